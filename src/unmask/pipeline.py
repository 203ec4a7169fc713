"""The pipeline: a transformer, its tokenizer and its text encoder, wired together. It computes nothing of its own."""

from __future__ import annotations

import dataclasses
import operator
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import sampling
from .checkpoints import atomic_folder, field, from_json, load_weights, read_config, read_weights, write_model
from .errors import unknown_name
from .models.transformer import (
    ClassTransformer,
    MaskedTransformer,
    TextTransformer,
    TransformerConfig,
    build_transformer,
)
from .pictures import Made, to_pil
from .sampling import Settings, Step
from .text import TextEncoder, load_text_encoder
from .tokenizers.vqgan import VQGAN, VQConfig

EMBEDDED = {"emoji": "text", "emoji-class": "class"}
"""Models that travel inside the package, and their condition."""


def embedded_folder(name: str) -> Path:
    """Folder of an embedded model or tokenizer."""
    return Path(str(files("unmask") / "pretrained" / name))


def resolve(name: str | Path) -> Path:
    """The folder that a name stands for: an embedded model, a folder, or what published.fetch takes (a published name,
    a Hub repository "owner/name" in our format, one of its checkpoints "owner/name:file"). Raises UnknownName (a
    ValueError) for a name that is none of these."""
    if str(name) in EMBEDDED:
        return embedded_folder(str(name))
    if Path(name).is_dir():
        return Path(name)
    from . import published

    if str(name) in published.PUBLISHED or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:.+)?", str(name)):
        return published.fetch(str(name))
    raise unknown_name("model", name, [*EMBEDDED, *published.PUBLISHED, "a folder", "a Hub repository"])


def _load(module: nn.Module, folder: Path, name: str, config: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
    weights = read_weights(folder, name, config)
    load_weights(module, {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in weights.items()},
                 folder / f"{name}.safetensors")
    return module.eval().requires_grad_(False)


def load_tokenizer(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> VQGAN:
    """Loads a tokenizer folder; dtype None keeps the stored one."""
    folder = Path(folder)
    config, path = read_config(folder), folder / "config.json"
    with torch.device("meta"):
        module = VQGAN(from_json(VQConfig, field(config, "tokenizer", path), path))
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
    with torch.device("meta"):
        module = build_transformer(from_json(TransformerConfig, field(config, "transformer", path), path))
    loaded = _load(module, folder, "transformer", config, dtype)
    assert isinstance(loaded, MaskedTransformer)
    return loaded


def write_pipeline(folder: Path, shape: TransformerConfig, weights: Mapping[str, Tensor], tokenizer: VQGAN | str,
                   config: Mapping[str, Any]) -> None:
    """Writes a pipeline folder, whole or not at all. tokenizer: written to a sub-folder, or the name of a tokenizer
    folder that stands beside this one. config: class_names, text_encoder, sampler and whatever else describes it."""
    with atomic_folder(folder) as temporary:
        other = {"tokenizer": tokenizer} if isinstance(tokenizer, str) else {}
        write_model(temporary, {"transformer": weights}, {
            "kind": "pipeline", "transformer": dataclasses.asdict(shape), **config, **other})
        if isinstance(tokenizer, VQGAN):
            write_model(temporary / "tokenizer", {"tokenizer": tokenizer.state_dict()}, {
                "kind": "tokenizer", "tokenizer": dataclasses.asdict(tokenizer.config),
                "image_size": shape.grid[0] * tokenizer.config.downsample})


@dataclasses.dataclass(frozen=True)
class Output:
    """What a call drew. images: PIL pictures, or an array / tensor / tokens by output_type. tokens: (B, N) int64.
    made: for each image a record of what made it (prompt or label, seed, model, hash, settings)."""

    images: Any
    tokens: Tensor
    made: list[Made]


@dataclasses.dataclass(frozen=True)
class _Request:
    """A call, one entry an image."""

    prompts: list[str] | None
    negatives: list[str] | None
    labels: list[int] | None
    seeds: list[int]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What the config.json of a pipeline says of everything but the transformer. tokenizer: the name of a folder beside
    the pipeline's; None where it stands inside."""

    tokenizer: str | None = None
    text_encoder: str | None = None
    class_names: tuple[str, ...] | None = None
    sampler: Settings | None = None


class Pipeline:
    """Draws pictures from prompts or class labels. Make one with :meth:`from_pretrained`.

    batch_invariant: on a CPU, compute every picture alone, so that it does not depend on its companions by as much as
    a rounding. False evaluates the transformer on a batch at once, several times as fast for small models.
    """

    def __init__(self, transformer: MaskedTransformer, tokenizer: VQGAN, text_encoder: TextEncoder | None = None,
                 class_names: Sequence[str] | None = None, settings: Settings | None = None, name: str = "",
                 model_hash: str = "", config: dict[str, Any] | None = None) -> None:
        if tokenizer.config.codebook_size != transformer.config.codebook_size:
            raise ValueError(f"the tokenizer has {tokenizer.config.codebook_size} codes, the transformer "
                             f"{transformer.config.codebook_size}: they do not belong together")
        if class_names and len(class_names) != transformer.config.classes:
            raise ValueError(f"{len(class_names)} class names for {transformer.config.classes} classes")
        self.transformer, self.tokenizer, self.text_encoder = transformer, tokenizer, text_encoder
        self.class_names = list(class_names) if class_names else None
        self.settings = settings or Settings()
        self.batch_invariant = True
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
        names = {f.name for f in dataclasses.fields(_Parts)}
        parts = from_json(_Parts, {k: v for k, v in config.items() if k in names}, folder / "config.json")
        tokenizer = load_tokenizer(folder.parent / parts.tokenizer if parts.tokenizer else folder / "tokenizer")
        encoder = load_text_encoder(parts.text_encoder) if parts.text_encoder else None
        shown = Path(name).resolve().name if Path(name) == folder else str(name)
        return cls(transformer.to(device), tokenizer.to(device), encoder, parts.class_names, parts.sampler, shown,
                   config["sha256"]["transformer.safetensors"], config)

    def save_pretrained(self, folder: str | Path, tokenizer: str | None = None) -> None:
        """Writes a folder that loads back equal: weights as they are, text encoder by name, the tokenizer in a
        sub-folder or, where `tokenizer` names one, as the tokenizer folder of that name beside `folder`. An
        existing model folder is replaced; UsageError for a folder that holds anything else."""
        kept = {k: v for k, v in self.config.items()
                if k not in ("transformer", "tokenizer", "sha256", "format_version", "kind")}
        write_pipeline(Path(folder), self.transformer.config, self.transformer.state_dict(),
                       tokenizer or self.tokenizer, {"text_encoder": None, **kept, "class_names": self.class_names,
                                                     "sampler": dataclasses.asdict(self.settings)})

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
        if not isinstance(value, str) or value.lstrip("-").isdecimal():
            number = int(value) if isinstance(value, str) else operator.index(value)
            if not 0 <= number < count:
                raise ValueError(f"class label {value} is out of range: this model has 0 ... {count - 1}")
            return number
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
        items: list[Any] = [given] if np.ndim(given) == 0 else list(given)
        if not items:
            raise ValueError("nothing to draw: the list of prompts or labels is empty")
        repeated = [item for item in items for _ in range(num_images_per_prompt)]
        if seed is None:
            seed = secrets.randbelow(2**31)
        if isinstance(seed, int) or np.ndim(seed) == 0:
            first = operator.index(seed)  # type: ignore[arg-type]
            seed = range(first, first + len(repeated))
        seeds = [operator.index(s) for s in seed]
        if len(seeds) != len(repeated):
            raise ValueError(f"{len(seeds)} seeds for {len(repeated)} images: give one each, or one number")
        if wrong := [s for s in seeds if not 0 <= s < 2**63]:
            raise ValueError(f"a seed must lie in 0 ... 2**63 - 1, got {wrong[0]}")
        if condition == "class":
            return _Request(None, None, [self.label(item) for item in repeated], seeds)
        negatives = None
        if negative_prompt is not None:
            negatives = [negative_prompt] * len(items) if isinstance(negative_prompt, str) else list(negative_prompt)
            if len(negatives) != len(items):
                raise ValueError(f"{len(negatives)} negative prompts for {len(items)} prompts: give one, or one each")
            negatives = [n for n in negatives for _ in range(num_images_per_prompt)]
        return _Request(repeated, negatives, None, seeds)

    def _prepare(self, request: _Request) -> sampling.Prepare:
        if request.labels is not None:
            assert isinstance(self.transformer, ClassTransformer)
            return sampling.prepare_labels(self.transformer, torch.tensor(request.labels, device=self.device))
        assert isinstance(self.transformer, TextTransformer)
        assert request.prompts is not None
        if self.text_encoder is None:
            raise ValueError(f"{self.name}: this text model names no text encoder in its config.json")
        text = self._encode(self.text_encoder, request.prompts)
        negative = None if request.negatives is None else self._encode(self.text_encoder, request.negatives, empty=True)
        return sampling.prepare_text(self.transformer, text, negative)

    def _encode(self, encoder: TextEncoder, prompts: list[str], empty: bool = False) -> Tensor:
        """Vectors (B, T, D) of the prompts, every wording encoded once, and alone where no picture may depend on its
        companions. empty: "" is no condition."""
        wordings = [p for p in dict.fromkeys(prompts) if p or not empty]
        batches = [[p] for p in wordings] if self._alone else [wordings] if wordings else []
        found = dict(zip(wordings, torch.cat([encoder.encode(b) for b in batches]), strict=True)) if batches else {}
        null = encoder.null_text()[0]
        return torch.stack([found.get(p, null).to(self.device) for p in prompts])

    @property
    def _alone(self) -> bool:
        """Whether every picture is computed by itself."""
        return self.batch_invariant and self.device.type == "cpu"

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
                                previews=previews, device=self.device,
                                chunk=1 if self._alone else None)
        return request, settings, steps

    def stream(self, **arguments: Any) -> Iterator[Step]:
        """Like a call, but yields every :class:`~unmask.sampling.Step`; `previews=True` fills each step's preview,
        which :meth:`decode` turns into pictures."""
        return self._start(arguments)[2]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) int64 -> images (B, 3, H, W) float in [-1, 1], one by one so that a picture does not depend on
        its companions, nor memory on their number."""
        grids = tokens.view(-1, 1, *self.transformer.config.grid).to(self.device)
        return torch.cat([self.tokenizer.decode(g) for g in grids]).float().clamp(-1, 1).cpu()

    def __call__(self, prompt: str | Sequence[str] | None = None, class_labels: Any = None, *,
                 negative_prompt: str | Sequence[str] | None = None, num_images_per_prompt: int = 1,
                 seed: int | Sequence[int] | None = None, output_type: str = "pil",
                 callback_on_step_end: Callable[[Step], bool | None] | None = None, previews: bool = True,
                 known_tokens: Tensor | None = None, **settings: Any) -> Output:
        """Draws.

        prompt: one or several (text models). class_labels: indices or names (class models). negative_prompt: what
        guidance leads away from, one or one a prompt; "" is no condition. seed: image i takes seed + i; or a list;
        None draws one. settings: any field of :class:`~unmask.sampling.Settings` (num_inference_steps,
        guidance_scale, temperature, order, schedule, ...); the model's own defaults hold for the rest. known_tokens:
        (B, N), the codebook size where unknown. callback_on_step_end: called with each Step, its preview filled; a
        true return value stops the run, and what is drawn is that preview. previews: False spares the previews where
        the callback neither looks at them nor stops the run. output_type: "pil", "np" (B, H, W, 3) uint8,
        "pt" (B, 3, H, W) float in [-1, 1], "tokens".

        Raises ValueError for anything out of range or unknown.
        """
        if output_type not in ("pil", "np", "pt", "tokens"):
            raise unknown_name("output_type", output_type, ["pil", "np", "pt", "tokens"])
        request, used, steps = self._start({
            "prompt": prompt, "class_labels": class_labels, "negative_prompt": negative_prompt,
            "num_images_per_prompt": num_images_per_prompt, "seed": seed, "known_tokens": known_tokens,
            "previews": callback_on_step_end is not None and previews, **settings})
        step: Step | None = None
        for step in steps:
            if callback_on_step_end is not None and callback_on_step_end(step):
                if step.preview is None:
                    raise ValueError("the callback stops the run: that needs previews=True")
                used = dataclasses.replace(used, stop_after=step.index + 1)
                break
        assert step is not None
        assert step.preview is not None
        made = self._made(request, used, known_tokens is not None)
        return Output(self._images(step.preview, output_type), step.preview, made)

    def _images(self, tokens: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        if output_type == "tokens":
            return tokens
        images = self.decode(tokens)
        if output_type == "pt":
            return images
        pictures = to_pil(images)
        return pictures if output_type == "pil" else np.stack([np.asarray(p) for p in pictures])

    def _made(self, request: _Request, settings: Settings, known_tokens: bool) -> list[Made]:
        made = []
        for i, seed in enumerate(request.seeds):
            number = request.labels[i] if request.labels is not None else None
            made.append(Made(
                self.name, self.model_hash, seed, settings, request.prompts[i] if request.prompts else None,
                request.negatives[i] if request.negatives else None, number,
                self.class_names[number] if self.class_names and number is not None else None, known_tokens))
        return made
