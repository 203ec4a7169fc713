"""The one sampling loop: masked tokens to tokens, a few positions a step.

Everything that draws, shows progress, films or stops early consumes the generator :func:`stream`.

Shapes: B images, N tokens, k revealed in a step, V codes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .errors import unknown_name
from .models.transformer import ClassTransformer, Prepared, TextTransformer, TransformerConfig
from .schedules import Schedule, power_of, reveal_counts
from .unmaskers import ORDER_NAMES, Confidence, FixedOrder, Unmasker, image_order


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A value that goes from `start` (first step) to `end` (last step): "linear" in the value, or "harmonic", linear
    in its inverse (what the public code's temperature multiplier 1 -> 1.2 is, as a temperature 1 -> 1 / 1.2)."""

    start: float
    end: float
    curve: str = "linear"

    def __post_init__(self) -> None:
        if self.curve not in ("linear", "harmonic"):
            raise unknown_name("ramp", self.curve, ["linear", "harmonic"])
        if self.curve == "harmonic" and min(self.start, self.end) <= 0:
            raise ValueError(f"a harmonic ramp needs ends above 0, got {self.start} and {self.end}")

    def __call__(self, step: int, steps: int) -> float:
        t = step / max(1, steps - 1)
        if self.curve == "harmonic":
            return 1 / (1 / self.start + (1 / self.end - 1 / self.start) * t)
        return self.start + (self.end - self.start) * t


@dataclasses.dataclass(frozen=True)
class Interval:
    """`value` on the steps whose share of progress lies in [begin, end), 1 (off) elsewhere (Kynkaanniemi et al.,
    2024)."""

    value: float
    begin: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"an interval needs 0 <= begin < end <= 1, got {self.begin} and {self.end}")

    def __call__(self, step: int, steps: int) -> float:
        return self.value if self.begin <= step / steps < self.end else 1.0


Varying = float | tuple[float, float] | Ramp | Interval
"""A value over the steps: a constant, a (start, end) pair (linear), a Ramp or an Interval."""


def value_at(value: Varying, step: int, steps: int) -> float:
    """The value of a Varying at step `step` of `steps`."""
    if isinstance(value, (Ramp, Interval)):
        return value(step, steps)
    if isinstance(value, (tuple, list)):
        return Ramp(*value)(step, steps)
    return float(value)


def parse_varying(text: str) -> Varying:
    """A Varying from its command-line form: "3", "1:4" (start:end), "3@0.2-0.8" (an interval of the steps)."""
    try:
        if "@" in text:
            value, span = text.split("@")
            begin, end = span.split("-")
            return Interval(float(value), float(begin), float(end))
        if ":" in text:
            start, end = text.split(":")
            return float(start), float(end)
        return float(text)
    except ValueError:
        raise ValueError(f"'{text}' is neither a number (3), a ramp (1:4) nor an interval (3@0.2-0.8)") from None


def _check_varying(name: str, value: Varying) -> None:
    """ValueError unless the value is finite and not negative at every step."""
    if isinstance(value, (tuple, list)) and len(value) != 2:
        raise ValueError(f"{name}: a ramp is a pair (start, end), got {value}")
    numbers = [value.value] if isinstance(value, Interval) else [value_at(value, step, 2) for step in (0, 1)]
    if not all(0 <= number < math.inf for number in numbers):
        raise ValueError(f"{name} must be finite and not negative, got {value}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample.

    num_inference_steps: model evaluations. order: "halton", "random", "raster", "sobol" or "confidence". roll: begin
    the order at an offset drawn from each image's seed. schedule: a name of schedules.CURVES or a power.
    guidance_scale: logits = u + s * (c - u); 1 is off. temperature: divides the logits; 0 takes the likeliest token.
    top_k: 0 is off. top_p: 1 is off. r_temp: noise of the confidence order, in units of log-probability.
    stop_after: steps to run; what is masked then takes the tokens drawn at that step (None: all steps).
    """

    num_inference_steps: int = 16
    order: str = "halton"
    roll: bool = False
    schedule: Schedule = "arccos"
    guidance_scale: Varying = 1.0
    temperature: Varying = 1.0
    top_k: int = 0
    top_p: float = 1.0
    r_temp: float = 4.5
    stop_after: int | None = None

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {self.num_inference_steps}")
        if self.order not in ORDER_NAMES:
            raise unknown_name("order", self.order, ORDER_NAMES)
        power_of(self.schedule)
        _check_varying("guidance_scale", self.guidance_scale)
        _check_varying("temperature", self.temperature)
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.r_temp < math.inf:
            raise ValueError(f"r_temp must be finite and not negative, got {self.r_temp}")
        if self.roll and self.order == "confidence":
            raise ValueError("roll turns a fixed order; the confidence order has none")
        if self.stop_after is not None and not 1 <= self.stop_after <= self.num_inference_steps:
            raise ValueError(f"stop_after must lie in 1 ... num_inference_steps ({self.num_inference_steps}), "
                             f"got {self.stop_after}")


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of the sampler did.

    index: from 0. steps: their number. tokens: (B, N) int64 after this step, the mask id where still masked.
    positions: (B, k) newly revealed. preview: (B, N), the still-masked places filled by this step's own draw (only
    where previews were asked for, and at the last step).
    """

    index: int
    steps: int
    tokens: Tensor
    positions: Tensor
    preview: Tensor | None


class MaskedModel(Protocol):
    """The part of a transformer that the loop uses."""

    @property
    def config(self) -> TransformerConfig: ...

    def encode(self, tokens: Tensor, prepared: Prepared) -> Tensor: ...

    def logits(self, hidden: Tensor, prepared: Prepared, positions: Tensor | None = None) -> Tensor: ...


Prepare = Callable[[slice, bool], Prepared]
"""prepare(images, guided) -> Prepared of a slice of the batch: the conditions alone, or, guided, the conditions
followed by the unconditional (or negative) ones, 2 * B rows."""


def prepare_labels(model: ClassTransformer, labels: Tensor) -> Prepare:
    """Prepare for class labels (B,) int64; the unconditional half is the null class."""
    def prepare(images: slice, guided: bool) -> Prepared:
        part = labels[images]
        if not guided:
            return model.prepare(part)
        return model.prepare(part.repeat(2), torch.arange(2 * len(part), device=part.device) >= len(part))

    return prepare


def prepare_text(model: TextTransformer, text: Tensor, negative: Tensor | None = None) -> Prepare:
    """Prepare for text vectors (B, T, Dt); the unconditional half is the null text, or `negative` (B, T, Dt)."""
    def prepare(images: slice, guided: bool) -> Prepared:
        part = text[images]
        if not guided:
            return model.prepare(part)
        other = torch.zeros_like(part) if negative is None else negative[images]
        return model.prepare(torch.cat([part, other]))

    return prepare


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (..., V) with all but the top_k largest (ties kept) set to -inf, then all but the smallest set whose
    probability reaches top_p (Holtzman et al., 2020; the token that crosses top_p is kept)."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        drop = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), -torch.inf)
    return logits


GREEDY = 1e-6
"""Temperatures below this are 0: dividing by them could overflow."""


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> tuple[
        Tensor, Tensor]:
    """Tokens by inverse CDF in float32.

    logits (..., V), uniform (...) in [0, 1) -> (tokens (...) int64, their log-probability (...)). The truncation acts
    on the tempered logits. At temperature 0 (below GREEDY) the likeliest token, whatever the uniform number, and its
    log-probability at temperature 1, by which the confidence order can still rank.
    """
    if logits.device.type == "cpu" and logits.numel() > CACHED:
        rows = max(1, CACHED // logits.shape[-1])
        parts = [_draw(part, numbers, temperature, top_k, top_p) for part, numbers in
                 zip(logits.flatten(0, -2).split(rows), uniform.flatten().split(rows), strict=True)]
        tokens, log_p = (torch.cat(column).view(uniform.shape) for column in zip(*parts, strict=True))
        return tokens, log_p
    return _draw(logits, uniform, temperature, top_k, top_p)


CACHED = 2**18
"""Logits that `draw` treats at a time on a CPU, whose caches hold them through its dozen passes: 2.6 times as fast."""


def _draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    if temperature < GREEDY:
        tokens, log_p = logits.argmax(-1), logits.log_softmax(-1)
    else:
        log_p = truncate(logits / temperature, top_k, top_p).log_softmax(-1)
        p = log_p.exp()
        cdf = p.cumsum(-1).masked_fill(p == 0, 0)  # a parallel sum need not be flat there
        tokens = (cdf > uniform[..., None] * cdf.amax(-1, keepdim=True)).byte().argmax(-1)  # the first such
    return tokens, log_p.gather(-1, tokens[..., None])[..., 0]


class _Batch:
    """Tokens, noise and unmasker of one call, all on the CPU; the model may be elsewhere."""

    def __init__(self, config: TransformerConfig, settings: Settings, seeds: Sequence[int],
                 known: Tensor | None) -> None:
        n, mask = config.tokens, config.mask_id
        if not seeds:
            raise ValueError("no seeds: there is nothing to draw")
        self.tokens = (torch.full((len(seeds), n), mask) if known is None
                       else known.to("cpu", torch.int64, copy=True))
        if self.tokens.shape != (len(seeds), n):
            raise ValueError(f"known tokens must be ({len(seeds)}, {n}), got {tuple(self.tokens.shape)}")
        if int(self.tokens.min()) < 0 or int(self.tokens.max()) > mask:
            raise ValueError(f"known tokens must lie in [0, {mask}], {mask} meaning unknown")
        unknown = self.tokens == mask
        free = unknown.sum(1).unique()
        if len(free) > 1:
            raise ValueError("known tokens must leave the same number of places open in every image of a call")
        self.free = int(free[0])
        if self.free == 0:
            raise ValueError("known tokens leave no place open: there is nothing to draw")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.uniform = torch.stack([torch.rand(n, generator=g) for g in generators])
        self.unmasker: Unmasker
        if settings.order == "confidence":
            steps = settings.num_inference_steps
            noise = torch.stack([torch.rand(steps, n, generator=g) for g in generators])
            self.unmasker = Confidence(unknown.nonzero()[:, 1].view(len(seeds), -1), noise, settings.r_temp)
        else:
            orders = torch.stack([image_order(settings.order, config.grid, g, settings.roll) for g in generators])
            self.unmasker = FixedOrder(orders[unknown.gather(1, orders)].view(len(seeds), -1))


@torch.no_grad()
def stream(model: MaskedModel, prepare: Prepare, seeds: Sequence[int], settings: Settings, *,
           known: Tensor | None = None, previews: bool = False, chunk: int | None = None,
           device: torch.device | str = "cpu") -> Iterator[Step]:
    """Samples one image for each seed, yielding a :class:`Step` after every model evaluation.

    Parameters
    ----------
    model : MaskedModel
        On `device`; its grid and codebook fix N and V.
    prepare : Prepare
        Computes what the model needs of the conditions, for a slice of the batch.
    seeds : sequence of int
        One an image. All its noise comes from a generator of its own: one uniform number a position, turned into a
        token by inverse CDF, so the same seed gives the same image in any batch.
    known : LongTensor (B, N), optional
        Tokens to start from, the mask id where unknown; known places never change.
    previews : bool
        Fill Step.preview at every step. Costs the evaluation of all masked positions.
    chunk : int, optional
        Images evaluated at a time (all at once by default). With chunk 1 the arithmetic of an image does not depend
        on its companions, bit for bit.

    Raises
    ------
    ValueError
        More steps than places to fill, bad known tokens.
    """
    size, steps = len(seeds), settings.num_inference_steps
    batch = _Batch(model.config, settings, seeds, known)
    counts = reveal_counts(settings.schedule, batch.free, steps)
    last = settings.stop_after or steps
    slices = [slice(i, min(i + (chunk or size), size)) for i in range(0, size, chunk or size)]
    prepared: list[dict[bool, Prepared]] = [{} for _ in slices]

    def evaluate(positions: Tensor, scale: float) -> Tensor:
        """Guided logits (B, k, V) on the CPU."""
        parts, guided = [], scale != 1.0
        for images, cache in zip(slices, prepared, strict=True):
            if guided not in cache:
                cache[guided] = prepare(images, guided)
            repeat = (2, 1) if guided else (1, 1)
            tokens = batch.tokens[images].to(device).repeat(repeat)
            hidden = model.encode(tokens, cache[guided])
            logits = model.logits(hidden, cache[guided], positions[images].to(device).repeat(repeat))
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + scale * (conditional - unconditional)
            parts.append(logits)
        return torch.cat(parts)

    for index in range(last):
        count, closing = counts[index], index + 1 == last
        proposed = batch.unmasker.propose(count)
        masked = batch.tokens == model.config.mask_id
        wide = previews or (closing and last < steps)
        evaluated = masked.nonzero()[:, 1].view(size, -1) if wide else proposed
        logits = evaluate(evaluated, value_at(settings.guidance_scale, index, steps))
        uniform = batch.uniform.gather(1, evaluated).to(logits.device)
        drawn, log_p = draw(logits, uniform, value_at(settings.temperature, index, steps), settings.top_k,
                            settings.top_p)
        drawn, log_p = drawn.cpu(), log_p.cpu()
        filled = batch.tokens.scatter(1, evaluated, drawn)
        if wide:
            log_p = torch.zeros(masked.shape).scatter(1, evaluated, log_p).gather(1, proposed)
        chosen = batch.unmasker.choose(log_p, count, (index + 1) / steps)
        positions = proposed.gather(1, chosen)
        if closing:
            positions = masked.nonzero()[:, 1].view(size, -1) if last < steps else positions
        batch.tokens = batch.tokens.scatter(1, positions, filled.gather(1, positions))
        yield Step(index, steps, batch.tokens, positions, filled if wide or closing else None)


def generate(model: MaskedModel, prepare: Prepare, seeds: Sequence[int], settings: Settings, *,
             callback_on_step_end: Callable[[Step], bool | None] | None = None, **options: object) -> Tensor:
    """Consumes :func:`stream` and returns the tokens (B, N) int64.

    callback_on_step_end: called with every Step; a true return value stops the run, and the result is that step's
    preview.
    """
    step: Step | None = None
    if callback_on_step_end is not None:
        options["previews"] = True
    for step in stream(model, prepare, seeds, settings, **options):  # type: ignore[arg-type]
        if callback_on_step_end is not None and callback_on_step_end(step):
            break
    assert step is not None
    assert step.preview is not None
    return step.preview
