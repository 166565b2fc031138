"""The controls: each does what its row of ARMS says, and not what it must not do."""

import contextlib
import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    arm_of,
    random_split,
    run_tiny,
    tiny_config,
    tiny_model,
    train,
    trainer_of,
    watch_steps,
    without_times,
)
from test_language_model import build, stir, tiny_settings

import common
from collapse.arms import BY_NAME
from collapse.data.batches import Split
from collapse.training import loop
from collapse.training.checkpoints import load_weights, save_weights
from collapse.training.optimizer import SharedScaleAdamW
from collapse.training.steps import learning_rate_at
from collapse.utils.errors import UserError

CONTROLS = ("shuffled-lm", "kl", "l2-start", "shared-scale", "2@0.1")
ENGRAM_CONTROLS = ("constant-prefix", "frozen-compressor", "lm-only-engram")
CONTROLS += (*ENGRAM_CONTROLS, "longer")
ROWS = np.arange(11)  # halves and micro-batches of unequal size


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in trainer.model.trainable().items() if p.grad is not None}


def lm_loss_of(trainer) -> float:
    return common.evaluate(trainer.model, trainer.split).lm_loss


BAD_FACTORS = ("longer@0.5", "longer@x", "longer@inf", "longer@nan")


def test_an_unknown_arm_or_weight_is_refused_in_one_sentence():
    for name in (
        "4",
        "dual",
        "2@",
        "2@x",
        "2@1",
        "2@-0.1",
        "2@nan",
        "1@0.5",
        "l2-start@-1",
        *BAD_FACTORS,
    ):
        if name == "2@":
            assert arm_of(name) == arm_of("2")
            continue
        with pytest.raises(UserError, match=f"--models {name}"):
            arm_of(name)


@pytest.mark.parametrize(
    "name",
    ["1", "2", "3", *CONTROLS, "kl@0.2", "l2-start@3", "2@0.1234567", "2@-0", "longer@4"],
)
def test_an_arm_is_found_by_the_name_that_its_results_have(name):
    arm = arm_of(name)
    assert common.find_arm(arm.name) == arm and "-seed" not in arm.name
    assert arm.sort_key[0] == list(BY_NAME).index(name.partition("@")[0])


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_starts_from_the_weights_of_model_1(name):
    start, weights = tiny_model(1).state_dict(), tiny_model(name).state_dict()
    assert all(torch.equal(weights[key], value) for key, value in start.items())


@pytest.mark.parametrize("name", CONTROLS)
def test_a_controls_gradient_does_not_depend_on_the_micro_batch(name):
    found = []
    for size in (100, 3, 1):
        trainer = trainer_of(name)
        trainer.micro_batch_size = size
        with torch.no_grad():  # off its start, where anchors pull
            for parameter in trainer.parameters:
                parameter.add_(0.01)
        torch.manual_seed(5)
        sums = trainer.accumulate_gradients(ROWS)
        norm = trainer.clip()
        found.append((sums, norm, gradients(trainer)))
    for sums, norm, grads in found[1:]:
        assert norm == pytest.approx(found[0][1], rel=1e-4)
        for key in ("cls_loss", "lm_loss", "anchor_loss"):
            assert getattr(sums, key) == pytest.approx(getattr(found[0][0], key), rel=1e-4)
        for key, gradient in grads.items():
            torch.testing.assert_close(gradient, found[0][2][key], atol=1e-6, rtol=1e-3)


def test_a_weight_of_its_own_weighs_the_lm_loss():
    light, heavy, config = trainer_of("2@0.1"), trainer_of("2"), tiny_config()
    for trainer, weight in ((light, 0.1), (heavy, config.lm_weight)):
        sums = trainer.accumulate_gradients(ROWS)
        record = trainer.record(sums)
        expected = weight * record["lm_loss"] + (1 - weight) * record["cls_loss"]
        assert record["loss"] == pytest.approx(expected)
    plain = trainer_of("2", lm_weight=0.1)
    plain.accumulate_gradients(ROWS)
    for key, gradient in gradients(light).items():
        torch.testing.assert_close(gradient, gradients(plain)[key], rtol=1e-5, atol=1e-8)


# --- shuffled-lm ----------------------------------------------------------------------------------


def counting_split(rows=48, words=6) -> Split:
    """Every next token follows from the one before; all tokens are equally frequent."""
    ids = [torch.tensor([2 + (i + j) % words for j in range(words)]) for i in range(rows)]
    return Split(ids, torch.tensor([i % 2 for i in range(rows)]))


def test_shuffled_targets_are_the_true_ones_in_another_order():
    trainer = trainer_of("shuffled-lm")
    trainer.shuffle_targets(ROWS)
    dealt = torch.cat([trainer.shuffled_targets[row] for row in ROWS])
    true = torch.cat([trainer.split.token_ids[row][1:] for row in ROWS])
    assert torch.equal(dealt.sort().values, true.sort().values) and not torch.equal(dealt, true)
    lengths = [len(trainer.shuffled_targets[row]) for row in ROWS]
    assert lengths == [len(trainer.split.token_ids[row]) - 1 for row in ROWS]
    trainer.shuffle_targets(ROWS)
    again = torch.cat([trainer.shuffled_targets[row] for row in ROWS])
    assert not torch.equal(again, dealt)  # another draw in every step


def test_shuffled_lm_learns_frequencies_and_no_syntax():
    unigram = math.log(6)
    true, shuffled = (trainer_of(name, counting_split()) for name in ("2", "shuffled-lm"))
    before = lm_loss_of(shuffled)
    for trainer in (true, shuffled):
        train(trainer, epochs=25)
    assert lm_loss_of(true) < 0.3 * unigram
    assert 0.9 * unigram < lm_loss_of(shuffled) < before


# --- kl -------------------------------------------------------------------------------------------


def kl_by_hand(trainer, start_logits) -> float:
    """Mean KL(start || now) over target tokens, from whole logits; start_logits(ids) -> (L, V)."""
    total, targets = 0.0, 0
    for row in ROWS:
        ids = trainer.split.token_ids[row]
        with torch.no_grad():
            output = trainer.model(ids[None], torch.ones(1, len(ids), dtype=torch.bool))
            now = F.log_softmax(trainer.model.lm_head(output.hidden[0]).double(), -1)[:-1]
            q = F.log_softmax(start_logits(ids).double(), -1)[:-1]
        total += float((q.exp() * (q - now)).sum())
        targets += len(ids) - 1
    return total / targets


def test_kl_at_the_start_is_nothing_and_leaves_the_classification_gradient():
    trainer, plain = trainer_of("kl"), trainer_of("1")
    sums = trainer.accumulate_gradients(ROWS)
    plain.accumulate_gradients(ROWS)
    assert (
        sums.anchor_loss == pytest.approx(0, abs=1e-6) and trainer.record(sums)["lm_loss"] is None
    )
    for key, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(trainer)[key], 0.5 * gradient, atol=1e-6, rtol=1e-3)


def test_kl_is_that_of_whole_distributions_to_the_weights_before_training():
    trainer = trainer_of("kl")
    start = copy.deepcopy(trainer.model)
    train(trainer, epochs=3, rate=0.03)
    trainer.model.eval()
    found = trainer.accumulate_gradients(ROWS).anchor_loss

    def start_logits(ids):
        return start.lm_head(start(ids[None], torch.ones(1, len(ids), dtype=torch.bool)).hidden[0])

    assert found == pytest.approx(0.5 * kl_by_hand(trainer, start_logits), rel=1e-4)
    assert found > 0.01


@pytest.mark.parametrize("name", ["kl", "kl@0.9"])
def test_kl_slope_is_that_of_the_whole_computation(name):
    trainer = trainer_of(name)
    start = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.mul_(1.1)
    trainer.accumulate_gradients(ROWS)
    found, weight = gradients(trainer), trainer.weight
    trainer.model.zero_grad()
    batch = trainer.collate(ROWS)
    output, before = (m(batch.input_ids, batch.text_mask) for m in (trainer.model, start))
    heads = (trainer.model.lm_head, start.lm_head)
    p, q = (
        F.log_softmax(head(out.hidden).flatten(0, 1)[batch.target_index - 1], -1)
        for head, out in zip(heads, (output, before), strict=True)
    )
    kl = (q.detach().exp() * (q.detach() - p)).sum(-1).mean()
    cls_loss = F.cross_entropy(output.logits, batch.labels)
    (weight * kl + (1 - weight) * cls_loss).backward()
    for key, gradient in gradients(trainer).items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-3)


def test_kl_holds_the_model_where_model_1_drifts_and_teaches_it_no_language():
    split = counting_split()
    held, free, start = (
        trainer_of("kl", split),
        trainer_of("2@0", split),
        lm_loss_of(trainer_of("2", split)),
    )
    for trainer in (held, free):
        train(trainer, epochs=15)
    assert 3 * abs(lm_loss_of(held) - start) < abs(lm_loss_of(free) - start)
    assert lm_loss_of(held) > start - 0.1  # the tokens' own order has taught it nothing


def test_kl_of_adapters_is_to_the_model_without_them(qwen):
    model, split = build("kl", qwen), random_split(11, longest=10, vocabulary=60)
    trainer = common.make_trainer(model, split, tiny_settings(qwen), arm_of("kl"))
    assert trainer.accumulate_gradients(ROWS).anchor_loss == pytest.approx(0, abs=1e-5)
    stir(model)

    def start_logits(ids):
        with model.adapters.disable_adapter():
            return model.adapters.get_base_model()(input_ids=ids[None]).logits[0]

    wanted = kl_by_hand(trainer, start_logits)
    model.train()
    trainer.optimizer.zero_grad()
    model.eval()
    assert trainer.accumulate_gradients(ROWS).anchor_loss == pytest.approx(0.5 * wanted, rel=1e-3)
    assert wanted > 0.01
    assert all(p.grad.abs().max() > 0 for n, p in model.trainable().items() if ".lora_" in n)

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    model.train()
    model.forward = out_of_memory  # the step is then taken again, in training mode
    with pytest.raises(torch.OutOfMemoryError):
        trainer.start_of(trainer.collate(ROWS))
    assert model.training


# --- l2-start -------------------------------------------------------------------------------------


def test_l2_pulls_the_backbone_to_its_start_and_no_head():
    trainer, plain = trainer_of("l2-start@0.3"), trainer_of("1")
    for each in (trainer, plain):
        with torch.no_grad():
            for parameter in each.parameters:
                parameter.add_(0.5)
        sums = each.accumulate_gradients(ROWS)
    sums = trainer.accumulate_gradients(ROWS)
    plain.accumulate_gradients(ROWS)  # gradients of two passes add up in both
    count = sum(p.numel() for n, p in trainer.model.named_parameters() if n.startswith("backbone"))
    assert sums.anchor_loss == pytest.approx(0.5 * 0.3 * 0.25 * count, rel=1e-5)
    for key, gradient in gradients(plain).items():
        pull = 2 * 0.3 * 0.5 if key.startswith("backbone") else 0.0
        torch.testing.assert_close(gradients(trainer)[key], gradient + pull, atol=1e-5, rtol=1e-4)


def test_a_stronger_pull_keeps_weights_nearer():
    distances = []
    for name in ("l2-start@0", "l2-start@0.1", "l2-start@10"):
        trainer = trainer_of(name)
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        train(trainer, epochs=5)
        moved = (p - start[n] for n, p in trainer.model.named_parameters() if n[:8] == "backbone")
        distances.append(sum(float(m.detach().square().sum()) for m in moved))
    assert distances[0] > distances[1] > distances[2] > 0


# --- shared-scale ---------------------------------------------------------------------------------


def test_its_optimizer_with_one_gradient_for_both_moments_is_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = (
        SharedScaleAdamW(ours.parameters(), **settings),
        torch.optim.AdamW(theirs.parameters(), **settings),
    )
    for _ in range(7):
        gradient = [torch.randn_like(p) for p in ours.parameters()]
        for model in (ours, theirs):
            for parameter, g in zip(model.parameters(), gradient, strict=True):
                parameter.grad = g.clone()
        optimizers[0].scale_gradients = gradient
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_shared_scale_moves_along_the_classification_gradient_by_the_size_of_both():
    """Adam's first step is rate x m / |v|^(1/2): here of two different gradients, known apart."""
    parts = {}
    for name in ("1", "2"):
        trainer = trainer_of(name)
        trainer.accumulate_gradients(ROWS)
        parts[name] = gradients(trainer)
    trainer = trainer_of("shared-scale")
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.step(ROWS, 1e-2)
    for name, parameter in trainer.model.named_parameters():
        moved = parameter.detach() - before[name]
        if name not in parts["1"]:  # the LM head, which no classification reaches: as in model 2
            step = -1e-2 * parts["2"][name].sign()
            clear = parts["2"][name].abs() > 1e-5
            torch.testing.assert_close(moved[clear], step[clear], rtol=2e-3, atol=1e-6)
            continue
        step = -1e-2 * 0.5 * parts["1"][name] / (parts["2"][name].abs() + 1e-8)
        clear = parts["2"][name].abs() > 1e-6  # below, rounding decides
        torch.testing.assert_close(moved[clear], step[clear], rtol=2e-3, atol=1e-6)


def test_shared_scale_takes_the_classification_step_that_model_2_would_take():
    """The second moment and the clipping are model 2's; their difference is the LM's own part."""
    for clip in (0.0, 1e-2):
        shared, dual = trainer_of("shared-scale", clip_norm=clip), trainer_of("2", clip_norm=clip)
        norms = [trainer.step(ROWS, 1e-2).grad_norm for trainer in (shared, dual)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
        states = [
            {n: trainer.optimizer.state[p] for n, p in trainer.model.trainable().items()}
            for trainer in (shared, dual)
        ]
        for name, state in states[0].items():
            if state:
                found, wanted = state["exp_avg_sq"], states[1][name]["exp_avg_sq"]
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-12)


def test_shared_scale_without_an_lm_weight_is_model_1():
    found = []
    for name in ("shared-scale@0", "1"):
        trainer = trainer_of(name, learning_rate=3e-3)
        torch.manual_seed(3)
        train(trainer, epochs=3)
        found.append(dict(trainer.model.named_parameters()))
    for name, parameter in found[1].items():
        # Less than a step of 3e-3: where a gradient is all rounding, Adam moves by its sign.
        torch.testing.assert_close(found[0][name], parameter, rtol=1e-3, atol=1e-3)


# --- controls of the engram ----------------------------------------------------------------------


def test_a_constant_prefix_starts_as_model_3_and_is_learned():
    trainer, model_3, model_2 = (trainer_of(name) for name in ("constant-prefix", "3", "2"))
    batch = trainer.collate(ROWS)
    cold, plain = (t.model(batch.input_ids, batch.text_mask).logits for t in (model_3, model_2))
    logits = trainer.model(batch.input_ids, batch.text_mask).logits
    assert torch.equal(logits, cold) and not torch.allclose(logits, plain)
    start = copy.deepcopy(trainer.model.projector.linear)
    train(trainer, epochs=2)
    learned = trainer.model.projector.linear
    assert not torch.equal(learned.bias, start.bias) and torch.equal(learned.weight, start.weight)
    assert "projector.linear.weight" not in trainer.model.trainable()


def test_a_constant_prefix_carries_nothing_from_one_row_to_another():
    """Who stands before whom is nothing to it, and something to model 3."""
    losses = {}
    for name in ("constant-prefix", "3"):
        trainer = trainer_of(name)
        if name == "3":
            with torch.no_grad():
                trainer.model.projector.linear.weight.mul_(20)
        orders = ROWS, np.roll(ROWS, 3), ROWS[::-1]
        losses[name] = [trainer.accumulate_gradients(rows).cls_loss for rows in orders]
    assert trainer_of("constant-prefix").model.compressor is None
    assert losses["constant-prefix"] == pytest.approx([losses["constant-prefix"][0]] * 3, rel=1e-5)
    assert losses["3"][1] != pytest.approx(losses["3"][0], rel=1e-5)
    evaluation = common.evaluate(trainer_of("constant-prefix").model, random_split())
    assert evaluation.engrams is None


def engram_gradients(name, split=None, **changes) -> dict[str, torch.Tensor]:
    trainer = trainer_of(name, split, **changes)
    trainer.accumulate_gradients(ROWS)
    return gradients(trainer)


@pytest.mark.parametrize("name", ENGRAM_CONTROLS[1:])
def test_all_but_the_compressor_learn_as_in_model_3(name):
    found, wanted = engram_gradients(name), engram_gradients("3")
    for key, gradient in wanted.items():
        if not key.startswith("compressor"):
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-8)


def test_a_frozen_compressor_never_moves_though_its_weights_decay_elsewhere():
    trainer = trainer_of("frozen-compressor", weight_decay=0.5)
    start = copy.deepcopy(trainer.model)
    train(trainer, epochs=3)
    for name, parameter in trainer.model.named_parameters():
        still = torch.equal(parameter, start.get_parameter(name))
        assert still == name.startswith("compressor"), name


def test_the_lm_only_engram_gets_the_gradient_of_the_lm_loss_alone():
    found, both, of_class = (engram_gradients(name) for name in ("lm-only-engram", "3", "3@0"))
    for key in ("compressor.linear.weight", "compressor.linear.bias"):
        lm_alone = both[key] - 0.5 * of_class[key]
        torch.testing.assert_close(found[key], lm_alone, rtol=1e-3, atol=1e-8)
        assert found[key].abs().max() > 0 and of_class[key].abs().max() > 0


def test_the_lm_only_engram_does_not_see_labels():
    split = random_split()
    flipped = Split(split.token_ids, 1 - split.labels)
    for name in ("lm-only-engram", "3"):
        one, other = (
            engram_gradients(name, s)["compressor.linear.weight"] for s in (split, flipped)
        )
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-9) == (name == "lm-only-engram")


@pytest.mark.parametrize("name", ENGRAM_CONTROLS)
def test_a_language_model_with_a_control_of_the_engram_trains_and_is_stored(qwen, tmp_path, name):
    how = {"source": "intermediate", "gradient_checkpointing": "on"}
    model, split = build(name, qwen, **how).train(), random_split(11, longest=10, vocabulary=60)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "pressor" in n}
    trainer = common.make_trainer(model, split, tiny_settings(qwen), arm_of(name))
    for _ in range(3):
        trainer.step(ROWS, 1e-2)
    moved = {n for n, p in start.items() if not torch.equal(model.get_parameter(n), p)}
    assert moved == (set(start) if name == "lm-only-engram" else set())
    save_weights(tmp_path, "best", model, 1)
    loaded = build(name, qwen, seed=1, **how)
    load_weights(tmp_path, "best", loaded)
    found, wanted = (common.evaluate(m, split) for m in (loaded, model))
    assert np.array_equal(found.logits, wanted.logits)
    if name != "constant-prefix":
        assert np.array_equal(found.engrams, wanted.engrams)


# --- longer ---------------------------------------------------------------------------------------


def test_longer_rounds_up_to_whole_epochs():
    config = tiny_config(epochs=3)
    for name, epochs in (("longer", 8), ("longer@4", 12), ("longer@1.1", 4), ("1", 3), ("3", 3)):
        assert arm_of(name).config_in(config) == tiny_config(epochs=epochs)
    assert arm_of("longer@1.1").config_in(tiny_config(epochs=10)).epochs == 11
    assert (
        arm_of("longer@2.5") == arm_of("longer") and arm_of("longer@4").title == "Longer, 4 times"
    )


def test_longer_is_model_1_but_for_its_length(run, whole):
    """Two epochs become five; at a constant rate the first two are model 1's."""
    short = run("--seeds 1 --models 1")["models"]["model1"]["1"]
    found = whole[0]["models"]["longer"]["1"]
    assert len(found["val"]) == len(found["train"]) == 5 and found["final"]["epoch"] == 5
    for split in ("train", "val"):
        assert without_times(found[split][:2]) == without_times(short[split])
    assert found["parameters"] == short["parameters"]


def test_the_schedule_of_longer_spans_all_its_steps(run, monkeypatch):
    steps = watch_steps(monkeypatch)
    run("--seeds 1 --models longer --schedule cosine --warmup-fraction 0.2")
    config = tiny_config(learning_rate=3e-3, schedule="cosine", warmup_fraction=0.2)
    assert [rate for *_, rate in steps] == [
        learning_rate_at(number, 25, config) for number in range(25)
    ]


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """results.json of a run of all controls that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = run_tiny(data_dir, folder, f"--seeds 1 2 --models 1 2 {' '.join(CONTROLS)}")
    return results, printed.getvalue()


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_that_was_killed_goes_on_to_the_same_numbers(run, whole, monkeypatch, name):
    """What it holds to is the model before its first step, not the one that was restored."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    watch_steps(monkeypatch, kill_at=7)
    with pytest.raises(SystemExit):
        run(f"--seeds 1 --models {name}")
    key = arm_of(name).name
    found = run(f"--seeds 1 --models {name}")["models"][key]["1"]
    assert without_times(found) == without_times(whole[0]["models"][key]["1"])


def test_controls_run_and_are_compared_with_models_1_and_2(whole):
    results, shown = whole
    names = ["model1", "model2", "model2@0.1", "shuffled-lm", "kl", "l2-start", "shared-scale"]
    names += [*ENGRAM_CONTROLS, "longer"]
    assert list(results["models"]) == names
    compared = results["comparisons"]["final"]
    for name in names[2:]:
        assert f"\n{name.removeprefix('model')} {arm_of(name).title} (n = 2) " in shown
        for other in ("model1", "model2"):
            assert f"\n{name} - {other} " in shown
            assert compared[f"{name} - {other}"]["interval"]["n_seeds"] == 2
    last = {name: runs["1"]["train"][-1] for name, runs in results["models"].items()}
    assert last["kl"]["anchor_loss"] > 0 and last["l2-start"]["anchor_loss"] > 0
    assert "anchor_loss" not in last["model2"] and last["kl"]["lm_loss"] is None
    assert last["shuffled-lm"]["lm_loss"] is None and last["shuffled-lm"]["shuffled_lm_loss"] > 0
    engrams = {name for name, runs in results["models"].items() if "cluster" in runs["1"]}
    assert engrams == {"frozen-compressor", "lm-only-engram"}
