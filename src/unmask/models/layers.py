"""The layers class and text transformers are made of.

Shapes: B images, P patches, k rows asked for, T text tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Root-mean-square normalisation over the last axis, computed in float32, in x's dtype (Zhang & Sennrich, 2019)."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain and, if asked for, a bias."""

    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = rms_norm(x) * self.weight
        return y if self.bias is None else y + self.bias


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows (B, k) of x (B, P, D) -> (B, k, D); all of x where rows is None."""
    return x if rows is None else x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, heads, P, d). On a CPU the backward pass of the fused kernel is slower than plain
    products, so that training there uses those."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class KeysValues(NamedTuple):
    """Keys and values of an attention, each (B, heads, P or T, d)."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    """Multi-head attention of queries to a context, which is the same sequence or the text.

    bias: biases on all projections. qk_norm: RMS normalisation without gain of queries and keys over the full
    projected width, before the split into heads. The projected width is heads * (width // heads), which is not the
    width where the heads do not divide it (the published "small": 6 heads of 85, 510 wide).
    """

    def __init__(self, width: int, heads: int, bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        inner = heads * (width // heads)
        self.q = nn.Linear(width, inner, bias=bias)
        self.k = nn.Linear(width, inner, bias=bias)
        self.v = nn.Linear(width, inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, context: Tensor) -> KeysValues:
        """context (B, P, D) -> its keys and values, reusable for any queries."""
        keys = self.k(context)
        return KeysValues(self._split(rms_norm(keys) if self.qk_norm else keys), self._split(self.v(context)))

    def forward(self, x: Tensor, context: KeysValues) -> Tensor:
        """Queries from x (B, k, D) -> (B, k, D)."""
        queries = self.q(x)
        y = attend(self._split(rms_norm(queries) if self.qk_norm else queries), *context)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) without biases (Shazeer, 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class GeluMLP(nn.Module):
    """Two linear layers with biases and the tanh form of GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class ClassBlock(nn.Module):
    """Self-attention and SwiGLU, each shifted, scaled and gated by the condition (AdaLN; Peebles & Xie, 2023)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = RMSNorm(width)
        self.attention = Attention(width, heads, bias=False, qk_norm=True)
        self.norm2 = RMSNorm(width)
        self.feed_forward = SwiGLU(width, hidden)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def prepare(self, condition: Tensor) -> Tensor:
        """condition (B, D) -> shifts, scales and gates (B, 6, 1, D)."""
        return self.modulation(F.silu(condition)).unflatten(-1, (6, 1, -1))

    def forward(self, x: Tensor, prepared: Tensor, rows: Tensor | None = None) -> Tensor:
        """x (B, P, D) -> (B, P, D), or (B, k, D) where only `rows` (B, k) are asked for."""
        shift1, scale1, gate1, shift2, scale2, gate2 = prepared.unbind(1)
        h = self.norm1(x) * (1 + scale1) + shift1
        context = self.attention.keys_values(h)
        x = take_rows(x, rows)
        x = x + gate1 * self.attention(take_rows(h, rows), context)
        return x + gate2 * self.feed_forward(self.norm2(x) * (1 + scale2) + shift2)


class TextBlock(nn.Module):
    """Self-attention, cross-attention to the text, and a GELU MLP, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, hidden: int, text_dim: int) -> None:
        super().__init__()
        self.text_in = nn.Linear(text_dim, width)
        self.text_norm = nn.LayerNorm(width, eps=1e-5)  # as published; of the null text only biases are left
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, bias=True, qk_norm=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.cross_attention = Attention(width, heads, bias=True, qk_norm=False)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)
        self.feed_forward = GeluMLP(width, hidden)

    def prepare(self, text: Tensor) -> KeysValues:
        """text (B, T, text_dim) -> keys and values of the cross-attention."""
        return self.cross_attention.keys_values(self.text_norm(self.text_in(text)))

    def forward(self, x: Tensor, prepared: KeysValues, rows: Tensor | None = None) -> Tensor:
        """x (B, P, D) -> (B, P, D), or (B, k, D) where only `rows` (B, k) are asked for."""
        h = self.norm1(x)
        context = self.attention.keys_values(h)
        x = take_rows(x, rows)
        x = x + self.attention(take_rows(h, rows), context)
        x = x + self.cross_attention(self.norm2(x), prepared)
        return x + self.feed_forward(self.norm3(x))


class EncoderBlock(nn.Module):
    """A text block without cross-attention: what the small encoder over word vectors is made of."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, bias=True, qk_norm=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.feed_forward = GeluMLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, self.attention.keys_values(h))
        return x + self.feed_forward(self.norm2(x))
