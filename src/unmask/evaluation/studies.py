"""The studies of `unmask study`: what each can be asked. Their work stands in studies_*.py, imported when one runs.

Every study writes NAME.json, NAME.md and its pictures into the folder `out`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import arg, subcommand

File = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Name = Annotated[str, arg(metavar="NAME")]
Number = Annotated[int, arg(metavar="N")]
Maybe = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Flag = Annotated[bool, arg(help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class Study:
    """What every study takes."""

    out: Path
    """Folder to write to; it is made."""
    force: Flag = False
    """Replace what an earlier run of this study wrote."""


@dataclasses.dataclass(frozen=True)
class Table(Study):
    """Table 3 and its radar plot (Figure 2), with your result's rows."""

    result: File = None
    """A result.json of `unmask evaluate` with inception-v3 features."""

    def run(self) -> None:
        from .studies_paper import table_study

        table_study(self.out, self.result, self.force)


@dataclasses.dataclass(frozen=True)
class Prompts(Study):
    """The 18 prompts of section 6 and the failure prompts of Figure 5, drawn by a text model."""

    model: Name = "emoji"
    """An embedded model, a folder, a published name or a Hub repository."""
    seed: Number = 0
    """Prompt i takes seed + i."""

    def run(self) -> None:
        from .studies_paper import prompts_study

        prompts_study(self.out, self.model, self.seed, self.force)


@dataclasses.dataclass(frozen=True)
class Orders(Study):
    """What each order looks like: reveal maps, filmstrips, distances inside a step, discrepancy."""

    orders: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("halton", "sobol", "random", "raster")
    """Of the tokens; confidence needs a model."""
    grid: Annotated[tuple[int, int], arg(metavar="H W")] = (16, 16)
    """Tokens of a picture, where no model says."""
    steps: Number = 16
    """Steps of the sampler."""
    schedule: Name = "arccos"
    """How many tokens each step reveals."""
    model: Text = None
    """Take the grid of this model, and its confidence."""
    draws: Number = 16
    """Pictures over which the figures of orders that differ from picture to picture are averaged."""
    seed: Number = 0
    """Of the first picture."""

    def run(self) -> None:
        from .studies_orders import orders_study

        orders_study(self.out, self.orders, self.grid, self.steps, self.schedule, self.model, self.draws, self.seed,
                     self.force)


@dataclasses.dataclass(frozen=True)
class TokenDistance(Study):
    """Figure 1: distance of token embeddings against distance in the picture."""

    data: Path = dataclasses.field(kw_only=True)
    """Pictures: a webdataset tar or a folder."""
    tokenizer: Path = dataclasses.field(kw_only=True)
    """A tokenizer folder."""
    images: Number = 200
    """How many pictures to take, in a fixed shuffled order."""
    token: Annotated[tuple[int, int] | None, arg(metavar="ROW COLUMN", help_behavior_hint="")] = None
    """The reference token of the map; by default the middle one."""

    def run(self) -> None:
        from .studies_orders import token_distance_study

        token_distance_study(self.out, self.data, self.tokenizer, self.images, self.token, self.force)


STUDIES = (Annotated[Table, subcommand("table")] | Annotated[Prompts, subcommand("prompts")]
           | Annotated[Orders, subcommand("orders")] | Annotated[TokenDistance, subcommand("token-distance")])
"""The studies, as the command line takes them."""
