"""Thresholds of a grid of rates, and lines through censored ones, against brute force."""

import math

import numpy as np
import pytest
from scipy.optimize import brute, fmin
from scipy.stats import norm

from collapse.measures.thresholds import (
    Threshold,
    collapsed_by,
    slope_bounds,
    slope_over_time,
    threshold_shift,
)


def test_a_threshold_is_the_middle_above_the_last_rate_below_which_all_are_kept():
    kept = {-3.0: True, -4.0: True, -3.5: True, -2.5: False}
    found = Threshold.of(kept)
    assert (found.low, found.high, found.value, found.censored) == (-3.0, -2.5, -2.75, "")
    # One that falls low in the grid and another that is kept above it: the lower one counts.
    found = Threshold.of(kept | {-3.5: False})
    assert (found.low, found.high, found.value) == (-4.0, -3.5, -3.75)
    assert not found.monotone and Threshold.of(kept).monotone


def test_a_grid_on_one_side_gives_a_bound():
    above = Threshold.of({-3.0: True, -2.0: True})
    assert (above.value, above.censored, above.high) == (-2.0, ">=", math.inf)
    below = Threshold.of({-3.0: False, -2.0: True})
    assert (below.value, below.censored, below.low) == (-3.0, "<=", -math.inf)


def noisy_line(n=40, slope=-0.8, sigma=0.2, seed=0):
    """Numbers of steps, their logarithms, and a log10 threshold after each."""
    rng = np.random.default_rng(seed)
    steps = 200 + 150 * np.arange(n)
    return steps, np.log10(steps), -1.0 + slope * np.log10(steps) + sigma * rng.standard_normal(n)


def slope_of(steps, low, high, least_sigma=1e-3):
    """Where low is high, a threshold's rates lie evenly around it."""
    half = 0.1 * (np.asarray(low) == high)
    ends = zip(low - half, high + half, strict=True)
    thresholds = [Threshold(float(a), float(b)) for a, b in ends]
    return slope_over_time(dict(zip(steps.tolist(), thresholds, strict=True)), least_sigma)


def test_without_a_censored_value_it_is_least_squares():
    steps, x, y = noisy_line()
    assert slope_of(steps, y, y) == pytest.approx(np.polyfit(x, y, 1)[0], abs=1e-6)


def test_bounds_that_the_line_keeps_far_off_leave_it_at_least_squares():
    """The search for the highest likelihood, not the closed form, finds it."""
    steps, x, y = noisy_line()
    far = np.append(steps, 900), np.append(y, -math.inf), np.append(y, 5.0)
    assert slope_of(*far) == pytest.approx(np.polyfit(x, y, 1)[0], abs=1e-5)
    far = np.append(steps, 900), np.append(y, -9.0), np.append(y, math.inf)
    assert slope_of(*far) == pytest.approx(np.polyfit(x, y, 1)[0], abs=1e-5)


@pytest.mark.parametrize("least_sigma", [1e-3, 0.5])
def test_the_likelihood_is_highest_there_of_all_lines(least_sigma):
    """By search over a grid of intercepts, slopes and sigmas, with every kind of bound."""
    steps, x, y = noisy_line(n=12)
    low, high = y.copy(), y.copy()
    low[8:], high[8:] = -3.6, math.inf
    low[:2], high[:2] = -math.inf, -2.9

    def minus(parameters):
        centre, slope, log_sigma = parameters
        sigma = max(math.exp(log_sigma), least_sigma)
        mean = centre + slope * (x - 3)
        exact = low == high
        masses = norm.cdf(high, mean, sigma) - norm.cdf(low, mean, sigma)
        with np.errstate(divide="ignore"):
            logs = np.where(exact, norm.logpdf(low, mean, sigma), np.log(masses))
        return -logs.sum()

    ranges = ((-5, -2), (-3, 2), (math.log(0.02), math.log(1)))
    _, slope, _ = brute(minus, ranges, Ns=30, finish=fmin)
    assert slope_of(steps, low, high, least_sigma) == pytest.approx(slope, abs=1e-3)


@pytest.mark.parametrize("side", ["above", "below"])
def test_a_simulation_recovers_the_slope_that_bounds_taken_for_values_would_bend(side):
    steps, x, y = noisy_line(n=4000, slope=-0.9)
    bound = float(np.quantile(y, 0.4 if side == "above" else 0.6))  # six in ten are censored
    censored = y > bound if side == "above" else y < bound
    low = np.where(censored, bound if side == "above" else -math.inf, y)
    high = np.where(censored, math.inf if side == "above" else bound, y)
    assert slope_of(steps, low, high) == pytest.approx(-0.9, abs=0.05)
    bent = np.polyfit(x, np.where(censored, bound, y), 1)[0]
    assert abs(bent + 0.9) > 0.2


@pytest.mark.parametrize(
    ("shares", "collapsed"),
    [
        ([1.0, 0.2], True),
        ([1.0, 0.25], False),  # the bound belongs to what is kept
        ([0.2, 0.5], False),  # one low measurement, and back
        ([0.2, 0.1, 0.9], True),  # two in a row
        ([0.2, 0.9, 0.2, 0.9], False),
        ([0.9, None], True),
        ([None, 0.9], True),
    ],
)
def test_a_run_that_comes_back_from_one_low_measurement_has_not_collapsed(shares, collapsed):
    assert collapsed_by(shares, 1 / 4) == collapsed


def test_slopes_over_time_by_hand():
    thresholds = {200: Threshold(-2.5, -2.25), 2000: Threshold(-3.5, -3.25)}
    assert slope_over_time(thresholds, 0.07) == pytest.approx(-1)
    # A bound that the line meets anyway changes nothing; without two known there is no line.
    met = thresholds | {20: Threshold(-1.75, math.inf)}
    assert slope_over_time(met, 1e-3) == pytest.approx(-1, abs=1e-4)
    assert slope_over_time(met | {200: Threshold(-math.inf, -4)}, 0.07) is None
    bounds = slope_bounds(thresholds[200], thresholds[2000], 200, 2000)
    assert bounds == pytest.approx((-1.25, -0.75))
    assert slope_bounds(Threshold(-1, math.inf), thresholds[2000], 200, 2000)[0] == -math.inf


def test_shifts_are_paired_and_say_what_their_bounds_allow():
    base = {0: Threshold(-3.3, -3.0), 1: Threshold(-3.0, -2.7), 2: Threshold(-3.0, -2.7)}
    other = {0: Threshold(-2.7, -2.4), 1: Threshold(-2.1, -1.8), 3: Threshold(-2.7, -2.4)}
    found = threshold_shift(base, other, 0.3)
    assert (found["n"], found["bounded"], found["lower_bound"]) == (2, True, False)
    assert found["mean"] == pytest.approx(0.75)
    assert found["se"] == pytest.approx(np.std([0.6, 0.9], ddof=1) / math.sqrt(2))
    kept = {seed: Threshold(-2.1, math.inf) for seed in base}
    assert threshold_shift(base, kept, 0.3)["lower_bound"]
    assert threshold_shift(base, kept, 0.3)["bounded"]
    assert not threshold_shift(kept, base, 0.3)["bounded"]
    assert not threshold_shift(kept, kept, 0.3)["bounded"]
    assert threshold_shift(base, {0: other[0]}, 0.3)["low"] is None


def test_seeds_that_agree_are_known_no_better_than_their_grid():
    base = {seed: Threshold(-3.3, -3.0) for seed in range(5)}
    other = {seed: Threshold(-3.0, -2.7) for seed in range(5)}
    found = threshold_shift(base, other, 0.3)
    assert found["se"] == pytest.approx(0.3 / math.sqrt(6 * 5))
