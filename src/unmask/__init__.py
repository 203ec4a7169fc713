"""unmask: masked generative image transformers, from data to pictures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .orders import halton_order
    from .pipeline import Pipeline, load_model
    from .sampling import Interval, Ramp, Settings, Step
    from .schedules import reveal_counts

__all__ = ["Interval", "Pipeline", "Ramp", "Settings", "Step", "halton_order", "load_model", "reveal_counts"]

_HOMES = {"halton_order": "orders", "reveal_counts": "schedules", "Pipeline": "pipeline", "load_model": "pipeline",
          "Settings": "sampling", "Step": "sampling", "Ramp": "sampling", "Interval": "sampling"}


def __getattr__(name: str) -> Any:
    """Public names load their module on first use, so that `import unmask` and the command line's help stay quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unmask' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
