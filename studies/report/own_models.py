"""Studies on our own language models: the protocol's endpoints, and tables."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collapse.arms import find_arm
from collapse.measures.statistics import format_bounds, t_interval
from collapse.measures.thresholds import Threshold
from collapse.measures.verdicts import holm, holm_levels, verdict
from collapse.report.markdown import Column, at, cell, merge_equal, plain, rows_of, table
from collapse.utils.files import ROOT, read_json
from studies import (
    benefit,
    class_count,
    collapse_threshold,
    collapse_time,
    engram_pieces,
    engram_salience,
    linguistic_collapse,
)
from studies.report import experiments, real_models
from studies.shared import sweep

STUDIES = {
    "collapse_threshold": collapse_threshold,
    "benefit": benefit,
    "class_count": class_count,
    "engram_salience": engram_salience,
    "engram_pieces": engram_pieces,
}
# Study -> settings of its published run that determine its folder and trainings.
CONFIGS = {name: study.Config() for name, study in STUDIES.items()}
STANDIN = collapse_threshold.Config(model="smollm2-135m")  # described, not tested
TIME = collapse_time.Config()
# Real models, in order of size: one held out for a prediction, and P8's.
GEMMA = collapse_threshold.Config(model="gemma-3-270m")
QWEN = collapse_threshold.Config(model="qwen2.5-coder-0.5b-instruct")
REAL_MODELS = (GEMMA, QWEN)
LINGUISTIC = linguistic_collapse.Config()
MODELS = ("model1", "model2")


def summarize() -> None:
    """Write results.json and figures of every study that has tables."""
    published = [(study, CONFIGS[name]) for name, study in STUDIES.items()]
    published += [(collapse_threshold, config) for config in (STANDIN, *REAL_MODELS)]
    for study, config in [*published, (collapse_time, TIME)]:
        study.STUDY.report(config)


def relative(path: Path) -> str:
    """A path as documents name it, from the repository's folder."""
    return os.path.relpath(path, ROOT)


def results_of(config: sweep.Config) -> dict[str, Any]:
    """The study's results.json."""
    return read_json(config.folder / "results.json")


def thresholds_of(config: collapse_threshold.Config) -> dict[str, dict[str, dict[int, Threshold]]]:
    """Data set -> arm -> seed -> log10 threshold by components alone, of a real model."""
    runs = collapse_threshold.read_runs(config.folder)
    grid = config.rates if config in REAL_MODELS else ()  # the stand-in ran at other rates
    return {
        dataset: collapse_threshold.thresholds_by_components(
            [run for run in runs if run.trial.dataset == dataset], grid
        )
        for dataset in dict.fromkeys(run.trial.dataset for run in runs)
    }


def thresholds_on_ag_news(config: collapse_threshold.Config) -> list[Threshold]:
    """Model 1's, of each seed that has one."""
    return list(thresholds_of(config).get("AG News", {}).get("model1", {}).values())


def predicted_for_gemma() -> float:
    """PROTOCOL.md, Held out: log10, from the models below and above it in width."""
    known = {576: thresholds_on_ag_news(STANDIN), 896: thresholds_on_ag_news(QWEN)}
    return real_models.predict(640, known)


def prediction() -> str:
    """In a sentence, beside what Gemma's seeds did."""
    return real_models.compare(predicted_for_gemma(), thresholds_on_ag_news(GEMMA))


def long_run(study: experiments.Study) -> str:
    """The ends of SmolLM2's long trainings, as foretold and found, in a sentence each."""
    results, (steps, when) = experiments.results_of(study), experiments.FORETOLD[study.folder]
    slope = results_of(TIME)["parts"]["model1"]["slope"]["mean"]
    rate = results["settings"]["config"]["learning_rate"]
    known, told = thresholds_on_ag_news(STANDIN), []
    for model, runs in results["models"].items():
        (run,) = runs.values()
        end = real_models.judge_long_run(known, slope, rate, steps, run["measured"])
        told.append(f"{find_arm(model).title}, predicted {when}: {end}")
    return " ".join(told)


def source_of(config: sweep.Config, options: str = "", settings: Sequence[str] = ()) -> str:
    """Command, source and provenance of a study, in words; settings: options read from its rows."""
    rows = sweep.published_rows(config.folder)
    trainings = {(row["seed"], row["training"]) for row in rows}
    options += "".join(f" --{name.replace('_', '-')} {rows[0][name]}" for name in settings)
    piloted = {int(row["seed"]) for row in rows} & set(sweep.PILOTS)
    commits = ", ".join(sorted({experiments.short_commit(row["git_commit"]) for row in rows}))
    machines = sorted({row["hardware"] for row in rows} - {""})
    on = f" on {', '.join(machines)}" if machines else ""
    script = type(config).__module__.rpartition(".")[2]
    command = " ".join(["python", f"studies/{script}.py", *options.split()])
    return (
        f"Command: `{command} --data-dir DIR`. Source: "
        f"`{relative(config.folder)}/seed-*.csv`, {len(rows):,} rows of {len(trainings):,} "
        f"trainings{', those of pilots among them' if piloted else ''}, "
        f"made by commit {commits}{on}."
    )


def arm_title(row: dict) -> str:
    return "before training" if row["arm"] == "start" else find_arm(row["arm"]).title


def count_of(interval: dict | None) -> int | None:
    """Number of backbones that an interval is based on."""
    return interval and interval.get("n", interval.get("n_seeds"))


DATA, ARM = Column("data", "data"), Column("arm", arm_title)
RATE = Column("rate", lambda row: f"{10 ** float(row['rate']):.1e}")
BACKBONES = Column("backbones", count_of)

# --------------------------------------------------------------------------------------------------
# The protocol's endpoints
# --------------------------------------------------------------------------------------------------

# Two families, adjusted separately: endpoint -> what it measures with unit, factor to that unit.
ENDPOINTS = {
    "P1": ("accuracy, Model 2 - Model 1, points", 100),
    "P2": ("shift of the threshold by the LM loss, decades (a lower bound)", 1),
    "P3": ("slope of the gain on log2 classes, logits", 1),
    "P4": ("ARI, trained label - other label", 1),
    "P5": ("log rank within classes at equal loss, Model 2 - Model 1", 1),
}
LATER_ENDPOINTS = {
    "P6": ("how far Model 1's threshold falls in a decade of steps, decades", 1),
    "P7": ("slope of Model 2's threshold - Model 1's, decades a decade", 1),
    "P8": ("Qwen2.5-Coder-0.5B: threshold, Model 2 - Model 1, decades", 1),
}
STUDY_OF = {"P1": "benefit", "P2": "collapse_threshold", "P3": "class_count"}
STUDY_OF |= {"P4": "engram_salience", "P5": "benefit"}


def result_of(endpoint: str) -> dict[str, Any] | None:
    """An endpoint in the results of its study; None before that has run."""
    if endpoint == "P8":
        return at(results_of(QWEN), ("by_components", "AG News", "shift"))
    return at(results_of(CONFIGS[STUDY_OF[endpoint]] if endpoint in STUDY_OF else TIME), endpoint)


def endpoints(family: dict[str, tuple[str, float]] = ENDPOINTS) -> dict[str, dict[str, Any]]:
    """The endpoints of a family that have run, with `interval` at Holm's level and verdict.

    For Holm's method an endpoint that has not run, or whose bound excludes nothing, has p = 1; one
    that has run in part has it for the others.
    """
    results = {name: result for name in family if (result := result_of(name))}
    in_full = {name: p_of(result) for name, result in results.items() if result["done"]}
    for name, result in results.items():
        p_values = dict.fromkeys(family, 1.0) | in_full | {name: p_of(result)}
        level, adjusted = holm_levels(p_values)[name], holm(p_values)[name]
        mean, se, df = (result[key] for key in ("mean", "se", "df"))
        interval = t_interval(mean, se or 0.0, df if result.get("bounded", True) else 0, level)
        result |= {"interval": interval, "p_holm": adjusted}
        if mean is not None and not refuted_from_above(result):
            rules = result["margin"], result["done"], result.get("lower_bound", False)
            result |= verdict(mean, interval, result["interval_90"], *rules)
    return results


def p_of(result: dict[str, Any]) -> float:
    """An endpoint's p for Holm's method; 1 if its bound cannot exclude zero."""
    bounds_nothing = not result.get("bounded", True)
    below = result.get("lower_bound", False) and (result["mean"] or 0) <= 0
    if (bounds_nothing or below) and not refuted_from_above(result):
        return 1.0
    return result["p"]


def refuted_from_above(result: dict[str, Any]) -> bool:
    """P7 alone: even the largest possible slope of Model 2 is below Model 1's."""
    return bool(result.get("at_most")) and result["verdict"] == "refuted"


def verdict_so_far(result: dict[str, Any]) -> str:
    return result["verdict"] + ("" if result["done"] else " so far")


def standing(ran: dict[str, dict], name: str) -> str:
    """An endpoint's name and verdict."""
    return f"{name} {verdict_so_far(ran[name])}"


def endpoint_columns(counted: str) -> list[Column]:
    """Columns of the table of endpoints; counted: title for `n`."""

    def scaled(row: dict) -> tuple[int, float, str]:
        return (2 if abs(row["scale"] * row["margin"]) >= 0.1 else 3), row["scale"], "+"

    def estimate(row: dict) -> str:
        interval = row["interval"] | {"mean": row["mean"]}
        bound = "≥ " if row.get("lower_bound") and row["mean"] is not None else ""
        return bound + cell(interval, *scaled(row))

    return [
        Column("", "name"),
        Column("what", "what"),
        Column("estimate [Holm-adjusted]", estimate),
        Column("90%", lambda row: format_bounds(row["interval_90"], *scaled(row)) or None),
        Column("margin", lambda row: f"{row['scale'] * row['margin']:g}"),
        Column(counted, "n"),
        Column("p, Holm", "p_holm", ".1g"),
        Column("verdict", verdict_so_far),
    ]


def endpoint_rows(family: dict[str, tuple[str, float]]) -> list[dict[str, Any]]:
    """The endpoints of a family that ran, as rows of endpoint_columns."""
    return [
        {"name": name, "what": family[name][0], "scale": family[name][1]} | result
        for name, result in endpoints(family).items()
    ]


def table_endpoints(
    family: dict[str, tuple[str, float]] = ENDPOINTS, counted: str = "backbones"
) -> str:
    return table(endpoint_columns(counted), endpoint_rows(family))


def short_table_endpoints() -> str:
    """The endpoints of both families that ran, without the 90% interval and p."""
    columns = [c for c in endpoint_columns("n") if c.title not in ("90%", "p, Holm")]
    return table(columns, [*endpoint_rows(ENDPOINTS), *endpoint_rows(LATER_ENDPOINTS)])


# --------------------------------------------------------------------------------------------------
# A bag of words on the same rows
# --------------------------------------------------------------------------------------------------

BAG_OF_WORDS = ROOT / "studies" / "results" / "bag_of_words" / "results.json"
SWEEPS = {
    "collapse_threshold": "own models, 200 steps, the best rate",
    "benefit": "own models, best epoch",
    "class_count": "own models, best epoch",
}
BAG_OF_WORDS_COLUMNS = (
    *plain("models", "data"),
    Column("training rows", "train_rows"),
    *plain("classes"),
    Column("bag of words", "accuracy", 1, 100),
    Column("Model 1", "model1", 1, 100),
    Column("Model 2", "model2", 1, 100),
)


def bag_of_words(folder: str) -> dict[str, float]:
    """Data set -> accuracy of a bag of words on the rows of a results folder."""
    rows = read_json(BAG_OF_WORDS)["rows"]
    return {row["data"]: row["accuracy"] for row in rows if row["folder"] == folder}


def table_bag_of_words() -> str:
    """A bag of words beside Models 1 and 2 on the same rows."""
    titles = {study.folder: study.short for study in experiments.STUDIES}
    titles |= {relative(CONFIGS[name].folder): title for name, title in SWEEPS.items()}
    rows = (
        row | {"models": titles[row["folder"]]} | accuracies(row["folder"], row["data"])
        for row in read_json(BAG_OF_WORDS)["rows"]
    )
    return table(BAG_OF_WORDS_COLUMNS, rows)


def accuracies(folder: str, data: str) -> dict[str, float]:
    """Mean validation accuracy of Models 1 and 2 on a data set, from a results folder."""
    results = read_json(ROOT / folder / "results.json")
    if "models" in results:  # an experiment
        return {
            model: float(np.mean(at(runs, "*.final.accuracy")))
            for model, runs in results["models"].items()
        }
    if "table" in results:  # class_count: a row for each number of classes
        counts = {f"{r['classes']} classes": r for r in results["table"] if r["merge"] == "nested"}
        arms = counts[data]
    elif "P1" in results:
        arms = results["arms"][data]
    else:  # a sweep over rates
        ends = {row["arm"]: row["ends"][data].values() for row in results["arms"]}
        return {
            arm: max(end["validation_accuracy"] for end in by_rate) for arm, by_rate in ends.items()
        }
    return {model: arms[model]["best_accuracy"]["mean"] for model in MODELS}


# --------------------------------------------------------------------------------------------------
# What the LM loss gains: benefit.py and class_count.py
# --------------------------------------------------------------------------------------------------

P1_COLUMNS = (
    Column("accuracy, points", lambda _: "Model 2 - Model 1"),
    Column("mean of the sets [95%]", "P1", 2, 100),
    Column("seeds and rows drawn anew [95%]", "P1.pigeonhole", 2, 100),
    Column("90%", "P1_equivalence", 2, 100),
    Column("margin", "P1.margin", "g", 100),
    Column("p of an effect outside it", "P1_equivalence.p", ".2g"),
    Column("backbones", lambda row: count_of(row["P1"])),
)
EQUAL_LOSS_COLUMNS = (
    DATA,
    Column("log rank, Model 2 - Model 1 [95%]", ""),
    Column("as a factor", lambda row: None if row.get("mean") is None else math.exp(row["mean"])),
    BACKBONES,
)
BENEFIT_COLUMNS = (
    DATA,
    ARM,
    Column("accuracy, %", "best_accuracy.mean", 1, 100),
    Column("loss, nats", "best_loss.mean", 3),
    Column("scaled by temperature", "best_scaled_loss.mean", 3),
    Column("best epoch", "best_epoch.mean", 1),
    Column("LM loss minus before, nats", "language_kept.mean", 2, 1, "+"),
    Column("probe of another set minus before, points", "transfer_kept.mean", 1, 100, "+"),
    BACKBONES,
    *plain("diverged"),
)
KEPT = ("language_kept", "transfer_kept", "best_scaled_loss")
KEPT_COLUMNS = (
    Column("Model 2 - Model 1 [95%]", "data"),
    Column("LM loss, nats", "language_kept", 2),
    Column("probe of another set, points", "transfer_kept", 1, 100),
    Column("validation loss at own rates, scaled, nats", "best_scaled_loss", 3),
    Column("backbones", lambda row: merge_equal([cell(count_of(row[name])) for name in KEPT])),
)
GAIN_COLUMNS = (
    DATA,
    Column("accuracy, points [95%]", "gain", 2, 100),
    Column("log rank at equal loss", "rank"),
    Column("Model 1, %", "accuracy", 1, 100),
    Column("bag of words, %", "words", 1, 100),
)
TIME_COST_COLUMNS = (DATA, ARM, Column("time over Model 1's", "mean"), BACKBONES)


def table_differences(results: dict) -> str:
    """Accuracy of each arm minus Model 1's, and of controls minus Model 2's; points [95%]."""
    columns = [Column("accuracy, points [95%]", "title")]
    columns += [Column(data, (data,), 2, 100) for data in results["arms"]]
    columns.append(Column("mean of its sets", "mean", 2, 100))
    columns.append(Column("backbones with all its sets", lambda row: count_of(row["mean"])))
    rows = [
        differences | {"title": f"{find_arm(arm).title} minus Model {number}"}
        for number, kind in ((1, "accuracy_differences"), (2, "less_model2"))
        for arm, differences in results[kind].items()
    ]
    return table(columns, rows)


def table_rank_at_equal_loss(results: dict) -> str:
    """P5 and its parts: log rank within classes at equal training loss."""
    return table(
        EQUAL_LOSS_COLUMNS,
        rows_of(results["rank_at_equal_loss"] | {"mean, P5": results["P5"]}, "data"),
    )


def table_times(results: dict) -> str:
    """Training time relative to Model 1 on the same backbone and data set."""
    times = {
        data: dict(sorted(arms.items(), key=lambda pair: find_arm(pair[0]).sort_key))
        for data, arms in results["times"].items()
    }
    return table(TIME_COST_COLUMNS, rows_of(times, "data", "arm"))


def table_gains() -> str:
    """For FINDINGS.md: Model 2 minus Model 1 on each data set; the means are P1 and P5.

    With the accuracy of Model 1 and of a bag of words on the same rows.
    """
    config = CONFIGS["benefit"]
    results, words = results_of(config), bag_of_words(relative(config.folder))
    rows = [
        {"data": data, "rank": rank, "words": words.get(data)}
        | {"gain": at(results, ("accuracy_differences", "model2", data))}
        | {"accuracy": results["arms"][data]["model1"]["best_accuracy"]["mean"]}
        for data, rank in results["rank_at_equal_loss"].items()
    ]
    return table(GAIN_COLUMNS, rows)


def of_both_models(title: str, number: str, digits: int = 1, scale: float = 1) -> list[Column]:
    return [
        Column(f"{title}, Model {model[-1]}", f"{model}.{number}.mean", digits, scale)
        for model in MODELS
    ]


CLASS_COLUMNS = (
    *plain("merge", "classes"),
    Column("accuracy, Model 2 - Model 1, points [95%]", "accuracy_difference", 2, 100),
    Column("in logits [95%]", "logit_gain", 3),
    *of_both_models("accuracy, %", "best_accuracy", 1, 100),
    *of_both_models("components", "dims_95pct"),
    *of_both_models("effective rank", "effective_rank"),
    *of_both_models("within classes", "effective_rank_within"),
    Column("backbones", "seeds"),
)


# --------------------------------------------------------------------------------------------------
# Engrams: engram_salience.py and engram_pieces.py
# --------------------------------------------------------------------------------------------------

LABELS = engram_salience.LABELS
TRAINING_COLUMNS = (
    Column("trained label", "trained"),
    ARM,
    Column("accuracy, %", "accuracy.mean", 1, 100),
    *(Column(f"ARI, {label}", f"ari_{label}", 3) for label in LABELS),
    *(Column(f"untrained compressor's, {label}", f"ari_untrained_{label}", 3) for label in LABELS),
    Column("trained - other, minus an untrained compressor's", "less_random", 3),
    *(Column(f"probe, {label}, %", f"probe_{label}.mean", 1, 100) for label in LABELS),
    Column("LM loss, nats", "lm_loss.mean", 3),
    *plain("learned", "backbones", "diverged"),
)
SALIENCE_COLUMNS = (
    ARM,
    Column("ARI, trained label - other label", "learned", 3),
    Column("minus an untrained compressor's", "less_random_compressor", 3),
    Column("of all backbones", "all_backbones", 3),
    Column("learned both labels", lambda row: f"{row['learned']['n']} of {row['ran']}"),
)
PIECES_COLUMNS = (
    Column("reading with", "title"),
    Column("LM loss, nats", "lm_loss", 4),
    Column("accuracy, points", "accuracy", 2, 100),
    Column("backbones", "lm_loss.n"),
)


# --------------------------------------------------------------------------------------------------
# Tokens as classes: linguistic_collapse.py
# --------------------------------------------------------------------------------------------------


def correlation(title: str, path: str) -> Column:
    """A column with a correlation and its 95% interval."""

    def value(row: dict) -> dict | None:
        known = at(row, path)
        return known and known | {"mean": known["r"]}

    return Column(title, value)


LINGUISTIC_COLUMNS = (
    Column("measure", "title"),
    correlation("one size", "one_size"),
    Column("p, Holm", "one_size.p_holm", ".2g"),
    correlation("theirs, one size", "paper_one_size"),
    correlation("over sizes", "sizes.spearman"),
    correlation("size taken out", "sizes.without_size"),
    correlation("theirs, over sizes", "paper_sizes"),
)
DECAY_COLUMNS = (
    Column("measure", "title"),
    Column("difference [95%]", "", 4),
    Column("pairs", "n"),
)
LANGUAGE_MODEL_COLUMNS = (
    Column("width", "width", 0),
    Column("layers", "layers", 0),
    Column("epochs", "epochs", 0),
    Column("weight decay", "weight_decay", 4),
    Column("seed", "seed", 0),
    Column("validation loss, nats", "validation_loss", 3),
    Column("ahead of the bigram", "ahead_of_bigram", 3),
    Column("CDNV", "cdnv", 2),
    Column("log-kernel variance", "log_kernel_var", 4),
    Column("variation of cosines", "cosine_cv", 2),
    Column("agreement", "agreement", 4),
)


def table_linguistic(results: dict) -> str:
    """Rank correlations with validation loss: at one size, over sizes, and the paper's."""
    paper = results["paper"] or {}
    rows = (
        {"title": title, "one_size": results["fixed_scale"][name], "sizes": results["grid"][name]}
        | {"paper_one_size": at(paper, ("fixed_scale", name))}
        | {"paper_sizes": at(paper, ("grid", name))}
        for name, title in linguistic_collapse.TITLES.items()
    )
    return table(LINGUISTIC_COLUMNS, rows)


def table_decay(results: dict) -> str:
    """Effect of less weight decay on each measure and on validation loss."""
    titles = {"validation_loss": "validation loss, nats", **linguistic_collapse.TITLES}
    differences = results["less_weight_decay"]
    rows = (differences[name] | {"title": title} for name, title in titles.items())
    return table(DECAY_COLUMNS, rows)
