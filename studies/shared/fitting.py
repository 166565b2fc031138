"""Fine-tuning as the studies of accuracy do it: to the epoch that is best on tuning rows.

Tuning rows are taken from the training rows and choose epochs and learning rates. Validation rows
choose nothing: some are measured along the way, all of them in an epoch that is the best so far.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

import common
from collapse.data.batches import Split, encode_rows
from collapse.data.task import Rows, Task, in_corpus_text, limit_task, tuning_split, without_texts
from collapse.measures.predictions import (
    RowResults,
    fit_temperature,
    log_probabilities,
    pack,
    unpack,
)
from collapse.measures.probe import transfer_accuracy
from collapse.models.pretrained import load_tokenizer
from collapse.runs.progress import Job, Progress
from collapse.training.monitor import accuracy, draw_rows, measures, outputs
from collapse.utils.errors import UserError
from collapse.utils.files import locked, read_tensors, write_tensors
from studies.shared import finetune as tuning
from studies.shared import sweep

TUNING_ROWS = 1000
MEASURED_AN_EPOCH = 4  # times
# On which other set's rows the states are probed, as many to train the probe as to test it.
TRANSFER_ROWS = 1000


@dataclass(frozen=True)
class Data(tuning.Data):
    """What a training reads; `validation` is the fixed draw that ranks are measured on."""

    tuning: Split
    all_validation: Split
    other: tuple[Split, Split] | None  # of another data set: to train a probe, and to test it

    def steps(self, epochs: int, batch_size: int) -> int:
        return epochs * math.ceil(len(self.train.labels) / batch_size)


def apart_from_validation(task: Task) -> Task:
    """The task without training rows that have the text of a validation row.

    Official splits have some that differ in capitals and marks alone, which corpus text drops.
    """
    return dataclasses.replace(task, train=without_texts(task.train, task.validation.texts))


@functools.lru_cache(maxsize=8)  # sentences among phrases take a while to find
def load_split(dataset: str, data_dir: Path | None) -> tuple[Task, Rows]:
    """A task in the letters of the own language models, and TUNING_ROWS of its training rows.

    Raises UserError where rows cannot be had.
    """
    task = apart_from_validation(in_corpus_text(tuning.load_task(dataset, data_dir)))
    return tuning_split(task, min(TUNING_ROWS, len(task.train) // 5))


def as_tokens(
    recipe: tuning.Recipe, task: Task, tuning_rows: Rows, other: Task | None = None
) -> Data:
    """Rows as the tokens of the recipe's model; of training rows a draw of recipe.train_rows.

    other: another data set, whose labels states are probed for.
    """
    encode, max_length = load_tokenizer(recipe.model), recipe.max_length
    task = limit_task(task, recipe.train_rows, None)
    parts = (task.train, task.validation, tuning_rows)
    train, validation, tuning_part = (encode_rows(part, encode, max_length) for part in parts)
    probe = None
    if other:
        second = limit_task(other, TRANSFER_ROWS, TRANSFER_ROWS)
        probe = tuple(
            encode_rows(part, encode, max_length) for part in (second.train, second.validation)
        )
    return Data(
        classes=len(task.class_names),
        train=train,
        validation=draw_rows(validation, tuning.MEASURED_ROWS),
        measured_train=draw_rows(train, tuning.MEASURED_TRAIN_ROWS),
        language=draw_rows(validation, tuning.LANGUAGE_ROWS),
        tuning=tuning_part,
        all_validation=validation,
        other=probe,
    )


@dataclass
class Fit:
    """What one training gave: its measurements in order, and each validation row at the best epoch.

    The last record also has what `AT_THE_END` names.
    """

    records: list[dict[str, Any]]
    rows: (
        dict[str, Tensor] | None
    )  # as collapse.measures.predictions packs them; None without a whole epoch


# Accuracy and losses (nats; scaled: by the temperature that fits tuning rows) of all validation
# rows at the best epoch; LM loss under the start's LM head and transfer after the last step;
# seconds of the steps alone.
AT_BEST = ("best_epoch", "best_accuracy", "best_loss", "best_scaled_loss")
AT_THE_END = (*AT_BEST, "lm_loss", "transfer_accuracy", "seconds")


def fit(
    recipe: tuning.Recipe,
    data: Data,
    validate: bool = True,
    after_step: Callable[[], None] = lambda: None,
) -> Fit:
    """Train for recipe.steps, whole epochs; without `validate` tuning rows alone are asked.

    A training that meets a number that is not finite ends there: its last record has None for
    what is measured then, and its best epoch is one before.
    """
    model, start_head = tuning.build(recipe, data.classes)
    trainer = tuning.trainer_of(recipe, model, data.train)
    an_epoch = data.steps(1, recipe.batch_size)
    every = math.ceil(an_epoch / MEASURED_AN_EPOCH)
    best: dict[str, Any] = dict.fromkeys(AT_BEST)
    records, rows, highest = [], None, -1.0
    seconds, started = 0.0, time.perf_counter()

    def record(step: int) -> dict[str, Any]:
        found = measures(model, data.measured_train, data.validation) if validate else {}
        asked = {"tuning_accuracy": None, "tuning_loss": None} | dict.fromkeys(AT_THE_END)
        return {"step": step, "epoch": step / an_epoch, **found, **asked}

    records.append(record(0) | at_the_end(model, data, start_head, validate))
    try:
        started = time.perf_counter()
        for step in tuning.steps_of(recipe, trainer):
            after_step()
            if step % an_epoch and (step % an_epoch) % every:
                continue
            seconds += time.perf_counter() - started
            records.append(record(step))
            if step % an_epoch == 0:
                logits = ask(model, data.tuning)
                if not logits.isfinite().all():
                    raise tuning.Diverged(step)
                records[-1] |= {
                    "tuning_accuracy": accuracy(logits, data.tuning.labels),
                    "tuning_loss": F.cross_entropy(logits, data.tuning.labels).item(),
                }
                if records[-1]["tuning_accuracy"] > highest:
                    highest = records[-1]["tuning_accuracy"]
                    best["best_epoch"] = step // an_epoch
                    if validate:
                        found, rows = validation_at(model, data, logits)
                        best |= found
            started = time.perf_counter()
        end = at_the_end(model, data, start_head, validate)
    except tuning.Diverged as error:
        nothing = dict.fromkeys(records[0].keys() - {"step", "epoch"})
        records.append({"step": error.step, "epoch": error.step / an_epoch, **nothing})
        end = {}
    records[-1] |= best | end | {"seconds": round(seconds, 2)}
    return Fit(records, rows)


def at_the_end(
    model: nn.Module, data: Data, start_head: nn.Linear, validate: bool
) -> dict[str, float | None]:
    """What a model knows beside its task: LM loss, accuracy of a probe on another data set."""
    model.eval()
    loss = tuning.lm_loss(model, data.language, start_head)
    found: dict[str, float | None] = {"lm_loss": loss if math.isfinite(loss) else None}
    if validate and data.other and found["lm_loss"] is not None:
        (train, _), (test, _) = (outputs(model, split) for split in data.other)
        labels = [split.labels.numpy() for split in data.other]
        probe = transfer_accuracy(train[0].numpy(), labels[0], test[0].numpy(), labels[1], seed=0)
        found["transfer_accuracy"] = probe["accuracy"]
    return found


def ask(model: nn.Module, split: Split) -> Tensor:
    """Logits (N, C) in evaluation mode."""
    model.eval()
    return outputs(model, split)[1]


def validation_at(
    model: nn.Module, data: Data, tuning_logits: Tensor
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Numbers of all validation rows as the model stands, and the rows themselves, packed."""
    logits, labels = ask(model, data.all_validation).numpy(), data.all_validation.labels.numpy()
    temperature = fit_temperature(tuning_logits.numpy(), data.tuning.labels.numpy())
    plain, scaled = (
        log_probabilities(logits, labels, np.full(len(labels), t)) for t in (1.0, temperature)
    )
    correct = logits.argmax(1) == labels
    found = {"best_accuracy": float(correct.mean())}
    found |= {"best_loss": -float(plain.mean()), "best_scaled_loss": -float(scaled.mean())}
    return found, pack(correct, plain, scaled)


# --------------------------------------------------------------------------------------------------
# Many trainings of a study
# --------------------------------------------------------------------------------------------------


@dataclass
class Config(sweep.Config):
    """Settings of such a study; the comment above a field is its --help text."""

    # Parts to run: pilot (chooses the rates), endpoint.
    parts: tuple[str, ...] = ("pilot", "endpoint")
    # Base-10 logarithms of the learning rates that the pilot tries.
    rates: tuple[float, ...] = (-3.5, -3.0, -2.75, -2.5)


def check_config(config: Config) -> None:
    """Raise UserError for settings that cannot be run."""
    sweep.check_config(config)
    known = type(config).parts
    if unknown := set(config.parts) - set(known):
        raise UserError(f"--parts knows no {', '.join(unknown)}: it takes {' '.join(known)}.")


def run_parts(
    config: Config,
    pilots: Sequence[Any],
    others: Callable[[], Sequence[Any]],
    run_some: Callable[[Any, Sequence[Any]], None],
) -> None:
    """The pilot's cells, then those of the other parts, which rest on the rates that it chose.

    run_some(config, cells) runs the cells of the config's seeds.
    """
    if "pilot" in config.parts:
        run_some(dataclasses.replace(config, seeds=sweep.PILOTS), pilots)
    if set(config.parts) - {"pilot"}:
        run_some(config, others())


def run_cells(
    config: Config,
    cells: Sequence[Any],
    job_of: Callable[[Any], Job],
    fit_of: Callable[[Any, Progress], Fit],
    settings_of: Callable[[Mapping[str, Any]], Mapping[str, float]],
) -> None:
    """Have every cell's records in its backbone's table, and its rows in the file beside it."""

    def rows_of(cell: Any, progress: Progress) -> list[dict[str, Any]]:
        found = fit_of(cell, progress)
        if found.rows:
            put_rows(rows_file(config.folder, cell.seed), cell.name, found.rows)
        return found.records

    sweep.run_missing(config, cells, job_of, rows_of, line_of, settings_of)


def line_of(name: str, records: list[dict[str, Any]]) -> str:
    end = records[-1]
    if end["best_epoch"] is None:
        return f"{name}: diverged at step {end['step']}"
    asked = max(r["tuning_accuracy"] for r in records if r["tuning_accuracy"] is not None)
    text = f"{name}: best epoch {end['best_epoch']}, tuning {asked:.1%}"
    accuracy = end["best_accuracy"]
    return text + (f", validation {accuracy:.1%}" if accuracy is not None else "")


@dataclass(frozen=True)
class Run:
    """A training that has ended."""

    cell: Any  # as by_backbone.Cell, with a `rate`
    path: list[dict[str, float | None]]  # its measurements, from before the first step to the last

    @property
    def end(self) -> dict[str, float | None]:
        return self.path[-1]

    @property
    def tuning_accuracy(self) -> float:
        """At the best epoch; 0 without a whole epoch."""
        found = [row["tuning_accuracy"] for row in self.path if row["tuning_accuracy"] is not None]
        return max(found, default=0.0)


def read_runs(folder: Path, seed: int, cell_type: type) -> list[Run]:
    """Every training in the table of a backbone."""
    table = sweep.table_of(folder, seed)
    return list(itertools.starmap(Run, sweep.read_paths(table, cell_type)))


def best_rates(
    config: Config, cell_type: type, kind_of: Callable[[Any], Any], wanted: Collection[Any]
) -> dict[Any, float]:
    """Kind of cell -> the one of config.rates with the best mean tuning accuracy over the pilots.

    Each training's accuracy is that of its best epoch; of equal rates it is the lowest. Raises
    UserError before every wanted kind ran at every rate on every pilot backbone.
    """
    found: dict[Any, dict[float, list[float]]] = {
        kind: {rate: [] for rate in sorted(config.rates)} for kind in wanted
    }
    for run in itertools.chain.from_iterable(
        read_runs(config.folder, seed, cell_type) for seed in sweep.PILOTS
    ):
        here = found.get(kind_of(run.cell), {}).get(run.cell.rate)
        if here is not None:
            here.append(run.tuning_accuracy)
    for kind, by_rate in found.items():
        if any(len(values) < len(sweep.PILOTS) for values in by_rate.values()):
            raise UserError(f"the pilot of {kind} has not run whole: run --parts pilot before.")
    return {
        kind: max(by_rate, key=lambda rate: float(np.mean(by_rate[rate])))
        for kind, by_rate in found.items()
    }


def is_pilot(cell: Any) -> bool:
    return cell.seed in sweep.PILOTS


def rows_file(folder: Path, seed: int) -> Path:
    """Beside the table of a backbone: which validation rows its trainings had right."""
    return folder / f"rows-{seed}.safetensors"


def right_rows(run: Run, rows: Mapping[str, RowResults]) -> np.ndarray | None:
    """Which validation rows (N,) a run had right at its best epoch; None where it has none.

    Rows that are not of the run's table, left from one before, are refused with UserError.
    """
    stored = rows.get(run.cell.name)
    if stored is None or run.end["best_epoch"] is None:
        return None
    if abs(stored.correct.mean() - run.end["best_accuracy"]) > 1e-5:
        raise UserError(
            f"rows and table of {run.cell.name}, seed {run.cell.seed}, are of two trainings: "
            "delete its rows from the table."
        )
    return stored.correct


def put_rows(file: Path, name: str, rows: Mapping[str, Tensor]) -> None:
    """Add a training's rows, or put them in the place of its former ones; commands take turns."""
    with locked(file.parent):
        stored = read_tensors(file)[0] if file.exists() else {}
        write_tensors(file, stored | {f"{name}/{part}": rows[part] for part in rows}, {})


def read_all_rows(file: Path) -> dict[str, RowResults]:
    """Name of a training -> its rows; empty where there is no file."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in (read_tensors(file)[0] if file.exists() else {}).items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = tensor
    return {name: unpack(tensors) for name, tensors in parts.items()}


def whole_epochs(recipe: tuning.Recipe, data: Data, epochs: int) -> tuning.Recipe:
    """The recipe for whole epochs of these data: of its arm's factor times as many."""
    own = common.find_arm(recipe.arm).epochs_of(epochs)
    steps = data.steps(own, recipe.batch_size)
    return dataclasses.replace(recipe, steps=steps)
