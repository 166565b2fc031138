"""AdamW whose second moment follows another gradient."""

import torch
from torch import Tensor


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
