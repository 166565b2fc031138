"""Tables of results that grow by a row as a training ends: CSV, a row a model."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collapse.files import locked, write_file
from collapse.settings import UserError


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
        there = read_rows(path)
        if there and list(there[0]) != list(rows[0]):
            raise UserError(f"{path} has other columns than this version writes: move it away.")
        new = [
            {name: "" if value is None else str(value) for name, value in row.items()}
            for row in rows
        ]
        same = [number for number, old in enumerate(there) if old[key] == new[0][key]]
        place = same[0] if same else len(there)
        behind = [row for row in there[place:] if row[key] != new[0][key]]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*there[:place], *new, *behind])
        write_file(path, text.getvalue().encode())
