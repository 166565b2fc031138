"""Fitting a step into a card: what it needs, what to recompute, what may stay unpacked."""

import math
import warnings
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from collapse.batches import EVALUATION_TOKENS, Split


class MemoryPlan:
    """What a step needs, and how it is made to fit.

    It tells in how many layers a step must recompute activations (gradient checkpointing), and of
    how many layers NF4 weights may stay unpacked.

    Attributes: `layers` of the backbone, `unpacked` of them; `token_bytes` that the backward pass
    needs kept for one token in all layers, and `boundary_bytes` for one in a layer that recomputes;
    `weight_bytes`, and `unpacking_bytes` that a layer's take more when they are unpacked;
    `optimizer_bytes` of gradients and AdamW's moments; `free_bytes` for all of it.
    """

    WORKING_BYTES = 2**30  # unpacked weights, a chunk of logits and its gradient, fragmentation

    def __init__(self, model: nn.Module, mode: Literal["auto", "on", "off"], share: float = 1.0):
        """model is a DualHeadModel; other trainings leave it this share of the free memory."""
        self.mode = mode
        with warnings.catch_warnings():
            # transformers renames this method; the pinned version knows it.
            warnings.simplefilter("ignore", FutureWarning)
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.layers = [
            m
            for m in model.backbone.modules()
            if m is not model.backbone and hasattr(m, "gradient_checkpointing")
        ]
        self.recompute(0)
        self.token_bytes = _activation_bytes(model)
        self.boundary_bytes = (
            model.classifier.inner.in_features * next(model.backbone.parameters()).element_size()
        )
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.optimizer_bytes = 3 * sum(
            p.numel() * p.element_size() for p in model.trainable().values()
        )
        self.free_bytes = self.weight_bytes + _free_bytes(next(model.parameters()).device) * share
        self.packed = [_packed_linears(layer) for layer in self.layers]
        linear = [module for _, _, module in self.packed[0]]
        plain = sum(
            math.prod(module.weight.quant_state.shape) * module.compute_dtype.itemsize
            for module in linear
        )
        leaving = sum(module.weight.nbytes for module in linear if module.weight.is_cuda)
        self.unpacked, self.unpacking_bytes = 0, plain - leaving

    def expected_bytes(self, tokens: int, recomputed: int) -> float:
        """Peak of a step of so many tokens with so many layers recomputed."""
        layer = self.token_bytes / len(self.layers)
        kept = (len(self.layers) - recomputed) * layer + recomputed * self.boundary_bytes
        in_work = 2 * layer  # the layer at hand: its activations again, and their gradients
        return (
            self.weight_bytes
            + self.optimizer_bytes
            + self.WORKING_BYTES
            + tokens * (kept + in_work)
        )

    def layers_to_recompute(self, tokens: int) -> int:
        if self.mode != "auto":
            return len(self.layers) if self.mode == "on" else 0
        fits = (
            n for n in range(len(self.layers)) if self.expected_bytes(tokens, n) <= self.free_bytes
        )
        return next(fits, len(self.layers))

    def recompute(self, count: int) -> None:
        """Let the first `count` layers recompute their activations in the next backward pass."""
        for number, layer in enumerate(self.layers):
            layer.gradient_checkpointing = number < count

    def unpack_what_fits(self, split: Split, batch_size: int) -> int:
        """Unpack layers for steps of the split's mean and greatest length; returns how many."""
        mean, longest = split.lengths.mean() * batch_size, split.lengths.max() * batch_size
        self.unpack(self.layers_to_unpack(int(mean), int(longest)))
        return self.unpacked

    def layers_to_unpack(self, typical: int, longest: int) -> int:
        """All that leave room for what must fit.

        That is a step of `typical` tokens without recomputing, the longest one with it, where the
        mode allows either, and an evaluation, which keeps nothing: half as many training tokens
        need more.
        """
        if not self.unpacking_bytes:
            return 0
        none, every = 0, len(self.layers)
        steps = [
            (typical, every if self.mode == "on" else none),
            (longest, none if self.mode == "off" else every),
        ]
        steps.append((max(EVALUATION_TOKENS.values()) // 2, every))
        needed = max(self.expected_bytes(*step) for step in steps)
        spare = self.free_bytes + self.unpacked * self.unpacking_bytes - needed
        return min(len(self.layers), max(0, int(spare // self.unpacking_bytes)))

    def unpack(self, count: int) -> None:
        """Hold the NF4 weights of the first `count` layers unpacked, and all others packed.

        bitsandbytes unpacks a weight for every product in training but the forward pass of short
        steps; here that is done once. The products are the same; on a GPU those of short steps may
        sum in another order. The packed weights wait in CPU memory.
        """
        from bitsandbytes.functional import dequantize_4bit

        for layer in self.packed[self.unpacked : count]:
            for parent, name, module in layer:
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                weight = weight.to(module.compute_dtype)
                plain = nn.Linear(module.in_features, module.out_features, device="meta")
                plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
                setattr(parent, name, plain)
                module.weight.data = module.weight.data.cpu()
        for layer in self.packed[count : self.unpacked]:
            for parent, name, module in layer:
                module.weight.data = module.weight.data.to(getattr(parent, name).weight.device)
                setattr(parent, name, module)
        self.weight_bytes += (count - self.unpacked) * self.unpacking_bytes
        self.unpacked = count

    def describe(self, tokens: int) -> str:
        """What the longest step, of so many tokens, is expected to need."""
        count = self.layers_to_recompute(tokens)
        total, gib = self.expected_bytes(tokens, count), 2**30
        return (
            f"memory: about {total / gib:.1f} GiB expected ({self.weight_bytes / gib:.1f} weights, "
            f"{self.optimizer_bytes / gib:.1f} gradients and optimizer, the rest for up to "
            f"{tokens:,} tokens a step), {self.free_bytes / gib:.1f} GiB free; "
            f"the longest step recomputes {count} of {len(self.layers)} layers"
            + (f"; NF4 weights of {self.unpacked} stay unpacked" if self.unpacking_bytes else "")
        )


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trainable and total parameters; a byte of NF4 holds two of them."""

    def size(parameter: nn.Parameter) -> int:
        state = getattr(parameter, "quant_state", None)
        return parameter.numel() if state is None else math.prod(state.shape)

    parameters = list(model.parameters())
    trainable = sum(size(p) for p in parameters if p.requires_grad)
    return {"trainable": trainable, "total": sum(map(size, parameters))}


def _packed_linears(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of each linear layer whose weights are in NF4."""
    children = (
        (parent, name, child)
        for parent in layer.modules()
        for name, child in parent.named_children()
    )
    return [
        (*place, child)
        for *place, child in children
        if isinstance(child, nn.Linear) and hasattr(child.weight, "quant_state")
    ]


def _free_bytes(device: torch.device) -> int:
    """Memory that this process may still take."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - reserved
    unused = reserved - torch.cuda.memory_allocated(device)
    return int(min(free, allowed) + unused)


def _activation_bytes(model: nn.Module, tokens: int = 64) -> float:
    """Bytes for each token that autograd keeps for the backbone's backward pass.

    Counted in one small forward pass.
    """
    device, embedding = next(model.parameters()).device, model.backbone.get_input_embeddings()
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself: where an operation saves its own output that would close a ring of
        # references which no garbage collection finds, and leak the whole graph.
        return tensor.detach()

    was_training = model.training
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        output = model.train().backbone(
            inputs_embeds=embedding(torch.zeros(1, tokens, dtype=torch.int64, device=device))
        )
    model.train(was_training)
    del output
    return sum(kept.values()) / tokens
