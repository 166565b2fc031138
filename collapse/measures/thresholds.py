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

    Of the line of highest likelihood with independent normal errors: a threshold between two rates
    enters as their middle, a censored one as a bound. None where fewer than two are not censored:
    every slope is then admitted. Without a censored one it is the line of least squares.
    `least_sigma` (above 0) keeps the errors' standard deviation away from zero, where points lie on
    a line by the coarseness of their grid: give that of rounding to it. Maximized in slope / sigma
    and 1 / sigma, in which the likelihood is concave (Olsen 1978).
    """
    from scipy.optimize import minimize

    steps = sorted(thresholds)
    x, values = np.log10(steps), np.array([thresholds[step].value for step in steps])
    kinds = np.array([thresholds[step].censored for step in steps])
    known = kinds == ""
    if known.sum() < 2:
        return None
    if known.all():
        return float(np.polyfit(x, values, 1)[0])
    scale, centre = np.ptp(x[known]), x[known].mean()  # so that what is sought is of like size
    z = (x - centre) / scale
    slope, intercept = np.polyfit(z[known], values[known], 1)
    residuals = values[known] - intercept - slope * z[known]
    sigma = max(float(np.sqrt(np.mean(residuals**2))), least_sigma)
    found = minimize(
        _minus_log_likelihood,
        np.array([intercept, slope, 1]) / sigma,
        args=(z, values, known, np.where(kinds == ">=", 1, -1)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(None, None), (None, None), (1e-9, 1 / least_sigma)],
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 10_000},
    )
    return float(found.x[1] / found.x[2] / scale)


def _minus_log_likelihood(
    parameters: np.ndarray, z: np.ndarray, values: np.ndarray, known: np.ndarray, side: np.ndarray
) -> tuple[float, np.ndarray]:
    """And its gradient (3,); parameters: intercept, slope (over sigma), 1 / sigma.

    side (N,): 1 where a value that is not known lies above its bound, -1 where below.
    """
    from scipy.special import log_ndtr

    at_zero, steepness, inverse = parameters
    error = inverse * values - at_zero - steepness * z  # (N,) over sigma
    mass = log_ndtr(-side * error)  # log probability of lying beyond the bound
    beyond = side * np.exp(-0.5 * error**2 - 0.5 * math.log(2 * math.pi) - mass)
    total = np.where(known, math.log(inverse) - 0.5 * error**2, mass).sum()
    by_mean = np.where(known, error, beyond)  # derivative by the mean
    by_inverse = known.sum() / inverse - by_mean @ values
    return -total, -np.array([by_mean.sum(), by_mean @ z, by_inverse])


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
