"""A data set as a Task of texts and labels: checks, subsets and splits, reading of files."""

import codecs
import csv
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collapse.data.phrases import maximal_phrases, rows_without_overlap
from collapse.data.text import corpus_text
from collapse.utils.errors import UserError


@dataclass(frozen=True)
class Rows:
    """One split as text: N texts and their labels in 0 .. C-1."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, numbers: Sequence[int] | np.ndarray) -> "Rows":
        """The rows with these indices, in this order."""
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
    of_phrases: bool = False  # rows are phrases of other rows, as in SST-2: see tuning_split
    # Arguments with which load_labelled_text reads a file or hub set again.
    origin: dict[str, Any] | None = None

    def summary(self) -> dict[str, Any]:
        """The entry `data` of results.json; equal digests mean that two runs saw the same rows."""
        digest = hashlib.sha256()
        for rows in (self.train, self.validation):
            digest.update(json.dumps([rows.texts, rows.labels]).encode())
        return {
            "name": self.name,
            "train_rows": len(self.train),
            "validation_rows": len(self.validation),
            "class_names": list(self.class_names),
            "sha256": digest.hexdigest(),
            **({"origin": self.origin} if self.origin else {}),
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
                    f"not one of 0 to {len(task.class_names) - 1}: fix or remove it."
                )
    return task


def fixed_draw(n: int, limit: int | None) -> np.ndarray:
    """Up to `limit` of the row numbers 0 .. n-1, in order: the same draw everywhere and always."""
    return np.sort(np.random.default_rng(0).permutation(n)[:limit])


def limit_task(task: Task, train_limit: int | None, eval_limit: int | None) -> Task:
    """The task cut to a fixed draw of rows; it names a results folder of its own."""
    train, validation = (
        rows.take(fixed_draw(len(rows), limit))
        for rows, limit in ((task.train, train_limit), (task.validation, eval_limit))
    )
    if len(train) == len(task.train) and len(validation) == len(task.validation):
        return task
    folder = os.path.join(task.folder, f"limit-{len(train)}-{len(validation)}")
    return dataclasses.replace(task, train=train, validation=validation, folder=folder)


def hold_out_tenth(rows: Rows) -> tuple[Rows, Rows]:
    """(training, validation) rows: a fixed tenth of the different texts, each with its copies."""
    texts = list(dict.fromkeys(rows.texts))
    held = {texts[i] for i in fixed_draw(len(texts), max(1, len(texts) // 10))}
    sides = [[], []]
    for number, text in enumerate(rows.texts):
        sides[text in held].append(number)
    return rows.take(sides[0]), rows.take(sides[1])


def tuning_split(task: Task, rows: int) -> tuple[Task, Rows]:
    """The task with fewer training rows, and a fixed draw of `rows` from them to tune on.

    No training row is left that has the text of a tuning row. Where rows are phrases, tuning rows
    are whole sentences (maximal phrases), as the validation rows are, and no training row is left
    that stands in one or holds one, see rows_without_overlap. Validation rows are not touched.
    Raises UserError when there are too few training rows.
    """
    train = task.train
    sentences = maximal_phrases(train.texts) if task.of_phrases else range(len(train))
    if not 0 < rows < len(sentences):
        raise UserError(
            f"{rows} tuning rows of {task.name}: take 1 to {len(sentences) - 1}, "
            "or more training rows."
        )
    tuning = train.take([sentences[i] for i in fixed_draw(len(sentences), rows)])
    if task.of_phrases:
        remaining = train.take(rows_without_overlap(train.texts, tuning.texts))
    else:
        remaining = without_texts(train, tuning.texts)
    return check_task(dataclasses.replace(task, train=remaining)), tuning


def without_texts(rows: Rows, texts: Iterable[str]) -> Rows:
    """The rows that have none of these texts, in order."""
    known = set(texts)
    return rows.take([number for number, text in enumerate(rows.texts) if text not in known])


NO_LETTERS = "x"


def in_corpus_text(task: Task) -> Task:
    """The task with its texts written as the language models' own corpus is, see corpus_text.

    Training rows without a letter are left out. Validation rows without one, such as "10-4", become
    NO_LETTERS: the split keeps its size, and no model can know such a row.
    """
    train = Rows([corpus_text(text) for text in task.train.texts], task.train.labels)
    train = train.take([number for number, text in enumerate(train.texts) if text])
    texts = [corpus_text(text) or NO_LETTERS for text in task.validation.texts]
    validation = Rows(texts, task.validation.labels)
    return check_task(dataclasses.replace(task, train=train, validation=validation))


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file without line ends. Raises UserError naming the file, and the line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        file = f"{path.parent.name}/{path.name}"
        raise UserError(
            f"{path} is not there: point --data-dir at the folder that holds {file}."
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): "
            "point --data-dir at a download in the official layout."
        ) from None
    return decode_lines(content, path)


def read_records(
    path: Path, columns: Sequence[str], header: bool = True
) -> Iterator[tuple[str, list[str]]]:
    """Rows of an official CSV file, or TSV, which quotes nothing: (place for messages, fields).

    Raises UserError naming file and line for another header, or another number of columns.
    """
    tabs = path.suffix == ".tsv"
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    names = ("<TAB>" if tabs else ",").join(columns)
    csv.field_size_limit(sys.maxsize)
    # Quoted texts contain the line ends that read_lines cuts off.
    reader = csv.reader((f"{line}\n" for line in read_lines(path)), strict=True, **options)
    try:
        for number, record in enumerate(reader):
            where = f"{path}, line {reader.line_num}"
            if header and number == 0:
                if record != list(columns):
                    fix = "add it, or fetch the file again"
                    raise UserError(f"{where}: not the header {names}; {fix}.")
                continue
            if len(record) != len(columns):
                wrong = f"{len(record)} columns where {names} has {len(columns)}"
                raise UserError(f"{where}: {wrong}; fix or remove the line.")
            yield where, record
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise UserError(f"{where}: {error}; fix or remove the line.") from None


def decode_lines(content: bytes, path: Path) -> list[str]:
    """Lines of UTF-8 text, without line ends and without a byte order mark.

    Raises UserError for another encoding, naming file and line.
    """
    encoding, number = other_encoding(content), 1
    lines = content.removeprefix(codecs.BOM_UTF8).splitlines()
    try:
        if encoding is None:
            return [line.decode() for line in lines]
    except UnicodeDecodeError as error:
        encoding, number = "WINDOWS-1252", lines.index(error.object) + 1
    raise UserError(
        f"{path}, line {number}: not UTF-8; fix the line, or convert the file from its encoding, "
        f"perhaps {encoding}: `iconv -f {encoding} -t UTF-8 {path.name} > NEW`."
    )


def other_encoding(content: bytes) -> str | None:
    """The encoding that a byte order mark or many zero bytes point at, or None."""
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
    marks |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    full = "UTF-16" if content.count(0) > len(content) / 4 else None
    return next((name for mark, name in marks.items() if content.startswith(mark)), full)


def named_rows(pairs: Iterable[tuple[str, str]], classes: Sequence[str], where: str) -> Rows:
    """Rows of (text, class name) pairs, runs of white space as one space: see registry.ONE_SPACE.

    where: what the pairs are, for messages. Raises UserError naming the row, counted from 1, that
    has no text or an unknown class.
    """
    numbers, rows = {name: number for number, name in enumerate(classes)}, Rows([], [])
    for row, (text, name) in enumerate(pairs, 1):
        rows.texts.append(" ".join(text.split()))
        if not rows.texts[-1]:
            raise UserError(f"row {row} of {where} is empty: fix or remove it.")
        if name not in numbers:
            raise UserError(
                f"row {row} of {where} has class {name!r}, "
                f"not one of the {len(numbers)}: fix or remove it."
            )
        rows.labels.append(numbers[name])
    return rows


def parse_label(text: str, lowest: int, highest: int, where: str) -> int:
    """A label of a file, counted from 0. Raises UserError that names its place in the file."""
    if text not in map(str, range(lowest, highest + 1)):
        raise UserError(
            f"{where}: label {text!r} is not one of {lowest} to {highest}; fix or remove the line."
        )
    return int(text) - lowest
