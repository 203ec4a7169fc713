"""Token data sets on disk: memory-mapped uint16 shards, a manifest, and a record for every picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import FORMAT_VERSION, atomic_folder, field, read_json, sha256, write_json

SHARD = 65_536
"""Pictures a shard at most."""


class TokenDataset:
    """Tokens (n, variants, h, w) and records of a folder that :func:`write_tokens` made.

    Opening checks the size of every shard; `verify` also their hashes. Tokens stay on disk until asked for.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such token folder: make one with `unmask tokenize`")
        self.manifest: dict[str, Any] = read_json(path)
        self.grid: tuple[int, int] = tuple(field(self.manifest, "grid", path))
        self.codebook_size: int = field(self.manifest, "codebook_size", path)
        self.variants: int = field(self.manifest, "variants", path)
        shape = (self.variants, *self.grid)
        self._shards: list[np.ndarray] = []
        for shard in field(self.manifest, "shards", path):
            file = self.folder / shard["file"]
            wanted = shard["count"] * int(np.prod(shape)) * 2
            if not file.is_file() or file.stat().st_size != wanted:
                raise ValueError(f"{file}: missing or damaged ({wanted} bytes expected): run `unmask tokenize` again")
            self._shards.append(np.memmap(file, np.uint16, "r", shape=(shard["count"], *shape)))
        lines = (self.folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._starts = np.cumsum([0, *(len(s) for s in self._shards)])
        if len(self.records) != self._starts[-1]:
            raise ValueError(f"{self.folder}: {len(self.records)} records for {self._starts[-1]} pictures: run "
                             f"`unmask tokenize` again")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def verify(self) -> None:
        """Reads every shard and compares its hash; ValueError names the damaged file."""
        for shard in self.manifest["shards"]:
            if sha256(self.folder / shard["file"]) != shard["sha256"]:
                raise ValueError(f"{self.folder / shard['file']}: damaged: run `unmask tokenize` again")

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
        """Indices of the pictures whose record has all these values; a record without the field counts as having
        it, so that data without a split are all of it."""
        chosen = [i for i, record in enumerate(self.records)
                  if all(record.get(name, value) == value for name, value in wanted.items())]
        return torch.tensor(chosen, dtype=torch.int64)

    def class_names(self, name: str) -> list[str]:
        """The sorted distinct values of a record field: the names of its classes."""
        values = {str(record[name]) for record in self.records if name in record}
        if not values:
            raise ValueError(f"{self.folder}: no record has the field '{name}'")
        return sorted(values)


def write_tokens(out: str | Path, batches: Iterable[tuple[Tensor, list[dict[str, Any]]]], grid: tuple[int, int],
                 codebook_size: int, extra: Mapping[str, Any] | None = None,
                 progress: Callable[[int], object] | None = None) -> Path:
    """Writes batches of (tokens (B, variants, h, w) int, records) as a token folder, atomically.

    codebook_size must not exceed 65,536 (uint16 on disk). `extra` goes into the manifest.
    """
    if codebook_size > 65_536:
        raise ValueError(f"tokens are stored as uint16: a codebook of {codebook_size} does not fit")
    out = Path(out)
    with atomic_folder(out) as folder:
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
        write_json(folder / "manifest.json", {"format_version": FORMAT_VERSION, "grid": list(grid),
                                              "codebook_size": codebook_size, "variants": variants,
                                              "shards": shards, **(extra or {})})
    return out
