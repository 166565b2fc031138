"""Columns of CSV, TSV, JSON lines, Parquet and hub tables, every row with where it stands.

Text files are read here. `datasets` (5.2.0) takes a text "null" or "NA" for a missing one, "007"
for 7, fills up a row that lacks a column, and names neither file nor line of one that it refuses.
"""

import csv
import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collapse.data.task import decode_lines
from collapse.utils.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Table:
    """The wanted columns of one split: texts', then the labels'."""

    rows: Iterable[tuple[str, Sequence[Any]]]  # where a row stands, its values
    class_names: list[str] | None  # of whole-number labels, where the data names them


def read_file(path: Path, columns: Sequence[str]) -> Table:
    """The columns of a file. Raises UserError when it cannot be read; a bad row does when taken."""
    try:
        if path.suffix.lower() == ".parquet":
            return read_parquet(path, columns)
        lines = decode_lines(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend or replace it.") from None
    if lines:
        lines[0] = lines[0].removeprefix("\ufeff")  # some programs begin UTF-8 with it
    read = read_json_lines if path.suffix.lower() in (".jsonl", ".json") else read_csv
    return Table(read(path, lines, columns), None)


def read_csv(
    path: Path, lines: Sequence[str], columns: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Rows of CSV (RFC 4180), or of TSV, where a quotation mark is part of the text, as in GLUE."""
    kind = {"delimiter": ","}
    if path.suffix.lower() == ".tsv":
        kind = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    # A quoted text may have line ends in it, which decode_lines has cut off.
    reader = csv.reader((f"{line}\n" for line in lines), strict=True, **kind)
    start, header = 1, None
    try:
        for values in reader:
            where, start = f"{path}, line {start}", reader.line_num + 1
            if header is None:
                header = values
                check_columns(header, columns, f"{path}, line 1")
                places = [header.index(name) for name in columns]
            elif values and len(values) != len(header):
                raise UserError(
                    f"{where}: {len(values)} columns where the header has {len(header)}; "
                    "mend or remove the line."
                )
            elif values:  # not a blank line
                yield where, [values[i] for i in places]
    except csv.Error as error:
        raise UserError(f"{path}, line {start}: {error}; mend or remove the line.") from None
    if header is None:
        raise UserError(f"{path} is empty: its first line names the columns.")


def read_json_lines(
    path: Path, lines: Sequence[str], columns: Sequence[str]
) -> Iterator[tuple[str, list[Any]]]:
    """Rows of a file with a JSON object a line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object of its own; mend or remove the line.")
        check_columns(list(record), columns, where)
        yield where, [record[name] for name in columns]


# What pyarrow and Python raise for bytes that are damaged, beside pyarrow's own kind.
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


def read_parquet(path: Path, columns: Sequence[str]) -> Table:
    """The columns of a Parquet file; page checksums are verified where it has them.

    Class names are those that `datasets` stores. Raises UserError for a damaged file.
    """
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        schema = file.schema_arrow
        check_columns(schema.names, columns, str(path))
        table = file.read(columns=list(dict.fromkeys(columns)))
        values = [table.column(name).to_pylist() for name in columns]
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = stored["info"]["features"][columns[-1]] if stored else {}
        names = feature["names"] if feature.get("_type") == "ClassLabel" else None
    except (pyarrow.ArrowException, *DAMAGED) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged, or no Parquet file ({reason}): replace it.") from None
    rows = zip(*values, strict=True)
    return Table(((f"{path}, row {number}", row) for number, row in enumerate(rows, 1)), names)


def read_hub_table(table: Any, columns: Sequence[str], where: str) -> Table:
    """The columns of a split as `datasets` has it."""
    check_columns(table.column_names, columns, where)
    rows = zip(*(table[name] for name in columns), strict=True)
    names = getattr(table.features[columns[-1]], "names", None)
    return Table(((f"row {number} of {where}", row) for number, row in enumerate(rows, 1)), names)


def check_columns(found: Sequence[str], wanted: Sequence[str], where: str) -> None:
    """Raise UserError unless each of the wanted columns is there, once."""
    for option, names in (("text", wanted[:-1]), ("label", wanted[-1:])):
        for name in names:
            if (count := found.count(name)) != 1:
                times = "no column" if count == 0 else f"{count} columns"
                raise UserError(
                    f"{where}: {times} {shown([name])} among {shown(found)}; "
                    f"name one with --{option}-column."
                )


def shown(names: Iterable[str]) -> str:
    """Names in a sentence; it stays a short one where a damaged file has thousands of them."""
    return textwrap.shorten(", ".join(map(repr, names)), 120, placeholder=" ...") or "nothing"
