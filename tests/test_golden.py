"""Golden values: outputs of the public networks, whose weights are filled by a rule anyone can repeat.

tests/data/golden.json holds them; the rule stands in `fill`.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask.layouts import build_network, infer_config, published_name, to_ours
from unmask.models.presets import TOKENIZERS, TRANSFORMERS, build
from unmask.models.transformer import MaskedTransformer, TransformerConfig
from unmask.orders import halton_order
from unmask.schedules import cumulative_counts

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden.json").read_text())
LAYOUTS = json.loads((DATA / "state_dict_keys.json").read_text())
SAMPLING = json.loads((DATA / "schedules_orders.json").read_text())

TRANSFORMER_LAYOUTS = {"class_tiny_256": "ImageNet_256_tiny", "class_small_384": "ImageNet_384_small",
                       "class_patch2": "class_patch2_demo", "text_patch2": "text_patch2_demo"}
PRESETS = {"ImageNet_256_tiny": "class-t-256", "ImageNet_256_small": "class-s-256",
           "ImageNet_256_base": "class-b-256", "ImageNet_384_small": "class-s-384",
           "ImageNet_384_base": "class-b-384", "ImageNet_384_large": "class-l-384",
           "class_table2_xl": "class-xl-2", "text_table2": "text-l-2",
           "llamagen_VQ-16": "vq-ds16", "llamagen_VQ-8": "vq-ds8"}


def fill(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights of a published layout, a pure function of names and shapes."""
    weights = {}
    for name, shape in shapes.items():
        key = "tok_emb.weight" if name == "head.weight" else name
        generator = np.random.default_rng(zlib.crc32(key.encode()))
        values = 0.05 * generator.standard_normal(shape, dtype=np.float32)
        if name.endswith(".weight") and len(shape) == 1:
            values += 1
        weights[name] = torch.from_numpy(values)
    return weights


def evaluate(expression: str) -> torch.Tensor:
    """A numpy expression of golden.json -> tensor. The file is our own data."""
    names = {"default_rng": np.random.default_rng, "clip": np.clip, "float32": np.float32}
    return torch.from_numpy(np.asarray(eval(expression, {"__builtins__": {}}, names)))


def close(a: torch.Tensor, b: list) -> None:
    torch.testing.assert_close(a.float(), torch.tensor(b), atol=1e-3, rtol=0)


@pytest.fixture(scope="module", params=TRANSFORMER_LAYOUTS)
def case(request):
    """(golden entry, model, tokens, prepared condition) of each transformer."""
    golden = GOLDEN[request.param]
    weights = fill(LAYOUTS[TRANSFORMER_LAYOUTS[request.param]])
    heads = golden["config"]["heads"]
    config = infer_config(weights, heads=heads)
    model = build_network(config)
    model.load_state_dict(to_ours(weights, config), assign=True)
    inputs = golden["inputs"]
    condition = evaluate(inputs["text"]) if "text" in inputs else torch.tensor(inputs["labels"])
    with torch.no_grad():
        prepared = model.prepare(condition, torch.tensor(inputs["drop_label"]))
    return golden, model, evaluate(inputs["tokens"]).flatten(1), prepared


@torch.no_grad()
def all_logits(model: MaskedTransformer, hidden: torch.Tensor, prepared, positions=None) -> torch.Tensor:
    """(B, k or N, V + 1): the library's logits, and the mask's own, which it never computes."""
    size = model.config.codebook_size
    features = model.features(hidden, prepared, positions)
    mask = features @ model.token_embedding.weight[size] + model.head_bias[size]
    return torch.cat([model.logits(hidden, prepared, positions), mask[..., None]], dim=-1)


@torch.no_grad()
def test_dense_logits(case) -> None:
    golden, model, tokens, prepared = case
    expected = golden["logits"]
    logits = all_logits(model, model.encode(tokens, prepared), prepared)
    assert list(logits.shape) == expected["shape"]
    assert logits.double().mean().item() == pytest.approx(expected["mean"], abs=1e-5)
    assert logits.double().std().item() == pytest.approx(expected["std"], abs=1e-5)
    close(logits[:, expected["positions"]][..., expected["entries"]], expected["values"])
    assert (logits.argmax(-1) == torch.tensor(expected["argmax"])).float().mean() >= 0.999  # ties of rounding


@torch.no_grad()
def test_logits_at_positions(case) -> None:
    golden, model, tokens, prepared = case
    expected = golden["logits"]
    positions = torch.tensor(expected["positions"]).expand(len(tokens), -1)
    logits = all_logits(model, model.encode(tokens, prepared), prepared, positions)
    close(logits[..., expected["entries"]], expected["values"])


@pytest.mark.parametrize("name", ["llamagen_VQ-16", pytest.param("llamagen_VQ-8", marks=pytest.mark.slow)])
@torch.no_grad()
def test_tokenizers(name: str) -> None:
    golden, weights = GOLDEN[name], fill(LAYOUTS[name])
    config = infer_config(weights)
    model = build_network(config)
    model.load_state_dict(to_ours(weights, config), assign=True)
    tokens = model.encode(evaluate(golden["inputs"]["image"]))
    assert (tokens[0] == torch.tensor(golden["encoded"])).float().mean() >= 0.995
    image, expected = model.decode(evaluate(golden["inputs"]["codes"])), golden["decoded"]
    assert image.mean().item() == pytest.approx(expected["mean"], abs=1e-4)
    assert image.std().item() == pytest.approx(expected["std"], abs=1e-4)
    close(image[0, 0, 0, :len(expected["row0"])], expected["row0"])
    close(image[0, :, image.shape[2] // 2, image.shape[3] // 2], expected["centre"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_map_one_to_one(layout: str) -> None:
    weights = {name: torch.empty(shape, device="meta") for name, shape in LAYOUTS[layout].items()}
    config = infer_config(weights, heads=4 if layout.endswith("demo") else None)
    ours = to_ours(weights, config)
    network = build_network(config).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in network.items()}
    if layout in PRESETS:
        expected = {**TRANSFORMERS, **TOKENIZERS}[PRESETS[layout]]()
        assert config == expected
    names = set(ours)
    if isinstance(config, TransformerConfig):
        places = [published_name(name, config.condition) for name in ours]
        assert len(set(places)) == len(places)
        names = {name for name, _ in places}
    assert names == weights.keys() - {"head.weight", "quantize.codebook_used"}


@pytest.mark.parametrize(("name", "count"), [("text-l-2", 479_761_409), ("class-xl-2", 703_619_969)])
def test_parameter_counts(name: str, count: int) -> None:
    assert sum(p.numel() for p in build(name, device="meta").parameters()) == count


@pytest.mark.parametrize("key", SAMPLING["cumulative_counts"])
def test_cumulative_counts(key: str) -> None:
    schedule, n, steps = key.split("_")
    assert cumulative_counts(schedule, int(n[1:]), int(steps[1:])) == SAMPLING["cumulative_counts"][key]


@pytest.mark.parametrize("size", SAMPLING["halton_order_row_col"])
def test_halton_orders(size: str) -> None:
    side = int(size)
    order = halton_order((side, side))
    pairs = torch.stack([order // side, order % side], dim=1).tolist()
    assert pairs == SAMPLING["halton_order_row_col"][size]
