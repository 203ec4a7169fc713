"""Studies: what they compute equals what was computed by hand, and what they write can be opened."""

import json
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import build_tiny
from unmask.checkpoints import read_json, write_json
from unmask.cli import main
from unmask.conversion import SAMPLER_PRESETS
from unmask.errors import UsageError
from unmask.evaluation.evaluate import evaluate, open_reference
from unmask.evaluation.features import Features
from unmask.evaluation.studies_dependence import dependence_study, shared_information
from unmask.evaluation.studies_orders import (
    distance_curve,
    distance_map,
    l2_star_discrepancy,
    order_steps,
    orders_study,
    step_measures,
    token_distance_study,
)
from unmask.evaluation.studies_paper import paper, prompts_study, radar, table_study
from unmask.evaluation.studies_sampling import Bench, compare_study, intermediate_study, percent, stops
from unmask.orders import halton_order
from unmask.pictures import read_made
from unmask.pipeline import Pipeline
from unmask.sampling import Settings
from unmask.schedules import cumulative_counts

pytest.importorskip("matplotlib")


def square(folder: Path, out: Path, condition: str) -> Path:
    """A tiny pipeline folder that draws 8x8 pixels."""
    pipe = Pipeline.from_pretrained(folder)
    words = pipe.text_encoder
    changes = {"text_dim": words.dim, "text_length": words.max_length} if words else {}
    Pipeline(build_tiny(condition, grid=(4, 4), **changes), pipe.tokenizer, words, pipe.class_names,
             Settings(num_inference_steps=4), config=pipe.config).save_pretrained(out)
    return out


@pytest.fixture
def pictures(tmp_path):
    """Six smooth pictures of 8x8 pixels in two classes."""
    generator = np.random.default_rng(0)
    for i in range(6):
        folder = tmp_path / "pictures" / ("ant", "cat")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        small.resize((8, 8), Image.Resampling.BILINEAR).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def written(out, name, *pictures):
    """The JSON of a study, after a look at its page and pictures."""
    page = (out / f"{name}.md").read_text(encoding="utf-8")
    for picture in pictures:
        assert f"({picture})" in page
        Image.open(out / picture).load()
    data = read_json(out / f"{name}.json")
    assert data["study"] == name
    return data


# --- the paper ---------------------------------------------------------------------------------------


def test_table_3_is_whole():
    rows = paper()["table3"]["rows"]
    assert len(rows) == 17
    assert [row["type"] for row in rows] == ["GAN"] * 3 + ["Diffusion"] * 4 + ["AR"] * 4 + ["MIM"] * 6
    # sums of the printed columns, added up by hand
    sums = {name: round(sum(row[name] or 0 for row in rows), 2) for name in
            ("fid", "inception_score", "precision", "recall")}
    assert sums == {"fid": 89.18, "inception_score": 3375.5, "precision": 8.07, "recall": 5.39}
    assert len(paper()["prompts"]["texts"]) == 18
    assert len(paper()["failures"]["texts"]) == 3


def test_table_4s_share_column_is_the_presets():
    """2, 8, 16, 28, 43, 61, 82, 100 % of the tokens from the preset that the paper used."""
    preset = SAMPLER_PRESETS["paper"]
    known = cumulative_counts(preset["schedule"], 32 * 32, preset["num_inference_steps"])
    rows = paper()["table4"]["rows"]
    shown = stops(32, 4)
    assert [number for number, _ in shown] == [row["step"] for row in rows]
    shares = [int(percent(known[done - 1] / 1024)) for _, done in shown]
    assert shares == [row["percent"] for row in rows] == [2, 8, 16, 28, 43, 61, 82, 100]
    assert stops(4, 1) == [(1, 2), (2, 3), (4, 4)], "each evaluation once"


def test_radar_by_hand():
    """Best FID 2.18 (LlamaGen), IS 323.7 (RQ-Transformer), precision 0.89 (BigGAN), recall 0.63 (ADM)."""
    rows = paper()["table3"]["rows"]
    found = {row["model"]: value for row, value in zip(rows, radar(rows), strict=True)}
    assert found["Halton MaskGIT"] == pytest.approx(
        {"fid": 0.582888, "inception_score": 0.863454, "precision": 0.910112, "recall": 0.952381}, abs=1e-6)
    assert found["MaskGIT"] == pytest.approx(
        {"fid": 0.352751, "inception_score": 0.562558, "precision": 0.898876, "recall": 0.809524}, abs=1e-6)
    assert found["BigGAN"]["precision"] == found["LlamaGen-3B"]["fid"] == found["ADM"]["recall"] == 1
    assert found["RQ-Transformer"] == {"fid": pytest.approx(2.18 / 3.8), "inception_score": 1, "precision": None,
                                       "recall": None}
    assert found["FSQ"]["inception_score"] is None


def result(tmp_path, extractor="inception-v3@fid", fid=1.09):
    points = [{"settings": {"num_inference_steps": steps}, "figures": {
        "fid": fid, "inception_score": 300.0, "precision": 0.8, "recall": 0.5}} for steps in (8, 16)]
    write_json(tmp_path / "result.json", {
        "model": "mine", "extractor": {"name": extractor}, "images": 50000, "reference": {"name": "imagenet.npz"},
        "parameters": 5_000_000, "points": points})
    return tmp_path / "result.json"


def test_table_takes_the_users_rows(tmp_path):
    table_study(tmp_path / "out", result(tmp_path))
    data = written(tmp_path / "out", "table", "table.png")
    assert len(data["rows"]) == 19
    assert [row["model"] for row in data["rows"][17:]] == ["mine (steps 8)", "mine (steps 16)"]
    assert data["rows"][17]["radar"]["fid"] == 1, "the best FID now"
    assert data["rows"][10]["radar"]["fid"] == 0.5
    assert "best / FID" in data["formula"]
    assert str(tmp_path) not in json.dumps(data), "no paths"


def test_table_refuses_other_features_and_keeps_what_is_there(tmp_path):
    with pytest.raises(UsageError, match="measured with efficientnet-lite0@128"):
        table_study(tmp_path / "out", result(tmp_path, "efficientnet-lite0@128"))
    assert not (tmp_path / "out").exists()
    table_study(tmp_path / "out")
    with pytest.raises(UsageError, match=r"table\.json exists"):
        table_study(tmp_path / "out")
    table_study(tmp_path / "out", result(tmp_path), force=True)
    assert len(read_json(tmp_path / "out" / "table.json")["rows"]) == 19


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_prompts(tiny_pipeline_folder, tmp_path):
    model = square(tiny_pipeline_folder("text"), tmp_path / "model", "text")
    prompts_study(tmp_path / "out", str(model), seed=5)
    data = written(tmp_path / "out", "prompts", "prompts.png", "prompts-failures.png")
    made = read_made(tmp_path / "out" / "prompts.png")
    assert [m.prompt for m in made] == paper()["prompts"]["texts"]
    assert [m.seed for m in made] == list(range(5, 23))
    assert len(data["failures"]["made"]) == 3
    assert Image.open(tmp_path / "out" / "prompts.png").size == (6 * 8 + 5 * 2, 3 * 8 + 2 * 2)
    with pytest.raises(UsageError, match="class model"):
        prompts_study(tmp_path / "other", str(tiny_pipeline_folder("class")))


# --- orders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 30])
def test_discrepancy_is_scipys(count):
    qmc = pytest.importorskip("scipy.stats.qmc")
    points = np.random.default_rng(0).random((count, 2))
    assert l2_star_discrepancy(points) == pytest.approx(qmc.discrepancy(points, method="L2-star"), rel=1e-9)


def test_step_measures_by_hand():
    """A 2x4 grid: a pair 3 apart; then a single token; then a row of three with gaps 1 and 1."""
    measured = step_measures([torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([4, 5, 6])], (2, 4))
    assert measured["nearest"] == [3, None, 1]
    assert measured["pairs"] == [3, None, pytest.approx(4 / 3)]
    assert len(measured["discrepancy"]) == 3


def test_order_steps_are_the_order():
    steps = order_steps("halton", (4, 6), [2, 7, 15], seed=0)
    assert [len(s) for s in steps] == [2, 7, 15]
    assert torch.equal(torch.cat(steps), halton_order((4, 6)))


def test_orders(tiny_pipeline_folder, tmp_path):
    orders_study(tmp_path / "out", ("halton", "random", "raster", "confidence"), steps=6, draws=2,
                 model=str(tiny_pipeline_folder("class")))
    data = written(tmp_path / "out", "orders", "orders.png", "orders-film.png", "orders-curves.png")
    assert data["grid"] == [4, 6]
    for found in data["maps"].values():
        assert [np.sum(np.array(found) == step) for step in range(1, 7)] == data["reveal_counts"]
    nearest = {name: [v for v in values["nearest"] if v] for name, values in data["measures"].items()}
    assert np.mean(nearest["halton"]) > np.mean(nearest["raster"]), "Halton spreads the tokens of a step"


@pytest.mark.parametrize(("changes", "message"), [
    ({"orders": ("confidence",)}, "give --model"), ({"orders": ("hilbert",)}, "unknown order 'hilbert'"),
    ({"grid": (2, 2)}, "16 steps are more than the 4 tokens"), ({"draws": 0}, "at least 1")])
def test_wrong_orders(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        orders_study(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


# --- token distance ----------------------------------------------------------------------------------


def test_distances_of_codes_are_those_of_all_pairs():
    codes = torch.randn(3, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    cells = [(r, c) for r in range(3) for c in range(4)]
    sums: dict[float, list[float]] = {}
    for i, a in enumerate(cells):
        for b in cells[i + 1 :]:
            key = (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
            sums.setdefault(key, []).extend((codes[:, :, *a] - codes[:, :, *b]).norm(dim=1).tolist())
    distances, means, counts = distance_curve(codes)
    assert distances == pytest.approx([k**0.5 for k in sorted(sums)])
    assert means == pytest.approx([np.mean(sums[k]) for k in sorted(sums)], rel=1e-5)
    assert counts == [len(sums[k]) for k in sorted(sums)]
    found = distance_map(codes, (1, 2))
    assert found[1, 2] == 0
    assert found[0, 3].item() == pytest.approx((codes[:, :, 0, 3] - codes[:, :, 1, 2]).norm(dim=1).mean().item())


def test_token_distance(tiny_pipeline_folder, pictures, tmp_path):
    tokenizer = square(tiny_pipeline_folder("class"), tmp_path / "model", "class") / "tokenizer"
    token_distance_study(tmp_path / "out", pictures, tokenizer, images=5, token=(1, 2))
    data = written(tmp_path / "out", "token-distance", "token-distance.png")
    assert data["images"] == 5
    assert data["grid"] == [4, 4]
    assert data["map"][1][2] == 0
    assert sum(data["curve"]["pairs"]) == 5 * 16 * 15 / 2
    with pytest.raises(UsageError, match="outside the grid of 4x4"):
        token_distance_study(tmp_path / "other", pictures, tokenizer, token=(4, 0))


# --- intermediate, compare ---------------------------------------------------------------------------


class SmallExtractor:
    """Six features of a picture, by a fixed projection."""

    name, hash, dim = "small@8", "0" * 12, 6

    def __call__(self, images):
        generator = torch.Generator().manual_seed(0)
        return Features(images.flatten(1).float() @ torch.randn(192, 6, generator=generator) / 2550, None)


@pytest.fixture
def bench(tiny_pipeline_folder, pictures, tmp_path):
    pipe = Pipeline.from_pretrained(square(tiny_pipeline_folder("class"), tmp_path / "bench", "class"))
    pipe.class_names = ["ant", "cat", "bee", "dog", "elk"]
    reference = open_reference(pictures, pipe, SmallExtractor())
    return Bench(pipe, SmallExtractor(), reference, {"images": 6, "seed": 2, "batch_size": 4, "allow_few": True})


def test_intermediate(bench, tmp_path):
    intermediate_study(tmp_path / "out", bench, steps=8, schedule="square", every=2)
    data = written(tmp_path / "out", "intermediate", "intermediate.png", "intermediate-curves.png")
    assert [row["step"] for row in data["rows"]] == [2, 4, 6, 8]
    assert [row["tokens"] for row in data["rows"]] == [3, 6, 12, 16], "floor(16 ((i + 1) / 8) ** 2), at least i + 1"
    assert [row["evaluations"] for row in data["rows"]] == [3, 5, 7, 8]
    settings = Settings(num_inference_steps=8, schedule="square")
    whole = evaluate(bench.pipe, bench.extractor, bench.reference, [settings], tmp_path / "whole", **bench.options)
    assert data["rows"][-1]["figures"] == whole["points"][0]["figures"], "the last row is the whole sampler"


def test_compare(bench, tmp_path):
    compare_study(tmp_path / "out", bench, ("halton", "raster"), steps=3)
    data = written(tmp_path / "out", "compare", "compare.png")
    assert [row["settings"]["order"] for row in data["report"]["points"]] == ["halton", "raster"]
    assert data["report"]["points"][0]["figures"] != data["report"]["points"][1]["figures"]
    for changes, message in (({"orders": ("halton", "halton")}, "twice"), ({"steps": 17}, "17 steps are more"),
                             ({"schedule": "square-ish"}, "unknown schedule")):
        with pytest.raises(UsageError, match=message):
            compare_study(tmp_path / "other", bench, **changes)


# --- dependence --------------------------------------------------------------------------------------


class Twins:
    """Three tokens of two codes: 0 and 1 are equal, 2 is a coin of its own."""

    def encode(self, tokens, prepared):
        return tokens

    def logits(self, hidden, prepared, positions=None):
        logits = torch.zeros(*positions.shape, 2)
        for row, (tokens, places) in enumerate(zip(hidden, positions, strict=True)):
            for column, place in enumerate(places.tolist()):
                other = int(tokens[1 - place]) if place < 2 else 2
                if other < 2:
                    logits[row, column, other] = 60.0
        return logits


def test_shared_information_by_hand():
    """Twins share log 2 nats, strangers nothing; once one twin is known, the other has nothing left to share."""
    tokens, everything = torch.tensor([2, 2, 2]), torch.tensor([0, 1, 2])
    found = shared_information(Twins(), lambda images, guided: None, tokens, everything, everything, draws=8)
    assert found.numpy() == pytest.approx(np.log(2) * np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]]), abs=1e-6)
    known = shared_information(Twins(), lambda images, guided: None, torch.tensor([1, 2, 2]), everything[1:],
                               everything[1:], draws=8)
    assert known.numpy() == pytest.approx(np.zeros((2, 2)), abs=1e-6)


@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_dependence(tiny_pipeline_folder, tmp_path, condition):
    dependence_study(tmp_path / "out", str(tiny_pipeline_folder(condition)), ("halton", "confidence"), steps=4,
                     images=2, probes=2, draws=3, quiet=True)
    data = written(tmp_path / "out", "dependence", "dependence.png")
    assert [len(found["steps"]) for found in data["ignored"].values()] == [4, 4]
    assert all(found["total"] > 0 for found in data["ignored"].values())
    assert data["falls"][0]["share"] == 0
    assert sum(row["pairs"] for row in data["falls"][0]["curve"]) == 2 * 2 * 23, "every probe with every other token"


def test_one_token_a_step_ignores_nothing(tiny_pipeline_folder, tmp_path):
    dependence_study(tmp_path / "out", str(tiny_pipeline_folder("class")), ("raster",), steps=24, images=1, probes=1,
                     draws=2, quiet=True)
    assert read_json(tmp_path / "out" / "dependence.json")["ignored"]["raster"]["total"] == 0


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def study(monkeypatch, capsys):
    """study("table", ...): runs the command in this process -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["unmask", "study", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        return code, *capsys.readouterr()

    return run


def test_commands(study, tiny_pipeline_folder, pictures, tmp_path):
    code, out, _ = study("table", "--out", tmp_path / "out", "--result", result(tmp_path))
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert len(written(tmp_path / "out", "table", "table.png")["rows"]) == 19
    model = square(tiny_pipeline_folder("class"), tmp_path / "model", "class")
    common = ("--model", model, "--reference", pictures, "--images", 3, "--allow-few", "--extractor",
              "efficientnet-lite0@32", "--label-field", "label")
    code, _, error = study("compare", "--out", tmp_path / "out", *common, "--orders", "raster", "random")
    assert (code, error) == (0, "")
    assert written(tmp_path / "out", "compare", "compare.png")["orders"] == ["raster", "random"]
    code, out, error = study("intermediate", "--out", tmp_path / "out", *common, "--every", 9)
    assert (code, out) == (2, "")
    assert error == "unmask: --every must lie in 1 ... 4, the number of steps, got 9\n"


def test_wrong_commands(study, tmp_path):
    for arguments, message in ((("orders", "--orders", "hilbert"), "unknown order 'hilbert'"),
                               (("dependence", "--draws", 1), "draws must be at least 2"),
                               (("table", "--result", tmp_path / "none.json"), "no such file")):
        code, out, error = study(*arguments, "--out", tmp_path / "out")
        assert code in (1, 2)
        assert out == ""
        assert message in error
        assert error.count("\n") == 1
