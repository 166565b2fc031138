"""Does an LM loss help more where there are more classes? And does rank follow their number?

P3 of studies/PROTOCOL.md: the same rows of CLINC150 with labels merged to 2, 5, 10, 30, 75 and 150
classes; Models 1 and 2 on many backbones, at the rates that are best on tuning rows of pilot
backbones at ten classes. Writes a table and a file with results on validation rows for each
backbone, then results.json and a figure. The same command resumes where it was stopped.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import common
from collapse.data.clinc_domains import CLINC_DOMAINS
from collapse.data.task import Rows, Task, check_task, fixed_draw, in_corpus_text, without_texts
from collapse.measures.statistics import (
    crossed_interval,
    differences_interval,
    format_interval,
    mean_interval,
)
from collapse.report.plots import save_figure
from collapse.runs.progress import Progress
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT
from studies.shared import finetune, pilots, sweep
from studies.shared.pilots import MODELS, Run, best_rates, in_parts, read_runs, run_trial

MARGIN = 0.05  # of the slope of the gain (empirical logit of accuracy) on log2 of classes
BACKBONES = 10  # backbones
COUNTS = (2, 5, 10, 30, 75, 150)
CHOSEN_AT = 10  # classes at which learning rates are chosen
RANDOM_COUNTS = (2, 10, 30)
TRAIN_ROWS, EPOCHS, MAX_LENGTH = 7500, 4, 32
SETTINGS = {"train_rows": TRAIN_ROWS, "epochs": EPOCHS, "max_length": MAX_LENGTH}


@dataclass
class Config(pilots.Config):
    """Settings of the study; the comment above a field is its --help text."""

    # Seeds of the backbones, our own small language models.
    seeds: tuple[int, ...] = tuple(range(BACKBONES))
    # Parts to run: pilot (chooses the learning rates), endpoint, random (classes merged at random).
    parts: tuple[str, ...] = ("pilot", "endpoint", "random")
    # Folder for results, with a subfolder for each corpus.
    output_dir: Path = ROOT / "studies" / "results" / "class_count"


@dataclass(frozen=True)
class Trial:
    """One training of the study."""

    seed: int
    classes: int
    merge: str  # how labels are merged: nested (in domains) or random
    arm: str  # its name in results
    rate: float  # base-10 logarithm

    @property
    def name(self) -> str:
        return f"{self.classes} {self.merge} classes, {self.arm}, 1e{self.rate:g}"


# --------------------------------------------------------------------------------------------------
# Merged labels
# --------------------------------------------------------------------------------------------------


def nested_classes(count: int) -> dict[str, int]:
    """Intent -> one of `count` classes, each a union of classes of the next larger count.

    Ten classes are the domains; five are pairs of domains in their written order; two are three of
    these pairs and the other two. For 30 classes a domain's fifteen intents, in alphabetical order,
    are cut into three classes of five; for 75 these are cut into two or three.
    """
    intents = sorted(CLINC_DOMAINS)
    if count == len(intents):
        return {intent: number for number, intent in enumerate(intents)}
    domains = list(dict.fromkeys(CLINC_DOMAINS.values()))
    if count in (2, 5, 10):
        pairs = [place // 2 for place in range(10)]
        class_of = {2: [int(pair > 2) for pair in pairs], 5: pairs, 10: list(range(10))}[count]
        return {intent: class_of[domains.index(CLINC_DOMAINS[intent])] for intent in intents}
    if count not in COUNTS:
        raise UserError(f"no {count} classes nested in domains: {', '.join(map(str, COUNTS))}.")
    by_domain = [intent for d in domains for intent in intents if CLINC_DOMAINS[intent] == d]
    fives = np.array(by_domain).reshape(-1, 5)
    pieces = [
        piece
        for place, five in enumerate(fives)
        for piece in np.array_split(five, 1 if count == 30 else 2 + place % 2)
    ]
    return {str(intent): number for number, piece in enumerate(pieces) for intent in piece}


def random_classes(count: int, seed: int) -> dict[str, int]:
    """Intent -> one of `count` random classes of sizes as equal as possible, drawn by the seed."""
    order = np.random.default_rng([seed, count]).permutation(sorted(CLINC_DOMAINS))
    return {str(intent): place % count for place, intent in enumerate(order)}


def load_merged(classes: int, merge: str, seed: int, data_dir: Path | None) -> tuple[Task, Rows]:
    """(CLINC150 with merged labels and fifty training rows of each intent, tuning rows).

    Both are fixed draws, the same for every number of classes. Tuning rows are other rows of the
    training split, without any text of the training rows.
    """
    task = finetune.apart_from_validation(in_corpus_text(finetune.load_task("CLINC150", data_dir)))
    trained = balanced_draw(task.train.labels, TRAIN_ROWS // len(task.class_names))
    train = task.train.take(trained)
    others = without_texts(task.train, train.texts)
    tuning_rows = others.take(fixed_draw(len(others), finetune.TUNING_ROWS))
    to_class = nested_classes(classes) if merge == "nested" else random_classes(classes, seed)
    numbers = [to_class[intent] for intent in task.class_names]  # intent's number -> class
    task = dataclasses.replace(task, train=train)
    return relabelled(task, tuning_rows, classes, lambda rows: [numbers[n] for n in rows.labels])


def relabelled(
    task: Task, tuning_rows: Rows, classes: int, labels_of: Callable[[Rows], list[int]]
) -> tuple[Task, Rows]:
    """Task and tuning rows with other labels, of so many classes."""
    train, validation, tuning_rows = (
        Rows(rows.texts, labels_of(rows)) for rows in (task.train, task.validation, tuning_rows)
    )
    names = tuple(map(str, range(classes)))
    task = dataclasses.replace(task, class_names=names, train=train, validation=validation)
    return check_task(task), tuning_rows


def balanced_draw(labels: list[int], each: int) -> np.ndarray:
    """Indices of `each` rows of every label, in order; the draw is always the same."""
    labels, rng = np.array(labels), np.random.default_rng(0)
    draws = [rng.permutation(np.flatnonzero(labels == c))[:each] for c in np.unique(labels)]
    return np.sort(np.concatenate(draws))


def toy(classes: int, merge: str, seed: int, data_dir: Path | None) -> tuple[Task, Rows]:
    """Generated texts for --miniature, with so many classes."""
    split = finetune.load_split(finetune.TOY, data_dir)
    return relabelled(*split, classes, lambda rows: [n % classes for n in range(len(rows))])


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def counts_of(config: Config) -> tuple[int, ...]:
    return (2, 4, 10) if config.miniature else COUNTS


def trials(config: Config) -> Iterator[Sequence[Trial]]:
    return in_parts(config, pilot_trials(config), lambda: trials_at(config, chosen_rates(config)))


def pilot_trials(config: Config) -> list[Trial]:
    product = itertools.product(sweep.PILOTS, (CHOSEN_AT,), ("nested",), MODELS, config.rates)
    return list(itertools.starmap(Trial, product))


def chosen_rates(config: Config) -> dict[str, float]:
    """Model -> its rate at ten classes, see best_rates."""
    return best_rates(config, pilot_trials(config), lambda trial: trial.arm)


def trials_at(config: Config, rates: dict[str, float]) -> list[Trial]:
    """Trials of the study, seed by seed; random merges at three numbers of classes."""
    merges = []
    if "endpoint" in config.parts:
        merges += [(count, "nested") for count in counts_of(config)]
    if "random" in config.parts:
        counts = (2,) if config.miniature else RANDOM_COUNTS
        merges += [(count, "random") for count in counts]
    product = itertools.product(config.seeds, merges, MODELS)
    return [Trial(seed, *merge, model, rates[model]) for seed, merge, model in product]


def run(config: Config, trial: Trial, progress: Progress) -> list[finetune.Record]:
    load = toy if config.miniature else load_merged
    task, tuning_rows = load(trial.classes, trial.merge, trial.seed, config.data_dir)
    return run_trial(config, trial, progress, SETTINGS, task, tuning_rows)


# --------------------------------------------------------------------------------------------------
# What the rows say
# --------------------------------------------------------------------------------------------------


def logit(correct: np.ndarray) -> float:
    """Empirical logit of right rows (N,): log((k + 1/2) / (n - k + 1/2))."""
    k, n = correct.sum(), len(correct)
    return math.log((k + 0.5) / (n - k + 0.5))


def slope(gains: dict[int, float]) -> float:
    """Least-squares slope of gains on log2 of their numbers of classes."""
    return float(np.polyfit(np.log2(list(gains)), list(gains.values()), 1)[0])


def read_study(config: Config) -> dict[tuple[str, int], dict[int, dict[str, Run]]]:
    """(merge, classes) -> seed -> model -> run, for seeds with both models at their rates."""
    runs: dict[tuple[str, int], dict[int, dict[str, Run]]] = {}
    rates = chosen_rates(config)
    for run in read_runs(config.folder, BACKBONES, Trial):
        trial = run.trial
        if run.correct is not None and trial.rate == rates[trial.arm]:
            by_seed = runs.setdefault((trial.merge, trial.classes), {})
            by_seed.setdefault(trial.seed, {})[trial.arm] = run
    return {
        place: {seed: pair for seed, pair in by_seed.items() if len(pair) == len(MODELS)}
        for place, by_seed in runs.items()
    }


def gains_of(study: dict, merge: str, counts: tuple[int, ...]) -> dict[int, dict[int, float]]:
    """Seed -> classes -> Model 2's empirical logit minus Model 1's; for seeds with all counts."""
    gains: dict[int, dict[int, float]] = {}
    for count in counts:
        for seed, pair in study.get((merge, count), {}).items():
            one, two = (logit(pair[model].correct) for model in MODELS)
            gains.setdefault(seed, {})[count] = two - one
    return {seed: by_count for seed, by_count in gains.items() if len(by_count) == len(counts)}


def pigeonhole_slope(study: dict, counts: tuple[int, ...], draws: int = 1000) -> dict | None:
    """Bootstrap interval of the mean slope: seeds and rows resampled independently (Owen 2007).

    A drawn row is used at every number of classes. None with fewer than two seeds.
    """
    seeds = sorted(gains_of(study, "nested", counts))
    if len(seeds) < 2:
        return None
    correct = np.array(
        [
            [[study["nested", count][seed][model].correct for model in MODELS] for count in counts]
            for seed in seeds
        ],
        dtype=np.float64,
    )  # (S, C, 2, N)
    n_rows, rng = correct.shape[-1], np.random.default_rng(0)
    x = np.log2(counts) - np.log2(counts).mean()
    mean_slopes = []
    for _ in range(draws):
        rows = rng.multinomial(n_rows, np.full(n_rows, 1 / n_rows))  # (N,) how often
        right = correct @ rows  # (S, C, 2)
        logits = np.log((right + 0.5) / (n_rows - right + 0.5))
        slopes = (logits[..., 1] - logits[..., 0]) @ x / (x @ x)  # (S,)
        mean_slopes.append(slopes[rng.integers(0, len(seeds), len(seeds))].mean())
    low, high = np.quantile(mean_slopes, [0.025, 0.975])
    return {"low": float(low), "high": float(high), "n": len(seeds)}


def summary(config: Config) -> dict[str, Any]:
    """What results.json holds."""
    study, counts = read_study(config), counts_of(config)
    slopes = {seed: slope(gains) for seed, gains in gains_of(study, "nested", counts).items()}
    interval = differences_interval(slopes)
    return {
        "rates": chosen_rates(config),
        "P3": sweep.endpoint(interval, MARGIN, interval["n"] >= BACKBONES),
        "P3_rows_too": pigeonhole_slope(study, counts),
        "table": [row_of(study[place], *place) for place in sorted(study) if study[place]],
    }


def row_of(by_seed: dict[int, dict[str, Run]], merge: str, classes: int) -> dict[str, Any]:
    """Models 1 and 2 at one number of classes: means over seeds, and their difference."""
    row: dict[str, Any] = {"merge": merge, "classes": classes, "seeds": len(by_seed)}
    pairs = [[pair[model].correct for model in MODELS] for pair in by_seed.values()]
    row["accuracy_difference"] = crossed_interval(np.array([two * 1.0 - one for one, two in pairs]))
    row["logit_gain"] = mean_interval([logit(two) - logit(one) for one, two in pairs])
    for model in MODELS:
        runs = [pair[model] for pair in by_seed.values()]
        ends = ("best_accuracy", "effective_rank", "effective_rank_within", "stable_rank")
        ends += ("dims_95pct", "cdnv", "loss")
        known = {name: [r.end[name] for r in runs if r.end[name] is not None] for name in ends}
        row[model] = {name: mean_interval(values) for name, values in known.items() if values}
    return row


# --------------------------------------------------------------------------------------------------
# The figure
# --------------------------------------------------------------------------------------------------


def draw(config: Config, results: dict[str, Any]) -> None:
    """Draw gain and components over the number of classes, for nested and random merges."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    merges = ("nested", "within domains", "full", "-"), ("random", "at random", "none", ":")
    for merge, name, fill, line in merges:
        rows = [row for row in results["table"] if row["merge"] == merge]
        if not rows:
            continue
        x = [row["classes"] for row in rows]
        gain = [row["logit_gain"] for row in rows]
        low, high = (
            [side[end] if side[end] is not None else side["mean"] for side in gain]
            for end in ("low", "high")
        )
        means = [side["mean"] for side in gain]
        bars = np.abs(np.array([low, high]) - means)
        look = {"linestyle": line, "marker": "o", "fillstyle": fill, "capsize": 2}
        axes[0].errorbar(x, means, yerr=bars, color="black", label=f"labels merged {name}", **look)
        for model in MODELS:
            arm = common.find_arm(model)
            look = {"linestyle": line, "marker": arm.marker, "fillstyle": fill, "color": arm.color}
            y = [row[model]["dims_95pct"]["mean"] for row in rows]
            axes[1].plot(x, y, label=f"{arm.title}, {name}", **look)
    axes[0].axhline(0, color="gray", linewidth=0.8)
    axes[1].plot(
        counts_of(config),
        [c - 1 for c in counts_of(config)],
        color="gray",
        linewidth=0.8,
        label="classes - 1",
    )
    axes[1].set_yscale("log")
    labels = ("gain of Model 2, logits", "components for 95% of variance")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xscale="log", xlabel="classes", ylabel=label)
        axis.set_xticks(counts_of(config), counts_of(config))
        axis.minorticks_off()
        axis.legend(fontsize=7)
    save_figure(figure, config.folder / "class_count.png")


def text(results: dict[str, Any]) -> str:
    lines = [f"P3: {results['P3']['text'] if results['P3'] else 'no interval yet'}"]
    for row in results["table"]:
        gain = format_interval(row["accuracy_difference"], 2, 100, "+")
        labels = f"{row['classes']} {row['merge']} classes"
        lines.append(f"{labels}: Model 2 minus Model 1 {gain} points")
    return "\n".join(lines)


STUDY = sweep.Study(
    description=__doc__,
    config_type=Config,
    miniature={"seeds": (0, 1, 2), "rates": (-3.0, -2.0)},
    trials=trials,
    settings=lambda config, trial: SETTINGS,
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
