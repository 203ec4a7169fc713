"""The emoji builder on small made packages, and the archive in the repository."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unmask.data import emoji, emoji_names
from unmask.data.images import open_images

ARCHIVE = Path(__file__).parent.parent / "datasets" / "emoji.tar.gz"
COUNTS = {
    "noto": 1645,
    "noto-v1": 1197,
    "twemoji": 1881,
    "fluent-emoji": 1591,
    "fluent-emoji-flat": 1593,
    "emojione": 1365,
    "fxemoji": 874,
}
SPLITS = {"train": 9268, "held-pair": 409, "held-concept": 469}

# --- made packages ------------------------------------------------------------------------------------

GROUPS = {
    "groups": {"0": "smileys", "2": "component", "9": "flags"},
    "subgroups": {"0": "face", "1": "person", "2": "tone", "3": "country-flag", "4": "keycap"},
}
DATA = [
    {"label": "Grinning face", "hexcode": "1F600", "tags": ["Happy"], "order": 1, "group": 0, "subgroup": 0},
    {"label": "red heart", "hexcode": "2764-FE0F", "order": 2, "group": 0, "subgroup": 0},
    {
        "label": "person",
        "hexcode": "1F9D1",
        "order": 3,
        "group": 0,
        "subgroup": 1,
        "skins": [{"label": "person: dark skin tone", "hexcode": "1F9D1-1F3FF"}],
    },
    {"label": "man: red hair", "hexcode": "1F468-200D-1F9B0", "order": 4, "group": 0, "subgroup": 1},
    {"label": "flag: France", "hexcode": "1F1EB-1F1F7", "order": 5, "group": 9, "subgroup": 3},
    {"label": "flag: Clipperton Island", "hexcode": "1F1E8-1F1F5", "order": 4, "group": 9, "subgroup": 3},
    {"label": "keycap: 1", "hexcode": "0031-FE0F-20E3", "order": 6, "group": 0, "subgroup": 4},
    {"label": "dark skin tone", "hexcode": "1F3FF", "order": 7, "group": 2, "subgroup": 2},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
    {"label": "pointing left", "hexcode": "1F448", "order": 8, "group": 0, "subgroup": 0},
    {"label": "pointing right", "hexcode": "1F449", "order": 9, "group": 0, "subgroup": 0},
]


def box(colour: str, x: int = 2) -> dict:
    return {"body": f'<path fill="{colour}" d="M{x} 2h4v8h-4z"/>'}


CODED = {  # a set that carries codepoints
    "icons": {
        "prefix": "coded",
        "width": 16,
        "height": 16,
        "icons": {
            "grinning-face": box("gold"),
            "heart": box("red"),
            "person": box("tan"),
            "person-dark": box("brown"),
            "france": box("blue"),
            "clipperton": box("blue"),
            "letter-a": box("black"),
        },
    },
    "chars": {
        "1f600": "grinning-face",
        "2764": "heart",
        "1f9d1": "person",
        "1f9d1-1f3ff": "person-dark",
        "1f1eb-1f1f7": "france",
        "1f1e8-1f1f5": "clipperton",
        "1f1e6": "letter-a",
    },
}
NAMED = {  # a set that carries names alone
    "icons": {
        "prefix": "named",
        "width": 16,
        "height": 16,
        "icons": {
            "happy-face": box("yellow"),  # a shortcode
            "heart": box("crimson"),  # a slug of the other set
            "man-redhair": box("tan", 3),
            "person-dark": box("brown", 3),  # skin tone, by the other set's slug
            "flag-for-france": box("white"),  # blank on white
            "digit-one": box("gray", 3),
            "unknown-thing": box("pink"),
            "bystander": {**box("teal"), "width": 32},  # named by its alias; twice as wide as high
            "pointing-left": box("olive", 0),
            "pointing-up": {**box("navy"), "hidden": True},
        },
        "aliases": {
            "person": {"parent": "bystander"},
            "pointing-right": {"parent": "pointing-left", "hFlip": True},
        },
    },
    "chars": {},
}


def tarball(path: Path, files: dict) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """A folder with made tarballs, put in place of the real table."""
    pytest.importorskip("resvg_py")
    folder = tmp_path / "packages"
    folder.mkdir()
    table = []
    for content in (CODED, NAMED):
        package = emoji.Package(f"@icons/{content['icons']['prefix']}", "1.0", "", "MIT", "plain")
        files = {f"{name}.json": value for name, value in content.items()}
        digest = tarball(folder / package.filename, files)
        table.append(emoji.Package(package.name, "1.0", digest, "MIT", f"{package.set} style"))
    base = {
        "en/data.json": DATA,
        "meta/groups.json": GROUPS,
        "en/shortcodes/emojibase.json": {"1F600": ["happy_face", "smile"], "1F449": "right"},
        "meta/unicode-names.json": {"2764": "HEAVY BLACK HEART"},
    }
    digest = tarball(folder / "emojibase-data-1.0.tgz", base)
    monkeypatch.setattr(emoji, "PACKAGES", tuple(table))
    monkeypatch.setattr(emoji, "EMOJIBASE", emoji.Package("emojibase-data", "1.0", digest, "MIT", ""))
    return folder


def test_build(packages, tmp_path):
    seen = []
    out = tmp_path / "new" / "made.tar.gz"
    summary = emoji.build(out, packages, 32, progress=lambda done, total: seen.append((done, total)))
    source = open_images(out)
    found = {m["key"]: m for m in (source.metadata(i) for i in range(len(source)))}
    assert sorted(found) == [
        "coded_1f1eb-1f1f7", "coded_1f600", "coded_1f9d1", "coded_2764", "named_0031-20e3",
        "named_1f448", "named_1f449", "named_1f468-200d-1f9b0", "named_1f600", "named_1f9d1", "named_2764",
    ]  # fmt: skip
    one = found["named_1f600"]
    assert one.pop("split") in ("train", "held-concept", "held-pair")
    assert one == {
        "key": "named_1f600",
        "caption": "grinning face",
        "tags": ["happy"],
        "group": "smileys",
        "subgroup": "face",
        "set": "named",
        "style": "named style",
        "codepoints": "1f600",
        "concept": "1f600",
        "licence": "MIT",
    }
    assert summary["pictures"] == 11 == len(source)
    assert summary["blanks"] == ["named_1f1eb-1f1f7"]
    assert summary["duplicates"] == [("coded_1f1e8-1f1f5", "coded_1f1eb-1f1f7")]  # the plainer name stays
    assert summary["sets"] == {"coded": 4, "named": 7}
    assert summary["bytes"] == out.stat().st_size
    assert seen == [(i + 1, 13) for i in range(13)]

    pictures = {source[i][1]["key"]: np.asarray(source[i][0].convert("RGBA")) for i in range(len(source))}
    assert {p.shape for p in pictures.values()} == {(32, 32, 4)}
    assert pictures["coded_2764"][8, 8].tolist() == [255, 0, 0, 255]
    assert pictures["coded_2764"][0, 0].tolist() == [0, 0, 0, 0]
    assert np.array_equal(pictures["named_1f448"], pictures["named_1f449"][:, ::-1])
    rows, columns = np.nonzero(pictures["named_1f9d1"][..., 3] == 255)  # 32 x 16 units: half a pixel's scale
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 17, 2, 5)


def test_build_is_reproducible(packages, tmp_path, monkeypatch):
    emoji.build(tmp_path / "a.tar.gz", packages, 32, workers=1)
    monkeypatch.setattr("time.time", lambda: 5e8)
    emoji.build(tmp_path / "b.tar.gz", packages, 32, workers=4)
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    emoji.build(tmp_path / "c.tar.gz", packages, 16)
    assert (tmp_path / "a.tar.gz").read_bytes() != (tmp_path / "c.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_package_errors(packages, tmp_path):
    out = tmp_path / "made.tar.gz"
    path = packages / "icons-named-1.0.tgz"
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    with pytest.raises(
        ValueError, match=r"icons-named-1\.0\.tgz: sha256 is .*delete .*npm pack @icons/named"
    ):
        emoji.build(out, packages, 16)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"icons-named-1\.0\.tgz: no such package; fetch it with"):
        emoji.build(out, packages, 16)
    assert not out.exists()


def test_package_without_member(packages, monkeypatch):
    package = emoji.PACKAGES[0]
    with pytest.raises(ValueError, match=r"icons-coded-1\.0\.tgz: holds no nothing\.json"):
        emoji.read_package(packages, package, ["nothing.json"])


def test_failed_write_leaves_the_old_file(packages, tmp_path, monkeypatch):
    out = tmp_path / "out" / "made.tar.gz"
    out.parent.mkdir()
    out.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        emoji.build(out, packages, 16)
    assert [path.name for path in out.parent.iterdir()] == ["made.tar.gz"]
    assert out.read_bytes() == b"old"


def fake_npm(folder: Path, script: str) -> str:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_fetch(packages, tmp_path, monkeypatch):
    emoji.build(tmp_path / "a.tar.gz", packages, 16)
    script = f'echo "$2" >> {tmp_path}/asked; cp {packages}/*.tgz .'
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", script))
    emoji.build(tmp_path / "b.tar.gz", size=16)
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    asked = (tmp_path / "asked").read_text().split()
    assert asked == ["@icons/coded@1.0", "@icons/named@1.0", "emojibase-data@1.0"]


def test_fetch_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", "echo first >&2; echo no network >&2; exit 1"))
    with pytest.raises(RuntimeError, match=r"npm pack @iconify-json/noto@1\.2\.9 failed: no network$"):
        emoji.build(tmp_path / "a.tar.gz")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(RuntimeError, match="npm is not installed: install Node"):
        emoji.build(tmp_path / "a.tar.gz")


# --- names and split ----------------------------------------------------------------------------------


def test_codepoint_key():
    assert emoji_names.codepoint_key("2764-FE0F") == "2764"
    assert emoji_names.codepoint_key("23-fe0f-20e3") == "0023-20e3"
    assert emoji_names.codepoint_key("1F468_200D_1F680") == "1f468-200d-1f680"


def test_concepts():
    pairs = {
        "1f3c3-200d-2642": "1f3c3",  # man running: person running
        "1f468-200d-1f680": "1f9d1",  # man astronaut: person
        "1f469-1f3fd": "1f9d1",
        "1f1eb-1f1f7": "1f1eb-1f1f7",  # flags by the pair
        "0031-20e3": "0031",
        "1f3f4-e0067-e007f": "1f3f4",
    }
    assert {key: emoji_names.concept_of(key) for key in pairs} == pairs


def test_ambiguous_names_fall_to_the_next_tier():
    data = [
        {"label": label, "hexcode": code, "order": 1, "group": 0, "subgroup": 0}
        for label, code in (("same", "1F600"), ("Same!", "1F601"), ("crème & co", "1F602"))
    ]
    names = emoji_names.Names(data, GROUPS, {"1F601": "same", "1F603": "other"}, {})
    assert names.find("same")[1] == "1f601"
    assert names.find("creme-and-co") == (0, "1f602")
    assert names.find("nothing") is None
    names.learn({"1f600": "same"})
    assert names.find("same")[1] == "1f600"


def test_splits():
    pairs = [(f"{c:04x}", f"set{s}") for c in range(4000) for s in range(1 + c % 7)]
    splits = emoji.assign_splits(pairs)
    assert set(splits) == set(pairs)
    by_concept = defaultdict(list)
    for (concept, _), split in splits.items():
        by_concept[concept].append(split)
    held = {concept for concept, all_of_it in by_concept.items() if "held-concept" in all_of_it}
    assert all(set(by_concept[concept]) == {"held-concept"} for concept in held)
    assert 0.04 < len(held) / len(by_concept) < 0.06
    for all_of_it in by_concept.values():
        if "held-pair" in all_of_it:
            assert all_of_it.count("train") >= 2
    rest = sum(len(s) for c, s in by_concept.items() if c not in held and len(s) >= 3)
    assert 0.04 < sum(split == "held-pair" for split in splits.values()) / rest < 0.06


def test_splits_stay_when_others_go_and_twins_stay_together():
    pairs = [(f"{c:04x}", f"set{s}") for c in range(1000) for s in range(4)]
    splits = emoji.assign_splits(pairs)
    assert emoji.assign_splits(reversed(pairs)) == splits
    assert emoji.assign_splits(pairs[:400]) == {pair: splits[pair] for pair in pairs[:400]}
    held = next(c for c, s in pairs if splits[c, s] == "held-concept")
    seen = next(c for c, s in pairs if splits[c, s] == "train")
    joined = emoji.assign_splits(pairs, [(held, seen)])
    assert (joined[held, "set0"] == "held-concept") == (joined[seen, "set0"] == "held-concept")


def test_blank_and_lookalikes():
    clear = np.zeros((16, 16, 4), np.uint8)
    white = np.full((16, 16, 4), 255, np.uint8)
    grey = np.full((16, 16, 4), 200, np.uint8)
    assert emoji.is_blank(clear)
    assert emoji.is_blank(white)
    assert not emoji.is_blank(grey)
    nearly = grey.copy()
    nearly[0, 0, :3] = 230
    thumbnails = [emoji.thumbnail(p) for p in (white, grey, clear, nearly)]
    assert thumbnails[0].shape == (768,)
    assert emoji.lookalikes(thumbnails) == [(0, 2), (1, 3)]


# --- the archive --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source():
    return open_images(ARCHIVE)


@pytest.fixture(scope="module")
def records(source):
    return [source.metadata(i) for i in range(len(source))]


def test_archive_counts(records):
    assert ARCHIVE.stat().st_size < 22e6
    assert Counter(r["set"] for r in records) == COUNTS
    assert len({r["subgroup"] for r in records}) == 98
    assert len({r["group"] for r in records}) == 9
    assert len({r["key"] for r in records}) == len(records)
    assert [r["key"] for r in records] == sorted(r["key"] for r in records)


def test_archive_records(records):
    table = {package.set: package for package in emoji.PACKAGES}
    for r in records:
        assert r["key"] == f"{r['set']}_{r['codepoints']}"
        assert r["concept"] == emoji_names.concept_of(r["codepoints"])
        assert (r["licence"], r["style"]) == (table[r["set"]].licence, table[r["set"]].style)
        assert r["caption"] == r["caption"].lower().strip() != ""
        assert not any(tone in r["codepoints"] for tone in ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))
    captions = defaultdict(set)
    for r in records:
        captions[r["codepoints"]].add((r["caption"], r["group"], r["subgroup"]))
    assert all(len(names) == 1 for names in captions.values())


def test_archive_known_pictures(source, records):
    """Some drawings whose colour is beyond doubt, in every set that has them."""
    colours = {"2764": (0, "red heart"), "1f49a": (1, "green heart"), "1f499": (2, "blue heart")}
    checked = 0
    for i, r in enumerate(records):
        if r["codepoints"] in colours:
            channel, caption = colours[r["codepoints"]]
            pixels = np.asarray(source[i][0].convert("RGBA")).astype(float)
            mean = (pixels[..., :3] * pixels[..., 3:]).sum((0, 1))
            assert mean.argmax() == channel
            assert r["caption"] == caption
            checked += 1
    assert checked >= 18


def test_archive_pictures_decode(source):
    for i in range(0, len(source), 101):
        image, metadata = source[i]
        assert image.size == (128, 128), metadata["key"]
        pixels = np.asarray(image.convert("RGBA"))
        assert not emoji.is_blank(pixels)
        assert not pixels[pixels[..., 3] == 0].any()


def test_archive_split(records):
    train = defaultdict(set)
    held_concepts, held_pairs, all_concepts = set(), defaultdict(set), set()
    for r in records:
        all_concepts.add(r["concept"])
        if r["split"] == "train":
            train[r["concept"]].add(r["set"])
        elif r["split"] == "held-pair":
            held_pairs[r["concept"]].add(r["set"])
        else:
            assert r["split"] == "held-concept"
            held_concepts.add(r["concept"])
    assert not held_concepts & set(train)
    assert not held_concepts & set(held_pairs)
    for concept, sets in held_pairs.items():
        assert not sets & train[concept]  # no other variant of it in the same style
        assert len(train[concept]) >= 2
    assert 0.03 < len(held_concepts) / len(all_concepts) < 0.07
    assert Counter(r["split"] for r in records) == SPLITS


def test_archive_agrees_with_tarfile(source):
    with tarfile.open(ARCHIVE) as tar:
        names = tar.getnames()
        assert len(names) == 2 * len(source)
        first = tar.extractfile(f"{source.metadata(0)['key']}.webp").read()
    image = Image.open(io.BytesIO(first)).convert("RGBA")
    assert np.array_equal(np.asarray(image), np.asarray(source[0][0].convert("RGBA")))
