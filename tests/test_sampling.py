"""The sampling loop against a literal slow sampler, against known probabilities, and what it promises of seeds."""

import math
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

import reference
from conftest import build_tiny
from unmask.models.transformer import MaskedTransformer
from unmask.sampling import (
    Interval,
    Ramp,
    Settings,
    Step,
    draw,
    generate,
    parse_varying,
    prepare_labels,
    prepare_text,
    stream,
    truncate,
    value_at,
)
from unmask.schedules import reveal_counts
from unmask.training.loop import batch_indices, step_generator
from unmask.training.objective import draw_mask

SEEDS = [11, 5, 2**40 + 3]

CLASS = build_tiny("class")
MODELS = {
    "class": CLASS,
    "class patch 2": build_tiny("class", patch=2, grid=(4, 8)),
    "text": build_tiny("text", text_depth=1),
    "text patch 2": build_tiny("text", patch=2),
}


def condition_of(model: MaskedTransformer, size: int) -> tuple[Tensor, Tensor]:
    """Labels or texts, and the texts of a negative prompt."""
    c, g = model.config, torch.Generator().manual_seed(1)
    if c.condition == "class":
        return torch.randint(c.classes, (size,), generator=g), torch.full((size,), c.classes)
    return tuple(torch.randn(2, size, c.text_length, c.text_dim, generator=g))


def prepare_of(model: MaskedTransformer, condition: Tensor, negative: Tensor | None = None) -> Callable:
    if model.config.condition == "class":
        return prepare_labels(model, condition)
    return prepare_text(model, condition, negative)


# --- the loop is the slow sampler, token for token

CASES: dict[str, tuple[str, dict]] = {
    "halton": ("class", {}),
    "halton, patch 2": ("class patch 2", {}),
    "halton, text": ("text", {}),
    "halton, text patch 2": ("text patch 2", {}),
    "random": ("class", {"order": "random"}),
    "raster": ("text", {"order": "raster"}),
    "sobol": ("class", {"order": "sobol"}),
    "confidence": ("class", {"order": "confidence"}),
    "confidence, text patch 2, guided": ("text patch 2", {"order": "confidence", "guidance_scale": 2.0}),
    "confidence without noise": ("text", {"order": "confidence", "r_temp": 0.0}),
    "confidence, likeliest tokens": ("class", {"order": "confidence", "r_temp": 0.0, "temperature": 0.0}),
    "rolled": ("class", {"roll": True}),
    "random, rolled": ("text", {"order": "random", "roll": True}),
    "cosine": ("class", {"schedule": "cosine"}),
    "power": ("class", {"schedule": 2.5}),
    "one step": ("class", {"num_inference_steps": 1}),
    "a step a token": ("text patch 2", {"num_inference_steps": 24}),
    "guided": ("class", {"guidance_scale": 3.0}),
    "guided, patch 2": ("class patch 2", {"guidance_scale": 3.0}),
    "unconditional": ("text", {"guidance_scale": 0.0}),
    "guidance ramp": ("class", {"guidance_scale": (1.0, 4.0)}),
    "guidance ramp, text": ("text", {"guidance_scale": Ramp(3.0, 0.5)}),
    "guidance interval": ("text patch 2", {"guidance_scale": Interval(4.0, 0.2, 0.7)}),
    "cold": ("class", {"temperature": 0.5}),
    "likeliest": ("text", {"temperature": 0.0, "guidance_scale": 2.0}),
    "temperature ramp": ("class", {"temperature": (1.5, 0.0)}),
    "temperature as published": ("class", {"temperature": Ramp(1.0, 1 / 1.2, "harmonic"), "guidance_scale": 2.0}),
    "top-k": ("class", {"top_k": 3}),
    "top-p": ("text", {"top_p": 0.7}),
    "top-k and top-p, tempered, guided": ("text patch 2", {"top_k": 6, "top_p": 0.8, "temperature": 1.3,
                                                          "guidance_scale": 1.5}),
    "negative prompt": ("text", {"guidance_scale": 2.5, "negative": True}),
    "negative prompt, confidence": ("text patch 2", {"guidance_scale": (1.0, 2.5), "negative": True,
                                                     "order": "confidence"}),
    "known tokens": ("class", {"known": True}),
    "known tokens, confidence, guided": ("text", {"known": True, "order": "confidence", "guidance_scale": 2.0}),
    "known tokens, random, rolled": ("text patch 2", {"known": True, "order": "random", "roll": True}),
    "stopped": ("class", {"stop_after": 3}),
    "stopped at once, confidence": ("text", {"stop_after": 1, "order": "confidence"}),
    "everything": ("text", {"known": True, "order": "confidence", "guidance_scale": Interval(2.0, 0.0, 0.5), "top_k": 8,
                            "top_p": 0.9, "temperature": Ramp(1.2, 0.6, "harmonic"), "schedule": "root",
                            "negative": True, "stop_after": 5, "num_inference_steps": 7, "r_temp": 2.0}),
}


def known_tokens(model: MaskedTransformer, size: int) -> Tensor:
    """Ten places of each image known, others in each."""
    g, c = torch.Generator().manual_seed(2), model.config
    known = torch.full((size, c.tokens), c.mask_id)
    for row in known:
        row[torch.randperm(c.tokens, generator=g)[:10]] = torch.randint(c.codebook_size, (10,), generator=g)
    return known


class Case:
    """A model, what it is asked for, and the slow sampler's answer."""

    def __init__(self, name: str) -> None:
        kind, options = CASES[name]
        options = {"num_inference_steps": 6, **options}
        negative, known = options.pop("negative", False), options.pop("known", False)
        self.model, self.settings = MODELS[kind], Settings(**options)
        self.condition, other = condition_of(self.model, len(SEEDS))
        self.negative = other if negative else None
        self.known = known_tokens(self.model, len(SEEDS)) if known else None
        self.prepare = prepare_of(self.model, self.condition, self.negative)
        self.free = self.model.config.tokens - (10 if known else 0)

    def fast(self, **options) -> list[Step]:
        return list(stream(self.model, self.prepare, SEEDS, self.settings, known=self.known, **options))

    def guidance(self, step: int, steps: int) -> float:
        value = self.settings.guidance_scale
        if isinstance(value, Interval):
            return value.value if value.begin <= step / steps < value.end else 1.0
        start, end = ((value.start, value.end) if isinstance(value, Ramp) else
                      value if isinstance(value, tuple) else (value, value))
        return start + (end - start) * step / max(1, steps - 1)

    def temperature(self, step: int, steps: int) -> float:
        value = self.settings.temperature
        share = step / max(1, steps - 1)
        if isinstance(value, Ramp) and value.curve == "harmonic":  # the public multiplier is 1 / temperature
            return 1 / ((1 - share) / value.start + share / value.end)
        start, end = value if isinstance(value, tuple) else (value, value)
        return start + (end - start) * share

    def slow(self, image: int) -> list[list[int]]:
        s, c = self.settings, self.model.config
        g, steps = torch.Generator().manual_seed(SEEDS[image]), s.num_inference_steps
        uniform, order, noise = torch.rand(c.tokens, generator=g).tolist(), None, None
        if s.order == "confidence":
            noise = torch.rand(steps, c.tokens, generator=g).tolist()
        else:
            h, w = c.grid
            order = {
                "halton": lambda: list(dict.fromkeys(
                    n2 * h // d2 * w + n3 * w // d3 for (n2, d2), (n3, d3)
                    in zip(reference.algorithm1(2, 500), reference.algorithm1(3, 500), strict=True))),
                "random": lambda: torch.randperm(c.tokens, generator=g).tolist(),
                "raster": lambda: list(range(c.tokens)),
                "sobol": lambda: sobol(c.grid),
            }[s.order]()
        if s.roll:
            offset = int(torch.randint(c.tokens, (1,), generator=g))
            order = order[-offset:] + order[:-offset] if offset else order
        condition = self.condition[image:image + 1]
        empty = torch.full_like(condition, c.classes) if c.condition == "class" else torch.zeros_like(condition)
        if self.negative is not None:
            empty = self.negative[image:image + 1]

        def logits_of(tokens: list[int], conditional: bool) -> list[list[float]]:
            return reference.dense_logits(self.model, torch.tensor([tokens]), condition if conditional else empty)[
                0].tolist()

        return reference.slow_sample(
            logits_of, order, c.tokens, c.codebook_size, uniform, reveal_counts(s.schedule, self.free, steps),
            guidance=[self.guidance(i, steps) for i in range(steps)],
            temperature=[self.temperature(i, steps) for i in range(steps)], top_k=s.top_k, top_p=s.top_p, noise=noise,
            r_temp=s.r_temp, known=None if self.known is None else self.known[image].tolist(), stop_after=s.stop_after)


def sobol(grid: tuple[int, int]) -> list[int]:
    from scipy.stats import qmc

    points = qmc.Sobol(d=2, scramble=False).random(1024)
    return list(dict.fromkeys(int(r * grid[0]) * grid[1] + int(c * grid[1]) for r, c in points))


@pytest.mark.parametrize("name", CASES)
def test_the_loop_is_the_slow_sampler(name: str) -> None:
    """Every token after every step; in one batch, one by one, and with previews of every step."""
    case = Case(name)
    expected = torch.tensor([case.slow(i) for i in range(len(SEEDS))]).transpose(0, 1)  # (steps, B, N)
    assert expected[-1].max() < case.model.config.mask_id
    for options in ({}, {"chunk": 1}, {"chunk": 2}, {"previews": True}):
        assert torch.equal(torch.stack([step.tokens for step in case.fast(**options)]), expected), options


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("previews", [False, True])
def test_the_fields_of_a_step(name: str, previews: bool) -> None:
    case = Case(name)
    s, mask = case.settings, case.model.config.mask_id
    steps = case.fast(previews=previews)
    last = s.stop_after or s.num_inference_steps
    counts = reveal_counts(s.schedule, case.free, s.num_inference_steps)[:last]
    counts[-1] = case.free - sum(counts[:-1])
    assert [step.index for step in steps] == list(range(last))
    assert {step.steps for step in steps} == {s.num_inference_steps}
    before = case.known if case.known is not None else torch.full((len(SEEDS), case.model.config.tokens), mask)
    for step, count in zip(steps, counts, strict=True):
        assert step.tokens.dtype == step.positions.dtype == torch.int64
        assert step.positions.shape == (len(SEEDS), count)
        for i in range(len(SEEDS)):
            changed = (step.tokens[i] != before[i]).nonzero()[:, 0].tolist()
            assert changed == sorted(step.positions[i].tolist())
            assert (before[i, changed] == mask).all()
        assert (step.preview is not None) == (previews or step is steps[-1])
        if step.preview is not None:
            shown = step.tokens != mask
            assert step.preview.max() < mask
            assert torch.equal(step.preview[shown], step.tokens[shown])
        before = step.tokens
    assert torch.equal(steps[-1].preview, steps[-1].tokens)


def test_a_preview_is_what_stopping_there_gives() -> None:
    case = Case("guided")
    for step in case.fast(previews=True):
        stopped = Settings(**{**vars(case.settings), "stop_after": step.index + 1})
        assert torch.equal(generate(case.model, case.prepare, SEEDS, stopped), step.preview)


def test_steps_without_guidance_run_the_conditional_branch_alone() -> None:
    case = Case("guidance interval")
    rows: list[int] = []
    encode = case.model.encode
    watched = SimpleNamespace(config=case.model.config, logits=case.model.logits,
                              encode=lambda tokens, prepared: rows.append(len(tokens)) or encode(tokens, prepared))
    generate(watched, case.prepare, SEEDS, case.settings)
    assert rows == [3 * 2 if 0.2 <= i / 6 < 0.7 else 3 for i in range(6)]


@pytest.mark.parametrize(("name", "value"), [
    ("guidance_scale", 2.0), ("guidance_scale", (1.0, 2.0)), ("guidance_scale", Interval(2.0, 0.0, 0.4)),
    ("temperature", 0.5), ("temperature", (1.0, 0.2)), ("temperature", Ramp(1.0, 0.2, "harmonic")), ("top_k", 2),
    ("top_p", 0.5), ("order", "random"), ("order", "raster"), ("order", "sobol"), ("order", "confidence"),
    ("roll", True), ("schedule", "square"), ("num_inference_steps", 5), ("stop_after", 2)])
def test_every_option_changes_something(name: str, value: object) -> None:
    case = Case("halton")
    changed = Settings(**{**vars(case.settings), name: value})
    assert not torch.equal(generate(case.model, case.prepare, SEEDS, changed), case.fast()[-1].tokens)


def test_noise_changes_the_confidence_order() -> None:
    case = Case("confidence")
    calm = Settings(**{**vars(case.settings), "r_temp": 0.0})
    assert not torch.equal(generate(case.model, case.prepare, SEEDS, calm), case.fast()[-1].tokens)


# --- known tokens, stopping

@given(st.sampled_from(["halton", "random", "confidence"]), st.booleans(), st.integers(1, 23), st.integers(0, 99))
def test_known_tokens_never_change(order: str, previews: bool, free: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    known = torch.randint(13, (2, 24), generator=g)
    for row in known:
        row[torch.randperm(24, generator=g)[:free]] = 13
    kept, fixed = known.clone(), known != 13
    settings = Settings(num_inference_steps=min(3, free), order=order, guidance_scale=2.0)
    for step in stream(CLASS, prepare_labels(CLASS, torch.tensor([0, 3])), [seed, 1], settings, known=known,
                       previews=previews):
        assert torch.equal(step.tokens[fixed], kept[fixed])
        assert step.preview is None or torch.equal(step.preview[fixed], kept[fixed])
    assert step.tokens.max() < 13
    assert torch.equal(known, kept), "the caller's tensor changed"


def test_a_callback_sees_every_step_and_may_stop() -> None:
    case = Case("guided")
    every = case.fast(previews=True)
    seen: list[Step] = []
    tokens = generate(case.model, case.prepare, SEEDS, case.settings, callback_on_step_end=seen.append)
    assert [step.index for step in seen] == list(range(6))
    assert torch.equal(tokens, every[-1].tokens)
    seen.clear()
    tokens = generate(case.model, case.prepare, SEEDS, case.settings,
                      callback_on_step_end=lambda step: seen.append(step) or step.index == 2)
    assert len(seen) == 3
    assert torch.equal(tokens, every[2].preview)


def test_a_consumer_may_leave_the_stream() -> None:
    """Nothing is evaluated before it is asked for: two steps taken are two evaluations."""
    case = Case("halton")
    calls: list[int] = []
    encode = case.model.encode
    watched = SimpleNamespace(config=case.model.config, logits=case.model.logits,
                              encode=lambda tokens, prepared: calls.append(1) or encode(tokens, prepared))
    steps = stream(watched, case.prepare, SEEDS, case.settings)
    assert calls == []
    next(steps), next(steps)
    assert len(calls) == 2
    steps.close()


@pytest.mark.parametrize(("known", "message"), [
    (torch.zeros(2, 24), r"must be \(1, 24\), got \(2, 24\)"),
    (torch.full((1, 24), 14), r"must lie in \[0, 13\], 13 meaning unknown"),
    (torch.full((1, 24), -1), r"must lie in \[0, 13\]"),
    (torch.zeros(1, 24), "no place open"),
    (torch.tensor([[13] * 4 + [0] * 20]), "6 steps are more than the 4 tokens"),
])
def test_bad_known_tokens(known: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(stream(CLASS, prepare_labels(CLASS, torch.tensor([0])), [0], Settings(6), known=known))


def test_known_tokens_must_leave_as_many_places_in_each_image() -> None:
    known = torch.full((2, 24), 13)
    known[0, 0] = 0
    with pytest.raises(ValueError, match="same number of places"):
        next(stream(CLASS, prepare_labels(CLASS, torch.tensor([0, 1])), [0, 1], Settings(6), known=known))


def test_no_seeds() -> None:
    with pytest.raises(ValueError, match="no seeds"):
        next(stream(CLASS, prepare_labels(CLASS, torch.tensor([])), [], Settings(6)))


def test_more_steps_than_tokens() -> None:
    with pytest.raises(ValueError, match="25 steps are more than the 24 tokens"):
        next(stream(CLASS, prepare_labels(CLASS, torch.tensor([0])), [0], Settings(25)))


# --- one seed, one image

WIDE = build_tiny("class", width=256, heads=4, mlp=1024, grid=(8, 8), depth=1, codebook_size=512)
"""Wide enough for the kernels of linear layers to depend on the number of rows."""
IMAGES = [(seed * 7919, seed % 5) for seed in range(40)]  # (seed, label)
INVARIANT = Settings(3, guidance_scale=Interval(2.0, 0.0, 0.5), roll=True)

Sampler = Callable[[Sequence[int], Sequence[int]], Tensor]


def sampler(model: MaskedTransformer, settings: Settings, chunk: int | None) -> Sampler:
    def sample(seeds: Sequence[int], labels: Sequence[int]) -> Tensor:
        return generate(model, prepare_labels(model, torch.tensor(labels)), seeds, settings, chunk=chunk)

    return sample


def different_tokens(sample: Sampler, batches: int = 20, largest: int = 32) -> int:
    """Tokens that differ between an image drawn alone and in random batches in random order."""
    alone: dict[int, Tensor] = {}
    chance, differ = random.Random(0), 0
    for _ in range(batches):
        chosen = chance.sample(range(len(IMAGES)), chance.randint(2, largest))
        together = sample([IMAGES[i][0] for i in chosen], [IMAGES[i][1] for i in chosen])
        for row, i in enumerate(chosen):
            if i not in alone:
                alone[i] = sample([IMAGES[i][0]], [IMAGES[i][1]])[0]
            differ += int((together[row] != alone[i]).sum())
    return differ


@pytest.mark.parametrize(("model", "settings"), [(WIDE, INVARIANT), (CLASS, Settings(4, order="confidence"))],
                         ids=["halton", "confidence"])
def test_the_same_seed_gives_the_same_image_in_any_batch(model: MaskedTransformer, settings: Settings) -> None:
    """As the pipeline runs on a CPU: chunk 1."""
    assert different_tokens(sampler(model, settings, chunk=1)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_text_image_in_any_batch(dtype: torch.dtype) -> None:
    model = build_tiny("text", width=256, heads=4, mlp=1024, grid=(8, 8), depth=2, text_depth=1).to(dtype)
    text = torch.randn(5, 5, 7, generator=torch.Generator().manual_seed(0))

    def sample(seeds: Sequence[int], labels: Sequence[int]) -> Tensor:
        return generate(model, prepare_text(model, text[list(labels)]), seeds, INVARIANT, chunk=1)

    assert different_tokens(sample) == 0


def test_a_seed_that_depends_on_the_batch_is_noticed() -> None:
    sample = sampler(CLASS, Settings(4), chunk=1)
    assert different_tokens(sample, batches=2) == 0
    assert different_tokens(lambda seeds, labels: sample([seeds[0] + i for i in range(len(seeds))], labels),
                            batches=2) > 100


def test_a_generator_shared_by_the_batch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the noise of all images came from the first one's generator."""
    sample = sampler(CLASS, Settings(4), chunk=1)

    def shared(seeds: Sequence[int], labels: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(seeds[0])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "Generator", lambda: SimpleNamespace(manual_seed=lambda seed: generator))
            return sample(seeds, labels)

    assert different_tokens(shared, batches=2) > 100


def test_arithmetic_that_depends_on_the_batch_is_noticed() -> None:
    """Noise of the size of bfloat16's rounding, different in every batch, as kernels that sum in another order for
    another number of rows would give (whether today's do depends on the machine)."""
    def logits(hidden: Tensor, prepared, positions: Tensor) -> Tensor:
        exact = CLASS.logits(hidden, prepared, positions)
        return exact * (1 + 2**-8 * math.sin(len(hidden)))

    noisy = SimpleNamespace(config=CLASS.config, encode=CLASS.encode, logits=logits)

    def sample(seeds: Sequence[int], labels: Sequence[int]) -> Tensor:
        return generate(noisy, prepare_labels(CLASS, torch.tensor(labels)), seeds, Settings(4))

    assert different_tokens(sample, batches=5) > 0


@pytest.mark.usefixtures("global_random_state_kept")
@pytest.mark.parametrize("order", ["halton", "random", "sobol", "confidence"])
def test_sampling_leaves_the_global_generators_alone(order: str) -> None:
    settings = Settings(4, order=order, roll=order != "confidence", guidance_scale=2.0)
    generate(CLASS, prepare_labels(CLASS, torch.tensor([0, 1])), [3, 4], settings)


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_the_global_generators_do_not_matter(order: str) -> None:
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            drawn.append(sampler(CLASS, Settings(4, order=order), None)([3, 4], [0, 1]))
    assert torch.equal(*drawn)


@pytest.mark.usefixtures("global_random_state_kept")
def test_training_helpers_leave_the_global_generators_alone() -> None:
    draw_mask(8, 16, "arccos", step_generator(0, 3))
    batch_indices(10, 4, 0, 5)


# --- drawing

def cdf_of(logits: Tensor) -> np.ndarray:
    p = np.exp(logits.double().numpy() - logits.double().max().item())
    return np.cumsum(p / p.sum())


@given(st.lists(st.floats(-8, 8, width=32) | st.just(-math.inf), min_size=1, max_size=40)
       .filter(lambda row: max(row) > -math.inf), st.floats(0, 1, exclude_max=True, width=32), st.floats(0.1, 3))
def test_a_draw_is_a_search_in_the_cumulative_distribution(row: list[float], u: float, temperature: float) -> None:
    """In float64, away from ties."""
    logits = torch.tensor(row)
    cdf = cdf_of(logits.double() / temperature)
    token, log_p = draw(logits, torch.tensor(u), temperature)
    probability = np.diff(cdf, prepend=0.0)[token]
    assert row[token] > -math.inf
    assert log_p.item() == pytest.approx(math.log(probability), abs=1e-4) if probability > 1e-6 else log_p < -13
    if np.abs(cdf - u).min() > 1e-5:
        assert token == np.searchsorted(cdf, u, side="right")


@given(st.integers(2, 300), st.integers(0, 10**6))
def test_a_batch_of_draws(size: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, u = 3 * torch.randn(2, 3, size, generator=g), torch.rand(2, 3, generator=g)
    tokens, log_p = draw(logits, u, 1.0)
    assert tokens.shape == log_p.shape == u.shape
    for index in np.ndindex(2, 3):
        cdf = cdf_of(logits[index])
        if np.abs(cdf - u[index].item()).min() > 1e-5:
            assert tokens[index] == np.searchsorted(cdf, u[index].item(), side="right")


ALMOST_1 = 1 - 2**-24
"""The largest number torch.rand gives in float32."""


@pytest.mark.parametrize(("row", "u", "token"), [
    ([0.0, 0.0, 0.0, 0.0], 0.0, 0),
    ([0.0, 0.0, 0.0, 0.0], 0.25, 1),  # [0, 1/4) is the first token's share
    ([0.0, 0.0, 0.0, 0.0], ALMOST_1, 3),
    ([-math.inf, -math.inf, 0.0, 0.0], 0.0, 2),  # what cannot be is not drawn, at 0 either
    ([0.0, 0.0, -math.inf, -math.inf], ALMOST_1, 1),
    ([-math.inf, 0.0, -math.inf], 0.5, 1),
    ([0.0, -200.0, -200.0], ALMOST_1, 0),  # nor what float32 takes for 0
    ([5.0], ALMOST_1, 0),
])
def test_the_ends_of_the_distribution(row: list[float], u: float, token: int) -> None:
    assert draw(torch.tensor(row), torch.tensor(u), 1.0)[0] == token


@given(st.integers(2, 2000), st.integers(0, 10**6), st.integers(1, 20))
def test_rounding_never_passes_the_last_token(size: int, seed: int, top_k: int) -> None:
    """The largest uniform number draws a token of the truncated distribution, however the sum was rounded."""
    logits = 4 * torch.randn(16, size, generator=torch.Generator().manual_seed(seed))
    tokens, log_p = draw(logits, torch.full((16,), ALMOST_1), 1.0, top_k=top_k)
    assert (log_p > -20).all()
    assert (logits.gather(1, tokens[:, None]) >= logits.topk(min(top_k, size)).values[:, -1:]).all()


def test_a_sum_that_is_not_flat_draws_nothing_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in parallel, as on a GPU, may round differently from entry to entry where nothing is added."""
    logits = torch.full((200,), -math.inf)
    logits[[60, 140]] = 0.0
    cumsum, tremble = torch.Tensor.cumsum, 2**-24 * torch.tensor([0.0, 1.0]).repeat(100)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: cumsum(x, dim) + tremble)
    for u in (0.0, 0.5 - 2**-24, 0.5, 0.5 + 2**-24, ALMOST_1):
        assert draw(logits, torch.tensor(u), 1.0)[0] in (60, 140)


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-7])
def test_temperature_0_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 4.999]])
    for u in (0.0, 0.5, ALMOST_1):
        tokens, log_p = draw(logits, torch.full((2,), u), temperature)
        assert tokens.tolist() == [1, 0]
        torch.testing.assert_close(log_p, logits.log_softmax(-1).amax(-1))


def test_a_small_temperature_tends_to_the_likeliest() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    u = torch.rand(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(logits, u, 1e-5)[0], draw(logits, u, 0.0)[0])


def test_half_precision_logits_are_drawn_in_float32() -> None:
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    u = torch.rand(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(logits, u, 0.7, top_p=0.9)[0], draw(logits.float(), u, 0.7, top_p=0.9)[0])


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [
    (0, 1.0, 4), (1, 1.0, 1), (3, 1.0, 3), (4, 1.0, 4), (9, 1.0, 4), (0, 0.01, 1), (0, 0.49, 1), (0, 0.51, 2),
    (0, 0.79, 2), (0, 0.81, 3), (0, 0.96, 4),
    (2, 0.6, 1),  # of 0.5 and 0.3 alone, the first holds 0.625
    (2, 0.63, 2)])
def test_truncation(top_k: int, top_p: float, kept: int) -> None:
    for shuffle in ([0, 1, 2, 3], [3, 1, 0, 2]):
        finite = truncate(LOGITS[shuffle], top_k, top_p) > -math.inf
        assert finite.tolist() == [j < kept for j in shuffle]


def test_top_k_keeps_ties() -> None:
    assert (truncate(torch.tensor([1.0, 2.0, 1.0, 0.0]), 2, 1.0) > -math.inf).tolist() == [True, True, True, False]


# --- statistics: a toy model whose conditional probabilities are known

class Toy:
    """Logits of a place depend on the place, the condition, and the tokens of its neighbours in reading order (the mask
    counts as one more token). A MaskedModel without layers."""

    def __init__(self, places: int, codes: int) -> None:
        g = torch.Generator().manual_seed(places)
        self.config = SimpleNamespace(tokens=places, grid=(1, places), codebook_size=codes, mask_id=codes)
        self.base = torch.randn(2, places, codes, generator=g)
        self.left, self.right = 1.5 * torch.randn(2, codes + 1, codes, generator=g)

    def prepare(self, images: slice, guided: bool) -> Tensor:
        """Condition 1 for every image, 0 for the unconditional half."""
        size = images.stop - images.start
        return torch.tensor([1] * size + [0] * size if guided else [1] * size)

    def encode(self, tokens: Tensor, prepared: Tensor) -> Tensor:
        return tokens

    def logits(self, hidden: Tensor, prepared: Tensor, positions: Tensor | None = None) -> Tensor:
        logits = self.base[prepared].clone()
        logits[:, 1:] += self.left[hidden[:, :-1]]
        logits[:, :-1] += self.right[hidden[:, 1:]]
        return logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))

    def probabilities(self, place: int, tokens: Sequence[int], settings: Settings) -> list[float]:
        """By plain Python, at constant guidance and temperature."""
        rows = []
        for condition in (0, 1):
            row = self.base[condition, place].tolist()
            if place:
                row = [a + b for a, b in zip(row, self.left[tokens[place - 1]].tolist(), strict=True)]
            if place + 1 < len(tokens):
                row = [a + b for a, b in zip(row, self.right[tokens[place + 1]].tolist(), strict=True)]
            rows.append(row)
        guided = [u + settings.guidance_scale * (c - u) for u, c in zip(*rows, strict=True)]
        return reference.slow_probabilities(guided, settings.temperature, settings.top_k, settings.top_p)


def p_value(observed: Tensor, probabilities: Tensor) -> float:
    """Chi-square test of counts against probabilities; cells that expect fewer than five are pooled, impossible ones
    must be empty."""
    observed, probabilities = observed.double().flatten(), probabilities.double().flatten()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    if observed[probabilities == 0].any():
        return 0.0
    expected = probabilities * observed.sum()
    few = (expected < 5) & (probabilities > 0)
    cells = [(observed[i].item(), expected[i].item()) for i in (expected >= 5).nonzero()[:, 0]]
    if few.any() and expected[few].sum() > 0.5:
        cells.append((observed[few].sum().item(), expected[few].sum().item()))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    return float(chi2.sf(statistic, len(cells) - 1)) if len(cells) > 1 else 1.0


DRAWS = 6_000
SHAPING = {
    "plain": {}, "guided": {"guidance_scale": 2.5}, "guided back": {"guidance_scale": 0.5},
    "unconditional": {"guidance_scale": 0.0}, "cold": {"temperature": 0.6}, "hot": {"temperature": 1.7},
    "top-k": {"top_k": 3}, "top-p": {"top_p": 0.75},
    "all": {"guidance_scale": 1.8, "temperature": 0.8, "top_k": 5, "top_p": 0.85},
}


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(places=3, codes=6)


def sample_toy(toy: Toy, settings: Settings, draws: int = DRAWS) -> Tensor:
    return generate(toy, toy.prepare, range(draws), settings)


@pytest.mark.parametrize("name", SHAPING)
def test_frequencies_are_the_models_probabilities(toy: Toy, name: str) -> None:
    """All three places drawn in one step, from their distributions beside masks; and independently of one another."""
    settings = Settings(1, **SHAPING[name])
    tokens = sample_toy(toy, settings)
    shares = torch.tensor([toy.probabilities(place, [6] * 3, settings) for place in range(3)])
    for place in range(3):
        observed = tokens[:, place].bincount(minlength=6)
        assert p_value(observed, shares[place]) > 1e-3
        if name != "plain":
            plain = torch.tensor(toy.probabilities(place, [6] * 3, Settings(1)))
            assert p_value(observed, plain) < 1e-6, "the test would not notice that the option does nothing"
    together = (tokens[:, 0] * 6 + tokens[:, 1]).bincount(minlength=36)
    assert p_value(together, torch.outer(shares[0], shares[1])) > 1e-3


def joint(toy: Toy, order: Sequence[int], settings: Settings) -> Tensor:
    """Probabilities (6, 6, 6) of the three tokens revealed one at a time in an order."""
    table = torch.zeros(6, 6, 6, dtype=torch.float64)

    def walk(tokens: list[int], depth: int, weight: float) -> None:
        if depth == 3:
            table[tuple(tokens)] = weight
            return
        for token, p in enumerate(toy.probabilities(order[depth], tokens, settings)):
            walk([token if place == order[depth] else t for place, t in enumerate(tokens)], depth + 1, weight * p)

    walk([6, 6, 6], 0, 1.0)
    return table


@pytest.mark.parametrize("name", SHAPING)
def test_one_token_at_a_time_gives_the_joint_distribution(toy: Toy, name: str) -> None:
    settings = Settings(3, order="raster", **SHAPING[name])
    tokens = sample_toy(toy, settings)
    observed = (tokens * torch.tensor([36, 6, 1])).sum(1).bincount(minlength=216)
    expected = joint(toy, [0, 1, 2], settings)
    assert p_value(observed, expected) > 1e-3
    pairs = observed.view(6, 6, 6).sum(2)
    assert p_value(pairs, expected.sum(2)) > 1e-3
    assert p_value(pairs, torch.outer(expected.sum((1, 2)), expected.sum((0, 2)))) < 1e-6, "the tokens are independent"


def test_the_order_of_revelation_counts(toy: Toy) -> None:
    """Halton on 1x3 reveals the middle, the right, the left place; the joint distribution is that order's alone."""
    settings = Settings(3)
    tokens = sample_toy(toy, settings)
    observed = (tokens * torch.tensor([36, 6, 1])).sum(1).bincount(minlength=216)
    assert p_value(observed, joint(toy, [1, 2, 0], settings)) > 1e-3
    assert p_value(observed, joint(toy, [0, 1, 2], settings)) < 1e-6


def test_consecutive_and_distant_seeds_are_independent(toy: Toy) -> None:
    """Image i of a call takes seed + i: the first tokens of neighbouring seeds must not go together."""
    settings = Settings(1)
    shares = torch.tensor(toy.probabilities(0, [6] * 3, settings))
    tokens = sample_toy(toy, settings)[:, 0]
    for distance in (1, 2, 16, 1024):
        pairs = (tokens[:-distance] * 6 + tokens[distance:]).bincount(minlength=36)
        # overlapping pairs are not independent draws: the statistic is a little larger than chi-square's
        assert p_value(pairs, torch.outer(shares, shares)) > 1e-5


# --- settings

@pytest.mark.parametrize(("change", "message"), [
    ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
    ({"order": "haltom"}, "unknown order 'haltom': did you mean halton"),
    ({"schedule": "squared"}, "unknown schedule 'squared': did you mean square"),
    ({"schedule": -1.0}, "power must be a positive number, got -1.0"),
    ({"guidance_scale": -0.5}, "guidance_scale must be finite and not negative, got -0.5"),
    ({"guidance_scale": (1.0, -2.0)}, "guidance_scale .*-2.0"),
    ({"guidance_scale": Ramp(-1.0, 2.0)}, "guidance_scale .*-1.0"),
    ({"guidance_scale": Interval(-1.0, 0.0, 0.5)}, "guidance_scale .*-1.0"),
    ({"guidance_scale": math.nan}, "guidance_scale .*nan"),
    ({"guidance_scale": (1.0, math.inf)}, "guidance_scale .*inf"),
    ({"guidance_scale": (1.0, 2.0, 3.0)}, "guidance_scale: a ramp is a pair"),
    ({"temperature": -0.1}, "temperature must be finite and not negative, got -0.1"),
    ({"temperature": (0.5, -0.1)}, "temperature .*-0.1"),
    ({"temperature": math.inf}, "temperature .*inf"),
    ({"top_k": -1}, "top_k must be 0 .*got -1"),
    ({"top_p": 0.0}, "top_p .*got 0.0"),
    ({"top_p": 1.1}, "top_p .*got 1.1"),
    ({"top_p": math.nan}, "top_p .*nan"),
    ({"r_temp": -1.0}, "r_temp .*got -1.0"),
    ({"roll": True, "order": "confidence"}, "roll turns a fixed order"),
    ({"stop_after": 0}, r"stop_after must lie in 1 ... num_inference_steps \(16\), got 0"),
    ({"stop_after": 17}, "stop_after .*got 17"),
])
def test_bad_settings_name_the_culprit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**change)


@pytest.mark.parametrize(("arguments", "message"), [
    ((1.0, 2.0, "cubic"), "unknown ramp 'cubic'.*linear, harmonic"),
    ((1.0, 0.0, "harmonic"), "harmonic ramp needs ends above 0, got 1.0 and 0.0"),
])
def test_bad_ramps(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ramp(*arguments)


@pytest.mark.parametrize("span", [(0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1.0)])
def test_bad_intervals(span: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=f"got {span[0]} and {span[1]}"):
        Interval(2.0, *span)


@pytest.mark.parametrize(("value", "expected"), [
    (2, [2, 2, 2, 2, 2]),
    ((1.0, 3.0), [1, 1.5, 2, 2.5, 3]),
    ([1.0, 3.0], [1, 1.5, 2, 2.5, 3]),
    (Ramp(3.0, 1.0), [3, 2.5, 2, 1.5, 1]),
    (Ramp(1.0, 0.5, "harmonic"), [1, 1 / 1.25, 1 / 1.5, 1 / 1.75, 0.5]),
    (Interval(4.0, 0.2, 0.6), [1, 4, 4, 1, 1]),
    (Interval(4.0, 0.0, 1.0), [4, 4, 4, 4, 4]),
])
def test_values_over_the_steps(value, expected: list[float]) -> None:
    assert [value_at(value, step, 5) for step in range(5)] == pytest.approx(expected)


def test_a_ramp_of_one_step_is_its_start() -> None:
    assert value_at((2.0, 5.0), 0, 1) == 2.0


@pytest.mark.parametrize(("text", "value"), [
    ("3", 3.0), ("0.5", 0.5), ("1:4", (1.0, 4.0)), ("1.5:0", (1.5, 0.0)), ("3@0.2-0.8", Interval(3.0, 0.2, 0.8)),
    ("2@0-1", Interval(2.0, 0.0, 1.0)),
])
def test_parse_varying(text: str, value: object) -> None:
    assert parse_varying(text) == value


@pytest.mark.parametrize("text", ["", "three", "1:2:3", "1:", "3@0.2", "3@0.2-0.8-0.9", "3@0.8-0.2", "@"])
def test_what_does_not_parse_is_quoted(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is neither a number"):
        parse_varying(text)
