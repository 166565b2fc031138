"""At which learning rate runs collapse, by a grid of rates, and how that moves with training time.

A threshold between two rates of a grid is told by their middle. Where every rate of the grid lies
on one side of it, the grid gives a bound alone: the threshold is censored. Leaving censored
thresholds out, or taking a bound for a value, would bend a line through them; the likelihood of a
bound is the probability of lying beyond it (Tobin 1958).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collapse.measures.statistics import t_interval

KEPT = 1 / 4  # share of the start's components below which a representation has collapsed


@dataclass(frozen=True)
class Threshold:
    """Base-10 logarithms of the two rates of a grid that a threshold lies between.

    `low` is the highest rate up to which every rate was kept, -inf where the lowest was not;
    `high` the next one, inf where every rate was kept. Not `monotone`: a rate above it was kept.
    """

    low: float
    high: float
    monotone: bool = True

    @classmethod
    def of(cls, kept: Mapping[float, bool]) -> "Threshold":
        """From base-10 logarithm of a rate -> whether its run was kept."""
        rates = sorted(kept)
        number = next((n for n, rate in enumerate(rates) if not kept[rate]), len(rates))
        low = rates[number - 1] if number else -math.inf
        high = rates[number] if number < len(rates) else math.inf
        return cls(low, high, not any(kept[rate] for rate in rates[number:]))

    @property
    def censored(self) -> str:
        """`<=` where no rate was kept, `>=` where every rate was, else nothing."""
        return "<=" * (self.low == -math.inf) + ">=" * (self.high == math.inf)

    @property
    def value(self) -> float:
        """Middle of the two rates, in logarithms their geometric one; the bound if censored."""
        if self.censored:
            return self.high if self.low == -math.inf else self.low
        return (self.low + self.high) / 2


def collapsed_by(shares: Sequence[float | None], bound: float) -> bool:
    """Whether a run counts as collapsed at the last of its measurements so far.

    shares: of the start's components, in order; None where a number was not finite, which counts
    for good. It counts as collapsed where the last share is below the bound, or two in a row
    before it were: one that comes back from a single low measurement has not collapsed.
    """
    if None in shares:
        return True
    low = [share < bound for share in shares]
    return low[-1] or any(first and second for first, second in itertools.pairwise(low))


def slope_over_time(thresholds: Mapping[int, Threshold], least_sigma: float) -> float | None:
    """Slope of log10 threshold on log10 steps, of steps -> threshold after so many.

    Thresholds between two rates enter as their middle, censored ones as bounds, see censored_line.
    None where fewer than two are not censored.
    """
    steps = sorted(thresholds)
    if sum(not thresholds[step].censored for step in steps) < 2:
        return None
    low, high = zip(*(_as_known(thresholds[step]) for step in steps), strict=True)
    return censored_line(np.log10(steps), low, high, least_sigma).slope


def _as_known(threshold: Threshold) -> tuple[float, float]:
    if threshold.censored:
        return threshold.low, threshold.high
    return threshold.value, threshold.value


def slope_bounds(
    first: Threshold, last: Threshold, first_step: int, last_step: int
) -> tuple[float, float]:
    """Least and largest slope of log10 threshold on log10 steps that two thresholds leave open.

    Infinite where the rate it needs is missing: the least falls from the lowest collapsed rate of
    the first to the highest kept one of the last.
    """
    decades = math.log10(last_step / first_step)
    return (last.low - first.high) / decades, (last.high - first.low) / decades


def threshold_shift(
    base: Mapping[int, Threshold], other: Mapping[int, Threshold], step: float
) -> dict[str, Any]:
    """How many decades `other` lies above `base`, paired over `n` seeds: a t interval.

    A censored threshold enters with its bound. `lower_bound`: some seed's `other` was kept at every
    rate, so that the shift is at least what is told; `bounded` is False where a threshold is
    censored in another way, and then the mean bounds nothing.
    Thresholds are rounded to a grid with this step, so seeds that agree are not known to: their
    variance is at least that of rounding both, step^2 / 6. No interval without two shared seeds.
    """
    shared = sorted(base.keys() & other.keys())
    differences = np.array([other[seed].value - base[seed].value for seed in shared])
    kinds = {(base[seed].censored, other[seed].censored) for seed in shared}
    told = {"n": len(shared), "lower_bound": ("", ">=") in kinds}
    told["bounded"] = kinds <= {("", ""), ("", ">=")}
    if len(shared) < 2:
        return t_interval(float(np.mean(differences)) if shared else 0.0, 0.0, 0, 0.95) | told
    variance = max(differences.var(ddof=1), step**2 / 6)
    se = math.sqrt(variance / len(shared))
    return t_interval(float(differences.mean()), se, len(shared) - 1, 0.95) | told


@dataclass(frozen=True)
class Line:
    """value = intercept + slope * x + normal error of standard deviation sigma."""

    intercept: float
    slope: float
    sigma: float


def censored_line(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], least_sigma: float
) -> Line:
    """The line of highest likelihood through values known to lie from `low` to `high`, all (N,).

    A value with low = high is known, one with low = -inf or high = inf by one bound alone. Errors
    are independent and normal. `least_sigma` (above 0) keeps sigma away from zero, where points
    lie on a line by the coarseness of their grid: give the standard deviation of rounding to it.
    Without a value that is censored it is the line of least squares. Maximized in slope / sigma and
    1 / sigma, in which the likelihood is concave (Olsen 1978). Raises ValueError where fewer than
    two values, at different x, have both bounds: the rest admits every slope.
    """
    from scipy.optimize import minimize

    x, low, high = (np.asarray(values, dtype=np.float64) for values in (x, low, high))
    if not x.shape == low.shape == high.shape or x.ndim != 1 or (low > high).any():
        raise ValueError("x, low and high are of one length, and no low is above its high")
    if not least_sigma > 0:
        raise ValueError(f"least_sigma is above 0, not {least_sigma}")
    known = np.isfinite(low) & np.isfinite(high)
    if len(np.unique(x[known])) < 2:
        raise ValueError(
            "a line needs two values with both bounds, at different x: the others are censored "
            "and admit every slope"
        )
    if (low == high).all():
        slope, intercept = np.polyfit(x, low, 1)
        sigma = float(np.sqrt(np.mean((low - intercept - slope * x) ** 2)))
        return Line(float(intercept), float(slope), max(sigma, least_sigma))
    # In units of the data, so that the three numbers sought are of like size.
    scale, centre = max(float(np.ptp(x[known])), 1e-12), float(x[known].mean())
    z = (x - centre) / scale
    middle = (low[known] + high[known]) / 2
    slope, intercept = np.polyfit(z[known], middle, 1)
    residuals = middle - intercept - slope * z[known]
    sigma = max(float(np.sqrt(np.mean(residuals**2))), least_sigma)
    start = np.array([intercept / sigma, slope / sigma, 1 / sigma])
    found = minimize(
        _minus_log_likelihood,
        start,
        args=(z, low, high),
        jac=True,
        method="L-BFGS-B",
        bounds=[(None, None), (None, None), (1e-9, 1 / least_sigma)],
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 10_000},
    )
    at_zero, steepness, inverse = found.x
    slope = steepness / inverse / scale
    return Line(float(at_zero / inverse - slope * centre), float(slope), float(1 / inverse))


def _minus_log_likelihood(
    parameters: np.ndarray, z: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[float, np.ndarray]:
    """And its gradient (3,); parameters: intercept, slope (over sigma), 1 / sigma."""
    at_zero, steepness, inverse = parameters
    mean = at_zero + steepness * z  # (N,) over sigma, as all below
    exact = low == high
    error = inverse * low[exact] - mean[exact]
    total = exact.sum() * math.log(inverse) - 0.5 * float(error @ error)
    by_mean = np.zeros_like(z)  # derivative by the mean
    by_mean[exact] = error
    by_inverse = exact.sum() / inverse - float(error @ low[exact])

    between = ~exact
    a = inverse * low[between] - mean[between]
    b = inverse * high[between] - mean[between]
    mass = _log_mass(a, b)
    total += float(mass.sum())
    at_a, at_b = (np.exp(-0.5 * end**2 - 0.5 * math.log(2 * math.pi) - mass) for end in (a, b))
    by_mean[between] = at_a - at_b
    finite_low, finite_high = np.isfinite(a), np.isfinite(b)
    by_inverse += float(at_b[finite_high] @ high[between][finite_high])
    by_inverse -= float(at_a[finite_low] @ low[between][finite_low])
    gradient = np.array([by_mean.sum(), by_mean @ z, by_inverse])
    return -total, -gradient


def _log_mass(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Log of the normal probability from a to b (N,), a < b; precise in both tails."""
    from scipy.special import log_ndtr

    flip = a > 0  # the upper tail is the lower one mirrored
    a, b = np.where(flip, -b, a), np.where(flip, -a, b)
    upper, lower = log_ndtr(b), log_ndtr(a)
    return upper + np.log1p(-np.exp(lower - upper))
