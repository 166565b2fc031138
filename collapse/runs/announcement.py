"""What a run on a pretrained model says before it takes long: card, hours, download."""

import numpy as np
import torch

from collapse.arms import chosen_arms
from collapse.config import DEFAULT_MODEL, STANDIN_MODEL, LanguageModelConfig
from collapse.data.task import Task, fixed_draw
from collapse.models.costs import Sizes, device_rates, least_training_seconds, ratio_on
from collapse.models.fetching import describe_card, fetch
from collapse.models.pretrained import load_tokenizer
from collapse.models.weights import read_config
from collapse.utils.device import check_card
from collapse.utils.errors import UserError

TIMED_ROWS = 1000  # training rows, a fixed draw, whose tokens stand for all


def check_device_for(model: str, device: torch.device, dtype: str | None = None) -> None:
    """Raise UserError where the 7B model would run on a CPU, or on a GPU too old for its type.

    dtype: as in LanguageModelConfig.compute_dtype.
    """
    check_card(device, dtype or "bfloat16")
    if device.type == "cpu" and model == DEFAULT_MODEL:
        raise UserError(
            f"{DEFAULT_MODEL} needs a CUDA GPU with 16 GB of memory, and this would run on the CPU:"
            " to try the script without a GPU, run `make standin` and give "
            f"--model {STANDIN_MODEL}."
        )


def announce_run(task: Task, device: torch.device, settings: LanguageModelConfig) -> None:
    """Say what comes before it takes long: card, hours, model, disk; then fetch the model."""
    print(describe_card(device, settings.quantization, settings.compute_dtype), flush=True)
    print(expected_hours(task, device, settings), flush=True)
    fetch(settings.model, settings.revision)


def expected_hours(task: Task, device: torch.device, settings: LanguageModelConfig) -> str:
    """Hours of each training from start to end as a range, and of all of them."""
    if device.type == "cpu" or not torch.cuda.is_available():
        return "time: not estimated for a CPU; the first minute of a training shows its own"
    sample = [task.train.texts[row] for row in fixed_draw(len(task.train), TIMED_ROWS)]
    ids = load_tokenizer(settings.model, settings.revision)(sample)
    mean = float(np.mean([min(len(row), settings.max_length) for row in ids]))
    sizes = Sizes.of(read_config(settings.model, settings.revision), settings.lora_rank)
    dtype = getattr(torch, settings.compute_dtype)
    rates = device_rates(device, dtype)
    torch.cuda.empty_cache()
    (low, high), measured = ratio_on(torch.cuda.get_device_name(device))
    hours, arms = {}, chosen_arms(settings)
    for arm in arms:
        seconds = least_training_seconds(
            sizes,
            rates,
            (len(task.train), len(task.validation)),
            mean,
            settings.batch_size,
            arm.config_in(settings).epochs,
            arm.needs_lm_head,
            arm.prefix == "engram",
            dtype.itemsize,
        )
        hours[arm.label] = seconds / 3600
    each = ", ".join(f"{label} {low * h:.2g} to {high * h:.2g}" for label, h in hours.items())
    total = sum(hours.values()) * len(set(settings.seeds))
    how = "as studies/gpu_check.py measured here" if measured else "assumed"
    return (
        f"time: hours a training {each}; {low * total:.2g} to {high * total:.2g} in all, from "
        "start to end (estimated: a step's operations and bytes at this card's rates, "
        f"{low:.1f} to {high:.1f} times that, {how})"
    )
