"""A study: trials that are trained and measured once, their tables on disk, summary and figures.

Studies fine-tune our own small language models. The unit of repetition is a backbone, that is, one
pretrained model: all its trials run and fill a table of its own before the next backbone begins. So
a study that is stopped has complete backbones, and resumes with the rows that its tables lack.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

import common
from collapse.config import check_bounds
from collapse.measures.statistics import differences_interval, t_interval
from collapse.measures.verdicts import verdict
from collapse.runs.engine import run_all
from collapse.runs.progress import Job, Progress
from collapse.utils import command_line
from collapse.utils.device import pick_device, set_allocator, set_threads
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT, write_json
from collapse.utils.provenance import git_commit, hardware_name
from studies.shared import finetune, pretrain
from studies.shared.tables import into_table, read_rows, reset_missing_jobs

PLANNED = 20  # backbones of an endpoint, with seeds from 0 on; pilots do not count
ENDPOINTS = 5  # in the protocol's first part, a family of tests
LATER_ENDPOINTS = 3  # in its second part, another family of tests
PILOTS = (100, 101, 102)  # seeds of the backbones that learning rates are chosen on


@dataclass
class Config:
    """Settings of a study; the comment above a field is its --help text."""

    # A model to fine-tune instead of backbones, if a study has such a setting.
    model: ClassVar[str | None] = None
    # Folder with the data sets in their official layouts. Default: the Hugging Face hub.
    data_dir: Path | None = command_line.grouped(None, "data")
    # Text that backbones are pretrained on; `make corpus` fetches that of newsgroups.
    corpus: pretrain.CorpusName = command_line.grouped("newsgroups", "data")
    # Seeds of the backbones, our own small language models.
    seeds: tuple[int, ...] = tuple(range(PLANNED))
    # Trainings to run in parallel, each in its own process with one thread.
    workers: int = command_line.grouped(1, "execution")
    # Where to fine-tune; auto takes a GPU when there is one. Backbones are always pretrained on the
    # CPU.
    device: Literal["auto", "cpu", "cuda"] = command_line.grouped("auto", "execution")
    # Run the whole study in small, on generated text, in a folder that git ignores.
    miniature: bool = command_line.grouped(False, "execution")
    # Only write results.json and the figures, from existing tables.
    summarize: bool = command_line.grouped(False, "execution")
    # Folder for the backbones.
    models_dir: Path = command_line.grouped(pretrain.LANGUAGE_MODELS, "execution")
    # Folder for results, with a subfolder for each corpus.
    output_dir: Path = command_line.grouped(ROOT / "studies" / "results", "execution")

    @property
    def folder(self) -> Path:
        """Folder of the tables, results.json and figures."""
        return self.output_dir / self.corpus


class Trial(Protocol):
    """One training of a study: a frozen dataclass, whose fields are columns of the tables."""

    seed: int  # of its backbone, heads, and order of rows
    arm: str  # its name in results

    @property
    def name(self) -> str: ...  # unique among the trials of its seed


@dataclass(frozen=True)
class RateTrial:
    """A trial of an arm on a data set at a learning rate."""

    seed: int
    dataset: str
    arm: str  # its name in results
    rate: float  # base-10 logarithm

    @property
    def name(self) -> str:
        return f"{self.dataset}, {self.arm}, 1e{self.rate:g}"


Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study as a set of functions; `config` is an instance of config_type."""

    description: str  # for --help
    config_type: type[Config]
    # Settings that differ with --miniature.
    miniature: Mapping[str, Any]
    # trials(config): in batches; a later batch may depend on rows of earlier ones.
    trials: Callable[[Any], Iterable[Sequence[Any]]]
    # settings(config, fields of a trial): settings of its training, stored in its rows. `steps`,
    # or `epochs` and `train_rows`, say how long it trains.
    settings: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    # run(config, trial, progress): trains, and returns rows of measurements.
    run: Callable[[Any, Any, Progress], list[Row]]
    # line(rows): the text to print when a trial has ended.
    line: Callable[[list[Row]], str]
    # summary(config): the content of results.json.
    summary: Callable[[Any], dict[str, Any]]
    # text(results): the text to print about them.
    text: Callable[[dict[str, Any]], str]
    # draw(config, results): writes figures into config.folder.
    draw: Callable[[Any, dict[str, Any]], None] = lambda config, results: None
    # check(config): raises UserError for settings that cannot be run.
    check: Callable[[Any], None] = lambda config: None
    # Cost of all measurements of a trial, in training steps of Model 1.
    evaluation_cost: float = 100.0

    def main(self) -> None:
        """Main function of the script: run missing trials, unless --summarize, and report."""
        config = command_line.parse(self.config_type, self.description)
        set_allocator()
        self.check_config(config)
        if config.miniature:
            config = self.miniature_config(config)
        config.folder.mkdir(parents=True, exist_ok=True)
        if not config.summarize:
            self.run_missing(config)
        print(self.text(self.report(config)))

    def check_config(self, config: Config) -> None:
        """Raise UserError for settings that cannot be run."""
        check_bounds("workers", config.workers, 1, 1024)
        if not config.seeds:
            raise UserError("--seeds is empty: name at least one, as in --seeds 0.")
        self.check(config)

    def miniature_config(self, config: Any) -> Any:
        """The settings for --miniature, with separate folders."""
        folder = config.output_dir / "limit-miniature"
        places = {"models_dir": folder / "state" / "lm", "output_dir": folder}
        return dataclasses.replace(config, corpus="miniature", **places, **self.miniature)

    def report(self, config: Config) -> dict[str, Any]:
        """Write results.json and the figures from existing tables."""
        results = to_nine_digits(self.summary(config))
        write_json(config.folder / "results.json", results)
        self.draw(config, results)
        return results

    def run_missing(self, config: Config) -> None:
        """Run every trial whose rows are missing, with as many backbones at once as workers.

        Raises UserError for a table that was made with other settings or other weights.
        """
        for trials in self.trials(config):
            seeds = list(dict.fromkeys(trial.seed for trial in trials))
            for seed in seeds:
                table = table_of(config.folder, seed)
                check_settings(table, lambda row: self.settings(config, row))
            # Of a given model each seed is completed before the next begins.
            batch_size = 1 if config.model else config.workers
            for first in range(0, len(seeds), batch_size):
                batch = seeds[first : first + batch_size]
                title = f"seeds {', '.join(map(str, batch))} of {len(seeds)}"
                self.run_seeds(config, [t for t in trials if t.seed in batch], title)

    def run_seeds(self, config: Config, trials: Sequence[Trial], title: str) -> None:
        """Pretrain the backbones of these trials, and run the trials whose rows are missing.

        A row of the table has the trial and its settings, the measurements, and its provenance.
        """
        commit = git_commit()
        by_job = {self.job(config, trial): trial for trial in trials}

        def table_and_key(job: Job) -> tuple[Path, str]:
            return table_of(config.folder, by_job[job].seed), by_job[job].name

        def rows_of(job: Job, progress: Progress) -> list[Row]:
            set_threads(1)  # sums of more threads differ in their last digits
            trial = by_job[job]
            fields = dataclasses.asdict(trial)
            head = {"training": trial.name} | fields | rounded(self.settings(config, fields))
            digest = finetune.digest_of_model(model_of(config, trial.seed))
            made_with = commit, digest, hardware_name(pick_device(config.device))
            tail = dict(zip(PROVENANCE_COLUMNS, made_with, strict=True))
            rows = self.run(config, trial, progress)
            progress.say(f"{job.name}: {self.line(rows)}", time_left=True)
            return [head | rounded(row) | tail for row in rows]

        missing = reset_missing_jobs(by_job, table_and_key, "training")
        if not missing:
            return
        print(title, flush=True)
        seeds = list(dict.fromkeys(trial.seed for trial in trials))
        if not config.model:
            pretrain.backbones(seeds, config.corpus, config.models_dir, config.workers)
        for seed in seeds:
            check_weights(table_of(config.folder, seed), model_of(config, seed))
        run_all(missing, into_table(rows_of, table_and_key, "training"), config.workers)

    def job(self, config: Config, trial: Trial) -> Job:
        """The unit of work that run_all takes."""
        arm = common.find_arm(trial.arm)
        made_with = self.settings(config, dataclasses.asdict(trial))
        if "steps" in made_with:
            steps = made_with["steps"]
        else:
            an_epoch = math.ceil(made_with["train_rows"] / finetune.Recipe.batch_size)
            steps = arm.epochs_of(made_with["epochs"]) * an_epoch
        return Job(
            name=f"seed {trial.seed}, {trial.name}",
            folder=config.folder / "state" / f"{trial.seed}-{trial.name.replace(', ', '-')}",
            cost=arm.cost,
            evaluation_cost=self.evaluation_cost,
            steps=steps,
            evaluations=1,
        )


def check_parts(config: Any) -> None:
    """Raise UserError for --parts that are none of the default's, which has all."""
    known = type(config).parts
    if unknown := set(config.parts) - set(known):
        raise UserError(f"--parts knows no {', '.join(unknown)}: it takes {' '.join(known)}.")


# --------------------------------------------------------------------------------------------------
# A trial's model
# --------------------------------------------------------------------------------------------------


def model_of(config: Config, seed: int) -> str:
    """The model to fine-tune: that of --model, or the folder of the seed's backbone."""
    if config.model:
        return config.model
    own = pretrain.fixed_size(seed, config.corpus)
    return str(config.models_dir / pretrain.folder_name(own, config.corpus))


def recipe_of(config: Config, trial: Trial, **other: Any) -> finetune.Recipe:
    """The recipe for training all weights of the trial's backbone.

    other: further fields, and any settings of LanguageModelConfig, as weight_decay=0.1. Of those
    that a command line gives, name them in Study.settings, too: it guards against mixed rows.
    """
    fields = {"model": model_of(config, trial.seed), "arm": trial.arm, "seed": trial.seed}
    fields |= {
        "corpus_text": True,
        "all_weights": True,
        "device": pick_device(config.device).type,
    }
    return finetune.Recipe.of(**fields | other)


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------

PROVENANCE_COLUMNS = ("git_commit", "weights_sha256", "hardware")


def table_of(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}.csv"


def check_settings(
    table: Path, settings_of: Callable[[Mapping[str, str]], Mapping[str, Any]]
) -> None:
    """Raise UserError if a row of a table was made with other settings than settings_of(row)."""
    for row in read_rows(table):
        for name, value in rounded(settings_of(row)).items():
            made_with = row.get(name, "")
            if made_with != value and (isinstance(value, str) or number(made_with) != value):
                raise UserError(
                    f"{table} was made with {name} {made_with}, not {value}: give another "
                    "--output-dir."
                )


def number(cell: str) -> float | str | None:
    """A cell of a table: a number, text, or None where it is empty."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def check_weights(table: Path, model: str) -> None:
    """Raise UserError if a table's rows were made with other weights than the model has.

    Arms must be compared on the same backbone, and on another kind of machine pretraining with the
    same seed gives other weights.
    """
    weights = {row["weights_sha256"] for row in read_rows(table)}
    if weights - {finetune.digest_of_model(model)}:
        raise UserError(
            f"{table} has rows of other weights than {model} has: move it away, or give another "
            "--output-dir."
        )


def published_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of all tables in a folder, seed by seed, including pilots."""
    tables = sorted(folder.glob("seed-*.csv"), key=lambda table: int(table.stem[5:]))
    return [row for table in tables for row in read_rows(table)]


@dataclass(frozen=True)
class Run:
    """A trial that has ended."""

    trial: Any
    path: list[Row]  # measurements in order, the first before any step; numbers, or settings' words

    @property
    def end(self) -> dict[str, float | None]:
        return self.path[-1]


def read_runs(
    folder: Path, seeds: Iterable[int], trial_type: type, run_type: type[Run] = Run
) -> list[Any]:
    """Every trial in the tables of these seeds, with measurements as numbers."""
    fields = {field.name: field.type for field in dataclasses.fields(trial_type)}
    words = {"training", *PROVENANCE_COLUMNS, *fields}
    runs = []
    for seed in seeds:
        rows = read_rows(table_of(folder, seed))
        for _, group in itertools.groupby(rows, key=lambda row: row["training"]):
            of_trial = list(group)
            first = of_trial[0]
            trial = trial_type(**{name: kind(first[name]) for name, kind in fields.items()})
            path = [
                {key: number(cell) for key, cell in row.items() if key not in words}
                for row in of_trial
            ]
            runs.append(run_type(trial, path))
    return runs


def arms_of(runs: Iterable[Run]) -> list[str]:
    """Names of the arms that ran, in the order of ARMS."""
    return sorted({run.trial.arm for run in runs}, key=lambda name: common.find_arm(name).sort_key)


def rounded(row: Mapping[str, Any]) -> Row:
    """Floats rounded to six digits: two machines agree in fewer, and tables stay small."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


def to_nine_digits(value: Any) -> Any:
    """A summary with its floats rounded: two machines differ in later digits of the same rows."""
    if isinstance(value, dict):
        return {key: to_nine_digits(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_nine_digits(part) for part in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


# --------------------------------------------------------------------------------------------------
# What rows say
# --------------------------------------------------------------------------------------------------


def mean_over_sets(sides: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Seed -> mean over data sets, for seeds that have a value on each."""
    seeds = sorted(set.intersection(*map(set, sides)))
    return {seed: float(np.mean([side[seed] for side in sides])) for seed in seeds}


def intervals_over_sets(by_set: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, Any]]:
    """Data set, or `mean` of all -> interval; by_set: data set -> seed -> difference."""
    intervals = {dataset: differences_interval(by_seed) for dataset, by_seed in by_set.items()}
    return intervals | {"mean": differences_interval(mean_over_sets(list(by_set.values())))}


def endpoint(
    interval: Mapping[str, Any] | None, margin: float, done: bool, family: int = ENDPOINTS
) -> dict[str, Any] | None:
    """An interval with `mean`, `se`, `df` and `n`, with the verdict of the protocol's endpoint.

    The verdict uses the widest level that Holm's method can ask for in a family of that size.
    done: all planned backbones ran. An interval marked `lower_bound` is judged as a lower bound,
    and one that is not `bounded` gets no verdict. None with fewer than two backbones.
    """
    if not interval or interval["n"] < 2:
        return None
    estimate, se, df = (interval[name] for name in ("mean", "se", "df"))
    if not interval.get("bounded", True):
        df = 0.0  # no interval
    widest = t_interval(estimate, se, df, 1 - 0.05 / family)
    interval_90 = t_interval(estimate, se, df, 0.90)
    lower_bound = interval.get("lower_bound", False)
    judged = verdict(estimate, widest, interval_90, margin, done, lower_bound)
    return {**interval, "holm_at_most": widest, "interval_90": interval_90, **judged, "done": done}
