"""Tables of results that grow by a row as a training ends: CSV, a row a model."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from collapse.runs.progress import Job, Progress
from collapse.utils.errors import UserError
from collapse.utils.files import locked, write_file, write_json


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def put_row(path: Path, row: Mapping[str, Any], key: str) -> None:
    put_rows(path, [row], key)


def put_rows(path: Path, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """Put rows that share a value of `key` into a CSV file: in the place of those that have it
    there, or at the end.

    The file is written whole, and commands that share it take turns. Raises UserError when it has
    other columns.
    """
    with locked(path.parent):
        stored = read_rows(path)
        if stored and list(stored[0]) != list(rows[0]):
            raise UserError(f"{path} has other columns than this version writes: move it away.")
        new = [
            {name: "" if value is None else str(value) for name, value in row.items()}
            for row in rows
        ]
        same = [number for number, old in enumerate(stored) if old[key] == new[0][key]]
        place = same[0] if same else len(stored)
        behind = [row for row in stored[place:] if row[key] != new[0][key]]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*stored[:place], *new, *behind])
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
    """What run_all calls: make a job's rows, put them into its table, and finish it."""

    def train(job: Job, progress: Progress) -> None:
        rows = rows_of(job, progress)
        put_rows(table_and_key(job)[0], rows, key)
        write_json(job.folder / "metrics.json", rows[-1])

    return train
