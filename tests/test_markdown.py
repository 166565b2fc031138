"""The renderer of tables: the type of a value decides how its cell is written."""

import pytest

from collapse.report.markdown import UNKNOWN, Column, at, cell, merge_equal, plain, rows_of, table

INTERVAL = {"mean": 0.0123, "low": -0.01, "high": 0.02}


@pytest.mark.parametrize(
    ("value", "options", "shown"),
    [
        (0.5, (1, 100), "50.0"),
        (0.5, (1, 100, "+"), "+50.0"),
        (12345, (3,), "12,345"),  # a count has no digits
        (0.0423, (".1g",), "0.04"),
        (INTERVAL, (2, 100), "+1.23 [-1.00, +2.00]"),
        (INTERVAL | {"low": None}, (2, 100), "+1.23"),
        ({"low": -0.01, "high": 0.02}, (2, 100), "[-1.00, +2.00]"),
        ([0.1, 0.2, 0.3], (0, 100), "20 (10 to 30)"),
        ([0.1], (1,), "0.1"),
        ("as it is", (), "as it is"),
        (None, (), UNKNOWN),
        ({"mean": None}, (), UNKNOWN),
        ({"n": 0}, (), UNKNOWN),
        ([0.1, None], (), UNKNOWN),
        ([], (), UNKNOWN),
    ],
)
def test_a_cell(value, options, shown):
    assert cell(value, *options) == shown


def test_a_path_leads_to_a_value_or_to_none():
    record = {"runs": {"42": {"val": [{"loss": 2}, {"loss": 1}]}, "43": {"val": None}}, "a.b": 3}
    assert at(record, "runs.42.val.-1.loss") == 1
    assert at(record, "runs.*.val.0.loss") == [2, None]
    assert at(record, ("a.b",)) == 3 and at(record, "") is record
    assert at(record, "runs.44.val") is None


def test_a_table_has_a_row_for_each_innermost_dict():
    rows = rows_of({"A": {"one": {"n": 3, "rank": 1.5}, "two": None}}, "data", "arm")
    columns = [*plain("data", "arm", "n"), Column("rank", "rank", 1), Column("unused", "unused")]
    assert table(columns, rows, hide_unknown=True).splitlines() == [
        "| data | arm | n | rank |",
        "|---|--:|--:|--:|",
        "| A | one | 3 | 1.5 |",
        "| A | two | n/a | n/a |",
    ]
    assert table(columns, rows).startswith("| data | arm | n | rank | unused |")


def test_equal_counts_are_told_once():
    assert merge_equal(["20", "20"]) == "20" and merge_equal(["20", "19"]) == "20, 19"
