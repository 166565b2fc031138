"""The throughput study: the yardstick measures the same model and counts what it costs."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
import transformers
from conftest import arm_of, random_split, tiny_config, tiny_model

import common
from collapse.config import LanguageModelConfig
from collapse.data.batches import Split, collate
from collapse.models.memory import MemoryPlan
from collapse.models.pretrained import add_lora
from studies import throughput
from studies.report import side_studies


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
    row = side_studies.table_throughput(results | {"model1": small}).splitlines()[2]
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
