"""The backbones of the studies: small causal language models, each pretrained from its seed.

They are folders in data/lm/ that transformers loads. A pretraining that is stopped goes on from its
checkpoint.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from collapse.data.corpus import VOCABULARY, tokens_of
from collapse.models.ngram import KneserNeyBigram
from collapse.models.weights import read_causal_lm
from collapse.runs.engine import run_all
from collapse.runs.progress import Job, Progress
from collapse.training.pretraining import Recipe, check_recipe, pretrain, step_cost, validation_loss
from collapse.utils.device import set_threads
from collapse.utils.files import ROOT, write_json
from collapse.utils.provenance import git_commit

LANGUAGE_MODELS = ROOT / "data" / "lm"
CorpusName = Literal["newsgroups", "miniature"]


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
    recipes: Sequence[Recipe], corpus: CorpusName, models_dir: Path = LANGUAGE_MODELS
) -> Callable[[Job, Progress], None]:
    """A function for run_all: pretrains, evaluates, writes metrics.json.

    `ahead_of_bigram` there (nats) is positive if the model beats a bigram.
    """
    by_name = {folder_name(recipe, corpus): recipe for recipe in recipes}

    def train(job: Job, progress: Progress) -> None:
        set_threads(1)  # sums of more threads differ in their last digits
        recipe = by_name[job.name]
        tokenizer, blocks, validation = tokens_of(corpus, models_dir)
        record = pretrain(recipe, blocks, VOCABULARY, tokenizer, job.folder, progress)
        loss = validation_loss(load(job.folder), validation)
        bigram = KneserNeyBigram(blocks, VOCABULARY).loss(validation)
        copied = ("width", "layers", "epochs", "seed", "weight_decay", "learning_rate")
        row = {"name": job.name} | {name: getattr(recipe, name) for name in copied}
        row |= {name: record[name] for name in ("tokens_seen", "train_loss")}
        row |= {"validation_loss": loss, "bigram_loss": bigram, "ahead_of_bigram": bigram - loss}
        row |= {"seconds": round(record["seconds"], 1)}
        row |= {"weights_sha256": record["weights_sha256"], "git_commit": git_commit()}
        progress.evaluation()
        write_json(job.folder / "metrics.json", row)
        progress.say(
            f"{job.name}: {row['validation_loss']:.3f} nats, bigram {row['bigram_loss']:.3f}",
            time_left=True,
        )

    return train


def load(folder: Path) -> torch.nn.Module:
    """The causal LM of a folder, in float32."""
    return read_causal_lm(folder, dtype=torch.float32)
