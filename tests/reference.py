"""The slow obvious truth: what the library computes, written a second time straight from the paper and its public
layout, for every position and one number at a time, without any of the library's savings.

Only names of weights and settings come from the library.
"""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

# --- orders


def algorithm1(base: int, count: int) -> list[tuple[int, int]]:
    """Algorithm 1 of the paper, line by line: points as (numerator, denominator)."""
    n, d = 0, 1
    points = []
    for _ in range(count):
        x = d - n
        if x == 1:
            n = 1
            d = d * base
        else:
            y = d // base
            while y >= x:
                y = y // base
            n = (base + 1) * y - x
        points.append((n, d))
    return points


def van_der_corput(index: int, base: int) -> Fraction:
    """The radical inverse: digits of `index` mirrored at the radix point."""
    value, weight = Fraction(0), Fraction(1, base)
    while index:
        index, digit = divmod(index, base)
        value += digit * weight
        weight /= base
    return value


# --- schedules


def curve(schedule: str | float, t: float) -> float:
    """Share known at time t; a number is a power."""
    named = {"arccos": lambda: 1 - math.acos(t) / (math.pi / 2), "square": lambda: t * t,
             "cosine": lambda: 1 - math.cos(math.pi / 2 * t), "linear": lambda: t, "root": lambda: math.sqrt(t)}
    return named[schedule]() if schedule in named else math.pow(t, float(schedule))


# --- transformers, dense, in the public layout


def _rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Projected (B, P, inner) -> (B, P, inner), head by head."""
    size = q.shape[-1] // heads
    parts = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size), -1)
        parts.append(weights @ v[..., part])
    return torch.cat(parts, -1)


def _patches(x: Tensor, w: dict[str, Tensor], grid: tuple[int, int], patch: int) -> Tensor:
    """(B, N, D) -> (B, P, D): a stride-`patch` convolution, patch by patch."""
    if patch == 1:
        return x
    x = x.view(len(x), *grid, -1)
    return torch.stack([torch.einsum("bijc,ocij->bo", x[:, r:r + patch, s:s + patch], w["patch_in.weight"])
                        for r in range(0, grid[0], patch) for s in range(0, grid[1], patch)], dim=1)


def _unpatch(x: Tensor, w: dict[str, Tensor], grid: tuple[int, int], patch: int) -> Tensor:
    """(B, P, D) -> (B, N, D): a 1x1 convolution whose channels are (D, row, column), laid out on the grid."""
    if patch == 1:
        return x
    rows, columns = grid[0] // patch, grid[1] // patch
    channels = (x @ w["patch_out.weight"].T).view(len(x), rows, columns, -1).permute(0, 3, 1, 2)
    return F.pixel_shuffle(channels, patch).flatten(2).transpose(1, 2)


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _layer_norm(x: Tensor, w: dict[str, Tensor], name: str, eps: float = 1e-6) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _self_attention(x: Tensor, context: Tensor, w: dict[str, Tensor], name: str, heads: int, norm: bool) -> Tensor:
    q, k, v = _linear(x, w, f"{name}.q"), _linear(context, w, f"{name}.k"), _linear(context, w, f"{name}.v")
    if norm:
        q, k = _rms(q), _rms(k)
    return _linear(_attention(q, k, v, heads), w, f"{name}.out")


def _mlp(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    x = _linear(x, w, f"{name}.up")
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return _linear(x, w, f"{name}.down")


def class_logits(model: torch.nn.Module, tokens: Tensor, labels: Tensor, null: Tensor | None = None) -> Tensor:
    """tokens (B, N), labels (B,) -> (B, N, V) of the class transformer."""
    c, w = model.config, dict(model.named_parameters())
    if null is not None:
        labels = torch.tensor([c.classes if drop else label for label, drop in zip(labels, null, strict=True)])
    y = w["class_embedding.weight"][labels]
    y = y * torch.sigmoid(y)
    x = w["token_embedding.weight"][tokens] + w["position_embedding"]
    x = _patches(x, w, c.grid, c.patch)
    count = x.shape[1]
    if c.registers:
        x = torch.cat([x, w["registers"].expand(len(x), -1, -1)], 1)
    for i in range(c.depth):
        b = f"blocks.{i}"
        g1, b1, a1, g2, b2, a2 = (m[:, None] for m in _linear(y, w, f"{b}.modulation").chunk(6, -1))
        h = _rms(x) * w[f"{b}.norm1.weight"] * (1 + b1) + g1
        x = x + a1 * _self_attention(h, h, w, f"{b}.attention", c.heads, norm=True)
        h = _rms(x) * w[f"{b}.norm2.weight"] * (1 + b2) + g2
        gate = _linear(h, w, f"{b}.feed_forward.w1")
        x = x + a2 * _linear(gate * torch.sigmoid(gate) * _linear(h, w, f"{b}.feed_forward.w3"), w,
                             f"{b}.feed_forward.w2")
    x = _unpatch(x[:, :count], w, c.grid, c.patch)
    shift, scale = (m[:, None] for m in _linear(y, w, "final_modulation").chunk(2, -1))
    x = (_rms(x) * w["final_norm.weight"] + w["final_norm.bias"]) * (1 + scale) + shift
    return (x @ w["token_embedding.weight"].T + w["head_bias"])[..., :c.codebook_size]


def text_logits(model: torch.nn.Module, tokens: Tensor, text: Tensor, null: Tensor | None = None) -> Tensor:
    """tokens (B, N), text (B, T, Dt) -> (B, N, V) of the text transformer."""
    c, w = model.config, dict(model.named_parameters())
    if null is not None:
        text = torch.stack([torch.zeros_like(t) if drop else t for t, drop in zip(text, null, strict=True)])
    if c.text_depth:
        text = _linear(text, w, "text_in") + w["text_position"]
        for i in range(c.text_depth):
            b = f"text_encoder.{i}"
            h = _layer_norm(text, w, f"{b}.norm1")
            text = text + _self_attention(h, h, w, f"{b}.attention", c.heads, norm=False)
            text = text + _mlp(_layer_norm(text, w, f"{b}.norm2"), w, f"{b}.feed_forward")
    x = _layer_norm(w["token_embedding.weight"][tokens] + w["position_embedding"], w, "first_norm")
    x = _patches(x, w, c.grid, c.patch)
    for i in range(c.depth):
        b = f"blocks.{i}"
        context = _layer_norm(_linear(text, w, f"{b}.text_in"), w, f"{b}.text_norm", eps=1e-5)
        h = _layer_norm(x, w, f"{b}.norm1")
        x = x + _self_attention(h, h, w, f"{b}.attention", c.heads, norm=False)
        x = x + _self_attention(_layer_norm(x, w, f"{b}.norm2"), context, w, f"{b}.cross_attention", c.heads,
                                norm=False)
        x = x + _mlp(_layer_norm(x, w, f"{b}.norm3"), w, f"{b}.feed_forward")
    x = _layer_norm(_unpatch(x, w, c.grid, c.patch), w, "final_norm")
    return (x @ w["token_embedding.weight"].T + w["head_bias"])[..., :c.codebook_size]


def dense_logits(model: torch.nn.Module, tokens: Tensor, condition: Tensor, null: Tensor | None = None) -> Tensor:
    """(B, N, V) of either transformer."""
    return (class_logits if model.config.condition == "class" else text_logits)(model, tokens, condition, null)


# --- the sampler


def slow_sample(logits_of, order: list[int] | None, n: int, codes: int, uniform: list[float], counts: list[int], *,
                guidance: list[float], temperature: list[float], top_k: int = 0, top_p: float = 1.0,
                noise: list[list[float]] | None = None, r_temp: float = 0.0, known: list[int] | None = None,
                stop_after: int | None = None) -> list[list[int]]:
    """One image by plain Python: logits of all positions at every step, every masked position drawn, some kept.

    logits_of(tokens, conditional) -> N lists of V numbers. order: None chooses by confidence with `noise` (steps, N).
    guidance, temperature: one number a step. Returns the tokens after each step, `codes` being the mask.
    """
    tokens = list(known) if known else [codes] * n
    order = order and [p for p in order if tokens[p] == codes]
    history = []
    for step, count in enumerate(counts[:stop_after]):
        conditional = logits_of(tokens, True)
        unconditional = logits_of(tokens, False) if guidance[step] != 1 else conditional
        drawn, score = {}, {}
        for p in (p for p in range(n) if tokens[p] == codes):
            logits = [u + guidance[step] * (c - u) for c, u in zip(conditional[p], unconditional[p], strict=True)]
            drawn[p], confidence = slow_draw(logits, uniform[p], temperature[step], top_k, top_p)
            if noise is not None:
                fade = r_temp * (1 - (step + 1) / len(counts))
                score[p] = confidence - fade * math.log(-math.log(noise[step][p]))
        if stop_after is not None and step + 1 == stop_after:
            reveal = list(drawn)
        elif order is None:
            reveal = sorted(drawn, key=score.__getitem__, reverse=True)[:count]
        else:
            reveal, order = order[:count], order[count:]
        for p in reveal:
            tokens[p] = drawn[p]
        history.append(list(tokens))
    return history


def slow_probabilities(logits: list[float], temperature: float, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """Softmax at a temperature > 0, then the top_k likeliest, then the fewest of these that hold top_p of what is
    left, renormalised."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda j: -weights[j])
    if top_k:
        ranked = ranked[:top_k]
    total, held, kept = sum(weights[j] for j in ranked), 0.0, set()
    for j in ranked:
        if held < top_p or top_p == 1:
            kept.add(j)
            held += weights[j] / total
    total = sum(weights[j] for j in kept)
    return [weights[j] / total if j in kept else 0.0 for j in range(len(logits))]


def slow_draw(logits: list[float], uniform: float, temperature: float, top_k: int, top_p: float) -> tuple[int, float]:
    """(token, its log-probability): the first token at which the running sum of probabilities exceeds `uniform`."""
    if temperature == 0:
        token = max(range(len(logits)), key=logits.__getitem__)
        return token, math.log(slow_probabilities(logits, 1.0)[token])
    probabilities, held = slow_probabilities(logits, temperature, top_k, top_p), 0.0
    for token, p in enumerate(probabilities):
        held += p
        if held > uniform:
            return token, math.log(p)
    raise AssertionError("uniform must be below 1")
