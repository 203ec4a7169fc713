"""The command line. Heavy imports stand inside the commands, so that help is quick."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes

from .. import __version__
from ..errors import UsageError
from .drawing import convert, generate, models, replay
from .measuring import evaluate, study
from .training import data, tokenize, train, train_tokenizer

COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "replay": replay,
    "models": models,
    "convert": convert,
    "data": data,
    "train-tokenizer": train_tokenizer,
    "tokenize": tokenize,
    "train": train,
    "evaluate": evaluate,
    "study": study,
}


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(143)


def _warn(message: Warning | str, *_: Any) -> None:
    print(f"unmask: warning: {message}", file=sys.stderr)


def main() -> None:
    """Entry point: exit code 0 done, 1 failed, 2 usage, 130 interrupted, 143 terminated."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _warn  # type: ignore[assignment]
    if sys.argv[1:] == ["--version"]:
        print(f"unmask {__version__}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="unmask", description="Masked generative image transformers: draw, train, measure.",
            config=(DisallowNone, FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes))
    except KeyboardInterrupt:
        print("unmask: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        print(f"unmask: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
