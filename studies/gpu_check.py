"""Checks that 7B training works as intended on this GPU. Run it first on a new card.

Eight steps, each below ten minutes, on the architecture of Qwen2.5-7B with random weights, without
download or data. Every check prints what is expected and what was found, and gpu_check.json stores
it; finished steps are skipped the next time. The last line says by what factor training steps are
slower than the lower bound from the card's rates, from which experiment_7b.py estimates its hours.

1 libraries: driver, versions, bitsandbytes, attention    5 peak memory against the plan
2 memory of plan, unpacking, a model that is dropped      6 out of memory in a step, an evaluation
3 NF4 products against unpacked ones                      7 time of steps, by kind of kernel
4 gradients packed, unpacked, recomputed, by Liger        8 adapters' function, cuDNN, Liger on, off

Training against other recipes is timed by `throughput.py --backbone 7b`.
"""

import gc
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import common
from collapse.config import LanguageModelConfig, check_bounds
from collapse.data.batches import Split, length_grouped_batches
from collapse.models import costs
from collapse.models.four_bits import unpacked_weight
from collapse.models.lora import use_fused_lora
from collapse.models.memory import MemoryPlan
from collapse.models.pretrained import add_lora
from collapse.utils.device import cap_memory, nvidia_driver, pick_device, set_allocator
from collapse.utils.errors import UserError, is_out_of_memory, run_script
from collapse.utils.files import ROOT, read_json, write_json
from collapse.utils.provenance import environment, liger_version
from studies import throughput
from studies.random_checkpoint import QWEN, TINY, random_language_model, random_packed

MIB, GIB = 2**20, 2**30
# (what, expected, found, whether right; None where there is nothing to judge)
Checks = Iterator[tuple[str, str, object, bool | None]]


@dataclass
class Config:
    """Settings of the check; the comment above a field is its --help text."""

    # Steps to run, from 1 to 8.
    steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    # Run in miniature on the CPU, to test the checks themselves.
    tiny: bool = False
    # Repeat finished steps.
    fresh: bool = False
    # GPU memory that the process may use, in GiB; default: what a driver leaves of 16.
    memory_gib: float = 15.0
    # Make bitsandbytes choose its kernels as on an RTX 4080, whatever this card is.
    as_rtx: bool = False
    # Folder for gpu_check.json. Default: results_7b; with --tiny a folder that git ignores.
    output_dir: Path | None = None


@dataclass
class Card:
    """The device that steps run on, and the sizes of the model."""

    tiny: bool
    memory_gib: float
    ratios: dict[str, list[float]] = field(default_factory=lambda: {"busy": [], "wall": []})

    def __post_init__(self) -> None:
        self.device = pick_device("cpu" if self.tiny else "cuda")
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.sizes, self.repeats = (TINY, 2) if self.tiny else (QWEN, 10)
        small = {"lora_rank": 4, "classifier_size": 16, "engram_size": 8} if self.tiny else {}
        self.settings = LanguageModelConfig(quantization="nf4", **small)

    def model(self, number: int, layers: int | None = None, liger: bool = True):
        """A model with random NF4 weights and nonzero adapters, without a memory plan."""
        torch.manual_seed(0)
        sizes = self.sizes | ({"num_hidden_layers": layers} if layers else {})
        causal_lm = random_language_model(sizes, self.dtype, self.device)
        adapters = add_lora(causal_lm, self.settings, liger)
        for name, parameter in causal_lm.named_parameters():
            if ".lora_B" in name:
                parameter.data.normal_(0, 0.01)
        arm = common.find_arm(str(number))
        return common.wrap_causal_lm(adapters, arm, 2, "pooled", self.settings)

    def planned(self, number: int, layers: int | None = None, liger: bool = True):
        model = self.model(number, layers, liger)
        model.memory_plan = MemoryPlan(model, "auto")
        return model.train()

    def split(self, rows: int, mean: float, longest: int | None = None) -> Split:
        """Random rows of about this mean length; without `longest` all have this length."""
        rng = np.random.default_rng(0)
        lengths = np.full(rows, int(mean))
        if longest:
            lengths = np.clip(rng.gamma(3, mean / 3, rows), 1, longest).astype(int)
        ids = [torch.from_numpy(rng.integers(2, 900, n)) for n in lengths]
        return Split(ids, torch.from_numpy(rng.integers(0, 2, rows)))

    def trainer(self, number: int, model: common.DualHeadModel, split: Split) -> common.Trainer:
        return common.make_trainer(model, split, self.settings, common.find_arm(str(number)))

    def held_bytes(self) -> int:
        """Bytes of all tensors on the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Median time of `work`, after a warm-up run."""
        times = []
        for _ in range(self.repeats + 1):
            started = costs.now()
            work()
            times.append(1e3 * (costs.now() - started))
        return float(np.median(times[1:]))


LIKE = {"SST-2": (11.2, 60), "AG News": (52.7, 200)}  # mean and longest row, in tokens


def libraries(card: Card) -> Checks:
    for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate"):
        yield name, "installed", importlib.metadata.version(name), None
    yield "liger-kernel", "optional", liger_version(card.device) or "not used", None
    yield "driver", "580 or newer for CUDA 13", nvidia_driver(), None
    yield "CUDA of torch", "13", torch.version.cuda, None
    q = torch.randn(2, 4, 32, 64, device=card.device, dtype=card.dtype)
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                F.scaled_dot_product_attention(q, q, q, is_causal=True)
            outcome = "runs"
        except RuntimeError as error:
            outcome = str(error).partition("\n")[0]
        yield f"attention by {backend}", "runs, but for cuDNN", outcome, None
    packed, plain = linear_pair(card, card.sizes["hidden_size"], card.sizes["hidden_size"])
    x = torch.randn(64, packed.in_features, device=card.device, dtype=card.dtype)
    error = float((packed(x) - F.linear(x, plain)).norm() / F.linear(x, plain).norm())
    yield "bitsandbytes: error of an NF4 product", "below 0.01", error, error < 0.01


def memory(card: Card) -> Checks:
    card.planned(2, layers=2)  # now libraries make the allocations that they keep for good
    start = card.held_bytes()
    model = card.model(2)
    before = card.held_bytes()
    plan = MemoryPlan(model, "auto")
    leftover = (card.held_bytes() - before) / MIB
    yield "a plan leaves behind, MiB", "within 1", leftover, abs(leftover) < 1
    count = min(10, len(plan.layers))
    plan.unpack(count)
    share = (card.held_bytes() - before) / (count * plan.unpacking_bytes)
    yield f"unpacking {count} layers takes, of what it says", "1", share, abs(share - 1) < 0.02
    plan.unpack(0)
    leftover = (card.held_bytes() - before) / MIB
    yield "packing them again leaves, MiB", "within 1", leftover, abs(leftover) < 1
    del model, plan
    leftover = (card.held_bytes() - start) / MIB
    yield "a dropped model leaves, MiB", "within 1", leftover, abs(leftover) < 1


def linear_pair(card: Card, *shape: int) -> tuple[nn.Module, torch.Tensor]:
    """An NF4 layer with random weights (O, I), and the same weights unpacked."""
    layer = random_packed(shape, False, card.dtype, card.device)
    return layer, unpacked_weight(layer, card.dtype)


def products(card: Card) -> Checks:
    h, f = card.sizes["hidden_size"], card.sizes["intermediate_size"]
    kv = h * card.sizes["num_key_value_heads"] // card.sizes["num_attention_heads"]
    for name, shape in {"q": (h, h), "k": (kv, h), "gate": (f, h), "down": (h, f)}.items():
        layer, plain = linear_pair(card, *shape)
        for tokens in (8, 64) if card.tiny else (8, 32, 64, 256, 1024, 4096):
            x = torch.randn(tokens, shape[1], device=card.device, dtype=card.dtype)
            expected, outcomes, errors = F.linear(x.float(), plain.float()), [], []
            ways = {"packed": partial(layer, x), "plain": partial(F.linear, x, plain)}
            for kind, work in ways.items():
                errors.append(float((work() - expected).norm() / expected.norm()))
                outcomes.append(f"{kind} {card.milliseconds(work):.3f} ms, error {errors[-1]:.1e}")
            what = f"{name} {shape}, {tokens} tokens"
            yield what, "errors below 0.01", ", ".join(outcomes), max(errors) < 0.01


def gradients(card: Card) -> Checks:
    packed = None
    ways = [("packed", 0, "off"), ("unpacked", 2, "off"), ("recomputed", 0, "on")]
    ways += [("unpacked and recomputed", 2, "on")]
    for liger in (False, True) if liger_version(card.device) else (False,):
        model = card.planned(3, layers=2, liger=liger)
        trainer, plan = card.trainer(3, model, card.split(16, *LIKE["SST-2"])), model.memory_plan
        for name, unpacked, plan.mode in ways:
            plan.unpack(unpacked)
            trainer.optimizer.zero_grad()
            torch.manual_seed(3)  # the same dropout
            trainer.accumulate_gradients(np.arange(16))
            gradient = torch.cat([p.grad.flatten() for p in trainer.parameters])
            packed = gradient if packed is None else packed
            error, most = float((gradient - packed).norm() / packed.norm()), 0.02 if liger else 0.01
            what = f"gradients {name}{' by Liger' * liger}, off those packed"
            yield what, f"below {most}", error, error < most


def peaks(card: Card) -> Checks:
    model = card.planned(2)
    plan, depth = model.memory_plan, len(model.memory_plan.layers)
    for tokens in (64, 128) if card.tiny else (64, 256, 1024, 2048, 4096):
        rows = max(1, tokens // 128)
        trainer = card.trainer(2, model, card.split(rows, tokens // rows))
        for count in (0, depth // 2, depth):
            name = f"{tokens} tokens, {count} layers recomputed: peak over expected"
            expected = plan.expected_bytes(tokens, count)
            plan.fit = lambda tokens, count=count: plan.recompute(count)
            trainer.optimizer.zero_grad()
            torch.cuda.empty_cache()
            if not card.tiny:
                torch.cuda.reset_peak_memory_stats()
            try:
                trainer.accumulate_gradients(np.arange(rows))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                fits = expected <= plan.free_bytes
                yield name, f"{expected / GIB:.2f} GiB", "out of memory", not fits
                continue
            if card.tiny:
                yield name, "at most 1", "not known on a CPU", None
                continue
            peak = torch.cuda.max_memory_allocated()
            spare = (torch.cuda.max_memory_reserved() - peak) / MIB
            # The expected bytes include the optimizer's moments, which do not exist yet.
            share = (peak + 2 / 3 * plan.optimizer_bytes) / expected
            yield name, "0.6 to 1", round(share, 3), 0.6 <= share <= 1
            yield "    reserved less allocated, MiB", "below 1,024", round(spare), spare < 1024


def out_of_memory(card: Card) -> Checks:
    model, split = card.planned(2), card.split(16, 20 if card.tiny else 120)
    trainer, plan = card.trainer(2, model, split), model.memory_plan
    plan.unpack_what_fits(split, 16)
    unpacked, forward = plan.unpacked, model.forward
    if card.tiny:  # a CPU does not run out of memory, so the error is simulated

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
    state = f"{unpacked} -> {plan.unpacked} unpacked, micro-batches of {trainer.micro_batch_size}, "
    state += f"{plan.layers_to_recompute(plan.tokens)} recomputed"
    yield "a step with little memory", "ends", state, bool(np.isfinite(sums.cls_loss))
    evaluation = common.evaluate(model, split)
    yield "an evaluation with little memory", "ends", evaluation.cls_loss, True
    model.forward = forward
    if not card.tiny:
        cap_memory(card.memory_gib)
    plan.unpack(0 if plan.unpacked else 2)  # as in a resumed run with other free memory
    difference = float(np.abs(common.evaluate(model, split).logits - evaluation.logits).max())
    what = "another number of unpacked layers: logits off"
    yield what, "below 0.05", difference, difference < 0.05
    model.train()
    sums = trainer.step(np.arange(16), 1e-4)
    yield "and a step with it", "ends", sums.cls_loss, bool(np.isfinite(sums.cls_loss))


KERNELS = {  # kind -> parts of a kernel's lower-case name; the first kind that fits counts
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "unpacking": ("dequant",),
    "NF4 product": ("gemm_4bit", "gemv_4bit"),
    "product": ("gemm", "mm", "cutlass", "xmma", "nvjet", "gemv"),
    "copy": ("copy", "memcpy", "memset"),
}


def profiles(card: Card) -> Checks:
    """Wall time of steps with length-grouped batches, then, profiled, time of kernels alone."""
    rates, count = costs.device_rates(card.device), card.repeats
    sizes = costs.Sizes.of(transformers.Qwen2Config(**card.sizes), card.settings.lora_rank)
    description = f"{rates['bytes'] / 1e9:.0f}, {rates['operations'] / 1e12:.2f}"
    yield "GB/s of a copy, TFLOP/s of a product", "-", description, None
    for number, (data, lengths) in itertools.product((2, 3), LIKE.items()):
        model, split = card.planned(number), card.split(16 * 8 * count, *lengths)
        batches = length_grouped_batches(split.lengths, 16, np.random.default_rng(0))[:count]
        trainer = card.trainer(number, model, split)
        model.memory_plan.unpack_what_fits(split, 16)

        def steps(trainer=trainer, batches=batches) -> float:
            started = costs.now()
            for rows in batches:
                trainer.step(rows, 1e-4)
            return costs.now() - started

        steps()  # warms up
        before = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        wall = steps()
        retries = torch.cuda.memory_stats().get("num_alloc_retries", 0) - before
        device, spent, launches = card.device.type.upper(), dict.fromkeys([*KERNELS, "other"], 0), 0
        with profile(activities=[getattr(ProfilerActivity, device)]) as seen:
            steps()
        for event in seen.events():
            if event.device_type.name != device:
                continue  # of the runtime: a launch, not a kernel
            name, launches = event.name.lower(), launches + 1
            kinds = (k for k, parts in KERNELS.items() if any(part in name for part in parts))
            micros = event.self_cpu_time_total if card.tiny else event.self_device_time_total
            spent[next(kinds, "other")] += micros / 1e6
        busy = sum(spent.values())
        least = throughput.least_step_seconds(sizes, rates, model, split, batches)
        card.ratios["busy"].append(busy / least)
        card.ratios["wall"].append(wall / least)
        times = ", ".join(f"{1e3 * seconds / count:.1f}" for seconds in (wall, busy, least))
        what = f"model {number}, {data}: ms a step, busy, at the least"
        yield what, "busy near the first", times, None
        description = ", ".join(f"{kind} {part / busy:.0%}" for kind, part in spent.items() if part)
        description += f"; {launches // count:,} kernels a step"
        yield "    by kind of kernel", "mostly products", description, None
        yield "    allocations that had to be tried again", "0", retries, retries == 0
        del model, trainer, steps
        gc.collect()


def switches(card: Card) -> Checks:
    def timed(model: common.DualHeadModel) -> float:
        split = card.split(16, *LIKE["AG News"])
        model.memory_plan.unpack_what_fits(split, 16)
        trainer = card.trainer(2, model, split)
        return round(card.milliseconds(lambda: trainer.step(np.arange(16), 1e-4)), 2)

    model = card.planned(2, liger=False)
    yield "as usual, without Liger: ms a step", "-", timed(model), None
    for layer in model.backbone.modules():
        if hasattr(layer, "lora_A"):
            layer.__dict__.pop("forward", None)  # peft's own path lies below
    yield "adapters not in one function: ms a step", "-", timed(model), None
    use_fused_lora(model.backbone)
    usual = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(not usual)
    yield f"cuDNN attention {'off' if usual else 'on'}: ms a step", "-", timed(model), None
    torch.backends.cuda.enable_cudnn_sdp(usual)
    del model
    if liger_version(card.device):  # last, because it replaces kernels for the whole process
        yield "with Liger: ms a step", "-", timed(card.planned(2)), None


ALL_STEPS = (libraries, memory, products, gradients, peaks, out_of_memory, profiles, switches)
STEPS = dict(enumerate(ALL_STEPS, 1))
FAILED = {"checks": [{"right": False}]}  # stands for a step that has not run


def do(number: int, card: Card) -> dict:
    """Run a step and print its checks; an exception becomes a failed check."""
    started, checks = time.monotonic(), []
    print(f"step {number}: {STEPS[number].__name__.replace('_', ' ')}", flush=True)
    try:
        for what, expected, result, right in STEPS[number](card):
            mark = {True: "right", False: "WRONG", None: "seen"}[right]
            print(f"  {mark:6}{what}: expected {expected}, found {result}", flush=True)
            checks.append({"what": what, "expected": expected, "found": result, "right": right})
    except Exception as error:
        message = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"  WRONG {message}", flush=True)
        checks.append({"what": "error", "expected": "none", "found": message, "right": False})
    gc.collect()
    torch.cuda.empty_cache()
    return {"checks": checks, "seconds": round(time.monotonic() - started, 1)}


def pretend_rtx_4080() -> None:
    """Give bitsandbytes the multiprocessors and compute capability of an RTX 4080."""
    kernels = importlib.import_module("bitsandbytes.backends.cuda.ops")
    kernels._gpu_dispatch_props = lambda device_index: (76, 8, 9)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    set_allocator()
    for number in config.steps:
        check_bounds("steps", number, 1, len(STEPS))
    folder = config.output_dir or ROOT / "results_7b" / ("limit-tiny" if config.tiny else "")
    card, file, results = Card(config.tiny, config.memory_gib), folder / "gpu_check.json", {}
    if not config.tiny:
        cap_memory(config.memory_gib)
        if config.as_rtx:
            pretend_rtx_4080()
    made_with = {"tiny": config.tiny, "as_rtx": config.as_rtx, **environment(card.device)}
    stored = read_json(file) if file.exists() else made_with
    same_card = stored["hardware"]["device"] == made_with["hardware"]["device"]
    if same_card:  # another card's results are replaced
        if any(stored.get(k, False) != made_with[k] for k in ("tiny", "as_rtx")):
            raise UserError(f"{file} is of another kind of check: choose another --output-dir.")
        results = stored
    results |= made_with
    steps = results.setdefault("steps", {})
    folder.mkdir(parents=True, exist_ok=True)
    for number in config.steps:
        done = steps.get(str(number), FAILED)["checks"]
        if not config.fresh and all(check["right"] is not False for check in done):
            print(f"step {number}: done before, see {file}; --fresh does it again", flush=True)
            continue
        steps[str(number)] = do(number, card)
        if ratios := {k: (min(v), max(v)) for k, v in card.ratios.items() if v}:
            results["ratio"] = ratios
        write_json(file, results)
    wrong = [n for n in config.steps if any(c["right"] is False for c in steps[str(n)]["checks"])]
    if wrong:
        raise UserError(f"not as expected: step {', '.join(map(str, wrong))}; see {file}.")
    print(f"all as expected; {file}")
    for kind, (low, high) in reversed(results.get("ratio", {}).items()):
        print(f"{kind} time / time at the least: {low:.1f} to {high:.1f}")


if __name__ == "__main__":
    run_script(main)
