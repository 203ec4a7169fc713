"""Measures of generated pictures, from their features: FID, KID, Inception Score, precision, recall, density,
coverage, CLIP score and retrieval rank.

Formulae only: features come from `features`. Everything is computed in float64, and pairwise distances in
tiles, so that 50,000 x 2048 features need little more memory than they take themselves.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask.checkpoints import atomic_path, read_tensors, write_tensors
from unmask.evaluation.features import Extractor, read_pth, tensors_hash

TILE = 4096  # rows and columns of a tile of pairwise distances: 134 MB in float64
MAX_BYTES = 2**31 + 2**20  # of an array in a statistics file: the float64 covariance of 16,384 features
# Statistics published elsewhere do not say which extractor made them; these are the ones in use.
FOREIGN = {".npz": ("inception-v3@fid", "inception-v3@clean"), ".pt": ("inception-v3@halton",)}


class Estimate(NamedTuple):
    """A figure and its standard deviation over the subsets or splits it was taken from."""

    mean: float
    std: float


def _checked(features: Tensor, name: str = "features", dim: int | None = None) -> Tensor:
    """`features` as float64 (N,D), N >= 1, finite; ValueError with one line otherwise."""
    if features.ndim != 2 or features.shape[1] == 0 or dim not in (None, features.shape[1]):
        wanted = "(N,D)" if dim is None else f"(N,{dim})"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(features.shape)}")
    if len(features) == 0:
        raise ValueError(f"{name}: the set is empty")
    bad = (~torch.isfinite(features).all(1)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"{name}: {len(bad)} of {len(features)} rows hold NaN or infinity, the first is row {first}"
        )
    return features.detach().double()


def _pair(a: Tensor, b: Tensor, names: tuple[str, str] = ("real", "fake")) -> tuple[Tensor, Tensor]:
    """Both sets checked, of one width, on one device."""
    a = _checked(a, names[0])
    return a, _checked(b, names[1], a.shape[1]).to(a.device)


# --------------------------------------------------------------------------------------------------
# Statistics and FID


class Statistics:
    """Count, mean and covariance of features, gathered batch by batch in float64.

    Batches may come in any sizes and order and from any number of processes (`merge`): the result is equal to
    1e-9 relative. `extractor` and `hash` say whose features they are; others' are refused.

    Attributes:
        extractor, hash: name and weights' hash of the extractor.
        count: number of pictures; None in a file from elsewhere that does not say.
        mean: float64 (D,). scatter: float64 (D,D), the sum of outer products of features less their mean.
    """

    def __init__(self, extractor: str, hash: str, dim: int) -> None:
        self.extractor = extractor
        self.hash = hash
        self.count: int | None = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._root: Tensor | None = None

    @classmethod
    def of(cls, extractor: Extractor) -> Statistics:
        """Empty statistics for this extractor's features."""
        return cls(extractor.name, extractor.hash, extractor.dim)

    @property
    def dim(self) -> int:
        """Number of features D."""
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """float64 (D,D), divided by count - 1; needs two pictures."""
        if self.count is None:
            return self.scatter
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, have {self.count}")
        return self.scatter / (self.count - 1)

    @property
    def covariance_root(self) -> Tensor:
        """float64 (D,r), R with R R^T = covariance; kept until more is added, for many distances to one reference."""
        if self._root is None:
            self._root = _root(self.covariance)
        return self._root

    def update(self, features: Tensor) -> None:
        """Add features (B,D) of any dtype and device. Raises ValueError for a wrong shape or NaN."""
        batch = _checked(features, dim=self.dim).cpu()
        mean = batch.mean(0)
        centred = batch - mean
        self._add(len(batch), mean, centred.T @ centred)

    def merge(self, other: Statistics) -> None:
        """Add all that `other` has seen. Raises ValueError where it is another extractor's."""
        same_extractor(self, other)
        if other.count:
            self._add(other.count, other.mean, other.scatter)
        elif other.count is None:
            raise ValueError("statistics that do not say their number of pictures cannot be merged")

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        # Chan, Golub & LeVeque, 1979: sums about the mean, which do not cancel as raw sums do.
        if self.count is None:
            raise ValueError("statistics that do not say their number of pictures cannot be added to")
        self._root = None
        total = self.count + count
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def save(self, path: str | Path) -> None:
        """Write to `path`, atomically: .safetensors, or .npz that other FID tools read (`mu`, `sigma`)."""
        path = Path(path)
        if path.suffix == ".npz":
            said: dict[str, Any] = {"extractor": self.extractor, "hash": self.hash}
            if self.count is not None:
                said["count"] = str(self.count)
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, mu=self.mean.numpy(), sigma=self.covariance.numpy(), **said)
        elif path.suffix == ".safetensors":
            tensors = {"mean": self.mean, "scatter": self.scatter}
            count = "" if self.count is None else str(self.count)
            said = {"extractor": self.extractor, "hash": self.hash, "count": count}
            write_tensors(
                path, tensors, {"format": "unmask statistics 1", "data": tensors_hash(tensors)} | said
            )
        else:
            raise ValueError(f"{path}: statistics are written as .safetensors or .npz")

    @classmethod
    def load(cls, path: str | Path, extractor: Extractor | None = None) -> Statistics:
        """Read statistics written by `save`, ADM's npz (`mu`, `sigma`) or the published .pt (`mu`, `cov`).

        extractor: whose statistics are wanted. Needed for files from elsewhere, which do not say who made
        them: then it is recorded, provided that it is one such files come from (Inception-v3 with the resize
        their makers use; see `FOREIGN`).

        Raises FileNotFoundError, or ValueError in one line for damage, missing keys, wrong shapes and
        another extractor.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such statistics file")
        readers = {
            ".safetensors": _read_own,
            ".npz": _read_npz,
            ".pt": _read_published,
            ".pth": _read_published,
        }
        if path.suffix not in readers:
            raise ValueError(f"{path}: statistics are .safetensors, .npz or .pt files")
        mean, scatter, said = readers[path.suffix](path)
        _check_moments(path, mean, scatter)
        if "extractor" not in said:
            said |= _foreign_extractor(path, len(mean), extractor)
        statistics = cls(said["extractor"], said["hash"], 0)
        statistics.count = int(said["count"]) if said.get("count") else None
        statistics.mean, statistics.scatter = mean.double(), scatter.double()
        if path.suffix == ".npz" and statistics.count:
            statistics.scatter = statistics.scatter * (statistics.count - 1)
        if extractor is not None:
            same_extractor(statistics, extractor)
        return statistics


def same_extractor(a: Statistics | Extractor, b: Statistics | Extractor) -> None:
    """Raise ValueError naming both unless name, weights' hash and width of the two extractors agree."""
    names = [
        f"{x.extractor if isinstance(x, Statistics) else x.name} (weights {x.hash}, {x.dim} features)"
        for x in (a, b)
    ]
    if names[0] != names[1]:
        raise ValueError(f"figures of different extractors cannot be compared: {names[0]} and {names[1]}")


def _read_own(path: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    tensors, said = read_tensors(path)
    if said.get("format") != "unmask statistics 1" or set(tensors) != {"mean", "scatter"}:
        raise ValueError(f"{path}: not a statistics file")
    if said.get("data") != tensors_hash(tensors):
        raise ValueError(f"{path}: damaged (its hash does not fit): compute the statistics again")
    return tensors["mean"], tensors["scatter"], said


def _read_npz(path: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        # ADM's files hold pictures too: only what is asked for is read.
        wanted = [key for key in ("mu", "sigma", "extractor", "hash", "count") if key in sizes]
        if any(sizes[key] > MAX_BYTES for key in wanted):
            raise ValueError(f"more than {MAX_BYTES} bytes")
        with np.load(path, allow_pickle=False) as data:
            fields = {key: data[key] for key in wanted}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, MemoryError) as error:
        raise ValueError(f"{path}: not a readable npz file ({str(error).splitlines()[0]})") from None
    _require(path, fields, "mu", "sigma")
    for key in ("mu", "sigma"):
        if fields[key].dtype.kind != "f":
            raise ValueError(
                f"{path}: the field '{key}' holds {fields[key].dtype}, not floating-point numbers"
            )
    mean, sigma = (torch.from_numpy(fields[key].astype(np.float64)) for key in ("mu", "sigma"))
    return mean, sigma, {key: str(fields[key]) for key in wanted if key not in ("mu", "sigma")}


def _read_published(path: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes: not a statistics file")
    fields = read_pth(path)
    _require(path, fields, "mu", "cov")
    return fields["mu"], fields["cov"], {}


def _require(path: Path, fields: Mapping[Any, object], *names: str) -> None:
    for name in names:
        if name not in fields:
            raise ValueError(f"{path}: the field '{name}' is missing: not a statistics file")


def _check_moments(path: Path, mean: Tensor, scatter: Tensor) -> None:
    if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)) or len(mean) == 0:
        raise ValueError(
            f"{path}: mean {tuple(mean.shape)} and covariance {tuple(scatter.shape)} are not (D,) and (D,D)"
        )
    if not (mean.is_floating_point() and scatter.is_floating_point()):
        raise ValueError(f"{path}: mean and covariance are not floating-point numbers")
    if not (torch.isfinite(mean).all() and torch.isfinite(scatter).all()):
        raise ValueError(f"{path}: mean or covariance hold NaN or infinity")
    scale = scatter.diagonal().abs().max()
    if (scatter - scatter.T).abs().max() > 1e-4 * scale or scatter.diagonal().min() < -1e-6 * scale:
        raise ValueError(f"{path}: the covariance is not symmetric with a diagonal of at least 0")


def _foreign_extractor(path: Path, dim: int, extractor: Extractor | None) -> dict[str, str]:
    makers = FOREIGN[".npz" if path.suffix == ".npz" else ".pt"]
    if extractor is None or extractor.name not in makers or extractor.dim != dim:
        asked = "no extractor was given" if extractor is None else f"asked for are {extractor.name}'s"
        raise ValueError(
            f"{path}: {dim} features of {' or '.join(makers)}, as the file does not say otherwise; {asked}"
        )
    return {"extractor": extractor.name, "hash": extractor.hash}


def frechet_distance(a: Statistics, b: Statistics, allow_few: bool = False) -> float:
    """Frechet distance of two Gaussians: |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0.

    The last trace is the sum of the singular values of C_a^(1/2) C_b^(1/2), taken from symmetric eigen
    decompositions: no square root of a matrix that is not symmetric, no error that grows when C is singular.

    allow_few: also answer where there are no more pictures than features. The covariance is then singular
    and the distance biased upwards all the more; compare equal numbers of pictures only.

    Raises ValueError for different extractors, empty sets and too few pictures.
    Source: Heusel et al., 2017; Dowson & Landau, 1982.
    """
    same_extractor(a, b)
    for statistics in (a, b):
        if statistics.count == 0:
            raise ValueError("the set is empty: no pictures were measured")
        have = statistics.count
        if have is not None and have <= a.dim and not allow_few:
            raise ValueError(
                f"FID with {a.dim} features ({a.extractor}) needs at least {a.dim + 1} pictures, have {have}"
            )
    overlap = torch.linalg.svdvals(a.covariance_root.T @ b.covariance_root).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """R (D,r) with R R^T = covariance, rounding noise of a singular covariance cut off."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    keep = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, keep] * values[keep].sqrt()


# --------------------------------------------------------------------------------------------------
# KID, Inception Score, CLIP score


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """Kernel Inception Distance: unbiased squared MMD with the kernel (x.y / D + 1)^3, over random subsets.

    real (N,D), fake (M,D): features of one extractor. May be slightly negative.
    subsets, subset_size: how many subsets, of how many pictures each; drawn from `seed` alone.

    Raises ValueError for too few pictures, NaN, empty sets, different widths.
    Source: Binkowski et al., 2018, "Demystifying MMD GANs".
    """
    real, fake = _pair(real, fake)
    n = subset_size
    if subsets < 1 or n < 2:
        raise ValueError(f"KID needs at least 1 subset of at least 2 pictures, got {subsets} of {n}")
    if min(len(real), len(fake)) < n:
        raise ValueError(
            f"KID with subsets of {n} needs at least {n} pictures, have {len(real)} real and {len(fake)} fake"
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(1 if n == len(real) == len(fake) else subsets):  # all pictures are in every such subset
        x = real[torch.randperm(len(real), generator=generator)[:n].to(real.device)]
        y = fake[torch.randperm(len(fake), generator=generator)[:n].to(fake.device)]
        cross = _cubic(x, y).mean()
        within = torch.zeros_like(cross)
        for z in (x, y):
            kernel = _cubic(z, z)
            within += (kernel.sum() - kernel.trace()) / (n * (n - 1))
        values.append(within - 2 * cross)
    result = torch.stack(values)
    return Estimate(result.mean().item(), result.std(correction=0).item())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(probabilities: Tensor, splits: int = 10, seed: int | None = 0) -> Estimate:
    """Inception Score, exp of the mean KL(p(class | picture) || p(class)), at least 1, over splits.

    probabilities (N,K): rows summing to 1. seed: pictures are shuffled by it before they are split, so that
    pictures sorted by class do not spoil the score; None leaves the order.

    Raises ValueError for fewer pictures than splits, NaN, rows that are no probabilities.
    Source: Salimans et al., 2016, "Improved Techniques for Training GANs".
    """
    p = _checked(probabilities, "probabilities")
    if p.min() < 0 or (p.sum(1) - 1).abs().max() > 1e-3:
        raise ValueError("probabilities: rows must be at least 0 and sum to 1")
    if splits < 1 or len(p) < splits:
        raise ValueError(
            f"the Inception Score in {splits} splits needs at least {splits} pictures, have {len(p)}"
        )
    if seed is not None:
        order = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))
        p = p[order.to(p.device)]
    scores = []
    for part in p.chunk(splits):
        mean = part.mean(0, keepdim=True)
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, mean)).sum(1).mean()
        scores.append(divergence.exp())
    result = torch.stack(scores)
    return Estimate(result.mean().item(), result.std(correction=1).item() if splits > 1 else 0.0)


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean of 100 max(cos, 0) over pairs of picture and text embeddings, in [0,100].

    images (B,D): features of `CLIPFeatures`. texts (B,D): its `text`, row i the prompt of picture i.
    Raises ValueError for unequal shapes, NaN, empty sets.
    Source: Hessel et al., 2021, "CLIPScore", with the weight 100 in common use instead of 2.5.
    """
    images, texts = _pair(images, texts, ("images", "texts"))
    if len(images) != len(texts):
        raise ValueError(f"each picture needs one text, have {len(images)} pictures and {len(texts)} texts")
    return 100 * torch.cosine_similarity(images, texts).clamp(min=0).mean().item()


# --------------------------------------------------------------------------------------------------
# Neighbours: precision, recall, density, coverage, retrieval


def _tiles(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Euclidean distances between the rows of a and b, tile by tile: (rows of a, rows of b, distances)."""
    norms_a, norms_b = a.square().sum(1), b.square().sum(1)
    for i in range(0, len(a), TILE):
        rows = slice(i, i + TILE)
        for j in range(0, len(b), TILE):
            columns = slice(j, j + TILE)
            squared = torch.addmm(norms_a[rows, None] + norms_b[columns], a[rows], b[columns].T, alpha=-2)
            yield rows, columns, squared.clamp_(min=0).sqrt_()


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row, (N,)."""
    nearest = features.new_full((len(features), k + 1), torch.inf)  # each row is its own nearest
    for rows, _, distances in _tiles(features, features):
        joined = torch.cat([nearest[rows], distances], 1)
        nearest[rows] = joined.topk(k + 1, largest=False).values
    return nearest[:, k]


def _neighbours(real: Tensor, fake: Tensor, k: int) -> tuple[Tensor, Tensor]:
    real, fake = _pair(real, fake)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"k = {k} neighbours need at least {k + 1} pictures, have {len(real)} real and {len(fake)} fake"
        )
    centre = real.mean(0)  # distances stay, rounding errors shrink
    real = real - centre
    return real, fake - centre


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall, each in [0,1].

    Precision: share of fake pictures inside a ball about some real picture that reaches to its k-th
    neighbour. Recall: the same with the roles changed.

    real (N,D), fake (M,D): features of one extractor. Time grows with (N + M)^2, memory does not.
    Raises ValueError for k pictures or fewer, NaN, empty sets, different widths.
    Source: Kynkaanniemi et al., 2019.
    """
    real, fake = _neighbours(real, fake, k)
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    covered_fake = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    covered_real = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, distances in _tiles(real, fake):
        covered_fake[columns] |= (distances < real_radii[rows, None]).any(0)
        covered_real[rows] |= (distances < fake_radii[columns]).any(1)
    return covered_fake.double().mean().item(), covered_real.double().mean().item()


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density (at least 0, about 1 for a good model) and coverage in [0,1].

    Density: mean number of real pictures' balls that hold a fake picture, divided by k. Coverage: share of
    real pictures with a fake picture in their ball.

    Arguments, errors and cost as in `precision_recall`. Source: Naeem et al., 2020, "Reliable Fidelity and
    Diversity Metrics for Generative Models".
    """
    real, fake = _neighbours(real, fake, k)
    radii = _radii(real, k)
    inside = 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, _, distances in _tiles(real, fake):
        within = distances < radii[rows, None]
        inside += int(within.sum())
        covered[rows] |= within.any(1)
    return inside / (k * len(fake)), covered.double().mean().item()


def retrieval_ranks(queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
    """Rank of the first gallery picture with the query's label, by cosine similarity: int64 (Q,), 1 is best.

    queries (Q,D), gallery (G,D): features of one extractor. query_labels (Q,), gallery_labels (G,): integers.
    Pictures of other labels that are just as similar go first, so that a gallery of equal features earns
    nothing. The share of ranks 1 is the accuracy of the nearest neighbour's label.

    Raises ValueError for a query whose label the gallery lacks, unequal lengths, NaN, empty sets.
    """
    queries, gallery = _pair(queries, gallery, ("queries", "gallery"))
    query_labels, gallery_labels = query_labels.to(queries.device), gallery_labels.to(queries.device)
    for name, features, labels in (("queries", queries, query_labels), ("gallery", gallery, gallery_labels)):
        if labels.shape != (len(features),):
            raise ValueError(f"{name}: {len(features)} pictures but labels of shape {tuple(labels.shape)}")
    missing = query_labels[~torch.isin(query_labels, gallery_labels)]
    if len(missing):
        raise ValueError(f"the gallery has no picture with label {int(missing[0])}")
    queries, gallery = (torch.nn.functional.normalize(x, dim=1) for x in (queries, gallery))
    ranks = []
    for features, labels in zip(queries.split(TILE), query_labels.split(TILE), strict=True):
        similarity = features @ gallery.T
        same = labels[:, None] == gallery_labels
        best = similarity.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        # Equal features may differ in the last digits of their similarity.
        ranks.append(1 + ((similarity >= best - 1e-12) & ~same).sum(1))
    return torch.cat(ranks)
