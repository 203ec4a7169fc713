"""The command line. Heavy imports stand inside the commands, so that help is quick."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from .errors import UnknownName, UsageError

if TYPE_CHECKING:
    from .pipeline import Pipeline


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Turns the ValueErrors of argument checks into usage errors."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_out(path: Path, force: bool) -> None:
    """Refuses what would overwrite or cannot be written, before any work is done."""
    if path.is_file() and not force:
        raise UsageError(f"{path} exists: give another --out, or --force to overwrite it")
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder: make it first, or give another --out")
    probe = folder / f".unmask-{time.time_ns()}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to ({error.strerror}): give another --out") from None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "picture"


def _free_name(folder: Path, stem: str, suffix: str = ".png") -> Path:
    """`stem.png`, or the first of `stem-2.png`, `stem-3.png`, ... that does not exist."""
    number = 1
    while (path := folder / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}").exists():
        number += 1
    return path


def _draw(pipe: Pipeline, quiet: bool, film: Path | None, request: dict[str, Any]) -> tuple[Any, float]:
    from tqdm import tqdm

    from .pictures import save_film, to_pil

    frames: list[Any] = []
    bar = tqdm(total=request.get("stop_after") or request.get("num_inference_steps")
               or pipe.settings.num_inference_steps, unit="step", disable=True if quiet else None, leave=False)

    def after_step(step: Any) -> None:
        bar.update()
        if film:
            frames.append(step.preview)

    began = time.perf_counter()
    with usage(), bar:
        if film:
            output = pipe(callback_on_step_end=after_step, **request)
        else:  # without a film only the positions of each step are computed
            output = pipe(**request)
    seconds = time.perf_counter() - began
    if film:
        save_film((to_pil(pipe.decode(tokens)) for tokens in frames), film)
    return output, seconds


def _write(output: Any, names: list[str], out: Path, force: bool, metadata: bool) -> list[Path]:
    """One file for each picture where `out` is a folder, else one file: the picture, or a grid of them."""
    from .pictures import grid, save_png

    if out.is_dir():
        written = []
        for image, made, name in zip(output.images, output.made, names, strict=True):
            path = out / f"{_slug(name)}-{made['seed']}.png"
            path = path if force else _free_name(out, path.stem)
            save_png(image, path, made if metadata else None)
            written.append(path)
        return written
    image = output.images[0] if len(output.images) == 1 else grid(output.images)
    made = output.made[0] if len(output.made) == 1 else output.made
    save_png(image, out, made if metadata else None)
    return [out]


def _report(paths: list[Path], output: Any, seconds: float, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"files": [str(p) for p in paths], "seconds": round(seconds, 3), "images": output.made},
                         ensure_ascii=False))
    else:
        print(", ".join(map(str, paths)))


def generate(
    prompts: Positional[tuple[str, ...]] = (),
    /,
    out: Path | None = None,
    model: str = "emoji",
    labels: tuple[str, ...] = (),
    negative_prompt: str | None = None,
    num_images: int = 1,
    seed: int | None = None,
    steps: int | None = None,
    order: str | None = None,
    schedule: str | None = None,
    guidance_scale: str | None = None,
    temperature: str | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    r_temp: float | None = None,
    roll: bool | None = None,
    stop_after: int | None = None,
    film: Path | None = None,
    metadata: bool = True,
    force: bool = False,
    quiet: bool = False,
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Draw pictures from prompts or class labels.

    Args:
        prompts: What to draw, for example "red apple, noto style". Several give a grid.
        out: A file (several pictures become a grid), or a folder (one file each). By default a new file named after
            the prompt.
        model: An embedded model, a folder, a published name or a Hub repository: see `unmask models`.
        labels: Classes by name or number, for class models.
        negative_prompt: What guidance leads away from.
        num_images: Pictures for each prompt or label.
        seed: Picture i takes seed + i. Drawn at random by default, and written into the picture.
        steps: Model evaluations a picture.
        order: halton, random, raster, sobol or confidence.
        schedule: arccos, square, cosine, linear, root, or a power such as 3.
        guidance_scale: 1 is off. A number, a ramp over the steps (1:4) or an interval of them (3@0.2-0.8).
        temperature: Divides the logits: below 1 is safer. A number, a ramp or an interval.
        top_k: Draw among the k likeliest tokens; 0 is off.
        top_p: Draw among the likeliest tokens whose probability reaches p; 1 is off.
        r_temp: Noise of the confidence order.
        roll: Begin the order at an offset drawn from each picture's seed.
        stop_after: Stop after this many steps; what is left takes that step's draw.
        film: Also write the steps of the drawing: a .gif, or a .png strip.
        metadata: Write into the PNG what made it.
        force: Overwrite files.
        quiet: No progress.
        as_json: Print one JSON object.
    """
    from .sampling import parse_varying

    given = {"num_inference_steps": steps, "order": order, "schedule": schedule, "top_k": top_k, "top_p": top_p,
             "r_temp": r_temp, "roll": roll, "stop_after": stop_after}
    with usage():
        for name, text in (("guidance_scale", guidance_scale), ("temperature", temperature)):
            given[name] = parse_varying(text) if text is not None else None  # type: ignore[assignment]
        if not prompts and not labels:
            raise ValueError('nothing to draw: give a prompt, such as unmask generate "red apple, noto style", or '
                             '--labels with a class model')
    names = [*(prompts or labels)]
    if out is None:
        out = _free_name(Path.cwd(), _slug(names[0]))
    for path in (out, *([film] if film else [])):
        _check_out(path, force)
    from .pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model)
    request = {"prompt": list(prompts) or None, "class_labels": list(labels) or None,
               "negative_prompt": negative_prompt, "num_images_per_prompt": num_images, "seed": seed,
               **{k: v for k, v in given.items() if v is not None}}
    output, seconds = _draw(pipe, quiet, film, request)
    paths = _write(output, [n for n in names for _ in range(num_images)], out, force, metadata)
    _report(paths + ([film] if film else []), output, seconds, as_json)


def replay(
    picture: Positional[Path],
    /,
    out: Path | None = None,
    force: bool = False,
    quiet: bool = False,
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Draw again what a picture's metadata describes.

    Args:
        picture: A PNG that unmask drew.
        out: The new file; by default a new name beside the working folder's other pictures.
        force: Overwrite a file.
        quiet: No progress.
        as_json: Print one JSON object.
    """
    from .pictures import read_made
    from .pipeline import Pipeline, settings_from

    made = read_made(picture)
    out = out or _free_name(Path.cwd(), picture.stem)
    _check_out(out, force)
    pipe = Pipeline.from_pretrained(made[0]["model"])
    if pipe.model_hash != made[0].get("model_hash"):
        raise ValueError(f"{picture}: was drawn by another version of the model '{made[0]['model']}'")
    settings = settings_from(made[0]["settings"], picture)
    column = {k: [m[k] for m in made] if k in made[0] else None for k in ("prompt", "negative_prompt", "class_label")}
    request = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    output, seconds = _draw(pipe, quiet, None, {
        "prompt": column["prompt"], "negative_prompt": column["negative_prompt"],
        "class_labels": column["class_label"], "seed": [m["seed"] for m in made], **request})
    _report(_write(output, [picture.stem] * len(made), out, force, True), output, seconds, as_json)


def models(as_json: Annotated[bool, arg(name="json")] = False) -> None:
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
    source: Positional[str],
    /,
    out: Path,
    tokenizer: str | None = None,
    force: bool = False,
) -> None:
    """Convert a published checkpoint to a model folder.

    Args:
        source: A local .pth, .pt or .safetensors file, or hf-repo:file.
        out: The folder to write.
        tokenizer: The tokenizer's checkpoint, for a transformer: a local file or hf-repo:file.
        force: Replace the folder if it exists.
    """
    if out.exists() and not force:
        raise UsageError(f"{out} exists: give another --out, or --force to replace it")
    from .published import convert as convert_checkpoint

    convert_checkpoint(source, out, tokenizer)
    print(out)


@dataclasses.dataclass(frozen=True)
class EmojiArchive:
    """Build the emoji archive from its npm packages (needs the `emoji` extra and npm)."""

    out: Path
    """The archive to write (.tar or .tar.gz)."""
    packages: Path | None = None
    """A folder with the packages' tarballs; fetched with npm by default."""
    force: bool = False
    """Overwrite the archive."""


@dataclasses.dataclass(frozen=True)
class WordArchive:
    """Distil the embedded word vectors from a sentence encoder (needs the `words` extra)."""

    out: Path
    """The file to write."""
    force: bool = False
    """Overwrite it."""


def data(
    what: Annotated[EmojiArchive, subcommand("emoji")] | Annotated[WordArchive, subcommand("words")],
) -> None:
    """Build the data that travels with unmask: the emoji archive, the word vectors."""
    _check_out(what.out, what.force)
    if isinstance(what, EmojiArchive):
        from .data.emoji import build

        print(json.dumps(build(what.out, what.packages), indent=1), file=sys.stderr)
    else:
        from .training.words import distill

        distill(what.out)
    print(what.out)


def train_tokenizer(
    data: Path,
    out: Path,
    preset: str = "emoji",
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    checkpoint_every: int | None = None,
    sample_every: int | None = None,
    threads: int | None = None,
    perceptual: float | None = None,
    quiet: bool = False,
) -> None:
    """Train a tokenizer on pictures. The same command goes on where a run stopped.

    Args:
        data: A webdataset tar or a folder of pictures.
        out: Folder of the run; the tokenizer ends up in its `model`.
        preset: A recipe: emoji.
        steps: Optimiser steps.
        batch_size: Pictures a step.
        learning_rate: The peak.
        seed: Of weights, data order and augmentation.
        checkpoint_every: Steps between saved states.
        sample_every: Steps between sample grids.
        threads: CPU threads.
        perceptual: Weight of the perceptual loss; 0 needs no feature network.
        quiet: No progress.
    """
    from .training.commands import run_train_tokenizer

    with usage():
        print(run_train_tokenizer(data, out, preset, {
            "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
            "checkpoint_every": checkpoint_every, "sample_every": sample_every, "threads": threads}, perceptual, quiet))


def tokenize(data: Path, tokenizer: Path, out: Path, flip: bool = False, force: bool = False,
             quiet: bool = False) -> None:
    """Turn pictures into tokens for training.

    Args:
        data: A webdataset tar or a folder of pictures.
        tokenizer: A tokenizer folder.
        out: The token folder to write.
        flip: Also keep the tokens of every picture's mirror image.
        force: Replace the folder if it exists.
        quiet: No progress.
    """
    if out.exists() and not force:
        raise UsageError(f"{out} exists: give another --out, or --force to replace it")
    from .training.commands import run_tokenize

    print(run_tokenize(data, tokenizer, out, flip, quiet))


def train(
    data: Path,
    tokenizer: Path,
    out: Path,
    preset: str = "emoji",
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    checkpoint_every: int | None = None,
    sample_every: int | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> None:
    """Train a transformer on tokens. The same command goes on where a run stopped.

    Args:
        data: A token folder that `unmask tokenize` wrote.
        tokenizer: The tokenizer folder the tokens were made with.
        out: Folder of the run; the pipeline ends up in its `model`.
        preset: A recipe: emoji, emoji-class, paper-class, paper-text.
        steps: Optimiser steps.
        batch_size: Pictures a step.
        learning_rate: The peak.
        seed: Of weights, data order and masks.
        checkpoint_every: Steps between saved states.
        sample_every: Steps between sample grids.
        threads: CPU threads.
        quiet: No progress.
    """
    from .training.commands import run_train

    with usage():
        print(run_train(data, tokenizer, out, preset, {
            "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
            "checkpoint_every": checkpoint_every, "sample_every": sample_every, "threads": threads}, quiet))


COMMANDS = {
    "generate": generate,
    "replay": replay,
    "models": models,
    "convert": convert,
    "data": data,
    "train-tokenizer": train_tokenizer,
    "tokenize": tokenize,
    "train": train,
}


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(143)


def main() -> None:
    """Entry point: exit code 0 done, 1 failed, 2 usage, 130 interrupted, 143 terminated."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="unmask", description="Masked generative image "
                                             "transformers: draw, train, measure.",
                                             config=(OmitArgPrefixes, OmitSubcommandPrefixes))
    except KeyboardInterrupt:
        print("unmask: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (UsageError, UnknownName) as error:
        print(f"unmask: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        print(f"unmask: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
