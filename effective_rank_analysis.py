"""Experiment 4: have the hidden states collapsed? Rank and neural collapse of trained models.

Looks for checkpoints under results/, results_7b/ and results_agnews/, runs up to 2,000 validation
rows through each model (model 3 with the zero engram), and measures pooled hidden states of every
layer and the classifier's intermediate features. Measurements are cached until the measuring code
changes, so a run that is started again goes on. Earlier measurements of published trainings whose
checkpoints are not here stay in the results.
"""

import gc
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import common
import experiment
from collapse.config import check_bounds
from collapse.data.batches import Split, encode_rows
from collapse.data.registry import load_again
from collapse.data.task import Rows, Task
from collapse.measures.probe import transfer_accuracy
from collapse.report import rank_plots, records
from collapse.report.comparisons import study_name
from collapse.report.model_records import (
    LEAST_ROWS,
    Splits,
    draw_splits,
    intermediate_record,
    pooled_record,
    train_record,
)
from collapse.training.checkpoints import load_weights
from collapse.utils import command_line
from collapse.utils.device import pick_device, set_allocator
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import (
    ROOT,
    digest_files,
    finished_trainings,
    locked,
    read_json,
    write_json,
)
from collapse.utils.provenance import environment


@dataclass
class Config:
    """Settings of the analysis; the comment above a field is its --help text."""

    # Results folders to analyse. Default: all folders with checkpoints under results/, results_7b/
    # and results_agnews/, except limit-*.
    folders: tuple[Path, ...] = command_line.grouped((), "data")
    # Folder for the results.
    output_dir: Path = command_line.grouped(ROOT / "results_effective_rank", "execution")
    # Folder with the data in its official layout. Default: the Hugging Face cache, then the hub.
    data_dir: Path | None = command_line.grouped(None, "data")
    # Folder of the pretrained model, if it has moved since the training.
    model: str | None = command_line.grouped(None, "data")
    # File or folder of your own data, if it has moved since the training.
    dataset: str | None = command_line.grouped(None, "data")
    # Validation rows to measure, a fixed draw.
    rows: int = command_line.grouped(2000, "measurement")
    # Random subsets of rows that each interval is estimated from, two or more.
    draws: int = command_line.grouped(50, "measurement")
    # Weights to load: of the last epoch, or of the epoch with the best validation accuracy.
    weights: Literal["final", "best"] = command_line.grouped("final", "measurement")
    # Where to compute; auto takes a GPU when there is one.
    device: Literal["auto", "cpu", "cuda"] = command_line.grouped("auto", "execution")
    # Ignore the cache, and replace results in the output folder that were measured with other
    # settings.
    fresh: bool = command_line.grouped(False, "execution")

    def how_measured(self) -> dict[str, Any]:
        """The settings that the measured numbers depend on."""
        return {"rows": self.rows, "draws": self.draws, "weights": self.weights}


SCRIPTS = {"results": "experiment.py", "results_7b": "experiment_7b.py"}
SCRIPTS["results_agnews"] = "experiment_agnews_7b.py"


def find_folders(config: Config) -> list[Path]:
    """Results folders with a finished training; prints how to make those that are missing."""
    if config.folders:
        folders = [folder for folder in config.folders if finished_trainings(folder)]
        missing = [f"{f} holds no finished training" for f in config.folders if f not in folders]
    else:
        folders, missing = [], []
        for top, script in SCRIPTS.items():
            states = (ROOT / top).glob("**/state/settings.json")
            with_checkpoints = sorted(
                f.parent.parent for f in states if finished_trainings(f.parent.parent)
            )
            limited = [
                folder for folder in with_checkpoints if "limit-" in str(folder.relative_to(ROOT))
            ]
            folders += [folder for folder in with_checkpoints if folder not in limited]
            why = "is left out, as a run on fewer rows"
            missing += [f"{folder} {why}: --folders {folder} takes it" for folder in limited]
            if ROOT / top not in with_checkpoints:
                missing.append(f"no checkpoints in {top}/ itself: `python {script}` makes them")
    if not folders:
        raise UserError(f"nothing to analyse; {'; '.join(missing)}.")
    for folder in folders:
        seed_by_model = dict(finished_trainings(folder))
        if lacking := [key for key in ("model1", "model2", "model3") if key not in seed_by_model]:
            how = "the command that made it adds them by --models 1 2 3"
            missing.append(f"{folder} lacks {', '.join(lacking)}: {how}")
    for sentence in missing:
        print(f"NOTE: {sentence}")
    return folders


def published_trainings(folder: Path) -> list[tuple[str, str]]:
    """(model, seed) of every training in a folder's published results.json."""
    file = folder / "results.json"
    models = read_json(file)["models"] if file.exists() else {}
    return [(model, seed) for model, runs in models.items() for seed in runs]


def models_of(
    folder: Path,
    settings: dict,
    task: Task,
    weights: str,
    device: torch.device,
    model: str | None = None,
) -> tuple[Callable[[Rows, int | None], Split], Iterator[tuple[str, int, common.DualHeadModel]]]:
    """(encode, models): a function rows, longest -> Split, and all models as (key, seed, model).

    Baselines (key `pretrained`) come first. A language model is loaded once and its adapters are
    exchanged; its baseline is the same for every seed and comes once. The small transformer's
    baselines are the untrained networks of each seed. A baseline's classifier has random weights.
    Every language model has the pretrained LM head; a small transformer has the LM head that it
    trained, if any.
    """
    settings_of_run, jobs = settings["config"], finished_trainings(folder)
    seeds = sorted({seed for _, seed in jobs})
    if "model" in settings_of_run:
        key, seed = jobs[0]
        adapter = folder / "state" / f"{key}-seed{seed}" / f"{weights}-adapter"
        config, encode, build = common.language_model_of(
            settings_of_run, adapter, len(task.class_names), device, model
        )
        seeds = seeds[:1]
    else:
        config = common.known_settings(experiment.Config, settings_of_run)
        encode = experiment.WordVocabulary(task.train.texts, config.vocabulary_size).encode

        def build(arm: common.Arm) -> common.DualHeadModel:
            return experiment.build_model(arm, len(task.class_names), config).to(device)

    def models() -> Iterator[tuple[str, int, common.DualHeadModel]]:
        for seed in seeds:
            torch.manual_seed(seed)
            yield "pretrained", seed, build(common.find_arm("2"))  # states and classifier of 1
        for key, seed in sorted(jobs, key=lambda job: (common.find_arm(job[0]).sort_key, job[1])):
            model = build(common.find_arm(key))
            load_weights(folder / "state" / f"{key}-seed{seed}", weights, model)
            yield key, seed, model

    def encode_split(rows: Rows, longest: int | None = None) -> Split:
        return encode_rows(rows, encode, min(longest or config.max_length, config.max_length))

    return encode_split, models()


# --------------------------------------------------------------------------------------------------
# Measuring one model
# --------------------------------------------------------------------------------------------------


def measure(model: common.DualHeadModel, splits: Splits, draws: int) -> dict[str, Any]:
    """Everything that results hold of one model. A new metric of saved models goes here.

    `lm_loss` (nats) is under the model's LM head, on the rows of splits.language; None without an
    LM head. `transfer_accuracy` is that of a probe of the frozen pooled states for the labels of
    another data set; None without its rows.
    """
    numbers: dict[str, Any] = dict.fromkeys(("accuracy", "lm_loss", "transfer_accuracy"))
    if model.lm_head is not None:
        numbers["lm_loss"] = common.evaluate(model, splits.language).lm_loss
    model.lm_head = None  # not needed any more: no feature passes through it
    validation = common.evaluate(model, splits.validation, with_layers=True)
    numbers["accuracy"] = validation.accuracy
    train = common.evaluate(model, splits.train)
    if splits.transfer is not None:
        arrays = []
        for split in splits.transfer:
            states = common.evaluate(model, split, losses=False)
            arrays += [states.pooled, states.labels]
        numbers["transfer_accuracy"] = transfer_accuracy(*arrays, seed=0)["accuracy"]
    lengths, labels = splits.validation.lengths, validation.labels
    record = pooled_record(validation.layers, labels, lengths, draws)
    outer = model.classifier.outer
    head = tuple(part.detach().cpu().numpy() for part in (outer.weight, outer.bias))
    intermediate = train.intermediate, train.labels
    record["intermediate"] = intermediate_record(
        validation.intermediate, labels, *intermediate, *head
    )
    record["train"] = train_record(train.pooled, *intermediate, *head)
    record["train"]["accuracy"] = train.accuracy
    return record | numbers


# --------------------------------------------------------------------------------------------------
# Measuring a study
# --------------------------------------------------------------------------------------------------


# Files and folders, from the repository: a change to one of them measures every model anew.
MEASURED_WITH = ("effective_rank_analysis.py", "common.py", "experiment.py", "requirements.txt")
MEASURED_WITH += ("collapse/arms.py", "collapse/config.py", "collapse/data")
MEASURED_WITH += ("collapse/measures", "collapse/models", "collapse/training")
MEASURED_WITH += ("collapse/report/model_records.py",)


def files_that_measure() -> list[Path]:
    here = Path(__file__).resolve().parent
    places = [here / place for place in MEASURED_WITH]
    return sorted(file for p in places for file in (p.glob("*.py") if p.is_dir() else [p]))


def measure_study(
    folder: Path, config: Config, device: torch.device, made_with: dict
) -> tuple[str, dict]:
    """(name, study): a results folder's settings, and a record for each model and seed.

    made_with: versions and hardware, stored in new records. Raises UserError when the folder's
    data or models cannot be loaded.
    """
    settings = read_json(folder / "state" / "settings.json")
    task = load_again(settings["data"], config.data_dir, config.dataset)
    name = study_name(settings)
    encode, models = models_of(folder, settings, task, config.weights, device, config.model)
    splits = draw_splits(task, config.rows, config.data_dir, encode)
    n = len(splits.validation.labels)
    where = str(folder.resolve()).removeprefix(f"{ROOT}/")
    state = config.output_dir / "state" / where.strip("/").replace("/", "-")
    state.mkdir(parents=True, exist_ok=True)
    measured = config.how_measured()
    code = [digest_files(files_that_measure()), splits.transfer is not None]
    print(f"{name}: {n:,} validation rows, {config.weights} weights of {folder}", flush=True)
    records_by_model: dict[str, dict[str, dict]] = {}
    for key, seed, model in models:
        training = folder / "state" / f"{key}-seed{seed}"
        files = training.rglob("*.safetensors")  # none of a baseline
        weights = sorted(f for f in files if config.weights in str(f.relative_to(folder)))
        made_from = [settings, digest_files(weights), *code, *measured.values()]
        made_from = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
        file = state / f"{key}-seed{seed}.json"
        record = read_json(file) if file.exists() and not config.fresh else {}
        if record.get("made_from") != made_from:
            record = {**measure(model, splits, config.draws), "made_from": made_from, **made_with}
            write_json(file, record)
        if key == "model3" and config.weights == "final":
            # The training has clustered the engrams of its last epoch.
            clusters = read_json(training / "metrics.json")["cluster"]
            for case, column in (("trained", "engram_ari"), ("untrained", "engram_ari_untrained")):
                record[column] = clusters[case]["ari"]
        records_by_model.setdefault(key, {})[str(seed)] = record
        print(f"  {key} seed {seed}: effective rank {record['effective_rank']:.1f}", flush=True)
    records.add_losses_of_training(records_by_model)
    study = {"folder": where, "settings": settings, "num_samples": n}
    return name, study | {"measured": measured, "records": records_by_model}


def main() -> None:
    config = command_line.parse(Config, __doc__, negative_flags=False)
    set_allocator()
    check_bounds("rows", config.rows, LEAST_ROWS, math.inf)
    check_bounds("draws", config.draws, 2, math.inf)
    device = pick_device(config.device)
    file = config.output_dir / "effective_rank_results.json"
    records.earlier_studies(file, config.how_measured(), config.fresh)  # raises before the hours
    folders, made_with = find_folders(config), environment(device)
    measured, unusable = [], []
    for folder in folders:
        try:
            measured.append((folder, *measure_study(folder, config, device, made_with)))
        except UserError as error:
            unusable.append(f"{folder}: {error}")
            print(f"NOTE: {folder}: {error}", flush=True)
        gc.collect()  # one base model at a time
    if not measured:
        raise UserError(f"nothing could be analysed; {' '.join(unusable)}")
    with locked(config.output_dir):  # read again: other commands may have added studies
        results = records.summarize(put_beside_earlier(file, measured, config))
        write_json(file, results)
        rank_plots.plot_all(config.output_dir, results)
    print(records.table(results))
    print(f"\nresults and plots: {config.output_dir}")


def put_beside_earlier(
    file: Path, measured: Sequence[tuple[Path, str, dict]], config: Config
) -> dict[str, dict]:
    """Studies by name: those of the results file, these (folder, name, study) in their place."""
    earlier = records.earlier_studies(file, config.how_measured(), config.fresh)
    studies, names = dict(earlier), {study["folder"]: name for name, study in earlier.items()}
    for folder, name, study in measured:
        name = name if name not in studies else f"{name}, {study['folder']}"
        name = names.setdefault(study["folder"], name)
        if kept := records.keep_unmeasured(study, earlier.get(name), published_trainings(folder)):
            print(f"NOTE: of earlier runs, whose weights are not here: {', '.join(kept)}")
        studies[name] = study
    for name in studies.keys() - {names[study["folder"]] for _, _, study in measured}:
        print(f"NOTE: {name} stays as {file} has it: measured by an earlier run")
    return studies


if __name__ == "__main__":
    run_script(main)
