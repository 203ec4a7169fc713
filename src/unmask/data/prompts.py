"""Prompts for a record: the same picture under many wordings, so that a model learns words and not a template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

TEMPLATES = ("{c}, {s} style", "{c}, {s} style", "{c}, {s} style", "{s} {c}", "{c} in {s} style", "a {c}, {s} style",
             "{c}")


def prompt(record: Mapping[str, Any]) -> str:
    """The plain prompt of a record: its caption and, where it has one, its style ("red apple, noto style")."""
    style = record.get("style")
    return f"{record['caption']}, {style} style" if style else str(record["caption"])


def varied_prompt(record: Mapping[str, Any], generator: torch.Generator) -> str:
    """A wording drawn from `generator`: the caption, sometimes with a tag beside it or a tag alone, in one of the
    templates; records without a style use the wording without one."""
    kind, choice, tag_choice = torch.rand(3, generator=generator).tolist()
    concept = str(record["caption"])
    tags = [tag for tag in record.get("tags") or [] if tag not in concept and any(c.isalnum() for c in tag)]
    if tags and kind > 0.7:
        tag = tags[int(tag_choice * len(tags))]
        concept = tag if kind > 0.9 else f"{concept}, {tag}"
    style = record.get("style")
    template = TEMPLATES[int(choice * len(TEMPLATES))] if style else "{c}"
    return template.format(c=concept, s=style)
