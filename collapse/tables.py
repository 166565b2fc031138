"""Tables of results that grow by a row as a training ends: CSV, a row a model."""

import csv
import io
from collections.abc import Mapping
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
    """Put a row into a CSV file, in the place of the one with the same `key`, or at the end.

    The file is written whole, and commands that share it take turns. Raises UserError when it has
    other columns.
    """
    with locked(path.parent):
        rows = read_rows(path)
        if rows and list(rows[0]) != list(row):
            raise UserError(f"{path} has other columns than this version writes: move it away.")
        values = {name: "" if value is None else str(value) for name, value in row.items()}
        places = [number for number, old in enumerate(rows) if old[key] == values[key]]
        if places:
            rows[places[0]] = values
        else:
            rows.append(values)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(path, text.getvalue().encode())
