"""Lower bounds of training time: operations and bytes over a device's measured rates."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from collapse.models.architectures import decoder_layers
from collapse.utils.files import ROOT, read_json

# Bytes that elementwise work (norms, rotations, the gate, adapters' casts, dropout, additions)
# moves per token, layer and unit of width, forward and backward, in bfloat16. Counted on Qwen2.5's
# layer by tests/test_lora_costs.py, for our fused adapters and for peft's.
ELEMENTWISE_BYTES, ELEMENTWISE_BYTES_OF_PEFT = 670, 1420
# Training time as a factor of the lower bound, because of recomputation, packed weights, padding,
# kernel launches and slow kernels: (low, high), assumed until studies/gpu_check.py measures it.
ASSUMED_RATIO = (1.6, 2.4)
GPU_CHECK = ROOT / "results_7b" / "gpu_check.json"


@dataclass(frozen=True)
class Sizes:
    """Parameter counts and dimensions that the cost of a step depends on."""

    layers: int  # parameters of all layers' matrices, which are frozen
    adapters: int
    head: int  # parameters of the LM head
    width: int
    depth: int

    @classmethod
    def of(cls, model_config: Any, lora_rank: int) -> "Sizes":
        """For a model that transformers knows, from its configuration alone."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(model_config)
        layers: list[nn.Module] = list(decoder_layers(causal_lm.base_model))
        matrices = [p for layer in layers for p in layer.parameters() if p.ndim > 1]
        return cls(
            layers=sum(p.numel() for p in matrices),
            adapters=lora_rank * sum(sum(p.shape[-2:]) for p in matrices),
            head=causal_lm.get_output_embeddings().weight.numel(),
            width=causal_lm.config.hidden_size,
            depth=len(layers),
        )


def least_seconds(
    sizes: Sizes,
    rates: dict[str, float],
    tokens: float,
    targets: float,
    reads: float = 1,
    products: int = 2,
    itemsize: int = 2,
    elementwise: float = ELEMENTWISE_BYTES,
) -> float:
    """Seconds that passes over so many tokens take at least, given a device's rates.

    rates: operations and bytes per second. targets: tokens with logits, 0 without an LM head.
    products: matrix products per weight, 1 in an evaluation, 2 with the backward pass, 3 where that
    recomputes the forward pass. reads: how often each of them reads all weights. itemsize: bytes of
    a value. The times of operations and bytes add up, because a product waits for its weights.
    Attention's own products and the optimizer are left out.
    """
    trains, head = products > 1, sizes.head if targets else 0
    operations = 2 * products * tokens * (sizes.layers + sizes.adapters)
    operations += 2 * tokens * sizes.adapters * trains + 2 * min(products, 2) * targets * head
    moved = reads * itemsize * (products * sizes.layers + min(products, 2) * head)
    share = (products + 1) / 3 if trains else 1 / 3  # a forward pass moves a third of what both do
    moved += tokens * sizes.depth * sizes.width * elementwise * share * itemsize / 2
    return operations / rates["operations"] + moved / rates["bytes"]


def least_training_seconds(
    sizes: Sizes,
    rates: dict[str, float],
    rows: tuple[int, int],
    tokens_per_row: float,
    batch_size: int,
    epochs: float,
    has_lm_head: bool,
    has_engram: bool,
    itemsize: int = 2,
) -> float:
    """least_seconds of a whole training with its evaluations, one of them before the first epoch.

    rows: numbers of training and validation rows. A model with an engram reads the weights twice a
    step, has a prefix in each row, and is evaluated a second time with carried engrams.
    """
    passes, targets = 2 if has_engram else 1, (tokens_per_row - 1) * has_lm_head
    trained, read = epochs * rows[0], epochs * rows[0] / batch_size * passes
    evaluated = (1 + epochs * passes) * rows[1]
    tokens = tokens_per_row + has_engram
    steps = least_seconds(
        sizes, rates, trained * tokens, trained * targets, read, itemsize=itemsize
    )
    evaluations = least_seconds(  # in batches so large that the weights' bytes do not count
        sizes, rates, evaluated * tokens, evaluated * targets, 0, products=1, itemsize=itemsize
    )
    return steps + evaluations


def device_rates(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Measures bytes per second of a copy and operations per second of a large matrix product."""
    on_gpu = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    size, length = (4096, 2**29) if on_gpu else (1024, 2**27)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(length, dtype=torch.uint8, device=device)

    def fastest(work: Any) -> float:
        seconds = []
        for _ in range(20):
            started = now()
            work()
            seconds.append(now() - started)
        return min(seconds)

    return {
        "bytes": 2 * source.numel() / fastest(source.clone),
        "operations": 2 * size**3 / fastest(lambda: a @ b),
    }


def now() -> float:
    """A clock in seconds that first waits for the GPU to finish."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def ratio_on(card: str) -> tuple[tuple[float, float], bool]:
    """Training time over the lower bound as (low, high), and whether measured on this card."""
    gpu_check = read_json(GPU_CHECK) if GPU_CHECK.exists() else {}
    ratio = gpu_check.get("ratio")
    if ratio and gpu_check["hardware"]["device"] == card:  # kernels alone, and with launching them
        return (ratio["busy"][0], ratio["wall"][1]), True
    return ASSUMED_RATIO, False
