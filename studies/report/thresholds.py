"""Tables and figures of collapse_threshold.py and collapse_time.py in RESULTS.md.

A rate has `≥` or `≤` before it where only a bound is known for some trainings.
"""

from collections.abc import Sequence
from typing import Any

from collapse.report.markdown import Column, at, cell, merge_equal, plain, rows_of, table
from collapse.utils.files import ROOT, read_json
from studies import collapse_threshold
from studies.report import own_models
from studies.report.own_models import ARM, DATA, RATE, folder_of, results_of
from studies.report.page import Page
from studies.shared import sweep

REAL_MODELS = "studies/results/collapse_threshold/real_models.png"
FINETUNED = "studies/results/pretrain/finetuned.json"
OUTCOMES = ("healthy", "not learning", "collapsed, functional", "collapsed, dead", "diverged")
SHIFTS = {
    "healthy": "shift of healthy runs",
    "not collapsed": "shift of collapse alone",
    "learning": "shift of learning",
    "not dead": "shift of dead runs",
}

# --------------------------------------------------------------------------------------------------
# After a given number of steps
# --------------------------------------------------------------------------------------------------


def bound_of(row: dict, datasets: Sequence[str], kind: str = "healthy") -> str:
    """`≥ ` or `≤ ` if some thresholds of an arm are beyond the rates, on one of these data sets.

    Those of healthy runs are counted; those of another kind of GOOD are seen by how runs end at the
    highest and at the lowest rate.
    """
    if kind == "healthy":
        ends = (("≥ ", "at_the_top"), ("≤ ", "at_the_bottom"))
        return "".join(sign for sign, end in ends if any(row[end][data] for data in datasets))
    good = collapse_threshold.GOOD[kind]
    by_rate = [list(row["outcomes"][data].values()) for data in datasets]  # from the lowest on
    above = any(counts[-1][outcome] for counts in by_rate for outcome in good)
    below = any(counts[0][outcome] for counts in by_rate for outcome in set(OUTCOMES) - good)
    return "≥ " * above + "≤ " * below


def threshold_column(data: str, steps: str) -> Column:
    """A column with the mean threshold of each arm, as a learning rate."""

    def threshold(row: dict) -> str | None:
        interval = row["edge"][data]
        return interval and f"{bound_of(row, [data])}{10 ** interval['mean']:.1e}"

    return Column(f"threshold{f' after {steps} steps' if steps else ''}, {data}", threshold)


def shift_cell(row: dict, kind: str, place: str, datasets: Sequence[str]) -> str:
    """A shift from Model 1's threshold, marked as a bound where the arm's threshold is one."""
    if row["arm"] == "model1":
        return "0"
    interval = row["shift"][kind][place]
    bound = bound_of(row, datasets, kind) if interval["n"] else ""
    return bound + cell(interval)


def table_threshold(
    results: dict,
    kinds: Sequence[str] = tuple(SHIFTS),
    unit: str | None = "backbones",
    steps: str = "",
) -> str:
    """Threshold of each arm, and its shifts from Model 1.

    unit: title of a last column with the number of backbones or seeds; None leaves it out. steps:
    length of the trainings, for the titles.
    """
    datasets = list(results["arms"][0]["edge"])

    def shift(kind: str) -> Column:
        return Column(SHIFTS[kind], lambda row: shift_cell(row, kind, "mean", datasets))

    columns = [ARM, *(threshold_column(data, steps) for data in datasets), *map(shift, kinds)]
    if unit:
        columns.append(
            Column(unit, lambda row: merge_equal([str(n or 0) for n in at(row, "edge.*.n")]))
        )
    return table(columns, results["arms"])


def table_shifts(results: dict) -> str:
    """The shifts of table_threshold on each data set separately, each with its own seeds."""

    def shift(kind: str) -> Column:
        return Column(SHIFTS[kind], lambda row: shift_cell(row, kind, row["data"], [row["data"]]))

    pairs = Column("pairs", lambda row: row["shift"]["healthy"][row["data"]]["n"])
    arms = [row for row in results["arms"] if row["arm"] != "model1"]
    rows = [row | {"data": data} for row in arms for data in row["edge"]]
    return table([ARM, DATA, *map(shift, SHIFTS), pairs], rows)


END_COLUMNS = (
    ARM,
    RATE,
    *(Column(outcome, outcome) for outcome in OUTCOMES),
    Column("components", "ends.dims_95pct", 1),
    Column("effective rank", "ends.effective_rank", 1),
    Column("within classes", "ends.effective_rank_within", 1),
    Column("without first token", "ends.effective_rank_without_first", 1),
    Column("stable rank", "ends.stable_rank", 2),
    Column("top-10 variance", "ends.top10_variance", 4),
    Column("training accuracy, %", "ends.accuracy", 1, 100),
    Column("validation accuracy, %", "ends.validation_accuracy", 1, 100),
    Column("LM loss less before, nats", "ends.language_kept", 2),
)
FINETUNED_COLUMNS = (
    DATA,
    Column("pretrained, %", "accuracy.pretrained", 1, 100),
    Column("random, %", "accuracy.random", 1, 100),
    Column("difference, points [95%]", "pretrained - random", 1, 100),
    Column("backbones", "pretrained - random.n"),
)


def table_ends(results: dict, dataset: str) -> str:
    """Counts of outcomes for each arm and rate, and means over backbones."""
    rows = [
        outcomes | {"arm": row["arm"], "rate": rate, "ends": row["ends"][dataset].get(rate)}
        for row in results["arms"]
        for rate, outcomes in row["outcomes"][dataset].items()
    ]
    return table(END_COLUMNS, rows)


def steps_of(config: collapse_threshold.Config) -> str:
    """Optimizer steps of a study's trainings, from its rows; empty without rows."""
    steps = {row["steps"] for row in sweep.published_rows(config.folder)}
    return " or ".join(sorted(steps, key=int))


def add_threshold(page: Page) -> None:
    config = own_models.CONFIGS["collapse_threshold"]
    results, folder = results_of(config), folder_of(config)
    title = "The learning rate at which a representation collapses"
    page.section(title, "From which rate on do small models collapse, and what moves that rate?")
    page.text(
        "Command: `python studies/collapse_threshold.py --corpus newsgroups --data-dir DIR "
        f"--workers 2`. Source: `{folder}/seed-*.csv`, a row for every measurement of "
        f"{results['runs']} trainings."
    )
    others = results["other_bounds"].items()
    shifts = (f"{cell(shift)} ({float(bound):.0%})" for bound, shift in others)
    caption = (
        "Where runs stop being healthy; shifts are paired over backbones. With another share of "
        f"components as bound of a collapse, Dual Head's shift is {'; '.join(shifts)}."
    )
    page.table("threshold", caption, table_threshold(results, steps=steps_of(config)))
    add_shifts_and_ends(page, results)
    page.figure(f"{folder}/collapse.png", "Components kept and accuracy by learning rate")
    if (ROOT / FINETUNED).exists():
        caption = "Backbones against random weights; each start at its better rate of two."
        rows = rows_of(read_json(ROOT / FINETUNED), "data")
        page.table("finetuned", caption, table(FINETUNED_COLUMNS, rows))


def add_standin_threshold(page: Page) -> None:
    """Descriptive only: one model, whose seeds are of adapters, heads and order of rows."""
    config = own_models.STANDIN
    title = "The same of the stand-in: SmolLM2-135M-Instruct with LoRA"
    options = f"--model {config.model} --arms 1 2"
    question = "The same question of a pretrained model of 135 million parameters."
    results = own_models.begin(page, title, question, config, options, ["steps"])
    if results is None:
        return
    caption = "Thresholds over the rates that ran; shifts: mean of the sets, by seeds with each."
    text = table_threshold(results, unit="seeds", steps=steps_of(config))
    page.table("standin threshold", caption, text)
    add_shifts_and_ends(page, results, "standin ", "the stand-in's runs", "seed", "of the seeds")
    caption = "Components that the stand-in keeps, and its accuracy"
    page.figure(f"{folder_of(config)}/collapse.png", caption)


def add_shifts_and_ends(
    page: Page,
    results: dict,
    key: str = "",
    runs: str = "runs",
    unit: str = "backbone",
    means: str = "over backbones",
) -> None:
    caption = f"Shifts on each data set, decades, paired by {unit}."
    page.table(f"{key}shifts", caption, table_shifts(results))
    for data in results["arms"][0]["edge"]:
        caption = f"How {runs} end, {data}: counts, and means {means}."
        page.table(f"{key}ends {data}", caption, table_ends(results, data))


# --------------------------------------------------------------------------------------------------
# Over time, and on real models
# --------------------------------------------------------------------------------------------------


def threshold_after(step: str) -> Column:
    """A column with the mean threshold after so many steps, as a learning rate."""

    def threshold(row: dict) -> str | None:
        known = row["thresholds"].get(step)
        if known is None:
            return None
        bound = "≥ " * bool(known["at_least"]) + "≤ " * bool(known["at_most"])
        return f"{bound}{10 ** known['threshold']['mean']:.1e}"

    return Column(f"after {step}", threshold)


def table_time(results: dict[str, Any]) -> str:
    """Mean threshold of each part of the study after each number of steps, and slopes."""
    columns = [Column("part", "part"), ARM]
    columns += [threshold_after(str(step)) for step in results["measured"]]
    columns += [
        Column("slope [95%]", "slope"),
        Column("not monotone", lambda row: sum(at(row, "thresholds.*.not_monotone"))),
        Column("recovered", lambda row: sum(at(row, "thresholds.*.recovered"))),
        Column("backbones", lambda row: max(at(row, "thresholds.*.threshold.n"), default=0)),
    ]
    return table(columns, rows_of(results["parts"], "part"))


def table_bounds(results: dict[str, Any]) -> str:
    """P6 and P7 with other bounds of a collapse, and from the first measurement on."""
    rules = {
        f"below {float(bound):.0%}": shares for bound, shares in results["other_bounds"].items()
    }
    rules["from the first measurement on"] = {"P6": results["from_first"]}
    columns = (Column("collapsed", "rule"), Column("P6 [95%]", "P6"))
    columns += (Column("P7, a lower bound [95%]", "P7"),)
    return table(columns, rows_of(rules, "rule"))


REAL_MODEL_COLUMNS = (
    ARM,
    RATE,
    *plain("runs", "fell", "came back"),
    Column(
        "first below after step", lambda row: ", ".join(map(str, row["fell_after_step"])) or "-"
    ),
    Column("threshold of each seed", "thresholds"),
)


def table_real_model(results: dict[str, Any]) -> str:
    """Thresholds of each arm and seed as rates, and outcomes at each rate."""
    rows, bounds = rows_of(results["runs"], "arm", "rate"), {">=": "≥ ", "<=": "≤ "}
    for arm, by_seed in results["arms"].items():
        thresholds = (
            f"{bounds.get(known['censored'], '')}{10 ** known['value']:.1e}"
            for known in by_seed.values()
        )
        first = next(row for row in rows if row["arm"] == arm)
        first["thresholds"] = "; ".join(thresholds)  # shown in the row of the arm's first rate
    return table(REAL_MODEL_COLUMNS, ({"thresholds": ""} | row for row in rows))


def add_time(page: Page) -> None:
    """The section on P6 to P8: the study of time, and each real model that ran."""
    config = own_models.TIME
    results, family = results_of(config), own_models.LATER_ENDPOINTS
    endpoints = own_models.endpoints(family)
    models = [model for model in own_models.REAL_MODELS if results_of(model)]
    if not (endpoints or results or models):
        return
    question = "Does that rate fall as training goes on, and where does it lie in real models?"
    page.section("Rate, time and real models", question)
    if endpoints:
        caption = "P6 to P8, a family of three adjusted by Holm; *n*: backbones, of P8 seeds."
        page.table("later endpoints", caption, own_models.table_endpoints(family, "n"))
    if results:
        page.text(own_models.source_of(config))
        caption = "Learning rate above which a quarter of the components is not kept, after so "
        caption += "many steps; means over backbones, a censored one with its bound."
        page.table("time", caption, table_time(results))
        caption = "P6 and P7 with another bound of a collapse, and with every number of steps."
        page.table("time bounds", caption, table_bounds(results))
        caption = "Components kept over steps and learning rate"
        page.figure(f"{folder_of(config)}/collapse_time.png", caption)
    for model in models:
        add_real_model(page, model)
    page.figure(REAL_MODELS, "Learning rate at which real models collapse, a point a seed")


def add_real_model(page: Page, config: collapse_threshold.Config) -> None:
    results = results_of(config)
    if not results or "by_components" not in results:
        return
    options = f"--model {config.model} --arms 1 2 --bracket"
    page.text(own_models.source_of(config, options, ["steps", "compute_dtype"]))
    for data, thresholds in results["by_components"].items():
        caption = f"{config.model}, {data}: thresholds by components alone, after the steps "
        caption += "above; a run fell where it had fewer than a quarter of its start's components "
        caption += f"at a measurement from step {collapse_threshold.FIRST_JUDGED} on."
        page.table(f"{config.model} {data}", caption, table_real_model(thresholds))
        caption = f"How these runs end, {data}: counts, and means of the seeds."
        page.table(f"{config.model} ends {data}", caption, table_ends(results, data))
    page.figure(f"{folder_of(config)}/collapse.png", f"Components that {config.model} keeps")
