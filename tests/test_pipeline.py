"""The pipeline: from a prompt or a class to a picture, always the same one for the same seed."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unmask
from unmask import Pipeline
from unmask.errors import UnknownName, UsageError
from unmask.models.transformer import MaskedTransformer
from unmask.pipeline import EMBEDDED, embedded_folder, load_model, resolve
from unmask.sampling import Ramp, Settings, Step
from unmask.text import TextEncoder
from unmask.tokenizers.vqgan import VQGAN

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def text(tiny_pipeline_folder: Folder) -> Pipeline:
    return Pipeline.from_pretrained(tiny_pipeline_folder("text"))


@pytest.fixture(scope="module")
def classes(tiny_pipeline_folder: Folder) -> Pipeline:
    return Pipeline.from_pretrained(tiny_pipeline_folder("class"))


@pytest.fixture
def copy(tiny_pipeline_folder: Folder, tmp_path: Path) -> Path:
    """A class pipeline's folder that may be changed."""
    return Path(shutil.copytree(tiny_pipeline_folder("class"), tmp_path / "model"))


PROMPTS = ["red apple", "a dog", "blue car in the rain"]


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0}, {"order": "confidence", "guidance_scale": 2.0},
                                      {"order": "random", "roll": True, "temperature": Ramp(1.2, 0.6)}])
def test_the_same_seed_gives_the_same_picture(text: Pipeline, settings: dict) -> None:
    together = text(PROMPTS, seed=[5, 6, 7], output_type="pt", **settings)
    for i in (0, 1, 2):
        alone = text(PROMPTS[i], seed=5 + i, output_type="pt", **settings)
        assert torch.equal(alone.tokens[0], together.tokens[i])
        assert torch.equal(alone.images[0], together.images[i])
    order = [2, 0, 1]
    mixed = text([PROMPTS[i] for i in order], seed=[5 + i for i in order], output_type="pt", **settings)
    assert torch.equal(mixed.images, together.images[order])
    assert not torch.equal(text(PROMPTS[0], seed=6, **settings).tokens[0], together.tokens[0])


def test_a_batch_at_once(tiny_pipeline_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `batch_invariant` the transformer sees the whole batch, twice for guidance, and draws the same up to
    rounding."""
    pipe = Pipeline.from_pretrained(tiny_pipeline_folder("class"))
    rows, encode = [], pipe.transformer.encode
    monkeypatch.setattr(pipe.transformer, "encode", lambda tokens, p: rows.append(len(tokens)) or encode(tokens, p))
    drawn = []
    for pipe.batch_invariant in (True, False):
        drawn.append(pipe(class_labels=[0, 1, 0, 2], seed=3, output_type="tokens", guidance_scale=2.0).tokens)
        assert set(rows) == ({2} if pipe.batch_invariant else {8})
        rows.clear()
    assert (drawn[0] == drawn[1]).float().mean() > 0.95


def test_prompts_are_encoded_alone_too(tiny_pipeline_folder: Folder) -> None:
    """A text encoder whose vectors depend on what is encoded beside them, as a network's do by a rounding, moves no
    picture; with `batch_invariant` off every wording is encoded once, all together."""
    pipe = Pipeline.from_pretrained(tiny_pipeline_folder("text"))

    class Moody:
        def __init__(self, inner: TextEncoder) -> None:
            self.inner, self.asked = inner, []

        dim = property(lambda self: self.inner.dim)
        max_length = property(lambda self: self.inner.max_length)

        def encode(self, prompts: Sequence[str]) -> torch.Tensor:
            self.asked.append(list(prompts))
            return self.inner.encode(prompts) * len(prompts)

        def null_text(self) -> torch.Tensor:
            return self.inner.null_text()

    assert pipe.text_encoder is not None
    pipe.text_encoder = moody = Moody(pipe.text_encoder)
    settings = {"negative_prompt": ["blue", "", "blue"], "guidance_scale": 3.0, "num_inference_steps": 4}
    together = pipe(PROMPTS, seed=[5, 6, 7], **settings).tokens
    for i in range(3):
        alone = pipe(PROMPTS[i], seed=5 + i, **{**settings, "negative_prompt": settings["negative_prompt"][i]}).tokens
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(pipe(PROMPTS[0], seed=5, **{**settings, "negative_prompt": ""}).tokens[0], together[0])
    pipe.batch_invariant = False
    moody.asked.clear()
    pipe(["red apple", "a dog"], num_images_per_prompt=2, seed=1, num_inference_steps=1)
    assert moody.asked == [["red apple", "a dog"]]


def test_output_types(classes: Pipeline) -> None:
    def draw(kind: str):
        return classes(class_labels=[0, 1], seed=3, output_type=kind).images

    pictures, array, tensor, tokens = (draw(kind) for kind in ("pil", "np", "pt", "tokens"))
    assert [(type(p), p.size, p.mode) for p in pictures] == [(Image.Image, (12, 8), "RGB")] * 2
    assert (array.shape, array.dtype) == ((2, 8, 12, 3), np.uint8)
    assert np.array_equal(array, np.stack([np.asarray(p) for p in pictures]))
    assert (tensor.shape, tensor.dtype) == ((2, 3, 8, 12), torch.float32)
    assert float(tensor.abs().max()) <= 1
    assert np.abs((tensor.permute(0, 2, 3, 1).numpy() + 1) * 127.5 - array).max() <= 0.51
    assert (tokens.shape, tokens.dtype) == ((2, 24), torch.int64)
    assert torch.equal(classes.decode(tokens), tensor)
    with pytest.raises(UnknownName, match="unknown output_type 'pill': did you mean pil"):
        draw("pill")


def test_seeds(classes: Pipeline) -> None:
    def tokens(**arguments: object) -> torch.Tensor:
        return classes(class_labels=[0, 0, 0], output_type="tokens", **arguments).tokens

    counted = tokens(seed=10)
    assert torch.equal(counted, tokens(seed=[10, 11, 12]))
    assert torch.equal(counted, tokens(seed=np.int64(10)))
    assert torch.equal(counted, tokens(seed=np.arange(10, 13)))
    assert not torch.equal(tokens(), tokens())  # no seed: a fresh one
    output = classes(class_labels=0)
    again = classes(class_labels=0, seed=output.made[0].seed)
    assert torch.equal(output.tokens, again.tokens)  # and the record says which
    assert torch.equal(tokens(seed=2**63 - 4), tokens(seed=2**63 - 4))


def test_several_images_a_prompt(text: Pipeline) -> None:
    output = text(["red apple", "a dog"], num_images_per_prompt=2, seed=0, negative_prompt=["blue", ""])
    assert [m.prompt for m in output.made] == ["red apple", "red apple", "a dog", "a dog"]
    assert [m.negative_prompt for m in output.made] == ["blue", "blue", "", ""]
    assert [m.seed for m in output.made] == [0, 1, 2, 3]
    assert len(output.images) == 4


def test_negative_prompt(text: Pipeline) -> None:
    def tokens(negative: object, scale: float = 3.0) -> torch.Tensor:
        return text(PROMPTS, seed=0, negative_prompt=negative, guidance_scale=scale).tokens

    plain = tokens(None)
    assert torch.equal(plain, tokens(""))  # the empty negative is no condition
    assert torch.equal(plain, tokens(["", "", ""]))
    assert not torch.equal(plain, tokens("green tree"))
    mixed = tokens(["", "green tree", ""])
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[1], tokens("green tree")[1])
    assert torch.equal(tokens("green tree", 1.0), tokens(None, 1.0))  # where guidance is off it has nothing to do


def test_labels_by_index_and_name(classes: Pipeline) -> None:
    for value in (1, "1", "bee, wasp", "wasp", "Bee", np.int64(1), torch.tensor(1)):
        assert classes.label(value) == 1
    by_name = classes(class_labels=["cat", "wasp"], seed=0)
    assert torch.equal(by_name.tokens, classes(class_labels=torch.tensor([2, 1]), seed=0).tokens)
    assert [(m.class_label, m.label) for m in by_name.made] == [(2, "cat"), (1, "bee, wasp")]
    assert torch.equal(classes(class_labels=np.int64(2), seed=0).tokens[0], by_name.tokens[0])
    with pytest.raises(UnknownName, match="unknown class 'cta': did you mean cat"):
        classes.label("cta")
    for value in (5, -1, "5", "-1"):
        with pytest.raises(ValueError, match=r"out of range: this model has 0 \.\.\. 4"):
            classes.label(value)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"class_labels": 1}, "this model draws from a prompt"), ({}, "this model draws from a prompt"),
    ({"prompt": "a", "class_labels": 1}, "takes no class_labels"), ({"prompt": []}, "nothing to draw"),
    ({"prompt": ""}, "the prompt is empty"), ({"prompt": "  \n"}, "the prompt is empty"),
    ({"prompt": "apple " * 2000}, "12,000 characters, the limit is 2,000"), ({"prompt": ["a", ""]}, "prompt is empty"),
    ({"prompt": "apple", "num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
    ({"prompt": "apple", "seed": -1}, "a seed must lie in"), ({"prompt": "apple", "seed": 2**63}, "a seed must lie in"),
    ({"prompt": "apple", "seed": [1, 2]}, "2 seeds for 1 images"),
    ({"prompt": "apple", "negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ({"prompt": "apple", "num_inference_steps": 0}, "at least 1"),
    ({"prompt": "apple", "num_inference_steps": 25}, "25 steps are more than the 24 tokens"),
    ({"prompt": "apple", "guidance_scale": -1.0}, "guidance_scale must be finite and not negative"),
    ({"prompt": "apple", "temperature": (1.0, -1.0)}, "temperature must be finite and not negative"),
    ({"prompt": "apple", "order": "halto"}, "unknown order 'halto': did you mean halton"),
    ({"prompt": "apple", "schedule": "cosin"}, "unknown schedule 'cosin': did you mean cosine"),
    ({"prompt": "apple", "top_p": 0.0}, "top_p must lie in"), ({"prompt": "apple", "stop_after": 7}, "stop_after must"),
    ({"prompt": "apple", "known_tokens": torch.zeros(1, 5, dtype=torch.int64)}, r"known tokens must be \(1, 24\)")])
def test_bad_arguments(text: Pipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text(**arguments)


def test_bad_arguments_of_a_class_model(classes: Pipeline) -> None:
    with pytest.raises(ValueError, match="this model draws from class labels"):
        classes("a dog")
    with pytest.raises(ValueError, match="negative_prompt needs a text model"):
        classes(class_labels=1, negative_prompt="a dog")
    with pytest.raises(TypeError, match="unknown argument 'steps'"):
        classes(class_labels=1, steps=3)


def test_settings_default_to_the_models(classes: Pipeline) -> None:
    made = classes(class_labels=0, seed=0, temperature=0.5).made[0]
    assert made.settings == dataclasses.replace(classes.settings, temperature=0.5)
    assert made.settings.num_inference_steps == 6
    assert torch.equal(classes(class_labels=0, seed=0, order=None, num_inference_steps=None).tokens,
                       classes(class_labels=0, seed=0).tokens)


def test_stream_yields_every_step(classes: Pipeline) -> None:
    steps = list(classes.stream(class_labels=[0, 3], seed=4, num_inference_steps=5, previews=True))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert all(step.preview is not None and int(step.preview.max()) < 13 for step in steps)
    final = classes(class_labels=[0, 3], seed=4, num_inference_steps=5)
    assert torch.equal(steps[-1].tokens, final.tokens)
    assert torch.equal(steps[-1].tokens[0], classes(class_labels=0, seed=4, num_inference_steps=5).tokens[0])
    assert classes.decode(steps[2].preview).shape == (2, 3, 8, 12)


def test_a_callback_watches_or_stops(classes: Pipeline) -> None:
    seen: list[Step] = []
    watched = classes(class_labels=[0, 3], seed=4, callback_on_step_end=seen.append)
    assert [step.index for step in seen] == list(range(6))
    assert all(step.preview is not None for step in seen)
    assert torch.equal(watched.tokens, classes(class_labels=[0, 3], seed=4).tokens)

    stopped = classes(class_labels=[0, 3], seed=4, callback_on_step_end=lambda step: step.index == 2)
    assert torch.equal(stopped.tokens, seen[2].preview)
    assert stopped.made[0].settings.stop_after == 3  # so that the record draws the same again
    assert torch.equal(stopped.tokens, classes(class_labels=[0, 3], seed=4, stop_after=3).tokens)

    seen.clear()
    classes(class_labels=0, seed=4, callback_on_step_end=seen.append, previews=False)
    assert [step.preview is None for step in seen] == [True] * 5 + [False]
    with pytest.raises(ValueError, match="needs previews=True"):
        classes(class_labels=0, seed=4, callback_on_step_end=lambda step: True, previews=False)


def test_known_tokens_stay(classes: Pipeline) -> None:
    known = torch.full((2, 24), 13)
    known[:, 4:12] = torch.randint(13, (2, 8), generator=torch.Generator().manual_seed(0))
    output = classes(class_labels=[0, 1], seed=0, known_tokens=known)
    assert torch.equal(output.tokens[:, 4:12], known[:, 4:12])
    assert all(m.known_tokens for m in output.made)


def test_nothing_touches_the_global_generators(text: Pipeline, global_random_state_kept: None) -> None:
    text(PROMPTS, seed=0, order="confidence", guidance_scale=2.0)
    text("a dog")


def test_save_and_load_are_equal(text: Pipeline, classes: Pipeline, tmp_path: Path) -> None:
    classes.settings, before = Settings(num_inference_steps=7, guidance_scale=(1.0, 2.0)), classes.settings
    try:
        for pipe, request in ((text, {"prompt": PROMPTS}), (classes, {"class_labels": [0, 1, 2]})):
            folder = tmp_path / "saved"
            pipe.save_pretrained(folder)  # the second replaces the first
            loaded = Pipeline.from_pretrained(folder)
            assert (loaded.settings, loaded.class_names) == (pipe.settings, pipe.class_names)
            assert (loaded.name, loaded.model_hash) == ("saved", pipe.model_hash)
            for name, weight in pipe.transformer.state_dict().items():
                assert torch.equal(weight, loaded.transformer.state_dict()[name])
            assert torch.equal(loaded(seed=1, output_type="pt", **request).images,
                               pipe(seed=1, output_type="pt", **request).images)
    finally:
        classes.settings = before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


def test_save_replaces_nothing_but_models(classes: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UsageError, match="is not replaced"):
        classes.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_tokenizer_beside_the_model(copy: Path) -> None:
    (copy / "tokenizer").rename(copy.parent / "shared")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tokenizer": "shared"}))
    pipe = Pipeline.from_pretrained(copy)
    pipe.save_pretrained(copy.parent / "whole")
    again = Pipeline.from_pretrained(copy.parent / "whole")
    assert torch.equal(pipe(class_labels=1, seed=0, output_type="pt").images,
                       again(class_labels=1, seed=0, output_type="pt").images)


def test_load_model(copy: Path) -> None:
    model = unmask.load_model(copy)
    assert isinstance(model, MaskedTransformer)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert isinstance(load_model(copy / "tokenizer"), VQGAN)
    half = load_model(copy, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="holds a tokenizer, not a pipeline"):
        Pipeline.from_pretrained(copy / "tokenizer")


def test_dtype_of_computation(copy: Path) -> None:
    pipe = Pipeline.from_pretrained(copy, dtype=torch.bfloat16)
    assert pipe.transformer.head_bias.dtype == torch.bfloat16
    assert pipe.tokenizer.decoder.last_layer.dtype == torch.float32
    assert pipe(class_labels=0, seed=0, output_type="pt").images.dtype == torch.float32


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    assert resolve("emoji") == embedded_folder("emoji")  # a folder of that name does not hide it
    assert resolve("./emoji") == Path("emoji")
    assert resolve(tmp_path) == tmp_path
    for name in ("emojy", "./nothing", "a/b/c", "/nowhere/at/all", "../x"):
        with pytest.raises(UnknownName, match=f"unknown model '{name}'"):
            resolve(name)
    with pytest.raises(UnknownName, match="did you mean emoji"):
        resolve("emojy")


def change(path: Path, key: str, value: object) -> None:
    """Sets, or with None deletes, a field of a JSON file; "a.b" is b inside a."""
    config = json.loads(path.read_text())
    *outer, last = key.split(".")
    inner = config
    for name in outer:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("file", "key", "value", "message"), [
    ("config.json", "format_version", 99, "newer unmask"), ("config.json", "format_version", None, "'format_version'"),
    ("config.json", "transformer", None, "the field 'transformer' is missing"),
    ("config.json", "transformer.width", None, "the field 'width' is missing"),
    ("config.json", "transformer.width", "24", "the field 'width' must be int"),
    ("config.json", "transformer.widht", 24, "the field 'widht' is unknown: did you mean width"),
    ("config.json", "transformer.condition", "sound", "condition must be"),
    ("config.json", "transformer.depth", 3, "the weight 'blocks.2"),
    ("config.json", "transformer.classes", 4, "'class_embedding.weight' has shape"),
    ("config.json", "sha256", None, "the field 'sha256' is missing"),
    ("config.json", "sha256", {}, r"the field 'transformer\.safetensors' is missing"),
    ("config.json", "sampler.order", "zigzag", "unknown order 'zigzag'"),
    ("config.json", "class_names", ["a"], "1 class names for 5 classes"),
    ("config.json", "class_names", [1, 2, 3, 4, 5], "the field 'class_names' must be"),
    ("config.json", "tokenizer", 3, "the field 'tokenizer' must be"),
    ("tokenizer/config.json", "tokenizer", None, "the field 'tokenizer' is missing"),
    ("tokenizer/config.json", "tokenizer.codebook_size", 14, "'quantize.embedding.weight' has shape")])
def test_damaged_configs(copy: Path, file: str, key: str, value: object, message: str) -> None:
    change(copy / file, key, value)
    with pytest.raises(ValueError, match=message) as caught:
        Pipeline.from_pretrained(copy)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, UsageError) or "order" in message


def test_damaged_weights(copy: Path) -> None:
    for file in (copy / "transformer.safetensors", copy / "tokenizer" / "tokenizer.safetensors"):
        whole = file.read_bytes()
        place = random.Random(0).randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
        with pytest.raises(ValueError, match=f"{file.name}: damaged"):
            Pipeline.from_pretrained(copy)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=file.name):
            Pipeline.from_pretrained(copy)
        file.write_bytes(whole)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(FileNotFoundError, match="tokenizer: no such model folder"):
        Pipeline.from_pretrained(copy)


def test_parts_must_belong_together(classes: Pipeline) -> None:
    other = VQGAN(dataclasses.replace(classes.tokenizer.config, codebook_size=14))
    with pytest.raises(ValueError, match="14 codes, the transformer 13"):
        Pipeline(classes.transformer, other)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models(name: str) -> None:
    pipe = Pipeline.from_pretrained(name)
    request = {"prompt": "red apple, noto style"} if EMBEDDED[name] == "text" else {"class_labels": "food-fruit"}
    output = pipe(**request, seed=1)
    assert np.asarray(output.images[0]).std() > 20  # something is drawn
    assert (output.made[0].model, len(output.made[0].model_hash)) == (name, 64)
    if name == "emoji-class":
        assert len(pipe.class_names) == pipe.transformer.config.classes == 98
