"""From files to a training run: what `train-tokenizer`, `tokenize` and `train` do."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoints import field, from_json, read_config, read_json, write_json
from ..data.images import ImageSource, load_rgba, open_images
from ..data.tokens import TokenDataset, write_tokens
from ..errors import UsageError, unknown_name
from ..pipeline import Pipeline, load_tokenizer
from ..text import load_text_encoder
from ..tokenizers.vqgan import VQGAN
from .loop import train
from .presets import Recipe, TokenizerRecipe
from .tokenizer import TokenizerTask, on_background
from .transformer import Conditioning, TransformerTask

R = TypeVar("R", Recipe, TokenizerRecipe)


def choose_recipe(presets: Mapping[str, Callable[[], R]], preset: str, file: Path | None,
                  changes: Mapping[str, Mapping[str, Any]]) -> R:
    """The recipe of a preset, changed by a JSON file that names some of its fields (such as
    {"transformer": {"width": 128}, "label_field": "class"}) and by `changes`, {section: {field: value, or None}}."""
    if preset not in presets:
        raise unknown_name("preset", preset, list(presets))
    recipe = presets[preset]()
    values: dict[str, Any] = dataclasses.asdict(recipe)
    given = read_json(file) if file else {}
    if not isinstance(given, dict):
        raise ValueError(f"{file}: a recipe is a JSON object")
    for layer in (given, {name: {k: v for k, v in part.items() if v is not None} for name, part in changes.items()}):
        for name, value in layer.items():
            both = isinstance(value, dict) and isinstance(values.get(name), dict)
            values[name] = {**values[name], **value} if both else value
    return from_json(type(recipe), values, file or f"preset {preset}")


def splits(source: ImageSource) -> list[str]:
    """The split of every picture; data that name none hold out every twentieth, as "held-concept"."""
    own = [source.metadata(i).get("split") for i in range(len(source))]
    if any(own):
        return [str(split) for split in own]
    if len(own) < 2:
        raise UsageError(f"{source.path}: training takes two pictures or more, one to hold out")
    held = min(20, len(own))
    return ["held-concept" if i % held == held - 1 else "train" for i in range(len(own))]


def _run(task: TokenizerTask | TransformerTask, recipe: Recipe | TokenizerRecipe, out: Path, quiet: bool) -> Path:
    """Trains, leaving the whole recipe beside the state, ready for --recipe."""
    path = out / "recipe.json"
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: --out is a folder")
    if not (out / "state.safetensors").exists():
        content = json.loads(json.dumps(dataclasses.asdict(recipe)))
        if path.exists() and read_json(path) != content:
            raise UsageError(f"{path} exists and is another recipe than this run's: give another --out")
        if not path.exists() and (out / "model").exists():
            raise UsageError(f"{out / 'model'} exists, of no run that could go on: give another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    if not quiet:
        parameters = sum(p.numel() for p in task.model.parameters())
        print(f"{parameters / 1e6:.1f} M parameters, {task.describe()['pictures']} pictures", file=sys.stderr)
    return train(task, recipe.run, out, quiet)


def run_train_tokenizer(data: Path, out: Path, recipe: TokenizerRecipe, quiet: bool, start: Path | None = None) -> Path:
    """Trains a tokenizer on the "train" pictures of a tar or folder, from the weights in the folder `start` where it is
    given, whose shape then replaces the recipe's; returns its folder."""
    if recipe.objective.decoder_only and start is None:
        raise UsageError("the recipe trains the decoder of a tokenizer only: give that tokenizer's folder as --start")
    begin = load_tokenizer(start) if start else None
    recipe = dataclasses.replace(recipe, tokenizer=begin.config) if begin else recipe
    source = open_images(data)
    network = None
    if recipe.objective.perceptual:
        from ..evaluation.features import EfficientNetLite0

        network = EfficientNetLite0()
    split = splits(source)
    pictures = {name: load_rgba(source, recipe.image_size, [i for i, own in enumerate(split) if own == name])
                for name in ("train", "held-concept")}
    for name, part in pictures.items():
        if not len(part):
            raise UsageError(f"{data}: no picture has the split '{name}'")
    task = TokenizerTask(recipe.tokenizer, recipe.objective, recipe.run, pictures["train"], pictures["held-concept"],
                         network, begin)
    return _run(task, recipe, out, quiet)


def run_tokenize(data: Path, tokenizer: Path, out: Path, flip: bool, quiet: bool) -> Path:
    """Encodes every picture, on white, to a token folder with the pictures' records and splits."""
    config = read_config(tokenizer)
    network = load_tokenizer(tokenizer)
    size = field(config, "image_size", tokenizer / "config.json")
    if type(size) is not int or size < 1 or size % network.config.downsample:
        raise ValueError(f"{tokenizer / 'config.json'}: the field 'image_size' must be a multiple of the "
                         f"{network.config.downsample} pixels of a token, got {size!r}")
    source = open_images(data)
    split = splits(source)
    side = size // network.config.downsample

    def batches() -> Iterator[tuple[Tensor, list[dict[str, Any]]]]:
        for start in range(0, len(source), 64):
            index = list(range(start, min(start + 64, len(source))))
            x = on_background(load_rgba(source, size, index), torch.ones(len(index), 3))
            variants = [x, x.flip(-1)] if flip else [x]
            yield (torch.stack([network.encode(v) for v in variants], dim=1),
                   [{**source.metadata(i), "split": split[i]} for i in index])

    with tqdm(total=len(source), unit="picture", disable=True if quiet else None) as bar:
        return write_tokens(out, batches(), (side, side), network.config.codebook_size,
                            {"tokenizer_sha256": config["sha256"]["tokenizer.safetensors"], "source": data.name},
                            bar.update)


def _conditioning(recipe: Recipe, data: TokenDataset) -> Conditioning:
    if recipe.label_field:
        names, labels = data.classes(recipe.label_field)
        return Conditioning(tuple(names), labels)
    data.column("caption")
    assert recipe.text_encoder is not None
    return Conditioning(text_encoder=load_text_encoder(recipe.text_encoder), text_encoder_name=recipe.text_encoder)


def _shape(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))


def _same_codes(a: VQGAN, b: VQGAN) -> bool:
    """Whether a token means the same to both: their decoders may differ."""
    return torch.equal(a.quantize.codebook, b.quantize.codebook)


def run_train(data: Path, tokenizer: Path, out: Path, recipe: Recipe, quiet: bool, start: str | None = None) -> Path:
    """Trains a transformer by a recipe, from the weights of the pipeline `start` (a folder or a name) where it is
    given, whose shape, text encoder and classes then replace the recipe's; returns the pipeline folder."""
    tokens = TokenDataset(data)
    begin = Pipeline.from_pretrained(start, dtype=torch.float32) if start else None
    if begin:
        shape = begin.transformer.config
        if shape.condition != recipe.transformer.condition:
            raise UsageError(f"{start} is a {shape.condition} model, the recipe is for a "
                             f"{recipe.transformer.condition} model: give another --start or --preset")
        recipe = dataclasses.replace(recipe, transformer=shape, text_encoder=begin.config.get("text_encoder"),
                                     codebook_start=False)
    network = load_tokenizer(tokenizer)
    if tokens.manifest.tokenizer_sha256 != read_config(tokenizer)["sha256"]["tokenizer.safetensors"]:
        raise UsageError(f"{data}: these tokens were made with another tokenizer than {tokenizer}")
    if begin and not _same_codes(begin.tokenizer, network):
        raise UsageError(f"{start} reads the tokens of another tokenizer than {tokenizer}: tokenize with its own, or "
                         "train without --start")
    tokens.verify()
    condition = _conditioning(recipe, tokens)
    if begin and list(condition.class_names) != (begin.class_names or []):
        raise UsageError(f"{data}: its classes are not those of {start}: train without --start")
    if begin and begin.transformer.config.grid != tuple(tokens.grid):
        raise UsageError(f"{data}: {_shape(tokens.grid)} tokens a picture, and {start} draws "
                         f"{_shape(begin.transformer.config.grid)}: train without --start")
    model = dataclasses.replace(recipe.transformer, grid=tokens.grid, codebook_size=tokens.codebook_size,
                                classes=len(condition.class_names))
    steps = min(recipe.sampler.num_inference_steps, model.tokens)
    sampler = dataclasses.replace(recipe.sampler, num_inference_steps=steps)
    task = TransformerTask(model, recipe.objective, recipe.run, tokens, condition, network, sampler,
                           start=begin.transformer if begin else None)
    if recipe.codebook_start:
        task.start_from_codebook()
    return _run(task, recipe, out, quiet)
