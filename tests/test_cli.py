"""The command line: what it prints, what it refuses, how it exits; and the whole life of a model through processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from unmask import Pipeline, __version__
from unmask.checkpoints import read_tensors
from unmask.cli import COMMANDS, main
from unmask.data.tokens import TokenDataset
from unmask.pictures import read_made
from unmask.training.commands import choose_recipe, run_train, run_train_tokenizer
from unmask.training.presets import RECIPES, TOKENIZER_RECIPES


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def unmask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., Result]:
    """unmask("generate", "red apple", ...): runs the command in this process, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "argv", [])
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Result:
        sys.argv = ["unmask", *map(str, arguments)]
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Result(code, *capsys.readouterr())

    return run


def refused(result: Result, code: int, *parts: str) -> None:
    """The command failed with one line on stderr, which holds all the parts, and nothing on stdout."""
    assert result.code == code, result
    assert result.out == ""
    assert result.err.startswith("unmask: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


def here() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir())


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture
def text(tiny_pipeline_folder: Callable[[str], Path]) -> Path:
    return tiny_pipeline_folder("text")


@pytest.fixture
def classes(tiny_pipeline_folder: Callable[[str], Path]) -> Path:
    return tiny_pipeline_folder("class")


# --- help ---------------------------------------------------------------------------------------------

LIGHT = """
import resource, sys
sys.argv = ["unmask", *sys.argv[1:]]
import unmask
from unmask.cli import main
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
heavy = {"torch", "numpy", "PIL", "tqdm", "safetensors", "huggingface_hub"} & set(sys.modules)
used = resource.getrusage(resource.RUSAGE_SELF)
print(sorted(heavy), used.ru_utime + used.ru_stime)
"""


@pytest.mark.parametrize("arguments", [("--help",), ("generate", "--help"), ("--version",)])
def test_help_is_light(arguments: tuple[str, ...]) -> None:
    result = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=True)
    *said, last = result.stdout.splitlines()
    heavy, seconds = last.rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 1.0  # about 0.25 where nothing else runs
    assert "unmask" in "\n".join(said)


def test_every_command_has_help(unmask: Callable[..., Result]) -> None:
    listed = unmask("--help").out
    for command in COMMANDS:
        assert command in listed
        code, out, _ = unmask(command, "--help")
        assert code == 0
        assert "None" not in out  # no default that says nothing, no {None}|STR
    assert unmask("--version").out == f"unmask {__version__}\n"
    assert unmask().code == unmask("genrate").code == unmask("generate", "--stepps", "3").code == 2


# --- generate and replay ------------------------------------------------------------------------------


def test_a_picture_from_a_prompt_and_again(unmask: Callable[..., Result], text: Path) -> None:
    result = unmask("generate", "red apple, noto style", "--model", text, "--seed", 5, "--steps", 4,
                    "--guidance-scale", "1:3", "--temperature", "0.9@0.2-0.8", "--negative-prompt", "blue",
                    "--order", "confidence", "--schedule", "square", "--top-k", 9, "--r-temp", 3)
    assert result == (0, "red-apple-noto-style.png\n", "")
    made = read_made(Path("red-apple-noto-style.png"))[0]
    assert (made.prompt, made.negative_prompt) == ("red apple, noto style", "blue")
    assert (made.seed, made.model) == (5, "tiny-text")
    s = made.settings
    assert (s.num_inference_steps, s.guidance_scale, s.order, s.schedule, s.top_k, s.r_temp) == (
        4, (1.0, 3.0), "confidence", "square", 9, 3.0)
    assert str(text.parent) not in Path("red-apple-noto-style.png").read_bytes().decode("latin-1")
    replayed = unmask("replay", "red-apple-noto-style.png", "--model", text)
    assert replayed == (0, "red-apple-noto-style-2.png\n", "")
    assert np.array_equal(pixels("red-apple-noto-style.png"), pixels("red-apple-noto-style-2.png"))
    assert read_made(Path("red-apple-noto-style-2.png")) == [made]


def test_a_grid_and_again(unmask: Callable[..., Result], classes: Path) -> None:
    assert unmask("generate", "--model", classes, "--labels", "cat", 1, "wasp", "--num-images", 2, "--seed", 9,
                  "--out", "grid.png").code == 0
    sheet = Image.open("grid.png")
    assert sheet.size == (3 * 12 + 4, 2 * 8 + 2)
    made = read_made(Path("grid.png"))
    assert [(m.class_label, m.seed) for m in made] == [(2, 9), (2, 10), (1, 11), (1, 12), (1, 13), (1, 14)]
    drawn = Pipeline.from_pretrained(classes)(class_labels=2, seed=10).images[0]
    assert np.array_equal(np.asarray(sheet.crop((14, 0, 26, 8))), np.asarray(drawn))
    assert unmask("replay", "grid.png", "--out", "again.png", "--model", classes).code == 0
    assert np.array_equal(pixels("grid.png"), pixels("again.png"))
    assert read_made(Path("again.png")) == made


def test_a_folder_takes_one_file_each(unmask: Callable[..., Result], text: Path) -> None:
    Path("out").mkdir()
    command = ("generate", "A dog!", "blue car", "--num-images", 2, "--model", text, "--seed", 3, "--out", "out")
    first = unmask(*command)
    names = ["a-dog-3.png", "a-dog-4.png", "blue-car-5.png", "blue-car-6.png"]
    assert first.out.splitlines() == [f"out/{name}" for name in names]
    assert unmask(*command).out.splitlines()[0] == "out/a-dog-3-2.png"  # nothing is overwritten
    before = pixels("out/a-dog-3.png")
    assert unmask(*command, "--steps", 2, "--force").out == first.out
    assert not np.array_equal(before, pixels("out/a-dog-3.png"))
    assert read_made(Path("out/blue-car-6.png"))[0].prompt == "blue car"


def test_json(unmask: Callable[..., Result], classes: Path) -> None:
    result = unmask("generate", "--model", classes, "--labels", "elk", "--seed", 2, "--json", "--out", "x.png")
    report = json.loads(result.out)
    assert result.out.count("\n") == 1
    assert report["files"] == ["x.png"]
    assert report["seconds"] > 0
    assert report["images"][0]["label"] == "elk"
    assert report["images"][0]["settings"]["num_inference_steps"] == 6
    assert len(report["images"][0]["model_hash"]) == 64
    assert json.loads(unmask("replay", "x.png", "--model", classes, "--json").out)["files"] == ["x-2.png"]


def test_no_metadata(unmask: Callable[..., Result], classes: Path) -> None:
    assert unmask("generate", "--model", classes, "--labels", 0, "--no-metadata", "--out", "x.png").code == 0
    assert not Image.open("x.png").text
    assert b"tiny-class" not in Path("x.png").read_bytes()
    refused(unmask("replay", "x.png"), 1, "x.png", "carries no record", "--no-metadata")


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_film(unmask: Callable[..., Result], classes: Path, suffix: str) -> None:
    request = ("generate", "--model", classes, "--labels", 0, 1, "--seed", 2, "--guidance-scale", 2)
    result = unmask(*request, "--out", "x.png", "--film", f"film.{suffix}")
    assert result.out.splitlines() == ["x.png", f"film.{suffix}"]
    assert unmask(*request, "--out", "y.png").code == 0
    assert np.array_equal(pixels("x.png"), pixels("y.png"))  # watching changes nothing
    film = Image.open(f"film.{suffix}")
    if suffix == "gif":
        assert film.n_frames == 6
    else:
        assert film.size == (6 * 14 - 2, 2 * 10 - 2)
        assert np.array_equal(np.asarray(film.crop((5 * 14, 0, 82, 8))), pixels("x.png")[:, :12])  # the last step


def test_options_that_draw_another_picture(unmask: Callable[..., Result], classes: Path) -> None:
    """Every option changes something."""
    def tokens(*options: object) -> bytes:
        assert unmask("generate", "--model", classes, "--labels", 0, "--seed", 2, "--out", "x.png", "--force",
                      *options).code == 0
        return pixels("x.png").tobytes()

    confidence = ("--order", "confidence")
    plain, sure = tokens(), tokens(*confidence)
    drawn = [plain, sure, tokens("--seed", 3), tokens("--steps", 3), tokens("--schedule", "root", "--steps", 3),
             tokens("--guidance-scale", 4), tokens("--temperature", 0.2), tokens("--top-k", 1), tokens("--top-p", 0.3),
             tokens("--roll"), tokens("--stop-after", 1), tokens("--order", "raster"),
             tokens(*confidence, "--r-temp", 0)]
    assert len(set(drawn)) == len(drawn)
    assert plain == tokens()


def test_a_random_seed_is_written_down(unmask: Callable[..., Result], classes: Path) -> None:
    for name in ("a.png", "b.png"):
        unmask("generate", "--model", classes, "--labels", 0, "--out", name)
    a, b = (read_made(Path(name))[0].seed for name in ("a.png", "b.png"))
    assert a != b


def test_warnings_are_one_line(unmask: Callable[..., Result], text: Path) -> None:
    result = unmask("generate", "red apple " * 20, "--model", text, "--out", "x.png")
    assert result.code == 0
    assert result.err.startswith("unmask: warning: the prompt has 40 tokens and 16 are read")
    assert result.err.count("\n") == 1


def test_models(unmask: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    table = unmask("models")
    rows = json.loads(unmask("models", "--json").out)
    assert table.code == 0
    assert len(table.out.splitlines()) == len(rows) + 1
    assert "halton-maskgit-l-384" in {row["name"] for row in rows}


@pytest.mark.parametrize("request_", [("red apple, noto style",), ("--model", "emoji-class", "--labels", "food-fruit")])
def test_embedded_models_draw_and_replay(unmask: Callable[..., Result], request_: tuple[str, ...],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert unmask("generate", *request_, "--seed", 1, "--steps", 4, "--out", "x.png").code == 0
    assert pixels("x.png").std() > 20  # something is drawn
    assert unmask("replay", "x.png").out == "x-2.png\n"
    assert np.array_equal(pixels("x.png"), pixels("x-2.png"))


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "parts"), [
    (("--order", "halto"), ["unknown order 'halto': did you mean halton?", "confidence"]),
    (("--schedule", "cosin"), ["unknown schedule 'cosin': did you mean cosine, arccos?"]),
    (("--schedule", "-2"), ["a schedule's power must be a positive number"]),
    (("--steps", 0), ["--steps must be at least 1, got 0"]),
    (("--steps", 25), ["25 steps are more than the 24 tokens"]),
    (("--guidance-scale", "-1"), ["--guidance-scale must be finite and not negative"]),
    (("--guidance-scale", "1:-2"), ["--guidance-scale must be finite and not negative"]),
    (("--guidance-scale", "strong"), ["'strong' is neither a number (3), a ramp (1:4) nor an interval"]),
    (("--guidance-scale", "3@0.8-0.2"), ["interval"]),
    (("--temperature", "nan"), ["temperature must be finite"]),
    (("--top-k", "-1"), ["--top-k must be 0 (off) or more"]), (("--top-p", "1.5"), ["--top-p must lie in"]),
    (("--stop-after", 7), ["--stop-after must lie in"]), (("--seed", "-1"), ["a seed must lie in", "got -1"]),
    (("--num-images", 0), ["--num-images must be at least 1"]),
    (("--roll", "--order", "confidence"), ["roll turns a fixed order"]),
    (("--labels", "cat"), ["this is a text model"]), (("--out", "nowhere/x.png"), ["nowhere: no such folder"]),
    (("--out", "folder"), ["folder: no such folder", ".png"]), (("--out", "x.jpg"), ["ends in .png"]),
    (("--film", "x.mp4"), ["ends in .gif or .png"]), (("--film", "nowhere/x.gif"), ["nowhere: no such folder"]),
    (("--out", "x.png", "--film", "./x.png"), ["--out and --film are both"])])
def test_bad_requests(unmask: Callable[..., Result], text: Path, options: tuple, parts: list[str]) -> None:
    refused(unmask("generate", "red apple", "--model", text, *options), 2, *parts)
    assert here() == []


@pytest.mark.parametrize(("prompts", "part"), [
    ((), "nothing to draw: give a prompt"), (("",), "the prompt is empty"), ((" \t",), "the prompt is empty"),
    (("red apple", ""), "the prompt is empty"), (("a" * 10_000,), "the prompt has 10,000 characters"),
    (("щ",), "no word of the prompt")])
def test_bad_prompts(unmask: Callable[..., Result], text: Path, prompts: tuple, part: str) -> None:
    refused(unmask("generate", *prompts, "--model", text), 2, part)
    assert here() == []


@pytest.mark.parametrize(("labels", "parts"), [
    (("act",), ["unknown class 'act': did you mean", "cat"]), ((5,), ["class label 5 is out of range", "0 ... 4"]),
    (("cat", "-1"), ["class label -1 is out of range"])])
def test_bad_labels(unmask: Callable[..., Result], classes: Path, labels: tuple, parts: list[str]) -> None:
    refused(unmask("generate", "--labels", *labels, "--model", classes), 2, *parts)
    refused(unmask("generate", "a cat", "--model", classes), 2, "this model draws from class labels: give --labels")
    assert here() == []


@pytest.mark.parametrize(("name", "part"), [("emojy", "unknown model 'emojy': did you mean emoji, emoji-class?"),
                                            ("./runs/model", "unknown model './runs/model'"),
                                            ("halton-maskgit-l-38", "did you mean halton-maskgit-l-384")])
def test_unknown_models(unmask: Callable[..., Result], name: str, part: str) -> None:
    refused(unmask("generate", "red apple", "--model", name), 2, part)
    assert here() == []


def test_nothing_is_overwritten_unasked(unmask: Callable[..., Result], classes: Path) -> None:
    request = ("generate", "--labels", 0, "--model", classes)
    Path("x.png").write_text("mine")
    Path("film.gif").write_text("mine")
    Path("folder.png").mkdir()
    refused(unmask(*request, "--out", "x.png"), 2, "x.png exists", "--force to overwrite")
    refused(unmask(*request, "--out", "y.png", "--film", "film.gif"), 2, "film.gif exists")
    refused(unmask(*request, "--out", "y.png", "--film", "folder.png", "--force"), 2, "folder.png exists")
    assert here() == ["film.gif", "folder.png", "x.png"]
    assert Path("x.png").read_text() == Path("film.gif").read_text() == "mine"
    assert unmask(*request, "--out", "x.png", "--force").code == 0
    assert Image.open("x.png").size == (12, 8)
    assert [unmask(*request).out for _ in range(2)] == ["0.png\n", "0-2.png\n"]  # avoids what is there
    Path("file").touch()
    refused(unmask(*request, "--out", "file/x.png"), 2, "file: no such folder")


def test_a_folder_that_cannot_be_written(unmask: Callable[..., Result], classes: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    Path("locked").mkdir(mode=0o555)
    if os.geteuid() == 0:  # root writes everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).stat().st_mode & 0o222 != 0)
    for out in ("locked", "locked/x.png"):
        refused(unmask("generate", "--labels", 0, "--model", classes, "--out", out), 2, "locked: cannot be written to")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v is not None}))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_damaged_models(unmask: Callable[..., Result], classes: Path) -> None:
    def damaged(damage: Callable[[Path], object], *parts: str) -> None:
        model = Path(shutil.copytree(classes, "model"))
        damage(model)
        refused(unmask("generate", "--labels", 0, "--model", model, "--out", "x.png"), 1, *parts)
        shutil.rmtree(model)
        assert here() == []

    damaged(lambda m: flip(m / "transformer.safetensors", -7), "transformer.safetensors: damaged", "sha256")
    damaged(lambda m: flip(m / "tokenizer" / "tokenizer.safetensors", 9), "tokenizer.safetensors: damaged")
    damaged(lambda m: (m / "transformer.safetensors").unlink(), "transformer.safetensors: no such weight file")
    damaged(lambda m: edit(m / "config.json", transformer=None), "config.json: the field 'transformer' is missing")
    damaged(lambda m: edit(m / "config.json", format_version=2), "config.json: written by a newer unmask", "upgrade")
    damaged(lambda m: edit(m / "config.json", sampler={"order": "zigzag"}), "unknown order 'zigzag'")
    damaged(lambda m: (m / "config.json").write_text("{"), "config.json: not valid JSON")
    damaged(lambda m: shutil.rmtree(m / "tokenizer"), "no such model folder")


def test_what_cannot_be_replayed(unmask: Callable[..., Result], classes: Path, text: Path) -> None:
    refused(unmask("replay", "none.png"), 1, "none.png: no such file")
    Path("text.png").write_text("words")
    refused(unmask("replay", "text.png"), 1, "text.png: not a readable picture")
    assert unmask("generate", "--labels", 0, "--model", classes, "--out", "x.png").code == 0
    refused(unmask("replay", "x.png"), 2, "unknown model 'tiny-class'")
    refused(unmask("replay", "x.png", "--model", text), 1, "was drawn by another model 'tiny-class'")
    refused(unmask("replay", "x.png", "--model", classes, "--out", "x.png"), 2, "x.png exists")
    assert here() == ["text.png", "x.png"]


# --- from pictures to pictures ------------------------------------------------------------------------

TOKENIZER = {"image_size": 16, "tokenizer": {
    "codebook_size": 32, "code_dim": 4, "channels": 8, "multipliers": [1, 1, 2], "encoder_blocks": [0, 0, 1],
    "decoder_blocks": [0, 0, 1], "z_channels": 8}, "objective": {"unquantised_steps": 10, "perceptual": 0},
    "run": {"steps": 200, "batch_size": 8, "checkpoint_every": 5, "sample_every": 150, "log_every": 10, "threads": 1}}
TRANSFORMER = {"transformer": {"width": 32, "depth": 2, "heads": 2, "mlp": 64}, "sampler": {"num_inference_steps": 4},
               "run": {"steps": 200, "batch_size": 8, "warmup_steps": 5, "checkpoint_every": 5, "sample_every": 150,
                       "log_every": 10, "threads": 1}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 small pictures in two class folders, with captions."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    generator = np.random.default_rng(0)
    for name, colour in (("apples", (200, 30, 30)), ("leaves", (30, 160, 40))):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            image = np.full((20, 20, 3), 255, np.uint8)
            top, left = generator.integers(0, 8, 2)
            image[top:top + 12, left:left + 12] = np.clip(np.array(colour) + generator.integers(-30, 30, 3), 0, 255)
            Image.fromarray(image).save(folder / name / f"{i:02}.png")
            (folder / name / f"{i:02}.txt").write_text({"apples": "a red apple", "leaves": "a green leaf"}[name])
    return folder


def process(*arguments: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "unmask.cli", *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def done(*arguments: object) -> str:
    """Runs a command to its end in a process of its own; its stdout."""
    running = process(*arguments)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert "Traceback" not in err
    return out


def step_of(state: Path) -> int:
    return int(read_tensors(state, prefix="none")[1]["step"]) if state.exists() else 0


def killed(number: int, state: Path, *arguments: object) -> tuple[int, str]:
    """Starts a training command and sends the signal once it has saved a state further on; (exit code, stderr)."""
    before = step_of(state)
    running = process(*arguments)
    while step_of(state) <= before:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.002)
    running.send_signal(number)
    err = running.communicate(timeout=300)[1]
    assert not (state.parent / "model").exists(), "the run was over before it was killed"
    return running.returncode, err


@pytest.mark.slow
def test_the_whole_life_of_a_model(pictures: Path, tmp_path: Path) -> None:
    """Train a tokenizer, tokenize, train a class and a text model, draw, draw again; with each training killed in the
    middle and started again by the same command, ending with the weights of one that was not."""
    for name, content in (("tok.json", TOKENIZER), ("class.json", {**TRANSFORMER, "label_field": "class"}),
                          ("text.json", TRANSFORMER)):
        (tmp_path / name).write_text(json.dumps(content))

    tokenizer = ("train-tokenizer", "--data", pictures, "--recipe", tmp_path / "tok.json", "--out", tmp_path / "tok")
    code, _ = killed(signal.SIGKILL, tmp_path / "tok" / "state.safetensors", *tokenizer)
    assert code == -signal.SIGKILL
    assert done(*tokenizer) == f"{tmp_path / 'tok' / 'model'}\n"
    recipe = choose_recipe(TOKENIZER_RECIPES, "emoji", tmp_path / "tok" / "recipe.json", {})
    whole = run_train_tokenizer(pictures, tmp_path / "tok-whole", recipe, quiet=True)
    same_weights(tmp_path / "tok" / "model", whole)

    out = done("tokenize", "--data", pictures, "--tokenizer", tmp_path / "tok" / "model", "--out", tmp_path / "tokens",
               "--flip")
    assert out == f"{tmp_path / 'tokens'}\n"
    data = TokenDataset(tmp_path / "tokens")
    assert (len(data), data.variants, data.grid) == (40, 2, (4, 4))
    assert len(data.select(split="held-concept")) == 2
    assert data.records[21]["caption"] == "a green leaf"

    common = ("--data", tmp_path / "tokens", "--tokenizer", tmp_path / "tok" / "model")
    classes = ("train", *common, "--preset", "emoji-class", "--recipe", tmp_path / "class.json",
               "--out", tmp_path / "c")
    state = tmp_path / "c" / "state.safetensors"
    assert killed(signal.SIGKILL, state, *classes)[0] == -signal.SIGKILL
    code, err = killed(signal.SIGTERM, state, *classes)
    assert code == 143
    assert "going on from step" in err
    assert "the same command goes on from there" in err
    code, err = killed(signal.SIGINT, state, *classes)
    assert code == 130
    assert err.endswith("unmask: interrupted\n")
    done(*classes)
    recipe = choose_recipe(RECIPES, "emoji-class", tmp_path / "c" / "recipe.json", {})
    whole = run_train(tmp_path / "tokens", tmp_path / "tok" / "model", tmp_path / "c-whole", recipe, quiet=True)
    same_weights(tmp_path / "c" / "model", whole)
    steps, losses = zip(*[(m["step"], m.get("loss")) for m in log(tmp_path / "c")], strict=True)
    assert list(steps) == sorted(steps)
    assert losses == tuple(m.get("loss") for m in log(tmp_path / "c-whole"))
    assert losses[-2] < losses[0]

    done("train", *common, "--recipe", tmp_path / "text.json", "--steps", 20, "--out", tmp_path / "t", "--quiet")

    picture = tmp_path / "leaf.png"
    out = done("generate", "--labels", "leaves", "--model", tmp_path / "c" / "model", "--out", picture)
    assert out == f"{picture}\n"
    assert Image.open(picture).size == (16, 16)
    done("replay", picture, "--model", tmp_path / "c" / "model", "--out", tmp_path / "leaf2.png")
    assert np.array_equal(pixels(picture), pixels(tmp_path / "leaf2.png"))
    done("generate", "a red apple", "--model", tmp_path / "t" / "model", "--out", tmp_path / "apple.png")
    assert read_made(tmp_path / "apple.png")[0].prompt == "a red apple"


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_weights(a: Path, b: Path) -> None:
    names = [path.name for path in a.glob("*.safetensors")]
    assert len(names) == 1
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer (tok), its tokens (tokens), and recipe files."""
    folder = tmp_path_factory.mktemp("trained")
    for name, content in (("tok.json", TOKENIZER), ("class.json", {**TRANSFORMER, "label_field": "class"})):
        (folder / name).write_text(json.dumps(content))
    threads = torch.get_num_threads()
    recipe = choose_recipe(TOKENIZER_RECIPES, "emoji", folder / "tok.json", {"run": {"steps": 12}})
    model = run_train_tokenizer(pictures, folder / "run", recipe, quiet=True)
    torch.set_num_threads(threads)
    model.rename(folder / "tok")
    from unmask.training.commands import run_tokenize

    run_tokenize(pictures, folder / "tok", folder / "tokens", flip=False, quiet=True)
    return folder


def test_training_refuses(unmask: Callable[..., Result], trained: Path, pictures: Path) -> None:
    train = ("train", "--data", trained / "tokens", "--tokenizer", trained / "tok", "--out", "run")
    refused(unmask(*train, "--preset", "emojis"), 2, "unknown preset 'emojis': did you mean emoji")
    refused(unmask(*train, "--steps", 0), 2, "steps must be at least 1")
    refused(unmask(*train, "--preset", "emoji-class"), 2, "'apples/00' has no field 'subgroup', only key, class, label")
    refused(unmask(*train, "--recipe", "none.json"), 1, "none.json: no such file")
    Path("bad.json").write_text('{"run": {"setps": 3}}')
    refused(unmask(*train, "--recipe", "bad.json"), 2, "bad.json: the field 'run.setps' is unknown: did you mean steps")
    Path("bad.json").unlink()
    refused(unmask("train", "--data", "none", "--tokenizer", trained / "tok", "--out", "run"), 1,
            "none: no such token folder")
    refused(unmask("train", "--data", trained / "tokens", "--tokenizer", "none", "--out", "run"), 1,
            "none: no such model folder")
    other = Path(shutil.copytree(trained / "tok", "other"))
    (other / "tokenizer.safetensors").unlink()
    refused(unmask("train", "--data", trained / "tokens", "--tokenizer", "other", "--out", "run"), 1, "no such weight")
    shutil.rmtree("other")
    tokenizer = ("train-tokenizer", "--out", "run", "--recipe", trained / "tok.json")
    refused(unmask(*tokenizer, "--data", "none"), 1, "none: no such image archive or folder")
    refused(unmask(*tokenizer, "--data", pictures, "--preset", "x"), 2, "unknown preset 'x'")
    refused(unmask(*tokenizer, "--data", pictures, "--perceptual", "-1"), 2, "perceptual")
    assert here() == []


def test_damaged_data(unmask: Callable[..., Result], trained: Path) -> None:
    shutil.copytree(trained / "tokens", "tokens")
    train = ("train", "--data", "tokens", "--tokenizer", trained / "tok", "--out", "run", "--preset", "emoji-class",
             "--recipe", trained / "class.json")
    flip(Path("tokens/tokens-00000.bin"), 40)
    refused(unmask(*train), 1, "tokens-00000.bin: missing or damaged", "unmask tokenize")
    shutil.copy(trained / "tokens" / "tokens-00000.bin", "tokens")
    edit(Path("tokens/manifest.json"), tokenizer_sha256="0" * 64)
    refused(unmask(*train), 2, "made with another tokenizer")
    edit(Path("tokens/manifest.json"), format_version=9)
    refused(unmask(*train), 1, "manifest.json: written by a newer unmask")
    shutil.rmtree("tokens")
    Path("cut.tar").write_bytes(b"\0" * 700)
    tokenize = ("tokenize", "--tokenizer", trained / "tok", "--out", "tokens")
    refused(unmask(*tokenize, "--data", "cut.tar"), 1, "cut.tar")
    Path("half.tar.gz").write_bytes(b"\x1f\x8b\x08\0half")
    refused(unmask(*tokenize, "--data", "half.tar.gz"), 1, "half.tar.gz: is truncated or damaged")
    assert here() == ["cut.tar", "half.tar.gz"]


def test_resuming_with_other_settings(unmask: Callable[..., Result], trained: Path) -> None:
    train = ("train", "--data", trained / "tokens", "--tokenizer", trained / "tok", "--out", "run", "--preset",
             "emoji-class", "--recipe", trained / "class.json", "--steps", 6, "--threads", 1)
    result = unmask(*train)
    assert result.out == "run/model\n"
    assert "pictures" in result.err
    refused(unmask(*train, "--quiet", "--seed", 3), 2, "seed = 0, this command asks for 3")
    assert unmask(*train, "--quiet") == (0, "run/model\n", "going on from step 6 of run\n")
    assert json.loads(Path("run/recipe.json").read_text())["run"]["seed"] == 0


def test_tokenizing_replaces_only_when_asked(unmask: Callable[..., Result], trained: Path, pictures: Path) -> None:
    tokenize = ("tokenize", "--data", pictures, "--tokenizer", trained / "tok", "--out")
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    refused(unmask(*tokenize, "mine"), 2, "mine exists", "--force")
    refused(unmask(*tokenize, "mine", "--force"), 2, "mine: exists and holds no manifest.json")
    assert Path("mine/letter.txt").read_text() == "dear"
    assert unmask(*tokenize, "new/deep") == (0, "new/deep\n", "")
    before = Path("new/deep/tokens-00000.bin").read_bytes()
    assert unmask(*tokenize, "new/deep", "--force", "--flip").code == 0
    assert TokenDataset("new/deep").variants == 2
    assert before == (trained / "tokens" / "tokens-00000.bin").read_bytes()
    assert sorted(p.name for p in Path("new").iterdir()) == ["deep"]
