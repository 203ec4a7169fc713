"""What the commands share: kinds of options, and the checks made before any work is done."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ..errors import UsageError

# Options that may be absent: what holds then stands in their help, so that "(default: None)" need not.
File = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
Number = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Real = Annotated[float | None, arg(metavar="X", help_behavior_hint="")]
Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Texts = Annotated[tuple[str, ...], arg(metavar="TEXT ...", help_behavior_hint="")]
Numbers = Annotated[tuple[int, ...], arg(metavar="N ...", help_behavior_hint="")]
Names = Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")]
Reals = Annotated[tuple[str, ...], arg(metavar="X ...", help_behavior_hint="")]
Decimals = Annotated[tuple[float, ...], arg(metavar="X ...", help_behavior_hint="")]
Flag = Annotated[bool, arg(help_behavior_hint="")]
Json = Annotated[bool, arg(name="json", help_behavior_hint="")]


OPTIONS = {"num_images_per_prompt": "--num-images", "num_inference_steps": "--steps", "class_labels": "--labels",
           **{name: f"--{name.replace('_', '-')}" for name in
              ("negative_prompt", "guidance_scale", "top_k", "top_p", "r_temp", "stop_after")}}
"""What the arguments of a pipeline are called on the command line."""


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Turns the ValueErrors of argument checks into usage errors that speak of options."""
    try:
        yield
    except ValueError as error:
        raise UsageError(re.sub(r"\b\w+_\w+\b", lambda m: OPTIONS.get(m[0], m[0]), str(error))) from None


def check_file(path: Path, suffixes: tuple[str, ...], force: bool) -> None:
    """Refuses, before any work is done, a file that exists, cannot be written, or is of another kind."""
    if not path.name.lower().endswith(suffixes):
        raise UsageError(f"{path}: give a name that ends in {' or '.join(suffixes)}")
    if path.exists() and not (force and path.is_file()):
        raise UsageError(f"{path} exists: give another name{', or --force to overwrite it' if path.is_file() else ''}")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder: make it first, or give another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder}: cannot be written to: give another folder")


def check_picture(out: Path, force: bool) -> None:
    """`out` is a folder that exists, or a PNG file that does not."""
    if out.is_dir():
        check_folder(out)
    elif not out.suffix and not out.exists():
        raise UsageError(f"{out}: no such folder: make it first, or give a name that ends in .png")
    else:
        check_file(out, (".png",), force)


def check_new(folder: Path, force: bool) -> None:
    if folder.exists() and not force:
        raise UsageError(f"{folder} exists: give another --out, or --force to replace it")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-") or "picture"


def free_name(folder: Path, stem: str) -> Path:
    """`stem.png`, or the first of `stem-2.png`, `stem-3.png`, ... that does not exist."""
    number = 1
    while (path := folder / f"{stem}{'' if number == 1 else f'-{number}'}.png").exists():
        number += 1
    return path
