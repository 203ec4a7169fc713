"""Pictures as files: tensors to PIL, grids, films, and the metadata that says how a picture was made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .checkpoints import atomic_path

KEY = "unmask"
"""Name of our PNG text entry."""


def to_pil(images: Tensor) -> list[Image.Image]:
    """images (B, 3, H, W) float in [-1, 1] (clamped) -> PIL pictures."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures of one size side by side on white, `columns` a row (about square by default)."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    w, h = images[0].size
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (w + gap), (i // columns) * (h + gap)))
    return sheet


def parameters_text(made: Mapping[str, Any]) -> str:
    """The `parameters` text that other programs read: prompt, negative prompt, then "Steps: ..., Seed: ...".
    """
    settings = made["settings"]
    lines = [str(made.get("prompt") or made.get("label") or "")]
    if made.get("negative_prompt"):
        lines.append(f"Negative prompt: {made['negative_prompt']}")
    lines.append(f"Steps: {settings['num_inference_steps']}, Sampler: {settings['order']}, "
                 f"Schedule type: {settings['schedule']}, CFG scale: {settings['guidance_scale']}, "
                 f"Seed: {made['seed']}, Model hash: {made['model_hash'][:10]}, Model: {made['model']}, "
                 f"Version: unmask {made['version']}")
    return "\n".join(lines)


def save_png(image: Image.Image, path: Path, made: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> None:
    """Writes a PNG atomically; `made` (one record, or one for each cell of a grid) goes into its text."""
    info = PngInfo()
    if made:
        info.add_itxt(KEY, json.dumps(made, ensure_ascii=False))
        info.add_itxt("parameters", parameters_text(made if isinstance(made, Mapping) else made[0]))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_made(path: Path) -> list[dict[str, Any]]:
    """The records in a picture that :func:`save_png` wrote; ValueError where there are none."""
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(KEY)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    try:
        made = json.loads(text) if text else None
        records = [made] if isinstance(made, dict) else made
        if not records or not all({"model", "seed", "settings"} <= r.keys() for r in records):
            raise TypeError
    except (TypeError, AttributeError, json.JSONDecodeError):
        raise ValueError(f"{path}: carries no record of how it was made (was it drawn by unmask, and not with "
                         f"--no-metadata?)") from None
    return records


def save_film(frames: Iterable[Sequence[Image.Image]], path: Path) -> None:
    """The steps of a drawing: a GIF (one frame a step, the last held) where `path` ends in .gif, else a PNG strip,
    a row for each image and a column for each step."""
    steps = [list(frame) for frame in frames]
    if path.suffix.lower() == ".gif":
        sheets = [grid(frame) for frame in steps]
        durations = [120] * (len(sheets) - 1) + [1500]
        with atomic_path(path) as temporary:
            sheets[0].save(temporary, format="GIF", save_all=True, append_images=sheets[1:], duration=durations, loop=0)
    else:
        save_png(grid([frame[i] for i in range(len(steps[0])) for frame in steps], columns=len(steps)), path, None)
