"""At which learning rate does fine-tuning collapse a representation, and does the LM loss move it?

Fine-tunes a model for a few hundred steps at many learning rates, without the LM loss, with it and
with controls, and finds for each the rate at which runs stop being healthy after so many steps;
after more steps it is lower, see collapse_time.py. By default on backbones of many seeds
(studies/shared/pretrain.py); with --model on one model with many seeds. Writes a CSV file for each
seed, with a row for every measurement, then results.json and a figure. The same command resumes
where it was stopped.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np

import common
from collapse.config import LanguageModelConfig, check_bounds
from collapse.measures.statistics import (
    differences_interval,
    format_interval,
    mean_interval,
    sign_flip_p,
)
from collapse.measures.thresholds import KEPT, Threshold, threshold_shift
from collapse.models.fetching import fetch
from collapse.models.pretrained import fill_in_for, find_model, load_tokenizer, weights_of
from collapse.models.weights import check_weights
from collapse.report.plots import save_figure
from collapse.report.reference import LEARNING_RATE
from collapse.runs.announcement import check_device_for
from collapse.runs.progress import Progress
from collapse.utils import command_line
from collapse.utils.device import pick_device
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT
from studies.shared import finetune, sweep

MARGIN = 0.25  # decades, of studies/PROTOCOL.md
OTHER_BOUNDS = (0.1, 0.5)  # in place of KEPT, to see how P2 depends on it
FIRST_JUDGED = 25  # steps; a low share earlier, just after warm-up, is no collapse for P8
SEEDS_OF_A_MODEL = 5  # planned for P8
MEASUREMENTS = 4  # during a training
# Base-10 logarithms of learning rates
RATES = tuple(-3.25 + k / 4 for k in range(8))
RATES_OF_A_MODEL = tuple(round(math.log10(LEARNING_RATE * 2**k), 5) for k in range(6))


@dataclass
class Config(sweep.Config):
    """Settings of the study; the comment above a field is its --help text."""

    # A causal LM to fine-tune instead of backbones: hub name, folder or GGUF file. A seed is then
    # that of adapters, heads and order of rows, and is completed before the next begins.
    model: str | None = command_line.grouped(None, "language model")
    # With --model: frozen weights in 4 bits (NF4) or as stored. Default: nf4 on a GPU.
    quantization: Literal["nf4", "none"] | None = command_line.grouped(None, "language model")
    # With --model: type of activations and weights. Default: bfloat16 on a GPU, float32 on a CPU;
    # bfloat16 is faster on CPUs that multiply it in hardware (avx512_bf16, AMX).
    compute_dtype: Literal["bfloat16", "float32"] | None = command_line.grouped(
        None, "language model"
    )
    # Steps after which to measure on fewer rows (256). If given, these rows are also measured
    # before the first step and after the last. Default: four steps, and not at the ends.
    measure_at: tuple[int, ...] = ()
    # Train LoRA adapters of the backbones instead of all their weights.
    lora: bool = command_line.grouped(False, "language model")
    # Data sets: names that experiment.py --dataset takes.
    datasets: tuple[str, ...] = command_line.grouped(("AG News", "SST-2 by sentence"), "data")
    # Models and controls, as experiment.py --models takes them.
    arms: tuple[str, ...] = ("1", "2", "2@0.1", "shuffled-lm", "kl", "l2-start", "shared-scale")
    # Base-10 logarithms of the learning rates, in order; without --model equally spaced. Default:
    # quarter decades from -3.25 to -1.5; with --model 2e-4 and five doublings of it.
    rates: tuple[float, ...] = command_line.grouped((), "optimization")
    # With --model: run only the two or three rates that are needed to find a threshold.
    bracket: bool = command_line.grouped(False, "optimization")
    # Optimizer steps of a training: ten of warm-up, then a constant learning rate.
    steps: int = command_line.grouped(200, "optimization")
    # Folder for results, with a subfolder for each --model or corpus.
    output_dir: Path = ROOT / "studies" / "results" / "collapse_threshold"

    def __post_init__(self) -> None:
        if not self.rates:
            self.rates = RATES_OF_A_MODEL if self.model else RATES

    @property
    def folder(self) -> Path:
        own = f"{self.corpus}-lora" if self.lora else self.corpus
        return self.output_dir / (name_of(self.model) if self.model else own)


def name_of(model: str) -> str:
    """A model's name in results: that of its file or folder, or its hub name without the owner."""
    return Path(model).name.removesuffix(".gguf")


# Data set -> training rows, longest text in tokens (the beginning of news shows its topic).
SIZES = {"AG News": (2000, 32), "SST-2 by sentence": (3000, 64), finetune.TOY: (64, 32)}


Trial = sweep.RateTrial


def trials(config: Config) -> Iterator[list[Trial]]:
    arms = [common.find_arm(name).name for name in config.arms]
    places = list(itertools.product(config.seeds, config.datasets, arms))
    if not config.bracket:
        yield [Trial(*place, rate) for place in places for rate in config.rates]
        return
    for seed in config.seeds:
        places_of_seed = [place for place in places if place[0] == seed]
        while missing := [
            trial for place in places_of_seed for trial in next_of_bracket(config, *place)
        ]:
            yield missing


def next_of_bracket(config: Config, seed: int, dataset: str, arm: str) -> list[Trial]:
    """The trial to run next; none once no untried rate lies between highest kept and lowest fallen.

    The first seed of an arm is bisected. Later seeds begin at the rate that is nearest to the mean
    threshold of the seeds before.
    """
    runs = [run for run in read_runs(config.folder) if run.trial.dataset == dataset]
    thresholds = thresholds_by_components(runs, config.rates).get(arm, {})
    known = Threshold.of(kept_by_rate(runs).get(arm, {}).get(seed, {}))
    between = [rate for rate in config.rates if known.low < rate < known.high]
    if not between:
        return []
    before = [threshold.value for number, threshold in thresholds.items() if number < seed]
    aim = float(np.mean(before)) if before else (between[0] + between[-1]) / 2
    return [Trial(seed, dataset, arm, min(between, key=lambda rate: abs(rate - aim)))]


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def settings(config: Config, trial: Mapping[str, Any]) -> dict[str, Any]:
    return {"steps": config.steps} | settings_of_model(config)


def settings_of_model(config: Config) -> dict[str, str]:
    """Columns about a model of --model: name, source of its weights, quantization, type.

    Empty for backbones, which rows identify by the digest of their weights alone.
    """
    if not config.model:
        return {}
    given = LanguageModelConfig(
        quantization=config.quantization, compute_dtype=config.compute_dtype
    )
    filled = fill_in_for(pick_device(config.device), given)
    return {
        "model": name_of(config.model),
        "weights": weights_of(config.model),
        "quantization": filled.quantization,
        "compute_dtype": filled.compute_dtype,
    }


def recipe_of(config: Config, trial: Trial) -> finetune.Recipe:
    train_rows, max_length = SIZES[trial.dataset]
    return sweep.recipe_of(
        config,
        trial,
        dataset=trial.dataset,
        learning_rate=10**trial.rate,
        steps=config.steps,
        train_rows=train_rows,
        max_length=max_length,
        corpus_text=not config.model,
        quantization=config.quantization,
        compute_dtype=config.compute_dtype,
        # At width 128 LoRA is less accurate and takes as long.
        all_weights=not (config.model or config.lora),
    )


def run(config: Config, trial: Trial, progress: Progress) -> list[dict[str, Any]]:
    """Measurements before, during and after a training, with the accuracy of chance."""
    recipe = recipe_of(config, trial)
    data = finetune.load_data(recipe, config.data_dir)
    interval = math.ceil(config.steps / (MEASUREMENTS + 1))
    measure_at = config.measure_at or range(0, config.steps, interval)
    both_ends = bool(config.measure_at)
    records = finetune.watch(recipe, data, measure_at, progress.step, both_ends)
    chance = np.bincount(data.measured_train.labels).max() / len(data.measured_train.labels)
    return [record | {"chance": chance, "classes": data.classes} for record in records]


def line(rows: list[dict[str, Any]]) -> str:
    first, last = rows[0], rows[-1]
    if last["dims_95pct"] is None:
        return f"diverged at step {last['step']}"
    return (
        f"components {first['dims_95pct']} -> {last['dims_95pct']}, training accuracy "
        f"{last['accuracy']:.1%}, validation {last['validation_accuracy']:.1%}"
    )


# --------------------------------------------------------------------------------------------------
# What the rows say
# --------------------------------------------------------------------------------------------------

OUTCOMES = ("healthy", "collapsed, functional", "collapsed, dead", "not learning", "diverged")


class Run(sweep.Run):
    """A trial that has ended, and its outcome."""

    @property
    def kept(self) -> float | None:
        """Components for 95% of the variance, as a share of the initial ones; None: it diverged."""
        end = self.end
        if None in (end["dims_95pct"], end["loss"]):
            return None
        return end["dims_95pct"] / self.path[0]["dims_95pct"]

    def outcome(self, best: float, bound: float = KEPT, line: float = 0.5) -> str:
        """One of OUTCOMES; best: the highest training accuracy on this backbone and data set.

        bound: share of components below which it has collapsed. line: how far from chance to the
        best accuracy a run must come to have learned.
        """
        if self.kept is None:
            return "diverged"
        learned = self.end["accuracy"] >= (1 - line) * self.end["chance"] + line * best
        if self.kept >= bound:
            return "healthy" if learned else "not learning"
        return "collapsed, functional" if learned else "collapsed, dead"

    def shares(self) -> dict[int, float | None]:
        """Step -> share of the initial components; None if a number was not finite.

        A measurement is compared with the initial one on as many rows, and left out if there is
        none. Of a step that was measured on two numbers of rows, the smaller share.
        """
        starts = {record["rows"]: record for record in self.path if record["step"] == 0}
        shares: dict[int, float | None] = {}
        for record in self.path:
            step = int(record["step"])
            if None in (record["dims_95pct"], record["loss"]):
                shares[step] = None
            elif step and record["rows"] in starts:
                share = record["dims_95pct"] / starts[record["rows"]]["dims_95pct"]
                shares[step] = min(share, shares.get(step, share))
        return shares

    def fell_at(self, bound: float = KEPT) -> int | None:
        """The first step from FIRST_JUDGED on after which components were below the bound.

        A step at which a number was not finite counts at any time.
        """
        for step, share in self.shares().items():
            if share is None or (step >= FIRST_JUDGED and share < bound):
                return step
        return None

    def came_back(self, bound: float = KEPT) -> bool:
        """Whether it fell below the bound and was above it again at the end."""
        shares = self.shares()
        last = shares[max(shares)]
        return self.fell_at(bound) is not None and last is not None and last >= bound


def read_runs(folder: Path) -> list[Run]:
    """Every trial in the tables of a folder, for the seeds that the protocol plans."""
    seeds = sorted(range(sweep.PLANNED), key=str)  # the order in which published sums were made
    return sweep.read_runs(folder, seeds, Trial, Run)


def outcomes_of(runs: Sequence[Run], bound: float = KEPT, line: float = 0.5) -> dict[Trial, str]:
    """Trial -> outcome. The best accuracy is taken over Models 1 and 2 alone."""
    best: dict[tuple, float] = {}
    for run in runs:
        if run.trial.arm in ("model1", "model2"):
            backbone = run.trial.seed, run.trial.dataset
            best[backbone] = max(best.get(backbone, 0.0), run.end["accuracy"] or 0.0)
    return {r.trial: r.outcome(best[r.trial.seed, r.trial.dataset], bound, line) for r in runs}


# (data set, arm) -> seed -> base-10 logarithm of the rate -> whether its run was good
GoodRuns = dict[tuple[str, str], dict[int, dict[float, bool]]]
# (data set, arm) -> seed -> base-10 logarithm of the rate where runs cease to be good
Thresholds = dict[tuple[str, str], dict[int, float]]


def good_by_rate(outcomes: dict[Trial, str], good: Collection[str]) -> GoodRuns:
    good_runs: GoodRuns = {}
    for trial, outcome in outcomes.items():
        by_seed = good_runs.setdefault((trial.dataset, trial.arm), {})
        by_seed.setdefault(trial.seed, {})[trial.rate] = outcome in good
    return good_runs


def threshold_of(good: dict[float, bool]) -> float:
    """Spearman and Karber's threshold, given logarithm of the rate -> whether the run was good.

    For equal steps it is lowest rate + step x (good runs - 1/2). For unequal ones a good run moves
    the threshold by half the distance between its neighbouring rates; the first and last step are
    continued beyond the rates. A single rate is its own threshold.
    """
    rates = sorted(good)
    steps = np.gradient(rates) if len(rates) > 1 else np.zeros(1)
    return float(rates[0] - steps[0] / 2 + steps @ [good[rate] for rate in rates])


def thresholds_of(
    good_runs: GoodRuns,
    rates: Mapping[str, Collection[float]],
    read: Callable[[dict[float, bool]], float | None] = threshold_of,
) -> Thresholds:
    """Thresholds by read(rate -> whether its run was good).

    rates: of each data set; runs at others are ignored, and seeds that lack one are left out.
    """
    thresholds: Thresholds = {}
    for (dataset, arm), by_seed in good_runs.items():
        values = {
            seed: read({rate: by_rate[rate] for rate in rates[dataset]})
            for seed, by_rate in by_seed.items()
            if by_rate.keys() >= set(rates[dataset])
        }
        thresholds[dataset, arm] = {s: value for s, value in values.items() if value is not None}
    return thresholds


def shifts_by_seed(
    thresholds: Thresholds, arm: str, datasets: Collection[str], base: str = "model1"
) -> dict[int, float]:
    """Seed -> by how many decades an arm's threshold is above that of `base`, mean of data sets."""
    base_thresholds, own = (
        sweep.mean_over_sets([thresholds.get((dataset, name), {}) for dataset in datasets])
        for name in (base, arm)
    )
    return {seed: own[seed] - base_thresholds[seed] for seed in own if seed in base_thresholds}


def shift(thresholds: Thresholds, arm: str, datasets: Collection[str]) -> dict[str, Any]:
    """By how many decades an arm's threshold is above Model 1's: 95% t interval over seeds.

    `p_flips`: p of a sign-flip test. All are None without shared seeds.
    """
    by_seed = shifts_by_seed(thresholds, arm, datasets)
    flips = sign_flip_p(list(by_seed.values())) if by_seed else None
    return differences_interval(by_seed) | {"p_flips": flips}


# Outcomes that count as good. An arm that blocks learning must not look like one that protects,
# so there are others beside "healthy".
GOOD = {
    "healthy": {"healthy"},
    "not collapsed": {"healthy", "not learning"},
    "learning": {"healthy", "collapsed, functional"},
    "not dead": set(OUTCOMES) - {"collapsed, dead"},
    "not diverged": set(OUTCOMES) - {"diverged"},
}


def summary(config: Config) -> dict[str, Any]:
    """What results.json holds: thresholds (`edge`) and shifts of every arm, outcomes by rate, P2.

    Thresholds use the planned rates; with --model, all rates that ran on a data set. `at_the_top`
    counts seeds that are healthy at every rate, whose threshold is a lower bound; `at_the_bottom`
    those that are healthy at none, whose threshold is an upper bound. `other_bounds`: Model 2's
    shift with another share of components in place of KEPT.
    """
    runs = read_runs(config.folder)
    outcomes = outcomes_of(runs)
    datasets = list(dict.fromkeys(trial.dataset for trial in outcomes))
    rates = {d: rates_of(outcomes, d) if config.model else config.rates for d in datasets}
    thresholds = {
        good: thresholds_of(good_by_rate(outcomes, kinds), rates) for good, kinds in GOOD.items()
    }
    counts = Counter((t.dataset, t.arm, f"{t.rate:g}", kind) for t, kind in outcomes.items())
    table = []
    for arm in sweep.arms_of(runs):
        row: dict[str, Any] = {"arm": arm, "edge": {}, "at_the_top": {}, "at_the_bottom": {}}
        row |= {"shift": {}, "outcomes": {}, "ends": {}}
        for dataset in datasets:
            values = thresholds["healthy"].get((dataset, arm), {}).values()
            row["edge"][dataset] = mean_interval(values) if values else None
            for name, healthy in (("at_the_top", True), ("at_the_bottom", False)):
                bound = threshold_of(dict.fromkeys(rates[dataset], healthy))
                row[name][dataset] = sum(value == bound for value in values)
            row["ends"][dataset] = mean_ends(runs, arm, dataset)
            row["outcomes"][dataset] = {
                rate: {kind: counts[dataset, arm, rate, kind] for kind in OUTCOMES}
                for rate in (f"{rate:g}" for rate in rates_of(outcomes, dataset))
            }
        if arm != "model1":
            for good in GOOD:
                parts = {dataset: shift(thresholds[good], arm, [dataset]) for dataset in datasets}
                row["shift"][good] = {"mean": shift(thresholds[good], arm, datasets), **parts}
        table.append(row)
    starts = [run.path[0] for run in runs]
    applies = all(start["classes"] - 1 < start["dims_95pct"] / 8 for start in starts)
    shifts = [row["shift"]["healthy"]["mean"] for row in table if row["arm"] == "model2"]
    counts_for_p2 = applies and shifts and not (config.model or config.lora)
    endpoint = None
    if counts_for_p2:
        done = shifts[0]["n"] >= sweep.PLANNED
        endpoint = sweep.endpoint(shifts[0], MARGIN, done)
    others = {}
    for bound in OTHER_BOUNDS if shifts else ():
        healthy = good_by_rate(outcomes_of(runs, bound), GOOD["healthy"])
        others[f"{bound:g}"] = shift(thresholds_of(healthy, rates), "model2", datasets)
    results = {
        "runs": len(runs),
        "criterion_applies": applies,
        "arms": table,
        "P2": endpoint,
        "other_bounds": others,
    }
    comparable = []
    if config.model:  # those whose start was measured on the fewer rows of the way, too
        comparable = [run for run in runs if sum(r["step"] == 0 for r in run.path) > 1]
    if comparable:
        results["by_components"] = {
            dataset: by_components(
                [run for run in comparable if run.trial.dataset == dataset], config.rates
            )
            for dataset in dict.fromkeys(run.trial.dataset for run in comparable)
        }
    return results


def kept_by_rate(runs: list[Run], bound: float = KEPT) -> dict[str, dict[int, dict[float, bool]]]:
    """Arm -> seed -> logarithm of the rate -> whether the run never fell; one data set."""
    kept: dict[str, dict[int, dict[float, bool]]] = {}
    for run in runs:
        by_rate = kept.setdefault(run.trial.arm, {}).setdefault(run.trial.seed, {})
        by_rate[run.trial.rate] = run.fell_at(bound) is None
    return kept


def thresholds_by_components(
    runs: list[Run], rates: Sequence[float], bound: float = KEPT
) -> dict[str, dict[int, Threshold]]:
    """Arm -> seed -> threshold, if no rate of the grid between its two ends is untried."""
    thresholds: dict[str, dict[int, Threshold]] = {}
    for arm, by_seed in kept_by_rate(runs, bound).items():
        thresholds[arm] = {}
        for seed, kept in sorted(by_seed.items()):
            threshold = Threshold.of(kept)
            if not any(threshold.low < rate < threshold.high for rate in rates):
                thresholds[arm][seed] = threshold
    return thresholds


def by_components(runs: list[Run], rates: Sequence[float], bound: float = KEPT) -> dict[str, Any]:
    """P8 on one data set: thresholds by components alone, at any measurement.

    rates: the grid, base-10 logarithms in order; a threshold needs runs at its two neighbours.

    `arms`: arm -> seed -> threshold after the last step. `runs`: arm -> rate -> how many ran, fell
    and came back, and after which step each first fell. `shift`: Model 2's threshold minus Model
    1's with the verdict of P8, see threshold_shift.
    """
    thresholds = thresholds_by_components(runs, rates, bound)
    counts: dict[str, dict[str, Any]] = {}
    for arm in sweep.arms_of(runs):
        of_arm = [run for run in runs if run.trial.arm == arm]
        counts[arm] = {}
        for rate in sorted({run.trial.rate for run in of_arm}):
            at_rate = [run for run in of_arm if run.trial.rate == rate]
            steps = sorted(run.fell_at(bound) for run in at_rate if run.fell_at(bound) is not None)
            counts[arm][f"{rate:g}"] = {
                "runs": len(at_rate),
                "fell": len(steps),
                "fell_after_step": steps,
                "came_back": sum(run.came_back(bound) for run in at_rate),
            }
    described = {
        arm: {
            str(seed): {"value": t.value, "censored": t.censored} | {"monotone": t.monotone}
            for seed, t in by_seed.items()
        }
        for arm, by_seed in thresholds.items()
    }
    sides = thresholds.get("model1", {}), thresholds.get("model2", {})
    step = max(np.diff(rates), default=0.0)
    interval = threshold_shift(*sides, float(step))
    done = interval["n"] >= SEEDS_OF_A_MODEL
    endpoint = sweep.endpoint(interval, MARGIN, done, sweep.LATER_ENDPOINTS)
    return {"arms": described, "runs": counts, "shift": endpoint}


ENDS = ("dims_95pct", "effective_rank", "effective_rank_within", "effective_rank_without_first")
ENDS += ("stable_rank", "top10_variance", "cdnv", "accuracy", "validation_accuracy")


def rates_of(outcomes: dict[Trial, str], dataset: str) -> list[float]:
    return sorted({trial.rate for trial in outcomes if trial.dataset == dataset})


def mean_ends(runs: list[Run], arm: str, dataset: str) -> dict[str, dict[str, float]]:
    """Rate -> means over seeds of the last record, for runs that did not diverge.

    `language_kept` is the change of the LM loss, under the initial LM head.
    """
    result = {}
    of_arm = [run for run in runs if (run.trial.arm, run.trial.dataset) == (arm, dataset)]
    for rate in sorted({run.trial.rate for run in of_arm}):
        paths = [run.path for run in of_arm if run.trial.rate == rate and run.kept is not None]
        if paths:
            means = {name: float(np.mean([path[-1][name] for path in paths])) for name in ENDS}
            losses = [(path[0]["lm_loss"], path[-1]["lm_loss"]) for path in paths]
            kept = [end - start for start, end in losses if end is not None]
            means["language_kept"] = float(np.mean(kept)) if kept else math.nan
            result[f"{rate:g}"] = means | {"n": len(paths)}
    return result


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------

MARKERS = dict(zip(OUTCOMES, ("o", "v", "X", "s", "*"), strict=True))
PANELS = {
    "kept": "components kept\n(share of the start's)",
    "validation_accuracy": "validation accuracy (%)",
}


def draw(config: Config, results: dict[str, Any]) -> None:
    """Draw components kept and accuracy over the learning rate, a column for each data set.

    A line for each arm is the mean over seeds; bands, for Models 1 and 2 alone, are lowest to
    highest; a marker is the most common outcome. No figure without runs.
    """
    runs = read_runs(config.folder)
    if not runs:
        return
    outcomes = outcomes_of(runs)
    datasets = list(dict.fromkeys(run.trial.dataset for run in runs))
    figure, axes = plt.subplots(
        len(PANELS),
        len(datasets),
        figsize=(5 * len(datasets), 3 * len(PANELS) + 0.8),
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    for dataset, column in zip(datasets, axes.T, strict=True):
        of_dataset = [run for run in runs if run.trial.dataset == dataset]
        for name in sweep.arms_of(of_dataset):
            for measure, axis in zip(PANELS, column, strict=True):
                draw_arm(
                    axis, [run for run in of_dataset if run.trial.arm == name], outcomes, measure
                )
        column[0].axhline(KEPT, color="gray", linewidth=0.8, linestyle=":", label="collapsed below")
        after = " or ".join(f"{n:g}" for n in sorted({run.path[0]["steps"] for run in of_dataset}))
        column[0].set(xscale="log", title=f"{dataset}, after {after} steps")
        column[-1].set_xlabel("learning rate")
    highest = max(axis.get_ylim()[1] for axis in axes[0])
    for axis in axes[0]:
        axis.set_ylim(0, highest)
    for label, row in zip(PANELS.values(), axes, strict=True):
        row[0].set_ylabel(label)
    lines, labels = axes[0][0].get_legend_handles_labels()
    kinds = [
        plt.Line2D([], [], color="gray", linestyle="", marker=MARKERS[kind], label=kind)
        for kind in OUTCOMES
        if kind in outcomes.values()
    ]
    figure.legend(
        handles=[*lines, *kinds],
        labels=[*labels, *(k.get_label() for k in kinds)],
        loc="outside lower center",
        ncols=4,
        fontsize=8,
    )
    save_figure(figure, config.folder / "collapse.png")


def draw_arm(axis: plt.Axes, runs: list[Run], outcomes: dict[Trial, str], measure: str) -> None:
    arm = common.find_arm(runs[0].trial.arm)
    rates = sorted({run.trial.rate for run in runs})
    means, lows, highs = [], [], []
    for rate in rates:
        values = [value_of(run, measure) for run in runs if run.trial.rate == rate]
        means.append(np.mean(values))
        lows.append(min(values))
        highs.append(max(values))
        kinds = Counter(outcomes[run.trial] for run in runs if run.trial.rate == rate)
        marker = MARKERS[kinds.most_common(1)[0][0]]
        axis.plot(10**rate, means[-1], color=arm.color, marker=marker, markersize=6)
    x = [10**rate for rate in rates]
    style = "-" if arm.weight is None else "--"
    axis.plot(x, means, style, color=arm.color, label=arm.title, linewidth=1.2)
    if arm.name in ("model1", "model2"):  # seven bands would overlap
        axis.fill_between(x, lows, highs, color=arm.color, alpha=0.2, linewidth=0)


def value_of(run: Run, measure: str) -> float:
    """Share of components kept, or final accuracy in %; 0 for a run that diverged."""
    if measure == "kept":
        return run.kept or 0.0
    return 100 * (run.end[measure] or 0.0)


def text(results: dict[str, Any]) -> str:
    """Thresholds and shifts, a line for each arm; P2; thresholds by components alone."""
    lines = []
    for row in results["arms"]:
        shown = [f"{d} {e['mean']:+.2f}" for d, e in row["edge"].items() if e]
        shift = row["shift"].get("healthy", {}).get("mean", {})
        moved = ""
        if shift.get("n"):
            moved = f", {format_interval(shift, sign='+')} decades from Model 1's"
        lines.append(f"{row['arm']:12} threshold at 10^: {', '.join(shown) or 'n/a'}{moved}")
    lines.append(results["P2"]["text"] if results["P2"] else "P2: no interval yet")
    for dataset, components in results.get("by_components", {}).items():
        shift = components["shift"]
        verdict = shift["text"] if shift else "no interval yet"
        lines.append(f"{dataset}, shift of Model 2 by components alone: {verdict}")
    return "\n".join(lines)


def check(config: Config) -> None:
    if config.bracket and max(config.seeds) >= sweep.PLANNED:
        raise UserError(
            f"--bracket takes seeds below {sweep.PLANNED}: a pilot's count for nothing."
        )
    if config.bracket and not (config.model and config.measure_at):
        raise UserError("--bracket needs --model, whose thresholds it finds, and --measure-at.")
    if config.model:
        if list(config.rates) != sorted(set(config.rates)):
            raise UserError("--rates are base-10 logarithms in order.")
    elif not np.allclose(np.diff(config.rates, 2), 0, atol=1e-6):
        raise UserError("--rates are base-10 logarithms in order, equally far apart.")
    check_bounds("steps", config.steps, 2 * finetune.WARMUP_STEPS, math.inf)
    if config.model and not config.summarize:  # what it lacks is said once, not by each training
        check_device_for(config.model, pick_device(config.device), config.compute_dtype)
        load_tokenizer(config.model)
        fetch(find_model(config.model), None)
        check_weights(find_model(config.model), None)


STUDY = sweep.Study(
    description=__doc__,
    config_type=Config,
    miniature={
        "seeds": (0, 1),
        "datasets": (finetune.TOY,),
        "arms": ("1", "2", "l2-start"),
        "rates": (-3.0, 0.0, 3.0),
        "steps": 20,
    },
    trials=trials,
    settings=settings,
    run=run,
    line=line,
    summary=summary,
    text=text,
    draw=draw,
    check=check,
    evaluation_cost=20.0,
)
main = STUDY.main


if __name__ == "__main__":
    run_script(main)
