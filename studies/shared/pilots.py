"""Studies of accuracy: learning rates are chosen on pilot backbones, results kept by row.

Each trial trains to the epoch that is best on its tuning rows. Trials of pilot backbones never use
validation rows; the rate with the best mean tuning accuracy over them is used in the study. Which
validation rows a trial classified correctly is stored in a file beside its backbone's table.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from collapse.data.task import Rows, Task, limit_task
from collapse.measures.predictions import read_named_rows
from collapse.runs.progress import Progress
from collapse.utils.errors import UserError
from collapse.utils.files import locked, read_tensors, write_tensors
from studies.shared import finetune, sweep

MODELS = ("model1", "model2")


@dataclass
class Config(sweep.Config):
    """Settings of a study with pilots; the comment above a field is its --help text."""

    # Parts to run: pilot (chooses the learning rates), endpoint.
    parts: tuple[str, ...] = ("pilot", "endpoint")
    # Base-10 logarithms of the learning rates that the pilot tries.
    rates: tuple[float, ...] = (-3.5, -3.0, -2.75, -2.5)


@dataclass(frozen=True)
class Run(sweep.Run):
    """A trial that has ended, and which validation rows it classified correctly."""

    correct: np.ndarray | None = None  # (N,) at the best epoch; None for pilots, or without epochs

    @property
    def tuning_accuracy(self) -> float:
        """Tuning accuracy at the best epoch; 0 without a whole epoch."""
        return best_tuning_accuracy(self.path)


def best_tuning_accuracy(path: Sequence[Mapping[str, Any]]) -> float:
    accuracies = (row["tuning_accuracy"] for row in path)
    return max((accuracy for accuracy in accuracies if accuracy is not None), default=0.0)


def best_rates(
    config: Config, pilots: Sequence[Any], kind_of: Callable[[Any], Any]
) -> dict[Any, float]:
    """Kind of trial -> the rate with the best mean tuning accuracy over pilots; of ties the lowest.

    kind_of(trial): trials of one kind share a rate. Raises UserError before all pilots have run.
    """
    runs = sweep.read_runs(config.folder, sweep.PILOTS, type(pilots[0]), Run)
    accuracies = {run.trial: run.tuning_accuracy for run in runs}
    accuracies_by_kind: dict[Any, dict[float, list[float]]] = {}
    for trial in sorted(pilots, key=lambda trial: trial.rate):
        if trial not in accuracies:
            kind = kind_of(trial)
            raise UserError(f"the pilot of {kind} has not run whole: run --parts pilot before.")
        by_rate = accuracies_by_kind.setdefault(kind_of(trial), {})
        by_rate.setdefault(trial.rate, []).append(accuracies[trial])
    return {
        kind: max(by_rate, key=lambda rate: float(np.mean(by_rate[rate])))
        for kind, by_rate in accuracies_by_kind.items()
    }


def in_parts(
    config: Config, pilot: Sequence[Any], others: Callable[[], Sequence[Any]]
) -> Iterator[Sequence[Any]]:
    """The pilot's trials, then those of the other parts, which need the rates that it chooses."""
    if "pilot" in config.parts:
        yield pilot
    if set(config.parts) - {"pilot"}:
        yield others()


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def run_trial(
    config: Config,
    trial: Any,
    progress: Progress,
    made_with: Mapping[str, Any],
    task: Task,
    tuning_rows: Rows,
    other: Task | None = None,
) -> list[finetune.Record]:
    """Train to the best epoch, measure, and store the results on validation rows.

    made_with: `train_rows`, `epochs`, `max_length`. other: another data set, for whose labels
    states are probed.
    """
    recipe = sweep.recipe_of(
        config,
        trial,
        dataset=task.name,
        learning_rate=10**trial.rate,
        steps=0,
        train_rows=made_with["train_rows"],
        max_length=made_with["max_length"],
    )
    task = limit_task(task, recipe.train_rows, None)
    data = finetune.as_tokens(recipe.model, recipe.max_length, task, tuning_rows, other)
    recipe = finetune.whole_epochs(recipe, data, made_with["epochs"])
    records, rows = finetune.to_best_epoch(
        recipe, data, trial.seed not in sweep.PILOTS, progress.step
    )
    if rows:
        put_rows(rows_file(config.folder, trial.seed), trial.name, rows)
    return records


def line(records: Sequence[finetune.Record]) -> str:
    end = records[-1]
    if end["best_epoch"] is None:
        return f"diverged at step {end['step']}"
    text = f"best epoch {end['best_epoch']}, tuning {best_tuning_accuracy(records):.1%}"
    accuracy = end["best_accuracy"]
    return text + (f", validation {accuracy:.1%}" if accuracy is not None else "")


# --------------------------------------------------------------------------------------------------
# Validation rows
# --------------------------------------------------------------------------------------------------


def rows_file(folder: Path, seed: int) -> Path:
    """The file beside a backbone's table with its trainings' results on validation rows."""
    return folder / f"rows-{seed}.safetensors"


def put_rows(file: Path, name: str, rows: Mapping[str, Tensor]) -> None:
    """Add a training's rows, or replace its earlier ones; commands take turns."""
    with locked(file.parent):
        stored = read_tensors(file)[0] if file.exists() else {}
        write_tensors(file, stored | {f"{name}/{part}": rows[part] for part in rows}, {})


def read_runs(folder: Path, planned: int, trial_type: type) -> Iterator[Run]:
    """Every trial of the seeds 0 .. planned - 1.

    Raises UserError where the results on validation rows do not fit the table, as those of an
    earlier training of the same name.
    """
    for seed in range(planned):
        rows = read_named_rows(rows_file(folder, seed), "/")
        for run in sweep.read_runs(folder, [seed], trial_type, Run):
            stored = rows.get(run.trial.name)
            if stored is None or run.end["best_epoch"] is None:
                yield run
            elif abs(stored.correct.mean() - run.end["best_accuracy"]) > 1e-5:
                raise UserError(
                    f"rows and table of {run.trial.name}, seed {seed}, are of two trainings: "
                    "delete its rows from the table."
                )
            else:
                yield Run(run.trial, run.path, stored.correct)
