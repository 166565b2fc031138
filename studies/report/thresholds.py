"""Tables of collapse_threshold.py and collapse_time.py in RESULTS.md.

A rate has `≥` or `≤` before it where only a bound is known for some trainings.
"""

from collections.abc import Sequence
from typing import Any

from collapse.arms import find_arm
from collapse.report.markdown import Column, at, cell, merge_equal, plain, rows_of, table
from collapse.utils.files import ROOT
from studies import collapse_threshold
from studies.report.own_models import ARM, DATA, RATE
from studies.shared import sweep

REAL_MODELS = ROOT / "studies" / "results" / "collapse_threshold" / "real_models.png"
FINETUNED = ROOT / "studies" / "results" / "pretrain" / "finetuned.json"
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
    Column("LM loss minus before, nats", "ends.language_kept", 2),
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


def table_kept(results: dict[str, Any]) -> str:
    """Components kept at each rate after each number of steps, means of backbones, and accuracy."""
    steps = [str(step) for step in results["measured"]]
    columns = [Column("part", "part"), Column("rate", "rate", ".1e")]
    columns += [Column(f"after {step}, %", (step, "share"), 0, 100) for step in steps]
    columns.append(Column("accuracy, best of these, %", "best", 1, 100))
    columns.append(Column("accuracy at the end, %", "last", 1, 100))
    rows = []
    for part, found in results["parts"].items():
        for rate, by_step in found["means"].items():
            accuracies = [means.get("validation_accuracy") for means in by_step.values()]
            best = max((value for value in accuracies if value is not None), default=None)
            ends = {"best": best, "last": accuracies[-1]}
            rows.append({"part": part, "rate": 10 ** float(rate), **by_step, **ends})
    return table(columns, rows)


def repeated_rows(found: dict[str, Any]) -> str:
    """Whether repeating the same rows drains components, in a sentence."""
    by_rate = ", ".join(
        f"{100 * share:+.2f} at {10 ** float(rate):.1e}" for rate, share in found["by_rate"].items()
    )
    return (
        "Components left at the end on 2,000 rows less those on all rows, % of the start's, means "
        f"of {len(found['backbones'])} backbones: {by_rate}; in all {100 * found['mean']:+.1f}. By "
        f"the protocol's reading, which is no verdict: {found['reading'] or 'not all has run'}."
    )


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
)


def table_real_model(results: dict[str, Any]) -> str:
    """Outcomes of each arm at each rate, and below them the threshold of each seed as a rate.

    No seed has one before it ran at the two rates that it lies between.
    """
    bounds, lines = {">=": "≥ ", "<=": "≤ "}, []
    for arm, by_seed in results["arms"].items():
        thresholds = [
            f"{bounds.get(known['censored'], '')}{10 ** known['value']:.1e}"
            for known in by_seed.values()
        ]
        if thresholds:
            lines.append(f"{find_arm(arm).title} {', '.join(thresholds)}")
    rows = rows_of(results["runs"], "arm", "rate")
    told = f"Threshold of each seed: {'; '.join(lines)}." if lines else "No threshold is known yet."
    return f"{table(REAL_MODEL_COLUMNS, rows)}\n\n{told}"
