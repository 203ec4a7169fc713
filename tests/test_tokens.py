"""Token folders: what goes in comes out, and damage is named."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from unmask.data import tokens as module
from unmask.data.prompts import prompt, varied_prompt
from unmask.data.tokens import TokenDataset, write_tokens
from unmask.errors import UsageError


def make(folder: Path, n: int = 10, variants: int = 2, records: list[dict] | None = None) -> torch.Tensor:
    """Writes n pictures of 2x3 tokens in batches of 4; returns all tokens (n, variants, 2, 3)."""
    tokens = torch.randint(0, 60_000, (n, variants, 2, 3), generator=torch.Generator().manual_seed(0))
    records = records or [{"key": f"k{i}", "split": "train" if i % 3 else "held-concept", "class": "ab"[i % 2],
                           "label": i % 2, "caption": f"número {i}"} for i in range(n)]
    write_tokens(folder, ((tokens[i:i + 4], records[i:i + 4]) for i in range(0, n, 4)), (2, 3), 60_000,
                 {"source": "test"})
    return tokens


def test_round_trip_over_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 4)
    tokens = make(tmp_path / "t")
    data = TokenDataset(tmp_path / "t")
    data.verify()
    assert (len(data), data.grid, data.codebook_size, data.variants) == (10, (2, 3), 60_000, 2)
    assert [shard.count for shard in data.manifest.shards] == [4, 4, 2]
    index = torch.tensor([9, 0, 4, 4, 3])
    assert torch.equal(data.tokens(index), tokens[index, 0].flatten(1))
    variant = torch.tensor([1, 0, 1, 0, 1])
    assert torch.equal(data.tokens(index, variant), tokens[index, variant].flatten(1))
    assert data.tokens(index).dtype == torch.int64
    assert data.records[3]["caption"] == "número 3"
    assert data.manifest.source == "test"


def test_select(tmp_path: Path) -> None:
    make(tmp_path / "t")
    data = TokenDataset(tmp_path / "t")
    assert data.select(split="held-concept").tolist() == [0, 3, 6, 9]
    assert data.select(split="train", label=1).tolist() == [1, 5, 7]
    assert len(data.select(split="none")) == 0


def test_classes_by_name_and_by_number(tmp_path: Path) -> None:
    records = [{"key": str(i), "class": ("ant", "zebra")[i % 2], "label": (2, 10)[i % 2], "mixed": (1, "x")[i % 2]}
               for i in range(4)]
    make(tmp_path / "t", 4, records=records)
    data = TokenDataset(tmp_path / "t")
    names, labels = data.classes("class")
    assert (names, labels.tolist()) == (["ant", "zebra"], [0, 1, 0, 1])
    names, labels = data.classes("label")
    assert labels.tolist() == [2, 10, 2, 10]  # numbers stay what they are
    assert names == ["0", "1", "ant", "3", "4", "5", "6", "7", "8", "9", "zebra"]
    assert data.classes("mixed")[0] == ["1", "x"]
    with pytest.raises(UsageError, match="'0' has no field 'subgroup', only key, class, label, mixed"):
        data.classes("subgroup")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    make(folder)
    shard, records, manifest = folder / "tokens-00000.bin", folder / "records.jsonl", folder / "manifest.json"
    saved = {path: path.read_bytes() for path in (shard, records, manifest)}

    def restore() -> None:
        for path, content in saved.items():
            path.write_bytes(content)

    flip(shard, 17)
    with pytest.raises(ValueError, match=r"tokens-00000\.bin: missing or damaged: run `unmask tokenize` again"):
        TokenDataset(folder).verify()
    shard.write_bytes(saved[shard][:-2])
    with pytest.raises(ValueError, match=r"tokens-00000\.bin: missing or damaged"):
        TokenDataset(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"tokens-00000\.bin: missing"):
        TokenDataset(folder)
    restore()
    flip(records, 5)
    with pytest.raises(ValueError, match=r"records\.jsonl: missing or damaged"):
        TokenDataset(folder)
    records.unlink()
    with pytest.raises(ValueError, match=r"records\.jsonl: missing"):
        TokenDataset(folder)
    restore()
    content = json.loads(saved[manifest])
    for change, message in (({"format_version": 2}, "newer unmask"), ({"grid": [2]}, "field 'grid' must be"),
                            ({"grid": None}, "field 'grid' must be"), ({"shards": [{"file": "x"}]}, "is missing")):
        manifest.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message) as caught:
            TokenDataset(folder)
        assert "manifest.json" in str(caught.value)
    for name in ("grid", "codebook_size", "shards", "records_sha256"):
        manifest.write_text(json.dumps({k: v for k, v in content.items() if k != name}))
        with pytest.raises(ValueError, match=f"the field '{name}' is missing"):
            TokenDataset(folder)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such token folder"):
        TokenDataset(tmp_path / "none")


def test_a_shard_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    make(tmp_path / "t")
    manifest = tmp_path / "t" / "manifest.json"
    (tmp_path / "t" / "tokens-00000.bin").rename(tmp_path / "tokens-00000.bin")
    manifest.write_text(manifest.read_text().replace("tokens-00000.bin", "../tokens-00000.bin"))
    with pytest.raises(ValueError, match="missing"):
        TokenDataset(tmp_path / "t")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="65537 does not fit"):
        write_tokens(tmp_path / "t", [], (2, 2), 65_537)
    with pytest.raises(ValueError, match="no pictures"):
        write_tokens(tmp_path / "t", [], (2, 2), 16)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UsageError, match=r"holds no manifest\.json"):
        make(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_prompts() -> None:
    record = {"caption": "red apple", "style": "noto", "tags": ["fruit", "red", "!", "×"]}
    assert prompt(record) == "red apple, noto style"
    assert prompt({"caption": "a dog"}) == "a dog"
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(varied_prompt(record, generator) for _ in range(2000))
    assert set(drawn) >= {"red apple, noto style", "noto red apple", "red apple in noto style", "red apple", "fruit",
                          "red apple, fruit, noto style", "fruit, noto style"}
    assert drawn.most_common(1)[0][0] == "red apple, noto style"
    assert not any(c in text for text in drawn for c in "!×")  # no encoder could read such a tag alone
    assert "red, noto style" not in drawn  # a tag that the caption says already adds nothing
    assert {varied_prompt({"caption": "a dog"}, generator) for _ in range(50)} == {"a dog"}
    again = torch.Generator().manual_seed(0)
    assert varied_prompt(record, again) == varied_prompt(record, torch.Generator().manual_seed(0))
