"""Intervals and tests: numbers of finished runs in, a dict with an interval out. float64.

A difference between two models varies over seeds (another training) and over rows (another
validation set). A claim about the method needs an interval that holds both: `crossed_interval`
where every row has a value (accuracy, losses), `seeds_and_rows_interval` where only a set of rows
has one (ranks, CDNV).

An interval is a dict with `mean`, `low` and `high`; where t's distribution is behind it also `se`,
`df` (degrees of freedom) and `p`, two-sided against zero, which is below 1 - level exactly where
the interval excludes zero. What is unknown for want of data is None.

Ratios are compared as log ratios: pass differences of logs, as log CDNV of one model less that of
the other, and take exp of the ends to read them as factors. So "half" and "twice" lie as far from
no change, and a few seeds with huge ratios do not carry the mean. For jackknife intervals take the
log of each draw, not of the mean over draws.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

PIGEONHOLE_CHUNK = 250  # draws at once: 15 MB of row weights at 7,600 rows


def crossed_interval(differences: np.ndarray, level: float = 0.95) -> dict[str, Any]:
    """Mean of differences (S seeds, N rows), with an interval for other seeds *and* other rows.

    Crossed random-effects analysis of variance with one value a cell (Satterthwaite 1946; Searle et
    al. 1992); see `crossed_error`. With one row only seeds vary (the paired t interval over seeds,
    for values that have no rows), with one seed only rows: `n_seeds` and `n_rows` say so, and such
    an interval speaks of nothing else. One value has no interval. `p` is 1 where all differences
    are 0, and 0 where all are another number.
    """
    differences = _seeds_by_rows(differences)
    origin = differences[0, 0]  # off first: equal differences have no spread, not one of rounding
    mean_squares = crossed_mean_squares(differences - origin)
    se, df = crossed_error(*mean_squares, *differences.shape)
    mean = float(origin + (differences - origin).mean())
    n_seeds, n_rows = differences.shape
    return t_interval(mean, float(se), float(df), level) | {"n_seeds": n_seeds, "n_rows": n_rows}


def crossed_mean_squares(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of differences (S, N): of seeds, of rows, of the rest; 0 without freedom."""
    n_seeds, n_rows = differences.shape
    of_seeds = differences.mean(1, keepdims=True) - differences.mean()  # (S, 1)
    of_rows = differences.mean(0, keepdims=True) - differences.mean()  # (1, N)
    rest = differences - differences.mean() - of_seeds - of_rows  # (S, N)
    freedom = (n_seeds - 1, n_rows - 1, (n_seeds - 1) * (n_rows - 1))
    sums = (n_rows * (of_seeds**2).sum(), n_seeds * (of_rows**2).sum(), (rest**2).sum())
    seeds, rows, residual = (float(s / f) if f else 0.0 for s, f in zip(sums, freedom, strict=True))
    return seeds, rows, residual


def crossed_error(
    of_seeds: Any, of_rows: Any, residual: Any, n_seeds: int, n_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Standard error of the mean and its degrees of freedom, from mean squares or arrays of them.

    SE^2 = (max(MSs, MSe) + max(MSr, MSe) - MSe) / (S N). The floors keep a variance component that
    was estimated below zero at zero. Satterthwaite's approximation takes the mean squares *as
    floored*: one that fell below MSe enters with MSe at its own few degrees of freedom. Had it
    entered as seen, a mean square of seeds that is small by luck would leave the many degrees of
    freedom of the rows to an error that is too small, and such intervals would exclude zero too
    often. There are never fewer degrees of freedom than the smaller of S - 1 and N - 1.
    """
    of_seeds, of_rows = np.maximum(of_seeds, residual), np.maximum(of_rows, residual)
    total = np.asarray(of_seeds + of_rows - residual, dtype=np.float64)
    freedom = (n_seeds - 1, n_rows - 1, (n_seeds - 1) * (n_rows - 1))
    parts = zip((of_seeds, of_rows, residual), freedom, strict=True)
    scatter = np.asarray(sum(np.square(part) / f for part, f in parts if f), dtype=np.float64)
    least = float(min((f for f in freedom if f), default=0))
    df = np.divide(total**2, scatter, out=np.full_like(total, least), where=scatter > 0)
    return np.sqrt(total / (n_seeds * n_rows)), np.maximum(df, least)


def sets_interval(differences: Sequence[np.ndarray], level: float = 0.95) -> dict[str, Any]:
    """Mean over data sets, each counted alike, of differences (S seeds, N rows of the set).

    For other seeds and other rows of the same sets; a seed's trainings on all sets are one draw, so
    seeds vary in the mean of the sets. SE^2 = max(V, sum MSe / (S N D^2)) + sum (max(MSr, MSe) -
    MSe) / (S N D^2), V the variance over seeds of the mean of D sets over S, each sum
    over the sets: with one set it is `crossed_error`. Satterthwaite's degrees of freedom, S - 1 at
    least.
    """
    arrays = [_seeds_by_rows(array) for array in differences]
    n_seeds, n_sets = len(arrays[0]), len(arrays)
    if len({len(array) for array in arrays}) != 1:
        raise ValueError(f"seeds differ between sets: {[len(array) for array in arrays]}")
    means = np.mean([array.mean(1) for array in arrays], axis=0)  # (S,)
    cells = np.array([array.size for array in arrays]) * n_sets**2  # (D,)
    squares = np.array([crossed_mean_squares(array)[1:] for array in arrays])  # (D, 2)
    residual = squares[:, 1] / cells
    of_rows = np.maximum(squares[:, 0], squares[:, 1]) / cells
    of_seeds = max(means.var(ddof=1) / n_seeds if n_seeds > 1 else 0.0, residual.sum())
    total = of_seeds + (of_rows - residual).sum()
    row_freedom = np.array([max(1, array.shape[1] - 1) for array in arrays])
    rest_freedom = row_freedom * max(1, n_seeds - 1)
    scatter = (of_rows**2 / row_freedom + residual**2 / rest_freedom).sum()
    if n_seeds > 1:
        scatter += of_seeds**2 / (n_seeds - 1)
    least = n_seeds - 1 if n_seeds > 1 else int(row_freedom.min())
    df = max(total**2 / scatter, least) if scatter > 0 else least
    found = t_interval(float(means.mean()), math.sqrt(total), float(df), level)
    return found | {"n": n_seeds}


def pigeonhole_interval(
    differences: Sequence[np.ndarray], draws: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Mean over data sets of differences (S, N): seeds and rows resampled apart (Owen 2007).

    Percentiles of the resampled means, for ten seeds or more: few seeds are few to draw from. A
    seed is drawn with all its sets. It asks for no normal distribution, but the variance that is
    neither of seeds nor of rows counts about three times, so it is the wider interval, up to 1.7
    times, where that is most of it. With one seed (or one row) only the other is resampled.
    """
    arrays = [_seeds_by_rows(array) for array in differences]
    n_seeds = len(arrays[0])
    # Rows alike in every seed are one kind: right-or-wrong differences have some hundred kinds.
    kinds = [np.unique(array, axis=1, return_counts=True) for array in arrays]  # (S, K), (K,)
    rng, means = np.random.default_rng(seed), np.empty(draws)
    for start in range(0, draws, PIGEONHOLE_CHUNK):
        n = min(PIGEONHOLE_CHUNK, draws - start)
        seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n)  # (n, S) how often
        total = np.zeros(n)
        for values, counts in kinds:
            n_rows = counts.sum()
            rows = rng.multinomial(n_rows, counts / n_rows, size=n)  # (n, K)
            total += ((seeds @ values) * rows).sum(1) / (n_seeds * n_rows)
        means[start : start + n] = total / len(arrays)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.mean([array.mean() for array in arrays]))
    interval = {"mean": mean, "low": float(low), "high": float(high)}
    return interval | {"se": float(means.std(ddof=1)), "n_seeds": n_seeds}


def seeds_and_rows_interval(
    values: np.ndarray, draws: np.ndarray, rows: int, total: int, level: float = 0.95
) -> dict[str, Any]:
    """Mean over seeds of a statistic of a set of rows, as a rank, for other seeds and other rows.

    `values` (S,) are at all `total` rows and give the centre; `draws` (S, B) are at B random
    subsets of `rows` rows, the same subsets for every seed. SE^2 = variance of values / S +
    delete-d jackknife variance of the mean over seeds (Shao & Wu 1989: that of the subsets counts
    rows / (total - rows) times, since large subsets overlap). S - 1 degrees of freedom: few where
    rows vary more than seeds, which errs on the wide side. From one seed the interval is over rows
    alone, and `n_seeds` says so.
    """
    values, draws = np.asarray(values, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    if draws.ndim != 2 or values.shape != draws.shape[:1]:
        raise ValueError(f"values {values.shape} and draws {draws.shape}: one row of draws a seed")
    n_seeds, n_draws = draws.shape
    if not 0 < rows < total or n_draws < 2:
        raise ValueError(f"{n_draws} draws of {rows} from {total} rows: no variance over rows")
    over_rows = float(draws.mean(0).std(ddof=1)) * math.sqrt(rows / (total - rows))
    over_seeds = values.var(ddof=1) / n_seeds if n_seeds > 1 else 0.0
    se, df = math.sqrt(over_seeds + over_rows**2), (n_seeds if n_seeds > 1 else n_draws) - 1
    return t_interval(float(values.mean()), se, df, level) | {"n_seeds": n_seeds}


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test: ONE seed of each model, right or wrong on N rows.

    It describes these two trained models: another training may turn it, so it is no test of the
    method.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"right-or-wrong arrays of one seed each, not {a.shape} and {b.shape}")
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_difference(
    theirs: Mapping[Any, float], yours: Mapping[Any, float], level: float = 0.95
) -> dict[str, Any]:
    """Mean of yours less theirs (seed -> value), paired t interval over the `n` seeds both ran.

    Seeds of one side alone are left out; 42 and "42" are one seed, as JSON makes text of keys.
    """
    theirs, yours = ({str(k): v for k, v in side.items()} for side in (theirs, yours))
    shared = [seed for seed in yours if seed in theirs]
    if not shared:
        nothing = dict.fromkeys(("mean", "low", "high", "se", "df", "p"))
        return nothing | {"n": 0}
    interval = crossed_interval(np.array([[yours[seed] - theirs[seed]] for seed in shared]), level)
    return {
        key: value for key, value in interval.items() if key != "n_rows" and key != "n_seeds"
    } | {"n": len(shared)}


def differences_interval(by_seed: Mapping[Any, float]) -> dict[str, Any]:
    """paired_difference of what is a difference already: seed -> its value."""
    return paired_difference(dict.fromkeys(by_seed, 0.0), by_seed)


def mean_interval(values: Iterable[float]) -> dict[str, float | int | None]:
    """Mean and 95% t interval over independent values (seeds); no interval from fewer than two."""
    values = np.asarray(list(values), dtype=np.float64)
    n = len(values)
    se = values.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    interval = t_interval(float(values.mean()), float(se), n - 1, 0.95)
    return {name: interval[name] for name in ("mean", "low", "high")} | {"n": n}


def independent_difference(
    a: Mapping[str, Any], b: Mapping[str, Any], level: float = 0.95
) -> dict[str, Any]:
    """b less a, two intervals of data that have nothing in common, as two data sets.

    SE^2 is the sum of both, the degrees of freedom Satterthwaite's; no interval without both.
    """
    mean, se = b["mean"] - a["mean"], None
    if None not in (a["se"], b["se"]):
        parts = [(side["se"] ** 2, side["df"]) for side in (a, b)]
        se, scatter = math.hypot(a["se"], b["se"]), sum(part**2 / df for part, df in parts)
        least = min(df for _, df in parts)  # where nothing varies
        return t_interval(mean, se, se**4 / scatter if scatter else least, level)
    return t_interval(mean, 0.0, 0, level)


def difference_interval(theirs: list[float], yours: list[float]) -> dict[str, float | None]:
    """Difference of two means over seeds with a 95% t interval of pooled variance; none when no
    side has two seeds.
    """
    a, b = np.array(theirs), np.array(yours)
    df, squares = len(a) + len(b) - 2, len(a) * a.var() + len(b) * b.var()
    se = math.sqrt(squares / df * (1 / len(a) + 1 / len(b))) if df else 0.0
    return t_interval(float(b.mean() - a.mean()), se, df, 0.95)


def compare_models(correct_a: np.ndarray, correct_b: np.ndarray) -> dict[str, Any]:
    """How much better is b than a? From right-or-wrong arrays (S, N): S seeds trained alike, the
    same N rows.

    `interval` is the crossed_interval of b's accuracy less a's, for other seeds and other rows;
    `mcnemar_p` describes each seed's two trainings by themselves.
    """
    a, b = np.atleast_2d(correct_a).astype(np.float64), np.atleast_2d(correct_b).astype(np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    p_values = [mcnemar(*pair) for pair in zip(a, b, strict=True)]
    return {"interval": crossed_interval(b - a), "mcnemar_p": p_values}


def format_bounds(interval: dict, digits: int = 2, scale: float = 1.0, sign: str = "") -> str:
    """`[low, high]` of an interval; nothing where there is none."""
    if interval["low"] is None:
        return ""
    return (
        f"[{scale * interval['low']:{sign}.{digits}f}, {scale * interval['high']:{sign}.{digits}f}]"
    )


def format_interval(interval: dict, digits: int = 2, scale: float = 1.0, sign: str = "") -> str:
    """`mean [low, high]`, or the mean alone."""
    bounds = format_bounds(interval, digits, scale, sign)
    return f"{scale * interval['mean']:{sign}.{digits}f} {bounds}".rstrip()


def format_spread(
    values: Iterable[float], digits: int = 2, scale: float = 1.0, sign: str = ""
) -> str:
    """`mean (lowest to highest)` of the seeds' values, or the one value alone."""
    values = [scale * value for value in values]
    shown = [f"{v:{sign}.{digits}f}" for v in (np.mean(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})" if len(values) > 1 else shown[0]


def t_interval(mean: float, se: float, df: float, level: float) -> dict[str, Any]:
    """t interval and two-sided p against zero of a mean; None without a degree of freedom."""
    if df <= 0:
        return {"mean": mean, "low": None, "high": None, "se": None, "df": None, "p": None}
    from scipy.special import stdtr, stdtrit

    half = float(stdtrit(df, (1 + level) / 2)) * se
    p = float(2 * stdtr(df, -abs(mean) / se)) if se > 0 else float(mean == 0)
    return {"mean": mean, "low": mean - half, "high": mean + half, "se": se, "df": df, "p": p}


def sign_flip_p(values: Sequence[float], draws: int = 20_000) -> float:
    """Two-sided p of a mean against zero, from random signs: what a t test's p is checked by."""
    values = np.asarray(values, dtype=np.float64)
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (draws, len(values)))
    larger = np.abs(signs @ values) >= abs(values.sum()) * (1 - 1e-12)
    return float((1 + larger.sum()) / (1 + draws))


def _seeds_by_rows(differences: np.ndarray) -> np.ndarray:
    """(S, N) in float64; one seed's (N,) may come as it is."""
    differences = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    if differences.ndim != 2 or not differences.size or not np.isfinite(differences).all():
        raise ValueError(f"finite differences (S, N), not of shape {differences.shape}")
    return differences
