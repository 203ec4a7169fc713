"""Studies that draw and measure: pictures from intermediate steps (Table 4, Figure 3), two samplers side by side
(Figure 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..errors import UsageError
from ..pictures import grid, to_pil
from ..pipeline import Pipeline
from ..sampling import Settings
from ..schedules import cumulative_counts
from .evaluate import Reference, evaluate, evaluations, load
from .features import Extractor
from .plots import curves, figure, save
from .report import FIGURES, estimate, table
from .studies_paper import finish, start

ROWS = 4
"""Pictures of the film of intermediate steps; the comparison shows four times as many."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a study measures with: a pipeline, an extractor, a reference, and how `evaluate` shall work.

    options: images, seed, batch_size, allow_few of `evaluate`. progress: makes its `progress` from the number of
    pictures to be done.
    """

    pipe: Pipeline
    extractor: Extractor
    reference: Reference
    options: dict[str, Any]
    progress: Callable[[int], Callable[[int], object]] = lambda total: lambda done: None

    def measure(self, points: Sequence[Settings], out: Path, force: bool) -> dict[str, Any]:
        """The report of `evaluate`, which keeps its features in out/evaluation."""
        real = self.reference.pictures.count if self.reference.pictures else 0
        report = evaluate(self.pipe, self.extractor, self.reference, points, out / "evaluation", force=force,
                          progress=self.progress(self.options["images"] * len(points) + real), **self.options)
        if report is None:
            raise UsageError("studies run in one process; `unmask evaluate` splits over torchrun's")
        return report

    def request(self, count: int) -> dict[str, Any]:
        """The first pictures of the evaluation."""
        conditions = [self.reference.conditions[i % len(self.reference.conditions)] for i in range(count)]
        key = "class_labels" if self.pipe.transformer.config.condition == "class" else "prompt"
        return {key: conditions, "seed": [self.options["seed"] + i for i in range(count)]}

    def settings(self, **changes: Any) -> Settings:
        """The pipeline's settings with those changes that are not None; UsageError where they do not fit."""
        try:
            settings = dataclasses.replace(
                self.pipe.settings, stop_after=None, **{k: v for k, v in changes.items() if v is not None})
            cumulative_counts(settings.schedule, self.pipe.transformer.config.tokens, settings.num_inference_steps)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return settings

    def describe(self, report: dict[str, Any]) -> str:
        """The sentence that says what the figures are."""
        return (f"{report['images']} pictures of {report['model']} ({report['model_hash'][:12]}) against "
                f"{report['reference']['name']}, features of {report['extractor']['name']}; figures of another "
                f"extractor, reference or number of pictures cannot be compared with these.")


def load_bench(model: str, reference: Path, extractor: str, weights: Path | None, split: str | None,
               label_field: str | None, resize: bool, quiet: bool, options: dict[str, Any]) -> Bench:
    """A bench from names, with a progress bar unless `quiet`."""
    from tqdm import tqdm

    def progress(total: int) -> Callable[[int], object]:
        return tqdm(total=total, unit="picture", disable=True if quiet else None, leave=False).update

    return Bench(*load(model, reference, extractor, weights, split, label_field, resize), options, progress)


# --------------------------------------------------------------------------------------------------
# Intermediate steps


def percent(share: float) -> str:
    """A share in whole percent as Table 4 prints it: 169 of 1,024 tokens, 16.5 %, is 16 there (half to even)."""
    return f"{round(100 * share, 1):.0f}"


def stops(steps: int, every: int) -> list[tuple[int, int]]:
    """(number of the step, from 0, as Table 4 counts; evaluations done by then): every so many steps, and the end."""
    numbers = sorted({*range(every, steps, every), steps})
    return [(number, min(number + 1, steps)) for number in numbers if number == steps or number + 1 < steps]


def intermediate_study(out: Path, bench: Bench, steps: int | None = None, schedule: str | None = None,
                       every: int | None = None, force: bool = False) -> None:
    """Writes intermediate.png (pictures as they would be after some of the steps), intermediate-curves.png (figures
    there), intermediate.json and intermediate.md (Table 4's columns and more).

    The tokens still masked after a step take that step's own draw, as `stop_after` has it. steps, schedule: None is
    as the model's settings say. every: steps between rows; None is an eighth of the steps, as in Table 4.
    """
    settings = bench.settings(num_inference_steps=steps, schedule=schedule)
    total, tokens = settings.num_inference_steps, bench.pipe.transformer.config.tokens
    every = max(1, total // 8) if every is None else every
    if not 1 <= every <= total:
        raise UsageError(f"--every must lie in 1 ... {total}, the number of steps, got {every}")
    start(out, "intermediate", force)
    shown = stops(total, every)
    known = cumulative_counts(settings.schedule, tokens, total)
    points = [dataclasses.replace(settings, stop_after=done) for _, done in shown]
    report = bench.measure(points, out, force)
    rows = [{"step": number, "steps": total, "evaluations": evaluations(point), "tokens": known[done - 1],
             "share": known[done - 1] / tokens, "figures": row["figures"]}
            for (number, done), point, row in zip(shown, points, report["points"], strict=True)]
    _film(bench, settings, shown, rows, out / "intermediate.png")
    present = {name: FIGURES[name] for name in FIGURES if all(name in row["figures"] for row in rows)}
    curves({bench.pipe.name: [(row["share"] * 100, row["figures"]) for row in rows]}, "known tokens (%)", present,
           out / "intermediate-curves.png")
    finish(out, "intermediate", {"report": report, "rows": rows},
           f"# Intermediate steps of {bench.pipe.name}\n\n![Pictures](intermediate.png)\n\n"
           f"![Figures](intermediate-curves.png)\n\n{bench.describe(report)}\n\n"
           + table(["Step", "NFE", "Tokens (%)", *present.values()],
                   [[f"{row['step']}/{total}", row["evaluations"], percent(row["share"]),
                     *(estimate(row["figures"], name) for name in present)] for row in rows])
           + f"\nSteps are numbered from 0, as in Table 4 of the supplementary; {total}/{total} is after the last. "
             f"What is masked still takes the tokens drawn at that step.\n")


def _film(bench: Bench, settings: Settings, shown: Sequence[tuple[int, int]], rows: Sequence[dict[str, Any]],
          path: Path) -> None:
    """A row for each of the first pictures, a column for each of the steps shown."""
    bench.pipe.settings = settings
    count = min(ROWS, bench.options["images"])
    wanted = {done for _, done in shown}
    previews: list[Tensor] = [step.preview for step in bench.pipe.stream(**bench.request(count), previews=True)
                              if step.index + 1 in wanted and step.preview is not None]
    columns = [to_pil(bench.pipe.decode(preview)) for preview in previews]
    plot = figure(1.25 * len(columns) + 0.2, 1.25 * count + 0.5)
    panels = plot.subplots(count, len(columns), squeeze=False)
    for i, column in enumerate(columns):
        for j, picture in enumerate(column):
            panels[j][i].imshow(picture, interpolation="nearest")
            panels[j][i].set_axis_off()
        panels[0][i].set_title(f"step {rows[i]['step']}\n{percent(rows[i]['share'])} %", fontsize=9)
    save(plot, path)


# --------------------------------------------------------------------------------------------------
# Two samplers


def compare_study(out: Path, bench: Bench, orders: tuple[str, str] = ("halton", "confidence"),
                  steps: int | None = None, schedule: str | None = None, r_temp: float | None = None,
                  force: bool = False) -> None:
    """Writes compare.png (the same seeds and conditions under two orders, side by side), compare.json and compare.md
    (the figures of both).

    steps, schedule, r_temp: None is as the model's settings say; r_temp is the noise of the confidence order.
    """
    if orders[0] == orders[1]:
        raise UsageError(f"--orders: '{orders[0]}' twice: give two")
    points = [bench.settings(order=order, num_inference_steps=steps, schedule=schedule, r_temp=r_temp,
                             roll=False if order == "confidence" else None) for order in orders]
    start(out, "compare", force)
    report = bench.measure(points, out, force)
    count = min(4 * ROWS, bench.options["images"])
    blocks = []
    for point in points:
        bench.pipe.settings = point
        blocks.append(grid(bench.pipe(**bench.request(count)).images))
    _side_by_side(dict(zip(orders, blocks, strict=True)), out / "compare.png")
    present = [name for name in FIGURES if name in report["points"][0]["figures"]]
    finish(out, "compare", {"orders": list(orders), "report": report},
           f"# {orders[0]} and {orders[1]}\n\n![Pictures](compare.png)\n\nThe same seeds and conditions, "
           f"{points[0].num_inference_steps} steps.\n\n{bench.describe(report)}\n\n"
           + table(["Order", "NFE", "s/image", *(FIGURES[name] for name in present)],
                   [[order, row["nfe"], row["seconds_per_image"], *(estimate(row["figures"], name) for name in present)]
                    for order, row in zip(orders, report["points"], strict=True)]))


def _side_by_side(blocks: dict[str, Image.Image], path: Path) -> None:
    plot = figure(4.8 * len(blocks), 4.8)
    panels = plot.subplots(1, len(blocks), gridspec_kw={"wspace": 0.06})
    for panel, (name, block) in zip(panels, blocks.items(), strict=True):
        panel.imshow(block, interpolation="nearest")
        panel.set_title(name, fontsize=12)
        panel.set_axis_off()
    save(plot, path)
