"""The studies of `unmask study`: what each can be asked. Their work stands in studies_*.py, imported when one runs.

Every study writes NAME.json, NAME.md and its pictures into the folder `out`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg, subcommand

if TYPE_CHECKING:
    from .studies_sampling import Bench

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


@dataclasses.dataclass(frozen=True)
class Measured(Study):
    """What every study takes that draws and measures."""

    model: Name = dataclasses.field(kw_only=True)
    """An embedded model, a folder, a published name or a Hub repository."""
    reference: Path = dataclasses.field(kw_only=True)
    """Real pictures (a webdataset tar or a folder), or a statistics file."""
    images: Number = 2000
    """Pictures measured."""
    steps: Maybe = None
    """Steps of the sampler; by default the model's."""
    schedule: Text = None
    """How many tokens each step reveals; by default as the model's settings say."""
    seed: Number = 0
    """Picture i takes seed + i."""
    split: Text = None
    """Take only the reference's pictures of this split."""
    label_field: Text = None
    """The field of the reference's records that names the class."""
    resize: Flag = False
    """Take reference pictures of different sizes, each cropped to a square and scaled."""
    extractor: Name = "efficientnet-lite0@128"
    """efficientnet-lite0, inception-v3, dinov2 or clip, with its resize after an @."""
    extractor_weights: File = None
    """Its weight file or folder."""
    batch_size: Number = 64
    """Pictures drawn at a time."""
    allow_few: Flag = False
    """Compute FID also from no more pictures than features."""
    quiet: Flag = False
    """No progress bar."""

    def bench(self) -> Bench:
        """The model, extractor and reference, loaded."""
        from .studies_sampling import load_bench

        options = {"images": self.images, "seed": self.seed, "batch_size": self.batch_size,
                   "allow_few": self.allow_few}
        return load_bench(self.model, self.reference, self.extractor, self.extractor_weights, self.split,
                          self.label_field, self.resize, self.quiet, options)


@dataclasses.dataclass(frozen=True)
class Intermediate(Measured):
    """Table 4 and Figure 3: pictures and figures after some of the steps."""

    every: Maybe = None
    """Steps between rows; by default an eighth of the steps."""

    def run(self) -> None:
        from .studies_sampling import intermediate_study

        intermediate_study(self.out, self.bench(), self.steps, self.schedule, self.every, self.force)


@dataclasses.dataclass(frozen=True)
class Compare(Measured):
    """Figure 4: the same seeds and conditions under two orders, with figures."""

    orders: Annotated[tuple[str, str], arg(metavar="NAME NAME")] = ("halton", "confidence")
    """The two."""
    r_temp: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Noise of the confidence order."""

    def run(self) -> None:
        from .studies_sampling import compare_study

        compare_study(self.out, self.bench(), self.orders, self.steps, self.schedule, self.r_temp, self.force)


@dataclasses.dataclass(frozen=True)
class Dependence(Study):
    """How much masked tokens say about each other, by distance, and what each order ignores of it."""

    model: Name = "emoji-class"
    """An embedded model, a folder, a published name or a Hub repository."""
    orders: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("halton", "sobol", "random", "raster", "confidence")
    """Of the tokens."""
    steps: Maybe = None
    """Steps of the sampler; by default the model's."""
    schedule: Text = None
    """How many tokens each step reveals; by default as the model's settings say."""
    images: Number = 8
    """Pictures to average over."""
    probes: Number = 4
    """Tokens probed at a time."""
    draws: Number = 8
    """Values tried for each token probed."""
    seed: Number = 0
    """Picture i takes seed + i."""
    quiet: Flag = False
    """No progress bar."""

    def run(self) -> None:
        from .studies_dependence import dependence_study

        dependence_study(self.out, self.model, self.orders, self.steps, self.schedule, self.images, self.probes,
                         self.draws, self.seed, self.quiet, self.force)


STUDIES = (Annotated[Table, subcommand("table")] | Annotated[Prompts, subcommand("prompts")]
           | Annotated[Orders, subcommand("orders")] | Annotated[TokenDistance, subcommand("token-distance")]
           | Annotated[Intermediate, subcommand("intermediate")] | Annotated[Compare, subcommand("compare")]
           | Annotated[Dependence, subcommand("dependence")])
"""The studies, as the command line takes them."""
