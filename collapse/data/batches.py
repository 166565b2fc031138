"""Task -> token ids -> batches padded to their own longest row."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from collapse.data.task import Rows
from collapse.utils.errors import UserError


@dataclass(frozen=True)
class Split:
    """One split as token ids of unequal lengths: N int64 tensors (length,), labels (N,)."""

    token_ids: list[Tensor]
    labels: Tensor

    @property
    def lengths(self) -> np.ndarray:  # (N,)
        return np.array([len(ids) for ids in self.token_ids])


def encode_rows(
    rows: Rows, encode: Callable[[list[str]], list[list[int]]], max_length: int
) -> Split:
    """Token ids of every row, cut to max_length. Raises UserError for a text without a token."""
    token_ids = [torch.tensor(ids[:max_length]) for ids in encode(rows.texts)]
    for text, ids in zip(rows.texts, token_ids, strict=True):
        if not len(ids):
            raise UserError(f"the text {text!r} has no token: remove the row from the data.")
    return Split(token_ids, torch.tensor(rows.labels))


@dataclass
class Batch:
    """Rows padded on the right to the longest of them."""

    input_ids: Tensor  # (B, L) int64, zeros behind the text
    text_mask: Tensor  # (B, L) bool, True on text
    labels: Tensor  # (B,)
    target_index: Tensor  # (T,) positions in the flattened (B * L) tokens that the LM head predicts


def collate(split: Split, rows: Iterable[int], device: torch.device) -> Batch:
    """The batch of these rows.

    Every text token but a row's first is a target: it is predicted from those before it.
    """
    rows = list(rows)
    ids = [split.token_ids[i] for i in rows]
    lengths = torch.tensor([len(i) for i in ids])
    input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    text_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    is_target = text_mask.clone()
    is_target[:, 0] = False
    tensors = (input_ids, text_mask, split.labels[rows], is_target.flatten().nonzero().squeeze(1))
    # On Apple's GPUs a copy that does not wait may read memory that is already free.
    return Batch(*(tensor.to(device, non_blocking=device.type == "cuda") for tensor in tensors))


def count_targets(split: Split, rows: Iterable[int]) -> int:
    return sum(len(split.token_ids[i]) - 1 for i in rows)


def length_grouped_batches(
    lengths: np.ndarray, batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Row indices of one epoch's batches: every row once, similar lengths together, random order.

    Shuffles, sorts by length inside chunks of 50 batches, then shuffles the batches and the rows
    inside each: model 3 pairs a batch's first half with its second, and must not always pair short
    texts with long ones.
    """
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), 50 * batch_size):
        chunk = order[start : start + 50 * batch_size]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [rng.permutation(batches[i]) for i in rng.permutation(len(batches))]


# Padded tokens of an evaluation batch: few enough for a CPU's cache, enough to fill a GPU.
EVALUATION_TOKENS = {"cpu": 1024, "cuda": 4096}


def token_budget_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Row indices by length, in batches of one row or more and at most max_tokens padded tokens."""
    batches, current = [], []
    for row in np.argsort(lengths, kind="stable"):
        if current and lengths[row] * (len(current) + 1) > max_tokens:
            batches.append(np.array(current))
            current = []
        current.append(row)
    return [*batches, np.array(current)]
