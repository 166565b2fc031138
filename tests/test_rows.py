"""Log probabilities of rows: temperature, what is stored, and intervals of losses from it."""

import itertools
import json

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from collapse.measures import predictions
from collapse.measures.statistics import crossed_interval
from collapse.utils.files import read_json, read_tensors, write_tensors

RNG = np.random.default_rng(0)


def calibrated(n=4000, classes=3, seed=0):
    """Logits (n, classes) and labels drawn from their softmax: the best temperature is 1."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, classes))
    p = np.exp(log_softmax(logits, axis=1))
    return logits, np.array([rng.choice(classes, p=row) for row in p])


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_scaling_of_calibrated_logits(factor):
    logits, labels = calibrated()
    assert predictions.fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.08)
    scaled = predictions.measure_rows(factor * logits, labels)["scaled"].double()
    plain = predictions.measure_rows(logits, labels)["log_probability"].double()
    assert scaled.mean().item() == pytest.approx(plain.mean().item(), abs=0.005)


def test_no_row_is_scaled_by_a_temperature_fitted_on_itself():
    """Other labels for one half change the other half's temperature and not its own."""
    logits, labels = calibrated(100)
    before = predictions.cross_fitted_temperatures(logits, labels)
    first = before == before[0]
    assert first.sum() == 50 and len(set(before)) == 2
    labels = np.where(first, (labels + 1) % 3, labels)
    after = predictions.cross_fitted_temperatures(logits, labels)
    assert np.array_equal(after[first], before[first])
    assert (after[~first] > before[~first]).all()


def test_rows_that_are_all_right_or_a_single_row_have_finite_numbers():
    found = predictions.unpack(
        predictions.measure_rows(np.array([[5.0, 0], [0, 5], [5, 0]]), np.array([0, 1, 0]))
    )
    assert found.correct.all() and (found.log_probability > -0.01).all()
    assert np.isfinite(found.scaled).all()
    one = predictions.unpack(predictions.measure_rows(np.array([[1e6, 0.0]]), np.array([1])))
    assert not one.correct.any() and np.isfinite(one.log_probability).all()
    assert np.array_equal(one.scaled, one.log_probability)


def finished(folder, model, seed, found):
    training = folder / "state" / f"{model}-seed{seed}"
    training.mkdir(parents=True)
    (training / "metrics.json").write_text("{}")
    for epoch in predictions.EPOCHS:
        write_tensors(predictions.file_of(training, epoch), found, {})


def test_published_rows_come_back(tmp_path):
    logits, labels = calibrated(2_000)
    for model, seed in itertools.product(("model1", "2@0.1"), (1, 2)):
        finished(tmp_path, model, seed, predictions.measure_rows(logits * seed, labels))
    predictions.publish_rows(tmp_path)
    found = predictions.read_rows(tmp_path)
    assert set(found) == {"2@0.1", "model1"}
    kept = found["model1"]["2"]["best"]
    expected = log_softmax(2 * logits, axis=1)[np.arange(2_000), labels]
    np.testing.assert_allclose(kept.log_probability, expected, rtol=1e-3, atol=1e-6)
    assert np.array_equal(kept.correct, logits.argmax(1) == labels)


def test_losses_of_two_models_are_compared_over_seeds_and_rows():
    def model(shift):
        return {
            str(seed): {
                "final": predictions.RowResults(
                    np.ones(50, bool), -shift - 0.1 * RNG.random(50), -2 * shift * np.ones(50)
                )
            }
            for seed in (1, 2, 3)
        }

    a, b = model(0.2), model(0.5)
    del b["3"]
    found = predictions.compare_losses({"model1": a, "model2": b}, "model1", "model2", "final")
    differences = [
        a[s]["final"].log_probability - b[s]["final"].log_probability for s in ("1", "2")
    ]
    assert found["cls_loss"] == crossed_interval(np.stack(differences))
    assert found["cls_loss"]["low"] > 0.2
    assert found["cls_loss_scaled"]["mean"] == pytest.approx(0.6)
    assert predictions.compare_losses({"model1": a}, "model1", "model2", "final") == {}
    assert predictions.compare_losses({"model1": a, "model2": b}, "model1", "model2", "best") == {}


def test_a_run_publishes_rows_that_give_its_accuracies_and_losses(undisturbed):
    results, found = read_json(undisturbed / "results.json"), predictions.read_rows(undisturbed)
    assert set(found) == {"model1", "model2", "model3"}
    for model, runs in results["models"].items():
        for seed, run in runs.items():
            for epoch in predictions.EPOCHS:
                record = run["val"][run[epoch]["epoch"] - 1]
                kept = found[model][seed][epoch]
                bits = "".join("01"[int(right)] for right in kept.correct)
                assert bits == run["correct"][f"{epoch}_cold"]
                loss = -kept.log_probability.mean()
                assert loss == pytest.approx(record["cls_loss"], rel=1e-3)
    comparison = results["comparisons"]["final"]["model2 - model1"]
    losses = [
        np.mean([run["val"][-1]["cls_loss"] for run in results["models"][m].values()])
        for m in ("model1", "model2")
    ]
    assert comparison["cls_loss"]["mean"] == pytest.approx(losses[1] - losses[0], abs=1e-3)
    assert comparison["cls_loss"]["low"] < comparison["cls_loss"]["high"]
    assert comparison["interval"]["n_seeds"] == 2 and comparison["interval"]["p"] is not None
    assert "cls_loss" not in results["comparisons"]["final"]["model3 carried - model3"]


def test_measuring_changes_nothing_and_measures_at_its_steps(run, undisturbed, tmp_path):
    folder = tmp_path / "measured"
    results = run("--seeds 1 --measure-every 3", folder)
    for model in ("model1", "model2", "model3"):
        place = f"state/{model}-seed1/final.safetensors"
        ours, theirs = read_tensors(folder / place)[0], read_tensors(undisturbed / place)[0]
        assert ours and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        log = (folder / f"state/{model}-seed1/metrics.jsonl").read_text().splitlines()
        lines = [line for line in map(json.loads, log) if "measured" in line]
        steps = [0, 3, 6, 9, 10]  # two epochs of five steps: the last is measured, too
        assert [line["step"] for line in lines] == steps
        path = [{"step": line["step"], **line["measured"]} for line in lines]
        assert results["models"][model]["1"]["measured"] == path
        names = {"effective_rank", "effective_rank_within", "effective_rank_without_first"}
        names |= {"stable_rank", "dims_95pct", "top10_variance", "cdnv"}
        names |= {"loss", "accuracy", "validation_accuracy", "rows"}
        assert lines[0]["measured"].keys() == names
        assert lines[1]["measured"].keys() == names | {"grad_norm"}
        plain = (undisturbed / f"state/{model}-seed1/metrics.jsonl").read_text().splitlines()
        assert [line for line in log if '"measured"' not in line] == plain
        first = json.loads(plain[0])["validation"]["effective_rank"]
        measured = lines[0]["measured"]["effective_rank"]
        assert measured == pytest.approx(first, rel=1e-5)  # 24 rows, all of them
    assert torch.is_inference_mode_enabled() is False
