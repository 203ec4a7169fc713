"""Pictures as files: tensors to PIL, grids, films, and the metadata that says how a picture was made."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from . import __version__
from .checkpoints import atomic_path, from_json
from .sampling import Settings

KEY = "unmask"
"""Name of our PNG text entry."""


@dataclasses.dataclass(frozen=True)
class Made:
    """What made a picture. model, model_hash: name (never a path) and sha256 of the transformer's weights. label: the
    name of class `class_label`. known_tokens: it was drawn around given tokens, which are not kept here."""

    model: str
    model_hash: str
    seed: int
    settings: Settings
    prompt: str | None = None
    negative_prompt: str | None = None
    class_label: int | None = None
    label: str | None = None
    known_tokens: bool = False
    version: str = __version__

    def to_json(self) -> dict[str, Any]:
        """The record without what does not apply."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


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


def parameters_text(made: Made) -> str:
    """The `parameters` text that other programs read: prompt, negative prompt, then "Steps: ..., Seed: ..."."""
    s = made.settings
    lines = [made.prompt or made.label or f"class {made.class_label}"]
    if made.negative_prompt:
        lines.append(f"Negative prompt: {made.negative_prompt}")
    lines.append(f"Steps: {s.num_inference_steps}, Sampler: {s.order}, Schedule type: {s.schedule}, "
                 f"CFG scale: {s.guidance_scale}, Seed: {made.seed}, Model hash: {made.model_hash[:10]}, "
                 f"Model: {made.model}, Version: unmask {made.version}")
    return "\n".join(lines)


def save_png(image: Image.Image, path: Path, made: Sequence[Made] = ()) -> None:
    """Writes a PNG atomically; `made` (a record, or one for each cell of a grid) goes into its text."""
    info = PngInfo()
    if made:
        records = [record.to_json() for record in made]
        info.add_itxt(KEY, json.dumps(records if len(records) > 1 else records[0], ensure_ascii=False))
        info.add_itxt("parameters", parameters_text(made[0]))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_made(path: Path) -> list[Made]:
    """The records in a picture that :func:`save_png` wrote; FileNotFoundError, or ValueError where there are none."""
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(KEY)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from None
    if not text:
        raise ValueError(f"{path}: carries no record of how it was made (was it drawn by unmask, and not with "
                         f"--no-metadata?)")
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the record of how it was made is damaged ({error})") from None
    if not isinstance(records, list) or not records:
        records = [records]
    return [from_json(Made, record, path) for record in records]


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
        save_png(grid([frame[i] for i in range(len(steps[0])) for frame in steps], columns=len(steps)), path)
