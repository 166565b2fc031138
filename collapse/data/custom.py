"""Your own labelled text as a Task: a file, a folder of files, or a data set of the hub."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from collapse.data.task import Rows, Task, check_task, hold_out_tenth
from collapse.data.text_tables import (
    SUFFIXES,
    NoLabels,
    Table,
    columns_of_split,
    file_type,
    quoted,
    read_file,
)
from collapse.utils.errors import UserError, check_name
from collapse.utils.files import ROOT
from collapse.utils.hub import load_all_splits

# GLUE's test files have no labels: they come last.
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing")
LONGEST_LABEL = 200  # characters


def load_labelled_text(
    dataset: str,
    text_column: Sequence[str],
    label_column: str,
    train_split: str,
    validation_split: str | None,
    search: bool = True,
) -> Task | None:
    """The Task of a file, a folder or a hub set; `dataset` may be a path as Task.origin stores it.

    search: if validation_split is None, look for a split to validate on before holding out rows.

    Classes are named as the data set names its numbers, else by the sorted labels of the training
    rows. Gives None when neither the hub nor its cache has the set. Raises UserError for a path,
    column or split that does not exist, and for a malformed row, with its file and row.
    """
    columns, path = [*text_column, label_column], find_path(dataset)
    if label_column in text_column:
        raise UserError(f"--label-column {label_column} is one of --text-column: name another.")
    if path is None:
        name, _, configuration = dataset.partition(":")
        if (tables := load_all_splits(name, configuration or None)) is None:
            return None
        title, source = dataset, f"Hugging Face {dataset}"
    else:
        dataset, source = path_in_origin(path), str(path)
        title = f"folder {path.name}" if path.is_dir() else path.name
        tables = files_of_splits(path)

    def read(split: str) -> Table:
        if path is None:
            return columns_of_split(tables[split], columns, f"the {split} split of {source}")
        shards = [read_file(file, columns) for file in tables[split]]
        return Table([row for shard in shards for row in shard.rows], shards[0].class_names)

    train_split = find_train(tables, train_split, validation_split, source)
    table = read(train_split)
    classes = classes_of(table, source)
    train = rows_of_table(table, classes)
    validation = None
    if validation_split is not None:
        validation = rows_of_table(read(validation_split), classes)
    elif search:
        validation_split, validation = find_validation(tables, train_split, read, classes)
    if unused := [name for name in tables if name not in (train_split, validation_split)]:
        print(f"NOTE: {source}: splits that are neither trained nor validated on: {quoted(unused)}")
    if validation is None:
        train, validation = hold_out_tenth(train)
    # Without commas, which end a name in titles (see study_name), and $, which begins a formula.
    name = " ".join(re.split(r"[\s,$]+", title))
    folder = "data-" + re.sub(r"\W+", "-", title.removeprefix("folder ").lower()).strip("-")
    origin = {"dataset": dataset, "text_column": list(text_column), "label_column": label_column}
    origin |= {"train_split": train_split, "validation_split": validation_split}
    return check_task(Task(name, folder, source, classes, train, validation, origin=origin))


# --------------------------------------------------------------------------------------------------
# Which files, which splits
# --------------------------------------------------------------------------------------------------


def find_path(dataset: str) -> Path | None:
    """The file or folder that --dataset names, or None for a name of the hub.

    Raises UserError for a name that looks like a path which does not exist.
    """
    path = Path(dataset).expanduser()
    check_name(path.resolve())
    if path.exists():
        return path.resolve()  # "." has no name of its own
    if file_type(path) in SUFFIXES or dataset.startswith((".", "/", "~")):
        raise UserError(f"{path} is not there: give --dataset a file or folder that is.")
    return None


def path_in_origin(path: Path) -> str:
    """A full path as a run's settings store it: from ./ if inside the repository."""
    return f"./{path.relative_to(ROOT).as_posix()}" if path.is_relative_to(ROOT) else str(path)


def dataset_of_origin(origin: str) -> str:
    """The inverse of path_in_origin; a hub name stays as it is."""
    return str(ROOT / origin) if origin.startswith("./") else origin


def files_of_splits(path: Path) -> dict[str, list[Path]]:
    """Split -> its files: one, or several shards as on the hub. A single file is the split train.

    Raises UserError for an unknown file type, two files of one split, and missing shards.
    """
    if not path.is_dir():
        if file_type(path) not in SUFFIXES:
            raise UserError(f"{path} is none of {', '.join(SUFFIXES)}: convert it to one of them.")
        return {"train": [path]}
    files, counts = {}, {}
    for file in sorted(path.iterdir()):
        if file_type(file) in SUFFIXES and file.is_file() and not file.name.startswith("."):
            name = file.name[: file.name.lower().rindex(file_type(file))]
            split, count = re.fullmatch(r"(.+?)(?:-\d{5}-of-(\d{5})(?:-\w+)?)?", name).groups()
            files.setdefault(split, []).append(file)
            counts[split] = int(count or 1)
    if not files and (path / "data").is_dir():  # the layout of data sets on the hub
        return files_of_splits(path / "data")
    if not files:  # a folder for each split
        inside = {
            folder.name: sorted(folder.glob("[!.]*")) for folder in sorted(path.glob("[!.]*/"))
        }
        inside = {
            name: [f for f in in_folder if file_type(f) in SUFFIXES]
            for name, in_folder in inside.items()
        }
        return {name: in_folder for name, in_folder in inside.items() if in_folder}
    for split, count in counts.items():
        if len(files[split]) != count:
            names = " and ".join(file.name for file in files[split][:2])
            wrong = "leave one of the two there" if len(files[split]) > count else "add the others"
            raise UserError(f"{path} holds {names} for {count} file(s) of {split}: {wrong}.")
    return files


def find_train(splits: Iterable[str], train: str, validation: str | None, source: str) -> str:
    """The split to train on. Raises UserError where one of the two is not there."""
    if train == "train":
        train = next(iter(similar(splits, ("train", "training"))), train)
    for option, split in (("train", train), ("validation", validation)):
        if split is not None and split not in splits:
            complaint = f"{source} has {quoted(splits)} for splits and no {quoted([split])}"
            raise UserError(f"{complaint}: name one with --{option}-split.")
    if validation == train:
        raise UserError("--validation-split is the training split: name another one.")
    return train


def similar(splits: Iterable[str], words: Sequence[str]) -> list[str]:
    """Splits named by one of these words, in their order; without any, names that hold one."""
    whole = [split for word in words for split in splits if split.lower() == word]
    parts = {split: re.split(r"[\W_\d]+", split.lower()) for split in splits}
    return whole or [split for word in words for split in splits if word in parts[split]]


def find_validation(
    splits: Iterable[str], train: str, read: Callable[[str], Table], classes: Sequence[str]
) -> tuple[str | None, Rows | None]:
    """The split to validate on and its rows; (None, None) where training rows must be held out."""
    for name in similar([split for split in splits if split != train], VALIDATION_SPLITS):
        try:
            table = read(name)
            unlabelled = [label for label in (None, "", -1, "-1") if str(label) not in classes]
            if all(label in unlabelled for _, (*_, label) in table.rows):
                raise NoLabels("none of its rows has one.")
            return name, rows_of_table(table, classes)
        except NoLabels as reason:
            print(f"NOTE: split {name} is skipped, it has no labels: {reason}")
    return None, None


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------


def classes_of(table: Table, source: str) -> tuple[str, ...]:
    """Class names of the training rows. Raises UserError for labels that cannot be classes."""
    words = {labelled(*row, table.class_names)[1] for row in table.rows}
    fix = "two or more are needed" if len(words) < 2 else None
    if table.class_names is None and 2 * len(words) > len(table.rows):
        fix = fix or "name their column with --label-column, or give more rows of each class"
    if fix:
        rows = f"the {len(table.rows)} training rows of {source}"
        raise UserError(f"{rows} have {len(words)} different labels: {fix}.")
    if all(re.fullmatch(r"-?[0-9]{1,18}", word) for word in words):
        return tuple(table.class_names or sorted(sorted(words), key=int))
    return tuple(table.class_names or sorted(words))


def rows_of_table(table: Table, classes: Sequence[str]) -> Rows:
    """Rows of a split whose classes are known. Raises UserError naming a row of another class."""
    numbers, rows = {name: number for number, name in enumerate(classes)}, Rows([], [])
    for where, values in table.rows:
        text, word = labelled(where, values, table.class_names)
        if word not in numbers:
            raise UserError(
                f"{where}: no training row has the label {word!r}; fix or remove the row."
            )
        rows.texts.append(text)
        rows.labels.append(numbers[word])
    return rows


def labelled(where: str, values: Sequence[Any], names: list[str] | None) -> tuple[str, str]:
    """Text and label of a row. Raises UserError naming a malformed one.

    A float without a fraction counts as a whole number; a number that the data set names becomes
    that name.
    """
    *parts, label = values
    parts, problem, text, word = ["" if part is None else part for part in parts], None, "", ""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if all(isinstance(part, str) for part in parts):
        text = " ".join(part.strip() for part in parts if part.strip())
        problem = None if text else "the text is empty"
    else:
        problem = "the text is a number or list"
    if label is None:
        problem = problem or "the label is missing"
    elif not isinstance(label, str | int):
        problem = problem or f"the label is a {type(label).__name__}, no word or whole number"
    elif names is None or isinstance(label, str):
        word = str(label).strip()
    elif 0 <= label < len(names):
        word = names[label]
    else:
        problem = problem or f"label {label} is not one of 0 to {len(names) - 1}"
    if len(word) > LONGEST_LABEL:
        problem = problem or (
            f"the label has more than {LONGEST_LABEL} characters, name another --label-column"
        )
    if re.search("[\ud800-\udfff]", text + word):  # JSON can write them, as \ud83d
        problem = problem or "an unpaired surrogate"
    if problem or not word:
        raise UserError(f"{where}: {problem or 'the label is empty'}; fix or remove the row.")
    return text, word
