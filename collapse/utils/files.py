"""Atomic writes, checksums and locks; which trainings a results folder holds."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import safetensors

from collapse.utils.errors import DISK_FULL, UserError

if TYPE_CHECKING:  # torch takes seconds, and whoever only starts jobs needs none of it
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]  # of the repository


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically: after a kill or on a full disk the old one is still there."""
    # Always the same name, so that the next write replaces what a kill has left.
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


def read_fetched(path: Path, sha256: str, command: str, instead: str = "") -> bytes:
    """Content of a file that a command fetches. Raises UserError when it is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path} is not there: run `{command}` to fetch it{instead}.")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        wrong = "is damaged (its SHA-256 is not the expected one)"
        raise UserError(f"{path} {wrong}: delete it and run `{command}`.")
    return content


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a line of JSON to a file of lines."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to this step, from which a run resumes; an incomplete line goes, too."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        with contextlib.suppress(ValueError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_file(path, "".join(kept).encode())


def write_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, Any]) -> None:
    """Store tensors and JSON-able metadata in one safetensors file, with a checksum of both."""
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts[CHECKSUM] = _checksum(tensors, texts)
    write_file(path, safetensors.torch.save(tensors, texts))


def read_tensors(path: Path, job: Path | None = None) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Read what write_tensors wrote: (tensors, metadata).

    job: folder of the training that the file belongs to, if not its own folder. Raises UserError
    when the file is missing or its content has changed.
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


def _checksum(tensors: "dict[str, Tensor]", texts: dict[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes of CPU tensors, and of the other metadata."""
    import torch

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
    """value as JSON stores it, so that stored and fresh settings compare equal."""
    return json.loads(json.dumps(value, default=str))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a folder during a change, so that commands that share it take turns.

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
    """Whether some command is running the training of this folder at the moment."""
    lock = filelock.FileLock(folder / ".lock", blocking=False)
    try:
        with lock:
            return False
    except filelock.Timeout:
        return True


def finished_trainings(path: Path) -> list[tuple[str, int]]:
    """(model, seed) of every finished training in a results folder, in order."""
    names = [file.parent.name for file in (path / "state").glob("*-seed*/metrics.json")]
    parts = [name.rpartition("-seed") for name in names]
    return sorted((model, int(seed)) for model, _, seed in parts if seed.isdecimal())  # no copies


# Values of settings that results written before those settings existed were made with.
BEFORE = {"config": {"pooling": "mean"}, "data": {}}


def settings_difference(file: Any, settings: dict) -> str | None:
    """How a results.json or settings.json differs from these settings; None: in nothing.

    A setting that only one side has is no difference, unless BEFORE knows what it was. Neither is
    the place that rows were read from, because their digest identifies them.
    """
    stored = file.get("settings", file) if isinstance(file, dict) else {}
    for part, before in BEFORE.items():
        if not isinstance(stored.get(part), dict):
            return f"its file names no {part}"
        there = before | stored[part]
        for key, value in (before | settings[part]).items():
            if there.get(key, value) != value and key != "origin":
                return f"{key} is {there[key]} there and {value} here"
    return None
