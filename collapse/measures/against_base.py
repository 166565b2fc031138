"""A model's states on given texts against those of its base: which rows, numbers, the verdict."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from collapse.data.batches import Split, collate, count_targets, encode_rows, token_budget_batches
from collapse.data.task import Rows, fixed_draw
from collapse.measures.layers import (
    READINGS,
    LayerStates,
    collapse_of,
    summarize_states,
    undisturbed,
)
from collapse.measures.neural_collapse import sink_ratio
from collapse.measures.thresholds import KEPT
from collapse.models.losses import lm_loss_of_logits
from collapse.utils.errors import UserError

ROWS, LEAST_ROWS, MAX_LENGTH = 256, 128, 128
ALARM = 0.325  # the same on the way: twice running it foretells that end, studies/alarm_replay.py
BATCH_TOKENS = 1024  # padded; the logits of so many exist at one time


@dataclass(frozen=True)
class Texts:
    """The rows to measure on."""

    split: Split  # labels are zeros where none were given
    classes: int  # 0 without labels
    sha256: str  # of texts, labels and tokens


def draw_texts(
    texts: Sequence[str], labels: Sequence[Any] | None, tokenizer: Any, rows: int, max_length: int
) -> Texts:
    """Up to `rows` of the different texts, a fixed draw, as tokens.

    Of a text that stands there twice the first label counts. Raises UserError where there is no
    text, one has no token, or labels are not as many.
    """
    if labels is not None and len(labels) != len(texts):
        raise UserError(f"{len(texts):,} texts and {len(labels):,} labels: give one to each text.")
    different: dict[str, str] = {}
    for text, label in zip(texts, [0] * len(texts) if labels is None else labels, strict=True):
        different.setdefault(text.strip(), str(label))
    different.pop("", None)
    if not different:
        raise UserError("there is no text to measure on.")
    names, numbers = np.unique(list(different.values()), return_inverse=True)
    drawn = fixed_draw(len(different), rows)
    chosen = Rows([list(different)[row] for row in drawn], numbers[drawn].tolist())
    split = encode_rows(chosen, lambda some: tokenizer(some)["input_ids"], max_length)
    content = [chosen.texts, chosen.labels, [ids.tolist() for ids in split.token_ids]]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Texts(split, len(names) if labels is not None else 0, digest)


def pooled_states(
    model: nn.Module,
    core: nn.Module,
    texts: Texts,
    read: str,
    causal: bool,
    every_layer: bool = False,
) -> tuple[LayerStates, float | None]:
    """States of the last layer, or of all, and the mean next-token loss in nats.

    model is what runs: the model, or a wrapper of distributed training around it; core is the
    transformers model inside; causal: it has a causal LM's head. The loss is None without one, and
    where it is not finite.
    """
    split, states, loss = texts.split, None, 0.0
    if int(max(ids.max() for ids in split.token_ids)) >= core.config.vocab_size:
        raise UserError("the tokenizer has tokens that the model or its base does not know.")
    # Decoders under a classifier refuse to pad without a token for it: then one row at a time.
    alone = not causal and getattr(core.config, "pad_token_id", None) is None
    with undisturbed(model):
        for rows in token_budget_batches(split.lengths, 1 if alone else BATCH_TOKENS):
            batch = collate(split, rows, next(model.parameters()).device)
            mask = batch.text_mask.long()
            output = model(batch.input_ids, attention_mask=mask, output_hidden_states=True)
            hidden = output.hidden_states[0 if every_layer else -1 :]
            found = [summarize_states(one, batch.text_mask, READINGS[read]) for one in hidden]
            size = hidden[-1].shape[-1]
            states = states or LayerStates.empty(len(found), len(split.labels), size)
            states.put(rows, found)
            if causal:
                loss += lm_loss_of_logits(output.logits, batch).item()
    loss /= count_targets(split, range(len(split.labels))) or math.nan
    return states, loss if causal and math.isfinite(loss) else None


def numbers_of(
    states: LayerStates, loss: float | None, texts: Texts, read: str
) -> dict[str, float | None]:
    """The last layer's ranks as Experiment 4 and --measure-every have them, and the LM loss."""
    labels = texts.split.labels.numpy() if texts.classes else None
    numbers = collapse_of(states.pooled[-1], labels)
    if read != "mean":
        numbers["effective_rank_without_first"] = None
    sink = float(sink_ratio(*states.norms[-1]))
    return numbers | {"sink_ratio": sink if math.isfinite(sink) else None, "lm_loss": loss}


def share_kept(now: dict[str, Any], base: dict[str, Any]) -> float | None:
    """Of the base's components for 95% of the variance; None where one side has none."""
    if now["dims_95pct"] is None or not base["dims_95pct"]:
        return None
    return now["dims_95pct"] / base["dims_95pct"]


def judge(
    now: dict[str, Any], base: dict[str, Any], texts: Texts, bound: float = KEPT
) -> tuple[str, str]:
    """`kept`, `collapsed`, `not finite` or `no verdict`, and a sentence that says why."""
    rows, needed = len(texts.split.labels), max(0, texts.classes - 1)
    if now["dims_95pct"] is None:
        return "not finite", "states, and so weights, are NaN or infinite."
    if rows < LEAST_ROWS:
        return "no verdict", f"{rows} different texts are too few: give {LEAST_ROWS} or more."
    if not base["dims_95pct"]:
        return "no verdict", "the base's own states are all one, or not finite."
    if needed >= base["dims_95pct"] / 8:
        few = f"{texts.classes} classes need {needed} of the base's {base['dims_95pct']} components"
        return "no verdict", f"{few}, too many to tell a collapse: give more texts."
    if share_kept(now, base) < bound:
        return "collapsed", f"under {100 * bound:g}% of the components are left."
    return "kept", f"{100 * bound:g}% or more of the components are left."
