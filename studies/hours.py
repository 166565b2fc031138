"""How many hours do the 7B experiments take at least, on GPUs that nobody has measured?

Computes a lower bound of training time (collapse/models/costs.py) from vendors' figures for some
GPUs, and an upper bound of the examples per second of two other recipes (studies/yardsticks.py).
Nothing is timed, and of a model only the tokenizer is needed. Writes throughput_on_paper.json into
results_7b and results_agnews; tables show the lower bound times the factor that costs.py assumes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
import tyro

from collapse.config import DEFAULT_MODEL
from collapse.data.batches import encode_rows, length_grouped_batches
from collapse.models import costs
from collapse.models.costs import Sizes, least_seconds, least_training_seconds
from collapse.models.pretrained import load_tokenizer
from collapse.report.reference import REFERENCE
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT, write_json
from collapse.utils.provenance import environment
from studies.random_checkpoint import QWEN
from studies.throughput import STUDIES
from studies.yardsticks import RECIPES

# Vendors' figures: memory bandwidth, and dense bfloat16 products with fp32 sums.
CARDS = {
    "RTX 4060 Ti": {"bytes": 288e9, "operations": 44.1e12},
    "RTX 3090": {"bytes": 936e9, "operations": 71e12},
    "RTX 4080": {"bytes": 717e9, "operations": 97.5e12},
}


@dataclass
class Config:
    """Settings of the estimate; the comment above a field is its --help text."""

    # Folder with the data in its official layout. Default: as for the experiments.
    data_dir: Path | None = None
    # Tokenizer that gives true token lengths: a hub name, a folder or smollm2-135m.
    tokenizer: str = DEFAULT_MODEL
    # Folder for results_7b and results_agnews. Default: the repository.
    output_dir: Path = ROOT


def most_examples_per_second(
    recipe: str, number: int, sizes: Sizes, settings, mean: float, grouped: float
) -> float:
    """Upper bound on an RTX 4080. mean, grouped: tokens of a row, of a batch's longest row."""
    tokens = settings.max_length if recipe == "conventional" else grouped
    predicted = (mean if recipe == "ours" else tokens) - 1
    pieces = (2 if number == 3 else 1) * (2 if recipe == "conventional" else 1)
    # gradient checkpointing runs the forward pass twice
    other = {"products": 3, "elementwise": costs.ELEMENTWISE_BYTES_OF_PEFT}
    seconds = least_seconds(
        sizes,
        CARDS["RTX 4080"],
        settings.batch_size * (tokens + (number == 3)),
        settings.batch_size * predicted * (number > 1),
        pieces,
        **({} if recipe == "ours" else other),
    )
    return settings.batch_size / seconds


def estimate_hours(config: Config) -> None:
    """Write throughput_on_paper.json of each results folder."""
    encode = load_tokenizer(config.tokenizer)
    made_with = {key: environment(torch.device("cpu"))[key] for key in ("versions", "git_commit")}
    for script, load, _, folder in STUDIES:
        task, settings = load(config.data_dir), script.Config()
        if task is None:
            raise UserError("the data is neither in the Hugging Face cache nor on the hub.")
        lengths = encode_rows(task.train, encode, settings.max_length).lengths
        batches = length_grouped_batches(lengths, settings.batch_size, np.random.default_rng(0))
        mean = float(lengths.mean())
        grouped = float(np.mean([lengths[rows].max() for rows in batches]))
        sizes = Sizes.of(transformers.Qwen2Config(**QWEN), settings.lora_rank)
        rows = REFERENCE[folder]["train_rows"], len(task.validation)
        estimate = {"data": task.summary(), "tokens_per_row": mean, "cards": CARDS, **made_with}
        estimate["assumed_ratio"] = costs.ASSUMED_RATIO
        for number in (1, 2, 3):
            shape = sizes, settings, mean, grouped
            rates = {r: most_examples_per_second(r, number, *shape) for r in RECIPES}
            how = rows, mean, settings.batch_size, settings.epochs, number > 1, number == 3
            seconds = {k: least_training_seconds(sizes, rates, *how) for k, rates in CARDS.items()}
            hours = {card: s / 3600 for card, s in seconds.items()}
            estimate[f"model{number}"] = {"examples_per_second": rates, "least_hours": hours}
            each = ", ".join(f"{card} {least:.2f}" for card, least in hours.items())
            print(f"{task.name}, model {number}: hours at the least: {each}", flush=True)
        target = config.output_dir / folder
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "throughput_on_paper.json", estimate)


def main() -> None:
    estimate_hours(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    run_script(main)
