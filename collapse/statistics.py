"""Intervals and tests."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.stats


def mean_interval(values: Iterable[float]) -> dict[str, float | int | None]:
    """Mean and 95 % t interval over independent values (seeds); no interval from fewer than two."""
    values = np.asarray(list(values), dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    half = float(scipy.stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def welch_interval(a: Sequence[float], b: Sequence[float]) -> dict[str, float | None]:
    """Mean of b minus mean of a with Welch's 95 % t interval; no interval when either has fewer
    than two values.
    """
    difference = float(np.mean(b) - np.mean(a))
    if min(len(a), len(b)) < 2:
        return {"mean": difference, "low": None, "high": None}
    if np.ptp(a) == np.ptp(b) == 0:
        return {"mean": difference, "low": difference, "high": difference}
    low, high = scipy.stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    return {"mean": difference, "low": float(low), "high": float(high)}


def difference_interval(theirs: list[float], yours: list[float]) -> dict[str, float | None]:
    """Difference of two means over seeds with a 95 % t interval of pooled variance; none when no
    side has two seeds.
    """
    a, b = np.array(theirs), np.array(yours)
    difference, freedom = float(b.mean() - a.mean()), len(a) + len(b) - 2
    if freedom < 1:
        return {"mean": difference, "low": None, "high": None}
    pooled = (((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / freedom
    half = float(scipy.stats.t.ppf(0.975, freedom) * math.sqrt(pooled * (1 / len(a) + 1 / len(b))))
    return {"mean": difference, "low": difference - half, "high": difference + half}


BOOTSTRAP_DRAWS = 10_000


def compare_models(correct_a: np.ndarray, correct_b: np.ndarray) -> dict[str, Any]:
    """How much better is b than a? From right-or-wrong arrays (S, N): S seeds trained alike, the
    same N rows.

    `difference` is b's mean accuracy minus a's. `seeds` gives its 95 % t interval over seeds,
    paired by seed (another training); `examples` a paired bootstrap interval over rows, seeds
    averaged (another validation set). `mcnemar_p` is the exact two-sided p of McNemar's test for
    each seed. See Dror et al. 2018, Bouthillier et al. 2021.
    """
    a, b = np.atleast_2d(correct_a).astype(np.float64), np.atleast_2d(correct_b).astype(np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    per_row = (b - a).mean(0)  # (N,)
    rng = np.random.default_rng(0)
    # A resample draws N rows with replacement; only how many rows of each distinct difference it
    # holds matters.
    differences, counts = np.unique(per_row, return_counts=True)
    means = (
        rng.multinomial(len(per_row), counts / len(per_row), size=BOOTSTRAP_DRAWS)
        @ differences
        / len(per_row)
    )
    low, high = np.quantile(means, [0.025, 0.975])
    only_b, only_a = ((b > a).sum(1), (a > b).sum(1))  # (S,) discordant rows
    return {
        "difference": float(per_row.mean()),
        "seeds": mean_interval((b - a).mean(1)),
        "examples": {"low": float(low), "high": float(high), "n": len(per_row)},
        "mcnemar_p": [
            float(scipy.stats.binomtest(int(x), int(x + y)).pvalue) if x + y else 1.0
            for x, y in zip(only_b, only_a, strict=True)
        ],
    }


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


def interval_over_rows(draws: np.ndarray, rows: int, total: int) -> dict[str, float]:
    """Mean of a statistic over subsets (draws,) of so many of `total` rows, with a 95 % interval.

    The interval is approximate, by t, and for other samples of `total` rows. Small subsets scatter
    more than their mean is uncertain, large ones overlap and scatter less: deviations count
    sqrt(rows / (total - rows)) times (delete-d jackknife, Shao & Wu 1989).
    """
    mean, spread = float(np.mean(draws)), np.std(draws, ddof=1) * math.sqrt(rows / (total - rows))
    half = float(scipy.stats.t.ppf(0.975, len(draws) - 1) * spread)
    return {"mean": mean, "low": mean - half, "high": mean + half}
