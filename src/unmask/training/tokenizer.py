"""Training a VQ tokenizer: reconstruction, perceptual and commitment losses, a codebook that stays alive."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checkpoints import tensors_sha256, write_model
from ..tokenizers.quantizer import CodebookTrainer
from ..tokenizers.vqgan import VQGAN, VQConfig
from .loop import RunConfig, batch_indices, step_generator


@dataclasses.dataclass(frozen=True)
class TokenizerObjective:
    """Weights of the losses. l1 + l2 are always on; `perceptual` joins after the share `perceptual_from` of the steps
    (squared error alone learns faster at first) and looks at the share `perceptual_share` of each batch (its network
    costs as much as the tokenizer). The codebook starts by k-means after `unquantised_steps` steps.
    `white`: share of pictures shown on white, the others get a random background colour behind their alpha, so that
    pale glyphs are seen. `decoder_only`: a trained tokenizer's decoder learns on, its tokens stay as they are."""

    l1: float = 1.0
    l2: float = 1.0
    perceptual: float = 0.3
    perceptual_from: float = 0.5
    perceptual_share: float = 1.0
    commitment: float = 0.25
    unquantised_steps: int = 300
    white: float = 0.8
    flip: bool = True
    decoder_only: bool = False

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "perceptual", "commitment", "unquantised_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("perceptual_from", "white"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 < self.perceptual_share <= 1:
            raise ValueError(f"perceptual_share must lie in (0, 1], got {self.perceptual_share}")


class FeatureStages(Protocol):
    """A frozen network whose feature maps the perceptual loss compares."""

    def stages(self, images: Tensor) -> list[Tensor]: ...


def on_background(rgba: Tensor, background: Tensor) -> Tensor:
    """rgba uint8 (B, 4, H, W) over colours (B, 3) in [0, 1] -> float (B, 3, H, W) in [-1, 1]."""
    x = rgba.float() / 255
    alpha = x[:, 3:]
    return (x[:, :3] * alpha + background[:, :, None, None] * (1 - alpha)) * 2 - 1


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of pictures in [-1, 1]."""
    error = ((a.clamp(-1, 1) - b) / 2).float().pow(2).flatten(1).mean(1)
    return -10 * error.clamp_min(1e-12).log10()


def perceptual_loss(network: FeatureStages, fake: Tensor, real: Tensor) -> Tensor:
    """Mean over the stages of the squared distance between channel-normalised features (Zhang et al., 2018, with
    unit weights)."""
    with torch.no_grad():
        target = [F.normalize(f, dim=1) for f in network.stages(real)]
    mine = [F.normalize(f, dim=1) for f in network.stages(fake)]
    return torch.stack([(a - b).pow(2).sum(1).mean() for a, b in zip(mine, target, strict=True)]).mean()


def save_grid(rows: list[Tensor], path: Path) -> None:
    """Rows of pictures (n, 3, H, W) in [-1, 1], one under the other, as one PNG."""
    grid = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path, format="PNG")


class TokenizerTask:
    """Trains a :class:`VQGAN` on pictures with alpha held in memory.

    train, held_out: uint8 (N, 4, S, S); perceptual: a frozen feature network, or None. start: a tokenizer of the same
    config whose weights and codebook training begins with, without unquantised steps.
    """

    def __init__(self, config: VQConfig, objective: TokenizerObjective, run: RunConfig, train: Tensor,
                 held_out: Tensor, perceptual: FeatureStages | None = None, start: VQGAN | None = None) -> None:
        torch_state = torch.random.get_rng_state()
        torch.manual_seed(run.seed)
        self.model = VQGAN(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.random.set_rng_state(torch_state)
        self.model.quantize.embedding.weight.requires_grad_(False)
        self.objective, self.run, self.perceptual = objective, run, perceptual
        self.train_pictures, self.held_out = train, held_out
        self.codebook = CodebookTrainer(self.model.quantize)
        self.start_sha256 = None if start is None else tensors_sha256(start.state_dict())
        if start is not None:
            self.model.load_state_dict(start.state_dict())
            self.codebook.total.copy_(start.quantize.codebook)
        if objective.decoder_only:
            if start is None:
                raise ValueError("decoder_only needs a trained tokenizer to start with")
            self.model.encoder.requires_grad_(False)
            self.model.quant_conv.requires_grad_(False)
        if perceptual is None and objective.perceptual:
            raise ValueError("the perceptual loss needs a feature network; its weight can be 0")

    def pictures(self, step: int) -> Tensor:
        """The batch of a step (B, 3, S, S) in [-1, 1]."""
        generator = step_generator(self.run.seed, step, purpose=2)
        index = batch_indices(len(self.train_pictures), self.run.batch_size, self.run.seed, step)
        size = len(index)
        colour = torch.rand(size, 3, generator=generator)
        white = torch.rand(size, generator=generator) < self.objective.white
        x = on_background(self.train_pictures[index], torch.where(white[:, None], 1.0, colour))
        flip = (torch.rand(size, generator=generator) < 0.5) & self.objective.flip
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        return x.contiguous(memory_format=torch.channels_last)

    def _start_codebook(self, step: int) -> None:
        with torch.no_grad():
            latents = [self.model.latents(self.pictures(step + i)).permute(0, 2, 3, 1).flatten(0, 2)
                       for i in range(max(1, 1024 // self.run.batch_size))]
        self.codebook.start(torch.cat(latents), step_generator(self.run.seed, step, purpose=3))

    def _codes(self, x: Tensor, step: int, figures: dict[str, float]) -> tuple[Tensor, Tensor]:
        """What the decoder gets for the pictures of a step, and the commitment loss; the codebook moves."""
        quantize = self.model.quantize
        if self.objective.decoder_only:
            return quantize.lookup(self.model.encode(x)), x.new_zeros(())
        z = F.normalize(self.model.latents(x), dim=1)
        if step < self.objective.unquantised_steps and self.start_sha256 is None:
            return z, z.new_zeros(())
        tokens = quantize.encode(z.detach())
        nearest = quantize.lookup(tokens)
        figures["restarted"] = self.codebook.update(z, nearest, tokens, step_generator(self.run.seed, step, purpose=4))
        return z + (nearest - z).detach(), (z - nearest).pow(2).mean()

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        o = self.objective
        if step == o.unquantised_steps and self.start_sha256 is None:
            self._start_codebook(step)
        x = self.pictures(step)
        figures: dict[str, float] = {}
        codes, commitment = self._codes(x, step, figures)
        y = self.model.decode_codes(codes)
        difference = y - x
        loss = o.l1 * difference.abs().mean() + o.l2 * difference.pow(2).mean() + o.commitment * commitment
        if self.perceptual is not None and o.perceptual and step >= o.perceptual_from * self.run.steps:
            seen = math.ceil(o.perceptual_share * len(x))
            perceptual = perceptual_loss(self.perceptual, y[:seen], x[:seen])
            figures["perceptual"] = float(perceptual.detach())
            loss = loss + o.perceptual * perceptual
        figures["psnr"] = float(psnr(y.detach(), x).mean())
        return loss, figures

    def extra_state(self) -> dict[str, Tensor]:
        return self.codebook.state_dict()

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.codebook.load_state_dict(state)

    @torch.no_grad()
    def sample(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Held-out pictures above their reconstructions; mean PSNR over all held-out pictures, share of codes used on
        the first 2,048 training pictures and the held-out ones."""
        assert isinstance(model, VQGAN)
        used = torch.zeros(model.config.codebook_size, dtype=torch.bool)
        values: list[Tensor] = []
        shown: list[Tensor] = []
        for pictures, measured in ((self.held_out, True), (self.train_pictures[:2048], False)):
            for part in pictures.split(64):
                x = on_background(part, torch.ones(len(part), 3)).contiguous(memory_format=torch.channels_last)
                tokens = model.encode(x)
                used[tokens.flatten()] = True
                if measured:
                    y = model.decode(tokens)
                    values.append(psnr(y, x))
                    if len(shown) < 4:
                        shown += [x[:16], y[:16]]
        save_grid(shown, path)
        return {"held_out_psnr": float(torch.cat(values).mean()), "codes_used": float(used.float().mean())}

    def save(self, model: nn.Module, folder: Path, step: int) -> None:
        """Writes the tokenizer folder: float16 weights, the codebook in float32 so that no two codes fall together."""
        assert isinstance(model, VQGAN)
        weights = {name: value if name.startswith("quantize.") else value.half()
                   for name, value in model.state_dict().items()}
        write_model(folder, {"tokenizer": weights}, {
            "kind": "tokenizer", "tokenizer": dataclasses.asdict(model.config),
            "image_size": int(self.train_pictures.shape[-1]),
            "training": {"steps": step, "objective": dataclasses.asdict(self.objective),
                         "run": dataclasses.asdict(self.run)}})

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": dataclasses.asdict(self.model.config), "objective": dataclasses.asdict(self.objective),
                "pictures": len(self.train_pictures), "start": self.start_sha256}
