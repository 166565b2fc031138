"""Token-level neural collapse in tiles, against measures of points in memory and plain loops."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from collapse.measures import tokens_as_classes
from collapse.measures.neural_collapse import neural_collapse_metrics
from collapse.measures.tokens_as_classes import class_means, pair_tiles, token_collapse_metrics
from collapse.utils.files import ROOT

VOCABULARY, WIDTH = 40, 6


@pytest.fixture
def points():
    """Training rows of 33 of 40 classes, of 1 to 60 rows each and off the origin; validation
    rows.
    """
    rng = np.random.default_rng(0)
    counts = rng.integers(2, 61, VOCABULARY)
    counts[[3, 7]] = 1
    counts[[0, 11, 12, 13, 25, 38, 39]] = 0
    tokens = rng.permutation(np.repeat(np.arange(VOCABULARY), counts))
    centres = rng.normal(size=(VOCABULARY, WIDTH)) * rng.uniform(0.5, 3, (VOCABULARY, 1)) + 0.5
    states = centres[tokens] + rng.normal(size=(len(tokens), WIDTH))
    heads = centres - 0.5 + rng.normal(size=centres.shape)
    seen = np.flatnonzero(counts)
    others = centres[rng.choice(seen, 200)] + 1.5 * rng.normal(size=(200, WIDTH))
    return states, tokens, others, heads


def batches(states, tokens=None, size=37):
    tokens = np.zeros(len(states), dtype=np.int64) if tokens is None else tokens
    return lambda: (
        (torch.from_numpy(states[i : i + size]), torch.from_numpy(tokens[i : i + size]))
        for i in range(0, len(states), size)
    )


def measured(points, monkeypatch=None, tile=7):
    states, tokens, others, heads = points
    if monkeypatch:
        monkeypatch.setattr(tokens_as_classes, "TILE", tile)
    return token_collapse_metrics(
        batches(states, tokens), batches(others), VOCABULARY, torch.from_numpy(heads)
    )


@pytest.mark.parametrize("tile", [3, 7, 1024])
def test_tiles_give_what_points_in_memory_give(points, monkeypatch, tile):
    found = measured(points, monkeypatch, tile)
    states, tokens, _, heads = points
    whole = neural_collapse_metrics(states, tokens, heads)
    same = {
        "cdnv": "cdnv",
        "norm_cv": "norm_cv",
        "etf_error": "etf_error",
        "log_kernel_mean": "hyperspherical_mean",
        "log_kernel_var": "hyperspherical_var",
        "self_duality_error": "self_duality_error",
        "cosine_cv": "uniform_duality_cv",
    }
    for ours, theirs in same.items():
        assert found[ours] == pytest.approx(whole[theirs], rel=1e-9), ours
    assert (found["classes"], found["train_tokens"]) == (33, len(tokens))


def test_every_measure_is_that_of_plain_double_loops(points, monkeypatch):
    found = measured(points, monkeypatch)
    states, tokens, others, heads = points
    classes = sorted(set(tokens.tolist()))
    rows = {c: states[tokens == c] for c in classes}
    means = {c: rows[c].mean(0) for c in classes}
    middle = sum(means.values()) / len(classes)
    unit = {c: (means[c] - middle) / np.linalg.norm(means[c] - middle) for c in classes}
    spread = {c: ((rows[c] - means[c]) ** 2).sum(1).mean() for c in classes}
    frequent = [c for c in classes if len(rows[c]) >= 20]
    unbiased = {c: spread[c] * len(rows[c]) / (len(rows[c]) - 1) for c in frequent}

    def over_pairs(chosen, value):
        return np.array([value(a, b) for a in chosen for b in chosen if a < b])

    def variability(spreads, power):
        return lambda a, b: (
            (spreads[a] + spreads[b]) / 2 / np.linalg.norm(means[a] - means[b]) ** power
        )

    kernel = over_pairs(classes, lambda a, b: -math.log(np.linalg.norm(unit[a] - unit[b])))
    interference = over_pairs(classes, lambda a, b: unit[a] @ unit[b])
    cosines = [unit[c] @ heads[c] / np.linalg.norm(heads[c]) for c in classes]
    eigen = np.linalg.eigvalsh(np.cov(np.stack(list(means.values())).T))
    agree = [
        min(classes, key=lambda c, x=x: ((x - means[c]) ** 2).sum()) == (heads @ x).argmax()
        for x in others
    ]
    expected = {
        "cdnv": over_pairs(classes, variability(spread, 2)).mean(),
        "cdnv_quartic": over_pairs(classes, variability(spread, 4)).mean(),
        "cdnv_frequent": over_pairs(frequent, variability(unbiased, 2)).mean(),
        "cdnv_quartic_frequent": over_pairs(frequent, variability(unbiased, 4)).mean(),
        "log_kernel_mean": kernel.mean(),
        "log_kernel_var": kernel.var(),
        "interference_mean": interference.mean(),
        "interference_var": interference.var(),
        "participation_ratio": eigen.sum() ** 2 / (eigen**2).sum(),
        "cosine_mean": np.mean(cosines),
        "cosine_cv": np.std(cosines) / abs(np.mean(cosines)),
        "agreement": np.mean(agree),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
    assert found["frequent_classes"] == len(frequent) < len(classes)


def test_a_class_never_seen_is_never_the_nearest():
    """The rows lie at the origin, where a mean of zeros would win."""
    states = np.array([[3.0, 0.0], [0.0, 3.0]])
    heads = torch.tensor([[1.0, 0.0], [-1.0, -1.0], [0.0, 1.0]], dtype=torch.float64)
    others = batches(np.array([[0.2, 0.1], [0.1, 0.2]]))
    train = batches(states, np.array([0, 2]))
    assert token_collapse_metrics(train, others, 3, heads)["agreement"] == 1.0


def test_means_that_lie_close_together_far_away_keep_their_distance(monkeypatch):
    monkeypatch.setattr(tokens_as_classes, "TILE", 2)
    points = torch.tensor([[1e3, 0.0], [1e3 + 1e-6, 0.0], [1e3, 2e-6]], dtype=torch.float64)
    found = {
        (rows.start + i, columns.start + j): apart[i, j].item()
        for rows, columns, apart in pair_tiles(points)
        for i, j in apart.isfinite().nonzero().tolist()
    }
    for (i, j), distance in found.items():
        expected = ((points[i] - points[j]) ** 2).sum().item()
        assert distance == pytest.approx(expected, rel=1e-12)
    assert len(found) == 3


def test_spreads_around_far_means_do_not_cancel():
    states = torch.tensor([[1e8 + 1.0], [1e8 - 1.0]], dtype=torch.float64)
    found = class_means(lambda: [(states, torch.tensor([2, 2]))], 4, 1)
    assert found.spreads.tolist() == [1.0]


def test_training_text_without_a_row_is_an_error():
    with pytest.raises(ValueError, match="no row"):
        class_means(list, 4, 2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a peak of its own")
def test_a_vocabulary_of_4096_at_width_256_stays_below_2_gib():
    """By VmHWM: ru_maxrss begins with the memory of the process that starts this one."""
    code = """
import torch
from collapse.measures.tokens_as_classes import token_collapse_metrics
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
states, tokens = torch.randn(8192, 256, generator=generator), torch.arange(8192) % 4096
heads = torch.randn(4096, 256, generator=generator)
few = lambda: [(states[:64], tokens[:64])]
token_collapse_metrics(lambda: [(states, tokens)], few, 4096, heads)
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 2
