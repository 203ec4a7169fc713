"""Features of many pictures, gathered chunk by chunk: interrupted runs go on, processes share the work.

A chunk is a file of CHUNK pictures' features. What a chunk holds depends on its set and its number alone, and chunks
are merged in their order, so that a figure is the same for any number of processes and interruptions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoints import read_tensors, write_tensors
from .features import Extractor
from .metrics import Statistics

CHUNK = 256
"""Pictures a file of features."""
KEPT = 50_000
"""Pictures of a set whose features are kept in memory for the measures that compare picture with picture."""


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures by number, to be measured.

    name: of the set, fit for a file name. identity: all that decides what the pictures are, in JSON's types. count: how
    many. draw: numbers -> uint8 (n, 3, H, W); a picture depends on its number alone.
    """

    name: str
    identity: Mapping[str, Any]
    count: int
    draw: Callable[[range], Tensor]


class Gathered(NamedTuple):
    """What is known of a set: statistics of all its pictures, features (n, D) and, where the extractor classifies,
    probabilities (n, K) of the first KEPT, and the seconds that drawing took."""

    statistics: Statistics
    features: Tensor
    probabilities: Tensor | None
    seconds: float


def processes() -> tuple[int, int]:
    """Number of this process and how many there are, as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def fingerprint(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of a value in JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _chunks(pictures: PictureSet, extractor: Extractor, out: Path) -> list[tuple[Path, range]]:
    """File and picture numbers of every chunk. Another model, setting or extractor has another folder."""
    identity = {**pictures.identity, "extractor": [extractor.name, extractor.hash]}
    folder = out / "features" / f"{pictures.name}-{fingerprint(identity)}"
    parts = [range(start, min(start + CHUNK, pictures.count)) for start in range(0, pictures.count, CHUNK)]
    return [(folder / f"{part.start:07d}-{part.stop:07d}.safetensors", part) for part in parts]


def _measure(pictures: PictureSet, part: range, extractor: Extractor, batch_size: int,
             progress: Callable[[int], object]) -> tuple[dict[str, Tensor], float]:
    """Tensors of a chunk, and the seconds that drawing its pictures took."""
    features, probabilities, seconds = [], [], 0.0
    for start in range(part.start, part.stop, batch_size):
        numbers = range(start, min(start + batch_size, part.stop))
        began = time.perf_counter()
        images = pictures.draw(numbers)
        seconds += time.perf_counter() - began
        found = extractor(images)
        bad = (~torch.isfinite(found.features).all(1)).nonzero()
        if len(bad):
            raise ValueError(f"{pictures.name}: the features of {extractor.name} hold NaN or infinity, first for "
                             f"picture {numbers[int(bad[0])]}")
        features.append(found.features.cpu())
        if found.probabilities is not None:
            probabilities.append(found.probabilities.cpu())
        progress(len(numbers))
    tensors = {"features": torch.cat(features)}
    return tensors | ({"probabilities": torch.cat(probabilities)} if probabilities else {}), seconds


def _write(path: Path, tensors: Mapping[str, Tensor], seconds: float) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"seconds": repr(seconds)})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"{path}: cannot be written ({reason}): make room; the same command then goes on") from None


def gather(sets: list[PictureSet], extractor: Extractor, out: Path, batch_size: int = 64,
           progress: Callable[[int], object] = lambda n: None) -> None:
    """Computes the chunks of `sets` that `out` lacks, this process's share of them; the first process returns once
    the others' are there too. All processes must see the same folder.

    batch_size: pictures drawn at a time. progress: called with every number of pictures done.

    Raises ValueError for features that are not finite, and OSError where a chunk cannot be written; what is done stays.
    """
    rank, world = processes()
    chunks = [(pictures, *chunk) for pictures in sets for chunk in _chunks(pictures, extractor, out)]
    for number, (pictures, path, part) in enumerate(chunks):
        if number % world != rank:
            continue
        if path.is_file():
            progress(len(part))
        else:
            _write(path, *_measure(pictures, part, extractor, batch_size, progress))
    if rank == 0:
        for number, (_, path, part) in enumerate(chunks):
            if number % world:
                while not path.is_file():  # torchrun ends us all where one fails
                    time.sleep(0.2)
                progress(len(part))


def collect(pictures: PictureSet, extractor: Extractor, out: Path) -> Gathered:
    """What `gather` left of a set. Memory is that of the features kept, however many pictures there are.

    Raises ValueError naming a damaged file and how to mend it.
    """
    statistics, seconds, kept = Statistics.of(extractor), 0.0, 0
    features, probabilities = [], []
    for path, part in _chunks(pictures, extractor, out):
        tensors, said = read_tensors(path)
        if set(tensors) - {"probabilities"} != {"features"} or len(tensors["features"]) != len(part):
            raise ValueError(f"{path}: not the features of {len(part)} pictures: delete it and run the same command "
                             f"again")
        statistics.update(tensors["features"])
        seconds += float(said["seconds"])
        room = KEPT - kept
        if room > 0:
            features.append(tensors["features"][:room])
            kept += len(features[-1])
            if "probabilities" in tensors:
                probabilities.append(tensors["probabilities"][:room])
    return Gathered(statistics, torch.cat(features), torch.cat(probabilities) if probabilities else None, seconds)
