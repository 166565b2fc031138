"""What an endpoint's interval means: correction for several endpoints, equivalence, the verdict."""

from collections.abc import Mapping
from typing import Any

from collapse.measures.statistics import t_interval


def verdict(
    estimate: float,
    holm_interval: Mapping[str, Any],
    interval_90: Mapping[str, Any],
    margin: float,
    planned_done: bool,
    lower_bound: bool = False,
) -> dict[str, Any]:
    """`verdict` on an effect said to be above zero, `half_width`, `margin`, a `text` with both.

    In this order: *supported*, the Holm-adjusted interval is above zero and the estimate beyond the
    margin; *refuted*, that interval is below zero, or the 90% interval lies inside the margin on
    both sides (no effect of interest, though perhaps one above zero); *small*, that interval
    excludes zero and the estimate is within the margin; *not decided* otherwise. Without an
    interval nothing is decided. An estimate that is a lower bound of the effect, as where what it
    is read from is censored, can be supported and nothing else. The text of a verdict before all
    planned seeds ran says so: "not decided" is no outcome until they did.
    """
    if not margin > 0:
        raise ValueError(f"a margin is above 0, not {margin}")
    low, high = holm_interval["low"], holm_interval["high"]
    known = low is not None and interval_90["low"] is not None
    if known and low > 0 and estimate > margin:
        found = "supported"
    elif known and (high < 0 or (-margin < interval_90["low"] and interval_90["high"] < margin)):
        found = "refuted"
    elif known and low > 0:
        found = "small"
    else:
        found = "not decided"
    if lower_bound and found != "supported":
        found = "not decided"
    half = (high - low) / 2 if low is not None else None
    bounds = "no interval"
    if known:
        bounds = f"Holm-adjusted [{low:+.3g}, {high:+.3g}], half-width {half:.3g}, "
        bounds += f"90% [{interval_90['low']:+.3g}, {interval_90['high']:+.3g}]"
    text = f"{found}: {estimate:+.3g}, {bounds}, margin {margin:g}"
    text += ", a lower bound" if lower_bound else ""
    text += "" if planned_done else "; not all planned seeds ran"
    return {"verdict": found, "half_width": half, "margin": margin, "text": text}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for testing them all (Holm 1979): at most alpha where Holm rejects."""
    if not all(0 <= p <= 1 for p in p_values.values()):
        raise ValueError(f"p-values outside 0 to 1: {dict(p_values)}")
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def holm_levels(p_values: Mapping[str, float], alpha: float = 0.05) -> dict[str, float]:
    """The level of each endpoint's Holm-adjusted interval, from all endpoints' unadjusted p.

    Holm compares the smallest p with alpha / m, the next with alpha / (m - 1), and stops at the
    first that is larger. An endpoint's level is 1 - alpha / k, k the number of hypotheses left when
    its turn came, or when the procedure stopped. An interval at that level excludes zero exactly
    where Holm rejects, so whatever rests on excluding zero, as a verdict does, is wrong for any
    endpoint with probability alpha at most. For values other than zero the intervals hold one at a
    time only; Bonferroni's (k = m everywhere) hold together, but can include zero where Holm
    rejects, so that interval and p would disagree. The 90% interval of a verdict is not adjusted:
    each "no effect of interest" is a statement on its own.
    """
    levels, left = {}, len(p_values)
    for name in sorted(p_values, key=p_values.__getitem__):
        levels[name] = 1 - alpha / left
        if p_values[name] <= alpha / left:
            left -= 1
    return {name: levels[name] for name in p_values}


def equivalence(estimate: float, se: float, df: float, margin: float) -> dict[str, float]:
    """Is the effect within the margin? `p` of two one-sided t tests (Schuirmann 1987).

    `p` is below 0.05 exactly where `low` to `high`, the 90% interval, lies inside the margin.
    """
    from scipy.special import stdtr

    interval = t_interval(estimate, se, df, 0.90)
    inside = margin - abs(estimate)  # how far the nearer bound of the margin is
    p = float(stdtr(df, -inside / se)) if se > 0 else float(inside <= 0)
    return {"p": p, "low": interval["low"], "high": interval["high"], "margin": margin}
