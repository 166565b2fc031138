"""Steps 1 to 8 of gpu_check.py: what each looks at, and what it expects to find."""

import gc
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
from collapse.config import LanguageModelConfig
from collapse.data.batches import Split
from collapse.models.lora import use_fused_lora
from collapse.models.memory import MemoryPlan
from collapse.models.pretrained import add_lora
from collapse.utils.device import nvidia_driver, pick_device
from collapse.utils.errors import is_out_of_memory
from studies import throughput

MIB, GIB = 2**20, 2**30
Checks = Iterator[tuple[str, str, object, bool | None]]  # what, expected, found, right (None: seen)


@dataclass
class Card:
    """Where the steps run, and what of."""

    tiny: bool
    memory_gib: float
    data_dir: Path | None
    tokenizer: str
    output_dir: Path

    def __post_init__(self) -> None:
        self.device = pick_device("cpu" if self.tiny else "cuda")
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.sizes = throughput.TINY if self.tiny else throughput.QWEN
        small = {"lora_rank": 4, "classifier_size": 16, "engram_size": 8} if self.tiny else {}
        self.settings = LanguageModelConfig(quantization="nf4", **small)

    def model(self, number: int, layers: int | None = None) -> common.DualHeadModel:
        """Random NF4 weights, adapters whose second factors are no zeros; no memory plan yet."""
        torch.manual_seed(0)
        sizes = self.sizes | ({"num_hidden_layers": layers} if layers else {})
        causal_lm = throughput.random_language_model(sizes, self.dtype, self.device)
        adapters = add_lora(causal_lm, self.settings)
        for name, parameter in causal_lm.named_parameters():
            if ".lora_B" in name:
                parameter.data.normal_(0, 0.01)
        arm = common.find_arm(str(number))
        return common.wrap_causal_lm(adapters, arm, 2, "pooled", self.settings)

    def planned(self, number: int, layers: int | None = None) -> common.DualHeadModel:
        model = self.model(number, layers)
        model.memory_plan = MemoryPlan(model, "auto")
        return model.train()

    def split(self, rows: int, lengths: Callable[[np.random.Generator, int], np.ndarray]) -> Split:
        rng = np.random.default_rng(0)
        ids = [torch.from_numpy(rng.integers(2, 900, n)) for n in lengths(rng, rows)]
        return Split(ids, torch.from_numpy(rng.integers(0, 2, rows)))

    def trainer(self, number: int, model: common.DualHeadModel, split: Split) -> common.Trainer:
        return common.make_trainer(model, split, self.settings, common.find_arm(str(number)))

    def held_bytes(self) -> int:
        """Of all tensors that live on the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    @cached_property
    def repeats(self) -> int:
        return 2 if self.tiny else 10


def constant(length: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda rng, rows: np.full(rows, length)


def about(mean: float, longest: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Lengths like those of a data set of this mean."""
    return lambda rng, rows: np.clip(rng.gamma(3, mean / 3, rows), 1, longest).astype(int)


LIKE = {"SST-2": about(11.2, 60), "AG News": about(52.7, 200)}


def libraries(card: Card) -> Checks:
    for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate"):
        yield name, "installed", importlib.metadata.version(name), None
    yield "driver", "580 or newer for CUDA 13", nvidia_driver(), None
    yield "CUDA of torch", "13", torch.version.cuda, None
    q = torch.randn(2, 4, 32, 64, device=card.device, dtype=card.dtype)
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                F.scaled_dot_product_attention(q, q, q, is_causal=True)
            found = "runs"
        except RuntimeError as error:
            found = str(error).partition("\n")[0]
        yield f"attention by {backend}", "runs, but for cuDNN", found, None
    packed, plain = linear_pair(card, card.sizes["hidden_size"], card.sizes["hidden_size"])
    x = torch.randn(64, packed.in_features, device=card.device, dtype=card.dtype)
    error = float((packed(x) - F.linear(x, plain)).norm() / F.linear(x, plain).norm())
    yield "bitsandbytes: error of an NF4 product", "below 0.01", error, error < 0.01


def memory(card: Card) -> Checks:
    card.planned(2, layers=2)  # what libraries take once, for good, they take now
    start = card.held_bytes()
    model = card.model(2)
    before = card.held_bytes()
    plan = MemoryPlan(model, "auto")
    left = (card.held_bytes() - before) / MIB
    yield "a plan leaves behind, MiB", "within 1", left, abs(left) < 1
    count = min(10, len(plan.layers))
    plan.unpack(count)
    share = (card.held_bytes() - before) / (count * plan.unpacking_bytes)
    yield f"unpacking {count} layers takes, of what it says", "1", share, abs(share - 1) < 0.02
    plan.unpack(0)
    left = (card.held_bytes() - before) / MIB
    yield "packing them again leaves, MiB", "within 1", left, abs(left) < 1
    del model, plan
    left = (card.held_bytes() - start) / MIB
    yield "a dropped model leaves, MiB", "within 1", left, abs(left) < 1


def linear_pair(card: Card, rows: int, columns: int) -> tuple[nn.Module, torch.Tensor]:
    """An NF4 layer of random weights, and these unpacked."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        columns, rows, False, compute_dtype=card.dtype, quant_type="nf4", device="meta"
    )
    values = torch.randn(rows, columns, device=card.device, dtype=card.dtype) * 0.02
    layer.weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, quant_type="nf4").to(
        card.device
    )
    layer.support_avx512bf16_for_cpu = False
    plain = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer, plain.to(card.dtype)


def products(card: Card) -> Checks:
    h, f = card.sizes["hidden_size"], card.sizes["intermediate_size"]
    kv = h * card.sizes["num_key_value_heads"] // card.sizes["num_attention_heads"]
    for name, shape in {"q": (h, h), "k": (kv, h), "gate": (f, h), "down": (h, f)}.items():
        layer, plain = linear_pair(card, *shape)
        for tokens in (8, 64) if card.tiny else (8, 32, 64, 256, 1024, 4096):
            x = torch.randn(tokens, shape[1], device=card.device, dtype=card.dtype)
            expected = F.linear(x.float(), plain.float())
            errors, times = {}, {}
            works = {"packed": partial(layer, x), "unpacked": partial(F.linear, x, plain)}
            for kind, work in works.items():
                errors[kind] = float((work() - expected).norm() / expected.norm())
                times[kind] = milliseconds(work, card.repeats)
            found = ", ".join(f"{k} {times[k]:.3f} ms, error {errors[k]:.1e}" for k in works)
            right = max(errors.values()) < 0.01
            yield f"{name} {shape}, {tokens} tokens", "errors below 0.01", found, right


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = throughput.now()
        work()
        times.append(1e3 * (throughput.now() - started))
    return float(np.median(times[1:]))


def gradients(card: Card) -> Checks:
    model = card.planned(3, layers=2)
    trainer = card.trainer(3, model, card.split(16, LIKE["SST-2"]))
    plan, found = model.memory_plan, {}
    for name, unpacked, mode in (
        ("packed", 0, "off"),
        ("unpacked", 2, "off"),
        ("recomputed", 0, "on"),
        ("unpacked and recomputed", 2, "on"),
    ):
        plan.mode = mode
        plan.unpack(unpacked)
        trainer.optimizer.zero_grad()
        torch.manual_seed(3)  # the same dropout
        trainer.accumulate_gradients(np.arange(16))
        found[name] = torch.cat([p.grad.flatten() for p in trainer.parameters])
        error = float((found[name] - found["packed"]).norm() / found["packed"].norm())
        yield f"gradients {name}, off those packed", "below 0.01", error, error < 0.01


def peaks(card: Card) -> Checks:
    model = card.planned(2)
    plan, depth, on_gpu = model.memory_plan, len(model.memory_plan.layers), not card.tiny
    for tokens in (64, 128) if card.tiny else (64, 256, 1024, 2048, 4096):
        rows = max(1, tokens // 128)
        trainer = card.trainer(2, model, card.split(rows, constant(tokens // rows)))
        for count in (0, depth // 2, depth):
            name = f"{tokens} tokens, {count} layers recomputed: peak over expected"
            expected = plan.expected_bytes(tokens, count)
            plan.fit = lambda tokens, count=count: plan.recompute(count)
            trainer.optimizer.zero_grad()
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                trainer.accumulate_gradients(np.arange(rows))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                fits = expected <= plan.free_bytes
                yield name, f"{expected / GIB:.2f} GiB", "out of memory", not fits
                continue
            if not on_gpu:
                yield name, "at most 1", "not known on a CPU", None
                continue
            peak = torch.cuda.max_memory_allocated()
            spare = (torch.cuda.max_memory_reserved() - peak) / MIB
            # What the optimizer will hold is in what is expected, and not here yet.
            share = (peak + 2 / 3 * plan.optimizer_bytes) / expected
            yield name, "0.6 to 1", round(share, 3), 0.6 <= share <= 1
            yield "    reserved less allocated, MiB", "below 1,024", round(spare), spare < 1024


def out_of_memory(card: Card) -> Checks:
    model = card.planned(2)
    split = card.split(16, constant(20 if card.tiny else 120))
    trainer, plan = card.trainer(2, model, split), model.memory_plan
    plan.unpack_what_fits(split, 16)
    unpacked, forward = plan.unpacked, model.forward
    if card.tiny:  # a CPU has none to run out of

        def short(ids, *arguments):
            if ids.numel() > 200:
                raise torch.OutOfMemoryError
            return forward(ids, *arguments)

        model.forward = short
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        cap = card.held_bytes() + plan.optimizer_bytes + 1.5 * GIB
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(cap / total)
    sums = trainer.step(np.arange(16), 1e-4)
    count = plan.layers_to_recompute(plan.tokens)
    found = f"{unpacked} -> {plan.unpacked} unpacked, {count} recomputed, "
    found += f"micro-batches of {trainer.micro_batch_size}"
    yield "a step with little memory", "ends", found, bool(np.isfinite(sums.cls_loss))
    evaluation = common.evaluate(model, split)
    yield "an evaluation with little memory", "ends", evaluation.cls_loss, True
    model.forward = forward
    if not card.tiny:
        throughput.cap_memory(card.memory_gib)
    plan.unpack(0 if plan.unpacked else 2)  # as a run goes on that found other memory free
    again = common.evaluate(model, split)
    away = float(np.abs(again.logits - evaluation.logits).max())
    yield "another number of unpacked layers: logits off", "below 0.05", away, away < 0.05
    model.train()
    sums = trainer.step(np.arange(16), 1e-4)
    yield "and a step with it", "ends", sums.cls_loss, bool(np.isfinite(sums.cls_loss))


KERNELS = {  # in a kernel's name -> its kind; the first that fits
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "unpacking": ("dequant",),
    "NF4 product": ("gemm_4bit", "gemv_4bit"),
    "product": ("gemm", "mm", "cutlass", "xmma", "nvjet", "gemv"),
    "copy": ("copy", "memcpy", "memset"),
}


def profiles(card: Card) -> Checks:
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CPU if card.tiny else ProfilerActivity.CUDA
    for number in (2, 3):
        model = card.planned(number)
        for data, lengths in LIKE.items():
            split = card.split(16 * (card.repeats + 1), lengths)
            trainer, steps = card.trainer(number, model, split), np.arange(len(split.labels))
            model.memory_plan.unpack_what_fits(split, 16)
            trainer.step(steps[:16], 1e-4)
            started = throughput.now()
            with profile(activities=[kind]) as seen:
                for rows in np.split(steps[16:], card.repeats):
                    trainer.step(rows, 1e-4)
                wall = 1e6 * (throughput.now() - started)
            shares, launches = dict.fromkeys([*KERNELS, "elementwise and other"], 0.0), 0
            for event in seen.key_averages():
                spent = event.self_cpu_time_total if card.tiny else event.self_device_time_total
                names = (k for k, parts in KERNELS.items() if any(p in event.key for p in parts))
                shares[next(names, "elementwise and other")] += spent / wall
                launches += event.count
            found = ", ".join(f"{k} {share:.1%}" for k, share in shares.items() if share)
            found += f"; {launches // card.repeats:,} launches and {wall / card.repeats / 1e3:.1f} "
            busy = sum(shares.values())
            yield f"model {number}, {data}: share of time busy", "near 1", round(busy, 3), None
            yield "    by kind of kernel", "mostly products", f"{found}ms a step", None
        del model, trainer
        gc.collect()


def switches(card: Card) -> Checks:
    model = card.planned(2)
    split = card.split(16, LIKE["AG News"])
    trainer, layers = card.trainer(2, model, split), model.backbone.layers
    model.memory_plan.unpack_what_fits(split, 16)
    matmul = torch.backends.cuda.matmul

    def compiled(on: bool) -> None:
        layers[0].forward = torch.compile(plain, dynamic=True) if on else plain

    def adapters_in_one_function(on: bool) -> None:
        """Off: peft's own path, which lies below."""
        if on:
            return use_fused_lora(model.backbone)
        for layer in model.backbone.modules():
            if isinstance(layer, LoraLayer):
                layer.__dict__.pop("forward", None)
        return None

    plain = layers[0].forward
    choices = {
        "adapters in one function": adapters_in_one_function,
        "TF32": lambda on: setattr(matmul, "allow_tf32", on),
        "cuDNN attention": torch.backends.cuda.enable_cudnn_sdp,
        **({} if card.tiny else {"one layer compiled": compiled}),
    }
    usual = {
        "adapters in one function": True,
        "TF32": matmul.allow_tf32,
        "one layer compiled": False,
    }
    usual["cuDNN attention"] = torch.backends.cuda.cudnn_sdp_enabled()
    for name, switch in choices.items():
        try:
            for on in (True, False):
                switch(on)
                spent = milliseconds(lambda: trainer.step(np.arange(16), 1e-4), card.repeats)
                yield f"{name} {'on' if on else 'off'}: ms a step", "-", round(spent, 2), None
        finally:
            switch(usual[name])
