"""Tiny models and data for the tests: every test runs in seconds on a CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

import common
import experiment

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

SHARED_DATA = common.ROOT.parent / "shared" / "data"


def tiny_config(**changes) -> experiment.Config:
    settings = {"epochs": 2, "batch_size": 8, "max_length": 12, "vocabulary_size": 40, "hidden_size": 16, "heads": 2}
    settings |= {"feed_forward_size": 24, "classifier_size": 10, "engram_size": 6} | changes
    return experiment.Config(**settings)


def random_split(rows: int = 30, seed: int = 0, longest: int = 12, vocabulary: int = 40, classes: int = 2) -> common.Split:
    """Random rows of 1 to `longest` tokens; the label is the class of the row's first token, which is learnable."""
    rng = np.random.default_rng(seed)
    ids = [torch.from_numpy(rng.integers(2, vocabulary, length)) for length in rng.integers(1, longest + 1, rows)]
    return common.Split(ids, torch.tensor([int(i[0]) % classes for i in ids]))


def tiny_model(number: int, seed: int = 0, **changes) -> common.DualHeadModel:
    """A small model in evaluation mode, so that dropout does not hide what a test looks for."""
    torch.manual_seed(seed)
    return experiment.build_model(number, 2, tiny_config(**changes)).eval()


@pytest.fixture(params=[1, 2, 3])
def model_number(request) -> int:
    return request.param


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.exists():
        pytest.skip(f"needs the full data sets in {SHARED_DATA.relative_to(common.ROOT.parent)} beside the repository")
    return SHARED_DATA
