"""Errors with their one line, and the line for a name nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UsageError(ValueError):
    """What was asked for cannot be; nothing is wrong with any file. The command line exits with 2."""


class UnknownName(UsageError):
    """A name that is none of the choices."""


def unknown_name(kind: str, name: object, known: Sequence[str]) -> UnknownName:
    """The error for a name nobody knows: the nearest ones first, then all (of at most twenty)."""
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    choices = f"choose from {', '.join(known)}" if len(known) <= 20 else f"{len(known)} names are known"
    return UnknownName(f"unknown {kind} '{name}': {hint}{choices}")
