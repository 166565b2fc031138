"""Spread, length, first token and transfer against closed forms and double loops."""

import numpy as np
import pytest
import torch
from conftest import DEGENERATE

from collapse.measures.layers import POOLINGS, mean_over_tokens, summarize_states
from collapse.measures.neural_collapse import (
    class_means,
    effective_rank_within,
    length_share,
    ncc_agreement,
    neural_collapse_metrics,
    sink_ratio,
    spreads,
    within_classes,
)
from collapse.measures.probe import transfer_accuracy
from collapse.measures.rank import effective_rank, singular_values


def classed_features(n=120, size=15, classes=4, seed=0):
    """Features (n, size) about means of unequal classes, every class with a row; labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes) // 2 * 2])
    means = 3 * rng.normal(size=(classes, size))
    return rng.normal(size=(n, size)) * np.linspace(0.2, 2, size) + means[labels], labels


def rotation(size, seed=5):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def pool_without_first(hidden, text_mask):
    return summarize_states(hidden, text_mask, mean_over_tokens)[0][1]


def test_within_classes_equals_the_loop():
    features, labels = classed_features()
    means = {
        c: np.mean([x for x, y in zip(features, labels, strict=True) if y == c], 0) for c in labels
    }
    expected = [x - means[c] for x, c in zip(features, labels, strict=True)]
    np.testing.assert_allclose(within_classes(features, labels), expected, atol=1e-12)


def test_spreads_equal_the_double_loop_and_the_traces_of_neural_collapse():
    features, labels = classed_features()
    means = [features[labels == c].mean(0) for c in range(4)]
    centre = sum(means) / 4
    within = np.mean([sum((x - means[c]) ** 2) for x, c in zip(features, labels, strict=True)])
    between = np.mean([sum((mean - centre) ** 2) for mean in means])
    found = spreads(features, labels)
    assert found == pytest.approx({"within_spread": within, "between_spread": between})
    s_within = np.cov(within_classes(features, labels).T, bias=True)
    assert found["within_spread"] == pytest.approx(np.trace(s_within))


def test_spreads_of_classes_of_equal_size_add_up_to_the_variance():
    features, labels = classed_features()[0], np.arange(120) % 4
    total = ((features - features.mean(0)) ** 2).sum(1).mean()
    assert sum(spreads(features, labels).values()) == pytest.approx(total)


def test_spreads_of_a_square():
    corners = np.array([[1.0, 3], [-1, 3], [1, -3], [-1, -3]])
    found = spreads(corners, [0, 0, 1, 1])
    assert found == {"within_spread": pytest.approx(1), "between_spread": pytest.approx(9)}


def test_a_shift_of_classes_moves_between_spread_and_rank_but_nothing_within():
    features, labels = classed_features()
    shifted = features + 100 * np.random.default_rng(1).normal(size=(4, 15))[labels]
    before, after = spreads(features, labels), spreads(shifted, labels)
    assert after["within_spread"] == pytest.approx(before["within_spread"])
    assert after["between_spread"] > 100 * before["between_spread"]
    rank = effective_rank_within(features, labels)
    assert effective_rank_within(shifted, labels) == pytest.approx(rank)
    assert effective_rank(singular_values(shifted)) < rank / 2  # that of all rows does move


def test_a_contraction_of_classes_moves_within_spread_and_not_the_rank_within():
    features, labels = classed_features()
    narrow = features - 0.9 * within_classes(features, labels)
    before, after = spreads(features, labels), spreads(narrow, labels)
    assert after["within_spread"] == pytest.approx(0.01 * before["within_spread"])
    assert after["between_spread"] == pytest.approx(before["between_spread"])
    rank = effective_rank_within(features, labels)
    assert effective_rank_within(narrow, labels) == pytest.approx(rank)


def test_rank_within_equals_the_formula():
    features, labels = classed_features()
    s = np.linalg.svd(within_classes(features, labels), compute_uv=False)
    p = s / s.sum()
    assert effective_rank_within(features, labels) == pytest.approx(np.prod(p**-p))


@pytest.mark.parametrize(("n", "size", "classes"), [(12, 50, 3), (12, 50, 11), (40, 6, 3)])
def test_rank_within_is_at_most_rows_less_classes(n, size, classes):
    features, labels = classed_features(n, size, classes)
    bound = min(n - classes, size)
    s = singular_values(within_classes(features, labels))
    assert (s > 0).sum() == bound
    assert effective_rank_within(features, labels) <= bound + 1e-9


def test_rank_within_reaches_its_bound():
    labels = np.repeat(np.arange(3), 2)
    features = np.vstack([np.eye(6)[2 * c : 2 * c + 2] for c in range(3)])  # a direction a class
    assert effective_rank_within(features, labels) == pytest.approx(3)


def test_classes_that_are_points_have_rank_zero_wherever_they_lie():
    labels = np.arange(90) % 3
    points = (1e3 + np.random.default_rng(0).normal(size=(3, 7)))[labels]
    assert effective_rank_within(points, labels) == spreads(points, labels)["within_spread"] == 0


def test_length_share_equals_a_regression_in_each_dimension():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 80)
    features = rng.normal(size=(80, 6)) + 4 * rng.normal(size=6) / lengths[:, None] + 2
    design = np.stack([np.ones(80), 1 / lengths], axis=1)
    explained = total = 0.0
    for column in features.T:
        fitted = design @ np.linalg.lstsq(design, column, rcond=None)[0]
        explained += sum((fitted - column.mean()) ** 2)
        total += sum((column - column.mean()) ** 2)
    assert 0.1 < explained / total < 0.99
    assert length_share(features, lengths) == pytest.approx(explained / total)


def test_length_share_of_a_constant_first_token_among_equal_ones_is_one():
    lengths = np.random.default_rng(0).integers(1, 30, 50)
    first, other = np.random.default_rng(1).normal(size=(2, 8))
    pooled = (first + (lengths[:, None] - 1) * other) / lengths[:, None]
    assert length_share(pooled, lengths) == pytest.approx(1)
    assert length_share(3 * pooled @ rotation(8) + 1e3, lengths) == pytest.approx(1)


def test_length_share_does_not_move_under_rotation_and_shift():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 50)
    features = rng.normal(size=(50, 8)) + rng.normal(size=8) / lengths[:, None]
    share = length_share(features, lengths)
    assert 0.01 < share < 0.9
    assert length_share(features @ rotation(8) * 7 - 50, lengths) == pytest.approx(share)


def test_length_share_of_noise_is_that_of_chance():
    rng = np.random.default_rng(0)
    lengths, features = rng.integers(1, 30, 400), rng.normal(size=(400, 50))
    assert length_share(features, lengths) == pytest.approx(1 / 399, rel=0.5)


def test_length_share_is_zero_without_lengths_or_spread():
    features = np.random.default_rng(0).normal(size=(9, 4))
    assert length_share(features, np.full(9, 7)) == 0
    assert length_share(np.full((9, 4), 0.1), np.arange(1, 10)) == 0


def test_sink_ratio_keeps_layers_apart():
    first, other = np.array([[10.0, 30], [5, 5]]), np.array([[2.0, 2], [4, 6]])
    np.testing.assert_allclose(sink_ratio(first, other), [10, 1])
    assert sink_ratio(first[0], other[0]) == pytest.approx(10)
    assert sink_ratio(np.zeros(3), np.zeros(3)) == 1


def test_pooling_without_the_first_token_keeps_a_lone_one_and_leaves_a_prefix_out():
    hidden = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))  # a prefix, 5 tokens
    hidden[:, :2] *= 200  # it and the first token
    text_mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    found = pool_without_first(hidden, text_mask)
    expected = [hidden[0, 2:].mean(0), hidden[1, 1], hidden[2, 2:4].mean(0)]
    torch.testing.assert_close(found, torch.stack(expected))
    assert text_mask[:, 0].all()  # the caller's mask is as it was


def test_no_pooling_reads_a_state_that_the_mask_leaves_out(pooling):
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    mask[0, 0] = False
    found = POOLINGS[pooling](hidden, mask)
    padded = torch.where(mask[..., None], hidden, 1000)
    assert torch.equal(POOLINGS[pooling](padded, mask), found) and found.dtype == torch.float32
    for row, own in enumerate(mask):  # of all tokens that it keeps, and at any length
        alone = POOLINGS[pooling](hidden[[row]][:, own], own[own][None])[0]
        torch.testing.assert_close(found[row], alone)


def test_agreement_with_means_of_the_same_rows_is_that_of_neural_collapse():
    features, labels = classed_features()
    rng = np.random.default_rng(2)
    weights, bias = rng.normal(size=(4, 15)), 20 * rng.normal(size=4)
    expected = neural_collapse_metrics(features, labels, weights, bias)["ncc_agreement"]
    found = ncc_agreement(features, class_means(features, labels), weights, bias)
    assert 0 < expected < 1 and found == pytest.approx(expected)


def test_agreement_counts_the_training_means_and_never_a_class_without_rows():
    train, labels = np.array([[0.0, 0], [4, 0], [1e6, 1e6]]), np.array([0, 2, 3])
    means = class_means(train, labels, classes=4)
    assert np.isnan(means[1]).all() and np.array_equal(means[[0, 2, 3]], train)
    weights = np.array([[-1.0, 0], [0, 0], [1, 0], [0, 0]])
    rows = np.array([[1.0, 0], [3, 0], [-1, 0], [-2, 0]])  # head: 2, 2, 0, 0; nearest: 0, 2, 0, 0
    assert ncc_agreement(rows, means, weights) == pytest.approx(3 / 4)


def probe_data(seed=0, n=300, size=20, distance=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    return rng.normal(size=(n, size)) + distance * np.eye(3, size)[labels], labels


def test_transfer_of_separated_classes_is_perfect_in_any_units():
    features, labels = probe_data(distance=20)
    features = features * np.logspace(-6, 6, 20) + 1e3 * np.logspace(-6, 6, 20)
    found = transfer_accuracy(features[:200], labels[:200], features[200:], labels[200:], seed=0)
    assert found["accuracy"] == 1


def test_transfer_comes_near_the_best_rule():
    features, labels = probe_data(n=3000, distance=2)
    best = (features[1000:, :3].argmax(1) == labels[1000:]).mean()  # Bayes' rule here
    split = features[:1000], labels[:1000], features[1000:], labels[1000:]
    assert transfer_accuracy(*split, seed=0)["accuracy"] == pytest.approx(best, abs=0.03)


def test_transfer_to_shuffled_labels_is_at_chance_and_asks_for_a_strong_penalty():
    features, labels = probe_data(n=900, distance=5)
    labels = np.random.default_rng(1).permutation(labels)
    found = transfer_accuracy(features[:600], labels[:600], features[600:], labels[600:], seed=0)
    assert abs(found["accuracy"] - 1 / 3) < 0.08
    assert found["C"] <= 1e-3


def test_transfer_is_the_same_in_every_call_and_draws_from_its_seed_alone():
    features, labels = probe_data()
    split = features[:200], labels[:200], features[200:], labels[200:]
    drawn = np.random.get_state()[2]  # the global generator's place
    assert transfer_accuracy(*split, seed=3) == transfer_accuracy(*split, seed=3)
    assert np.random.get_state()[2] == drawn


def test_a_prediction_does_not_depend_on_the_other_test_rows():
    features, labels = probe_data()
    features[250:] *= 1e3

    def accuracy(start, stop):
        rows = slice(start, stop)
        return transfer_accuracy(features[:200], labels[:200], features[rows], labels[rows], seed=0)

    near, far, both = accuracy(200, 250), accuracy(250, 300), accuracy(200, 300)
    assert both["accuracy"] == pytest.approx((near["accuracy"] + far["accuracy"]) / 2)
    assert both["C"] == near["C"]


@pytest.mark.parametrize(("features", "labels"), DEGENERATE)
def test_degenerate_features_give_finite_numbers(features, labels):
    found = [*spreads(features, labels).values(), effective_rank_within(features, labels)]
    found.append(length_share(features, np.arange(1, len(labels) + 1)))
    found.append(transfer_accuracy(features, labels, features, labels, seed=0)["accuracy"])
    assert np.isfinite(found).all(), found
