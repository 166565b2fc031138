"""The figures of Experiment 4, a row of panels for each study."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from collapse.arms import find_arm
from collapse.report.comparisons import comparisons_of
from collapse.report.plots import label_at_1_2_5, legend_below, plot_band, save_figure
from collapse.report.records import keys_of, title_of, values_of
from collapse.report.reference import reference_for
from collapse.utils.files import ROOT, read_json, settings_difference

BEFORE_TRAINING = "#666666"
LEAST_DEPTHS = 5  # points that a line over depth needs


def plot_all(folder: Path, results: dict[str, dict]) -> None:
    """Draw every figure of the results, as records.summarize gives them, into the folder."""
    plot_ranks(folder / "effective_rank.png", results)
    plot_layers(folder / "rank_by_layer.png", results)
    plot_collapse(folder / "neural_collapse.png", results)
    plot_overview(folder / "overview.png", results)


@dataclass(frozen=True)
class Shown:
    """One model of a study with its look in figures."""

    key: str
    title: str
    tick: str
    color: str
    marker: str
    records: list[dict]  # one for each seed

    def band(self, axis: plt.Axes, x, rows, **look) -> None:
        """Mean and range over seeds; rows is (S, points)."""
        look |= {"marker": self.marker, "label": self.title}
        plot_band(axis, x, np.array(rows, dtype=float), self.color, **look)

    def dots(self, axis: plt.Axes, position: float, values: Iterable[float]) -> None:
        """A dot for each seed and a bar for their mean."""
        values = list(values)
        bar = {"marker": "_", "markersize": 20, "markeredgewidth": 2}
        axis.plot(position, np.mean(values), color=self.color, **bar)
        dots = {"marker": self.marker, "linestyle": "none", "markersize": 5, "alpha": 0.7}
        axis.plot([position] * len(values), values, color=self.color, label=self.title, **dots)


def shown_models(result: dict) -> list[Shown]:
    models = []
    for key in keys_of(result):
        title, tick, color, marker = "Before training", "Start", BEFORE_TRAINING, "D"
        if key != "pretrained":
            arm = find_arm(key)
            title, tick = title_of(key, result), arm.label.capitalize()
            color, marker = arm.color, arm.marker
        models.append(Shown(key, title, tick, color, marker, list(result[key]["seeds"].values())))
    return models


def in_two_lines(name: str) -> str:
    """A study's name for a figure in two lines; of a folder in it only the last part."""
    name = re.sub(r", results\S*/", ", ", name)
    return name.replace(" training rows, ", " training rows\n")


def name_models(axis: plt.Axes, models: list[Shown]) -> None:
    axis.set_xticks(range(len(models)), [model.tick for model in models], fontsize=8)
    axis.set_xlim(-0.6, len(models) - 0.4)


def grid_of(studies: int, columns: int, height: float) -> tuple[plt.Figure, np.ndarray]:
    size = {"figsize": (14, 1 + height * studies), "layout": "constrained", "squeeze": False}
    return plt.subplots(studies, columns, **size)


def plot_ranks(path: Path, results: dict[str, dict]) -> None:
    """Singular spectrum, cumulative variance, effective rank over rows, effective rank of all."""
    figure, axes = grid_of(len(results), 4, 2.9)
    for row, (name, result) in zip(axes, results.items(), strict=True):
        models = shown_models(result)
        for position, model in enumerate(models):
            values = np.array([r["singular_values"] for r in model.records])  # (S, min(N, D))
            components, look = np.arange(1, values.shape[1] + 1), {"markersize": 4}
            shares = values / values.sum(1, keepdims=True)
            variance = np.cumsum(values**2, 1) / (values**2).sum(1, keepdims=True)
            model.band(row[0], components, shares, markevery=0.15, **look)
            model.band(row[1], components, 100 * variance, markevery=0.15, **look)
            model.band(row[2], *rank_over_rows(model), **look)
            model.dots(row[3], position, (record["effective_rank"] for record in model.records))
        bound = min(result["num_samples"] - 1, len(values[0]))
        share = "share of the singular values' sum"
        row[0].set(xlabel="component", ylabel=share, xscale="log", yscale="log")
        row[0].set_ylim(bottom=1e-5)
        row[0].set_title(f"{in_two_lines(name)}; N = {result['num_samples']:,}", loc="left")
        row[1].set(xlabel="component", ylabel="cumulative variance (%)", xscale="log")
        row[2].set(xlabel="rows, random subsets", ylabel="effective rank")
        row[3].set(ylabel=f"effective rank, at most {bound:,}")
        name_models(row[3], models)
        for axis in row:
            axis.grid(alpha=0.3)
    legend_below(figure)
    figure.suptitle(
        "Pooled hidden states on validation rows; mean of the seeds, band or dots: each"
    )
    save_figure(figure, path)


def rank_over_rows(model: Shown) -> tuple[list[int], np.ndarray]:
    """Sizes of subsets of the rows, and the mean rank of each seed's draws (S, sizes)."""
    curves = [
        record["subsets"] | {str(record["halves"]["rows"]): record["halves"]["effective_rank"]}
        for record in model.records
    ]
    sizes = sorted(map(int, curves[0]))
    return sizes, np.array([[np.mean(curve[str(size)]) for size in sizes] for curve in curves])


DEPTH_PANELS = {
    "effective_rank": "all rows and tokens",
    "effective_rank_without_first": "without the first token",
    "effective_rank_within": "within classes",
    "effective_rank_within_without_first": "within classes, without the first token",
}


def plot_layers(path: Path, results: dict[str, dict]) -> None:
    """Effective rank by depth: a row of panels for each study of a deep model, a panel per measure.

    Records of older versions have the first measure alone. No figure if no model is deep.
    """
    deep = {
        name: result
        for name, result in results.items()
        if len(shown_models(result)[0].records[0]["layers"]) >= LEAST_DEPTHS
    }
    if not deep:
        path.unlink(missing_ok=True)
        return
    first = [shown_models(result)[0].records[0]["layers"][0] for result in deep.values()]
    measures = [name for name in DEPTH_PANELS if all(name in layer for layer in first)]
    panels = [(name, result, measure) for name, result in deep.items() for measure in measures]
    columns = len(measures) if len(measures) > 1 else min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = {"figsize": (5.5 * columns, 1 + 3.8 * lines), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(lines, columns, **size)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, result, measure) in zip(axes.flat, panels, strict=False):
        for model in shown_models(result):
            ranks = [[layer[measure] for layer in record["layers"]] for record in model.records]
            model.band(axis, np.arange(len(ranks[0])), ranks, markersize=3)
        axis.set(xlabel="layer (0: embeddings; last: after the final norm)")
        axis.set(ylabel="effective rank of pooled states")
        title = f"{in_two_lines(name)}; N = {result['num_samples']:,}"
        axis.set_title(f"{title}\n{DEPTH_PANELS[measure]}", loc="left", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    legend_below(figure)
    figure.suptitle("Effective rank by depth: mean of the seeds, band: lowest to highest")
    save_figure(figure, path)


# NC2 is left out: the means of two classes always form a simplex.
COLLAPSE_PANELS = {
    "cdnv": "NC1: CDNV, pooled states",
    "intermediate.cdnv": "NC1: CDNV, intermediate",
    "intermediate.self_duality_error": "NC3: self-duality error",
    "intermediate.ncc_agreement": "NC4: agreement",
}


def plot_collapse(path: Path, results: dict[str, dict]) -> None:
    """Neural-collapse measures: a row for each study, a dot for each seed."""
    figure, axes = grid_of(len(results), len(COLLAPSE_PANELS), 2.6)
    for row, (name, result) in zip(axes, results.items(), strict=True):
        models = shown_models(result)
        for axis, (number, label) in zip(row, COLLAPSE_PANELS.items(), strict=True):
            for position, model in enumerate(models):
                model.dots(axis, position, values_of(result, model.key, number))
            if "cdnv" in number:
                logarithmic(axis)
            name_models(axis, models)
            axis.set_ylabel(label, fontsize=9)
            axis.grid(alpha=0.3)
        row[0].set_title(f"{in_two_lines(name)}; N = {result['num_samples']:,}", loc="left")
    legend_below(figure)
    meaning = "lower is more collapsed, NC4: higher; dots: seeds, bar: their mean"
    figure.suptitle(f"Neural collapse on validation rows: {meaning}")
    save_figure(figure, path)


def logarithmic(axis: plt.Axes) -> None:
    """A logarithmic scale with labels at 1, 2 and 5, and room for more than one."""
    axis.set_yscale("log")
    label_at_1_2_5(axis.yaxis)
    low, high = axis.get_ylim()
    axis.set_ylim(low / 1.3, high * 1.3)


def plot_overview(path: Path, results: dict[str, dict]) -> None:
    """Accuracy against model 1, rank against the start, CDNV against model 1: a row for each study.

    Bars are intervals for other seeds and rows; hollow marks are the reference's, one seed each.
    """
    size = {"figsize": (14, 1.8 + 1.0 * len(results)), "layout": "constrained"}
    figure, axes = plt.subplots(1, 3, sharey=True, **size)
    for row, result in enumerate(results.values()):
        reference = reference_for(result["folder"]) or {}
        gains = accuracy_gains(result)
        for model in shown_models(result)[1:]:
            look = {"color": model.color, "marker": model.marker, "label": model.title}
            height = row + {"model1": -0.22, "model3": 0.22}.get(model.key, 0.0)
            if gain := gains.get(f"{model.key} - model1"):
                point(axes[0], height, ends(gain, lambda value: 100 * value), **look)
                if reference:
                    final = reference["final"]
                    hollow(axes[0], height, final[model.key] - final["model1"], **look)
            if change := result["changes"].get(f"{model.key} - pretrained"):
                start = np.mean(values_of(result, "pretrained", "effective_rank"))
                rank = change["both"]["effective_rank"]
                shares = ends(rank, lambda value, start=start: 100 * (1 + value / start))
                point(axes[1], height, shares, **look)
                if "ranks" in reference:
                    ranks = reference["ranks"]
                    share = 100 * ranks[model.key][0] / ranks["pretrained"][0]
                    hollow(axes[1], height, share, **look)
            change = result["changes"].get(f"{model.key} - model1", {}).get("both", {})
            if ratio := change.get("cdnv_log_ratio"):
                point(axes[2], height, ends(ratio, math.exp), **look)
    axes[0].set_yticks(range(len(results)), map(in_two_lines, results))
    axes[0].invert_yaxis()
    finish_overview(figure, axes)
    save_figure(figure, path)


def accuracy_gains(result: dict) -> dict[str, dict]:
    """Pair -> interval of the difference in final accuracy; empty without a results.json.

    Empty also where that is of another run, whose settings differ.
    """
    file = ROOT / result["folder"] / "results.json"
    published = read_json(file) if file.exists() else None
    if published is None or settings_difference(published, result["settings"]):
        return {}
    pairs = comparisons_of(published)["final"]
    return {pair: comparison["interval"] for pair, comparison in pairs.items()}


def ends(interval: dict, scaled: Callable[[float], float]) -> dict[str, float]:
    """Mean and bounds of an interval, without those that are None, on another scale."""
    known = {name: interval[name] for name in ("mean", "low", "high")}
    return {name: scaled(value) for name, value in known.items() if value is not None}


def finish_overview(figure: plt.Figure, axes: np.ndarray) -> None:
    axes[0].set(title="Final validation accuracy", xlabel="minus Model 1's (points)")
    axes[1].set(title="Effective rank after training", xlabel="% of the rank before training")
    axes[1].set_xlim(left=-3)  # a mark at 1% is seen whole
    axes[2].set(title="Spread within classes (CDNV)", xlabel="over Model 1's (factor)")
    axes[2].set_xscale("log")
    label_at_1_2_5(axes[2].xaxis)
    for axis, nothing in zip(axes, (0, 100, 1), strict=True):
        axis.axvline(nothing, color="black", linewidth=0.8, zorder=0)
        axis.grid(alpha=0.3, axis="x")
    look = {
        "color": BEFORE_TRAINING,
        "marker": "o",
        "label": "the reference's own model and rows, one seed",
    }
    axes[1].plot([], [], markerfacecolor="white", linestyle="none", **look)
    legend_below(figure, axes[1:2])
    figure.suptitle("Final epoch; bars: 95% interval for other seeds and rows")


def point(axis: plt.Axes, height: float, interval: dict, **look) -> None:
    """A mean with a horizontal bar for its interval, if it has one."""
    mean = interval["mean"]
    reach = [[mean - interval.get("low", mean)], [interval.get("high", mean) - mean]]
    axis.errorbar(mean, height, xerr=reach, capsize=4, linestyle="none", **look)


def hollow(axis: plt.Axes, height: float, value: float, color: str, marker: str, **_) -> None:
    """The reference's number, as a hollow mark above ours."""
    look = {"color": color, "marker": marker, "markerfacecolor": "white", "linestyle": "none"}
    axis.plot(value, height - 0.1, **look)
