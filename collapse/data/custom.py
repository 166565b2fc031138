"""Anybody's labelled text as a Task: a file, a folder of files, or a set of the hub."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from collapse.data.task import Rows, Task, check_task, fixed_draw
from collapse.data.text_tables import SUFFIXES, Table, read_file, read_hub_table, shown
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT
from collapse.utils.hub import load_all_splits

VALIDATION_SPLITS = ("validation", "dev", "test")  # GLUE's test files have no labels: dev is first
LONGEST_LABEL = 200  # characters


def load_labelled_text(
    dataset: str,
    text_column: Sequence[str],
    label_column: str,
    train_split: str,
    validation_split: str | None,
) -> Task | None:
    """The Task of a file, a folder (paths as `origin` has them, too) or a hub set.

    Classes are the data set's own where its labels are numbers that it has names for, else the
    training rows' labels in order. None when neither the hub nor its cache gives the set. Raises
    UserError for what is not there, or naming file and line of a malformed row.
    """
    columns, path = [*text_column, label_column], find_path(dataset)
    if label_column in text_column:
        raise UserError(f"--label-column {label_column} is one of --text-column: name another.")
    if path is None:
        name, _, configuration = dataset.partition(":")
        tables = load_all_splits(name, configuration or None)
        if tables is None:
            return None
        title, source = dataset, f"Hugging Face {dataset}"
    else:
        dataset, source = path_in_origin(path), str(path)
        title = f"folder {path.name}" if path.is_dir() else path.name
        tables = files_of_splits(path)
    train_split, validation_split = choose_splits(tables, train_split, validation_split, source)

    def read(split: str) -> Table:
        if path is not None:
            return read_file(tables[split], columns)
        return read_hub_table(tables[split], columns, f"the {split} split of {source}")

    classes, train = read_train(read(train_split), source)
    if validation_split is None:
        train, validation = hold_out_tenth(train)
    else:
        validation = read_rows(read(validation_split), classes)
    # In titles a comma ends a name, see study_name, and $ begins a formula.
    name = " ".join(re.split(r"[\s,$]+", title))
    folder = "data-" + re.sub(r"\W+", "-", title.removeprefix("folder ").lower()).strip("-")
    origin = {"dataset": dataset, "text_column": list(text_column), "label_column": label_column}
    origin |= {"train_split": train_split, "validation_split": validation_split}
    task = Task(name, folder, source, classes, train, validation, origin=origin)
    return check_task(task)


# --------------------------------------------------------------------------------------------------
# What is read
# --------------------------------------------------------------------------------------------------


def find_path(dataset: str) -> Path | None:
    """The file or folder that --dataset names, or None for a name of the hub.

    Raises UserError for what looks like a path and is not there.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        return path.resolve()  # "." has no name of its own
    if path.suffix.lower() in SUFFIXES or dataset.startswith((".", "/", "~")):
        raise UserError(f"{path} is not there: give --dataset a file or folder that is.")
    return None


def path_in_origin(path: Path) -> str:
    """A full path as a run's settings keep it: from ./, the repository, where it lies in that."""
    return f"./{path.relative_to(ROOT).as_posix()}" if path.is_relative_to(ROOT) else str(path)


def dataset_of_origin(origin: str) -> str:
    """What path_in_origin was made from; a hub name stays."""
    return str(ROOT / origin) if origin.startswith("./") else origin


def files_of_splits(path: Path) -> dict[str, Path]:
    """Split -> its file. A file by itself is the split train.

    Raises UserError for a file of another kind, and for two files of one split.
    """
    if not path.is_dir():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is none of {', '.join(SUFFIXES)}: convert it to one of them.")
        return {"train": path}
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
            if file.stem in files:
                both = f"{files[file.stem].name} and {file.name}"
                raise UserError(f"{path} holds {both}: leave one of the two there.")
            files[file.stem] = file
    return files


def choose_splits(
    splits: Iterable[str], train: str, validation: str | None, source: str
) -> tuple[str, str | None]:
    """The splits to train and to validate on; None: rows are to be held out."""
    splits = list(splits)
    for option, name in (("train", train), ("validation", validation)):
        if name is not None and name not in splits:
            raise UserError(
                f"{source} has {shown(splits)} for splits and no {shown([name])}: "
                f"name one with --{option}-split."
            )
    if validation == train:
        raise UserError("--validation-split is the training split: name another one.")
    if validation is None:
        found = [name for name in VALIDATION_SPLITS if name in splits and name != train]
        validation = found[0] if found else None
    return train, validation


def hold_out_tenth(rows: Rows) -> tuple[Rows, Rows]:
    """(training, validation) rows: a fixed tenth of the different texts, each with its copies."""
    texts = list(dict.fromkeys(rows.texts))
    held = {texts[i] for i in fixed_draw(len(texts), max(1, len(texts) // 10))}
    sides = [[], []]
    for number, text in enumerate(rows.texts):
        sides[text in held].append(number)
    return rows.take(sides[0]), rows.take(sides[1])


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------


def read_train(table: Table, source: str) -> tuple[tuple[str, ...], Rows]:
    """Class names and rows of a training split. Raises UserError for labels that are no classes."""
    found = list(labelled(table))
    words = {label for _, _, label in found}
    if len(words) < 2:
        raise UserError(
            f"the training rows of {source} have {len(words)} different labels: "
            "two or more are needed."
        )
    if table.class_names is None and 2 * len(words) > len(found):
        raise UserError(
            f"the {len(found)} training rows of {source} have {len(words)} different labels: "
            "name the column of their classes with --label-column, or give more rows of each."
        )
    classes = tuple(table.class_names or in_order(words))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, Rows([text for _, text, _ in found], [numbers[word] for *_, word in found])


def in_order(words: Iterable[str]) -> list[str]:
    """Labels in the order of their numbers where all are whole numbers, else of the alphabet."""
    words = sorted(words)
    if all(re.fullmatch(r"-?[0-9]{1,18}", word) for word in words):
        words.sort(key=int)
    return words


def read_rows(table: Table, classes: Sequence[str]) -> Rows:
    """Rows of a split whose classes are known. Raises UserError naming a row of another class."""
    numbers, rows = {name: number for number, name in enumerate(classes)}, Rows([], [])
    for where, text, word in labelled(table):
        if word not in numbers:
            raise UserError(
                f"{where}: no training row has the label {word!r}; mend or remove the row."
            )
        rows.texts.append(text)
        rows.labels.append(numbers[word])
    return rows


def labelled(table: Table) -> Iterator[tuple[str, str, str]]:
    """(where it stands, text, label) of every row. Raises UserError naming a malformed one."""
    for where, (*parts, label) in table.rows:
        parts = ["" if part is None else part for part in parts]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: the text is a number or list; mend or remove the row.")
        text = " ".join(part.strip() for part in parts if part.strip())
        if not text:
            raise UserError(f"{where}: the text is empty; mend or remove the row.")
        word = label_word(label, table.class_names, where)
        try:
            f"{text}{word}".encode()
        except UnicodeEncodeError:  # JSON can write half of a character, as \ud83d
            raise UserError(f"{where}: half of a character; mend or remove the row.") from None
        yield where, text, word


def label_word(label: Any, class_names: list[str] | None, where: str) -> str:
    """A row's label as a word; a number that names a class of the data set is that name."""
    if not isinstance(label, str | int):
        kind = "missing" if label is None else f"a {type(label).__name__}"
        raise UserError(f"{where}: the label is {kind}, no word or whole number; mend the row.")
    if class_names is not None and isinstance(label, int):
        if not 0 <= label < len(class_names):
            most = len(class_names) - 1
            raise UserError(f"{where}: label {label} is not one of 0 to {most}; mend the row.")
        return class_names[label]
    try:
        word = str(label).strip()
    except ValueError:  # of a number of thousands of digits
        word = "?" * (LONGEST_LABEL + 1)
    if not word:
        raise UserError(f"{where}: the label is empty; mend or remove the row.")
    if len(word) > LONGEST_LABEL:
        raise UserError(
            f"{where}: the label has more than {LONGEST_LABEL} characters; name the column of the "
            "classes with --label-column, or mend the row."
        )
    return word
