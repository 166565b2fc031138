"""A data set as a Task of texts and labels: its checks, its cuts, the reading of its files."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collapse.settings import UserError


@dataclass(frozen=True)
class Rows:
    """One split as text: N texts and their labels in 0 .. C-1."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, numbers: Sequence[int] | np.ndarray) -> "Rows":
        """The rows of these numbers, in this order."""
        return Rows([self.texts[i] for i in numbers], [self.labels[i] for i in numbers])


@dataclass(frozen=True)
class Task:
    """A classification data set. To add one, write a function that returns a Task."""

    name: str  # as it stands in logs, titles and tables
    folder: str  # subfolder for its results when it is not the script's own data set; "" when it is
    source: str  # where the rows came from
    class_names: tuple[str, ...]
    train: Rows
    validation: Rows

    def summary(self) -> dict[str, Any]:
        """What results.json says of the data; the digest tells if two runs saw the same rows."""
        digest = hashlib.sha256()
        for rows in (self.train, self.validation):
            digest.update(json.dumps([rows.texts, rows.labels]).encode())
        return {
            "name": self.name,
            "train_rows": len(self.train),
            "validation_rows": len(self.validation),
            "class_names": list(self.class_names),
            "sha256": digest.hexdigest(),
        }

    def title(self) -> str:
        return (
            f"{self.name} ({len(self.train):,} training, {len(self.validation):,} validation rows)"
        )


def check_task(task: Task) -> Task:
    """The task itself. Raises UserError for an empty split or a label that names no class."""
    for split, rows in (("training", task.train), ("validation", task.validation)):
        if not len(rows):
            raise UserError(
                f"the {split} split of {task.name} ({task.source}) is empty: fetch the data again."
            )
        for number, label in enumerate(rows.labels):
            if not 0 <= label < len(task.class_names):
                where = f"row {number + 1} of the {split} split of {task.name} ({task.source})"
                raise UserError(
                    f"{where} has label {label}, "
                    f"not one of 0 to {len(task.class_names) - 1}: mend or remove it."
                )
    return task


def fixed_draw(n: int, limit: int | None) -> np.ndarray:
    """Up to `limit` of the row numbers 0 .. n-1, in order: the same draw everywhere and always."""
    return np.sort(np.random.default_rng(0).permutation(n)[:limit])


def limit_task(task: Task, train_limit: int | None, eval_limit: int | None) -> Task:
    """The task cut to a fixed draw of rows; it names a results folder of its own."""

    def draw(rows: Rows, limit: int | None) -> Rows:
        if limit is None or limit >= len(rows):
            return rows
        return rows.take(fixed_draw(len(rows), limit))

    train, validation = draw(task.train, train_limit), draw(task.validation, eval_limit)
    if len(train) == len(task.train) and len(validation) == len(task.validation):
        return task
    folder = os.path.join(task.folder, f"limit-{len(train)}-{len(validation)}")
    return dataclasses.replace(task, train=train, validation=validation, folder=folder)


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file without line ends. Raises UserError naming the file, and the line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        here = f"{path.parent.name}/{path.name}"
        raise UserError(
            f"{path} is not there: point --data-dir at the folder that holds {here}."
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): "
            "point --data-dir at a download in the official layout."
        ) from None
    lines = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8; mend or remove the line.") from None
    return lines


def parse_label(text: str, lowest: int, highest: int, where: str) -> int:
    """A label of a file, counted from 0. Raises UserError that says where it stands."""
    if text not in map(str, range(lowest, highest + 1)):
        raise UserError(
            f"{where}: label {text!r} is not one of {lowest} to {highest}; mend or remove the line."
        )
    return int(text) - lowest
