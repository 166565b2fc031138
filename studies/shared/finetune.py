"""Fine-tuning as the studies do it: many short trainings of one backbone, measured as they go.

One loop, `train`, and what is recorded along it: `watch` measures what has become of a model;
`to_best_epoch` chooses an epoch on tuning rows, which are taken from the training rows, and tells
how right it is. Validation rows choose nothing.
"""

import copy
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from collapse.config import LanguageModelConfig
from collapse.data.batches import (
    Split,
    encode_rows,
    length_grouped_batches,
)
from collapse.data.corpus import miniature_documents
from collapse.data.registry import LOADERS
from collapse.data.task import Rows, Task, in_corpus_text, limit_task, tuning_split, without_texts
from collapse.measures.predictions import fit_temperature, log_probabilities, pack
from collapse.measures.probe import transfer_accuracy
from collapse.models.pretrained import find_model, hub_commit, load_causal_lm, load_tokenizer
from collapse.training import monitor
from collapse.training.steps import Shuffle, steps
from collapse.utils.errors import UserError
from collapse.utils.files import digest_weights

WARMUP_STEPS = 10
MEASURED_ROWS, MEASURED_TRAIN_ROWS, LANGUAGE_ROWS = 1000, 512, 200
TUNING_ROWS = 1000
MEASURED_AN_EPOCH = 4  # times
# On which other set's rows the states are probed, as many to train the probe as to test it.
TRANSFER_ROWS = 1000

Record = dict[str, Any]  # what was measured after a step


@dataclass(frozen=True)
class Recipe:
    """All that the numbers of one training depend on, beside code and machine."""

    model: str  # as --model takes it
    dataset: str  # a name of LOADERS
    arm: str  # as --models takes it
    learning_rate: float
    seed: int  # of adapters, heads and the order of rows
    steps: int
    train_rows: int  # a fixed draw
    corpus_text: bool  # write texts as the corpus of the backbones does, see in_corpus_text
    all_weights: bool = False  # instead of LoRA adapters
    device: str = "cpu"
    max_length: int = 64
    batch_size: int = 16
    # Any other settings of LanguageModelConfig, as (name, value).
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, **fields: Any) -> "Recipe":
        """A recipe from its fields and any settings of LanguageModelConfig, all by name."""
        own = {field.name for field in dataclasses.fields(cls)}
        settings = sorted((name, fields.pop(name)) for name in fields.keys() - own)
        return cls(**fields, settings=tuple(settings))

    def config(self) -> LanguageModelConfig:
        settings = {"schedule": "constant", "warmup_fraction": WARMUP_STEPS / self.steps}
        settings |= dict(self.settings)
        if self.all_weights:
            settings |= {"quantization": "none", "compute_dtype": "float32"}
        return LanguageModelConfig(
            model=self.model,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            **settings,
        )


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """Rows as token ids. Those to measure on are fixed draws, the same for every training."""

    classes: int
    train: Split
    validation: Split  # up to MEASURED_ROWS, for ranks and accuracy
    measured_train: Split  # of the training rows, for loss and accuracy in evaluation mode
    language: Split  # of the validation rows, for the LM loss
    all_validation: Split
    tuning: Split | None  # choose the epoch
    other: tuple[Split, Split] | None  # of another data set: to train a probe, and to test it

    def steps(self, epochs: int, batch_size: int) -> int:
        return epochs * math.ceil(len(self.train.labels) / batch_size)


TOY = "made-up"  # data for rehearsals, as rows name it


def toy_task(data_dir: Path | None) -> Task:
    """Made-up texts; class 1: the text begins with a letter before l."""
    texts = miniature_documents(count=160, words=12)
    rows = Rows(texts, [int(text[0] < "l") for text in texts])
    half = len(texts) // 2
    parts = rows.take(range(half)), rows.take(range(half, len(texts)))
    return Task(TOY, "", "made up here", ("late", "early"), *parts)


def load_task(dataset: str, data_dir: Path | None) -> Task:
    """A data set of LOADERS, or the made-up one. Raises UserError where it cannot be had."""
    task = (LOADERS | {TOY: toy_task})[dataset](data_dir)
    if task is None:
        raise UserError(f"{dataset} is not at hand: give --data-dir a folder with a download.")
    return task


def load_data(recipe: Recipe, data_dir: Path | None) -> Data:
    """The recipe's data set as its model's tokens. Raises UserError where rows cannot be had."""
    return _load_data(dataclasses.replace(start_of(recipe), arm="", seed=0), data_dir)


@functools.lru_cache(maxsize=4)
def _load_data(recipe: Recipe, data_dir: Path | None) -> Data:
    task = limit_task(load_task(recipe.dataset, data_dir), recipe.train_rows, MEASURED_ROWS)
    task = in_corpus_text(task) if recipe.corpus_text else task
    return as_tokens(recipe.model, recipe.max_length, task)


@functools.lru_cache(maxsize=8)  # sentences among phrases take a while to find
def load_split(dataset: str, data_dir: Path | None) -> tuple[Task, Rows]:
    """A task in the letters of the own language models, and TUNING_ROWS of its training rows.

    Raises UserError where rows cannot be had.
    """
    task = apart_from_validation(in_corpus_text(load_task(dataset, data_dir)))
    return tuning_split(task, min(TUNING_ROWS, len(task.train) // 5))


def apart_from_validation(task: Task) -> Task:
    """The task without training rows that have the text of a validation row.

    Official splits have some that differ in capitals and marks alone, which corpus text drops.
    """
    return dataclasses.replace(task, train=without_texts(task.train, task.validation.texts))


def as_tokens(
    model: str,
    max_length: int,
    task: Task,
    tuning_rows: Rows | None = None,
    other: Task | None = None,
) -> Data:
    """Rows as the tokens of a model. other: a data set whose labels states are probed for."""
    encode = load_tokenizer(model)

    def tokens(rows: Rows) -> Split:
        return encode_rows(rows, encode, max_length)

    train, validation = tokens(task.train), tokens(task.validation)
    probe = limit_task(other, TRANSFER_ROWS, TRANSFER_ROWS) if other else None
    return Data(
        classes=len(task.class_names),
        train=train,
        validation=monitor.draw_rows(validation, MEASURED_ROWS),
        measured_train=monitor.draw_rows(train, MEASURED_TRAIN_ROWS),
        language=monitor.draw_rows(validation, LANGUAGE_ROWS),
        all_validation=validation,
        tuning=tokens(tuning_rows) if tuning_rows else None,
        other=(tokens(probe.train), tokens(probe.validation)) if probe else None,
    )


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@functools.cache  # a process runs many trials of one model
def digest_of_model(name: str) -> str:
    """Digest of the weights of a model in a folder; of one of the hub its commit."""
    place = find_model(name)
    return digest_weights(Path(place)) if Path(place).exists() else hub_commit(place)


def build(recipe: Recipe, classes: int) -> tuple[common.DualHeadModel, nn.Linear]:
    """The recipe's model before its first step, drawn from its seed, and its LM head as it is now.

    The second is what `language_kept` is measured under: Model 1 has no LM head of its own.
    """
    gc.collect()  # frees the previous model, which reference cycles keep alive
    torch.manual_seed(recipe.seed)
    arm, config, device = common.find_arm(recipe.arm), recipe.config(), torch.device(recipe.device)
    if not recipe.all_weights:
        model = common.build_language_model(arm, classes, "pooled", config, device)
        return model, model.adapters.get_base_model().get_output_embeddings()
    causal_lm = load_causal_lm(config, device).requires_grad_(True)
    start_head = copy.deepcopy(causal_lm.get_output_embeddings()).requires_grad_(False)
    return common.wrap_causal_lm(causal_lm, arm, classes, "pooled", config), start_head


def trainer_of(recipe: Recipe, model: common.DualHeadModel, train: Split) -> common.Trainer:
    if plan := model.memory_plan:
        plan.unpack_what_fits(train, recipe.batch_size)
    return common.make_trainer(model, train, recipe.config(), common.find_arm(recipe.arm))


def train(
    recipe: Recipe,
    trainer: common.Trainer,
    measure: Callable[[int], Iterable[Record]],
    after_step: Callable[[], None] = lambda: None,
    shuffle: Shuffle | None = None,
) -> list[Record]:
    """Train; returns all records of measure(step), called with 0 and after every step.

    It gives nothing for most steps. A training that meets a number that is not finite ends there,
    whether a step or `measure` raises FloatingPointError: its last record has the step, and None
    for all else. shuffle: an epoch's batches, by default of rows of similar length.
    """
    lengths = trainer.split.lengths
    shuffle = shuffle or functools.partial(length_grouped_batches, lengths, recipe.batch_size)
    records, done = [], 0
    try:
        records.extend(measure(0))
        for step in steps(shuffle, recipe.steps, recipe.config(), recipe.seed):
            done = step.number + 1
            trainer.model.train()
            trainer.step(step.rows, step.learning_rate)
            after_step()
            records.extend(measure(done))
    except FloatingPointError:
        records.append(dict.fromkeys(records[0] if records else ()) | {"step": done})
    return records


def lm_loss(model: nn.Module, split: Split, lm_head: nn.Linear) -> float | None:
    """Mean next-token loss (nats) of the split under that LM head; None where it is not finite."""
    loss = common.evaluate(model, split, lm_head=lm_head).lm_loss
    return loss if math.isfinite(loss) else None


# --------------------------------------------------------------------------------------------------
# What has become of a model
# --------------------------------------------------------------------------------------------------


def watch(
    recipe: Recipe,
    data: Data,
    measure_at: Collection[int],
    after_step: Callable[[], None] = lambda: None,
    few_rows_too: bool = False,
) -> list[Record]:
    """Train, and return what was measured: before the first step, after these steps and the last.

    In between on monitor.MEASURED_ROWS of each split; with few_rows_too on these at both ends as
    well, so that any two steps can be compared on as many rows: ranks grow with them. The first
    record and the last are of all measured rows. A process measures a start once, since on a CPU
    that takes as long as dozens of steps.
    """
    model, start_head = build(recipe, data.classes)
    few = [monitor.draw_rows(split) for split in (data.measured_train, data.validation)]
    limits = [None, monitor.MEASURED_ROWS] if few_rows_too else [None]

    def measure(step: int) -> list[Record]:
        if step == 0:
            start = start_of(recipe), data, few_rows_too
            if start not in measured_starts:
                measured_starts[start] = both_ends(step)
            return measured_starts[start]
        if step == recipe.steps:
            return both_ends(step)[::-1]
        if step not in measure_at:
            return []
        return [{"step": step, **monitor.measures(model, *few), "lm_loss": None}]

    def both_ends(step: int) -> list[Record]:
        return [{"step": step, **r} for r in full_records(model, data, start_head, limits)]

    return train(recipe, trainer_of(recipe, model, data.train), measure, after_step)


measured_starts: dict[tuple[Recipe, Data, bool], list[Record]] = {}


def start_of(recipe: Recipe) -> Recipe:
    """The recipe without what changes nothing before the first step, as any arm but a prefix."""
    arm = recipe.arm if common.find_arm(recipe.arm).prefix != "none" else ""
    return dataclasses.replace(recipe, arm=arm, learning_rate=0.0, steps=0)


def full_records(
    model: nn.Module, data: Data, start_head: nn.Linear, limits: Sequence[int | None] = (None,)
) -> list[dict[str, float | None]]:
    """Measures on so many rows for every limit, the first of them all; it has the LM loss, too."""
    model.eval()
    first, *others = monitor.measures_on(model, data.measured_train, data.validation, limits)
    first |= {"lm_loss": lm_loss(model, data.language, start_head)}
    return [first, *(record | {"lm_loss": None} for record in others)]


# --------------------------------------------------------------------------------------------------
# To the epoch that is best on tuning rows
# --------------------------------------------------------------------------------------------------

# Accuracy and losses (nats; scaled: by the temperature that fits tuning rows) of all validation
# rows at the best epoch; LM loss under the start's LM head and transfer after the last step;
# seconds of the steps alone.
AT_BEST = ("best_epoch", "best_accuracy", "best_loss", "best_scaled_loss")
AT_THE_END = (*AT_BEST, "lm_loss", "transfer_accuracy", "seconds")


def whole_epochs(recipe: Recipe, data: Data, epochs: int) -> Recipe:
    """The recipe for whole epochs of these data: of its arm's factor times as many."""
    own = common.find_arm(recipe.arm).epochs_of(epochs)
    return dataclasses.replace(recipe, steps=data.steps(own, recipe.batch_size))


def to_best_epoch(
    recipe: Recipe,
    data: Data,
    validate: bool = True,
    after_step: Callable[[], None] = lambda: None,
) -> tuple[list[Record], dict[str, Tensor] | None]:
    """Train for recipe.steps, whole epochs; without `validate` tuning rows alone are asked.

    Its measurements in order, and each validation row at the best epoch, as predictions.pack has
    them, None without a whole epoch. The last record also has what AT_THE_END names. The best epoch
    of a training that meets a number that is not finite is one before.
    """
    model, start_head = build(recipe, data.classes)
    selection = Selection(recipe, data, model, start_head, validate)
    records = train(recipe, trainer_of(recipe, model, data.train), selection.measure, after_step)
    records[-1] |= selection.best | {"epoch": records[-1]["step"] / selection.an_epoch}
    records[-1] |= {"seconds": round(selection.seconds, 2)}
    return records, selection.rows


class Selection:
    """The best epoch of a training so far, and what is measured on the way to it."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        model: common.DualHeadModel,
        start_head: nn.Linear,
        validate: bool,
    ):
        self.data, self.model, self.start_head, self.validate = data, model, start_head, validate
        self.steps, self.an_epoch = recipe.steps, data.steps(1, recipe.batch_size)
        self.best: Record = dict.fromkeys(AT_BEST)
        self.rows: dict[str, Tensor] | None = None
        self.highest = -1.0  # tuning accuracy
        self.seconds, self._stopped = 0.0, time.perf_counter()

    def measure(self, step: int) -> Iterator[Record]:
        """A few times an epoch; at its end tuning rows are asked, at both ends what else is known.

        Raises FloatingPointError where the classifier's outputs on tuning rows are not finite.
        """
        self.seconds += time.perf_counter() - self._stopped if step else 0.0
        in_epoch = step % self.an_epoch
        if in_epoch % math.ceil(self.an_epoch / MEASURED_AN_EPOCH) == 0:
            record = {"step": step, "epoch": step / self.an_epoch}
            if self.validate:
                data = self.data
                record |= monitor.measures(self.model, data.measured_train, data.validation)
            record |= dict.fromkeys(("tuning_accuracy", "tuning_loss", *AT_THE_END))
            yield record  # it is told also where what follows raises
            if step and not in_epoch:
                record |= self.select(step // self.an_epoch)
            if step in (0, self.steps):
                record |= self.finish()
        self._stopped = time.perf_counter()

    def select(self, epoch: int) -> Record:
        """Ask tuning rows; all validation rows where this epoch is the best so far."""
        logits, labels = torch.from_numpy(self.ask(self.data.tuning)), self.data.tuning.labels
        if not logits.isfinite().all():
            raise FloatingPointError("an output on tuning rows is not finite")
        accuracy = monitor.accuracy(logits, labels)
        if accuracy > self.highest:
            self.highest, self.best["best_epoch"] = accuracy, epoch
            if self.validate:
                self.best |= self.ask_validation_rows(logits)
        loss = F.cross_entropy(logits, labels).item()
        return {"tuning_accuracy": accuracy, "tuning_loss": loss}

    def ask(self, split: Split) -> np.ndarray:
        """Logits (N, C) in evaluation mode."""
        return common.evaluate(self.model, split, losses=False).logits

    def ask_validation_rows(self, tuning_logits: Tensor) -> dict[str, float]:
        """Numbers of all validation rows as the model stands; the rows themselves are kept."""
        split, tuning = self.data.all_validation, self.data.tuning
        logits, labels = self.ask(split), split.labels.numpy()
        temperature = fit_temperature(tuning_logits.numpy(), tuning.labels.numpy())
        plain, scaled = (
            log_probabilities(logits, labels, np.full(len(labels), t)) for t in (1.0, temperature)
        )
        correct = logits.argmax(1) == labels
        self.rows = pack(correct, plain, scaled)
        losses = {"best_loss": -float(plain.mean()), "best_scaled_loss": -float(scaled.mean())}
        return {"best_accuracy": float(correct.mean()), **losses}

    def finish(self) -> dict[str, float | None]:
        """What a model knows beside its task: LM loss, accuracy of a probe on another data set."""
        found = {"lm_loss": lm_loss(self.model, self.data.language, self.start_head)}
        if self.validate and self.data.other and found["lm_loss"] is not None:
            train, test = (common.evaluate(self.model, s, losses=False) for s in self.data.other)
            probe = transfer_accuracy(train.pooled, train.labels, test.pooled, test.labels, seed=0)
            found["transfer_accuracy"] = probe["accuracy"]
        return found
