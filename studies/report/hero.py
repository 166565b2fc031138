"""The figure that README and FINDINGS begin with: what the learning rate does to rank and accuracy.

One data set, Models 1 and 2, a point a training. Drawn for own models, and for each real model that
ran; the tables of collapse_threshold.py hold the numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import common
from collapse.measures.thresholds import KEPT
from collapse.report.plots import save_figure
from studies.collapse_threshold import Run, value_of
from studies.report.experiments import model_name

ARMS = ("model1", "model2")
SIDE = {"model1": -0.012, "model2": 0.012}  # decades: points stand beside each other
BAND = 0.07  # decades to each side of the shaded rate
GRAY = {"fontsize": 9, "color": "gray"}


def draw(
    path: Path, title: str, runs: Sequence[Run], shaded: float, marked: Mapping[float, str]
) -> None:
    """Components kept above, validation accuracy below, against the learning rate.

    shaded: base-10 logarithm of the rate whose means are written above it; marked: names of
    further rates, by the same logarithm. Other arms than Models 1 and 2 are left out.
    """
    runs = [run for run in runs if run.trial.arm in ARMS]
    figure, panels = plt.subplots(2, 1, figsize=(7, 6), layout="constrained", sharex=True)
    for axis, measure in zip(panels, ("kept", "validation_accuracy"), strict=True):
        for name in ARMS:
            draw_arm(axis, [run for run in runs if run.trial.arm == name], measure)
        bottom, top = axis.get_ylim()
        axis.set_ylim(bottom, top + 0.15 * (top - bottom))  # room for the means
        axis.axvspan(10 ** (shaded - BAND), 10 ** (shaded + BAND), color="gold", alpha=0.25)
        means = " against ".join(mean_text(runs, name, shaded, measure) for name in ARMS)
        place = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "top"}
        axis.text(10**shaded, 0.97, means, fontsize=9, **place)
        for rate in marked:
            axis.axvline(10**rate, color="gray", linewidth=0.8, linestyle="--")
    kept, accuracy = panels
    name_arms(kept, runs, shaded)
    for rate, name in marked.items():
        place = {"xytext": (4, 3), "textcoords": "offset points"}
        kept.annotate(name, (10**rate, 0), xycoords=("data", "axes fraction"), **place, **GRAY)
    chance = 100 * float(np.mean([run.end["chance"] for run in runs]))
    for axis, height, name in ((kept, 100 * KEPT, "collapsed below"), (accuracy, chance, "chance")):
        axis.axhline(height, color="gray", linewidth=0.8, linestyle=":")
        place = {"xytext": (4, 2), "textcoords": "offset points"}
        axis.annotate(name, (0.19, height), xycoords=("axes fraction", "data"), **place, **GRAY)
    kept.set(ylabel="components kept (%)", title=title, xscale="log")
    accuracy.set(ylabel="validation accuracy (%)", xlabel="learning rate")
    rates = sorted({run.trial.rate for run in runs} | set(marked))
    accuracy.set_xticks([10**rate for rate in rates], [f"{10**rate:.1e}" for rate in rates])
    accuracy.minorticks_off()
    save_figure(figure, path)


def percent(run: Run, measure: str) -> float:
    return value_of(run, measure) * (100 if measure == "kept" else 1)


def means_by_rate(runs: Sequence[Run], arm: str, measure: str) -> dict[float, float]:
    """The mean over an arm's trainings in percent, by base-10 logarithm of the rate."""
    values: dict[float, list[float]] = {}
    for run in sorted(runs, key=lambda run: run.trial.rate):
        if run.trial.arm == arm:
            values.setdefault(run.trial.rate, []).append(percent(run, measure))
    return {rate: float(np.mean(some)) for rate, some in values.items()}


def draw_arm(axis: plt.Axes, runs: Sequence[Run], measure: str) -> None:
    """A point a training, and a line through the means."""
    if not runs:
        return
    arm = common.find_arm(runs[0].trial.arm)
    means = means_by_rate(runs, arm.name, measure)
    for rate in means:
        values = [percent(run, measure) for run in runs if run.trial.rate == rate]
        places = np.full(len(values), 10 ** (rate + SIDE[arm.name]))
        axis.plot(places, values, ".", color=arm.color, alpha=0.5, markersize=5)
    x = [10 ** (rate + SIDE[arm.name]) for rate in means]
    axis.plot(x, list(means.values()), color=arm.color, linewidth=1.5)


def name_arms(axis: plt.Axes, runs: Sequence[Run], shaded: float) -> None:
    """Each arm's name at its line: Model 1's where highest, Model 2's where they part most."""
    first, second = (means_by_rate(runs, name, "kept") for name in ARMS)
    highest = max(first, key=first.get)
    apart = max(set(first) & set(second), key=lambda rate: second[rate] - first[rate])
    align = "left" if highest == min(first) else "right"  # no room before the first point
    beside = apart + (BAND if apart == shaded else 0)  # not over the band
    for name, rate, x, side in (
        (ARMS[0], highest, highest, align),
        (ARMS[1], apart, beside, "left"),
    ):
        arm = common.find_arm(name)
        values = [percent(r, "kept") for r in runs if (r.trial.arm, r.trial.rate) == (name, rate)]
        place = {"xytext": (4, 5), "textcoords": "offset points", "ha": side, "fontsize": 9}
        axis.annotate(f"Model {model_name(name)}", (10**x, max(values)), color=arm.color, **place)


def mean_text(runs: Sequence[Run], arm: str, rate: float, measure: str) -> str:
    mean = means_by_rate(runs, arm, measure)[rate]
    return f"{mean:.0f}%" if measure == "kept" else f"{mean:.1f}%"
