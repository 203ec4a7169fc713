"""The commands that draw, and those that bring models to hand."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ..errors import UsageError
from .options import (
    File,
    Flag,
    Json,
    Number,
    Real,
    Text,
    Texts,
    check_file,
    check_new,
    check_picture,
    free_name,
    slug,
    usage,
)

if TYPE_CHECKING:
    from ..pictures import Made
    from ..pipeline import Output, Pipeline
    from ..sampling import Step


def _draw(pipe: Pipeline, quiet: bool, film: Path | None, request: dict[str, Any]) -> tuple[Output, float]:
    """Draws with a progress bar; a film takes the preview of every step, which costs time."""
    from tqdm import tqdm

    from ..pictures import save_film, to_pil

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
    from ..pictures import grid, save_png

    if not out.is_dir():
        save_png(grid(output.images), out, output.made if metadata else ())
        return [out]
    written = []
    for image, made, name in zip(output.images, output.made, names, strict=True):
        stem = f"{slug(name)}-{made.seed}"
        written.append(out / f"{stem}.png" if force else free_name(out, stem))
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
    from ..sampling import parse_varying

    with usage():
        varying = {name: parse_varying(text) for name, text in
                   (("guidance_scale", guidance_scale), ("temperature", temperature)) if text is not None}
        if not prompts and not labels:
            raise ValueError('nothing to draw: give a prompt, such as unmask generate "red apple, noto style", or '
                             '--labels with a class model')
    names = prompts or labels
    out = out or free_name(Path(), slug(names[0]))
    check_picture(out, force)
    if film:
        check_file(film, (".gif", ".png"), force)
        if film.resolve() == out.resolve():
            raise UsageError(f"--out and --film are both {film}")
    from ..pipeline import Pipeline

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
    from ..pictures import read_made
    from ..pipeline import Pipeline

    made = read_made(picture)
    out = out or free_name(Path(), picture.stem)
    check_picture(out, force)
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
    from ..published import catalogue

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
    heads: Number = None,
    force: Flag = False,
) -> None:
    """Convert a published checkpoint to a model folder.

    Args:
        source: A local .pth, .pt or .safetensors file, or hf-repo:file.
        out: The folder to write.
        tokenizer: The tokenizer's checkpoint, for a transformer: a local file or hf-repo:file.
        heads: Attention heads, where the width is none of the published ones: shapes do not tell them.
        force: Replace the folder if it exists.
    """
    check_new(out, force)
    from ..published import convert as convert_checkpoint
    from ..published import to_terminal

    convert_checkpoint(source, out, tokenizer, heads=heads, report=to_terminal)
    print(out)
