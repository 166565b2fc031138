"""Own labelled text: one command trains on it, and what reads a run needs no more than its folder.

Which rows a file gives is in test_labelled_text.py.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, fails, start_script
from test_labelled_text import FORMATS, write_table

import effective_rank_analysis as analysis
import experiment
import experiment_7b
from collapse.report import plots, rank_plots
from collapse.utils.files import ROOT, read_json
from common import load_classifier

WORDS = {"good": "praise", "bad": "blame", "world": "neither $"}
ROWS = [(f"{word} word{i}", WORDS[word]) for i in range(20) for word in WORDS]
COLUMNS = ("review", "stars")
CLASSES = ("blame", "neither $", "praise")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_every_format_trains_by_one_command(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    path = write_table(tmp_path / f"reviews{suffix}", ROWS, ("review", "verdict"))
    columns = "--text-column review --label-column verdict"
    start_script(experiment, f"--dataset {path} {columns} {TINY} --models 1")
    results = read_json(tmp_path / f"results/data-reviews-{suffix[1:]}/results.json")
    data = results["settings"]["data"]
    assert (data["name"], data["train_rows"], data["validation_rows"]) == (path.name, 54, 6)
    assert tuple(data["class_names"]) == CLASSES and list(results["models"]) == ["model1"]


def test_class_names_that_look_like_formulas_can_be_drawn(tmp_path, monkeypatch):
    drawn = []
    plane = SimpleNamespace(fit_transform=lambda engrams: engrams[:, :2])
    monkeypatch.setattr(plots, "TSNE", lambda **_: plane)
    monkeypatch.setattr(plots, "write_file", lambda path, content: drawn.append(len(content)))
    engrams = np.random.default_rng(0).normal(size=(12, 4))
    labels = np.arange(12) % 2
    names = ("$x_{$", "$5 or $6 " + "a" * 10_000)
    plots.plot_engram_clusters(tmp_path / "a.png", "reviews", engrams, engrams, labels, names, 0)
    assert drawn[0] > 10_000


@pytest.fixture(scope="module")
def trained(qwen, tmp_path_factory):
    """A language model's results folder beside the CSV, trained by the command of the README."""
    top = tmp_path_factory.mktemp("own")
    path = write_table(top / "reviews.csv", ROWS, COLUMNS)
    readme = (ROOT / "README.md").read_text()
    line = re.search(r"experiment_7b\.py (.+--dataset reviews\.csv.+)", readme)[1]
    line = line.replace("smollm2-135m", str(qwen)).replace("reviews.csv", str(path))
    line += f" --output-dir {top / 'out'} --models 1 --epochs 1"
    line += " --batch-size 8 --max-length 12 --lora-rank 4 --classifier-size 10 --engram-size 6"
    start_script(experiment_7b, f"{line} --device cpu --workers 1")
    return top / "out"


def test_the_classifier_has_the_users_own_class_names(trained):
    classify = load_classifier(trained / "state/model1-seed42", device="cpu")
    assert classify.class_names == CLASSES and classify(["good word1"]).shape == (1, 3)


def test_experiment_4_needs_the_folder_alone_and_the_rows_where_they_were(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(rank_plots, "plot_all", lambda *_: None)
    line = f"--folders {trained} --output-dir {tmp_path} --device cpu --draws 5"
    start_script(analysis, line)
    results = json.loads((tmp_path / "effective_rank_results.json").read_text())
    (name,) = results
    assert name.startswith("reviews.csv, 54 training rows, tiny-qwen2")
    assert {"pretrained", "model1"} <= set(results[name]) and results[name]["num_samples"] == 6
    path = trained.parent / "reviews.csv"
    path.rename(trained.parent / "gone.csv")
    assert f"{path} is not there" in fails(start_script, capsys, analysis, line)
    write_table(path, ROWS[1:], COLUMNS)
    assert "holds other rows of reviews.csv" in fails(start_script, capsys, analysis, line)
