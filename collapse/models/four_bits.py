"""Weights in 4 bits, as bitsandbytes holds them, unpacked right on a CPU.

With AVX-512 bitsandbytes 0.50 gives a row whose length is a multiple of 16, but not of its blocks'
64 values, the scales of other rows; and with bfloat16 in hardware an evaluation repacks the weights
into a form that has no gradient. A block a row is right everywhere.
"""

import copy
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_packed(layer: nn.Module) -> bool:
    return hasattr(getattr(layer, "weight", None), "quant_state")


def unpacked_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) of a linear layer in 4 bits."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(layer.weight.quant_state)
    shape, count = state.shape, state.shape.numel()
    width = count if count % state.blocksize else state.blocksize
    state.shape, state.dtype = torch.Size((count // width, width)), dtype
    return dequantize_4bit(layer.weight.data, state).view(shape)


def compute_unpacked(model: nn.Module) -> None:
    """Let a model's layers in 4 bits compute by unpacked_weight, in place, not as bitsandbytes."""
    for layer in filter(is_packed, model.modules()):
        layer.forward = types.MethodType(_forward, layer)


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    dtype = layer.compute_dtype or x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), unpacked_weight(layer, dtype), bias).to(x.dtype)
