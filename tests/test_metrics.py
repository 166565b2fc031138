"""Metrics and statistics against closed forms and direct double loops."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from conftest import DEGENERATE

from collapse.measures.engrams import analyse_engrams, engram_cosine, k_means, match_clusters
from collapse.measures.neural_collapse import neural_collapse_metrics
from collapse.measures.rank import rank_metrics
from collapse.measures.statistics import compare_models, difference_interval, mean_interval
from collapse.report.comparisons import reproduction_table

RNG = np.random.default_rng(0)


def simplex(n: int) -> np.ndarray:
    """n rows whose centred matrix has n - 1 equal singular values."""
    return np.eye(n)


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_rank_metrics_of_equal_spectra(scale):
    found = rank_metrics(scale * simplex(11))
    for key in (
        "effective_rank",
        "stable_rank",
        "participation_ratio",
        "participation_ratio_eigen",
    ):
        assert found[key] == pytest.approx(10, abs=1e-6)
    assert [found[f"dims_{p}pct"] for p in (90, 95, 99)] == [9, 10, 10]
    assert found["top1_variance"] == pytest.approx(0.1) and found[
        "top10_variance"
    ] == pytest.approx(1)
    assert found["num_samples"] == found["num_dimensions"] == 11


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_rank_metrics_of_rank_one(shape):
    found = rank_metrics(np.outer(RNG.normal(size=shape[0]), RNG.normal(size=shape[1])) + 3)
    for key in (
        "effective_rank",
        "stable_rank",
        "participation_ratio",
        "participation_ratio_eigen",
        "top1_variance",
    ):
        assert found[key] == pytest.approx(1, abs=1e-6)
    assert found["dims_99pct"] == 1 and found["num_dimensions"] == 8


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (20, 20), (200, 90)])
def test_rank_metrics_equal_the_formulas(shape):
    features = RNG.normal(size=shape) * np.linspace(0.1, 3, shape[1]) + 5
    s = np.sqrt(np.clip(np.linalg.eigvalsh(np.cov(features.T, bias=True) * shape[0]), 0, None))[
        ::-1
    ]
    s = s[s > 1e-6]
    found, p, v = rank_metrics(features), s / s.sum(), s**2 / (s**2).sum()
    assert found["effective_rank"] == pytest.approx(math.prod(x**-x for x in p), rel=1e-6)
    assert found["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-6)
    assert found["participation_ratio"] == pytest.approx(s.sum() ** 2 / (s**2).sum(), rel=1e-6)
    assert found["participation_ratio_eigen"] == pytest.approx(1 / (v**2).sum(), rel=1e-6)
    for percent in (90, 95, 99):
        assert found[f"dims_{percent}pct"] == next(
            k for k in range(1, 99) if v[:k].sum() >= percent / 100
        )
    for k in (1, 10, 50):
        assert found[f"top{k}_variance"] == pytest.approx(v[:k].sum())
    assert found["effective_rank"] <= min(shape[0] - 1, shape[1]) + 1e-9


@pytest.mark.parametrize("features", [np.full((9, 4), 0.1), np.ones((1, 5)), np.zeros((3, 3))])
def test_features_without_spread_have_rank_zero(features):
    found = rank_metrics(features)
    assert (
        found["effective_rank"]
        == found["stable_rank"]
        == found["dims_99pct"]
        == found["top1_variance"]
        == 0
    )
    assert all(math.isfinite(value) for value in found.values())


def test_clusters_of_separated_classes():
    labels = RNG.integers(0, 3, 90)
    engrams = np.eye(3)[labels] * 5 + RNG.normal(size=(90, 3)) * 0.1
    found = match_clusters(k_means(engrams, 3, seed=0), labels, 3)
    assert found["ari"] == found["cluster_accuracy"] == 1
    assert found["purity"] == {0: 1, 1: 1, 2: 1} and sorted(found["mapping"].values()) == [0, 1, 2]


def test_match_clusters_counts_what_lands_in_the_wrong_cluster():
    engrams = np.array([[0.0]] * 10 + [[1.0]] * 10)
    labels = np.array([1] * 8 + [0] * 2 + [0] * 9 + [1])
    found = match_clusters(k_means(engrams, 2, seed=0), labels, 2)
    assert found["cluster_accuracy"] == pytest.approx(17 / 20)
    assert found["purity"] == {0: pytest.approx(9 / 11), 1: pytest.approx(8 / 9)}
    assert found["ari"] == pytest.approx(
        sklearn.metrics.adjusted_rand_score(labels, [0] * 10 + [1] * 10)
    )


def test_clusters_of_noise_is_at_chance():
    clusters = k_means(RNG.normal(size=(400, 8)), 2, seed=0)
    found = match_clusters(clusters, RNG.integers(0, 2, 400), 2)
    assert abs(found["ari"]) < 0.05 and found["cluster_accuracy"] < 0.6


def test_engram_cosine_equals_the_double_loop():
    engrams, labels = RNG.normal(size=(25, 4)), RNG.integers(0, 3, 25)
    pairs = {True: [], False: []}
    for i, j in itertools.combinations(range(25), 2):
        cosine = engrams[i] @ engrams[j] / np.linalg.norm(engrams[i]) / np.linalg.norm(engrams[j])
        pairs[bool(labels[i] == labels[j])].append(cosine)
    found = engram_cosine(engrams, labels)
    assert found["within"] == pytest.approx(np.mean(pairs[True]), abs=1e-9)
    assert found["between"] == pytest.approx(np.mean(pairs[False]), abs=1e-9)


def test_engram_cosine_without_pairs():
    assert engram_cosine(np.ones((2, 3)), np.array([0, 1])) == {
        "within": None,
        "between": pytest.approx(1),
    }
    assert engram_cosine(np.ones((2, 3)), np.array([0, 0])) == {
        "within": pytest.approx(1),
        "between": None,
    }


def test_mean_interval_is_the_t_interval():
    values = [0.91, 0.93, 0.96]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    found = mean_interval(values)
    assert (found["mean"], found["low"], found["high"], found["n"]) == pytest.approx(
        (np.mean(values), low, high, 3)
    )
    assert mean_interval([0.9]) == {"mean": 0.9, "low": None, "high": None, "n": 1}


def test_difference_interval_is_the_two_sample_t_interval():
    a, b = [0.80, 0.82, 0.83], [0.85, 0.84]
    low, high = scipy.stats.ttest_ind(b, a).confidence_interval()
    found = difference_interval(a, b)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(
        (np.mean(b) - np.mean(a), low, high)
    )
    assert difference_interval([0.8], [0.9])["low"] is None


def test_mcnemar_is_the_exact_binomial_test():
    a = np.array([1] * 50 + [0] * 9 + [1] * 3)
    b = np.array([1] * 50 + [1] * 9 + [0] * 3)
    found = compare_models(a, b)
    tail = sum(math.comb(12, k) for k in range(4)) / 2**12
    assert found["mcnemar_p"] == [pytest.approx(2 * tail)]
    assert found["interval"]["mean"] == pytest.approx(6 / 62)
    assert compare_models(a, a)["mcnemar_p"] == [1.0]


def test_compare_models_pairs_the_seeds():
    a = np.array([[1, 1, 0, 0], [1, 0, 0, 0]])
    b = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = compare_models(a, b)
    assert found["interval"]["mean"] == 0.25  # +1 of 4 rows in both seeds
    assert found["interval"]["n_seeds"] == 2 and found["mcnemar_p"] == [1.0, 1.0]
    with pytest.raises(ValueError):
        compare_models(a, b[:, :3])


def test_engrams_have_a_chance_level_and_a_control():
    labels = RNG.integers(0, 2, 200)
    separated, noise = (
        np.eye(2)[labels] + 0.01 * RNG.normal(size=(200, 2)),
        RNG.normal(size=(200, 2)),
    )
    found = analyse_engrams(separated, noise, labels, 2, seed=0)
    aris = {case: value["ari"] for case, value in found["cluster"].items()}
    assert aris["trained"] == 1 and abs(aris["chance"]) < 0.05 and abs(aris["untrained"]) < 0.05
    assert (
        found["cluster"]["trained"]["mapping"]
        == match_clusters(k_means(separated, 2, 0), labels, 2)["mapping"]
    )
    gaps = {case: value["within"] - value["between"] for case, value in found["engram_cos"].items()}
    assert gaps["trained"] > 0.9 and abs(gaps["chance"]) < 0.05 and abs(gaps["untrained"]) < 0.05
    assert analyse_engrams(noise, separated, labels, 2, seed=0)["cluster"]["untrained"]["ari"] == 1


def results(*accuracies):
    runs = {str(i): {"final": {"accuracy": a}} for i, a in enumerate(accuracies)}
    return {"models": {"model1": runs}}


def test_reproduction_table_tells_a_difference_from_none():
    published = results(0.80, 0.81, 0.82)
    assert reproduction_table(published, results(0.815)).endswith("no difference found")
    lower = reproduction_table(published, results(0.60))
    assert lower.endswith("yours differ from the published ones")
    assert reproduction_table(results(0.8), results(0.6)).endswith("no interval")


def test_reruns_with_the_same_seeds_are_compared_seed_by_seed():
    """A fall of a point in each seed is found though seeds lie twenty points apart."""
    published = results(0.60, 0.70, 0.80)
    fallen = reproduction_table(published, results(0.59, 0.689, 0.791))
    assert fallen.endswith("seed by seed, yours differ from the published ones")
    assert reproduction_table(published, published).endswith("the same in every seed")
    both_ways = reproduction_table(published, results(0.61, 0.69, 0.80))
    assert both_ways.endswith("seed by seed, no difference found")


def test_neural_collapse_of_a_perfect_simplex():
    """Every row at its class mean, means a scaled, shifted and rotated simplex, the head its dual:
    all measures are ideal.
    """
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0][:, :4]
    means = 3.0 * (np.eye(4) - 0.25) @ rotation.T  # (4, 12)
    labels = np.repeat(np.arange(4), 5)
    found = neural_collapse_metrics(
        means[labels] + 7.0, labels, weights=2 * means, bias=-14.0 * means.sum(1)
    )
    ideal = {
        "cdnv": 0,
        "within_between_trace": 0,
        "norm_cv": 0,
        "etf_error": 0,
        "hyperspherical_var": 0,
    }
    ideal |= {"self_duality_error": 0, "uniform_duality_cv": 0, "ncc_agreement": 1}
    ideal |= {
        "hyperspherical_mean": -np.log(np.sqrt(2 * 4 / 3))
    }  # unit vectors of a simplex of 4 are sqrt(8 / 3) apart
    assert found.keys() == ideal.keys()
    for name, value in ideal.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(
    ("n", "size", "classes"), [(60, 7, 3), (20, 40, 4), (50, 5, 2), (33, 3, 6)]
)
def test_neural_collapse_equals_double_loops(n, size, classes):
    rng = np.random.default_rng(n)
    labels = np.concatenate(
        [np.arange(classes), rng.integers(0, classes, n - classes)]
    )  # unequal class sizes
    features = rng.normal(size=(n, size)) + 2 * rng.normal(size=(classes, size))[labels]
    weights, bias = rng.normal(size=(classes, size)), rng.normal(size=classes)
    means = [features[labels == c].mean(0) for c in range(classes)]
    centre = sum(means) / classes
    centred = [m - centre for m in means]
    spread = [
        np.mean([np.sum((x - means[c]) ** 2) for x in features[labels == c]])
        for c in range(classes)
    ]
    pairs = [(a, b) for a in range(classes) for b in range(classes) if a != b]
    within = (
        sum(np.outer(x - means[c], x - means[c]) for x, c in zip(features, labels, strict=True)) / n
    )
    between = sum(np.outer(m, m) for m in centred) / classes
    lengths = [np.linalg.norm(m) for m in centred]
    units = [m / length for m, length in zip(centred, lengths, strict=True)]
    angles = [np.log(1 / np.linalg.norm(units[a] - units[b])) for a, b in pairs]
    simplex = (np.eye(classes) - 1 / classes) / np.sqrt(classes - 1)
    gram = np.array([[a @ b for b in centred] for a in centred])
    duality = np.array([[w @ m for m in centred] for w in weights])
    cosines = [w @ u / np.linalg.norm(w) for w, u in zip(weights, units, strict=True)]
    nearest = [np.argmin([np.linalg.norm(x - m) for m in means]) for x in features]
    predicted = [np.argmax(weights @ x + bias) for x in features]
    expected = {
        "cdnv": np.mean(
            [(spread[a] + spread[b]) / (2 * np.sum((means[a] - means[b]) ** 2)) for a, b in pairs]
        ),
        "within_between_trace": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / classes,
        "norm_cv": np.std(lengths) / np.mean(lengths),
        "etf_error": np.linalg.norm(gram / np.linalg.norm(gram) - simplex),
        "hyperspherical_mean": np.mean(angles),
        "hyperspherical_var": np.var(angles),
        "self_duality_error": np.linalg.norm(duality / np.linalg.norm(duality) - simplex),
        "uniform_duality_cv": np.std(cosines) / abs(np.mean(cosines)),
        "ncc_agreement": np.mean(np.equal(nearest, predicted)),
    }
    found = neural_collapse_metrics(features, labels, weights, bias)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    without_head = neural_collapse_metrics(features, labels)
    assert without_head == {name: found[name] for name in without_head} and len(without_head) == 6


@pytest.mark.parametrize(("features", "labels"), DEGENERATE)
def test_collapse_metrics_are_finite_on_degenerate_features(features, labels):
    weights = np.random.default_rng(1).normal(size=(3, features.shape[1]))
    found = neural_collapse_metrics(features, labels, weights, np.zeros(3)) | rank_metrics(features)
    assert all(np.isfinite(value) for value in found.values()), found
