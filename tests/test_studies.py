"""The throughput study: the yardstick measures the same model and counts what it costs."""

import dataclasses
import gc
import json
import weakref

import numpy as np
import pytest
import torch
import transformers
from conftest import arm_of, cells_of_row, random_split, start_script, tiny_config, tiny_model
from test_language_model import build, stir

import common
from collapse.config import LanguageModelConfig
from collapse.data.batches import Split
from collapse.data.sst2 import load_sst2
from collapse.models import costs
from collapse.models.memory import MemoryPlan
from collapse.models.pretrained import add_lora
from collapse.report.markdown import table
from collapse.utils import device
from collapse.utils.errors import UserError
from studies import hours, lora_speed, random_checkpoint, throughput
from studies.report import side_studies
from studies.yardsticks import (
    PRODUCTS,
    Conventional,
    EcosystemLoss,
    load_published_script,
    matrix_share,
    published_seconds,
)


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
    causal_lm = random_checkpoint.random_language_model(
        random_checkpoint.TINY, torch.float32, torch.device("cpu")
    )
    adapters = add_lora(causal_lm, settings)
    stir(causal_lm)
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
        trainer = throughput.make_trainer(model_number, recipe, model, split, settings)
        assert trainer.micro_batch_size == (8 if recipe == "conventional" else 16)
        if recipe == "ecosystem":
            EcosystemLoss(trainer)(torch.from_numpy(rows))["loss"].backward()
        else:
            trainer.accumulate_gradients(rows)
        found[recipe] = {name: p.grad.clone() for name, p in model.trainable().items()}
    for name, expected in found["conventional"].items():
        for recipe in ("ours", "ecosystem"):
            torch.testing.assert_close(found[recipe][name], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("model_number", [2])
def test_recipes_of_lora_speed_train_one_model_with_other_layers(miniature, model_number):
    model, settings = miniature
    split, rows, gradients = random_split(rows=16, longest=20, vocabulary=900), np.arange(16), {}
    for name, recipe in lora_speed.RECIPES.items():
        lora_speed.use_recipe(model, recipe)
        assert model.backbone.config._attn_implementation == recipe.attention
        fused = [module for module in model.backbone.modules() if "forward" in vars(module)]
        assert bool(fused) == recipe.fused_lora
        model.zero_grad()
        lora_speed.make_trainer(2, recipe.trainer, model, split, settings).accumulate_gradients(
            rows
        )
        gradients[name] = {key: p.grad.clone() for key, p in model.trainable().items()}
    for name in lora_speed.RECIPES:
        torch.testing.assert_close(gradients[name], gradients["ours"], atol=1e-5, rtol=1e-3)


def test_speedups_are_paired_by_round():
    seconds = {"ours": [1.0, 2.0, 4.0], "peft's layers": [2.0, 2.0, 12.0]}
    assert lora_speed.speedup_text(seconds, "peft's layers") == "2.00 [1.00, 3.00]"


def test_throughput_measures_every_recipe(miniature, model_number, monkeypatch):
    model, settings = miniature
    accumulate, unpacked = common.Trainer.accumulate_gradients, {True: set(), False: set()}

    def seen(trainer, rows):
        if trainer.model is model:
            unpacked[isinstance(trainer, Conventional)].add(model.memory_plan.unpacked)
        return accumulate(trainer, rows)

    monkeypatch.setattr(common.Trainer, "accumulate_gradients", seen)
    config, split = (
        throughput.Config(rounds=2, steps=1),
        random_split(rows=48, longest=20, vocabulary=900),
    )
    least = sizes_of_tiny(), costs.device_rates(torch.device("cpu"))
    found = throughput.measure(model_number, model, split, settings, config, least)
    assert set(found["examples_per_second"]) == set(throughput.RECIPES)
    assert unpacked == {True: {0}, False: {2}} and (
        found["layers_unpacked"],
        found["micro_batch_size"],
    ) == (2, 16)
    assert all(rate > 0 for rate in found["examples_per_second"].values())
    assert all(
        ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in found["ratio"].values()
    )
    assert found["limit_share"] > 0  # a tiny model lies in caches faster than memory
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
    table = table_of_throughput(results | {"model1": small})
    cells = cells_of_row(table, "1: Classification Only")
    padded, share = small["ratio"]["conventional"], small["matrix_share"]
    low, high = (f"{padded[end]:.1f}" for end in ("low", "high"))
    assert cells["times the padded"] == f"{padded['median']:.1f} [{low}, {high}]"
    assert cells["matrix products, % of our time"] == f"{100 * share:.0f}"
    assert "reference" not in table  # which was not given


def test_the_share_of_matrix_products_counts_them_all(miniature, model_number):
    model, settings = miniature
    trainer = common.make_trainer(
        model, random_split(rows=16, longest=20, vocabulary=900), settings, arm_of(model_number)
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.step(np.arange(16), 1e-3)
    seen = {event.key.rstrip("_") for event in profile.key_averages()}
    assert {name for name in seen if name.endswith("mm")} <= PRODUCTS
    assert "aten::addmm" in seen and 0 < matrix_share(trainer, [np.arange(16)]) < 1


PUBLISHED = """
import os
import torch
from datasets import load_dataset

os.makedirs(os.path.join(os.path.dirname(__file__), "folder"))
DEVICE, BATCH_SIZE, LR = torch.device("meta"), 4, 1e-3
train_ds = [(row["sentence"], row["label"]) for row in load_dataset("glue", "sst2")["train"]]
seen = []

class Model1_SentimentOnly(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

class Model2_Dual(Model1_SentimentOnly):
    pass

class Model3_Engram(Model1_SentimentOnly):
    pass

def train_epoch(model, batches, optimizer, number):
    assert type(model).__name__.startswith(f"Model{number}_")
    assert model.weight.device.type == "cpu"
    assert len(optimizer.param_groups[0]["params"]) == 2
    seen.extend((number, list(texts), labels.tolist()) for texts, labels in batches)

if __name__ == "__main__":
    raise SystemExit("the whole run started")
"""


def test_the_reference_script_is_timed_on_the_same_rows(data_dir, tmp_path, model_number):
    (tmp_path / "theirs.py").write_text(PUBLISHED)
    task = load_sst2(data_dir)
    script = load_published_script(tmp_path / "theirs.py", task)
    rows = np.array([5, 3, 8, 1, 2, 0, 9, 4])
    assert published_seconds(script, model_number, rows) > 0
    texts, labels = ([x[row] for row in rows] for x in (task.train.texts, task.train.labels))
    expected = [(model_number, texts[:4], labels[:4]), (model_number, texts[4:], labels[4:])]
    assert script.seen == expected
    config, split = throughput.Config(rounds=1, steps=1), random_split(rows=8)
    settings, model = dataclasses.replace(tiny_config(), batch_size=4), tiny_model(model_number)
    found = throughput.measure(model_number, model, split, settings, config, None, script)
    assert set(found["ratio"]) == {"reference", "conventional"}
    assert len(script.seen) == 4 and not (tmp_path / "folder").exists()
    table = table_of_throughput({f"model{model_number}": found})
    (row,) = table.splitlines()[2:]
    ratio = found["ratio"]["reference"]
    cells = cells_of_row(table, row.split("|")[1].strip())
    assert cells["times the script's [lowest, highest round]"].startswith(
        f"{ratio['median']:.1f} ["
    )


def test_another_script_is_refused(data_dir, tmp_path):
    (tmp_path / "mine.py").write_text("train_ds = []")
    with pytest.raises(UserError, match="not the reference's experiment"):
        load_published_script(tmp_path / "mine.py", load_sst2(data_dir))
    with pytest.raises(UserError, match="is no Python file"):
        load_published_script(tmp_path / "none.py", load_sst2(data_dir))


def sizes_of_tiny() -> costs.Sizes:
    return costs.Sizes.of(transformers.Qwen2Config(**random_checkpoint.TINY), 4)


def test_the_least_time_is_of_true_tokens(miniature, model_number):
    """Two batches of known length; an engram's model reads its weights twice a step."""
    model, _ = miniature
    split = Split([torch.arange(n) for n in (3, 5, 7, 9)], torch.zeros(4, dtype=torch.int64))
    rates, rows = {"bytes": 1.0, "operations": 1.0}, [np.array([0, 1]), np.array([2, 3])]
    found = throughput.least_step_seconds(sizes_of_tiny(), rates, model, split, rows)
    tokens, reads = (28, 4) if model_number == 3 else (24, 2)
    targets = 0 if model_number == 1 else 20
    shape = sizes_of_tiny(), rates, tokens, targets, reads
    assert found == costs.least_seconds(*shape, itemsize=4)


def test_hours_are_counted_on_the_real_architecture(tmp_path, phrases_dir, qwen, monkeypatch):
    """Of Qwen2.5-7B's parameters, built without memory; the more a recipe computes the slower."""
    sizes = costs.Sizes.of(transformers.Qwen2Config(**random_checkpoint.QWEN), lora_rank=16)
    assert sizes.layers + 2 * sizes.head == pytest.approx(7.6e9, rel=0.01)
    assert sizes.adapters == pytest.approx(41e6, rel=0.02)  # as the reference reports
    monkeypatch.setattr(hours, "STUDIES", throughput.STUDIES[:1])
    line = f"--data-dir {phrases_dir} --tokenizer {qwen} --output-dir {tmp_path}"
    start_script(hours, line)
    found = json.loads((tmp_path / "results_7b/throughput_on_paper.json").read_text())
    one, two, three = (found[f"model{number}"] for number in (1, 2, 3))
    for kind in (one, two, three):
        rates = kind["examples_per_second"]
        assert rates["conventional"] < rates["ecosystem"] < rates["ours"]
        assert list(kind["least_hours"]) == list(hours.CARDS)
    assert one["least_hours"]["RTX 4080"] < two["least_hours"]["RTX 4080"]
    assert two["least_hours"]["RTX 4080"] < three["least_hours"]["RTX 4080"]
    assert two["least_hours"]["RTX 4060 Ti"] > 2 * two["least_hours"]["RTX 4080"]
    rows = (67_349, found["data"]["validation_rows"])
    how = rows, found["tokens_per_row"], 16, 3, True, False
    seconds = costs.least_training_seconds(sizes, hours.CARDS["RTX 4080"], *how)
    assert two["least_hours"]["RTX 4080"] == pytest.approx(seconds / 3600)


def test_the_random_model_is_what_a_real_nf4_model_is_to_peft(miniature, qwen, model_number):
    real = build(model_number, qwen, quantization="nf4")
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
    random_checkpoint.random_language_model(
        random_checkpoint.TINY, torch.float32, torch.device("cpu")
    )
    assert {device.type for device in drawn} <= {"meta"}


@pytest.mark.parametrize("failing", ["conventional", "ecosystem", "ours"])
def test_a_recipe_that_runs_out_of_memory_is_recorded_and_the_others_go_on(
    miniature, model_number, failing, monkeypatch
):
    model, settings = miniature
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

    monkeypatch.setattr(throughput, "make_trainer", making)
    split = random_split(rows=48, longest=20, vocabulary=900)
    config = throughput.Config(rounds=1, steps=1)
    least = sizes_of_tiny(), {"bytes": 1e9, "operations": 1e9}
    found = throughput.measure(model_number, model, split, settings, config, least)
    assert found["out_of_memory"] == [failing] and now_running.count(failing) == 1
    assert set(found["examples_per_second"]) == set(throughput.RECIPES) - {failing}
    assert failing in throughput.describe(found)


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
    device.cap_memory(15.0)
    assert caps == [pytest.approx(14.6 / 16)]


def table_of_throughput(results):
    rows = side_studies.rows_by_model(results)
    return table(side_studies.THROUGHPUT_COLUMNS, rows, hide_unknown=True)
