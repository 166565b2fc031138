"""The figure that README and FINDINGS begin with: what the learning rate does to rank and accuracy.

One data set, Models 1 and 2, a point a training. Drawn for own models, and for each real model that
ran; the tables of collapse_threshold.py hold the numbers.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import common
from collapse.measures.thresholds import KEPT
from collapse.report.plots import save_figure
from studies.collapse_threshold import Run, value_of

ARMS = ("model1", "model2")
SIDE = {"model1": -0.012, "model2": 0.012}  # decades: points stand beside each other
PUBLISHED_RATE = 2e-4  # of the reference


def draw(
    path: Path,
    title: str,
    runs: Sequence[Run],
    shaded: float | None = None,
    chosen: float | None = None,
) -> None:
    """Components kept above, validation accuracy below, against the learning rate.

    shaded: base-10 logarithm of a rate whose numbers are written beside it; chosen: of the rate
    that rows held out for tuning chose for Model 1. Other arms than Models 1 and 2 are left out.
    """
    runs = [run for run in runs if run.trial.arm in ARMS]
    figure, panels = plt.subplots(2, 1, figsize=(7, 6), layout="constrained", sharex=True)
    measures = ("kept", "validation_accuracy")
    for axis, measure in zip(panels, measures, strict=True):
        for name in ARMS:
            draw_arm(axis, [run for run in runs if run.trial.arm == name], measure)
        if shaded is not None:
            axis.axvspan(10 ** (shaded - 0.1), 10 ** (shaded + 0.1), color="gold", alpha=0.25)
            axis.annotate(
                " against ".join(mean_text(runs, name, shaded, measure) for name in ARMS),
                (10 ** (shaded - 0.12), axis.get_ylim()[0]),
                xytext=(-4, 40),
                textcoords="offset points",
                ha="right",
                fontsize=9,
            )
        if chosen is not None:
            axis.axvline(10**chosen, color="gray", linewidth=0.8, linestyle="--")
    kept, accuracy = panels
    kept.axhline(100 * KEPT, color="gray", linewidth=0.8, linestyle=":")
    beside_line = {**RIGHT, "transform": kept.get_yaxis_transform()}
    kept.text(0.99, 100 * KEPT + 1, "collapsed below", **beside_line)
    kept.set(ylabel="components kept (%)", title=title, xscale="log")
    kept.set_ylim(top=1.12 * kept.get_ylim()[1])  # room for a name above the highest point
    chance = 100 * float(np.mean([run.end["chance"] for run in runs]))
    accuracy.axhline(chance, color="gray", linewidth=0.8, linestyle=":")
    beside_line["transform"] = accuracy.get_yaxis_transform()
    accuracy.text(0.15, chance + 1, "chance", **beside_line)
    accuracy.set(ylabel="validation accuracy (%)", xlabel="learning rate")
    rates = [10**run.trial.rate for run in runs]
    if min(rates) <= PUBLISHED_RATE <= max(rates):
        kept.axvline(PUBLISHED_RATE, color="black", linewidth=0.8)
        kept.annotate("published rate", (PUBLISHED_RATE, 0.03), **BESIDE)
    if chosen is not None:
        kept.annotate("rate one would choose", (10**chosen, 0.03), **BESIDE)
    save_figure(figure, path)


RIGHT = {"ha": "right", "va": "bottom", "fontsize": 9, "color": "gray"}
BESIDE = {
    "xycoords": ("data", "axes fraction"),
    "xytext": (4, 0),
    "textcoords": "offset points",
    "fontsize": 9,
    "color": "gray",
}


def percent(run: Run, measure: str) -> float:
    return value_of(run, measure) * (100 if measure == "kept" else 1)


def draw_arm(axis: plt.Axes, runs: Sequence[Run], measure: str) -> None:
    """A point a training, a line through the means, the arm's name at its end."""
    if not runs:
        return
    arm = common.find_arm(runs[0].trial.arm)
    rates = sorted({run.trial.rate for run in runs})
    means = []
    for rate in rates:
        values = [percent(run, measure) for run in runs if run.trial.rate == rate]
        means.append(np.mean(values))
        places = np.full(len(values), 10 ** (rate + SIDE[arm.name]))
        axis.plot(places, values, ".", color=arm.color, alpha=0.5, markersize=5)
    x = [10 ** (rate + SIDE[arm.name]) for rate in rates]
    axis.plot(x, means, color=arm.color, linewidth=1.5)
    if measure == "kept":  # named once
        highest = max(percent(run, measure) for run in runs if run.trial.rate == rates[0])
        axis.annotate(
            f"Model {arm.name.removeprefix('model')}: {arm.title}",
            (10 ** rates[0], highest),
            xytext=(-4, 7),
            textcoords="offset points",
            color=arm.color,
            fontsize=10,
        )


def mean_text(runs: Sequence[Run], name: str, rate: float, measure: str) -> str:
    values = [percent(r, measure) for r in runs if (r.trial.arm, r.trial.rate) == (name, rate)]
    return f"{np.mean(values):.0f}%" if measure == "kept" else f"{np.mean(values):.1f}%"
