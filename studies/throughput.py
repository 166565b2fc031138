"""How fast does training run, against two yardsticks on the same model and the same rows?

`--backbone small` times Experiment 1; `--backbone 7b` the architecture of Qwen2.5-7B with random
NF4 weights and true token lengths, for which it needs a GPU; `--backbone tiny` is that in
miniature, for a CPU; `--backbone paper` only counts what the 7B architecture's steps move and
compute, and times nothing. The recipes run in turn, a few steps of each, in one process:

- conventional: every row padded to the maximum length, batches at random, LM logits at every
  position; on a language model also micro-batches of 8 x accumulation 2 and gradient checkpointing.

- ecosystem (language models): transformers' Trainer: padding to the longest row, rows of like
  length together as its sampler groups a whole epoch, gradient checkpointing, LM logits at every
  position.

- ours: as the experiments train.

Writes throughput.json, and for a language model throughput.png; on paper throughput_on_paper.json
and its plot.
"""

import dataclasses
import gc
import math
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import datasets
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import common
import experiment
import experiment_7b
import experiment_agnews_7b
from collapse.config import DEFAULT_MODEL, LanguageModelConfig, check_bounds
from collapse.data.batches import (
    EVALUATION_TOKENS,
    Batch,
    Split,
    collate,
    count_targets,
    encode_rows,
    length_grouped_batches,
    token_budget_batches,
)
from collapse.data.registry import load_ag_news
from collapse.data.sst2 import load_sst2
from collapse.data.task import Task
from collapse.models.losses import LOGIT_CHUNK_TOKENS, combined_loss
from collapse.models.memory import DOES_NOT_FIT, MemoryPlan, count_parameters
from collapse.models.pretrained import add_lora, fill_in_for, load_tokenizer
from collapse.report.plots import save_figure
from collapse.utils.device import pick_device, set_allocator
from collapse.utils.errors import UserError, is_out_of_memory, run_script
from collapse.utils.files import ROOT, write_json
from collapse.utils.provenance import environment

RECIPES = ("conventional", "ecosystem", "ours")
RECIPE_COLORS = {"conventional": "#999999", "ecosystem": "#56B4E9", "ours": "#009E73"}
QWEN = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
}
QWEN |= {"num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY |= {"vocab_size": 1000, "tie_word_embeddings": False}


@dataclasses.dataclass
class Config:
    """Settings of the measurement; the comment above a field is its --help text."""

    # What is trained: Experiment 1, the 7B architecture with random weights, that in miniature, or
    # that on paper.
    backbone: Literal["small", "7b", "tiny", "paper"] = "small"
    # Folder with the data in its official layout. Default: as for the experiments.
    data_dir: Path | None = None
    # Tokenizer that gives the language models' true token lengths: a hub name, a folder or
    # smollm2-135m.
    tokenizer: str = DEFAULT_MODEL
    # Folder for the results. Default: the experiment's own; for the miniature, a folder that git
    # ignores.
    output_dir: Path | None = None
    # Models to time.
    models: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    # Timed rounds: in each, every recipe runs in turn.
    rounds: int = 7
    # Optimizer steps of one recipe in a round.
    steps: int = 20
    # GPU memory that the process may take, in GiB: of a card of 16, what its driver leaves.
    memory_gib: float = 15.0


# --------------------------------------------------------------------------------------------------
# Recipes
# --------------------------------------------------------------------------------------------------


class Conventional:
    """Mixed into a trainer: pads to the maximum length and makes logits at every position, pads
    included.
    """

    def collate(self, rows: np.ndarray) -> Batch:
        batch = super().collate(rows)
        missing = self.config.max_length - batch.input_ids.shape[1]
        ids, mask = F.pad(batch.input_ids, (0, missing)), F.pad(batch.text_mask, (0, missing))
        return dataclasses.replace(batch, input_ids=ids, text_mask=mask)

    def lm_loss_sum(self, hidden: Tensor, batch: Batch) -> Tensor:
        return logits_everywhere_loss_sum(self.model.lm_head, hidden, batch)

    def use_less_memory(self) -> None:
        """It knows of no way to."""
        raise torch.OutOfMemoryError("the conventional recipe runs out of memory")


def logits_everywhere_loss_sum(lm_head: nn.Linear, hidden: Tensor, batch: Batch) -> Tensor:
    targets = batch.input_ids.masked_fill(~batch.text_mask, -100)[:, 1:]  # (B, L - 1)
    logits = lm_head(hidden)[:, :-1].float()  # (B, L - 1, V)
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )


class ConventionalTrainer(Conventional, common.Trainer):
    pass


class ConventionalPairTrainer(Conventional, common.SequentialPairTrainer):
    pass


def make_trainer(
    number: int, recipe: str, model: common.DualHeadModel, split: Split, settings
) -> common.Trainer:
    arm = common.find_arm(str(number))
    if recipe == "ours":
        return common.make_trainer(model, split, settings, arm)
    kind = ConventionalPairTrainer if number == 3 else ConventionalTrainer
    trainer = kind(model, split, settings, arm)
    if isinstance(settings, LanguageModelConfig):
        trainer.micro_batch_size = 8
    return trainer


class EcosystemLoss(nn.Module):
    """What transformers' Trainer trains: a batch's loss, logits at every position; model 3's pairs
    are the batch's halves.
    """

    def __init__(self, model: common.DualHeadModel, lm_weight: float):
        super().__init__()
        self.model, self.lm_weight = model, lm_weight

    def forward(self, input_ids: Tensor, text_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        half = (len(labels) + 1) // 2 if self.model.compressor is not None else len(labels)
        cls_loss, lm_loss, engram = 0.0, 0.0, None
        for part in (slice(0, half), slice(half, None)):
            batch = Batch(input_ids[part], text_mask[part], labels[part], labels[:0])
            if not len(batch.labels):
                continue
            output = self.model(
                batch.input_ids,
                batch.text_mask,
                None if engram is None else engram[: len(batch.labels)],
            )
            cls_loss = cls_loss + F.cross_entropy(output.logits, batch.labels, reduction="sum")
            if self.model.lm_head is not None:
                lm_loss = lm_loss + logits_everywhere_loss_sum(
                    self.model.lm_head, output.hidden, batch
                )
            engram = output.engram
        lm_loss = (
            lm_loss / text_mask[:, 1:].sum().clamp(min=1)
            if self.model.lm_head is not None
            else None
        )
        return {"loss": combined_loss(cls_loss / len(labels), lm_loss, self.lm_weight)}


class StepTimes(transformers.TrainerCallback):
    def __init__(self):
        self.stamps: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.stamps.append(now())

    def on_step_end(self, *_, **__) -> None:
        self.stamps.append(now())


def ecosystem_seconds(
    model: common.DualHeadModel, split: Split, settings, rows: np.ndarray
) -> float:
    """Seconds that transformers' Trainer takes for the rows, between its first step's start and its
    last one's end.
    """

    def collate_items(items: list[dict]) -> dict[str, Tensor]:
        batch = collate(split, [item["row"] for item in items], torch.device("cpu"))
        return {"input_ids": batch.input_ids, "text_mask": batch.text_mask, "labels": batch.labels}

    device = next(model.parameters()).device
    times, folder = (
        StepTimes(),
        tempfile.TemporaryDirectory(),
    )  # the Trainer makes a folder, though it saves nothing
    arguments = transformers.TrainingArguments(
        output_dir=folder.name,
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip_norm,
        # the rows are grouped: a few steps' rows alone it would group coarsely
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        # The model itself multiplies in bfloat16, in every recipe.
        bf16=False,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    table = datasets.Dataset.from_dict({"row": rows.tolist()})
    trainer = transformers.Trainer(
        EcosystemLoss(model, settings.lm_weight),
        arguments,
        data_collator=collate_items,
        train_dataset=table,
        callbacks=[times],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    with folder:
        trainer.train()
    return times.stamps[-1] - times.stamps[0]


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# --------------------------------------------------------------------------------------------------
# A language model of random weights
# --------------------------------------------------------------------------------------------------


def random_language_model(
    sizes: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Qwen2 of these sizes, packed as load_causal_lm packs it, one layer after another: it never
    exists unpacked.
    """
    import bitsandbytes

    config = transformers.Qwen2Config(**sizes, rope_theta=1e6, rms_norm_eps=1e-6, use_cache=False)
    with torch.device("meta"):
        causal_lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    causal_lm.model.rotary_emb = type(causal_lm.model.rotary_emb)(config).to(device)
    for name, module in [*causal_lm.named_modules()]:
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                module.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",  # else it fills a matrix in fp32 on the CPU first
            )
            values = (
                torch.randn(module.out_features, module.in_features, dtype=dtype, device=device)
                * 0.02
            )
            packed.weight = bitsandbytes.nn.Params4bit(
                values, requires_grad=False, quant_type="nf4"
            ).to(device)
            packed.support_avx512bf16_for_cpu = False
            if packed.bias is not None:
                packed.bias = nn.Parameter(
                    torch.zeros(module.out_features, dtype=dtype, device=device)
                )
            causal_lm.set_submodule(name, packed)
    for module in causal_lm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # embeddings and LM head are matrices, norms are vectors of ones
                shape = {"size": parameter.shape, "dtype": dtype, "device": device}
                values = torch.randn(**shape) * 0.02 if parameter.ndim == 2 else torch.ones(**shape)
                setattr(module, name, nn.Parameter(values))
    causal_lm.is_loaded_in_4bit = True  # as in what transformers loads: peft asks for it
    return causal_lm.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------


def device_rates(device: torch.device) -> dict[str, float]:
    """Measured bytes a second of a copy, and operations a second of a large matrix product."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(
        2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device
    )

    def fastest(work) -> float:
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


def limit_seconds(
    model: common.DualHeadModel,
    number: int,
    rows: list[np.ndarray],
    split: Split,
    rates: dict,
) -> dict:
    """The least that these steps need: packed weights read once a pass, and the operations of true
    tokens, at measured rates.

    A step passes forward and backward over the weights; model 3 does both twice, since its second
    half waits for the first half's engrams. The backward pass needs gradients of the inputs alone,
    and of the adapters.
    """
    linear = [
        m
        for m in model.backbone.layers.modules()
        if isinstance(m, nn.Linear) and not m.weight.requires_grad
    ]
    count = count_parameters(model.backbone.layers)
    lengths = split.lengths
    tokens = sum(lengths[batch].sum() + (len(batch) if number == 3 else 0) for batch in rows)
    passes = len(rows) * (4 if number == 3 else 2)
    moved = passes * sum(m.in_features * m.out_features for m in linear) // 2
    operations = tokens * (4 * (count["total"] - count["trainable"]) + 6 * count["trainable"])
    if model.lm_head is not None:
        head = model.lm_head.weight
        moved += passes * head.numel() * head.element_size()
        operations += 4 * head.numel() * sum(count_targets(split, batch) for batch in rows)
    seconds = {
        "bytes": moved / rates["bytes"],
        "operations": float(operations) / rates["operations"],
    }
    return {**seconds, "binding": max(seconds, key=seconds.get)}


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def measure(
    number: int,
    model: common.DualHeadModel,
    split: Split,
    settings,
    config: Config,
    rates: dict | None,
) -> dict:
    """Examples and tokens per second of each recipe, medians over rounds; ratios over pairs of
    rounds; peak memory; limits. A recipe that ran out of memory is named in `out_of_memory`, and
    has no numbers.
    """
    size, on_gpu, lengths = settings.batch_size, next(model.parameters()).is_cuda, split.lengths
    needed, rng = (config.rounds + 1) * config.steps, np.random.default_rng(0)
    shuffled = rng.permutation(len(split.labels))[: needed * size]
    batches = {"conventional": [shuffled[i : i + size] for i in range(0, len(shuffled), size)]}
    batches["ours"] = length_grouped_batches(lengths, size, rng)[:needed]
    if model.memory_plan is not None:
        batches["ecosystem"] = length_grouped_batches(lengths, size, rng)[:needed]
    recipes = [recipe for recipe in RECIPES if recipe in batches]
    rounds: dict[str, list[dict]] = {recipe: [] for recipe in recipes}
    plan, out_of_memory, state = model.memory_plan, [], {"unpacked": 0, "micro_batch_size": size}
    if plan is not None:
        state["unpacked"] = plan.unpack_what_fits(split, size)
    model.train()
    for round_number in tqdm(range(config.rounds + 1), f"model {number}", disable=None):
        for recipe in [recipe for recipe in recipes if recipe not in out_of_memory]:
            rows = batches[recipe][round_number * config.steps : (round_number + 1) * config.steps]
            if plan is not None:
                plan.mode = "auto" if recipe == "ours" else "on"
                plan.recompute(0 if recipe == "ours" else len(plan.layers))
                plan.unpack(state["unpacked"] if recipe == "ours" else 0)
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds = recipe_seconds(number, recipe, model, split, settings, rows, state)
            model.zero_grad()
            if seconds is None:
                out_of_memory.append(recipe)
                print(f"model {number}: the recipe {recipe} runs out of memory", flush=True)
                continue
            tokens = sum(float(lengths[batch].sum()) for batch in rows)
            found = {"examples": sum(map(len, rows)) / seconds, "tokens": tokens / seconds}
            if on_gpu:
                found["peak_bytes"] = torch.cuda.max_memory_allocated()
            if rates is not None and recipe == "ours":
                limit = limit_seconds(model, number, rows, split, rates)
                found |= {
                    "limit_share": max(limit["bytes"], limit["operations"]) / seconds,
                    "binding_limit": limit["binding"],
                }
            if round_number:  # the first round warms up
                rounds[recipe].append(found)
    if plan is not None:
        plan.unpack(state["unpacked"])  # as an evaluation in training finds them
    result = summarize({r: found for r, found in rounds.items() if r not in out_of_memory}, split)
    result |= {"out_of_memory": out_of_memory, "layers_unpacked": state["unpacked"]}
    result["micro_batch_size"] = state["micro_batch_size"]
    return result | {"evaluation_examples_per_second": evaluation_rate(model, split, needed * size)}


def recipe_seconds(
    number: int, recipe: str, model, split: Split, settings, rows: list[np.ndarray], state: dict
) -> float | None:
    """Seconds of these steps, None where memory runs out.

    Each time with an optimizer of its own, which is gone afterwards: the moments of two would not
    be in one training. `state` keeps what ours learned about memory.
    """
    trainer = None
    try:
        if recipe == "ecosystem":
            return ecosystem_seconds(model, split, settings, np.concatenate(rows))
        trainer = make_trainer(number, recipe, model, split, settings)
        if recipe == "ours":
            trainer.micro_batch_size = state["micro_batch_size"]
        started = now()
        for batch in rows:
            trainer.step(batch, settings.learning_rate)
        return now() - started
    except (RuntimeError, UserError) as error:
        if str(error) != DOES_NOT_FIT and not is_out_of_memory(error):
            raise
        return None
    finally:
        if recipe == "ours" and trainer is not None:
            state["micro_batch_size"] = trainer.micro_batch_size
            if model.memory_plan is not None:  # fewer, where memory ran out
                state["unpacked"] = model.memory_plan.unpacked


def summarize(rounds: dict[str, list[dict]], split: Split) -> dict:
    """Medians over the rounds of each recipe that did not run out of memory."""
    result: dict[str, Any] = {"examples_per_second": {}, "tokens_per_second": {}}
    result |= {"peak_memory_bytes": {}, "ratio": {}}
    ours = [f["examples"] for f in rounds.get("ours", [])]
    for recipe, found in rounds.items():
        examples = np.array([f["examples"] for f in found])
        result["examples_per_second"][recipe] = float(np.median(examples))
        result["tokens_per_second"][recipe] = float(np.median([f["tokens"] for f in found]))
        if "peak_bytes" in found[0]:
            result["peak_memory_bytes"][recipe] = max(f["peak_bytes"] for f in found)
        if recipe != "ours" and ours:
            ratios = np.array(ours) / examples
            result["ratio"][recipe] = {
                "median": float(np.median(ratios)),
                "low": float(ratios.min()),
                "high": float(ratios.max()),
            }
    if ours and "limit_share" in rounds["ours"][0]:
        result["limit_share"] = float(np.median([f["limit_share"] for f in rounds["ours"]]))
        result["binding_limit"] = rounds["ours"][-1]["binding_limit"]
    rows = len(split.labels)
    result["epoch_seconds"] = {
        recipe: rows / rate for recipe, rate in result["examples_per_second"].items()
    }
    return result


def evaluation_rate(model: common.DualHeadModel, split: Split, rows: int) -> float:
    """Rows a second of an evaluation, on a draw of the training split: of about its lengths."""
    drawn = np.random.default_rng(1).permutation(len(split.labels))[: min(rows, 1000)]
    part = Split([split.token_ids[row] for row in drawn], split.labels[drawn])
    started = now()
    common.evaluate(model, part)
    return len(drawn) / (now() - started)


def evaluation_passes(number: int, epochs: int) -> int:
    """Over the validation rows: before training and after each epoch, model 3's then also with
    engrams that are carried.
    """
    return 1 + epochs * (2 if number == 3 else 1)


def describe(found: dict) -> str:
    rates = "  ".join(
        f"{recipe} {rate:,.0f}" for recipe, rate in found["examples_per_second"].items()
    )
    ratios = ", ".join(
        f"{r['median']:.1f} [{r['low']:.1f}, {r['high']:.1f}] x {recipe}"
        for recipe, r in found["ratio"].items()
    )
    line = f"examples/s: {rates}; ratio [lowest, highest round]: {ratios}"
    if found["out_of_memory"]:
        line += f"; out of memory: {', '.join(found['out_of_memory'])}"
    if found["peak_memory_bytes"]:
        line += "; peak GiB: " + ", ".join(
            f"{recipe} {b / 2**30:.1f}" for recipe, b in found["peak_memory_bytes"].items()
        )
    if "limit_share" in found:
        line += f"; {found['limit_share']:.0%} of the limit ({found['binding_limit']})"
    return line


def measure_small(config: Config) -> dict:
    settings = experiment.Config(data_dir=config.data_dir)
    task = experiment.load_task(settings)
    vocabulary = experiment.WordVocabulary(task.train.texts, settings.vocabulary_size)
    split = encode_rows(task.train, vocabulary.encode, settings.max_length)
    check_rows(config, split, settings)
    mean, padded = float(split.lengths.mean()), settings.max_length
    print(f"{task.title()}, {mean:.1f} tokens a row, padded to {padded} by the conventional recipe")
    here = environment(torch.device("cpu"))
    results = {"data": task.summary(), "tokens_per_row": mean, **here}
    results["settings"] = {
        "rounds": config.rounds,
        "steps": config.steps,
        "batch_size": settings.batch_size,
    }
    for number in config.models:
        torch.manual_seed(0)
        arm = common.find_arm(str(number))
        model = experiment.build_model(arm, 2, settings)
        found = results[arm.name] = measure(number, model, split, settings, config, None)
        print(f"{arm.title:20}{describe(found)}", flush=True)
    save(config.output_dir or ROOT / "results" / task.folder, results)
    return results


def check_rows(config: Config, split: Split, settings) -> None:
    for name in ("rounds", "steps"):
        check_bounds(name, getattr(config, name), 1, math.inf)
    if (config.rounds + 1) * config.steps * settings.batch_size > len(split.labels):
        raise UserError(
            "--rounds times --steps needs more rows than the training split has: lower one of them."
        )


def save(folder: Path, results: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "throughput.json", results)


STUDIES = (
    (experiment_7b, load_sst2, "pooled", "results_7b"),
    (experiment_agnews_7b, load_ag_news, "intermediate", "results_agnews"),
)


def results_folder(config: Config, folder: str) -> Path:
    """Where a language-model experiment's measurements go; the miniature's into a folder that git
    ignores.
    """
    if config.output_dir:
        return config.output_dir / folder
    return ROOT / folder / ("limit-tiny" if config.backbone == "tiny" else "")


def load_split(script, load, encode, config: Config) -> tuple[Task, Any, Split]:
    """Task, settings and true token ids of one of the two language-model experiments."""
    task, settings = load(config.data_dir), script.Config(quantization="nf4")
    if task is None:
        raise UserError(
            "the data is neither in the Hugging Face cache nor on the hub: give --data-dir."
        )
    split = encode_rows(task.train, encode, settings.max_length)
    check_rows(config, split, settings)
    mean, limit = split.lengths.mean(), settings.max_length
    print(
        f"{task.title()}, {mean:.1f} tokens a row, padded to {limit} by the conventional recipe",
        flush=True,
    )
    return task, settings, split


def cap_memory(gib: float) -> None:
    """Let this process take so much of the GPU, what the CUDA context takes included."""
    torch.cuda.synchronize()  # makes the context
    free, total = torch.cuda.mem_get_info()
    # A context takes less than a GiB; what is more, other processes hold.
    context = min(2**30, total - free - torch.cuda.memory_reserved())
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib * 2**30 - context) / total))


def measure_language_model(config: Config) -> dict[str, dict]:
    """Both data sets on one architecture; a throughput.json for each, and a plot of both."""
    device = torch.device("cuda" if config.backbone == "7b" else "cpu")
    if config.backbone == "7b":
        pick_device("cuda")
        cap_memory(config.memory_gib)
    encode, rates, found = load_tokenizer(config.tokenizer), device_rates(device), {}
    print(f"measured: {rates['bytes'] / 1e9:,.0f} GB/s, {rates['operations'] / 1e12:.2f} TFLOP/s")
    for script, load, source, folder in STUDIES:
        task, settings, split = load_split(script, load, encode, config)
        settings, sizes = (
            fill_in_for(device, settings),
            QWEN if config.backbone == "7b" else TINY,
        )
        if config.backbone == "tiny":
            settings = dataclasses.replace(settings, lora_rank=4, classifier_size=16, engram_size=8)
            split = Split(
                [ids % TINY["vocab_size"] for ids in split.token_ids], split.labels
            )  # true lengths, few words
        mean = float(split.lengths.mean())
        results = {
            "backbone": config.backbone,
            "data": task.summary(),
            "tokens_per_row": mean,
            **environment(device),
        }
        results |= {
            "rates": rates,
            "memory_gib": config.memory_gib if device.type == "cuda" else None,
        }
        results["settings"] = {
            "rounds": config.rounds,
            "steps": config.steps,
            "batch_size": settings.batch_size,
        }
        for number in config.models:
            torch.manual_seed(0)
            causal_lm = random_language_model(sizes, getattr(torch, settings.compute_dtype), device)
            arm, classes = common.find_arm(str(number)), len(task.class_names)
            adapters = add_lora(causal_lm, settings)
            model = common.wrap_causal_lm(adapters, arm, classes, source, settings)
            del causal_lm, adapters
            model.memory_plan = MemoryPlan(model, "auto")
            result = results[arm.name] = measure(number, model, split, settings, config, rates)
            evaluated = evaluation_passes(number, settings.epochs) * len(task.validation)
            seconds = evaluated / result["evaluation_examples_per_second"]
            seconds += settings.epochs * result["epoch_seconds"].get("ours", math.nan)
            hours = f"{settings.epochs} epochs with evaluations: {seconds / 3600:.1f} h"
            print(f"{arm.title:20}{describe(result)}; {hours}", flush=True)
            save(results_folder(config, folder), results)
            del model
            gc.collect()
        found[task.name] = results
    model = (
        "Qwen2.5-7B's architecture, random NF4 weights" if config.backbone == "7b" else "miniature"
    )
    title = f"{model}; {results['hardware']['device']}; medians of {config.rounds} rounds"
    plot(results_folder(config, "results_7b") / "throughput.png", found, title)
    return found


# Vendor's figures of the reference's card: memory bandwidth, and dense bfloat16 products with fp32
# sums.
RTX_4080 = {"name": "RTX 4080", "bytes": 717e9, "operations": 97.5e12}
# Tokens up to which bitsandbytes 0.50.2 multiplies packed weights of these shapes without unpacking
# them, on that card.
FUSED = {"q o": 32, "k v": 23, "gate up": 256, "down": 64}


# Bytes that elementwise work moves for a token and layer, forward and backward: norms, rotations,
# the MLP's gate, the adapters' casts, dropout and additions. Counted by tests/test_lora_costs.py
# in bfloat16: peft's own path, and adapters that compute as one function (collapse/models/lora.py).
ELEMENTWISE_BYTES = {"conventional": 5.1e6, "ecosystem": 5.1e6, "ours": 2.4e6}
ELEMENTWISE_FORWARD = 1 / 3  # of them, in a forward pass


def count_architecture(settings, number: int) -> SimpleNamespace:
    """Parameters of the 7B architecture: hidden, feed-forward and depth; of a layer and of its
    matrices by name; of all adapters; of the LM head, 0 for model 1.
    """
    h, f, depth = (QWEN[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = h * QWEN["num_key_value_heads"] / QWEN["num_attention_heads"]
    matrices = {"q o": 2 * h * h, "k v": 2 * h * kv, "gate up": 2 * h * f, "down": h * f}
    adapters = depth * settings.lora_rank * (4 * h + 2 * (h + kv) + 3 * (h + f))
    head = QWEN["vocab_size"] * h if number > 1 else 0
    layer = sum(matrices.values())
    return SimpleNamespace(
        h=h, f=f, depth=depth, layer=layer, matrices=matrices, adapters=adapters, head=head
    )


def packed_forward(matrices: dict[str, float], tokens: float) -> float:
    """Bytes of a layer's packed weights in a forward pass of so many tokens: bitsandbytes reads
    them, or reads, writes unpacked and reads again.
    """
    return sum(
        n * (0.52 if tokens <= FUSED[name] else 0.52 + 2 + 2) for name, n in matrices.items()
    )


def count_step(
    lengths: np.ndarray,
    recipe: str,
    number: int,
    settings,
    memory_gib: float,
    typical: float,
    longest: float,
) -> dict[str, float]:
    """Bytes moved, operations and seconds on paper of one optimizer step on rows of these lengths,
    7B architecture.

    For a product, packed weights are read, written unpacked, and read again; in a forward pass of
    few tokens (FUSED) they are only read, as unpacked ones are. A product waits for its weights, so
    the times add up, with that of elementwise work. Ours keeps layers unpacked as MemoryPlan does,
    for steps of `typical` and at most `longest` tokens. Attention's own products and the optimizer
    are left out. The limit is that of limit_seconds.
    """
    a, prefix, ours = count_architecture(settings, number), float(number == 3), recipe == "ours"
    h, f, depth, layer, adapters, head = a.h, a.f, a.depth, a.layer, a.adapters, a.head
    longest_here = settings.max_length if recipe == "conventional" else lengths.max()
    tokens, halves = len(lengths) * (longest_here + prefix), 2 if number == 3 else 1
    # Micro-batches of 8, halves of pairs: each a pass over the weights.
    pieces = halves * (2 if recipe == "conventional" else 1)
    # kept for a token and layer: the adapters' dropped-out fp32 inputs with masks, norms,
    # attention, and the MLP's gate
    kept = 23 * h + 9 * f if recipe == "ours" else 5 * (6 * h + f) + 22 * h + 6 * f
    fixed = 0.52 * depth * layer + 2 * (QWEN["vocab_size"] * h + head) + 12 * adapters
    free = memory_gib * 2**30 - fixed - MemoryPlan.WORKING_BYTES
    needed = max(typical * (depth + 1) * kept, longest * (2 * kept + 2 * depth * h))
    unpacked = min(1.0, max(0.0, (free - needed) / (1.48 * depth * layer))) if ours else 0.0
    free -= unpacked * 1.48 * depth * layer
    recomputed = min(1.0, max(0.0, 1 + 1 / depth - free / (tokens * depth * kept))) if ours else 1.0
    packed_passes = (1 + recomputed) * packed_forward(a.matrices, tokens / pieces)
    packed_passes += (0.52 + 2 + 2) * layer
    plain_passes = (2 + recomputed) * 2 * layer
    moved = pieces * depth * ((1 - unpacked) * packed_passes + unpacked * plain_passes)
    elementwise = 1 + ELEMENTWISE_FORWARD * recomputed
    moved += tokens * depth * ELEMENTWISE_BYTES[recipe] * elementwise
    operations = tokens * (2 * (2 + recomputed) * (depth * layer + adapters) + 2 * adapters)
    predicted = lengths.sum() - len(lengths)
    operations += 4 * head * (predicted if ours else tokens)
    # Each chunk reads the LM head forward and back.
    chunks = math.ceil(predicted / pieces / LOGIT_CHUNK_TOKENS) if ours else 1
    moved += pieces * chunks * 2 * 2 * head
    seconds = moved / RTX_4080["bytes"] + operations / RTX_4080["operations"]
    true_tokens = lengths.sum() + prefix * len(lengths)
    least_operations = true_tokens * (4 * depth * layer + 6 * adapters) + 4 * head * predicted
    least_bytes = 2 * halves * (depth * layer / 2 + 2 * head)
    limit = max(least_bytes / RTX_4080["bytes"], least_operations / RTX_4080["operations"])
    return {
        "bytes": moved,
        "operations": operations,
        "seconds": seconds,
        "limit_share": limit / seconds,
        "recomputed": recomputed,
        "unpacked": unpacked,
    }


def count_evaluation(
    lengths: np.ndarray, recipe: str, number: int, settings, unpacked: float
) -> float:
    """Seconds on paper of one evaluation of rows of these lengths, 7B architecture, in batches as
    common.evaluate makes them, with this share of layers unpacked.
    """
    a, seconds = count_architecture(settings, number), 0.0
    for rows in token_budget_batches(lengths, EVALUATION_TOKENS["cuda"]):
        tokens = len(rows) * (float(lengths[rows].max()) + (number == 3))
        predicted = lengths[rows].sum() - len(rows)
        packed = packed_forward(a.matrices, tokens)
        moved = a.depth * ((1 - unpacked) * packed + unpacked * 2 * a.layer)
        moved += tokens * a.depth * ELEMENTWISE_BYTES[recipe] * ELEMENTWISE_FORWARD
        moved += math.ceil(predicted / LOGIT_CHUNK_TOKENS) * 2 * a.head
        operations = 2 * tokens * (a.depth * a.layer + a.adapters) + 2 * a.head * predicted
        seconds += moved / RTX_4080["bytes"] + float(operations) / RTX_4080["operations"]
    return seconds


def count_on_paper(config: Config) -> dict[str, dict]:
    """What the recipes would take on the reference's card, from counts alone; written to
    throughput_on_paper.json.
    """
    encode, results = load_tokenizer(config.tokenizer), {}
    here = {key: environment(torch.device("cpu"))[key] for key in ("versions", "git_commit")}
    for script, load, _, folder in STUDIES:
        task, settings, split = load_split(script, load, encode, config)
        rng, size, lengths = np.random.default_rng(0), settings.batch_size, split.lengths
        validation = encode_rows(task.validation, encode, settings.max_length).lengths
        grouped, shuffled = (
            length_grouped_batches(lengths, size, rng),
            rng.permutation(len(lengths)),
        )
        steps = min(len(grouped), 500)
        found: dict[str, Any] = {
            "data": task.summary(),
            "tokens_per_row": float(lengths.mean()),
            "rates": RTX_4080,
            **here,
        }
        found["settings"] = {
            "steps": steps,
            "epochs": settings.epochs,
            "memory_gib": config.memory_gib,
            "elementwise_bytes": ELEMENTWISE_BYTES,
        }
        for number in config.models:
            by_recipe = {}
            for recipe in RECIPES:
                rows = (
                    grouped[:steps]
                    if recipe != "conventional"
                    else np.split(shuffled[: steps * size], steps)
                )
                memory = config.memory_gib, size * lengths.mean(), size * lengths.max()
                counts = [
                    count_step(lengths[batch], recipe, number, settings, *memory) for batch in rows
                ]
                means = {key: float(np.mean([count[key] for count in counts])) for key in counts[0]}
                means["examples_per_second"] = sum(map(len, rows)) / sum(
                    count["seconds"] for count in counts
                )
                means["evaluation_seconds"] = count_evaluation(
                    validation, recipe, number, settings, means["unpacked"]
                )
                seconds = settings.epochs * len(split.labels) / means["examples_per_second"]
                passes = evaluation_passes(number, settings.epochs)
                means["evaluation_passes"] = passes
                means["hours"] = (seconds + passes * means["evaluation_seconds"]) / 3600
                by_recipe[recipe] = means
            rates = {recipe: means["examples_per_second"] for recipe, means in by_recipe.items()}
            found[f"model{number}"] = {"examples_per_second": rates, "step": by_recipe}
            line = "  ".join(f"{recipe} {rate:.0f}" for recipe, rate in rates.items())
            ours = by_recipe["ours"]
            ratios = ", ".join(
                f"{rates['ours'] / rates[other]:.1f} x {other}" for other in RECIPES[:2]
            )
            shares = f"{ours['limit_share']:.0%} of the limit, "
            shares += f"{ours['recomputed']:.0%} of layers recomputed, "
            shares += f"{ours['unpacked']:.0%} kept unpacked"
            name, hours = (
                common.find_arm(str(number)).title,
                f"an evaluation {ours['evaluation_seconds']:.0f} s; "
                f"{settings.epochs} epochs with evaluations: {ours['hours']:.1f} h",
            )
            print(
                f"{name:20}examples/s on paper: {line}; ratio {ratios}; {shares}; {hours}",
                flush=True,
            )
        results[task.name] = found
        target = results_folder(config, folder)
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "throughput_on_paper.json", found)
    title = f"Qwen2.5-7B's architecture; counted on paper for an {RTX_4080['name']}, not measured"
    plot(results_folder(config, "results_7b") / "throughput_on_paper.png", results, title)
    return results


def plot(path: Path, found: dict[str, dict], title: str) -> None:
    """Examples per second of each recipe, a panel for each data set."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(6 * len(found), 4), layout="constrained", squeeze=False
    )
    for axis, (name, results) in zip(axes[0], found.items(), strict=True):
        keys = [key for key in ("model1", "model2", "model3") if key in results]
        for offset, recipe in enumerate(RECIPES):
            found_rates = [results[key]["examples_per_second"] for key in keys]
            rates = [of_model.get(recipe, 0.0) for of_model in found_rates]  # 0: out of memory
            places = np.arange(len(keys)) + 0.27 * (offset - 1)
            bars = axis.bar(places, rates, 0.25, label=recipe, color=RECIPE_COLORS[recipe])
            axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set(
            ylabel="training examples per second",
            title=f"{name}, {results['tokens_per_row']:.0f} tokens a row",
        )
        axis.set_xticks(range(len(keys)), [common.find_arm(key).title for key in keys])
        axis.grid(alpha=0.3, axis="y")
    axes[0][0].legend()
    figure.suptitle(title)
    save_figure(figure, path)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    set_allocator()
    {"small": measure_small, "paper": count_on_paper}.get(config.backbone, measure_language_model)(
        config
    )


if __name__ == "__main__":
    run_script(main)
