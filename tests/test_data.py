"""Loaders and batches: every row once, nothing swapped, bad input named by file and line."""

import hashlib
import io
import tarfile
import threading
import types

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import tiny_config

import common
import experiment
from collapse.data import registry
from collapse.data.batches import (
    Split,
    collate,
    encode_rows,
    length_grouped_batches,
    token_budget_batches,
)
from collapse.data.registry import MOVIE_SNIPPETS_ARCHIVE, load_ag_news, load_movie_snippets
from collapse.data.sst2 import load_sst2
from collapse.data.task import Rows, Task, check_task, limit_task
from collapse.utils import hub
from collapse.utils.errors import UserError
from collapse.utils.hub import _hub_answers


def write_sst2(folder, train="good\t1\nbad\t0\n", dev="fine\t1\n"):
    (folder / "SST-2").mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("dev", dev)):
        content = rows if isinstance(rows, bytes) else b"sentence\tlabel\n" + rows.encode()
        (folder / "SST-2" / f"{name}.tsv").write_bytes(content)
    return folder


def test_sst2_is_read_as_glue_ships_it(tmp_path):
    task = load_sst2(write_sst2(tmp_path, 'a "quoted " one \t1\nbad\t0\r\n'))
    assert task.train == Rows(['a "quoted " one', "bad"], [1, 0])
    assert task.validation == Rows(["fine"], [1]) and task.name == "SST-2" and task.folder == ""


def test_the_whole_of_sst2(shared_data):
    task = load_sst2(shared_data)
    assert (len(task.train), len(task.validation)) == (67_349, 872)
    assert (sum(task.train.labels), sum(task.validation.labels)) == (37_569, 444)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("good\t1\nbad\n", r"train\.tsv, line 3: 1 columns"),
        ("good\t1\tx\n", r"train\.tsv, line 2: 3 columns"),
        ("good\t1\n \t0\n", r"train\.tsv, line 3: the sentence is empty"),
        ("good\t2\n", r"train\.tsv, line 2: label '2' is not one of 0 to 1"),
        ("good\tx\n", r"train\.tsv, line 2: label 'x'"),
        (b"sentence\tlabel\ngood\t1\n\xff\xfe\t0\n", r"train\.tsv, line 3: not UTF-8"),
        ("", "training split of SST-2 .* is empty"),
        (b"good\t1\n", r"train\.tsv, line 1: not the header"),
        (b"", "training split of SST-2 .* is empty"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, train, message):
    with pytest.raises(UserError, match=message):
        load_sst2(write_sst2(tmp_path, train))


def write_ag_news(
    folder, train='"3","A title","A \\$5 story, ""quoted""."\n', test='"1","Other","News"\n'
):
    (folder / "ag_news_csv").mkdir()
    for name, text in (("train", train), ("test", test)):
        (folder / "ag_news_csv" / f"{name}.csv").write_bytes(
            text if isinstance(text, bytes) else text.encode()
        )
    return folder


def test_ag_news_is_read_as_its_authors_ship_it(tmp_path):
    task = load_ag_news(write_ag_news(tmp_path))
    assert task.train == Rows(['A title A \\$5 story, "quoted".'], [2])
    assert task.validation == Rows(["Other News"], [0])
    assert task.class_names == ("World", "Sports", "Business", "Sci/Tech")
    # not the official 120,000 rows: the name says so, and the results have a folder of their own
    assert task.name == "AG News, 1-row training subset" and task.folder == "subset-1"


def test_the_whole_training_split_of_ag_news_is_named_so(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "AG_NEWS_ROWS", 1)
    task = load_ag_news(write_ag_news(tmp_path))
    assert task.name == "AG News" and task.folder == ""


def test_ag_news_at_hand(shared_data):
    task = load_ag_news(shared_data)
    assert task.name == "AG News, 9,983-row training subset"
    assert (len(task.train), len(task.validation)) == (9983, 7600)
    assert np.bincount(task.validation.labels).tolist() == [1900] * 4


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ('"1","Title","Text"\n"2","Title"\n', "line 2: 2 columns"),
        ('"1","",""\n', "line 1: title and description are empty"),
        ('"5","Title","Text"\n', "line 1: label '5' is not one of 1 to 4"),
        ('"1","Title","Text"\n"1","Title","Te"xt"\n', "line 2: .*expected after"),
        (b'"1","Title","\xff"\n', "line 1: not UTF-8"),
        ("", "is empty"),
    ],
)
def test_a_bad_row_of_ag_news_is_named_by_file_and_line(tmp_path, train, message):
    with pytest.raises(UserError, match=message):
        load_ag_news(write_ag_news(tmp_path, train))


def test_a_data_dir_without_the_files_is_an_error_not_another_data_set(tmp_path):
    with pytest.raises(UserError, match=r"train\.tsv is not there: point --data-dir"):
        load_sst2(tmp_path)


def test_labels_out_of_range_from_any_source_are_refused():
    task = Task("x", "", "somewhere", ("a", "b"), Rows(["t"], [0]), Rows(["t", "u"], [1, -1]))
    with pytest.raises(UserError, match=r"row 2 of the validation split .* label -1"):
        check_task(task)


@pytest.mark.parametrize("answer", ["silent", "refusing", "failing", "answering"])
def test_a_hub_that_does_not_answer_costs_little(monkeypatch, answer):
    class Session:
        def head(self, url, timeout):
            if answer == "silent":
                threading.Event().wait(30)
            if answer == "refusing":
                raise ConnectionError("refused")
            return types.SimpleNamespace(status_code=503 if answer == "failing" else 200)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.2)
    assert _hub_answers() == (answer == "answering")


def snippets_archive(path, monkeypatch, table):
    def tar(name, content):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    inner = tar("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", table.encode())
    path.write_bytes(
        tar("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    )
    monkeypatch.setattr(
        registry, "MOVIE_SNIPPETS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()
    )
    return path


def test_movie_snippets_are_labelled_by_sign_and_split_by_text(tmp_path, monkeypatch):
    lines = [
        f"{i}\t{'-' if i % 4 == 3 else ''}{i % 5}.5\t{'bad' if i % 4 == 3 else 'good'} {i // 8}"
        for i in range(400)
    ]
    lines.append("400\t0.0\tneither")
    archive = snippets_archive(
        tmp_path / "package.tar.gz", monkeypatch, "\r\n".join(lines) + "\r\n"
    )
    task = load_movie_snippets(archive)
    assert len(task.train) + len(task.validation) == 400
    assert not set(task.train.texts) & set(
        task.validation.texts
    )  # every text stands twice or more, on one side
    assert 10 <= len(task.validation) <= 80
    for rows in (task.train, task.validation):
        assert [text.split()[0] for text in rows.texts] == [
            ("bad", "good")[label] for label in rows.labels
        ]
    assert task.folder == "movie-snippets"


def test_movie_snippets_missing_or_damaged(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="make data"):
        load_movie_snippets(tmp_path / "absent.tar.gz")
    archive = snippets_archive(tmp_path / "package.tar.gz", monkeypatch, "1\t1.0\tx\r\n")
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged"):
        load_movie_snippets(archive)


def test_the_real_movie_snippets():
    if not MOVIE_SNIPPETS_ARCHIVE.exists():
        pytest.skip("needs the movie-review snippets: `make data` fetches them")
    task = load_movie_snippets()
    assert (len(task.train), len(task.validation)) == (9_473, 1_095)
    assert sum(task.train.labels) + sum(task.validation.labels) == 5_242


def test_a_limited_task_is_a_fixed_draw_in_a_folder_of_its_own(tmp_path):
    rows = Rows([f"row {i}" for i in range(50)], [i % 2 for i in range(50)])
    task = Task("x", "", "somewhere", ("a", "b"), rows, rows)
    cut = limit_task(task, 10, 20)
    assert cut == limit_task(task, 10, 20) and cut.folder == "limit-10-20"
    assert len(set(cut.train.texts)) == 10 and len(cut.validation) == 20
    for text, label in zip(cut.train.texts, cut.train.labels, strict=True):
        assert label == int(text.split()[1]) % 2
    assert limit_task(task, 50, None) is task and limit_task(task, 99, 99) is task
    assert cut.summary()["sha256"] != task.summary()["sha256"]


def test_vocabulary_keeps_the_most_frequent_words_and_knows_unknown_ones():
    vocabulary = experiment.WordVocabulary(["The film, the end", "the film isn't"], size=5)
    assert vocabulary.ids == {"the": 2, "film": 3, ",": 4}  # ties in alphabetical order
    assert vocabulary.encode(["THE best film.", "-lrb- the"]) == [[2, 1, 3, 1], [1, 1, 1, 2]]


def test_encoding_cuts_long_rows_and_refuses_empty_ones():
    rows = Rows(["abc", "defgh"], [0, 1])
    split = encode_rows(
        rows, lambda texts: [[ord(c) for c in text] for text in texts], max_length=4
    )
    assert [ids.tolist() for ids in split.token_ids] == [[97, 98, 99], [100, 101, 102, 103]]
    with pytest.raises(UserError, match="'abc' has no token"):
        encode_rows(rows, lambda texts: [[] for _ in texts], max_length=4)


def test_collate_pads_to_the_longest_row_of_the_batch():
    split = Split(
        [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.arange(2, 12)], torch.tensor([0, 1, 1])
    )
    batch = collate(split, [1, 0], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[8, 0, 0], [5, 6, 7]] and batch.labels.tolist() == [1, 0]
    assert batch.text_mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.target_index.tolist() == [4, 5]


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 3333])
def test_length_grouped_batches_hold_every_row_once(rows):
    lengths = np.random.default_rng(0).integers(1, 60, rows)
    batches = length_grouped_batches(lengths, 16, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == list(range(rows))
    assert len(batches) == -(-rows // 16) and sum(len(batch) != 16 for batch in batches) <= 1


def test_length_grouped_batches_pad_little_and_pair_without_bias():
    lengths = np.random.default_rng(0).integers(1, 60, 6400)
    batches = length_grouped_batches(lengths, 16, np.random.default_rng(1))
    assert sum(len(b) * lengths[b].max() for b in batches) < 1.05 * lengths.sum()
    # model 3 pairs halves: the second must not be the longer one
    halves = [lengths[b[8:]].mean() - lengths[b[:8]].mean() for b in batches]
    assert abs(np.mean(halves)) < 3 * np.std(halves) / len(halves) ** 0.5 + 1e-9
    other = length_grouped_batches(lengths, 16, np.random.default_rng(2))
    assert not np.array_equal(batches[0], other[0])


def test_token_budget_batches_hold_every_row_once_within_the_budget():
    lengths = np.array([3, 60, 1, 7, 7, 30, 100])
    batches = token_budget_batches(lengths, 64)
    assert sorted(np.concatenate(batches)) == list(range(7))
    assert all(len(b) * lengths[b].max() <= 64 or len(b) == 1 for b in batches)


def test_settings_that_cannot_be_run_are_refused():
    with pytest.raises(UserError, match="--batch-size is 1: model 3 trains on pairs"):
        common.chosen_arms(tiny_config(batch_size=1))
    common.chosen_arms(tiny_config(batch_size=1, models=("1", "2")))
    bad = {
        "seeds": (),
        "models": (),
        "epochs": 0,
        "train_limit": 0,
        "batch_size": 0,
        "threads": 0,
        "workers": 0,
        "lm_weight": 1.0,
        "clip_norm": -1.0,
    }
    bad |= {
        "learning_rate": float("nan"),
        "warmup_fraction": 3.0,
        "heads": 3,
        "hidden_size": 15,
        "dropout": 2.0,
    }
    bad |= {"engram_size": 1, "vocabulary_size": 1}
    for name, value in bad.items():
        option = "hidden-size" if name == "heads" else name.replace("_", "-")
        with pytest.raises(UserError, match=f"--{option} is"):
            experiment.check_config(tiny_config(**{name: value}))
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match="--seeds is"):
            experiment.check_config(tiny_config(seeds=(1, seed)))
    experiment.check_config(tiny_config(lm_weight=0.0, batch_size=1, models=("1", "2")))
