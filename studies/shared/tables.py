"""Tables of results as CSV files, which get their rows when a training ends."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from collapse.runs.progress import Job, Progress
from collapse.utils.errors import UserError
from collapse.utils.files import locked, write_file, write_json


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header; empty if the file does not exist."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def put_rows(path: Path, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """Put rows with one value of column `key` into a CSV file.

    They replace the rows that have this value, or are added at the end. The file is written
    atomically, and commands that share it take turns. Raises UserError if it has other columns.
    """
    with locked(path.parent):
        stored = read_rows(path)
        if stored and list(stored[0]) != list(rows[0]):
            raise UserError(f"{path} has other columns than this version writes: move it away.")
        new = [
            {name: "" if value is None else str(value) for name, value in row.items()}
            for row in rows
        ]
        positions = [number for number, old in enumerate(stored) if old[key] == new[0][key]]
        position = positions[0] if positions else len(stored)
        after = [row for row in stored[position:] if row[key] != new[0][key]]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*stored[:position], *new, *after])
        write_file(path, text.getvalue().encode())


def reset_missing_jobs(
    jobs: Iterable[Job], table_and_key: Callable[[Job], tuple[Path, str]], key: str
) -> list[Job]:
    """The jobs without a row in their table, reset so that they run, or run again.

    table_and_key(job) gives the job's table and the value of column `key` in the job's rows. The
    table decides, not the job's folder: a metrics.json of a job without a row is deleted.
    """
    known: dict[Path, set[str]] = {}
    missing = []
    for job in jobs:
        table, value = table_and_key(job)
        if table not in known:
            known[table] = {row[key] for row in read_rows(table)}
        if value not in known[table]:
            (job.folder / "metrics.json").unlink(missing_ok=True)
            missing.append(job)
    return missing


def into_table(
    rows_of: Callable[[Job, Progress], Sequence[Mapping[str, Any]]],
    table_and_key: Callable[[Job], tuple[Path, str]],
    key: str,
) -> Callable[[Job, Progress], None]:
    """A function for run_all: makes a job's rows, puts them into its table, finishes the job."""

    def train(job: Job, progress: Progress) -> None:
        rows = rows_of(job, progress)
        put_rows(table_and_key(job)[0], rows, key)
        write_json(job.folder / "metrics.json", rows[-1])

    return train
