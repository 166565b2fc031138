"""Power and error rates of P6, P7 and P8 of the protocol. Simulations.

Assumes thresholds that move with training time, simulates trainings at the protocol's rates, and
runs the endpoints' code on the simulated measurements. Two minutes on one core; writes
studies/results/statistics/threshold_simulation.json, in per cent of draws.
"""

import argparse
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from collapse.measures.statistics import differences_interval
from collapse.measures.thresholds import (
    KEPT,
    Threshold,
    collapsed_by,
    slope_bounds,
    slope_over_time,
    threshold_shift,
)
from collapse.utils.files import ROOT, write_json
from studies import collapse_time
from studies.collapse_threshold import MARGIN
from studies.collapse_time import FITTED_FROM, ROUNDING
from studies.shared.sweep import LATER_ENDPOINTS, endpoint

OUTPUT = ROOT / "studies" / "results" / "statistics" / "threshold_simulation.json"
DRAWS = 1000
TINY = 1e-9  # decades: slopes that are all 0 differ by rounding, which is no difference
STEPS = collapse_time.Config().measured
FITTED = STEPS[FITTED_FROM:]
RATES = {  # arm -> rates, and the steps that each is trained for
    arm: [
        *itertools.product(part.rates, [STEPS[-1]]),
        *itertools.product(part.short_rates, [STEPS[collapse_time.SHORT]]),
    ]
    for arm, part in collapse_time.PARTS.items()
    if arm in ("model1", "model2")
}
AT_200 = {"model1": -2.38, "model2": -1.43}  # published thresholds after 200 steps
DOUBLING = math.log10(2)
# Standard deviations of thresholds over backbones, and of errors of a training, a measurement.
BACKBONES, TRAININGS, MEASUREMENTS = 0.15, 0.1, 0.1


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help alone
    rng = np.random.default_rng(0)
    results = {
        "settings": {
            "draws": DRAWS,
            "steps": STEPS,
            "threshold at 200 steps": AT_200,
            "sd of backbones, trainings, measurements": [BACKBONES, TRAININGS, MEASUREMENTS],
        },
        "P6": p6(rng),
        "P7": p7(rng),
        "P8": p8(rng),
    }
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    write_json(OUTPUT, results)
    print(OUTPUT.read_text(), end="")


def thresholds_of(
    arm: str, at_200: float, slope: float, rng: np.random.Generator
) -> dict[int, Threshold]:
    """Steps -> threshold of a simulated backbone, whose true one is linear in log10 of steps."""
    collapsed: dict[int, dict[float, bool]] = {step: {} for step in STEPS}
    for rate, longest in RATES[arm]:
        own = rate - at_200 + TRAININGS * rng.standard_normal()
        steps = [step for step in STEPS if step <= longest]
        above = own - slope * np.log10(np.array(steps) / 200)
        above += MEASUREMENTS * rng.standard_normal(len(steps))
        shares = [0.1 if excess > 0 else 0.9 for excess in above]
        for count, step in enumerate(steps, 1):
            collapsed[step][rate] = collapsed_by(shares[:count], KEPT)
    return {
        step: Threshold.of({rate: not fell for rate, fell in by_rate.items()})
        for step, by_rate in collapsed.items()
    }


def p6(rng: np.random.Generator) -> dict[str, Any]:
    """Verdicts by slope, its standard deviation, number of backbones, and shift of thresholds."""
    rates_by_case = {}
    product = [*itertools.product((0.0, -0.25, -0.5, -0.87), (0.1, 0.2), (8, 5), (0.0,))]
    product += [(slope, 0.2, 8, moved) for slope in (0.0, -0.87) for moved in (-0.6, 0.4)]
    for slope, spread, backbones, moved in product:
        name = f"slope {slope:g}, sd {spread:g}, {backbones} backbones"
        name += f", thresholds moved by {moved:+g}" if moved else ""

        def draw(slope=slope, spread=spread, backbones=backbones, moved=moved):
            values, censored = [], 0
            for _ in range(backbones):
                start = AT_200["model1"] + moved + BACKBONES * rng.standard_normal()
                own = slope + spread * rng.standard_normal()
                by_step = thresholds_of("model1", start, own, rng)
                fitted = {step: by_step[step] for step in FITTED}
                censored += sum(bool(threshold.censored) for threshold in fitted.values())
                values.append(slope_over_time(fitted, ROUNDING))
            falls = {n: -value for n, value in enumerate(values) if value is not None}
            complete = len(falls) == backbones
            return differences_interval(falls), complete, censored / backbones / len(FITTED)

        rates_by_case[name] = rates_of(draw)
    return rates_by_case


def p7(rng: np.random.Generator) -> dict[str, Any]:
    """Verdicts by Model 2's slope and number of backbones; Model 1's slope is -0.87."""
    rates_by_case = {}
    for slope, backbones in itertools.product((-0.87, -0.62, -0.4, 0.0), (5, 8)):

        def draw(slope=slope, backbones=backbones):
            values, missing = [], 0
            for _ in range(backbones):
                own = BACKBONES * rng.standard_normal(2)
                slopes = np.array([-0.87, slope]) + 0.15 * rng.standard_normal(2)
                first = thresholds_of("model1", AT_200["model1"] + own[0], slopes[0], rng)
                second = thresholds_of("model2", AT_200["model2"] + own.sum(), slopes[1], rng)
                of_1 = slope_over_time({step: first[step] for step in FITTED}, ROUNDING)
                of_2, _ = slope_bounds(second[200], second[6400], 200, 6400)
                if of_1 is None or not math.isfinite(of_2):
                    missing += 1
                else:
                    values.append(of_2 - of_1)
            interval = differences_interval(dict(enumerate(values))) | {"lower_bound": True}
            return interval, not missing, missing / backbones

        rates_by_case[f"Model 2's slope {slope:g}, {backbones} backbones"] = rates_of(draw)
    return rates_by_case


def p8(rng: np.random.Generator) -> dict[str, Any]:
    """Verdicts by Model 1's threshold and Model 2's shift; five seeds, six rates that double."""
    rates = [math.log10(2e-4) + k * DOUBLING for k in range(6)]
    rates_by_case = {}
    for base, shift, spread in itertools.product((-3.25, -2.75), (0.0, 0.25, 0.5, 0.9), (0.1, 0.2)):

        def draw(base=base, shift=shift, spread=spread):
            sides: list[dict[int, Threshold]] = [{}, {}]
            for seed in range(5):
                for side, at in zip(sides, (base, base + shift), strict=True):
                    own = at + spread * rng.standard_normal()
                    side[seed] = Threshold.of({rate: rate < own for rate in rates})
            interval = threshold_shift(*sides, DOUBLING)
            return interval, interval["bounded"], float(not interval["bounded"])

        rates_by_case[f"Model 1 at 10^{base:g}, shift {shift:g}, sd {spread:g}"] = rates_of(draw)
    return rates_by_case


def rates_of(draw: Callable[[], tuple]) -> dict[str, float]:
    """Per cent of draws with each verdict; mean estimate; mean share censored or missing.

    draw() gives (an interval over backbones, whether all have a value, share that is censored or
    missing).
    """
    verdicts, means, shares, excluded = Counter(), [], [], 0
    for _ in range(DRAWS):
        interval, complete, share = draw()
        shares.append(share)
        judged = endpoint(interval, MARGIN, True, LATER_ENDPOINTS) if complete else None
        if judged is None:
            verdicts["not complete"] += 1
            continue
        verdicts[judged["verdict"]] += 1
        means.append(judged["mean"])
        holm = judged["holm_at_most"]
        excluded += holm["low"] > TINY or holm["high"] < -TINY
    per_cent = {name: round(100 * count / DRAWS, 1) for name, count in sorted(verdicts.items())}
    per_cent["interval excludes zero"] = round(100 * excluded / DRAWS, 1)
    per_cent["mean estimate"] = round(float(np.mean(means)), 3) if means else None
    per_cent["censored or missing"] = round(100 * float(np.mean(shares)), 1)
    return per_cent


if __name__ == "__main__":
    main()
