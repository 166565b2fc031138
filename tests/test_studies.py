"""The studies: the yardstick measures the same model, and the documents say what the JSON says."""

import csv
import gc
import json
import math
import subprocess
import weakref
from pathlib import Path

import findings
import numpy as np
import pytest
import throughput
import torch
import transformers
from conftest import arm_of, random_split, tiny_config, tiny_model

import common
from collapse import rank_plots, records
from collapse.batches import Split, collate
from collapse.files import read_json
from collapse.language_models import add_lora
from collapse.memory import MemoryPlan
from collapse.reports import cross_dataset_table, study_name, summary_table, tidy_table
from collapse.settings import ROOT, LanguageModelConfig


def test_both_recipes_compute_the_same_losses_and_gradients(model_number):
    split, rows, found = random_split(), np.arange(11), {}
    for recipe in ("conventional", "ours"):
        trainer = throughput.make_trainer(
            model_number, recipe, tiny_model(model_number), split, tiny_config()
        )
        sums = trainer.accumulate_gradients(rows)
        found[recipe] = sums.cls_loss, sums.lm_loss, [p.grad for p in trainer.model.parameters()]
        length = trainer.collate(rows[:2]).input_ids.shape[1]
        assert length == (
            12 if recipe == "conventional" else max(len(split.token_ids[i]) for i in rows[:2])
        )
    assert found["ours"][:2] == pytest.approx(found["conventional"][:2], rel=1e-5)
    for ours, conventional in zip(found["ours"][2], found["conventional"][2], strict=True):
        torch.testing.assert_close(ours, conventional, atol=1e-6, rtol=1e-4)


@pytest.fixture
def miniature(model_number):
    """The tiny language model of the throughput study, without dropout."""
    torch.manual_seed(0)
    settings = LanguageModelConfig(
        lora_rank=4, classifier_size=16, engram_size=8, batch_size=16, max_length=20
    )
    causal_lm = throughput.random_language_model(
        throughput.TINY, torch.float32, torch.device("cpu")
    )
    adapters = add_lora(causal_lm, settings)
    for name, parameter in causal_lm.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model = common.wrap_causal_lm(
        adapters, arm_of(model_number), 2, "intermediate", settings
    ).eval()
    model.memory_plan = MemoryPlan(model, "auto")
    return model, settings


def test_all_recipes_compute_the_same_gradients_on_a_language_model(miniature, model_number):
    """Ours, padded with accumulation and checkpointing, and what transformers' Trainer is given."""
    model, settings = miniature
    split, rows, found = random_split(rows=16, longest=20, vocabulary=900), np.arange(16), {}
    for recipe in throughput.RECIPES:
        model.zero_grad()
        if recipe == "ecosystem":
            batch = collate(split, rows, torch.device("cpu"))
            throughput.EcosystemLoss(model, 0.5)(batch.input_ids, batch.text_mask, batch.labels)[
                "loss"
            ].backward()
        else:
            trainer = throughput.make_trainer(model_number, recipe, model, split, settings)
            assert trainer.micro_batch_size == (16 if recipe == "ours" else 8)
            trainer.accumulate_gradients(rows)
        found[recipe] = {name: p.grad.clone() for name, p in model.trainable().items()}
    for name, expected in found["conventional"].items():
        for recipe in ("ours", "ecosystem"):
            torch.testing.assert_close(found[recipe][name], expected, atol=1e-5, rtol=1e-3)


def test_throughput_measures_every_recipe(miniature, model_number, monkeypatch):
    model, settings = miniature
    accumulate, unpacked = common.Trainer.accumulate_gradients, {True: set(), False: set()}

    def seen(trainer, rows):
        if trainer.model is model:
            unpacked[isinstance(trainer, throughput.Conventional)].add(model.memory_plan.unpacked)
        return accumulate(trainer, rows)

    monkeypatch.setattr(common.Trainer, "accumulate_gradients", seen)
    config, split = (
        throughput.Config(rounds=2, steps=1),
        random_split(rows=48, longest=20, vocabulary=900),
    )
    rates = throughput.device_rates(torch.device("cpu"))
    found = throughput.measure(model_number, model, split, settings, config, rates)
    assert set(found["examples_per_second"]) == set(throughput.RECIPES)
    assert unpacked == {True: {0}, False: {2}} and (
        found["layers_unpacked"],
        found["micro_batch_size"],
    ) == (2, 16)
    assert all(rate > 0 for rate in found["examples_per_second"].values())
    assert all(
        ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in found["ratio"].values()
    )
    assert 0 < found["limit_share"] < 1 and found["binding_limit"] in ("bytes", "operations")
    small = throughput.measure(
        model_number, tiny_model(model_number), random_split(rows=60), tiny_config(), config, None
    )
    assert set(small["examples_per_second"]) == {"conventional", "ours"}
    hardware, data = {"device": "abacus", "threads": 1}, {"name": "Data"}
    results = {
        "tokens_per_row": 5.0,
        "hardware": hardware,
        "git_commit": None,
        "data": data,
        "settings": {"rounds": 2},
    }
    row = findings.table_throughput("some", results | {"model1": small}).splitlines()[2]
    assert row.split("|")[4].strip() == f"{small['ratio']['conventional']['median']:.1f}"


def test_the_limit_counts_weights_and_tokens(miniature, model_number):
    """Two batches of known length against a count by hand, one byte and operation a second."""
    model, _ = miniature
    split = Split([torch.arange(n) for n in (3, 5, 7, 9)], torch.zeros(4, dtype=torch.int64))
    rates = {"bytes": 1.0, "operations": 1.0}
    found = throughput.limit_seconds(
        model, model_number, [np.array([0, 1]), np.array([2, 3])], split, rates
    )
    layer = (
        2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    )  # q and o, k and v (two heads of 16), gate, up and down
    passes = 8 if model_number == 3 else 4
    head = 0 if model_number == 1 else 1000 * 64
    assert found["bytes"] == passes * (
        2 * layer // 2 + 4 * head
    )  # two layers, half a byte a weight; the head in fp32
    adapters = sum(p.numel() for name, p in model.trainable().items() if ".lora_" in name)
    frozen = sum(
        math.prod(getattr(p, "quant_state", p).shape)
        for p in model.backbone.layers.parameters()
        if not p.requires_grad
    )
    tokens = 24 + (4 if model_number == 3 else 0)
    assert found["operations"] == tokens * (4 * frozen + 6 * adapters) + 20 * 4 * head


def test_steps_on_paper_count_the_real_architecture(model_number):
    """Operations of one step against the parameters of Qwen2.5-7B's architecture, built without
    memory.
    """
    with torch.device("meta"):
        causal_lm = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen2Config(**throughput.QWEN)
        )
    assert causal_lm.num_parameters() == pytest.approx(7.6e9, rel=0.01)
    settings = LanguageModelConfig()
    weights = sum(p.numel() for p in causal_lm.model.layers.parameters() if p.ndim == 2)
    add_lora(causal_lm, settings)
    adapters = sum(p.numel() for name, p in causal_lm.named_parameters() if ".lora_" in name)
    assert adapters == pytest.approx(41e6, rel=0.02)  # as the reference reports
    lengths = np.array([5, 7, 8, 8])
    memory = {"memory_gib": 14, "typical": 200, "longest": 1000}
    found = throughput.count_step(lengths, "ours", model_number, settings, **memory)
    tokens = 4 * (9 if model_number == 3 else 8)
    head = 0 if model_number == 1 else 24 * 4 * causal_lm.lm_head.weight.numel()
    assert found["operations"] == pytest.approx(tokens * (4 * weights + 6 * adapters) + head)
    assert found["recomputed"] == 0
    long = throughput.count_step(np.full(16, 200), "ours", model_number, settings, **memory)
    assert 0 < long["recomputed"] <= 1 < long["seconds"] / found["seconds"]
    assert 0 < found["unpacked"] < 1
    roomy = throughput.count_step(
        lengths, "ours", model_number, settings, **memory | {"memory_gib": 80}
    )
    halves, head = (
        (2 if model_number == 3 else 1),
        0 if model_number == 1 else causal_lm.lm_head.weight.numel(),
    )
    assert roomy["unpacked"] == 1  # every weight is read as bfloat16, forward and backward
    elementwise = tokens * 28 * throughput.ELEMENTWISE_BYTES["ours"]
    assert roomy["bytes"] == pytest.approx(halves * (2 * 2 * weights + 2 * 2 * head) + elementwise)
    least_bytes = halves * (weights + 4 * head)  # half a byte a weight, twice
    least_operations = (28 + 4 * (model_number == 3)) * (4 * weights + 6 * adapters) + 4 * 24 * head
    least = max(
        least_bytes / throughput.RTX_4080["bytes"],
        least_operations / throughput.RTX_4080["operations"],
    )
    assert roomy["limit_share"] == pytest.approx(least / roomy["seconds"])
    conventional = throughput.count_step(lengths, "conventional", model_number, settings, **memory)
    assert conventional["operations"] > 128 / 8 * (found["operations"] - 24 * 4 * head)
    full = throughput.count_step(
        np.full(16, 8), "conventional", model_number, settings, **memory
    )  # two micro-batches of 8 x 128
    elementwise = 16 * (129 if model_number == 3 else 128) * 28 * (1 + 1 / 3)
    elementwise *= throughput.ELEMENTWISE_BYTES["conventional"]
    expected = 2 * halves * (3 * 4.52 * weights + 4 * head) + elementwise
    assert full["bytes"] == pytest.approx(expected)
    ecosystem = throughput.count_step(
        lengths, "ecosystem", model_number, settings, **memory
    )  # at 32 tokens most is fused
    again = ecosystem["bytes"] - tokens * 28 * (1 + 1 / 3) * throughput.ELEMENTWISE_BYTES["ours"]
    assert 4.52 * weights < again / halves - 4 * head < 2 * 4.52 * weights


def test_an_evaluation_on_paper_is_a_forward_pass_over_all_rows(model_number, monkeypatch):
    """On unpacked weights: two bytes a weight in each batch, a third of the elementwise work."""
    monkeypatch.setitem(throughput.EVALUATION_TOKENS, "cuda", 40)
    settings, lengths = LanguageModelConfig(), np.array([5, 5, 5, 5, 20])
    a = throughput.count_architecture(settings, model_number)
    found = throughput.count_evaluation(lengths, "ours", model_number, settings, unpacked=1.0)
    tokens = 40 + 5 * (model_number == 3)
    per_token = 28 * throughput.ELEMENTWISE_BYTES["ours"] / 3
    moved = 2 * (28 * 2 * a.layer + 2 * a.head) + tokens * per_token
    operations = 2 * tokens * (28 * a.layer + a.adapters) + 2 * a.head * 35
    card = throughput.RTX_4080
    assert found == pytest.approx(moved / card["bytes"] + operations / card["operations"])
    long = np.full(9, 400)  # each batch is long enough that packed weights are unpacked for it
    packed, plain = (
        throughput.count_evaluation(long, "ours", model_number, settings, unpacked)
        for unpacked in (0.0, 1.0)
    )
    saved = 9 * 28 * (4.52 - 2) * a.layer / card["bytes"]
    assert packed - plain == pytest.approx(saved)
    assert throughput.evaluation_passes(model_number, 3) == (7 if model_number == 3 else 4)


def test_the_random_model_is_what_a_real_nf4_model_is_to_peft(miniature, qwen, model_number):
    real = common.build_language_model(
        arm_of(model_number),
        2,
        "pooled",
        LanguageModelConfig(model=str(qwen), quantization="nf4", lora_rank=4),
        torch.device("cpu"),
    )
    kinds = [
        {(name.rpartition(".")[2], type(m)) for name, m in model.backbone.layers.named_modules()}
        for model in (miniature[0], real)
    ]
    wrappers = [{(n, kind) for n, kind in found if n.endswith("_proj")} for found in kinds]
    assert wrappers[0] == wrappers[1] and len(wrappers[0]) == 7


def test_a_random_model_fills_no_matrix_on_the_way(monkeypatch):
    """bitsandbytes would draw each in fp32 on the CPU before it is replaced: a minute at 7B."""
    drawn = []
    kaiming = torch.nn.init.kaiming_uniform_
    monkeypatch.setattr(
        torch.nn.init,
        "kaiming_uniform_",
        lambda tensor, **k: drawn.append(tensor.device) or kaiming(tensor, **k),
    )
    throughput.random_language_model(throughput.TINY, torch.float32, torch.device("cpu"))
    assert {device.type for device in drawn} <= {"meta"}


@pytest.mark.parametrize("failing", ["conventional", "ecosystem", "ours"])
def test_a_recipe_that_runs_out_of_memory_is_recorded_and_the_others_go_on(
    miniature, model_number, failing, monkeypatch, tmp_path
):
    model, settings = miniature
    seconds = throughput.ecosystem_seconds
    forward, now_running = model.forward, []

    def short_of_memory(*arguments):
        if now_running[-1] == failing:
            raise RuntimeError("CUDA error: out of memory")
        return forward(*arguments)

    monkeypatch.setattr(model, "forward", short_of_memory)
    make = throughput.make_trainer

    def making(number, recipe, *rest):
        now_running.append(recipe)
        return make(number, recipe, *rest)

    def ecosystem(*arguments):
        now_running.append("ecosystem")
        return seconds(*arguments)

    monkeypatch.setattr(throughput, "make_trainer", making)
    monkeypatch.setattr(throughput, "ecosystem_seconds", ecosystem)
    monkeypatch.setattr(throughput, "evaluation_rate", lambda *_: 1.0)
    split = random_split(rows=48, longest=20, vocabulary=900)
    config = throughput.Config(rounds=1, steps=1)
    rates = {"bytes": 1e9, "operations": 1e9}
    found = throughput.measure(model_number, model, split, settings, config, rates)
    assert found["out_of_memory"] == [failing] and now_running.count(failing) == 1
    assert set(found["examples_per_second"]) == set(throughput.RECIPES) - {failing}
    assert failing in throughput.describe(found)
    results = {f"model{model_number}": found, "tokens_per_row": 9.0}
    throughput.plot(tmp_path / "plot.png", {"data": results}, "title")


def test_recipes_never_hold_the_moments_of_two_optimizers(miniature, model_number, monkeypatch):
    model, settings = miniature
    alive, most = weakref.WeakSet(), []

    class Watched(torch.optim.AdamW):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            alive.add(self)

        def step(self, *arguments, **keywords):
            gc.collect()
            most.append(len(alive))
            return super().step(*arguments, **keywords)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    split = random_split(rows=48, longest=20, vocabulary=900)
    throughput.measure(
        model_number, model, split, settings, throughput.Config(rounds=1, steps=1), None
    )
    assert max(most) == 1


def test_the_cap_leaves_out_what_the_context_takes(monkeypatch):
    """A card of 16 GiB of which the context takes 0.4: torch may have 14.6 of 15."""
    gib, caps = 2**30, []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (15.6 * gib, 16 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
    throughput.cap_memory(15.0)
    assert caps == [pytest.approx(14.6 / 16)]


@pytest.mark.parametrize("name", findings.DOCUMENTS)
def test_the_tables_of_the_documents_are_those_of_the_json(name):
    changed = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", "*.json"], cwd=ROOT, check=False
    ).returncode
    if changed == 1:
        pytest.skip(
            "results are a run of your own, not the published ones; "
            "`make findings` fills the tables from them"
        )
    text = (ROOT / name).read_text()
    assert findings.BLOCK.search(text), f"{name} has no marked table"
    assert findings.fill(text) == text, "run `make findings`"


def test_a_table_follows_its_json(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "ROOT", tmp_path)
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
    results = {
        "settings": {"data": data, "config": {"epochs": 1}},
        "models": {"model1": {"7": run}},
    }
    (tmp_path / "some/results.json").write_text(json.dumps(results))
    text = "before\n<!-- begin some accuracy -->\nold\n<!-- end -->\nafter\n"
    filled = findings.fill(text)
    assert (
        "| 1: Classification Only | 5 | 10 | 50.00 | n/a | 75.00 |" in filled
        and "old" not in filled
    )
    assert filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter\n")
    assert "seed 7" in filled and "`some/results.json`" in filled and "abacus" in filled
    assert findings.fill(filled) == filled


def test_effects_are_those_of_the_json(tmp_path, monkeypatch):
    """Signs, pairs and seeds of the effects on the hypotheses, on numbers made by hand."""
    monkeypatch.setattr(findings, "ROOT", tmp_path)

    def run(cls_loss, trained, untrained):
        cluster = {"trained": {"ari": trained}, "untrained": {"ari": untrained}}
        return {"val": [{"cls_loss": cls_loss}], "train": [{"cls_loss": 0.1}], "cluster": cluster}

    difference = {"mean": 0.02, "low": 0.01, "high": 0.03, "n": 2}
    gains = {"here": difference, "there": difference | {"n": 3}, "more_here": difference}
    results = {
        "settings": {
            "data": {"name": "Data, in part", "train_rows": 1000},
            "config": {"model": "some/backbone"},
        },
        "models": {
            "model1": {"1": run(0.5, 0, 0), "2": run(0.7, 0, 0)},
            "model2": {"1": run(0.4, 0, 0), "2": run(0.4, 0, 0)},
            "model3": {"1": run(0, 0.75, 0.25), "2": run(0, 0.75, 0.25)},
        },
        "comparisons": {
            "final": {"model2 - model1": {"seeds": difference, "examples": difference}}
        },
        "cross_dataset": {
            "other": {"study": "Other, as large"},
            "comparisons": {"model2 - model1": gains},
        },
    }
    (tmp_path / "FINDINGS.md").write_text("<!-- begin results_b accuracy -->\n<!-- end -->\n")
    for folder in ("results_b", "results_b/of a user"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.json").write_text(json.dumps(results))
    change = {"effective_rank": {"mean": -3.0, "low": None, "high": None, "n": 1}}
    change |= {
        "cdnv": difference,
        "stable_rank": difference,
        "half": dict.fromkeys(records.HALVED, difference) | {"rows": 7},
    }
    study = {
        "settings": results["settings"],
        "changes": {"model1 - pretrained": change, "model2 - model1": change},
    }
    name = study_name(results["settings"])
    assert name == "Data, 1,000 training rows, backbone"
    table = findings.table_effects(tmp_path, {name: study})
    gain = "+2.00 [+1.00, +3.00] | [+1.00, +3.00]"
    assert f"| H1 | accuracy, points: model2 - model1 | {name} | 2 | {gain} |" in table
    assert f"nats: model2 - model1 | {name} | 2 | -0.200 [" in table  # -0.1 and -0.3
    assert f"| H2 | accuracy gain, points | {name}, less Other, as large | 2 and 3 | +2.00" in table
    assert f"| H3 | engram ARI: trained - untrained compressor | {name} | 2 | +0.500" in table
    rank = "-3.0 | +0.0 [+0.0, +0.0] at 7 rows"
    assert f"| H4 | effective rank: model1 - pretrained | {name} | 1 | {rank} |" in table
    assert table.count("H1") == 3  # nothing of a run that has no section in FINDINGS.md


def cells(table: str, *row: str) -> dict[str, str]:
    """Head -> cell of the one row of a table that holds these cells."""
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    (found,) = [line for line in lines if set(row) <= set(line)]
    return dict(zip(lines[0], found, strict=True))


def test_each_table_of_experiment_4_puts_each_number_below_its_head():
    keys = [
        "effective_rank",
        "effective_rank_share",
        "stable_rank",
        "participation_ratio",
        "participation_ratio_eigen",
    ]
    keys += ["dims_95pct", "cdnv", "accuracy"]
    inner = ["cdnv", "etf_error", "self_duality_error", "ncc_agreement"]

    origin = {"git_commit": "c0ffee0123456789", "hardware": {"device": "abacus", "threads": 2}}

    def record(base):
        found = {key: base + place for place, key in enumerate(keys)}
        found |= {
            "intermediate": {key: base + 20 + place for place, key in enumerate(inner)},
            "num_samples": 100,
        }
        found["layers"] = [{"effective_rank": base + rank} for rank in (7, 9, 3, 5)]
        halves = {
            key: [base * (2 + i) + draw for draw in (-1, 0, 1)]
            for i, key in enumerate(records.HALVED[:3])  # as older records have them
        }
        return (
            found
            | {
                "subsets": {"50": [base + 40 + draw for draw in (-1, 0, 1)]},
                "halves": {"rows": 50, **halves},
            }
            | origin
        )

    bases = {"pretrained": 100, "model1": 200, "model2": 300, "model3": 500}
    settings = {"config": {"model": "some/backbone"}}
    measured = {"weights": "final", "draws": 3, "rows": 2000}
    study = {
        "folder": "f",
        "settings": settings,
        "num_samples": 100,
        "measured": measured,
        "records": {key: {"1": record(base)} for key, base in bases.items()},
    }
    results = records.summarize({"S": study}, common.find_arm)
    assert "measured by commit c0ffee0123 on abacus, 2 threads" in findings.analysis_caption(
        "f", results
    )
    row = cells(findings.table_collapse("f", results), "Classification Only")
    heads = [
        "effective rank",
        "over N - 1",
        "stable rank",
        "participation ratio",
        "the same, eigenvalues",
    ]
    expected = ["200.0", "201.000", "202.0", "203.0", "204.0"]
    assert [row[head] for head in heads] == expected and row[
        "components for 95 % of variance"
    ] == "205"
    assert (row["rows"], row["seeds"], row["effective rank at 50 rows"]) == ("100", "1", "240.0")
    row = cells(findings.table_neural_collapse("f", results), "Dual Head")
    heads = [
        "NC1 cdnv, pooled",
        "NC1 cdnv, intermediate",
        "NC2 etf_error",
        "NC3 self_duality_error",
        "NC4 ncc_agreement",
    ]
    assert [float(row[head]) for head in [*heads, "accuracy"]] == [306, 320, 321, 322, 323, 307]
    row = cells(findings.table_depth("f", results), "Dual + Engram")
    assert list(row.values())[3:] == ["507.0", "503.0 at 2", "505.0"]
    for change, difference in (
        ("model1 - pretrained", 100),
        ("model3 - model1", 300),
        ("model3 - model2", 200),
    ):
        row = cells(findings.table_collapse_changes("f", results), change)
        assert row["half the rows"] == "50"
        for factor, number in ((2, "effective rank"), (3, "stable rank"), (4, "NC1 cdnv, pooled")):
            assert float(row[f"{number}, mean [95 % over seeds]"]) == difference
            over_rows = row[f"{number}, at half the rows [95 % over rows]"].split(" [")
            assert float(over_rows[0]) == factor * difference and len(over_rows) == 2


def test_each_table_of_a_training_puts_each_number_below_its_head():
    def run(base):
        train = {
            "accuracy": base / 1000,
            "cls_loss": base + 1,
            "lm_loss": base + 2,
            "grad_norm": base + 3,
        }
        val = {
            "accuracy": base / 500,
            "cls_loss": base + 4,
            "lm_loss": base + 5,
            "effective_rank": base + 6,
        }
        earlier = {"max_grad_norm": base + 9}
        names = ("trained", "chance", "untrained")
        cluster = {
            name: {
                "ari": base + 10 + i,
                "cluster_accuracy": (base + 13 + i) / 100,
                "purity": {"0": 0.25, "1": 0.75},
            }
            for i, name in enumerate(names)
        }
        cosines = {
            name: {"within": base + 16 + i, "between": base + 19 + i}
            for i, name in enumerate(names)
        }
        initial = {"effective_rank": base + 7}
        train = [train | earlier, train | {"max_grad_norm": base + 8}]
        return {
            "train": train,
            "val": [{}, val],
            "initial": initial,
            "cluster": cluster,
            "engram_cos": cosines,
        }

    interval = {"mean": 0.01, "low": -0.02, "high": 0.03, "n": 2}
    found = {
        "difference": 0.01,
        "seeds": interval,
        "examples": interval | {"low": -0.04},
        "mcnemar_p": [0.5, 0.125],
    }
    data = {
        "name": "Data",
        "train_rows": 9,
        "validation_rows": 8,
        "class_names": ["no", "yes"],
        "compute_dtype": "float32",
    }
    results = {
        "settings": {"config": {"model": "m", "compute_dtype": "bfloat16"}, "data": data},
        "models": {"model1": {"7": run(100)}, "model2": {"7": run(200)}, "model3": {"7": run(300)}},
        "comparisons": {"final": {"model2 - model1": found}, "best": {}},
        "cross_dataset": {
            "other": data | {"name": "Other"},
            "comparisons": {
                "model2 - model1": {
                    "here": interval,
                    "there": interval | {"mean": 0.0},
                    "more_here": interval,
                }
            },
        },
    }
    own, theirs = Path("results_b"), Path("results_7b")
    row = cells(findings.table_comparisons(own, results), "model2 - model1, final epoch")
    assert list(row.values())[1:] == ["+1.00", "[-2.00, +3.00]", "[-4.00, +3.00]", "0.5, 0.12"]
    assert (
        list(
            cells(
                findings.table_comparisons(theirs, results), "model2 - model1, final epoch"
            ).values()
        )[-1]
        == "+0.34"
    )
    row = cells(findings.table_training(own, results), "2: Dual Head")
    assert list(map(float, list(row.values())[1:])) == [20, 201, 204, 202, 205, 203, 207, 206]
    assert "Ranks of 8 pooled" in findings.table_training(own, results)
    row = cells(findings.table_seeds(own, results), "3: Dual + Engram")
    assert list(map(float, list(row.values())[1:])) == [7, 60, 304, 306, 309, 310, 312]
    row = cells(
        findings.table_engrams(own, results), "control: untrained compressor, trained backbone"
    )
    assert list(map(float, list(row.values())[1:])) == [312, 315, 318, 321]
    assert "no 25.0; yes 75.0" in findings.table_engrams(own, results)
    row = cells(findings.table_cross(own, results), "model2 - model1")
    assert list(row)[1:3] == ["Data (9 / 8 rows, bfloat16)", "Other (9 / 8 rows, float32)"]
    assert [cell.split()[0] for cell in list(row.values())[1:]] == ["+1.00", "+0.00", "+1.00"]


PUBLISHED = sorted(p for p in ROOT.glob("results*/**/results.json") if "limit-" not in str(p))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_published_results_are_readable_and_their_csv_says_the_same(path):
    results = read_json(path)
    assert summary_table(results, common.find_arm).count("(n = ") == len(results["models"])
    assert cross_dataset_table(results) if "cross_dataset" in results else True
    if not results["git_commit"].endswith("-modified"):  # a run of your own writes its CSV itself
        assert (path.parent / "results.csv").read_text() == tidy_table(results)
    rows = list(csv.DictReader((path.parent / "results.csv").open()))
    for row in rows:
        run = results["models"][row["model"]][row["seed"]]
        record = run["val"][int(row["epoch"]) - 1] if row["epoch"] != "0" else run["initial"]
        assert float(row["val_accuracy"]) == record["accuracy"]
    epochs = results["settings"]["config"]["epochs"]
    assert len(rows) == (epochs + 1) * sum(map(len, results["models"].values()))


def test_published_ranks_are_readable():
    results = read_json(ROOT / "results_effective_rank/effective_rank_results.json")
    again = records.summarize(records.with_records(results), common.find_arm)
    table = records.table(again, common.find_arm)
    for name, result in results.items():
        assert name in table
        shown = rank_plots.shown_models(result, common.find_arm)
        assert [model.key for model in shown] == ["pretrained", "model1", "model2", "model3"]


def test_depths_are_drawn_for_each_measure_that_the_records_have(tmp_path, monkeypatch):
    """A panel a measure and study; older records have the first measure alone."""
    drawn = []
    monkeypatch.setattr(rank_plots, "save_figure", lambda figure, _: drawn.append(figure))
    results = read_json(ROOT / "results_effective_rank/effective_rank_results.json")
    deep = {name: r for name, r in results.items() if "model" in r["settings"]["config"]}
    rank_plots.plot_layers(tmp_path / "old.png", results, common.find_arm)
    assert len(drawn[-1].axes) == len(deep)  # none of the small transformer
    for result in deep.values():
        for key in records.keys_of(result):
            for record in result[key]["seeds"].values():
                for layer in record["layers"]:
                    layer |= dict.fromkeys(rank_plots.DEPTH_PANELS, layer["effective_rank"])
    rank_plots.plot_layers(tmp_path / "new.png", deep, common.find_arm)
    assert len(drawn[-1].axes) == 4 * len(deep)
    titles = [axis.get_title(loc="left") for axis in drawn[-1].axes]
    assert sum("without the first token" in title for title in titles) == 2 * len(deep)


def test_the_overview_shows_the_numbers_of_the_json(tmp_path, monkeypatch):
    """Centres of AG News' bars, and the reference's fall of the rank to 1.3 %."""
    drawn = []
    monkeypatch.setattr(rank_plots, "save_figure", lambda figure, _: drawn.append(figure))
    stored = read_json(ROOT / "results_effective_rank/effective_rank_results.json")
    results = records.summarize(records.with_records(stored), common.find_arm)
    name = next(name for name in results if name.startswith("AG News"))
    rank_plots.plot_overview(tmp_path / "a.png", {name: results[name]}, common.find_arm)
    centres = [
        [float(line.get_xdata()[0]) for line in axis.lines if len(line.get_xdata()) == 1]
        for axis in drawn[-1].axes
    ]
    runs = read_json(ROOT / results[name]["folder"] / "results.json")["models"]
    gains = [
        np.mean([run["final"]["accuracy"] for run in runs[b].values()])
        - np.mean([run["final"]["accuracy"] for run in runs["model1"].values()])
        for b in ("model2", "model3")
    ]
    assert set(np.round(100 * np.array(gains), 4)) <= set(np.round(centres[0], 4))
    start, end = (results[name][key]["effective_rank"] for key in ("pretrained", "model1"))
    assert round(100 * end / start, 4) in np.round(centres[1], 4)
    assert round(100 * 12.6 / 984.0, 4) in np.round(centres[1], 4)
    assert all(factor > 1 for factor in centres[2])
