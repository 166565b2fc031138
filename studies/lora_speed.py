"""How fast is LoRA fine-tuning on a CPU, and what do our attention and LoRA layers add to that?

Trains Models 1 and 2 of Experiment 3 on the stand-in, one thread, bfloat16: as the experiments do;
with PyTorch's fused attention, as transformers would choose it; with peft's own LoRA layers, too;
and all that in transformers' Trainer with LM logits at every position. The recipes take the same
batches in turn, a few steps of each, in one process, so that ratios are paired by round. Times are
processor seconds; beside ours stands the share that matrix products take. Writes results.json.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

import common
import experiment_agnews_7b
from collapse.data.batches import Split, length_grouped_batches
from collapse.data.registry import load_ag_news
from collapse.models.lora import use_fused_lora
from collapse.models.pretrained import load_tokenizer
from collapse.utils.device import set_threads
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT, write_json
from collapse.utils.provenance import environment
from studies.throughput import encode_for, over_rounds
from studies.yardsticks import ecosystem_seconds, make_trainer, matrix_share

OUTPUT = ROOT / "studies" / "results" / "lora_speed" / "results.json"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a step is made; `trainer` is a name of yardsticks.RECIPES."""

    attention: str
    fused_lora: bool
    trainer: str


RECIPES = {
    "ours": Recipe("eager", True, "ours"),
    "fused attention": Recipe("sdpa", True, "ours"),
    "peft's layers": Recipe("sdpa", False, "ours"),
    "transformers' Trainer": Recipe("sdpa", False, "ecosystem"),
}
OTHERS = tuple(name for name in RECIPES if name != "ours")


@dataclasses.dataclass
class Config:
    """Settings of the measurement; the comment above a field is its --help text."""

    # Folder with the data in its official layout. Default: as for the experiments.
    data_dir: Path | None = None
    # Causal language model: a hub name, a folder or smollm2-135m.
    model: str = "smollm2-135m"
    # Type that the frozen weights compute in; bfloat16 where the CPU multiplies it in hardware.
    compute_dtype: str = "bfloat16"
    # Timed rounds; in each, every recipe runs once. One more warms up.
    rounds: int = 5
    # Optimizer steps of one recipe in a round.
    steps: int = 3
    # Folder for results.json.
    output_dir: Path = OUTPUT.parent


def use_recipe(model: common.DualHeadModel, recipe: Recipe) -> None:
    """Change attention and LoRA layers of a model in place; no weight changes."""
    model.backbone.set_attn_implementation(recipe.attention)
    for module in model.backbone.modules():
        vars(module).pop("forward", None)  # ours stand in the way of the class's own
    if recipe.fused_lora:
        use_fused_lora(model.backbone)


def step_seconds(
    recipe: Recipe, number: int, model: common.DualHeadModel, split: Split, settings, batches
) -> float:
    """Processor seconds of a step, mean over the batches (arrays of row numbers)."""
    use_recipe(model, recipe)
    trainer = make_trainer(number, recipe.trainer, model, split, settings)
    if recipe.trainer == "ecosystem":
        return ecosystem_seconds(trainer, np.concatenate(batches), time.process_time) / len(batches)
    started = time.process_time()
    for rows in batches:
        trainer.step(rows, settings.learning_rate)
    return (time.process_time() - started) / len(batches)


def measure(
    number: int, model: common.DualHeadModel, split: Split, settings, config: Config
) -> dict[str, Any]:
    """`seconds`: recipe -> processor seconds of a step, by round; `matrix_share`: of ours."""
    seconds: dict[str, list[float]] = {name: [] for name in RECIPES}
    rng = np.random.default_rng(0)
    batches = length_grouped_batches(split.lengths, settings.batch_size, rng)
    model.train()
    for round_number in tqdm(range(config.rounds + 1), f"model {number}", disable=None):
        taken = batches[round_number * config.steps : (round_number + 1) * config.steps]
        for name, recipe in RECIPES.items():
            of_step = step_seconds(recipe, number, model, split, settings, taken)
            if round_number:  # the first round warms up
                seconds[name].append(of_step)
    use_recipe(model, RECIPES["ours"])
    trainer = make_trainer(number, "ours", model, split, settings)
    return {"seconds": seconds, "matrix_share": matrix_share(trainer, batches[: config.steps])}


def speedup_text(seconds: Mapping[str, list[float]], name: str) -> str:
    """A recipe's time over ours, paired by round: median [lowest, highest]."""
    ratio = over_rounds(np.array(seconds[name]) / np.array(seconds["ours"]))
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    set_threads(1)
    settings = experiment_agnews_7b.Config(
        model=config.model,
        quantization="none",
        compute_dtype=config.compute_dtype,
        gradient_checkpointing="off",  # recomputation is no part of the comparison
    )
    device, task = torch.device("cpu"), load_ag_news(config.data_dir)
    split = encode_for(config, task, load_tokenizer(config.model), settings)
    results = {"data": task.summary(), "tokens_per_row": float(split.lengths.mean())}
    results |= {"settings": dataclasses.asdict(config), "rows": settings.batch_size}
    results["settings"] |= {"data_dir": None, "output_dir": None}
    results |= environment(device)
    for number in (1, 2):
        torch.manual_seed(0)
        arm = common.find_arm(str(number))
        model = common.build_language_model(
            arm, len(task.class_names), "intermediate", settings, device
        )
        results[arm.name] = measure(number, model, split, settings, config)
        print(f"{arm.title}: {describe(**results[arm.name])}", flush=True)
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(config.output_dir / OUTPUT.name, results)


def describe(seconds: Mapping[str, list[float]], matrix_share: float) -> str:
    parts = [f"ours {np.median(seconds['ours']):.2f} s a step, {matrix_share:.0%} in products"]
    parts += [f"{name} takes {speedup_text(seconds, name)} times as long" for name in OTHERS]
    return ", ".join(parts)


if __name__ == "__main__":
    run_script(main)
