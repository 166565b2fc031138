"""SST-2, as GLUE splits it and split by sentence."""

import dataclasses
from pathlib import Path

from collapse.data.phrases import maximal_phrases, rows_without_overlap
from collapse.data.task import Rows, Task, check_task, fixed_draw, parse_label, read_records
from collapse.utils.errors import UserError
from collapse.utils.hub import load_from_hub


def read_sst2_split(path: Path) -> Rows:
    """Rows of a GLUE SST-2 file. Raises UserError naming file and line."""
    rows = Rows([], [])
    for where, (sentence, label) in read_records(path, ("sentence", "label")):
        if not sentence.strip():
            raise UserError(f"{where}: the sentence is empty; fix or remove the line.")
        rows.texts.append(sentence.strip())
        rows.labels.append(parse_label(label.strip(), 0, 1, where))
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
    classes = ("negative", "positive")
    return check_task(Task("SST-2", "", source, classes, train, validation, of_phrases=True))


HELD_OUT_SENTENCES = 3000  # of 6,886; with the official 872 they resolve a point of accuracy


def load_sst2_by_sentence(data_dir: Path | None) -> Task | None:
    """SST-2 with more validation rows: 3,000 training sentences, then the 872 official ones.

    GLUE's training rows are phrases of 6,886 sentences, the maximal ones, which are no part of
    another row. A fixed draw of them is held out (half of them, where there are fewer than 6,000).
    Guaranteed: no training row stands in a validation row, and none holds one, word for word, with
    or without punctuation (see rows_without_overlap). Validation rows may overlap each other, and
    phrases that merely share words are on both sides. Reads from the same places as load_sst2, and
    raises the same errors.
    """
    task = load_sst2(data_dir)
    if task is None:
        return None
    sentences = maximal_phrases(task.train.texts)
    drawn = fixed_draw(len(sentences), min(HELD_OUT_SENTENCES, len(sentences) // 2))
    held = task.train.take([sentences[i] for i in drawn])
    official = task.validation
    validation = Rows(held.texts + official.texts, held.labels + official.labels)
    train = task.train.take(rows_without_overlap(task.train.texts, validation.texts))
    name, folder = "SST-2 by sentence", "sst-2-by-sentence"
    parts = {"train": train, "validation": validation}
    return check_task(dataclasses.replace(task, name=name, folder=folder, **parts))
