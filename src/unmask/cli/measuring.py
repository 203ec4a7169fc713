"""The commands that measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..evaluation.studies import STUDIES
from .options import Decimals, File, Flag, Json, Names, Numbers, Reals, Text


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
    r_temps: Decimals = (),
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
        r_temps: Noise of the confidence order.
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
    from ..evaluation.evaluate import run_evaluate

    axes = {"steps": steps, "orders": orders, "schedules": schedules, "guidance_scales": guidance_scales,
            "temperatures": temperatures, "r_temps": r_temps}
    report, page = run_evaluate(model, reference, out, images, seed, axes, extractor, extractor_weights, split,
                                label_field, resize, batch_size, allow_few, force, quiet)
    if report is not None:
        print(json.dumps(report, ensure_ascii=False) if as_json else page)


def study(what: STUDIES) -> None:
    """Run a study: a table or a figure of the paper, or what an order does. Writes pictures, JSON and a page."""
    what.run()
    print(what.out)
