"""Files on disk: written atomically, hashed, checked on load.

A model is a folder: `config.json` names the format version, the parts and the sha256 of every weight file, which are
safetensors. A training state is a single safetensors file. What is on disk is whole or absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import shutil
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UsageError

FORMAT_VERSION = 1
T = TypeVar("T")


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal sha256 over the names and the bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0".encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed over `path`, on any error
    it is removed and `path` stays as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path, marker: str = "config.json") -> Iterator[Path]:
    """Yields an empty temporary folder beside `folder`; on success it takes the place of `folder`, on any error it is
    removed and `folder` stays as it was.

    Raises UsageError for an existing folder that holds files but no `marker`: it is none of ours to replace.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / marker).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and holds no {marker}: it is not replaced, give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(temporary, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as one safetensors file, atomically."""
    with atomic_path(path) as temporary:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(plain, temporary, metadata=dict(metadata or {}))
        temporary.chmod(mode)  # safetensors would leave it readable by its owner alone


def read_tensors(path: Path, expected_sha256: str | None = None,
                 prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file -> ({name: tensor}, metadata), only the names that begin with `prefix` (taken off).

    Raises FileNotFoundError, or ValueError naming the file where it is damaged or is not the file that
    `expected_sha256` describes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    if expected_sha256 is not None and sha256(path) != expected_sha256:
        raise ValueError(f"{path}: damaged (its sha256 is not the one in config.json): fetch or train it again")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no mapping)
            return {name[len(prefix):]: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}): fetch or train it again") from None


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file; a missing or damaged one gives one line naming it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def read_versioned(path: Path) -> dict[str, Any]:
    """Reads a JSON object that we wrote and checks its format version."""
    config = read_json(path)
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path}: the field 'format_version' is missing: not a file of unmask")
    if version > FORMAT_VERSION:
        raise ValueError(f"{path}: written by a newer unmask (format {version}, this one reads up to "
                         f"{FORMAT_VERSION}): upgrade unmask")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `config.json` of a model folder and checks its format version."""
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder")
    return read_versioned(path)


def field(config: Any, name: str, path: Path) -> Any:
    """`config[name]`, or a ValueError that names the file and the missing field."""
    if not isinstance(config, Mapping) or name not in config:
        raise ValueError(f"{path}: the field '{name}' is missing")
    return config[name]


def from_json(kind: type[T], values: Any, source: Path | str) -> T:
    """The dataclass `kind`, and those inside it, from what dataclasses.asdict and JSON made of it.

    Raises ValueError naming `source` and the field that is missing, unknown, or does not fit its type or its range.
    """
    try:
        made: T = _decode(kind, values, str(source), "")
    except TypeError as error:
        raise ValueError(str(error)) from None
    return made


def _decode(hint: Any, value: Any, source: str, name: str) -> Any:
    options = typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _decode_dataclass(hint, value, source, f"{name}." if name else "")
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in options:
            with contextlib.suppress(TypeError):
                return _decode(option, value, source, name)
    elif typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        each = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(each) == len(value):
            return tuple(_decode(h, v, source, name) for h, v in zip(each, value, strict=True))
    elif (hint is float and type(value) is int) or type(value) is hint:
        return value
    shown = hint.__name__ if isinstance(hint, type) and not options else str(hint)
    raise TypeError(f"{source}: the field '{name}' must be {shown.replace('NoneType', 'None')}, got {value!r}")


def _decode_dataclass(kind: Any, values: dict[str, Any], source: str, prefix: str) -> Any:
    fields = dataclasses.fields(kind)
    for name in values.keys() - {f.name for f in fields}:
        near = "".join(f": did you mean {n}?" for n in difflib.get_close_matches(name, [f.name for f in fields], n=1))
        raise TypeError(f"{source}: the field '{prefix}{name}' is unknown{near}")
    for f in fields:
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise TypeError(f"{source}: the field '{prefix}{f.name}' is missing")
    hints = typing.get_type_hints(kind)
    decoded = {name: _decode(hints[name], value, source, prefix + name) for name, value in values.items()}
    try:
        return kind(**decoded)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def write_model(folder: Path, files: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any],
                texts: Mapping[str, str] | None = None) -> None:
    """Writes a model folder: one safetensors file for each entry of `files` (named without extension), any `texts`
    (file name -> content), and `config.json` with the format version and the hash of every weight file."""
    with atomic_folder(folder) as temporary:
        hashes = {}
        for name, tensors in files.items():
            path = temporary / f"{name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, tensors)
            hashes[path.name] = sha256(path)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_json(temporary / "config.json", {"format_version": FORMAT_VERSION, **config, "sha256": hashes})


def read_weights(folder: Path, name: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of `folder/name.safetensors`, after its hash was checked against `config`."""
    path = Path(folder) / f"{name}.safetensors"
    hashes = field(config, "sha256", Path(folder) / "config.json")
    return read_tensors(path, field(hashes, path.name, Path(folder) / "config.json"))[0]


def load_weights(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Loads tensors into a module built on the meta device or a real one, checking names, shapes and finiteness.

    The weights keep their own dtype. Raises ValueError naming the file and the first entry that does not fit.
    """
    wanted = module.state_dict()
    for kind, names in (("missing", wanted.keys() - tensors.keys()), ("unexpected", tensors.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{source}: the weight '{min(names)}' is {kind} ({len(names)} in all): "
                             f"config and weights do not belong together")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{source}: the weight '{name}' has shape {tuple(tensor.shape)}, "
                             f"the config asks for {tuple(wanted[name].shape)}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: the weight '{name}' holds NaN or infinity")
    module.load_state_dict(dict(tensors), assign=True)
