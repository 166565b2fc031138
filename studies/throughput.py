"""How fast does training run, compared with other recipes on the same rows?

`--backbone small` times Experiment 1; `--backbone 7b` times the architecture of Qwen2.5-7B with
random NF4 weights and true token lengths, on a GPU; `--backbone tiny` is that in miniature, for a
CPU. The recipes of studies/yardsticks.py and ours run alternately, a few steps of each, in one
process: conventional and the reference's own script (--reference-script, Experiment 1 alone) on
random batches, the others on batches of rows of similar length.

Writes throughput.json.
"""

import dataclasses
import gc
import math
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
import transformers
import tyro
from tqdm import tqdm

import common
import experiment
import experiment_7b
import experiment_agnews_7b
from collapse.config import DEFAULT_MODEL, check_bounds
from collapse.data.batches import Split, count_targets, encode_rows, length_grouped_batches
from collapse.data.registry import load_ag_news
from collapse.data.sst2 import load_sst2
from collapse.data.task import Task
from collapse.models import costs
from collapse.models.costs import Sizes, least_seconds, now
from collapse.models.memory import DOES_NOT_FIT, MemoryPlan
from collapse.models.pretrained import add_lora, fill_in_for, load_tokenizer
from collapse.utils.device import cap_memory, pick_device, set_allocator
from collapse.utils.errors import UserError, is_out_of_memory, run_script
from collapse.utils.files import ROOT, write_json
from collapse.utils.provenance import environment
from studies.random_checkpoint import QWEN, TINY, random_language_model
from studies.yardsticks import (
    RECIPES,
    ecosystem_seconds,
    load_published_script,
    make_trainer,
    matrix_share,
    published_seconds,
)


@dataclasses.dataclass
class Config:
    """Settings of the measurement; the comment above a field is its --help text."""

    # What to train: Experiment 1, the 7B architecture with random weights, or that in miniature.
    backbone: Literal["small", "7b", "tiny"] = "small"
    # Folder with the data in its official layout. Default: as for the experiments.
    data_dir: Path | None = None
    # Tokenizer for true token lengths of language models: a hub name, a folder or smollm2-135m.
    tokenizer: str = DEFAULT_MODEL
    # Folder for the results. Default: the experiment's own; with --backbone tiny a folder that git
    # ignores.
    output_dir: Path | None = None
    # Models to time.
    models: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    # Timed rounds; in each, every recipe runs once.
    rounds: int = 7
    # Optimizer steps of one recipe in a round.
    steps: int = 20
    # GPU memory that the process may use, in GiB; default: what a driver leaves of 16.
    memory_gib: float = 15.0
    # The reference's experiment.py, to be timed beside --backbone small. It is no part of this
    # repository: download it from github.com/MikeyBeez/sentiment to any place.
    reference_script: Path | None = None


def measure(
    number: int,
    model: common.DualHeadModel,
    split: Split,
    settings,
    config: Config,
    least: tuple[Sizes, dict[str, float]] | None,
    reference: ModuleType | None = None,
) -> dict:
    """Examples per second of each recipe (medians over rounds), ratios, peak memory.

    least: (sizes, rates), to compute `limit_share`, the lower bound of the time over our time.
    reference: load_published_script's, to be timed, too. On a CPU `matrix_share` is the share of
    our time that matrix products take. A recipe that runs out of memory is named in `out_of_memory`
    and has no numbers.
    """
    size, on_gpu, lengths = settings.batch_size, next(model.parameters()).is_cuda, split.lengths
    needed, rng = (config.rounds + 1) * config.steps, np.random.default_rng(0)
    shuffled = rng.permutation(len(split.labels))[: needed * size]
    batches = {"conventional": [shuffled[i : i + size] for i in range(0, len(shuffled), size)]}
    batches["ours"] = length_grouped_batches(lengths, size, rng)[:needed]
    plan, out_of_memory, state = model.memory_plan, [], {"unpacked": 0, "micro_batch_size": size}
    if plan is not None:
        batches["ecosystem"] = length_grouped_batches(lengths, size, rng)[:needed]
        state["unpacked"] = plan.unpack_what_fits(split, size)
    if reference is not None:
        batches["reference"] = batches["conventional"]
    recipes = [recipe for recipe in ("reference", *RECIPES) if recipe in batches]
    rounds: dict[str, list[dict]] = {recipe: [] for recipe in recipes}
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
            if recipe == "reference":
                seconds = published_seconds(reference, number, np.concatenate(rows))
            else:
                seconds = recipe_seconds(number, recipe, model, split, settings, rows, state)
            model.zero_grad()
            if seconds is None:
                out_of_memory.append(recipe)
                print(f"model {number}: the recipe {recipe} runs out of memory", flush=True)
                continue
            speed = {"examples": sum(map(len, rows)) / seconds}
            if on_gpu:
                speed["peak_bytes"] = torch.cuda.max_memory_allocated()
            if least and recipe == "ours":
                speed["limit_share"] = least_step_seconds(*least, model, split, rows) / seconds
            if round_number:  # the first round warms up
                rounds[recipe].append(speed)
    result = summarize({r: speed for r, speed in rounds.items() if r not in out_of_memory})
    result |= {"out_of_memory": out_of_memory, "layers_unpacked": state["unpacked"]}
    result["micro_batch_size"] = state["micro_batch_size"]
    if not on_gpu and "ours" not in out_of_memory:
        trainer = make_trainer(number, "ours", model, split, settings)
        result["matrix_share"] = matrix_share(trainer, batches["ours"][: config.steps])
    return result


def recipe_seconds(
    number: int, recipe: str, model, split: Split, settings, rows: list[np.ndarray], state: dict
) -> float | None:
    """Seconds of these steps, or None if memory runs out.

    Every call has its own optimizer, because one training never holds the moments of two. `state`
    keeps our recipe's micro-batch size and number of unpacked layers between calls.
    """
    trainer = make_trainer(number, recipe, model, split, settings)
    try:
        if recipe == "ecosystem":
            return ecosystem_seconds(trainer, np.concatenate(rows))
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
        if recipe == "ours":
            state["micro_batch_size"] = trainer.micro_batch_size
            if model.memory_plan is not None:  # fewer, where memory ran out
                state["unpacked"] = model.memory_plan.unpacked


def least_step_seconds(
    sizes: Sizes, rates: dict, model: common.DualHeadModel, split: Split, rows: list[np.ndarray]
) -> float:
    """least_seconds for the true tokens of these steps.

    A model with an engram reads the weights twice per step, because a batch's second half needs the
    engrams of its first half.
    """
    has_engram = model.compressor is not None
    tokens = sum(float(split.lengths[batch].sum()) + has_engram * len(batch) for batch in rows)
    targets = sum(count_targets(split, batch) for batch in rows) if model.lm_head else 0
    itemsize = model.backbone.get_input_embeddings().weight.element_size()
    reads = len(rows) * (2 if has_engram else 1)
    return least_seconds(sizes, rates, tokens, targets, reads, itemsize=itemsize)


def summarize(rounds: dict[str, list[dict]]) -> dict:
    """Medians over the rounds of each recipe that did not run out of memory."""
    result: dict[str, Any] = {"examples_per_second": {}, "peak_memory_bytes": {}, "ratio": {}}
    own_examples = np.array([f["examples"] for f in rounds.get("ours", [])])
    for recipe, speeds in rounds.items():
        examples = np.array([f["examples"] for f in speeds])
        result["examples_per_second"][recipe] = float(np.median(examples))
        if "peak_bytes" in speeds[0]:
            result["peak_memory_bytes"][recipe] = max(f["peak_bytes"] for f in speeds)
        if recipe != "ours" and len(own_examples):
            result["ratio"][recipe] = over_rounds(own_examples / examples)
    if len(own_examples) and "limit_share" in rounds["ours"][0]:
        result["limit_share"] = float(np.median([f["limit_share"] for f in rounds["ours"]]))
    return result


def over_rounds(values: np.ndarray) -> dict[str, float]:
    kinds = {"median": np.median, "low": np.min, "high": np.max}
    return {kind: float(of(values)) for kind, of in kinds.items()}


def describe(result: dict) -> str:
    rates = result["examples_per_second"].items()
    line = "examples/s: " + "  ".join(f"{recipe} {rate:,.0f}" for recipe, rate in rates)
    ratios = (
        f"{r['median']:.1f} [{r['low']:.1f}, {r['high']:.1f}] x {recipe}"
        for recipe, r in result["ratio"].items()
    )
    line += f"; ratio [lowest, highest round]: {', '.join(ratios)}"
    if result["out_of_memory"]:
        line += f"; out of memory: {', '.join(result['out_of_memory'])}"
    if peaks := result["peak_memory_bytes"]:
        line += "; peak GiB: " + ", ".join(f"{r} {b / 2**30:.1f}" for r, b in peaks.items())
    if "matrix_share" in result:
        line += f"; matrix products: {result['matrix_share']:.0%} of our time"
    if "limit_share" in result:
        line += f"; time / least time: {1 / result['limit_share']:.1f}"
    return line


# --------------------------------------------------------------------------------------------------
# What is timed
# --------------------------------------------------------------------------------------------------

STUDIES = (
    (experiment_7b, load_sst2, "pooled", "results_7b"),
    (experiment_agnews_7b, load_ag_news, "intermediate", "results_agnews"),
)


def measure_small(config: Config) -> None:
    settings = experiment.Config(data_dir=config.data_dir)
    task = experiment.load_task(settings)
    vocabulary = experiment.WordVocabulary(task.train.texts, settings.vocabulary_size)
    split = encode_for(config, task, vocabulary.encode, settings)
    results = describe_data(config, task, split, settings) | environment(torch.device("cpu"))
    script = config.reference_script
    reference = load_published_script(script, task) if script else None
    for number in config.models:
        torch.manual_seed(0)
        arm = common.find_arm(str(number))
        model = experiment.build_model(arm, 2, settings)
        result = measure(number, model, split, settings, config, None, reference)
        results[arm.name] = result
        print(f"{arm.title:20}{describe(result)}", flush=True)
    save(config, "" if config.output_dir else f"results/{task.folder}", results)


def encode_for(config: Config, task: Task | None, encode, settings) -> Split:
    """The training rows as token ids. Raises UserError where there are not enough."""
    if task is None:
        raise UserError("the data is neither in the Hugging Face cache nor on the hub: --data-dir.")
    split = encode_rows(task.train, encode, settings.max_length)
    for name in ("rounds", "steps"):
        check_bounds(name, getattr(config, name), 1, math.inf)
    if (config.rounds + 1) * config.steps * settings.batch_size > len(split.labels):
        raise UserError(
            "--rounds times --steps needs more rows than the training split has: lower one of them."
        )
    print(f"{task.title()}, {split.lengths.mean():.1f} tokens a row", flush=True)
    return split


def describe_data(config: Config, task: Task, split: Split, settings) -> dict[str, Any]:
    how = {"rounds": config.rounds, "steps": config.steps, "batch_size": settings.batch_size}
    mean = float(split.lengths.mean())
    return {"data": task.summary(), "tokens_per_row": mean, "settings": how}


def save(config: Config, folder: str, results: dict) -> None:
    part = "limit-tiny" if config.backbone == "tiny" else ""  # which git ignores
    place = (config.output_dir or ROOT) / folder / part
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "throughput.json", results)


def measure_language_model(config: Config) -> None:
    """Time both data sets on one architecture; write a throughput.json for each."""
    tiny = config.backbone == "tiny"
    device, shape = torch.device("cpu" if tiny else "cuda"), TINY if tiny else QWEN
    if not tiny:
        pick_device("cuda")
        cap_memory(config.memory_gib)
    encode, rates = load_tokenizer(config.tokenizer), costs.device_rates(device)
    print(f"measured: {rates['bytes'] / 1e9:,.0f} GB/s, {rates['operations'] / 1e12:.2f} TFLOP/s")
    for script, load, source, folder in STUDIES:
        small = {"lora_rank": 4, "classifier_size": 16, "engram_size": 8} if tiny else {}
        settings = fill_in_for(device, script.Config(quantization="nf4", **small))
        task = load(config.data_dir)
        split = encode_for(config, task, encode, settings)
        if tiny:  # true lengths, few words
            split = Split([i % shape["vocab_size"] for i in split.token_ids], split.labels)
        results = describe_data(config, task, split, settings) | environment(device)
        memory = None if tiny else config.memory_gib
        results |= {"backbone": config.backbone, "rates": rates, "memory_gib": memory}
        least = Sizes.of(transformers.Qwen2Config(**shape), settings.lora_rank), rates
        for number in config.models:
            torch.manual_seed(0)
            causal_lm = random_language_model(shape, getattr(torch, settings.compute_dtype), device)
            arm, classes = common.find_arm(str(number)), len(task.class_names)
            adapters = add_lora(causal_lm, settings)
            model = common.wrap_causal_lm(adapters, arm, classes, source, settings)
            del causal_lm, adapters
            model.memory_plan = MemoryPlan(model, "auto")
            results[arm.name] = measure(number, model, split, settings, config, least)
            print(f"{arm.title:20}{describe(results[arm.name])}", flush=True)
            save(config, folder, results)
            del model
            gc.collect()


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    if config.reference_script and config.backbone != "small":
        raise UserError("--reference-script is a yardstick for --backbone small alone.")
    set_allocator()
    (measure_small if config.backbone == "small" else measure_language_model)(config)


if __name__ == "__main__":
    run_script(main)
