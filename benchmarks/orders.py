"""Which order of the tokens draws best? Every order under its own best temperature, at several numbers of steps.

    python benchmarks/orders.py emoji-class --reference datasets/emoji.tar.gz --split train --out runs/orders-emoji
    python benchmarks/orders.py runs/fashion-class/model --reference runs/fashion.tar --out runs/orders-fashion

First each order at each number of steps gets the temperature (and the confidence order the noise `r_temp`) that gives
the lowest FID with pictures of other seeds; then it is measured with that, once for each of `--seeds` disjoint ranges
of seeds. Writes orders.json, orders.md (mean and standard deviation over the ranges) and orders.png. Interrupted, the
same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unmask.evaluation.evaluate import evaluate, load, sweep
from unmask.evaluation.plots import curves
from unmask.evaluation.report import FIGURES, table
from unmask.sampling import Settings

TUNING_SEED = 1_000_000
"""The first seed of the pictures that temperatures are chosen with: none of them is measured again."""


def spread(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation, as NAME and NAME_std, of figures measured several times."""
    found: dict[str, float] = {}
    for name in (name for name in FIGURES if all(name in row for row in rows)):
        values = [row[name] for row in rows]
        found[name] = statistics.fmean(values)
        found[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--split")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--orders", nargs="+", default=["halton", "confidence", "random", "raster", "sobol"])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--temperatures", nargs="+", default=["0.7", "0.85", "1"])
    parser.add_argument("--r-temps", type=float, nargs="+", default=[1.5, 4.5, 12.0])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--tuning-images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    pipe, extractor, reference = load(arguments.model, arguments.reference, "efficientnet-lite0@128", None,
                                      arguments.split, None, False)
    base = dataclasses.replace(pipe.settings, roll=False)

    def measure(points: Sequence[Settings], images: int, seed: int) -> list[dict[str, Any]]:
        with tqdm(total=images * len(points), unit="picture", desc=f"seed {seed}", disable=None) as bar:
            report = evaluate(pipe, extractor, reference, points, arguments.out, images, seed=seed, allow_few=True,
                              force=True, progress=bar.update)
        assert report is not None
        return report["points"]

    tuned: list[dict[str, Any]] = []
    for order in arguments.orders:
        noise = arguments.r_temps if order == "confidence" else ()
        points = sweep(base, arguments.steps, [order], temperatures=arguments.temperatures, r_temps=noise)
        tuned += [{"settings": point, "fid": row["figures"]["fid"]} for point, row in
                  zip(points, measure(points, arguments.tuning_images, TUNING_SEED), strict=True)]
    chosen = [min((row for row in tuned if (row["settings"].order, row["settings"].num_inference_steps) == (order, n)),
                  key=lambda row: row["fid"])["settings"] for order in arguments.orders for n in arguments.steps]
    runs = [measure(chosen, arguments.images, number * 100_000) for number in range(arguments.seeds)]
    rows = [{"settings": dataclasses.asdict(point), "nfe": measured[0]["nfe"],
             "figures": spread([row["figures"] for row in measured]), "runs": [row["figures"] for row in measured]}
            for point, *measured in zip(chosen, *runs, strict=True)]
    result = {"model": pipe.name, "model_hash": pipe.model_hash, "extractor": extractor.name,
              "reference": reference.name, "images": arguments.images, "seeds": arguments.seeds, "points": rows,
              "tuning": [{"settings": dataclasses.asdict(row["settings"]), "fid": row["fid"]} for row in tuned]}
    (arguments.out / "orders.json").write_text(json.dumps(result, indent=1) + "\n")
    shown = {name: heading for name, heading in FIGURES.items() if name in rows[0]["figures"]}
    (arguments.out / "orders.md").write_text(table(
        ["order", "steps", "temperature", "r_temp", *shown.values()],
        [[point.order, point.num_inference_steps, point.temperature,
          point.r_temp if point.order == "confidence" else None,
          *(f"{row['figures'][name]:.4g} ± {row['figures'][name + '_std']:.2g}" for name in shown)]
         for point, row in zip(chosen, rows, strict=True)]))
    lines = {order: [(float(point.num_inference_steps), row["figures"]) for point, row in zip(chosen, rows, strict=True)
                     if point.order == order] for order in arguments.orders}
    curves(lines, "steps", shown, arguments.out / "orders.png")
    print((arguments.out / "orders.md").read_text())


if __name__ == "__main__":
    main()
