"""Collapse watched between optimizer steps: --measure-every STEPS, `measured` in results.json.

Models that learn the classes at different speeds are to be compared at equal training loss, and a
validation after each epoch is too seldom for that. So some rows are measured often, the same ones
before the first step and ever after, for ranks depend on how many rows there are: ranks and spread
of fixed validation rows, loss and accuracy of fixed training rows as an evaluation finds them,
without dropout. Training is not touched: no random number is drawn and no weight changes.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse.data.batches import Split
from collapse.data.task import fixed_draw
from collapse.measures.layers import collapse_of
from collapse.training.evaluation import evaluate

MEASURED_ROWS = 256  # of each split, by default


def draw_rows(split: Split, limit: int = MEASURED_ROWS) -> Split:
    rows = fixed_draw(len(split.labels), limit)
    return Split([split.token_ids[row] for row in rows], split.labels[rows])


def measures(model: nn.Module, train: Split, validation: Split) -> dict[str, float | None]:
    """Numbers of a DualHeadModel as it stands, with the zero engram; its mode stays as it was.

    Ranks and `cdnv` are of pooled states of validation rows, `validation_accuracy` is theirs;
    `loss` (nats) and `accuracy` are of the classifier on training rows; `rows` counts validation
    rows, on which ranks depend. None where a state or a logit is not finite.
    """
    return measures_on(model, train, validation, [None])[0]


def measures_on(
    model: nn.Module, train: Split, validation: Split, limits: Sequence[int | None]
) -> list[dict[str, float | None]]:
    """`measures` on so many of each split's rows, for every limit, from one evaluation.

    None stands for all rows.
    """
    was_training = model.training
    of_validation, of_train = (evaluate(model, s, losses=False) for s in (validation, train))
    model.train(was_training)
    states = np.stack([of_validation.pooled, of_validation.pooled_without_first])
    logits, train_logits = (torch.from_numpy(e.logits).float() for e in (of_validation, of_train))
    records = []
    for limit in limits:
        rows, train_rows = (fixed_draw(len(split.labels), limit) for split in (validation, train))
        labels, train_labels = validation.labels[rows], train.labels[train_rows]
        finite = train_logits[train_rows].isfinite().all()
        loss = F.cross_entropy(train_logits[train_rows], train_labels).item() if finite else None
        records.append(
            {
                **collapse_of(states[:, rows], labels.numpy()),
                "validation_accuracy": accuracy(logits[rows], labels),
                "loss": loss,
                "accuracy": accuracy(train_logits[train_rows], train_labels) if finite else None,
                "rows": len(labels),
            }
        )
    return records


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()
