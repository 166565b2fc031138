"""Correlations with an interval, plain and beyond what other variables explain. float64."""

import math
from typing import Any

import numpy as np


def correlation_interval(
    r: float, n: int, level: float = 0.95, controls: int = 0, ranks: bool = False
) -> dict[str, Any]:
    """Interval and two-sided p of a correlation r of n pairs by Fisher's z.

    Each controlled variable costs a pair. Of ranks (Spearman) z varies 1 + r^2 / 2 times as much
    (Bonett & Wright 2000). None with fewer than four pairs.
    """
    freedom = n - controls - 3
    if freedom < 1:
        return {"r": r, "low": None, "high": None, "p": None, "n": n}
    if abs(r) >= 1:
        return {"r": r, "low": r, "high": r, "p": 0.0, "n": n}
    from scipy.stats import norm

    se = math.sqrt((1 + r * r / 2 if ranks else 1.0) / freedom)
    z, half = math.atanh(r), float(norm.ppf((1 + level) / 2)) * se
    p = float(2 * norm.sf(abs(z) / se))
    return {"r": r, "low": math.tanh(z - half), "high": math.tanh(z + half), "p": p, "n": n}


def partial_spearman(
    x: np.ndarray, y: np.ndarray, controls: np.ndarray, level: float = 0.95
) -> dict[str, Any]:
    """Rank correlation of x and y (n,) beyond what controls (n,) or (n, k) explain, as an interval.

    All become ranks, the controls are regressed out of x and y by least squares, and what remains
    is correlated. `r` is None where nothing remains of one of them. Ranks of a sum are no sum of
    ranks: of two strong common causes a little stays (about 0.2 instead of 0 where they explain
    nine tenths of both).
    """
    from scipy.stats import rankdata

    x, y = rankdata(x), rankdata(y)  # (n,)
    controls = np.asarray(controls, dtype=np.float64).reshape(len(x), -1)  # (n, k)
    known = np.column_stack([np.ones(len(x)), rankdata(controls, axis=0)])
    a, b = (v - known @ np.linalg.lstsq(known, v, rcond=None)[0] for v in (x, y))
    floor = 1e-9 * len(x) ** 1.5  # of residuals that are rounding: ranks go up to n
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if min(lengths) <= floor:
        return {"r": None, "low": None, "high": None, "p": None, "n": len(x)}
    r = float(np.clip(a @ b / (lengths[0] * lengths[1]), -1, 1))
    return correlation_interval(r, len(x), level, controls.shape[1], ranks=True)
