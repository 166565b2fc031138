"""Collapse watched between optimizer steps: --measure-every STEPS, lines of metrics.jsonl.

Models that learn the classes at different speeds are to be compared at equal training loss, and a
validation after each epoch is too seldom for that. So a few rows are measured often: ranks and
spread of fixed validation rows, loss and accuracy of fixed training rows as an evaluation finds
them, without dropout. Training is not touched: no random number is drawn and no weight changes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse.batches import EVALUATION_TOKENS, Split, collate, token_budget_batches
from collapse.data import fixed_draw
from collapse.metrics import neural_collapse_metrics, rank_metrics, ranks_from_gram
from collapse.spread import within_classes

MEASURED_ROWS = 256  # of each split


@dataclass
class Measuring:
    """Measures one model, given its splits' rows to draw from once."""

    model: nn.Module  # a DualHeadModel
    train: Split
    validation: Split

    def __post_init__(self) -> None:
        self.train, self.validation = map(draw_rows, (self.train, self.validation))

    def __call__(self) -> dict[str, float | None]:
        """Numbers of the model as it stands, with the zero engram; its mode stays as it was.

        Ranks and `cdnv` are of pooled states of validation rows (None where a state is not finite),
        `loss` (nats) and `accuracy` of the classifier on training rows.
        """
        was_training = self.model.training
        self.model.eval()
        pooled, _ = outputs(self.model, self.validation)
        _, logits = outputs(self.model, self.train)
        self.model.train(was_training)
        loss = F.cross_entropy(logits, self.train.labels).item()
        right = (logits.argmax(1) == self.train.labels).float().mean().item()
        return {
            **collapse_of(pooled.numpy(), self.validation.labels.numpy()),
            "loss": loss if np.isfinite(loss) else None,
            "accuracy": right,
        }


def draw_rows(split: Split) -> Split:
    rows = fixed_draw(len(split.labels), MEASURED_ROWS)
    return Split([split.token_ids[row] for row in rows], split.labels[rows])


@torch.inference_mode()
def outputs(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """Pooled states (N, D) and the classifier's logits (N, C), on the CPU; no LM head runs."""
    device = next(model.parameters()).device
    batches = token_budget_batches(split.lengths, EVALUATION_TOKENS[device.type])
    found = []
    for rows in batches:
        batch = collate(split, rows, device)
        output = model(batch.input_ids, batch.text_mask)
        found.append((output.pooled.cpu(), output.logits.float().cpu()))
    back = torch.from_numpy(np.argsort(np.concatenate(batches)))
    pooled, logits = (torch.cat(column)[back] for column in zip(*found, strict=True))
    return pooled, logits


def collapse_of(pooled: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """How many directions pooled states (N, D) spread over, in all and within classes; CDNV."""
    names = ("effective_rank", "effective_rank_within", "stable_rank", "dims_95pct", "cdnv")
    if not np.isfinite(pooled).all():
        return dict.fromkeys(names)
    ranks = rank_metrics(pooled)
    within = ranks_from_gram(within_classes(pooled, labels))["effective_rank"]
    cdnv = neural_collapse_metrics(pooled, labels)["cdnv"]
    values = (ranks["effective_rank"], within, ranks["stable_rank"], ranks["dims_95pct"], cdnv)
    return dict(zip(names, values, strict=True))
