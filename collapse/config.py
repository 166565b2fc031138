"""Settings of the training scripts: their defaults, groups in --help, and checks."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from collapse.utils.errors import UserError

# Groups of --help.
DATA, MODELS, OPTIMIZATION = "data", "model", "optimization"
LANGUAGE_MODEL, EXECUTION = "language model", "execution"

# Name in --log-to -> the module that writes to that tracker.
TRACKERS = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}


def study_setting(default: Any, group: str) -> Any:
    """A field of a configuration that defines the study: another value makes another study."""
    return dataclasses.field(default=default, metadata={"in_fingerprint": True, "group": group})


def run_setting(default: Any, group: str) -> Any:
    """A field that says where, or how much of, a study is run: results stay comparable.

    So are settings that select rows: the digest of the data identifies those.
    """
    return dataclasses.field(default=default, metadata={"in_fingerprint": False, "group": group})


@dataclass
class RunConfig:
    """Settings that every training script has; the comment above a field is its --help text."""

    # Folder for results.json, plots and checkpoints. Default: one named after the data, so that
    # results on other data or fewer rows never land on published ones.
    output_dir: Path | None = run_setting(None, EXECUTION)
    # Folder with the data in its official layout (SST-2/train.tsv ...). Default: the Hugging Face
    # cache, else the hub, else, in Experiment 1, the movie-review snippets.
    data_dir: Path | None = run_setting(None, DATA)
    # Data set: a name of LOADERS in collapse/data/registry.py; a file of CSV, TSV, JSON (lines or
    # one array) or Parquet, also compressed, or a folder with train.*, and val.*, dev.*, test.* or
    # the like, also in shards; or a data set of the Hugging Face hub: owner/name or
    # owner/name:config. Any but the script's default gets a results subfolder of its own.
    dataset: str = run_setting("SST-2", DATA)
    # Column with the texts of a file or hub set; several columns are joined by a space.
    text_column: tuple[str, ...] = run_setting(("text",), DATA)
    # Column with the labels of a file or hub set: words or whole numbers.
    label_column: str = run_setting("label", DATA)
    # Split of a hub set or folder to train on; in a folder a file's name without its suffix.
    train_split: str = run_setting("train", DATA)
    # Split to validate on. Default: the first of validation, valid, val, dev, eval and test that
    # exists and has labels; without any, a fixed tenth of the training texts with all their copies.
    validation_split: str | None = run_setting(None, DATA)
    # Models to train: 1 classification only, 2 dual head, 3 dual head with engram; or controls by
    # name: shuffled-lm, kl, l2-start, shared-scale, constant-prefix, frozen-compressor,
    # lm-only-engram, longer. NAME@WEIGHT sets the LM loss's weight, as in 2@0.1; longer trains
    # model 1 for 2.5 times the epochs, longer@4 for four times.
    models: tuple[str, ...] = run_setting(("1", "2", "3"), MODELS)
    # Seeds: one full training of each model for each; more can be added to a finished run later.
    seeds: tuple[int, ...] = run_setting((42,), MODELS)
    # Passes over the training split.
    epochs: int = study_setting(3, OPTIMIZATION)
    # Use this many training rows, the same fixed draw for every model and seed. Default: all.
    train_limit: int | None = run_setting(None, DATA)
    # Use this many validation rows, a fixed draw. Default: all.
    eval_limit: int | None = run_setting(None, DATA)
    # Where to compute; auto takes a GPU when there is one.
    device: Literal["auto", "cpu", "cuda"] = run_setting("auto", EXECUTION)
    # Trainings to run in parallel, each in its own process. Default: one per core or GPU, at most
    # one per training.
    workers: int | None = run_setting(None, EXECUTION)
    # CPU threads of one training. They count as part of the study, because with another number
    # sums differ in their last digits.
    threads: int = study_setting(1, EXECUTION)
    # Where trainings run: on this machine, or as jobs of a Slurm cluster that shares this folder,
    # as many as --workers.
    cluster: Literal["none", "slurm"] = run_setting("none", EXECUTION)
    # Time limit of a cluster job, in minutes; a training that reaches it is queued again and goes
    # on from its checkpoint.
    cluster_minutes: int = run_setting(240, EXECUTION)
    # Memory of a cluster job, in GiB.
    cluster_memory_gib: int = run_setting(16, EXECUTION)
    # Partition of the cluster. Default: the cluster's own.
    cluster_partition: str | None = run_setting(None, EXECUTION)
    # Measure collapse (on up to 1,000 validation rows) and training loss (on 256 training rows)
    # every so many optimizer steps, before the first and after the last, and print components and
    # accuracy; 0: never. Training itself is the same with and without.
    measure_every: int = run_setting(0, EXECUTION)
    # Experiment tracker that also receives the numbers of metrics.jsonl, one run per training.
    log_to: Literal["none", *TRACKERS] = run_setting("none", EXECUTION)
    # Delete all earlier results in the output folder, of every model and seed, and train anew.
    fresh: bool = run_setting(False, EXECUTION)
    # Examples per optimizer step.
    batch_size: int = study_setting(16, OPTIMIZATION)
    # Longest input in tokens; the rest of a row is cut off.
    max_length: int = study_setting(128, DATA)
    # Peak learning rate of AdamW.
    learning_rate: float = study_setting(2e-4, OPTIMIZATION)
    # Decoupled weight decay; 0 makes AdamW plain Adam.
    weight_decay: float = study_setting(0.01, OPTIMIZATION)
    # Learning rate after the warm-up: held, or cosine to zero.
    schedule: Literal["constant", "cosine"] = study_setting("cosine", OPTIMIZATION)
    # Share of all steps over which the learning rate rises linearly.
    warmup_fraction: float = study_setting(0.05, OPTIMIZATION)
    # Gradients are scaled down to this total norm; 0 leaves them alone.
    clip_norm: float = study_setting(1.0, OPTIMIZATION)
    # What the classifier reads of a text's hidden states: their mean, or the last token's (last). A
    # name of POOLINGS in collapse/measures/layers.py.
    pooling: str = study_setting("mean", MODELS)
    # Weight of the LM loss (of the KL divergence in kl); the classification loss gets the rest.
    lm_weight: float = study_setting(0.5, MODELS)


DEFAULT_MODEL = "Qwen/Qwen2.5-7B"


STANDIN_MODEL = "smollm2-135m"


@dataclass
class LanguageModelConfig(RunConfig):
    """Settings of the experiments that fine-tune a pretrained causal LM with (Q)LoRA."""

    # Pretrained causal LM: a name on the Hugging Face hub, a folder, or smollm2-135m, the small
    # stand-in of `make standin`.
    model: str = study_setting(DEFAULT_MODEL, LANGUAGE_MODEL)
    # Commit, tag or branch of a model on the hub. Default: main. Results name the commit.
    revision: str | None = run_setting(None, LANGUAGE_MODEL)
    # Precision of the frozen weights: 4 bits (NF4, double quantization), or as stored. Default: nf4
    # on a GPU, none on a CPU.
    quantization: Literal["nf4", "none"] | None = study_setting(None, LANGUAGE_MODEL)
    # Type of activations and of weights that are not quantized. Default: bfloat16 on a GPU, float32
    # on a CPU; bfloat16 is faster on CPUs that multiply it in hardware (AMX).
    compute_dtype: Literal["bfloat16", "float32"] | None = study_setting(None, LANGUAGE_MODEL)
    # Recompute activations in the backward pass instead of keeping them; auto: in as few layers as
    # memory allows.
    gradient_checkpointing: Literal["auto", "on", "off"] = run_setting("auto", EXECUTION)
    # Rank of the LoRA adapters.
    lora_rank: int = study_setting(16, LANGUAGE_MODEL)
    # Adapters' outputs are scaled by alpha / rank.
    lora_alpha: int = study_setting(32, LANGUAGE_MODEL)
    # Dropout on the adapters' inputs.
    lora_dropout: float = study_setting(0.05, LANGUAGE_MODEL)
    # Size of the classifier's intermediate layer.
    classifier_size: int = study_setting(256, LANGUAGE_MODEL)
    # Size of the engram of model 3.
    engram_size: int = study_setting(128, LANGUAGE_MODEL)
    # Repository of the Hugging Face hub, OWNER/NAME, to upload the trained models to: adapters and
    # heads in a subfolder MODEL-seedN for every training of the output folder, and a model card. A
    # repository that does not exist is created, as a private one.
    push_to_hub: str | None = run_setting(None, EXECUTION)


# Settings that say how a file or hub set is read; with `dataset` they make up Task.origin.
READING_SETTINGS = ("text_column", "label_column", "train_split", "validation_split")


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """The settings that define a study, name -> value: all results in a folder share them.

    Raises TypeError for a setting whose declaration does not say whether it is one of them.
    """
    settings = dataclasses.fields(config)
    for setting in settings:
        if "in_fingerprint" not in setting.metadata:
            raise TypeError(f"declare {setting.name} by study_setting or run_setting.")
    return {s.name: getattr(config, s.name) for s in settings if s.metadata["in_fingerprint"]}


def check_config(config: RunConfig) -> None:
    """Raise UserError for settings that cannot be run."""
    if not config.seeds:
        raise UserError("--seeds is empty: name at least one, as in --seeds 42.")
    if not config.models:
        raise UserError("--models is empty: name at least one of 1 2 3.")
    if not config.text_column:
        raise UserError("--text-column is empty: name at least one column.")
    bounds = {
        "epochs": (1, math.inf),
        "batch_size": (1, math.inf),
        "threads": (1, 1024),
        "workers": (1, 1024),
        "cluster_minutes": (1, math.inf),
        "cluster_memory_gib": (1, math.inf),
        "max_length": (1, math.inf),
        "train_limit": (1, math.inf),
        "eval_limit": (1, math.inf),
        "measure_every": (0, math.inf),
        "learning_rate": (1e-12, 1e3),
        "weight_decay": (0, 1e3),
        "warmup_fraction": (0, 1),
        "clip_norm": (0, math.inf),
        "lm_weight": (0, 0.999),
    }
    if isinstance(config, LanguageModelConfig):
        bounds |= {
            "lora_rank": (1, math.inf),
            "lora_alpha": (1, math.inf),
            "lora_dropout": (0, 0.99),
        }
        bounds |= {"classifier_size": (1, math.inf), "engram_size": (2, math.inf)}
    for name, (low, high) in bounds.items():
        check_bounds(name, getattr(config, name), low, high)
    for seed in config.seeds:
        check_bounds("seeds", seed, 0, 2**32 - 1)


def check_bounds(name: str, value: float | None, low: float, high: float) -> None:
    """Raise UserError for a setting outside of [low, high] or infinite; None: it is not set."""
    if value is not None and not (low <= value <= high and value != math.inf):
        wanted = f"{low} or more, and finite" if high == math.inf else f"between {low} and {high}"
        raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {wanted}.")
