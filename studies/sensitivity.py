"""How sensitive are P2 and P5 to their rules? Exploratory, written after the runs.

Recomputes in seconds, from the committed tables of collapse_threshold.py and benefit.py: P2 for
other definitions of "has learned", and by the highest healthy rate instead of the number of healthy
ones; how much of Model 2's shift is explained by an LM loss that only scales Adam's steps;
components at equal training loss and rate; rank at fixed training losses; the gain in accuracy at
other learning rates; components and accuracy after each epoch. Writes
studies/results/sensitivity/results.json.
"""

import argparse
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from collapse.arms import find_arm
from collapse.measures.statistics import differences_interval, format_interval, paired_difference
from collapse.measures.thresholds import KEPT
from collapse.report.markdown import Column, rows_of, table
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT, write_json
from studies import benefit, class_count
from studies import collapse_threshold as threshold
from studies.shared import pilots, sweep

OUTPUT = ROOT / "studies" / "results" / "sensitivity" / "results.json"
LINES = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the way from chance to a backbone's best accuracy
LOSSES = (0.5, 0.4, 0.3, 0.2)  # nats, of 512 training rows
FEWEST_PAIRS = 5  # that a rate needs to enter the table of components at equal loss


def good_by_rate(
    runs: Sequence[threshold.Run], kind: str = "healthy", line: float = LINES[0]
) -> threshold.GoodRuns:
    """line: how far from chance (0) to the best accuracy (1) a run must come to have learned."""
    return threshold.good_by_rate(threshold.outcomes_of(runs, line=line), threshold.GOOD[kind])


def highest_healthy(good: Mapping[float, bool]) -> float | None:
    """The highest rate with a healthy run, whatever happened at lower ones; None without one."""
    return max((rate for rate, healthy in good.items() if healthy), default=None)


def shifts_by_line(runs: Sequence[threshold.Run], rates: Collection[float]) -> dict[str, Any]:
    """Line -> kind of threshold -> data set or `mean` -> Model 2 minus Model 1, decades."""
    by_line: dict[str, Any] = {}
    for line in LINES:
        healthy = good_by_rate(runs, line=line)
        readings = {"by the number of healthy runs": threshold.threshold_of}
        readings["by the highest healthy rate"] = highest_healthy
        by_line[f"{line:g}"] = {
            name: shifts(healthy, read, rates, "model2", "model1")
            for name, read in readings.items()
        }
    return by_line


def shifts(
    good_runs: threshold.GoodRuns,
    read: Callable[[dict[float, bool]], float | None],
    rates: Collection[float],
    arm: str,
    base: str,
) -> dict[str, Any]:
    """Data set or `mean` -> an arm's threshold minus that of `base`: paired t interval.

    read(rate -> outcome): the threshold. `at_the_top`: backbones whose arm is good at every rate,
    which makes the shift a lower bound.
    """
    datasets = list(dict.fromkeys(dataset for dataset, _ in good_runs))
    thresholds = threshold.thresholds_of(good_runs, dict.fromkeys(datasets, rates), read)
    at_the_top = {
        dataset: sum(
            all(good_runs[dataset, arm][seed][rate] for rate in rates)
            for seed in thresholds.get((dataset, arm), ())
        )
        for dataset in datasets
    }
    places = {dataset: [dataset] for dataset in datasets} | {"mean": datasets}
    return {
        place: differences_interval(threshold.shifts_by_seed(thresholds, arm, sets, base))
        | {"at_the_top": max(at_the_top[dataset] for dataset in sets)}
        for place, sets in places.items()
    }


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
    return {
        f"{level:g}": sweep.intervals_over_sets(
            benefit.rank_differences(study, datasets, partial(benefit.log_rank_difference, level))
        )
        for level in LOSSES
    }


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


def by_epoch(study: benefit.Runs, arms: Sequence[str]) -> list[dict[str, Any]]:
    """What is left after each epoch, at each arm's own rate: means over backbones.

    `kept`: share of the start's components; `below`: backbones with less than KEPT of them;
    `accuracy`: on validation rows, of the same models. Data sets that an arm did not run are left
    out.
    """
    rows = []
    for dataset, arm in itertools.product(sorted({key[0] for key in study.runs}), arms):
        records: dict[float, list[tuple[float, float, float]]] = {}
        for run in study.runs.get(study.run_key(dataset, arm), {}).values():
            for record in run.path[1:]:
                if record["epoch"].is_integer():
                    kept = record["dims_95pct"] / run.path[0]["dims_95pct"]
                    end = kept, record["validation_accuracy"], record["step"]
                    records.setdefault(record["epoch"], []).append(end)
        for epoch, ends in sorted(records.items()):
            kept, accuracy, step = (list(values) for values in zip(*ends, strict=True))
            place = {"data": dataset, "arm": arm, "epoch": epoch, "step": step[0]}
            means = {"kept": float(np.mean(kept)), "accuracy": float(np.mean(accuracy))}
            below = sum(share < KEPT for share in kept)
            rows.append(place | means | {"below": below, "backbones": len(ends)})
    return rows


def summary(
    of_threshold: threshold.Config, of_benefit: benefit.Config, of_classes: class_count.Config
) -> dict[str, Any]:
    """What results.json holds, given the settings of the three studies."""
    runs, rates = threshold.read_runs(of_threshold.folder), of_threshold.rates
    healthy, kept = good_by_rate(runs), good_by_rate(runs, "not collapsed")
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
        "by_epoch": by_epoch(study, ("model1", "longer", "model2")),
    }


def write_summary() -> None:
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    studies = threshold, benefit, class_count
    write_json(OUTPUT, sweep.to_nine_digits(summary(*(study.Config() for study in studies))))


# --------------------------------------------------------------------------------------------------
# Tables of RESULTS.md
# --------------------------------------------------------------------------------------------------


def cell(interval: Mapping[str, Any], digits: int = 2) -> str:
    """An interval, marked if it is a lower bound; with n if fewer backbones than planned."""
    if not interval["n"]:
        return "n/a"
    text = "≥ " * bool(interval.get("at_the_top")) + format_interval(interval, digits, 1, "+")
    return text if interval["n"] >= sweep.PLANNED else f"{text} (n = {interval['n']})"


def columns_of(places: Iterable[str], digits: int = 2) -> list[Column]:
    """A column of intervals for each data set, or `mean`."""
    return [Column(place, lambda row, place=place: cell(row[place], digits)) for place in places]


def table_lines(results: Mapping[str, Any]) -> str:
    """P2 by the line above which a run has learned; collapse alone needs no line."""
    alone = results["collapse_alone"]
    rows = [{"line": "collapse alone", "read": "", **alone}]
    for row in rows_of(results["P2_by_line"], "line", "read"):
        rows.append(row | {"line": f"{float(row['line']):.0%}"})
    columns = [Column("learned from", "line"), Column("read", "read"), *columns_of(alone)]
    return table(columns, rows)


def table_shared_scale(results: Mapping[str, Any]) -> str:
    columns = [Column("difference", "difference"), *columns_of(results["collapse_alone"])]
    return table(columns, rows_of(results["shared_scale"], "difference"))


EQUAL_LOSS_COLUMNS = (
    Column("data", "data"),
    Column("rate", lambda row: f"{10 ** row['rate']:.1e}"),
    Column("pairs", "pairs"),
    Column("loss, Model 1", "loss_model1"),
    Column("Model 2", "loss_model2"),
    Column("kept, Model 1", "model1"),
    Column("Model 2", "model2"),
)


BY_EPOCH_COLUMNS = (
    Column("data", "data"),
    Column("arm", lambda row: find_arm(row["arm"]).title),
    Column("epoch", "epoch", ".0f"),
    Column("step", "step", ",.0f"),
    Column("components kept, %", "kept", 0, 100),
    Column("below a quarter", "below"),
    Column("accuracy, %", "accuracy", 1, 100),
    Column("backbones", "backbones"),
)


def table_losses(results: Mapping[str, Any]) -> str:
    by_loss = results["P5_at_losses"]
    loss = Column("training loss, nats", lambda row: f"{float(row['loss']):.1f}")
    places = next(iter(by_loss.values()))
    return table([loss, *columns_of(places, 3)], rows_of(by_loss, "loss"))


def table_gains_by_rate(results: Mapping[str, Any]) -> str:
    by_data = results["gains_by_rate"]
    rates = sorted({rate for by_rate in by_data.values() for rate in by_rate}, key=float)
    gains = (Column(f"{10 ** float(rate):.1e}", (rate, "mean"), 2, 100, "+") for rate in rates)
    return table([Column("data", "data"), *gains], rows_of(by_data, "data"))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help alone
    write_summary()
    print(OUTPUT.read_text(), end="")


if __name__ == "__main__":
    run_script(main)
