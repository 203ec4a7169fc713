"""Fixtures shared by the tests: small transformers whose every weight says something."""

import random
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from unmask.models.transformer import MaskedTransformer, TransformerConfig, build_transformer
from unmask.pipeline import Pipeline
from unmask.sampling import Settings
from unmask.text import WordVectors
from unmask.tokenizers.vqgan import VQGAN, VQConfig

hypothesis.settings.register_profile("unmask", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("unmask")

SHAPES = {
    "class": {"grid": (4, 6), "codebook_size": 13, "width": 24, "depth": 2, "heads": 3, "mlp": 40, "registers": 1,
              "classes": 5},
    "text": {"grid": (4, 6), "codebook_size": 13, "width": 24, "depth": 2, "heads": 3, "mlp": 40, "text_dim": 7,
             "text_length": 5},
}


def build_tiny(condition: str, seed: int = 0, **changes: object) -> MaskedTransformer:
    """A transformer of SHAPES[condition] with `changes`, in eval mode and without gradients. All its weights are
    random, modulations, gains and biases too (a fresh model has them at 0 or 1, which would hide a mistake); the global
    generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        model = build_transformer(TransformerConfig(condition, **{**SHAPES[condition], **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.3 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.3 * noise)
            elif "embedding" in name or name in ("registers", "text_position"):
                weight.copy_(0.4 * noise)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture
def make_model() -> Callable[..., MaskedTransformer]:
    """build_tiny as a fixture: make_model("class" or "text", seed=0, **config fields)."""
    return build_tiny


@pytest.fixture
def tiny_class() -> MaskedTransformer:
    """4x6 tokens of 13 codes, 5 classes, one register."""
    return build_tiny("class")


@pytest.fixture
def tiny_class_patch2() -> MaskedTransformer:
    return build_tiny("class", patch=2)


@pytest.fixture
def tiny_text() -> MaskedTransformer:
    """4x6 tokens of 13 codes, 5 text vectors of 7 numbers, no text encoder of its own."""
    return build_tiny("text")


@pytest.fixture
def tiny_text_patch2() -> MaskedTransformer:
    """Patch 2, and a trained text encoder of one block."""
    return build_tiny("text", patch=2, text_depth=1)


@pytest.fixture
def global_random_state_kept():
    """Fails the test if it changed the global random state of torch, numpy or Python."""
    def state() -> tuple:
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()

    before = state()
    yield
    assert state() == before, "the global random state changed"


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_pipeline_folder("class" or "text"): a complete pipeline folder of random weights, drawing 8x12 pixels. Copy
    it before changing it."""
    made: dict[str, Path] = {}

    def make(condition: str) -> Path:
        if condition not in made:
            tokenizer = VQGAN(VQConfig(13, 4, 8, (1, 2), (0, 1), (1, 1), 8, norm_groups=2)).eval().requires_grad_(False)
            generator = torch.Generator().manual_seed(1)
            for weight in tokenizer.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
            words = WordVectors.load()
            changes = {"text_dim": words.dim, "text_length": words.max_length} if condition == "text" else {}
            pipe = Pipeline(build_tiny(condition, **changes), tokenizer, words if condition == "text" else None,
                            ["ant", "bee, wasp", "cat", "dog", "elk"] if condition == "class" else None,
                            Settings(num_inference_steps=6), config={"text_encoder": "words"} if changes else {})
            made[condition] = tmp_path_factory.mktemp("pipelines") / f"tiny-{condition}"
            pipe.save_pretrained(made[condition])
        return made[condition]

    return make
