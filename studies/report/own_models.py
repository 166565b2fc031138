"""What RESULTS.md and FINDINGS.md tell of the studies on own language models.

The protocol's endpoints; a function add_NAME for each study's part of RESULTS.md, which adds
nothing before its results.json is there; block_NAME for each block of FINDINGS.md, see findings.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from collapse.measures.statistics import format_bounds, format_interval, t_interval
from collapse.measures.verdicts import holm, holm_levels, verdict
from collapse.utils.files import ROOT, read_json
from studies import (
    benefit,
    class_count,
    collapse_threshold,
    engram_pieces,
    engram_salience,
    linguistic_collapse,
)
from studies.report import gain_tables, study_tables
from studies.report import result_tables as tables
from studies.report.page import Page, with_full
from studies.shared import sweep

STUDIES = {
    "collapse_threshold": collapse_threshold,
    "benefit": benefit,
    "class_count": class_count,
    "engram_salience": engram_salience,
    "engram_pieces": engram_pieces,
}
# Study -> the settings of its published run, as far as they name its folder and its trainings.
CONFIGS = {name: study.Config(corpus="newsgroups") for name, study in STUDIES.items()}
STANDIN = collapse_threshold.Config(model="smollm2-135m")  # described, not tested
LINGUISTIC = "studies/results/linguistic_collapse"
FINETUNED = "studies/results/pretrain/finetuned.json"


def summarize() -> None:
    """Anew results.json and figures of every study that has tables."""
    published = [(study, CONFIGS[name]) for name, study in STUDIES.items()]
    for study, config in [*published, (collapse_threshold, STANDIN)]:
        if sweep.table_of(config.folder, 0).exists():
            study.STUDY.report(config)


def folder_of(config: sweep.Config) -> str:
    return str(config.folder.relative_to(ROOT))


def results_of(config: sweep.Config) -> dict[str, Any] | None:
    """Its results.json; None before it is there."""
    path = config.folder / "results.json"
    return read_json(path) if path.exists() else None


# --------------------------------------------------------------------------------------------------
# A bag of words on the same rows
# --------------------------------------------------------------------------------------------------

BAG_OF_WORDS = ROOT / "studies" / "results" / "bag_of_words" / "results.json"
SWEEPS = {
    "collapse_threshold": "own models, 200 steps, the best rate",
    "benefit": "own models, best epoch",
    "class_count": "own models, best epoch",
}


def bag_of_words(folder: str) -> dict[str, float]:
    """Data set -> accuracy of a bag of words on the rows of a results folder."""
    rows = read_json(BAG_OF_WORDS)["rows"] if BAG_OF_WORDS.exists() else []
    return {row["data"]: row["accuracy"] for row in rows if row["folder"] == folder}


def table_bag_of_words(titles: dict[str, str]) -> str:
    """A bag of words beside Models 1 and 2 on the same rows; titles: of experiments' folders."""
    titles = titles | {folder_of(CONFIGS[name]): title for name, title in SWEEPS.items()}
    rows = []
    for row in read_json(BAG_OF_WORDS)["rows"]:
        models = accuracies(row["folder"], row["data"])
        cells = [titles[row["folder"]], row["data"], f"{row['train_rows']:,}", f"{row['classes']}"]
        numbers = [row["accuracy"], *(models[model] for model in ("model1", "model2"))]
        rows.append([*cells, *(f"{100 * number:.1f}" for number in numbers)])
    header = ["models", "data", "training rows", "classes", "bag of words", "Model 1", "Model 2"]
    return tables.markdown(header, rows)


def accuracies(folder: str, data: str) -> dict[str, float]:
    """Mean validation accuracy of Models 1 and 2 on a data set, as a results folder tells it."""
    found = read_json(ROOT / folder / "results.json")
    if "models" in found:  # an experiment
        return {
            model: float(np.mean([run["final"]["accuracy"] for run in runs.values()]))
            for model, runs in found["models"].items()
        }
    if "table" in found:  # class_count: a row for each number of classes
        counts = {f"{r['classes']} classes": r for r in found["table"] if r["merge"] == "nested"}
        arms = counts[data]
    elif "P1" in found:
        arms = found["arms"][data]
    else:  # a sweep over rates
        ends = {row["arm"]: row["ends"][data].values() for row in found["arms"]}
        return {arm: max(end["validation_accuracy"] for end in at) for arm, at in ends.items()}
    return {model: arms[model]["best_accuracy"]["mean"] for model in ("model1", "model2")}


# --------------------------------------------------------------------------------------------------
# The protocol's endpoints
# --------------------------------------------------------------------------------------------------

# Endpoint -> its study, what it measures, a unit, and what a number is multiplied by for it.
ENDPOINTS = {
    "P1": ("benefit", "accuracy, Model 2 - Model 1", "points", 100),
    "P2": ("collapse_threshold", "shift of the edge by the LM loss", "decades", 1),
    "P3": ("class_count", "slope of the gain on log2 classes", "logits", 1),
    "P4": ("engram_salience", "ARI, trained label - other label", "", 1),
    "P5": ("benefit", "log rank within classes at equal loss, Model 2 - Model 1", "", 1),
}


def endpoints() -> dict[str, dict]:
    """P1 to P5 as far as they have run, each with `interval` at Holm's level and its verdict.

    One that has not run keeps its place among the five: it counts as if its p were 1.
    """
    found = {}
    for name, (study, *_) in ENDPOINTS.items():
        results = results_of(CONFIGS[study])
        if results and results[name]:
            found[name] = results[name]
    p_values = {name: found[name]["p"] if name in found else 1.0 for name in ENDPOINTS}
    levels, adjusted = holm_levels(p_values), holm(p_values)
    for name, result in found.items():
        estimate = [result[key] for key in ("mean", "se", "df")]
        interval = t_interval(*estimate, levels[name])
        bounds = interval, result["interval_90"]
        said = verdict(result["mean"], *bounds, result["margin"], result["done"])
        result |= {"interval": interval, "p_holm": adjusted[name], **said}
    return found


def standing(found: dict[str, dict], name: str) -> str:
    """An endpoint's verdict in a word."""
    if name not in found:
        return f"{name} not run"
    return f"{name} {found[name]['verdict']}{'' if found[name]['done'] else ' so far'}"


def of_h4(found: dict[str, dict]) -> str:
    """H4 is decided only where P2 and P5 agree."""
    both = [
        found[name]["verdict"] for name in ("P2", "P5") if name in found and found[name]["done"]
    ]
    agree = len(both) == 2 and len(set(both)) == 1 and both[0] in ("supported", "refuted")
    parts = f"{standing(found, 'P2')}, at high rates; {standing(found, 'P5')}, a difference"
    return f"{both[0] if agree else 'open'} ({parts})"


def of_h3(found: dict[str, dict]) -> str:
    """P4 is of a trained label; P4b asks what training the compressor adds."""
    arms = (results_of(CONFIGS["engram_salience"]) or {"arms": []})["arms"]
    gains = [row["less_random_compressor"] for row in arms if row["arm"] == "model3"]
    told = [f"; P4b {format_interval(gain, 3, sign='+')}" for gain in gains if gain["n"]]
    return f"{standing(found, 'P4')}, of a trained label{''.join(told)}"


def table_endpoints(short: bool = False) -> str:
    """Those that ran, and a line that names the others."""
    ran, rows = endpoints(), []
    for name, found in ran.items():
        _, what, unit, scale = ENDPOINTS[name]
        title = f"{what}, {unit}" if unit else what
        ends = [{**found[key], "mean": found["mean"]} for key in ("interval", "interval_90")]
        digits = 2 if abs(scale * found["margin"]) >= 0.1 else 3
        cells = [format_interval(end, digits, scale, "+") for end in ends]
        cells[1] = format_bounds(ends[1], digits, scale, "+")
        said = standing(ran, name).removeprefix(f"{name} ")
        cells += [f"{scale * found['margin']:g}", str(found["n"]), f"{found['p_holm']:.1g}", said]
        rows.append([name, title, *cells])
    header = ["", "what", "estimate [Holm-adjusted]", "90%", "margin", "backbones", "p, Holm"]
    header.append("verdict")
    if short:  # without what the adjusted interval tells, too
        kept = [place for place, head in enumerate(header) if head not in ("90%", "p, Holm")]
        header, *rows = ([row[place] for place in kept] for row in (header, *rows))
    table = tables.markdown(header, rows)
    others = [f"{name}: {what}" for name, (_, what, *_) in ENDPOINTS.items() if name not in ran]
    return f"{table}\n\nNot run yet: {'; '.join(others)}." if others else table


# --------------------------------------------------------------------------------------------------
# RESULTS.md
# --------------------------------------------------------------------------------------------------


def steps_of(config: collapse_threshold.Config) -> str:
    """Optimizer steps of a study's trainings, as its rows have them; without rows nothing."""
    steps = {row["steps"] for row in sweep.published_rows(config.folder)}
    return " or ".join(sorted(steps, key=int))


def add_threshold(page: Page) -> None:
    config = CONFIGS["collapse_threshold"]
    found, folder = results_of(config), folder_of(config)
    page.text("## The learning rate at which a representation collapses")
    page.text(
        "Command: `python studies/collapse_threshold.py --corpus newsgroups --data-dir DIR "
        f"--workers 2`. Source: `{folder}/seed-*.csv`, a row for every measurement of "
        f"{found['runs']} trainings."
    )
    caption = "Where runs stop being healthy; shifts are paired over backbones. With another share "
    caption += "of components as bound of a collapse, Dual Head's shift of the edge is "
    others = found["other_bounds"].items()
    told = [f"{format_interval(d, sign='+')} ({float(bound):.0%})" for bound, d in others]
    caption += "; ".join(told) + "."
    steps = steps_of(config)
    page.table("threshold", caption, study_tables.table_threshold(found, steps=steps))
    caption = "Shifts on each data set, decades, paired by backbone."
    page.table("shifts", caption, study_tables.table_shifts(found))
    for dataset in found["arms"][0]["edge"]:
        caption = f"How runs end, {dataset}: counts, and means over backbones."
        page.table(f"ends {dataset}", caption, study_tables.table_ends(found, dataset))
    page.figure(f"{folder}/collapse.png", "Components kept and accuracy by learning rate")
    if (ROOT / FINETUNED).exists():
        caption = "Backbones against random weights; each start at its better rate of two."
        finetuned = read_json(ROOT / FINETUNED)
        page.table("finetuned", caption, study_tables.table_finetuned(finetuned))


def source_of(
    config: sweep.Config, options: str = "--corpus newsgroups", settings: Sequence[str] = ()
) -> str:
    """Command of a study, with options, and settings as its rows have them; how these were made."""
    rows = sweep.published_rows(config.folder)
    trainings = {(row["seed"], row["training"]) for row in rows}
    options += "".join(f" --{name.replace('_', '-')} {rows[0][name]}" for name in settings)
    piloted = {int(row["seed"]) for row in rows} & set(sweep.PILOTS)
    commits = ", ".join(sorted({tables.short_commit(row["git_commit"]) for row in rows}))
    machines = sorted({row["hardware"] for row in rows} - {""})
    on = f" on {', '.join(machines)}" if machines else ""
    script = type(config).__module__.rpartition(".")[2]
    return (
        f"Command: `python studies/{script}.py {options} --data-dir DIR`. Source: "
        f"`{folder_of(config)}/seed-*.csv`, {len(rows):,} rows of {len(trainings):,} trainings"
        f"{', those of pilots among them' if piloted else ''}, made by commit {commits}{on}."
    )


def chosen(rates: dict[str, float]) -> str:
    """Rates that the pilots chose."""
    shown = (f"{name} {10**rate:.1e}" for name, rate in rates.items())
    return f"Learning rates, chosen on tuning rows of the pilots: {'; '.join(shown)}."


def begin(
    page: Page,
    title: str,
    config: sweep.Config,
    options: str = "--corpus newsgroups",
    settings: Sequence[str] = (),
    once: str = "",
) -> dict[str, Any] | None:
    """Begin a study's part, and give its results.

    None, with nothing added, before these are there; before the endpoint `once` has an interval.
    """
    found = results_of(config)
    if found is None or (once and not found[once]):
        return None
    page.text(f"## {title}")
    page.text(source_of(config, options, settings))
    if "rates" in found:
        page.text(chosen(found["rates"]))
    return found


def add_standin_threshold(page: Page) -> None:
    """Described, not tested: one model, whose seeds are of adapters, heads and order of rows."""
    title = "The same of the stand-in: SmolLM2-135M-Instruct with LoRA"
    options, folder = f"--model {STANDIN.model} --arms 1 2", folder_of(STANDIN)
    found = begin(page, title, STANDIN, options, ["steps"])
    if found is None:
        return
    caption = "Edges over the rates that ran; shifts: mean of the sets, of seeds that have each."
    table = study_tables.table_threshold(found, unit="seeds", steps=steps_of(STANDIN))
    page.table("standin threshold", caption, table)
    caption = "Shifts on each data set, decades, paired by seed."
    page.table("standin shifts", caption, study_tables.table_shifts(found))
    for dataset in found["arms"][0]["edge"]:
        caption = f"How the stand-in's runs end, {dataset}: counts, and means of the seeds."
        page.table(f"standin ends {dataset}", caption, study_tables.table_ends(found, dataset))
    page.figure(f"{folder}/collapse.png", "Components that the stand-in keeps, and its accuracy")


def add_benefit(page: Page) -> None:
    config = CONFIGS["benefit"]
    title = "Accuracy and rank on four data sets, each model at its own rate"
    found = begin(page, title, config, once="P1")  # before that it is its pilots alone
    if found is None:
        return
    caption = "Differences in accuracy; controls ran on two sets, their mean is of these."
    page.table("benefit differences", caption, gain_tables.table_differences(found))
    page.table("benefit P1", "P1, and its equivalence.", gain_tables.table_p1(found))
    caption = "Rank within classes at equal training loss, both models at Model 1's rate; P5."
    page.table("benefit ranks", caption, gain_tables.table_rank_at_equal_loss(found))
    caption = "Each arm at the best epoch of its tuning rows; what is kept: after the last step."
    page.table("benefit ends", caption, gain_tables.table_ends(found))
    caption = "LM loss on the set's own texts, which Model 2 learns, and what is left of another "
    caption += "set's labels, both at Model 1's rate; t over backbones, for these rows."
    page.table("benefit kept", caption, gain_tables.table_kept(found))
    if found["times"]:
        caption = "Cost on a CPU, a training a core."
        page.table("benefit times", caption, gain_tables.table_times(found))
    caption = "Accuracy less Model 1's; rank within classes as the training loss falls"
    page.figure(f"{folder_of(config)}/benefit.png", caption)


def add_class_count(page: Page) -> None:
    config = CONFIGS["class_count"]
    results, options = results_of(config), "--corpus newsgroups"
    if results and all(row["merge"] != "random" for row in results["table"]):
        options += " --parts pilot endpoint"
    found = begin(page, "CLINC150's classes merged", config, options)
    if found is None:
        return
    caption = "Models 1 and 2 by the number of classes; ranks are those of the last step."
    rows_too = found["P3_rows_too"]
    if rows_too:
        caption += f" Slope of the gain, seeds and rows drawn anew: {format_bounds(rows_too, 3)}."
    page.table("classes", caption, gain_tables.table_classes(found))
    caption = "Gain and components against the number of classes"
    page.figure(f"{folder_of(config)}/class_count.png", caption)


def add_salience(page: Page) -> None:
    config = CONFIGS["engram_salience"]
    title = "Two labels in one input: what an engram organizes by"
    results = results_of(config)
    if results is None:
        return
    kinds = [row for row in results["trainings"] if row["arm"] != "start"]
    arms = dict.fromkeys(row["arm"].removeprefix("model") for row in kinds)
    trained = dict.fromkeys(row["trained"] for row in kinds)
    options = f"--corpus newsgroups --arms {' '.join(arms)} --trained {' '.join(trained)}"
    found = begin(page, title, config, options, ["learning_rate", "steps"])
    least = f"{engram_salience.LEARNED:.0%}"
    caption = f"Two clusters of engrams; *learned*: backbones with an accuracy above {least}."
    table = study_tables.table_trainings(found, engram_salience.LABELS)
    page.table("salience trainings", caption, table)
    caption = "P4 (Model 3) and P4b (less an untrained one's): mean of both trained labels."
    page.table("salience", caption, study_tables.table_salience(found))
    page.figure(f"{folder_of(config)}/engrams.png", "Index of engrams with either label")


def add_pieces(page: Page) -> None:
    config = CONFIGS["engram_pieces"]
    title = "What an engram carries from one piece of a post to the next (exploratory)"
    found = begin(page, title, config, settings=engram_pieces.SETTINGS)
    if found is None:
        return
    caption = "Second pieces read with another prefix, less the own engram's reading; other posts "
    caption += "are drawn by their true newsgroup. t over backbones, for these posts."
    page.table("pieces", caption, study_tables.table_pieces(found))


def add_linguistic(page: Page) -> None:
    if not (ROOT / LINGUISTIC / "results.json").exists():
        return
    found = read_json(ROOT / LINGUISTIC / "results.json")
    page.text("## Tokens as classes: Linguistic Collapse on own language models")
    models = "; ".join(f"{part} {a} of {b}" for part, (a, b) in found["models"].items())
    not_run = ", ".join(name.partition("-")[2] for name in found["not_run"])
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
    table = study_tables.table_linguistic(found, linguistic_collapse.TITLES)
    page.table("linguistic", caption, table)
    if found["models"]["decay"][0]:
        caption = "Weight decay 5e-4 less .1: width 128, 2 layers, 3 epochs; of CDNVs log ratios."
        decay = study_tables.table_decay(found, linguistic_collapse.TITLES)
        page.table("linguistic decay", caption, decay)
    page.figure(f"{LINGUISTIC}/linguistic_collapse.png", "Each measure against validation loss")
    parts = linguistic_collapse.rows_of_parts(linguistic_collapse.Config(corpus="newsgroups"))
    table = study_tables.table_language_models(linguistic_collapse.distinct(parts))
    page.table("models", "Every model; the bigram is Kneser and Ney's, of the same tokens.", table)


def add_studies(page: Page) -> None:
    """Each that ran, in the order of the protocol."""
    add_threshold(page)
    add_standin_threshold(page)
    add_benefit(page)
    add_class_count(page)
    add_salience(page)
    add_pieces(page)
    add_linguistic(page)


# --------------------------------------------------------------------------------------------------
# Blocks of FINDINGS.md
# --------------------------------------------------------------------------------------------------


def block_endpoints(page: Page) -> str:
    return with_full(table_endpoints(short=True), page, "endpoints")


def block_threshold(page: Page) -> str:
    found = results_of(CONFIGS["collapse_threshold"])
    kinds, steps = ("healthy", "not collapsed"), steps_of(CONFIGS["collapse_threshold"])
    table = study_tables.table_threshold(found, kinds, unit=None, steps=steps)
    return with_full(table, page, "threshold", "shifts")


def block_gains(page: Page) -> str:
    folder = CONFIGS["benefit"].folder.relative_to(ROOT)
    table = gain_tables.table_gains(results_of(CONFIGS["benefit"]), bag_of_words(str(folder)))
    return with_full(table, page, "benefit differences", "benefit ranks", "bag of words")


def block_salience(page: Page) -> str:
    found = results_of(CONFIGS["engram_salience"])
    table = study_tables.table_indices(found, engram_salience.LABELS)
    return with_full(table, page, "salience trainings", "salience", "pieces")


def block_linguistic(page: Page) -> str:
    """The protocol's four correlations alone."""
    found = read_json(ROOT / LINGUISTIC / "results.json")
    primary = {name: linguistic_collapse.TITLES[name] for name in found["primary"]}
    return with_full(study_tables.table_linguistic(found, primary), page, "linguistic")
