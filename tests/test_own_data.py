"""Own labelled text: one command trains on it, and what reads a run needs no more than its folder.

Which rows a file gives is in test_labelled_text.py.
"""

import json
import os
import re
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, fails, start_script, without_times
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


@pytest.mark.parametrize("option", ["--output-dir=~/x", "--output-dir ~/x"])
def test_a_home_that_the_shell_left_is_expanded(option, tmp_path, monkeypatch, data_dir):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    start_script(experiment, f"--data-dir={data_dir} {option} {TINY} --models 1")
    assert (tmp_path / "home/x/results.json").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("option", ["--dataset", "--output-dir", "--data-dir"])
def test_a_path_that_is_no_utf_8_is_refused_before_a_training(option, tmp_path, capsys, data_dir):
    path = tmp_path / os.fsdecode(b"caf\xe9.csv")
    write_table(path, ROWS)
    line = f"--data-dir {data_dir} --output-dir {tmp_path / 'out'} {TINY} {option}"
    assert "is not valid UTF-8: rename it" in fails(
        start_script, capsys, experiment, f"{line}={path}"
    )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(class names) gives the figure of some engrams, drawn; and the size of its PNG."""
    figures = []
    plane = SimpleNamespace(fit_transform=lambda engrams: engrams[:, :2])
    monkeypatch.setattr("sklearn.manifold.TSNE", lambda **_: plane)
    monkeypatch.setattr(plots, "k_means", lambda engrams, k, seed: np.arange(len(engrams)) % k)
    matched = {"mapping": list(range(3000))}
    monkeypatch.setattr(plots, "match_clusters", lambda *_: matched)
    monkeypatch.setattr(plots.plt, "close", figures.append)
    plots.LACKING.clear()

    def draw_classes(names):
        engrams = np.random.default_rng(0).normal(size=(max(12, len(names)), 4))
        labels = np.arange(len(engrams)) % len(names)
        file = tmp_path / "a.png"
        plots.plot_engram_clusters(file, "reviews", engrams, engrams, labels, names, 0)
        return figures[-1], struct.unpack(">II", file.read_bytes()[16:24])

    return draw_classes


NAMES = ("$x_{$", "$5 or $6 " + "a" * 10_000, "_", "__label__up", "_nolegend_", "a\nb", "plain")


def test_every_class_name_stands_in_the_legend_which_covers_no_panel(draw):
    figure, size = draw(NAMES)
    (legend,) = figure.legends
    shown = [text.get_text().strip() for text in legend.get_texts()]
    assert shown == [" ".join(name.split())[:40].replace("$", r"\$") for name in NAMES]
    box = legend.get_window_extent()
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)
    assert max(size) < 4000


@pytest.mark.parametrize("count", [2, 20, 21, 77, 2500])
def test_figures_of_many_classes_stay_small_and_show_every_row(draw, count):
    figure, size = draw([f"class {number}" for number in range(count)])
    assert max(size) < 4000 and len(figure.legends) == (count <= 20)
    for axis in figure.axes:
        assert sum(len(dots.get_offsets()) for dots in axis.collections) == min(
            2000, max(12, count)
        )
    assert (f"{count:,} classes" in figure.get_suptitle()) == (count > 20)


def test_characters_that_the_font_lacks_are_one_sentence(draw, capsys, recwarn):
    for _ in range(2):
        draw(["好评", "差评", "plain"])
    out = capsys.readouterr().out
    assert out.count("NOTE: figures show boxes for") == 1 and "评" in out
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


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
    gone = path.rename(trained.parent / "gone.csv")
    assert f"{path} is not there: give --dataset" in fails(start_script, capsys, analysis, line)
    start_script(analysis, f"{line} --fresh --dataset {gone}")
    again = json.loads((tmp_path / "effective_rank_results.json").read_text())
    assert without_times(again[name]["model1"]) == without_times(results[name]["model1"])
    write_table(path, ROWS[1:], COLUMNS)
    assert "holds other rows of reviews.csv" in fails(start_script, capsys, analysis, line)
    gone.rename(path)


def test_experiment_4_takes_the_new_place_of_a_model(trained, qwen, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rank_plots, "plot_all", lambda *_: None)
    folder = shutil.copytree(trained, tmp_path / "out")
    adapter = folder / "state/model1-seed42/final-adapter/adapter_config.json"
    adapter.write_text(adapter.read_text().replace(str(qwen), "/gone/tiny-qwen2"))
    line = f"--folders {folder} --output-dir {tmp_path} --device cpu --draws 5"
    error = fails(start_script, capsys, analysis, line)
    assert "/gone/tiny-qwen2 of the training is not there" in error and "--model FOLDER" in error
    start_script(analysis, f"{line} --model {qwen}")
    assert (tmp_path / "effective_rank_results.json").exists()
