"""How sensitive are P2 and P5 to their rules? Exploratory, written after the runs.

Recomputes in seconds, from the committed tables of collapse_threshold.py and benefit.py: P2 for
other definitions of "has learned", and by the highest healthy rate instead of the number of healthy
ones; how much of Model 2's shift is explained by an LM loss that only scales Adam's steps;
components at equal training loss and rate; rank at fixed training losses; the gain in accuracy at
other learning rates. Writes studies/results/sensitivity/results.json.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from collapse.measures.statistics import differences_interval, format_interval, paired_difference
from collapse.measures.thresholds import KEPT
from collapse.report.markdown import markdown
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT, read_json, write_json
from studies import benefit, class_count
from studies import collapse_threshold as threshold
from studies.report.page import Page
from studies.shared import pilots, sweep

OUTPUT = ROOT / "studies" / "results" / "sensitivity" / "results.json"
LINES = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the way from chance to a backbone's best accuracy
LOSSES = (0.5, 0.4, 0.3, 0.2)  # nats, of 512 training rows
FEWEST_PAIRS = 5  # that a rate needs to enter the table of components at equal loss


def healthy_by_line(runs: Sequence[threshold.Run], line: float) -> dict[tuple[str, str], Any]:
    """(data set, arm) -> backbone -> rate -> whether components are kept and accuracy above a line.

    line: position between chance (0) and the backbone's best accuracy (1); P2 uses 0.5.
    """
    outcomes = threshold.outcomes_of(runs, line=line)
    return threshold.good_by_rate(outcomes, threshold.GOOD["healthy"])


def highest_healthy(good: Mapping[float, bool]) -> float | None:
    """The highest rate with a healthy run, whatever happened at lower ones; None without one."""
    return max((rate for rate, healthy in good.items() if healthy), default=None)


def shifts_by_line(runs: Sequence[threshold.Run], rates: Collection[float]) -> dict[str, Any]:
    """Line -> kind of threshold -> data set or `mean` -> Model 2 minus Model 1, decades."""
    by_line: dict[str, Any] = {}
    for line in LINES:
        healthy = healthy_by_line(runs, line)
        readings = {"by the number of healthy runs": threshold.threshold_of}
        readings["by the highest healthy rate"] = highest_healthy
        by_line[f"{line:g}"] = {
            name: shifts(healthy, read, rates, "model2", "model1")
            for name, read in readings.items()
        }
    return by_line


def shifts(
    outcomes: Mapping[tuple[str, str], Mapping[int, Mapping[float, bool]]],
    read: Any,
    rates: Collection[float],
    arm: str,
    base: str,
) -> dict[str, Any]:
    """Data set or `mean` -> an arm's threshold minus that of `base`: paired t interval.

    read(rate -> outcome): the threshold. `at_the_top`: backbones whose arm is good at every rate,
    which makes the shift a lower bound.
    """
    by_dataset, per_set = {}, []
    for dataset in dict.fromkeys(dataset for dataset, _ in outcomes):
        sides, at_the_top = [], 0
        for name in (base, arm):
            values, at_the_top = {}, 0
            for seed, by_rate in outcomes.get((dataset, name), {}).items():
                planned = {rate: by_rate[rate] for rate in rates if rate in by_rate}
                value = read(planned) if len(planned) == len(set(rates)) else None
                if value is not None:
                    values[seed] = value
                    at_the_top += all(planned.values())
            sides.append(values)
        shared = sides[0].keys() & sides[1].keys()
        difference = {seed: sides[1][seed] - sides[0][seed] for seed in sorted(shared)}
        per_set.append(difference)
        by_dataset[dataset] = differences_interval(difference) | {"at_the_top": at_the_top}
    at_the_top = max(part["at_the_top"] for part in by_dataset.values())
    mean = differences_interval(sweep.mean_over_sets(per_set))
    return by_dataset | {"mean": mean | {"at_the_top": at_the_top}}


def kept_by_rate(runs: Sequence[threshold.Run]) -> dict[tuple[str, str], Any]:
    """(data set, arm) -> backbone -> rate -> whether components were kept, at any accuracy."""
    return threshold.good_by_rate(threshold.outcomes_of(runs), threshold.GOOD["not collapsed"])


def at_equal_loss(runs: Sequence[threshold.Run]) -> list[dict[str, Any]]:
    """Components kept by Models 1 and 2 at the end, for pairs with similar final training loss.

    A pair has one backbone, data set and rate, and losses within a tenth of each other. Rows are
    rates with FEWEST_PAIRS pairs or more at which Model 1 has collapsed on average.
    """
    by_place = {
        (r.trial.dataset, r.trial.rate, r.trial.seed, r.trial.arm): r
        for r in runs
        if r.kept is not None
    }
    rows = []
    for dataset, rate in sorted({place[:2] for place in by_place}):
        pairs = []
        for seed in sorted({place[2] for place in by_place if place[:2] == (dataset, rate)}):
            one, two = (by_place.get((dataset, rate, seed, arm)) for arm in ("model1", "model2"))
            if one and two:
                losses = [run.end["loss"] for run in (one, two)]
                if max(losses) <= 1.1 * min(losses):
                    pairs.append((one.kept, two.kept, *losses))
        if len(pairs) >= FEWEST_PAIRS:
            means = np.mean(pairs, axis=0)
            names = ("model1", "model2", "loss_model1", "loss_model2")
            numbers = dict(zip(names, map(float, means), strict=True))
            if numbers["model1"] < KEPT:
                place = {"data": dataset, "rate": rate, "pairs": len(pairs)}
                rows.append(place | numbers)
    return rows


def ranks_at_losses(study: benefit.Runs, datasets: Sequence[str]) -> dict[str, Any]:
    """Loss -> data set or `mean` -> log rank within classes, Model 2 minus 1, at Model 1's rate.

    For backbones whose two models both reach the loss; in `mean`, on every data set.
    """
    by_loss: dict[str, Any] = {}
    for level in LOSSES:
        per_set = {}
        for dataset in datasets:
            rate = study.rates[dataset, "model1"]
            ones, twos = (study.runs.get((dataset, m, rate), {}) for m in ("model1", "model2"))
            values = {}
            for seed in sorted(ones.keys() & twos.keys()):
                ranks = [benefit.log_rank_at(side[seed].path, level) for side in (ones, twos)]
                if None not in ranks:
                    values[seed] = ranks[1] - ranks[0]
            per_set[dataset] = values
        shown = {dataset: differences_interval(values) for dataset, values in per_set.items()}
        mean = differences_interval(sweep.mean_over_sets(list(per_set.values())))
        by_loss[f"{level:g}"] = shown | {"mean": mean}
    return by_loss


def gains_by_rate(of_benefit: benefit.Config, of_classes: class_count.Config) -> dict[str, Any]:
    """Data set -> rate -> Model 2's mean gain on tuning rows of pilots, both models at the rate.

    Each study's rates were chosen on these pilots; for P3, where CLINC150 with ten classes is
    learned best, which is the lowest of the four.
    """
    gains: dict[str, dict[str, dict[str, Any]]] = {}
    for study, config in ((benefit, of_benefit), (class_count, of_classes)):
        accuracy: dict[tuple[str, float], dict[str, dict[int, float]]] = {}
        for run in sweep.read_runs(config.folder, sweep.PILOTS, study.Trial, pilots.Run):
            trial = run.trial
            data = trial.dataset if study is benefit else f"CLINC150, {trial.classes} classes"
            if trial.arm in pilots.MODELS:
                sides = accuracy.setdefault((data, trial.rate), {})
                sides.setdefault(trial.arm, {})[trial.seed] = run.tuning_accuracy
        for (data, rate), sides in sorted(accuracy.items()):
            difference = paired_difference(sides.get("model1", {}), sides.get("model2", {}))
            gains.setdefault(data, {})[f"{rate:g}"] = difference
    return gains


def summary(
    of_threshold: threshold.Config, of_benefit: benefit.Config, of_classes: class_count.Config
) -> dict[str, Any]:
    """What results.json holds, given the settings of the three studies."""
    runs, rates = threshold.read_runs(of_threshold.folder), of_threshold.rates
    healthy, kept = healthy_by_line(runs, LINES[0]), kept_by_rate(runs)
    study = benefit.read_study(of_benefit)
    return {
        "P2_by_line": shifts_by_line(runs, rates),
        "collapse_alone": shifts(kept, threshold.threshold_of, rates, "model2", "model1"),
        "shared_scale": {
            f"{arm} - {base}": shifts(healthy, threshold.threshold_of, rates, arm, base)
            for arm, base in (("shared-scale", "model1"), ("model2", "shared-scale"))
        },
        "components_at_equal_loss": at_equal_loss(runs),
        "P5_at_losses": ranks_at_losses(study, of_benefit.datasets),
        "gains_by_rate": gains_by_rate(of_benefit, of_classes),
    }


def write_summary() -> None:
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    studies = threshold, benefit, class_count
    write_json(OUTPUT, summary(*(study.Config(corpus="newsgroups") for study in studies)))


# --------------------------------------------------------------------------------------------------
# Tables of RESULTS.md
# --------------------------------------------------------------------------------------------------


def cell(interval: Mapping[str, Any], digits: int = 2) -> str:
    """An interval, marked if it is a lower bound; with n if fewer backbones than planned."""
    if not interval["n"]:
        return "n/a"
    text = "≥ " * bool(interval.get("at_the_top")) + format_interval(interval, digits, 1, "+")
    return text if interval["n"] >= sweep.PLANNED else f"{text} (n = {interval['n']})"


def table_lines(results: Mapping[str, Any]) -> str:
    """P2 by the line above which a run has learned; collapse alone needs no line."""
    datasets = list(results["collapse_alone"])
    rows = [["collapse alone", "", *(cell(results["collapse_alone"][data]) for data in datasets)]]
    for line, readings in results["P2_by_line"].items():
        for reading, by_data in readings.items():
            rows.append([f"{float(line):.0%}", reading, *(cell(by_data[d]) for d in datasets)])
    return markdown(["learned from", "read", *datasets], rows)


def table_shared_scale(results: Mapping[str, Any]) -> str:
    datasets = list(results["collapse_alone"])
    rows = [
        [name, *(cell(by_data[data]) for data in datasets)]
        for name, by_data in results["shared_scale"].items()
    ]
    return markdown(["difference", *datasets], rows)


def table_equal_loss(results: Mapping[str, Any]) -> str:
    rows = [
        [
            place["data"],
            f"{10 ** place['rate']:.1e}",
            str(place["pairs"]),
            *(f"{place[name]:.2f}" for name in ("loss_model1", "loss_model2", "model1", "model2")),
        ]
        for place in results["components_at_equal_loss"]
    ]
    header = ["data", "rate", "pairs", "loss, Model 1", "Model 2", "kept, Model 1", "Model 2"]
    return markdown(header, rows)


def table_losses(results: Mapping[str, Any]) -> str:
    by_loss = results["P5_at_losses"]
    datasets = list(next(iter(by_loss.values())))
    rows = [
        [f"{float(loss):.1f}", *(cell(by_data[data], 3) for data in datasets)]
        for loss, by_data in by_loss.items()
    ]
    return markdown(["training loss, nats", *datasets], rows)


def table_gains_by_rate(results: Mapping[str, Any]) -> str:
    by_data = results["gains_by_rate"]
    rates = sorted({rate for by_rate in by_data.values() for rate in by_rate}, key=float)
    rows = []
    for data, by_rate in by_data.items():
        gains = [by_rate.get(rate) for rate in rates]
        shown = [f"{100 * gain['mean']:+.2f}" if gain and gain["n"] else "n/a" for gain in gains]
        rows.append([data, *shown])
    return markdown(["data", *(f"{10 ** float(rate):.1e}" for rate in rates)], rows)


def add_tables(page: Page) -> None:
    if not OUTPUT.exists():
        return
    results = read_json(OUTPUT)
    title = "What P2, P3 and P5 rest on (exploratory)"
    page.section(title, "Would another reading of the same runs give another verdict?")
    page.text(
        "Command: `python studies/sensitivity.py`. Source: "
        f"`{OUTPUT.relative_to(ROOT)}`, from the tables of the studies above."
    )
    steps = threshold.Config().steps
    caption = f"Model 2's shift after {steps} steps, decades, by the line that says *has learned* "
    caption += (
        "(way from chance to a backbone's best); ≥: some backbone's is healthy at every rate."
    )
    page.table("lines", caption, table_lines(results))
    caption = "How much of the shift an LM loss explains that scales Adam's steps alone, decades."
    page.table("shared scale", caption, table_shared_scale(results))
    caption = "Share of components kept by pairs of one backbone and rate whose training losses "
    caption += "differ by a tenth at most, where Model 1's collapsed."
    page.table("equal loss", caption, table_equal_loss(results))
    caption = "Log rank within classes at fixed training losses, Model 2 - Model 1, at Model 1's "
    caption += "rate; of backbones whose both models reach them."
    page.table("fixed losses", caption, table_losses(results))
    caption = "Model 2's gain in points on tuning rows by learning rate, both models at the same: "
    caption += "three pilots, no validation row."
    page.table("gains by rate", caption, table_gains_by_rate(results))


def main() -> None:
    write_summary()
    print(OUTPUT.read_text(), end="")


if __name__ == "__main__":
    run_script(main)
