"""Figures of training runs, and how every figure is saved; colours suit colour-blind readers."""

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # plots are files; a machine without a display makes them too
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator

from collapse.arms import find_arm
from collapse.data.task import fixed_draw
from collapse.measures.engrams import k_means, match_clusters, shuffled_labels
from collapse.utils.files import write_file

# Okabe & Ito 2008.
CLASS_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
CLASS_COLORS += ("#56B4E9", "#D55E00", "#F0E442", "#000000")
CLASS_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
LOOKS = len(CLASS_COLORS) * len(CLASS_MARKERS)
MOST_NAMES = 20  # in a legend
HAIR_SPACE = "\u200a"


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG without date and version, so that equal plots are equal files."""
    buffer = io.BytesIO()
    look = {"dpi": 150, "bbox_inches": "tight", "metadata": {"Software": None}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(buffer, format="png", **look)
    plt.close(figure)
    write_file(path, buffer.getvalue())
    messages = {str(warning.message): warning for warning in caught}
    lacking = {int(glyph[1]) for glyph in map(re.compile(r"Glyph (\d+)").match, messages) if glyph}
    for message, warning in messages.items():
        if not message.startswith("Glyph "):
            warnings.warn(warning.message, warning.category, stacklevel=2)
    if new := "".join(map(chr, sorted(lacking - LACKING))):
        LACKING.update(lacking)
        print(f"NOTE: figures show boxes for {new[:20]}, which their font {FONT} lacks", flush=True)


FONT = "DejaVu Sans"  # matplotlib's own
LACKING: set[int] = set()  # characters that a message has named already


def legend_below(figure: plt.Figure, axes: Sequence[plt.Axes] = ()) -> None:
    """One legend for all panels (or these) below the figure, each entry once."""
    entries: dict[str, Any] = {}
    for axis in axes or figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=5, fontsize=9)


def plot_band(axis: plt.Axes, x: Sequence[float], rows: np.ndarray, color: str, **look) -> None:
    """Mean line over seeds, and a band from the lowest to the highest; rows is (S, points)."""
    axis.plot(x, rows.mean(0), color=color, **look)
    axis.fill_between(x, rows.min(0), rows.max(0), color=color, alpha=0.2, linewidth=0)


def label_at_1_2_5(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times each power of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


CURVES = (
    ("accuracy", "accuracy (%)", 100),
    ("cls_loss", "classification loss (nats)", 1),
    ("lm_loss", "LM loss (nats per token)", 1),
    ("effective_rank", "effective rank of pooled features", 1),
)


def plot_learning_curves(path: Path, title: str, models: dict[str, dict]) -> None:
    """Accuracy, losses and effective rank over epochs: mean over seeds, band lowest to highest.

    models: key -> seed -> metrics.
    """
    size = 15 / 4 * len(CURVES), 4
    figure, axes = plt.subplots(1, len(CURVES), figsize=size, layout="constrained")
    for axis, (key, label, scale) in zip(axes, CURVES, strict=True):
        for model_key, runs in models.items():
            arm = find_arm(model_key)
            for split in ("val", "train"):
                values = [[record.get(key) for record in run[split]] for run in runs.values()]
                if values[0][0] is None:  # no LM loss in model 1, no effective rank in training
                    continue
                if split == "val":  # start from the model before its first step
                    values = [
                        [run["initial"][key], *row]
                        for run, row in zip(runs.values(), values, strict=True)
                    ]
                values = scale * np.array(values, dtype=float)  # (S, epochs)
                epochs = np.arange(values.shape[1]) + (split == "train")
                if split == "val":
                    look = {"marker": arm.marker, "label": arm.title, "markersize": 4}
                    plot_band(axis, epochs, values, arm.color, **look)
                else:
                    axis.plot(epochs, values.mean(0), color=arm.color, linestyle="--")
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].plot([], [], "k-", label="validation")
    axes[0].plot([], [], "k--", label="training (with dropout)")
    legend_below(figure)
    counts = sorted({len(runs) for runs in models.values()})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    spread = f"mean of {seeds} seeds, band: lowest to highest seed" if counts != [1] else "1 seed"
    figure.suptitle(f"{title}; {spread}")
    save_figure(figure, path)


MEASURED = (
    ("dims_95pct", "components, 95% of the variance", 1),
    ("effective_rank", "effective rank", 1),
    ("effective_rank_within", "effective rank within classes", 1),
    ("accuracy", "accuracy on training rows (%)", 100),
)


def plot_measured(path: Path, title: str, models: dict[str, dict]) -> None:
    """Ranks and training accuracy over optimizer steps, a line for each training.

    models: key -> seed -> metrics. Trainings without `measured` are left out; if none has it, there
    is no figure.
    """
    runs = [
        (find_arm(key), run["measured"])
        for key, seeds in models.items()
        for run in seeds.values()
        if run.get("measured")
    ]
    if not runs:
        path.unlink(missing_ok=True)
        return
    figure, axes = plt.subplots(1, len(MEASURED), figsize=(15, 4), layout="constrained")
    for axis, (key, label, scale) in zip(axes, MEASURED, strict=True):
        for arm, measured in runs:
            steps = [record["step"] for record in measured]
            values = [np.nan if record[key] is None else scale * record[key] for record in measured]
            axis.plot(steps, values, color=arm.color, label=arm.title, linewidth=1.2)
        axis.set(xlabel="optimizer step", ylabel=label)
        if key != "accuracy":
            axis.set_ylim(bottom=0)  # so that a collapse shows as a share of the start
        axis.grid(alpha=0.3)
    legend_below(figure)
    figure.suptitle(f"{title}; {runs[0][1][0]['rows']:,} validation rows measured")
    save_figure(figure, path)


def plot_engram_clusters(
    path: Path,
    title: str,
    engrams: np.ndarray,
    untrained: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    seed: int,
) -> None:
    """t-SNE of up to 2,000 engrams by true class and by matched cluster; chance and the control."""
    from sklearn.manifold import TSNE  # seconds, which a training that draws nothing would pay

    shown = fixed_draw(len(engrams), 2000)
    if len(shown) < 3:  # t-SNE of a point or two says nothing
        path.unlink(missing_ok=True)
        return
    clusters = k_means(engrams, len(class_names), seed)
    mapping = match_clusters(clusters, labels, len(class_names))["mapping"]
    matched = np.array([mapping[c] for c in clusters])
    perplexity = min(30.0, (len(shown) - 1) / 3)
    trained_points, untrained_points = (
        TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points[shown])
        for points in (engrams, untrained)
    )
    panels = (
        ("engrams, true class", trained_points, labels),
        ("engrams, k-means cluster matched to a class", trained_points, matched),
        ("chance: engrams, class labels shuffled", trained_points, shuffled_labels(labels, seed)),
        ("control: untrained compressor, true class", untrained_points, labels),
    )
    figure, axes = plt.subplots(1, 4, figsize=(19, 5), layout="constrained")
    handles = []
    for axis, (panel, points, colouring) in zip(axes, panels, strict=True):
        for c in range(min(len(class_names), LOOKS)):  # further classes share a look
            chosen = colouring[shown] % LOOKS == c
            look = {"color": CLASS_COLORS[c % 8], "marker": CLASS_MARKERS[(c + c // 8) % 8]}
            dots = axis.scatter(*points[chosen].T, s=10, alpha=0.6, linewidth=0, **look)
            handles.append(dots)
        axis.set(title=panel, xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
    if len(class_names) <= MOST_NAMES:
        # A $ would begin a formula, and an underscore at the beginning hide the name.
        names = [" ".join(name.split())[:40].replace("$", r"\$") for name in class_names]
        names = [HAIR_SPACE + name if name.startswith("_") else name for name in names]
        below = {"loc": "outside lower center", "ncols": 5, "fontsize": 9, "markerscale": 2}
        figure.legend(handles[: len(names)], names, **below)
    else:
        title += f"; {len(class_names):,} classes"
    figure.suptitle(f"{title}; {len(shown):,} of {len(engrams):,} validation rows shown")
    save_figure(figure, path)
