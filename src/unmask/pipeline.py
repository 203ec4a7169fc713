"""The pipeline: a transformer, its tokenizer and its text encoder, wired together. It computes nothing of its own."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import sampling
from .checkpoints import field, load_weights, read_config, read_weights, write_model
from .errors import unknown_name
from .models.transformer import (
    ClassTransformer,
    MaskedTransformer,
    TextTransformer,
    TransformerConfig,
    build_transformer,
)
from .pictures import to_pil
from .sampling import Interval, Ramp, Settings, Step
from .text import TextEncoder, load_text_encoder
from .tokenizers.vqgan import VQGAN, VQConfig

EMBEDDED = {"emoji": "text", "emoji-class": "class"}
"""Models that travel inside the package, and their condition."""


def embedded_folder(name: str) -> Path:
    """Folder of an embedded model or tokenizer."""
    return Path(str(files("unmask") / "pretrained" / name))


def resolve(name: str | Path) -> Path:
    """The folder that a name stands for: a folder, an embedded model, a published name, or a Hub repository in our
    format. Raises UnknownName (a ValueError) for a name that is none of these."""
    if Path(name).is_dir():
        return Path(name)
    if str(name) in EMBEDDED:
        return embedded_folder(str(name))
    from . import published

    if str(name) in published.PUBLISHED or "/" in str(name):
        return published.fetch(str(name))
    raise unknown_name("model", name, [*EMBEDDED, *published.PUBLISHED, "a folder", "a Hub repository"])


def _config_object(kind: type, values: Any, path: Path) -> Any:
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{path}: the section for {kind.__name__} does not fit: "
                         f"{str(error).removeprefix(kind.__name__ + '.__init__() ')}") from None


def _load(module: nn.Module, folder: Path, name: str, config: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
    weights = read_weights(folder, name, config)
    load_weights(module, {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in weights.items()},
                 folder / f"{name}.safetensors")
    return module.eval().requires_grad_(False)


def load_tokenizer(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> VQGAN:
    """Loads a tokenizer folder; dtype None keeps the stored one."""
    folder = Path(folder)
    config = read_config(folder)
    shape = _config_object(VQConfig, field(config, "tokenizer", folder / "config.json"), folder / "config.json")
    with torch.device("meta"):
        module = VQGAN(shape)
    loaded = _load(module, folder, "tokenizer", config, dtype)
    assert isinstance(loaded, VQGAN)
    return loaded


def load_model(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> MaskedTransformer | VQGAN:
    """The bare network of a model folder: a transformer, or a tokenizer from a tokenizer folder.

    Raises FileNotFoundError or ValueError naming the file and the field that is missing, damaged or too new.
    """
    folder = resolve(folder)
    config = read_config(folder)
    if config.get("kind") == "tokenizer":
        return load_tokenizer(folder, dtype)
    path = folder / "config.json"
    shape = _config_object(TransformerConfig, field(config, "transformer", path), path)
    with torch.device("meta"):
        module = build_transformer(shape)
    loaded = _load(module, folder, "transformer", config, dtype)
    assert isinstance(loaded, MaskedTransformer)
    return loaded


def settings_from(values: dict[str, Any], path: Path | str = "settings") -> Settings:
    """Settings from their JSON form: a ramp is {"start", "end", "curve"}, an interval {"value", "begin", "end"}."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return Interval(**value) if "value" in value else Ramp(**value)
        return tuple(value) if isinstance(value, list) else value

    return _config_object(Settings, {name: plain(value) for name, value in values.items()}, Path(path))


@dataclasses.dataclass(frozen=True)
class Output:
    """What a call drew. images: PIL pictures, or an array / tensor / tokens by output_type. tokens: (B, N). made: a
    record an image of what made it (prompt or label, seed, model, hash, settings)."""

    images: Any
    tokens: Tensor
    made: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Request:
    """A call, one entry an image."""

    prompts: list[str] | None
    negatives: list[str] | None
    labels: list[int] | None
    seeds: list[int]


class Pipeline:
    """Draws pictures from prompts or class labels. Make one with :meth:`from_pretrained`."""

    def __init__(self, transformer: MaskedTransformer, tokenizer: VQGAN, text_encoder: TextEncoder | None = None,
                 class_names: Sequence[str] | None = None, settings: Settings | None = None, name: str = "",
                 model_hash: str = "", config: dict[str, Any] | None = None) -> None:
        if tokenizer.config.codebook_size != transformer.config.codebook_size:
            raise ValueError(f"the tokenizer has {tokenizer.config.codebook_size} codes, the transformer "
                             f"{transformer.config.codebook_size}: they do not belong together")
        self.transformer, self.tokenizer, self.text_encoder = transformer, tokenizer, text_encoder
        self.class_names = list(class_names) if class_names else None
        self.settings = settings or Settings()
        self.name, self.model_hash, self.config = name, model_hash, config or {}

    @classmethod
    def from_pretrained(cls, name: str | Path = "emoji", *, dtype: torch.dtype | None = None,
                        device: str | torch.device = "cpu") -> Pipeline:
        """Loads a pipeline: a folder, an embedded model ("emoji", "emoji-class"), a published short name
        ("halton-maskgit-l-384"), or a Hub repository in our format.

        dtype None computes in float32 on a CPU and in bfloat16 elsewhere. Raises ValueError for an unknown name
        (listing the nearest), and ValueError or FileNotFoundError naming the file for a damaged folder.
        """
        folder = resolve(name)
        config = read_config(folder)
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        transformer = load_model(folder, dtype)
        if not isinstance(transformer, MaskedTransformer):
            raise ValueError(f"{folder}: holds a tokenizer, not a pipeline")
        other = config.get("tokenizer")
        tokenizer = load_tokenizer(folder / "tokenizer" if other is None else folder.parent / other)
        encoder = config.get("text_encoder")
        hashes = field(config, "sha256", folder / "config.json")
        shown = str(name) if not Path(name).is_dir() else Path(name).resolve().name
        return cls(transformer.to(device), tokenizer.to(device), load_text_encoder(encoder) if encoder else None,
                   config.get("class_names"), settings_from(config.get("sampler") or {}, folder / "config.json"),
                   shown, hashes["transformer.safetensors"], config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that loads back equal: weights as they are, tokenizer in a sub-folder."""
        kept = {k: v for k, v in self.config.items() if k not in ("tokenizer", "sha256", "format_version")}
        config = {"kind": "pipeline", "text_encoder": None, **kept,
                  "transformer": dataclasses.asdict(self.transformer.config),
                  "class_names": self.class_names, "sampler": dataclasses.asdict(self.settings)}
        size = [side * self.tokenizer.config.downsample for side in self.transformer.config.grid]
        write_model(Path(folder), {"transformer": self.transformer.state_dict()}, config)
        write_model(Path(folder) / "tokenizer", {"tokenizer": self.tokenizer.state_dict()},
                    {"kind": "tokenizer", "tokenizer": dataclasses.asdict(self.tokenizer.config), "image_size": size[0]})

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Uploads what :meth:`save_pretrained` writes to a Hugging Face repository; returns its address."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder)
            api = HfApi()
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return str(url)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def label(self, value: int | str) -> int:
        """The index of a class given by index or by name; ValueError with the nearest names."""
        count = self.transformer.config.classes
        if isinstance(value, int) or value.lstrip("-").isdigit():
            if not 0 <= int(value) < count:
                raise ValueError(f"class label {value} is out of range: this model has 0 ... {count - 1}")
            return int(value)
        names = self.class_names or []
        lowered = [name.lower() for name in names]
        if value.lower() in lowered:
            return lowered.index(value.lower())
        parts = [i for i, name in enumerate(lowered) if value.lower() in [p.strip() for p in name.split(",")]]
        if len(parts) == 1:
            return parts[0]
        raise unknown_name("class", value, names)

    def _request(self, prompt: str | Sequence[str] | None, class_labels: Any, negative_prompt: Any,
                 num_images_per_prompt: int, seed: int | Sequence[int] | None) -> _Request:
        condition = self.transformer.config.condition
        given = prompt if condition == "text" else class_labels
        if given is None:
            raise ValueError(f"this model draws from {'a prompt' if condition == 'text' else 'class labels'}: "
                             f"give {'prompt' if condition == 'text' else 'class_labels'}")
        if (class_labels if condition == "text" else prompt) is not None:
            raise ValueError(f"this is a {condition} model: it takes no "
                             f"{'class_labels' if condition == 'text' else 'prompt'}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        if negative_prompt is not None and condition != "text":
            raise ValueError("negative_prompt needs a text model")
        items = [given] if isinstance(given, (str, int)) else list(given)
        if not items:
            raise ValueError("nothing to draw: the list of prompts or labels is empty")
        repeated = [item for item in items for _ in range(num_images_per_prompt)]
        if seed is None:
            seed = secrets.randbelow(2**31)
        seeds = [seed + i for i in range(len(repeated))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(repeated):
            raise ValueError(f"{len(seeds)} seeds for {len(repeated)} images: give one each, or one number")
        if not all(0 <= s < 2**63 for s in seeds):
            raise ValueError(f"a seed must lie in 0 ... 2**63 - 1, got {seed}")
        if condition == "class":
            return _Request(None, None, [self.label(item) for item in repeated], seeds)
        negatives = None
        if negative_prompt is not None:
            negatives = [negative_prompt] * len(items) if isinstance(negative_prompt, str) else list(negative_prompt)
            if len(negatives) != len(items):
                raise ValueError(f"{len(negatives)} negative prompts for {len(items)} prompts: give one, or one each")
            negatives = [n for n in negatives for _ in range(num_images_per_prompt)]
        return _Request([str(p) for p in repeated], negatives, None, seeds)

    def _prepare(self, request: _Request) -> sampling.Prepare:
        if request.labels is not None:
            assert isinstance(self.transformer, ClassTransformer)
            return sampling.prepare_labels(self.transformer, torch.tensor(request.labels, device=self.device))
        assert isinstance(self.transformer, TextTransformer) and request.prompts is not None
        if self.text_encoder is None:
            raise ValueError(f"{self.name}: this text model names no text encoder in its config.json")
        text = self.text_encoder.encode(request.prompts).to(self.device)
        negative = self.text_encoder.encode(request.negatives).to(self.device) if request.negatives else None
        return sampling.prepare_text(self.transformer, text, negative)

    def _start(self, arguments: dict[str, Any]) -> tuple[_Request, Settings, Iterator[Step]]:
        known, previews = arguments.pop("known_tokens", None), arguments.pop("previews", False)
        request = self._request(arguments.pop("prompt", None), arguments.pop("class_labels", None),
                                arguments.pop("negative_prompt", None), arguments.pop("num_images_per_prompt", 1),
                                arguments.pop("seed", None))
        unknown = arguments.keys() - {f.name for f in dataclasses.fields(Settings)}
        if unknown:
            raise TypeError(f"unknown argument '{min(unknown)}'")
        settings = dataclasses.replace(self.settings, **{k: v for k, v in arguments.items() if v is not None})
        if settings.num_inference_steps > self.transformer.config.tokens:
            raise ValueError(f"{settings.num_inference_steps} steps are more than the "
                             f"{self.transformer.config.tokens} tokens of a picture")
        steps = sampling.stream(self.transformer, self._prepare(request), request.seeds, settings, known=known,
                                previews=previews, chunk=1 if self.device.type == "cpu" else None, device=self.device)
        return request, settings, steps

    def stream(self, **arguments: Any) -> Iterator[Step]:
        """Like a call, but yields every :class:`~unmask.sampling.Step`; `previews=True` fills each step's preview,
        which :meth:`decode` turns into pictures."""
        return self._start(arguments)[2]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) int64 -> images (B, 3, H, W) float in [-1, 1], one by one so that a picture does not depend on
        its companions."""
        grids = tokens.view(-1, 1, *self.transformer.config.grid).to(self.device)
        return torch.cat([self.tokenizer.decode(g) for g in grids]).float().clamp(-1, 1).cpu()

    def __call__(self, prompt: str | Sequence[str] | None = None, class_labels: Any = None, *,
                 negative_prompt: str | Sequence[str] | None = None, num_images_per_prompt: int = 1,
                 seed: int | Sequence[int] | None = None, output_type: str = "pil",
                 callback_on_step_end: Callable[[Step], bool | None] | None = None,
                 known_tokens: Tensor | None = None, **settings: Any) -> Output:
        """Draws.

        prompt: one or several (text models). class_labels: indices or names (class models). negative_prompt: what
        guidance leads away from. seed: image i takes seed + i; or a list; None draws one. settings: any field of
        :class:`~unmask.sampling.Settings` (num_inference_steps, guidance_scale, temperature, order, schedule, ...);
        the model's own defaults hold for the rest. known_tokens: (B, N), the codebook size where unknown.
        callback_on_step_end: called with each Step, its preview filled; a true return value stops the run, and what
        is drawn is that preview. output_type: "pil", "np" (B, H, W, 3) uint8, "pt" (B, 3, H, W) in [-1, 1], "tokens".

        Raises ValueError for anything out of range or unknown.
        """
        if output_type not in ("pil", "np", "pt", "tokens"):
            raise unknown_name("output_type", output_type, ["pil", "np", "pt", "tokens"])
        request, used, steps = self._start({
            "prompt": prompt, "class_labels": class_labels, "negative_prompt": negative_prompt,
            "num_images_per_prompt": num_images_per_prompt, "seed": seed, "known_tokens": known_tokens,
            "previews": callback_on_step_end is not None, **settings})
        step: Step | None = None
        for step in steps:
            if callback_on_step_end is not None and callback_on_step_end(step):
                break
        assert step is not None and step.preview is not None
        return Output(self._images(step.preview, output_type), step.preview, self._made(request, used))

    def _images(self, tokens: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        if output_type == "tokens":
            return tokens
        images = self.decode(tokens)
        if output_type == "pt":
            return images
        pictures = to_pil(images)
        return pictures if output_type == "pil" else np.stack([np.asarray(p) for p in pictures])

    def _made(self, request: _Request, settings: Settings) -> list[dict[str, Any]]:
        from . import __version__

        common = {"model": self.name, "model_hash": self.model_hash, "version": __version__,
                  "settings": dataclasses.asdict(settings)}
        made = []
        for i, seed in enumerate(request.seeds):
            entry: dict[str, Any] = {"seed": seed, **common}
            if request.prompts is not None:
                entry["prompt"] = request.prompts[i]
            if request.negatives is not None:
                entry["negative_prompt"] = request.negatives[i]
            if request.labels is not None:
                number = request.labels[i]
                entry |= {"class_label": number, "label": self.class_names[number] if self.class_names else number}
            made.append(entry)
        return made
