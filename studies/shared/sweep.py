"""What a study is: trials, each trained and measured once, their rows on disk, and what these say.

Studies fine-tune own language models. A backbone is the unit that repeats: all its trials run,
their rows are in a table of its own, then comes the next. So a study that is stopped has whole
backbones, and goes on by what its tables lack.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

import common
from collapse.config import check_bounds
from collapse.measures.statistics import t_interval
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

PLANNED = 20  # backbones of an endpoint, by their seeds from 0 on; pilots count for nothing
ENDPOINTS = 5  # of the protocol's first part
LATER_ENDPOINTS = 3  # of its second, a family of its own
PILOTS = (100, 101, 102)


@dataclass
class Config:
    """Settings of a study; the comment above a field is its --help text."""

    # A study's own setting: what is trained instead, seeds are then no backbones.
    model: ClassVar[str | None] = None
    # Folder with the data sets in their official layouts. Default: the Hugging Face hub.
    data_dir: Path | None = command_line.grouped(None, "data")
    # Text of the own language models: tinystories from the hub, or newsgroups, of `make corpus`.
    corpus: pretrain.CorpusName = command_line.grouped("tinystories", "data")
    # Own language models, by their seeds.
    seeds: tuple[int, ...] = tuple(range(PLANNED))
    # Trainings side by side, each in a process of its own with one thread.
    workers: int = command_line.grouped(1, "execution")
    # Where trainings compute: auto takes a GPU where there is one. Own models are pretrained on
    # the CPU in any case.
    device: Literal["auto", "cpu", "cuda"] = command_line.grouped("auto", "execution")
    # The whole study in small, on made-up text, in a folder that git ignores.
    miniature: bool = command_line.grouped(False, "execution")
    # Only results.json and the figures, from the rows that are there.
    summarize: bool = command_line.grouped(False, "execution")
    # Folder for own language models.
    models_dir: Path = command_line.grouped(pretrain.LANGUAGE_MODELS, "execution")
    # Folder for results, in it one for each corpus.
    output_dir: Path = command_line.grouped(ROOT / "studies" / "results", "execution")

    @property
    def folder(self) -> Path:
        """Of the tables, results.json and figures."""
        return self.output_dir / self.corpus


class Trial(Protocol):
    """One training of a study: a frozen dataclass, whose fields are columns of the tables."""

    seed: int  # of its backbone, heads, and order of rows
    arm: str  # its name in results

    @property
    def name(self) -> str: ...  # unique among its seed's


Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study as functions; `config` stands for its settings, an instance of config_type."""

    config_type: type[Config]
    # Settings of the whole study in small, see --miniature.
    miniature: Mapping[str, Any]
    # trials(config): in batches, where a later batch may rest on the rows of the ones before.
    trials: Callable[[Any], Iterable[Sequence[Any]]]
    # settings(config, fields of a trial): what its rows are made with, in the table behind them.
    # `steps`, or `epochs` of `train_rows`, say how long it trains.
    settings: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    # run(config, trial, progress): trains, and gives the rows that it measured.
    run: Callable[[Any, Any, Progress], list[Row]]
    # line(rows): what is printed of a trial that has ended.
    line: Callable[[list[Row]], str]
    # summary(config): what results.json holds.
    summary: Callable[[Any], dict[str, Any]]
    # text(results): what is printed of them.
    text: Callable[[dict[str, Any]], str]
    # draw(config, results): figures, into config.folder.
    draw: Callable[[Any, dict[str, Any]], None] = lambda config, results: None
    # check(config): raises UserError for settings that cannot be run.
    check: Callable[[Any], None] = lambda config: None
    # Of all measurements of a trial, in steps of Model 1.
    evaluation_cost: float = 100.0

    def main(self, description: str) -> None:
        """Of the script: run what is missing, unless only a summary is asked for, and report."""
        config = command_line.parse(self.config_type, description)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads do not outlive a fork
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
        """The settings of the study's miniature, in folders of its own."""
        folder = config.output_dir / "limit-miniature"
        places = {"models_dir": folder / "state" / "lm", "output_dir": folder}
        return dataclasses.replace(config, corpus="miniature", **places, **self.miniature)

    def report(self, config: Config) -> dict[str, Any]:
        """Write results.json and the figures from the rows that are there."""
        results = self.summary(config)
        write_json(config.folder / "results.json", results)
        self.draw(config, results)
        return results

    def run_missing(self, config: Config) -> None:
        """Have every trial's rows in its seed's table: backbones side by side, up to workers.

        Raises UserError for a table that was made with other settings, or other weights.
        """
        for trials in self.trials(config):
            seeds = list(dict.fromkeys(trial.seed for trial in trials))
            for seed in seeds:
                table = table_of(config.folder, seed)
                check_settings(table, lambda row: self.settings(config, row))
            together = 1 if config.model else config.workers  # seeds; one model's are whole
            for first in range(0, len(seeds), together):
                batch = seeds[first : first + together]
                title = f"seeds {', '.join(map(str, batch))} of {len(seeds)}"
                self.run_seeds(config, [t for t in trials if t.seed in batch], title)

    def run_seeds(self, config: Config, trials: Sequence[Trial], title: str) -> None:
        """Run the trials of some seeds whose rows are not there; pretrain their backbones before.

        In the table the trial and its settings go before a row, behind it what it was made with.
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


# --------------------------------------------------------------------------------------------------
# A trial's model
# --------------------------------------------------------------------------------------------------


def model_of(config: Config, seed: int) -> str:
    """As --model takes it: the given one, or the folder of an own language model."""
    if config.model:
        return config.model
    own = pretrain.fixed_size(seed, config.corpus)
    return str(config.models_dir / pretrain.folder_name(own, config.corpus))


def recipe_of(config: Config, trial: Trial, **other: Any) -> finetune.Recipe:
    """Of a training of all weights of the trial's backbone, but where `other` fields say else."""
    fields = {"model": model_of(config, trial.seed), "arm": trial.arm, "seed": trial.seed}
    fields |= {"letters": True, "all_weights": True, "device": pick_device(config.device).type}
    return finetune.Recipe(**fields | other)


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------

PROVENANCE_COLUMNS = ("git_commit", "weights_sha256", "hardware")
MODEL_COLUMNS = ("model", "weights", "quantization", "compute_dtype")  # that --model gave


def table_of(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}.csv"


def check_settings(
    table: Path, settings_of: Callable[[Mapping[str, str]], Mapping[str, Any]]
) -> None:
    """Raise UserError when a row of a table was made with other settings than settings_of(row)."""
    for row in read_rows(table):
        for name, value in rounded(settings_of(row)).items():
            made_with = row.get(name, "")
            if made_with != value if isinstance(value, str) else float(made_with) != value:
                raise UserError(
                    f"{table} was made with {name} {made_with}, not {value}: give another "
                    "--output-dir."
                )


def check_weights(table: Path, model: str) -> None:
    """Raise UserError when a table's rows were made with other weights than the model has.

    Arms are compared on one backbone, and another kind of machine pretrains another one.
    """
    weights = {row["weights_sha256"] for row in read_rows(table)}
    if weights - {finetune.digest_of_model(model) or ""}:
        raise UserError(
            f"{table} has rows of other weights than {model} has: move it away, or give another "
            "--output-dir."
        )


def published_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of all tables in a folder, seed by seed, pilots' among them."""
    tables = sorted(folder.glob("seed-*.csv"), key=lambda table: int(table.stem[5:]))
    return [row for table in tables for row in read_rows(table)]


@dataclass(frozen=True)
class Run:
    """A trial that has ended."""

    trial: Any
    path: list[dict[str, float | None]]  # its measurements, from before the first step to the last

    @property
    def end(self) -> dict[str, float | None]:
        return self.path[-1]


def read_runs(
    folder: Path, seeds: Iterable[int], trial_type: type, run_type: type[Run] = Run
) -> list[Any]:
    """Every trial in the tables of these seeds, numbers as numbers."""
    fields = {field.name: field.type for field in dataclasses.fields(trial_type)}
    words = {"training", *PROVENANCE_COLUMNS, *MODEL_COLUMNS, *fields}
    runs = []
    for seed in seeds:
        rows = read_rows(table_of(folder, seed))
        for _, group in itertools.groupby(rows, key=lambda row: row["training"]):
            of_trial = list(group)
            first = of_trial[0]
            trial = trial_type(**{name: kind(first[name]) for name, kind in fields.items()})
            path = [
                {key: float(v) if v else None for key, v in row.items() if key not in words}
                for row in of_trial
            ]
            runs.append(run_type(trial, path))
    return runs


def arms_of(runs: Iterable[Run]) -> list[str]:
    """Arms that ran, in their order."""
    return sorted({run.trial.arm for run in runs}, key=lambda name: common.find_arm(name).sort_key)


def rounded(row: Mapping[str, Any]) -> Row:
    """Six digits, more than two machines share; a table of thousands of rows stays small."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


# --------------------------------------------------------------------------------------------------
# What rows say
# --------------------------------------------------------------------------------------------------


def mean_over_sets(sides: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Seed -> mean of its values on all data sets, of seeds that have one on each."""
    seeds = sorted(set.intersection(*map(set, sides)))
    return {seed: float(np.mean([side[seed] for side in sides])) for seed in seeds}


def endpoint(
    interval: Mapping[str, Any] | None, margin: float, done: bool, family: int = ENDPOINTS
) -> dict[str, Any] | None:
    """An interval with `mean`, `se`, `df`, `n` as one of the protocol's endpoints: its verdict.

    At the level of the first of a family, the widest that Holm can ask for; done: all planned
    backbones ran. An estimate that `found` calls a `lower_bound` is judged as one, and one that is
    not `bounded` not at all. None before two are done.
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
