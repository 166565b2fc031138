"""Does neural collapse grow with language models, and predict their loss beyond their size?

Repeats "Linguistic Collapse" (Wu & Papyan 2024) at a scale for two CPU cores: small language models
of many sizes, and many seeds of one size, each measured when it is trained. Writes a row of
models.csv for each model, then results.json and linguistic_collapse.png. Models with a row are not
trained again; the same command resumes where it was stopped.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from collapse.config import check_bounds
from collapse.data.corpus import VOCABULARY, tokens_of
from collapse.measures.correlations import correlation_interval, partial_spearman
from collapse.measures.statistics import paired_difference
from collapse.measures.tokens_as_classes import token_collapse_metrics
from collapse.measures.verdicts import holm
from collapse.report.plots import CLASS_COLORS, CLASS_MARKERS, save_figure
from collapse.runs.engine import run_all
from collapse.runs.progress import Job, Progress
from collapse.training.pretraining import Recipe, states_and_targets
from collapse.utils import command_line
from collapse.utils.device import set_threads
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT, locked, read_json, write_json
from studies.shared import pretrain, sweep
from studies.shared.tables import into_table, read_rows, reset_missing_jobs

PRIMARY = ("agreement", "cdnv", "log_kernel_var", "cosine_cv")  # of studies/PROTOCOL.md
TITLES = {
    "cdnv": "NC1: CDNV",
    "cdnv_quartic": "NC1: CDNV, power 4",
    "cdnv_frequent": "NC1: CDNV, 20 tokens or more",
    "norm_cv": "NC2: variation of norms",
    "etf_error": "NC2: ETF error",
    "log_kernel_var": "NC2: log-kernel variance",
    "self_duality_error": "NC3: self-duality error",
    "cosine_mean": "NC3: mean cosine",
    "cosine_cv": "NC3: variation of cosines",
    "agreement": "NC4: agreement",
}


@dataclasses.dataclass
class Config:
    """Settings of the study; the comment above a field is its --help text."""

    # Text; `make corpus` fetches that of newsgroups.
    corpus: pretrain.CorpusName = command_line.grouped("newsgroups", "data")
    # Trainings to run in parallel, each in its own process with one thread.
    workers: int = command_line.grouped(1, "execution")
    # Parts of the study to run: seeds (30 of one size), decay (ten of them with less weight decay),
    # grid (sizes). Results always use all existing rows.
    parts: tuple[str, ...] = ("seeds", "decay", "grid")
    # How many of the 30 seeds to run.
    seeds: int = 30
    # Leave out models of more epochs; those of ten take two thirds of the time of all sizes.
    max_epochs: int = 10
    # Run the whole study with a few tiny models on generated text, in a folder that git ignores.
    miniature: bool = command_line.grouped(False, "execution")
    # Only write results.json and the figure, from existing rows.
    summarize: bool = command_line.grouped(False, "execution")
    # CSV file with Wu & Papyan's table, to show beside ours. Default: not shown.
    paper_table: Path | None = command_line.grouped(None, "data")
    # Folder for models.
    models_dir: Path = command_line.grouped(pretrain.LANGUAGE_MODELS, "execution")
    # Folder for results.
    output_dir: Path = command_line.grouped(
        ROOT / "studies" / "results" / "linguistic_collapse", "execution"
    )


def plan(miniature: bool) -> dict[str, list[Recipe]]:
    """Part of the study -> recipes of its models; a model may be in two parts."""
    if miniature:
        fixed = pretrain.fixed_size(0, "miniature")
        sizes = [(32, 1, 2), (64, 1, 1), (32, 2, 1)]
        seeds, decayed, grid = range(5), range(2), [(*size, 0) for size in sizes]
    else:
        fixed = Recipe()  # width 128, 2 layers, 3 epochs: the backbones of the other studies
        sizes = [(w, n, e) for w in (32, 64, 128) for n in (1, 2, 4) for e in (1, 3, 10)]
        large = [(256, n, e, 0) for n in (1, 2) for e in (1, 3)]
        seeds, decayed = range(30), range(10)
        grid = [(*size, seed) for size in sizes for seed in (0, 1)] + large
    return {
        "seeds": [dataclasses.replace(fixed, seed=seed) for seed in seeds],
        "decay": [dataclasses.replace(fixed, seed=seed, weight_decay=5e-4) for seed in decayed],
        "grid": [
            dataclasses.replace(fixed, width=width, layers=layers, epochs=epochs, seed=seed)
            for width, layers, epochs, seed in grid
        ],
    }


def run_missing(config: Config, recipes: list[Recipe]) -> None:
    """Train and measure every model without a row in models.csv."""
    table, state = config.output_dir / "models.csv", config.output_dir / "state"
    train_one = pretrain.trainer(recipes, config.corpus, config.models_dir)
    models = {
        pretrain.folder_name(recipe, config.corpus): pretrain.job_of(
            recipe, config.corpus, config.models_dir
        )
        for recipe in recipes
    }

    def table_and_key(job: Job) -> tuple[Path, str]:
        return table, job.name

    def rows_of(job: Job, progress: Progress) -> list[dict[str, Any]]:
        set_threads(1)  # two workers would wait for each other in numpy
        model = models[job.name]
        with locked(model.folder):  # other studies train backbones there
            if not model.finished:
                train_one(model, progress)
        row = read_json(model.folder / "metrics.json")
        started = time.monotonic()
        row |= measure(model.folder, config)
        return [row | {"measuring_seconds": round(time.monotonic() - started, 1)}]

    jobs = (dataclasses.replace(model, folder=state / name) for name, model in models.items())
    missing = reset_missing_jobs(jobs, table_and_key, "name")
    run_all(missing, into_table(rows_of, table_and_key, "name"), config.workers)


def measure(folder: Path, config: Config) -> dict[str, Any]:
    """Neural collapse of the model in a folder; NC1 to NC3 on training, NC4 on validation text."""
    _, blocks, validation = tokens_of(config.corpus, config.models_dir)
    causal_lm = pretrain.load(folder)
    return token_collapse_metrics(
        lambda: states_and_targets(causal_lm, blocks),
        lambda: states_and_targets(causal_lm, validation),
        VOCABULARY,
        causal_lm.lm_head.weight.detach(),
    )


# --------------------------------------------------------------------------------------------------
# What the rows say
# --------------------------------------------------------------------------------------------------

Rows = list[dict[str, float]]


def rows_of_parts(config: Config) -> dict[str, Rows]:
    """Part of the study -> its rows of models.csv, without models that have not run."""
    row_by_name = {row["name"]: row for row in read_rows(config.output_dir / "models.csv")}
    words = ("name", "weights_sha256", "git_commit")
    result = {}
    for part, recipes in plan(config.miniature).items():
        names = [pretrain.folder_name(recipe, config.corpus) for recipe in recipes]
        result[part] = [
            {key: float(value) for key, value in row_by_name[name].items() if key not in words}
            for name in dict.fromkeys(names)
            if name in row_by_name
        ]
    return result


def distinct(parts: dict[str, Rows]) -> Rows:
    """Rows of all parts, each model once; some are in two parts."""
    kind = ("width", "layers", "epochs", "weight_decay", "seed")
    row_by_recipe = {
        tuple(row[key] for key in kind): row for rows in parts.values() for row in rows
    }
    return list(row_by_recipe.values())


def column(rows: Rows, name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def spearman_with_loss(rows: Rows, name: str) -> dict[str, Any]:
    """Rank correlation with validation loss; all None where a column does not vary."""
    x, loss = column(rows, name), column(rows, "validation_loss")
    if len(rows) < 3 or not np.ptp(x) or not np.ptp(loss):
        return {"r": None, "low": None, "high": None, "p": None, "n": len(rows)}
    return correlation_interval(float(scipy.stats.spearmanr(x, loss)[0]), len(rows), ranks=True)


def summary(config: Config) -> dict[str, Any]:
    """What results.json holds: correlations at one size and over sizes, effect of weight decay."""
    parts = rows_of_parts(config)
    fixed, grid = parts["seeds"], parts["grid"]
    at_fixed_scale = {name: spearman_with_loss(fixed, name) for name in TITLES}
    tested = {name: at_fixed_scale[name]["p"] for name in PRIMARY}
    if None not in tested.values():
        for name, p in holm(tested).items():
            at_fixed_scale[name]["p_holm"] = p
    over_grid = {}
    for name in TITLES:
        over_grid[name] = {"spearman": spearman_with_loss(grid, name)}
        if len(grid) >= 3:
            size = np.column_stack([column(grid, key) for key in ("width", "layers", "epochs")])
            loss = column(grid, "validation_loss")
            partial = partial_spearman(column(grid, name), loss, size)
            over_grid[name]["without_size"] = partial
    planned = {part: set(recipes) for part, recipes in plan(config.miniature).items()}
    measured = {row["name"] for row in read_rows(config.output_dir / "models.csv")}
    names = {pretrain.folder_name(r, config.corpus) for part in planned.values() for r in part}
    return {
        "corpus": config.corpus,
        "models": {part: [len(rows), len(planned[part])] for part, rows in parts.items()},
        "not_run": sorted(names - measured),
        "primary": list(PRIMARY),
        "fixed_scale": at_fixed_scale,
        "grid": over_grid,
        "less_weight_decay": {
            name: decay_effect(parts, name) for name in ("validation_loss", *TITLES)
        },
        "paper": paper_correlations(config),
        "behind_bigram": sum(row["ahead_of_bigram"] < 0 for row in distinct(parts)),
        "least_ahead_at_fixed_scale": min((r["ahead_of_bigram"] for r in fixed), default=None),
    }


def paper_correlations(config: Config) -> dict[str, Any] | None:
    """Rank correlations with validation loss, computed from Wu & Papyan's table.

    Without the table, those that results.json has from an earlier run, or None.
    """
    if not config.paper_table:
        stored = config.output_dir / "results.json"
        return read_json(stored)["paper"] if stored.exists() else None
    rows = paper_rows(config.paper_table)
    measures = [name for name in TITLES if name in rows[0]]
    grid = [row for row in rows if not row["of_one_size"]]
    fixed = [row for row in rows if row["of_one_size"]]
    parts = {"fixed_scale": fixed, "grid": grid}
    return {
        part: {name: spearman_with_loss(rows_of_part, name) for name in measures}
        for part, rows_of_part in parts.items()
    }


def decay_effect(parts: dict[str, Rows], name: str) -> dict[str, Any]:
    """Weight decay 5e-4 minus 0.1, paired over seeds; for CDNVs the difference of logs."""

    def by_seed(rows: Rows) -> dict[float, float]:
        values = {row["seed"]: row[name] for row in rows}
        return {s: math.log(v) for s, v in values.items()} if name.startswith("cdnv") else values

    return paired_difference(by_seed(parts["seeds"]), by_seed(parts["decay"]))


# --------------------------------------------------------------------------------------------------
# The figure
# --------------------------------------------------------------------------------------------------


def paper_rows(path: Path) -> Rows:
    """Wu & Papyan's table with our names. Raises UserError if the file is another table."""
    result = []
    try:
        for row in read_rows(path):
            name, values = row.pop("model"), {key: float(value) for key, value in row.items()}
            size, _, ending = name.partition("_")
            seeded = len(ending.partition("@")[0]) > 3  # "01d07": one of the seeds of one size
            hits = values["hits"]
            result.append(
                {
                    "width": float(size.partition("x")[2]),
                    "of_one_size": float(seeded),
                    "validation_loss": values["val_loss"],
                    "cdnv_quartic": values["cdnv"],
                    "norm_cv": math.sqrt(values["norms_var"]) / values["norms_mean"],
                    "etf_error": values["etf_error"],
                    "log_kernel_var": values["log_kern_var"],
                    "self_duality_error": values["dual_error"],
                    "cosine_mean": values["simcos_mean"],
                    "cosine_cv": math.sqrt(values["simcos_var"]) / abs(values["simcos_mean"]),
                    "agreement": hits / (hits + values["misses"]),
                }
            )
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not the table of Linguistic Collapse ({error!r}).") from None
    return result


def plot(config: Config) -> None:
    """Plot each measure (a row) over validation loss: over sizes, at one size, and the paper's."""
    parts = rows_of_parts(config)
    panels = [("ours, sizes", parts["grid"]), ("ours, seeds of one size", parts["seeds"])]
    if config.paper_table:
        paper = paper_rows(config.paper_table)
        for title, one_size in (("sizes", 0), ("seeds of one size", 1)):
            rows = [row for row in paper if row["of_one_size"] == one_size]
            panels.append((f"Wu & Papyan 2024,\n{title}", rows))
    panels = [(title, rows) for title, rows in panels if len(rows) >= 3]
    if not panels:
        return
    widths = sorted({row["width"] for _, rows in panels for row in rows})
    shape = (len(TITLES), len(panels))
    figure, axes = plt.subplots(
        *shape, figsize=(3 * shape[1], 2.1 * shape[0]), layout="constrained", squeeze=False
    )
    for (title, rows), line in zip(panels, axes.T, strict=True):
        for (name, label), axis in zip(TITLES.items(), line, strict=True):
            if name not in rows[0]:
                axis.set_axis_off()
                axis.text(0.5, 0.5, "not in their table", ha="center", fontsize=8)
                continue
            scatter_by_width(axis, rows, name, widths)
            correlation = spearman_with_loss(rows, name)
            text = "" if correlation["r"] is None else f"Spearman {correlation['r']:+.2f}"
            if correlation["low"] is not None and "one size" in title:
                text += f" [{correlation['low']:+.2f}, {correlation['high']:+.2f}]"
            axis.set_title(text, fontsize=8)
            axis.set_ylabel(label, fontsize=8)
            axis.tick_params(labelsize=7)
            axis.ticklabel_format(useOffset=False)
            if name.startswith("cdnv") and max(column(rows, name)) > 10 * min(column(rows, name)):
                axis.set_yscale("log")
        line[0].set_title(f"{title}\n{line[0].get_title()}", fontsize=8)
        line[-1].set_xlabel("validation loss (nats)", fontsize=8)
        if "one size" not in title:
            line[-1].legend(title="width", fontsize=6, title_fontsize=6, loc="upper right")
    figure.suptitle(f"Tokens as classes; our text: {config.corpus}")
    save_figure(figure, config.output_dir / "linguistic_collapse.png")


def scatter_by_width(axis: plt.Axes, rows: Rows, name: str, widths: list[float]) -> None:
    """Scatter a measure over validation loss, a colour per width; widths: of all panels."""
    for number, width in enumerate(widths):
        chosen = [row for row in rows if row["width"] == width]
        if not chosen:
            continue
        look = {"color": CLASS_COLORS[number % 8], "marker": CLASS_MARKERS[number % 8]}
        x, y = column(chosen, "validation_loss"), column(chosen, name)
        axis.scatter(x, y, s=14, alpha=0.8, linewidth=0, label=f"{width:.0f}", **look)


def main() -> None:
    config = command_line.parse(Config, __doc__)
    sweep.check_parts(config)
    check_bounds("workers", config.workers, 1, 1024)
    check_bounds("seeds", config.seeds, 1, 30)
    check_bounds("max_epochs", config.max_epochs, 1, math.inf)
    if config.miniature:
        folder = config.output_dir / "limit-miniature"
        config = dataclasses.replace(
            config, corpus="miniature", output_dir=folder, models_dir=folder / "state" / "lm"
        )
    recipes = plan(config.miniature)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if not config.summarize:
        now = recipes | {"seeds": recipes["seeds"][: config.seeds]}
        chosen = [recipe for part in config.parts for recipe in now[part]]
        run_missing(config, [recipe for recipe in chosen if recipe.epochs <= config.max_epochs])
    results = sweep.to_nine_digits(summary(config))
    write_json(config.output_dir / "results.json", results)
    plot(config)
    for name, correlation in results["fixed_scale"].items():
        if correlation["r"] is not None:
            adjusted = f", Holm {correlation['p_holm']:.3f}" if "p_holm" in correlation else ""
            print(f"{TITLES[name]:32} {correlation['r']:+.2f} with validation loss{adjusted}")


if __name__ == "__main__":
    run_script(main)
