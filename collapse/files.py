"""Files that are whole or not there, checksums, locks, and the folder of a run."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from collapse.settings import DISK_FULL, ROOT, UserError


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a kill or a full disk leaves the old one."""
    # One name: what a kill leaves is overwritten next time.
    temporary = path.with_name(f".{path.name}.partial")
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
        raise UserError(
            f"{path} is not valid JSON ({error}): move it away, or use --fresh to start over."
        ) from None


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a line of JSON to a file of lines."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def drop_lines_after(path: Path, step: int) -> None:
    """Leave the lines up to this step, for a run that goes on there; one cut short goes too."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        with contextlib.suppress(ValueError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_file(path, "".join(kept).encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Store tensors and JSON-able metadata in one safetensors file, with a checksum of both."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts[CHECKSUM] = _checksum(tensors, texts)
    write_file(path, safetensors.torch.save(tensors, texts))


def read_tensors(path: Path, job: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what write_tensors wrote: (tensors, metadata).

    job is the folder of the training that the file belongs to; default: the one it lies in.
    Raises UserError when the file is gone or anything in it is not as it was written.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            texts = file.metadata() or {}
        if texts.pop(CHECKSUM, None) != _checksum(tensors, texts):
            raise ValueError("its checksum does not agree")
        return tensors, {key: json.loads(value) for key, value in texts.items()}
    except (safetensors.SafetensorError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"the checkpoint {path} is damaged or missing ({error}): delete the folder "
            f"{job or path.parent}, and run the experiment again: that training alone starts over."
        ) from None


CHECKSUM = "sha256"


def _checksum(tensors: dict[str, Tensor], texts: dict[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes of CPU tensors, and of the other metadata."""
    digest = hashlib.sha256(json.dumps(sorted(texts.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    """value as it looks after a trip through JSON: stored and fresh settings compare equal."""
    return json.loads(json.dumps(value, default=str))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a folder for the moment of a change, so that commands that share it take turns.

    Raises UserError when the folder cannot be written.
    """
    lock = filelock.FileLock(path / ".lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(
            f"cannot write to {path} ({error.strerror}): choose another folder with --output-dir."
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Does a command train in this folder of one training at the moment?"""
    lock = filelock.FileLock(folder / ".lock", blocking=False)
    try:
        with lock:
            return False
    except filelock.Timeout:
        return True


class RunFolder:
    """A folder of results: published files at its top, the state of the run under state/.

    Attributes: `published` is the results.json that stood here before this run's state began, or
    None.
    """

    def __init__(self, path: Path, settings: dict, fresh: bool):
        """settings define the study (configuration and data); a folder holds one such study.

        Raises UserError when the folder holds another study's results and fresh is not set, or
        when fresh is set while another command trains here.
        """
        self.path, self.state, self.results_file = path, path / "state", path / "results.json"
        self.published, self.settings = None, through_json(settings)
        with locked(path):
            if fresh and any(is_held(lock.parent) for lock in self.state.glob("*-seed*/.lock")):
                raise UserError(
                    f"another command trains in {path}, and --fresh would delete its work: "
                    "stop it, wait for its end, or choose another --output-dir."
                )
            self._open(self.settings, fresh)

    @property
    def settings_file(self) -> Path:
        return self.state / "settings.json"

    @property
    def rows_file(self) -> Path:
        return self.path / "rows.safetensors"

    def check(self) -> None:
        """Raise UserError when another command has begun another study here since, with --fresh."""
        there = read_json(self.settings_file) if self.settings_file.exists() else self.settings
        if difference := settings_difference(there, self.settings):
            raise UserError(
                f"another command has begun another configuration in {self.path} with --fresh "
                f"({difference}): choose another folder with --output-dir."
            )

    def _open(self, settings: dict, fresh: bool) -> None:
        settings_file, published_file = self.settings_file, self.state / "published.json"
        for file in () if fresh else (settings_file, self.results_file):
            if not file.exists():
                continue
            if difference := settings_difference(read_json(file), settings):
                raise UserError(
                    f"{self.path} holds results of another configuration ({difference}): "
                    "choose another folder with --output-dir, or replace them with --fresh."
                )
        # What this run will be compared with: the results.json that stood here before our state, or
        # that --fresh replaces.
        published = published_file if published_file.exists() else self.results_file
        if published == published_file or fresh or not settings_file.exists():
            # With --fresh it may be any file.
            with contextlib.suppress(FileNotFoundError, UserError):
                before = read_json(published)
                self.published = None if settings_difference(before, settings) else before
        if fresh and self.state.exists():
            discarded = self.path / "state-discarded"
            shutil.rmtree(discarded, ignore_errors=True)
            # At once: a kill in rmtree must not leave half of another run.
            self.state.rename(discarded)
            shutil.rmtree(discarded)
        self.state.mkdir(parents=True, exist_ok=True)
        if self.published:
            write_json(published_file, self.published)
        if fresh:  # what is published stays published until it is trained again: nothing stays now
            self.results_file.unlink(missing_ok=True)
            self.rows_file.unlink(missing_ok=True)
        write_json(settings_file, settings)

    def training(self, model: str, seed: int) -> Path:
        """Folder of one training: training.safetensors while it runs, weights and metrics.json."""
        return self.state / f"{model}-seed{seed}"

    def finished(self) -> dict[str, dict[str, dict]]:
        """Metrics of every training that finished here: model -> seed -> metrics."""
        done: dict[str, dict[str, dict]] = {}
        for model, seed in finished_trainings(self.path):
            metrics = read_json(self.training(model, seed) / "metrics.json")
            done.setdefault(model, {})[str(seed)] = metrics
        return done

    def trained_elsewhere(self) -> dict[str, dict[str, dict]]:
        """Metrics of the published trainings whose state is not here, as `finished` gives them.

        In a fresh clone that is every one of them, until it is trained again.
        """
        published = read_json(self.results_file)["models"] if self.results_file.exists() else {}
        here = {(model, str(seed)) for model, seed in finished_trainings(self.path)}
        return {
            model: left
            for model, runs in published.items()
            if (left := {seed: run for seed, run in runs.items() if (model, seed) not in here})
        }


def finished_trainings(path: Path) -> list[tuple[str, int]]:
    """(model, seed) of every finished training in a results folder, in order."""
    names = [file.parent.name for file in (path / "state").glob("*-seed*/metrics.json")]
    return sorted((model, int(seed)) for model, _, seed in (n.rpartition("-seed") for n in names))


def settings_difference(file: Any, here: dict) -> str | None:
    """In which setting a results.json or settings.json differs from those here; None: in none.

    A setting that only one side knows is no difference: what the code learnt later had one value
    before. Where the rows were read from is none either: their digest says what they are.
    """
    there = file.get("settings", file) if isinstance(file, dict) else {}
    for part in ("config", "data"):
        if not isinstance(there.get(part), dict):
            return f"its file names no {part}"
        for key, value in here[part].items():
            if key in there[part] and there[part][key] != value and key != "origin":
                return f"{key} is {there[part][key]} there and {value} here"
    return None


def git_commit() -> str | None:
    """The commit of the code, with -modified at its end when the code differs from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            )
            return done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None  # no git, or not a clone

    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain", "--", "*.py", "requirements.txt"):
        commit += "-modified"
    return commit


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Versions, hardware and git commit (default: the present one), for results.json."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "numpy", "scikit-learn", "scipy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "hardware": {
            "device": hardware_name(device),
            "threads": torch.get_num_threads(),
        },
        "git_commit": commit or git_commit(),
    }


def hardware_name(device: torch.device) -> str:
    """Of the GPU or processor."""
    # On the machine that hands trainings to a cluster the device may be absent.
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
