"""Frozen text encoders: prompts in, a fixed-length sequence of vectors out.

`WordVectors` is the small one that travels inside the package; `HFTextEncoder` runs T5 or CLIP through
transformers. Both answer to the `TextEncoder` protocol, and both pad to a fixed length, so that the vectors
of a prompt never depend on the prompts beside it. The null condition of classifier-free guidance is zeros.
"""

from __future__ import annotations

import hashlib
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.checkpoints import read_tensors

MAX_CHARACTERS = 2000
SYMBOLS = "#*&+%$="  # the only symbols WordVectors reads: keycaps, sums, prices
_PLAIN = str.maketrans(
    {"’": "'", "ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"}
)  # what Unicode does not decompose
_LONGEST_WORD = 100  # BERT's WordPiece gives up on longer words


class TextEncoder(Protocol):
    """A frozen text encoder. T = `max_length` tokens, D = `dim` numbers a token."""

    @property
    def dim(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Vectors of the prompts: float32 (B, T, D)."""
        ...

    def null_text(self) -> Tensor:
        """The empty condition: float32 zeros (1, T, D)."""
        ...


def load_text_encoder(spec: str) -> TextEncoder:
    """`"words"` gives the embedded `WordVectors`; anything else is a Hugging Face name or a folder."""
    return WordVectors.load() if spec == "words" else HFTextEncoder.from_pretrained(spec)


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list, or the reason why they cannot be encoded.

    Raises:
        TypeError: `prompts` is one bare string, or an entry is not a string.
        ValueError: no prompts, a prompt without a letter, digit or symbol, or one over 2,000 characters.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of strings, not one string: write [prompt]")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("no prompts given: encode needs at least one")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"a prompt must be a string, not {type(prompt).__name__}")
        if len(prompt) > MAX_CHARACTERS:
            raise ValueError(
                f"the prompt has {len(prompt):,} characters, the limit is {MAX_CHARACTERS:,}: shorten it"
            )
        if not any(c.isalnum() or unicodedata.category(c)[0] == "S" for c in prompt):
            raise ValueError(
                f"the prompt is empty: {prompt!r} holds no word (for no condition use null_text)"
            )
    return prompts


def split_words(text: str) -> list[str]:
    """Lower-case words of a text, without accents and punctuation; an emoji is read as its Unicode name.

    As BERT's uncased pre-tokeniser, except that punctuation is dropped (but for `#*&+%$=`, a word each), a
    possessive 's too, and that letters like ø are read as o: "Woman’s hat, noto style" -> woman hat noto
    style; "🍎" -> red apple.
    """
    spelled = "".join(_spell_out(c) for c in text)
    letters = unicodedata.normalize("NFKD", spelled.lower())
    plain = "".join(c for c in letters if unicodedata.category(c) != "Mn").translate(_PLAIN)
    words: list[str] = []
    word = ""
    for i, c in enumerate(plain + " "):
        if c.isalnum():
            word += c
            continue
        if word and not (word == "s" and i >= 2 and plain[i - 2] == "'" and words):
            words.append(word)
        word = ""
        if c in SYMBOLS:
            words.append(c)
    return words


def _spell_out(char: str) -> str:
    """An emoji (category So, but for the letters flags are made of) becomes its name between blanks."""
    if char.isascii() or unicodedata.category(char) != "So":
        return char
    name = unicodedata.name(char, "")
    return " " if name.startswith("REGIONAL INDICATOR") else f" {name} "


def wordpieces(word: str, vocabulary: Mapping[str, int]) -> list[str]:
    """Greedy longest-match cut of one word; continuations begin with `##`; [] where no cut exists.

    A vocabulary entry that begins with a blank is a whole word: it stands for that word and cuts no other.
    Source: WordPiece as in BERT (Devlin et al. 2019), after its pre-tokeniser.
    """
    if f" {word}" in vocabulary:
        return [f" {word}"]
    pieces: list[str] = []
    start = 0
    while start < len(word) <= _LONGEST_WORD:
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocabulary:
                pieces.append(piece)
                start = end
                break
        else:
            return []
    return pieces


class WordVectors:
    """Static word vectors distilled from MiniLM: a text encoder of a few megabytes without a network.

    Words are read from the vocabulary (BERT's uncased WordPiece, Latin pieces, with whole words added);
    the vector of a token does not depend on its neighbours, which is the transformer's affair.
    Made by `unmask.training.words.distill`; method after model2vec (van Dongen and Tulkens, 2024).
    """

    def __init__(
        self, vocabulary: Sequence[str], vectors: Tensor, scales: Tensor, max_length: int = 16
    ) -> None:
        """n pieces, int8 vectors (n, D), float32 scales (n,): piece i has vectors[i] * scales[i]."""
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self._index = {piece: i for i, piece in enumerate(vocabulary)}
        self._vectors = vectors
        self._scales = scales
        self._max_length = max_length

    @classmethod
    def load(cls, path: str | Path | None = None, max_length: int = 16) -> WordVectors:
        """Read a words file; None reads the one embedded in the package.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a words file, or its contents do not match its hash.
        """
        if path is not None:
            return cls(*_read_words(Path(path)), max_length=max_length)
        with as_file(files("unmask") / "pretrained" / "words.safetensors") as embedded:
            return cls(*_read_words(embedded), max_length=max_length)

    @property
    def dim(self) -> int:
        """D, numbers a token."""
        return self._vectors.shape[1]

    @property
    def max_length(self) -> int:
        """T, tokens a prompt is padded or cut to."""
        return self._max_length

    def tokenize(self, prompt: str) -> list[str]:
        """The pieces a prompt is read as, uncut; words that cannot be read are left out."""
        return [piece.strip() for piece in self._pieces(prompt)]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Vectors of the prompts, zeros after the last token.

        Returns:
            float32 (B, T, D) on the CPU; a content word has a root mean square near 1, "the" near 0.2.
        Raises:
            TypeError, ValueError: see `check_prompts`; ValueError also where no word of a prompt is known.
        Warns:
            UserWarning: a prompt has more than T tokens, or words that the vocabulary cannot spell.
        """
        prompts = check_prompts(prompts)
        out = torch.zeros(len(prompts), self.max_length, self.dim)
        for row, prompt in zip(out, prompts, strict=True):
            ids = [self._index[piece] for piece in self._readable(prompt)]
            row[: len(ids)] = self._vectors[ids] * self._scales[ids, None]
        return out

    def null_text(self) -> Tensor:
        """The empty condition: float32 zeros (1, T, D)."""
        return torch.zeros(1, self.max_length, self.dim)

    def _pieces(self, prompt: str) -> list[str]:
        return [piece for word in split_words(prompt) for piece in wordpieces(word, self._index)]

    def _readable(self, prompt: str) -> list[str]:
        """At most T vocabulary entries of a checked prompt; warns of what is lost."""
        pieces = self._pieces(prompt)
        unknown = [word for word in split_words(prompt) if not wordpieces(word, self._index)]
        if not pieces:
            raise ValueError(
                f"no word of the prompt {_shorten(prompt)!r} is known: the words encoder reads English"
            )
        if unknown:
            warnings.warn(
                f"words that the encoder cannot read were left out: {_shorten(' '.join(unknown))}",
                stacklevel=3,
            )
        dropped = " ".join(piece.strip() for piece in pieces[self.max_length :])
        dropped = dropped.replace(" ##", "").removeprefix("##")
        _warn_if_cut(len(pieces), self.max_length, dropped)
        return pieces[: self.max_length]


class HFTextEncoder:
    """A T5 or CLIP text encoder run through transformers (the extra `text`).

    The tokeniser pads every prompt to `max_length`; the encoder attends to the prompt's own tokens alone, and
    the last hidden states of all positions, padding too, are handed on, as published text models were trained
    (Halton MaskGIT: Flan-T5 XL, 120 tokens, 2,048 wide). Weights stay frozen and in eval mode.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        """A transformers encoder with its tokeniser; most callers want `from_pretrained`."""
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._dim = int(model.config.hidden_size)
        self._max_length = max_length

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        max_length: int = 120,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        local_files_only: bool = False,
    ) -> HFTextEncoder:
        """Load an encoder from the Hub or from a folder; of T5 the decoder is never loaded.

        Args:
            max_length: T; CLIP's own limit (77) holds where it is lower.
            dtype: of the weights; None is bfloat16 where the device computes in it, else float32.
            device: None is the CPU.
            local_files_only: never ask the Hub (HF_HUB_OFFLINE=1 does the same).
        Raises:
            ImportError: transformers is not installed.
            OSError: the model cannot be found or read.
            ValueError: the model is neither T5 nor CLIP, or max_length is below 2.
        """
        try:
            import transformers
        except ImportError as error:
            raise ImportError("T5 and CLIP encoders need transformers: pip install 'unmask[text]'") from error
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, a token and the end mark, not {max_length}")
        device = torch.device(device or "cpu")
        if dtype is None:
            dtype = torch.bfloat16 if _computes_in_bfloat16(device) else torch.float32
        hub = {"local_files_only": local_files_only}
        try:
            config = transformers.AutoConfig.from_pretrained(name_or_folder, **hub)
            if config.model_type not in _HF_CLASSES:
                raise ValueError(
                    f"{name_or_folder} is a {config.model_type} model; "
                    f"a text encoder is one of {', '.join(sorted(_HF_CLASSES))}"
                )
            tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_folder, **hub)
            encoder = getattr(transformers, _HF_CLASSES[config.model_type])
            model = encoder.from_pretrained(name_or_folder, dtype=dtype, **hub)
        except OSError as error:
            reason = str(error).strip().split("\n")[0]
            raise OSError(f"cannot load the text encoder {str(name_or_folder)!r}: {reason}") from error
        limit = getattr(model.config, "max_position_embeddings", max_length)
        return cls(model.to(device), tokenizer, min(max_length, limit))

    @property
    def dim(self) -> int:
        """D, width of the last hidden state."""
        return self._dim

    @property
    def max_length(self) -> int:
        """T, tokens a prompt is padded or cut to."""
        return self._max_length

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Last hidden states of the prompts, computed together: float32 (B, T, D) on the encoder's device.

        Raises:
            TypeError, ValueError: see `check_prompts`.
            RuntimeError: the weights have been released.
        Warns:
            UserWarning: a prompt has more than T tokens.
        """
        if self._model is None:
            raise RuntimeError("the text encoder's weights were released: load it anew")
        tokens = self._tokens(check_prompts(prompts)).to(self._model.device)
        with torch.no_grad():
            states = self._model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return states.last_hidden_state.float()

    def null_text(self) -> Tensor:
        """The empty condition: float32 zeros (1, T, D)."""
        return torch.zeros(1, self.max_length, self.dim)

    def release(self) -> None:
        """Free the weights, once all prompts are encoded; `dim`, `max_length` and `null_text` stay."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _tokens(self, prompts: list[str]) -> Any:
        """Padded and cut ids and attention mask (B, T); warns of what is lost."""
        limit = self.max_length
        for ids in self._tokenizer(prompts, verbose=False)["input_ids"]:
            dropped = ids[limit - 1 : -1]  # both kinds end with one end mark, which a cut prompt keeps
            _warn_if_cut(
                len(ids), limit, self._tokenizer.decode(dropped, skip_special_tokens=True) if dropped else ""
            )
        return self._tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=limit,
            return_attention_mask=True,
            return_tensors="pt",
        )


_HF_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _warn_if_cut(length: int, limit: int, dropped: str) -> None:
    if length > limit:
        warnings.warn(
            f"the prompt has {length} tokens and {limit} are read; dropped: {_shorten(dropped)}", stacklevel=4
        )


def hash_words(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the bytes of a words file's vocabulary, vectors and scales, in this order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _read_words(path: Path) -> tuple[list[str], Tensor, Tensor]:
    """Vocabulary, int8 vectors (n, D) and float32 scales (n,) of a words file, checked."""
    tensors, metadata = read_tensors(path)
    try:
        packed, vectors, scales = (tensors[key] for key in ("vocabulary", "vectors", "scales"))
    except KeyError as error:
        raise ValueError(f"{path}: the field {error} is missing: not a words file of unmask") from None
    types = (packed.dtype, packed.ndim, vectors.dtype, vectors.ndim, scales.dtype, scales.ndim)
    if types != (torch.uint8, 1, torch.int8, 2, torch.float32, 1):
        raise ValueError(f"{path}: vocabulary, vectors, scales must be uint8 (b,), int8 (n, D), float32 (n,)")
    if metadata.get("sha256") != hash_words((packed, vectors, scales)):
        raise ValueError(f"{path}: damaged (the contents do not match its field sha256): fetch it again")
    vocabulary = packed.numpy().tobytes().decode("utf-8").split("\n")
    if not len(vocabulary) == len(set(vocabulary)) == len(vectors) == len(scales):
        raise ValueError(f"{path}: vocabulary, vectors and scales differ in length, or a word stands twice")
    return vocabulary, vectors, scales
