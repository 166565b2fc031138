"""A model on a split, without dropout: outputs of every row, in the split's order, and losses."""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse.arms import Arm
from collapse.config import RunConfig
from collapse.data.batches import EVALUATION_TOKENS, Split, collate, count_targets
from collapse.measures.layers import (
    LayerStates,
    summaries_of_layers,
    summarize_states,
    without_first,
)
from collapse.models.losses import lm_loss_sum
from collapse.models.memory import in_batches_that_fit


@dataclass
class Evaluation:
    """A model's outputs on a split, in the split's order."""

    logits: np.ndarray  # (N, C)
    labels: np.ndarray  # (N,)
    pooled: np.ndarray  # (N, D) what the classifier reads
    pooled_without_first: np.ndarray  # (N, D) the same over all but a text's first token
    intermediate: np.ndarray  # (N, classifier's inner size)
    engrams: np.ndarray | None = None  # (N, E)
    layers: LayerStates | None = None  # with_layers; its last depth is `pooled`
    cls_loss: float | None = None  # mean over rows
    lm_loss: float | None = None  # mean over target tokens; None without an LM head

    @property
    def accuracy(self) -> float:
        return float((self.logits.argmax(1) == self.labels).mean())

    def correct(self) -> str:
        """A character for each row, 1 where the prediction is right: for tests that pair rows."""
        return "".join("1" if right else "0" for right in self.logits.argmax(1) == self.labels)

    def record(self, arm: Arm, config: RunConfig) -> dict[str, float | None]:
        """As Trainer.record has it, of true tokens and without anchors."""
        return {
            "loss": arm.loss(self.cls_loss, self.lm_loss, config),
            "cls_loss": self.cls_loss,
            "lm_loss": self.lm_loss,
            "accuracy": self.accuracy,
        }


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    engrams: np.ndarray | None = None,
    with_layers: bool = False,
    losses: bool = True,
    lm_head: nn.Linear | None = None,
) -> Evaluation:
    """Run a split through a DualHeadModel without dropout.

    engrams (N, E): each row's prefix for model 3; None runs it cold, with the zero engram.
    with_layers also keeps every layer's states, pooled. Without `losses` no loss is computed, and
    labels may be of other classes than the model's. lm_head: whose LM loss is computed; None: the
    model's own, if it has one. Leaves the model in evaluation mode and the random generators as
    they were.
    """
    model.eval()
    device = next(model.parameters()).device
    lm_head = (lm_head or model.lm_head) if losses else None
    layers: list[LayerStates] = []

    def run(rows: np.ndarray) -> tuple[dict[str, Tensor], dict[str, float]]:
        batch = collate(split, rows, device)
        prefix = None if engrams is None else torch.from_numpy(engrams[rows]).to(device)
        with summaries_of_layers(model) if with_layers else contextlib.nullcontext() as by_depth:
            out = model(batch.input_ids, batch.text_mask, prefix)
        if with_layers:
            by_depth.append(summarize_states(out.hidden, batch.text_mask, model.pool))
            if not layers:
                size = len(by_depth), len(split.labels), out.pooled.shape[1]
                layers.append(LayerStates.empty(*size))
            layers[0].put(rows, by_depth)
        outputs = {
            "logits": out.logits,
            "labels": batch.labels,
            "pooled": out.pooled,
            "pooled_without_first": model.pool(out.hidden, without_first(batch.text_mask)),
            "intermediate": out.intermediate,
            "engrams": out.engram,
        }
        sums = {}
        if losses:
            sums["cls_loss"] = F.cross_entropy(out.logits, batch.labels, reduction="sum").item()
        if lm_head is not None:
            sums["lm_loss"] = lm_loss_sum(out.hidden, batch, lm_head).item()
        return {name: part.cpu() for name, part in outputs.items() if part is not None}, sums

    runs = in_batches_that_fit(split.lengths, EVALUATION_TOKENS[device.type], run)
    batches, results = zip(*runs, strict=True)
    outputs, sums = zip(*results, strict=True)
    back = np.argsort(np.concatenate(batches))
    arrays = {
        name: torch.cat([of_batch[name] for of_batch in outputs]).numpy()[back]
        for name in outputs[0]
    }
    units = {"cls_loss": len(back), "lm_loss": max(1, count_targets(split, range(len(back))))}
    means = {name: sum(part[name] for part in sums) / units[name] for name in sums[0]}
    return Evaluation(**arrays, **means, layers=layers[0] if layers else None)
