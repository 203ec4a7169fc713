"""The published sizes, and the sizes of the embedded models, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..errors import unknown_name
from ..tokenizers.vqgan import VQGAN, VQConfig
from .transformer import TransformerConfig, build_transformer, swiglu_hidden

CLASS_SIZES = {
    "tiny": (384, 6, 6),
    "small": (512, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xlarge": (1152, 28, 16),
}
"""(width, depth, heads) of the public class models."""


def class_transformer(size: str, grid: int, patch: int = 1, codebook_size: int = 16384,
                      classes: int = 1000) -> TransformerConfig:
    """A class transformer of a published size on a square grid; one register, as published."""
    if size not in CLASS_SIZES:
        raise unknown_name("size", size, list(CLASS_SIZES))
    width, depth, heads = CLASS_SIZES[size]
    return TransformerConfig("class", (grid, grid), codebook_size, width, depth, heads, swiglu_hidden(width),
                             patch=patch, registers=1, classes=classes)


def text_transformer_table2() -> TransformerConfig:
    """The text transformer of Table 2: 1024 wide, 24 deep, patch 2 on 32x32 tokens, 120 T5-XL vectors of 2048."""
    return TransformerConfig("text", (32, 32), 16384, 1024, 24, 16, 4096, patch=2, text_dim=2048, text_length=120)


TRANSFORMERS: dict[str, Callable[[], TransformerConfig]] = {
    "class-t-256": lambda: class_transformer("tiny", 16),
    "class-s-256": lambda: class_transformer("small", 16),
    "class-b-256": lambda: class_transformer("base", 16),
    "class-s-384": lambda: class_transformer("small", 24),
    "class-b-384": lambda: class_transformer("base", 24),
    "class-l-384": lambda: class_transformer("large", 24),
    "class-xl-2": lambda: class_transformer("xlarge", 32, patch=2),
    "text-l-2": text_transformer_table2,
}

TOKENIZERS: dict[str, Callable[[], VQConfig]] = {
    "vq-ds16": VQConfig,
    "vq-ds8": lambda: VQConfig(multipliers=(1, 2, 2, 4), encoder_blocks=(2, 2, 2, 2), decoder_blocks=(3, 3, 3, 3)),
}


def build(name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """Builds a network by name with fresh weights: a transformer of TRANSFORMERS or a tokenizer of TOKENIZERS.

    device "meta" gives shapes without memory. Raises ValueError listing the names for an unknown one.
    """
    if name not in TRANSFORMERS and name not in TOKENIZERS:
        raise unknown_name("network", name, [*TRANSFORMERS, *TOKENIZERS])
    with torch.device(device or "cpu"):
        network: nn.Module = (build_transformer(TRANSFORMERS[name]()) if name in TRANSFORMERS
                              else VQGAN(TOKENIZERS[name]()))
    return network.to(dtype) if dtype else network
