"""Recipes by name: the embedded models' and the paper's (Table 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..models.presets import class_transformer, text_transformer_table2
from ..models.transformer import TransformerConfig, swiglu_hidden
from ..sampling import Settings
from ..tokenizers.vqgan import VQConfig
from .loop import RunConfig
from .objective import MaskObjective
from .tokenizer import TokenizerObjective


@dataclasses.dataclass(frozen=True)
class TokenizerRecipe:
    """All that `unmask train-tokenizer` needs beside the pictures."""

    image_size: int
    tokenizer: VQConfig
    objective: TokenizerObjective
    run: RunConfig

    def __post_init__(self) -> None:
        side = self.tokenizer.downsample
        if self.image_size < side or self.image_size % side:
            raise ValueError(f"image_size must be a multiple of the {side} pixels of a token, got {self.image_size}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that `unmask train` needs beside the tokens, whose grid, codebook and classes replace the transformer's.
    label_field: the record field that is the class (class models); text_encoder: as in text.load_text_encoder (text
    models). codebook_start: token embeddings begin as a projection of the tokenizer's codes."""

    transformer: TransformerConfig
    objective: MaskObjective
    run: RunConfig
    sampler: Settings
    label_field: str = ""
    text_encoder: str | None = None
    codebook_start: bool = False

    def __post_init__(self) -> None:
        needed = "label_field" if self.transformer.condition == "class" else "text_encoder"
        if not getattr(self, needed):
            raise ValueError(f"a recipe for a {self.transformer.condition} model needs {needed}")


def emoji_tokenizer() -> TokenizerRecipe:
    """The embedded tokenizer: 64 px, 8 pixels a token, 4,096 codes, sized for two CPU cores (about 45 minutes)."""
    config = VQConfig(codebook_size=4096, code_dim=8, channels=16, multipliers=(1, 1, 3, 8),
                      encoder_blocks=(0, 0, 1, 2), decoder_blocks=(0, 1, 2, 2), z_channels=64, norm_groups=1)
    objective = TokenizerObjective(l1=0.5, l2=4.0, perceptual=0.2, perceptual_from=0.25, perceptual_share=0.25,
                                   unquantised_steps=100)
    run = RunConfig(steps=4500, batch_size=16, learning_rate=3e-3, warmup_steps=50, optimizer="muon", ema=0.998,
                    checkpoint_every=300, sample_every=900)
    return TokenizerRecipe(64, config, objective, run)


def emoji_decoder() -> TokenizerRecipe:
    """The embedded tokenizer's decoder, trained on while its tokens stay as they are."""
    recipe = emoji_tokenizer()
    objective = dataclasses.replace(recipe.objective, perceptual=0.1, perceptual_from=0.0, decoder_only=True)
    run = dataclasses.replace(recipe.run, steps=900, learning_rate=1e-3, checkpoint_every=150, sample_every=450)
    return dataclasses.replace(recipe, objective=objective, run=run)


TOKENIZER_RECIPES: dict[str, Callable[[], TokenizerRecipe]] = {"emoji": emoji_tokenizer,
                                                               "emoji-decoder": emoji_decoder}


def emoji() -> Recipe:
    """The embedded text model, sized for two CPU cores and for a weight file under 15 MB in bf16."""
    model = TransformerConfig("text", (8, 8), 4096, width=256, depth=4, heads=4, mlp=1024, patch=2, text_dim=192,
                              text_length=16, text_depth=1)
    run = RunConfig(steps=2_400, batch_size=64, learning_rate=5e-3, warmup_steps=200, decay="trapezoid",
                    optimizer="muon", betas=(0.9, 0.98), weight_decay=0.01, ema=0.998, checkpoint_every=250,
                    sample_every=1000)
    return Recipe(model, MaskObjective(), run, Settings(num_inference_steps=16, guidance_scale=2.0, temperature=0.45),
                  text_encoder="words", codebook_start=True)


def emoji_class() -> Recipe:
    """The embedded class model: 98 subgroups. Order and temperature are those of docs/orders.md."""
    model = TransformerConfig("class", (8, 8), 4096, width=192, depth=5, heads=4, mlp=swiglu_hidden(192), patch=2,
                              registers=1, classes=98)
    run = RunConfig(steps=2_200, batch_size=64, learning_rate=4e-3, warmup_steps=100, decay="trapezoid",
                    optimizer="muon", betas=(0.9, 0.98), weight_decay=0.01, ema=0.998, checkpoint_every=250,
                    sample_every=1000)
    sampler = Settings(num_inference_steps=16, order="confidence", guidance_scale=2.0, temperature=0.6, r_temp=1.5)
    return Recipe(model, MaskObjective(), run, sampler, label_field="subgroup", codebook_start=True)


def paper_class() -> Recipe:
    """Table 1, class-to-image, on the network of Table 2."""
    run = RunConfig(steps=2_000_000, batch_size=256, learning_rate=1e-4, warmup_steps=2500, betas=(0.9, 0.96),
                    weight_decay=5e-5, clip=1.0, ema=0.0, precision="bf16", checkpoint_every=5000, sample_every=50_000)
    return Recipe(class_transformer("xlarge", 32, patch=2), MaskObjective(), run,
                  Settings(num_inference_steps=32, schedule="square"), label_field="label")


def paper_text() -> Recipe:
    """Table 1, text-to-image, on the network of Table 2."""
    run = RunConfig(steps=500_000, batch_size=2048, learning_rate=5e-5, warmup_steps=2500, betas=(0.9, 0.999),
                    weight_decay=0.05, clip=0.25, ema=0.999, precision="bf16", checkpoint_every=2500,
                    sample_every=25_000)
    return Recipe(text_transformer_table2(), MaskObjective(), run, Settings(num_inference_steps=32, schedule="square"),
                  text_encoder="google/t5-v1_1-xl")


RECIPES: dict[str, Callable[[], Recipe]] = {"emoji": emoji, "emoji-class": emoji_class, "paper-class": paper_class,
                                            "paper-text": paper_text}
