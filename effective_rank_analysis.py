"""Experiment 4: have the hidden states collapsed? Rank and neural collapse of trained models.

Looks for checkpoints under results/, results_7b/ and results_agnews/, runs up to 2,000 validation
rows through each model as it runs (model 3 with its cold prefix), and measures pooled hidden states
of every layer and the classifier's intermediate features. Each measured model is kept until the
code that measures changes: a run that is started again goes on. Studies in the output folder of
results folders that have no checkpoints here stay as they are.
"""

import common  # isort: skip  # before torch: it sets the allocator

import dataclasses
import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

import experiment
from collapse import rank_plots, records
from collapse.batches import Split, encode_rows
from collapse.checkpoints import load_weights
from collapse.data import Task, fixed_draw, load_again
from collapse.files import (
    digest_files,
    digest_weights,
    environment,
    finished_trainings,
    read_json,
    write_json,
)
from collapse.language_models import add_lora, load_causal_lm, load_tokenizer
from collapse.metrics import (
    neural_collapse_metrics,
    random_subsets,
    rank_metrics,
    ranks_from_gram,
    singular_values,
)
from collapse.reports import study_name
from collapse.settings import (
    DEFAULT_MODEL,
    ROOT,
    STANDIN_MODEL,
    LanguageModelConfig,
    UserError,
    check_bounds,
    pick_device,
    run_script,
)
from collapse.source import digest_of_code

LEAST_ROWS = 4  # half of them still have a rank


@dataclass
class Config:
    """Settings of the analysis; the comment above a field is its --help text."""

    # Result folders to analyse. Default: all with checkpoints under results/, results_7b/ and
    # results_agnews/ but limit-*.
    folders: tuple[Path, ...] = ()
    # Folder for the results.
    output_dir: Path = ROOT / "results_effective_rank"
    # Folder with the data in its official layout. Default: the Hugging Face cache, then the hub.
    data_dir: Path | None = None
    # Validation rows to measure, a fixed draw.
    rows: int = 2000
    # Random subsets of rows behind each interval over rows, two or more.
    draws: int = 50
    # Weights to load: of the last epoch, or of the one with the best validation accuracy.
    weights: Literal["final", "best"] = "final"
    # Where to compute; auto takes a GPU when there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Measure everything anew, and replace results in the output folder that were measured
    # otherwise.
    fresh: bool = False

    def how_measured(self) -> dict[str, Any]:
        return {"rows": self.rows, "draws": self.draws, "weights": self.weights}


SCRIPTS = {"results": "experiment.py", "results_7b": "experiment_7b.py"}
SCRIPTS["results_agnews"] = "experiment_agnews_7b.py"


def find_folders(config: Config) -> list[Path]:
    """Result folders with at least one finished training; says how the missing ones are made."""
    if config.folders:
        found = [folder for folder in config.folders if finished_trainings(folder)]
        missing = [f"{f} holds no finished training" for f in config.folders if f not in found]
    else:
        found, missing = [], []
        for top, script in SCRIPTS.items():
            states = (ROOT / top).glob("**/state/settings.json")
            here = sorted(f.parent.parent for f in states if finished_trainings(f.parent.parent))
            limited = [folder for folder in here if "limit-" in str(folder.relative_to(ROOT))]
            found += [folder for folder in here if folder not in limited]
            why = "is left out, as a run on fewer rows"
            missing += [f"{folder} {why}: --folders {folder} takes it" for folder in limited]
            if ROOT / top not in here:
                missing.append(f"no checkpoints in {top}/ itself: `python {script}` makes them")
    if not found:
        raise UserError(f"nothing to analyse; {'; '.join(missing)}.")
    for folder in found:
        made = dict(finished_trainings(folder))
        if lacking := [key for key in ("model1", "model2", "model3") if key not in made]:
            how = "the command that made it adds them by --models 1 2 3"
            missing.append(f"{folder} lacks {', '.join(lacking)}: {how}")
    for sentence in missing:
        print(f"NOTE: {sentence}")
    return found


def models_of(
    folder: Path, settings: dict, task: Task, weights: str, device: torch.device
) -> tuple[Split, Iterator[tuple[str, int, common.DualHeadModel]]]:
    """The validation split, and (model key, seed, model) one after another, pretrained ones first.

    A language model is loaded once and its adapters are exchanged. Its pretrained hidden states are
    the same for every seed and come once; the small transformer's baseline is the untrained network
    of each seed. The classifier of a baseline is a fresh draw.
    """
    stored, jobs = settings["config"], finished_trainings(folder)
    seeds = sorted({seed for _, seed in jobs})
    if "model" in stored:
        key, seed = jobs[0]
        adapter = folder / "state" / f"{key}-seed{seed}" / f"{weights}-adapter"
        config, encode, build = language_model_of(stored, adapter, task, device)
        seeds = seeds[:1]
    else:
        config = known_settings(experiment.Config, stored)
        encode = experiment.WordVocabulary(task.train.texts, config.vocabulary_size).encode

        def build(arm: common.Arm) -> common.DualHeadModel:
            return experiment.build_model(arm, len(task.class_names), config).to(device)

    def models() -> Iterator[tuple[str, int, common.DualHeadModel]]:
        for seed in seeds:
            torch.manual_seed(seed)
            yield "pretrained", seed, build(common.find_arm("1"))
        for key, seed in sorted(jobs, key=lambda job: (common.find_arm(job[0]).place, job[1])):
            model = build(common.find_arm(key))
            load_weights(folder / "state" / f"{key}-seed{seed}", weights, model)
            model.lm_head = None  # it has done its work: no feature passes through it
            yield key, seed, model

    return encode_rows(task.validation, encode, config.max_length), models()


def language_model_of(
    stored: dict, adapter: Path, task: Task, device: torch.device
) -> tuple[LanguageModelConfig, Callable, Callable[[common.Arm], common.DualHeadModel]]:
    """Settings, tokenizer, and what wraps one copy of a pretrained model for an arm."""
    config = known_settings(LanguageModelConfig, stored)
    if device.type == "cpu" and config.model == DEFAULT_MODEL:
        raise UserError(f"{config.model} needs a CUDA GPU, and this would run on the CPU.")
    if "/" not in config.model and config.model != STANDIN_MODEL:
        # A folder: results keep its name alone.
        config.model = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    encode, classes = load_tokenizer(config.model), len(task.class_names)
    if stored.get("model_sha256") not in (None, digest_weights(config.model)):
        raise UserError(f"{config.model} holds other weights than the models were trained on.")
    adapters = add_lora(load_causal_lm(config, device), config)

    def build(arm: common.Arm) -> common.DualHeadModel:
        return common.wrap_causal_lm(adapters, arm, classes, stored["engram_source"], config)

    return config, encode, build


def known_settings(config_class: type, stored: dict) -> Any:
    names = [field.name for field in dataclasses.fields(config_class)]
    return config_class(**{name: stored[name] for name in names if name in stored})


# --------------------------------------------------------------------------------------------------
# Measuring one model
# --------------------------------------------------------------------------------------------------


def measure(model: common.DualHeadModel, split: Split, draws: int) -> dict[str, Any]:
    """Everything that results hold of one model. A new metric of saved models goes here.

    Keys of rank_metrics and neural_collapse_metrics are of the pooled states.
    """
    times = [time.perf_counter()]
    evaluation = common.evaluate(model, split, with_layers=True)
    times.append(time.perf_counter())
    pooled, labels, outer = evaluation.pooled, evaluation.labels, model.classifier.outer
    weights, bias = (parameter.detach().cpu().numpy() for parameter in (outer.weight, outer.bias))
    layers = [rank_metrics(states) for states in evaluation.layers]
    times.append(time.perf_counter())
    n = len(labels)
    curve = {
        str(size): [
            ranks_from_gram(pooled[rows])["effective_rank"]
            for rows in random_subsets(n, size, draws)
        ]
        for size in records.CURVE_ROWS
        if size < n
    }
    halves: dict[str, list[float]] = {number: [] for number in records.HALVED}
    for rows in random_subsets(n, n // 2, draws):
        cdnv = neural_collapse_metrics(pooled[rows], labels[rows])["cdnv"]
        for number, value in (ranks_from_gram(pooled[rows]) | {"cdnv": cdnv}).items():
            halves[number].append(value)
    times.append(time.perf_counter())
    record = {
        **layers[-1],
        **neural_collapse_metrics(pooled, labels),
        "effective_rank_share": layers[-1]["effective_rank"] / max(1, n - 1),
        "accuracy": evaluation.accuracy,
        "intermediate": {
            **rank_metrics(evaluation.intermediate),
            **neural_collapse_metrics(evaluation.intermediate, labels, weights, bias),
        },
        "layers": layers,
        "singular_values": singular_values(pooled).tolist(),
        "subsets": curve,
        "halves": {"rows": n // 2, **halves},
    }
    times.append(time.perf_counter())
    parts = ("forward", "ranks", "subsets", "collapse")
    return record | {"seconds": dict(zip(parts, np.diff(times).tolist(), strict=True))}


# --------------------------------------------------------------------------------------------------
# Measuring a study
# --------------------------------------------------------------------------------------------------


def measure_study(
    folder: Path, config: Config, device: torch.device, here: dict
) -> tuple[str, dict]:
    """The study's name; its settings, data and records (model -> seed -> record)."""
    settings = read_json(folder / "state" / "settings.json")
    task = load_again(settings["data"], config.data_dir)
    name = study_name(settings)
    split, models = models_of(folder, settings, task, config.weights, device)
    rows = fixed_draw(len(split.labels), config.rows)
    if len(rows) < LEAST_ROWS:
        raise UserError(
            f"{len(rows)} validation rows are too few: {LEAST_ROWS} or more are needed."
        )
    split = Split([split.token_ids[i] for i in rows], split.labels[rows])
    where = str(folder.resolve()).removeprefix(f"{ROOT}/")
    state = config.output_dir / "state" / where.strip("/").replace("/", "-")
    state.mkdir(parents=True, exist_ok=True)
    measured, code = config.how_measured(), digest_of_code(measure, models_of)
    print(
        f"{name}: {len(rows):,} validation rows, {config.weights} weights of {folder}", flush=True
    )
    found: dict[str, dict[str, dict]] = {}
    for key, seed, model in models:
        training = folder / "state" / f"{key}-seed{seed}"
        files = training.rglob("*.safetensors")  # none of a baseline
        weights = sorted(f for f in files if config.weights in str(f.relative_to(folder)))
        made_from = [settings, digest_files(weights), code, *measured.values()]
        made_from = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
        file = state / f"{key}-seed{seed}.json"
        record = read_json(file) if file.exists() and not config.fresh else {}
        if record.get("made_from") != made_from:
            record = {**measure(model, split, config.draws), "made_from": made_from, **here}
            write_json(file, record)
        if key == "model3" and config.weights == "final":
            # The training has clustered the engrams of its last epoch.
            clusters = read_json(training / "metrics.json")["cluster"]
            for case, column in (("trained", "engram_ari"), ("untrained", "engram_ari_untrained")):
                record[column] = clusters[case]["ari"]
        found.setdefault(key, {})[str(seed)] = record
        times = ", ".join(f"{part} {s:.0f} s" for part, s in record["seconds"].items())
        rank = record["effective_rank"]
        print(f"  {key} seed {seed}: effective rank {rank:.1f} ({times})", flush=True)
    study = {"folder": where, "settings": settings, "num_samples": len(rows)}
    return name, study | {"measured": measured, "records": found}


def main() -> None:
    config = tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    check_bounds("rows", config.rows, LEAST_ROWS, math.inf)
    check_bounds("draws", config.draws, 2, math.inf)
    device = pick_device(config.device)
    file = config.output_dir / "effective_rank_results.json"
    earlier = records.earlier_studies(file, config.how_measured(), config.fresh)
    studies, names = dict(earlier), {study["folder"]: name for name, study in earlier.items()}
    folders, here = find_folders(config), environment(device)
    measured, unusable = set(), []
    for folder in folders:
        try:
            name, study = measure_study(folder, config, device, here)
        except UserError as error:
            unusable.append(f"{folder}: {error}")
            print(f"NOTE: {folder}: {error}", flush=True)
            continue
        name = name if name not in studies else f"{name}, {study['folder']}"
        name = names.setdefault(study["folder"], name)
        studies[name] = study
        measured.add(name)
        gc.collect()  # one base model at a time
    if not measured:
        raise UserError(f"nothing could be analysed; {' '.join(unusable)}")
    for name in studies.keys() - measured:
        print(f"NOTE: {name} stays as {file} has it: measured by an earlier run")
    results = records.summarize(studies, common.find_arm)
    write_json(file, results)
    rank_plots.plot_all(config.output_dir, results, common.find_arm)
    print(records.table(results, common.find_arm))
    print(f"\nresults and plots: {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
