"""The VQGAN tokenizer in LlamaGen's layout: one class loads the published weights and trains the small ones.

Source: Esser et al. (2020) for the network, Sun et al. (2024, "LlamaGen") for the layout and its names.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantizer import Quantizer


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Shape of a tokenizer.

    channels: width at full resolution; `multipliers`: its factor at each level, full resolution first, so that a
    token covers 2 ** (levels - 1) pixels a side. `encoder_blocks`, `decoder_blocks`: residual blocks a level
    (0 is allowed at full resolution, where blocks are dear). `norm_groups`: groups of every GroupNorm.
    """

    codebook_size: int = 16384
    code_dim: int = 8
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_blocks: tuple[int, ...] = (2, 2, 2, 2, 2)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 3, 3)
    z_channels: int = 256
    norm_groups: int = 32

    def __post_init__(self) -> None:
        for name in ("multipliers", "encoder_blocks", "decoder_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        levels = len(self.multipliers)
        if len(self.encoder_blocks) != levels or len(self.decoder_blocks) != levels:
            raise ValueError(f"tokenizer config: multipliers, encoder_blocks and decoder_blocks must have one entry "
                             f"a level, got {levels}, {len(self.encoder_blocks)} and {len(self.decoder_blocks)}")

    @property
    def downsample(self) -> int:
        """Pixels a token, a side."""
        return 2 ** (len(self.multipliers) - 1)


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head attention over all places of a feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (layer(n).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attention = torch.softmax((q @ k.transpose(1, 2)).float() * x.shape[1] ** -0.5, dim=-1).to(v.dtype)
        return x + self.proj_out((attention @ v).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, attention after each at the lowest one, then a change of resolution."""

    def __init__(self, channels: tuple[int, int], blocks: int, attention: bool, resample: nn.Module | None,
                 groups: int) -> None:
        super().__init__()
        widths = [channels[0]] + [channels[1]] * blocks
        self.res = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        self.attn = nn.ModuleList(AttentionBlock(channels[1], groups) for _ in range(blocks if attention else 0))
        self.downsample = resample if isinstance(resample, Downsample) else None
        self.upsample = resample if isinstance(resample, Upsample) else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


def _middle(channels: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(channels, channels, groups), AttentionBlock(channels, groups),
                          ResidualBlock(channels, channels, groups)])


class Encoder(nn.Module):
    def __init__(self, c: VQConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, c.channels, 3, padding=1)
        width, last = c.channels, len(c.multipliers) - 1
        levels = []
        for i, (multiplier, blocks) in enumerate(zip(c.multipliers, c.encoder_blocks, strict=True)):
            out = c.channels * multiplier if blocks else width
            levels.append(Level((width, out), blocks, i == last, Downsample(out) if i < last else None, c.norm_groups))
            width = out
        self.conv_blocks = nn.ModuleList(levels)
        self.mid = _middle(width, c.norm_groups)
        self.norm_out = _norm(width, c.norm_groups)
        self.conv_out = nn.Conv2d(width, c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in (*self.conv_blocks, *self.mid):
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, c: VQConfig) -> None:
        super().__init__()
        last = len(c.multipliers) - 1
        width = c.channels * c.multipliers[-1]
        self.conv_in = nn.Conv2d(c.z_channels, width, 3, padding=1)
        self.mid = _middle(width, c.norm_groups)
        levels = []
        for i in range(last, -1, -1):
            blocks = c.decoder_blocks[i]
            out = c.channels * c.multipliers[i] if blocks else width
            levels.append(Level((width, out), blocks, i == last, Upsample(out) if i else None, c.norm_groups))
            width = out
        self.conv_blocks = nn.ModuleList(levels)
        self.norm_out = _norm(width, c.norm_groups)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution: where an adversarial loss is balanced against the others."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for layer in (*self.mid, *self.conv_blocks):
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Tokenizer: encode (B, 3, H, W) in [-1, 1] -> (B, h, w) int64; decode back. H and W are multiples of
    `config.downsample`; h = H / downsample."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.codebook_size, config.code_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    def latents(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> latents before quantisation (B, c, h, w), not normalised."""
        side = self.config.downsample
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            raise ValueError(f"images must be (B, 3, H, W) with H and W multiples of {side}, "
                             f"got {tuple(images.shape)}")
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) float in [-1, 1] -> tokens (B, h, w) int64."""
        return self.quantize.encode(self.latents(images))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Unit codes (B, c, h, w) -> images (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(codes))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, h, w) int64 in [0, V) -> images (B, 3, H, W) about [-1, 1], not clamped."""
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.config.codebook_size):
            raise ValueError(f"tokens must lie in [0, {self.config.codebook_size}), got "
                             f"[{int(tokens.min())}, {int(tokens.max())}]: a mask token cannot be decoded")
        return self.decode_codes(self.quantize.lookup(tokens))
