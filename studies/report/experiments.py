"""Experiments 1 to 4: their results folders, and their tables in RESULTS.md.

Levels are written as mean of the seeds (lowest to highest seed), differences as mean [95% interval
for other seeds and other rows]. Columns and rows with the reference's numbers say so.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

import common
from collapse.measures.statistics import format_interval
from collapse.report import records
from collapse.report.comparisons import compare_datasets, comparisons_of, compute_type, p_values
from collapse.report.markdown import Column, at, cell, plain, rows_of, table
from collapse.report.records import level, title_of_change
from collapse.utils.files import ROOT, read_json

THREE_MODELS = ("model1", "model2", "model3")


@dataclass(frozen=True)
class Study:
    """A results folder and the command that made it."""

    folder: str
    title: str
    short: str  # name in tables of FINDINGS.md
    command: str
    other: str = ""  # results folder of the same models on the other data set


SMOLLM = "--model smollm2-135m --data-dir DIR --train-limit 2000"
# In the order of all tables and figures; folders without results are left out.
STUDIES = (
    Study(
        "results",
        "Experiment 1: a small transformer from scratch, SST-2",
        "SST-2, small",
        "python experiment.py --data-dir DIR --seeds 42 43 44",
    ),
    Study(
        "results/movie-snippets",
        "Experiment 1 on movie-review snippets",
        "snippets, small",
        'make experiment ARGS="--seeds 42 43 44"',
    ),
    Study(
        "results/movie-snippets/24-epochs",
        "Experiment 1 on movie-review snippets, three times as long",
        "snippets, small, 24 epochs",
        'make experiment ARGS="--models 1 2 --seeds 42 43 44 --epochs 24 --output-dir '
        'results/movie-snippets/24-epochs"',
    ),
    Study(
        "results_7b",
        "Experiment 2: Qwen2.5-7B, SST-2",
        "SST-2, 7B",
        "python experiment_7b.py --data-dir DIR",
    ),
    Study(
        "results_7b/smollm2-135m",
        "Experiment 2, stand-in: SmolLM2-135M-Instruct, 2,000 rows of SST-2",
        "SST-2, stand-in",
        f"python experiment_7b.py {SMOLLM} --seeds 42 43 44 --output-dir results_7b/smollm2-135m",
    ),
    Study(
        "results_7b/smollm2-135m-all-rows",
        "Experiment 2, stand-in: SmolLM2-135M-Instruct, all 67,349 rows of SST-2",
        "SST-2, stand-in, all rows",
        "python experiment_7b.py --model smollm2-135m --data-dir DIR --compute-dtype bfloat16 "
        "--models 1 2 --measure-every 1000 --output-dir results_7b/smollm2-135m-all-rows",
    ),
    Study(
        "results_agnews",
        "Experiment 3: Qwen2.5-7B, AG News",
        "AG News, 7B",
        "python experiment_agnews_7b.py --data-dir DIR",
        other="results_7b",
    ),
    Study(
        "results_agnews/smollm2-135m",
        "Experiment 3, stand-in: SmolLM2-135M-Instruct, 2,000 rows of AG News",
        "AG News, stand-in",
        f"python experiment_agnews_7b.py {SMOLLM} --eval-limit 2000 --compute-dtype bfloat16 "
        "--seeds 42 43 44 --output-dir results_agnews/smollm2-135m",
        other="results_7b/smollm2-135m",
    ),
    Study(
        "results_agnews/smollm2-135m-all-rows",
        "Experiment 3, stand-in: SmolLM2-135M-Instruct, all 9,983 rows of AG News at hand",
        "AG News, stand-in, all rows",
        "python experiment_agnews_7b.py --model smollm2-135m --data-dir DIR --eval-limit 2000 "
        "--compute-dtype bfloat16 --models 1 2 --measure-every 125 "
        "--output-dir results_agnews/smollm2-135m-all-rows",
    ),
    Study(
        "results_agnews/smollm2-135m-constant-rate",
        "Experiment 3, stand-in: Model 1 at a constant 1e-3 for 3,000 steps",
        "AG News, stand-in, constant 1e-3",
        "python experiment_agnews_7b.py --model smollm2-135m --data-dir DIR --models 1 --epochs 5 "
        "--max-length 32 --learning-rate 1e-3 --schedule constant --warmup-fraction 0.0032 "
        "--eval-limit 1000 --measure-every 250 --threads 2 --compute-dtype float32 "
        "--output-dir results_agnews/smollm2-135m-constant-rate",
    ),
)
LONG_RUN = STUDIES[-1]  # at another rate than the reference's
# Studies of which the protocol foretold the end: after how many steps, and when it was said.
FORETOLD = {
    LONG_RUN.folder: (3_000, "before the run"),
    "results_7b/smollm2-135m-all-rows": (12_630, "while it ran"),
}
RANKS = ROOT / "results_effective_rank" / "effective_rank_results.json"


def studies_with_results(studies: tuple[Study, ...] = STUDIES) -> list[Study]:
    """The studies whose folder has a results.json."""
    return [study for study in studies if (ROOT / study.folder / "results.json").exists()]


def results_of(study: Study) -> dict[str, Any]:
    return read_json(ROOT / study.folder / "results.json")


def results_beside(study: Study) -> dict[str, Any] | None:
    """Results of the same models on the other data set, if there are any."""
    path = ROOT / study.other / "results.json"
    return read_json(path) if study.other and path.exists() else None


@functools.cache
def read_ranks() -> dict[str, dict]:
    """Results of Experiment 4 on STUDIES, in their order, summarized by the present code."""
    stored = read_json(RANKS)
    places = {study.folder: place for place, study in enumerate(STUDIES)}
    known = [name for name, result in stored.items() if result["folder"] in places]
    known.sort(key=lambda name: places[stored[name]["folder"]])
    ordered = {name: stored[name] for name in known}
    return records.summarize(records.with_records(ordered))


# --------------------------------------------------------------------------------------------------
# Where numbers come from
# --------------------------------------------------------------------------------------------------


def short_commit(commit: str | None) -> str:
    """Ten digits of a commit, with -modified if it has that; unknown for a run outside a clone."""
    if commit is None:
        return "unknown"
    return commit[:10] + ("-modified" if commit.endswith("-modified") else "")


def threads(run: dict) -> str:
    count = run["hardware"]["threads"]
    return f"{count} thread{'s' * (count > 1)}"


def origin(runs: list[dict]) -> str:
    """Commits and machines by which trainings or records were made, in words."""
    commits = ", ".join(sorted({short_commit(run["git_commit"]) for run in runs}))
    devices = ", ".join(sorted({f"{run['hardware']['device']}, {threads(run)}" for run in runs}))
    return f"by commit {commits} on {devices}"


def records_of(ranks: dict) -> list[dict]:
    """The records of Experiment 4, of every study, model and seed."""
    return [
        record
        for row in records.models_of(ranks)
        for record in at(row, ("result", row["key"], "seeds", "*"))
    ]


def model_name(key: str) -> str:
    arm = common.find_arm(key)
    return f"{key.removeprefix('model')}: {arm.title}" if key.startswith("model") else arm.title


# --------------------------------------------------------------------------------------------------
# Experiments 1 to 3
# --------------------------------------------------------------------------------------------------


def trainings_by_model(results: dict) -> list[dict[str, Any]]:
    """A row for each model: its key, name, and trainings."""
    return [
        {"key": key, "name": model_name(key), "runs": list(runs.values())}
        for key, runs in results["models"].items()
    ]


def table_accuracy(reference: dict | None, results: dict) -> str:
    columns = [
        Column("validation accuracy, %", "name"),
        Column("trained parameters", "runs.0.parameters.trainable"),
        Column("final epoch", "runs.*.final.accuracy", 2, 100),
        Column("final, engram carried", "runs.*.val.-1.carried.accuracy", 2, 100),
        Column("best epoch", "runs.*.best.accuracy", 2, 100),
    ]
    if reference:
        title = f"reference, {reference['model']}: final"
        columns.append(Column(title, lambda row: reference["final"][row["key"]]))
        columns.append(Column("reference: best", lambda row: reference["best"][row["key"]]))
    return table(columns, trainings_by_model(results))


def table_comparisons(reference: dict | None, results: dict) -> str:
    def published(row: dict) -> float | None:
        b, a = (reference[row["epoch"]].get(model) for model in row["pair"].split(" - "))
        return None if None in (a, b) else b - a

    title = "difference in accuracy, points"
    columns = [Column(title, lambda row: f"{row['pair']}, {row['epoch']} epoch")]
    columns.append(Column("mean [95%]", "interval", 2, 100))
    columns.append(Column("McNemar's exact p, each seed", p_values))
    if reference:
        columns.append(Column(f"reference, {reference['model']}", published, sign="+"))
    return table(columns, rows_of(comparisons_of(results), "epoch", "pair"))


TRAINING_COLUMNS = (
    Column("model, final epoch", "name"),
    Column("train accuracy, %", "runs.*.train.-1.accuracy", 2, 100),
    Column("train cls loss", "runs.*.train.-1.cls_loss", 3),
    Column("val cls loss", "runs.*.val.-1.cls_loss", 3),
    Column("train LM loss", "runs.*.train.-1.lm_loss", 3),
    Column("val LM loss", "runs.*.val.-1.lm_loss", 3),
    Column("gradient norm", "runs.*.train.-1.grad_norm", 2),
    Column("effective rank before training", "runs.*.initial.effective_rank", 1),
    Column("effective rank after", "runs.*.val.-1.effective_rank", 1),
)


SEED_COLUMNS = (
    Column("model, final epoch", lambda row: model_name(row["model"])),
    *plain("seed"),
    Column("accuracy, %", "val.-1.accuracy", 2, 100),
    Column("val cls loss", "val.-1.cls_loss", 3),
    Column("effective rank", "val.-1.effective_rank", 1),
    Column("largest gradient norm of a step", lambda row: max(at(row, "train.*.max_grad_norm")), 1),
    Column("engram ARI", "cluster.trained.ari", 3),
    Column("the same, untrained compressor", "cluster.untrained.ari", 3),
)


ENGRAM_CASES = {
    "trained": "trained compressor",
    "chance": "chance: the same, labels shuffled",
    "untrained": "control: untrained compressor, trained backbone",
}
ENGRAM_COLUMNS = (
    Column("engrams of model 3, final epoch", "name"),
    Column("ARI", "ari", 3),
    Column("cluster accuracy, %", "cluster_accuracy", 1),
    Column("cosine within class", "within", 3),
    Column("cosine between classes", "between", 3),
)


def table_engrams(reference: dict | None, results: dict) -> str:
    runs, rows = results["models"]["model3"], []
    for case, name in ENGRAM_CASES.items():
        clusters, cosines = at(runs, f"*.cluster.{case}"), at(runs, f"*.engram_cos.{case}")
        row = {"name": name, "ari": at(clusters, "*.ari")}
        row["cluster_accuracy"] = [100 * share for share in at(clusters, "*.cluster_accuracy")]
        rows.append(row | {kind: at(cosines, f"*.{kind}") for kind in ("within", "between")})
    if reference:
        rows.append(reference | {"name": f"reference: {reference['model']}"})
    purities = "; ".join(
        f"{name} {cell(at(runs, f'*.cluster.trained.purity.{label}'), 1, 100)}"
        for label, name in enumerate(results["settings"]["data"]["class_names"])
    )
    note = f"Share of each class's rows in its own cluster, trained compressor, %: {purities}."
    return f"{table(ENGRAM_COLUMNS, rows)}\n\n{note}"


MEASURED_COLUMNS = (
    Column("training", lambda row: f"{model_name(row['model'])}, seed {row['seed']}"),
    *plain("at", "step"),
    Column("components, of the start", "components"),
    Column("effective rank", "effective_rank", 1),
    Column("without first token", "effective_rank_without_first", 1),
    Column("within classes", "effective_rank_within", 1),
    Column("training loss", "loss", 3),
    Column("training accuracy, %", lambda row: row["loss"] and row["accuracy"], 1, 100),
)


def table_measured(results: dict) -> str:
    """Trainings with measurements on the way: at the start, the fewest components, the end.

    Empty if no training has them from the start on: one that was gone on with may have begun later.
    """
    rows = []
    for run in rows_of(results["models"], "model", "seed"):
        path = [point for point in run.get("measured", ()) if point["dims_95pct"] is not None]
        if path and path[0]["step"] == 0:
            fewest, start = min(path, key=lambda p: p["dims_95pct"]), path[0]["dims_95pct"]
            for place, point in (("start", path[0]), ("fewest", fewest), ("end", path[-1])):
                count = point["dims_95pct"]
                row = point | {"at": place, "components": f"{count}, {100 * count / start:.0f}%"}
                rows.append(row | {name: run[name] for name in ("model", "seed")})
    return table(MEASURED_COLUMNS, rows) if rows else ""


def table_cross(results: dict, other: dict) -> str:
    """Differences in accuracy on two data sets, and the difference of the differences."""

    def title(part: dict) -> str:
        data, compute = part["settings"]["data"], compute_type(part)
        counts = f"{data['train_rows']:,} / {data['validation_rows']:,} rows"
        return f"{data['name']} ({counts}{f', {compute}' if compute else ''})"

    columns = (
        Column("difference in final accuracy, points [95%]", "pair"),
        Column(title(results), "here", 2, 100),
        Column(title(other), "there", 2, 100),
        Column("difference of the two", "more_here", 2, 100),
    )
    return table(columns, rows_of(compare_datasets(results, other)["comparisons"], "pair"))


# --------------------------------------------------------------------------------------------------
# Experiment 4
# --------------------------------------------------------------------------------------------------


def change(title: str, number: str, digits: int = 1) -> Column:
    """A column with the change of a number between two models."""
    return Column(title, lambda row: change_cell(row["change"], number, digits))


HEAD_COLUMNS = (
    Column("data, backbone", "name"),
    Column("rows", "result.num_samples"),
    Column("model", "title"),
    Column("seeds", lambda row: len(row["result"][row["key"]]["seeds"])),
)
RANK_COLUMNS, COLLAPSE_COLUMNS = (
    (*HEAD_COLUMNS, *(level(m.title, m.number, m.digits) for m in metrics))
    for metrics in (records.RANKS, records.NEURAL_COLLAPSE)
)
CHANGE_COLUMNS = (
    Column("data, backbone", "name"),
    Column("change, mean [95%]", "title"),
    Column("seeds", "change.both.effective_rank.n_seeds"),
    *(change(m.title, m.number) for m in records.RANKS if m.number in records.HALVED),
    change("NC1 CDNV, pooled, as a factor", "cdnv_log_ratio", 2),
)
DEPTH_COLUMNS = (
    Column("data, backbone", "name"),
    Column("model", "title"),
    Column("measure", "measure"),
    Column("at the embeddings", "first", 1),
    Column("lowest between, at layer", lambda row: f"{cell(row['lowest'], 1)} at {row['layers']}"),
    Column("at the end", "last", 1),
)


def change_cell(changes: dict, number: str, digits: int) -> str | None:
    """Mean [95%] of a change, for a log ratio as a factor.

    None if older results lack it.
    """
    interval = changes["both"].get(number)
    if interval is None:
        return None
    if not number.endswith("log_ratio"):
        return format_interval(interval, digits, sign="+")
    ends = {k: None if interval[k] is None else math.exp(interval[k]) for k in ("low", "high")}
    return format_interval({"mean": math.exp(interval["mean"]), **ends}, digits)


def table_changes(ranks: dict) -> str:
    rows = [
        {"name": name, "title": title_of_change(pair, result), "change": changes}
        for name, result in ranks.items()
        for pair, changes in result["changes"].items()
    ]
    return table(CHANGE_COLUMNS, rows, hide_unknown=True)


def table_depth(ranks: dict) -> str:
    """Ranks of language models at the embeddings, at the last state, and the lowest between.

    A row for each measure that the records have; the lowest layer is that of each seed.
    """
    rows = []
    for model in records.models_of(ranks):
        if "model" not in model["result"]["settings"]["config"]:
            continue
        for metric in records.RANKS:
            if not metric.number.startswith("effective_rank"):
                continue
            path = model["key"], "seeds", "*", "layers", "*", metric.number
            by_seed = at(model["result"], path)
            if any(None in layers for layers in by_seed):
                continue
            between = np.array(by_seed)[:, 1:-1]
            layers = sorted(set((1 + between.argmin(1)).tolist()))
            rows.append(
                model
                | {"measure": metric.title, "layers": " or ".join(map(str, layers))}
                | {"first": at(by_seed, "*.0"), "last": at(by_seed, "*.-1")}
                | {"lowest": between.min(1).tolist()}
            )
    return table(DEPTH_COLUMNS, rows)
