r"""Which order of the tokens draws best? Every order under its own best temperature, at several numbers of steps.

    python benchmarks/orders.py emoji-class --reference datasets/emoji.tar.gz --split train \
        --temperatures 0.45 0.6 0.8 --out runs/orders-emoji
    python benchmarks/orders.py runs/fashion-class/model --reference runs/fashion.tar --split held-concept \
        --temperatures 0.5 0.7 0.85 1 --out runs/orders-fashion

First each order at each number of steps gets the temperature that gives the lowest FID with pictures of other seeds,
and the confidence order before that, at the middle temperature, its noise `r_temp`. Then it draws with that for
`--seeds` disjoint ranges of seeds, each measured alone against all real pictures (FID) or as many of them (KID and the
like), and all together (FID).

Writes orders.json, orders.md (mean and standard deviation over the ranges), orders.png and features, which are not
computed twice: interrupted, the same command goes on, and several may share the work with different `--orders`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from unmask.evaluation.evaluate import drawn, evaluations, figures, load, sweep
from unmask.evaluation.features import Extractor
from unmask.evaluation.gather import Gathered, collect, gather
from unmask.evaluation.metrics import Statistics, frechet_distance
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


def part(of: Gathered, extractor: Extractor, numbers: slice) -> Gathered:
    """What is known of some of a set's pictures."""
    statistics = Statistics.of(extractor)
    statistics.update(of.features[numbers])
    return Gathered(statistics, of.features[numbers], None if of.probabilities is None else of.probabilities[numbers],
                    of.seconds)


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
    parser.add_argument("--images", type=int, default=500, help="of each range of seeds")
    parser.add_argument("--tuning-images", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3, help="ranges of seeds")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pipe, extractor, reference = load(arguments.model, arguments.reference, "efficientnet-lite0@128", None,
                                      arguments.split, None, False)
    assert reference.pictures is not None
    base = dataclasses.replace(pipe.settings, roll=False)

    def measure(points: Sequence[Settings], images: int, seed: int) -> list[Gathered]:
        sets = [drawn(pipe, point, reference, images, seed, arguments.out, 64) for point in points]
        with tqdm(total=images * len(points), unit="picture", desc=f"seed {seed}", disable=None) as bar:
            gather(sets, extractor, arguments.out, progress=bar.update)
        return [collect(pictures, extractor, arguments.out) for pictures in sets]

    gather([reference.pictures], extractor, arguments.out)
    real = collect(reference.pictures, extractor, arguments.out)
    alike = part(real, extractor, slice(0, arguments.images))
    known = dataclasses.replace(reference, statistics=real.statistics)
    tuning: dict[Settings, float] = {}

    def best(order: str, steps: int, temperatures: Sequence[str], noises: Sequence[float]) -> Settings:
        points = sweep(base, [steps], [order], temperatures=temperatures, r_temps=noises)
        for point, fake in zip(points, measure(points, arguments.tuning_images, TUNING_SEED), strict=True):
            tuning[point] = frechet_distance(real.statistics, fake.statistics, allow_few=True)
            print(f"{order}, {steps} steps, temperature {point.temperature}, r_temp {point.r_temp}: "
                  f"{tuning[point]:.4g}", flush=True)
        return min(points, key=lambda point: tuning[point])

    chosen = []
    for order, steps in itertools.product(arguments.orders, arguments.steps):
        noise = base.r_temp
        if order == "confidence":
            middle = arguments.temperatures[len(arguments.temperatures) // 2]
            noise = best(order, steps, [middle], arguments.r_temps).r_temp
        chosen.append(best(order, steps, arguments.temperatures, [noise]))
    rows: list[dict[str, Any]] = []
    for point, fake in zip(chosen, measure(chosen, arguments.images * arguments.seeds, 0), strict=True):
        ranges = [part(fake, extractor, slice(start, start + arguments.images))
                  for start in range(0, len(fake.features), arguments.images)]
        runs = [figures(known, alike, pictures, extractor, allow_few=True) for pictures in ranges]
        rows.append({"settings": dataclasses.asdict(point), "nfe": evaluations(point),
                     "fid_all": frechet_distance(real.statistics, fake.statistics, allow_few=True),
                     "seconds_per_image": fake.seconds / len(fake.features), "figures": spread(runs), "runs": runs})
    result = {"model": pipe.name, "model_hash": pipe.model_hash, "extractor": extractor.name,
              "reference": reference.name, "split": arguments.split, "images": arguments.images,
              "seeds": arguments.seeds, "points": rows,
              "tuning": [{"settings": dataclasses.asdict(point), "fid": fid}
                         for point, fid in tuning.items()]}
    (arguments.out / "orders.json").write_text(json.dumps(result, indent=1) + "\n")
    shown = {name: heading for name, heading in FIGURES.items() if name in rows[0]["figures"]}
    (arguments.out / "orders.md").write_text(table(
        ["order", "steps", "temperature", "r_temp", f"FID of {arguments.images * arguments.seeds}", *shown.values()],
        [[point.order, point.num_inference_steps, point.temperature,
          point.r_temp if point.order == "confidence" else None, row["fid_all"],
          *(f"{row['figures'][name]:.4g} ± {row['figures'][name + '_std']:.2g}" for name in shown)]
         for point, row in zip(chosen, rows, strict=True)]))
    lines = {order: [(float(point.num_inference_steps), row["figures"]) for point, row in zip(chosen, rows, strict=True)
                     if point.order == order] for order in arguments.orders}
    curves(lines, "steps", shown, arguments.out / "orders.png")
    print((arguments.out / "orders.md").read_text())


if __name__ == "__main__":
    main()
