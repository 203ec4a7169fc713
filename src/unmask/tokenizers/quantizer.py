"""Vector quantisation on the unit sphere, with an exponential-moving-average codebook for training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantizer(nn.Module):
    """A codebook of V unit vectors of c numbers; the nearest code is the one of largest cosine.

    Source: LlamaGen (Sun et al., 2024, section 2.1), after ViT-VQGAN (Yu et al., 2021): codes and latents are
    L2-normalised, so that distance is angle.
    """

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    @property
    def codebook(self) -> Tensor:
        """(V, c) unit rows."""
        return F.normalize(self.embedding.weight, dim=-1)

    def encode(self, z: Tensor) -> Tensor:
        """z (B, c, h, w) -> index of the nearest code (B, h, w) int64."""
        flat = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
        return (flat @ self.codebook.T).argmax(dim=-1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """tokens (B, h, w) int64 in [0, V) -> codes (B, c, h, w)."""
        return F.normalize(self.embedding(tokens), dim=-1).permute(0, 3, 1, 2)


class CodebookTrainer:
    """Keeps the codebook at the moving mean of what is assigned to it, and restarts the codes that die.

    A training-time companion of :class:`Quantizer` (van den Oord et al., 2017, appendix A.1). A code whose moving
    count falls below `threshold` is moved to a latent of the current batch (Dhariwal et al., 2020). All randomness
    comes from the generator given to each call, so that a step is a pure function of (seed, step).
    """

    def __init__(self, quantizer: Quantizer, decay: float = 0.99, threshold: float = 0.5) -> None:
        self.quantizer, self.decay, self.threshold = quantizer, decay, threshold
        size, dim = quantizer.embedding.weight.shape
        device = quantizer.embedding.weight.device
        self.count = torch.ones(size, device=device)
        self.total = torch.zeros(size, dim, device=device)

    @torch.no_grad()
    def start(self, latents: Tensor, generator: torch.Generator, rounds: int = 10) -> None:
        """Spherical k-means on latents (n, c), after near-duplicates are dropped; the codes become its centres."""
        weight = self.quantizer.embedding.weight
        flat = F.normalize(latents.float(), dim=-1)
        distinct = torch.unique((flat * 50).round(), dim=0, return_inverse=True)[1]
        first = torch.full((int(distinct.max()) + 1,), flat.shape[0], device=flat.device)
        first.scatter_reduce_(0, distinct, torch.arange(flat.shape[0], device=flat.device), "amin")
        flat = flat[first]
        if flat.shape[0] < weight.shape[0]:  # too few distinct latents: fill up with slightly moved copies
            extra = torch.randint(flat.shape[0], (weight.shape[0] - flat.shape[0],), generator=generator)
            noise = torch.randn(len(extra), flat.shape[1], generator=generator) * 0.05
            flat = torch.cat([flat, F.normalize(flat[extra] + noise.to(flat), dim=-1)])
        pick = torch.randperm(flat.shape[0], generator=generator)[: weight.shape[0]].to(flat.device)
        centres = flat[pick]
        for _ in range(rounds):
            nearest = torch.cat([(part @ centres.T).argmax(-1) for part in flat.split(8192)])
            total = torch.zeros_like(centres).index_add_(0, nearest, flat)
            alive = total.norm(dim=-1) > 1e-6
            centres = torch.where(alive[:, None], F.normalize(total, dim=-1), centres)
        weight.copy_(centres)
        self.count.fill_(1.0)
        self.total.copy_(centres)

    @torch.no_grad()
    def update(self, z: Tensor, nearest: Tensor, tokens: Tensor, generator: torch.Generator) -> int:
        """One moving-average step from unit latents z (B, c, h, w), their nearest codes (B, c, h, w) and tokens
        (B, h, w). A dead code moves to a latent chosen with probability proportional to its squared error, so that
        plain background does not attract them all. Returns the number of codes restarted."""
        weight = self.quantizer.embedding.weight
        flat = F.normalize(z.detach().float().permute(0, 2, 3, 1), dim=-1).reshape(-1, z.shape[1])
        index = tokens.reshape(-1)
        count = torch.bincount(index, minlength=weight.shape[0]).to(self.count)
        total = torch.zeros_like(self.total).index_add_(0, index, flat)
        self.count.mul_(self.decay).add_(count, alpha=1 - self.decay)
        self.total.mul_(self.decay).add_(total, alpha=1 - self.decay)
        dead = self.count < self.threshold * flat.shape[0] / weight.shape[0] * 0.1
        number = int(dead.sum())
        if number:
            error = (z - nearest).detach().pow(2).sum(1).flatten().cpu() + 1e-6
            pick = torch.multinomial(error, number, replacement=True, generator=generator).to(flat.device)
            self.total[dead] = flat[pick]
            self.count[dead] = 1.0
        weight.copy_(F.normalize(self.total, dim=-1))
        return number

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count, "total": self.total}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count.copy_(state["count"])
        self.total.copy_(state["total"])
