"""Files on disk: whole or absent, and noticed when damaged."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from unmask import checkpoints
from unmask.checkpoints import (
    atomic_folder,
    atomic_path,
    from_json,
    load_weights,
    read_config,
    read_tensors,
    read_weights,
    tensors_sha256,
    write_model,
    write_tensors,
)
from unmask.errors import UsageError
from unmask.sampling import Interval, Ramp, Settings
from unmask.tokenizers.vqgan import VQConfig


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_path_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        with atomic_path(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert names(tmp_path) == ["a.txt"]


def test_atomic_path_keeps_the_old_on_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_atomic_folder_replaces_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    for number in (1, 2):
        with atomic_folder(folder) as temporary:
            (temporary / "config.json").write_text(str(number))
            (temporary / f"only{number}").touch()
        assert names(folder) == ["config.json", f"only{number}"]
    assert names(folder.parent) == ["model"]


def test_atomic_folder_keeps_the_old_on_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")

    def fail() -> None:
        with atomic_folder(folder) as temporary:
            (temporary / "config.json").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (folder / "config.json").read_text() == "old"

    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"), atomic_folder(folder) as temporary:
        (temporary / "config.json").write_text("new")
    assert (folder / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_atomic_folder_refuses_what_is_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    (tmp_path / "file").touch()
    for path in (folder, tmp_path / "file"):
        with pytest.raises(UsageError, match=r"holds no config\.json"), atomic_folder(path):
            raise AssertionError("not reached")
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert names(tmp_path) == ["file", "home"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_model(folder, {"net": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}},
                {"kind": "test"}, {"note.txt": "hello"})
    return folder


def test_model_folder_round_trip(model: Path) -> None:
    config = read_config(model)
    assert config["kind"] == "test"
    assert config["format_version"] == checkpoints.FORMAT_VERSION
    weights = read_weights(model, "net", config)
    assert torch.equal(weights["a"], torch.arange(6.0).view(2, 3))
    assert weights["b"].dtype == torch.bfloat16
    assert (model / "note.txt").read_text() == "hello"


def test_every_flipped_byte_is_noticed(model: Path) -> None:
    path, config = model / "net.safetensors", read_config(model)
    whole = path.read_bytes()
    for place in (0, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        with pytest.raises(ValueError, match=r"net\.safetensors: damaged"):
            read_weights(model, "net", config)
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="damaged"):
        read_weights(model, "net", config)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"net\.safetensors"):
        read_weights(model, "net", config)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not valid JSON"), ("[]", "'format_version' is missing"), ("{}", "'format_version' is missing"),
    ('{"format_version": 99}', "newer unmask"), ("\udcff", "not valid JSON")])
def test_damaged_config(model: Path, text: str, message: str) -> None:
    (model / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as caught:
        read_config(model)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_config(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such model folder"):
        read_config(tmp_path / "nowhere")
    (model / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        read_config(model)
    with pytest.raises(ValueError, match="'sha256' is missing"):
        read_weights(model, "net", {})
    with pytest.raises(ValueError, match=r"'net\.safetensors' is missing"):
        read_weights(model, "net", {"sha256": {}})


def test_not_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nonsense" * 10)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_tensors(path)


def test_read_a_part_by_prefix(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a/w": torch.zeros(1), "b/w": torch.ones(1)}, {"said": "so"})
    tensors, metadata = read_tensors(tmp_path / "x.safetensors", prefix="b/")
    assert list(tensors) == ["w"]
    assert tensors["w"].item() == 1
    assert metadata["said"] == "so"


def test_tensors_sha256() -> None:
    a, b = torch.randn(3, 4), torch.ones(2, dtype=torch.bfloat16)
    first = tensors_sha256({"a": a, "b": b})
    assert first == tensors_sha256({"b": b.clone(), "a": a.t().contiguous().t()})
    assert first != tensors_sha256({"a": a, "c": b})
    assert first != tensors_sha256({"a": torch.nextafter(a, a + 1), "b": b})
    assert tensors_sha256({"empty": torch.zeros(0)}) != tensors_sha256({})


def test_load_weights_names_what_does_not_fit(tmp_path: Path) -> None:
    def load(**changes: torch.Tensor | None) -> None:
        weights = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), **changes}
        load_weights(torch.nn.Linear(3, 2), {k: v for k, v in weights.items() if v is not None}, tmp_path / "w")

    load()
    for changes, message in (({"bias": None}, "'bias' is missing"), ({"more": torch.zeros(1)}, "'more' is unexpected"),
                             ({"bias": torch.zeros(3)}, r"'bias' has shape \(3,\)"),
                             ({"bias": torch.tensor([0.0, torch.nan])}, "'bias' holds NaN")):
        with pytest.raises(ValueError, match=message):
            load(**changes)


@pytest.mark.parametrize("settings", [
    Settings(), Settings(guidance_scale=(1.0, 3.0), schedule=2.5), Settings(temperature=Ramp(1, 0.8, "harmonic")),
    Settings(guidance_scale=Interval(3, 0.2, 0.8), stop_after=3, roll=True, schedule="square")])
def test_from_json_inverts_asdict(settings: Settings) -> None:
    assert from_json(Settings, json.loads(json.dumps(dataclasses.asdict(settings))), "x") == settings


@pytest.mark.parametrize(("values", "message"), [
    ({"codebook_sise": 3}, "field 'codebook_sise' is unknown: did you mean codebook_size?"),
    ({"channels": "128"}, "field 'channels' must be int, got '128'"),
    ({"channels": True}, "field 'channels' must be int, got True"),
    ({"multipliers": [1, "2"]}, "field 'multipliers' must be int, got '2'"),
    ({"multipliers": 3}, r"field 'multipliers' must be tuple\[int, ...\], got 3"),
    ({"multipliers": [1, 2]}, "must have one entry"), (7, "must be VQConfig, got 7")])
def test_from_json_names_the_field(values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_json(VQConfig, values, "here.json")
    assert str(caught.value).startswith("here.json: ")


def test_from_json_nested() -> None:
    @dataclasses.dataclass
    class Outer:
        settings: Settings
        pair: tuple[int, int] | None = None

    globals()["Outer"] = Outer  # get_type_hints looks names up in the module
    assert from_json(Outer, {"settings": {}, "pair": [1, 2]}, "x") == Outer(Settings(), (1, 2))
    assert from_json(Outer, {"settings": {}, "pair": None}, "x").pair is None
    for values, message in (({}, "'settings' is missing"),
                            ({"settings": {"top_k": 0.5}}, "'settings.top_k' must be int"),
                            ({"settings": {"order": "halto"}}, "unknown order 'halto': did you mean halton"),
                            ({"settings": {}, "pair": [1]}, "'pair' must be"),
                            ({"settings": {"guidance_scale": {"value": 1}}}, "'settings.guidance_scale' must be")):
        with pytest.raises(ValueError, match=message):
            from_json(Outer, values, "x")
