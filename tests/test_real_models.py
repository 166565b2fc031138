"""The figure of real models in order of size."""

import numpy as np
import pytest
from test_collapse_threshold import measured_run

from collapse.measures.thresholds import Threshold
from studies.collapse_threshold import thresholds_by_components
from studies.report import real_models


def test_a_threshold_lies_between_two_rates_or_points_beyond_them(monkeypatch, tmp_path):
    kept = {("model1", -3.0): 0.9, ("model1", -2.0): 0.1, ("model2", -3.0): 0.9}
    kept |= {("model2", -2.0): 0.9, ("kl", -3.0): 0.1}  # Model 2 is kept at both, kl is left out
    runs = [measured_run([1.0, 1.0, k, k], arm, rate, "0") for (arm, rate), k in kept.items()]
    drawn = []
    monkeypatch.setattr(real_models, "save_figure", lambda figure, path: drawn.append(figure))
    thresholds = thresholds_by_components(runs, ())
    real_models.draw(tmp_path / "x.png", {"one model": thresholds}, {"one model": -2.25})
    axis = drawn[0].axes[0]
    points = {
        line.get_marker(): line.get_ydata() for line in axis.lines if len(line.get_xdata()) == 1
    }
    assert points["o"][0] == pytest.approx(10**-2.5) and points["^"][0] == pytest.approx(1e-2)
    bars = [line.get_ydata() for line in axis.lines if line.get_linewidth() == 0.8]
    assert any(np.allclose(bar, [1e-3, 1e-2]) for bar in bars)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["one model"]
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend[2:] == ["predicted", "kept at every rate tried"]  # only kl collapsed at all
    (foretold,) = (line for line in axis.lines if line.get_label() == "predicted")
    assert foretold.get_ydata() == pytest.approx([10**-2.25] * 2)


def test_a_prediction_lies_on_the_line_in_the_logarithm_of_the_width_and_is_judged():
    def at(*values):
        return [Threshold(value - 0.15, value + 0.15) for value in values]

    predicted = real_models.predict(1000, {100: at(-1.0, -2.0), 10_000: at(-3.5)})
    assert predicted == pytest.approx(-2.5)
    assert "not all known" in real_models.compare(-2.5, at(-2.5))
    assert "not all known" in real_models.compare(-2.5, [*at(-2.5), Threshold(-2.5, np.inf)])
    told = real_models.compare(-2.5, at(-2.9, -2.7))
    assert "3.2e-03 or more" in told and "1.6e-03" in told and "-0.30 decades" in told
    assert "prediction holds" in told
    assert "prediction fails" in real_models.compare(-2.5, at(-2.9, -2.9))
    assert "prediction is open" in real_models.compare(-2.5, at(-2.1, -2.1))


def test_a_long_run_is_judged_by_the_threshold_that_time_leaves():
    known = [Threshold(-2.5, -2.0), Threshold(-3.0, -2.5)]  # in the mean 10^-2.5 after 150 steps

    def judge(slope, *counts):
        path = [{"step": 500 * k, "dims_95pct": count} for k, count in enumerate(counts)]
        return real_models.judge_long_run(known, slope, 1e-3, 1500, path)

    fallen, kept = (100, 60, 30, 20, 90), (100, 20, 30, 25, 10)  # what comes after does not count
    told = judge(-1.0, *fallen)  # ten times the steps: a threshold of 10^-3.5
    assert "threshold is 3.2e-04, so a rate of 1e-03 has collapsed" in told
    assert "20 components, 100 before, 20 at the fewest" in told and told.endswith(
        "collapsed, as predicted."
    )
    assert judge(-1.0, *kept).endswith("has not collapsed, so the prediction fails.")
    told = judge(-0.2, *kept)
    assert "has not collapsed. Found" in told and told.endswith("not collapsed, as predicted.")
    assert judge(-0.2, *fallen).endswith("has collapsed, so the prediction fails.")
    assert judge(-1.0, 100, 20, 20, 90).endswith("has collapsed, as predicted.")  # two in a row
    assert judge(-1.0, 100, 90, None, 90).endswith("has collapsed, as predicted.")
    assert judge(-1.0, 100, 60, 20).endswith("not come that far.")
