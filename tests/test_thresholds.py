"""Thresholds of a grid of rates, and lines through censored ones, against brute force."""

import math

import numpy as np
import pytest
from scipy.optimize import brute, fmin
from scipy.stats import norm

from collapse.measures.thresholds import (
    Threshold,
    censored_line,
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
    rng = np.random.default_rng(seed)
    x = np.linspace(2.3, 3.8, n)
    return x, -1.0 + slope * x + sigma * rng.standard_normal(n)


def test_without_a_censored_value_it_is_least_squares():
    x, y = noisy_line()
    found = censored_line(x, y, y, 1e-6)
    slope, intercept = np.polyfit(x, y, 1)
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept), abs=1e-6)
    rms = np.sqrt(np.mean((y - intercept - slope * x) ** 2))
    assert found.sigma == pytest.approx(rms, rel=1e-5)


def test_bounds_that_the_line_keeps_far_off_leave_it_at_least_squares():
    """The search for the highest likelihood, not the closed form, finds it."""
    x, y = noisy_line()
    far = np.append(x, 3.0), np.append(y, -math.inf), np.append(y, 5.0)
    found = censored_line(*far, 1e-6)
    assert found.slope == pytest.approx(np.polyfit(x, y, 1)[0], abs=1e-5)


def test_points_on_a_line_have_the_least_sigma():
    x = np.log10([200, 400, 800, 1600])
    y = -2.375 - 0.25 * np.arange(4)
    found = censored_line(x, y, y, 0.07)
    assert found.slope == pytest.approx(-0.25 / math.log10(2), abs=1e-6)
    assert found.sigma == pytest.approx(0.07)


def test_the_likelihood_is_highest_there_of_all_lines():
    """By search over a grid of intercepts, slopes and sigmas, with every kind of bound."""
    x, y = noisy_line(n=12)
    low, high = y.copy(), y.copy()
    low[8:], high[8:] = -3.6, math.inf
    low[:2], high[:2] = -math.inf, -2.9
    low[4], high[4] = y[4] - 0.2, y[4] + 0.1

    def minus(parameters):
        centre, slope, log_sigma = parameters
        sigma = math.exp(log_sigma)
        mean = centre + slope * (x - 3)
        exact = low == high
        masses = norm.cdf(high, mean, sigma) - norm.cdf(low, mean, sigma)
        with np.errstate(divide="ignore"):
            logs = np.where(exact, norm.logpdf(low, mean, sigma), np.log(masses))
        return -logs.sum()

    ranges = ((-5, -2), (-3, 2), (math.log(0.02), math.log(1)))
    centre, slope, log_sigma = brute(minus, ranges, Ns=30, finish=fmin)
    found = censored_line(x, low, high, 1e-3)
    assert found.slope == pytest.approx(slope, abs=1e-3)
    assert found.intercept + 3 * found.slope == pytest.approx(centre, abs=1e-3)
    assert found.sigma == pytest.approx(math.exp(log_sigma), abs=1e-3)


@pytest.mark.parametrize("side", ["above", "below"])
def test_a_simulation_recovers_the_slope_that_bounds_taken_for_values_would_bend(side):
    x, y = noisy_line(n=4000, slope=-0.9)
    bound = -3.7
    censored = y > bound if side == "above" else y < bound
    low = np.where(censored, bound if side == "above" else -math.inf, y)
    high = np.where(censored, math.inf if side == "above" else bound, y)
    found = censored_line(x, low, high, 1e-3)
    assert found.slope == pytest.approx(-0.9, abs=0.05)
    assert found.sigma == pytest.approx(0.2, abs=0.01)
    bent = np.polyfit(x, np.where(censored, bound, y), 1)[0]
    assert abs(bent + 0.9) > 0.2


def test_a_slope_that_nothing_holds_is_refused():
    x, bounds = [1.0, 2.0, 3.0], [-3.0, -3.0, -3.0]
    with pytest.raises(ValueError, match="two values with both bounds, at different x"):
        censored_line(x, bounds, [math.inf] * 3, 0.07)
    with pytest.raises(ValueError, match="different x"):
        censored_line([1.0, 1.0, 2.0], bounds, [-3.0, -3.0, math.inf], 0.07)
    with pytest.raises(ValueError, match="least_sigma"):
        censored_line(x, bounds, bounds, 0)
    with pytest.raises(ValueError, match="no low is above"):
        censored_line(x, [1.0, 2.0, 3.0], bounds, 0.07)


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
