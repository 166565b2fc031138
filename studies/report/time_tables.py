"""What RESULTS.md tells of rate, time and real models: the protocol's second part, P6 to P8.

Each function adds nothing before the results it tells of are there.
"""

from typing import Any

from collapse.arms import find_arm
from collapse.measures.statistics import format_bounds, format_interval, t_interval
from collapse.measures.verdicts import holm, holm_levels, verdict
from studies import collapse_threshold, collapse_time
from studies.report import result_tables as tables
from studies.report.own_models import folder_of, results_of, source_of
from studies.report.page import Page

TIME = collapse_time.Config(corpus="newsgroups")
# Real models, in order of size; the first is P8's.
QWEN = collapse_threshold.Config(model="qwen2.5-coder-0.5b-instruct")
MODELS = (collapse_threshold.Config(model="gemma-3-270m"), QWEN)

WHAT = {
    "P6": "how far Model 1's threshold falls in a decade of steps, decades",
    "P7": "slope of Model 2's threshold - Model 1's, decades a decade",
    "P8": "Qwen2.5-Coder-0.5B: threshold, Model 2 - Model 1, decades",
}


BOUNDS = {">=": "≥ ", "<=": "≤ "}


def summarize() -> None:
    """Anew results.json and figures of the studies that have tables."""
    for study, config in ((collapse_time, TIME), *((collapse_threshold, c) for c in MODELS)):
        if any(config.folder.glob("seed-*.csv")):
            study.STUDY.report(config)


def endpoints() -> dict[str, dict[str, Any]]:
    """P6 to P8 as far as they have run, each with `interval` at Holm's level and its verdict.

    A family of three; one that has not run, or that bounds nothing above zero, counts as if its p
    were 1.
    """
    found: dict[str, dict[str, Any]] = {}
    in_time = results_of(TIME) or {}
    real = (results_of(QWEN) or {}).get("by_components", {}).get("AG News") or {}
    for name, result in (("P6", in_time.get("P6")), ("P7", in_time.get("P7"))):
        if result:
            found[name] = result
    if real.get("shift"):
        found["P8"] = real["shift"]
    p_values = {name: p_of(found[name]) if name in found else 1.0 for name in WHAT}
    levels, adjusted = holm_levels(p_values), holm(p_values)
    for name, result in found.items():
        mean, se, df = (result[key] for key in ("mean", "se", "df"))
        if not result.get("bounded", True):
            df = 0
        interval = t_interval(mean, se or 0.0, df, levels[name])
        result |= {"interval": interval, "p_holm": adjusted[name]}
        if mean is not None and not refuted_from_above(result):
            rules = result["margin"], result["done"], result.get("lower_bound", False)
            result |= verdict(mean, interval, result["interval_90"], *rules)
    return found


def p_of(result: dict[str, Any]) -> float:
    """As Holm counts it: a lower bound below zero, or one of nothing, rejects nothing."""
    bounds_nothing = not result.get("bounded", True)
    below = result.get("lower_bound", False) and (result["mean"] or 0) <= 0
    if (bounds_nothing or below) and not refuted_from_above(result):
        return 1.0
    return result["p"]


def refuted_from_above(result: dict[str, Any]) -> bool:
    """Of P7: the largest slope that Model 2's ends allow lies surely below Model 1's."""
    return bool(result.get("at_most")) and result["verdict"] == "refuted"


def table_endpoints() -> str:
    ran, rows = endpoints(), []
    for name, found in ran.items():
        interval = {**found["interval"], "mean": found["mean"]}
        bound = "≥ " if found.get("lower_bound") else ""
        said = found["verdict"] + ("" if found["done"] else " so far")
        inner = format_bounds(found["interval_90"], 2, 1, "+") or "n/a"
        told = found["mean"] is not None
        estimate = bound + format_interval(interval, 2, 1, "+") if told else "n/a"
        numbers = [f"{found['margin']:g}", str(found["n"]), f"{found['p_holm']:.1g}", said]
        rows.append([name, WHAT[name], estimate, inner, *numbers])
    header = ["", "what", "estimate [Holm-adjusted]", "90%", "margin", "n", "p, Holm", "verdict"]
    table = tables.markdown(header, rows)
    others = [f"{name}: {what}" for name, what in WHAT.items() if name not in ran]
    return f"{table}\n\nNot run yet: {'; '.join(others)}." if others else table


def table_time(results: dict[str, Any]) -> str:
    """Mean threshold of each part after so many steps, as a learning rate; slopes."""
    steps = [str(step) for step in results["measured"]]
    rows = []
    for part, found in results["parts"].items():
        cells = [threshold_cell(found["thresholds"].get(step)) for step in steps]
        slope = found["slope"]
        told = format_interval(slope, 2, 1, "+") if slope else "n/a"
        counts = [
            str(sum(at[kind] for at in found["thresholds"].values()))
            for kind in ("not_monotone", "recovered")
        ]
        backbones = max((at["threshold"]["n"] for at in found["thresholds"].values()), default=0)
        rows.append([part, find_arm(found["arm"]).title, *cells, told, *counts, str(backbones)])
    header = ["part", "arm", *(f"after {step}" for step in steps), "slope [95%]"]
    return tables.markdown([*header, "not monotone", "recovered", "backbones"], rows)


def threshold_cell(at: dict[str, Any] | None) -> str:
    """`≥` or `≤` where that many of the backbones are known by a bound alone."""
    if at is None:
        return "n/a"
    bound = "≥ " * bool(at["at_least"]) + "≤ " * bool(at["at_most"])
    return f"{bound}{10 ** at['threshold']['mean']:.1e}"


def table_bounds(results: dict[str, Any]) -> str:
    """P6 and P7 with other shares of components as bound of a collapse, and from step 50 on."""
    kinds = {f"below {float(bound):.0%}": found for bound, found in results["other_bounds"].items()}
    kinds["from the first measurement on"] = {"P6": results["from_first"], "P7": None}
    rows = []
    for kind, found in kinds.items():
        cells = [
            format_interval(found[name], 2, 1, "+") if found[name] else "n/a"
            for name in ("P6", "P7")
        ]
        rows.append([kind, *cells])
    return tables.markdown(["collapsed", "P6 [95%]", "P7, a lower bound [95%]"], rows)


def table_model(found: dict[str, Any]) -> str:
    """Thresholds of each arm and seed as rates, and what became of the runs at each rate."""
    rows = []
    for arm, by_seed in found["arms"].items():
        told = [
            f"{BOUNDS.get(at['censored'], '')}{10 ** at['value']:.1e}" for at in by_seed.values()
        ]
        for rate, counts in found["runs"][arm].items():
            steps = ", ".join(map(str, counts["fell_after_step"])) or "-"
            numbers = [str(counts[kind]) for kind in ("runs", "fell", "came_back")]
            title = find_arm(arm).title
            rows.append([title, f"{10 ** float(rate):.1e}", *numbers, steps, "; ".join(told)])
            told = []
    header = ["arm", "rate", "runs", "fell", "came back", "first below after step"]
    return tables.markdown([*header, "threshold of each seed"], rows)


def add_time(page: Page) -> None:
    """P6 to P8, the study of time, and each real model that ran."""
    if not endpoints() and results_of(TIME) is None:
        return
    page.text("## Rate, time and real models")
    caption = "P6 to P8, a family of three adjusted by Holm; *n*: backbones, of P8 seeds."
    page.table("later endpoints", caption, table_endpoints())
    found = results_of(TIME)
    if found:
        page.text(source_of(TIME))
        caption = "Learning rate above which a quarter of the components is not kept, after so "
        caption += "many steps; means over backbones, a censored one with its bound."
        page.table("time", caption, table_time(found))
        caption = "P6 and P7 with another bound of a collapse, and with every number of steps."
        page.table("time bounds", caption, table_bounds(found))
        caption = "Components kept over steps and learning rate"
        page.figure(f"{folder_of(TIME)}/collapse_time.png", caption)
    for config in MODELS:
        add_model(page, config)


def add_model(page: Page, config: collapse_threshold.Config) -> None:
    found = results_of(config)
    if not found or "by_components" not in found:
        return
    page.text(source_of(config, f"--model {config.model} --arms 1 2", ["steps", "compute_dtype"]))
    for dataset, told in found["by_components"].items():
        caption = f"{config.model}, {dataset}: thresholds by components alone, after the steps "
        caption += "above; a run fell where it had fewer than a quarter of its start's components "
        caption += f"at a measurement from step {collapse_threshold.FIRST_JUDGED} on."
        page.table(f"{config.model} {dataset}", caption, table_model(told))
    page.figure(f"{folder_of(config)}/collapse.png", f"Components that {config.model} keeps")
