"""Does the learning rate at which a representation collapses fall as fine-tuning goes on?

Fine-tunes own small language models (studies/shared/pretrain.py), all weights, at many constant
learning rates, and measures each training after 50, 100, 200 ... 6,400 steps: with a constant rate
one training gives the state after every number of steps. So every number of steps has a threshold,
the rate above which runs have lost three quarters of their components, and the study asks for its
slope over time, without the LM loss (P6 of PROTOCOL.md) and with it (P7). Writes a CSV file for
each backbone, with a row for every measurement, then results.json and a figure. The same command
resumes where it was stopped.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D

import common
from collapse.measures.neural_collapse import length_share
from collapse.measures.statistics import differences_interval, mean_interval
from collapse.measures.thresholds import (
    KEPT,
    Threshold,
    collapsed_by,
    slope_bounds,
    slope_over_time,
)
from collapse.report.plots import save_figure
from collapse.report.reference import LEARNING_RATE, REFERENCE
from collapse.runs.progress import Progress
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT
from studies.collapse_threshold import MARGIN, OTHER_BOUNDS, threshold_of
from studies.shared import finetune, sweep

BACKBONES = tuple(range(200, 208))  # of P6 and P7
LATER = (208, 209, 210)  # of what is exploratory, on another kind of machine
FIRST, DOUBLINGS = 50, 7  # measured after 50 x 2^k steps
SHORT = 3  # doublings of the highest rates' trainings: 400 steps
FITTED_FROM = 2  # doublings after which thresholds count for a slope: 200 steps
ALIKE = 0.05  # of the start's components: shares nearer to each other are alike
ROUNDING = 0.25 / math.sqrt(12)  # standard deviation of what a grid of quarter decades rounds off


@dataclass(frozen=True)
class Part:
    """Trainings that differ in their backbone and learning rate alone."""

    dataset: str
    train_rows: int
    max_length: int
    arm: str  # as --models takes it
    backbones: tuple[int, ...]  # their seeds
    rates: tuple[float, ...]  # base-10 logarithms, for all steps
    short_rates: tuple[float, ...] = ()  # for the first 400 alone
    schedule: str = "constant"


def evenly(lowest: float, highest: float, step: float = 0.25) -> tuple[float, ...]:
    return tuple(lowest + step * k for k in range(round((highest - lowest) / step) + 1))


NEWS = ("AG News", 9_983, 32)  # the rows at hand; of the whole set a fixed draw of as many
ABOVE = evenly(-1.25, -0.75)  # rates of Model 2 and kl for the first 400 steps
# In the order of the protocol: P6, P7, then what is exploratory.
PARTS = {
    "model1": Part(*NEWS, "1", BACKBONES, evenly(-4.25, -2.25), (-2.0, -1.75)),
    "model2": Part(*NEWS, "2", BACKBONES, evenly(-3.5, -1.5, 0.5), ABOVE),
    "cosine": Part(*NEWS, "1", BACKBONES[:1], (-3.0, -2.5), schedule="cosine"),
    "all rows": Part(*NEWS, "1", LATER, evenly(-3.5, -2.5)),
    "2,000 rows": Part("AG News", 2_000, 32, "1", LATER, evenly(-3.5, -2.5)),
    "SST-2": Part("SST-2 by sentence", 35_074, 64, "1", LATER, evenly(-3.75, -2.5)),
    "kl": Part(*NEWS, "kl", LATER[:2], evenly(-3.0, -1.5, 0.5), ABOVE),
}
TOY = (finetune.TOY, 64, 32)
MINIATURE = {
    "model1": Part(*TOY, "1", BACKBONES[:2], (-3.0, -1.0), (3.0,)),
    "model2": Part(*TOY, "2", BACKBONES[:2], (-3.0, -1.0), (3.0,)),
    "cosine": Part(*TOY, "1", BACKBONES[:1], (-1.0,), schedule="cosine"),
}


@dataclass
class Config(sweep.Config):
    """Settings of the study; the comment above a field is its --help text."""

    # Own language models, by their seeds; a part takes those of 200 to 210 that it is planned on,
    # and any other seed is a pilot, which counts for nothing.
    seeds: tuple[int, ...] = BACKBONES + LATER
    # Parts of the study: model1, model2, cosine, "all rows", "2,000 rows", SST-2, kl.
    parts: tuple[str, ...] = tuple(PARTS)
    # Of each part's learning rates these base-10 logarithms alone. Default: all.
    rates: tuple[float, ...] = ()
    # First measurement, in steps, and how often they double from there to the end.
    first: int = FIRST
    doublings: int = DOUBLINGS
    # Folder for results, in it one for each corpus.
    output_dir: Path = ROOT / "studies" / "results" / "collapse_time"

    @property
    def measured(self) -> list[int]:
        """Steps after which trainings are measured."""
        return [self.first * 2**k for k in range(self.doublings + 1)]

    @property
    def planned(self) -> dict[str, Part]:
        return MINIATURE if self.miniature else PARTS


@dataclass(frozen=True)
class Trial:
    """One training of the study."""

    seed: int  # of its backbone, head, and order of rows
    part: str
    arm: str  # its name in results
    rate: float  # base-10 logarithm; of a cosine schedule its peak

    @property
    def name(self) -> str:
        return f"{self.part}, 1e{self.rate:g}"


def trials(config: Config) -> list[list[Trial]]:
    all_trials = []
    for seed, name in itertools.product(config.seeds, config.parts):
        part = config.planned[name]
        if seed in BACKBONES + LATER and seed not in part.backbones:
            continue
        rates = [rate for rate in part.rates + part.short_rates if rate in (config.rates or [rate])]
        arm = common.find_arm(part.arm).name
        all_trials += [Trial(seed, name, arm, rate) for rate in rates]
    return [all_trials]


def settings(config: Config, trial: Mapping[str, Any]) -> dict[str, Any]:
    """A training's number of steps and of rows, and longest text in tokens."""
    part = config.planned[trial["part"]]
    short = float(trial["rate"]) in part.short_rates
    steps = config.measured[min(SHORT, config.doublings) if short else -1]
    return {"steps": steps, "train_rows": part.train_rows, "max_length": part.max_length}


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def recipe_of(config: Config, trial: Trial) -> finetune.Recipe:
    part = config.planned[trial.part]
    return sweep.recipe_of(
        config,
        trial,
        dataset=part.dataset,
        learning_rate=10**trial.rate,
        schedule=part.schedule,
        **settings(config, dataclasses.asdict(trial)),
    )


def run(config: Config, trial: Trial, progress: Progress) -> list[finetune.Record]:
    """Measures before one training and after each of config.measured, always on the same rows."""
    recipe = recipe_of(config, trial)
    data = finetune.load_data(recipe, config.data_dir)
    return measured_run(recipe, data, config.measured, progress.step)


def measured_run(
    recipe: finetune.Recipe,
    data: finetune.Data,
    measured: Sequence[int],
    after_step: Callable[[], None] = lambda: None,
) -> list[finetune.Record]:
    """Train; what was measured before the first step and after those of `measured`, on all rows.

    Beside what finetune.full_records tells: `length_share` of pooled states, `step_size`, the
    length of the last step in the space of all weights, and `distance` from the start's.
    """
    model, start_head = finetune.build(recipe, data.classes)
    start = before = weights_of(model)

    def measure(step: int) -> Iterator[finetune.Record]:
        nonlocal before
        if step == 0 or step in measured:
            (record,) = finetune.full_records(model, data, start_head)
            states = common.evaluate(model, data.validation, losses=False).pooled  # (N, D)
            finite, now = bool(np.isfinite(states).all()), weights_of(model)
            share = length_share(states, data.validation.lengths) if finite else None
            yield {
                "step": step,
                **record,
                "length_share": share,
                "step_size": float((now - before).norm()) if finite and step else None,
                "distance": float((now - start).norm()) if finite else None,
            }
        if step + 1 in measured:
            before = weights_of(model)

    trainer = finetune.trainer_of(recipe, model, data.train)
    return finetune.train(recipe, trainer, measure, after_step)


@torch.no_grad()
def weights_of(model: torch.nn.Module) -> torch.Tensor:
    """A copy of all that trains, in one row."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.nn.utils.parameters_to_vector(trained).clone()


def line(rows: list[finetune.Record]) -> str:
    kept = " ".join("-" if row["dims_95pct"] is None else str(row["dims_95pct"]) for row in rows)
    return f"components {kept} after step {rows[-1]['step']}"


# --------------------------------------------------------------------------------------------------
# What the rows say
# --------------------------------------------------------------------------------------------------


class Run(sweep.Run):
    """A trial that has ended, and whether it collapsed."""

    def shares(self, measured: Sequence[int]) -> dict[int, float | None]:
        """Step -> share of the initial components; None once a number was not finite.

        Raises UserError for a step after which it was not measured.
        """
        by_step = {int(record["step"]): record for record in self.path}
        not_finite = (s for s, r in by_step.items() if None in (r["dims_95pct"], r["loss"]))
        diverged = min(not_finite, default=math.inf)
        shares: dict[int, float | None] = {}
        for step in measured:
            if step > self.end["steps"]:
                break
            if step >= diverged:
                shares[step] = None
            elif step in by_step:
                shares[step] = by_step[step]["dims_95pct"] / self.path[0]["dims_95pct"]
            else:
                raise UserError(
                    f"{self.trial.name} of seed {self.trial.seed} was not measured after {step} "
                    "steps: give --first and --doublings as its table has them."
                )
        return shares

    def collapsed(self, measured: Sequence[int], bound: float = KEPT) -> dict[int, bool]:
        """Step -> whether it counts as collapsed then, see collapsed_by."""
        shares = list(self.shares(measured).values())
        return {
            step: collapsed_by(shares[: count + 1], bound)
            for count, step in enumerate(measured[: len(shares)])
        }


def read_runs(config: Config) -> dict[str, list[Run]]:
    """Part -> its trials in the tables, of the backbones that the protocol plans for it."""
    runs = sweep.read_runs(config.folder, BACKBONES + LATER, Trial, Run)
    by_part = {
        part: [run for run in runs if run.trial.part == part and run.trial.seed in plan.backbones]
        for part, plan in config.planned.items()
    }
    return {part: of_part for part, of_part in by_part.items() if of_part}


def thresholds_of(
    config: Config, part: str, runs: Sequence[Run], bound: float = KEPT
) -> dict[int, dict[int, Threshold]]:
    """Backbone -> steps -> threshold, of backbones whose every planned rate ran that long."""
    kept = kept_of(config, part, runs, bound)
    return {
        seed: {step: Threshold.of(by_rate) for step, by_rate in by_step.items()}
        for seed, by_step in kept.items()
    }


def kept_of(
    config: Config, part: str, runs: Sequence[Run], bound: float = KEPT
) -> dict[int, dict[int, dict[float, bool]]]:
    """Backbone -> steps -> rate -> whether the run was kept, where every planned rate ran."""
    plan, kept = config.planned[part], {}
    for run in runs:
        for step, fell in run.collapsed(config.measured, bound).items():
            by_rate = kept.setdefault(run.trial.seed, {}).setdefault(step, {})
            by_rate[run.trial.rate] = not fell
    short = config.measured[min(SHORT, config.doublings)]
    return {
        seed: {
            step: by_rate
            for step, by_rate in sorted(by_step.items())
            if set(by_rate) >= {*plan.rates, *(plan.short_rates if step <= short else ())}
        }
        for seed, by_step in sorted(kept.items())
    }


def slopes_of(
    config: Config, by_seed: Mapping[int, Mapping[int, Threshold]], fitted_from: int = FITTED_FROM
) -> dict[int, float]:
    """Backbone -> slope of log10 threshold on log10 steps, where all ran and there is one."""
    fitted, slopes = config.measured[fitted_from:], {}
    for seed, by_step in by_seed.items():
        if set(fitted) <= set(by_step):
            slope = slope_over_time({step: by_step[step] for step in fitted}, ROUNDING)
            if slope is not None:
                slopes[seed] = slope
    return slopes


def ends_of_slopes(
    config: Config, by_seed: Mapping[int, Mapping[int, Threshold]]
) -> dict[int, tuple[float, float]]:
    """Backbone -> least and largest slope that thresholds after 200 and all steps leave open."""
    first, last = config.measured[FITTED_FROM], config.measured[-1]
    return {
        seed: slope_bounds(by_step[first], by_step[last], first, last)
        for seed, by_step in by_seed.items()
        if first in by_step and last in by_step
    }


def p6(config: Config, slopes: Mapping[int, float]) -> dict[str, Any] | None:
    """How far the threshold of Model 1 falls in a decade of steps: minus its slope."""
    done = len(slopes) >= len(config.planned["model1"].backbones)
    falls = {seed: -slope for seed, slope in slopes.items()}
    family = sweep.LATER_ENDPOINTS
    return sweep.endpoint(differences_interval(falls), MARGIN, done, family)


def p7(
    config: Config, slopes: Mapping[int, float], ends: Mapping[int, tuple[float, float]]
) -> dict[str, Any] | None:
    """Model 2's slope at its least less Model 1's, a lower bound, paired over backbones.

    `missing`: backbones whose Model 2 has no such slope; then nothing is decided. Where the largest
    slope (`at_most`) is surely below Model 1's, it is refuted.
    """
    shared = sorted(slopes.keys() & ends.keys())
    missing = [seed for seed in shared if not math.isfinite(ends[seed][0])]
    least = {seed: ends[seed][0] - slopes[seed] for seed in shared if seed not in missing}
    interval = differences_interval(least) | {"lower_bound": True, "bounded": not missing}
    done = len(shared) >= len(config.planned["model2"].backbones)
    family = sweep.LATER_ENDPOINTS
    if len(shared) < 2:
        return None
    endpoint = sweep.endpoint(interval, MARGIN, done, family)
    if endpoint is None:  # fewer than two have a slope
        text = f"not decided: Model 2 has no slope on {len(missing)} of {len(shared)} backbones"
        unknown = dict.fromkeys(("mean", "low", "high", "se", "df"))
        intervals = {"holm_at_most": unknown, "interval_90": unknown}
        verdict = {"verdict": "not decided", "half_width": None, "margin": MARGIN, "text": text}
        endpoint = interval | unknown | intervals | verdict | {"p": 1.0, "done": done}
    finite = {seed: ends[seed][1] - slopes[seed] for seed in shared if ends[seed][1] < math.inf}
    largest = None
    if len(finite) == len(shared):
        largest = sweep.endpoint(differences_interval(finite), MARGIN, done, family)
        if largest["holm_at_most"]["high"] < 0:
            endpoint |= {"verdict": "refuted", "p": largest["p"]}
            endpoint["text"] = endpoint["text"].replace("not decided", "refuted", 1)
    return endpoint | {"missing": missing, "at_most": largest}


def repetition(config: Config, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any] | None:
    """What all steps leave on 2,000 rows less what they leave on all, by the protocol's reading.

    In shares of the start's components, on the backbones and at the rates that ran on both;
    `by_rate` are means over backbones. None where nothing ran on both; `reading` is None until all
    that is planned has run on both.
    """
    last, left = config.measured[-1], {}
    for part in ("2,000 rows", "all rows"):
        for run in runs.get(part, []):
            shares = run.shares(config.measured)
            if last in shares:
                left.setdefault((run.trial.rate, run.trial.seed), {})[part] = shares[last] or 0.0
    less = {
        place: shares["2,000 rows"] - shares["all rows"]
        for place, shares in left.items()
        if len(shares) == 2
    }
    if not less:
        return None
    rates, seeds = sorted({rate for rate, _ in less}), sorted({seed for _, seed in less})
    by_rate = {
        rate: float(np.mean([value for place, value in less.items() if place[0] == rate]))
        for rate in rates
    }
    mean, plan = round(float(np.mean(list(by_rate.values()))), 9), config.planned["2,000 rows"]
    if not less.keys() >= set(itertools.product(plan.rates, plan.backbones)):
        reading = None
    elif abs(mean) < ALIKE:
        reading = "time alone"
    else:
        reading = "repetition" if max(by_rate.values()) < 0 else "open"
    found = {"backbones": seeds, "by_rate": {f"{rate:g}": by_rate[rate] for rate in rates}}
    return found | {"mean": mean, "reading": reading}


def summary(config: Config) -> dict[str, Any]:
    """What results.json holds: of each part thresholds by steps and their slopes; P6 and P7.

    `other_bounds`: P6 and P7 were this share of components the bound of a collapse; `from_first`:
    P6 with every number of steps.
    """
    runs = read_runs(config)
    thresholds = {part: thresholds_of(config, part, runs[part]) for part in runs}
    slopes = {part: slopes_of(config, by_seed) for part, by_seed in thresholds.items()}
    ends = ends_of_slopes(config, thresholds.get("model2", {}))
    others = {}
    for bound in OTHER_BOUNDS:
        moved = {p: thresholds_of(config, p, runs.get(p, []), bound) for p in ("model1", "model2")}
        moved_slopes = slopes_of(config, moved["model1"])
        others[f"{bound:g}"] = {
            "P6": p6(config, moved_slopes),
            "P7": p7(config, moved_slopes, ends_of_slopes(config, moved["model2"])),
        }
    slopes_of_1 = slopes.get("model1", {})
    return {
        "runs": sum(map(len, runs.values())),
        "measured": config.measured,
        "parts": {part: part_summary(config, part, runs[part], slopes[part]) for part in runs},
        "P6": p6(config, slopes_of_1),
        "P7": p7(config, slopes_of_1, ends),
        "repetition": repetition(config, runs),
        "other_bounds": others,
        "from_first": p6(config, slopes_of(config, thresholds.get("model1", {}), fitted_from=0)),
    }


def part_summary(
    config: Config, part: str, runs: Sequence[Run], slopes: Mapping[int, float]
) -> dict[str, Any]:
    """Thresholds by steps, slopes of backbones, and means of what rows hold.

    Of a number of steps: mean of the thresholds and its interval over backbones (a censored one
    with its bound), how many are bounds from below and above, are not monotone, and how many runs
    had recovered by then; `spearman_karber`: mean of that estimate of the threshold.
    """
    kept, by_steps = kept_of(config, part, runs), {}
    for step in config.measured:
        outcomes = [by_step[step] for by_step in kept.values() if step in by_step]
        if not outcomes:
            continue
        thresholds = [Threshold.of(by_rate) for by_rate in outcomes]
        values = [threshold.value for threshold in thresholds]
        by_steps[str(step)] = {
            "threshold": mean_interval(values),
            "lowest": min(values),
            "highest": max(values),
            "at_least": sum(threshold.censored == ">=" for threshold in thresholds),
            "at_most": sum(threshold.censored == "<=" for threshold in thresholds),
            "not_monotone": sum(not threshold.monotone for threshold in thresholds),
            "recovered": sum(recovered(run, config.measured, step) for run in runs),
            "spearman_karber": mean_interval(map(threshold_of, outcomes)),
        }
    return {
        "arm": common.find_arm(config.planned[part].arm).name,
        "runs": len(runs),
        "thresholds": by_steps,
        "slopes": {str(seed): slope for seed, slope in slopes.items()},
        "slope": mean_interval(slopes.values()) if slopes else None,
        "means": means_of(config, runs),
    }


def recovered(run: Run, measured: Sequence[int], step: int) -> bool:
    """Whether its components had been below the bound before that step and are not then."""
    shares = run.shares(measured)
    if shares.get(step) is None or shares[step] < KEPT:
        return False
    return any(share is not None and share < KEPT for s, share in shares.items() if s < step)


def means_of(config: Config, runs: Sequence[Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rate -> step -> means over backbones: `share` of the start's components, and accuracy.

    A measurement that is not finite counts as a share of 0, and not for the accuracy.
    """
    by_rate: dict[str, dict[str, dict[str, Any]]] = {}
    for rate in sorted({run.trial.rate for run in runs}):
        at_rate = [run for run in runs if run.trial.rate == rate]
        for step in config.measured:
            shares_by_step = [run.shares(config.measured) for run in at_rate]
            shares = [shares[step] or 0.0 for shares in shares_by_step if step in shares]
            if not shares:
                continue
            rows = [row for run in at_rate for row in run.path if row["step"] == step]
            known = [r["validation_accuracy"] for r in rows if r["dims_95pct"] is not None]
            means = {"share": float(np.mean(shares))}
            if known:
                means["validation_accuracy"] = float(np.mean(known))
            by_rate.setdefault(f"{rate:g}", {})[str(step)] = means
    return by_rate


# --------------------------------------------------------------------------------------------------
# Figure and text
# --------------------------------------------------------------------------------------------------

BATCH = 16  # rows a step, here and in the reference
LINE = {"color": "#CC3311", "linewidth": 2}
BOUND = {"color": "#CC3311", "linestyle": "", "marker": "^"}
POINT = {"color": "black", "linestyle": "", "markersize": 9}
STYLES = {
    "a quarter is left": LINE,
    "the same line of Model 1": LINE | {"linestyle": ":"},
    "at least": BOUND,
    "reference, 7B: collapsed": POINT | {"marker": "X"},
    "reference, 7B: not collapsed": POINT | {"marker": "o"},
}


def draw(config: Config, results: Mapping[str, Any]) -> None:
    """Share of components kept over steps and learning rate: a panel for Model 1 and one for 2.

    Points are means over backbones; the line is the mean threshold, the band lowest to highest,
    and a triangle says that some backbone was kept at every rate. Model 2's panel repeats Model 1's
    line. The reference's runs stand where they ended.
    """
    parts = [part for part in ("model1", "model2") if part in results["parts"]]
    if not parts:
        return
    size = (4.5 * len(parts) + 1, 5)
    figure, axes = plt.subplots(
        1, len(parts), figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for part, axis in zip(parts, axes[0], strict=True):
        of_part = results["parts"][part]
        points = [
            (int(step), 10 ** float(rate), means["share"])
            for rate, by_step in of_part["means"].items()
            for step, means in by_step.items()
        ]
        steps, rates, shares = zip(*points, strict=True)
        tiles = {"cmap": "cividis", "vmin": 0, "vmax": 1, "marker": "s", "s": 150}
        colours = axis.scatter(steps, rates, c=shares, **tiles)
        draw_threshold(axis, of_part["thresholds"])
        if part == "model2" and "model1" in parts:
            line = line_of(results["parts"]["model1"]["thresholds"])
            axis.plot(*line, **STYLES["the same line of Model 1"])
        if not config.miniature:
            mark_reference(axis, part)
        axis.set(xscale="log", yscale="log", xlabel=f"steps of {BATCH} rows")
        axis.set_title(f"Model {part[-1]}: {common.find_arm(of_part['arm']).title}")
    axes[0][0].set_ylabel("learning rate, held constant")
    figure.colorbar(colours, ax=axes, label="share of the components that is kept")
    handles = [Line2D([], [], label=name, **style) for name, style in STYLES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    save_figure(figure, config.folder / "collapse_time.png")


def line_of(thresholds: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Steps, and the mean threshold after each as a learning rate."""
    return list(map(int, thresholds)), [10 ** t["threshold"]["mean"] for t in thresholds.values()]


def draw_threshold(axis: plt.Axes, thresholds: Mapping[str, Any]) -> None:
    steps, rates = line_of(thresholds)
    axis.plot(steps, rates, **LINE)
    low, high = ([10 ** t[end] for t in thresholds.values()] for end in ("lowest", "highest"))
    axis.fill_between(steps, low, high, color=LINE["color"], alpha=0.25, linewidth=0)
    for step, rate, threshold in zip(steps, rates, thresholds.values(), strict=True):
        if threshold["at_least"]:
            axis.plot(step, rate, **BOUND)


# The reference's runs of 7B: Model 1 collapsed on AG News alone, Model 2 on neither data set.
COLLAPSED = {"model1": ("AG News",), "model2": ()}


def mark_reference(axis: plt.Axes, part: str) -> None:
    """The reference's runs at their cosine schedule's peak; their steps from its rows."""
    for folder in ("results_agnews", "results_7b"):
        theirs = REFERENCE[folder]
        steps, name = 3 * theirs["train_rows"] / BATCH, theirs["data"]
        outcome = "collapsed" if name in COLLAPSED[part] else "not collapsed"
        axis.plot(steps, LEARNING_RATE, **STYLES[f"reference, 7B: {outcome}"])
        place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        axis.annotate(name, (steps, LEARNING_RATE), fontsize=8, rotation=90, **place)


def text(results: Mapping[str, Any]) -> str:
    """Thresholds by steps, a line a part; P6 and P7."""
    lines = []
    for part, of_part in results["parts"].items():
        shown = [
            f"{step}: {'>=' * bool(t['at_least'])}{'<=' * bool(t['at_most'])}"
            f"{t['threshold']['mean']:+.2f}"
            for step, t in of_part["thresholds"].items()
        ]
        lines.append(f"{part:12} threshold at 10^, after steps {', '.join(shown) or 'n/a'}")
        if of_part["slope"]:
            lines[-1] += f"; slope {of_part['slope']['mean']:+.2f}"
    for name in ("P6", "P7"):
        lines.append(f"{name}: {results[name]['text'] if results[name] else 'no interval yet'}")
    return "\n".join(lines)


STUDY = sweep.Study(
    description=__doc__,
    config_type=Config,
    miniature={"seeds": BACKBONES[:2], "first": 5, "doublings": 4, "parts": tuple(MINIATURE)},
    trials=trials,
    settings=settings,
    run=run,
    line=line,
    summary=summary,
    text=text,
    draw=draw,
    check=sweep.check_parts,
)
main = STUDY.main


if __name__ == "__main__":
    run_script(main)
