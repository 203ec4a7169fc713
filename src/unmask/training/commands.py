"""From files to a training run: what `train-tokenizer`, `tokenize` and `train` do."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoints import read_config
from ..data.images import ImageSource, load_rgba, open_images
from ..data.tokens import TokenDataset, write_tokens
from ..errors import unknown_name
from ..pipeline import load_tokenizer
from ..text import load_text_encoder
from .loop import RunConfig, train
from .presets import RECIPES, TOKENIZER_RECIPES
from .tokenizer import TokenizerTask, on_background
from .transformer import Conditioning, TransformerTask


def _override(run: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    return dataclasses.replace(run, **{k: v for k, v in overrides.items() if v is not None})


def _split(source: ImageSource, split: str) -> list[int]:
    """Pictures of a split; data without splits hold out every twentieth."""
    splits = [source.metadata(i).get("split") for i in range(len(source))]
    if any(splits):
        return [i for i, s in enumerate(splits) if s == split]
    held = split == "held-concept"
    return [i for i in range(len(splits)) if (i % 20 == 19) == held]


def run_train_tokenizer(data: Path, out: Path, preset: str, overrides: dict[str, Any], perceptual: float | None,
                        quiet: bool) -> Path:
    """Trains a tokenizer on the "train" pictures of a tar or folder; returns its folder."""
    if preset not in TOKENIZER_RECIPES:
        raise unknown_name("preset", preset, list(TOKENIZER_RECIPES))
    recipe = TOKENIZER_RECIPES[preset]()
    run = _override(recipe.run, overrides)
    objective = recipe.objective
    if perceptual is not None:
        objective = dataclasses.replace(objective, perceptual=perceptual)
    network = None
    if objective.perceptual:
        from ..evaluation.features import EfficientNetLite0

        network = EfficientNetLite0()
    source = open_images(data)
    pictures = {name: load_rgba(source, recipe.image_size, _split(source, name)) for name in ("train", "held-concept")}
    task = TokenizerTask(recipe.tokenizer, objective, run, pictures["train"], pictures["held-concept"], network)
    return train(task, run, out, quiet)


def run_tokenize(data: Path, tokenizer: Path, out: Path, flip: bool, quiet: bool) -> Path:
    """Encodes every picture, on white, to a token folder with the pictures' records."""
    config = read_config(tokenizer)
    network = load_tokenizer(tokenizer)
    size = int(config.get("image_size") or 256)
    source = open_images(data)
    side = size // network.config.downsample

    def batches() -> Iterator[tuple[Tensor, list[dict[str, Any]]]]:
        for start in range(0, len(source), 64):
            index = list(range(start, min(start + 64, len(source))))
            x = on_background(load_rgba(source, size, index), torch.ones(len(index), 3))
            variants = [x, x.flip(-1)] if flip else [x]
            yield (torch.stack([network.encode(v) for v in variants], dim=1),
                   [source.metadata(i) for i in index])

    with tqdm(total=len(source), unit="picture", disable=True if quiet else None) as bar:
        return write_tokens(out, batches(), (side, side), network.config.codebook_size,
                            {"tokenizer_sha256": config["sha256"]["tokenizer.safetensors"], "source": data.name},
                            bar.update)


def run_train(data: Path, tokenizer: Path, out: Path, preset: str, overrides: dict[str, Any], quiet: bool) -> Path:
    """Trains a transformer by a recipe; returns the pipeline folder."""
    if preset not in RECIPES:
        raise unknown_name("preset", preset, list(RECIPES))
    recipe = RECIPES[preset]()
    run = _override(recipe.run, overrides)
    tokens = TokenDataset(data)
    network = load_tokenizer(tokenizer)
    made_with = tokens.manifest.get("tokenizer_sha256")
    if made_with != read_config(tokenizer)["sha256"]["tokenizer.safetensors"]:
        raise ValueError(f"{data}: these tokens were made with another tokenizer than {tokenizer}")
    model = dataclasses.replace(recipe.transformer, grid=tokens.grid, codebook_size=tokens.codebook_size)
    names: tuple[str, ...] = ()
    if recipe.label_field:
        names = tuple(tokens.class_names(recipe.label_field))
        model = dataclasses.replace(model, classes=len(names))
    encoder = load_text_encoder(recipe.text_encoder) if recipe.text_encoder else None
    condition = Conditioning(recipe.label_field, names, encoder, recipe.text_encoder)
    task = TransformerTask(model, recipe.objective, run, tokens, condition, network, recipe.sampler)
    parameters = sum(p.numel() for p in task.model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {len(task.index)} pictures", file=sys.stderr)
    return train(task, run, out, quiet)
