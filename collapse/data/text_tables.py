"""Reads columns of CSV, TSV, JSON and Parquet files and of hub tables; rows keep their place.

CSV and JSON are read by Python's own readers: where a column holds "007" and 7, `datasets` (5.2.0)
makes 7 of both, of "null" a missing value, and of dates points in time; and pandas, which reads CSV
for it, shifts columns without a word where rows have more of them than the header.
"""

import csv
import io
import json
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from collapse.data.task import decode_lines
from collapse.utils.errors import DISK_FULL, UserError

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")  # after one of SUFFIXES


class NoLabels(UserError):
    """A split without labels, such as a competition's test rows."""


class Table(NamedTuple):
    """The requested columns of one split: those of the texts, then that of the labels."""

    rows: list[tuple[str, Sequence[Any]]]  # place of a row, for messages, and its values
    class_names: list[str] | None  # names of whole-number labels, if the data has them


def file_type(path: Path) -> str:
    """The suffix that names a file's type, without that of a compression."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def read_file(path: Path, columns: Sequence[str]) -> Table:
    """The columns of a file, which may be compressed. Raises UserError when it cannot be read."""
    from datasets.utils.extract import Extractor

    with tempfile.TemporaryDirectory() as folder:
        file = path
        try:
            if compression := Extractor.infer_extractor_format(path):
                file = Path(folder, "rows")
                Extractor.extract(path, file, compression)
            if file.is_dir():  # of zip
                files = (inner for inner in file.rglob("*") if inner.is_file())
                # macOS adds a file of its own to each: __MACOSX/._NAME
                (file,) = (inner for inner in files if not inner.name.startswith("."))
            if file_type(path) == ".parquet":
                return read_parquet(file, columns, str(path))
            return parse_table(decode_lines(file.read_bytes(), path), columns, path)
        except Exception as error:  # each of these libraries has its own for bytes that are damaged
            disk_full = isinstance(error, OSError) and error.errno in DISK_FULL
            if disk_full or isinstance(error, UserError):
                raise
            reason = getattr(error, "strerror", None) or error.__cause__ or error
            reason = textwrap.shorten(str(reason), 200, placeholder=" ...")
            kind = file_type(path)[1:]
            raise UserError(
                f"{path} cannot be read as {kind} ({reason}): fix or replace it."
            ) from None


def parse_table(lines: Sequence[str], columns: Sequence[str], path: Path) -> Table:
    """The columns of a file of TEXT_SUFFIXES, given its lines."""
    read = read_json if file_type(path) in (".json", ".jsonl") else read_csv
    return read("\n".join(lines), columns, path)


def read_csv(text: str, columns: Sequence[str], path: Path) -> Table:
    """Rows of CSV (RFC 4180), or of TSV, where a quotation mark is part of the text, as in GLUE."""
    options = {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL}
    if file_type(path) == ".tsv":
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    csv.field_size_limit(sys.maxsize)
    reader, rows = csv.reader(io.StringIO(text), strict=True, **options), []
    # Without blank lines.
    records = (record for record in reader if len(record) > 1 or "".join(record).strip())
    try:
        if not (header := next(records, [])):
            raise UserError(f"{path} is empty: its first line names the columns.")
        check_columns(header, columns, f"{path}, line 1")
        for number, record in enumerate(records, 1):
            if len(record) > len(header):
                raise csv.Error(f"{len(record)} columns where the header has {len(header)}")
            values = dict(zip(header, record, strict=False))
            rows.append((f"row {number} of {path}", [values.get(name) for name in columns]))
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise UserError(f"{where}: {error}; fix or remove the line.") from None
    return Table(rows, None)


def read_json(text: str, columns: Sequence[str], path: Path) -> Table:
    """Rows of a file with a JSON object a line, or with one array of objects."""
    if text.lstrip().startswith("["):
        unit, records = "element", enumerate(parse_json(text) or [None], 1)
    else:
        lines = enumerate(text.split("\n"), 1)
        unit, records = (
            "line",
            ((number, parse_json(line)) for number, line in lines if line.strip()),
        )
    rows = []
    for number, record in records:
        where = f"{path}, {unit} {number}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected one JSON object; fix or remove the {unit}.")
        check_columns(list(record), columns, where)
        rows.append((where, [record[name] for name in columns]))
    return Table(rows, None)


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_parquet(file: Path, columns: Sequence[str], where: str) -> Table:
    """The columns of a Parquet file; page checksums are verified where it has them."""
    import pyarrow.parquet
    from datasets import Dataset

    check_columns(pyarrow.parquet.read_schema(file).names, columns, where)
    wanted = list(dict.fromkeys(columns))
    table = pyarrow.parquet.read_table(file, columns=wanted, page_checksum_verification=True)
    try:
        split = Dataset(table)
    except Exception:  # class names that it stores may be stale
        split = Dataset(table.replace_schema_metadata(None))
    return columns_of_split(split, columns, where)


def columns_of_split(table: Any, columns: Sequence[str], where: str) -> Table:
    """The requested columns of a split that `datasets` has loaded."""
    check_columns(table.column_names, columns, where)
    values = [table[name][:] for name in columns]
    names = getattr(table.features[columns[-1]], "names", None)
    if names and any(isinstance(label, int) and label >= len(names) for label in values[-1]):
        names = None  # stale names: another tool has changed the column
    rows = enumerate(zip(*values, strict=True), 1)
    return Table([(f"row {number} of {where}", row) for number, row in rows], names)


def check_columns(names_there: Sequence[str], wanted: Sequence[str], where: str) -> None:
    """Raise UserError unless each of the wanted columns is there exactly once.

    The last one holds labels, if there are several.
    """
    texts = max(1, len(wanted) - 1)
    for option, names in (("text", wanted[:texts]), ("label", wanted[texts:])):
        for name in names:
            if (count := names_there.count(name)) != 1:
                count_in_words = "no column" if count == 0 else f"{count} columns"
                error = NoLabels if (option, count) == ("label", 0) else UserError
                raise error(
                    f"{where}: {count_in_words} {quoted([name])} among {quoted(names_there)}; "
                    f"name one with --{option}-column."
                )


def quoted(names: Iterable[str]) -> str:
    """Names for a message, cut short: a damaged file may have thousands of them."""
    return textwrap.shorten(", ".join(map(repr, names)), 120, placeholder=" ...") or "nothing"
