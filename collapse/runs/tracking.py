"""Sends the numbers of metrics.jsonl to an experiment tracker: --log-to."""

import contextlib
import importlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from collapse.config import TRACKERS
from collapse.utils.errors import UserError
from collapse.utils.files import write_file


def load_tracker(kind: str) -> Any:
    """The module that writes to a tracker; None for "none".

    Raises UserError if its package is not installed; nothing else here needs it.
    """
    if kind == "none":
        return None
    try:
        return importlib.import_module(TRACKERS[kind])
    except ImportError:
        install = f".venv/bin/python -m pip install {kind}"
        raise UserError(f"--log-to {kind}: its package is not installed; `{install}`.") from None


@contextlib.contextmanager
def tracked(
    kind: str, folder: Path, name: str, group: str, config: dict[str, Any]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that a training calls with each record that it adds to metrics.jsonl.

    A training is one run of the tracker. The run's id is stored in the training's folder, so that
    it continues after a kill; steps since the last checkpoint are then sent twice, with the same
    numbers. group: the same for all trainings of a study.
    """
    module = load_tracker(kind)
    if module is None:
        yield lambda record: None
        return
    if kind == "tensorboard":
        writer = module.SummaryWriter(folder / "tensorboard")
        close = writer.close

        def log(numbers: dict[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
    else:
        run_id = stored_id(folder / "tracker-run")
        # trackio identifies a run by its name, and stores all runs in a folder of its own.
        own = {"id": run_id, "dir": folder} if kind == "wandb" else {}
        run = module.init(
            project="collapse",
            name=f"{name} {run_id}",
            group=group,
            config=config,
            resume="allow",
            **own,
        )
        log, close = run.log, run.finish
    try:
        yield lambda record: log(numbers_of(record), step=record["step"])
    finally:
        close()


def stored_id(file: Path) -> str:
    """The id in the file; a new one is written if the file does not exist."""
    if not file.exists():
        write_file(file, uuid.uuid4().hex[:8].encode())
    return file.read_text()


def numbers_of(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """A record's numbers as trackers take them: {"validation": {"loss": 1}} -> validation/loss."""
    numbers = {}
    for key, value in record.items():
        if isinstance(value, dict):
            numbers |= numbers_of(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            numbers[prefix + key] = value
    return numbers
