"""Data sets: files or the Hugging Face hub -> a Task of texts and labels."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collapse.hub import load_from_hub
from collapse.settings import ROOT, UserError


@dataclass(frozen=True)
class Rows:
    """One split as text: N texts and their labels in 0 .. C-1."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


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
        chosen = fixed_draw(len(rows), limit)
        return Rows([rows.texts[i] for i in chosen], [rows.labels[i] for i in chosen])

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


def read_sst2_split(path: Path) -> Rows:
    """Rows of a GLUE SST-2 file: a header, then sentence<TAB>label.

    Raises UserError naming file and line.
    """
    rows = Rows([], [])
    lines = read_lines(path)
    if lines and lines[0].split("\t") != ["sentence", "label"]:
        raise UserError(
            f"{path}, line 1: not the header sentence<TAB>label; add it, or fetch the file again."
        )
    for number, line in enumerate(lines[1:], 2):
        where = f"{path}, line {number}"
        columns = line.split("\t")  # GLUE quotes nothing: a quotation mark is part of the text
        if len(columns) != 2:
            raise UserError(
                f"{where}: {len(columns)} columns where sentence<TAB>label has 2; "
                "mend or remove the line."
            )
        if not columns[0].strip():
            raise UserError(f"{where}: the sentence is empty; mend or remove the line.")
        rows.texts.append(columns[0].strip())
        rows.labels.append(parse_label(columns[1].strip(), 0, 1, where))
    return rows


def load_sst2(data_dir: Path | None) -> Task | None:
    """SST-2 from data_dir/SST-2, without a data_dir from the Hugging Face cache or hub, or None.

    Raises UserError when data_dir is given and lacks the files, or a row is malformed.
    """
    if data_dir is not None:
        folder = data_dir / "SST-2"
        train, validation = (read_sst2_split(folder / f"{name}.tsv") for name in ("train", "dev"))
        source = str(folder)
    else:
        splits = load_from_hub("stanfordnlp/sst2", "sentence", ("train", "validation"))
        if splits is None:
            return None
        (train, validation), source = (Rows(*s) for s in splits), "Hugging Face stanfordnlp/sst2"
    return check_task(Task("SST-2", "", source, ("negative", "positive"), train, validation))


AG_NEWS_ROWS = 120_000  # of the official training split


def read_ag_news_split(path: Path) -> Rows:
    """Rows of an AG News file: quoted "class 1-4","title","description".

    Title and description are joined by a space, as the hub's copy has them. Raises UserError naming
    file and line.
    """
    rows = Rows([], [])
    reader = csv.reader(read_lines(path), strict=True)
    try:
        for columns in reader:
            where = f"{path}, line {reader.line_num}"
            if len(columns) != 3:
                raise UserError(
                    f"{where}: {len(columns)} columns where class,title,description has 3; "
                    "mend or remove the line."
                )
            text = " ".join(columns[1:]).strip()
            if not text:
                raise UserError(
                    f"{where}: title and description are empty; mend or remove the line."
                )
            rows.texts.append(text)
            rows.labels.append(parse_label(columns[0], 1, 4, where))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {error}; mend or remove the line."
        ) from None
    return rows


def load_ag_news(data_dir: Path | None) -> Task | None:
    """AG News (Zhang et al. 2015), its test split as validation; from where load_sst2 looks too.

    A training split that is not the official 120,000 rows is named by its size, and has a results
    folder of its own. Raises UserError when data_dir is given and lacks the files, or a row is
    malformed.
    """
    if data_dir is not None:
        folder = data_dir / "ag_news_csv"
        train, validation = (read_ag_news_split(folder / f"{n}.csv") for n in ("train", "test"))
        source = str(folder)
    else:
        splits = load_from_hub("fancyzhx/ag_news", "text", ("train", "test"))
        if splits is None:
            return None
        (train, validation), source = (Rows(*s) for s in splits), "Hugging Face fancyzhx/ag_news"
    name, subfolder = "AG News", ""
    if len(train) != AG_NEWS_ROWS:
        name, subfolder = f"AG News, {len(train):,}-row training subset", f"subset-{len(train)}"
    classes = ("World", "Sports", "Business", "Sci/Tech")
    return check_task(Task(name, subfolder, source, classes, train, validation))


MOVIE_SNIPPETS_ARCHIVE = ROOT / "data" / "vaderSentiment-3.3.2.tar.gz"  # `make data` fetches it


MOVIE_SNIPPETS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"


def load_movie_snippets(archive: Path = MOVIE_SNIPPETS_ARCHIVE) -> Task:
    """10,568 movie-review sentences (Hutto & Gilbert 2014), labelled by the sign of their rating.

    It is the mean of 20 people's; ratings of exactly zero are dropped. A text goes to validation
    when its SHA-256 is divisible by ten: the split needs no seed, and two copies of a text cannot
    land on different sides. Raises UserError when the archive is missing or is not the one this
    loader was written for.
    """
    if not archive.exists():
        raise UserError(
            f"{archive} is not there: run `make data` to fetch it, or point --data-dir at SST-2."
        )
    content = archive.read_bytes()
    if hashlib.sha256(content).hexdigest() != MOVIE_SNIPPETS_SHA256:
        raise UserError(
            f"{archive} is damaged (its SHA-256 is not the expected one): "
            "delete it and run `make data`."
        )
    for member in (
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ):
        with tarfile.open(fileobj=io.BytesIO(content)) as package:
            content = package.extractfile(member).read()
    train, validation = Rows([], []), Rows([], [])
    for line in content.decode().strip().split("\r\n"):
        _, rating, text = line.split("\t")
        text = text.strip()
        if float(rating) != 0:
            digest = int(hashlib.sha256(text.encode()).hexdigest(), 16)
            side = train if digest % 10 else validation
            side.texts.append(text)
            side.labels.append(int(float(rating) > 0))
    source = "movieReviewSnippets_GroundTruth.txt of vaderSentiment 3.3.2"
    return check_task(
        Task(
            "movie-review snippets",
            "movie-snippets",
            source,
            ("negative", "positive"),
            train,
            validation,
        )
    )


# What a results folder names its data -> the function that gives the rows again.
LOADERS: dict[str, Callable[[Path | None], Task | None]] = {
    "SST-2": load_sst2,
    "AG News": load_ag_news,
    "movie-review snippets": lambda data_dir: load_movie_snippets(),
}


def load_again(summary: dict[str, Any], data_dir: Path | None) -> Task:
    """The rows that a run's `Task.summary` tells of. Raises UserError when they cannot be had."""
    name = summary["name"]
    task = LOADERS[name.partition(",")[0]](data_dir)
    if task is None:
        raise UserError(
            f"{name} is neither in the Hugging Face cache nor on the hub: give --data-dir."
        )
    task = limit_task(task, summary["train_rows"], summary["validation_rows"])
    if task.summary()["sha256"] != summary["sha256"]:
        raise UserError(
            f"{task.source} holds other rows of {name} than the models were trained on."
        )
    return task
