"""Metrics against torchmetrics, prdc and scipy on the same features; statistics; bad input."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.evaluation import metrics
from unmask.evaluation.metrics import (
    Statistics,
    clip_score,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    retrieval_ranks,
    same_extractor,
)


def sample(n: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated, skewed float32 features (n, dim) with a mean away from zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    return (torch.randn(n, dim, generator=generator) @ mix).relu() + 0.3 + shift


def gathered(features: torch.Tensor, batch: int = 64, name: str = "net@64", hash: str = "abc") -> Statistics:
    statistics = Statistics(name, hash, features.shape[1])
    for part in features.split(batch):
        statistics.update(part)
    return statistics


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert (a - b).norm() <= tolerance * b.norm()


class Identity(torch.nn.Module):
    """An extractor for torchmetrics that takes features for pictures."""

    num_features = 16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


# Statistics


def test_moments_are_those_of_numpy() -> None:
    features = sample(200, 12, 1)
    statistics = gathered(features, 7)
    close(statistics.mean, torch.from_numpy(features.double().numpy().mean(0)))
    close(statistics.covariance, torch.from_numpy(np.cov(features.double().numpy(), rowvar=False)))
    assert statistics.count == 200


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 99), max_size=8, unique=True),
    order=st.randoms(use_true_random=False),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
)
def test_batches_order_and_merging_do_not_matter(cuts: list[int], order, offset: float) -> None:
    features = sample(100, 6, 2, offset)
    whole = gathered(features, 100)
    edges = [0, *sorted(cuts), 100]
    parts = [features[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    order.shuffle(parts)
    one, two = Statistics("net@64", "abc", 6), Statistics("net@64", "abc", 6)
    for i, part in enumerate(parts):
        (one if i % 2 else two).update(part)
    one.merge(two)
    assert one.count == 100
    close(one.mean, whole.mean)
    close(one.covariance, whole.covariance)


def test_merging_with_empty_statistics_changes_nothing() -> None:
    features = sample(20, 4, 3)
    statistics, empty = gathered(features), Statistics("net@64", "abc", 4)
    statistics.merge(empty)
    close(statistics.covariance, gathered(features).covariance)
    empty.merge(statistics)
    close(empty.covariance, statistics.covariance)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_saved_statistics_come_back_and_go_on(tmp_path, suffix: str) -> None:
    features = sample(50, 5, 4)
    path = tmp_path / f"half{suffix}"
    gathered(features[:30]).save(path)
    again = Statistics.load(path)
    assert (again.extractor, again.hash, again.count) == ("net@64", "abc", 30)
    again.update(features[30:])
    close(again.covariance, gathered(features).covariance)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_npz_is_readable_by_other_tools(tmp_path) -> None:
    statistics = gathered(sample(50, 5, 4))
    statistics.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as data:
        np.testing.assert_array_equal(data["mu"], statistics.mean.numpy())
        np.testing.assert_allclose(data["sigma"], statistics.covariance.numpy())


def extractor(name: str, dim: int = 5) -> SimpleNamespace:
    return SimpleNamespace(name=name, hash="feed", dim=dim)


def test_statistics_from_elsewhere(tmp_path) -> None:
    mine = gathered(sample(50, 5, 4), name="inception-v3@fid", hash="feed")
    np.savez(
        tmp_path / "adm.npz", mu=mine.mean, sigma=mine.covariance, arr_0=np.zeros((2, 4, 4, 3), np.uint8)
    )
    adm = Statistics.load(tmp_path / "adm.npz", extractor("inception-v3@fid"))
    assert adm.count is None
    assert frechet_distance(mine, adm) < 1e-6 * mine.covariance.trace()
    torch.save({"mu": mine.mean.float(), "cov": mine.covariance.float()}, tmp_path / "train.pt")
    train = Statistics.load(tmp_path / "train.pt", extractor("inception-v3@halton"))
    assert train.mean.dtype == train.scatter.dtype == torch.float64
    close(train.covariance, mine.covariance, 1e-6)
    with pytest.raises(ValueError, match=r"inception-v3@fid.*inception-v3@halton"):
        frechet_distance(mine, train)
    with pytest.raises(ValueError, match="do not say their number"):
        adm.update(sample(3, 5, 1))
    with pytest.raises(ValueError, match="do not say their number"):
        mine.merge(adm)
    adm.save(tmp_path / "known.safetensors")
    assert Statistics.load(tmp_path / "known.safetensors").count is None


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("adm.npz", None),
        ("adm.npz", "efficientnet-lite0@224"),
        ("adm.npz", "inception-v3@halton"),
        ("train.pt", "inception-v3@fid"),
    ],
)
def test_statistics_from_elsewhere_need_their_extractor(tmp_path, name: str, wanted: str | None) -> None:
    mean, covariance = torch.zeros(5), torch.eye(5)
    np.savez(tmp_path / "adm.npz", mu=mean.numpy(), sigma=covariance.numpy())
    torch.save({"mu": mean, "cov": covariance}, tmp_path / "train.pt")
    with pytest.raises(ValueError, match=wanted or "no extractor was given"):
        Statistics.load(tmp_path / name, wanted and extractor(wanted))


def test_own_statistics_of_another_extractor_are_refused(tmp_path) -> None:
    gathered(sample(50, 5, 4)).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"net@64 \(weights abc.*other@64 \(weights feed"):
        Statistics.load(tmp_path / "a.safetensors", extractor("other@64"))


def write(path, **fields: object) -> None:
    if path.suffix == ".npz":
        np.savez(path, **fields)
    else:
        torch.save({k: torch.as_tensor(v) if not isinstance(v, str) else v for k, v in fields.items()}, path)


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"mu": np.zeros(5)}, "is missing"),
        ({"mu": np.zeros(5), "cov": np.eye(4)}, r"\(D,\) and \(D,D\)"),
        ({"mu": np.zeros((5, 1)), "cov": np.eye(5)}, r"\(D,\) and \(D,D\)"),
        ({"mu": np.zeros(5), "cov": np.full((5, 5), np.nan)}, "NaN"),
        ({"mu": np.zeros(5), "cov": np.arange(25.0).reshape(5, 5)}, "symmetric"),
        ({"mu": np.zeros(5), "cov": -np.eye(5)}, "diagonal"),
        ({"mu": np.zeros(5, np.int64), "cov": np.eye(5, dtype=np.int64)}, "floating-point"),
    ],
)
def test_wrong_statistics_files(tmp_path, suffix: str, fields: dict, complaint: str) -> None:
    path = tmp_path / f"wrong{suffix}"
    write(path, **{"sigma" if k == "cov" and suffix == ".npz" else k: v for k, v in fields.items()})
    maker = "inception-v3@fid" if suffix == ".npz" else "inception-v3@halton"
    with pytest.raises(ValueError, match=complaint) as caught:
        Statistics.load(path, extractor(maker))
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_garbage_and_missing_files(tmp_path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    with pytest.raises(FileNotFoundError, match="no such"):
        Statistics.load(path)
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(ValueError, match="readable") as caught:
        Statistics.load(path)
    assert "\n" not in str(caught.value)


def test_pickled_objects_and_other_files_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "o.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"o\.npz"):
        Statistics.load(tmp_path / "o.npz")
    torch.save({"mu": "text"}, tmp_path / "o.pt")
    with pytest.raises(ValueError, match="plain dictionary"):
        Statistics.load(tmp_path / "o.pt")
    (tmp_path / "o.txt").touch()
    with pytest.raises(ValueError, match=r"\.safetensors, \.npz or \.pt"):
        Statistics.load(tmp_path / "o.txt")
    with pytest.raises(ValueError, match=r"\.safetensors or \.npz"):
        gathered(sample(9, 3, 1)).save(tmp_path / "o.txt")


def test_a_changed_byte_is_noticed(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    gathered(sample(50, 5, 4)).save(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        Statistics.load(path)


def test_features_of_two_extractors_do_not_mix() -> None:
    a = gathered(sample(20, 4, 1))
    for other in (
        gathered(sample(20, 4, 1), name="net@128"),
        gathered(sample(20, 4, 1), hash="def"),
        gathered(sample(20, 3, 1)),
    ):
        for action in (frechet_distance, same_extractor, Statistics.merge):
            with pytest.raises(
                ValueError, match=rf"net@64 \(weights abc, 4.*{other.extractor} .weights {other.hash}"
            ):
                action(a, other)


def test_bad_features_are_refused() -> None:
    statistics = Statistics("net@64", "abc", 4)
    features = sample(10, 4, 1)
    features[3, 2] = torch.nan
    features[7, 0] = torch.inf
    with pytest.raises(ValueError, match="2 of 10 rows hold NaN or infinity, the first is row 3"):
        statistics.update(features)
    with pytest.raises(ValueError, match=r"\(N,4\), got \(10, 5\)"):
        statistics.update(sample(10, 5, 1))
    with pytest.raises(ValueError, match="empty"):
        statistics.update(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="at least 2 pictures, have 0"):
        _ = statistics.covariance
    assert statistics.count == 0


# FID


def test_fid_equals_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    real, fake = sample(300, 16, 1), 1.2 * sample(200, 16, 2, 0.1)
    metric = fid.FrechetInceptionDistance(feature=Identity(), normalize=False).set_dtype(torch.float64)
    metric.used_custom_model = True
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert frechet_distance(gathered(real), gathered(fake)) == pytest.approx(
        metric.compute().item(), rel=1e-4
    )


def test_fid_equals_sqrtm() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = gathered(sample(300, 16, 1)), gathered(1.2 * sample(200, 16, 2, 0.1))
    root = linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item() - 2 * np.trace(root), rel=1e-6)


def test_fid_of_diagonal_gaussians_is_the_closed_form() -> None:
    a, b = Statistics("n", "h", 3), Statistics("n", "h", 3)
    a.count = b.count = None
    a.scatter, b.scatter = (
        torch.diag(torch.tensor([1.0, 4, 0])).double(),
        torch.diag(torch.tensor([9.0, 1, 4])).double(),
    )
    b.mean += 2
    assert frechet_distance(a, b) == pytest.approx(12 + (1 - 3) ** 2 + (2 - 1) ** 2 + 2**2, rel=1e-12)


@pytest.mark.parametrize("n", [30, 400])
def test_fid_with_itself_is_nothing(n: int) -> None:
    statistics = gathered(sample(n, 100, 1))
    other = gathered(sample(n, 100, 1).flip(0), 13)
    trace = statistics.covariance.trace().item()
    assert frechet_distance(statistics, other, allow_few=True) < 1e-9 * trace
    constant = gathered(torch.ones(n, 100))
    assert frechet_distance(constant, constant, allow_few=True) == 0
    assert frechet_distance(constant, statistics, True) == pytest.approx(
        frechet_distance(statistics, constant, True), rel=1e-9
    )


def test_fid_needs_more_pictures_than_features() -> None:
    few, enough = gathered(sample(16, 16, 1)), gathered(sample(17, 16, 2))
    with pytest.raises(ValueError, match=r"needs at least 17 pictures, have 16"):
        frechet_distance(enough, few)
    assert frechet_distance(enough, few, allow_few=True) > 0
    assert frechet_distance(enough, enough) < 1e-9
    with pytest.raises(ValueError, match="empty"):
        frechet_distance(enough, Statistics("net@64", "abc", 16), allow_few=True)


# KID, IS, CLIP score


def test_kid_equals_torchmetrics() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid")
    real, fake = sample(60, 16, 1), 1.2 * sample(50, 16, 2, 0.1)
    metric = kid.KernelInceptionDistance(feature=Identity(), subsets=5, subset_size=40, normalize=False)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mean, std = metric.compute()
    result = kernel_distance(real, fake, subsets=5, subset_size=40, seed=3)
    assert result == pytest.approx((mean.item(), std.item()), rel=1e-4)
    assert result == kernel_distance(real, fake, subsets=5, subset_size=40, seed=3)
    assert result != kernel_distance(real, fake, subsets=5, subset_size=40, seed=4)


def test_is_equals_torchmetrics() -> None:
    inception = pytest.importorskip("torchmetrics.image.inception")
    logits = 3 * torch.randn(103, 16, generator=torch.Generator().manual_seed(0)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = inception.InceptionScore(feature=Identity(), splits=10, normalize=False)
    metric.update(logits)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mean, std = metric.compute()
    assert inception_score(logits.softmax(1)) == pytest.approx((mean.item(), std.item()), rel=1e-4)


def test_is_of_extremes() -> None:
    sure = torch.eye(8).repeat(5, 1)
    assert inception_score(sure, splits=1, seed=None).mean == pytest.approx(8)
    assert inception_score(sure, splits=5, seed=None) == pytest.approx((8, 0))
    assert inception_score(sure.sort(0).values.flip(0) * 0 + 1 / 8) == pytest.approx((1, 0))


def test_clip_score() -> None:
    a = torch.tensor([[1.0, 0], [0, 2], [1, 1]])
    b = torch.tensor([[3.0, 0], [0, -1], [1, 0]])
    assert clip_score(a, b) == pytest.approx(100 * (1 + 0 + 0.5**0.5) / 3)
    with pytest.raises(ValueError, match="3 pictures and 2 texts"):
        clip_score(a, b[:2])


# Neighbours


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("tile", [4096, 17])
def test_neighbours_equal_prdc(monkeypatch, k: int, tile: int) -> None:
    prdc = pytest.importorskip("prdc")
    monkeypatch.setattr(metrics, "TILE", tile)
    real, fake = sample(90, 8, 1), 1.4 * sample(70, 8, 2, 0.1)
    expected = prdc.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k)
    assert precision_recall(real, fake, k) == pytest.approx(
        (expected["precision"], expected["recall"]), rel=1e-4
    )
    assert density_coverage(real, fake, k) == pytest.approx(
        (expected["density"], expected["coverage"]), rel=1e-4
    )
    assert 0 < expected["precision"] < 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10), offset=st.floats(-100, 100))
def test_neighbours_do_not_depend_on_scale_and_offset(seed: int, scale: float, offset: float) -> None:
    real, fake = sample(40, 5, seed).double(), sample(30, 5, seed + 1).double()
    moved = real * scale + offset, fake * scale + offset
    assert precision_recall(*moved) == pytest.approx(precision_recall(real, fake))
    assert density_coverage(*moved) == pytest.approx(density_coverage(real, fake))
    assert precision_recall(real, fake) == precision_recall(fake, real)[::-1]


def test_far_and_equal_sets() -> None:
    real = sample(50, 5, 1)
    assert precision_recall(real, real) == (1, 1)
    assert density_coverage(real, real)[1] == 1
    assert precision_recall(real, real + 100) == (0, 0)
    assert density_coverage(real, real + 100) == (0, 0)


def test_retrieval_ranks() -> None:
    gallery = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]])
    labels = torch.tensor([5, 7, 7, 9])
    queries = torch.tensor([[1.0, 0.02], [1, 0.02], [1, 0.02], [0, 3]])
    ranks = retrieval_ranks(queries, gallery, torch.tensor([5, 7, 9, 7]), labels)
    assert ranks.tolist() == [1, 2, 4, 1]
    assert ranks.dtype == torch.int64
    with pytest.raises(ValueError, match="no picture with label 6"):
        retrieval_ranks(queries, gallery, torch.tensor([5, 7, 6, 7]), labels)
    with pytest.raises(ValueError, match="4 pictures but labels of shape"):
        retrieval_ranks(queries, gallery, torch.tensor([5, 7]), labels)


def test_equal_features_retrieve_nothing() -> None:
    ones, labels = torch.ones(6, 3), torch.arange(6)
    assert retrieval_ranks(ones, ones, labels, labels).tolist() == [6] * 6


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_retrieval_equals_sorting(seed: int) -> None:
    queries, gallery = sample(12, 6, seed) - 1, sample(30, 6, seed + 1) - 1
    generator = torch.Generator().manual_seed(seed)
    gallery_labels = torch.cat([torch.arange(4), torch.randint(4, (26,), generator=generator)])
    query_labels = torch.randint(4, (12,), generator=generator)
    similarity = torch.cosine_similarity(queries[:, None].double(), gallery[None].double(), dim=-1)
    order = gallery_labels[similarity.argsort(dim=1, descending=True)]
    expected = (order == query_labels[:, None]).int().argmax(1) + 1
    assert torch.equal(retrieval_ranks(queries, gallery, query_labels, gallery_labels), expected)


TWO_SETS = [kernel_distance, precision_recall, density_coverage, clip_score]


@pytest.mark.parametrize("metric", TWO_SETS)
def test_bad_sets_are_one_clear_line(metric) -> None:
    good = sample(20, 4, 1)
    broken = good.clone()
    broken[2, 1] = torch.nan
    for a, b, complaint in [
        (good, broken, "1 of 20 rows hold NaN or infinity, the first is row 2"),
        (broken, good, "NaN"),
        (good[:0], good, "empty"),
        (good, good[:0], "empty"),
        (good, sample(20, 5, 1), r"\(N,4\), got \(20, 5\)"),
        (good[0], good, r"\(N,D\)"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            metric(a, b)


def test_too_few_pictures_say_how_many() -> None:
    few, many = sample(3, 4, 1), sample(30, 4, 1)
    with pytest.raises(ValueError, match="at least 4 pictures, have 3 real and 30 fake"):
        precision_recall(few, many)
    with pytest.raises(ValueError, match="at least 6 pictures, have 30 real and 3 fake"):
        density_coverage(many, few)
    with pytest.raises(ValueError, match="at least 1000 pictures, have 30 real and 3 fake"):
        kernel_distance(many, few)
    with pytest.raises(ValueError, match="at least 1 subset of at least 2"):
        kernel_distance(many, many, subset_size=1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        precision_recall(many, many, k=0)
    with pytest.raises(ValueError, match="needs at least 10 pictures, have 8"):
        inception_score(torch.eye(8))
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(torch.ones(20, 4))
