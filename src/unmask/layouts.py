"""Foreign checkpoints: read without running anything in them, recognised by names and shapes, renamed.

"The public code" is valeoai/Halton-MaskGIT for transformers, FoundationVision/LlamaGen for tokenizers.
Names and shapes on both sides correspond one to one, but for the text model's stacked query, key and value
projections (three of ours) and the class model's head, which is stored twice (it is the token embedding).
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import read_tensors
from .models.presets import CLASS_SIZES
from .models.transformer import TransformerConfig, build_transformer
from .tokenizers.vqgan import VQGAN, VQConfig

PAYLOADS = ("model_state_dict", "model")
"""Entries of a checkpoint that hold the weights; a file without them must be the state dict itself."""

_EMBEDDINGS = {"token_embedding": "tok_emb", "position_embedding": "pos_emb.weight", "patch_in": "in_proj"}
_CLASS = {**_EMBEDDINGS, "registers": "reg_tokens.weight", "class_embedding": "cls_emb",
          "patch_out": "out_proj", "head_bias": "head.bias", "final_norm": "last_norm.norm_final",
          "final_modulation": "last_norm.mlp.1"}
_CLASS_BLOCK = {"modulation": "mlp.1", "norm1": "ln1", "norm2": "ln2", "attention.q": "attn.wq",
                "attention.k": "attn.wk", "attention.v": "attn.wv", "attention.out": "attn.wo",
                "feed_forward.w1": "ff.w1", "feed_forward.w2": "ff.w2", "feed_forward.w3": "ff.w3"}
_TEXT = {**_EMBEDDINGS, "first_norm": "first_norm", "patch_out": "out_proj.0", "final_norm": "last_norm",
         "head_bias": "bias"}
_TEXT_BLOCK = {"text_in": "mlp.0", "text_norm": "mlp.1", "norm1": "ln1", "norm2": "ln2", "norm3": "ln3",
               "attention.out": "self_attn.mha.out_proj", "cross_attention.out": "cross_attn.mha.out_proj",
               "feed_forward.up": "ff.net.0", "feed_forward.down": "ff.net.3"}
_STACKED = {"attention": "self_attn", "cross_attention": "cross_attn"}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Reads the weights of a .pth, .pt or .safetensors file -> {name: tensor}, memory-mapped.

    Takes the entry `model_state_dict` or `model`, or the file's own dictionary; takes the prefixes `module.`
    (DistributedDataParallel) and `_orig_mod.` (torch.compile) off every name. Whatever lies beside, such as
    the optimizer's state, stays on disk. Nothing in the file is run.

    Raises FileNotFoundError, or ValueError naming the file and the mend: a web page or a Git LFS pointer in
    place of the file, a truncated or damaged one, a pickle of anything but a plain state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(512)
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path}: is a web page, not a checkpoint: download the file itself "
                         f"(on the Hub: its 'resolve' address, not 'blob')")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a Git LFS pointer, not the file: run 'git lfs pull' beside it")
    if start.startswith(b"PK\x03\x04"):
        return _state_dict(_load_zip(path), path)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _state_dict(read_tensors(path)[0], path)
    if start.startswith(b"\x80"):
        raise ValueError(f"{path}: a bare pickle, or from PyTorch before 1.6, which unmask does not open: "
                         f"fetch the file as .safetensors, or torch.save it again where you trust it")
    raise ValueError(f"{path}: not a checkpoint (neither PyTorch nor safetensors): fetch the file again")


def _load_zip(path: Path) -> Any:
    """What a PyTorch zip file holds, by the restricted unpickler, its tensors mapped rather than read."""
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError):
        raise ValueError(f"{path}: truncated (its end is missing): fetch the file again") from None
    if inflated > path.stat().st_size:
        raise ValueError(f"{path}: a compressed archive, not a file of torch.save: fetch the file again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the file is foreign: whatever it provokes is its fault
        text = " ".join(str(error).split())
        thing = re.search(r"GLOBAL (\S+)", text)
        if thing:
            raise ValueError(f"{path}: holds more than tensors ('{thing[1]}'), and reading that could run "
                             f"code: nothing was run; fetch the file as .safetensors, or save its state dict "
                             f"alone") from None
        raise ValueError(f"{path}: damaged ({text[:120]}): fetch the file again") from None


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The plain state dict in what a file held, prefixes off, every tensor dense and ordinary."""
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in PAYLOADS if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{path}: holds no weights (no state dict, '{PAYLOADS[0]}' or '{PAYLOADS[1]}')")
    weights = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or type(tensor) not in (Tensor, nn.Parameter):
            raise ValueError(f"{path}: not a plain state dict: its entry '{str(name)[:60]}' is a "
                             f"{type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or (
                tensor.nbytes > tensor.untyped_storage().nbytes()):
            raise ValueError(f"{path}: the weight '{name[:60]}' is not a dense tensor")
        weights[re.sub(r"^((module|_orig_mod)\.)+", "", name)] = tensor.detach()
    return weights


def published_name(name: str, condition: str) -> tuple[str, int | None]:
    """Our name of a transformer's weight -> the public code's, and which third of it (None: all of it)."""
    top, block = (_CLASS, _CLASS_BLOCK) if condition == "class" else (_TEXT, _TEXT_BLOCK)
    if name in top:
        return top[name], None
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if match is None:
        return f"{top[stem]}.{kind}", None
    layer, part = f"transformer.layers.{match[1]}", match[2]
    attention, _, projection = part.rpartition(".")
    if condition == "text" and projection in ("q", "k", "v"):
        return f"{layer}.{_STACKED[attention]}.mha.in_proj_{kind}", "qkv".index(projection)
    return f"{layer}.{block[part]}.{kind}", None


def _published_shape(name: str, shape: torch.Size, condition: str, third: int | None) -> tuple[int, ...]:
    """Shape the public code stores one of our weights in."""
    if third is not None:
        return (3 * shape[0], *shape[1:])
    if name == "patch_out.weight":
        return (*shape, 1, 1)
    return (1, 1, *shape) if name == "head_bias" and condition == "text" else tuple(shape)


def build_network(config: TransformerConfig | VQConfig) -> nn.Module:
    """The network of a config on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return VQGAN(config) if isinstance(config, VQConfig) else build_transformer(config)


def to_ours(weights: Mapping[str, Tensor], config: TransformerConfig | VQConfig,
            source: Path | str = "checkpoint") -> dict[str, Tensor]:
    """Published weights -> ours, as views of the same memory.

    Raises ValueError naming `source` and the first weight that is missing, left over, of another shape, not
    floating point, or not finite; and where the head is not tied to the token embedding.
    """
    ours, used = {}, set()
    for name, like in build_network(config).state_dict().items():
        third, shape = None, tuple(like.shape)
        theirs = name
        if isinstance(config, TransformerConfig):
            theirs, third = published_name(name, config.condition)
            shape = _published_shape(name, like.shape, config.condition, third)
        tensor = weights.get(theirs)
        if tensor is None:
            raise ValueError(f"{source}: the weight '{theirs}' is missing: the file is incomplete")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{source}: the weight '{theirs}' has shape {tuple(tensor.shape)}, the rest of "
                             f"the file asks for {shape}: it is damaged or of another architecture")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{source}: the weight '{theirs}' is {tensor.dtype}: only float32, float16 and "
                             f"bfloat16 are read")
        tensor = tensor.detach() if third is None else tensor.detach().chunk(3)[third]
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: the weight '{theirs}' holds NaN or infinity: fetch the file again, "
                             f"or take an earlier checkpoint of that training")
        ours[name] = tensor.reshape(like.shape)
        used.add(theirs)
    rest = weights.keys() - used - {"quantize.codebook_used", "head.weight"}
    if rest:
        raise ValueError(f"{source}: the weight '{min(rest)}' is unexpected ({len(rest)} in all): another "
                         f"architecture than its other names say")
    head = weights.get("head.weight")
    if head is not None and not head.is_meta and not torch.equal(head, weights["tok_emb.weight"]):
        raise ValueError(f"{source}: 'head.weight' differs from 'tok_emb.weight': only tied heads are read")
    return ours


def _shape(weights: Mapping[str, Tensor], name: str, dimensions: int, source: Path | str) -> tuple[int, ...]:
    if name not in weights:
        raise ValueError(f"{source}: the weight '{name}' is missing: the file is incomplete")
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{source}: the weight '{name}' has shape {shape}, {dimensions} axes were expected")
    return shape


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Different numbers that follow `prefix` in the names."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for name in weights if (match := pattern.match(name))})


def infer_config(weights: Mapping[str, Tensor], source: Path | str = "checkpoint",
                 heads: int | None = None) -> TransformerConfig | VQConfig:
    """Architecture of published weights, from their names and shapes.

    The grid is taken to be square. Shapes do not tell the number of heads: a class model's comes from
    presets.CLASS_SIZES by width, a text model's from a head width of 64; `heads` overrides both. A text model
    is taken to read 120 vectors (Table 2).

    Raises ValueError naming `source` for an unknown architecture, a grid that is not square, a class model of
    unknown width without `heads`.
    """
    if "tok_emb.weight" in weights and ("cls_emb.weight" in weights or "bias" in weights):
        return _infer_transformer(weights, source, heads)
    if "quantize.embedding.weight" in weights and "encoder.conv_in.weight" in weights:
        return _infer_tokenizer(weights, source)
    names = ", ".join(sorted(weights)[:3])
    raise ValueError(f"{source}: neither a transformer of the public code nor a LlamaGen tokenizer (its "
                     f"weights are called {names[:120]} ...): unmask cannot convert this architecture")


def _infer_transformer(weights: Mapping[str, Tensor], source: Path | str,
                       heads: int | None) -> TransformerConfig:
    condition = "class" if "cls_emb.weight" in weights else "text"
    entries, width = _shape(weights, "tok_emb.weight", 2, source)
    tokens = _shape(weights, "pos_emb.weight", 2, source)[0]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{source}: {tokens} positions are no square grid: only those can be converted")
    patch = _shape(weights, "in_proj.weight", 4, source)[-1] if "in_proj.weight" in weights else 1
    depth, block = _count(weights, "transformer.layers"), "transformer.layers.0"
    common: dict[str, Any] = {"grid": (side, side), "codebook_size": entries - 1, "width": width,
                              "depth": depth, "patch": patch}
    if condition == "text":
        return TransformerConfig("text", **common, heads=heads or max(1, width // 64), text_length=120,
                                 mlp=_shape(weights, f"{block}.ff.net.0.weight", 2, source)[0],
                                 text_dim=_shape(weights, f"{block}.mlp.0.weight", 2, source)[1])
    known = {size: number for size, _, number in CLASS_SIZES.values()}
    if heads is None and width not in known:
        raise ValueError(f"{source}: {width} wide is none of the published widths "
                         f"({', '.join(map(str, known))}), and shapes do not tell the heads: give heads (--heads)")
    registers = _shape(weights, "reg_tokens.weight", 2, source)[0] if "reg_tokens.weight" in weights else 0
    return TransformerConfig("class", **common, heads=heads or known[width], registers=registers,
                             mlp=_shape(weights, f"{block}.ff.w1.weight", 2, source)[0],
                             classes=_shape(weights, "cls_emb.weight", 2, source)[0] - 1)


def _infer_tokenizer(weights: Mapping[str, Tensor], source: Path | str) -> VQConfig:
    codebook_size, code_dim = _shape(weights, "quantize.embedding.weight", 2, source)
    channels = _shape(weights, "encoder.conv_in.weight", 4, source)[0]
    levels = _count(weights, "encoder.conv_blocks")
    widths = [_shape(weights, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4, source)[0]
              for i in range(levels)]
    if channels % 32 or any(width % channels for width in widths):
        raise ValueError(f"{source}: levels {widths} wide after a first layer of {channels}: another "
                         f"architecture than LlamaGen's tokenizer")
    return VQConfig(
        codebook_size, code_dim, channels, tuple(width // channels for width in widths),
        encoder_blocks=tuple(_count(weights, f"encoder.conv_blocks.{i}.res") for i in range(levels)),
        decoder_blocks=tuple(_count(weights, f"decoder.conv_blocks.{i}.res") for i in range(levels))[::-1],
        z_channels=_shape(weights, "encoder.conv_out.weight", 4, source)[0])
