"""The figures of Experiment 4, a panel or a row of panels for each study."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np

from collapse.plots import save_figure
from collapse.records import keys_of, scalars, title_of
from collapse.statistics import interval_over_rows

FindArm = Callable[[str], Any]  # key of the results -> title, label, color, marker
BEFORE_TRAINING = "#666666"


def plot_all(folder: Path, results: dict[str, dict], find_arm: FindArm) -> None:
    """Draw every figure of the results, as records.summarize gives them, into the folder."""
    plot_ranks(folder / "effective_rank.png", results, find_arm)
    plot_layers(folder / "rank_by_layer.png", results, find_arm)
    plot_collapse(folder / "neural_collapse.png", results, find_arm)
    plot_overview(folder / "overview.png", results, find_arm)


@dataclass(frozen=True)
class Shown:
    """One model of a study as figures show it."""

    key: str
    title: str
    tick: str
    color: str
    marker: str
    records: list[dict]  # one for each seed
    intervals: dict[str, dict]

    @property
    def label(self) -> str:
        count = len(self.records)
        return f"{self.title} ({count} seed{'s' * (count > 1)})"

    def band(self, axis: plt.Axes, x, rows, **look) -> None:
        """Mean line over seeds, and a band from the lowest to the highest; rows is (S, points)."""
        rows = np.array(rows, dtype=float)
        axis.plot(x, rows.mean(0), color=self.color, marker=self.marker, label=self.label, **look)
        axis.fill_between(x, rows.min(0), rows.max(0), color=self.color, alpha=0.2, linewidth=0)


def shown_models(result: dict, find_arm: FindArm) -> list[Shown]:
    found = []
    for key in keys_of(result):
        title, color, marker = title_of(key, result, find_arm), BEFORE_TRAINING, "D"
        tick = title
        if key != "pretrained":
            arm = find_arm(key)
            tick, color, marker = arm.label.capitalize(), arm.color, arm.marker
        records = list(result[key]["seeds"].values())
        found.append(Shown(key, title, tick, color, marker, records, result[key]["intervals"]))
    return found


def in_two_lines(name: str) -> str:
    return name.replace(" training rows, ", " training rows\n")


def name_models(axis: plt.Axes, models: list[Shown]) -> None:
    axis.set_xticks(range(len(models)), [model.tick for model in models], fontsize=7)
    axis.set_xlim(-0.6, len(models) - 0.4)


def grid_of(results: dict[str, dict], columns: int, height: float) -> tuple[plt.Figure, np.ndarray]:
    size = {"figsize": (14, height * len(results)), "layout": "constrained", "squeeze": False}
    return plt.subplots(len(results), columns, **size)


def plot_ranks(path: Path, results: dict[str, dict], find_arm: FindArm) -> None:
    """Singular spectrum, cumulative variance, effective rank over rows, effective rank of all."""
    figure, axes = grid_of(results, 4, 3.2)
    for row, (name, result) in zip(axes, results.items(), strict=True):
        models = shown_models(result, find_arm)
        for model in models:
            values = np.array([r["singular_values"] for r in model.records])  # (S, min(N, D))
            components, look = np.arange(1, values.shape[1] + 1), {"markersize": 4}
            shares = values / values.sum(1, keepdims=True)
            variance = np.cumsum(values**2, 1) / (values**2).sum(1, keepdims=True)
            model.band(row[0], components, shares, markevery=0.15, **look)
            model.band(row[1], components, 100 * variance, markevery=0.15, **look)
            plot_rank_over_rows(row[2], model, result["num_samples"])
        plot_rank_of_all(row[3], models)
        bound, scale = min(result["num_samples"] - 1, len(values[0])), {"xscale": "log"}
        share = "share of the singular values' sum"
        row[0].set(
            xlabel="component", ylabel=share, title=in_two_lines(name), yscale="log", **scale
        )
        row[0].set_ylim(bottom=1e-6)
        rows = f"N = {result['num_samples']:,}"
        row[1].set(xlabel="component", ylabel="cumulative variance (%)", title=rows, **scale)
        subsets = "random subsets\nband: 95 % over rows"
        row[2].set(xlabel="rows", ylabel="effective rank", title=subsets)
        meaning = f"at most {bound:,}; dots: seeds\nbars: 95 % over seeds"
        row[3].set(ylabel="effective rank", title=meaning)
        row[0].legend(fontsize=8)
        for axis in row:
            axis.grid(alpha=0.3)
    figure.suptitle("Pooled hidden states on validation rows")
    save_figure(figure, path)


def plot_rank_over_rows(axis: plt.Axes, model: Shown, total: int) -> None:
    """Effective rank of random subsets of the rows, with its interval over rows."""
    curves = [
        record["subsets"] | {str(record["halves"]["rows"]): record["halves"]["effective_rank"]}
        for record in model.records
    ]
    sizes = sorted(map(int, curves[0]))
    draws = np.mean([[curve[str(size)] for size in sizes] for curve in curves], axis=0)
    points = [interval_over_rows(d, n, total) for d, n in zip(draws, sizes, strict=True)]
    means, lows, highs = ([point[end] for point in points] for end in ("mean", "low", "high"))
    axis.plot(sizes, means, color=model.color, marker=model.marker, markersize=4)
    axis.fill_between(sizes, lows, highs, color=model.color, alpha=0.2, linewidth=0)


def plot_rank_of_all(axis: plt.Axes, models: list[Shown]) -> None:
    """Effective rank of all rows: a bar with its interval over seeds, a dot for each seed."""
    for position, model in enumerate(models):
        interval = model.intervals["effective_rank"]
        axis.bar(position, interval["mean"], color=model.color, alpha=0.8)
        if interval["low"] is not None:
            half = interval["high"] - interval["mean"]
            axis.errorbar(position, interval["mean"], half, color="black", capsize=4)
        ranks = [record["effective_rank"] for record in model.records]
        axis.plot([position] * len(ranks), ranks, ".", color="black")
    name_models(axis, models)


def plot_layers(path: Path, results: dict[str, dict], find_arm: FindArm) -> None:
    """Effective rank by depth, a panel for each study, two abreast."""
    columns = min(2, len(results))
    lines = math.ceil(len(results) / columns)
    size = {"figsize": (5 * columns, 3.8 * lines), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(lines, columns, **size)
    for axis in axes.flat[len(results) :]:
        axis.remove()
    for axis, (name, result) in zip(axes.flat, results.items(), strict=False):
        for model in shown_models(result, find_arm):
            ranks = [[layer["effective_rank"] for layer in r["layers"]] for r in model.records]
            model.band(axis, np.arange(len(ranks[0])), ranks, markersize=3)
        of_language_model = "model" in result["settings"]["config"]
        last = "; last point: after the final norm" if of_language_model else ""
        axis.set(xlabel=f"layer (0: embeddings){last}", ylabel="effective rank of pooled states")
        axis.set_title(f"{in_two_lines(name)}; N = {result['num_samples']:,}")
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower left", handlelength=1)
    figure.suptitle("Where does the rank go? Mean over seeds; band: lowest to highest seed")
    save_figure(figure, path)


COLLAPSE_PANELS = (
    ("cdnv", "NC1: class-distance normalized\nvariance, pooled states"),
    ("intermediate.cdnv", "NC1: the same, classifier's\nintermediate features"),
    ("intermediate.etf_error", "NC2: distance of class means\nfrom a simplex, intermediate"),
    (
        "intermediate.self_duality_error",
        "NC3: distance of the head from\nself-duality, intermediate",
    ),
    ("intermediate.ncc_agreement", "NC4: agreement with the nearest\nclass mean, intermediate"),
)


def plot_collapse(path: Path, results: dict[str, dict], find_arm: FindArm) -> None:
    """Neural-collapse measures: a row for each study, a dot for each seed."""
    figure, axes = grid_of(results, len(COLLAPSE_PANELS), 2.9)
    titles: dict[str, str] = {}
    for row, (name, result) in zip(axes, results.items(), strict=True):
        models = shown_models(result, find_arm)
        titles |= {m.tick: m.title for m in models if m.key != "pretrained"}
        for axis, (number, label) in zip(row, COLLAPSE_PANELS, strict=True):
            for position, model in enumerate(models):
                values, color = [scalars(r)[number] for r in model.records], model.color
                bar = {"marker": "_", "markersize": 20, "markeredgewidth": 2}
                axis.plot(position, np.mean(values), color=color, **bar)
                dots = {"marker": model.marker, "linestyle": "none", "markersize": 5}
                axis.plot([position] * len(values), values, color=color, alpha=0.7, **dots)
            if "cdnv" in number:
                logarithmic(axis)
            elif axis.get_ylim()[1] < 1e-6:
                axis.set_ylim(-0.05, 1)  # two classes always form a simplex: the rest is rounding
            name_models(axis, models)
            axis.set_ylabel(label, fontsize=9)
            axis.grid(alpha=0.3)
        row[0].set_title(f"{in_two_lines(name)}; N = {result['num_samples']:,}", loc="left")
    meaning = "lower is more collapsed, NC4: higher; dots: seeds, bar: their mean"
    names = ", ".join(f"{tick}: {title}" for tick, title in titles.items())
    figure.suptitle(f"Neural collapse on validation rows: {meaning}\n{names}")
    save_figure(figure, path)


def logarithmic(axis: plt.Axes) -> None:
    """A logarithmic scale with labels at 1, 2 and 5, and room for more than one."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    low, high = axis.get_ylim()
    axis.set_ylim(low / 1.3, high * 1.3)


def plot_overview(path: Path, results: dict[str, dict], find_arm: FindArm) -> None:
    """Accuracy, effective rank and engram clusters of every study, with intervals over seeds.

    Ranks are of as many rows in every study, unless one has too few: a rank rises with the rows.
    """
    size = {"figsize": (15, 1.5 + 1.1 * len(results)), "layout": "constrained"}
    figure, axes = plt.subplots(1, 3, sharey=True, **size)
    matched = next(iter(results.values()))["matched_rows"]
    for row, result in enumerate(results.values()):
        for offset, model in enumerate(shown_models(result, find_arm)):
            place, look = (
                row + 0.18 * (offset - 1.5),
                {"color": model.color, "marker": model.marker},
            )
            label = "before training" if model.key == "pretrained" else model.title
            if model.key != "pretrained":
                point(axes[0], place, model.intervals["accuracy"], 100, **look)
            rank = model.intervals["effective_rank_matched" if matched else "effective_rank"]
            rows, dimensions = matched or result["num_samples"], result[model.key]["num_dimensions"]
            point(axes[1], place, rank, 100 / min(rows - 1, dimensions), label=label, **look)
            if "engram_ari" in model.intervals:
                point(axes[2], row - 0.1, model.intervals["engram_ari"], 1, label="trained", **look)
                look = {"color": BEFORE_TRAINING, "marker": "o"}
                look["label"] = "control: untrained compressor"
                point(axes[2], row + 0.1, model.intervals["engram_ari_untrained"], 1, **look)
    axes[0].set_yticks(range(len(results)), map(in_two_lines, results))
    axes[0].invert_yaxis()
    axes[0].set(xlabel="validation accuracy (%)", title="Accuracy")
    rows = f"{matched:,} rows" if matched else "the rows of each"
    label = "effective rank (% of the highest possible)\n"
    label += "to be compared within a study: backbones differ in width"
    axes[1].set(xlabel=label, title=f"Rank of pooled states, {rows}", xlim=(0, 100))
    axes[2].set(xlabel="adjusted Rand index with the classes", title="Engram clusters of model 3")
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        if handles:
            once = dict(zip(labels, handles, strict=True))  # an entry for each kind
            axis.legend(once.values(), once.keys(), fontsize=8)
        axis.grid(alpha=0.3)
    measured = next(iter(results.values()))["measured"]
    note = f"{measured['weights']} epoch, up to {measured['rows']:,} validation rows"
    figure.suptitle(f"{note}; mean over seeds, bars: 95 % over seeds where there are several")
    save_figure(figure, path)


def point(axis: plt.Axes, place: float, interval: dict, scale: float, **look) -> None:
    """A mean and its interval, where there is one, on a horizontal scale."""
    half = 0.0 if interval["low"] is None else scale * (interval["high"] - interval["mean"])
    axis.errorbar(scale * interval["mean"], place, xerr=half, capsize=4, linestyle="none", **look)
