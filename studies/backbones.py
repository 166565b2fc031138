"""Does pretraining help the backbones? Compares them with the same networks from random weights.

Fine-tunes both as the other studies do, on AG News (4,000 rows) and CLINC150, at two learning
rates; each start is judged at its better rate. Writes a row of finetuned.csv when a training ends,
then finetuned.json: the difference in accuracy with its interval over backbones. The same command
resumes where it was stopped.
"""

import dataclasses
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from collapse.config import check_bounds
from collapse.data.corpus import VOCABULARY
from collapse.measures.statistics import format_interval, paired_difference
from collapse.runs.engine import run_all
from collapse.runs.progress import Job, Progress
from collapse.training import pretraining
from collapse.utils.device import set_threads
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT, write_json
from collapse.utils.provenance import git_commit
from studies.shared import finetune, pretrain
from studies.shared.tables import into_table, read_rows, reset_missing_jobs

# Data set -> training rows, steps of 16 rows.
DATASETS = {"AG News": (4000, 500), "CLINC150": (15_000, 1000), finetune.TOY: (64, 10)}
STARTS = ("pretrained", "random")


@dataclasses.dataclass
class Config:
    """Settings of the comparison; the comment above a field is its --help text."""

    # Folder with ag_news_csv and clinc150. Default: the Hugging Face hub or its cache.
    data_dir: Path | None = None
    # Text that backbones are pretrained on; `make corpus` fetches that of newsgroups.
    corpus: pretrain.CorpusName = "newsgroups"
    # Seeds of the backbones.
    seeds: tuple[int, ...] = tuple(range(5))
    # Data sets.
    datasets: tuple[str, ...] = ("AG News", "CLINC150")
    # Learning rates.
    rates: tuple[float, ...] = (1e-3, 3e-3)
    # Trainings to run in parallel, each in its own process with one thread.
    workers: int = 1
    # Folder for backbones.
    models_dir: Path = pretrain.LANGUAGE_MODELS
    # Folder for results.
    output_dir: Path = ROOT / "studies" / "results" / "pretrain"

    @property
    def table(self) -> Path:
        return self.output_dir / "finetuned.csv"


@dataclass(frozen=True)
class Trial:
    """One training of the comparison."""

    seed: int
    start: str  # one of STARTS
    dataset: str
    rate: float

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.start}, {self.dataset}, {self.rate:g}"


def run_missing(config: Config) -> None:
    """Run every trial that has no row in the table, and pretrain the backbones for it."""
    product = itertools.product(config.seeds, STARTS, config.datasets, config.rates)
    trials = {trial.name: trial for trial in itertools.starmap(Trial, product)}
    commit = git_commit()

    def table_and_key(job: Job) -> tuple[Path, str]:
        return config.table, job.name

    missing = reset_missing_jobs(
        (job_of(config, trial) for trial in trials.values()), table_and_key, "name"
    )
    seeds = list(dict.fromkeys(trials[job.name].seed for job in missing))
    folders = pretrain.backbones(seeds, config.corpus, config.models_dir, config.workers)
    backbones = dict(zip(seeds, folders, strict=True))

    def rows_of(job: Job, progress: Progress) -> list[dict[str, Any]]:
        set_threads(1)  # sums of more threads differ in their last digits
        trial = trials[job.name]
        row = run_trial(config, trial, backbones[trial.seed], progress) | {"git_commit": commit}
        progress.say(f"{trial.name}: {row['accuracy']:.1%}", time_left=True)
        return [row]

    run_all(missing, into_table(rows_of, table_and_key, "name"), config.workers)


def job_of(config: Config, trial: Trial) -> Job:
    return Job(
        name=trial.name,
        folder=config.output_dir / "state" / trial.name.replace(", ", "-"),
        steps=DATASETS[trial.dataset][1],
        evaluations=1,
        evaluation_cost=30.0,
    )


def run_trial(config: Config, trial: Trial, backbone: Path, progress: Progress) -> dict[str, Any]:
    rows, steps = DATASETS[trial.dataset]
    model = backbone if trial.start == "pretrained" else random_weights(trial, backbone)
    recipe = finetune.Recipe(
        model=str(model),
        dataset=trial.dataset,
        arm="1",
        learning_rate=trial.rate,
        seed=trial.seed,
        steps=steps,
        train_rows=rows,
        corpus_text=True,
        all_weights=True,
        max_length=32,
    )
    data = finetune.load_data(recipe, config.data_dir)
    last = finetune.watch(recipe, data, (), progress.step)[-1]
    return {
        "name": trial.name,
        **dataclasses.asdict(trial),
        "steps": steps,
        "train_rows": rows,
        "accuracy": last["validation_accuracy"],
        "train_accuracy": last["accuracy"],
    }


def random_weights(trial: Trial, backbone: Path) -> Path:
    """Folder of the backbone's network before its pretraining, made once."""
    folder = backbone.with_name(f"{backbone.name}-random")
    if not (folder / "model.safetensors").exists():
        seed, corpus = trial.seed, backbone.name.partition("-")[0]
        pretraining.build(pretrain.fixed_size(seed, corpus), VOCABULARY).save_pretrained(folder)
        for file in backbone.glob("token*.json"):
            shutil.copy(file, folder)
    return folder


def mean(by_seed: dict[str, float]) -> float:
    return float(np.mean(list(by_seed.values())))


def summary(rows: list[dict[str, str]]) -> dict[str, Any]:
    """data set -> accuracy of each start at its better rate, and their difference over seeds."""
    result: dict[str, Any] = {}
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        accuracies: dict[str, dict[str, dict[str, float]]] = {start: {} for start in STARTS}
        for row in rows:
            if row["dataset"] == dataset:
                by_seed = accuracies[row["start"]].setdefault(row["rate"], {})
                by_seed[row["seed"]] = float(row["accuracy"])
        best = {start: max(by_rate.values(), key=mean) for start, by_rate in accuracies.items()}
        difference = paired_difference(best["random"], best["pretrained"])
        accuracy = {start: mean(by_seed) for start, by_seed in best.items()}
        result[dataset] = {"accuracy": accuracy, "pretrained - random": difference}
    return result


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    check_bounds("workers", config.workers, 1, 1024)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    run_missing(config)
    results = summary(read_rows(config.table))
    write_json(config.output_dir / "finetuned.json", results)
    for dataset, comparison in results.items():
        difference = format_interval(comparison["pretrained - random"], 1, 100, "+")
        print(f"{dataset}: pretrained less random {difference} points")


if __name__ == "__main__":
    run_script(main)
