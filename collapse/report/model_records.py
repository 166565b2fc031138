"""What Experiment 4 measures of one saved model: draws of rows, and numbers of its states."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collapse.data.batches import Split
from collapse.data.registry import load_ag_news
from collapse.data.sst2 import load_sst2
from collapse.data.task import Rows, Task, limit_task
from collapse.measures.layers import LayerStates, records_by_depth
from collapse.measures.neural_collapse import (
    cdnv,
    class_means,
    effective_rank_within,
    ncc_agreement,
    neural_collapse_metrics,
    spreads,
)
from collapse.measures.rank import random_subsets, rank_metrics, ranks_from_gram, singular_values
from collapse.utils.errors import UserError

LEAST_ROWS = 4  # half of them still have a rank
CURVE_ROWS = (50, 100, 200, 400, 800, 1600)  # numbers of rows that the rank is also measured on
# Size of the other data set's sample for `transfer_accuracy`, limited to keep a record cheap.
TRANSFER_ROWS, TRANSFER_TOKENS = 300, 16
LANGUAGE_ROWS = 200


@dataclass(frozen=True)
class Splits:
    """The rows that the models of a study are measured on."""

    validation: Split
    train: Split  # as many training rows
    language: Split  # fewer validation rows, for the LM loss, which is expensive
    transfer: tuple[Split, Split] | None = None  # training and test rows of another data set


def draw_splits(
    task: Task, rows: int, data_dir: Path | None, encode: Callable[[Rows, int | None], Split]
) -> Splits:
    """Fixed draws of up to `rows` of the task's rows, and of another data set's in data_dir.

    encode(rows, longest) gives token ids, cut to `longest`. Raises UserError for too few rows.
    """
    validation = limit_task(task, None, rows).validation
    if len(validation) < LEAST_ROWS:
        too_few = f"{len(validation)} validation rows are too few"
        raise UserError(f"{too_few}: {LEAST_ROWS} or more are needed.")
    train, other = limit_task(task, len(validation), None).train, None
    if data_dir is not None:
        with contextlib.suppress(UserError, OSError):  # data_dir may lack the other data set
            other = (load_sst2 if task.name.startswith("AG News") else load_ag_news)(data_dir)
    transfer = None
    if other is not None:
        most = min(TRANSFER_ROWS, len(validation))
        other = limit_task(other, most, most)
        transfer = tuple(encode(part, TRANSFER_TOKENS) for part in (other.train, other.validation))
    language = limit_task(task, None, min(rows, LANGUAGE_ROWS)).validation
    splits = (encode(part, None) for part in (validation, train, language))
    return Splits(*splits, transfer)


def pooled_record(
    states: LayerStates, labels: np.ndarray, lengths: np.ndarray, draws: int
) -> dict[str, Any]:
    """Ranks, spreads and neural collapse by depth; of the last state also on subsets of rows."""
    layers, n = records_by_depth(states, labels, lengths), len(labels)
    pooled = states.pooled[-1, 0]  # (N, D) what the classifier reads
    subsets = {size: random_subsets(n, size, draws) for size in CURVE_ROWS if size < n}
    return {
        **layers[-1],
        **neural_collapse_metrics(pooled, labels),
        "effective_rank_share": layers[-1]["effective_rank"] / max(1, n - 1),
        "layers": layers,
        "singular_values": singular_values(pooled).tolist(),
        "subsets": {
            str(size): [ranks_from_gram(pooled[rows])["effective_rank"] for rows in drawn]
            for size, drawn in subsets.items()
        },
        "halves": {"rows": n // 2, **half_records(states.pooled[-1], labels, draws)},
    }


def half_records(states: np.ndarray, labels: np.ndarray, draws: int) -> dict[str, list[float]]:
    """Numbers on random halves of the rows, from which intervals are estimated.

    states (2, N, D) are pooled with and without the first token.
    """
    n = len(labels)
    by_measure: dict[str, list[float]] = {}
    for rows in random_subsets(n, n // 2, draws):
        (pooled, rest), half_labels = states[:, rows], labels[rows]
        numbers = ranks_from_gram(pooled)
        numbers["cdnv"] = cdnv(pooled, half_labels)
        for suffix, features in (("", pooled), ("_without_first", rest)):
            within = effective_rank_within(features, half_labels)
            numbers["effective_rank_within" + suffix] = within
        numbers["effective_rank_without_first"] = ranks_from_gram(rest)["effective_rank"]
        for name, value in numbers.items():
            by_measure.setdefault(name, []).append(value)
    return by_measure


def intermediate_record(
    features: np.ndarray,
    labels: np.ndarray,
    train_features: np.ndarray,
    train_labels: np.ndarray,
    weights: np.ndarray,
    bias: np.ndarray,
) -> dict[str, float]:
    """Ranks and NC1 to NC4 of the classifier's intermediate features (N, D) on validation rows.

    `ncc_agreement` uses class means of the validation rows themselves, `ncc_agreement_train_means`
    those of the training rows, as Papyan et al. 2020 do. weights (C, D), bias (C,).
    """
    means = class_means(train_features, train_labels, len(weights))
    return {
        **rank_metrics(features),
        **neural_collapse_metrics(features, labels, weights, bias),
        "ncc_agreement_train_means": ncc_agreement(features, means, weights, bias),
    }


def train_record(
    pooled: np.ndarray,
    intermediate: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    bias: np.ndarray,
) -> dict[str, float | dict]:
    """NC1 to NC3 and spreads on training rows (N, D), on which the literature measures them."""
    intermediate_numbers = neural_collapse_metrics(intermediate, labels, weights, bias)
    intermediate_numbers.pop("ncc_agreement")  # on training rows it is nearly their accuracy
    return {
        **neural_collapse_metrics(pooled, labels),
        **spreads(pooled, labels),
        "intermediate": intermediate_numbers,
    }
