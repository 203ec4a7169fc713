"""The training loop that tokenizers and transformers share: one process, resumable to the bit.

Everything random in a step is a pure function of (seed, step), so a run that was killed and started again by the same
command ends with the weights of a run that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..checkpoints import atomic_path, read_tensors, tensors_sha256, write_tensors
from ..errors import UsageError, unknown_name
from .muon import Muon, muon_parameters


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long and how to optimise; what is trained is the task's own matter.

    learning_rate: peak, after `warmup_steps` of linear rise; `decay` is "cosine" (to zero at `steps`), "trapezoid"
    (constant, then linear to zero over the last fifth: a run that has not come there can still be made longer or
    shorter, one that has ended longer, the rate rising to its peak and falling again) or "constant". optimizer:
    "adamw", or "muon" for the hidden matrices and AdamW for the rest at the same learning rate; weight decay acts on
    matrices, not on gains and biases. clip: largest norm of the gradient, 0 is off. ema: decay of the weight average,
    0 is off. precision: "float32" or "bf16" (autocast). threads: 0 leaves PyTorch's choice.
    """

    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay: str = "cosine"
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "float32"
    seed: int = 0
    checkpoint_every: int = 500
    sample_every: int = 2000
    log_every: int = 50
    threads: int = 0

    def __post_init__(self) -> None:
        choices = {"decay": ("cosine", "trapezoid", "constant"), "optimizer": ("adamw", "muon"),
                   "precision": ("float32", "bf16")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        for name in ("steps", "batch_size", "checkpoint_every", "sample_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "clip", "seed", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")


COOLDOWN = 0.2
"""Share of the steps in which the trapezoid's learning rate falls."""


class Task(Protocol):
    """What the loop trains."""

    @property
    def model(self) -> nn.Module: ...

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of the batch of this step, a pure function of (seed, step), and figures to log."""
        ...

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors beside the model and the optimizer that a resumed run needs."""
        ...

    def load_extra_state(self, state: dict[str, Tensor]) -> None: ...

    def sample(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Draws a grid from fixed seeds to `path`; returns figures to log."""
        ...

    def save(self, model: nn.Module, folder: Path, step: int) -> None:
        """Writes the model folder."""
        ...

    def describe(self) -> dict[str, Any]:
        """Settings that a resumed run must share, for the state file."""
        ...


def step_generator(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, step, purpose) alone."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + purpose * 0x94D049BB133111EB) & (2**64 - 1)
    mixed ^= mixed >> 31
    return torch.Generator().manual_seed((mixed * 0xD6E8FEB86659FD93) % (2**63))


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices (batch_size,) of step `step`: epoch after epoch, each a fresh permutation of n that depends on
    (seed, epoch) alone."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n
    parts = []
    for epoch in torch.unique(epochs).tolist():
        order = torch.randperm(n, generator=step_generator(seed, epoch, purpose=1))
        parts.append(order[positions[epochs == epoch] % n])
    return torch.cat(parts)


def learning_rate(config: RunConfig, step: int) -> float:
    """Factor of the peak learning rate at `step`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    if config.decay == "trapezoid":
        return min(1.0, (config.steps - step) / (COOLDOWN * config.steps))
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizers(model: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """Over all parameters that want a gradient: AdamW, or Muon and AdamW beside it."""
    muon = muon_parameters(model) if config.optimizer == "muon" else []
    taken = {id(p) for p in muon}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas, fused=True)]
    if muon:
        optimizers.append(Muon(muon, config.learning_rate, weight_decay=config.weight_decay))
    return optimizers


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": torch.as_tensor(value)
            for index, entry in state.items() for name, value in entry.items()}


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        like = parameters[int(index)]
        if value.shape == like.shape:  # in the parameter's memory format: the fused kernel walks both side by side
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class _Run:
    """The state of one run: what a checkpoint holds."""

    def __init__(self, task: Task, config: RunConfig, out: Path) -> None:
        self.task, self.config, self.out, self.step = task, config, out, 0
        self.optimizers = build_optimizers(task.model, config)
        self.average = (AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
                        if config.ema else None)
        fixed = {k: v for k, v in dataclasses.asdict(config).items()
                 if k not in ("checkpoint_every", "sample_every", "log_every", "threads")}
        self.description = json.loads(json.dumps({"run": fixed, "task": task.describe()}, default=str))

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are sampled from and shipped: the average where there is one."""
        return self.average.module if self.average else self.task.model

    def save(self) -> None:
        tensors = {f"model/{k}": v for k, v in self.task.model.state_dict().items()}
        if self.average:
            tensors |= {f"average/{k}": v for k, v in self.average.module.state_dict().items()}
            tensors["count"] = self.average.n_averaged
        for number, optimizer in enumerate(self.optimizers):
            tensors |= {f"optimizer/{number}/{k}": v for k, v in _flatten(optimizer).items()}
        tensors |= {f"extra/{k}": v for k, v in self.task.extra_state().items()}
        metadata = {"step": str(self.step), "settings": json.dumps(self.description),
                    "content_sha256": tensors_sha256(tensors)}
        write_tensors(self.out / "state.safetensors", {k: v.clone() for k, v in tensors.items()}, metadata)

    def resume(self) -> bool:
        """Takes up the state in `out`, if there is one; UsageError where it belongs to a run with other settings."""
        path = self.out / "state.safetensors"
        for name in (path.name, "model", "metrics.jsonl", "samples-*.png"):  # of a run killed while it wrote
            for stale in (*self.out.glob(f".{name}.*.tmp"), *self.out.glob(f".{name}.*.old")):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        if not path.exists():
            return False
        tensors, metadata = read_tensors(path)
        if metadata.get("content_sha256") not in (None, tensors_sha256(tensors)) or "settings" not in metadata:
            raise ValueError(f"{path}: damaged: delete it to begin anew")
        settings = json.loads(metadata["settings"])
        for section in ("run", "task"):
            for key, value in self.description[section].items():
                there = settings[section].get(key)
                if there != value and not (key == "steps" and self._movable(settings, metadata)):
                    raise UsageError(f"{path}: the run there has {key} = {there}, this command asks "
                                     f"for {value}: give another --out, or the same settings")

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.task.model.load_state_dict(part("model/"))
        if self.average:
            self.average.module.load_state_dict(part("average/"))
            self.average.n_averaged.copy_(tensors["count"])
        for number, optimizer in enumerate(self.optimizers):
            _unflatten(optimizer, part(f"optimizer/{number}/"))
        self.task.load_extra_state(part("extra/"))
        self.step = int(metadata["step"])
        return True

    def _movable(self, settings: dict[str, Any], metadata: Mapping[str, str]) -> bool:
        """Whether the number of steps may still change: the steps done do not depend on it, or the trapezoid has ended
        (after which a second one learns as well as a longer one would have: Wen et al., 2024)."""
        done, end = int(metadata["step"]), int(settings["run"]["steps"])
        if self.config.decay == "trapezoid":
            return done <= (1 - COOLDOWN) * min(end, self.config.steps) or done == end < self.config.steps
        return self.config.decay == "constant"

    def log(self, record: dict[str, Any]) -> None:
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def trim_log(self) -> None:
        """Drops the lines a run wrote after its last checkpoint: of one that was killed, or whose state is gone."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines()
                     if line.endswith("}") and json.loads(line)["step"] <= self.step]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _one_step(run: _Run) -> dict[str, Tensor | float]:
    config, model = run.config, run.task.model
    factor = learning_rate(config, run.step)
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = config.learning_rate * factor
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
        loss, figures = run.task.loss(run.step)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    if not (math.isfinite(loss.detach()) and math.isfinite(norm)):
        raise FloatingPointError(f"step {run.step}: the loss is {loss:.4g}, the norm of its gradient {norm:.4g}: lower "
                                 f"the learning rate; the last checkpoint in {run.out} is intact")
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if run.average:
        run.average.update_parameters(model)
    run.step += 1
    return {"loss": loss.detach(), "gradient_norm": norm.detach(), "learning_rate": config.learning_rate * factor,
            **figures}


def train(task: Task, config: RunConfig, out: Path, quiet: bool = False) -> Path:
    """Trains to `config.steps`, going on from `out/state.safetensors` where there is one.

    Writes `metrics.jsonl` and, every `config.sample_every` steps and at the end, a sample grid `samples-STEP.png` and
    the model folder `out/model`. An interrupt or a termination signal saves the state first, then raises
    KeyboardInterrupt or SystemExit(143). Returns the model folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    run = _Run(task, config, out)
    resumed = run.resume()
    run.trim_log()
    if resumed:
        print(f"going on from step {run.step} of {out}", file=sys.stderr)
    signals: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: signals.append(number))
                for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=config.steps, initial=run.step, disable=quiet or None, unit="step", mininterval=1.0)
    began, counted = time.perf_counter(), 0
    try:
        while run.step < config.steps and not signals:
            figures = _one_step(run)
            counted += 1
            bar.update()
            last = run.step == config.steps
            if run.step % config.log_every == 0 or last:
                record = {"step": run.step, **{k: float(v) for k, v in figures.items()},
                          "images_per_second": counted * config.batch_size / (time.perf_counter() - began)}
                run.log(record)
                bar.set_postfix(loss=f"{record['loss']:.3f}", images_per_s=f"{record['images_per_second']:.0f}")
            if run.step % config.sample_every == 0 or last:
                with atomic_path(out / f"samples-{run.step:07d}.png") as path:
                    run.log({"step": run.step, **task.sample(run.evaluated, path)})
                task.save(run.evaluated, out / "model", run.step)
                began, counted = time.perf_counter(), 0
            if run.step % config.checkpoint_every == 0 or last:
                run.save()
        if signals:
            run.save()
    finally:
        bar.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if signals:
        print(f"stopped at step {run.step}; the same command goes on from there", file=sys.stderr)
        if signals[0] == signal.SIGTERM:
            raise SystemExit(143)
        raise KeyboardInterrupt
    task.save(run.evaluated, out / "model", run.step)
    return out / "model"
