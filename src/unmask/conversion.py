"""Published checkpoints to our model folders: weights, configuration, default settings, model card."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from .checkpoints import atomic_folder, field, from_json, read_config, read_weights, sha256, write_model
from .hub import download, split_source
from .layouts import infer_config, read_checkpoint, to_ours
from .models.presets import TRANSFORMERS
from .models.transformer import TransformerConfig
from .tokenizers.vqgan import VQConfig

SAMPLER_PRESETS: dict[str, dict[str, Any]] = {
    "published": {"num_inference_steps": 32, "schedule": "arccos", "order": "halton", "roll": True,
                  "temperature": {"start": 1.0, "end": 1 / 1.2, "curve": "harmonic"}},
    "paper": {"num_inference_steps": 32, "schedule": "square", "order": "halton", "roll": True,
              "temperature": {"start": 1.0, "end": 1 / 1.2, "curve": "harmonic"}},
}
"""Sampler settings by name: what the public code runs with (its temperature multiplier rises 1 -> 1.2), and
the same with the paper's schedule (Table 4). The guidance scale is each model's own."""

GUIDANCE_SCALES = {"class-t-256": 2.5, "class-s-256": 2.0, "class-b-256": 1.7,
                   "class-s-384": 2.0, "class-b-384": 1.7, "class-l-384": 1.5}
"""Guidance scale of each published model, by its network's name: w of the public code's README, plus 1."""

C2I_TOKENIZER = "FoundationVision/LlamaGen:vq_ds16_c2i.pt"
T2I_TOKENIZER = "peizesun/llamagen_t2i:vq_ds16_t2i.pt"
LICENCES = {"llvictorll/Halton-MaskGIT": "mit", "FoundationVision/LlamaGen": "mit",
            "peizesun/llamagen_t2i": "mit"}
"""Licences of the published repositories, as the README of each project states it."""

Report = Callable[[str], None]
"""Takes one line about what is being done."""


def imagenet_classes() -> list[str]:
    """ImageNet's thousand class names in label order; two of one name are told apart by a longer synonym."""
    return (files("unmask") / "models" / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()


def sampler_defaults(config: TransformerConfig) -> dict[str, Any]:
    """The sampler settings a converted model carries: the published ones, or the paper's for patches of 2
    (the networks of Table 2). Where no guidance scale is published it is 2, the middle of those that are."""
    scales = {TRANSFORMERS[network](): scale for network, scale in GUIDANCE_SCALES.items()}
    preset = SAMPLER_PRESETS["paper" if config.patch > 1 else "published"]
    return {**preset, "guidance_scale": scales.get(config, 2.0)}


def convert(source: str | Path, out: str | Path, tokenizer: str | Path | None = None, *,
            heads: int | None = None, image_size: int | None = None, class_names: list[str] | None = None,
            text_encoder: str | None = None, sampler: Mapping[str, Any] | None = None,
            licence: str | None = None, report: Report | None = None) -> Path:
    """Converts a published checkpoint to a model folder, which takes the place of `out`.

    Parameters
    ----------
    source : str or Path
        A local .pth, .pt or .safetensors file, or "hf-repo:file". A transformer gives a pipeline folder, a
        tokenizer a tokenizer folder.
    tokenizer : str or Path, optional
        The tokenizer of a transformer: as `source`, or a tokenizer folder of ours. By default the published
        one for 16 pixels a token: the class models', or the text models'.
    heads : int, optional
        Attention heads, where the width is none of the published ones.
    image_size : int, optional
        Pixels a side that the pair must give; checked.
    class_names : list of str, optional
        By default ImageNet's, for a thousand classes.
    text_encoder : str, optional
        By default "google/flan-t5-xl", for text vectors of 2,048.
    sampler : mapping, optional
        Default settings, the fields of sampling.Settings; by default those of `sampler_defaults`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError, FileNotFoundError
        One line naming the file: see `layouts.read_checkpoint`, `infer_config` and `to_ours`; a tokenizer
        whose codes or size do not fit.
    OSError
        The disk is full, or a file could not be fetched. Nothing is left of `out`, or what was there before.
    UsageError
        `out` is there and is no model folder.
    """
    out, say = Path(out), report or (lambda line: None)
    path = _locate(source, say)
    weights = read_checkpoint(path)
    config = infer_config(weights, path, heads)
    say(f"converting {path.name}")
    if isinstance(config, VQConfig):
        with _full_disk(out), atomic_folder(out) as folder:
            _write_tokenizer(folder, config, to_ours(weights, config, path),
                             image_size or 16 * config.downsample, _origin(source, path))
        return out
    default = C2I_TOKENIZER if config.condition == "class" else T2I_TOKENIZER
    codes = _open_tokenizer(tokenizer or default, say)
    size = _check_fit(config, codes, image_size)
    if class_names is not None and len(class_names) != config.classes:
        raise ValueError(f"{path}: {len(class_names)} class names for {config.classes} classes")
    if class_names is None and config.classes == 1000:
        class_names = imagenet_classes()
    if text_encoder is None and config.text_dim == 2048:
        text_encoder = "google/flan-t5-xl"
    written = {"kind": "pipeline", "transformer": dataclasses.asdict(config), "text_encoder": text_encoder,
               "class_names": class_names, "sampler": dict(sampler or sampler_defaults(config)),
               **_origin(source, path)}
    if licence is not None:
        written["licence"] = licence
    with _full_disk(out), atomic_folder(out) as folder:
        ours = to_ours(weights, config, path)
        _check_room(folder, ours)
        write_model(folder, {"transformer": ours}, written, {"README.md": _card(out.name, written, size)})
        del ours, weights  # before the tokenizer's are read
        _write_tokenizer(folder / "tokenizer", codes.config, codes.read(), size, codes.origin)
    return out


def _locate(source: str | Path, say: Report) -> Path:
    """A local file, or one of the Hub."""
    place = split_source(source)
    if place is None:
        return Path(source)
    say(f"fetching {place[1]} of {place[0]}")
    return download(*place)


def _origin(source: str | Path, path: Path) -> dict[str, Any]:
    """What config.json says of where weights came from: a name, never a path."""
    place = split_source(source)
    return {"source": {"file": str(source) if place else path.name, "sha256": sha256(path)},
            "licence": LICENCES.get(place[0]) if place else None}


class _Tokenizer(NamedTuple):
    """A tokenizer whose weights are not read yet. place: for error lines. origin: see `_origin`."""

    config: VQConfig
    place: Path
    origin: dict[str, Any]
    read: Callable[[], dict[str, Tensor]]


def _open_tokenizer(source: str | Path, say: Report) -> _Tokenizer:
    """A foreign tokenizer file, or a tokenizer folder of ours."""
    folder = Path(source)
    if folder.is_dir():
        folder = folder if (folder / "tokenizer.safetensors").exists() else folder / "tokenizer"
        stored, place = read_config(folder), folder / "config.json"
        origin = {key: stored.get(key) for key in ("source", "licence")}
        return _Tokenizer(from_json(VQConfig, field(stored, "tokenizer", place), place), folder, origin,
                          lambda: read_weights(folder, "tokenizer", stored))
    path = _locate(source, say)
    weights = read_checkpoint(path)
    config = infer_config(weights, path)
    if not isinstance(config, VQConfig):
        raise ValueError(f"{path}: is a transformer, not a tokenizer")
    return _Tokenizer(config, path, _origin(source, path), lambda: to_ours(weights, config, path))


def _write_tokenizer(folder: Path, config: VQConfig, tensors: Mapping[str, Tensor], image_size: int,
                     origin: Mapping[str, Any]) -> None:
    write_model(folder, {"tokenizer": tensors}, {"kind": "tokenizer", "tokenizer": dataclasses.asdict(config),
                                                 "image_size": image_size, **origin})


def _check_fit(config: TransformerConfig, codes: _Tokenizer, image_size: int | None) -> int:
    """Pixels a side of the pair, or a ValueError where the two do not belong together."""
    mend = "give the tokenizer that the transformer was trained with"
    if codes.config.codebook_size != config.codebook_size:
        raise ValueError(f"{codes.place}: the tokenizer has {codes.config.codebook_size} codes, the "
                         f"transformer {config.codebook_size}: {mend}")
    size = config.grid[0] * codes.config.downsample
    if image_size is not None and size != image_size:
        raise ValueError(f"{codes.place}: {codes.config.downsample} pixels a token on a grid of "
                         f"{config.grid[0]}x{config.grid[1]} give {size} pixels, not {image_size}: {mend}")
    return size


def _check_room(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


@contextlib.contextmanager
def _full_disk(out: Path) -> Iterator[None]:
    """One line for a disk that fills up while `out` is written; safetensors raises an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
            raise OSError(f"{out}: the disk is full, nothing was written: make room, or choose another place "
                          f"({getattr(error, 'strerror', None) or error})") from None
        raise


def _card(name: str, config: Mapping[str, Any], size: int) -> str:
    """The model card of a converted model."""
    shape, source = config["transformer"], config["source"]
    licence = config["licence"] or "unknown"
    settings = "\n".join(f"| {key} | {value} |" for key, value in config["sampler"].items())
    draw = "class_labels=[207]" if shape["condition"] == "class" else 'prompt="a red fox in the snow"'
    return f"""---
library_name: unmask
license: {licence}
pipeline_tag: {"unconditional-image-generation" if shape["condition"] == "class" else "text-to-image"}
---

# {name}

A masked generative image transformer, converted from `{source["file"]}` (sha256 `{source["sha256"]}`).

| | |
|---|---|
| condition | {shape["condition"]} |
| picture | {size}x{size} pixels, {shape["grid"][0]}x{shape["grid"][1]} tokens of {shape["codebook_size"]} |
| width, depth, heads | {shape["width"]}, {shape["depth"]}, {shape["heads"]} |
{settings}

    from unmask import Pipeline

    Pipeline.from_pretrained("{name}")({draw}).images[0].save("picture.png")

Source: Besnier et al., "Halton Scheduler for Masked Generative Image Transformer", ICLR 2025. Licence of the
weights, as their source states it: {licence}.
"""
