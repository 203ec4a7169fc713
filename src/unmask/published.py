"""The published models by name: fetched, converted once, cached.

Source: the README of the public code (valeoai/Halton-MaskGIT) and its repositories on the Hugging Face Hub.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from .checkpoints import field, from_json, read_config, read_json
from .conversion import C2I_TOKENIZER, LICENCES, SAMPLER_PRESETS, Report, convert, imagenet_classes
from .hub import cache_home, snapshot, split_source
from .layouts import build_network, infer_config, read_checkpoint
from .models.presets import TRANSFORMERS
from .models.transformer import TransformerConfig
from .tokenizers.vqgan import VQConfig


@dataclasses.dataclass(frozen=True)
class Published:
    """A published class model. network: its name in models.presets. repo, file: where it lies on the Hub;
    tokenizer: the same as "repo:file". image_size: pixels a side."""

    network: str
    file: str
    image_size: int
    repo: str = "llvictorll/Halton-MaskGIT"
    tokenizer: str = C2I_TOKENIZER


PUBLISHED = {
    "halton-maskgit-t-256": Published("class-t-256", "ImageNet_256_tiny.pth", 256),
    "halton-maskgit-s-256": Published("class-s-256", "ImageNet_256_small.pth", 256),
    "halton-maskgit-b-256": Published("class-b-256", "ImageNet_256_base.pth", 256),
    "halton-maskgit-s-384": Published("class-s-384", "ImageNet_384_small.pth", 384),
    "halton-maskgit-b-384": Published("class-b-384", "ImageNet_384_base.pth", 384),
    "halton-maskgit-l-384": Published("class-l-384", "ImageNet_384_large.pth", 384),
}
"""The published models by short name."""


def _cache_folder(name: str) -> Path:
    return cache_home() / "converted" / re.sub("[/:]", "--", name)


def cached(name: str) -> Path | None:
    """The folder of a published name that was converted before, whole; else None. Loads check the hashes."""
    folder = _cache_folder(name)
    try:
        for part in (folder, folder / "tokenizer"):
            if not all((part / file).is_file() for file in field(read_config(part), "sha256", part)):
                return None
    except (ValueError, FileNotFoundError):
        return None
    return folder


def fetch(name: str, report: Report | None = None) -> Path:
    """The model folder that a name of the network stands for.

    name: a key of PUBLISHED, or "hf-repo:file", a published checkpoint: both are fetched, converted once, and
    kept under `hub.cache_home`; or "owner/repo", a repository in our format. Two processes may ask at once:
    one converts, the other waits and finds the result. report: takes what is being done, line by line; by
    default stderr, if that is a terminal.

    Raises ConnectionError with no network and nothing cached, ValueError for a name that is nothing on the
    Hub or a repository of another format, and what :func:`convert` raises.
    """
    if name not in PUBLISHED and split_source(name) is None:
        folder = snapshot(name)
        config = folder / "config.json"
        if not config.is_file() or "format_version" not in read_json(config):
            raise ValueError(f"{name}: the repository is not in unmask's format: name one of its "
                             f"checkpoints, as {name}:FILE")
        return folder
    say = report or to_terminal
    folder = _cache_folder(name)
    if cached(name) is not None:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is converting {name}: waiting for it")
        lock.acquire()
    try:
        if cached(name) is None:
            _convert_into(folder, name, say)
    finally:
        lock.release()
    return folder


def _convert_into(folder: Path, name: str, say: Report) -> None:
    """Fetches and converts. The caller holds the lock, so what an interrupted process left can go."""
    for left in (folder, *folder.parent.glob(f".{folder.name}.*.*")):
        shutil.rmtree(left, ignore_errors=True)
    entry = PUBLISHED.get(name)
    if entry is None:
        convert(name, folder, report=say)
    else:
        convert(f"{entry.repo}:{entry.file}", folder, entry.tokenizer, image_size=entry.image_size,
                report=say)


def to_terminal(line: str) -> None:
    if sys.stderr.isatty():
        print(f"unmask: {line}", file=sys.stderr)


def catalogue() -> list[dict[str, str]]:
    """The models at hand, one row each: embedded ones, converted ones in the cache, published ones.

    Keys: name, where ("embedded", "cached", "published"), condition, pixels, grid, parameters, licence.
    """
    from .pipeline import EMBEDDED, embedded_folder

    rows = [row for name in EMBEDDED if (row := _row(name, "embedded", embedded_folder(name)))]
    home = cache_home() / "converted"
    others = [path.name for path in sorted(home.glob("[!.]*/")) if path.name not in PUBLISHED]
    for name in [*PUBLISHED, *others]:
        folder = cached(name)
        row = _row(name if name in PUBLISHED else str(home / name), "cached", folder) if folder else None
        if row is None and name in PUBLISHED:
            entry = PUBLISHED[name]
            config = TRANSFORMERS[entry.network]()
            row = _describe(name, "published", config, entry.image_size, LICENCES[entry.repo])
        if row:
            rows.append(row)
    return rows


def _row(name: str, where: str, folder: Path) -> dict[str, str] | None:
    """A row for a model folder, None if it cannot be read."""
    try:
        config = read_config(folder)
        other = config.get("tokenizer")
        tokenizer = read_config(folder / "tokenizer" if other is None else folder.parent / other)
        shape = from_json(TransformerConfig, field(config, "transformer", folder), folder)
        codes = from_json(VQConfig, field(tokenizer, "tokenizer", folder), folder)
    except (ValueError, FileNotFoundError):
        return None
    return _describe(name, where, shape, shape.grid[0] * codes.downsample, config.get("licence"))


def _describe(name: str, where: str, config: TransformerConfig, pixels: int,
              licence: str | None) -> dict[str, str]:
    parameters = sum(p.numel() for p in build_network(config).parameters())
    return {"name": name, "where": where, "condition": config.condition, "pixels": str(pixels),
            "grid": f"{config.grid[0]}x{config.grid[1]}", "parameters": f"{parameters / 1e6:.1f}M",
            "licence": licence or "unknown"}


__all__ = ["PUBLISHED", "SAMPLER_PRESETS", "Published", "cached", "catalogue", "convert", "fetch",
           "imagenet_classes", "infer_config", "read_checkpoint"]
