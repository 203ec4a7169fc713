"""The masked objective: hide some tokens, predict them from the rest and the condition."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.transformer import MaskedTransformer, Prepared
from ..schedules import Schedule, mask_ratio, power_of


@dataclasses.dataclass(frozen=True)
class MaskObjective:
    """What is masked and where the loss is taken.

    schedule: the curve behind the mask ratio (public code: "arccos"). condition_dropout: share of pictures whose
    condition is dropped, for guidance (Table 1: 0.1). loss_on: "masked" positions, or "all" as the public code does.
    """

    schedule: Schedule = "arccos"
    condition_dropout: float = 0.1
    loss_on: str = "masked"

    def __post_init__(self) -> None:
        power_of(self.schedule)
        if self.loss_on not in ("masked", "all"):
            raise ValueError(f"loss_on must be 'masked' or 'all', got '{self.loss_on}'")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout must lie in [0, 1), got {self.condition_dropout}")


def draw_mask(size: int, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
    """Mask (size, n) bool: each picture has a ratio mask_ratio(u), u uniform, and each of its positions is masked
    independently with that probability (public training code); a picture left without any gets one."""
    ratio = mask_ratio(schedule, torch.rand(size, 1, generator=generator))
    uniform = torch.rand(size, n, generator=generator)
    return (uniform < ratio) | (uniform == uniform.min(dim=1, keepdim=True).values)


def masked_loss(model: MaskedTransformer, tokens: Tensor, mask: Tensor, prepared: Prepared,
                loss_on: str = "masked") -> Tensor:
    """Mean cross-entropy in nats a token of tokens (B, N) where mask (B, N) hides them (or everywhere)."""
    size = model.config.codebook_size
    hidden = model.encode(tokens.masked_fill(mask, model.config.mask_id), prepared)
    features = model.features(hidden, prepared)
    if loss_on == "masked":
        features, tokens = features[mask], tokens[mask]
    logits = F.linear(features, model.token_embedding.weight[:size], model.head_bias[:size])
    return F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten())
