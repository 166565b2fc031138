"""LoRA layers (Hu et al. 2021) that cost little more than their matrix products.

peft creates, names, stores and loads the adapters; we replace only how a layer computes:

    peft.get_peft_model(causal_lm, peft.LoraConfig(...))
    use_fused_lora(causal_lm)

A layer of peft casts its input to the adapter's float32, keeps a copy after dropout in that type,
and adds the adapter's output in separate passes. Here a layer is one autograd function: the
adapter's products have the base layer's type and are added in place. For the backward pass it keeps
the input, which layers share, and the positions of the values that dropout removed.
"""

import math
import types

import torch
from torch import Tensor, nn

from collapse.models.four_bits import is_packed, unpacked_weight


def use_fused_lora(model: nn.Module) -> None:
    """Make each LoRA layer that peft put into `model` compute by LoraLinear, in place.

    Weights, names and peft's switches (disable_adapter, training or evaluation) keep working, and a
    base layer may be replaced between steps. Adapters of experts' stacked weights, and of linear
    layers whose class overrides the forward pass, keep peft's computation. Raises ValueError, here
    or when a layer runs, for what LoraLinear does not support: merged or several adapters, DoRA and
    other variants, biases of adapters, a base layer that trains, or one that is not linear.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("the model has no LoRA layers: call peft.get_peft_model first.")
    layers = [layer for layer in layers if not _is_special(layer)]
    for layer in layers:
        _only_adapter(layer)
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)


class LoraLinear(torch.autograd.Function):
    """base(x) + scaling * B A dropout(x), with x of the type that the base layer computes in.

    x: (..., I); A: (R, I) and B: (O, R), both float32; base: a frozen linear layer, plain, in
    4 bits, or GPT-2's Conv1D; p: the rate at which dropout takes values of x from the adapter.
    Gives (..., O) in x's type. Differentiable once, in x, A and B. For the backward pass it keeps
    x itself, dropout's mask (see draw_mask), and the adapter's inner values, (T, R) for T tokens.
    """

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, base: nn.Linear, scaling: float, p: float):
        output, rows = base(x), x.reshape(-1, x.shape[-1])  # (..., O), (T, I)
        mask = draw_mask(rows, p) if p else None
        scale = scaling / (1 - p)  # on the inner values: no pass over x or the output for it
        inner = (kept_values(rows, mask) @ a.to(x.dtype).T).mul_(scale)  # (T, R)
        output.view(-1, output.shape[-1]).addmm_(inner, b.to(x.dtype).T)
        ctx.save_for_backward(x, a, b, mask, inner)
        ctx.base, ctx.scale = base, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        x, a, b, mask, inner = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])  # (T, I)
        grad_output = grad_output.reshape(-1, grad_output.shape[-1])  # (T, O)
        grad_x = grad_a = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            grad_inner = (grad_output @ b.to(x.dtype)).mul_(ctx.scale)  # (T, R)
            if ctx.needs_input_grad[1]:
                grad_a = _float32_product(grad_inner.T, kept_values(rows, mask))
            if ctx.needs_input_grad[2]:
                grad_b = _float32_product(grad_output.T, inner)
            if ctx.needs_input_grad[0]:
                grad_x = kept_values(grad_inner @ a.to(x.dtype), mask, overwrite=True)
                grad_x = grad_x.addmm_(grad_output, plain_weight(ctx.base, x.dtype)).view(x.shape)
        return grad_x, grad_a, grad_b, None, None, None


def draw_mask(rows: Tensor, p: float) -> Tensor:
    """Draws which values of `rows` dropout removes, each with probability p, by torch's generator.

    On a CPU: the int64 positions of the removed values, so that a dropout of 5% draws, keeps and
    touches a twentieth of the values. On a GPU, where one would have to wait for their number: a
    boolean for each value, True where it stays.
    """
    if rows.device.type == "cpu":
        return dropped_positions(rows.numel(), p)
    return torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - p)


def kept_values(rows: Tensor, mask: Tensor | None, overwrite: bool = False) -> Tensor:
    """`rows` with removed values set to zero. With `overwrite` they may be changed in place."""
    if mask is None:
        return rows
    if mask.dtype == torch.bool:
        # one kernel that reads bytes as they are, where a product with the mask would cast them
        return torch.ops.aten.native_dropout_backward(rows, mask, 1.0)
    rows = rows if overwrite else rows.clone(memory_format=torch.contiguous_format)
    rows.view(-1).index_fill_(0, mask, 0)
    return rows


def dropped_positions(count: int, p: float) -> Tensor:
    """A random subset of 0 .. count - 1, in order, each number in it with probability p < 1.

    The gaps between its numbers are geometric, so only about p * count random numbers are drawn, by
    inversion of uniform ones of 24 bits. The actual rate is off by less than a millionth of p.
    """
    pieces, last = [torch.empty(0, dtype=torch.int64)], -1
    while last < count - 1:
        expected = (count - 1 - last) * p
        draws = int(expected + 6 * math.sqrt(expected)) + 1  # nearly always enough
        uniform = 1 - torch.rand(draws, device="cpu", dtype=torch.float32)  # in (0, 1]
        gaps = uniform.log_().div_(math.log1p(-p)).long()  # how many stay before one is dropped
        pieces.append(gaps.add_(1).cumsum_(0).add_(last))
        last = int(pieces[-1][-1])
    positions = torch.cat(pieces)
    return positions[: int(torch.searchsorted(positions, count))]


def _forward(layer: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    """Replaces a LoRA layer's own forward method."""
    if args or kwargs:
        raise ValueError("a fused LoRA layer takes its input alone, and one adapter for all rows.")
    base = layer.base_layer
    if layer.disable_adapters and not layer.merged:
        return base(x)
    name = _only_adapter(layer)
    if is_packed(base):  # bitsandbytes' own rules
        compute_type, result_type = base.compute_dtype or x.dtype, x.dtype
    else:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        compute_type = torch.get_autocast_dtype(device) if autocast else base.weight.dtype
        result_type = compute_type
    dropout = layer.lora_dropout[name]  # nn.Identity where the rate is zero
    output = LoraLinear.apply(
        x.to(compute_type),
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        base,
        layer.scaling[name],
        dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0,
    )
    return output.to(result_type)


def _only_adapter(layer: nn.Module) -> str:
    """A LoRA layer's only adapter, by name. Raises ValueError where LoraLinear would be wrong."""
    base = layer.base_layer
    linear = isinstance(base, nn.Linear) or _is_transposed(base)
    if not linear or not (base.weight.is_floating_point() or is_packed(base)):
        layer_type = type(base).__name__
        raise ValueError(
            f"a fused LoRA layer needs a linear one, plain or in 4 bits, not {layer_type}."
        )
    if any(parameter.requires_grad for parameter in base.parameters()):
        raise ValueError("a fused LoRA layer gives its base layer no gradient: freeze it.")
    if layer.merged:
        raise ValueError("a fused LoRA layer cannot run with a merged adapter: unmerge it.")
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        raise ValueError(f"a fused LoRA layer needs one active adapter, not {len(names)}.")
    if layer.lora_variant.get(names[0]) or layer.lora_bias[names[0]]:
        raise ValueError("a fused LoRA layer is plain LoRA: no variant as DoRA, no adapter bias.")
    return names[0]


def _is_transposed(base: nn.Module) -> bool:
    """Whether it is the linear layer of GPT and GPT-2, whose weight is (I, O)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(base, Conv1D)


def _is_special(layer: nn.Module) -> bool:
    """Whether a LoRA layer must stay peft's: one of experts' stacked weights, or of a linear layer
    whose class overrides the forward pass, as Falcon's and BitNet's do.
    """
    from peft.tuners.lora.layer import ParamWrapper

    if isinstance(layer, ParamWrapper):
        return True
    base = layer.base_layer
    plain = type(base).forward is nn.Linear.forward or is_packed(base)
    return isinstance(base, nn.Linear) and not plain


def plain_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) of a linear layer in nn.Linear's layout, unpacked if it has 4 bits."""
    if is_packed(base):
        return unpacked_weight(base, dtype)
    weight = base.weight.to(dtype)
    return weight.T if _is_transposed(base) else weight


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32; on a GPU the sum is never rounded to the factors' type."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
