"""Image sources with random access: webdataset tars and folders of images.

`open_images` gives an `ImageSource`; `to_tensor` turns one picture into a tensor over a background colour and
`load_rgba` decodes a whole source into memory. A source keeps no file open, so it can be pickled, forked and
read from threads.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "tif", "tiff"})
_BLOCK = 512
_PACKED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


class ImageSource(Protocol):
    """Pictures with metadata, by number."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        """The decoded picture (in its own mode, upright) and its metadata."""
        ...

    def metadata(self, index: int) -> dict[str, Any]:
        """The metadata alone; nothing is decoded. "key" names the picture within its source."""
        ...


def open_images(path: str | os.PathLike[str]) -> ImageSource:
    """Open a webdataset tar (plain or gzipped) or a folder of images.

    Raises FileNotFoundError for a missing path and ValueError for a damaged tar or a folder without images;
    pictures are decoded only when asked for, so a damaged picture shows (as ValueError) on access.
    """
    path = Path(path)
    if path.is_dir():
        return FolderSource(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image archive or folder")
    return TarSource(path)


def _decode(data: bytes, name: str, mend: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, zlib.error) as error:
        raise ValueError(f"{name}: cannot be decoded as an image ({error}); {mend}") from error


def _position(index: int, length: int) -> int:
    if not -length <= index < length:
        raise IndexError(f"image {index} of {length}")
    return index % length


# --- webdataset tar -----------------------------------------------------------------------------------


class TarSource:
    """A webdataset tar: members that share a name up to its first dot are one sample, in tar order.

    A sample has one picture and may have `.json` (an object: the metadata), `.txt` (the caption) and `.cls`
    (the label, an integer). A plain tar is read member by member with its index in memory; a gzipped one is
    unpacked into memory once.

    Raises ValueError, naming file and member, for a tar that is truncated or otherwise damaged and for a
    sample without the picture or without the .json that the others have.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._data = _unpack(self.path)  # None: read from the file
        self._samples: list[tuple[str, dict[str, tuple[int, int]]]] = []  # key, extension -> offset, size
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        for name, offset, size in self._index():
            folder, slash, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if dot and stem:
                samples.setdefault(f"{folder}{slash}{stem}", {})[extension.lower()] = (offset, size)
        has_json = any("json" in parts for parts in samples.values())
        for key, parts in samples.items():
            pictures = [extension for extension in parts if extension.rpartition(".")[2] in EXTENSIONS]
            if len(pictures) != 1:
                what = f"holds {len(pictures)} pictures ({', '.join(parts)})"
                raise ValueError(f"{self.path}: sample {key} {what}, not one; write the archive again")
            if has_json and "json" not in parts:
                raise ValueError(f"{self.path}: sample {key} has no {key}.json; write the archive again")
            self._samples.append((key, {"picture": parts[pictures[0]], **parts}))
        if not self._samples:
            raise ValueError(f"{self.path}: holds no pictures; expected members like name.png, name.json")

    def _index(self) -> list[tuple[str, int, int]]:
        if self._data is not None:
            return tar_index(io.BytesIO(self._data), str(self.path))
        with open(self.path, "rb") as file:
            return tar_index(file, str(self.path))

    def _read(self, place: tuple[int, int]) -> bytes:
        offset, size = place
        if self._data is not None:
            return self._data[offset : offset + size]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        key, parts = self._samples[_position(index, len(self))]
        name = f"{self.path}: member {key}"
        return _decode(self._read(parts["picture"]), name, "write the archive again"), self.metadata(index)

    def metadata(self, index: int) -> dict[str, Any]:
        """The sample's .json object, with "caption" from .txt, "label" from .cls, and "key"."""
        key, parts = self._samples[_position(index, len(self))]
        found: dict[str, Any] = {}
        for extension, field, parse in (
            ("json", None, json.loads),
            ("txt", "caption", str.strip),
            ("cls", "label", int),
        ):
            if extension not in parts:
                continue
            try:
                value: Any = parse(self._read(parts[extension]).decode())
            except ValueError as error:
                raise ValueError(
                    f"{self.path}: member {key}.{extension} cannot be read ({error}); write the archive again"
                ) from error
            if field is None and not isinstance(value, dict):
                raise ValueError(f"{self.path}: member {key}.json is not an object; write the archive again")
            found.update({field: value} if field else value)
        return {**found, "key": key}


def _unpack(path: Path) -> bytes | None:
    """The bytes of a gzipped file, None for one that is not packed."""
    with open(path, "rb") as file:
        start = file.read(8)
        if not start.startswith(b"\x1f\x8b"):
            for magic, name in _PACKED.items():
                if start.startswith(magic):
                    raise ValueError(f"{path}: is packed with {name}; unpack it (plain and gzip are read)")
            return None
    try:
        with gzip.open(path) as packed:
            return packed.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: is truncated or damaged ({error}); fetch or build it again") from error


def tar_index(file: io.BufferedIOBase, name: str) -> list[tuple[str, int, int]]:
    """(member name, offset of its data, size in bytes) of every regular file in a tar, in order.

    Reads the 512-byte headers alone (POSIX ustar and pax, GNU long names and sizes). `name` stands in the
    ValueError raised for a checksum that fails, data that ends early or a missing end mark.
    """
    mend = "fetch or build the archive again"
    end = file.seek(0, os.SEEK_END)
    members: list[tuple[str, int, int]] = []
    position = 0
    override: dict[str, str] = {}  # what an extended header says of the next member
    while True:
        file.seek(position)
        header = file.read(_BLOCK)
        after = f"after {members[-1][0]}" if members else "at its start"
        if len(header) < _BLOCK:
            raise ValueError(f"{name}: is truncated {after} (no end mark); {mend}")
        if not any(header):
            return members
        try:
            stored = int(header[148:156].strip(b"\0 "), 8)
            size = _number(header[124:136])
        except ValueError:
            stored, size = -1, 0
        if stored != sum(header) - sum(header[148:156]) + 8 * 32:
            raise ValueError(f"{name}: is not a tar or is damaged {after} (header checksum); {mend}")
        kind = header[156:157]
        member, prefix = _text(header[:100]), _text(header[345:500])
        if header[257:263] == b"ustar\0" and prefix:
            member = f"{prefix}/{member}"
        if kind in b"0\0":
            member, size = override.get("path", member), int(override.get("size", size))
        data = position + _BLOCK
        if data + size > end:
            raise ValueError(f"{name}: is truncated within member {member}; {mend}")
        if kind == b"x":
            try:
                override.update(_pax(file.read(size)))
            except ValueError as error:
                raise ValueError(f"{name}: is damaged {after} (extended header: {error}); {mend}") from error
        elif kind == b"L":
            override["path"] = _text(file.read(size))
        elif kind not in b"gK":
            if kind in b"0\0" and not member.endswith("/"):
                members.append((member.removeprefix("./"), data, size))
            override = {}
        position = data + -(-size // _BLOCK) * _BLOCK


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """An octal field, or GNU's base 256 for sizes of 8 GiB and more."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    return int(field.strip(b"\0 ") or b"0", 8)


def _pax(data: bytes) -> dict[str, str]:
    """The records "length key=value" of an extended header."""
    records = {}
    while data.strip(b"\0"):
        length = int(data.partition(b" ")[0])
        if not 4 < length <= len(data):
            raise ValueError(f"record of length {length}")
        key, _, value = data[:length].partition(b" ")[2].decode("utf-8", "surrogateescape").partition("=")
        records[key] = value.removesuffix("\n")
        data = data[length:]
    return records


# --- folder -------------------------------------------------------------------------------------------


class FolderSource:
    """A folder of images, sorted by path; hidden files and folders are passed over.

    The first sub-folder is the class (torchvision's ImageFolder): metadata has "class", its name, and "label",
    its place in `classes` (sorted names). Pictures beside the class folders have neither. A text file of
    the same name gives "caption". ValueError if no image is found.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files: list[str] = []  # relative, with forward slashes
        for folder, subfolders, files in os.walk(self.path, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in files:
                if not name.startswith(".") and name.rpartition(".")[2].lower() in EXTENSIONS:
                    self._files.append((Path(folder) / name).relative_to(self.path).as_posix())
        if not self._files:
            kinds = ", ".join(sorted(EXTENSIONS))
            raise ValueError(f"{self.path}: holds no images; expected files like class/name.png ({kinds})")
        self._files.sort()
        self.classes: list[str] = sorted({name.partition("/")[0] for name in self._files if "/" in name})

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        path = self.path / self._files[_position(index, len(self))]
        return _decode(path.read_bytes(), str(path), "replace or delete the file"), self.metadata(index)

    def metadata(self, index: int) -> dict[str, Any]:
        """ "key" (path without extension), and where there are: "class", "label", "caption"."""
        name = self._files[_position(index, len(self))]
        found: dict[str, Any] = {"key": name.rpartition(".")[0]}
        if "/" in name:
            found["class"] = name.partition("/")[0]
            found["label"] = self.classes.index(found["class"])
        text = (self.path / name).with_suffix(".txt")
        if text.is_file():
            try:
                found["caption"] = text.read_text("utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{text}: is not UTF-8 text ({error}); save it as UTF-8") from error
        return found


# --- tensors ------------------------------------------------------------------------------------------


def to_tensor(image: Image.Image, size: int, background: Sequence[int] = (255, 255, 255)) -> Tensor:
    """One picture as uint8 (3, size, size): over `background` (RGB, 0..255), centre-cropped, resized.

    Compositing comes before resizing. Both are linear, so this equals resizing premultiplied colours: no
    dark fringes.
    """
    rgba = _square(_to_rgba(image))
    under = Image.new("RGBA", rgba.size, (*background, 255))
    return _planes(_resize(Image.alpha_composite(under, rgba).convert("RGB"), size))


def to_rgba(image: Image.Image, size: int) -> Tensor:
    """One picture as uint8 (4, size, size), straight alpha, centre-cropped, resized with premultiplied alpha."""
    return _planes(_resize(_square(_to_rgba(image)), size))


def composite(rgba: Tensor, background: Tensor | Sequence[int] = (255, 255, 255)) -> Tensor:
    """Lay uint8 (..., 4, H, W) over a colour (3,) or one a picture (..., 3), 0..255: uint8 (..., 3, H, W).

    Rounds to the nearest: exact where alpha is 0 or 255.
    """
    colour = torch.as_tensor(background, dtype=torch.int32, device=rgba.device)[..., None, None]
    values = rgba.to(torch.int32)
    alpha = values[..., 3:, :, :]
    return ((values[..., :3, :, :] * alpha + colour * (255 - alpha) + 127) // 255).to(torch.uint8)


def load_rgba(
    source: ImageSource,
    size: int,
    indices: Iterable[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Decode pictures into memory: uint8 (N, 4, size, size), straight alpha, in the order of `indices`.

    All pictures if `indices` is None. `progress` is called with (pictures done, pictures in all). See
    `composite` for laying them over a colour.
    """
    chosen = list(range(len(source)) if indices is None else indices)
    pictures = torch.empty(len(chosen), 4, size, size, dtype=torch.uint8)
    for row, index in enumerate(chosen):
        pictures[row] = to_rgba(source[index][0], size)
        if progress:
            progress(row + 1, len(chosen))
    return pictures


def _to_rgba(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit greys to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGBA")


def _square(image: Image.Image) -> Image.Image:
    """The largest centred square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _resize(image: Image.Image, size: int) -> Image.Image:
    """Area average where the sides divide (no ringing at sharp edges), Lanczos otherwise; both antialias."""
    if image.width == size:
        return image
    method = Image.Resampling.BOX if image.width % size == 0 else Image.Resampling.LANCZOS
    if image.mode == "RGBA":
        return image.convert("RGBa").resize((size, size), method).convert("RGBA")
    return image.resize((size, size), method)


def _planes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
