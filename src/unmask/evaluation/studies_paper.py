"""Studies of what the paper prints: Table 3 with Figure 2's radar plot, and the prompts of section 6 and Figure 5."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..checkpoints import atomic_path, field, from_json, read_json, write_json
from ..errors import UsageError
from ..sampling import Settings
from .plots import figure, line_style, save
from .report import SWEPT, shown, table, varied

RADAR = {"fid": "1 / FID", "inception_score": "IS", "precision": "Precision", "recall": "Recall"}
"""The axes of the radar plot."""


def paper() -> dict[str, Any]:
    """What the supplementary prints, with its sources: `table3`, `table4`, `prompts`, `failures` (paper.json)."""
    found: dict[str, Any] = json.loads((files("unmask") / "evaluation" / "paper.json").read_text(encoding="utf-8"))
    return found


def start(out: Path, name: str, force: bool) -> None:
    """Makes the folder of a study; UsageError where an earlier run of it has written there."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is not a folder: give another --out")
    if (out / f"{name}.json").exists() and not force:
        raise UsageError(f"{out / name}.json exists: give another --out, or --force to replace it")
    out.mkdir(parents=True, exist_ok=True)


def finish(out: Path, name: str, data: Mapping[str, Any], page: str) -> None:
    """Writes the figures of a study and its page."""
    with atomic_path(out / f"{name}.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_json(out / f"{name}.json", {"study": name, **data})


def radar(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
    """Values of Figure 2, a dictionary for each row: each metric divided by its best over all rows, so that the best
    has 1; the FID, where less is better, is reversed by taking best / FID. None where a row has no figure."""
    best = {name: (min if name == "fid" else max)(row[name] for row in rows if row[name] is not None) for name in RADAR}
    return [{name: None if row[name] is None else
             best["fid"] / row["fid"] if name == "fid" else row[name] / best[name] for name in RADAR} for row in rows]


def own_rows(path: Path) -> list[dict[str, Any]]:
    """A row of Table 3 for each point of a result.json.

    Raises UsageError where another extractor than Inception-v3 measured it: Table 3's figures are Inception's.
    """
    result = read_json(path)
    extractor = field(field(result, "extractor", path), "name", path)
    if not extractor.startswith("inception-v3"):
        raise UsageError(f"{path}: measured with {extractor}; Table 3 is of inception-v3, and figures of different "
                         f"extractors cannot be compared: evaluate with --extractor inception-v3")
    points = field(result, "points", path)
    used = [from_json(Settings, field(point, "settings", path), path) for point in points]
    names = varied(used)
    rows = []
    for point, setting in zip(points, used, strict=True):
        settings = ", ".join(f"{SWEPT[name]} {shown(getattr(setting, name))}" for name in names)
        rows.append({"type": "own", "model": field(result, "model", path) + (f" ({settings})" if settings else ""),
                     "source": f"{path.name}: {result['images']} pictures against {result['reference']['name']}, "
                               f"{extractor}",
                     "parameters_millions": result["parameters"] / 1e6,
                     **{name: point["figures"].get(name) for name in RADAR}})
    return rows


def table_study(out: Path, result: Path | None = None, force: bool = False) -> None:
    """Writes table.md (Table 3 and the rows of `result`), table.json (with the radar's values) and table.png."""
    rows = paper()["table3"]["rows"] + (own_rows(result) if result else [])
    start(out, "table", force)
    values = radar(rows)
    _radar_plot(rows, values, out / "table.png")
    formula = "each metric divided by its best over all rows of the table; the FID, reversed, is best / FID"
    finish(out, "table", {"source": paper()["source"], "formula": formula,
                          "rows": [{**row, "radar": value} for row, value in zip(rows, values, strict=True)]},
           "# Class-conditional ImageNet 256x256\n\n"
           + table(["Type", "Model", "Parameters (M)", "FID↓", "IS↑", "Precision↑", "Recall↑", "Source"],
                   [[row["type"], row["model"], row["parameters_millions"], *(row[name] for name in RADAR),
                     row["source"]] for row in rows])
           + f"\n![Radar plot](table.png)\n\nThe plot: {formula}. Models with all four figures. "
             f"Rows of type \"own\" are measured here, on the pictures and the reference they name.\n\n"
             f"{paper()['source']}, Table 3 and Figure 2.\n")


def _radar_plot(rows: Sequence[Mapping[str, Any]], values: Sequence[Mapping[str, float | None]], path: Path) -> None:
    plot = figure(8.2, 5.4)
    axes = plot.add_subplot(projection="polar")
    angles = [2 * math.pi * i / len(RADAR) for i in range(len(RADAR))]
    shown_rows = [(row, value) for row, value in zip(rows, values, strict=True) if None not in value.values()]
    for number, (row, value) in enumerate(shown_rows):
        radii = list(value.values())
        bold = row["type"] == "own" or row["model"] in ("MaskGIT", "Halton MaskGIT")
        axes.plot([*angles, angles[0]], [*radii, radii[0]], label=row["model"],
                  **line_style(number) | {"linewidth": 2.6 if bold else 1.1}, zorder=3 if bold else 2)
    axes.set_xticks(angles, list(RADAR.values()), fontsize=10)
    axes.tick_params(axis="x", pad=14)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0.25, 0.5, 0.75, 1], ["0.25", "0.5", "", "1"], fontsize=8)
    axes.set_rlabel_position(225)
    plot.legend(*axes.get_legend_handles_labels(), loc="outside center right", fontsize=9, frameon=False)
    save(plot, path)


def prompts_study(out: Path, model: str, seed: int = 0, force: bool = False) -> None:
    """Draws the prompts of section 6 (prompts.png, 6 a row) and of Figure 5c (prompts-failures.png); prompt i of each
    takes seed + i. UsageError for a model that takes no prompts."""
    from ..pictures import grid, save_png
    from ..pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model)
    if pipe.transformer.config.condition != "text":
        raise UsageError(f"{pipe.name}: is a class model: prompts need a text model")
    start(out, "prompts", force)
    page, data = f"# Prompts of the paper, drawn by {pipe.name}\n", {}
    for kind, name in (("prompts", "prompts.png"), ("failures", "prompts-failures.png")):
        section = paper()[kind]
        output = pipe(section["texts"], seed=seed)
        save_png(grid(output.images, columns=min(6, len(output.images))), out / name, output.made)
        data[kind] = {"source": section["source"], "notes": section["notes"], "picture": name,
                      "made": [made.to_json() for made in output.made]}
        page += f"\n{section['source']}; from left to right and top to bottom:\n\n![{kind}]({name})\n\n"
        page += "".join(f"{i}. {text}\n" for i, text in enumerate(section["texts"], 1))
        page += "".join(f"\n{note}\n" for note in section["notes"])
    settings = dataclasses.asdict(pipe.settings)
    page += f"\nModel {pipe.model_hash[:12]}, seeds from {seed}, settings {json.dumps(settings)}.\n"
    finish(out, "prompts", {"model": pipe.name, "model_hash": pipe.model_hash, "seed": seed, "settings": settings,
                            **data}, page)

