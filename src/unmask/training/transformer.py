"""Training class and text transformers on token folders."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import tensors_sha256
from ..data.prompts import prompt, varied_prompt
from ..data.tokens import TokenDataset
from ..models.transformer import (
    ClassTransformer,
    MaskedTransformer,
    TextTransformer,
    TransformerConfig,
    build_transformer,
)
from ..pipeline import write_pipeline
from ..sampling import Prepare, Settings, generate, prepare_labels, prepare_text
from ..text import TextEncoder
from ..tokenizers.vqgan import VQGAN
from .loop import RunConfig, batch_indices, step_generator
from .objective import MaskObjective, draw_mask, masked_loss
from .tokenizer import save_grid


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What the pictures are drawn from: classes, by name, with the label (n,) int64 of every picture; or a text
    encoder, by its specification in text.load_text_encoder."""

    class_names: tuple[str, ...] = ()
    labels: Tensor | None = None
    text_encoder: TextEncoder | None = None
    text_encoder_name: str | None = None


class TransformerTask:
    """Trains a transformer on the pictures of `data` whose split is "train"; "held-pair" and "held-concept" pictures
    are only measured.

    tokenizer and sampler serve the sample grids and the model folder, which becomes a whole pipeline; `sampler` holds
    its default settings. start: a model of the same configuration whose weights training begins with.
    """

    def __init__(self, config: TransformerConfig, objective: MaskObjective, run: RunConfig, data: TokenDataset,
                 condition: Conditioning, tokenizer: VQGAN, sampler: Settings, tokenizer_ref: str | None = None,
                 card: dict[str, Any] | None = None, start: MaskedTransformer | None = None) -> None:
        if tuple(data.grid) != config.grid or data.codebook_size != config.codebook_size:
            raise ValueError(f"{data.folder}: tokens of a {data.grid[0]}x{data.grid[1]} grid and {data.codebook_size} "
                             f"codes do not fit a model of {config.grid[0]}x{config.grid[1]} and "
                             f"{config.codebook_size}")
        state = torch.random.get_rng_state()
        torch.manual_seed(run.seed)
        self.model: MaskedTransformer = build_transformer(config)
        torch.random.set_rng_state(state)
        self.start_sha256 = None if start is None else tensors_sha256(start.state_dict())
        if start is not None:
            self.model.load_state_dict(start.state_dict())
        self.objective, self.run, self.data, self.condition = objective, run, data, condition
        self.tokenizer, self.tokenizer_ref, self.sampler, self.card = tokenizer, tokenizer_ref, sampler, card or {}
        self.index = data.select(split="train")
        if not len(self.index):
            raise ValueError(f"{data.folder}: no picture has the split 'train'")

    @torch.no_grad()
    def start_from_codebook(self) -> None:
        """Token embeddings that begin as a random projection of the tokenizer's codes: codes that look alike begin
        alike, on the way in and, the head being tied, on the way out. The mask keeps its own."""
        codes = self.tokenizer.quantize.codebook
        generator = step_generator(self.run.seed, 0, purpose=7)
        projection = 0.02 * torch.randn(codes.shape[1], self.model.config.width, generator=generator)
        self.model.token_embedding.weight[: len(codes)] = codes @ projection + 0.1 * self.model.token_embedding.weight[
            : len(codes)]

    def _prepared(self, index: Tensor, null: Tensor, generator: torch.Generator | None) -> Any:
        """Prepared conditions of pictures; varied wordings where a generator is given."""
        if isinstance(self.model, ClassTransformer):
            assert self.condition.labels is not None
            return self.model.prepare(self.condition.labels[index], null)
        assert isinstance(self.model, TextTransformer)
        records = [self.data.records[i] for i in index.tolist()]
        return self.model.prepare(self._encode([prompt(r) if generator is None else varied_prompt(r, generator)
                                                for r in records]), null)

    def _encode(self, prompts: list[str]) -> Tensor:
        assert self.condition.text_encoder is not None
        with warnings.catch_warnings():  # long captions are cut: no news after the first thousand
            warnings.simplefilter("ignore")
            return self.condition.text_encoder.encode(prompts)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        generator = step_generator(self.run.seed, step, purpose=2)
        index = self.index[batch_indices(len(self.index), self.run.batch_size, self.run.seed, step)]
        variant = torch.randint(self.data.variants, (len(index),), generator=generator)
        tokens = self.data.tokens(index, variant)
        mask = draw_mask(len(tokens), tokens.shape[1], self.objective.schedule, generator)
        null = torch.rand(len(index), generator=generator) < self.objective.condition_dropout
        prepared = self._prepared(index, null, generator)
        return masked_loss(self.model, tokens, mask, prepared, self.objective.loss_on), {}

    def extra_state(self) -> dict[str, Tensor]:
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        pass

    def prepare_for(self, model: nn.Module, index: Tensor) -> Prepare:
        """The sampler's conditions for some pictures of the data."""
        if isinstance(model, ClassTransformer):
            assert self.condition.labels is not None
            return prepare_labels(model, self.condition.labels[index])
        assert isinstance(model, TextTransformer)
        return prepare_text(model, self._encode([prompt(self.data.records[i]) for i in index.tolist()]))

    @torch.no_grad()
    def sample(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Real pictures above generated ones of the same condition, seen pictures first, then held-out pairs; and the
        masked loss on up to 512 pictures of each split at fixed masks."""
        assert isinstance(model, MaskedTransformer)
        figures, rows = {}, []
        splits = {split: self.data.select(split=split) for split in ("train", "held-pair", "held-concept")}
        splits = {split: index for split, index in splits.items() if len(index)}
        columns = min(16, *map(len, splits.values()))
        trained, self.model = self.model, model
        for split, index in splits.items():
            index = index[torch.randperm(len(index), generator=step_generator(0, 0, purpose=5))][:512]
            total = 0.0
            for i, part in enumerate(index.split(128)):
                tokens = self.data.tokens(part)
                mask = draw_mask(len(tokens), tokens.shape[1], self.objective.schedule, step_generator(0, i, purpose=6))
                prepared = self._prepared(part, torch.zeros(len(part), dtype=torch.bool), None)
                total += float(masked_loss(model, tokens, mask, prepared)) * len(part)
            figures[f"loss_{split}"] = total / len(index)
            shown = index[:columns]
            drawn = generate(model, self.prepare_for(model, shown), list(range(columns)), self.sampler)
            rows += [self.tokenizer.decode(t.view(-1, *model.config.grid)) for t in (self.data.tokens(shown), drawn)]
        self.model = trained
        save_grid(rows, path)
        return figures

    def save(self, model: nn.Module, folder: Path, step: int) -> None:
        """A whole pipeline folder with bf16 weights; the tokenizer by reference where `tokenizer_ref` names one."""
        assert isinstance(model, MaskedTransformer)
        weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
        write_pipeline(folder, model.config, weights, self.tokenizer_ref or self.tokenizer, {
            "text_encoder": self.condition.text_encoder_name, "class_names": list(self.condition.class_names) or None,
            "sampler": dataclasses.asdict(self.sampler), **self.card,
            "training": {"steps": step, "objective": dataclasses.asdict(self.objective),
                         "run": dataclasses.asdict(self.run)}})

    def describe(self) -> dict[str, Any]:
        labels = self.condition.labels
        return {"transformer": dataclasses.asdict(self.model.config), "objective": dataclasses.asdict(self.objective),
                "pictures": len(self.index), "shards": [shard.sha256 for shard in self.data.manifest.shards],
                "text_encoder": self.condition.text_encoder_name, "start": self.start_sha256,
                "labels": None if labels is None else tensors_sha256({"labels": labels})}
