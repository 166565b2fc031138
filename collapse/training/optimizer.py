"""The learning rate's schedule, and an AdamW whose scale and direction part."""

import math

import torch
from torch import Tensor

from collapse.config import RunConfig


def learning_rate_at(step: int, total_steps: int, config: RunConfig) -> float:
    """Learning rate of step 0 .. total_steps-1: linear warm-up, then held or cosine to zero."""
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class SharedScaleAdamW(torch.optim.AdamW):
    """AdamW whose steps follow one gradient and are scaled by the second moment of another.

    The first moment is that of the gradients, the second that of `scale_gradients`, which stand in
    the order of the parameters and are set before each step. A parameter without a gradient stays.
    """

    scale_gradients: list[Tensor]

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        rate, (beta_1, beta_2) = group["lr"], group["betas"]
        for parameter, scale in zip(group["params"], self.scale_gradients, strict=True):
            if (gradient := parameter.grad) is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            count = state["step"].item()
            state["exp_avg"].lerp_(gradient, 1 - beta_1)
            state["exp_avg_sq"].mul_(beta_2).addcmul_(scale, scale, value=1 - beta_2)
            size = (state["exp_avg_sq"] / (1 - beta_2**count)).sqrt_().add_(group["eps"])
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.addcdiv_(state["exp_avg"], size, value=-rate / (1 - beta_1**count))
