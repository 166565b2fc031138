"""sensitivity.py: the same rows read by other rules, on rows with a known answer."""

import math
from types import SimpleNamespace

import pytest
from test_collapse_threshold import run_of

from collapse.utils.files import write_json
from studies import benefit, sensitivity
from studies.report.page import results_page

RATES = (-4.0, -3.5, -3.0, -2.5)


def runs_of(accuracies, seed=0, arm="model1", ends=(40,) * 4):
    """One run a rate, chance .3."""
    pairs = zip(RATES, accuracies, ends, strict=True)
    return [run_of(arm, rate, seed, accuracy=a, end=end) for rate, a, end in pairs]


def test_a_stricter_line_takes_low_rates_from_an_arm_that_learns_slowly():
    """Model 2 learns little at low rates: half-way it is healthy at all four, at .9 at two."""
    runs = runs_of((0.9, 0.9, 0.9, 0.9), ends=(40, 40, 5, 5))
    runs += runs_of((0.65, 0.7, 0.9, 0.9), arm="model2")
    found = sensitivity.shifts_by_line(runs, RATES)
    number, highest = "by the number of healthy runs", "by the highest healthy rate"
    assert found["0.5"][number]["AG News"]["mean"] == pytest.approx(1.0)
    assert found["0.5"][number]["mean"]["at_the_top"] == 1
    assert found["0.9"][number]["AG News"]["mean"] == pytest.approx(0.0)
    assert found["0.9"][highest]["AG News"]["mean"] == pytest.approx(1.0)
    assert found["0.9"][number]["AG News"]["at_the_top"] == 0
    kept = sensitivity.good_by_rate(runs, "not collapsed")
    shifts = sensitivity.shifts(kept, sensitivity.threshold.threshold_of, RATES, "model2", "model1")
    assert shifts["mean"]["mean"] == pytest.approx(1.0) and shifts["mean"]["n"] == 1
    # A backbone that lacks a rate has no threshold.
    assert sensitivity.shifts(kept, min, (*RATES, -2.0), "model2", "model1")["mean"]["n"] == 0


def test_components_are_compared_where_losses_are_alike():
    """In run_of the loss is the accuracy: .9 and .85 are alike, .9 and .5 are not."""
    runs = []
    for seed in range(6):
        accuracy = 0.85 if seed < 5 else 0.5
        runs.append(run_of("model1", -3.0, seed, end=4, accuracy=0.9))
        runs.append(run_of("model2", -3.0, seed, end=36, accuracy=accuracy))
        runs.append(run_of("model1", -4.0, seed, end=30))  # nothing has collapsed
        runs.append(run_of("model2", -4.0, seed, end=36))
    (found,) = sensitivity.at_equal_loss(runs)
    assert (found["rate"], found["pairs"]) == (-3.0, 5)
    assert (found["model1"], found["model2"]) == pytest.approx((0.1, 0.9))


def test_ranks_are_read_where_the_loss_is_reached():
    def run(scale):
        path = [{"loss": loss, "effective_rank_within": scale * loss * 100} for loss in (1, 0.1)]
        return SimpleNamespace(path=path)

    runs = {("A", "model1", -3.0): {0: run(1), 1: run(1)}, ("A", "model2", -3.0): {0: run(2)}}
    study = benefit.Runs(runs, {("A", "model1"): -3.0, ("A", "model2"): -2.0})
    found = sensitivity.ranks_at_losses(study, ["A"])
    assert found["0.5"]["A"]["mean"] == pytest.approx(math.log(2)) and found["0.5"]["A"]["n"] == 1
    assert list(found) == ["0.5", "0.4", "0.3", "0.2"]


def test_what_is_left_is_read_at_whole_epochs_of_the_same_model():
    def run(*ends):
        times = ((0, 0.0), (25, 0.5), (50, 1.0), (100, 2.0))
        return SimpleNamespace(
            path=[
                {"step": step, "epoch": epoch, "dims_95pct": kept, "validation_accuracy": accuracy}
                for (step, epoch), (kept, accuracy) in zip(times, ends, strict=True)
            ]
        )

    start = (40, 0.2), (1, 0.1)  # the second, at half an epoch, is not shown
    runs = {0: run(*start, (20, 0.8), (8, 0.7)), 1: run(*start, (30, 0.6), (12, 0.5))}
    study = benefit.Runs({("A", "longer", -3.0): runs}, {("A", "model1"): -3.0})
    first, second = sensitivity.by_epoch(study, ("longer",))
    assert (first["epoch"], first["step"], first["backbones"], first["below"]) == (1, 50, 2, 0)
    assert (first["kept"], first["accuracy"]) == pytest.approx((0.625, 0.7))
    assert (second["kept"], second["accuracy"], second["below"]) == pytest.approx((0.25, 0.6, 1))


def test_tables_mark_bounds_and_few_backbones(tmp_path, monkeypatch):
    runs = runs_of((0.9,) * 4, ends=(40, 40, 5, 5)) + runs_of((0.9,) * 4, arm="model2")
    kept = sensitivity.good_by_rate(runs, "not collapsed")
    both = sensitivity.shifts(kept, sensitivity.threshold.threshold_of, RATES, "model2", "model1")
    none = {"mean": None, "n": 0}
    results = {
        "P2_by_line": sensitivity.shifts_by_line(runs, RATES),
        "collapse_alone": both,
        "shared_scale": {"model2 - shared-scale": both | {"mean": none}},
        "components_at_equal_loss": [],
        "P5_at_losses": {"0.5": {"A": both["AG News"], "mean": none}},
        "gains_by_rate": {"A": {"-3": {"mean": 0.004, "n": 3}}},
        "by_epoch": [],
    }
    monkeypatch.setattr(sensitivity, "OUTPUT", tmp_path / "results.json")
    write_json(tmp_path / "results.json", results)
    text = results_page().text
    assert "| collapse alone |  | ≥ +1.00 (n = 1) |" in text and "after 200 steps" in text
    assert "| n/a |" in text and "| A | +0.40 |" in text
