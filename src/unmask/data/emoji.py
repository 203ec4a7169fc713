"""Build the embedded data set: colour emoji from seven openly licensed sets, with true names.

The drawings come from the iconify packages on npm (SVG), the names, tags and groups from
emojibase-data (Unicode CLDR). `build` joins them by codepoint sequence, renders, drops blanks and
duplicates, splits and writes one webdataset tar that is the same to the byte on every run with the same
library versions. Reading the archive needs nothing from here: see `unmask.data.images`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .emoji_names import Emoji, Names, concept_of, join

HELD_CONCEPTS = 0.05
HELD_PAIRS = 0.05
_SALT = "unmask-emoji"
_COLOUR_STEP, _ALPHA_STEP = 5, 17  # both divide 255, so black, white, clear and opaque stay exact


@dataclass(frozen=True)
class Package:
    """One npm package: where it is, what it must hash to, whose work it is."""

    name: str
    version: str
    sha256: str
    licence: str  # of the artwork (SPDX); for emojibase, of the data
    style: str  # the words a prompt uses; empty for a package without pictures

    @property
    def set(self) -> str:
        """Short name, e.g. "noto-v1"."""
        return self.name.rpartition("/")[2]

    @property
    def filename(self) -> str:
        """The file name `npm pack` gives, e.g. "iconify-json-noto-v1-1.2.5.tgz"."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


# fmt: off
PACKAGES: tuple[Package, ...] = (
    Package("@iconify-json/noto", "1.2.9",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0", "noto"),
    Package("@iconify-json/noto-v1", "1.2.5",
            "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0", "noto v1"),
    Package("@iconify-json/twemoji", "1.2.5",
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0", "twemoji"),
    Package("@iconify-json/fluent-emoji", "1.2.7",
            "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b", "MIT", "fluent"),
    Package("@iconify-json/fluent-emoji-flat", "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT", "fluent flat"),
    Package("@iconify-json/emojione", "1.2.3",
            "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", "CC-BY-4.0", "emojione"),
    # The npm package says Apache-2.0; Mozilla's own repository puts the artwork under CC-BY-4.0.
    Package("@iconify-json/fxemoji", "1.2.2",
            "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", "CC-BY-4.0", "fxemoji"),
)
EMOJIBASE = Package("emojibase-data", "17.0.0",
                    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT", "")
# fmt: on


# --- packages -----------------------------------------------------------------------------------------


def fetch(packages: Sequence[Package], folder: Path) -> None:
    """Download `packages` from the npm registry into `folder`. RuntimeError if npm is missing or fails."""
    for package in packages:
        spec = f"{package.name}@{package.version}"
        try:
            done = subprocess.run(
                ["npm", "pack", spec, "--silent"], cwd=folder, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise RuntimeError(
                "npm is not installed: install Node.js, or pass a folder with the downloaded packages"
            ) from None
        if done.returncode:
            reason = (done.stderr or done.stdout).strip().splitlines()
            raise RuntimeError(f"npm pack {spec} failed: {reason[-1] if reason else done.returncode}")


def read_package(folder: Path, package: Package, members: Sequence[str]) -> list[Any]:
    """Parse JSON `members` (paths inside the tarball) of a package after checking its hash."""
    path = folder / package.filename
    fetch_it = f"fetch it with `npm pack {package.name}@{package.version}`"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such package; {fetch_it}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{path}: sha256 is {found}, expected {package.sha256}; delete the file and {fetch_it}"
        )
    contents = []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in members:
            try:
                file = tar.extractfile(f"package/{member}")
            except KeyError:
                file = None
            if file is None:
                raise ValueError(f"{path}: holds no {member}; {fetch_it}")
            contents.append(json.load(file))
    return contents


# --- pictures -----------------------------------------------------------------------------------------


def svg_of(icons: dict, slug: str, size: int) -> str:
    """The SVG document of one icon, fitted and centred in a square of `size` pixels."""
    alias = icons.get("aliases", {}).get(slug, {})
    icon = icons["icons"][alias.get("parent", slug)]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def render(icons: dict, slug: str, size: int) -> np.ndarray:
    """uint8 (size, size, 4), straight alpha, colours in steps of 5 and alpha of 17 (PSNR 48 dB, at least 43).

    The rounding makes the lossless file a quarter smaller; clear pixels are zero in all channels.
    """
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg_of(icons, slug, size), skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(np.int32)
    for channels, step in ((slice(0, 3), _COLOUR_STEP), (slice(3, 4), _ALPHA_STEP)):
        pixels[..., channels] = (pixels[..., channels] + step // 2) // step * step
    pixels[pixels[..., 3] == 0] = 0
    return pixels.astype(np.uint8)


def is_blank(pixels: np.ndarray) -> bool:
    """True if nothing can be seen of RGBA `pixels` over white."""
    alpha = pixels[..., 3:].astype(np.int32)
    return int((alpha * (255 - pixels[..., :3].astype(np.int32))).max()) < 8 * 255


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """float32 (768,), 0..255: RGBA `pixels` over white, averaged to 16 x 16."""
    white = Image.new("RGBA", pixels.shape[1::-1], "white")
    flat = Image.alpha_composite(white, Image.fromarray(pixels)).convert("RGB")
    return np.asarray(flat.resize((16, 16), Image.Resampling.BOX), np.float32).ravel()


def lookalikes(thumbnails: Sequence[np.ndarray], limit: float = 4.0) -> list[tuple[int, int]]:
    """Pairs of positions whose thumbnails differ by less than `limit` levels (root mean square)."""
    pairs, rows = [], np.stack(thumbnails) if thumbnails else np.empty((0, 0))
    for position, one in enumerate(rows):
        apart = np.sqrt(np.mean((rows[position + 1 :] - one) ** 2, axis=1))
        pairs += [(position, position + 1 + int(other)) for other in np.flatnonzero(apart < limit)]
    return pairs


def encode(pixels: np.ndarray) -> bytes:
    """Lossless WebP."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=100, method=4, exact=True)
    return buffer.getvalue()


# --- split --------------------------------------------------------------------------------------------


def _chance(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone."""
    digest = hashlib.sha256("/".join((_SALT, *words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(drawings: Iterable[tuple[str, str]], same: Iterable[tuple[str, str]] = ()) -> dict:
    """{(concept, set): "train" | "held-concept" | "held-pair"} for the (concept, set) pairs given.

    About 5 % of the concepts are held out in every set. Of the other pairs about 5 % are held out, as long
    as the concept stays in train in two other sets. A hash decides, so that a pair keeps its side when
    others come or go. `same` lists pairs of concepts whose drawings agree or nearly so (Norway's flag and
    Bouvet Island's): they go to one side together.
    """
    root: dict[str, str] = {}

    def find(concept: str) -> str:
        while concept in root:
            concept = root[concept]
        return concept

    for pair in same:
        low, high = sorted(map(find, pair))
        if low != high:
            root[high] = low
    sets: dict[str, set[str]] = defaultdict(set)
    for concept, one in drawings:
        sets[concept].add(one)
    splits = {}
    for concept, drawn_in in sets.items():
        if _chance("concept", find(concept)) < HELD_CONCEPTS:
            splits.update({(concept, one): "held-concept" for one in drawn_in})
            continue
        left = len(drawn_in)
        for chance, one in sorted((_chance("pair", concept, one), one) for one in drawn_in):
            held = chance < HELD_PAIRS and left >= 3
            left -= held
            splits[concept, one] = "held-pair" if held else "train"
    return splits


# --- archive ------------------------------------------------------------------------------------------


def _write_tar(out: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A gzipped tar with nothing in it that depends on when, where or by whom it is written; atomic."""
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            with (
                gzip.GzipFile("", "wb", 9, file, mtime=0) as packed,
                tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for name, data in members:
                    info = tarfile.TarInfo(name)  # mtime, uid and gid 0, no names
                    info.size, info.mode = len(data), 0o644
                    tar.addfile(info, io.BytesIO(data))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, out)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load(folder: Path, packages: Sequence[Package]) -> tuple[Names, dict[str, tuple[dict, dict]]]:
    base = ["en/data.json", "meta/groups.json", "en/shortcodes/emojibase.json", "meta/unicode-names.json"]
    names = Names(*read_package(folder, EMOJIBASE, base))
    sets = {}
    for package in packages:
        icons, chars = read_package(folder, package, ["icons.json", "chars.json"])
        sets[package.set] = (icons, chars)
        names.learn(chars)
    return names, sets


def build(
    out: Path,
    packages: Path | None = None,
    size: int = 128,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Build the archive `out` and return a summary of what is in it.

    Parameters
    ----------
    out : where the gzipped webdataset tar goes; replaced whole once it is complete.
    packages : folder with the npm tarballs named in `PACKAGES` and `EMOJIBASE`; None fetches them with npm.
    size : side of the pictures in pixels.
    workers : threads that render and encode; the result does not depend on it.
    progress : called with (pictures done, pictures in all).

    Returns
    -------
    dict with "pictures", "bytes", "sets", "splits", "concepts", "subgroups" (counts), "duplicates" and
    "blanks" (keys left out; of each duplicate also the key kept).

    Raises
    ------
    ValueError for a package whose hash or content is wrong, FileNotFoundError for a missing one,
    RuntimeError where npm is missing or fails.
    """
    if packages is None:
        with tempfile.TemporaryDirectory() as folder:
            fetch([*PACKAGES, EMOJIBASE], Path(folder))
            return build(out, Path(folder), size, workers, progress)
    names, sets = _load(packages, PACKAGES)
    jobs = [
        (package, names.emoji[key], slug)
        for package in PACKAGES
        for key, slug in join(names, *sets[package.set]).items()
    ]
    # Of equal drawings the plainest emoji stays: "family" rather than "family: man, woman, boy".
    jobs.sort(key=lambda j: (PACKAGES.index(j[0]), j[1].key.count("-"), len(j[1].label), j[1].order))

    def draw(job: tuple[Package, Emoji, str]) -> tuple[str, np.ndarray, bytes] | None:
        pixels = render(sets[job[0].set][0], job[2], size)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        return None if is_blank(pixels) else (digest, thumbnail(pixels), encode(pixels))

    first: dict[str, int] = {}  # hash of the pixels -> first job that drew them
    kept: dict[int, tuple[np.ndarray, bytes]] = {}
    blanks, duplicates, same = [], [], []
    with ThreadPoolExecutor(workers) as pool:
        for number, drawn in enumerate(pool.map(draw, jobs)):
            package, emoji, _ = jobs[number]
            if drawn is None:
                blanks.append(f"{package.set}_{emoji.key}")
            elif (twin := first.setdefault(drawn[0], number)) != number:
                duplicates.append((f"{package.set}_{emoji.key}", f"{jobs[twin][0].set}_{jobs[twin][1].key}"))
                same.append((concept_of(emoji.key), concept_of(jobs[twin][1].key)))
            else:
                kept[number] = drawn[1:]
            if progress:
                progress(number + 1, len(jobs))
    pairs = {number: (concept_of(jobs[number][1].key), jobs[number][0].set) for number in kept}
    for package in PACKAGES:
        inside = [number for number in kept if jobs[number][0] is package]
        alike = lookalikes([kept[number][0] for number in inside])
        same += [(pairs[inside[a]][0], pairs[inside[b]][0]) for a, b in alike]
    splits = assign_splits(pairs.values(), same)
    records = [(*jobs[number][:2], splits[pairs[number]], data) for number, (_, data) in kept.items()]
    _write_tar(out, _members(records))
    return {
        "pictures": len(records),
        "bytes": out.stat().st_size,
        "sets": dict(Counter(package.set for package, *_ in records)),
        "splits": dict(Counter(split for *_, split, _ in records)),
        "concepts": len({concept for concept, _ in splits}),
        "subgroups": len({emoji.subgroup for _, emoji, *_ in records}),
        "blanks": blanks,
        "duplicates": duplicates,
    }


def _members(records: Iterable[tuple[Package, Emoji, str, bytes]]) -> Iterable[tuple[str, bytes]]:
    """The archive's members in order: for each sample its metadata, then its picture."""
    for package, emoji, split, data in sorted(records, key=lambda r: f"{r[0].set}_{r[1].key}"):
        key = f"{package.set}_{emoji.key}"
        metadata = {
            "caption": emoji.label,
            "tags": list(emoji.tags),
            "group": emoji.group,
            "subgroup": emoji.subgroup,
            "set": package.set,
            "style": package.style,
            "codepoints": emoji.key,
            "concept": concept_of(emoji.key),
            "licence": package.licence,
            "split": split,
        }
        yield f"{key}.json", json.dumps(metadata, ensure_ascii=False).encode()
        yield f"{key}.webp", data
