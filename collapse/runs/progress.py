"""Jobs, their progress as files, and the progress bar of a whole run.

A job writes progress.json into its folder, on whichever machine it runs; every command in the
results folder reads the files of all its jobs.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from collapse.utils.files import write_json

REPORT_SECONDS = 1.0  # how often progress.json is written, and how often read


@dataclass(frozen=True)
class Job:
    """A unit of work with a folder, a lock and, if it takes long, a checkpoint.

    Costs are relative times, in any unit that all jobs of a run share. They decide which job starts
    first (the longest) and the estimate of the time left.
    """

    name: str  # as messages name it: "model 2 seed 43"
    folder: Path  # of its state; the job is finished when it contains metrics.json
    steps: int
    cost: float = 1.0  # of a step
    evaluations: int = 0
    evaluation_cost: float = 0.0  # of an evaluation

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").exists()

    @property
    def work(self) -> float:
        return self.cost * self.steps + self.evaluation_cost * self.evaluations

    def work_done(self) -> float:
        """Work done, from metrics.json or progress.json; 0 if the latter is missing or damaged."""
        if self.finished:
            return self.work
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            report = json.loads((self.folder / "progress.json").read_bytes())
            steps = self.cost * min(report["steps"], self.steps)
            return steps + self.evaluation_cost * min(report["evaluations"], self.evaluations)
        return 0.0


class Progress:
    """Reports of a running job. `alone`: no other job runs, so it may show its own bar."""

    def __init__(
        self,
        job: Job,
        write_line: Callable[[str, bool], None],
        alone: bool = False,
        after_report: Callable[[], None] = lambda: None,
    ):
        self.alone, self._write_line, self._after_report = alone, write_line, after_report
        self._file, self._written = job.folder / "progress.json", float("-inf")
        self._steps = self._evaluations = 0

    def resume_at(self, steps: int, evaluations: int) -> None:
        """Count what was done before the job was resumed."""
        self._steps, self._evaluations = steps, evaluations
        self._report()

    def step(self) -> None:
        self._steps += 1
        self._report()

    def evaluation(self) -> None:
        self._evaluations += 1
        self._report()

    def say(self, line: str, time_left: bool = False) -> None:
        """Print a line in the run's output; time_left: followed by the minutes left."""
        if time_left:
            self._report(always=True)
        self._write_line(line, time_left)

    def _report(self, always: bool = False) -> None:
        if always or time.monotonic() - self._written >= REPORT_SECONDS:
            write_json(self._file, {"steps": self._steps, "evaluations": self._evaluations})
            self._written = time.monotonic()
            self._after_report()


class RunBar:
    """The progress bar of a whole run; it estimates the time left also without a terminal."""

    def __init__(self, jobs: Sequence[Job]):
        self._done = {job: job.work_done() for job in jobs}
        self._started, self._looked, self._gained = time.monotonic(), float("-inf"), 0.0
        shape = "{desc} {percentage:3.0f}% |{bar}| {elapsed}{postfix}"
        self._bar = tqdm(total=100, desc="whole run", bar_format=shape, disable=None)

    def refresh(self) -> None:
        """Update the bar from the jobs' reports, at most once a second."""
        if time.monotonic() - self._looked >= REPORT_SECONDS:
            self._show()

    def write(self, line: str, time_left: bool = False, error: bool = False) -> None:
        """Print a whole line above the bar, on stdout or on stderr."""
        left = ""
        if time_left:
            self._show()
            left = self._time_left()
        stream = sys.stderr if error else sys.stdout
        tqdm.write(f"{line}  {left}" if left else line, file=stream)
        stream.flush()

    def drop(self, job: Job) -> None:
        """Leave a failed job out of the remaining work."""
        self._done.pop(job, None)

    def close(self) -> None:
        self._show()
        self._bar.close()

    def _show(self) -> None:
        self._looked = time.monotonic()
        for job, before in self._done.items():
            self._done[job] = job.work_done()
            # A job that starts over reports less than before, which must not count as negative.
            self._gained += max(0.0, self._done[job] - before)
        total = sum(job.work for job in self._done)
        self._bar.n = round(100 * sum(self._done.values()) / total, 1) if total else 100
        self._bar.set_postfix_str(self._time_left(), refresh=False)
        self._bar.refresh()

    def _time_left(self) -> str:
        """Minutes left, from the work that all commands have done since the start; "" without any.

        With several workers it is too low at the end, when some of them are idle.
        """
        if not self._gained:
            return ""
        left = sum(job.work - done for job, done in self._done.items())
        minutes = left / self._gained * (time.monotonic() - self._started) / 60
        return f"about {minutes:.0f} min left"
