"""Plots, with matplotlib imported late and without its global state: no pyplot, no display, no style left behind."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints import atomic_path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933", "#882255")
"""Colours for lines that the colour-blind tell apart (Okabe & Ito, 2008, and two of Tol's)."""
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*Xh"


def have_matplotlib() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches, typed Any: its stubs do not know what panels can do.
    ModuleNotFoundError says how to get matplotlib."""
    if not have_matplotlib():
        raise ModuleNotFoundError("plots need matplotlib: pip install 'unmask[plot]'")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def line_style(number: int) -> dict[str, Any]:
    """Colour, dash and marker of line `number`: lines differ also where colour is lost."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
            "marker": MARKERS[number % len(MARKERS)], "markersize": 4, "linewidth": 1.4}


def save(plot: Any, path: Path) -> None:
    """Writes a figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        plot.savefig(temporary, format="png", metadata={"Software": "unmask"})


def curves(lines: Mapping[str, Sequence[tuple[float, Mapping[str, float]]]], x_label: str, titles: Mapping[str, str],
           path: Path) -> None:
    """Small multiples: a panel for each entry of `titles`, a line for each of `lines`, (x, values) each; a value's
    "..._std" is its error bar."""
    places = sorted({x for points in lines.values() for x, _ in points})
    columns = min(4, len(titles))
    rows = math.ceil(len(titles) / columns)
    plot = figure(3.1 * columns, 2.6 * rows + 0.5)
    panels = plot.subplots(rows, columns, squeeze=False).flatten()
    for panel, (name, title) in zip(panels, titles.items(), strict=False):
        for number, (label, points) in enumerate(lines.items()):
            ordered = sorted(points, key=lambda point: point[0])
            errors = [values.get(f"{name}_std", 0.0) for _, values in ordered]
            panel.errorbar([x for x, _ in ordered], [values[name] for _, values in ordered],
                           yerr=errors if any(errors) else None, label=label, capsize=2, **line_style(number))
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(x_label, fontsize=9)
        if all(b - a >= 0.1 * (places[-1] - places[0]) for a, b in zip(places, places[1:], strict=False)):
            panel.set_xticks(places, [f"{x:g}" for x in places])  # where the numbers do not overlap
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    for panel in panels[len(titles):]:
        panel.set_axis_off()
    plot.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(lines)),
                fontsize=8, frameon=False)
    save(plot, path)
