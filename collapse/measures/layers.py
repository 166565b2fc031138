"""What a model's layers hold of each text, pooled as the pass goes on, and numbers of it by depth.

A pretrained model makes an attention sink of the first token: in some layers its state is hundreds
of times as long as the others', and a mean over tokens is then that one state over the number of
tokens. So everything is pooled twice, with the first token and without it.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from collapse.measures.neural_collapse import (
    cdnv,
    effective_rank_within,
    length_share,
    sink_ratio,
    spreads,
)
from collapse.measures.rank import rank_metrics, ranks_from_gram
from collapse.models.architectures import decoder_layers
from collapse.utils.errors import UserError


@dataclass
class LayerStates:
    """Hidden states by depth: the embeddings, each layer's output, and what a final norm makes of
    the last one.

    The second axis is (all text tokens, all but the first); a row of one token has it in both.
    """

    pooled: np.ndarray  # (depth, 2, N, D) fp32, over those tokens; [-1, 0] the classifier's
    norms: np.ndarray  # (depth, 2, N) norm of the first token's state, mean norm of the others'

    @classmethod
    def empty(cls, depth: int, rows: int, size: int) -> "LayerStates":
        pooled = np.empty((depth, 2, rows, size), np.float32)
        return cls(pooled, np.empty((depth, 2, rows), np.float32))

    def put(self, rows: np.ndarray, found: list[tuple[Tensor, Tensor]]) -> None:
        """The states of a batch's rows, as summarize_states gives them for each depth."""
        for depth, (pooled, norms) in enumerate(found):
            self.pooled[depth][:, rows] = pooled.cpu().numpy()
            self.norms[depth][:, rows] = norms.cpu().numpy()


def mean_over_tokens(hidden: Tensor, text_mask: Tensor) -> Tensor:
    mask = text_mask.unsqueeze(-1)
    return (hidden.float() * mask).sum(1) / mask.sum(1)


def last_token(hidden: Tensor, text_mask: Tensor) -> Tensor:
    positions = torch.arange(text_mask.shape[1], device=text_mask.device)
    last = (positions * text_mask).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last].float()


def first_token(hidden: Tensor, text_mask: Tensor) -> Tensor:
    return hidden[:, 0].float()


# From hidden states (B, L, D), a prefix's left out, and a mask (B, L) that is True on the tokens to
# pool: a state for each text (B, D), in fp32.
Pooling = Callable[[Tensor, Tensor], Tensor]
# Name in --pooling -> what the classifier reads of each text.
POOLINGS: dict[str, Pooling] = {"mean": mean_over_tokens, "last": last_token}
# And what a classifier on an encoder reads; in a causal model the first token has seen no other.
READINGS = POOLINGS | {"first": first_token}


def find_pooling(name: str) -> Pooling:
    """The function that --pooling or a run's settings name. Raises UserError for another name."""
    if name not in POOLINGS:
        raise UserError(f"--pooling {name} is none of {', '.join(POOLINGS)}.")
    return POOLINGS[name]


def without_first(text_mask: Tensor) -> Tensor:
    """text_mask (B, L) less each row's first token, which a row of one token keeps."""
    rest = text_mask.clone()
    rest[:, 0] = text_mask.sum(1) == 1
    return rest


def summarize_states(hidden: Tensor, text_mask: Tensor, pool: Pooling) -> tuple[Tensor, Tensor]:
    """(2, B, D) and (2, B), as LayerStates holds them, of one depth's states.

    hidden is (B, L, D), or with a prefix (B, 1 + L, D). A pooling that takes one token's state has
    it in both places.
    """
    rest, text = without_first(text_mask), hidden[:, -text_mask.shape[1] :]
    norms = torch.linalg.vector_norm(text, dim=-1, dtype=torch.float32)  # (B, L)
    others = (norms * rest).sum(1) / rest.sum(1)  # (B,)
    pooled = torch.stack([pool(text, text_mask), pool(text, rest)])
    return pooled, torch.stack([norms[:, 0], others])


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, nothing compiled; then each module is in its mode again.

    No inference tensors: what a model caches in a pass may be needed by a backward pass later.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def summaries_of_layers(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields a list that holds, after a pass, summarize_states of all depths of LayerStates but the
    last, which is the pass's result.

    model is a DualHeadModel. Made as the pass goes on: the hidden states of two layers never exist
    at one time.
    """
    found: list[tuple[Tensor, Tensor]] = []
    text_mask = last = None

    def start(module, arguments) -> None:
        nonlocal text_mask
        text_mask = arguments[1]
        found.clear()

    def catch(module, arguments, keywords) -> None:
        states = arguments[0] if arguments else keywords["hidden_states"]
        found.append(summarize_states(states, text_mask, model.pool))

    def keep(module, arguments, output) -> None:
        nonlocal last
        last = output if isinstance(output, Tensor) else output[0]

    def end(module, arguments, output) -> None:
        nonlocal last
        if output.last_hidden_state.data_ptr() != last.data_ptr():  # a final norm came after
            found.append(summarize_states(last, text_mask, model.pool))
        last = None

    layers = decoder_layers(model.backbone)
    handles = [model.register_forward_pre_hook(start)]
    handles += [layer.register_forward_pre_hook(catch, with_kwargs=True) for layer in layers]
    handles += [layers[-1].register_forward_hook(keep), model.backbone.register_forward_hook(end)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def records_by_depth(
    states: LayerStates, labels: np.ndarray, lengths: np.ndarray
) -> list[dict[str, float]]:
    """Numbers of each depth: of all text tokens pooled, and `_without_first` of the others.

    rank_metrics, `cdnv`, effective_rank_within, within_spread and between_spread, length_share, see
    collapse.measures.neural_collapse, and `sink_ratio`, first token's norm over the others'.
    labels, lengths (N,).
    """
    records = []
    for (pooled, rest), (first, others) in zip(states.pooled, states.norms, strict=True):
        record = rank_metrics(pooled)
        record |= numbers_of(pooled, labels, lengths, "")
        record["effective_rank_without_first"] = ranks_from_gram(rest)["effective_rank"]
        record |= numbers_of(rest, labels, lengths, "_without_first")
        records.append(record | {"sink_ratio": float(sink_ratio(first, others))})
    return records


def numbers_of(
    pooled: np.ndarray, labels: np.ndarray, lengths: np.ndarray, suffix: str
) -> dict[str, float]:
    """What rank_metrics does not tell of pooled states (N, D)."""
    within = effective_rank_within(pooled, labels)
    numbers = {"effective_rank_within": within, **spreads(pooled, labels)}
    numbers["cdnv"] = cdnv(pooled, labels)
    numbers["length_share"] = length_share(pooled, lengths)
    return {name + suffix: value for name, value in numbers.items()}


def collapse_of(states: np.ndarray, labels: np.ndarray | None) -> dict[str, float | None]:
    """How many directions pooled states (2, N, D) spread over, in all and within classes.

    states: of one depth, as summarize_states gives them. None for what is not finite, and for what
    needs labels (N,) where there are none.
    """
    pooled, rest = states
    ranks = rank_metrics(pooled) if np.isfinite(states).all() else {}
    names = ("effective_rank", "stable_rank", "dims_95pct", "top10_variance")
    numbers = {name: ranks.get(name) for name in names}
    numbers |= dict.fromkeys(
        ("effective_rank_within", "effective_rank_without_first", "cdnv"), None
    )
    if ranks:
        numbers["effective_rank_without_first"] = ranks_from_gram(rest)["effective_rank"]
    if ranks and labels is not None:
        numbers["effective_rank_within"] = effective_rank_within(pooled, labels)
        numbers["cdnv"] = cdnv(pooled, labels)
    return numbers
