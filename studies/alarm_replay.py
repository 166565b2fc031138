"""Would an alarm at a share of the start's components have caught the collapses that ran, in time?

Replays the published trainings of collapse_threshold.py. They were measured on 256 rows during
training and on 1,000 at both ends, and components at different numbers of rows must not be
compared; so this script measures the initial models on the 256 rows. The bound is chosen on
backbones with even seeds; error rates are those on odd seeds, on the controls and on a real model.
Writes a row of starts.csv for each initial model, then results.json. The same command resumes
where it was stopped.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from collapse.measures.thresholds import KEPT
from collapse.report.markdown import Column, table
from collapse.training import monitor
from collapse.utils.device import set_threads
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT, write_json
from collapse.utils.provenance import git_commit, hardware_name
from studies import collapse_threshold
from studies.shared import finetune, pretrain, sweep
from studies.shared.tables import put_rows, read_rows

PUBLISHED = ROOT / "studies" / "results" / "collapse_threshold"
OUTPUT = ROOT / "studies" / "results" / "alarm_replay"
ROWS = monitor.MEASURED_ROWS
BOUNDS = tuple(round(0.10 + k / 40, 3) for k in range(17))  # 0.10 to 0.50
MEASURES = {"dims_95pct": "components", "effective_rank": "effective rank"}
MEASURES["stable_rank"] = "stable rank"
RULES = {"once": 1, "twice": 2}  # measurements below the bound, one after another
DATASETS = ("AG News", "SST-2 by sentence")
PLAIN = ("model1", "model2")
CORPUS, MODEL = "newsgroups", "smollm2-135m"  # of the published trainings


@dataclass
class Config:
    """Settings of the replay; the comment above a field is its --help text."""

    # Folder with ag_news_csv and SST-2 in their official layouts. Default: the Hugging Face hub.
    data_dir: Path | None = None
    # Own language models whose starts are measured, pretrained here where they are not; those of
    # other seeds are taken to start as the mean of the measured ones.
    seeds: tuple[int, ...] = tuple(range(sweep.PLANNED))
    # Measure nothing: only results.json, from the starts that are there.
    summarize: bool = False
    # Folder for own language models.
    models_dir: Path = pretrain.LANGUAGE_MODELS
    # Folder for the results.
    output_dir: Path = OUTPUT


# --------------------------------------------------------------------------------------------------
# Starts at as many rows
# --------------------------------------------------------------------------------------------------


def measure_starts(config: Config) -> None:
    """Add to starts.csv what lacks there, the real model before the own ones."""
    weights = {"quantization": "none", "compute_dtype": "float32"}
    real = collapse_threshold.Config(model=MODEL, **weights)
    own = collapse_threshold.Config(corpus=CORPUS, models_dir=config.models_dir)
    for study, seeds in ((real, (0,)), (own, config.seeds)):
        for seed, dataset in itertools.product(seeds, DATASETS):
            name = f"{study.folder.name}, {dataset}, seed {seed}"
            table_of_starts = config.output_dir / "starts.csv"
            if any(row["start"] == name for row in read_rows(table_of_starts)):
                continue
            if not study.model:
                pretrain.backbones([seed], CORPUS, config.models_dir)
            found = measure_start(study, seed, dataset, config.data_dir)
            fields = {"start": name, "models": study.folder.name, "seed": seed, "dataset": dataset}
            put_rows(table_of_starts, [fields | sweep.rounded(found)], "start")
            print(f"{name}: {found['dims_95pct']} components at {ROWS} rows", flush=True)


def measure_start(
    study: collapse_threshold.Config, seed: int, dataset: str, data_dir: Path | None
) -> dict[str, Any]:
    """What --measure-every finds before the first step of a training.

    Raises UserError where the weights are not those that the published trainings started from.
    """
    trial = collapse_threshold.Trial(seed, dataset, "model1", -3.0)
    recipe = collapse_threshold.recipe_of(study, trial)
    data = finetune.load_data(recipe, data_dir)
    digest = finetune.digest_of_model(recipe.model)
    published = read_rows(sweep.table_of(PUBLISHED / study.folder.name, seed))
    if {row["weights_sha256"] for row in published} != {digest}:
        raise UserError(f"{recipe.model} has other weights than the published trainings of it.")
    model, _ = finetune.build(recipe, data.classes)
    few = [monitor.draw_rows(split) for split in (data.measured_train, data.validation)]
    found = monitor.measures(model, *few)
    made_with = {"git_commit": git_commit(), "weights_sha256": digest}
    made_with["hardware"] = hardware_name(next(model.parameters()).device)
    return {"rows": ROWS, **{name: found[name] for name in MEASURES}, **made_with}


def read_starts(file: Path) -> dict[tuple[str, str], dict[int, dict[str, float]]]:
    """(models, data set) -> seed -> its start."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in read_rows(file):
        numbers = {name: float(row[name]) for name in MEASURES}
        found.setdefault((row["models"], row["dataset"]), {})[int(row["seed"])] = numbers
    return found


# --------------------------------------------------------------------------------------------------
# The replay
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replayed:
    """A training as an alarm sees it."""

    run: collapse_threshold.Run
    start: dict[str, float]  # at as many rows as the way

    @property
    def collapsed(self) -> bool:
        """By the published rule, at the last step and all measured rows of both ends."""
        return self.run.kept < KEPT

    def alarm(self, measure: str, bound: float, times: int) -> int | None:
        """The step of the first alarm on the way; None: it is silent."""
        below = 0
        for record in self.run.path:
            if not record["step"] or record["rows"] != ROWS:
                continue
            value = record[measure]
            below = below + 1 if value is None or value / self.start[measure] < bound else 0
            if below == times:
                return int(record["step"])
        return None


def replayed(config: Config, models: str) -> list[Replayed]:
    """The published trainings of own models or of the real one that did not diverge."""
    starts, found = read_starts(config.output_dir / "starts.csv"), []
    for run in collapse_threshold.read_runs(PUBLISHED / models):
        known = starts.get((models, run.trial.dataset))
        if known is None or run.kept is None:
            continue
        means = {name: float(np.mean([s[name] for s in known.values()])) for name in MEASURES}
        found.append(Replayed(run, known.get(run.trial.seed, means)))
    return found


def rates(trainings: Sequence[Replayed], measure: str, bound: float, times: int) -> dict[str, Any]:
    """How many collapses an alarm caught before the end, how often it was false, how early it was.

    Intervals: exact, of trainings as if they were independent; those of one backbone are not.
    """
    alarms = [(one, one.alarm(measure, bound, times)) for one in trainings]
    of_collapsed = [(one, step) for one, step in alarms if one.collapsed]
    of_others = [step for one, step in alarms if not one.collapsed]
    early = [int(one.run.end["step"]) - step for one, step in of_collapsed if step is not None]
    ends = {"median": np.median(early), "least": min(early), "most": max(early)} if early else None
    return {
        "caught": share(len(early), len(of_collapsed)),
        "false": share(len(of_others) - of_others.count(None), len(of_others)),
        "steps_before_the_end": ends,
    }


def share(count: int, of: int) -> dict[str, Any]:
    """`mean` with Clopper and Pearson's interval at 95%."""
    from scipy.stats import binomtest

    found = {"count": count, "of": of, "mean": None, "low": None, "high": None}
    if of:
        interval = binomtest(count, of).proportion_ci(0.95, "exact")
        found |= {"mean": count / of, "low": float(interval.low), "high": float(interval.high)}
    return found


def best_bound(trainings: Sequence[Replayed], measure: str, times: int) -> float:
    """The bound with the greatest caught share minus false share; of equals the nearest to 1/4."""

    def worth(bound: float) -> tuple[float, float]:
        found = rates(trainings, measure, bound, times)
        balance = found["caught"]["mean"] - found["false"]["mean"]
        return round(balance, 9), -abs(bound - KEPT)

    return max(BOUNDS, key=worth)


def summary(config: Config) -> dict[str, Any]:
    own, real = replayed(config, CORPUS), replayed(config, MODEL)
    starts = read_starts(config.output_dir / "starts.csv")

    def some(trainings: list[Replayed], odd: bool, plain: bool = True) -> list[Replayed]:
        trials = ((one, one.run.trial) for one in trainings)
        return [one for one, t in trials if t.seed % 2 == odd and (t.arm in PLAIN) == plain]

    even = some(own, odd=False)
    groups = {
        "even seeds, Models 1 and 2 (chosen on)": even,
        "odd seeds, Models 1 and 2": some(own, odd=True),
        "odd seeds, controls": some(own, odd=True, plain=False),
        f"{MODEL}, Models 1 and 2": real,
    }
    if not all(groups.values()):
        raise UserError("no start is measured yet: leave --summarize out.")
    chosen = {
        measure: {rule: best_bound(even, measure, times) for rule, times in RULES.items()}
        for measure in MEASURES
    }

    return {
        "rows": ROWS,
        "starts": {
            ", ".join(key): {
                "measured_seeds": sorted(known),
                "components": [known[seed]["dims_95pct"] for seed in sorted(known)],
            }
            for key, known in starts.items()
        },
        "chosen": chosen,
        "rates": {
            title: {
                rule: {
                    name: rates(of, measure, chosen[measure][rule], times)
                    for name, of in groups.items()
                }
                for rule, times in RULES.items()
            }
            for measure, title in MEASURES.items()
        },
        "at_a_quarter": {
            rule: {name: rates(of, "dims_95pct", KEPT, times) for name, of in groups.items()}
            for rule, times in RULES.items()
        },
    }


# --------------------------------------------------------------------------------------------------
# RESULTS.md
# --------------------------------------------------------------------------------------------------


def counted(name: str) -> Callable[[dict], str]:
    return lambda row: f"{row[name]['count']} of {row[name]['of']}"


def percent(name: str) -> Callable[[dict], str]:
    def written(row: dict) -> str:
        found = row[name]
        return f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"

    return written


def early(row: dict) -> str:
    steps = row["steps_before_the_end"]
    return f"{steps['median']:g} ({steps['least']} to {steps['most']})" if steps else "n/a"


COLUMNS = (
    Column("trainings", "where"),
    Column("alarm", "alarm"),
    Column("collapsed, caught", counted("caught")),
    Column("caught, % [95%]", percent("caught")),
    Column("others, false alarms", counted("false")),
    Column("false, % [95%]", percent("false")),
    Column("steps before the end", early),
)


def rows_of_rates(by_rule: dict, bounds: dict[str, float], measure: str) -> list[dict[str, Any]]:
    return [
        found | {"where": where, "alarm": f"{measure} < {bounds[rule]:g}, {rule}"}
        for rule, groups in by_rule.items()
        for where, found in groups.items()
    ]


def table_components(found: dict) -> str:
    """Alarms by components, at the bounds that were chosen."""
    rows = rows_of_rates(found["rates"]["components"], found["chosen"]["dims_95pct"], "components")
    return table(COLUMNS, rows)


def table_at_a_quarter(found: dict) -> str:
    rows = rows_of_rates(found["at_a_quarter"], dict.fromkeys(RULES, KEPT), "components")
    return table(COLUMNS, rows)


def table_other_ranks(found: dict) -> str:
    rows = []
    for measure, name in list(MEASURES.items())[1:]:
        rows += rows_of_rates(found["rates"][name], found["chosen"][measure], name)
    return table(COLUMNS, rows)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    set_threads(1)  # sums of more threads differ in their last digits
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if not config.summarize:
        measure_starts(config)
    results = sweep.to_nine_digits(summary(config))
    write_json(config.output_dir / "results.json", results)
    print(table_components(results))


if __name__ == "__main__":
    run_script(main)
