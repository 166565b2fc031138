"""Markdown tables: a list of columns says where a row holds a value and how it is written.

`table(columns, rows)` is every table of RESULTS.md, FINDINGS.md and README.md. One more `Column` in
its list is one more column.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from collapse.measures.statistics import format_bounds, format_interval, format_spread

KeyPath = str | tuple[str, ...]
UNKNOWN = "n/a"


def at(record: Any, path: KeyPath) -> Any:
    """The value under a path of keys, "val.-1.accuracy" say; None where a part is missing.

    `*` stands for every entry of a list or dict and gives a list; "" is the record itself. Keys
    that have dots of their own come as a tuple.
    """
    keys = path.split(".") if isinstance(path, str) and path else tuple(path)
    for place, key in enumerate(keys):
        if record is None:
            return None
        if key == "*":
            entries = record.values() if isinstance(record, dict) else record
            return [at(entry, tuple(keys[place + 1 :])) for entry in entries]
        record = record.get(key) if isinstance(record, dict) else record[int(key)]
    return record


def cell(value: Any, digits: int | str = 2, scale: float = 1.0, sign: str = "") -> str:
    """A value as a table shows it; its type decides how.

    digits: of a number, also a format such as ".2g".
    A dict with `mean`, `low` and `high` is an interval, `mean [low, high]` with signs, its bounds
    alone where it has no key `mean`; a list holds the values of several seeds, `mean (lowest to
    highest)`; an int is a count. n/a stands for None, a mean of None, and a list with nothing or
    None in it.
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
    """Its title, and the value of each row: a path (see `at`) or a function of the row.

    `digits`, `scale` (100 for %) and `sign` ("+" for differences) are those of `cell`.
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
    """Columns whose values stand under their titles, with _ for spaces."""
    return [Column(title, (title.replace(" ", "_"),)) for title in titles]


def table(
    columns: Sequence[Column], rows: Iterable[Any], numbers: bool = True, hide_unknown: bool = False
) -> str:
    """Columns after the first end at the right where they hold numbers.

    hide_unknown: leave out a column that is n/a in every row.
    """
    lines = [[column.cell(row) for column in columns] for row in rows]
    shown = range(len(columns))
    if hide_unknown:
        shown = [place for place in shown if any(line[place] != UNKNOWN for line in lines)]
    header = [columns[place].title for place in shown]
    return markdown(header, [[line[place] for place in shown] for line in lines], numbers)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A table of cells that are written already."""
    rule = "|---" + ("|--:" if numbers else "|---") * (len(header) - 1) + "|"
    head, *body = ("| " + " | ".join(line) + " |" for line in (header, *rows))
    return "\n".join((head, rule, *body))


def text_table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """The same for the log: columns stand below each other."""
    lines = [[column.title for column in columns]]
    lines += [[column.cell(row) for column in columns] for row in rows]
    widths = [max(map(len, entries)) for entries in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def rows_of(nested: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """A row for each innermost dict of nested ones: the keys that lead to it, under these names,
    and its entries.
    """
    rows = []
    for key, inner in nested.items():
        below = rows_of(inner, *names[1:]) if names[1:] else [inner or {}]
        rows += [row | {names[0]: key} for row in below]
    return rows


def merge_equal(counts: Sequence[str]) -> str:
    """Counts of several columns, told as one where they agree."""
    return counts[0] if len(set(counts)) == 1 else ", ".join(counts)
