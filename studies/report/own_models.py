"""Studies on our own language models: the protocol's endpoints, tables and figures.

A function add_NAME writes a study's section of RESULTS.md, or nothing while the study has no
results.json.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from collapse.arms import find_arm
from collapse.measures.statistics import format_bounds, t_interval
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
from studies.report.experiments import short_commit
from studies.report.page import Page
from studies.shared import sweep

STUDIES = {
    "collapse_threshold": collapse_threshold,
    "benefit": benefit,
    "class_count": class_count,
    "engram_salience": engram_salience,
    "engram_pieces": engram_pieces,
}
# Study -> settings of its published run that determine its folder and trainings.
CONFIGS = {name: study.Config(corpus="newsgroups") for name, study in STUDIES.items()}
STANDIN = collapse_threshold.Config(model="smollm2-135m")  # described, not tested
TIME = collapse_time.Config(corpus="newsgroups")
# Real models, in order of size; P8 is about the second.
QWEN = collapse_threshold.Config(model="qwen2.5-coder-0.5b-instruct")
REAL_MODELS = (collapse_threshold.Config(model="gemma-3-270m"), QWEN)
LINGUISTIC = "studies/results/linguistic_collapse"
MODELS = ("model1", "model2")


def summarize() -> None:
    """Write results.json and figures of every study that has tables."""
    published = [(study, CONFIGS[name]) for name, study in STUDIES.items()]
    published += [(collapse_threshold, config) for config in (STANDIN, *REAL_MODELS)]
    for study, config in [*published, (collapse_time, TIME)]:
        if any(config.folder.glob("seed-*.csv")):
            study.STUDY.report(config)


def folder_of(config: sweep.Config) -> str:
    return str(config.folder.relative_to(ROOT))


def results_of(config: sweep.Config) -> dict[str, Any] | None:
    """The study's results.json; None if it does not exist."""
    path = config.folder / "results.json"
    return read_json(path) if path.exists() else None


def source_of(
    config: sweep.Config, options: str = "--corpus newsgroups", settings: Sequence[str] = ()
) -> str:
    """Command, source and provenance of a study, in words; settings: options read from its rows."""
    rows = sweep.published_rows(config.folder)
    trainings = {(row["seed"], row["training"]) for row in rows}
    options += "".join(f" --{name.replace('_', '-')} {rows[0][name]}" for name in settings)
    piloted = {int(row["seed"]) for row in rows} & set(sweep.PILOTS)
    commits = ", ".join(sorted({short_commit(row["git_commit"]) for row in rows}))
    machines = sorted({row["hardware"] for row in rows} - {""})
    on = f" on {', '.join(machines)}" if machines else ""
    script = type(config).__module__.rpartition(".")[2]
    return (
        f"Command: `python studies/{script}.py {options} --data-dir DIR`. Source: "
        f"`{folder_of(config)}/seed-*.csv`, {len(rows):,} rows of {len(trainings):,} trainings"
        f"{', those of pilots among them' if piloted else ''}, made by commit {commits}{on}."
    )


def begin(
    page: Page,
    title: str,
    question: str,
    config: sweep.Config,
    options: str = "--corpus newsgroups",
    settings: Sequence[str] = (),
    once: str = "",
) -> dict[str, Any] | None:
    """Begin a study's section, and return its results.

    Adds nothing and returns None if there are no results, or if the endpoint `once` has none.
    """
    results = results_of(config)
    if results is None or (once and not results[once]):
        return None
    page.section(title, question)
    page.text(source_of(config, options, settings))
    if "rates" in results:
        rates = (f"{name} {10**rate:.1e}" for name, rate in results["rates"].items())
        page.text(f"Learning rates, chosen on tuning rows of the pilots: {'; '.join(rates)}.")
    return results


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

    For Holm's method an endpoint that has not run, or whose bound excludes nothing, has p = 1.
    """
    results = {name: result for name in family if (result := result_of(name))}
    p_values = {name: p_of(results[name]) if name in results else 1.0 for name in family}
    levels, adjusted = holm_levels(p_values), holm(p_values)
    for name, result in results.items():
        mean, se, df = (result[key] for key in ("mean", "se", "df"))
        interval = t_interval(
            mean, se or 0.0, df if result.get("bounded", True) else 0, levels[name]
        )
        result |= {"interval": interval, "p_holm": adjusted[name]}
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
    return f"{name} {verdict_so_far(ran[name]) if name in ran else 'not run'}"


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


def table_endpoints(
    family: dict[str, tuple[str, float]] = ENDPOINTS,
    counted: str = "backbones",
    short: bool = False,
) -> str:
    """Table of the endpoints that ran, and a line with the others.

    short: without the 90% interval and p.
    """
    ran = endpoints(family)
    rows = [
        {"name": name, "what": what, "scale": scale} | ran[name]
        for name, (what, scale) in family.items()
        if name in ran
    ]
    columns = endpoint_columns(counted)
    if short:
        columns = [column for column in columns if column.title not in ("90%", "p, Holm")]
    others = [f"{name}: {what}" for name, (what, _) in family.items() if name not in ran]
    note = f"\n\nNot run yet: {'; '.join(others)}." if others else ""
    return table(columns, rows) + note


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
    rows = read_json(BAG_OF_WORDS)["rows"] if BAG_OF_WORDS.exists() else []
    return {row["data"]: row["accuracy"] for row in rows if row["folder"] == folder}


def table_bag_of_words(titles: dict[str, str]) -> str:
    """A bag of words beside Models 1 and 2 on the same rows; titles: folder -> its name."""
    titles = titles | {folder_of(CONFIGS[name]): title for name, title in SWEEPS.items()}
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
    Column("LM loss less before, nats", "language_kept.mean", 2, 1, "+"),
    Column("probe of another set less before, points", "transfer_kept.mean", 1, 100, "+"),
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
        differences | {"title": f"{find_arm(arm).title} less Model {number}"}
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
    results, words = results_of(config), bag_of_words(folder_of(config))
    rows = [
        {"data": data, "rank": rank, "words": words.get(data)}
        | {"gain": at(results, ("accuracy_differences", "model2", data))}
        | {"accuracy": results["arms"][data]["model1"]["best_accuracy"]["mean"]}
        for data, rank in results["rank_at_equal_loss"].items()
    ]
    return table(GAIN_COLUMNS, rows)


def add_benefit(page: Page) -> None:
    config = CONFIGS["benefit"]
    title = "Accuracy and rank on four data sets, each model at its own rate"
    question = "Does the LM head help accuracy, and does it keep rank at equal training loss?"
    results = begin(page, title, question, config, once="P1")  # before, it is its pilots alone
    if results is None:
        return
    caption = "Differences in accuracy; controls ran on two sets, their mean is of these."
    page.table("benefit differences", caption, table_differences(results))
    page.table("benefit P1", "P1, and its equivalence.", table(P1_COLUMNS, [results]))
    caption = "Rank within classes at equal training loss, both models at Model 1's rate; P5."
    page.table("benefit ranks", caption, table_rank_at_equal_loss(results))
    caption = "Each arm at the best epoch of its tuning rows; what is kept: after the last step."
    rows = rows_of(results["arms"], "data", "arm")
    page.table("benefit ends", caption, table(BENEFIT_COLUMNS, rows))
    caption = "LM loss on the set's own texts, which Model 2 learns, and what is left of another "
    caption += "set's labels, both at Model 1's rate; t over backbones, for these rows."
    page.table("benefit kept", caption, table(KEPT_COLUMNS, rows_of(results["kept"], "data")))
    if results["times"]:
        page.table("benefit times", "Cost on a CPU, a training a core.", table_times(results))
    page.figure(f"{folder_of(config)}/benefit.png", "Accuracy less Model 1's")
    caption = "Rank within classes as the training loss falls, both models at Model 1's rate"
    page.figure(f"{folder_of(config)}/rank_at_equal_loss.png", caption)


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


def add_class_count(page: Page) -> None:
    config = CONFIGS["class_count"]
    results, options = results_of(config), "--corpus newsgroups"
    if results and all(row["merge"] != "random" for row in results["table"]):
        options += " --parts pilot endpoint"
    question = "Does the LM head help more where there are more classes?"
    results = begin(page, "CLINC150's classes merged", question, config, options)
    if results is None:
        return
    caption = "Models 1 and 2 by the number of classes; ranks are those of the last step."
    rows_too = results["P3_rows_too"]
    if rows_too:
        caption += f" Slope of the gain, seeds and rows drawn anew: {format_bounds(rows_too, 3)}."
    page.table("classes", caption, table(CLASS_COLUMNS, results["table"]))
    caption = "Gain and components against the number of classes"
    page.figure(f"{folder_of(config)}/class_count.png", caption)


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
    Column("trained less other, less an untrained compressor's", "less_random", 3),
    *(Column(f"probe, {label}, %", f"probe_{label}.mean", 1, 100) for label in LABELS),
    Column("LM loss, nats", "lm_loss.mean", 3),
    *plain("learned", "backbones", "diverged"),
)
SALIENCE_COLUMNS = (
    ARM,
    Column("ARI, trained label - other label", "learned", 3),
    Column("less an untrained compressor's", "less_random_compressor", 3),
    Column("of all backbones", "all_backbones", 3),
    Column("learned both labels", lambda row: f"{row['learned']['n']} of {row['ran']}"),
)
PIECES_COLUMNS = (
    Column("reading with", "title"),
    Column("LM loss, nats", "lm_loss", 4),
    Column("accuracy, points", "accuracy", 2, 100),
    Column("backbones", "lm_loss.n"),
)


def add_salience(page: Page) -> None:
    config = CONFIGS["engram_salience"]
    title = "Two labels in one input: what an engram organizes by"
    results = results_of(config)
    if results is None:
        return
    trainings = [row for row in results["trainings"] if row["arm"] != "start"]
    arms = dict.fromkeys(row["arm"].removeprefix("model") for row in trainings)
    trained = dict.fromkeys(row["trained"] for row in trainings)
    options = f"--corpus newsgroups --arms {' '.join(arms)} --trained {' '.join(trained)}"
    question = "Do engrams group by the label that was trained, or by what lies in the states?"
    begin(page, title, question, config, options, ["learning_rate", "steps"])
    least = f"{engram_salience.LEARNED:.0%}"
    caption = f"Two clusters of engrams; *learned*: backbones with an accuracy above {least}."
    page.table("salience trainings", caption, table(TRAINING_COLUMNS, results["trainings"]))
    caption = "P4 (Model 3) and P4b (less an untrained one's): mean of both trained labels."
    page.table("salience", caption, table(SALIENCE_COLUMNS, results["arms"]))
    page.figure(f"{folder_of(config)}/engrams.png", "Index of engrams with either label")


def add_pieces(page: Page) -> None:
    config = CONFIGS["engram_pieces"]
    title = "What an engram carries from one piece of a post to the next (exploratory)"
    question = "Does an engram help with the text that follows its own?"
    results = begin(page, title, question, config, settings=engram_pieces.SETTINGS)
    if results is None:
        return
    caption = "Second pieces read with another prefix, less the own engram's reading; other posts "
    caption += "are drawn by their true newsgroup. t over backbones, for these posts."
    page.table("pieces", caption, table(PIECES_COLUMNS, rows_of(results, "title")))


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


def table_linguistic(results: dict, titles: dict[str, str]) -> str:
    """Rank correlations with validation loss: at one size, over sizes, and the paper's."""
    paper = results["paper"] or {}
    rows = (
        {"title": title, "one_size": results["fixed_scale"][name], "sizes": results["grid"][name]}
        | {"paper_one_size": at(paper, ("fixed_scale", name))}
        | {"paper_sizes": at(paper, ("grid", name))}
        for name, title in titles.items()
    )
    return table(LINGUISTIC_COLUMNS, rows)


def table_decay(results: dict, titles: dict[str, str]) -> str:
    """Effect of less weight decay on each measure and on validation loss."""
    titles = {"validation_loss": "validation loss, nats", **titles}
    differences = results["less_weight_decay"]
    rows = (differences[name] | {"title": title} for name, title in titles.items())
    return table(DECAY_COLUMNS, rows)


def add_linguistic(page: Page) -> None:
    if not (ROOT / LINGUISTIC / "results.json").exists():
        return
    results = read_json(ROOT / LINGUISTIC / "results.json")
    page.section(
        "Tokens as classes: Linguistic Collapse on own language models",
        "Does neural collapse over next tokens go with a lower validation loss?",
    )
    models = "; ".join(f"{part} {a} of {b}" for part, (a, b) in results["models"].items())
    not_run = ", ".join(name.partition("-")[2] for name in results["not_run"])
    shorter = ", here with `--max-epochs 3`" if "-e10-" in not_run else ""
    page.text(
        "Command: `python studies/linguistic_collapse.py --corpus newsgroups --workers 2 "
        f"--paper-table CSV`{shorter}. Source: `{LINGUISTIC}/models.csv`; models that ran: {models}"
        + (f". Not run (width, layers, epochs, decay, seed): {not_run}." if not_run else ".")
    )
    caption = (
        "Spearman correlation with validation loss [95%]; *size taken out*: width, layers and "
        "epochs, by ranks; two seeds of a size count as two models, which narrows intervals. "
        "*Theirs*: from Wu & Papyan's table, 20 seeds of one size and 210 models, CDNV with "
        "exponent 4 alone."
    )
    titles = linguistic_collapse.TITLES
    page.table("linguistic", caption, table_linguistic(results, titles))
    if results["models"]["decay"][0]:
        caption = "Weight decay 5e-4 less .1: width 128, 2 layers, 3 epochs; of CDNVs log ratios."
        page.table("linguistic decay", caption, table_decay(results, titles))
    page.figure(f"{LINGUISTIC}/linguistic_collapse.png", "Each measure against validation loss")
    parts = linguistic_collapse.rows_of_parts(linguistic_collapse.Config(corpus="newsgroups"))
    models = table(LANGUAGE_MODEL_COLUMNS, linguistic_collapse.distinct(parts))
    caption = "Every model; the bigram is Kneser and Ney's, of the same tokens."
    page.table("models", caption, models)
