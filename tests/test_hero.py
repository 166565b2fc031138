"""The figure that the documents begin with."""

import numpy as np
import pytest
from test_collapse_threshold import measured_run

from studies.report import hero


@pytest.fixture
def runs():
    """Three seeds at two rates; Model 1 falls at the higher one, kl is of no interest here."""
    kept = {("model1", -3.0): 0.5, ("model1", -2.0): 0.1, ("model2", -3.0): 0.8}
    kept |= {("model2", -2.0): 0.9, ("kl", -2.0): 1.0}
    runs = [
        measured_run([1.0, 1.0, k, k], arm, r, s) for (arm, r), k in kept.items() for s in "012"
    ]
    for run in runs:
        for record in run.path:
            record["validation_accuracy"] = 0.7 if run.trial.arm == "model1" else 0.6
    return runs


def test_a_line_goes_through_the_means_and_every_training_is_a_point(runs, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(hero, "save_figure", lambda figure, path: drawn.append(figure))
    hero.draw(tmp_path / "hero.png", "title", runs, -2.0, {-3.0: "the reference's rate"})
    kept, accuracy = drawn[0].axes
    lines = {tuple(np.round(line.get_ydata(), 6)) for line in kept.lines}
    assert {(50.0, 10.0), (80.0, 90.0)} <= lines and (100.0,) not in lines
    assert sum(len(line.get_ydata()) == 3 for line in kept.lines) == 4  # arms by rates
    texts = [text.get_text() for text in (*kept.texts, *accuracy.texts)]
    assert "10% against 90%" in texts and "70.0% against 60.0%" in texts
    named = {text.get_text(): text.xy for text in kept.texts if hasattr(text, "xy")}
    assert named["the reference's rate"][0] == 1e-3
    assert named["Model 1: Classification Only"] == (1e-3, 50.0)
    # where Model 1 has fallen, beside the band
    assert named["Model 2: Dual Head"] == (pytest.approx(10 ** (-2 + hero.BAND)), 90.0)
