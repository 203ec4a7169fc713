"""The masked transformers: class-to-image (AdaLN) and text-to-image (cross-attention).

Source: the paper's section 1 and Table 2, in the layout of its public code. Both share embedding, patches, blocks and
the head tied to the token embedding; they differ in their blocks, their condition and their last norm.

Shapes: B images, N = h * w tokens, P = N / patch ** 2 patches, k positions asked for, V codes, D width, T text tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ClassBlock, EncoderBlock, KeysValues, RMSNorm, TextBlock, take_rows


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a masked transformer.

    condition: "class" or "text". grid: (h, w) tokens. codebook_size: V; token V is the mask. mlp: hidden width of the
    feed-forward layers. patch: side of the square of tokens that one row of the network stands for. registers: extra
    rows that belong to no patch. classes: labels 0 ... classes - 1 (class models). text_dim, text_length: width and
    number of the text encoder's vectors; text_depth: blocks of a small encoder trained over them (0: none).
    """

    condition: str
    grid: tuple[int, int]
    codebook_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    patch: int = 1
    registers: int = 0
    classes: int = 0
    text_dim: int = 0
    text_length: int = 0
    text_depth: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.condition not in ("class", "text"):
            raise ValueError(f"condition must be 'class' or 'text', got '{self.condition}'")
        if self.grid[0] % self.patch or self.grid[1] % self.patch:
            raise ValueError(f"a grid of {self.grid[0]}x{self.grid[1]} cannot be cut into patches of {self.patch}")
        needed = "classes" if self.condition == "class" else "text_dim"
        if getattr(self, needed) < 1:
            raise ValueError(f"a {self.condition} model needs {needed} of at least 1")

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def mask_id(self) -> int:
        """The token that stands for an unknown place: the codebook size."""
        return self.codebook_size


def swiglu_hidden(width: int) -> int:
    """Hidden width of the class models' SwiGLU: two thirds of 4 * width, rounded up to a multiple of 256."""
    return math.ceil(2 * 4 * width // 3 / 256) * 256


class Prepared(NamedTuple):
    """All that depends on the condition alone: computed once an image, used at every step."""

    blocks: list[Any]
    final: Tensor | None


class MaskedTransformer(nn.Module):
    """What both transformers share. `prepare` once an image, then at each step `encode` and `logits`."""

    blocks: nn.ModuleList

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.token_embedding = nn.Embedding(c.codebook_size + 1, c.width)
        self.position_embedding = nn.Parameter(torch.empty(c.tokens, c.width))
        self.registers = nn.Parameter(torch.empty(c.registers, c.width)) if c.registers else None
        if c.patch > 1:
            self.patch_in = nn.Conv2d(c.width, c.width, c.patch, stride=c.patch, bias=False)
            self.patch_out = nn.Linear(c.width, c.patch**2 * c.width, bias=False)
        self.head_bias = nn.Parameter(torch.zeros(c.codebook_size + 1))

    def _initialise(self) -> None:
        """Normal weights of deviation 0.02 for embeddings, Glorot for matrices; zero biases; whatever a block set
        to zero on purpose stays so."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear) and not name.endswith("modulation"):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.position_embedding, self.registers):
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)

    def _embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) -> (B, N, D)"""
        return self.token_embedding(tokens) + self.position_embedding

    def _final(self, x: Tensor, prepared: Prepared) -> Tensor:
        raise NotImplementedError

    def encode(self, tokens: Tensor, prepared: Prepared) -> Tensor:
        """tokens (B, N) int64 in [0, V], V being the mask -> hidden (B, P + registers, D), the input of the last
        block. The last block belongs to :meth:`logits`, which runs it where logits are asked for."""
        c = self.config
        if tokens.dim() != 2 or tokens.shape[1] != c.tokens:
            raise ValueError(f"tokens must be (B, {c.tokens}) for a grid of {c.grid[0]}x{c.grid[1]}, "
                             f"got {tuple(tokens.shape)}")
        x = self._embed(tokens)
        if c.patch > 1:
            x = self.patch_in(x.transpose(1, 2).unflatten(2, c.grid)).flatten(2).transpose(1, 2)
        if self.registers is not None:
            x = torch.cat([x, self.registers.expand(len(x), -1, -1)], dim=1)
        for block, condition in zip(self.blocks[:-1], prepared.blocks, strict=False):
            x = block(x, condition)
        return x

    def features(self, hidden: Tensor, prepared: Prepared, positions: Tensor | None = None) -> Tensor:
        """hidden -> what the head reads: (B, k, D) at positions (B, k), or (B, N, D) at all of them."""
        c = self.config
        patches = c.tokens // c.patch**2
        rows = part = None
        if positions is not None:
            row, column = positions // c.grid[1], positions % c.grid[1]
            rows = (row // c.patch) * (c.grid[1] // c.patch) + column // c.patch
            part = (row % c.patch) * c.patch + column % c.patch
        dense = rows is None or rows.shape[1] >= patches
        x = self.blocks[-1](hidden, prepared.blocks[-1], None if dense else rows)
        if dense:
            x = take_rows(x[:, :patches], rows)
        if c.patch > 1:
            x = self.patch_out(x).unflatten(-1, (c.width, -1))  # (B, k or P, D, patch ** 2)
            if part is not None:
                x = x.gather(-1, part[:, :, None, None].expand(-1, -1, c.width, 1))[..., 0]
            else:
                x = x.unflatten(1, (c.grid[0] // c.patch, -1)).unflatten(-1, (c.patch, c.patch))
                x = x.permute(0, 1, 4, 2, 5, 3).reshape(len(x), c.tokens, c.width)
        return self._final(x, prepared)

    def logits(self, hidden: Tensor, prepared: Prepared, positions: Tensor | None = None) -> Tensor:
        """hidden from :meth:`encode` -> float32 logits (B, k, V) at positions (B, k) int64, or (B, N, V) at all of
        them. The mask is no candidate: V entries, not V + 1."""
        size = self.config.codebook_size
        x = self.features(hidden, prepared, positions)
        return F.linear(x, self.token_embedding.weight[:size], self.head_bias[:size]).float()


class ClassTransformer(MaskedTransformer):
    """Class-to-image: AdaLN blocks, RMSNorm, query-key norm, SwiGLU, registers."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        c = config
        self.class_embedding = nn.Embedding(c.classes + 1, c.width)
        self.blocks = nn.ModuleList(ClassBlock(c.width, c.heads, c.mlp) for _ in range(c.depth))
        self.final_modulation = nn.Linear(c.width, 2 * c.width)
        self.final_norm = RMSNorm(c.width, bias=True)
        self._initialise()
        nn.init.zeros_(self.final_modulation.weight)
        nn.init.zeros_(self.final_modulation.bias)

    def prepare(self, labels: Tensor, null: Tensor | None = None) -> Prepared:
        """labels (B,) int64 in [0, classes); where null (B,) bool is True the condition is dropped. Computes the
        modulations of every block and of the last norm."""
        c = self.config
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) > c.classes):
            raise ValueError(f"labels must lie in [0, {c.classes}), got [{int(labels.min())}, {int(labels.max())}]")
        if null is not None:
            labels = torch.where(null, c.classes, labels)
        condition = self.class_embedding(labels)
        final = self.final_modulation(F.silu(condition)).unflatten(-1, (2, 1, -1))
        return Prepared([block.prepare(condition) for block in self.blocks], final)  # type: ignore[operator]

    def _final(self, x: Tensor, prepared: Prepared) -> Tensor:
        assert prepared.final is not None
        shift, scale = prepared.final.unbind(1)
        return self.final_norm(x) * (1 + scale) + shift


class TextTransformer(MaskedTransformer):
    """Text-to-image: LayerNorm, self-attention, cross-attention to the text, GELU MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        c = config
        self.first_norm = nn.LayerNorm(c.width, eps=1e-6)
        text_dim = c.text_dim
        if c.text_depth:
            text_dim = c.width
            self.text_in = nn.Linear(c.text_dim, c.width)
            self.text_position = nn.Parameter(torch.empty(c.text_length, c.width))
            self.text_encoder = nn.ModuleList(EncoderBlock(c.width, c.heads, c.mlp) for _ in range(c.text_depth))
            nn.init.normal_(self.text_position, std=0.02)
        self.blocks = nn.ModuleList(TextBlock(c.width, c.heads, c.mlp, text_dim) for _ in range(c.depth))
        self.final_norm = nn.LayerNorm(c.width, eps=1e-6)
        self._initialise()

    def prepare(self, text: Tensor, null: Tensor | None = None) -> Prepared:
        """text (B, T, text_dim); where null (B,) bool is True it is replaced by zeros, the null text. Computes the
        keys and values of every cross-attention."""
        c = self.config
        if text.dim() != 3 or text.shape[2] != c.text_dim or (c.text_depth and text.shape[1] != c.text_length):
            raise ValueError(f"text must be (B, {c.text_length or 'T'}, {c.text_dim}), got {tuple(text.shape)}: "
                             f"this model was trained with another text encoder")
        text = text.to(self.head_bias.dtype)
        if null is not None:
            text = text.masked_fill(null[:, None, None], 0.0)
        if c.text_depth:
            text = self.text_in(text) + self.text_position
            for block in self.text_encoder:
                text = block(text)
        return Prepared([block.prepare(text) for block in self.blocks], None)  # type: ignore[operator]

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.first_norm(super()._embed(tokens))

    def _final(self, x: Tensor, prepared: Prepared) -> Tensor:
        return self.final_norm(x)


def build_transformer(config: TransformerConfig) -> MaskedTransformer:
    """The transformer that `config` describes, with fresh weights drawn from PyTorch's global generator."""
    return {"class": ClassTransformer, "text": TextTransformer}[config.condition](config)


__all__ = ["ClassTransformer", "KeysValues", "MaskedTransformer", "Prepared", "TextTransformer", "TransformerConfig",
           "build_transformer", "swiglu_hidden"]
