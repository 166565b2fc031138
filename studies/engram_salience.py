"""Do engrams group by the label that is trained, or by something else that the text is about?

An input is a sentence of SST-2 and the beginning of an AG News row, in random order, and the label
of one of the two is trained, on backbones of many seeds (studies/shared/pretrain.py). Then
k-means finds two clusters of engrams, which are compared with both labels. Writes a CSV file for
each seed, with a row for every measurement, then results.json and a figure. The same command
resumes where it was stopped.
"""

import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np

import common
from collapse.config import check_bounds
from collapse.data.batches import Split, encode_rows
from collapse.data.registry import load_ag_news
from collapse.data.sst2 import load_sst2_by_sentence
from collapse.data.task import Rows, Task, fixed_draw, in_corpus_text, tuning_split, without_texts
from collapse.measures.engrams import k_means, match_clusters
from collapse.measures.probe import transfer_accuracy
from collapse.measures.statistics import (
    differences_interval,
    format_interval,
    mean_interval,
    paired_difference,
)
from collapse.models.pretrained import load_tokenizer
from collapse.report.plots import CLASS_COLORS, save_figure
from collapse.runs.progress import Progress
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT
from studies.shared import finetune, sweep

MARGIN = 0.05  # of the adjusted Rand index, of studies/PROTOCOL.md
LEARNED = 0.7  # validation accuracy that a training must exceed to count
LABELS = ("sentiment", "topic")
NEITHER = "neither"  # no label is trained, only the LM loss
TRAIN_PAIRS, VALIDATION_PAIRS = 32_000, 2000
TUNING_ROWS = 600  # of each source
HEADLINE_WORDS = 16  # of an AG News row: a sentence of SST-2 has 17 on average
MAX_LENGTH = 128  # tokens, more than any pair has
RANDOM_COMPRESSORS = 5  # the control is their mean


@dataclass
class Config(sweep.Config):
    """Settings of the study; the comment above a field is its --help text."""

    # Model 3 and its controls that have an engram, as experiment.py --models takes them.
    arms: tuple[str, ...] = ("3", "frozen-compressor", "lm-only-engram")
    # Labels to train, each with every arm; neither trains Model 3 with the LM loss alone.
    trained: tuple[Literal["sentiment", "topic", "neither"], ...] = (*LABELS, NEITHER)
    # Learning rate: ten steps of warm-up, then constant.
    learning_rate: float = 1e-3
    # Optimizer steps of a training, 16 rows each.
    steps: int = 3000
    # Measure on tuning rows, held out of the training rows, to choose learning rate and steps.
    tuning: bool = False
    # Folder for results, with a subfolder for each corpus.
    output_dir: Path = ROOT / "studies" / "results" / "engram_salience"

    @property
    def folder(self) -> Path:
        return self.output_dir / (self.corpus + "-tuning" * self.tuning)


@dataclass(frozen=True)
class Trial:
    """One training of the study."""

    seed: int
    trained: str  # one of LABELS, or NEITHER
    arm: str  # its name in results

    @property
    def name(self) -> str:
        return f"{self.trained}, {self.arm}"


def trials(config: Config) -> list[list[Trial]]:
    """Trials of each arm with each label, and of Model 3 with the LM loss alone."""
    arms = [common.find_arm(name).name for name in config.arms]
    trained_arms = list(
        itertools.product([label for label in LABELS if label in config.trained], arms)
    )
    trained_arms += [(NEITHER, "model3")] * (NEITHER in config.trained)
    return [[Trial(seed, *trained_arm) for seed in config.seeds for trained_arm in trained_arms]]


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """N inputs made of a text from each of two sources, with both labels."""

    texts: list[str]
    labels: np.ndarray  # (N, 2), in the order of LABELS
    sentence_first: np.ndarray  # (N,) bool

    def split(self, trained: str, encode: Any) -> Split:
        """The pairs as token ids with the label that is trained (for NEITHER the first, unused)."""
        label = LABELS.index(trained) if trained != NEITHER else 0
        return encode_rows(Rows(self.texts, self.labels[:, label].tolist()), encode, MAX_LENGTH)


def pair_up(sentences: Rows, headlines: Rows, count: int, seed: int) -> Pairs:
    """Random pairs of texts, so that the two labels and the order are independent.

    Every text of a source is used equally often, or once more; half of the pairs begin with the
    sentence.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for source in (sentences, headlines):
        rounds = math.ceil(count / len(source))
        numbers = np.concatenate([rng.permutation(len(source)) for _ in range(rounds)])[:count]
        drawn.append(source.take(rng.permutation(numbers)))
    first = rng.permutation(count) % 2 == 0
    both = [rows.texts for rows in drawn]
    texts = [
        f"{sentence} {headline}" if sentence_first else f"{headline} {sentence}"
        for sentence, headline, sentence_first in zip(*both, first, strict=True)
    ]
    return Pairs(texts, np.stack([rows.labels for rows in drawn], axis=1), first)


@functools.lru_cache(maxsize=1)  # a process runs many trials
def load_pairs(
    data_dir: Path | None, on_tuning_rows: bool = False, toy: bool = False
) -> tuple[Pairs, Pairs]:
    """(training pairs, pairs to measure on), the latter of validation rows or tuning rows.

    The two share no text, nor a part of a sentence. Sentences to measure on are whole; most of
    those to train on are phrases. Raises UserError if SST-2 or AG News cannot be loaded.
    """
    if toy:
        sources = [finetune.toy_task(None)] * 2
        counts = 128, 80
    else:
        sources = [load_sst2_by_sentence(data_dir), load_ag_news(data_dir)]
        counts = TRAIN_PAIRS, VALIDATION_PAIRS
    if None in sources:
        raise UserError("SST-2 or AG News is not at hand: give --data-dir a folder with both.")
    if on_tuning_rows:
        sources = [measured_on_tuning_rows(task) for task in sources]
        counts = counts[0], TUNING_ROWS
    if not toy:
        sources = [in_corpus_text(sources[0]), headlines_of(sources[1])]
    train = pair_up(*(task.train for task in sources), counts[0], seed=0)
    held = [task.validation for task in sources]
    held = [rows.take(fixed_draw(len(rows), counts[1])) for rows in held]
    return train, pair_up(*held, min(map(len, held)), seed=1)


def measured_on_tuning_rows(task: Task) -> Task:
    """The task with tuning rows, held out of the training rows, as its validation rows."""
    task, rows = tuning_split(task, TUNING_ROWS)
    return dataclasses.replace(task, validation=rows)


def headlines_of(task: Task) -> Task:
    """AG News with two classes and texts cut to HEADLINE_WORDS words, the title and often more.

    World and Sports against Business and Sci/Tech: the classes that are confused most, business and
    technology, stay together, and each side has half of the rows.
    """
    task = in_corpus_text(task)

    def cut(rows: Rows) -> Rows:
        texts = [" ".join(text.split()[:HEADLINE_WORDS]) for text in rows.texts]
        return Rows(texts, [label // 2 for label in rows.labels])

    train, validation = cut(task.train), cut(task.validation)
    train = without_texts(train, validation.texts)
    classes = "World or Sports", "Business or Sci/Tech"
    return dataclasses.replace(task, class_names=classes, train=train, validation=validation)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def settings(config: Config, trial: Mapping[str, Any]) -> dict[str, Any]:
    return {"steps": config.steps, "learning_rate": config.learning_rate}


def recipe_of(config: Config, trial: Trial) -> finetune.Recipe:
    return sweep.recipe_of(
        config,
        trial,
        dataset="SST-2 by sentence with AG News",
        learning_rate=config.learning_rate,
        steps=config.steps,
        train_rows=TRAIN_PAIRS,
        max_length=MAX_LENGTH,
    )


def arm_of(trial: Trial) -> common.Arm:
    """The trial's arm; for NEITHER with weight 1, so that the classification loss has none."""
    arm = common.find_arm(trial.arm)
    return dataclasses.replace(arm, weight=1.0) if trial.trained == NEITHER else arm


def run(config: Config, trial: Trial, progress: Progress) -> list[finetune.Record]:
    """Measurements of one training half-way and at its end; for NEITHER also before the first step.

    Before the first step all trainings of a backbone are the same model.
    """
    recipe = recipe_of(config, trial)
    encode = load_tokenizer(recipe.model)
    train, validation = load_pairs(config.data_dir, config.tuning, config.miniature)
    model, _ = finetune.build(recipe, classes=2)
    trainer = common.make_trainer(
        model, train.split(trial.trained, encode), recipe.config(), arm_of(trial)
    )
    split = validation.split(trial.trained, encode)
    measured = (0,) * (trial.trained == NEITHER) + (config.steps // 2, config.steps)

    def measure(step: int) -> Iterator[finetune.Record]:
        if step in measured:
            yield {"step": step} | measures(model, split, validation.labels, trial.seed)

    records = finetune.train(recipe, trainer, measure, progress.step)
    if trial.trained == NEITHER:
        for record in records:
            record["accuracy"] = None  # its classifier is random
    rows = {"rows": len(validation.texts)}
    return [{name: record.get(name) for name in ("step", *MEASURES)} | rows for record in records]


MEASURES = ("accuracy", "lm_loss")
MEASURES += tuple(
    f"{kind}_{label}" for kind in ("ari", "ari_untrained", "probe") for label in LABELS
)


def measures(
    model: common.DualHeadModel, split: Split, labels: np.ndarray, seed: int
) -> dict[str, float]:
    """Numbers of a model, read with the zero engram, on validation rows; `labels` (N, 2).

    `accuracy`: on the split's own labels. `ari_LABEL`: adjusted Rand index of two clusters of
    engrams and that label; `ari_untrained_LABEL`: its mean over random compressors on the same
    states. `probe_LABEL`: accuracy of a logistic regression from engrams, fitted to every other row
    and tested on the rest. Raises FloatingPointError if an engram is not finite.
    """
    cold = common.evaluate(model, split)
    if not np.isfinite(cold.engrams).all():
        raise FloatingPointError("an engram is not finite")
    compressors = range(seed * RANDOM_COMPRESSORS, (seed + 1) * RANDOM_COMPRESSORS)
    untrained = [common.untrained_engrams(model, cold, draw) for draw in compressors]
    clusters, *others = (k_means(engrams, 2, seed) for engrams in (cold.engrams, *untrained))
    numbers = {"accuracy": cold.accuracy, "lm_loss": cold.lm_loss}
    for label, true in zip(LABELS, labels.T, strict=True):
        numbers[f"ari_{label}"] = ari(clusters, true)
        numbers[f"ari_untrained_{label}"] = float(np.mean([ari(each, true) for each in others]))
        halves = cold.engrams[::2], true[::2], cold.engrams[1::2], true[1::2]
        numbers[f"probe_{label}"] = transfer_accuracy(*halves, seed)["accuracy"]
    return numbers


def ari(clusters: np.ndarray, labels: np.ndarray) -> float:
    return match_clusters(clusters, labels, 2)["ari"]


def line(rows: list[finetune.Record]) -> str:
    last = rows[-1]
    if last["lm_loss"] is None:
        return f"diverged at step {last['step']}"
    accuracy = f"accuracy {last['accuracy']:.1%}, " if last["accuracy"] else ""
    indices = ", ".join(f"{label} {last[f'ari_{label}']:+.3f}" for label in LABELS)
    return f"{accuracy}adjusted Rand index with {indices}"


# --------------------------------------------------------------------------------------------------
# What the rows say
# --------------------------------------------------------------------------------------------------

Ends = dict[Trial, dict[str, float | None]]


def read_table(folder: Path) -> tuple[Ends, Ends]:
    """(last measurements of each training, initial measurements of those of NEITHER).

    For the seeds that the protocol plans, arms in their order. All numbers of a training that
    diverged are None.
    """
    runs = sweep.read_runs(folder, range(sweep.PLANNED), Trial)
    in_order = sorted(runs, key=lambda run: common.find_arm(run.trial.arm).sort_key)
    starts = {run.trial: run.path[0] for run in runs if run.path[0]["step"] == 0}
    return {run.trial: run.end for run in in_order}, starts


def trained_less_other(end: dict[str, float | None], trained: str, kind: str) -> float:
    """A training's index with its trained label minus that with the other label."""
    (other,) = set(LABELS) - {trained}
    return end[f"{kind}_{trained}"] - end[f"{kind}_{other}"]


def salience(ends: Ends, arm: str, kind: str = "ari", above: float = 0.0) -> dict[int, float]:
    """Seed -> index with the trained label minus that with the other, mean over both trainings.

    For seeds where both trainings ended with a validation accuracy above `above`.
    """
    differences = {}
    for seed in sorted({trial.seed for trial in ends if trial.arm == arm}):
        both = {label: ends.get(Trial(seed, label, arm)) for label in LABELS}
        if all(end and (end["accuracy"] or 0.0) > above for end in both.values()):
            trained = [end[f"{kind}_{label}"] for label, end in both.items()]
            swapped = zip(both.values(), reversed(LABELS), strict=True)
            other = [end[f"{kind}_{label}"] for end, label in swapped]
            differences[seed] = float(np.mean(trained) - np.mean(other))
    return differences


def summary(config: Config) -> dict[str, Any]:
    """What results.json holds: means of every arm and label, P4, and related differences.

    In `trainings`, `learned` counts backbones whose validation accuracy exceeds LEARNED, and
    `less_random` is the index with the trained label minus that with the other, minus the same for
    a random compressor. In `arms`, `learned` is the index with the trained label minus that with
    the other, for backbones that learned both labels; `less_random_compressor` (for Model 3: P4b)
    the same minus a random compressor's; `all_backbones` the same for all of the `ran` backbones
    where both labels were trained.
    """
    ends, starts = read_table(config.folder)
    results: dict[str, Any] = {"runs": len(ends), "trainings": [], "arms": []}
    if starts:
        results["trainings"].append({"trained": NEITHER, "arm": "start"} | means(starts.values()))
    for trained, arm in dict.fromkeys((trial.trained, trial.arm) for trial in ends):
        ends_by_seed = {
            t.seed: end for t, end in ends.items() if (t.trained, t.arm) == (trained, arm)
        }
        row = {"trained": trained, "arm": arm} | means(ends_by_seed.values())
        if trained != NEITHER:
            row["learned"] = sum(
                (end["accuracy"] or 0.0) > LEARNED for end in ends_by_seed.values()
            )
            finite = {seed: end for seed, end in ends_by_seed.items() if end["lm_loss"] is not None}
            row["less_random"] = paired_difference(
                *(
                    {seed: trained_less_other(end, trained, kind) for seed, end in finite.items()}
                    for kind in ("ari_untrained", "ari")
                )
            )
        results["trainings"].append(row)
    for arm in dict.fromkeys(trial.arm for trial in ends):
        all_of, learned = (salience(ends, arm, above=above) for above in (0.0, LEARNED))
        random = salience(ends, arm, "ari_untrained", LEARNED)
        seeds = [{t.seed for t in ends if (t.trained, t.arm) == (of, arm)} for of in LABELS]
        row = {"arm": arm, "ran": len(set.intersection(*seeds))}
        row["learned"] = differences_interval(learned)
        row["less_random_compressor"] = paired_difference(random, learned)
        results["arms"].append(row | {"all_backbones": differences_interval(all_of)})
    model3 = [row for row in results["arms"] if row["arm"] == "model3"]
    done = all(Trial(s, label, "model3") in ends for s in range(sweep.PLANNED) for label in LABELS)
    results["P4"] = sweep.endpoint(model3[0]["learned"], MARGIN, done) if model3 else None
    return results


def means(ends: Collection[dict[str, float | None]]) -> dict[str, Any]:
    """Measure -> mean and interval over trainings that did not diverge; numbers of both kinds."""
    finite = [end for end in ends if end["lm_loss"] is not None]
    known = [name for name in MEASURES if finite and finite[0][name] is not None]
    intervals = {name: mean_interval(end[name] for end in finite) for name in known}
    return {"backbones": len(finite), "diverged": len(ends) - len(finite)} | intervals


def text(results: dict[str, Any]) -> str:
    """Accuracy and indices, a line for each arm and label; P4."""
    lines = []
    for row in results["trainings"]:
        if row["backbones"]:
            indices = [f"{label} {format_interval(row[f'ari_{label}'])}" for label in LABELS]
            line = f"{row['trained']:9} {row['arm']:17} index with {', '.join(indices)}"
            if "learned" in row:
                line += f"; accuracy {row['accuracy']['mean']:.1%}, above {LEARNED:.0%} in "
                line += f"{row['learned']} of {row['backbones']}"
            lines.append(line)
    for row in results["arms"]:
        if row["learned"]["n"]:
            lines.append(
                f"{row['arm']:17} trained less other {format_interval(row['learned'], sign='+')}, "
                f"less an untrained compressor's {format_interval(row['less_random_compressor'])}"
            )
    return "\n".join([*lines, f"P4: {(results['P4'] or {}).get('text', 'no interval yet')}"])


# --------------------------------------------------------------------------------------------------
# Figure
# --------------------------------------------------------------------------------------------------


def draw(config: Config, results: dict[str, Any]) -> None:
    """Draw the index with either label: a panel per trained label, a point per backbone."""
    ends, starts = read_table(config.folder)
    arms = list(dict.fromkeys(trial.arm for trial in ends if trial.trained != NEITHER))
    if not arms:
        return
    neither = {trial: end for trial, end in ends.items() if trial.trained == NEITHER}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for trained, axis in zip(LABELS, axes, strict=True):
        groups = [("before training,\nuntrained\ncompressor", starts, "ari_untrained")]
        groups.append(("LM loss\nalone", neither, "ari"))
        groups = [group for group in groups if group[1]]
        for arm in arms:
            of_arm = {t: end for t, end in ends.items() if (t.trained, t.arm) == (trained, arm)}
            groups.append((common.find_arm(arm).title.replace(" ", "\n"), of_arm, "ari"))
            if arm == "model3":
                groups.append(("untrained\ncompressor,\nsame states", of_arm, "ari_untrained"))
        for place, (_, ends_by_trial, kind) in enumerate(groups):
            finite = [end for end in ends_by_trial.values() if end["lm_loss"] is not None]
            for side, label in enumerate(LABELS):
                values = [end[f"{kind}_{label}"] for end in finite]
                x, color = place + 0.36 * (side - 0.5), CLASS_COLORS[1 + side]
                name = f"index with {label}" if place == 0 else None
                spread = x + np.linspace(-0.1, 0.1, len(values))  # so that each is seen
                axis.plot(spread, values, ".", color=color, markersize=5, label=name)
                if values:
                    mean = "mean" if place == side == 0 else None
                    line = {"color": "black", "linewidth": 1, "label": mean}
                    axis.plot([x - 0.15, x + 0.15], [np.mean(values)] * 2, **line)
        axis.axhline(0, color="gray", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(groups)), [title for title, *_ in groups], fontsize=8)
        axis.set_title(f"{trained} is trained")
    axes[0].set_ylabel("adjusted Rand index of two clusters")
    axes[0].legend(fontsize=8)
    save_figure(figure, config.folder / "engrams.png")


def check(config: Config) -> None:
    if not config.arms or not config.trained:
        raise UserError("--arms or --trained is empty: name at least one of each.")
    check_bounds("steps", config.steps, 2 * finetune.WARMUP_STEPS, math.inf)
    check_bounds("learning_rate", config.learning_rate, 1e-12, 1e3)
    for name in config.arms:
        if common.find_arm(name).prefix != "engram":
            raise UserError(f"--arms {name} has no engram: take 3, or a control of it that has.")


STUDY = sweep.Study(
    description=__doc__,
    config_type=Config,
    miniature={"seeds": (0, 1), "arms": ("3", "lm-only-engram"), "steps": 20},
    trials=trials,
    settings=settings,
    run=run,
    line=line,
    summary=summary,
    text=text,
    draw=draw,
    check=check,
)
main = STUDY.main


if __name__ == "__main__":
    # Imported by name, not run as __main__: workers find cached functions by module name.
    run_script(importlib.import_module("studies.engram_salience").main)
