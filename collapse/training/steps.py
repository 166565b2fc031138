"""The steps of a training: which rows each takes, and at which learning rate."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from collapse.config import RunConfig

# An epoch's rows, batch by batch, in an order drawn from the generator.
Shuffle = Callable[[np.random.Generator], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    number: int  # from 0, over all epochs
    epoch: int  # from 0
    batch: int  # from 0, in its epoch
    batches: int  # of its epoch
    rows: np.ndarray  # (B,) numbers of the rows
    learning_rate: float

    @property
    def ends_epoch(self) -> bool:
        return self.batch + 1 == self.batches


def steps(
    shuffle: Shuffle, total: int, config: RunConfig, seed: int, first: int = 0
) -> Iterator[Step]:
    """Steps `first` to total - 1, epoch after epoch.

    An epoch's generator comes from seed and epoch alone: every arm sees the same order, and a
    resumed training finds its place in it.
    """
    number = 0
    for epoch in itertools.count():
        batches = shuffle(np.random.default_rng([seed, epoch]))
        for batch, rows in enumerate(batches):
            if number == total:
                return
            if number >= first:
                rate = learning_rate_at(number, total, config)
                yield Step(number, epoch, batch, len(batches), rows, rate)
            number += 1


def learning_rate_at(step: int, total_steps: int, config: RunConfig) -> float:
    """Learning rate of step 0 .. total_steps-1: linear warm-up, then held or cosine to zero."""
    warmup = math.ceil(round(config.warmup_fraction * total_steps, 6))  # 10 / 147 * 147 is above 10
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
