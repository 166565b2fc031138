"""Correlations with their intervals, against scipy and the formula for one control."""

import math

import numpy as np
import pytest
import scipy.stats

from collapse.measures.correlations import correlation_interval, partial_spearman


def test_a_correlation_has_fishers_interval():
    found = correlation_interval(0.6, 30)
    rng = np.random.default_rng(19)  # a sample with exactly that correlation
    x, noise = rng.standard_normal((2, 30))
    x = (x - x.mean()) / np.linalg.norm(x - x.mean())
    noise = noise - noise.mean() - (noise @ x) * x
    y = 0.6 * x + 0.8 * noise / np.linalg.norm(noise)
    low, high = scipy.stats.pearsonr(x, y).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["p"] == pytest.approx(2 * scipy.stats.norm.sf(math.atanh(0.6) * math.sqrt(27)))


def test_ranks_widen_the_interval_of_a_correlation_and_a_control_costs_a_pair():
    plain, ranks = correlation_interval(0.6, 30), correlation_interval(0.6, 30, ranks=True)
    assert ranks["low"] < plain["low"] and plain["high"] < ranks["high"]
    fewer = correlation_interval(0.6, 29)
    controlled = correlation_interval(0.6, 30, controls=1)
    assert (controlled["low"], controlled["p"]) == (fewer["low"], fewer["p"])
    assert correlation_interval(1.0, 10)["low"] == 1.0
    assert correlation_interval(0.5, 3)["low"] is None


def test_partial_spearman_is_the_textbook_formula_for_one_control():
    rng = np.random.default_rng(20)
    z = rng.standard_normal(60)
    x, y = np.exp(z + rng.standard_normal(60)), z + rng.standard_normal(60)
    xy, xz, yz = (scipy.stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    found = partial_spearman(x, y, z)
    assert found["r"] == pytest.approx(expected)
    assert found == pytest.approx(correlation_interval(found["r"], 60, controls=1, ranks=True))
    assert partial_spearman(x**3, y, z)["r"] == pytest.approx(expected)  # ranks alone count


def test_a_common_cause_is_controlled_away_and_more_than_one_may_be_given():
    rng = np.random.default_rng(21)
    causes = rng.standard_normal((2000, 2))
    x, y = (causes.sum(1) + 0.5 * rng.standard_normal(2000) for _ in range(2))
    assert scipy.stats.spearmanr(x, y).statistic > 0.8
    assert abs(partial_spearman(x, y, causes)["r"]) < 0.3
    assert partial_spearman(x, y, causes[:, 0])["r"] > 0.5


def test_a_variable_that_its_control_explains_has_no_partial_correlation():
    z = np.arange(20.0)
    found = partial_spearman(z**3, np.random.default_rng(22).standard_normal(20), z)
    assert found["r"] is None and found["low"] is None
