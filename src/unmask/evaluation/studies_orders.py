"""Studies of where tokens lie: what orders look like, and how tokens differ with their distance (Figure 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError, unknown_name
from ..pipeline import Pipeline, load_tokenizer
from ..schedules import reveal_counts
from ..unmaskers import ORDER_NAMES, image_order
from .plots import figure, line_style, save
from .report import table
from .studies_paper import finish, paper, start

FILM = 8
"""Frames of a filmstrip."""
MEASURES = {"nearest": "Mean distance to the nearest token\nrevealed in the same step",
            "pairs": "Mean distance of tokens revealed\nin the same step",
            "discrepancy": "L2-star discrepancy of all tokens\nrevealed so far"}
"""What is measured at each step; distances are in tokens."""


# --------------------------------------------------------------------------------------------------
# Orders


def l2_star_discrepancy(points: np.ndarray) -> float:
    """L2-star discrepancy of points (n, 2) in [0, 1]^2: root mean square, over all boxes that begin at the origin, of
    the box's area less its share of the points (Warnock, 1972; scipy.stats.qmc.discrepancy(method="L2-star"))."""
    n = len(points)
    largest = np.maximum(points[:, None], points[None])
    squared = 1 / 9 - (2 / n) * ((1 - points**2) / 2).prod(1).sum() + (1 - largest).prod(2).sum() / n**2
    return float(np.sqrt(max(squared, 0.0)))


def step_measures(steps: Sequence[Tensor], grid: tuple[int, int]) -> dict[str, list[float | None]]:
    """MEASURES at each step, from the positions (k,) that the steps of one picture reveal; None for a distance where a
    step reveals one token."""
    measured: dict[str, list[float | None]] = {name: [] for name in MEASURES}
    known = np.empty((0, 2))
    for positions in steps:
        cells = np.stack([positions.numpy() // grid[1], positions.numpy() % grid[1]], 1)
        distances = np.linalg.norm(cells[:, None] - cells[None], axis=2)
        k = len(cells)
        measured["nearest"].append(
            float((distances + np.diag([np.inf] * k)).min(1).mean()) if k > 1 else None)
        measured["pairs"].append(float(distances.sum() / (k * (k - 1))) if k > 1 else None)
        known = np.concatenate([known, (cells + 0.5) / np.array(grid)])
        measured["discrepancy"].append(l2_star_discrepancy(known))
    return measured


def order_steps(name: str, grid: tuple[int, int], counts: Sequence[int], seed: int) -> list[Tensor]:
    """The positions that each step of an image with that seed reveals in a fixed order."""
    order = image_order(name, grid, torch.Generator().manual_seed(seed), False)
    return list(order.split(list(counts)))


def own_request(pipe: Pipeline, count: int) -> dict[str, Any]:
    """What a study that brings no conditions asks a pipeline for: class i for picture i, or the paper's prompt i."""
    if pipe.transformer.config.condition == "class":
        return {"class_labels": [i % pipe.transformer.config.classes for i in range(count)]}
    prompts = paper()["prompts"]["texts"]
    return {"prompt": [prompts[i % len(prompts)] for i in range(count)]}


def confidence_steps(pipe: Pipeline, steps: int, schedule: str, seeds: Sequence[int]) -> list[list[Tensor]]:
    """The same for the confidence order, as a model draws."""
    drawn = list(pipe.stream(**own_request(pipe, len(seeds)), seed=list(seeds), num_inference_steps=steps,
                             schedule=schedule, order="confidence", roll=False))
    return [[step.positions[i] for step in drawn] for i in range(len(seeds))]


def _mean(measured: Sequence[Mapping[str, list[float | None]]]) -> dict[str, list[float | None]]:
    """Mean over pictures, step by step."""
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return {name: [mean(values) for values in zip(*(one[name] for one in measured), strict=True)]
            for name in MEASURES}


def orders_study(out: Path, orders: Sequence[str] = ("halton", "sobol", "random", "raster"),
                 grid: tuple[int, int] = (16, 16), steps: int = 16, schedule: str = "arccos", model: str | None = None,
                 draws: int = 16, seed: int = 0, force: bool = False) -> None:
    """Writes orders.png (reveal maps: the step in which each token is revealed), orders-film.png (what is known after
    some of the steps, an order a row), orders-curves.png (MEASURES step by step), orders.json and orders.md.

    model: its grid is taken and it draws the confidence order. draws: pictures over which orders that differ from
    picture to picture are averaged. Raises UsageError for what is unknown or does not fit.
    """
    pipe = Pipeline.from_pretrained(model) if model else None
    grid = pipe.transformer.config.grid if pipe else grid
    try:
        counts = reveal_counts(schedule, grid[0] * grid[1], steps)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if draws < 1:
        raise UsageError(f"draws must be at least 1, got {draws}")
    for name in orders:
        if name not in ORDER_NAMES:
            raise unknown_name("order", name, ORDER_NAMES)
        if name == "confidence" and pipe is None:
            raise UsageError("the confidence order depends on a model: give --model")
    start(out, "orders", force)
    seeds = range(seed, seed + draws)
    revealed: dict[str, list[list[Tensor]]] = {}
    for name in orders:
        if name == "confidence" and pipe is not None:
            revealed[name] = confidence_steps(pipe, steps, schedule, seeds)
        else:
            revealed[name] = [order_steps(name, grid, counts, s) for s in seeds]
    measured = {name: _mean([step_measures(one, grid) for one in pictures]) for name, pictures in revealed.items()}
    maps = {name: _step_map(pictures[0], grid) for name, pictures in revealed.items()}
    _reveal_maps(maps, steps, out / "orders.png")
    _film(maps, steps, out / "orders-film.png")
    _order_curves(measured, out / "orders-curves.png")
    overall = [[name, *(_average(values[m]) for m in MEASURES)] for name, values in measured.items()]
    headings = ["Order", *(text.replace("\n", " ") for text in MEASURES.values())]
    finish(out, "orders", {"grid": list(grid), "steps": steps, "schedule": schedule, "seed": seed, "draws": draws,
                           "model": pipe.name if pipe else None, "reveal_counts": counts,
                           "maps": {name: m.tolist() for name, m in maps.items()}, "measures": measured},
           f"# Orders on {grid[0]}x{grid[1]} tokens, {steps} steps, schedule {schedule}\n\n"
           f"![Reveal maps](orders.png)\n\nThe step in which each token is revealed: dark first, bright last.\n\n"
           f"![Filmstrips](orders-film.png)\n\nKnown tokens after some of the steps: grey known before, blue "
           f"revealed in that step.\n\n![Curves](orders-curves.png)\n\nDistances in tokens, between centres; "
           f"orders that differ from picture to picture are averaged over {draws} (seeds from {seed}). Means over the "
           f"steps:\n\n"
           + table(headings, overall))


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _step_map(steps: Sequence[Tensor], grid: tuple[int, int]) -> np.ndarray:
    """(h, w): the step, from 1, that reveals each token."""
    found = np.zeros(grid[0] * grid[1], dtype=np.int64)
    for number, positions in enumerate(steps, 1):
        found[positions.numpy()] = number
    return found.reshape(grid)


def _bare(panel: Any) -> None:
    panel.set_xticks([])
    panel.set_yticks([])


def _reveal_maps(maps: Mapping[str, np.ndarray], steps: int, path: Path) -> None:
    plot = figure(2.5 * len(maps) + 0.9, 2.9)
    panels = plot.subplots(1, len(maps), squeeze=False)[0]
    for panel, (name, found) in zip(panels, maps.items(), strict=True):
        image = panel.imshow(found, cmap="viridis", vmin=1, vmax=max(steps, 2), interpolation="nearest")
        panel.set_title(name, fontsize=11)
        _bare(panel)
    plot.colorbar(image, ax=panels, label="step", shrink=0.85)
    save(plot, path)


def _film(maps: Mapping[str, np.ndarray], steps: int, path: Path) -> None:
    from matplotlib.colors import ListedColormap

    frames = sorted({round(i) for i in np.linspace(1, steps, min(FILM, steps))})
    plot = figure(1.15 * len(frames) + 0.9, 1.2 * len(maps) + 0.4)
    panels = plot.subplots(len(maps), len(frames), squeeze=False)
    colours = ListedColormap(["#ffffff", "#bbbbbb", "#0072B2"])
    for row, (name, found) in zip(panels, maps.items(), strict=True):
        for panel, frame in zip(row, frames, strict=True):
            panel.imshow((found <= frame) * 1 + (found == frame) * 1, cmap=colours, vmin=0, vmax=2,
                         interpolation="nearest")
            _bare(panel)
        row[0].set_ylabel(name, fontsize=10)
    for panel, frame in zip(panels[0], frames, strict=True):
        panel.set_title(f"step {frame}", fontsize=9)
    save(plot, path)


def _order_curves(measured: Mapping[str, Mapping[str, list[float | None]]], path: Path) -> None:
    plot = figure(3.7 * len(MEASURES), 3.4)
    from matplotlib.ticker import LogLocator, NullFormatter

    panels = plot.subplots(1, len(MEASURES))
    for panel, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for number, (name, values) in enumerate(measured.items()):
            known = [(step, value) for step, value in enumerate(values[measure], 1) if value is not None]
            panel.plot([step for step, _ in known], [value for _, value in known], label=name, **line_style(number))
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    panels[-1].set_yscale("log")
    panels[-1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[-1].yaxis.set_major_formatter("{x:g}")
    panels[-1].yaxis.set_minor_formatter(NullFormatter())
    plot.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(measured), fontsize=9,
                frameon=False)
    save(plot, path)


# --------------------------------------------------------------------------------------------------
# Distance of token embeddings (Figure 1)


def distance_map(codes: Tensor, token: tuple[int, int]) -> Tensor:
    """Mean Euclidean distance of every token's code to that of `token`: codes (B, c, h, w) -> (h, w)."""
    return (codes - codes[:, :, token[0], token[1], None, None]).norm(dim=1).mean(0)


def distance_curve(codes: Tensor) -> tuple[list[float], list[float], list[int]]:
    """Euclidean distances of codes (B, c, h, w) by distance in the grid, over all pairs of places of all pictures:
    (distance in the grid, mean distance of codes, number of pairs), nearest first."""
    h, w = codes.shape[2:]
    sums: dict[int, tuple[float, int]] = {}
    for down in range(h):
        for across in range(1 - w, w):
            if down == 0 and across <= 0:
                continue
            left, right = max(0, -across), w - max(0, across)
            here = codes[:, :, : h - down, left:right]
            there = codes[:, :, down:, left + across : right + across]
            distances = (here - there).norm(dim=1)
            total, count = sums.get(down**2 + across**2, (0.0, 0))
            sums[down**2 + across**2] = total + distances.double().sum().item(), count + distances.numel()
    ordered = sorted(sums.items())
    return ([key**0.5 for key, _ in ordered], [total / count for _, (total, count) in ordered],
            [count for _, (_, count) in ordered])


def token_distance_study(out: Path, data: Path, tokenizer: Path, images: int = 200,
                         token: tuple[int, int] | None = None, force: bool = False) -> None:
    """Writes token-distance.png (Figure 1's map about the reference token, and the curve over all pairs),
    token-distance.json and token-distance.md.

    Codes are the tokenizer's unit vectors. images: pictures, taken in a fixed shuffled order, each on white, cropped to
    a square and scaled to the size the tokenizer was trained on. The dashed line is the mean distance of tokens
    in the same place of different pictures: what is left without a common picture.
    """
    from ..checkpoints import field, read_config
    from ..data.images import composite, load_rgba, open_images

    if images < 2:
        raise UsageError(f"images must be at least 2, got {images}")
    network = load_tokenizer(tokenizer)
    size = field(read_config(tokenizer), "image_size", tokenizer / "config.json")
    side = size // network.config.downsample
    row, column = token = token or (side // 2, side // 2)
    if not (0 <= row < side and 0 <= column < side):
        raise UsageError(f"--token {row} {column} is outside the grid of {side}x{side} tokens")
    source = open_images(data)
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:images].tolist()
    if len(chosen) < 2:
        raise UsageError(f"{data}: holds one picture, the study needs two or more")
    start(out, "token-distance", force)
    parts = []
    for begin in range(0, len(chosen), 16):
        pixels = composite(load_rgba(source, size, chosen[begin : begin + 16]))
        parts.append(network.quantize.lookup(network.encode(pixels.float() / 127.5 - 1)))
    codes = torch.cat(parts)
    found = distance_map(codes, token)
    distances, means, counts = distance_curve(codes)
    other = (codes - codes.roll(1, 0)).norm(dim=1).mean().item()
    _distance_plot(found, token, distances, means, other, out / "token-distance.png")
    near = next(mean for distance, mean in zip(distances, means, strict=True) if distance == 1)
    finish(out, "token-distance", {
        "data": data.name, "tokenizer": read_config(tokenizer)["sha256"]["tokenizer.safetensors"],
        "images": len(chosen), "grid": [side, side], "token": list(token), "map": found.tolist(),
        "curve": {"distance": distances, "mean": means, "pairs": counts}, "other_pictures": other},
        f"# Distance of tokens: in the picture and in their embedding\n\n![Map and curve](token-distance.png)\n\n"
        f"Mean Euclidean distance of unit codes over {len(chosen)} pictures of {data.name}, {side}x{side} tokens. "
        f"Neighbours differ by {near:.3f}, the farthest tokens by {means[-1]:.3f}, tokens in the same place of "
        f"different pictures by {other:.3f}.\n\nFigure 1 of the supplementary shows the map for LlamaGen's tokenizer "
        f"on ImageNet.\n")


def _distance_plot(found: Tensor, token: tuple[int, int], distances: Sequence[float], means: Sequence[float],
                   other: float, path: Path) -> None:
    plot = figure(9, 3.9)
    left, right = plot.subplots(1, 2, width_ratios=[1, 1.25])
    largest = found.max().clamp(min=1e-12)
    image = left.imshow((found / largest).numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    left.plot(token[1], token[0], "s", color="#D55E00", markersize=9, markeredgecolor="white")
    left.set_title("Distance to the marked token, largest 1", fontsize=10)
    _bare(left)
    plot.colorbar(image, ax=left, shrink=0.85)
    right.plot(distances, means, **line_style(0) | {"markersize": 2.5})
    right.axhline(other, color="#555555", linestyle="--", linewidth=1.2, label="same place of other pictures")
    right.set_xlabel("distance in the picture (tokens)", fontsize=9)
    right.set_ylabel("mean distance of codes", fontsize=9)
    right.tick_params(labelsize=8)
    right.grid(alpha=0.3)
    right.legend(fontsize=9, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(plot, path)
