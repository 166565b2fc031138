"""Tables of rate, time and real models: P6 to P8 as a family, bounds marked as such."""

import dataclasses
import math

import pytest
from test_collapse_threshold import GRID, planted
from test_collapse_time import tables  # noqa: F401  # a fixture

from collapse.measures.statistics import differences_interval
from collapse.measures.verdicts import holm
from collapse.utils.files import write_json
from studies import collapse_threshold
from studies.report import own_models, thresholds
from studies.report.page import results_page
from studies.shared import sweep

LATER = own_models.LATER_ENDPOINTS


@pytest.fixture
def published(tables, tmp_path, monkeypatch):  # noqa: F811
    """The study of time with a drift that the LM loss stops; P8's model with four seeds of five."""
    at = {("model1", seed): (-3.4, -3.1)[seed % 2] for seed in range(4)}
    at |= {("model2", seed): 0.0 for seed in range(4)}
    qwen = dataclasses.replace(own_models.QWEN, output_dir=tmp_path / "real")
    components = collapse_threshold.by_components(planted(at), GRID)
    results = {"by_components": {"AG News": components}, "arms": []}
    qwen.folder.mkdir(parents=True)
    write_json(qwen.folder / "results.json", results)
    monkeypatch.setattr(own_models, "TIME", tables)
    monkeypatch.setattr(own_models, "QWEN", qwen)
    monkeypatch.setattr(own_models, "REAL_MODELS", (qwen,))
    monkeypatch.setattr(own_models, "source_of", lambda *_, **__: "Command.")
    own_models.collapse_time.STUDY.report(tables)
    return qwen


def test_three_endpoints_are_adjusted_together(published):
    found = own_models.endpoints(LATER)
    p_values = {name: result["p"] for name, result in found.items()}
    adjusted = holm(p_values | {"P8": 1.0})  # for the others, until all of its seeds have run
    adjusted["P8"] = holm(p_values)["P8"]
    assert {name: result["p_holm"] for name, result in found.items()} == pytest.approx(adjusted)
    assert found["P6"]["verdict"] == "supported" and found["P8"]["lower_bound"]
    assert not found["P8"]["done"]
    table = own_models.table_endpoints(LATER, "n")
    assert "≥ +" in table and "supported so far" in table and "Not run yet" not in table


def test_an_estimate_that_bounds_nothing_rejects_nothing():
    interval = differences_interval({0: 0.5, 1: 0.6, 2: 0.7})
    unbounded = sweep.endpoint(interval | {"bounded": False}, 0.25, True, 3)
    assert unbounded["verdict"] == "not decided" and own_models.p_of(unbounded) == 1.0
    below = differences_interval({0: -0.5, 1: -0.6, 2: -0.7}) | {"lower_bound": True}
    said = sweep.endpoint(below, 0.25, True, 3)
    assert said["verdict"] == "not decided" and own_models.p_of(said) == 1.0
    plain = sweep.endpoint(interval, 0.25, True, 3)
    assert own_models.p_of(plain) == plain["p"] < 0.05


def test_an_endpoint_without_any_slope_has_its_row(published, monkeypatch):
    results = dict(own_models.results_of(own_models.TIME))
    slopes = dict.fromkeys(range(200, 208), -0.8)
    nowhere = dict.fromkeys(slopes, (-math.inf, math.inf))
    results["P7"] = own_models.collapse_time.p7(own_models.TIME, slopes, nowhere)
    write_json(own_models.TIME.folder / "results.json", results)
    row = next(
        line for line in own_models.table_endpoints(LATER, "n").splitlines() if "| P7" in line
    )
    assert "| n/a | n/a |" in row and "| not decided |" in row


def test_the_page_tells_thresholds_with_their_bounds(published):
    text = results_page().text.partition("## Rate, time")[2].partition("\n## ")[0]
    row = next(line for line in text.splitlines() if line.startswith("| model2"))
    assert "| ≥ 3.2e-02 |" in row and "after 6400" in text
    row = next(line for line in text.splitlines() if line.startswith("| model1"))
    cells = [cell.strip() for cell in row.split("|")]
    assert float(cells[10]) == pytest.approx(10 ** (-2.4 - 0.8 * math.log10(32)), rel=0.35)
    assert "≥ 1.6e-03, ≥ 1.6e-03" in text and "came back" in text


def test_a_model_that_ran_at_one_rate_has_no_threshold_yet():
    components = collapse_threshold.by_components(planted({("model1", 0): -3.4})[:1], GRID)
    assert thresholds.table_real_model(components).endswith("\n\nNo threshold is known yet.")
