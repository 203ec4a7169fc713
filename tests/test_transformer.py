"""The transformers against a dense forward pass written out in plain tensor algebra (reference.py)."""

import pytest
import torch
from torch import Tensor

import reference
from conftest import build_tiny
from unmask.models.transformer import MaskedTransformer, TransformerConfig, build_transformer

VARIANTS = {
    "class": ("class", {}),
    "class without registers": ("class", {"registers": 0}),
    "class patch 2": ("class", {"patch": 2}),
    "class patch 2, three registers": ("class", {"patch": 2, "registers": 3}),
    "class, heads that do not divide the width": ("class", {"heads": 5}),
    "text": ("text", {}),
    "text with registers": ("text", {"registers": 2}),
    "text patch 2": ("text", {"patch": 2}),
    "text, encoder": ("text", {"text_depth": 2}),
    "text patch 2, encoder": ("text", {"patch": 2, "text_depth": 2}),
}
PUBLISHED = [name for name in VARIANTS if name != "text with registers"]
"""The public text model has no registers, so that the reference knows none there."""

IMAGES = 3


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> MaskedTransformer:
    condition, changes = VARIANTS[request.param]
    return build_tiny(condition, **changes)


def condition_of(model: MaskedTransformer, size: int = IMAGES) -> Tensor:
    c, g = model.config, torch.Generator().manual_seed(7)
    if c.condition == "class":
        return torch.randint(c.classes, (size,), generator=g)
    return torch.randn(size, c.text_length, c.text_dim, generator=g)


def tokens_of(model: MaskedTransformer, size: int = IMAGES) -> Tensor:
    """Random tokens, the mask among them."""
    c, g = model.config, torch.Generator().manual_seed(8)
    tokens = torch.randint(c.codebook_size, (size, c.tokens), generator=g)
    return tokens.masked_fill(torch.rand(tokens.shape, generator=g) < 0.5, c.mask_id)


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def logits(model: MaskedTransformer, tokens: Tensor, condition: Tensor, null: Tensor | None = None,
           positions: Tensor | None = None) -> Tensor:
    prepared = model.prepare(condition, null)
    return model.logits(model.encode(tokens, prepared), prepared, positions)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dropped", [None, [True, False, True]])
def test_logits_are_those_of_the_reference(name: str, dropped: list[bool] | None) -> None:
    condition, changes = VARIANTS[name]
    model = build_tiny(condition, **changes)
    tokens, given = tokens_of(model), condition_of(model)
    null = None if dropped is None else torch.tensor(dropped)
    expected = reference.dense_logits(model, tokens, given, null)
    assert expected.std() > 0.5
    close(logits(model, tokens, given, null), expected)
    close(logits(model, tokens, given, null, torch.arange(24).expand(IMAGES, -1)), expected)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 24])
def test_logits_at_positions_are_the_dense_ones(model: MaskedTransformer, count: int) -> None:
    """1, 2 and 5 positions are fewer than the patches of any variant, 24 are all, in another order for each image."""
    tokens, given = tokens_of(model), condition_of(model)
    generator = torch.Generator().manual_seed(count)
    positions = torch.stack([torch.randperm(24, generator=generator)[:count] for _ in range(IMAGES)])
    dense = logits(model, tokens, given)
    expected = torch.stack([dense[i, positions[i]] for i in range(IMAGES)])
    close(logits(model, tokens, given, positions=positions), expected)


@pytest.mark.parametrize("positions", [[0, 0, 0], [23, 5, 5, 23], [0, 1, 6, 7], [13] * 30])
def test_repeated_positions_and_patches(model: MaskedTransformer, positions: list[int]) -> None:
    """Positions that share a patch (0, 1, 6, 7 of a grid 6 wide) or are the same."""
    tokens, given = tokens_of(model), condition_of(model)
    dense = logits(model, tokens, given)
    close(logits(model, tokens, given, positions=torch.tensor([positions] * IMAGES)), dense[:, positions])


def test_what_is_prepared_once_serves_every_step(model: MaskedTransformer) -> None:
    """One `prepare` for several token grids, kept unchanged by them, gives what preparing anew for each gives."""
    given = condition_of(model)
    prepared = model.prepare(given)
    for seed in range(3):
        tokens = torch.randint(14, (IMAGES, 24), generator=torch.Generator().manual_seed(seed))
        positions = torch.tensor([[seed, 9, 20]] * IMAGES)
        once = model.logits(model.encode(tokens, prepared), prepared, positions)
        assert torch.equal(once, logits(model, tokens, given, positions=positions))


def test_hidden_serves_several_requests(model: MaskedTransformer) -> None:
    tokens, prepared = tokens_of(model), model.prepare(condition_of(model))
    hidden = model.encode(tokens, prepared)
    dense = model.logits(hidden, prepared)
    for position in (0, 11, 23):
        close(model.logits(hidden, prepared, torch.full((IMAGES, 1), position)), dense[:, [position]])


def test_the_null_condition(model: MaskedTransformer) -> None:
    """Dropped, a label is the null class and a text is zeros; the others stay as they are."""
    tokens, given = tokens_of(model), condition_of(model)
    null = torch.tensor([True, False, True])
    empty = torch.full_like(given, model.config.classes) if model.config.condition == "class" else 0 * given
    dropped = logits(model, tokens, given, null)
    close(dropped[[0, 2]], logits(model, tokens, empty)[[0, 2]])
    close(dropped[[1]], logits(model, tokens, given)[[1]])
    assert (dropped[0] - logits(model, tokens, given)[0]).abs().max() > 0.01


def test_every_token_sees_every_other_and_the_condition(model: MaskedTransformer) -> None:
    tokens, given = tokens_of(model), condition_of(model)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 13
    base = logits(model, tokens, given)
    for other in (logits(model, changed, given), logits(model, tokens, given.flip(0))):
        assert ((base - other).abs().amax(-1)[0] > 1e-4).all()


def test_the_mask_is_no_candidate(model: MaskedTransformer) -> None:
    assert logits(model, tokens_of(model), condition_of(model)).shape == (IMAGES, 24, 13)


def test_half_precision_gives_float32_logits(model: MaskedTransformer) -> None:
    tokens, given, positions = tokens_of(model), condition_of(model), torch.tensor([[1, 8, 20]] * IMAGES)
    expected = logits(model, tokens, given, positions=positions)
    halved = logits(model.bfloat16(), tokens, given, positions=positions)
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, expected, atol=0.25, rtol=0.1)


def test_gradients_reach_every_weight(model: MaskedTransformer) -> None:
    """In training mode attention takes another path on a CPU: same logits, and nothing is left out."""
    tokens, given = tokens_of(model), condition_of(model)
    expected = logits(model, tokens, given)
    model.requires_grad_(True)
    null = torch.tensor([True, False, False])
    got = logits(model, tokens, given)
    close(got.detach(), expected)
    (got.square().sum() + logits(model, tokens, given, null).square().sum()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a bias of the keys shifts all scores of a query alike
    assert [name for name in silent if not name.endswith("k.bias")] == []


@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.parametrize("patch", [1, 2])
def test_a_fresh_model_is_finite_and_modulations_are_zero(condition: str, patch: int) -> None:
    config = build_tiny(condition, patch=patch).config
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_transformer(config).eval()
        assert logits(model, tokens_of(model), condition_of(model)).isfinite().all()
    assert not any(p.any() for name, p in model.named_parameters() if "modulation" in name)


# --- bad input

def test_wrong_number_of_tokens(model: MaskedTransformer) -> None:
    with pytest.raises(ValueError, match=r"tokens must be \(B, 24\) for a grid of 4x6, got \(3, 23\)"):
        logits(model, tokens_of(model)[:, 1:], condition_of(model))


@pytest.mark.parametrize("label", [-1, 6])
def test_labels_out_of_range(tiny_class: MaskedTransformer, label: int) -> None:
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 5\), got \[.*{label}"):
        tiny_class.prepare(torch.tensor([2, label]))


def test_text_of_another_encoder(tiny_text: MaskedTransformer) -> None:
    with pytest.raises(ValueError, match=r"text must be \(B, 5, 7\), got \(2, 5, 8\)"):
        tiny_text.prepare(torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match=r"got \(2, 4, 7\)"):
        build_tiny("text", text_depth=1).prepare(torch.zeros(2, 4, 7))


@pytest.mark.parametrize(("change", "message"), [
    ({"condition": "image"}, "'image'"),
    ({"patch": 4}, "4x6 cannot be cut into patches of 4"),
    ({"classes": 0}, "needs classes"),
    ({"condition": "text"}, "needs text_dim"),
])
def test_bad_configurations(tiny_class: MaskedTransformer, change: dict, message: str) -> None:
    fields = {**vars(tiny_class.config), **change}
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**fields)
