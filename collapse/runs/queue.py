"""Which training comes next, and one attempt at it under its lock.

Whoever trains holds the lock of the training's folder. So any number of commands may work in one
results folder: each takes trainings that nobody holds, and a lock falls with the process that
held it, however that process ended.
"""

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock

from collapse.runs.progress import Progress, RunBar, Training
from collapse.utils.errors import what_to_do

POLL_SECONDS = 1.0  # between two looks at a training that another command holds

Train = Callable[[Training, Progress], None]


def attempt(training: Training, train: Train, progress: Progress) -> str:
    """Train under the training's lock: "done", also when it was before, or "held" by another."""
    lock = lock_of(training)
    try:
        lock.acquire()
    except filelock.Timeout:
        return "held"
    try:
        if not training.finished:
            train(training, progress)
            if not training.finished:
                raise RuntimeError(f"the training of {training.name} left no metrics.json")
            progress.finish()
        return "done"
    finally:
        lock.release()


def attempt_and_tell(training: Training, train: Train, progress: Progress) -> tuple[str, str]:
    """attempt for another process to hear of: also ("failed", sentence), ("crashed", traceback)."""
    try:
        return attempt(training, train, progress), ""
    except Exception as error:
        if sentence := what_to_do(error):
            return "failed", sentence
        return "crashed", traceback.format_exc()


def lock_of(training: Training) -> filelock.BaseFileLock:
    training.folder.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(training.folder / ".lock", blocking=False)


class Queue:
    """What is left to do; a training that another command holds goes to the end."""

    def __init__(self, trainings: Sequence[Training], longest_first: bool):
        def duration(training: Training) -> float:
            evaluations = training.evaluation_cost * training.evaluations
            return training.cost * training.steps + evaluations

        if longest_first:
            trainings = sorted(trainings, key=duration, reverse=True)
        self.waiting = deque(trainings)
        self.failures: list[str] = []
        self._held: dict[Path, float] = {}  # folder -> when it was found held
        self._said_so = False

    def next(self) -> Training | None:
        """Take a training to try now; None where there is none, or others hold all of them."""
        for _ in range(len(self.waiting)):
            training = self.waiting.popleft()
            found_held = self._held.get(training.folder, float("-inf"))
            if time.monotonic() - found_held < POLL_SECONDS and not training.finished:
                self.waiting.append(training)
            elif not training.finished:
                return training
        return None

    def put_back(self, training: Training) -> None:
        """Another command holds it: look again in a second."""
        self._held[training.folder] = time.monotonic()
        self.waiting.append(training)

    def settle(self, training: Training, outcome: str, text: str, bar: RunBar) -> None:
        """Note how an attempt at a training has ended; text: the sentence, or the traceback."""
        if outcome == "held":
            self.put_back(training)
        if outcome in ("crashed", "failed"):
            bar.drop(training)
        if outcome == "crashed":
            bar.write(text.rstrip(), error=True)
            cause = text.strip().splitlines()[-1]
            self.failures.append(f"{training.name} failed ({cause}); its traceback is above.")
        elif outcome == "failed":
            sentence = text if training.name in text else f"{training.name}: {text}"
            self.failures.append(sentence)
            if self.waiting:
                bar.write(f"one failed, the others go on: {sentence}")

    def say_that_it_waits(self, bar: RunBar) -> None:
        """Say once that nothing is left but what others do."""
        if self.waiting and not self._said_so:
            self._said_so = True
            more = f" and {len(self.waiting) - 1} more" if len(self.waiting) > 1 else ""
            bar.write(f"waiting for {self.waiting[0].name}{more}, which another command trains")
