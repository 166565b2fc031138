"""LoRA layers (Hu et al. 2021) that cost little more than their products.

peft creates, names, stores and loads the adapters; only the way a layer computes is exchanged:

    peft.get_peft_model(causal_lm, peft.LoraConfig(...))
    use_fused_lora(causal_lm)

A layer of peft casts its input to the adapter's float32, keeps a dropped-out copy in that type,
and adds the adapter's output in passes of its own. Here a layer is one autograd function: the
adapter's products are of the base layer's type and added in place, and what is kept for the
backward pass is the input, which layers share, and which of its values dropout took.
"""

import math
import types

import torch
from torch import Tensor, nn


def use_fused_lora(model: nn.Module) -> None:
    """Let each LoRA layer that peft put into `model` compute by LoraLinear, in place.

    Weights, names and peft's switches (disable_adapter, training or evaluation) stay as they are,
    and a base layer may be replaced between steps. Adapters of experts' stacked weights, and of a
    linear layer whose class has a forward pass of its own, stay peft's. Raises ValueError, here or
    when a layer runs, for what LoraLinear does not compute: merged or several adapters, DoRA and
    other variants, biases of adapters, a base layer that trains or is not linear, plain or in 4
    bits.
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
    def backward(ctx, upstream: Tensor):
        x, a, b, mask, inner = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])  # (T, I)
        upstream = upstream.reshape(-1, upstream.shape[-1])  # (T, O)
        of_x = of_a = of_b = None
        with torch.autocast(x.device.type, enabled=False):
            of_inner = (upstream @ b.to(x.dtype)).mul_(ctx.scale)  # (T, R)
            if ctx.needs_input_grad[1]:
                of_a = _float32_product(of_inner.T, kept_values(rows, mask))
            if ctx.needs_input_grad[2]:
                of_b = _float32_product(upstream.T, inner)
            if ctx.needs_input_grad[0]:
                of_x = kept_values(of_inner @ a.to(x.dtype), mask, overwrite=True)
                of_x = of_x.addmm_(upstream, _weight(ctx.base, x.dtype)).view(x.shape)
        return of_x, of_a, of_b, None, None, None


def draw_mask(rows: Tensor, p: float) -> Tensor:
    """Which values of `rows` dropout takes, each with probability p, drawn by torch's generator.

    On a CPU the positions of those that it takes, int64: a dropout of 5% then draws, keeps and
    touches a twentieth of the values. Elsewhere, where one would have to wait for their number,
    a byte for each value: whether it stays.
    """
    if rows.device.type == "cpu":
        return dropped_positions(rows.numel(), p)
    return torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - p)


def kept_values(rows: Tensor, mask: Tensor | None, overwrite: bool = False) -> Tensor:
    """`rows`, zero where the mask takes a value. With `overwrite` they may be changed in place."""
    if mask is None:
        return rows
    if mask.dtype == torch.bool:
        # one kernel that reads bytes as they are, where a product with the mask would cast them
        return torch.ops.aten.native_dropout_backward(rows, mask, 1.0)
    rows = rows if overwrite else rows.clone(memory_format=torch.contiguous_format)
    rows.view(-1).index_fill_(0, mask, 0)
    return rows


def dropped_positions(count: int, p: float) -> Tensor:
    """Those of 0 .. count - 1 that are dropped, in order, each independently with probability p.

    The gaps between them are geometric, so only about p * count numbers are drawn: uniform ones
    of 24 bits, inverted. The rate is off by less than a millionth of p, which is below 1.
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
    """In place of a LoRA layer's own forward method."""
    if args or kwargs:
        raise ValueError("a fused LoRA layer takes its input alone, and one adapter for all rows.")
    base = layer.base_layer
    if layer.disable_adapters and not layer.merged:
        return base(x)
    name = _only_adapter(layer)
    if hasattr(base.weight, "quant_state"):  # bitsandbytes' own rules
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
    """The name of a LoRA layer's adapter. Raises ValueError where LoraLinear would be wrong."""
    base = layer.base_layer
    linear = isinstance(base, nn.Linear) or _is_transposed(base)
    if not linear or not (base.weight.is_floating_point() or hasattr(base.weight, "quant_state")):
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
    """Whether a LoRA layer's base layer is an expert mixture's, or linear as Falcon's and BitNet's
    are, in a way of their own.
    """
    from peft.tuners.lora.layer import ParamWrapper

    if isinstance(layer, ParamWrapper):
        return True
    base = layer.base_layer
    plain = type(base).forward is nn.Linear.forward or hasattr(base.weight, "quant_state")
    return isinstance(base, nn.Linear) and not plain


def _weight(base: nn.Module, dtype: torch.dtype) -> Tensor:  # (O, I)
    """The weight of a linear layer as nn.Linear has it, unpacked where it is in 4 bits."""
    if hasattr(base.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)
    weight = base.weight.to(dtype)
    return weight.T if _is_transposed(base) else weight


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed in float32, and on a GPU not rounded to the factors' type either."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
