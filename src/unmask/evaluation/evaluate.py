"""How good a model is: pictures drawn under one or several sampler settings, measured against a reference.

`open_reference` says what to draw and what to compare with, `evaluate` draws, measures and writes the report.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..checkpoints import FORMAT_VERSION, atomic_path, read_json, write_json
from ..data.images import ImageSource, composite, open_images, to_rgba
from ..data.prompts import prompt
from ..errors import UsageError
from ..pictures import Made, grid, save_png, to_pil
from ..pipeline import Pipeline
from ..sampling import Settings, parse_varying, value_at
from ..schedules import Schedule, reveal_counts
from .features import Extractor, tensors_hash
from .gather import CHUNK, Gathered, PictureSet, collect, fingerprint, gather, processes
from .metrics import (
    Statistics,
    clip_score,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from .report import draw_curves, markdown
from .retrieval import to_uint8

STATISTICS = (".safetensors", ".npz", ".pt", ".pth")
GRID = 64
"""Pictures of a sample grid."""

# --------------------------------------------------------------------------------------------------
# What to draw, what to compare with


@dataclasses.dataclass(frozen=True)
class Reference:
    """What generated pictures are compared with.

    name: of the file or folder. conditions: class labels or prompts to draw; picture i takes entry i modulo their
    number. pictures: the real ones, or None where only their statistics are known. statistics: those, or None where
    they come from the pictures. field: the records' field that the labels come from. split: the one taken.
    """

    name: str
    conditions: Sequence[int] | Sequence[str]
    pictures: PictureSet | None = None
    statistics: Statistics | None = None
    field: str | None = None
    split: str | None = None


def image_size(pipe: Pipeline) -> int:
    """Side in pixels of the pictures a pipeline draws; UsageError where they are not square."""
    h, w = pipe.transformer.config.grid
    if h != w:
        raise UsageError(f"{pipe.name}: draws pictures of {h}x{w} tokens; reference pictures are made square: give a "
                         f"statistics file")
    return h * pipe.tokenizer.config.downsample


def open_reference(path: Path, pipe: Pipeline, extractor: Extractor, split: str | None = None,
                   label_field: str | None = None, resize: bool = False) -> Reference:
    """The reference in a picture archive or folder, or in a statistics file.

    Records are taken in a fixed shuffled order: as many pictures as the reference has are drawn with exactly its class
    labels, or its prompts, and fewer with a random part of them. A statistics file names no labels: the classes
    take turns.

    split: take only the records whose "split" is this. label_field: the records' field with the class (index or name);
    None takes the first whose every value is a class of the model. resize: allow pictures of different sizes, each
    cropped to a square and scaled.

    Raises FileNotFoundError, UsageError or ValueError in one line: nothing there, another extractor's statistics,
    records without captions or classes.
    """
    condition = pipe.transformer.config.condition
    if path.suffix in STATISTICS and not path.is_dir():
        statistics = Statistics.load(path, extractor)
        for given, name in ((split, "--split"), (label_field, "--label-field")):
            if given is not None:
                raise UsageError(f"{path}: {name} picks from records, and a statistics file has none")
        if condition == "text":
            raise UsageError(f"{path}: a statistics file holds no prompts to draw: give an archive with captions")
        return Reference(path.name, range(pipe.transformer.config.classes), statistics=statistics)
    source = open_images(path)
    records = [source.metadata(i) for i in range(len(source))]
    chosen = [i for i, record in enumerate(records) if split is None or record.get("split") == split]
    if not chosen:
        known = sorted({str(record["split"]) for record in records if "split" in record})
        raise UsageError(f"{path}: no picture has the split '{split}': there are {', '.join(known) or 'no splits'}")
    shuffled = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).tolist()
    order = [chosen[i] for i in shuffled]
    pictures = _real_pictures(source, order, records, image_size(pipe), resize)
    if condition == "text":
        without = next((r["key"] for r in records if "caption" not in r), None)
        if without is not None:
            raise UsageError(f"{path}: the picture '{without}' has no caption: a text model is measured on captions")
        return Reference(path.name, [prompt(records[i]) for i in order], pictures, split=split)
    field = label_field or _label_field(pipe, records, path)
    labels = [_label(pipe, records[i], field, path) for i in order]
    return Reference(path.name, labels, pictures, field=field, split=split)


def _label(pipe: Pipeline, record: dict[str, Any], field: str, path: Path) -> int:
    value = record.get(field)
    if type(value) not in (int, str):
        raise UsageError(f"{path}: the picture '{record['key']}' has no class in the field '{field}'")
    return pipe.label(value)  # type: ignore[arg-type]


def _label_field(pipe: Pipeline, records: Sequence[dict[str, Any]], path: Path) -> str:
    names = set(pipe.class_names or ())
    for field in records[0]:
        if {r[field] if isinstance(r.get(field), str) else None for r in records} <= names:
            return field
    if all(type(r.get("label")) is int and 0 <= r["label"] < pipe.transformer.config.classes for r in records):
        return "label"
    raise UsageError(f"{path}: no field of its records names only classes of {pipe.name}: give --label-field, one of "
                     f"{', '.join(records[0])}")


def _real_pictures(source: ImageSource, order: Sequence[int], records: Sequence[dict[str, Any]], size: int,
                   resize: bool) -> PictureSet:
    """The reference's pictures on white, at the model's size."""
    first = source[order[0]][0].size

    def draw(numbers: range) -> Tensor:
        images = []
        for i in numbers:
            image = source[order[i]][0]
            if image.size != first and not resize:
                raise ValueError(
                    f"{source.path}: pictures of different sizes ({records[order[0]]['key']} is {first[0]}x{first[1]}, "
                    f"{records[order[i]]['key']} {image.width}x{image.height} pixels): --resize crops and scales each")
            images.append(to_rgba(image, size))
        return composite(torch.stack(images))

    changed = source.path.stat()
    identity = {"size": size, "order": fingerprint(list(order)), "records": fingerprint(records),
                "file": [changed.st_size, changed.st_mtime_ns]}
    return PictureSet("reference", identity, len(order), draw)


# --------------------------------------------------------------------------------------------------
# Settings


def sweep(base: Settings, steps: Sequence[int] = (), orders: Sequence[str] = (), schedules: Sequence[Schedule] = (),
          guidance_scales: Sequence[str] = (), temperatures: Sequence[str] = (),
          r_temps: Sequence[float] = ()) -> list[Settings]:
    """Every combination of the values given, over `base` for what is not; scales and temperatures as on the command
    line ("3", "1:4", "3@0.2-0.8"). Raises UsageError for values out of range or given twice."""
    axes: dict[str, Sequence[Any]] = {"num_inference_steps": steps, "order": orders, "schedule": schedules,
                                      "r_temp": r_temps}
    try:
        axes["guidance_scale"] = [parse_varying(text) for text in guidance_scales]
        axes["temperature"] = [parse_varying(text) for text in temperatures]
    except ValueError as error:
        raise UsageError(str(error)) from None
    axes = {name: values for name, values in axes.items() if values}
    for name, values in axes.items():
        if len(set(values)) < len(values):
            raise UsageError(f"{name}: a value is given twice")
    try:
        return [dataclasses.replace(base, **dict(zip(axes, values, strict=True)))
                for values in itertools.product(*axes.values())]
    except ValueError as error:
        raise UsageError(str(error)) from None


def evaluations(settings: Settings) -> int:
    """Model evaluations an image (NFE): one a step, two where guidance is on."""
    steps = settings.num_inference_steps
    return sum(1 + (value_at(settings.guidance_scale, i, steps) != 1) for i in range(settings.stop_after or steps))


# --------------------------------------------------------------------------------------------------
# Drawing and measuring


def drawn(pipe: Pipeline, settings: Settings, reference: Reference, count: int, seed: int, out: Path,
           batch_size: int) -> PictureSet:
    """The model's pictures under `settings`; picture i takes seed + i. The first ones go to a sample grid."""
    config = pipe.transformer.config
    key = "class_labels" if config.condition == "class" else "prompt"
    identity = {"model": pipe.model_hash, "tokenizer": tensors_hash(pipe.tokenizer.state_dict()),
                "text_encoder": pipe.config.get("text_encoder"), "settings": dataclasses.asdict(settings),
                "conditions": fingerprint(list(reference.conditions)), "seed": seed,
                "device": pipe.device.type, "batch_size": batch_size}  # both decide how sums are rounded
    name = f"{settings.order}-{settings.num_inference_steps}"
    pipe = copy.copy(pipe)
    pipe.settings, pipe.batch_invariant = settings, False
    picture_grid = out / f"samples-{name}-{fingerprint(identity)}.png"
    size = min(GRID, CHUNK, count)

    def draw(numbers: range) -> Tensor:
        conditions = [reference.conditions[i % len(reference.conditions)] for i in numbers]
        request: dict[str, Any] = {key: conditions, "seed": [seed + i for i in numbers]}
        output = pipe(**request, output_type="pt")
        if numbers.start < size:
            first.extend(zip(to_pil(output.images), output.made, strict=True))
            if len(first) >= size:
                save_png(grid([image for image, _ in first[:size]]), picture_grid, [made for _, made in first[:size]])
        return to_uint8(output.images)

    first: list[tuple[Any, Made]] = []
    return PictureSet(name, identity, count, draw)


def figures(reference: Reference, real: Gathered | None, fake: Gathered, extractor: Extractor,
            allow_few: bool = False) -> dict[str, float]:
    """Every figure that the extractor and the number of pictures allow; estimates have a second entry, "..._std".

    KID takes subsets of 1,000 pictures, or all where there are fewer. Without the reference's pictures only FID and
    Inception Score are known. Raises ValueError as the measures do.
    """
    statistics = reference.statistics or (real.statistics if real else None)
    assert statistics is not None
    found: dict[str, float] = {"fid": frechet_distance(statistics, fake.statistics, allow_few)}
    if fake.probabilities is not None and len(fake.probabilities) >= 10:
        found["inception_score"], found["inception_score_std"] = inception_score(fake.probabilities)
    if real is not None:
        least = min(len(real.features), len(fake.features))
        found["kid"], found["kid_std"] = kernel_distance(real.features, fake.features, subset_size=min(1000, least))
        if least > 3:
            found["precision"], found["recall"] = precision_recall(real.features, fake.features)
        if least > 5:
            found["density"], found["coverage"] = density_coverage(real.features, fake.features)
    text = getattr(extractor, "text", None)
    if text is not None and isinstance(reference.conditions[0], str):
        conditions = [str(reference.conditions[i % len(reference.conditions)]) for i in range(len(fake.features))]
        parts = [text(conditions[i : i + 64]).cpu() for i in range(0, len(conditions), 64)]
        found["clip_score"] = clip_score(fake.features, torch.cat(parts))
    return found


def _check(pipe: Pipeline, points: Sequence[Settings], reference: Reference, extractor: Extractor, images: int,
           batch_size: int, allow_few: bool) -> None:
    """Says what cannot work before any work is done."""
    for point in points:
        try:
            reveal_counts(point.schedule, pipe.transformer.config.tokens, point.num_inference_steps)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {batch_size}")
    if images < 2:
        raise UsageError(f"a distance between sets needs at least 2 pictures, asked for are {images}")
    source = reference.pictures or reference.statistics
    counts = {"asked for": images, f"in {reference.name}": source.count if source else None}
    for where, count in counts.items():
        if count is not None and count <= extractor.dim and not allow_few:
            raise UsageError(
                f"FID with the {extractor.dim} features of {extractor.name} needs at least {extractor.dim + 1} "
                f"pictures, {where} are {count}: --allow-few measures nonetheless, for comparing equal numbers only")


def evaluate(pipe: Pipeline, extractor: Extractor, reference: Reference, points: Sequence[Settings], out: Path,
             images: int = 5000, *, seed: int = 0, batch_size: int = 64, allow_few: bool = False, force: bool = False,
             progress: Callable[[int], object] = lambda n: None) -> dict[str, Any] | None:
    """Measures a pipeline under each of `points` and writes the report to the folder `out`.

    images: pictures a point; picture i takes seed + i and the reference's condition i, whatever the number of
    processes. batch_size: pictures drawn at a time; another rounds sums in another order, and is measured anew.
    allow_few: FID also from no more pictures than features. force: replace the report of another evaluation.
    progress: called with every number of pictures done, of images * len(points) plus the reference's.

    Features stay in `out`/features: an interrupted run goes on where it stopped, a longer one uses them. Under torchrun
    all processes draw, through `out`, which all must see; the first writes the report and returns it, the others
    return None.

    Writes result.json (everything), result.md (a row a point), samples-*.png, reference.safetensors (the statistics,
    to be given as a reference later) and, with matplotlib, curves.png of a sweep.

    Raises UsageError and ValueError in one line, before any work where it can be known, and OSError for a full disk.
    """
    _check(pipe, points, reference, extractor, images, batch_size, allow_few)
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "kind": "evaluation", "model": pipe.name, "model_hash": pipe.model_hash,
        "parameters": sum(weight.numel() for weight in pipe.transformer.parameters()),
        "extractor": {"name": extractor.name, "hash": extractor.hash, "features": extractor.dim},
        "reference": {"name": reference.name, "split": reference.split, "label_field": reference.field},
        "images": images, "seed": seed}
    _check_report(out / "result.json", report, points, force)
    out.mkdir(parents=True, exist_ok=True)
    sets = [drawn(pipe, point, reference, images, seed, out, batch_size) for point in points]
    others = [reference.pictures] if reference.pictures is not None else []
    gather(others + sets, extractor, out, batch_size, progress)
    if processes()[0] != 0:
        return None
    real = collect(reference.pictures, extractor, out) if reference.pictures is not None else None
    statistics = reference.statistics or (real.statistics if real else None)
    assert statistics is not None
    statistics.save(out / "reference.safetensors")
    report["reference"] |= {
        "pictures": statistics.count, "statistics": tensors_hash({"m": statistics.mean, "s": statistics.scatter})}
    rows = []
    for point, pictures in zip(points, sets, strict=True):
        fake = collect(pictures, extractor, out)
        rows.append({"settings": dataclasses.asdict(point), "nfe": evaluations(point),
                     "seconds_per_image": fake.seconds / images,
                     "figures": figures(reference, real, fake, extractor, allow_few),
                     "samples": f"samples-{pictures.name}-{fingerprint(pictures.identity)}.png"})
    report |= {"points": rows, "version": __version__, "batch_size": batch_size, "device": pipe.device.type,
               "dtype": str(pipe.transformer.head_bias.dtype).removeprefix("torch."), "torch": torch.__version__,
               "threads": torch.get_num_threads(), "processes": processes()[1]}
    write_json(out / "result.json", report)
    with atomic_path(out / "result.md") as temporary:
        temporary.write_text(markdown(report, points), encoding="utf-8")
    if len(points) > 1:
        draw_curves(report, points, out)
    return report


def _check_report(path: Path, report: dict[str, Any], points: Sequence[Settings], force: bool) -> None:
    """UsageError where `path` reports another evaluation than this one."""
    if path.parent.exists() and not path.parent.is_dir():
        raise UsageError(f"{path.parent}: is not a folder: give another --out")
    if not path.exists() or force:
        return
    old = read_json(path)
    same = isinstance(old, dict) and all(
        old.get(name) == report[name] for name in ("model_hash", "extractor", "images", "seed")) and all(
        old.get("reference", {}).get(name) == value for name, value in report["reference"].items())
    asked = json.loads(json.dumps([dataclasses.asdict(point) for point in points]))
    if not same or [row.get("settings") for row in old.get("points", [])] != asked:
        raise UsageError(f"{path}: reports another evaluation: give another --out, or --force to replace the report "
                         f"(features that still fit are used again)")


# --------------------------------------------------------------------------------------------------
# The command


def load(model: str, reference: Path, extractor: str, weights: Path | None, split: str | None, label_field: str | None,
         resize: bool) -> tuple[Pipeline, Extractor, Reference]:
    """The parts of an evaluation by name, on this process's GPU where there is one."""
    from .features import load_extractor

    device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if torch.cuda.is_available() else "cpu"
    pipe = Pipeline.from_pretrained(model, device=device)
    network = load_extractor(extractor, weights, device)
    return pipe, network, open_reference(reference, pipe, network, split, label_field, resize)


def run_evaluate(model: str, reference: Path, out: Path, images: int, seed: int, axes: Mapping[str, Sequence[Any]],
                 extractor: str, weights: Path | None, split: str | None, label_field: str | None, resize: bool,
                 batch_size: int, allow_few: bool, force: bool, quiet: bool) -> tuple[dict[str, Any] | None, str]:
    """What `unmask evaluate` does: the report and its page; (None, "") from all processes but the first."""
    from tqdm import tqdm

    pipe, network, known = load(model, reference, extractor, weights, split, label_field, resize)
    points = sweep(pipe.settings, **axes)
    total = images * len(points) + (known.pictures.count if known.pictures else 0)
    hidden = True if quiet or processes()[0] else None
    with tqdm(total=total, unit="picture", disable=hidden, leave=False) as bar:
        report = evaluate(pipe, network, known, points, out, images, seed=seed, batch_size=batch_size,
                          allow_few=allow_few, force=force, progress=bar.update)
    return report, markdown(report, points) if report else ""
