"""Intent classification: CLINC150 (150 classes) and Banking77 (77)."""

import json
from collections.abc import Iterable
from pathlib import Path

from collapse.data.clinc_domains import CLINC_DOMAINS
from collapse.data.task import Task, check_task, named_rows, read_lines, read_records
from collapse.utils.errors import UserError
from collapse.utils.hub import load_named_from_hub

OUT_OF_SCOPE = "oos"


def load_clinc150(data_dir: Path | None) -> Task | None:
    """CLINC150 (Larson et al. 2019), its test split as validation, without out-of-scope rows.

    From data_dir/clinc150/data_full.json, without a data_dir from the Hugging Face cache or hub, or
    None. Classes are the 150 intents in alphabetical order. Raises UserError when data_dir is given
    and lacks the file, or a row is malformed.
    """
    if data_dir is not None:
        path = data_dir / "clinc150" / "data_full.json"
        splits, source = [read_clinc150_split(path, name) for name in ("train", "test")], str(path)
    else:
        name = "clinc/clinc_oos"  # its "plus" has all intents' rows, and more out of scope
        splits = load_named_from_hub(name, ("train", "test"), "text", "intent", "plus")
        if splits is None:
            return None
        source = f"Hugging Face {name}"
    splits = [[pair for pair in pairs if pair[1] != OUT_OF_SCOPE] for pairs in splits]
    return _intent_task("CLINC150", "clinc150", source, tuple(sorted(CLINC_DOMAINS)), splits)


def read_clinc150_split(path: Path, split: str) -> list[tuple[str, str]]:
    """(text, intent) pairs of a split of data_full.json. Raises UserError where there are none."""
    try:
        pairs = json.loads("\n".join(read_lines(path)))[split]
        return [(str(text), str(intent)) for text, intent in pairs]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} holds no list of [text, intent] under {split!r} ({error}): fetch it again."
        ) from None


def load_banking77(data_dir: Path | None) -> Task | None:
    """Banking77 (Casanueva et al. 2020), its test split as validation.

    From data_dir/banking77/train.csv and test.csv, without a data_dir from the Hugging Face cache
    or hub, or None. Classes are the categories of the training rows in alphabetical order. Raises
    UserError when data_dir is given and lacks the files, or a row is malformed.
    """
    if data_dir is not None:
        folder = data_dir / "banking77"
        splits = [read_banking77_split(folder / f"{name}.csv") for name in ("train", "test")]
        source = str(folder)
    else:
        name = "mteb/banking77"
        splits = load_named_from_hub(name, ("train", "test"), "text", "label_text")
        if splits is None:
            return None
        source = f"Hugging Face {name}"
    categories = tuple(sorted({category for _, category in splits[0]}, key=str.lower))
    return _intent_task("Banking77", "banking77", source, categories, splits)


def read_banking77_split(path: Path) -> list[tuple[str, str]]:
    """(text, category) pairs of a Banking77 file. Raises UserError naming file and line."""
    return [(text, category) for _, (text, category) in read_records(path, ("text", "category"))]


def _intent_task(
    name: str,
    folder: str,
    source: str,
    classes: tuple[str, ...],
    splits: Iterable[list[tuple[str, str]]],
) -> Task:
    train, validation = (
        named_rows(pairs, classes, f"the {split} split of {name} ({source})")
        for split, pairs in zip(("training", "test"), splits, strict=True)
    )
    return check_task(Task(name, folder, source, classes, train, validation))
