"""Training: the same losses, the same weights, whatever happens on the way."""

import dataclasses
import json
import math
import os
import signal
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unmask.checkpoints import read_config, read_json, read_tensors
from unmask.data.tokens import TokenDataset, write_tokens
from unmask.errors import UnknownName, UsageError
from unmask.models.transformer import TransformerConfig
from unmask.pipeline import Pipeline, load_tokenizer
from unmask.sampling import Settings
from unmask.schedules import mask_ratio
from unmask.tokenizers.vqgan import VQGAN, VQConfig
from unmask.training.commands import choose_recipe, run_train
from unmask.training.loop import RunConfig, batch_indices, learning_rate, step_generator, train
from unmask.training.muon import Muon, muon_parameters, orthogonalise
from unmask.training.objective import MaskObjective, draw_mask, masked_loss
from unmask.training.presets import RECIPES, TOKENIZER_RECIPES, Recipe, TokenizerRecipe
from unmask.training.tokenizer import TokenizerObjective, TokenizerTask, on_background, psnr
from unmask.training.transformer import Conditioning, TransformerTask

GOLDEN = {
    "tokenizer": [3.303571, 2.574473, 2.90228, 2.349278, 1.911769, 1.481881, 1.122705, 1.487512, 1.264503, 1.111614],
    "emoji-decoder": [3.301826, 2.194546, 2.891697, 2.337892, 1.599186, 1.567215, 1.364077, 1.306201, 1.403464,
                      1.048276],
    "emoji": [8.377855, 8.156262, 7.577633, 6.64059, 5.766904, 5.78395, 4.829759, 4.56122, 4.251191, 3.937068],
    "emoji-class": [8.379708, 8.10108, 7.768649, 7.253284, 6.689511, 6.497087, 5.572237, 4.772345, 4.398761, 4.059675],
    "paper-class": [6.258701, 6.24429, 6.243916, 6.247068, 6.219768, 6.226645, 6.196949, 6.194522, 6.204506, 6.180624],
    "paper-text": [6.243627, 6.252542, 6.257185, 6.246926, 6.2208, 6.213797, 6.210757, 6.178587, 6.198137, 6.186454],
}
"""Loss of the first ten steps of each preset; `python tests/test_training.py` prints them anew."""


class FakeEncoder:
    """A text encoder that needs no files: each word has a random vector of its own."""

    def __init__(self, dim: int, max_length: int) -> None:
        self.dim, self.max_length = dim, max_length

    def encode(self, prompts: Sequence[str]) -> Tensor:
        out = torch.zeros(len(prompts), self.max_length, self.dim)
        for row, text in zip(out, prompts, strict=True):
            for place, word in enumerate(text.split()[:self.max_length]):
                row[place] = torch.randn(self.dim, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
        return out

    def null_text(self) -> Tensor:
        return torch.zeros(1, self.max_length, self.dim)


def shapes(n: int, size: int = 16) -> Tensor:
    """uint8 (n, 4, size, size): a coloured disc or square on nothing, each another."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.arange(size) - size / 2 + 0.5
    pictures = torch.zeros(n, 4, size, size, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        radius = size * (0.2 + 0.25 * torch.rand((), generator=generator))
        colour = torch.randint(256, (3,), generator=generator, dtype=torch.uint8)
        square = torch.maximum(axis.abs()[:, None], axis.abs()[None])
        inside = (square if i % 2 else (axis[:, None] ** 2 + axis[None] ** 2).sqrt()) < radius
        picture[:3] = colour[:, None, None]
        picture[3] = inside * 255
    return pictures


def token_folder(folder: Path, grid: tuple[int, int], codes: int, n: int = 48, tokenizer: Path | None = None,
                 names: Sequence[str] = ("ant", "bee", "cat")) -> TokenDataset:
    """Three classes of pictures: each has one picture of its own, of which a tenth of the tokens is noise."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(codes, (3, 1, *grid), generator=generator).repeat(n // 3, 1, 1, 1)
    noise = torch.randint(codes, kinds.shape, generator=generator)
    tokens = torch.where(torch.rand(kinds.shape, generator=generator) < 0.1, noise, kinds)
    records = [{"key": str(i), "caption": f"{names[i % 3]} number {i % 5}", "tags": ["animal"], "style": "noto",
                "subgroup": names[i % 3], "label": i % 3, "split": "held-pair" if i % 8 == 7 else "train"}
               for i in range(n)]
    made_with = {"tokenizer_sha256": read_config(tokenizer)["sha256"]["tokenizer.safetensors"]} if tokenizer else {}
    write_tokens(folder, [(tokens, records)], grid, codes, {"source": "test", **made_with})
    return TokenDataset(folder)


def tiny_tokenizer(codes: int) -> VQGAN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = VQConfig(codes, 4, 4, (1, 1), (0, 1), (0, 1), 4, norm_groups=1)
        return VQGAN(config).eval().requires_grad_(False)


def transformer_task(folder: Path, recipe: Recipe) -> TransformerTask:
    """The task of a recipe on the tokens of :func:`token_folder`, made to fit."""
    shape = recipe.transformer
    data = token_folder(folder, shape.grid, shape.codebook_size)
    if shape.condition == "class":
        names, labels = data.classes(recipe.label_field)
        shape, condition = dataclasses.replace(shape, classes=len(names)), Conditioning(tuple(names), labels)
    else:
        condition = Conditioning(text_encoder=FakeEncoder(shape.text_dim, shape.text_length), text_encoder_name="fake")
    task = TransformerTask(shape, recipe.objective, recipe.run, data, condition, tiny_tokenizer(shape.codebook_size),
                           recipe.sampler)
    if recipe.codebook_start:
        task.start_from_codebook()
    return task


def tokenizer_task(recipe: TokenizerRecipe, n: int = 40, start: VQGAN | None = None) -> TokenizerTask:
    pictures = shapes(n, recipe.image_size)
    return TokenizerTask(recipe.tokenizer, recipe.objective, recipe.run, pictures[4:], pictures[:4], start=start)


def small(recipe: Recipe, **run: Any) -> Recipe:
    """The recipe with a network that a laptop trains, its kind of layers and its objective as they are."""
    shape = dataclasses.replace(recipe.transformer, grid=(4, 4), codebook_size=32, width=48, depth=2, heads=4, mlp=96,
                                **({"text_dim": 16, "text_length": 8} if recipe.text_encoder else {}))
    sampler = dataclasses.replace(recipe.sampler, num_inference_steps=4)
    return dataclasses.replace(recipe, transformer=shape, sampler=sampler, run=dataclasses.replace(recipe.run, **run))


SMALL_TOKENIZER = TokenizerRecipe(
    16, VQConfig(32, 4, 8, (1, 1, 2), (0, 0, 1), (0, 1, 1), 8, norm_groups=1),
    TokenizerObjective(perceptual=0, unquantised_steps=4),
    RunConfig(steps=12, batch_size=8, learning_rate=2e-3, warmup_steps=2, optimizer="muon", ema=0.9,
              checkpoint_every=3, log_every=1))


def metrics(out: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


# --- pure functions -----------------------------------------------------------------------------------


def test_every_epoch_shows_every_picture_once() -> None:
    for n, size in ((10, 4), (3, 8), (7, 7)):
        shown = torch.cat([batch_indices(n, size, 5, step) for step in range(n * 3)])
        for epoch in shown[:len(shown) // n * n].view(-1, n):
            assert sorted(epoch.tolist()) == list(range(n))
    assert torch.equal(batch_indices(100, 8, 0, 17), batch_indices(100, 8, 0, 17))
    assert not torch.equal(batch_indices(100, 8, 0, 17), batch_indices(100, 8, 1, 17))


def test_step_generators_differ() -> None:
    drawn = {torch.rand(1, generator=step_generator(*key)).item()
             for key in ((0, 0), (0, 1), (1, 0), (0, 0, 1), (1, 1), (-1 + 2**62, 5))}
    assert len(drawn) == 6


def test_learning_rate() -> None:
    config = RunConfig(steps=100, warmup_steps=10, decay="cosine")
    assert learning_rate(config, 0) == 0.1
    assert learning_rate(config, 9) == learning_rate(config, 10) == 1
    assert learning_rate(config, 55) == pytest.approx(0.5)
    assert learning_rate(config, 99) < 0.001
    constant = dataclasses.replace(config, decay="constant")
    assert [learning_rate(constant, step) for step in (10, 99)] == [1, 1]
    trapezoid = dataclasses.replace(config, decay="trapezoid")
    assert [learning_rate(trapezoid, step) for step in (5, 10, 79, 80, 90)] == pytest.approx([0.6, 1, 1, 1, 0.5])
    assert learning_rate(dataclasses.replace(config, warmup_steps=0), 0) == 1


@pytest.mark.parametrize(("field", "value"), [
    ("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", math.nan), ("ema", 1.0), ("clip", -1.0),
    ("decay", "cosin"), ("optimizer", "mun"), ("precision", "fp8"), ("seed", -1), ("checkpoint_every", 0),
    ("warmup_steps", -1)])
def test_bad_settings(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        RunConfig(**{field: value})


@pytest.mark.parametrize("schedule", ["arccos", "square", 3.0])
def test_masks(schedule: str | float) -> None:
    """The share masked follows mask_ratio of a uniform number, and every picture has at least one."""
    mask = draw_mask(4000, 64, schedule, torch.Generator().manual_seed(0))
    share = mask.float().mean(1).sort().values
    uniform = (torch.arange(4000) + 0.5) / 4000
    expected = mask_ratio(schedule, uniform).sort().values
    assert float((share - expected).abs().mean()) < 0.03
    assert int(mask.sum(1).min()) >= 1
    positions = mask.float().mean(0)
    assert float(positions.max() - positions.min()) < 0.06  # no place is favoured


def test_masked_loss_is_the_mean_over_what_is_hidden(make_model: Callable) -> None:
    model = make_model("class")
    tokens = torch.randint(13, (3, 24), generator=torch.Generator().manual_seed(0))
    mask = draw_mask(3, 24, "arccos", torch.Generator().manual_seed(1))
    prepared = model.prepare(torch.tensor([0, 1, 2]))
    logits = model.logits(model.encode(tokens.masked_fill(mask, 13), prepared), prepared)
    each = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(masked_loss(model, tokens, mask, prepared), each[mask].mean())
    torch.testing.assert_close(masked_loss(model, tokens, mask, prepared, "all"), each.mean())


def test_objective_checks() -> None:
    with pytest.raises(UnknownName, match="unknown schedule 'arcos': did you mean arccos"):
        MaskObjective("arcos")
    with pytest.raises(ValueError, match="loss_on"):
        MaskObjective(loss_on="some")
    with pytest.raises(ValueError, match="condition_dropout"):
        MaskObjective(condition_dropout=1.0)


def test_pictures_on_a_background() -> None:
    rgba = shapes(2)
    white = on_background(rgba, torch.ones(2, 3))
    assert (white.shape, float(white[0, 0, 0, 0])) == ((2, 3, 16, 16), 1.0)
    red = on_background(rgba, torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
    assert red[:, :, 0, 0].tolist() == [[1, -1, -1], [-1, -1, -1]]
    assert torch.equal(red[0, :, 8, 8], white[0, :, 8, 8])
    torch.testing.assert_close(psnr(white, white.clamp(-1, 0.98)).min(), torch.tensor(40.0), atol=3, rtol=0)
    assert float(psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2))) == pytest.approx(20)


# --- recipes ------------------------------------------------------------------------------------------


def test_a_recipe_file_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text(json.dumps({"label_field": "class", "transformer": {"width": 64, "heads": 2},
                                "run": {"steps": 7, "batch_size": 3}, "sampler": {"guidance_scale": [1, 3]}}))
    recipe = choose_recipe(RECIPES, "emoji-class", path, {"run": {"steps": 9, "seed": None}})
    base = RECIPES["emoji-class"]()
    assert recipe == dataclasses.replace(
        base, label_field="class", transformer=dataclasses.replace(base.transformer, width=64, heads=2),
        run=dataclasses.replace(base.run, steps=9, batch_size=3),
        sampler=dataclasses.replace(base.sampler, guidance_scale=(1, 3)))
    for name in RECIPES:
        assert choose_recipe(RECIPES, name, None, {}) == RECIPES[name]()
    whole = dataclasses.asdict(recipe)  # what a run leaves in recipe.json gives the same recipe on any preset
    path.write_text(json.dumps(whole))
    assert choose_recipe(RECIPES, "paper-text", path, {}) == recipe


@pytest.mark.parametrize(("content", "message"), [
    ({"transfromer": {}}, "'transfromer' is unknown: did you mean transformer"), ([], "a recipe is a JSON object"),
    ({"run": {"step": 3}}, "'run.step' is unknown: did you mean steps"), ({"run": {"steps": "x"}}, "must be int"),
    ({"run": {"steps": 0}}, "steps must be at least 1"), ({"label_field": ""}, "needs label_field"),
    ({"objective": {"schedule": "arcos"}}, "did you mean arccos"), ({"run": 3}, "field 'run' must be RunConfig")])
def test_damaged_recipes(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "my.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        choose_recipe(RECIPES, "emoji-class", tmp_path / "my.json", {})


def test_unknown_presets() -> None:
    with pytest.raises(UnknownName, match="unknown preset 'emojis': did you mean emoji"):
        choose_recipe(RECIPES, "emojis", None, {})
    with pytest.raises(ValueError, match="image_size must be a multiple of the 8 pixels"):
        dataclasses.replace(TOKENIZER_RECIPES["emoji"](), image_size=60)


# --- Muon ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (16, 90), (90, 16), (64, 48)])
def test_orthogonalise_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    """Against the singular value decomposition: U S V -> U f(S) V, where f is the quintic of Jordan et al. applied five
    times to every singular value, which brings them all near 1."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    moved = values / values.norm()
    for _ in range(5):
        moved = 3.4445 * moved - 4.7750 * moved**3 + 2.0315 * moved**5
    expected = u @ torch.diag(moved) @ v
    torch.testing.assert_close(orthogonalise(matrix), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(orthogonalise(matrix.float()).double(), expected, rtol=0, atol=2e-4)
    assert orthogonalise(torch.zeros(shape)).abs().max() == 0


def test_muon_agrees_with_pytorch_s() -> None:
    """torch.optim.Muon, with its scale for AdamW's rates, takes the same steps up to its bfloat16."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(24, 40, generator=generator), torch.randn(5, 24, 40, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [Muon([ours], 0.02, weight_decay=0.1),
                  torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1,
                                   adjust_lr_fn="match_rms_adamw")]
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_muon_takes_hidden_matrices() -> None:
    """Not embeddings, gains, biases, nor what has fewer than 16 rows or columns (a picture's three channels)."""
    network = nn.ModuleDict({"words": nn.Embedding(50, 32), "linear": nn.Linear(32, 64), "norm": nn.LayerNorm(32),
                             "colours": nn.Conv2d(16, 3, 3), "hidden": nn.Conv2d(16, 20, 3)})
    names = {id(p): name for name, p in network.named_parameters()}
    assert [names[id(p)] for p in muon_parameters(network)] == ["linear.weight", "hidden.weight"]
    network.requires_grad_(False)
    assert not muon_parameters(network)


# --- golden losses ------------------------------------------------------------------------------------


def golden_task(name: str, folder: Path) -> tuple[TokenizerTask | TransformerTask, RunConfig]:
    """Ten steps of a preset: its own optimiser and objective on a few pictures; the paper's networks narrowed."""
    brief = {"steps": 10, "batch_size": 4, "warmup_steps": 3, "log_every": 1, "checkpoint_every": 10,
             "sample_every": 10, "threads": 1}
    if name in ("tokenizer", "emoji-decoder"):
        recipe = TOKENIZER_RECIPES["emoji" if name == "tokenizer" else name]()
        objective = dataclasses.replace(recipe.objective, perceptual=0, unquantised_steps=5)
        recipe = dataclasses.replace(recipe, objective=objective, run=dataclasses.replace(recipe.run, **brief))
        start = None
        if recipe.objective.decoder_only:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                start = VQGAN(recipe.tokenizer)
        return tokenizer_task(recipe, 12, start), recipe.run
    recipe = RECIPES[name]()
    if name.startswith("paper"):
        shape = dataclasses.replace(recipe.transformer, grid=(8, 8), codebook_size=512, width=96, depth=3, heads=4,
                                    mlp=256, **({"text_dim": 24} if recipe.text_encoder else {}))
        recipe = dataclasses.replace(recipe, transformer=shape)
    recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, **brief))
    return transformer_task(folder / "tokens", recipe), recipe.run


def ten_losses(name: str, folder: Path) -> list[float]:
    threads = torch.get_num_threads()
    try:
        task, run = golden_task(name, folder)
        train(task, run, folder / "run", quiet=True)
    finally:
        torch.set_num_threads(threads)
    return metrics(folder / "run")


@pytest.mark.parametrize("name", GOLDEN)
def test_ten_steps_are_golden(name: str, tmp_path: Path) -> None:
    assert ten_losses(name, tmp_path) == pytest.approx(GOLDEN[name], rel=1e-3)


# --- learning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emoji", "emoji-class"])
def test_a_transformer_learns_its_few_pictures(name: str, tmp_path: Path) -> None:
    """Three pictures, one a class, with noise on a tenth of the tokens: the loss falls far below chance (ln 32 = 3.5),
    on pictures never shown too, and each class draws its own picture."""
    recipe = small(RECIPES[name](), steps=120, batch_size=16, learning_rate=4e-3, warmup_steps=5, ema=0.9,
                   log_every=10, checkpoint_every=1000, sample_every=1000)
    task = transformer_task(tmp_path / "tokens", recipe)
    out = train(task, recipe.run, tmp_path / "run", quiet=True)
    losses = metrics(tmp_path / "run")
    assert losses[0] > 2.5
    assert losses[-1] < 1.3
    assert metrics(tmp_path / "run", "loss_train")[-1] < 1.3
    assert metrics(tmp_path / "run", "loss_held-pair")[-1] < 1.5
    assert (tmp_path / "run" / "samples-0000120.png").is_file()
    if name == "emoji-class":
        pipe = Pipeline.from_pretrained(out)
        assert pipe.class_names == ["ant", "bee", "cat"]
        drawn = pipe(class_labels=["ant", "bee", "cat"], seed=0, temperature=0.0).tokens
        real = [task.data.tokens(torch.arange(i, 48, 3)).mode(dim=0).values for i in range(3)]
        assert (drawn == torch.stack(real)).float().mean() > 0.9


def test_a_tokenizer_learns_and_its_codebook_lives(tmp_path: Path) -> None:
    run = dataclasses.replace(SMALL_TOKENIZER.run, steps=150, batch_size=16, learning_rate=3e-3, log_every=10,
                              checkpoint_every=1000)
    objective = dataclasses.replace(SMALL_TOKENIZER.objective, unquantised_steps=30)
    task = tokenizer_task(dataclasses.replace(SMALL_TOKENIZER, run=run, objective=objective), n=64)
    folder = train(task, run, tmp_path, quiet=True)
    decibels = metrics(tmp_path, "psnr")
    assert decibels[-1] > decibels[0] + 4
    assert metrics(tmp_path, "codes_used")[-1] > 0.8
    assert metrics(tmp_path, "held_out_psnr")[-1] > decibels[0] + 3
    network = load_tokenizer(folder)
    assert network.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 4)
    assert read_json(folder / "config.json")["image_size"] == 16


def test_the_perceptual_loss_joins_late(tmp_path: Path) -> None:
    class Features:
        calls = pictures = 0

        def stages(self, images: Tensor) -> list[Tensor]:
            self.calls += 1
            self.pictures += len(images)
            return [images, images.square()]

    features = Features()
    objective = dataclasses.replace(SMALL_TOKENIZER.objective, perceptual=0.5, perceptual_from=0.75,
                                    perceptual_share=0.25)
    task = TokenizerTask(SMALL_TOKENIZER.tokenizer, objective, SMALL_TOKENIZER.run, shapes(20), shapes(4), features)
    train(task, SMALL_TOKENIZER.run, tmp_path, quiet=True)
    assert features.calls == 2 * 3  # fake and real on the last quarter of twelve steps
    assert features.pictures == 2 * 3 * 2  # a quarter of the eight pictures of a batch
    assert len(metrics(tmp_path, "perceptual")) == 3
    with pytest.raises(ValueError, match="needs a feature network"):
        TokenizerTask(SMALL_TOKENIZER.tokenizer, objective, SMALL_TOKENIZER.run, shapes(20), shapes(4), None)


def test_the_decoder_learns_on_alone(tmp_path: Path) -> None:
    """The tokens stay as they are to the last one, in the written folder too; the decoder gets better."""
    run = dataclasses.replace(SMALL_TOKENIZER.run, steps=60, log_every=10, checkpoint_every=100)
    first = load_tokenizer(train(tokenizer_task(dataclasses.replace(SMALL_TOKENIZER, run=run)), run, tmp_path / "first",
                                 quiet=True))
    objective = dataclasses.replace(SMALL_TOKENIZER.objective, decoder_only=True)
    task = TokenizerTask(first.config, objective, run, shapes(40, 16)[4:], shapes(40, 16)[:4], start=first)
    second = load_tokenizer(train(task, run, tmp_path / "second", quiet=True))
    pictures = on_background(shapes(40, 16), torch.ones(40, 3))
    tokens = first.encode(pictures)
    assert torch.equal(second.encode(pictures), tokens)
    better = psnr(second.decode(tokens), pictures).mean() - psnr(first.decode(tokens), pictures).mean()
    assert better > 0.3
    other = TokenizerTask(first.config, objective, run, shapes(40, 16)[4:], shapes(40, 16)[:4], start=second)
    with pytest.raises(UsageError, match="start = "):  # a run does not go on from another beginning
        train(other, run, tmp_path / "second", quiet=True)
    with pytest.raises(ValueError, match=r"perceptual_share must lie in \(0, 1\], got 0"):
        TokenizerObjective(perceptual_share=0)
    with pytest.raises(ValueError, match="decoder_only needs a trained tokenizer"):
        TokenizerTask(first.config, objective, run, shapes(8), shapes(4))


def test_training_may_start_from_a_tokenizer(tmp_path: Path) -> None:
    """It begins as good as that one is: quantised from the first step on, with its codebook."""
    run = dataclasses.replace(SMALL_TOKENIZER.run, steps=60, log_every=10, checkpoint_every=100)
    first = load_tokenizer(train(tokenizer_task(dataclasses.replace(SMALL_TOKENIZER, run=run)), run, tmp_path,
                                 quiet=True))
    pictures = shapes(40, 16)
    task = TokenizerTask(first.config, SMALL_TOKENIZER.objective, run, pictures[4:], pictures[:4], start=first)
    x = task.pictures(0)
    expected = psnr(first.decode(first.encode(x)), x).mean()
    assert task.loss(0)[1]["psnr"] == pytest.approx(float(expected), abs=1e-3)
    assert (task.model.quantize.codebook * first.quantize.codebook).sum(1).min() > 0.9


def test_training_may_start_from_a_model(tmp_path: Path) -> None:
    """Its first loss is that model's own; what does not fit it is refused in a line."""
    recipe = small(RECIPES["emoji-class"](), steps=30, batch_size=16, learning_rate=4e-3, warmup_steps=5, ema=0.9,
                   log_every=1, checkpoint_every=1000)
    first = train(transformer_task(tmp_path / "tokens", recipe), recipe.run, tmp_path / "first", quiet=True)
    tokenizer = first / "tokenizer"
    token_folder(tmp_path / "data", (4, 4), 32, tokenizer=tokenizer)
    again = dataclasses.replace(recipe, transformer=dataclasses.replace(recipe.transformer, width=96),
                                run=dataclasses.replace(recipe.run, steps=1, seed=1))
    second = run_train(tmp_path / "data", tokenizer, tmp_path / "second", again, quiet=True, start=str(first))
    model = Pipeline.from_pretrained(first).transformer
    assert Pipeline.from_pretrained(second).transformer.config == model.config
    task = transformer_task(tmp_path / "same", dataclasses.replace(recipe, run=again.run))
    task.model = model
    assert metrics(tmp_path / "second")[0] == pytest.approx(float(task.loss(0)[0].detach()), abs=1e-5)
    with pytest.raises(UsageError, match="start = "):  # a run does not go on from another beginning
        run_train(tmp_path / "data", tokenizer, tmp_path / "second", again, quiet=True, start=str(second))
    with pytest.raises(UsageError, match="is a class model, the recipe is for a text model"):
        run_train(tmp_path / "data", tokenizer, tmp_path / "third", small(RECIPES["emoji"]()), quiet=True,
                  start=str(first))
    token_folder(tmp_path / "other", (4, 4), 32, tokenizer=tokenizer, names=["ant", "bee", "dog"])
    with pytest.raises(UsageError, match="its classes are not those of"):
        run_train(tmp_path / "other", tokenizer, tmp_path / "third", recipe, quiet=True, start=str(first))
    token_folder(tmp_path / "wide", (4, 8), 32, tokenizer=tokenizer)
    with pytest.raises(UsageError, match=r"4x8 tokens a picture, and .* draws 4x4"):
        run_train(tmp_path / "wide", tokenizer, tmp_path / "third", recipe, quiet=True, start=str(first))
    foreign = Pipeline.from_pretrained(first)
    foreign.tokenizer.quantize.embedding.weight.mul_(-1)
    foreign.save_pretrained(tmp_path / "foreign")
    with pytest.raises(UsageError, match="reads the tokens of another tokenizer"):
        run_train(tmp_path / "data", tokenizer, tmp_path / "third", recipe, quiet=True, start=str(tmp_path / "foreign"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.json").write_text('{"label_field": "subgroup"}')
    with pytest.raises(UsageError, match=r"recipe\.json exists and is another recipe"):
        run_train(tmp_path / "data", tokenizer, tmp_path / "mine", recipe, quiet=True)
    assert (tmp_path / "mine" / "recipe.json").read_text() == '{"label_field": "subgroup"}'
    (tmp_path / "mine" / "recipe.json").rename(tmp_path / "mine" / "model")
    with pytest.raises(UsageError, match="model exists, of no run that could go on"):
        run_train(tmp_path / "data", tokenizer, tmp_path / "mine", recipe, quiet=True)
    with pytest.raises(UsageError, match="is a file: --out is a folder"):
        run_train(tmp_path / "data", tokenizer, tmp_path / "mine" / "model", recipe, quiet=True)
    assert not (tmp_path / "third").exists()


# --- resuming -----------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for a crash."""


def interrupt(task: Any, at: int, what: Callable[[], None]) -> Any:
    """The task, which does `what` when it comes to step `at`."""
    original = task.loss

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == at:
            what()
        return original(step)

    task.loss = loss
    return task


def crash() -> None:
    raise Stop


def weights(folder: Path) -> bytes:
    return next(folder.glob("*.safetensors")).read_bytes()


def task_maker(kind: str, folder: Path) -> tuple[Callable[[], Any], RunConfig]:
    if kind == "tokenizer":
        return lambda: tokenizer_task(SMALL_TOKENIZER), SMALL_TOKENIZER.run
    precision = "bf16" if kind == "paper-text" else "float32"
    recipe = small(RECIPES[kind](), steps=12, batch_size=8, warmup_steps=2, checkpoint_every=3, sample_every=7,
                   log_every=1, precision=precision)
    return lambda: transformer_task(folder / "tokens", recipe), recipe.run


@pytest.mark.parametrize("kind", ["tokenizer", "emoji", "emoji-class", "paper-class", "paper-text"])
def test_a_crash_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Crashed after 5 steps (the last state is of step 3) and after 10, the run ends with the same bits and log."""
    make, run = task_maker(kind, tmp_path)
    whole = train(make(), run, tmp_path / "whole", quiet=True)
    for at in (5, 10):
        with pytest.raises(Stop):
            train(interrupt(make(), at, crash), run, tmp_path / "crashed", quiet=True)
        assert (tmp_path / "crashed" / "model").exists() == (at > run.sample_every)
    assert len(metrics(tmp_path / "crashed")) == 10
    resumed = train(make(), run, tmp_path / "crashed", quiet=True)
    assert weights(resumed) == weights(whole)
    assert metrics(tmp_path / "crashed") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "crashed", "step") == metrics(tmp_path / "whole", "step")
    again = train(make(), run, tmp_path / "crashed", quiet=True)  # a finished run has nothing left to do
    assert weights(again) == weights(whole)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_signals_save_the_state(number: int, error: type[BaseException], tmp_path: Path,
                                capsys: pytest.CaptureFixture) -> None:
    make, run = task_maker("emoji-class", tmp_path)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error) as caught:
        train(interrupt(make(), 4, lambda: os.kill(os.getpid(), number)), run, tmp_path / "run", quiet=True)
    assert getattr(caught.value, "code", 143) == 143
    assert read_tensors(tmp_path / "run" / "state.safetensors")[1]["step"] == "5"  # the step under way is finished
    assert "stopped at step 5; the same command goes on from there" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    resumed = train(make(), run, tmp_path / "run", quiet=True)
    assert "going on from step 5" in capsys.readouterr().err
    assert weights(resumed) == weights(train(make(), run, tmp_path / "whole", quiet=True))


def test_other_settings_are_refused(tmp_path: Path) -> None:
    make, run = task_maker("emoji-class", tmp_path)
    with pytest.raises(Stop):
        train(interrupt(make(), 11, crash), run, tmp_path / "run", quiet=True)
    state = (tmp_path / "run" / "state.safetensors").read_bytes()
    for change in ({"learning_rate": 0.5}, {"seed": 1}, {"batch_size": 4}):
        name, value = next(iter(change.items()))
        with pytest.raises(UsageError, match=f"{name} = .*, this command asks for {value}: give another --out"):
            train(make(), dataclasses.replace(run, **change), tmp_path / "run", quiet=True)
    task = make()
    task.objective = dataclasses.replace(task.objective, condition_dropout=0.2)
    with pytest.raises(UsageError, match="objective = "):
        train(task, run, tmp_path / "run", quiet=True)
    task = make()
    task.condition = dataclasses.replace(task.condition, labels=task.condition.labels.flip(0))
    with pytest.raises(UsageError, match="labels = "):
        train(task, run, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == state
    other = dataclasses.replace(run, log_every=2, checkpoint_every=5, threads=1)  # what changes no weight may change
    train(make(), other, tmp_path / "run", quiet=True)


def test_a_damaged_state_is_noticed(tmp_path: Path) -> None:
    make, run = task_maker("emoji-class", tmp_path)
    with pytest.raises(Stop):
        train(interrupt(make(), 4, crash), run, tmp_path / "run", quiet=True)
    path = tmp_path / "run" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"state\.safetensors: damaged: delete it to begin anew"):
        train(make(), run, tmp_path / "run", quiet=True)
    path.unlink()
    train(make(), run, tmp_path / "run", quiet=True)
    train(make(), run, tmp_path / "whole", quiet=True)
    assert metrics(tmp_path / "run", "step") == metrics(tmp_path / "whole", "step")  # nothing of the lost run is left


def test_what_a_killed_run_leaves_is_cleared(tmp_path: Path) -> None:
    make, run = task_maker("emoji-class", tmp_path)
    out = tmp_path / "run"
    with pytest.raises(Stop):
        train(interrupt(make(), 5, crash), run, out, quiet=True)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    (out / ".state.safetensors.123.tmp").write_bytes(b"half")
    (out / ".samples-0000007.png.123.tmp").write_bytes(b"half")
    (out / ".model.123.old").mkdir()
    (out / ".model.123.old" / "config.json").write_text("{}")
    train(make(), run, out, quiet=True)
    assert metrics(out, "step") == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12, 12]  # steps 7 and 12 drew samples too
    assert not list(out.glob(".*"))


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(3, 3))


class LineTask:
    """The least a task can be; its loss turns to NaN, or only its gradient, at step 5 where it is `bad`."""

    def __init__(self, bad: str = "") -> None:
        self.model, self.bad = Line(), bad

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        loss = self.model.slope.square().mean()
        if step == 5 and self.bad:
            loss = loss * math.nan if self.bad == "loss" else loss + (self.model.slope * 0).sqrt().sum()
        return loss, {}

    def extra_state(self) -> dict[str, Tensor]:
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        pass

    def sample(self, model: nn.Module, path: Path) -> dict[str, float]:
        path.touch()
        return {}

    def save(self, model: nn.Module, folder: Path, step: int) -> None:
        folder.mkdir(exist_ok=True)

    def describe(self) -> dict[str, Any]:
        return {"pictures": 0}


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_nan_stops_the_run(bad: str, tmp_path: Path) -> None:
    run = RunConfig(steps=10, checkpoint_every=1, log_every=1, warmup_steps=0, ema=0.9)
    with pytest.raises(FloatingPointError, match=r"step 5: the loss is .*nan.*: lower the learning rate; the last"):
        train(LineTask(bad), run, tmp_path, quiet=True)
    tensors, metadata = read_tensors(tmp_path / "state.safetensors")
    assert metadata["step"] == "5"
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert not (tmp_path / "model").exists()


def rates(out: Path, steps: int, **changes: Any) -> list[float]:
    run = RunConfig(steps=steps, learning_rate=1.0, warmup_steps=0, decay="trapezoid", checkpoint_every=1, log_every=1)
    train(LineTask(), dataclasses.replace(run, **changes), out, quiet=True)
    return metrics(out, "learning_rate")


def test_a_trapezoid_grows_at_its_plateau_and_at_its_end(tmp_path: Path) -> None:
    task = LineTask()
    task.loss = lambda step, loss=task.loss: crash() if step == 7 else loss(step)  # type: ignore[method-assign,misc]
    with pytest.raises(Stop):
        train(task, RunConfig(steps=10, learning_rate=1.0, warmup_steps=0, decay="trapezoid", checkpoint_every=1,
                              log_every=1), tmp_path, quiet=True)
    assert rates(tmp_path, 15) == pytest.approx([1] * 13 + [2 / 3, 1 / 3])  # the steps done are those of 15
    assert rates(tmp_path, 25) == pytest.approx([1] * 13 + [2 / 3, 1 / 3] + [1] * 6 + [0.8, 0.6, 0.4, 0.2])
    for steps, changes in ((20, {}), (30, {"decay": "cosine"})):
        with pytest.raises(UsageError, match="this command asks for"):
            rates(tmp_path, steps, **changes)


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    """The exponential average by its formula, from the weights after each step."""
    task, seen = LineTask(), []
    run = RunConfig(steps=5, learning_rate=0.1, warmup_steps=0, decay="constant", ema=0.8, checkpoint_every=1)

    def sample(model: nn.Module, path: Path) -> dict[str, float]:
        path.touch()
        seen.append((task.model.slope.detach().clone(), model.slope.detach().clone()))
        return {}

    task.sample = sample
    train(task, dataclasses.replace(run, sample_every=1), tmp_path, quiet=True)
    average = seen[0][0]  # the first step copies
    for weight, averaged in seen[1:]:
        average = 0.8 * average + 0.2 * weight
        torch.testing.assert_close(averaged, average)
    assert len(seen) == 5


def test_a_transformer_fits_its_tokens_and_its_data(tmp_path: Path) -> None:
    recipe = small(RECIPES["emoji-class"]())
    data = token_folder(tmp_path / "tokens", (4, 4), 16)
    names, labels = data.classes("subgroup")
    shape: TransformerConfig = recipe.transformer
    with pytest.raises(ValueError, match="16 codes do not fit a model of 4x4 and 32"):
        TransformerTask(shape, recipe.objective, recipe.run, data, Conditioning(tuple(names), labels),
                        tiny_tokenizer(16), Settings())


def test_training_touches_no_global_generator(tmp_path: Path, global_random_state_kept: None) -> None:
    for kind in ("tokenizer", "emoji"):
        make, run = task_maker(kind, tmp_path)
        train(make(), run, tmp_path / kind, quiet=True)


if __name__ == "__main__":
    import tempfile

    for preset in GOLDEN:
        with tempfile.TemporaryDirectory() as temporary:
            print(f'    "{preset}": {[round(x, 6) for x in ten_losses(preset, Path(temporary))]},', flush=True)
