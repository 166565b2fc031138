"""One training through its epochs: evaluations, checkpoints, a log, going on after a kill."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from collapse.config import RunConfig
from collapse.data.batches import length_grouped_batches
from collapse.measures.predictions import file_of
from collapse.runs.progress import Progress
from collapse.training.checkpoints import optimizer_tensors, restore_optimizer, save_weights
from collapse.training.steps import Step, steps
from collapse.utils.errors import UserError
from collapse.utils.files import append_line, drop_lines_after, read_tensors, write_tensors

CHECKPOINT_SECONDS = 600  # a kill costs at most this much work; the end of an epoch is saved too
LOG_STEPS = 25  # optimizer steps that one line of metrics.jsonl sums up


@dataclass
class StepSums:
    """What one optimizer step, or many of them, add up to."""

    rows: int = 0
    targets: int = 0
    cls_loss: float = 0.0  # summed over rows
    lm_loss: float = 0.0  # summed over targets
    anchor_loss: float = 0.0  # weighed, and summed over steps
    correct: int = 0
    steps: int = 0
    grad_norm: float = 0.0  # summed over steps, before clipping
    max_grad_norm: float = 0.0

    def add(self, other: "StepSums") -> None:
        largest = max(self.max_grad_norm, other.max_grad_norm)
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.max_grad_norm = largest


@dataclass
class History:
    """Where a training stands: all that a resumed run needs beside tensors."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the current epoch
    sums: StepSums = field(default_factory=StepSums)  # of the current epoch
    unlogged: StepSums = field(default_factory=StepSums)  # since the last line of metrics.jsonl
    initial: dict = field(default_factory=dict)  # validation record before the first step
    train: list[dict] = field(default_factory=list)
    val: list[dict] = field(default_factory=list)
    # Evaluation -> per epoch, a 0 or 1 for each row.
    correct: dict[str, list[str]] = field(default_factory=dict)
    measured: list[dict] = field(default_factory=list)  # every config.measure_every steps
    resumed: list[int] = field(default_factory=list)  # steps at which a start went on
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, stored: dict) -> "History":
        sums = {key: StepSums(**stored[key]) for key in ("sums", "unlogged")}
        return cls(**stored | sums)

    def best_epoch(self) -> int:
        """The first epoch (from 1) with the highest validation accuracy."""
        return max(self.val, key=lambda record: (record["accuracy"], -record["epoch"]))["epoch"]


@dataclass
class Validation:
    """The result of one validation."""

    record: dict[str, Any]  # accuracy, losses, rank: what results.json holds
    correct: dict[str, str]  # evaluation -> a character for each row, 1 where it is right
    rows: dict[str, Tensor]  # measures.predictions: what is kept of each row
    details: Any  # passed back to the caller, of the last validation


@dataclass
class TrainingLoop:
    """One training from its first step, or its last checkpoint, to its last epoch.

    Args:
        label: as messages name it, "model 2 seed 43".
        trainer: has model, split, optimizer; `step(rows, learning_rate)` returns StepSums and
            `record(sums)` their means.
        validate: the model's Validation as it stands.
        measure: numbers of the model as it stands, every config.measure_every steps.
        progress: counts steps and evaluations, also those before a resume.
        track: gets every record that metrics.jsonl gets.
    """

    label: str
    trainer: Any
    validate: Callable[[], Validation]
    measure: Callable[[], dict[str, Any]]
    config: RunConfig
    seed: int
    folder: Path
    progress: Progress
    track: Callable[[dict[str, Any]], None]

    def run(self) -> tuple[History, Any]:
        """Train, with a validation after each epoch.

        Saves the weights of the epoch with the best validation accuracy and of the last one.
        Returns the history and the details of the last validation. Raises UserError when training
        diverges.
        """
        self.folder.mkdir(exist_ok=True)
        self.batches_per_epoch = math.ceil(len(self.trainer.split.labels) / self.config.batch_size)
        self.started = self.saved = time.monotonic()
        try:
            history = self.history = self.resume() if self.checkpoint.exists() else self.begin()
        except FloatingPointError as error:
            raise UserError(f"{self.label} is not finite before its first step: {error}.") from None
        last = None
        for step in self.steps_left():
            try:
                self.train_step(step)
                if step.ends_epoch:
                    last = self.end_epoch()
                    self.save()
            except FloatingPointError as error:
                good = "no checkpoint was written yet"
                if self.checkpoint.exists():
                    good = f"the last good checkpoint is {self.checkpoint}"
                raise UserError(
                    f"{self.label} diverged at step {step.number + 1} (learning rate "
                    f"{step.learning_rate:.2g}: {error}); {good}. "
                    "Try a smaller --learning-rate with another --output-dir."
                ) from None
        if last is None:  # killed between the last epoch and the end
            last = self.validate()
        save_weights(self.folder, "final", self.trainer.model, history.epoch)
        write_tensors(file_of(self.folder, "final"), last.rows, {"epoch": history.epoch})
        return history, last.details

    @property
    def checkpoint(self) -> Path:
        return self.folder / "training.safetensors"

    @property
    def log(self) -> Path:
        return self.folder / "metrics.jsonl"

    def write(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, and tell the tracker."""
        append_line(self.log, record)
        self.track(record)

    def begin(self) -> History:
        self.log.unlink(missing_ok=True)
        history = History(initial=self.reported_validation().record)
        self.write({"step": 0, "epoch": 0, "validation": history.initial})
        if self.config.measure_every:
            self.log_measures(history, {"step": 0, "epoch": 0})
        return history

    def resume(self) -> History:
        tensors, metadata = read_tensors(self.checkpoint)
        history = History.from_dict(metadata["history"])
        restore_optimizer(self.trainer.model, self.trainer.optimizer, tensors)
        done = self.steps_done(history)
        history.resumed.append(done)
        drop_lines_after(self.log, done)
        self.progress.resume_at(done, 1 + history.epoch)
        done = f"{history.epoch} epochs and {history.batch} batches"
        self.progress.say(f"{self.label}: going on after {done}")
        if self.config.measure_every and not history.measured:
            self.progress.say(f"NOTE: {self.label} was not measured before its first step")
        return history

    def save(self) -> None:
        self.saved = time.monotonic()
        self.history.seconds += self.saved - self.started
        self.started = self.saved
        tensors = optimizer_tensors(self.trainer.model, self.trainer.optimizer)
        write_tensors(self.checkpoint, tensors, {"history": dataclasses.asdict(self.history)})

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.batches_per_epoch

    def steps_done(self, history: History) -> int:
        return history.epoch * self.batches_per_epoch + history.batch

    def steps_left(self) -> Iterator[Step]:
        """The remaining steps, with a progress bar on a terminal."""
        lengths, config, history = self.trainer.split.lengths, self.config, self.history
        shuffle = partial(length_grouped_batches, lengths, config.batch_size)
        total, done = self.total_steps, self.steps_done(history)
        return tqdm(
            steps(shuffle, total, config, self.seed, first=done),
            self.label,
            total=total,
            initial=done,
            leave=False,
            disable=None if self.progress.alone else True,  # None: where no terminal shows it
        )

    def train_step(self, step: Step) -> None:
        """Take it; log, measure and save where one of these is due."""
        history, done, config = self.history, step.number + 1, self.config
        self.trainer.model.train()
        sums = self.trainer.step(step.rows, step.learning_rate)
        history.sums.add(sums)
        history.unlogged.add(sums)
        history.batch = step.batch + 1
        self.progress.step()
        place = {"step": done, "epoch": step.epoch + 1, "learning_rate": step.learning_rate}
        if done % LOG_STEPS == 0:
            self.write(place | self.trainer.record(history.unlogged))
            history.unlogged = StepSums()
        last = done == self.total_steps
        if config.measure_every and (last or done % config.measure_every == 0):
            self.log_measures(history, place, grad_norm=sums.grad_norm)
        if time.monotonic() - self.saved > CHECKPOINT_SECONDS and not step.ends_epoch:
            self.save()

    def log_measures(self, history: History, place: dict[str, Any], **of_step: float) -> None:
        """The model as it stands, and numbers of the last step, for results and metrics.jsonl."""
        measured = {**self.measure(), **of_step}
        history.measured.append({"step": place["step"], **measured})
        self.write(place | {"measured": measured})
        self.progress.say(measured_line(self.label, history.measured))

    def end_epoch(self) -> Validation:
        """Validate, append the epoch's records, keep the weights if they are the best so far."""
        history = self.history
        validation = self.reported_validation()
        train = self.trainer.record(history.sums)
        for name, rows in validation.correct.items():
            history.correct.setdefault(name, []).append(rows)
        history.epoch, history.batch, history.sums = history.epoch + 1, 0, StepSums()
        history.train.append({"epoch": history.epoch, **train})
        history.val.append({"epoch": history.epoch, **validation.record})
        place = {"step": history.epoch * self.batches_per_epoch, "epoch": history.epoch}
        self.write(place | {"validation": validation.record})
        if history.best_epoch() == history.epoch:
            save_weights(self.folder, "best", self.trainer.model, history.epoch)
            write_tensors(file_of(self.folder, "best"), validation.rows, {"epoch": history.epoch})
        self.progress.say(epoch_line(self.label, history, self.config.epochs), time_left=True)
        return validation

    def reported_validation(self) -> Validation:
        validation = self.validate()
        self.progress.evaluation()
        return validation


def measured_line(label: str, measured: list[dict]) -> str:
    """A line of the log: the latest measurement, and the first one's components."""
    first, last = measured[0], measured[-1]
    line = f"{label}  step {last['step']}: "
    if last["dims_95pct"] is None:
        return line + "states are not finite"
    before = f" ({first['dims_95pct']} at step {first['step']})" if last is not first else ""
    accuracy = f"accuracy {last['validation_accuracy']:.2%} on {last['rows']:,} validation rows"
    return f"{line}{last['dims_95pct']} components{before}, {accuracy}"


def epoch_line(label: str, history: History, epochs: int) -> str:
    """The epoch that has just ended, for the log."""

    def losses(record: dict) -> str:
        lm = "" if record["lm_loss"] is None else f", LM {record['lm_loss']:.4f}"
        return f"cls {record['cls_loss']:.4f}{lm}"

    train, val = history.train[-1], history.val[-1]
    carried = f" (carried {val['carried']['accuracy']:.2%})" if "carried" in val else ""
    return (
        f"{label}  epoch {history.epoch}/{epochs}  train: accuracy {train['accuracy']:.2%}, "
        f"{losses(train)}, gradient norm {train['grad_norm']:.2f}  validation: accuracy "
        f"{val['accuracy']:.2%}{carried}, {losses(val)}, effective rank {val['effective_rank']:.1f}"
    )
