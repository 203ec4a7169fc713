"""How fast the sampler is, as ratios within one run: positions-only against dense, prepared against not, bf16 against
float32, by batch size and model size, and where the time goes.

    python benchmarks/sampling.py --models emoji class-t-256 --out benchmarks/sampling.json
    python benchmarks/sampling.py --cost --models class-xl-2 class-l-384 --steps 32

--cost draws one picture in a process of its own and adds the peak memory, in float32 and in bf16. The floor is the time
that the multiplications of a picture would take at the rate of a large float32 matrix product in the same run.

The variants of one model are timed in turn, A B C A B C ..., and the medians compared, so that a drift of the
machine's speed touches all alike. Networks named after a published size have random weights: their speed does not
depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from unmask.models.presets import TRANSFORMERS, build
from unmask.models.transformer import ClassTransformer, MaskedTransformer, TextTransformer
from unmask.pipeline import EMBEDDED, Pipeline, load_model
from unmask.sampling import Prepare, Settings, draw, generate, prepare_labels, prepare_text
from unmask.tokenizers.vqgan import VQGAN


class Dense:
    """The same model with logits of all positions at every step and a draw from all of them, as in the public code;
    the sampler takes those it needs from them."""

    def __init__(self, model: MaskedTransformer, batch: int) -> None:
        self.model, self.config, self.batch = model, model.config, batch

    def encode(self, tokens: torch.Tensor, prepared: object) -> torch.Tensor:
        return self.model.encode(tokens, prepared)  # type: ignore[arg-type]

    def logits(self, hidden: torch.Tensor, prepared: object, positions: torch.Tensor | None = None) -> torch.Tensor:
        dense = self.model.logits(hidden, prepared)  # type: ignore[arg-type]
        guided = dense[: self.batch]  # the mix with the unconditional rows is left out: a pass over the logits
        draw(guided, torch.rand(guided.shape[:2]), 1.0)
        assert positions is not None
        return dense.gather(1, positions[..., None].expand(-1, -1, dense.shape[-1]))


class Unprepared:
    """The same model with everything that depends on the condition alone computed again at every step."""

    def __init__(self, model: MaskedTransformer, condition: Callable[[], Prepare]) -> None:
        self.model, self.config, self.condition = model, model.config, condition

    def encode(self, tokens: torch.Tensor, prepared: object) -> torch.Tensor:
        self.prepared = self.condition()(slice(None), len(tokens) > self.batch)
        return self.model.encode(tokens, self.prepared)

    def logits(self, hidden: torch.Tensor, prepared: object, positions: torch.Tensor | None = None) -> torch.Tensor:
        return self.model.logits(hidden, self.prepared, positions)

    batch = 1


def load(name: str, dtype: torch.dtype) -> MaskedTransformer:
    model = load_model(name, dtype) if name in EMBEDDED else random_weights(name, dtype)
    assert isinstance(model, MaskedTransformer)
    return model


def random_weights(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The network with weights of `dtype` from the start: never twice the memory."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        return build(name).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def conditions(model: MaskedTransformer, batch: int) -> Prepare:
    dtype = model.head_bias.dtype
    if isinstance(model, ClassTransformer):
        return prepare_labels(model, torch.arange(batch) % model.config.classes)
    assert isinstance(model, TextTransformer)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(batch, model.config.text_length or 120, model.config.text_dim, generator=generator)
    return prepare_text(model, text.to(dtype))


def variants(name: str, batch: int, settings: Settings, with_bf16: bool) -> dict[str, Callable[[], object]]:
    """What is timed: the name of each variant and a function that draws one batch with it."""
    model = load(name, torch.float32)
    seeds = list(range(batch))
    unprepared = Unprepared(model, lambda: conditions(model, batch))
    unprepared.batch = batch
    timed: dict[str, Callable[[], object]] = {
        "positions-only": lambda: generate(model, conditions(model, batch), seeds, settings),
        "dense": lambda: generate(Dense(model, batch), conditions(model, batch), seeds, settings),
        "not prepared": lambda: generate(unprepared, conditions(model, batch), seeds, settings),
    }
    if batch > 1:
        timed["one by one"] = lambda: generate(model, conditions(model, batch), seeds, settings, chunk=1)
    if with_bf16:
        half = load(name, torch.bfloat16)
        timed["bf16"] = lambda: generate(half, conditions(half, batch), seeds, settings)
    return timed


def interleaved(timed: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(repeats + 1):
        for name, run in timed.items():
            began = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_rate() -> float:
    """Floating-point operations a second of a large float32 matrix product: the median of five."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    a @ b
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / statistics.median(seconds)


def shares(name: str, model: MaskedTransformer, settings: Settings, warm: bool = True) -> dict[str, float]:
    """One picture's seconds, the shares of them in transformer blocks, head, draw and the rest of the loop, and
    decoding; and the floor, as a share too. warm: draw once before, unmeasured."""
    times = {"transformer": 0.0, "head": 0.0}

    class Timed:
        config = model.config

        def encode(self, tokens: torch.Tensor, prepared: object) -> torch.Tensor:
            began = time.perf_counter()
            hidden = model.encode(tokens, prepared)  # type: ignore[arg-type]
            times["transformer"] += time.perf_counter() - began
            return hidden

        def logits(self, hidden: torch.Tensor, prepared: object, positions: torch.Tensor | None = None) -> torch.Tensor:
            began = time.perf_counter()
            features = model.features(hidden, prepared, positions)  # type: ignore[arg-type]
            middle = time.perf_counter()
            size = model.config.codebook_size
            logits = torch.nn.functional.linear(features, model.token_embedding.weight[:size], model.head_bias[:size])
            times["transformer"] += middle - began
            times["head"] += time.perf_counter() - middle
            return logits.float()

    if name in EMBEDDED:
        tokenizer = Pipeline.from_pretrained(name).tokenizer
    else:
        network = random_weights("vq-ds16" if model.config.patch == 1 else "vq-ds8", model.head_bias.dtype)
        assert isinstance(network, VQGAN)
        tokenizer = network
        assert tokenizer.config.codebook_size == model.config.codebook_size
    prepare, grid = conditions(model, 1), model.config.grid
    operations = FlopCounterMode(display=False)  # counting costs small networks more time than they take themselves
    if warm:
        with operations:
            tokenizer.decode(generate(Timed(), prepare, [0], settings).view(1, *grid))
    times.update(transformer=0.0, head=0.0)
    with contextlib.nullcontext() if warm else operations:
        began = time.perf_counter()
        tokens = generate(Timed(), prepare, [0], settings)
        total = time.perf_counter() - began
        times["draw and loop"] = total - times["transformer"] - times["head"]
        began = time.perf_counter()
        tokenizer.decode(tokens.view(1, *grid))
        times["decode"] = time.perf_counter() - began
    whole = sum(times.values())
    return {"seconds": whole, **{part: value / whole for part, value in times.items()},
            "floor": operations.get_total_flops() / matmul_rate() / whole}


def in_words(parts: dict[str, float]) -> str:
    absolute = ("seconds", "weights_mib", "peak_mib")
    return ", ".join(f"{name} {value:.0%}" for name, value in parts.items() if name not in absolute)


def peak() -> float:
    """This process's peak memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_picture(name: str, settings: Settings, dtype: torch.dtype) -> dict[str, float]:
    """`shares` of the first picture this process draws, and in MiB how much its peak memory grew by loading the
    transformer and what it was in the end."""
    before = peak()
    model = load(name, dtype)
    grown = peak() - before
    parts = shares(name, model, settings, warm=False)
    return {**parts, "weights_mib": grown, "peak_mib": peak()}


def cost(name: str, settings: Settings, dtype: torch.dtype) -> dict[str, float]:
    """`one_picture` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(one_picture, name, settings, dtype).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["emoji", "emoji-class"], choices=[*EMBEDDED, *TRANSFORMERS])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-bf16", action="store_true", help="leave bf16 out, where the processor emulates it")
    parser.add_argument("--cost", action="store_true", help="one picture each, with its peak memory")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    settings = Settings(num_inference_steps=arguments.steps, guidance_scale=arguments.guidance_scale)
    report: dict[str, object] = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
                                 "torch": torch.__version__, "steps": arguments.steps, "models": {}}
    for name in arguments.models:
        rows: dict[object, object] = {}
        kinds = {"float32": torch.float32, **({} if arguments.no_bf16 else {"bf16": torch.bfloat16})}
        for kind, dtype in kinds.items() if arguments.cost else ():
            parts = cost(name, settings, dtype)
            rows[kind] = parts
            print(f"{name}, {kind}, one picture: {parts['seconds']:.1f} s, weights {parts['weights_mib']:.0f} MiB, "
                  f"peak {parts['peak_mib']:.0f} MiB; "
                  f"{in_words(parts)}", flush=True)
        if arguments.cost:
            report["models"][name] = rows  # type: ignore[index]
            continue
        for batch in arguments.batches:
            medians = interleaved(variants(name, batch, settings, not arguments.no_bf16), arguments.repeats)
            base = medians["positions-only"]
            rows[batch] = {"seconds_an_image": base / batch, **{f"{k} / positions-only": v / base
                                                                for k, v in medians.items() if k != "positions-only"}}
            print(f"{name}, batch {batch}: {base / batch * 1000:.0f} ms an image; " + ", ".join(
                f"{k} {v / base:.2f}x" for k, v in medians.items() if k != "positions-only"), flush=True)
        parts = shares(name, load(name, torch.float32), settings)
        print(f"{name}, one picture {parts['seconds'] * 1000:.0f} ms: {in_words(parts)}", flush=True)
        report["models"][name] = {"batches": rows, "shares": parts}  # type: ignore[index]
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
