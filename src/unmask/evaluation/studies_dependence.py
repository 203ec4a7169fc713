"""The paper's argument measured on a model itself: how much two masked tokens say about each other, how that falls with
their distance, and how much of it each order ignores by drawing tokens of one step independently.

The information that tokens x_i and x_j share, given the known tokens c, is taken from the model's own conditionals:

    I(i; j | c) = E over x_j ~ p(. | c) of KL( p(x_i | c, x_j) || p(x_i | c) ), in nats.

For conditionals of one joint distribution this is the mutual information exactly. A model's are learnt one by one and
need not fit together, so I(i; j) and I(j; i) may differ; both enter the means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, unknown_name
from ..models.transformer import ClassTransformer, Prepared, TextTransformer
from ..pipeline import Pipeline
from ..sampling import MaskedModel, Prepare, Settings, draw, prepare_labels, prepare_text
from ..schedules import reveal_counts
from ..unmaskers import ORDER_NAMES
from .plots import figure, line_style, save
from .report import table
from .studies_orders import own_request
from .studies_paper import finish, start

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)
"""Shares of known tokens at which the fall with distance is measured."""


@torch.no_grad()
def shared_information(model: MaskedModel, prepare: Prepare, tokens: Tensor, targets: Tensor, probes: Tensor,
                       draws: int) -> Tensor:
    """I(target; probe | known tokens) in nats, (p, k); 0 where the probe is the target.

    tokens (N,): one picture's, the mask id where unknown. targets (k,), probes (p,): masked positions. prepare: of that
    picture's condition, repeated `draws` times. draws: tokens drawn for each probe, at evenly spaced quantiles of its
    distribution, so that the mean over them has little noise; guidance is off and the temperature 1.
    """
    one, many = prepare(slice(0, 1), False), prepare(slice(0, draws), False)
    base = _logits(model, one, tokens[None], targets).log_softmax(-1)[0]
    at_probes = _logits(model, one, tokens[None], probes)[0]
    uniform = (torch.arange(draws, device=tokens.device) + 0.5) / draws
    found = []
    for probe, logits in zip(probes, at_probes, strict=True):
        drawn, _ = draw(logits.expand(draws, -1), uniform, 1.0)
        context = tokens.repeat(draws, 1)
        context[:, probe] = drawn
        after = _logits(model, many, context, targets).log_softmax(-1)
        divergence = (after.exp() * (after - base)).sum(-1).mean(0)
        found.append(divergence.masked_fill(targets == probe, 0.0))
    return torch.stack(found).clamp(min=0)


def _logits(model: MaskedModel, prepared: Prepared, tokens: Tensor, positions: Tensor) -> Tensor:
    """Conditional logits (rows, k, V) of tokens (rows, N) at positions (k,)."""
    return model.logits(model.encode(tokens, prepared), prepared, positions.expand(len(tokens), -1))


class _Walk:
    """Pictures drawn by a pipeline, with what their tokens share, measured on the way."""

    def __init__(self, pipe: Pipeline, settings: Settings, images: int, probes: int, draws: int, seed: int) -> None:
        self.pipe, self.settings, self.images, self.seed = pipe, settings, images, seed
        self.probes, self.draws = probes, draws
        self.request = own_request(pipe, images)

    def prepare(self, image: int) -> Prepare:
        """The condition of one picture, `draws` times."""
        model = self.pipe.transformer
        if isinstance(model, ClassTransformer):
            labels = torch.tensor(self.request["class_labels"][image : image + 1], device=self.pipe.device)
            return prepare_labels(model, labels.repeat(self.draws))
        assert isinstance(model, TextTransformer)
        assert self.pipe.text_encoder is not None
        text = self.pipe.text_encoder.encode(self.request["prompt"][image : image + 1]).to(self.pipe.device)
        return prepare_text(model, text.repeat(self.draws, 1, 1))

    def pairs(self, image: int, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(distances, information) of pairs of `targets` (k,), the probes being some of them: spread evenly, and at
        other places in every picture."""
        count = min(self.probes, len(targets))
        shift = (0.5 + 0.618 * image) % 1
        probes = targets[((torch.arange(count) + shift) * len(targets) / count).long()]
        device = self.pipe.device
        found = shared_information(self.pipe.transformer, self.prepare(image), tokens.to(device), targets.to(device),
                                   probes.to(device), self.draws).cpu()
        w = self.pipe.transformer.config.grid[1]
        cells = torch.stack([targets // w, targets % w], 1).double()
        others = torch.stack([probes // w, probes % w], 1).double()
        different = probes[:, None] != targets
        return torch.cdist(others, cells)[different], found[different].double()

    def run(self, visit: Callable[[int, Tensor, Tensor], None]) -> None:
        """Draws, and calls visit(step, tokens before the step (B, N), positions revealed (B, k)) at every step."""
        self.pipe.settings = self.settings
        config = self.pipe.transformer.config
        before = torch.full((self.images, config.tokens), config.mask_id)
        seeds = [self.seed + i for i in range(self.images)]
        for step in self.pipe.stream(**self.request, seed=seeds):
            visit(step.index, before, step.positions)
            before = step.tokens


def falls(walk: _Walk, shares: Sequence[float] = SHARES) -> dict[float, list[tuple[float, float, int]]]:
    """How shared information falls with distance: for each share of known tokens, (distance, mean information, number
    of pairs), distances rounded to whole tokens. Known are the tokens that the pictures' drawing reveals first."""
    config = walk.pipe.transformer.config
    counts = reveal_counts(walk.settings.schedule, config.tokens, walk.settings.num_inference_steps)
    known = [sum(counts[:i]) for i in range(len(counts))]
    wanted = {min(range(len(known)), key=lambda i: abs(known[i] / config.tokens - share)) for share in shares}
    gathered: dict[float, list[tuple[Tensor, Tensor]]] = {known[i] / config.tokens: [] for i in sorted(wanted)}

    def visit(step: int, before: Tensor, positions: Tensor) -> None:
        if step in wanted:
            for image, tokens in enumerate(before):
                masked = (tokens == config.mask_id).nonzero()[:, 0]
                gathered[known[step] / config.tokens].append(walk.pairs(image, tokens, masked))

    walk.run(visit)
    found = {}
    for share, pairs in gathered.items():
        distances = torch.cat([d for d, _ in pairs]).round()
        information = torch.cat([i for _, i in pairs])
        found[share] = [(float(d), information[distances == d].mean().item(), int((distances == d).sum()))
                        for d in distances.unique()]
    return found


def ignored(walk: _Walk) -> list[float]:
    """What drawing the tokens of a step independently ignores, step by step: the information that two of its tokens
    share, summed over all pairs of the step (mean over the pairs probed, times their number), mean over pictures."""
    totals: list[float] = []

    def visit(step: int, before: Tensor, positions: Tensor) -> None:
        k, total = positions.shape[1], 0.0
        if k > 1:
            for image, tokens in enumerate(before):
                total += walk.pairs(image, tokens, positions[image])[1].mean().item() * k * (k - 1) / 2
        totals.append(total / len(before))

    walk.run(visit)
    return totals


def dependence_study(out: Path, model: str, orders: Sequence[str] = ("halton", "sobol", "random", "raster",
                                                                     "confidence"),
                     steps: int | None = None, schedule: str | None = None, images: int = 8, probes: int = 4,
                     draws: int = 8, seed: int = 0, quiet: bool = False, force: bool = False) -> None:
    """Writes dependence.png, dependence.json and dependence.md: shared information against distance at several shares
    of known tokens (random order), and what each order ignores, step by step and in all.

    steps, schedule: None is as the model's settings say. images: pictures, of classes 0, 1, ... or of the paper's
    prompts. probes, draws: positions probed at a time, and tokens drawn for each.
    """
    from tqdm import tqdm

    for name, value, least in (("images", images, 1), ("probes", probes, 1), ("draws", draws, 2)):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    for order in orders:
        if order not in ORDER_NAMES:
            raise unknown_name("order", order, ORDER_NAMES)
    pipe = Pipeline.from_pretrained(model)
    given: dict[str, Any] = {"num_inference_steps": steps, "schedule": schedule}
    try:
        settings = dataclasses.replace(pipe.settings, roll=False, stop_after=None,
                                       **{name: value for name, value in given.items() if value is not None})
        reveal_counts(settings.schedule, pipe.transformer.config.tokens, settings.num_inference_steps)
    except ValueError as error:
        raise UsageError(str(error)) from None
    start(out, "dependence", force)

    def walk(order: str) -> _Walk:
        return _Walk(pipe, dataclasses.replace(settings, order=order), images, probes, draws, seed)

    curves = falls(walk("random"))
    left = {order: ignored(walk(order)) for order in tqdm(orders, unit="order", disable=True if quiet else None,
                                                          leave=False)}
    _plot(curves, left, out / "dependence.png")
    finish(out, "dependence", _data(pipe, settings, curves, left, images, probes, draws, seed),
           _page(pipe, settings, curves, left, images, probes, draws))


def _data(pipe: Pipeline, settings: Settings, curves: dict[float, list[tuple[float, float, int]]],
          left: dict[str, list[float]], images: int, probes: int, draws: int, seed: int) -> dict[str, Any]:
    return {"model": pipe.name, "model_hash": pipe.model_hash, "steps": settings.num_inference_steps,
            "schedule": settings.schedule, "images": images, "probes": probes, "draws": draws, "seed": seed,
            "unit": "nats",
            "falls": [{"share": share, "curve": [{"distance": d, "information": i, "pairs": n} for d, i, n in rows]}
                      for share, rows in curves.items()],
            "ignored": {order: {"steps": values, "total": sum(values)} for order, values in left.items()}}


def _page(pipe: Pipeline, settings: Settings, curves: dict[float, list[tuple[float, float, int]]],
          left: dict[str, list[float]], images: int, probes: int, draws: int) -> str:
    return (f"# What tokens of {pipe.name} say about each other\n\n![Curves](dependence.png)\n\n"
            f"{images} picture{'s' * (images > 1)}, {settings.num_inference_steps} steps, schedule "
            f"{settings.schedule}; {probes} positions probed at a time with {draws} tokens each, from the model's own "
            f"conditionals without guidance at temperature 1, in nats.\n\nShared information of two masked tokens, "
            f"against their distance:\n\n"
            + table(["Known tokens", "1 token apart", "2", "4", "farthest"], [
                [f"{100 * share:.0f} %", *(next((i for d, i, _ in rows if d == wanted), None) for wanted in (1, 2, 4)),
                 rows[-1][1]] for share, rows in curves.items() if rows])
            + "\nWhat each order ignores by drawing the tokens of a step independently, summed over the pairs of each "
              "step:\n\n"
            + table(["Order", "In all", "In the worst step"],
                    [[order, sum(values), max(values)]
                     for order, values in sorted(left.items(), key=lambda item: sum(item[1]))]))


def _plot(curves: dict[float, list[tuple[float, float, int]]], left: dict[str, list[float]], path: Path) -> None:
    from matplotlib import colormaps

    plot = figure(10, 4)
    fall, loss = plot.subplots(1, 2)
    shades = colormaps["viridis"]
    for number, (share, rows) in enumerate(curves.items()):
        colour = shades(0.9 * number / max(1, len(curves) - 1))
        positive = [(d, i) for d, i, _ in rows if i > 0]  # of a logarithm
        fall.plot(*zip(*positive, strict=True), **line_style(number) | {"color": colour},
                  label=f"{100 * share:.0f} % known")
    fall.set_title("Information shared by two masked tokens", fontsize=10)
    fall.set_xlabel("distance (tokens)", fontsize=9)
    fall.set_ylabel("nats", fontsize=9)
    for number, (order, values) in enumerate(left.items()):
        positive = [(step, value) for step, value in enumerate(values, 1) if value > 0]
        loss.plot(*zip(*positive, strict=True), **line_style(number), label=order)
    loss.set_title("Shared information ignored inside a step", fontsize=10)
    loss.set_xlabel("step", fontsize=9)
    loss.set_ylabel("nats, summed over pairs", fontsize=9)
    for panel in (fall, loss):
        panel.set_yscale("log")
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(plot, path)
