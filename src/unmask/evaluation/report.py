"""Evaluations as people read them: markdown tables and curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..sampling import Settings, Varying
from .plots import curves, have_matplotlib

FIGURES = {"fid": "FID↓", "kid": "KID↓", "inception_score": "IS↑", "precision": "Precision↑", "recall": "Recall↑",
           "density": "Density↑", "coverage": "Coverage↑", "clip_score": "CLIP↑"}
"""The figures and their headings; the arrow says which way is better."""

SWEPT = {"order": "order", "num_inference_steps": "steps", "schedule": "schedule", "guidance_scale": "guidance",
         "temperature": "temperature", "r_temp": "r_temp", "stop_after": "stop after"}
"""The settings a sweep may vary, and their headings."""


def shown(value: Varying | str | None) -> str:
    """A setting's value as the command line takes it: 3, 1:4, 3@0.2-0.8."""
    if dataclasses.is_dataclass(value):
        parts = dataclasses.asdict(value)
        if "begin" in parts:
            return f"{parts['value']:g}@{parts['begin']:g}-{parts['end']:g}"
        return f"{parts['start']:g}:{parts['end']:g} {parts['curve']}"
    if isinstance(value, (tuple, list)):
        return ":".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def varied(points: Sequence[Settings]) -> list[str]:
    """The fields of SWEPT in which the settings differ."""
    return [name for name in SWEPT if len({str(getattr(point, name)) for point in points}) > 1]


def estimate(figures: Mapping[str, float], name: str) -> str | None:
    """A figure of a report with its deviation where it has one: "12.34 ± 0.56"; None where it is missing."""
    if name not in figures:
        return None
    deviation = figures.get(f"{name}_std")
    return f"{figures[name]:.4g}" + (f" ± {deviation:.2g}" if deviation is not None else "")


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table; None is an empty cell, floats take four significant digits."""
    def cell(value: object) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)


def markdown(report: dict[str, Any], points: Sequence[Settings]) -> str:
    """The report as a page: what was measured with what, and a row for each point."""
    present = [name for name in FIGURES if any(name in row["figures"] for row in report["points"])]
    needed = {"stop_after": any(point.stop_after for point in points), "r_temp": "r_temp" in varied(points)}
    columns = [name for name in SWEPT if needed.get(name, True)]

    def row(point: Settings, measured: dict[str, Any]) -> list[object]:
        return [*(shown(getattr(point, name)) for name in columns), measured["nfe"], measured["seconds_per_image"],
                *(estimate(measured["figures"], name) for name in present)]

    headings = [*(SWEPT[name] for name in columns), "NFE", "s/image", *(FIGURES[name] for name in present)]
    extractor, reference = report["extractor"], report["reference"]
    split = f", {reference['split']}" if reference["split"] else ""
    return (f"# {report['model']}\n\n{report['images']} pictures (seeds from {report['seed']}) against "
            f"{reference['name']}{split} ({reference['pictures'] or 'unknown number of'} pictures), features of "
            f"{extractor['name']} (weights {extractor['hash']}), model {report['model_hash'][:12]}. Figures of another "
            f"extractor or another number of pictures cannot be compared with these. KID ± is over its subsets, IS "
            f"± over its splits.\n\n"
            + table(headings, map(row, points, report["points"])))


def draw_curves(report: dict[str, Any], points: Sequence[Settings], out: Path) -> None:
    """curves.png: every figure over the first swept number, a line for each combination of the rest."""
    axes = varied(points)
    x = next((n for n in ("num_inference_steps", "guidance_scale", "temperature", "r_temp", "stop_after") if n in axes
              and all(isinstance(getattr(p, n), (int, float)) for p in points)), None)
    if x is None or not have_matplotlib():
        return
    present = {name: FIGURES[name] for name in FIGURES if all(name in row["figures"] for row in report["points"])}
    lines: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for point, row in zip(points, report["points"], strict=True):
        label = ", ".join(shown(getattr(point, n)) if isinstance(getattr(point, n), str)
                          else f"{SWEPT[n]} {shown(getattr(point, n))}" for n in axes if n != x)
        lines.setdefault(label or report["model"], []).append((getattr(point, x), row["figures"]))
    curves(lines, SWEPT[x], present, out / "curves.png")
