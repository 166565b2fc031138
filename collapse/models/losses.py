"""Losses as sums, so that an optimizer step can be split into micro-batches of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse.data.batches import Batch

LOGIT_CHUNK_TOKENS = 256  # tokens whose logits exist at one time


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear layer's logits, which never exist all at once.

    Logits are made for LOGIT_CHUNK_TOKENS tokens at a time and turned into their gradient at once,
    so nothing of size T x V is kept for the backward pass or computed again in it. Differentiable
    once. The sum is fp32 whatever the type of the states; torch.nn.functional.linear_cross_entropy
    sums in the states' type, which leaves three digits in bfloat16.

    Given `start`, other states and the linear layer above them, targets are ignored and the sum is
    of KL(start's distribution || distribution of the logits). Its gradient by the logits is p - q,
    where the cross-entropy's is p - one_hot(target).

    Logits may be multiplied by `scale` and then limited to (-cap, cap) by cap tanh(x / cap).
    """

    @staticmethod
    def forward(
        ctx,
        states: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (T,)
        with_gradients: bool,
        start: tuple[Tensor, nn.Linear] | None = None,  # (T, D) and the layer
        scale: float = 1.0,
        cap: float | None = None,
    ) -> Tensor:  # scalar, fp32
        needed = [with_gradients and n for n in ctx.needs_input_grad[:3]]
        grad_states, grad_weight, grad_bias = (
            torch.zeros_like(tensor) if n else None
            for tensor, n in zip((states, weight, bias), needed, strict=True)
        )
        total = states.new_zeros((), dtype=torch.float32)
        for first in range(0, len(states), LOGIT_CHUNK_TOKENS):
            part = slice(first, first + LOGIT_CHUNK_TOKENS)
            logits = _scaled_and_capped(
                F.linear(states[part], weight, bias), scale, cap
            )  # (chunk, V)
            log_p = _log_softmax(logits)
            if start is None:
                true_tokens = targets[part].unsqueeze(1)
                total -= log_p.gather(1, true_tokens).sum()
                if not any(needed):
                    continue
                slope = log_p.exp_()
                slope.scatter_add_(
                    1, true_tokens, slope.new_full((), -1.0).expand(true_tokens.shape)
                )
            else:
                log_q = _log_softmax(_scaled_and_capped(start[1](start[0][part]), scale, cap))
                q = log_q.exp()
                total += (q * (log_q - log_p)).sum()
                slope = log_p.exp_() - q
            if cap:
                slope *= 1 - (logits.float() / cap).square()  # tanh' = 1 - tanh^2
            if scale != 1:
                slope *= scale
            slope = slope.to(states.dtype)  # d loss / d what the linear layer gave
            if grad_states is not None:
                grad_states[part] = slope @ weight
            if grad_weight is not None:
                grad_weight.addmm_(slope.T, states[part])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        ctx.gradients = grad_states, grad_weight, grad_bias
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        # In fp32: rounded to bfloat16, the scale would be off by up to 0.2% for a whole step.
        scaled = (None if g is None else (g.float() * upstream).to(g.dtype) for g in ctx.gradients)
        return *scaled, *[None] * 5


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.float32)


def _scaled_and_capped(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    if scale != 1:
        logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap else logits


def _scaling_of(lm_head: nn.Linear) -> tuple[float, float | None]:
    """(scale, cap) of the head's logits, from store_logit_scaling; default: (1, None)."""
    return getattr(lm_head, "logit_scale", 1.0), getattr(lm_head, "logit_cap", None)


def lm_loss_sum(
    hidden: Tensor, batch: Batch, lm_head: nn.Linear, targets: Tensor | None = None
) -> Tensor:
    """Next-token cross-entropy in nats, summed over the batch's targets; hidden is (B, L, D).

    targets (T,): predict these instead of the true tokens.
    """
    if targets is None:
        targets = batch.input_ids.flatten()[batch.target_index]  # (T,)
    states = predicting_states(hidden, batch)
    # Inside an autograd function gradients always look disabled, so the answer is passed in.
    wanted = torch.is_grad_enabled()
    weights = lm_head.weight, lm_head.bias
    return LinearCrossEntropy.apply(states, *weights, targets, wanted, None, *_scaling_of(lm_head))


def lm_loss_of_logits(logits: Tensor, batch: Batch) -> Tensor:
    """What lm_loss_sum gives, of a model's own logits (B, L, V), whatever it does to them."""
    targets = batch.input_ids.flatten()[batch.target_index]  # (T,)
    total = logits.new_zeros((), dtype=torch.float32)
    for part in torch.arange(len(targets)).split(LOGIT_CHUNK_TOKENS):
        log_p = _log_softmax(logits.flatten(0, 1)[batch.target_index[part] - 1])  # (chunk, V)
        total -= log_p.gather(1, targets[part].unsqueeze(1)).sum()
    return total


def kl_from_start_sum(
    hidden: Tensor, batch: Batch, lm_head: nn.Linear, start_hidden: Tensor, start_head: nn.Linear
) -> Tensor:
    """KL(start || now) of the next-token distributions in nats, summed over the batch's targets.

    The LM loss with the initial model's distribution in place of the true token, as in learning
    without forgetting (Li & Hoiem 2016). hidden and start_hidden are (B, L, D).
    """
    states, start = (predicting_states(h, batch) for h in (hidden, start_hidden))
    wanted = torch.is_grad_enabled()
    weights, form = (lm_head.weight, lm_head.bias), _scaling_of(lm_head)
    return LinearCrossEntropy.apply(states, *weights, None, wanted, (start, start_head), *form)


def predicting_states(hidden: Tensor, batch: Batch) -> Tensor:
    """The states (T, D) of hidden (B, L, D) just before each target, which predict it."""
    return hidden.flatten(0, 1)[batch.target_index - 1]


def combined_loss(cls_loss, other_loss, weight: float):
    """weight * other + (1 - weight) * cls; the classification loss alone where other is None."""
    return cls_loss if other_loss is None else weight * other_loss + (1 - weight) * cls_loss
