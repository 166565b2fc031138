"""Labelled text of files and of the hub: its rows as they stand there, or one sentence."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from collapse.config import RunConfig, fingerprint
from collapse.data import custom
from collapse.data.custom import load_labelled_text
from collapse.data.registry import LOADERS, load_again, load_task
from collapse.data.task import Rows, Task, limit_task
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT, settings_difference

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


def write_table(path: Path, rows: list[tuple], header: tuple = ("text", "label")) -> Path:
    """Rows in the format of the suffix; texts without tabs and line ends suit all four."""
    if path.suffix == ".parquet":
        columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(columns), path, write_page_checksum=True)
    elif path.suffix == ".jsonl":
        lines = [
            json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) for row in rows
        ]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in (header, *rows)))
    else:
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])
        path.write_text(stream.getvalue())
    return path


def load(path, columns=("text",), label="label", train="train", validation=None) -> Task:
    return load_labelled_text(str(path), columns, label, train, validation)


def named(task: Task) -> list[tuple[str, str]]:
    """(text, class name) of all rows, those of training first."""
    return [
        (text, task.class_names[label])
        for rows in (task.train, task.validation)
        for text, label in zip(rows.texts, rows.labels, strict=True)
    ]


ROWS = [(f'row {i}, "é" null', ("neg", "pos", "NA")[i % 3]) for i in range(24)]


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_is_read_as_it_stands_and_a_tenth_of_its_rows_is_held_out(tmp_path, suffix):
    """ "NA" and "null" are words here, as any."""
    path = write_table(tmp_path / f"My reviews{suffix}", ROWS)
    task = load(path)
    assert sorted(named(task)) == sorted(ROWS) and len(task.validation) == 2
    assert task.class_names == ("NA", "neg", "pos")
    assert task.name == f"My reviews{suffix}" and task.folder == f"data-my-reviews-{suffix[1:]}"
    assert load(path).summary() == task.summary()


def test_copies_of_a_text_are_on_one_side(tmp_path):
    rows = [(f"text {i % 25}", str(i % 2)) for i in range(100)]
    task = load(write_table(tmp_path / "a.csv", rows))
    assert not set(task.train.texts) & set(task.validation.texts)
    assert len(set(task.validation.texts)) == 2 and len(task.validation) == 8


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_folder_holds_a_file_for_each_split(tmp_path, suffix):
    for split, rows in (("train", ROWS[:9]), ("test", ROWS[9:15]), ("dev", ROWS[15:])):
        write_table(tmp_path / f"{split}{suffix}", rows)
    (tmp_path / "notes.txt").touch()
    task = load(tmp_path)
    assert named(task) == ROWS[:9] + ROWS[15:]  # GLUE's test.tsv has no labels: dev comes first
    assert task.name == f"folder {tmp_path.name}"
    assert named(load(tmp_path, validation="test"))[9:] == ROWS[9:15]
    assert named(load(tmp_path, train="test"))[:6] == ROWS[9:15]
    write_table(tmp_path / f"validation{suffix}", ROWS[:2])
    assert named(load(tmp_path))[9:] == ROWS[:2]


def test_whole_numbers_are_classes_in_their_order(tmp_path):
    path = write_table(tmp_path / "a.jsonl", [(f"text {i}", (10, 9)[i % 2]) for i in range(8)])
    assert load(path).class_names == ("9", "10")


def test_columns_are_named_and_several_texts_joined(tmp_path):
    rows = [(f"title {i} ", " ", i % 2) if i else ("", "body", 1) for i in range(9)]
    path = write_table(tmp_path / "a.tsv", rows, ("title", "description", "kind"))
    task = load(path, ("title", "description"), "kind")
    assert {"title 1", "body"} <= {text for text, _ in named(task)}


def test_texts_with_line_ends_a_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "a.csv"
    content = '\ufefftext,label\r\n"two\r\nlines",a\r\n\r\n' + "x,a\r\ny,b\r\nz,b\r\n"
    path.write_bytes(content.encode())
    assert ("two\nlines", "a") in named(load(path)) and len(named(load(path))) == 4


@pytest.mark.parametrize("suffix", FORMATS)
def test_users_texts_are_copied_nowhere(tmp_path, suffix, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    load(write_table(tmp_path / f"a{suffix}", ROWS))
    assert not list((tmp_path / "temporary").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a{suffix}", "temporary"]


def compressed(kind: str, path: Path) -> None:
    content = path.read_bytes()
    if kind == "zip":
        with zipfile.ZipFile(f"{path}.zip", "w") as archive:
            archive.writestr(path.name, content)
            archive.writestr(f"__MACOSX/._{path.name}", b"\0\x05\x16\x07")  # as Finder does
    else:
        name = path if kind == "misnamed" else f"{path}.{kind}"
        compress = {"gz": gzip, "bz2": bz2, "xz": lzma, "misnamed": gzip}[kind].compress
        Path(name).write_bytes(compress(content))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip", "misnamed"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_compressed_files_are_read(tmp_path, suffix, kind):
    path = write_table(tmp_path / f"train{suffix}", ROWS)
    compressed(kind, path)
    if kind != "misnamed":
        path.unlink()
    (file,) = tmp_path.iterdir()
    assert sorted(named(load(file))) == sorted(ROWS)
    assert sorted(named(load(tmp_path))) == sorted(ROWS)


@pytest.mark.parametrize("name", ["a[1]*.csv", "a::b.csv", "train-?.csv", "ä 数据.csv"])
def test_names_that_mean_something_to_others_are_names(tmp_path, name):
    write_table(tmp_path / "a1.csv", [("another", "x")] * 4)
    assert sorted(named(load(write_table(tmp_path / name, ROWS)))) == sorted(ROWS)


@pytest.mark.parametrize("size", [140_000, 5_000_000])
def test_long_fields_are_read_whether_they_are_wanted_or_not(tmp_path, size):
    rows = [(text, "y" * size if not i else "", label) for i, (text, label) in enumerate(ROWS)]
    path = write_table(tmp_path / "a.csv", rows, ("text", "html", "label"))
    assert sorted(named(load(path))) == sorted(ROWS)
    assert any(len(text) >= size for text, _ in named(load(path, columns=("text", "html"))))


@pytest.mark.parametrize("mark", ["", "\ufeff", " \n"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read(tmp_path, indent, mark):
    records = [{"text": text, "label": label} for text, label in ROWS]
    (tmp_path / "a.json").write_text(mark + json.dumps(records, indent=indent))
    assert sorted(named(load(tmp_path / "a.json"))) == sorted(ROWS)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_strings_stay_what_they_are(tmp_path, suffix):
    """Also where others would see numbers, dates, or a missing value."""
    words = ("007", "7", "null", "NA", "true", "2020-01-01", "1e5", "1.0")
    path = tmp_path / f"a{suffix}"
    rows = [(word, word) for word in words for _ in range(3)]
    if suffix == ".json":
        path.write_text(json.dumps([{"text": text, "label": label} for text, label in rows]))
    else:
        write_table(path, rows)
    assert sorted(named(load(path))) == sorted(rows)


def test_numbers_and_words_may_share_a_column_of_json(tmp_path):
    labels = (7, "007", 8, 9.0)
    rows = [(f"t{i}", labels[i % 4]) for i in range(24)]
    found = set(named(load(write_table(tmp_path / "a.jsonl", rows))))
    assert {label for _, label in found} == {"7", "007", "8", "9"}


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int8", "uint64", "bool"])
def test_whole_numbers_of_every_type_are_labels(tmp_path, kind):
    labels = pyarrow.array([i % 2 for i in range(20)]).cast("uint8")
    labels = labels.cast("float32").cast(kind) if kind == "float16" else labels.cast(kind)
    table = pyarrow.table({"text": [f"t{i}" for i in range(20)], "label": labels})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    expected = ("False", "True") if kind == "bool" else ("0", "1")
    assert load(tmp_path / "a.parquet").class_names == expected


def test_floats_that_are_not_whole_are_refused(tmp_path):
    for label in (0.5, float("nan"), float("inf")):
        rows = [("x", 1.0), ("y", 0.0), ("z", label)] * 9
        with pytest.raises(UserError, match=r"row 3 of .*: the label is a float"):
            load(write_table(tmp_path / "a.parquet", rows))


def with_features(path: Path, columns: dict, features: dict) -> Path:
    """A Parquet file with what `datasets` stores of its features, fitting or not."""
    stored = json.dumps({"info": {"features": features}})
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": stored})
    pyarrow.parquet.write_table(table, path)
    return path


NAMES = {"names": ["bad", "good"], "_type": "ClassLabel"}
STRINGS = {"dtype": "string", "_type": "Value"}


@pytest.mark.parametrize(
    ("labels", "feature", "classes"),
    [
        ([0, 1], NAMES, ("bad", "good")),
        ([0.0, 1.0], NAMES, ("0", "1")),
        ([0, 4], NAMES, ("0", "4")),
        (["up", "down"], NAMES, ("down", "up")),
        ([0, 1], None, ("0", "1")),
        ([0, 1], STRINGS, ("0", "1")),
        ([0, 1], {"_type": "OfTomorrow"}, ("0", "1")),
    ],
)
def test_stored_names_are_used_where_they_fit(tmp_path, labels, feature, classes):
    columns = {"text": [f"t{i}" for i in range(8)], "label": labels * 4, "added": labels * 4}
    features = {"text": STRINGS, "gone": STRINGS} | ({"label": feature} if feature else {})
    path = with_features(tmp_path / "a.parquet", columns, features)
    assert load(path).class_names == classes
    if classes == ("bad", "good"):
        assert set(named(load(path))) == {(f"t{i}", classes[i % 2]) for i in range(8)}
    plain = tuple(sorted({str(int(x)) if isinstance(x, float) else str(x) for x in labels}))
    assert load(path, label="added").class_names == plain


# --- splits ---------------------------------------------------------------------------------------

SPLITS = ["validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing", "Val"]


@pytest.mark.parametrize("name", [*SPLITS, "my-val", "reviews.dev", "imdb_test"])
def test_the_split_to_validate_on_has_many_names(tmp_path, name):
    write_table(tmp_path / "train.csv", ROWS[:15])
    write_table(tmp_path / f"{name}.csv", ROWS[15:])
    task = load(tmp_path)
    assert named(task) == ROWS and task.origin["validation_split"] == name
    assert load_again(task.summary(), None) == task


def test_a_run_that_held_rows_out_finds_them_again_beside_a_split_that_came_later(tmp_path):
    write_table(tmp_path / "train.csv", ROWS)
    task = load(tmp_path)
    write_table(tmp_path / "val.csv", ROWS[:5])
    assert load_again(task.summary(), None) == task and load(tmp_path) != task


def test_of_several_the_one_made_for_it_is_taken_and_the_others_are_named(tmp_path, capsys):
    for name, rows in (("train", ROWS[:15]), ("test", ROWS[:9]), ("val", ROWS[15:])):
        write_table(tmp_path / f"{name}.csv", rows)
    write_table(tmp_path / "pretest.csv", ROWS)
    assert named(load(tmp_path)) == ROWS
    assert "neither trained nor validated on: 'pretest', 'test'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["id,text\n1,x\n", "text,label\nx,\ny,\n", "text\nx\n", "text,label\nx,-1\n"]
)
def test_a_test_split_without_labels_is_left_out_and_that_is_said(tmp_path, capsys, content):
    write_table(tmp_path / "train.csv", ROWS)
    (tmp_path / "test.csv").write_text(content)
    assert sorted(named(load(tmp_path))) == sorted(ROWS)
    assert "split test is skipped, it has no labels" in capsys.readouterr().out
    with pytest.raises(UserError, match="label"):
        load(tmp_path, validation="test")
    write_table(tmp_path / "dev.csv", ROWS[:5])
    assert named(load(tmp_path)) == ROWS + ROWS[:5]


@pytest.mark.parametrize("below", ["", "data"])
@pytest.mark.parametrize("tail", ["", "-0a1b2c"])
def test_shards_of_a_split_are_read_in_order_and_none_may_lack(tmp_path, below, tail):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    for number in range(3):
        rows = ROWS[5 * number : 5 * number + 5]
        write_table(folder / f"train-0000{number}-of-00003{tail}.parquet", rows)
    write_table(folder / f"test-00000-of-00001{tail}.parquet", ROWS[15:])
    assert named(load(tmp_path)) == ROWS
    (folder / f"train-00001-of-00003{tail}.parquet").unlink()
    with pytest.raises(UserError, match=r"for 3 file\(s\) of train: add the others"):
        load(tmp_path)


def test_a_folder_may_hold_a_folder_for_each_split(tmp_path):
    for split, rows in (("train", ROWS[:15]), ("val", ROWS[15:])):
        (tmp_path / split).mkdir()
        for part, some in ((0, rows[:4]), (1, rows[4:])):
            write_table(tmp_path / split / f"000{part}.parquet", some)
    assert named(load(tmp_path)) == ROWS


@pytest.mark.parametrize("header", ["text,label,", ",text,label", "n,n,text,label", "é,text,label"])
def test_columns_that_nobody_reads_may_have_any_name(tmp_path, header):
    columns = header.split(",")
    rows = [
        ("x", "", text, label) if header[0] == "n" else (text, label, "") for text, label in ROWS
    ]
    if header[0] in ",é":
        rows = [("1" if i % 2 else "x", *row) for i, row in enumerate(ROWS)]
    assert sorted(named(load(write_table(tmp_path / "a.csv", rows, columns)))) == sorted(ROWS)


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_strings_of_parquet_have_several_types(tmp_path, kind):
    table = pyarrow.table(dict(zip(("text", "label"), zip(*ROWS, strict=True), strict=True)))
    for place, name in enumerate(table.column_names):
        column = table[name]
        column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
        table = table.set_column(place, name, column)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert sorted(named(load(tmp_path / "a.parquet"))) == sorted(ROWS)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,a\ny\n", r"row 2 of .*a\.csv: the label is missing"),
        ("a.csv", "text,label\nx,a\ny,b,c\n", r"a\.csv, line 3: 3 columns where the header has 2"),
        ("a.csv", "text,label\nx,a\ny, z, w,b\ny, z, w,b\n", r"a\.csv, line 3: 4 columns where"),
        ("a.csv", "text,label,n\nx,a,1,,\n", r"a\.csv, line 2: 5 columns where the header has 3"),
        ("a.csv", 'text,label\n"x\ny",a\n"z,b\n', r"a\.csv, line 4: unexpected end"),
        ("a.csv", 'text,label\n"x"y,a\n', r"a\.csv, line 2: .*expected after"),
        ("a.csv", "text,label\nx,a\n \t,b\n", r"row 2 of .*a\.csv: the text is empty"),
        ("a.csv", "text,label\nx,a\ny, \n", r"row 2 of .*a\.csv: the label is empty"),
        (
            "a.csv",
            "text,label\nx," + "a" * 201,
            "row 1 of .*: the label has more than 200 characters",
        ),
        (
            "a.csv",
            "text;label\nx;a\n",
            r"line 1: no column 'text' among 'text;label'; .*--text",
        ),
        ("a.csv", "text,text,label\nx,y,a\n", r"line 1: 2 columns 'text'"),
        ("a.csv", "text,kind\nx,a\n", r"no column 'label' among 'text', 'kind'; .*--label-column"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "text,label\nx,a\ny,a\n", "have 1 different labels: two or more"),
        ("a.csv", "text,label\nx,a\ny,b\nz,c\n", "the 3 training rows .* have 3 different labels"),
        ("a.tsv", "text\tlabel\nx\ta\tb\n", r"a\.tsv, line 2: 3 columns"),
        (
            "a.jsonl",
            '{"text": "x", "label": 1}\n\n{"text": "y"\n',
            "line 3: expected one JSON object",
        ),
        ("a.jsonl", "[" * 100_000, "element 1: expected one JSON object"),
        (
            "a.json",
            '[{"text": "x", "label": 1}, 2]',
            r"a\.json, element 2: expected one JSON object",
        ),
        ("a.json", '[{"text": "x", "label": 1}, {}]', r"a\.json, element 2: no column 'text'"),
        ("a.json", '{"data": []}', r"a\.json, line 1: no column 'text' among 'data'"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"}\n', "line 2: no column 'label'"),
        ("a.jsonl", '{"text": "x", "label": null}', "line 1: the label is missing"),
        ("a.jsonl", '{"text": "x", "label": 0.5}', "line 1: the label is a float"),
        ("a.jsonl", f'{{"text": "x", "label": {"1" * 300}}}', "line 1: the label has more than"),
        ("a.jsonl", '{"text": 5, "label": 1}', "line 1: the text is a number or list"),
        ("a.jsonl", '{"text": "\\ud83d", "label": 1}', "line 1: an unpaired surrogate"),
        ("a.parquet", "PAR1", r"a\.parquet cannot be read as parquet"),
        ("a.txt", "x", r"a\.txt is none of \.csv"),
        ("a.txt.gz", "x", r"a\.txt\.gz is none of \.csv"),
        ("a.csv.zst", "\x28\udcb5\x2f\udcfd", r"a\.csv\.zst cannot be read as csv"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_row_or_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("cp1252", "WINDOWS-1252"),
        ("latin-1", "WINDOWS-1252"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-32", "UTF-32"),
    ],
)
def test_another_encoding_is_named_with_the_command_that_converts(tmp_path, suffix, encoding, said):
    path = write_table(tmp_path / f"a{suffix}", ROWS)
    path.write_bytes(path.read_text().replace("é", "caf\xe9").encode(encoding))
    with pytest.raises(UserError, match=rf"line \d: not UTF-8; .*`iconv -f {said} -t UTF-8 a\."):
        load(path)


def test_a_name_that_is_no_utf_8_is_refused_before_a_training(tmp_path):
    for name in (b"caf\xe9.csv", b"caf\xe9"):
        path = tmp_path / os.fsdecode(name)
        path.touch() if path.suffix else path.mkdir()
        with pytest.raises(UserError, match=r"not valid UTF-8: rename it") as refused:
            load(path)
        str(refused.value).encode()


def test_what_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "a.csv", tmp_path / "folder"):
        with pytest.raises(UserError, match="is not there: give --dataset"):
            load(path)
    with pytest.raises(UserError, match="has nothing for splits and no 'train'"):
        load(tmp_path)
    path = write_table(tmp_path / "train.csv", ROWS)
    with pytest.raises(
        UserError, match=r"has 'train' for splits and no 'test'.*--validation-split"
    ):
        load(path, validation="test")
    with pytest.raises(UserError, match="is the training split"):
        load(path, validation="train")
    with pytest.raises(UserError, match="--label-column text is one of --text-column"):
        load(path, label="text")
    write_table(tmp_path / "dev.tsv", [("x", "pos"), ("y", "neutral")])
    with pytest.raises(UserError, match=r"row 2 of .*dev\.tsv: no training row has .* 'neutral'"):
        load(tmp_path)
    write_table(tmp_path / "train.tsv", ROWS)
    with pytest.raises(UserError, match=r"holds train\.csv and train\.tsv for 1 file"):
        load(tmp_path)


# --- the hub --------------------------------------------------------------------------------------


class HubTable:
    """A split as `datasets` has it, as far as it is asked."""

    def __init__(self, names=None, **columns):
        self.columns, self.column_names = columns, list(columns)
        label = type("ClassLabel", (), {"names": names} if names else {})
        self.features = dict.fromkeys(columns, label)

    def __getitem__(self, name):
        return self.columns[name]


def test_a_hub_set_has_its_own_class_names_and_splits(monkeypatch):
    tables = {
        "train": HubTable(["no", "yes"], text=["a ", "b", "c"], label=[1, 0, 1]),
        "test": HubTable(["no", "yes"], text=["d"], label=[0]),
        "unlabelled": HubTable(["no", "yes"], text=["d"], label=[-1]),
    }
    asked = []
    monkeypatch.setattr(custom, "load_all_splits", lambda *name: asked.append(name) or tables)
    task = load("owner/name:part")
    assert asked == [("owner/name", "part")] and task.class_names == ("no", "yes")
    assert (task.train, task.validation) == (Rows(["a", "b", "c"], [1, 0, 1]), Rows(["d"], [0]))
    assert (task.name, task.folder) == ("owner/name:part", "data-owner-name-part")
    assert load_again(task.summary(), None) == task
    with pytest.raises(UserError, match=r"row 1 of the unlabelled split of .* label -1 is not one"):
        load("owner/name", validation="unlabelled")
    with pytest.raises(UserError, match=r"the train split of .*: no column 'sentence'"):
        load("owner/name", columns=("sentence",))
    tables.clear()
    with pytest.raises(UserError, match="has nothing for splits"):
        load("owner/name")


def test_a_set_that_nobody_has_is_refused(monkeypatch):
    monkeypatch.setattr(custom, "load_all_splits", lambda *name: None)
    with pytest.raises(
        UserError, match=r"--dataset nobody/has is none of SST-2, AG News, .*no file"
    ):
        load_task(RunConfig(dataset="nobody/has"))


# --- as a run's settings have it ------------------------------------------------------------------


def test_rows_are_found_again_from_what_a_run_keeps_and_changed_ones_refused(tmp_path):
    path = write_table(tmp_path / "a.csv", ROWS)
    task = load_task(RunConfig(dataset=str(path), train_limit=9))
    assert task.folder == "data-a-csv/limit-9-2"
    kept = json.loads(json.dumps(task.summary()))
    assert load_again(kept, None).summary() == task.summary()
    write_table(path, [(text, label.upper()) for text, label in ROWS])
    with pytest.raises(UserError, match=r"holds other rows of a\.csv than the models were"):
        load_again(kept, None)  # the same texts and numbers, other names
    write_table(path, [*ROWS[1:], ("row 0", "pos")])
    with pytest.raises(UserError, match="holds other rows"):
        load_again(kept, None)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.csv is not there"):
        load_again(kept, None)


def test_a_path_in_the_repository_is_kept_relative_to_it_and_no_part_of_the_study(tmp_path):
    task = limit_task(load(write_table(tmp_path / "a.csv", ROWS)), 9, None)
    here = {"config": {}, "data": task.summary()}
    (tmp_path / "b").mkdir()
    moved = limit_task(load((tmp_path / "a.csv").rename(tmp_path / "b/a.csv")), 9, None)
    there = {"config": {}, "data": moved.summary()}
    assert here != there and settings_difference(there, here) is None
    inside = custom.path_in_origin(ROOT / "data" / "a.csv")
    assert inside == "./data/a.csv"
    assert custom.dataset_of_origin(inside) == str(ROOT / "data" / "a.csv")
    assert custom.dataset_of_origin("owner/name") == "owner/name"


def test_settings_of_a_file_change_no_fingerprint_and_suit_no_set_by_name():
    added = {"dataset", "text_column", "label_column", "train_split", "validation_split"}
    assert not added & fingerprint(RunConfig()).keys()
    for name in LOADERS:
        with pytest.raises(UserError, match="--label-column is for files and hub sets"):
            load_task(RunConfig(dataset=name, label_column="kind"))


# --- damage ---------------------------------------------------------------------------------------


def change_row(change: Callable[[list], None], header=("text", "label")):
    """A damage that changes one of the rows and writes the file anew."""

    def damaged(path: Path, rng: np.random.Generator) -> None:
        rows = [list(row) for row in ROWS]
        change(rows[rng.integers(len(rows))])
        write_table(path, rows, header)

    return damaged


def change_bytes(change: Callable[[bytearray, int, np.random.Generator], None]):
    """A damage of the file's bytes at a random place."""

    def damaged(path: Path, rng: np.random.Generator) -> None:
        content = bytearray(path.read_bytes())
        change(content, int(rng.integers(len(content))), rng)
        path.write_bytes(content)

    return damaged


def change_lines(change: Callable[[list[bytes], int], None]):
    def damaged(path: Path, rng: np.random.Generator) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        change(lines, int(rng.integers(len(lines))))
        path.write_bytes(b"".join(lines))

    return damaged


def flip(content, place, rng):
    content[place] ^= 1 << int(rng.integers(8))


def other_byte(content, place, rng):
    content[place] = int(rng.integers(256))


def drop_quote(content, place, rng):
    if (found := content.find(b'"', place)) >= 0:
        del content[found]


DAMAGES = {
    "a flipped bit": change_bytes(flip),
    "another byte": change_bytes(other_byte),
    "cut short": change_bytes(lambda content, place, rng: content.__delitem__(slice(place, None))),
    "a piece gone": change_bytes(
        lambda content, place, rng: content.__delitem__(slice(place, place + int(rng.integers(60))))
    ),
    "a quote more": change_bytes(lambda content, place, rng: content.insert(place, ord('"'))),
    "a quote less": change_bytes(drop_quote),
    "not UTF-8": change_bytes(lambda content, place, rng: content.insert(place, 0xFF)),
    "a line gone": change_lines(lambda lines, place: lines.pop(place)),
    "a line twice": change_lines(lambda lines, place: lines.insert(place, lines[place])),
    "lines joined": change_lines(
        lambda lines, place: lines.__setitem__(place, lines[place].rstrip(b"\r\n"))
    ),
    "UTF-16": lambda path, rng: path.write_bytes(
        path.read_bytes().decode("latin-1").encode("utf-16")
    ),
    "an empty text": change_row(lambda row: row.__setitem__(0, " ")),
    "an empty label": change_row(lambda row: row.__setitem__(1, "")),
    "a huge text": change_row(lambda row: row.__setitem__(0, "x" * 140_000)),
    "a huge label": change_row(lambda row: row.__setitem__(1, "x" * 140_000)),
    "another header": change_row(lambda row: None, header=("Text", "label")),
    "columns swapped": change_row(lambda row: None, header=("label", "text")),
    "one class": lambda path, rng: write_table(path, [(text, "pos") for text, _ in ROWS]),
}
REFUSED = {"not UTF-8", "UTF-16", "an empty text", "an empty label", "a huge label"}
REFUSED |= {"another header", "columns swapped", "one class"}


def reference_rows(path: Path) -> list[tuple[str, str]] | None:
    """What a damaged file says, read another way; None where it says nothing clear.

    Of a Parquet file with checksums, nothing but what was written.
    """
    if path.suffix == ".parquet":
        return ROWS
    text = re.sub("\r\n?", "\n", path.read_bytes().decode()).removeprefix("\ufeff")
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
        return [(record["text"].strip(), str(record["label"]).strip()) for record in records]
    table, row, place = [], [], 0
    quoted = r'"(?:[^"]|"")*"|(?!")[^,\n]*' if path.suffix == ".csv" else r"[^\t\n]*"
    field = re.compile(f"({quoted})([,\t\n]|\\Z)")
    while place < len(text):
        if (found := field.match(text, place)) is None:
            return None
        value, place = found[1], found.end()
        if path.suffix == ".csv" and value.startswith('"'):
            value = value[1:-1].replace('""', '"')
        row.append(value)
        if found[2] in ("\n", ""):
            table, row = [*table, row] if row != [""] else table, []
    header = table[0]
    text_at, label_at = header.index("text"), header.index("label")
    return [(values[text_at].strip(), values[label_at].strip()) for values in table[1:]]


def try_damages(folder: Path, count: int, seed: int) -> Counter:
    """Damage files of every format so often, each time anew: (suffix, damage, outcome) -> times.

    Anything but UserError in one short line, or other rows than the file says, ends here.
    """
    rng, outcomes = np.random.default_rng(seed), Counter()
    wholes = {suffix: write_table(folder / f"whole{suffix}", ROWS) for suffix in FORMATS}
    wholes = {suffix: path.read_bytes() for suffix, path in wholes.items()}
    for number in range(count):
        suffix = FORMATS[number % len(FORMATS)]
        kind = list(DAMAGES)[number // len(FORMATS) % len(DAMAGES)]
        path = folder / f"damaged{suffix}"
        path.write_bytes(wholes[suffix])
        DAMAGES[kind](path, rng)
        try:
            task = load(path)
        except UserError as error:
            sentence = str(error)
            assert "\n" not in sentence and len(sentence) < 500, (suffix, kind, sentence)
            assert path.name in sentence, (suffix, kind, sentence)
            assert path.read_bytes() != wholes[suffix], f"{suffix} is whole and refused: {sentence}"
            outcomes[suffix, kind, "refused"] += 1
            continue
        assert kind not in REFUSED or path.read_bytes() == wholes[suffix], (suffix, kind)
        expected = reference_rows(path) if kind != "a huge text" else None
        if kind == "a huge text":
            assert max(map(len, task.train.texts + task.validation.texts)) == 140_000
        else:
            assert Counter(named(task)) == Counter(expected), (suffix, kind, path.read_bytes())
        outcomes[suffix, kind, "read"] += 1
    return outcomes


def test_a_damaged_file_is_refused_in_one_sentence_or_read_as_it_says(tmp_path):
    outcomes = try_damages(tmp_path, 5 * len(FORMATS) * len(DAMAGES), seed=0)
    refused = sum(times for (*_, outcome), times in outcomes.items() if outcome == "refused")
    assert 150 < refused < outcomes.total() - 50  # some damages leave a file that can be read
