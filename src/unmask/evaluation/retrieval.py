"""Does a text model draw what was asked? Retrieval among the real pictures of the same style, in feature space.

For each (concept, style) asked for, the generated picture's features are compared with those of every real picture of
that style: is the asked concept the nearest, is it among the nearest five? Beside it stands the ceiling, the same
measure on the tokenizer's reconstructions of the real pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.images import ImageSource, composite, load_rgba
from ..data.prompts import prompt
from ..pipeline import Pipeline
from .features import Extractor
from .metrics import retrieval_ranks

SPLITS = {"seen": "train", "held-pair": "held-pair"}
"""Kinds of queries: (concept, style) pairs that were trained on, and pairs whose concept was seen in other styles."""


def choose_queries(records: Sequence[dict[str, Any]], split: str, count: int) -> list[int]:
    """Indices of `count` pictures of a split, a fixed choice by a hash of (set, codepoints); all where there are
    fewer. Only captions that are distinct within their style can be asked for."""
    captions: dict[tuple[str, str], int] = {}
    for record in records:
        key = (record["style"], record["caption"])
        captions[key] = captions.get(key, 0) + 1
    chosen = [i for i, r in enumerate(records)
              if r.get("split") == split and captions[r["style"], r["caption"]] == 1]
    return sorted(chosen, key=lambda i: hashlib.sha256(
        f"{records[i]['set']} {records[i]['codepoints']}".encode()).digest())[:count]


def picture_features(extractor: Extractor, images: Tensor, batch_size: int = 64) -> Tensor:
    """Features (n, D) of uint8 images (n, 3, H, W)."""
    return torch.cat([extractor(part).features for part in images.split(batch_size)])


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, as a file would hold them."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


class RetrievalMeasure:
    """The gallery of real pictures, on white, with their features: made once, used for any model of the same size.

    source: an archive whose records have caption, style, set, codepoints and split.
    """

    def __init__(self, source: ImageSource, extractor: Extractor, image_size: int, count: int = 96) -> None:
        self.extractor = extractor
        self.records = [source.metadata(i) for i in range(len(source))]
        self.images = composite(load_rgba(source, image_size))
        self.features = picture_features(extractor, self.images)
        concepts, styles = ({v: i for i, v in enumerate(sorted({r[k] for r in self.records}))}
                            for k in ("caption", "style"))
        self.concepts = torch.tensor([concepts[r["caption"]] for r in self.records])
        self.styles = torch.tensor([styles[r["style"]] for r in self.records])
        self.queries = {kind: choose_queries(self.records, split, count) for kind, split in SPLITS.items()}

    def score(self, features: Tensor, index: list[int]) -> dict[str, float]:
        """Shares of queries whose concept comes first and among the first five of its style, and whose nearest
        picture of all has the right style."""
        first = five = style = 0
        for feature, i in zip(features, index, strict=True):
            same_style = self.styles == self.styles[i]
            rank = int(retrieval_ranks(feature[None], self.features[same_style], self.concepts[i : i + 1],
                                       self.concepts[same_style]))
            first, five = first + (rank == 1), five + (rank <= 5)
            style += int(retrieval_ranks(feature[None], self.features, self.styles[i : i + 1], self.styles)) == 1
        n = len(index)
        return {"queries": n, "first": first / n, "among_five": five / n, "style": style / n}

    def model(self, pipe: Pipeline, progress: Callable[[int], object] | None = None,
              **settings: Any) -> dict[str, dict[str, float]]:
        """The measure of a text pipeline: for each kind of query, one picture a query, query i with seed i."""
        result = {}
        for kind, index in self.queries.items():
            drawn = []
            for start in range(0, len(index), 16):
                part = index[start : start + 16]
                drawn.append(to_uint8(pipe([prompt(self.records[i]) for i in part], output_type="pt",
                                           seed=start, **settings).images))
                if progress:
                    progress(len(part))
            result[kind] = self.score(picture_features(self.extractor, torch.cat(drawn)), index)
        return result

    def ceiling(self, pipe: Pipeline) -> dict[str, dict[str, float]]:
        """The same measure on the tokenizer's reconstructions of the real pictures."""
        result = {}
        for kind, index in self.queries.items():
            x = self.images[index].float() / 127.5 - 1
            y = torch.cat([pipe.tokenizer.decode(pipe.tokenizer.encode(p)) for p in x.split(16)])
            result[kind] = self.score(picture_features(self.extractor, to_uint8(y)), index)
        return result
