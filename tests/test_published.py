"""Foreign checkpoints and published names: read, refused, converted, cached."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from unmask import checkpoints, conversion, hub, published
from unmask.conversion import GUIDANCE_SCALES, convert, imagenet_classes, sampler_defaults
from unmask.layouts import (
    _published_shape,
    build_network,
    infer_config,
    published_name,
    read_checkpoint,
    to_ours,
)
from unmask.models.presets import TRANSFORMERS, build
from unmask.models.transformer import TransformerConfig
from unmask.pipeline import Pipeline, load_model
from unmask.published import PUBLISHED, cached, catalogue, fetch
from unmask.sampling import Settings, value_at
from unmask.tokenizers.vqgan import VQGAN, VQConfig

CLASS = TransformerConfig("class", (16, 16), 64, 384, 1, 6, 1024, registers=1, classes=10)
PATCH2 = TransformerConfig("class", (8, 8), 64, 384, 1, 6, 1024, patch=2, registers=1, classes=10)
TEXT = TransformerConfig("text", (8, 8), 64, 64, 2, 1, 96, patch=2, text_dim=16, text_length=120)
CODES = VQConfig(64, 4, 32, (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), z_channels=32)
DATA = Path(__file__).parent / "data"


def layout(config: TransformerConfig | VQConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names and in the shapes of the public code."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, like in build_network(config).state_dict().items():
        theirs, shape = name, tuple(like.shape)
        if isinstance(config, TransformerConfig):
            theirs, third = published_name(name, config.condition)
            shape = _published_shape(name, like.shape, config.condition, third)
        if theirs not in weights:
            weights[theirs] = torch.randn(shape, generator=generator) * 0.05
    if isinstance(config, VQConfig):
        weights["quantize.codebook_used"] = torch.zeros(65536)
    elif config.condition == "class":
        weights["head.weight"] = weights["tok_emb.weight"]
    return weights


def training_state(weights: dict[str, torch.Tensor], prefix: str = "module.") -> dict:
    """A checkpoint as training writes it: prefixed weights, and the optimizer's state beside them."""
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(5), "exp_avg_sq": torch.zeros(5)}
    return {"iter": 3, "global_epoch": 1, "model_state_dict": {prefix + k: v for k, v in weights.items()},
            "optimizer_state_dict": {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "params": [0]}]}}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a class model, a text model and a tokenizer in published form."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(training_state(layout(CLASS)), folder / "class.pth")
    torch.save(training_state(layout(TEXT), "_orig_mod."), folder / "text.pth")
    torch.save({"model": layout(CODES)}, folder / "vq.pt")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def network(files, monkeypatch) -> list[str]:
    """A Hub that serves the files of `files`; returns the names it was asked for."""
    asked = []

    def serve(repo: str, file: str, **_) -> str:
        asked.append(f"{repo}:{file}")
        return str(files / ("vq.pt" if file.startswith("vq") else "class.pth"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", serve)
    return asked


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*")] if folder.exists() else []


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("payload", ["model_state_dict", "model", None])
def test_reads_every_wrapping(tmp_path, prefix: str, payload: str | None) -> None:
    weights = {"a.weight": torch.randn(3, 2), "module_like.bias": torch.randn(2)}
    state = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save(state if payload is None else {payload: state, "optimizer": {"lr": 1}}, tmp_path / "a.pth")
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.pth"), weights)


def test_reads_safetensors(tmp_path) -> None:
    save_file({"module.a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert read_checkpoint(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]


class Runs:
    """A pickle of this writes a file when it is loaded carelessly."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def write_bad(kind: str, path: Path) -> None:
    weights = layout(CLASS)
    torch.save(training_state(weights), path)
    data = path.read_bytes()
    match kind:
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "flipped":
            path.write_bytes(data[:150] + bytes(200) + data[350:])
        case "empty":
            path.write_bytes(b"")
        case "web page":
            path.write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>")
        case "pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
        case "code":
            torch.save({"model_state_dict": weights, "x": Runs(path.parent / "ran")}, path)
        case "bare code":
            path.write_bytes(pickle.dumps(Runs(path.parent / "ran")))
        case "old format":
            torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
        case "compressed":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("archive/data.pkl", bytes(10**6))
        case "text":
            path.write_text("hello")
        case "resnet":
            torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64),
                        "bn1.num_batches_tracked": torch.tensor(0), "fc.weight": torch.zeros(10, 64)}, path)
        case "nested":
            torch.save({"epoch": 3, "state_dict": weights}, path)
        case "list":
            torch.save([torch.zeros(2)], path)
        case "nothing":
            torch.save({"model": {}}, path)
        case "sparse":
            torch.save({"tok_emb.weight": torch.eye(3).to_sparse()}, path)
        case "bomb":
            torch.save({**weights, "tok_emb.weight": torch.zeros(1, 1).expand(10**6, 10**6)}, path)
        case _:
            save_changed(kind, weights, path)


def save_changed(kind: str, weights: dict[str, torch.Tensor], path: Path) -> None:
    layer = "transformer.layers.0"
    match kind:
        case "wrong shape":
            weights[f"{layer}.ln1.weight"] = torch.zeros(383)
        case "wrong axes":
            weights["tok_emb.weight"] = torch.zeros(65)
        case "nan":
            weights[f"{layer}.ff.w2.weight"][5, 5] = torch.nan
        case "integers":
            weights[f"{layer}.ln1.weight"] = torch.ones(384, dtype=torch.int64)
        case "missing":
            del weights[f"{layer}.attn.wk.weight"]
        case "extra":
            weights["controlnet.weight"] = torch.zeros(2)
        case "untied":
            weights["head.weight"] = weights["head.weight"] + 1
        case "oblong":
            weights["pos_emb.weight"] = torch.zeros(200, 384)
    torch.save(training_state(weights), path)


BAD = {"truncated": "truncated", "flipped": "damaged", "empty": "not a checkpoint", "web page": "web page",
       "pointer": "git lfs pull", "code": "nothing was run", "bare code": "bare pickle",
       "old format": "before 1.6", "compressed": "compressed", "text": "not a checkpoint",
       "resnet": "conv1.weight", "nested": "'epoch' is a int", "list": "no weights", "nothing": "no weights",
       "sparse": "not a dense", "bomb": "not a dense", "wrong shape": r"has shape \(383,\)",
       "wrong axes": "2 axes were expected", "nan": "NaN", "integers": "int64",
       "missing": "wk.weight' is missing", "extra": "controlnet.weight' is unexpected",
       "untied": "differs from 'tok_emb.weight'",
       "oblong": "no square grid"}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_in_one_line(files, tmp_path, kind: str) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    path = folder / "bad.pth"
    write_bad(kind, path)
    with pytest.raises(ValueError, match=BAD[kind]) as caught:
        convert(path, tmp_path / "out", files / "vq.pt")
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 260
    assert leftovers(folder) == ["bad.pth"]  # and no code ran
    assert leftovers(tmp_path) == ["place", "bad.pth"]


def test_missing_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert(tmp_path / "none.pth", tmp_path / "out")


def test_unknown_width_asks_for_heads() -> None:
    config = TransformerConfig("class", (4, 4), 16, 64, 1, 4, 256, registers=1, classes=3)
    with pytest.raises(ValueError, match="--heads"):
        infer_config(layout(config))
    assert infer_config(layout(config), heads=4) == config


@pytest.mark.parametrize("config", [CLASS, PATCH2, TEXT, CODES])
def test_infers_what_was_written(config) -> None:
    weights = layout(config)
    assert infer_config(weights) == config
    build_network(config).load_state_dict(to_ours(weights, config), assign=True)


# --------------------------------------------------------------------------------------------- converting


def test_converts_loads_and_draws(files, tmp_path) -> None:
    folder = convert(files / "class.pth", tmp_path / "out", files / "vq.pt",
                     class_names=[f"class {i}" for i in range(10)])
    pipe = Pipeline.from_pretrained(folder)
    images = pipe(class_labels=["class 3"], seed=1, num_inference_steps=2).images
    assert images[0].size == (256, 256)
    expected = to_ours(layout(CLASS), CLASS)
    torch.testing.assert_close(dict(pipe.transformer.state_dict()), expected, rtol=0, atol=0)
    codes = to_ours(layout(CODES), CODES)
    torch.testing.assert_close(dict(pipe.tokenizer.state_dict()), codes, rtol=0, atol=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["source"] == {"file": "class.pth", "sha256": checkpoints.sha256(files / "class.pth")}
    assert config["sampler"] == sampler_defaults(CLASS)
    assert config["kind"] == "pipeline"
    stored = json.loads((folder / "tokenizer" / "config.json").read_text())
    assert (stored["kind"], stored["image_size"]) == ("tokenizer", 256)
    card = (folder / "README.md").read_text()
    assert "class.pth" in card
    assert str(tmp_path) not in card + json.dumps(config) + json.dumps(stored)


def test_text_models_convert(files, tmp_path) -> None:
    folder = convert(files / "text.pth", tmp_path / "out", files / "vq.pt", text_encoder="words",
                     licence="mit")
    model = load_model(folder)
    assert model.config == TEXT
    torch.testing.assert_close(dict(model.state_dict()), to_ours(layout(TEXT), TEXT), rtol=0, atol=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["sampler"]["schedule"] == "square"
    assert (config["text_encoder"], config["class_names"], config["licence"]) == ("words", None, "mit")


def test_tokenizers_convert_alone_and_serve_as_folders(files, tmp_path) -> None:
    tokenizer = convert(files / "vq.pt", tmp_path / "vq")
    assert isinstance(load_model(tokenizer), VQGAN)
    first = convert(files / "class.pth", tmp_path / "first", tokenizer)
    second = convert(files / "class.pth", tmp_path / "second", first)  # the tokenizer of a pipeline folder
    assert read_checkpoint(second / "tokenizer" / "tokenizer.safetensors").keys() == load_model(
        tokenizer).state_dict().keys()


def test_half_precision_is_kept(tmp_path, files) -> None:
    torch.save({k: v.bfloat16() for k, v in layout(CLASS).items()}, tmp_path / "half.pth")
    folder = convert(tmp_path / "half.pth", tmp_path / "out", files / "vq.pt")
    assert {t.dtype for t in load_model(folder, dtype=None).state_dict().values()} == {torch.bfloat16}


def test_options_show(files, tmp_path) -> None:
    lines: list[str] = []
    folder = convert(files / "class.pth", tmp_path / "out", files / "vq.pt", heads=3, report=lines.append,
                     sampler={"num_inference_steps": 7})
    assert load_model(folder).config.heads == 3
    assert Pipeline.from_pretrained(folder).settings.num_inference_steps == 7
    assert lines == ["converting class.pth"]
    with pytest.raises(ValueError, match="2 class names for 10 classes"):
        convert(files / "class.pth", tmp_path / "out", files / "vq.pt", class_names=["a", "b"])


def test_tokenizers_that_do_not_fit(files, tmp_path) -> None:
    with pytest.raises(ValueError, match="give 256 pixels, not 384"):
        convert(files / "class.pth", tmp_path / "out", files / "vq.pt", image_size=384)
    torch.save(layout(VQConfig(32, 4, 32, (1,), (1,), (1,), 32)), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="32 codes, the transformer 64"):
        convert(files / "class.pth", tmp_path / "out", tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is a transformer, not a tokenizer"):
        convert(files / "class.pth", tmp_path / "out", files / "class.pth")
    assert leftovers(tmp_path) == ["other.pt"]


@pytest.mark.parametrize("call", [1, 2])
def test_full_disk_leaves_nothing(files, tmp_path, monkeypatch, call: int) -> None:
    """The disk fills up while the transformer (1) or the tokenizer (2) is written."""
    calls = []

    def save(tensors, path, metadata=None) -> None:
        calls.append(path)
        Path(path).write_bytes(b"half")
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", save)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(OSError, match="the disk is full, nothing was written") as caught:
        convert(files / "class.pth", tmp_path / "out", files / "vq.pt")
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == ["out", "config.json"]


def test_a_disk_too_small_is_seen_before_writing(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match=r"needed, 0\.0 GB free"):
        convert(files / "class.pth", tmp_path / "out", files / "vq.pt")
    assert leftovers(tmp_path) == []


# ------------------------------------------------------------------------------------------------ names


def test_published_figures() -> None:
    """README of the public code: w, resolution."""
    scales = {"t-256": 1.5, "s-256": 1.0, "b-256": 0.7, "s-384": 1.0, "b-384": 0.7, "l-384": 0.5}
    assert PUBLISHED.keys() == {f"halton-maskgit-{key}" for key in scales}
    for key, w in scales.items():
        entry = PUBLISHED[f"halton-maskgit-{key}"]
        config = TRANSFORMERS[entry.network]()
        assert entry.image_size == int(key[-3:]) == 16 * config.grid[0]
        settings = checkpoints.from_json(Settings, sampler_defaults(config), "sampler")
        assert settings.guidance_scale == pytest.approx(1 + w)
        assert (settings.num_inference_steps, settings.order, settings.roll) == (32, "halton", True)
        assert settings.schedule == "arccos"
        assert entry.network in GUIDANCE_SCALES


def test_temperature_is_the_public_multiplier() -> None:
    """The public code multiplies logits by linspace(1, 1.2, steps); ours divides them by the temperature."""
    settings = checkpoints.from_json(Settings, sampler_defaults(CLASS), "sampler")
    ours = torch.tensor([1 / value_at(settings.temperature, i, 32) for i in range(32)])
    torch.testing.assert_close(ours, torch.linspace(1, 1.2, 32))


def test_table2_networks_take_the_papers_schedule() -> None:
    for name in ("class-xl-2", "text-l-2"):
        assert sampler_defaults(TRANSFORMERS[name]())["schedule"] == "square"
    presets = published.SAMPLER_PRESETS
    assert {**presets["paper"], "schedule": "arccos"} == presets["published"]


def test_imagenet_classes() -> None:
    names = imagenet_classes()
    known = {0: "tench", 1: "goldfish", 88: "macaw", 207: "golden retriever", 388: "giant panda",
             985: "daisy", 999: "toilet tissue", 134: "crane bird", 517: "construction crane"}
    assert {i: names[i] for i in known} == known
    assert len(names) == len({name.lower() for name in names}) == 1000
    assert all(name == name.strip() and name.isascii() for name in names)


def test_fetch_converts_once(home, network) -> None:
    lines: list[str] = []
    folder = fetch("halton-maskgit-t-256", lines.append)
    assert network == ["llvictorll/Halton-MaskGIT:ImageNet_256_tiny.pth", published.C2I_TOKENIZER]
    assert lines[0] == "fetching ImageNet_256_tiny.pth of llvictorll/Halton-MaskGIT"
    assert fetch("halton-maskgit-t-256") == folder == cached("halton-maskgit-t-256")
    assert len(network) == 2
    config = json.loads((folder / "config.json").read_text())
    assert config["source"]["file"] == "llvictorll/Halton-MaskGIT:ImageNet_256_tiny.pth"
    assert config["licence"] == "mit"
    assert isinstance(Pipeline.from_pretrained("halton-maskgit-t-256"), Pipeline)


def test_fetch_mends_a_broken_cache(home, network) -> None:
    folder = fetch("halton-maskgit-t-256")
    (folder / "tokenizer" / "tokenizer.safetensors").unlink()
    stale = folder.parent / f".{folder.name}.123.tmp"
    stale.mkdir()
    assert cached("halton-maskgit-t-256") is None
    assert fetch("halton-maskgit-t-256") == folder
    assert cached("halton-maskgit-t-256") == folder
    assert not stale.exists()


def test_fetch_of_a_file_of_any_repository(home, network) -> None:
    folder = fetch("someone/else:mine.pth")
    assert network[0] == "someone/else:mine.pth"
    assert fetch("someone/else:mine.pth") == folder
    assert len(network) == 2


def test_fetch_checks_the_picture_size(home, network) -> None:
    with pytest.raises(ValueError, match="give 256 pixels, not 384"):
        fetch("halton-maskgit-s-384")
    assert cached("halton-maskgit-s-384") is None


def test_fetch_of_a_repository_in_our_format(home, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(tmp_path))
    with pytest.raises(ValueError, match="not in unmask's format"):
        fetch("someone/else")
    (tmp_path / "config.json").write_text('{"format_version": 1}')
    assert fetch("someone/else") == tmp_path


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(("error", "kind", "line"), [
    (lambda: errors.LocalEntryNotFoundError("gone"), ConnectionError, "cannot be reached"),
    (lambda: errors.OfflineModeIsEnabled("off"), ConnectionError, "cannot be reached"),
    (lambda: ConnectionError("refused"), ConnectionError, "cannot be reached"),
    (lambda: errors.RepositoryNotFoundError("no\nrepo", response=RESPONSE), ValueError, "no such repository"),
    (lambda: errors.GatedRepoError("gate", response=RESPONSE), ValueError, "gated"),
    (lambda: errors.RemoteEntryNotFoundError("no", response=RESPONSE), ValueError, "no such file"),
    (lambda: errors.HfHubHTTPError("500 error\nmore", response=RESPONSE), ConnectionError, "answered 500"),
    (lambda: Exception("read timed out\nmore"), ConnectionError, "read timed out: try again"),
    (lambda: OSError(errno.ENOSPC, "No space left on device"), OSError, "the disk is full"),
    (lambda: errors.HFValidationError("bad"), ValueError, "no name a Hub repository can have"),
])
def test_what_goes_wrong_at_the_hub_is_one_line(home, monkeypatch, error, kind, line: str) -> None:
    def fail(*_, **__):
        raise error()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(kind, match=line) as caught:
        fetch("halton-maskgit-t-256")
    assert "\n" not in str(caught.value)
    assert cached("halton-maskgit-t-256") is None
    assert [name for name in leftovers(home) if "lock" not in name] == ["converted"]


def test_no_network_is_seen_at_once(home, monkeypatch) -> None:
    def unresolved(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub.socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        hub.download("llvictorll/Halton-MaskGIT", "nothing-of-this-name.pth")


def test_full_disk_in_the_cache(home, network, monkeypatch) -> None:
    def save(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", save)
        with pytest.raises(OSError, match="disk is full"):
            fetch("halton-maskgit-t-256")
    assert [name for name in leftovers(home) if "lock" not in name] == ["converted"]
    assert fetch("halton-maskgit-t-256").is_dir()


def test_catalogue(home, network) -> None:
    fetch("halton-maskgit-t-256")
    fetch("someone/else:mine.pth")
    rows = {row["name"]: row for row in catalogue()}
    assert rows["halton-maskgit-t-256"]["where"] == "cached"
    assert rows["halton-maskgit-l-384"] == {
        "name": "halton-maskgit-l-384", "where": "published", "condition": "class", "pixels": "384",
        "grid": "24x24", "parameters": "480.0M", "licence": "mit"}
    assert sum("else" in name for name in rows) == 1
    assert len({tuple(row) for row in rows.values()}) == 1


FETCH = """
    import sys, huggingface_hub
    from pathlib import Path
    files = Path(sys.argv[1])
    huggingface_hub.hf_hub_download = lambda repo, file, **_: str(
        files / ("vq.pt" if file.startswith("vq") else "class.pth"))
    from unmask.published import fetch
    from unmask.pipeline import Pipeline
    lines = []
    print(Pipeline.from_pretrained(fetch("halton-maskgit-t-256", lines.append)).model_hash, len(lines))
"""


def test_two_processes_at_once(files, home) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FETCH), str(files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    results = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0].split()[0] == results[1][0].split()[0]
    assert cached("halton-maskgit-t-256") is not None
    assert not [name for name in leftovers(home) if name.endswith((".tmp", ".old"))]


# ------------------------------------------------------------------------------------------------ full size


@pytest.fixture(scope="module")
def full_tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vq") / "vq_ds16_c2i.pt"
    torch.save({"model": build("vq-ds16").state_dict()}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_layout_converts_and_draws(name: str, full_tokenizer, tmp_path) -> None:
    entry = PUBLISHED[name]
    shapes = json.loads((DATA / "state_dict_keys.json").read_text())[entry.file.removesuffix(".pth")]
    weights = {key: torch.randn(shape) * 0.02 for key, shape in shapes.items()}
    weights["head.weight"] = weights["tok_emb.weight"]
    torch.save(training_state(weights), tmp_path / entry.file)
    del weights
    pipe = Pipeline.from_pretrained(convert(tmp_path / entry.file, tmp_path / "out", full_tokenizer))
    assert pipe.transformer.config == TRANSFORMERS[entry.network]()
    output = pipe(class_labels=["daisy"], seed=1, num_inference_steps=2)
    assert output.images[0].size == (entry.image_size, entry.image_size)


PEAK = """
    import re, sys
    from pathlib import Path
    from unmask.published import convert
    def peak():  # of this process alone; getrusage would count what the parent had before exec
        return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    import_only = peak()
    convert(*sys.argv[1:4])
    print(peak() - import_only)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_peak_memory_of_converting(full_tokenizer, tmp_path) -> None:
    """480 M parameters, with Adam's two moments beside them: under 1.3 times the float32 weights."""
    shapes = json.loads((DATA / "state_dict_keys.json").read_text())["ImageNet_384_large"]
    weights = {key: torch.randn(shape) for key, shape in shapes.items()}
    weights["head.weight"] = weights["tok_emb.weight"]
    state = training_state(weights)
    state["optimizer_state_dict"]["state"] = {i: {"exp_avg": tensor.clone(), "exp_avg_sq": tensor.clone()}
                                              for i, tensor in enumerate(weights.values())}
    torch.save(state, tmp_path / "large.pth")
    size = sum(tensor.nbytes for key, tensor in weights.items() if key != "head.weight")
    del weights, state
    command = [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path / "large.pth"),
               str(tmp_path / "out"), str(full_tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(f"peak {int(done.stdout) / size:.3f} of {size / 1e9:.2f} GB")
    assert int(done.stdout) < 1.3 * size
