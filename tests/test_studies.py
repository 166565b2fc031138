"""The studies: the yardstick measures the same model, and the documents say what the JSON says."""

import json
import subprocess

import findings
import numpy as np
import pytest
import throughput
import torch
from conftest import random_split, tiny_config, tiny_model

import common


@pytest.mark.parametrize("number", [1, 2, 3])
def test_both_recipes_compute_the_same_losses_and_gradients(number):
    split, rows, found = random_split(), np.arange(11), {}
    for recipe in ("conventional", "ours"):
        trainer = throughput.trainer_class(number, recipe)(tiny_model(number), split, tiny_config())
        sums = trainer.accumulate_gradients(rows)
        found[recipe] = sums.cls_loss, sums.lm_loss, [p.grad for p in trainer.model.parameters()]
        length = trainer.collate(rows[:2]).input_ids.shape[1]
        assert length == (12 if recipe == "conventional" else max(len(split.token_ids[i]) for i in rows[:2]))
    assert found["ours"][:2] == pytest.approx(found["conventional"][:2], rel=1e-5)
    for ours, conventional in zip(found["ours"][2], found["conventional"][2], strict=True):
        torch.testing.assert_close(ours, conventional, atol=1e-6, rtol=1e-4)


def test_throughput_measures_all_models(tmp_path):
    config, split = throughput.Config(rounds=2, steps=2), random_split(rows=60)
    for number in (1, 2, 3):
        found = throughput.measure(number, split, tiny_config(), config)
        assert found["lowest_ratio"] <= found["ratio"] <= found["highest_ratio"]
        assert all(rate > 0 for rate in found["examples_per_second"].values())


@pytest.mark.parametrize("name", findings.DOCUMENTS)
def test_the_tables_of_the_documents_are_those_of_the_json(name):
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.json"], cwd=common.ROOT, check=False).returncode
    if changed == 1:
        pytest.skip("results are a run of your own, not the published ones; `make findings` fills the tables from them")
    text = (common.ROOT / name).read_text()
    assert findings.BLOCK.search(text), f"{name} has no marked table"
    assert findings.fill(text) == text, "run `make findings`"


def test_a_table_follows_its_json(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    (tmp_path / "some").mkdir()
    run = {
        "parameters": {"trainable": 5},
        "seconds": 600,
        "final": {"accuracy": 0.5},
        "best": {"accuracy": 0.75},
        "git_commit": "c0ffee",
    }
    run["hardware"] = {"device": "abacus", "threads": 1}
    data = {"name": "Data", "train_rows": 4, "validation_rows": 4}
    results = {"settings": {"data": data, "config": {"epochs": 1}}, "models": {"model1": {"7": run}}}
    (tmp_path / "some/results.json").write_text(json.dumps(results))
    text = "before\n<!-- begin some accuracy -->\nold\n<!-- end -->\nafter\n"
    filled = findings.fill(text)
    assert "| 1: Classification Only | 5 | 10 | 50.00 | n/a | 75.00 |" in filled and "old" not in filled
    assert filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter\n")
    assert "seeds 7" in filled and "`some/results.json`" in filled and "abacus" in filled
    assert findings.fill(filled) == filled
