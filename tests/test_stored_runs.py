"""Runs that an earlier version left: this one loads, resumes and measures them to the same numbers.

What is stored is in tests/data/stored_runs, see the README.md there.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails, start_script

import effective_rank_analysis
import experiment
import experiment_7b
from collapse.data.sst2 import load_sst2
from collapse.report import rank_plots
from collapse.utils.files import read_json
from common import load_classifier

STORED = Path(__file__).parent / "data/stored_runs"
ALL = "--data-dir . --device cpu --workers 1 --epochs 2 --batch-size 8 --max-length 12 --seeds 1"
ALL += " --learning-rate 3e-3 --classifier-size 10 --engram-size 6"
SMALL = f"{ALL} --vocabulary-size 60 --hidden-size 8 --heads 2 --feed-forward-size 8"
TUNED = f"{ALL} --lora-rank 1"
# Results folder -> script and options that made it.
RUNS = {
    "small": (experiment, SMALL),
    "qwen2": (experiment_7b, f"{TUNED} --model tiny-qwen2 --quantization none"),
    "llama": (experiment_7b, f"{TUNED} --model tiny-llama --quantization none"),
    "nf4": (experiment_7b, f"{TUNED} --model tiny-qwen2 --quantization nf4 --models 2"),
}
OF_THE_MACHINE = {"seconds", "versions", "hardware", "git_commit", "made_from"}


def train(name: str) -> None:
    script, options = RUNS[name]
    start_script(script, f"{options} --output-dir {name}")


def analyse(names: list[str], folder: Path) -> None:
    options = f"--data-dir . --device cpu --draws 3 --output-dir {folder} --folders"
    start_script(effective_rank_analysis, " ".join([options, *names]))


@pytest.fixture
def stored(tmp_path, monkeypatch) -> Path:
    """A copy of what is stored, as the folder where commands start; dropout, whose numbers differ
    between builds of torch, is off as it was then.
    """
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    return tmp_path


def assert_same(found, expected, where="", **tolerance) -> None:
    """Equal but for rounding, and for what tells of machine and version; found may hold more."""
    if isinstance(expected, dict):
        for key in expected.keys() - OF_THE_MACHINE:
            assert key in found, f"{where}/{key} is gone"
            assert_same(found[key], expected[key], f"{where}/{key}", **tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}/{number}", **tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, **tolerance), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", ["qwen2", "llama", "nf4"])
def test_a_stored_classifier_gives_the_stored_probabilities(name, stored):
    task = load_sst2(stored)
    for folder in sorted((stored / name / "state").glob("model*")):
        for weights in ("best", "final") if folder.name == "model3-seed1" else ("final",):
            found = load_classifier(folder, weights, "cpu")(task.validation.texts)
            expected = read_json(stored / "probabilities.json")[f"{name} {folder.name} {weights}"]
            np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["small", "qwen2"])
def test_a_stored_checkpoint_goes_on_to_the_stored_end(name, stored):
    folder, published = stored / name / "state/model3-seed1", stored / name / "results.json"
    expected, before = read_json(folder / "metrics.json"), read_json(published)
    (folder / "metrics.json").unlink()
    (stored / f"{name}-after-first-epoch.safetensors").rename(folder / "training.safetensors")
    train(name)
    assert_same(read_json(folder / "metrics.json"), expected, rel=1e-4, abs=1e-6)
    assert_same(read_json(published), before, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_published_as_it_was(name, stored, capsys):
    before = read_json(stored / name / "results.json")
    (stored / name / "results.json").unlink()
    train(name)
    assert "epoch 1/2" not in capsys.readouterr().out  # nothing trained
    assert_same(read_json(stored / name / "results.json"), before, rel=1e-9)


def test_a_run_from_before_there_was_a_choice_of_pooling_has_the_mean(stored, capsys):
    for name in ("small", "qwen2"):
        script, options = RUNS[name]
        start = f"{options} --output-dir {name} --pooling last"
        error = fails(start_script, capsys, script, start)
        assert "another configuration (pooling is mean there and last here)" in error
        (stored / name / "state/settings.json").unlink()  # as in a fresh clone
        assert "pooling is mean there" in fails(start_script, capsys, script, start)


def test_experiment_4_measures_the_stored_numbers(stored, monkeypatch):
    monkeypatch.setattr(rank_plots, "plot_all", lambda *_: None)
    analyse(["small", "qwen2"], stored / "again")
    found = {
        f"{file.parent.name.rpartition('-')[2]} {file.stem}": read_json(file)
        for file in stored.glob("again/state/*/*.json")
    }
    expected = read_json(stored / "analysis.json")
    assert_same(found, expected, rel=1e-4, abs=1e-6)
