"""What studies share that take own language models, one after another, and train each many times.

A backbone is the unit that repeats: all its trainings run, their rows are in a table of its own,
then comes the next. So a study that is stopped has whole backbones, and goes on by what its tables
lack.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

import common
from collapse.config import check_bounds
from collapse.measures.statistics import t_interval
from collapse.measures.verdicts import verdict
from collapse.runs.engine import run_all
from collapse.runs.progress import Job, Progress
from collapse.utils.device import pick_device, set_allocator, set_threads
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT
from collapse.utils.provenance import git_commit, hardware_name
from studies.shared import finetune, pretrain
from studies.shared.tables import into_table, read_rows, without_rows

PLANNED = 20  # backbones of an endpoint, by their seeds from 0 on; pilots count for nothing
ENDPOINTS = 5  # of the protocol's first part
LATER_ENDPOINTS = 3  # of its second, a family of its own
PILOTS = (100, 101, 102)


@dataclass
class Config:
    """Settings of such a study; the comment above a field is its --help text."""

    # Folder with the data sets in their official layouts. Default: the Hugging Face hub.
    data_dir: Path | None = None
    # Text of the own language models: tinystories from the hub, or newsgroups, of `make corpus`.
    corpus: pretrain.CorpusName = "tinystories"
    # Own language models, by their seeds.
    seeds: tuple[int, ...] = tuple(range(PLANNED))
    # Trainings side by side, each in a process of its own with one thread.
    workers: int = 1
    # Where trainings compute: auto takes a GPU where there is one. Own models are pretrained on
    # the CPU in any case.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # The whole study in small, on made-up text, in a folder that git ignores.
    miniature: bool = False
    # Only results.json and the figures, from the rows that are there.
    summarize: bool = False
    # Folder for own language models.
    models_dir: Path = pretrain.LANGUAGE_MODELS
    # Folder for results, in it one for each corpus.
    output_dir: Path = ROOT / "studies" / "results"

    @property
    def folder(self) -> Path:
        """Of the tables, results.json and figures."""
        return self.output_dir / self.corpus


class Cell(Protocol):
    """One training of a study."""

    seed: int  # of its backbone, heads, and order of rows
    arm: str  # its name in results

    @property
    def name(self) -> str: ...  # unique among its seed's


def table_of(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}.csv"


def run_missing(
    config: Config,
    cells: Sequence[Cell],
    job_of: Callable[[Cell], Job],
    rows_of: Callable[[Cell, Progress], list[dict[str, Any]]],
    line_of: Callable[[str, list[dict[str, Any]]], str],
    settings_of: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    model: str | None = None,
) -> None:
    """Have every cell's rows in its seed's table: backbones side by side, as many as workers.

    rows_of(cell, progress) trains and gives rows; the cell and settings_of(its fields) go before
    each, behind it what it was made with. line_of(job's name, rows) is printed then. With
    `model`, as --model takes it, seeds are no backbones but trainings of that one. Raises UserError
    for a table that was made with other settings, or other weights.
    """
    commit = git_commit()
    for seed in config.seeds:
        check_settings(table_of(config.folder, seed), settings_of)
    together = 1 if model else config.workers  # seeds; those of one model are whole one by one
    for first in range(0, len(config.seeds), together):
        seeds = config.seeds[first : first + together]
        here = {job_of(cell): cell for cell in cells if cell.seed in seeds}

        def place_of(job: Job, here=here) -> tuple[Path, str]:
            return table_of(config.folder, here[job].seed), here[job].name

        def rows(job: Job, progress: Progress, here=here) -> list[dict[str, Any]]:
            set_threads(1)  # sums of more threads differ in their last digits
            cell = here[job]
            fields = dataclasses.asdict(cell)
            head = {"training": cell.name} | fields | rounded(settings_of(fields))
            digest = finetune.digest_of_model(model or backbone(config, cell.seed))
            made_with = commit, digest, hardware_name(pick_device(config.device))
            tail = dict(zip(MADE_WITH, made_with, strict=True))
            found = rows_of(cell, progress)
            progress.say(line_of(job.name, found), time_left=True)
            return [head | rounded(row) | tail for row in found]

        missing = without_rows(here, place_of, "training")
        if not missing:
            continue
        print(f"seeds {', '.join(map(str, seeds))} of {len(config.seeds)}", flush=True)
        if not model:
            pretrain.backbones(seeds, config.corpus, config.models_dir, config.workers)
        for seed in seeds:
            check_weights(table_of(config.folder, seed), model or backbone(config, seed))
        run_all(missing, into_table(rows, place_of, "training"), config.workers)


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
    theirs = {row["weights_sha256"] for row in read_rows(table)}
    if theirs - {finetune.digest_of_model(model) or ""}:
        raise UserError(
            f"{table} has rows of other weights than {model} has: move it away, or give another "
            "--output-dir."
        )


def published_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of all tables in a folder, seed by seed, pilots' among them."""
    tables = sorted(folder.glob("seed-*.csv"), key=lambda table: int(table.stem[5:]))
    return [row for table in tables for row in read_rows(table)]


MADE_WITH = ("git_commit", "weights_sha256", "hardware")
OF_A_MODEL = ("model", "weights", "quantization", "compute_dtype")  # that --model gave


def read_paths(
    table: Path, cell_type: type[Cell]
) -> Iterator[tuple[Cell, list[dict[str, float | None]]]]:
    """Each training in a table: its cell, and its measurements in order, numbers as numbers."""
    fields = {field.name: field.type for field in dataclasses.fields(cell_type)}
    for _, rows in itertools.groupby(read_rows(table), key=lambda row: row["training"]):
        rows = list(rows)
        cell = cell_type(**{name: kind(rows[0][name]) for name, kind in fields.items()})
        words = {"training", *MADE_WITH, *OF_A_MODEL, *fields}
        yield (
            cell,
            [
                {
                    key: float(value) if value else None
                    for key, value in row.items()
                    if key not in words
                }
                for row in rows
            ],
        )


def backbone(config: Config, seed: int) -> str:
    """An own language model as --model takes it: its folder."""
    own = pretrain.fixed_size(seed, config.corpus)
    return str(config.models_dir / pretrain.folder_name(own, config.corpus))


def recipe_of(config: Config, cell: Cell, **other: Any) -> finetune.Recipe:
    """Of a training of all weights of the cell's backbone, but where `other` fields say else."""
    fields = {"model": backbone(config, cell.seed), "arm": cell.arm, "seed": cell.seed}
    fields |= {"letters": True, "all_weights": True, "device": pick_device(config.device).type}
    return finetune.Recipe(**fields | other)


def job_of(config: Config, cell: Cell, steps: int, evaluation_cost: float = 100.0) -> Job:
    """The unit of work that run_all takes.

    evaluation_cost: of all measurements, in steps of Model 1.
    """
    return Job(
        name=f"seed {cell.seed}, {cell.name}",
        folder=config.folder / "state" / f"{cell.seed}-{cell.name.replace(', ', '-')}",
        steps=steps,
        cost=common.find_arm(cell.arm).cost,
        evaluations=1,
        evaluation_cost=evaluation_cost,
    )


def in_small(config: Config, **other: Any) -> Any:
    """The settings of a study's miniature; `other` fields are the study's."""
    folder = config.output_dir / "limit-miniature"
    places = {"models_dir": folder / "state" / "lm", "output_dir": folder}
    return dataclasses.replace(config, corpus="miniature", **places, **other)


def carry_out(
    config: Config, run_missing: Callable[[Any], None], report: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """Run what is missing, unless only a summary is asked for, and report; gives the report."""
    config.folder.mkdir(parents=True, exist_ok=True)
    if not config.summarize:
        run_missing(config)
    return report(config)


def check_config(config: Config) -> None:
    """Raise UserError for settings that cannot be run; prepare what worker processes inherit."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not outlive a fork
    set_allocator()
    check_bounds("workers", config.workers, 1, 1024)
    if not config.seeds:
        raise UserError("--seeds is empty: name at least one, as in --seeds 0.")


def mean_over_sets(sides: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Seed -> mean of its values on all data sets, of seeds that have one on each."""
    seeds = sorted(set.intersection(*map(set, sides)))
    return {seed: float(np.mean([side[seed] for side in sides])) for seed in seeds}


def endpoint(
    found: Mapping[str, Any] | None, margin: float, done: bool, family: int = ENDPOINTS
) -> dict[str, Any] | None:
    """An interval with `mean`, `se`, `df`, `n` as one of the protocol's endpoints: its verdict.

    At the level of the first of a family, the widest that Holm can ask for; done: all planned
    backbones ran. An estimate that `found` calls a `lower_bound` is judged as one, and one that is
    not `bounded` not at all. None before two are done.
    """
    if not found or found["n"] < 2:
        return None
    estimate, se, df = (found[name] for name in ("mean", "se", "df"))
    if not found.get("bounded", True):
        df = 0.0  # no interval
    widest = t_interval(estimate, se, df, 1 - 0.05 / family)
    interval_90 = t_interval(estimate, se, df, 0.90)
    lower_bound = found.get("lower_bound", False)
    said = verdict(estimate, widest, interval_90, margin, done, lower_bound)
    return {**found, "holm_at_most": widest, "interval_90": interval_90, **said, "done": done}


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Six digits, more than two machines share; a table of thousands of rows stays small."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
