"""Pretrain small causal language models, each from its seed, as folders that transformers loads.

By default it makes the backbones of the other studies: width 128, 2 layers, 3 epochs, one for each
seed. Models go to data/lm/, and a row for each to studies/results/pretrain/models.csv, with its
loss on validation text and that of a Kneser-Ney bigram model on the same tokens. The same command
resumes where it was stopped.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from collapse.config import check_bounds
from collapse.data.corpus import VOCABULARY, check_no_row_inside, load_corpus, tokens_of
from collapse.data.registry import LOADERS
from collapse.models.ngram import KneserNeyBigram
from collapse.models.weights import read_causal_lm
from collapse.runs.engine import run_all
from collapse.runs.progress import Job, Progress
from collapse.training.pretraining import Recipe, check_recipe, pretrain, step_cost, validation_loss
from collapse.utils import command_line
from collapse.utils.device import set_threads
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT, write_json
from collapse.utils.provenance import git_commit
from studies.shared.tables import put_row

LANGUAGE_MODELS = ROOT / "data" / "lm"
RESULTS = ROOT / "studies" / "results" / "pretrain" / "models.csv"
# Data sets that studies use; their validation rows must not be in the pretraining text.
CHECKED = ("SST-2 by sentence", "AG News", "CLINC150", "Banking77", "20 Newsgroups")
CorpusName = Literal["tinystories", "newsgroups", "miniature"]


@dataclasses.dataclass
class Config:
    """Settings of the pretraining; the comment above a field is its --help text."""

    # Text: tinystories from the hub, or newsgroups (20 Newsgroups' train part and the Friends
    # dialogues) from `make corpus`; miniature is generated, for test runs.
    corpus: CorpusName = command_line.grouped("tinystories", "data")
    # Seeds, one for each model.
    seeds: tuple[int, ...] = command_line.grouped(tuple(range(30)), "model")
    # Width of the models.
    width: int = command_line.grouped(128, "model")
    # Layers of the models.
    layers: int = command_line.grouped(2, "model")
    # Passes over the training text.
    epochs: int = command_line.grouped(3, "optimization")
    # Decoupled weight decay; applied to matrices alone.
    weight_decay: float = command_line.grouped(0.1, "optimization")
    # Trainings to run in parallel, each in its own process with one thread.
    workers: int = command_line.grouped(1, "execution")
    # Folder for the models.
    models_dir: Path = command_line.grouped(LANGUAGE_MODELS, "execution")
    # Table with a row for each model.
    results: Path = command_line.grouped(RESULTS, "execution")
    # Only check that no validation row of a classification set is in the training text. Needs
    # --data-dir with SST-2, ag_news_csv, clinc150 and banking77.
    check: bool = command_line.grouped(False, "data")
    # Folder with the classification sets in their official layout, for --check.
    data_dir: Path | None = command_line.grouped(None, "data")


def fixed_size(seed: int, corpus: CorpusName) -> Recipe:
    """The recipe of the backbones that studies fine-tune; tiny for the corpus `miniature`."""
    size = {"width": 32, "layers": 1, "epochs": 1} if corpus == "miniature" else {}
    return Recipe(seed=seed, **size)


def backbones(
    seeds: Sequence[int], corpus: CorpusName, models_dir: Path = LANGUAGE_MODELS, workers: int = 1
) -> list[Path]:
    """Folders of the backbones with these seeds; pretrains those that do not exist.

    AutoModelForCausalLM and AutoTokenizer load them. Raises UserError where a folder has a model of
    another recipe. Weights depend on seed and corpus alone: with one thread on one kind of machine
    they are the same bit for bit.
    """
    recipes = [fixed_size(seed, corpus) for seed in seeds]
    jobs = [job_of(recipe, corpus, models_dir) for recipe in recipes]
    for job, recipe in zip(jobs, recipes, strict=True):
        if job.finished:
            check_recipe(job.folder / "recipe.json", recipe)
    run_all(jobs, trainer(recipes, corpus, models_dir), workers)
    return [job.folder for job in jobs]


def folder_name(recipe: Recipe, corpus: str) -> str:
    return f"{corpus}-{recipe.name()}"


def job_of(recipe: Recipe, corpus: CorpusName, models_dir: Path) -> Job:
    """The unit of work that run_all takes."""
    _, blocks, _ = tokens_of(corpus, models_dir)
    return Job(
        name=folder_name(recipe, corpus),
        folder=models_dir / folder_name(recipe, corpus),
        steps=recipe.steps(len(blocks)),
        cost=step_cost(recipe, VOCABULARY),
        evaluations=1,
        evaluation_cost=step_cost(recipe, VOCABULARY) * 10,
    )


def trainer(
    recipes: Sequence[Recipe],
    corpus: CorpusName,
    models_dir: Path = LANGUAGE_MODELS,
    results: Path | None = None,
):
    """A function for run_all: pretrains, evaluates, puts the row into the table, writes metrics."""
    by_name = {folder_name(recipe, corpus): recipe for recipe in recipes}

    def train(job: Job, progress: Progress) -> None:
        set_threads(1)  # sums of more threads differ in their last digits
        recipe = by_name[job.name]
        tokenizer, blocks, validation = tokens_of(corpus, models_dir)
        record = pretrain(recipe, blocks, VOCABULARY, tokenizer, job.folder, progress)
        row = model_row(job.name, recipe, record, job.folder, blocks, validation)
        progress.evaluation()
        if results:
            put_row(results, row, "name")
        write_json(job.folder / "metrics.json", row)
        progress.say(
            f"{job.name}: {row['validation_loss']:.3f} nats, bigram {row['bigram_loss']:.3f}",
            time_left=True,
        )

    return train


def model_row(
    name: str,
    recipe: Recipe,
    record: dict[str, Any],
    folder: Path,
    blocks: np.ndarray,
    validation: np.ndarray,
) -> dict[str, Any]:
    """A model's row of models.csv; `ahead_of_bigram` (nats) is positive if it beats the bigram."""
    loss = validation_loss(load(folder), validation)
    bigram = bigram_loss(blocks, validation)
    return {
        "name": name,
        "width": recipe.width,
        "layers": recipe.layers,
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "weight_decay": recipe.weight_decay,
        "learning_rate": recipe.learning_rate,
        "tokens_seen": record["tokens_seen"],
        "train_loss": record["train_loss"],
        "validation_loss": loss,
        "bigram_loss": bigram,
        "ahead_of_bigram": bigram - loss,
        "seconds": round(record["seconds"], 1),
        "weights_sha256": record["weights_sha256"],
        "git_commit": git_commit(),
    }


def bigram_loss(blocks: np.ndarray, validation: np.ndarray) -> float:
    return KneserNeyBigram(blocks, VOCABULARY).loss(validation)


def load(folder: Path) -> torch.nn.Module:
    """The causal LM of a folder, in float32."""
    return read_causal_lm(folder, dtype=torch.float32)


def check_rows(corpus: CorpusName, data_dir: Path | None) -> int:
    """Number of validation rows that were checked against the training text.

    Raises UserError when one of them is in it, in the sense of collapse.data.corpus.rows_inside.
    """
    if data_dir is None:
        raise UserError("--check needs --data-dir with the classification sets.")
    rows: dict[str, Sequence[str]] = {}
    for name in CHECKED:
        task = LOADERS[name](data_dir)
        rows[f"{task.name}, validation"] = task.validation.texts
    check_no_row_inside(rows, load_corpus(corpus))
    return sum(map(len, rows.values()))


def check_config(config: Config) -> None:
    """Raise UserError for settings that cannot be run."""
    check_bounds("width", config.width, 32, 1024)
    check_bounds("layers", config.layers, 1, 64)
    check_bounds("epochs", config.epochs, 1, 1000)
    check_bounds("weight_decay", config.weight_decay, 0, 1e3)
    check_bounds("workers", config.workers, 1, 1024)
    if config.width % 32:
        raise UserError(f"--width is {config.width}: it must be a multiple of 32, a head's size.")
    if not config.seeds:
        raise UserError("--seeds is empty: name at least one, as in --seeds 0.")


def main() -> None:
    config = command_line.parse(Config, __doc__)
    # Worker processes inherit it: threads of the tokenizer do not outlive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if config.check:
        number = check_rows(config.corpus, config.data_dir)
        print(f"none of {number:,} validation rows is in the training text of {config.corpus}")
        return
    check_config(config)
    names = ("width", "layers", "epochs", "weight_decay")
    recipe = Recipe(**{name: getattr(config, name) for name in names})
    recipes = [dataclasses.replace(recipe, seed=seed) for seed in config.seeds]
    run_all(
        [job_of(recipe, config.corpus, config.models_dir) for recipe in recipes],
        trainer(recipes, config.corpus, config.models_dir, config.results),
        config.workers,
    )


if __name__ == "__main__":
    run_script(main)
