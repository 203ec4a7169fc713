"""Token data sets on disk: memory-mapped uint16 shards, a manifest, and a record for every picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import FORMAT_VERSION, atomic_folder, from_json, read_versioned, sha256, write_json
from ..errors import UsageError

SHARD = 65_536
"""Pictures a shard, about."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of uint16 tokens (count, variants, h, w)."""

    file: str
    count: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a token folder. variants: how often each picture stands there, as it is and, where there are
    two, mirrored."""

    format_version: int
    grid: tuple[int, int]
    codebook_size: int
    variants: int
    shards: tuple[Shard, ...]
    records_sha256: str
    tokenizer_sha256: str = ""
    source: str = ""


class TokenDataset:
    """Tokens (n, variants, h, w) and records of a folder that :func:`write_tokens` made.

    Opening checks the records and the size of every shard, :meth:`verify` every byte. Tokens stay on disk until asked
    for. Raises FileNotFoundError or ValueError naming the file that is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such token folder: make one with `unmask tokenize`")
        self.manifest = from_json(Manifest, read_versioned(path), path)
        self.grid, self.codebook_size = self.manifest.grid, self.manifest.codebook_size
        self.variants = self.manifest.variants
        shape = (self.variants, *self.grid)
        self._shards: list[np.ndarray] = []
        for shard in self.manifest.shards:
            file = self.folder / Path(shard.file).name
            wanted = shard.count * int(np.prod(shape)) * 2
            if not file.is_file() or file.stat().st_size != wanted:
                raise ValueError(f"{file}: missing or damaged ({wanted} bytes expected): run `unmask tokenize` again")
            self._shards.append(np.memmap(file, np.uint16, "r", shape=(shard.count, *shape)))
        records = self.folder / "records.jsonl"
        self._check(records, self.manifest.records_sha256)
        self.records: list[dict[str, Any]] = [json.loads(line) for line in records.read_bytes().splitlines()]
        self._starts = np.cumsum([0, *(len(s) for s in self._shards)])
        if len(self.records) != self._starts[-1]:
            raise ValueError(f"{self.folder}: {len(self.records)} records for {self._starts[-1]} pictures: run "
                             f"`unmask tokenize` again")

    @staticmethod
    def _check(file: Path, wanted: str) -> None:
        if not file.is_file() or sha256(file) != wanted:
            raise ValueError(f"{file}: missing or damaged: run `unmask tokenize` again")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def verify(self) -> None:
        """Reads every shard and compares its hash; ValueError names the damaged file."""
        for shard in self.manifest.shards:
            self._check(self.folder / Path(shard.file).name, shard.sha256)

    def tokens(self, index: Tensor, variant: Tensor | None = None) -> Tensor:
        """Tokens (B, N) int64 of pictures `index` (B,), in their variant (B,) (0, the picture as it is, by
        default; 1, where there are two, its mirror image)."""
        out = np.empty((len(index), self.grid[0] * self.grid[1]), dtype=np.int64)
        chosen = torch.zeros_like(index) if variant is None else variant
        for i, (n, v) in enumerate(zip(index.tolist(), chosen.tolist(), strict=True)):
            shard = int(np.searchsorted(self._starts, n, side="right")) - 1
            out[i] = self._shards[shard][n - self._starts[shard], v].reshape(-1)
        return torch.from_numpy(out)

    def select(self, **wanted: str) -> Tensor:
        """Indices (m,) int64 of the pictures whose record has all these values."""
        chosen = [i for i, record in enumerate(self.records)
                  if all(record.get(name) == value for name, value in wanted.items())]
        return torch.tensor(chosen, dtype=torch.int64)

    def column(self, name: str) -> list[Any]:
        """The field `name` of every record; UsageError where a record lacks it."""
        for record in self.records:
            if name not in record:
                raise UsageError(f"{self.folder}: the picture '{record.get('key')}' has no field '{name}', only "
                                 f"{', '.join(record)}")
        return [record[name] for record in self.records]

    def classes(self, name: str) -> tuple[list[str], Tensor]:
        """Class names and labels (n,) int64 by a record field. Whole numbers are the labels themselves, named by the
        field "class" where records have one; of anything else the sorted distinct values are the classes."""
        values = self.column(name)
        if all(type(value) is int and value >= 0 for value in values):
            named = {value: str(record.get("class", value)) for value, record in zip(values, self.records, strict=True)}
            return [named.get(i, str(i)) for i in range(max(values) + 1)], torch.tensor(values)
        names = sorted({str(value) for value in values})
        numbers = {value: i for i, value in enumerate(names)}
        return names, torch.tensor([numbers[str(value)] for value in values])


def write_tokens(out: str | Path, batches: Iterable[tuple[Tensor, list[dict[str, Any]]]], grid: tuple[int, int],
                 codebook_size: int, extra: Mapping[str, Any] | None = None,
                 progress: Callable[[int], object] | None = None) -> Path:
    """Writes batches of (tokens (B, variants, h, w) int, records) as a token folder, atomically.

    codebook_size must not exceed 65,536 (uint16 on disk). `extra` goes into the manifest.
    """
    if codebook_size > 65_536:
        raise ValueError(f"tokens are stored as uint16: a codebook of {codebook_size} does not fit")
    out = Path(out)
    with atomic_folder(out, "manifest.json") as folder:
        shards: list[dict[str, Any]] = []
        pending: list[np.ndarray] = []
        variants = 1

        def flush() -> None:
            if pending:
                array = np.concatenate(pending)
                name = f"tokens-{len(shards):05d}.bin"
                (folder / name).write_bytes(array.tobytes())
                shards.append({"file": name, "count": len(array), "sha256": sha256(folder / name)})
                pending.clear()

        with open(folder / "records.jsonl", "w", encoding="utf-8") as records:
            for tokens, batch in batches:
                variants = tokens.shape[1]
                pending.append(tokens.cpu().numpy().astype(np.uint16))
                records.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in batch)
                if sum(map(len, pending)) >= SHARD:
                    flush()
                if progress:
                    progress(len(batch))
            flush()
        if not shards:
            raise ValueError("there are no pictures to tokenize")
        write_json(folder / "manifest.json", {
            "format_version": FORMAT_VERSION, "grid": list(grid), "codebook_size": codebook_size, "variants": variants,
            "shards": shards, "records_sha256": sha256(folder / "records.jsonl"), **(extra or {})})
    return out
