"""Files from the Hugging Face Hub, with one clear line for whatever goes wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors, utils

PATTERNS = ["*.json", "*.safetensors", "*.md", "*.model", "*.txt"]
"""What is fetched of a repository in our format: no pickles."""


def cache_home() -> Path:
    """Where converted models are kept: the environment's UNMASK_HOME, or ~/.cache/unmask."""
    return Path(os.environ.get("UNMASK_HOME") or Path.home() / ".cache" / "unmask").expanduser()


def split_source(source: str | Path) -> tuple[str, str] | None:
    """"owner/repo:file" -> (repo, file); None for anything else, a local path above all."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+):([^:]+)", str(source))
    return None if match is None or Path(source).exists() else (match[1], match[2])


def download(repo: str, file: str) -> Path:
    """One file of a repository, from huggingface_hub's cache or the network; progress on a terminal.

    Raises ConnectionError (an OSError) with no network and nothing cached, ValueError where there is no such
    repository or file.
    """
    with _one_line(f"{repo}: {file}"), _quiet():
        return Path(huggingface_hub.hf_hub_download(repo, file, local_files_only=not _reachable()))


def snapshot(repo: str) -> Path:
    """The folder of a repository in our format, fetched whole; errors as in :func:`download`."""
    with _one_line(repo), _quiet():
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=PATTERNS,
                                                      local_files_only=not _reachable()))


def _reachable() -> bool:
    """Whether the Hub's name resolves (or a proxy sees to that): spares a machine without network half a
    minute of repeated attempts."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """huggingface_hub's progress bars off without a terminal, its warnings off: the error says it."""
    verbosity, bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    if bars and not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if bars:
            utils.enable_progress_bars()


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What huggingface_hub and its network raise -> one line that names the thing and the mend."""
    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(f"{what}: the repository is gated: accept its terms on the Hub, then log in with "
                         f"'hf auth login'") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{what}: no such repository on the Hub, or a private one: log in with 'hf auth "
                         f"login'") from None
    except errors.HFValidationError:
        raise ValueError(f"{what}: no folder here, and no name a Hub repository can have") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        raise ConnectionError(f"{what}: not cached, and the Hub cannot be reached: connect once, or "
                              f"fetch the file elsewhere and run 'unmask convert FILE'") from None
    except errors.EntryNotFoundError:
        raise ValueError(f"{what}: the repository has no such file") from None
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"{what}: the Hub answered {str(error).splitlines()[0][:120]}") from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(f"{what}: the disk is full: make room, or set HF_HOME to another place") from None
    except ValueError:
        raise
    except Exception as error:  # of the HTTP library, which is not ours to know: a connection that breaks
        first = (str(error).splitlines() or [""])[0][:120]
        raise ConnectionError(f"{what}: {type(error).__name__} {first}: try again") from None
