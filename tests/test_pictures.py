"""Pictures as files: grids, films and the record of how each was made."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unmask.pictures import KEY, Made, grid, parameters_text, read_made, save_film, save_png, to_pil
from unmask.sampling import Interval, Settings

MADE = Made("emoji", "0123456789abcdef", 7, Settings(num_inference_steps=12, guidance_scale=Interval(3.0, 0.2, 0.8)),
            "red apple, “noto” style", "blue")


def plain(colour: str, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_to_pil() -> None:
    images = torch.stack([torch.full((3, 2, 5), v) for v in (-1.0, 0.0, 1.0, 7.0)])
    pictures = to_pil(images)
    assert [p.size for p in pictures] == [(5, 2)] * 4
    assert [p.getpixel((0, 0)) for p in pictures] == [(0, 0, 0), (128, 128, 128), (255, 255, 255), (255, 255, 255)]


def test_grid() -> None:
    sheet = grid([plain(c) for c in ("red", "lime", "blue", "black", "gray")], gap=1)
    assert sheet.size == (3 * 7 - 1, 2 * 5 - 1)
    assert [sheet.getpixel(xy) for xy in ((0, 0), (7, 0), (14, 0), (0, 5), (6, 0), (19, 8))] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255), (255, 255, 255)]
    assert grid([plain("red")] * 3, columns=3, gap=0).size == (18, 4)
    assert np.array_equal(np.asarray(grid([plain("red")])), np.asarray(plain("red")))


def test_record_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    save_png(plain("red"), path, [MADE])
    assert read_made(path) == [MADE]
    other = dataclasses.replace(MADE, seed=8, prompt=None, negative_prompt=None, class_label=3, label="dog")
    save_png(plain("red"), path, [MADE, other])
    assert read_made(path) == [MADE, other]
    text = Image.open(path).text
    assert text["parameters"] == parameters_text(MADE)
    assert isinstance(json.loads(text[KEY]), list)
    assert "prompt" not in json.loads(text[KEY])[1]


def test_parameters_text() -> None:
    assert parameters_text(MADE) == (
        "red apple, “noto” style\nNegative prompt: blue\n"
        "Steps: 12, Sampler: halton, Schedule type: arccos, CFG scale: Interval(value=3.0, begin=0.2, end=0.8), "
        f"Seed: 7, Model hash: 0123456789, Model: emoji, Version: unmask {MADE.version}")
    bare = Made("m", "", 0, Settings(), class_label=4)
    assert parameters_text(bare).startswith("class 4\nSteps: 16,")
    assert parameters_text(dataclasses.replace(bare, label="elk")).startswith("elk\n")


def test_pictures_without_a_record(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    save_png(plain("red"), path)
    assert not Image.open(path).text
    with pytest.raises(ValueError, match="carries no record"):
        read_made(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_made(tmp_path / "none.png")
    path.write_text("not a picture")
    with pytest.raises(ValueError, match="not a readable picture"):
        read_made(path)
    data = io.BytesIO()
    plain("red").save(data, "PNG")
    path.write_bytes(data.getvalue()[:-30])
    with pytest.raises(ValueError, match=r"not a readable picture|carries no record"):
        read_made(path)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "the record of how it was made is damaged"), ("[]", "must be Made"), ("3", "must be Made"),
    ("{}", "'model' is missing"),
    (json.dumps({**MADE.to_json(), "seed": "seven"}), "field 'seed' must be int"),
    (json.dumps({**MADE.to_json(), "settings": {"steps": 3}}), "field 'settings.steps' is unknown"),
    (json.dumps({**MADE.to_json(), "settings": {"order": "zigzag"}}), "unknown order 'zigzag'"),
    (json.dumps({**MADE.to_json(), "prompt": ["a"]}), "field 'prompt' must be")])
def test_damaged_records(tmp_path: Path, text: str, message: str) -> None:
    info = PngInfo()
    info.add_itxt(KEY, text)
    plain("red").save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(ValueError, match=message):
        read_made(tmp_path / "x.png")


def test_film(tmp_path: Path) -> None:
    frames = [[plain("red"), plain("blue")], [plain("lime"), plain("black")], [plain("white"), plain("gray")]]
    save_film(frames, tmp_path / "f.gif")
    with Image.open(tmp_path / "f.gif") as film:
        assert (film.n_frames, film.size) == (3, (14, 4))
        assert film.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    save_film(frames, tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as strip:
        assert strip.size == (3 * 8 - 2, 2 * 6 - 2)
        assert [strip.getpixel(xy) for xy in ((0, 0), (8, 0), (16, 0), (0, 6), (8, 6))] == [
            (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 255), (0, 0, 0)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.gif", "f.png"]


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    save_png(plain("red"), path)
    before = path.read_bytes()

    def half(self: Image.Image, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_png(plain("blue"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
