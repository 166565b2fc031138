"""GPU memory of a training step: what it needs, which layers recompute, which stay unpacked."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from collapse.data.batches import EVALUATION_TOKENS, Split, token_budget_batches
from collapse.models.architectures import decoder_layers
from collapse.models.four_bits import is_packed, unpacked_weight
from collapse.utils.device import cap_memory_on_wsl
from collapse.utils.errors import UserError, is_out_of_memory


class MemoryPlan:
    """Decides how a training step fits into memory.

    In how many layers it recomputes activations (gradient checkpointing), and how many layers keep
    their NF4 weights unpacked.

    Attributes:
        layers: of the backbone.
        unpacked: number of layers whose weights are unpacked.
        token_bytes, pair_bytes: kept for the backward pass in all layers, per token and per pair of
            tokens of a row.
        longest_row: tokens of the longest row.
        boundary_bytes: kept per token in a layer that recomputes.
        weight_bytes: of the model as it is.
        unpacking_bytes: how much more one layer takes unpacked.
        optimizer_bytes: of gradients and AdamW's moments.
        free_bytes: available for all of this.
        prefix_tokens: before each row.
        tokens: of the pass that was planned last.
    """

    WORKING_BYTES = 2**30  # unpacked weights, a chunk of logits and its gradient, fragmentation

    def __init__(self, model: nn.Module, mode: Literal["auto", "on", "off"]):
        """model is a DualHeadModel."""
        self.mode, self.layers = mode, list(decoder_layers(model.backbone))
        if all(hasattr(layer, "gradient_checkpointing") for layer in self.layers):
            let_layers_recompute(model.backbone)
        elif mode == "on":
            raise UserError(
                "--gradient-checkpointing on, but the layers of this model cannot recompute their "
                "activations: leave the option out."
            )
        else:
            self.mode = "off"
        self.recompute(0)
        self.prefix_tokens = int(model.projector is not None)
        self.tokens = self.typical = self.longest = self.longest_row = 0
        torch.cuda.empty_cache()  # cached memory of an earlier model counts as free
        self.token_bytes, self.pair_bytes = _activation_bytes(model)
        self.boundary_bytes = (
            model.classifier.inner.in_features * next(model.backbone.parameters()).element_size()
        )
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.optimizer_bytes = 3 * sum(
            p.numel() * p.element_size() for p in model.trainable().values()
        )
        device = next(model.parameters()).device
        cap_memory_on_wsl(device)
        self.free_bytes = self.weight_bytes + _free_bytes(device)
        self.packed = [_packed_linears(layer) for layer in self.layers]
        linear = [module for _, _, module in self.packed[0]]
        plain = sum(
            math.prod(module.weight.quant_state.shape) * module.compute_dtype.itemsize
            for module in linear
        )
        leaving = sum(module.weight.nbytes for module in linear if module.weight.is_cuda)
        self.unpacked, self.unpacking_bytes = 0, plain - leaving

    def take_share(self, share: float) -> None:
        """Use only this share of the free memory; other trainings have the rest."""
        self.free_bytes = self.weight_bytes + (self.free_bytes - self.weight_bytes) * share

    def expected_bytes(self, tokens: int, recomputed: int) -> float:
        """Peak bytes of a step of `tokens`, with activations recomputed in that many layers."""
        layer = (self.token_bytes + self.pair_bytes * self.longest_row) / len(self.layers)
        kept = (len(self.layers) - recomputed) * layer + recomputed * self.boundary_bytes
        # The layer at work holds gradients of its activations, and, if none are kept, also the
        # activations. What earlier layers recompute takes the place of what the last one kept.
        in_work = layer if recomputed < len(self.layers) else 2 * layer
        return (
            self.weight_bytes
            + self.optimizer_bytes
            + self.WORKING_BYTES
            + tokens * (kept + in_work)
        )

    def layers_to_recompute(self, tokens: int) -> int:
        """The fewest layers with which a step fits; if it never fits, as many as help."""
        least = len(self.layers) if self.mode == "on" else 0
        counts = range(least, self.most_recomputed + 1)
        fits = (n for n in counts if self.expected_bytes(tokens, n) <= self.free_bytes)
        return next(fits, self.most_recomputed)

    @property
    def most_recomputed(self) -> int:
        """All but the last layer in auto mode: its activations are needed at once."""
        return {"on": len(self.layers), "auto": len(self.layers) - 1, "off": 0}[self.mode]

    def fit(self, tokens: int) -> None:
        """Choose what to recompute, before a forward and backward pass of so many tokens."""
        self.tokens = tokens
        self.recompute(self.layers_to_recompute(tokens))

    def shrink(self) -> bool:
        """Plan with less memory, after the last planned pass has run out of it.

        Lowers free_bytes by a tenth at a time until fewer layers stay unpacked or more recompute;
        False if neither can gain anything.
        """
        expected = self.expected_bytes(self.tokens, self.layers_to_recompute(self.tokens))
        while self.unpacked or self.layers_to_recompute(self.tokens) < self.most_recomputed:
            self.free_bytes = 0.9 * min(self.free_bytes, expected)
            fitting = self.layers_to_unpack(self.typical, self.longest)
            self.unpack(min(self.unpacked, fitting))
            count = self.layers_to_recompute(self.tokens)
            if self.expected_bytes(self.tokens, count) < expected:
                return True
        return False

    def recompute(self, count: int) -> None:
        """Let the first `count` layers recompute their activations in the next backward pass."""
        for number, layer in enumerate(self.layers):
            layer.gradient_checkpointing = number < count

    def unpack_what_fits(self, split: Split, batch_size: int) -> int:
        """Unpack layers for steps of the split's mean and greatest length; returns how many."""
        lengths = split.lengths + self.prefix_tokens
        self.longest_row = int(lengths.max())
        self.typical = int(lengths.mean() * batch_size)
        self.longest = self.longest_row * batch_size
        self.unpack(self.layers_to_unpack(self.typical, self.longest))
        return self.unpacked

    def layers_to_unpack(self, typical: int, longest: int) -> int:
        """How many layers can stay unpacked and leave room for what must fit.

        What must fit is a step of `typical` tokens without recomputing, the longest step with it
        (where the mode allows either), and an evaluation, which keeps no activations and needs less
        than half as many tokens in training.
        """
        if not self.unpacking_bytes:
            return 0
        most = self.most_recomputed
        steps = [(typical, most if self.mode == "on" else 0), (longest, most)]
        steps.append((max(EVALUATION_TOKENS.values()) // 2, len(self.layers)))
        needed = max(self.expected_bytes(*step) for step in steps)
        spare = self.free_bytes + self.unpacked * self.unpacking_bytes - needed
        return min(len(self.layers), max(0, int(spare // self.unpacking_bytes)))

    def unpack(self, count: int) -> None:
        """Hold the NF4 weights of the first `count` layers unpacked, and all others packed.

        bitsandbytes unpacks a weight for nearly every product in training; here that is done once.
        Products are the same, but on a GPU those of short steps may sum in another order. The
        packed weights are kept in CPU memory meanwhile.
        """
        for layer in self.packed[self.unpacked : count]:
            for parent, name, module in layer:
                weight = unpacked_weight(module, module.compute_dtype)
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

    def describe(self) -> str:
        """A line on the expected memory of the longest step, which unpack_what_fits has set."""
        tokens = self.longest
        count = self.layers_to_recompute(tokens)
        total, gib = self.expected_bytes(tokens, count), 2**30
        return (
            f"memory: about {total / gib:.1f} GiB expected ({self.weight_bytes / gib:.1f} weights, "
            f"{self.optimizer_bytes / gib:.1f} gradients and optimizer, the rest for up to "
            f"{tokens:,} tokens a step), {self.free_bytes / gib:.1f} GiB free; "
            f"the longest step recomputes {count} of {len(self.layers)} layers"
            + (f"; NF4 weights of {self.unpacked} stay unpacked" if self.unpacking_bytes else "")
        )


def let_layers_recompute(backbone: nn.Module) -> None:
    """Prepare checkpointing in a Hugging Face base model; each layer's attribute switches it."""
    with warnings.catch_warnings():
        # transformers renames this method; the pinned version knows it.
        warnings.simplefilter("ignore", FutureWarning)
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    if hasattr(backbone, "disable_input_require_grads"):
        # It makes embeddings require gradients, which costs products in the first layer and is
        # needed for reentrant checkpointing alone.
        backbone.disable_input_require_grads()


def in_batches_that_fit(
    lengths: np.ndarray, max_tokens: int, run: Callable[[np.ndarray], Any]
) -> Iterator[tuple[np.ndarray, Any]]:
    """(rows, run(rows)) for all rows, in batches of at most max_tokens padded tokens.

    When a batch runs out of memory, its rows and all later ones are run in batches of half its
    tokens. Raises UserError when a single row does not fit.
    """
    waiting = token_budget_batches(lengths, max_tokens)
    while waiting:
        rows, result = waiting[0], None
        try:
            result = run(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if result is not None:
            del waiting[0]
            yield rows, result
            continue
        if len(rows) == 1:
            raise UserError(DOES_NOT_FIT)
        torch.cuda.empty_cache()  # outside of `except`, which still holds the failed pass's tensors
        max_tokens = len(rows) * int(lengths[rows].max()) // 2
        tqdm.write(f"out of GPU memory in an evaluation: batches of {max_tokens} tokens from here")
        remaining = np.concatenate(waiting)
        waiting = [
            remaining[batch] for batch in token_budget_batches(lengths[remaining], max_tokens)
        ]


DOES_NOT_FIT = "GPU memory does not hold a single row: use a smaller model or --max-length."


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
        if isinstance(child, nn.Linear) and is_packed(child)
    ]


def _free_bytes(device: torch.device) -> int:
    """Bytes that this process may still allocate."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - reserved
    unused = reserved - torch.cuda.memory_allocated(device)
    return int(min(free, allowed) + unused)


def _activation_bytes(model: nn.Module) -> tuple[float, float]:
    """(bytes per token, per pair of a row's tokens) that autograd keeps of the backbone.

    Attention that keeps its weights, as on a CPU, keeps a number for each pair: bytes of a row of n
    tokens are c + a n + b n^2, from three small forward passes. c, such as the adapters' weights
    cast to the states' type, is left out. Where nothing is kept for pairs, b is zero.
    """
    few, some, more = (_kept_bytes(model, tokens) for tokens in (16, 32, 64))
    slopes = (some - few) / 16, (more - some) / 32
    by_pair = max(0.0, (slopes[1] - slopes[0]) / 48)  # drawn dropout masks may bend it below zero
    return slopes[1] - by_pair * (32 + 64), by_pair


def _kept_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes that autograd keeps of a forward pass of the backbone, without weights and buffers."""
    device, embedding = next(model.parameters()).device, model.backbone.get_input_embeddings()
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        # Detached: an operation that saves its own output would otherwise be in a reference cycle
        # that garbage collection does not find, and the whole graph would leak.
        return tensor.detach()

    was_training = model.training
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        output = model.train().run_backbone(
            embedding(torch.zeros(1, tokens, dtype=torch.int64, device=device))
        )
    model.train(was_training)
    del output
    return sum(kept.values())
