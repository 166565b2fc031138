"""Does an LM loss make a classifier more accurate, and does it keep rank at equal training loss?

P1 and P5 of studies/PROTOCOL.md: four data sets, many backbones, Models 1 and 2 each at the
learning rate that is best on tuning rows of pilot backbones; controls on two of the data sets.
Writes a table and a file with results on validation rows for each backbone, then results.json and a
figure. The same command resumes where it was stopped.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import common
from collapse.measures.statistics import (
    crossed_interval,
    format_interval,
    mean_interval,
    pigeonhole_interval,
    sets_interval,
)
from collapse.measures.verdicts import equivalence
from collapse.report import rank_plots
from collapse.report.plots import save_figure
from collapse.runs.progress import Progress
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT
from studies.shared import finetune, pilots, sweep
from studies.shared.pilots import MODELS, Run, best_rates, in_parts, read_runs, run_trial

MARGIN_P1 = 0.005  # half a point of accuracy
FEWEST_TO_DRAW_FROM = 10  # seeds that a pigeonhole bootstrap needs
MARGIN_P5 = 0.1  # of log rank


@dataclass(frozen=True)
class Size:
    """How a data set is trained on."""

    train_rows: int
    epochs: int
    max_length: int  # tokens
    other: str | None  # the data set for whose labels states are probed


SIZES = {
    "AG News": Size(4000, 4, 32, "SST-2 by sentence"),
    "SST-2 by sentence": Size(8000, 3, 64, "AG News"),
    "CLINC150": Size(15_000, 4, 32, "AG News"),
    "Banking77": Size(9000, 6, 32, "AG News"),
    finetune.TOY: Size(64, 2, 32, None),
}


@dataclass
class Config(pilots.Config):
    """Settings of the study; the comment above a field is its --help text."""

    # Parts to run: pilot (chooses the learning rates), endpoint (Models 1 and 2), controls (first
    # ten seeds).
    parts: tuple[str, ...] = ("pilot", "endpoint", "controls")
    # Data sets: names that experiment.py --dataset takes.
    datasets: tuple[str, ...] = ("AG News", "SST-2 by sentence", "CLINC150", "Banking77")
    # Data sets to run the controls on.
    control_datasets: tuple[str, ...] = ("AG News", "SST-2 by sentence")
    # Controls, as experiment.py --models takes them.
    controls: tuple[str, ...] = ("longer", "shuffled-lm", "2@0.1", "2@0.9")
    # Folder for results, with a subfolder for each corpus.
    output_dir: Path = ROOT / "studies" / "results" / "benefit"


Trial = sweep.RateTrial


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def trials(config: Config) -> Iterator[Sequence[Trial]]:
    return in_parts(config, pilot_trials(config), lambda: trials_at(config, chosen_rates(config)))


def pilot_trials(config: Config) -> list[Trial]:
    product = itertools.product(sweep.PILOTS, config.datasets, MODELS, config.rates)
    return list(itertools.starmap(Trial, product))


def chosen_rates(config: Config) -> dict[tuple[str, str], float]:
    """(data set, model) -> its rate, see best_rates."""
    return best_rates(config, pilot_trials(config), lambda trial: (trial.dataset, trial.arm))


def trials_at(config: Config, rates: dict[tuple[str, str], float]) -> list[Trial]:
    """Trials of the study: Models 1 and 2 at their own rates, Model 2 also at Model 1's, controls.

    A control has the rate of the model that it varies: `longer` that of Model 1, others Model 2's.
    """
    trials = []
    for seed in config.seeds:
        if "endpoint" in config.parts:
            for dataset in config.datasets:
                ones, twos = rates[dataset, "model1"], rates[dataset, "model2"]
                trials.append(Trial(seed, dataset, "model1", ones))
                trials += [Trial(seed, dataset, "model2", r) for r in dict.fromkeys((twos, ones))]
        if "controls" in config.parts and seed < sweep.PLANNED // 2:
            for dataset, name in itertools.product(config.control_datasets, config.controls):
                arm = common.find_arm(name).name
                trials.append(Trial(seed, dataset, arm, rate_of(rates, dataset, arm)))
    return trials


def rate_of(rates: dict[tuple[str, str], float], dataset: str, arm: str) -> float:
    """An arm's own rate; for a control, that of the model that it varies."""
    model = "model1" if common.find_arm(arm).lm == "none" else "model2"
    return rates[dataset, model]


def settings(config: Config, trial: Mapping[str, Any]) -> dict[str, int]:
    size = SIZES[trial["dataset"]]
    return {"train_rows": size.train_rows, "epochs": size.epochs, "max_length": size.max_length}


def run(config: Config, trial: Trial, progress: Progress) -> list[finetune.Record]:
    task, tuning_rows = finetune.load_split(trial.dataset, config.data_dir)
    name = SIZES[trial.dataset].other
    other = finetune.load_split(name, config.data_dir)[0] if name else None
    made_with = settings(config, dataclasses.asdict(trial))
    return run_trial(config, trial, progress, made_with, task, tuning_rows, other)


# --------------------------------------------------------------------------------------------------
# What the rows say
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """All runs of the study: (data set, arm, rate) -> seed -> run; and the chosen rates."""

    runs: dict[tuple[str, str, float], dict[int, Run]]
    rates: dict[tuple[str, str], float]

    def run_key(self, dataset: str, arm: str) -> tuple[str, str, float]:
        """The key of an arm's runs at its own rate."""
        return dataset, arm, rate_of(self.rates, dataset, arm)

    def differences(self, dataset: str, arm: str, base: str = "model1") -> dict[int, np.ndarray]:
        """Seed -> correct rows (N,) of an arm minus those of `base`, for seeds that have both."""
        own, others = (
            {
                seed: run.correct.astype(float)
                for seed, run in self.runs.get(self.run_key(dataset, name), {}).items()
                if run.correct is not None
            }
            for name in (arm, base)
        )
        return {seed: own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())}

    def pairs(self, dataset: str, at_own_rates: bool = False) -> dict[int, tuple[Run, Run]]:
        """Seed -> runs of Models 1 and 2, both at Model 1's rate or each at its own."""
        one, two = (self.run_key(dataset, model) for model in MODELS)
        if not at_own_rates:
            two = (*two[:2], one[2])
        ones, twos = (self.runs.get(key, {}) for key in (one, two))
        return {seed: (ones[seed], twos[seed]) for seed in sorted(ones.keys() & twos.keys())}


def read_study(config: Config) -> Runs:
    runs: dict[tuple[str, str, float], dict[int, Run]] = {}
    for run in read_runs(config.folder, sweep.PLANNED, Trial):
        key = run.trial.dataset, run.trial.arm, run.trial.rate
        runs.setdefault(key, {})[run.trial.seed] = run
    return Runs(runs, chosen_rates(config))


def sets_difference(
    study: Runs, datasets: Iterable[str], arm: str, base: str = "model1"
) -> dict[str, Any]:
    """Intervals of an arm's accuracy minus that of `base`, on each data set and their `mean`.

    The mean has only seeds with all data sets. None with fewer than two seeds.
    """
    intervals: dict[str, Any] = {}
    values = {dataset: study.differences(dataset, arm, base) for dataset in datasets}
    for dataset, by_seed in values.items():
        rows = list(by_seed.values())
        intervals[dataset] = crossed_interval(np.stack(rows)) if len(rows) > 1 else None
    shared = sorted(set.intersection(*map(set, values.values())))
    intervals["mean"] = None
    if len(shared) > 1:
        arrays = [np.stack([by_seed[s] for s in shared]) for by_seed in values.values()]
        intervals["mean"] = sets_interval(arrays)
        if len(shared) >= FEWEST_TO_DRAW_FROM:
            intervals["mean"]["pigeonhole"] = pigeonhole_interval(arrays)
    return intervals


def log_rank_at(path: list[dict[str, float | None]], level: float) -> float | None:
    """Log effective rank within classes when a run's training loss first reaches a level.

    Interpolated between measurements, linearly in log loss. None if the loss stays above.
    """
    before = None
    for row in path:
        if row["loss"] is None or not row["effective_rank_within"]:
            return None
        loss, rank = math.log(max(row["loss"], 1e-9)), math.log(row["effective_rank_within"])
        if row["loss"] <= level:
            if before is None:
                return rank
            share = (before[0] - math.log(level)) / (before[0] - loss)
            return before[1] + share * (rank - before[1])
        before = loss, rank
    return None


def rank_at_equal_loss(one: sweep.Run, two: sweep.Run) -> float | None:
    """P5 of one backbone and data set: log rank within classes, Model 2 minus Model 1.

    Both are compared at the larger of the two runs' lowest training losses. None if one of them
    diverged before.
    """
    losses = [[row["loss"] for row in run.path if row["loss"] is not None] for run in (one, two)]
    return log_rank_difference(max(map(min, losses)), one, two)


def log_rank_difference(level: float, one: sweep.Run, two: sweep.Run) -> float | None:
    ranks = [log_rank_at(run.path, level) for run in (one, two)]
    return None if None in ranks else ranks[1] - ranks[0]


def rank_differences(
    study: Runs,
    datasets: Iterable[str],
    difference: Callable[[Run, Run], float | None] = rank_at_equal_loss,
) -> dict[str, dict[int, float]]:
    """Data set -> seed -> difference(Model 1's run, Model 2's) where known, at Model 1's rate."""
    differences: dict[str, dict[int, float]] = {}
    for dataset in datasets:
        by_seed = {seed: difference(*pair) for seed, pair in study.pairs(dataset).items()}
        differences[dataset] = {s: value for s, value in by_seed.items() if value is not None}
    return differences


def summary(config: Config) -> dict[str, Any]:
    """What results.json holds."""
    study = read_study(config)
    datasets = list(config.datasets)
    p1 = sets_difference(study, datasets, "model2")["mean"]
    all_sets = datasets == list(Config().datasets)  # the endpoints' four
    ranks = sweep.intervals_over_sets(rank_differences(study, datasets))
    p5 = ranks.pop("mean")
    arms = sweep.arms_of(run for by_seed in study.runs.values() for run in by_seed.values())
    return {
        "rates": {f"{dataset}, {arm}": rate for (dataset, arm), rate in study.rates.items()},
        "P1": sweep.endpoint(p1, MARGIN_P1, all_sets and bool(p1) and p1["n"] >= sweep.PLANNED),
        "P1_equivalence": p1 and equivalence(p1["mean"], p1["se"], p1["df"], MARGIN_P1),
        "accuracy_differences": {
            arm: sets_difference(study, datasets_of(study, arm), arm)
            for arm in arms
            if arm != "model1"
        },
        "less_model2": {
            arm: sets_difference(study, datasets_of(study, arm), arm, "model2")
            for arm in arms
            if arm not in ("model1", "model2")
        },
        "P5": sweep.endpoint(p5, MARGIN_P5, all_sets and p5["n"] >= sweep.PLANNED),
        "rank_at_equal_loss": ranks,
        "arms": {
            dataset: {
                arm: summarize_arm(study, dataset, arm)
                for arm in arms
                if dataset in datasets_of(study, arm)
            }
            for dataset in datasets
        },
        "kept": kept_differences(study, datasets),
        "times": times(config, study),
    }


def datasets_of(study: Runs, arm: str) -> list[str]:
    return list(dict.fromkeys(dataset for dataset, name, _ in study.runs if name == arm))


def summarize_arm(study: Runs, dataset: str, arm: str) -> dict[str, Any]:
    """Means over seeds of an arm at its own rate.

    `language_kept` (nats) and `transfer_kept` are changes since before training.
    """
    runs = study.runs.get(study.run_key(dataset, arm), {}).values()
    means = {}
    for name in (*finetune.AT_BEST, *KEPT):
        known = [value for run in runs if (value := value_of(run, name)) is not None]
        means[name] = mean_interval(known) if known else None
    diverged = sum(run.end["best_epoch"] is None for run in runs)
    return means | {"n": len(runs), "diverged": diverged}


# Measure -> the number whose change it is, from before the first step to after the last.
KEPT = {"language_kept": "lm_loss", "transfer_kept": "transfer_accuracy"}


def value_of(run: Run, name: str) -> float | None:
    """A change of KEPT, or a number of the run's last row; None if unknown."""
    if name not in KEPT:
        return run.end[name]
    start, end = (row[KEPT[name]] for row in (run.path[0], run.end))
    return None if None in (start, end) else end - start


def kept_differences(study: Runs, datasets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Data set, or `mean` of all -> measure -> Model 2 minus Model 1, paired over seeds.

    Measures of KEPT are compared at one rate, Model 1's, because a higher rate alone loses more;
    `best_scaled_loss` at each model's own rate.
    """
    intervals: dict[str, dict[str, Any]] = {}
    for name in (*KEPT, "best_scaled_loss"):
        by_set = {dataset: differences_of(study, dataset, name) for dataset in datasets}
        for place, interval in sweep.intervals_over_sets(by_set).items():
            intervals.setdefault(place, {})[name] = interval
    return intervals


def differences_of(study: Runs, dataset: str, name: str) -> dict[int, float]:
    """Seed -> a measure of Model 2 minus that of Model 1, where both are known."""
    differences = {}
    for seed, pair in study.pairs(dataset, at_own_rates=name not in KEPT).items():
        one, two = (value_of(run, name) for run in pair)
        if None not in (one, two):
            differences[seed] = two - one
    return differences


def times(config: Config, study: Runs) -> dict[str, dict[str, Any]]:
    """Data set -> arm -> training time relative to Model 1 of the same backbone, with `n`.

    Whole trainings at the arm's own rate on one CPU. Times on a GPU are left out, because many
    trainings shared it. Pilot backbones are included.
    """
    seconds: dict[tuple, dict[str, float]] = {}
    for row in sweep.published_rows(config.folder):
        dataset, arm = row["dataset"], row["arm"]
        if dataset not in config.datasets or not row["seconds"] or not row["lm_loss"]:
            continue  # another set, on the way, or diverged
        own = float(row["rate"]) == rate_of(study.rates, dataset, arm)
        if own and row["hardware"] and "NVIDIA" not in row["hardware"]:
            by_arm = seconds.setdefault((dataset, row["seed"], row["hardware"]), {})
            by_arm[arm] = float(row["seconds"])
    ratios_by_data: dict[str, dict[str, list[float]]] = {}
    for (dataset, *_), by_arm in seconds.items():
        for arm in sorted(by_arm.keys() - {"model1"}) if "model1" in by_arm else ():
            ratios = ratios_by_data.setdefault(dataset, {}).setdefault(arm, [])
            ratios.append(by_arm[arm] / by_arm["model1"])
    return {
        d: {arm: mean_interval(v) for arm, v in arms.items()} for d, arms in ratios_by_data.items()
    }


# --------------------------------------------------------------------------------------------------
# The figure
# --------------------------------------------------------------------------------------------------


def draw(config: Config, results: dict[str, Any]) -> None:
    """Draw accuracy minus Model 1's, and in another figure rank within classes over the loss."""
    study, datasets = read_study(config), list(config.datasets)
    size = max(8, 2.9 * len(datasets)), 3.3
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
    differences = results["accuracy_differences"]
    gains = differences.get("model2", {})
    draw_differences(left, {place: (gains.get(place), "model2") for place in [*datasets, "mean"]})
    left.set(title="Dual Head, each model at its own rate")
    controls = {
        f"{common.find_arm(name).title}, {place.removesuffix(' by sentence')}": (
            intervals[place],
            name,
        )
        for name, intervals in differences.items()
        for place in config.control_datasets
        if name != "model2" and place in intervals
    }
    draw_differences(right, controls)
    right.set(title="Controls")
    save_figure(figure, config.folder / "benefit.png")
    figure, grid = plt.subplots(
        1, len(datasets), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    panels = grid[0]
    for axis, dataset in zip(panels, datasets, strict=True):
        draw_ranks(axis, study, dataset)
    panels[0].set_ylabel("rank within classes,\nshare of the start's")
    panels[0].legend(fontsize=9)
    figure.supxlabel(
        "training loss (nats), which falls as training goes on, from left to right", fontsize=10
    )
    save_figure(figure, config.folder / "rank_at_equal_loss.png")


def draw_differences(axis: plt.Axes, shown: Mapping[str, tuple[dict | None, str]]) -> None:
    """Draw a line for each name -> (accuracy minus Model 1's, arm); the margin is gray."""
    known = {name: pair for name, pair in shown.items() if pair[0]}
    for line, (interval, name) in enumerate(known.values()):
        arm = common.find_arm(name)
        points = rank_plots.ends(interval, lambda value: 100 * value)
        rank_plots.point(axis, line, points, marker=arm.marker, color=arm.color)
    axis.set_yticks(range(len(known)), list(known))
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.axvspan(-100 * MARGIN_P1, 100 * MARGIN_P1, color="gray", alpha=0.15, linewidth=0)
    axis.set(xlabel="accuracy minus Model 1's (points)")
    axis.invert_yaxis()


def draw_ranks(axis: plt.Axes, study: Runs, dataset: str) -> None:
    """Draw each backbone's path of both models at Model 1's rate; loss falls to the right."""
    rate = study.rates[dataset, "model1"]
    for name in ("model1", "model2"):
        arm = common.find_arm(name)
        for run in study.runs.get((dataset, name, rate), {}).values():
            path = [row for row in run.path if row["loss"] is not None]
            start = path[0]["effective_rank_within"]
            x = [row["loss"] for row in path]
            y = [row["effective_rank_within"] / start for row in path]
            axis.plot(x, y, color=arm.color, linewidth=0.6, alpha=0.6)
        axis.plot([], [], color=arm.color, label=arm.title)
    axis.set(xscale="log", title=dataset)
    low, high = axis.get_xlim()
    ticks = [loss for loss in LOSSES if low <= loss <= high]
    axis.set_xticks(ticks, [f"{loss:g}" for loss in ticks])
    axis.minorticks_off()
    axis.invert_xaxis()


LOSSES = (0.05, 0.1, 0.3, 1, 3)  # nats, as ticks


def text(results: dict[str, Any]) -> str:
    lines = []
    for name in ("P1", "P5"):
        lines.append(f"{name}: {results[name]['text'] if results[name] else 'no interval yet'}")
    for arm, intervals in results["accuracy_differences"].items():
        parts = [
            f"{place} {format_interval(value, 2, 100, '+')}"
            for place, value in intervals.items()
            if value
        ]
        lines.append(f"{arm} minus Model 1, points: {', '.join(parts) or 'no two seeds yet'}")
    return "\n".join(lines)


STUDY = sweep.Study(
    description=__doc__,
    config_type=Config,
    miniature={
        "seeds": (0, 1, 2),
        "datasets": (finetune.TOY,),
        "control_datasets": (finetune.TOY,),
        "controls": ("longer", "2@0.1"),
        "rates": (-3.0, -2.0),
    },
    trials=trials,
    settings=settings,
    run=run,
    line=pilots.line,
    summary=summary,
    text=text,
    draw=draw,
    check=sweep.check_parts,
)
main = STUDY.main


if __name__ == "__main__":
    run_script(main)
