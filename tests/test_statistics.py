"""Intervals, against double loops, closed forms, textbook examples and small simulations."""

import math

import numpy as np
import pytest
import scipy.stats
from scipy.special import stdtr

from collapse.measures.statistics import (
    crossed_error,
    crossed_interval,
    crossed_mean_squares,
    independent_difference,
    mcnemar,
    paired_difference,
    pigeonhole_interval,
    seeds_and_rows_interval,
    t_interval,
)


def crossed_draw(rng, n_seeds, n_rows, of_seeds=1.0, of_rows=1.0, residual=1.0, mean=0.0):
    """Differences (S, N) with a standard deviation of each effect."""
    return (
        mean
        + of_seeds * rng.standard_normal((n_seeds, 1))
        + of_rows * rng.standard_normal((1, n_rows))
        + residual * rng.standard_normal((n_seeds, n_rows))
    )


# Differences over seeds and rows


def test_mean_squares_are_those_of_a_double_loop():
    differences = crossed_draw(np.random.default_rng(0), 4, 7, mean=0.3)
    n_seeds, n_rows = differences.shape
    mean = sum(differences[s, r] for s in range(n_seeds) for r in range(n_rows)) / 28
    seeds = [sum(differences[s, r] for r in range(n_rows)) / n_rows for s in range(n_seeds)]
    rows = [sum(differences[s, r] for s in range(n_seeds)) / n_seeds for r in range(n_rows)]
    residual = 0.0
    for s in range(n_seeds):
        for r in range(n_rows):
            residual += (differences[s, r] - seeds[s] - rows[r] + mean) ** 2
    expected = (
        n_rows * sum((s - mean) ** 2 for s in seeds) / (n_seeds - 1),
        n_seeds * sum((r - mean) ** 2 for r in rows) / (n_rows - 1),
        residual / ((n_seeds - 1) * (n_rows - 1)),
    )
    assert crossed_mean_squares(differences) == pytest.approx(expected)


def test_the_standard_error_is_the_sum_of_the_three_variance_components():
    differences = crossed_draw(np.random.default_rng(1), 5, 40, 0.5, 2.0, 1.0)
    of_seeds, of_rows, residual = crossed_mean_squares(differences)
    assert min(of_seeds, of_rows) > residual  # no floor in this draw
    seeds, rows = (of_seeds - residual) / 40, (of_rows - residual) / 5  # components
    found = crossed_interval(differences, level=0.9)
    assert found["se"] == pytest.approx(math.sqrt(seeds / 5 + rows / 40 + residual / 200))
    total = of_seeds + of_rows - residual
    df = total**2 / (of_seeds**2 / 4 + of_rows**2 / 39 + residual**2 / 156)  # Satterthwaite
    assert found["df"] == pytest.approx(df)
    low, high = scipy.stats.t.interval(0.9, df, differences.mean(), found["se"])
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["p"] == pytest.approx(2 * scipy.stats.t.sf(abs(found["mean"]) / found["se"], df))


def test_variance_that_is_all_between_seeds_gives_the_t_interval_over_seeds():
    seeds = np.random.default_rng(2).standard_normal(6)
    found = crossed_interval(np.tile(seeds[:, None], (1, 50)))
    expected = scipy.stats.ttest_1samp(seeds, 0.0)
    assert found["df"] == pytest.approx(5)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found["p"] == pytest.approx(expected.pvalue)


def test_variance_that_is_all_between_rows_gives_the_t_interval_over_rows():
    rows = np.random.default_rng(3).standard_normal(200)
    found = crossed_interval(np.tile(rows, (4, 1)))
    expected = scipy.stats.ttest_1samp(rows, 0.0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    noisy = crossed_interval(crossed_draw(np.random.default_rng(3), 4, 200, 0, 1, 0.05))
    assert noisy["se"] == pytest.approx(1 / math.sqrt(200), rel=0.15)
    assert noisy["df"] > 100


def test_one_seed_gives_the_interval_over_rows_and_one_row_that_over_seeds():
    values = np.random.default_rng(5).standard_normal(30) + 0.2
    low, high = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    for differences, shape in ((values[None, :], (1, 30)), (values[:, None], (30, 1))):
        found = crossed_interval(differences)
        assert (found["low"], found["high"]) == pytest.approx((low, high))
        assert (found["n_seeds"], found["n_rows"]) == shape


def test_one_value_has_a_mean_and_no_interval():
    found = crossed_interval([[0.25]])
    assert found["mean"] == 0.25
    assert found["low"] is found["high"] is found["se"] is found["p"] is None


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.1, 0.0), (-1 / 3, 0.0)])
def test_equal_differences_have_an_interval_of_no_width(value, p):
    found = crossed_interval(np.full((3, 7), value))
    assert (found["mean"], found["low"], found["high"], found["p"]) == (value, value, value, p)


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), [[1.0, np.nan]], np.zeros((2, 3, 4))])
def test_differences_that_are_no_finite_matrix_are_refused(bad):
    with pytest.raises(ValueError, match="finite differences"):
        crossed_interval(bad)


def test_a_mean_square_of_seeds_that_is_small_by_luck_frees_no_degrees_of_freedom():
    """Seeds with exactly equal means: their variance is estimated as zero, from two comparisons."""
    rng = np.random.default_rng(6)
    differences = crossed_draw(rng, 3, 500, of_seeds=0, of_rows=0)
    differences -= differences.mean(1, keepdims=True)
    found = crossed_interval(differences)
    _, _, residual = crossed_mean_squares(differences)
    assert found["se"] >= math.sqrt(residual / 1500)
    assert 2 <= found["df"] < 3
    # Where rows vary most by far, that seeds tell little costs little.
    rows = crossed_interval(differences + 20 * rng.standard_normal((1, 500)))
    assert rows["df"] > 300


@pytest.mark.parametrize(("n_seeds", "n_rows"), [(2, 2), (3, 100), (7, 4), (20, 872)])
def test_no_degrees_of_freedom_below_those_of_the_smaller_factor(n_seeds, n_rows):
    rng = np.random.default_rng(7)
    squares = rng.chisquare(2, (3, 1000))
    se, df = crossed_error(*squares, n_seeds, n_rows)
    assert (df >= min(n_seeds, n_rows) - 1).all() and np.isfinite(se).all()
    assert (se**2 * n_seeds * n_rows >= squares.max(0) * (1 - 1e-12)).all()


BALANCES = [(1, 1, 1), (1, 1, 0), (9, 1, 0), (1, 0, 0), (0, 1, 0.01), (0, 0, 1), (1, 0, 1)]


@pytest.mark.parametrize(("n_seeds", "most"), [(3, 0.08), (5, 0.06), (10, 0.055), (20, 0.053)])
@pytest.mark.parametrize("shares", BALANCES)
def test_a_difference_of_nothing_is_rarely_called_one(n_seeds, most, shares):
    """False positives at 5%: at most 8% at three seeds, 6% at five, near 5% from ten on.

    Mean squares are drawn from their chi-squared laws. Slack: three standard errors, 0.3 points.
    """
    draws, n_rows = 60_000, 300
    rng = np.random.default_rng(8)
    freedom = (n_seeds - 1, n_rows - 1, (n_seeds - 1) * (n_rows - 1))
    expected = (shares[2] + shares[0], shares[2] + shares[1], shares[2])
    squares = [e * rng.chisquare(f, draws) / f for e, f in zip(expected, freedom, strict=True)]
    mean = math.sqrt(sum(shares) / (n_seeds * n_rows)) * rng.standard_normal(draws)
    se, df = crossed_error(*squares, n_seeds, n_rows)
    rate = np.mean(2 * stdtr(df, -np.abs(mean) / se) < 0.05)
    assert rate < most + 3 * math.sqrt(0.05 * 0.95 / draws)


@pytest.mark.parametrize("effects", [(1, 1, 1), (1, 4, 3), (0, 0, 1)])
def test_the_interval_covers_the_true_difference(effects):
    """At least 92% of 95% intervals from ten seeds. Slack: three standard errors, 1.9 points."""
    rng, runs = np.random.default_rng(9), 1200
    covered = 0
    for _ in range(runs):
        found = crossed_interval(crossed_draw(rng, 10, 40, *effects, mean=0.7))
        covered += found["low"] <= 0.7 <= found["high"]
    assert covered / runs > 0.92 - 3 * math.sqrt(0.95 * 0.05 / runs)


# Pigeonhole bootstrap


def test_the_pigeonhole_bootstrap_resamples_seeds_and_rows():
    """Against indices drawn one by one; both standard errors have a Monte Carlo error of 1.6%."""
    rng = np.random.default_rng(10)
    differences = crossed_draw(rng, 8, 30, mean=0.5)
    found = pigeonhole_interval([differences], draws=2000, seed=1)
    means = [
        differences[np.ix_(rng.integers(8, size=8), rng.integers(30, size=30))].mean()
        for _ in range(2000)
    ]
    assert found["mean"] == pytest.approx(differences.mean())
    assert found["se"] == pytest.approx(np.std(means), rel=0.08)
    width = found["high"] - found["low"]
    assert width == pytest.approx(np.ptp(np.quantile(means, [0.025, 0.975])), rel=0.1)
    assert found["low"] < differences.mean() < found["high"]


def test_rows_that_are_alike_are_drawn_as_often_as_they_are_many():
    """4 of 40 rows are 1, the others 0, in every seed: the standard error is a binomial's."""
    differences = np.tile(np.repeat([0.0, 1.0], [36, 4]), (3, 1))
    expected = math.sqrt(0.1 * 0.9 / 40)
    assert pigeonhole_interval([differences])["se"] == pytest.approx(expected, rel=0.06)


def test_the_pigeonhole_bootstrap_agrees_with_the_crossed_interval_where_seeds_and_rows_vary():
    differences = crossed_draw(np.random.default_rng(11), 30, 300, 1, 3, 0.5)
    ours, theirs = crossed_interval(differences), pigeonhole_interval([differences])
    assert theirs["se"] == pytest.approx(ours["se"], rel=0.1)


def test_the_same_seed_gives_the_same_bootstrap_and_a_lower_level_a_narrower_one():
    differences = crossed_draw(np.random.default_rng(12), 4, 20)
    first = pigeonhole_interval([differences], draws=300)
    assert pigeonhole_interval([differences], draws=300) == first
    assert pigeonhole_interval([differences], draws=300, seed=1) != first
    narrow = pigeonhole_interval([differences], draws=300, level=0.5)
    assert first["low"] < narrow["low"] < narrow["high"] < first["high"]


# Statistics of sets of rows


def test_the_jackknife_of_a_mean_is_the_standard_error_of_the_mean():
    rng = np.random.default_rng(13)
    values = rng.standard_normal(100)
    for rows in (10, 50, 90):
        draws = [rng.permutation(values)[:rows].mean() for _ in range(4000)]
        found = seeds_and_rows_interval([values.mean()], [draws], rows, 100)
        assert found["se"] == pytest.approx(scipy.stats.sem(values), rel=0.05)


def test_the_jackknife_interval_is_centred_at_the_value_of_all_rows():
    found = seeds_and_rows_interval([10.0], [[6.0, 7.0, 8.0]], 50, 150)
    assert found["mean"] == 10.0 and found["high"] - 10 == pytest.approx(10 - found["low"])
    half = scipy.stats.t.ppf(0.975, 2) * math.sqrt(50 / 100)
    assert found["high"] == pytest.approx(10 + half)


@pytest.mark.parametrize(("draws", "rows"), [([1.0, 2.0], 10), ([1.0, 2.0], 0), ([1.0], 5)])
def test_subsets_without_a_variance_over_rows_are_refused(draws, rows):
    with pytest.raises(ValueError, match="no variance over rows"):
        seeds_and_rows_interval([1.0], [draws], rows, 10)


def test_the_interval_of_a_rank_adds_the_variance_over_rows_of_the_mean_over_seeds():
    rng = np.random.default_rng(14)
    values, draws = np.array([3.0, 5.0, 4.0]), rng.standard_normal((3, 20))
    found = seeds_and_rows_interval(values, draws, 40, 100)
    over_rows = np.var(draws.mean(0), ddof=1) * 40 / 60
    assert found["se"] == pytest.approx(math.sqrt(1.0 / 3 + over_rows))
    assert (found["mean"], found["df"], found["n_seeds"]) == (4.0, 2, 3)
    with pytest.raises(ValueError, match="one row of draws a seed"):
        seeds_and_rows_interval(values, draws.T, 40, 100)


def test_rows_that_move_all_seeds_together_count_in_full_and_apart_only_in_part():
    rows = np.random.default_rng(15).standard_normal(400)
    values = np.full(4, 2.0)
    together = seeds_and_rows_interval(values, np.tile(rows, (4, 1)), 50, 100)
    apart = seeds_and_rows_interval(values, rows.reshape(4, 100), 50, 100)
    assert together["se"] == pytest.approx(rows.std(ddof=1))
    assert apart["se"] == pytest.approx(rows.std(ddof=1) / 2, rel=0.2)


def test_the_jackknife_interval_covers_the_stable_rank_of_other_samples():
    """At least 92% of 95% intervals. Slack: three standard errors, 3.3 points."""
    rng, runs, total, subsets = np.random.default_rng(17), 400, 120, 40
    scale = np.arange(1, 7) ** -0.5

    def log_stable_rank(x):  # (B, n, D) -> (B,)
        centred = x - x.mean(1, keepdims=True)
        variances = np.linalg.eigvalsh(centred.swapaxes(1, 2) @ centred)
        return np.log(variances.sum(1) / variances[:, -1])

    samples = scale * rng.standard_normal((runs, total, 6))
    at_all = log_stable_rank(samples)
    covered = 0
    for x, value in zip(samples, at_all, strict=True):
        half = rng.permuted(np.tile(np.arange(total), (subsets, 1)), axis=1)[:, : total // 2]
        draws = log_stable_rank(x[half])
        found = seeds_and_rows_interval([value], [draws], total // 2, total)
        covered += found["low"] <= at_all.mean() <= found["high"]
    assert covered / runs > 0.92 - 3 * math.sqrt(0.95 * 0.05 / runs)


# One seed, reruns


@pytest.mark.parametrize(("only_a", "only_b"), [(3, 9), (9, 3), (1, 1), (0, 5), (0, 0)])
def test_mcnemar_is_a_binomial_test_of_the_rows_that_differ(only_a, only_b):
    a = np.array([1] * only_a + [0] * only_b + [1] * 20 + [0] * 5)
    b = np.array([0] * only_a + [1] * only_b + [1] * 20 + [0] * 5)
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_takes_one_seed():
    with pytest.raises(ValueError, match="one seed"):
        mcnemar(np.ones((2, 5)), np.ones((2, 5)))


def test_reruns_are_compared_seed_by_seed():
    theirs = {"42": 0.80, "43": 0.90, "44": 0.70, "50": 0.1}
    yours = {44: 0.71, 42: 0.83, 43: 0.92, 60: 0.99}  # another order, other kinds of keys
    found = paired_difference(theirs, yours)
    expected = scipy.stats.ttest_1samp([0.03, 0.02, 0.01], 0.0)
    low, high = expected.confidence_interval(0.95)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.02, low, high))
    assert (found["p"], found["n"]) == (pytest.approx(expected.pvalue), 3)


def test_a_rerun_without_difference_or_without_a_common_seed():
    same = paired_difference({"1": 0.5, "2": 0.6}, {"1": 0.5, "2": 0.6})
    assert (same["low"], same["high"], same["p"]) == (0.0, 0.0, 1.0)
    assert paired_difference({"1": 0.5}, {"1": 0.6})["low"] is None
    nothing = paired_difference({"1": 0.5}, {"2": 0.6})
    assert nothing["mean"] is nothing["low"] is nothing["p"] is None
    assert nothing["n"] == 0


def test_a_t_interval_at_any_level():
    found = t_interval(1.0, 0.5, 7, 0.99)
    assert (found["low"], found["high"]) == pytest.approx(scipy.stats.t.interval(0.99, 7, 1.0, 0.5))
    assert found["p"] == pytest.approx(2 * scipy.stats.t.sf(2.0, 7))


def test_a_difference_of_two_data_sets_is_welchs():
    """With one row each it is Welch's t interval of two samples of seeds."""
    a, b = np.array([0.1, 0.2, 0.6]), np.array([0.5, 0.52, 0.51, 0.53])
    found = independent_difference(*(crossed_interval(side[:, None]) for side in (a, b)))
    expected = scipy.stats.ttest_ind(b, a, equal_var=False)
    assert found["mean"] == pytest.approx(b.mean() - a.mean())
    assert found["p"] == pytest.approx(expected.pvalue)
    assert (found["low"], found["high"]) == pytest.approx(expected.confidence_interval(0.95))
    one = crossed_interval(np.array([[0.1]]))
    assert independent_difference(one, found)["low"] is None
    still = crossed_interval(np.full((2, 1), 0.5))
    assert independent_difference(still, still)["high"] == 0
