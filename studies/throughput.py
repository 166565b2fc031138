"""How fast does Experiment 1 train, against the conventional recipe on the same model and the same rows?

The conventional recipe pads every row to the maximum length, draws batches at random and computes LM logits at
every position, pads included. Ours pads to the batch's longest row, groups rows of like length and computes
logits only where there is a target. Both run in this process, a few steps of one, then of the other.
Writes throughput.json into the experiment's results folder.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import experiment


@dataclasses.dataclass
class Config:
    """Settings of the measurement; the comment above a field is its --help text."""

    # Folder with the data in its official layout. Default: as for experiment.py.
    data_dir: Path | None = None
    # Folder for throughput.json. Default: the one of experiment.py for the same data.
    output_dir: Path | None = None
    # Models to time.
    models: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    # Timed rounds: in each, both recipes run in turn.
    rounds: int = 7
    # Optimizer steps of one recipe in a round.
    steps: int = 20


class Conventional:
    """Mixed into a trainer: pads to the maximum length and makes logits at every position, pads included."""

    def collate(self, rows: np.ndarray) -> common.Batch:
        batch = super().collate(rows)
        missing = self.config.max_length - batch.input_ids.shape[1]
        ids, mask = F.pad(batch.input_ids, (0, missing)), F.pad(batch.text_mask, (0, missing))
        return dataclasses.replace(batch, input_ids=ids, text_mask=mask)

    def lm_loss_sum(self, hidden: Tensor, batch: common.Batch) -> Tensor:
        targets = batch.input_ids.masked_fill(~batch.text_mask, -100)[:, 1:]  # (B, L - 1)
        logits = self.model.lm_head(hidden)[:, :-1]  # (B, L - 1, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


class ConventionalTrainer(Conventional, common.Trainer):
    pass


class ConventionalPairTrainer(Conventional, common.SequentialPairTrainer):
    pass


def trainer_class(number: int, recipe: str) -> type[common.Trainer]:
    if recipe == "conventional":
        return ConventionalPairTrainer if number == 3 else ConventionalTrainer
    return common.SequentialPairTrainer if number == 3 else common.Trainer


def measure(number: int, split: common.Split, settings: experiment.Config, config: Config) -> dict:
    """Examples per second of both recipes: medians over rounds, and the ratio's over pairs of rounds."""
    trainers, batches = {}, {}
    rng = np.random.default_rng(0)
    shuffled, needed = rng.permutation(len(split.labels)), (config.rounds + 1) * config.steps
    for recipe in ("conventional", "ours"):
        torch.manual_seed(0)
        model = experiment.build_model(number, 2, settings)
        trainers[recipe] = trainer_class(number, recipe)(model.train(), split, settings)
    size = settings.batch_size
    batches["conventional"] = [shuffled[i * size : (i + 1) * size] for i in range(needed)]
    batches["ours"] = common.length_grouped_batches(split.lengths, size, rng)[:needed]
    rates: dict[str, list[float]] = {"conventional": [], "ours": []}
    for round_number in tqdm(range(config.rounds + 1), f"model {number}", disable=None):
        for recipe, trainer in trainers.items():
            rows = batches[recipe][round_number * config.steps : (round_number + 1) * config.steps]
            started = time.perf_counter()
            for batch in rows:
                trainer.step(batch, settings.learning_rate)
            seconds = time.perf_counter() - started
            if round_number:  # the first round warms up
                rates[recipe].append(sum(map(len, rows)) / seconds)
    ratios = np.array(rates["ours"]) / np.array(rates["conventional"])
    return {
        "examples_per_second": {recipe: float(np.median(values)) for recipe, values in rates.items()},
        "ratio": float(np.median(ratios)),
        "lowest_ratio": float(ratios.min()),
        "highest_ratio": float(ratios.max()),
        "epoch_seconds": {recipe: len(split.labels) / float(np.median(values)) for recipe, values in rates.items()},
    }


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    settings = experiment.Config(data_dir=config.data_dir)
    task = experiment.load_task(settings)
    vocabulary = experiment.WordVocabulary(task.train.texts, settings.vocabulary_size)
    split = common.encode_rows(task.train, vocabulary.encode, settings.max_length)
    for name in ("rounds", "steps"):
        common.check_bounds(name, getattr(config, name), 1, math.inf)
    if (config.rounds + 1) * config.steps * settings.batch_size > len(task.train):
        raise common.UserError("--rounds times --steps needs more rows than the training split has: lower one of them.")
    tokens = float(split.lengths.mean())
    print(f"{task.title()}, {tokens:.1f} tokens a row, padded to {settings.max_length} by the conventional recipe")
    print(f"{'examples per second':22}{'conventional':>14}{'ours':>10}{'ratio [lowest, highest round]':>34}")
    results = {"data": task.summary(), "tokens_per_row": tokens, **common.environment(torch.device("cpu"))}
    results["settings"] = {"rounds": config.rounds, "steps": config.steps, "batch_size": settings.batch_size}
    for number in config.models:
        found = results[f"model{number}"] = measure(number, split, settings, config)
        rates = found["examples_per_second"]
        spread = f"{found['ratio']:.1f} [{found['lowest_ratio']:.1f}, {found['highest_ratio']:.1f}]"
        print(f"{common.MODEL_NAMES[number]:22}{rates['conventional']:14,.0f}{rates['ours']:10,.0f}{spread:>34}", flush=True)
    folder = config.output_dir or common.ROOT / "results" / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    common.write_json(folder / "throughput.json", results)


if __name__ == "__main__":
    common.run_script(main)
