"""The models, losses and optimizer steps: what would silently ruin the science."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import arm_of, random_split, tiny_config, tiny_model, train, trainer_of

import common
from collapse.data.batches import Split, collate, count_targets
from collapse.models import losses
from collapse.models.losses import LinearCrossEntropy, lm_loss_sum
from collapse.training.steps import learning_rate_at
from collapse.utils.errors import UserError

CPU = torch.device("cpu")


def run(model, split, rows, engram=None):
    batch = collate(split, rows, CPU)
    return model(batch.input_ids, batch.text_mask, engram), batch


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_later_token_changes_no_earlier_logit(model_number, pooling):
    model = tiny_model(model_number, pooling=pooling)
    ids = torch.randint(2, 40, (1, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    before = model(ids, mask).hidden
    for position in range(1, 9):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % 38 + 2
        after = model(changed, mask).hidden
        assert torch.equal(after[:, :position], before[:, :position])
        cut = mask.clone()  # what is pooled of the tokens before it alone
        cut[0, position:] = False
        assert torch.equal(model(changed, cut).pooled, model(ids, cut).pooled)
        assert not torch.allclose(after[:, position], before[:, position])


def test_a_row_does_not_depend_on_its_batch(model_number, pooling):
    model, split = tiny_model(model_number, pooling=pooling), random_split()
    together, batch = run(model, split, range(30))
    for row in range(30):
        alone, _ = run(model, split, [row])
        length = len(split.token_ids[row])
        torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.pooled[0], together.pooled[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            alone.hidden[0], together.hidden[row, :length], atol=1e-5, rtol=1e-5
        )
    assert batch.input_ids.shape[1] == max(split.lengths)


def test_pooling_reads_text_tokens_alone(model_number, pooling):
    model, split = tiny_model(model_number, pooling=pooling), random_split()
    embeddings = model.backbone.get_input_embeddings()
    for row in range(5):
        tokens = embeddings(split.token_ids[row])[None]
        if model_number == 3:
            tokens = torch.cat([model.projector(torch.zeros(1, 6)), tokens], dim=1)
        hidden = model.backbone(inputs_embeds=tokens).last_hidden_state[
            0, 1 if model_number == 3 else 0 :
        ]
        output, _ = run(model, split, [*range(row), row])
        expected = {"mean": hidden.mean(0), "last": hidden[-1]}[pooling]
        torch.testing.assert_close(output.pooled[row], expected, atol=1e-5, rtol=1e-5)


def test_an_unknown_pooling_names_those_there_are():
    with pytest.raises(UserError, match="--pooling middle is none of mean, last"):
        tiny_model(1, pooling="middle")


def test_lm_loss_is_over_text_tokens_but_the_first_and_the_same_for_models_2_and_3():
    split = random_split()
    for number in (2, 3):
        model = tiny_model(number)
        output, batch = run(model, split, range(30))
        targets = batch.input_ids.flatten()[batch.target_index].tolist()
        assert targets == [int(token) for ids in split.token_ids for token in ids[1:]]
        assert len(targets) == count_targets(split, range(30))
        expected = torch.zeros(())
        for row, ids in enumerate(split.token_ids):
            logits = model.lm_head(
                output.hidden[row, : len(ids) - 1]
            )  # the prefix's state is not among them
            expected += F.cross_entropy(logits, ids[1:], reduction="sum")
        torch.testing.assert_close(lm_loss_sum(output.hidden, batch, model.lm_head), expected)


def test_linear_cross_entropy_in_bfloat16_is_that_of_the_same_numbers_in_float32(monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_CHUNK_TOKENS", 100)
    torch.manual_seed(0)
    states, targets = torch.randn(1000, 32).bfloat16().requires_grad_(), torch.randint(300, (1000,))
    head = torch.nn.Linear(32, 300).bfloat16().requires_grad_(False)
    loss = LinearCrossEntropy.apply(states, head.weight, head.bias, targets, True)
    exact_states = states.detach().float().requires_grad_()
    exact = F.cross_entropy(
        F.linear(exact_states, head.weight.float(), head.bias.float()), targets, reduction="sum"
    )
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(
        exact.item(), rel=1e-4
    )  # a bfloat16 sum is off by 4e-3
    gradients = [
        torch.autograd.grad(*pair)[0].float() for pair in ((loss, states), (exact, exact_states))
    ]
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("trainable_head", [True, False])
def test_linear_cross_entropy_equals_the_plain_computation(with_bias, trainable_head, monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_CHUNK_TOKENS", 7)  # several chunks, the last one short
    torch.manual_seed(0)
    states, targets = (
        torch.randn(31, 5, dtype=torch.float64, requires_grad=True),
        torch.randint(11, (31,)),
    )
    head = torch.nn.Linear(5, 11, bias=with_bias, dtype=torch.float64).requires_grad_(
        trainable_head
    )
    leaves = [
        leaf for leaf in (states, head.weight, head.bias) if leaf is not None and leaf.requires_grad
    ]
    plain = 0.3 * F.cross_entropy(head(states), targets, reduction="sum")
    ours = 0.3 * LinearCrossEntropy.apply(states, head.weight, head.bias, targets, True)
    torch.testing.assert_close(ours, plain, check_dtype=False, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(plain, leaves)
    for _ in range(2):  # a second backward pass finds the same
        for found, wanted in zip(
            torch.autograd.grad(ours, leaves, retain_graph=True), expected, strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_evaluation_computes_no_gradient_of_the_lm_head(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a gradient was allocated")

    model, split = tiny_model(2), random_split()
    monkeypatch.setattr(torch, "zeros_like", refuse)  # what the loss's gradients are accumulated in
    assert common.evaluate(model, split).lm_loss > 0


def test_rows_without_a_target_give_no_lm_loss():
    model, split = (
        tiny_model(2),
        Split([torch.tensor([3]), torch.tensor([5])], torch.tensor([0, 1])),
    )
    output, batch = run(model, split, range(2))
    assert lm_loss_sum(output.hidden, batch, model.lm_head).item() == 0
    common.make_trainer(model, split, tiny_config(), arm_of(2)).step(np.arange(2), 1e-3)


def test_step_gradients_are_those_of_one_big_batch_whatever_the_micro_batch(model_number):
    split, rows = random_split(), np.arange(11)  # 11: halves and micro-batches of unequal size
    reference = None
    for size in (100, 4, 3, 1):
        trainer = trainer_of(model_number, split)
        trainer.micro_batch_size = size
        sums, found = trainer.accumulate_gradients(rows), gradients(trainer.model)
        if reference is None:
            reference = sums, found
        assert sums.cls_loss == pytest.approx(reference[0].cls_loss, rel=1e-5)
        assert sums.lm_loss == pytest.approx(reference[0].lm_loss, rel=1e-5)
        for name in found:
            torch.testing.assert_close(found[name], reference[1][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("lm_weight", [0.5, 0.2])
def test_step_loss_is_the_weighted_mean_over_targets_plus_the_rest_of_the_mean_over_rows(lm_weight):
    split, rows = random_split(), np.arange(11)
    trainer = trainer_of(2, split, lm_weight=lm_weight)
    trainer.micro_batch_size = 2
    trainer.accumulate_gradients(rows)
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    output, batch = run(trainer.model, split, rows)
    targets = batch.input_ids.masked_fill(~batch.text_mask, -100)[:, 1:]
    lm = F.cross_entropy(
        trainer.model.lm_head(output.hidden)[:, :-1].flatten(0, 1),
        targets.flatten(),
        ignore_index=-100,
    )
    (lm_weight * lm + (1 - lm_weight) * F.cross_entropy(output.logits, batch.labels)).backward()
    for name, expected in gradients(trainer.model).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-4)


def test_every_part_of_every_model_is_trained(model_number):
    """The first half's losses alone would leave the compressor without a gradient."""
    trainer = trainer_of(model_number, random_split())
    trainer.accumulate_gradients(np.arange(12))
    assert all(g.abs().max() > 0 for g in gradients(trainer.model).values())
    assert len(gradients(trainer.model)) == len(list(trainer.model.parameters()))


def test_the_compressor_is_trained_by_the_second_halfs_losses():
    split, model = random_split(), tiny_model(3)
    first, _ = run(model, split, range(6))
    second, batch = run(model, split, range(6, 12), first.engram)
    for loss in (
        F.cross_entropy(second.logits, batch.labels),
        lm_loss_sum(second.hidden, batch, model.lm_head),
    ):
        (gradient,) = torch.autograd.grad(loss, model.compressor.linear.weight, retain_graph=True)
        assert gradient.abs().max() > 1e-8


def test_pair_trainer_feeds_each_engram_to_the_row_at_the_same_place_of_the_second_half():
    split, rows = random_split(), np.arange(11)
    trainer = trainer_of(3, split)
    trainer.accumulate_gradients(rows)
    found = gradients(trainer.model)
    model = tiny_model(3)
    first, batch_1 = run(model, split, rows[:6])
    second, batch_2 = run(model, split, rows[6:], first.engram[:5])
    cls = (
        sum(
            F.cross_entropy(o.logits, b.labels, reduction="sum")
            for o, b in ((first, batch_1), (second, batch_2))
        )
        / 11
    )
    lm = sum(
        lm_loss_sum(o.hidden, b, model.lm_head) for o, b in ((first, batch_1), (second, batch_2))
    )
    (0.5 * cls + 0.5 * lm / count_targets(split, rows)).backward()
    for name, expected in gradients(model).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-4)


def test_a_different_engram_changes_the_output_and_none_is_the_zero_engram():
    split, model = random_split(), tiny_model(3)
    cold, _ = run(model, split, range(5))
    zero, _ = run(model, split, range(5), torch.zeros(5, 6))
    other, _ = run(model, split, range(5), torch.ones(5, 6))
    assert torch.equal(cold.logits, zero.logits)
    assert (cold.logits - other.logits).abs().min() > 1e-6
    assert not torch.allclose(cold.hidden, other.hidden)


def test_engram_can_be_taken_from_the_classifiers_intermediate():
    torch.manual_seed(0)
    backbone, head = tiny_model(1).backbone, common.ClassificationHead(16, 10, 2)
    model = common.DualHeadModel(
        backbone, 16, head, torch.nn.Linear(16, 40), 6, "intermediate"
    ).eval()
    output, _ = run(model, random_split(), range(4))
    torch.testing.assert_close(
        output.engram, torch.tanh(model.compressor.linear(F.gelu(head.inner(output.pooled))))
    )


def test_parameter_counts_of_the_default_models_are_those_of_the_design():
    import experiment

    counts = [
        sum(
            p.numel()
            for p in experiment.build_model(arm_of(n), 2, experiment.Config()).parameters()
        )
        for n in (1, 2, 3)
    ]
    assert counts == [1_297_346, 2_329_346, 2_329_346 + (128 * 32 + 32) + (32 * 128 + 128)]


def test_the_models_of_a_seed_start_from_the_same_backbone_and_classifier():
    weights = [tiny_model(number).state_dict() for number in (1, 2, 3)]
    for name, expected in weights[0].items():
        assert all(torch.equal(expected, other[name]) for other in weights[1:])


def test_out_of_memory_halves_the_micro_batch_and_gives_the_same_step(model_number, monkeypatch):
    split, rows = random_split(), np.arange(8)
    expected, trainer = trainer_of(model_number, split), trainer_of(model_number, split)
    expected.step(rows, 1e-2)
    forward = trainer.model.forward

    def short_of_memory(input_ids, *rest):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("no memory left")
        return forward(input_ids, *rest)

    monkeypatch.setattr(trainer.model, "forward", short_of_memory)
    trainer.step(rows, 1e-2)
    assert trainer.micro_batch_size == (4 if model_number == 3 else 2)
    for name, wanted in gradients(expected.model).items():
        torch.testing.assert_close(gradients(trainer.model)[name], wanted, atol=1e-6, rtol=1e-4)
    monkeypatch.setattr(
        trainer.model, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError())
    )
    with pytest.raises(UserError, match="single row"):
        trainer.step(rows, 1e-2)


def test_a_loss_that_is_not_finite_stops_before_it_reaches_a_weight(model_number):
    trainer = trainer_of(model_number, random_split())
    with torch.no_grad():
        trainer.model.classifier.outer.bias[0] = float("nan")
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(FloatingPointError):
        trainer.step(np.arange(8), 1e-2)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0, equal_nan=True)


def test_gradient_norm_is_the_one_of_all_gradients_together(model_number):
    trainer = trainer_of(model_number, random_split())
    trainer.accumulate_gradients(np.arange(8))
    expected = sum(float((g.double() ** 2).sum()) for g in gradients(trainer.model).values()) ** 0.5
    assert trainer.step(np.arange(8), 0.0).grad_norm == pytest.approx(expected, rel=1e-5)


def test_clipping_bounds_the_update_and_reports_the_norm_before_it():
    free, clipped = trainer_of(2, random_split()), trainer_of(2, random_split(), clip_norm=1e-3)
    assert free.step(np.arange(8), 0.0).grad_norm == pytest.approx(
        clipped.step(np.arange(8), 0.0).grad_norm
    )
    norm = torch.nn.utils.get_total_norm([p.grad for p in clipped.model.parameters()])
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_learning_rate_warms_up_and_follows_the_cosine():
    config = tiny_config(learning_rate=1.0, warmup_fraction=0.05, schedule="cosine")
    rates = [learning_rate_at(step, 200, config) for step in range(200)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10] == pytest.approx(1.0) and rates[105] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3 and all(np.diff(rates[10:]) < 0)
    assert {learning_rate_at(step, 200, tiny_config(learning_rate=1.0)) for step in range(200)} == {
        1.0
    }


def test_a_step_is_taken_at_the_rate_it_is_given():
    """Adam's first step moves every weight that has a gradient by the learning rate."""
    for rate in (0.0, 1e-3, 0.1):
        trainer = trainer_of(1, random_split())
        before = [p.detach().clone() for p in trainer.parameters]
        trainer.step(np.arange(8), rate)
        moved = max(
            (p - b).abs().max().item() for p, b in zip(trainer.parameters, before, strict=True)
        )
        assert moved == pytest.approx(rate, rel=1e-2)


def test_the_control_is_a_compressor_that_no_training_has_touched():
    model, split = tiny_model(3), random_split()
    evaluation = common.evaluate(model, split)
    torch.manual_seed(5)
    fresh = common.EngramCompressor(16, 6)
    expected = fresh(torch.from_numpy(evaluation.pooled)).detach().numpy()
    found = common.untrained_engrams(model, evaluation, seed=5)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - evaluation.engrams).max() > 0.1


def test_evaluation_is_in_row_order_without_dropout_and_leaves_the_generators_alone(model_number):
    model, split = tiny_model(model_number).train(), random_split()
    state = torch.get_rng_state()
    found = common.evaluate(model, split)
    assert torch.equal(torch.get_rng_state(), state)
    output, batch = run(model.eval(), split, range(30))
    np.testing.assert_allclose(found.logits, output.logits.detach(), atol=1e-5)
    np.testing.assert_allclose(found.pooled, output.pooled.detach(), atol=1e-5)
    assert found.cls_loss == pytest.approx(
        F.cross_entropy(output.logits, batch.labels).item(), rel=1e-5
    )
    assert found.correct() == "".join(str(int(c)) for c in output.logits.argmax(1) == batch.labels)
    if model_number == 1:
        assert found.lm_loss is None and found.engrams is None
    else:
        lm = lm_loss_sum(output.hidden, batch, model.lm_head) / len(batch.target_index)
        assert found.lm_loss == pytest.approx(lm.item(), rel=1e-5)


def test_carried_evaluation_gives_each_row_the_engram_of_one_other_row():
    model, split = tiny_model(3), random_split()
    cold = common.evaluate(model, split)
    carried = common.carried_engrams(cold.engrams)
    rows = [int(np.flatnonzero((cold.engrams == engram).all(1))[0]) for engram in carried]
    assert sorted(rows) == list(range(30)) and all(row != i for i, row in enumerate(rows))
    found = common.evaluate(model, split, carried)
    output, _ = run(model, split, [7], torch.from_numpy(cold.engrams[[rows[7]]]))
    np.testing.assert_allclose(found.logits[7], output.logits[0].detach(), atol=1e-5)
    assert not np.allclose(found.logits, cold.logits)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_all_models_learn_a_trivial_task(number, monkeypatch):
    """With lm_weight 0.5 as in the study: the class is the parity of the first token."""
    split = random_split(rows=64, longest=6)
    trainer = trainer_of(number, split, learning_rate=3e-3)
    train(trainer, epochs=40)
    assert common.evaluate(trainer.model, split).accuracy == 1.0
