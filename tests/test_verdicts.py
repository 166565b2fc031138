"""Correction for several endpoints, equivalence and verdicts, by hand and against scipy."""

import numpy as np
import pytest
import scipy.stats

from collapse.measures.statistics import crossed_interval
from collapse.measures.verdicts import equivalence, holm, holm_levels, verdict


def test_holm_adjusts_as_by_hand():
    p = {"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.005}
    adjusted = holm(p)
    assert list(adjusted) == list(p)
    assert adjusted == pytest.approx({"b": 0.02, "a": 0.03, "c": 0.06, "d": 0.06})
    assert holm({"x": 0.7, "y": 0.6}) == {"x": 1.0, "y": 1.0}
    with pytest.raises(ValueError, match="outside 0 to 1"):
        holm({"x": float("nan")})


def test_holm_levels_as_by_hand():
    levels = holm_levels({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.005})
    expected = {"b": 1 - 0.05 / 4, "a": 1 - 0.05 / 3, "c": 1 - 0.05 / 2, "d": 1 - 0.05 / 2}
    assert levels == pytest.approx(expected)


def test_a_holm_adjusted_interval_excludes_zero_exactly_where_holm_rejects():
    rng = np.random.default_rng(18)
    seen = set()
    for _ in range(100):
        samples = {name: rng.standard_normal(6) + rng.choice([0.0, 1.2]) for name in "abcde"}
        p = {name: crossed_interval(x[:, None])["p"] for name, x in samples.items()}
        levels, adjusted = holm_levels(p), holm(p)
        for name, x in samples.items():
            found = crossed_interval(x[:, None], levels[name])
            assert (found["low"] > 0 or found["high"] < 0) == (adjusted[name] <= 0.05)
        seen.add(sum(value <= 0.05 for value in adjusted.values()))
    assert seen.issuperset(range(4))


def interval(low, high):
    return {"low": low, "high": high}


@pytest.mark.parametrize(
    ("estimate", "adjusted", "ninety", "expected"),
    [
        (0.8, (0.3, 1.3), (0.4, 1.2), "supported"),
        (-0.8, (-1.3, -0.3), (-1.2, -0.4), "refuted"),  # below zero
        (0.1, (-0.4, 0.6), (-0.3, 0.45), "refuted"),  # no effect of interest
        (0.2, (0.05, 0.35), (0.1, 0.3), "refuted"),  # above zero and of no interest
        (0.4, (0.1, 0.7), (0.2, 0.6), "small"),
        (0.5, (0.1, 0.9), (0.2, 0.8), "small"),  # at the margin is not beyond it
        (0.4, (-0.1, 0.9), (0.0, 0.8), "not decided"),
        (0.8, (-0.1, 1.7), (0.1, 1.5), "not decided"),  # beyond the margin, zero not excluded
        (-0.3, (-0.7, 0.1), (-0.6, 0.0), "not decided"),
        (0.1, (-0.6, 0.8), (-0.3, 0.5), "not decided"),  # touches the margin
        (0.8, (None, None), (None, None), "not decided"),
    ],
)
@pytest.mark.parametrize("planned", [True, False])
def test_the_verdict_follows_the_rule(estimate, adjusted, ninety, expected, planned):
    found = verdict(estimate, interval(*adjusted), interval(*ninety), 0.5, planned)
    assert found["verdict"] == expected
    assert found["text"].startswith(expected) and "margin 0.5" in found["text"]
    assert ("not all planned seeds ran" in found["text"]) == (not planned)


def test_the_half_width_stands_beside_the_margin():
    found = verdict(0.4, interval(-0.1, 0.9), interval(0.0, 0.8), 0.25, planned_done=True)
    assert (found["half_width"], found["margin"]) == (0.5, 0.25)
    assert "half-width 0.5" in found["text"] and "margin 0.25" in found["text"]
    with pytest.raises(ValueError, match="margin"):
        verdict(0.4, interval(0, 1), interval(0, 1), 0.0, planned_done=True)


@pytest.mark.parametrize("estimate", [0.0, 0.3, -0.3, 0.7, -0.7])
def test_equivalence_is_the_larger_of_two_one_sided_p(estimate):
    found = equivalence(estimate, se=0.2, df=9, margin=0.5)
    above = scipy.stats.t.sf((estimate + 0.5) / 0.2, 9)  # against: the effect is below -margin
    below = scipy.stats.t.cdf((estimate - 0.5) / 0.2, 9)
    assert found["p"] == pytest.approx(max(above, below))
    low, high = scipy.stats.t.interval(0.90, 9, estimate, 0.2)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert (found["p"] < 0.05) == (max(-found["low"], found["high"]) < 0.5)


def test_equivalence_without_any_spread_is_a_comparison():
    assert equivalence(0.1, 0.0, 3, 0.5)["p"] == 0.0
    assert equivalence(-0.6, 0.0, 3, 0.5)["p"] == 1.0


def test_a_lower_bound_is_supported_or_nothing():
    above, inside = {"low": 0.2, "high": 0.6}, {"low": -0.1, "high": 0.2}
    said = verdict(0.4, above, above, 0.25, True, lower_bound=True)
    assert said["verdict"] == "supported" and "a lower bound" in said["text"]
    assert verdict(0.05, inside, inside, 0.25, True)["verdict"] == "refuted"
    said = verdict(0.05, inside, inside, 0.25, True, lower_bound=True)
    assert said["verdict"] == "not decided"
