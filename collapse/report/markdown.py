"""Markdown tables from a list of columns, each of which says where its value is and its format.

`table(columns, rows)` makes nearly every table of RESULTS.md, FINDINGS.md and README.md. To add a
column, add a `Column` to the list.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from collapse.measures.statistics import format_bounds, format_interval, format_spread

KeyPath = str | tuple[str, ...]
UNKNOWN = "n/a"


def at(record: Any, path: KeyPath) -> Any:
    """The value under a path of keys, such as "val.-1.accuracy"; None where a part is missing.

    `*` stands for every entry of a list or dict and gives a list; "" is the record itself. Keys
    that contain dots are given as a tuple.
    """
    keys = path.split(".") if isinstance(path, str) and path else tuple(path)
    for depth, key in enumerate(keys):
        if record is None:
            return None
        if key == "*":
            entries = record.values() if isinstance(record, dict) else record
            return [at(entry, tuple(keys[depth + 1 :])) for entry in entries]
        record = record.get(key) if isinstance(record, dict) else record[int(key)]
    return record


def cell(value: Any, digits: int | str = 2, scale: float = 1.0, sign: str = "") -> str:
    """A value as a table shows it, by its type.

    digits: decimals of a number, or a format such as ".2g".
    A dict with `mean`, `low` and `high` is an interval and becomes `mean [low, high]` with signs,
    or its bounds alone where it has no key `mean`. A list has the values of several seeds and
    becomes `mean (lowest to highest)`. An int is a count. None, a mean of None, an empty list and a
    list with None become n/a.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        written = format_bounds if value.get("mean") is None else format_interval
        known = value.get("mean", value.get("low")) is not None
        return written(value, digits, scale, sign or "+") if known else UNKNOWN
    if isinstance(value, list):
        known = value and None not in value
        return format_spread(value, digits, scale, sign) if known else UNKNOWN
    if value is None:
        return UNKNOWN
    if isinstance(digits, str):
        return f"{scale * value:{digits}}"
    return f"{value:,}" if isinstance(value, int) else f"{scale * value:{sign}.{digits}f}"


@dataclass(frozen=True)
class Column:
    """A column: its title, and where each row has its value, by a path (see `at`) or a function.

    `digits`, `scale` (100 for %) and `sign` ("+" for differences) are arguments of `cell`.
    """

    title: str
    value: KeyPath | Callable[[Any], Any]
    digits: int | str = 2
    scale: float = 1.0
    sign: str = ""

    def cell(self, row: Any) -> str:
        value = self.value(row) if callable(self.value) else at(row, self.value)
        return cell(value, self.digits, self.scale, self.sign)


def plain(*titles: str) -> list[Column]:
    """Columns whose values have the title as their key, with _ for spaces."""
    return [Column(title, (title.replace(" ", "_"),)) for title in titles]


def table(
    columns: Sequence[Column], rows: Iterable[Any], numbers: bool = True, hide_unknown: bool = False
) -> str:
    """A Markdown table of rows.

    numbers: align columns after the first to the right. hide_unknown: leave out columns that are
    n/a in every row.
    """
    lines = [[column.cell(row) for column in columns] for row in rows]
    shown = range(len(columns))
    if hide_unknown:
        shown = [number for number in shown if any(line[number] != UNKNOWN for line in lines)]
    lines = [[column.title for column in columns], *lines]
    head, *body = ("| " + " | ".join(line[number] for number in shown) + " |" for line in lines)
    rule = "|---" + ("|--:" if numbers else "|---") * (len(shown) - 1) + "|"
    return "\n".join((head, rule, *body))


def text_table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """The same table for the log, its columns aligned by spaces."""
    lines = [[column.title for column in columns]]
    lines += [[column.cell(row) for column in columns] for row in rows]
    widths = [max(map(len, entries)) for entries in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def rows_of(nested: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """A row for each innermost dict of nested dicts.

    A row has the dict's entries, and the keys that lead to it under these names.
    """
    rows = []
    for key, inner in nested.items():
        below = rows_of(inner, *names[1:]) if names[1:] else [inner or {}]
        rows += [row | {names[0]: key} for row in below]
    return rows


def merge_equal(counts: Sequence[str]) -> str:
    """Counts of several columns, as one where they are all equal."""
    return counts[0] if len(set(counts)) == 1 else ", ".join(counts)
