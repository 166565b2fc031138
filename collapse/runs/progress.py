"""How far trainings have come, and when all of them will be done.

A training writes progress.json in its folder, whichever process of whichever machine it runs in;
every command that works in the results folder reads those of all its trainings.
"""

import dataclasses
import heapq
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from collapse.utils.errors import UserError
from collapse.utils.files import read_json, write_json

REPORT_SECONDS = 1.0  # between two writes of progress.json, and two looks at those of others
STALE_SECONDS = 60.0  # a training whose progress.json stood still for so long is not running
PRIOR_STEPS = 20  # steps vary with the lengths of their texts: the prior counts as so many of them


@dataclass(frozen=True)
class Training:
    """A unit of work with a folder, a lock and a checkpoint of its own."""

    name: str  # as messages name it: "model 2 seed 43"
    folder: Path  # its state; it is finished when metrics.json is there
    kind: str  # trainings of one kind take equally long for a step
    cost: float  # of a step, in a unit that all trainings share, until it is measured
    evaluation_cost: float  # of an evaluation, in the same unit
    steps: int
    evaluations: int

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").exists()


@dataclass
class Report:
    """What progress.json holds: the work done, and how long the part took that was measured."""

    steps: int = 0
    evaluations: int = 0
    timed_steps: int = 0
    step_seconds: float = 0.0
    timed_evaluations: int = 0
    evaluation_seconds: float = 0.0


class Progress:
    """What a training tells the world. `alone`: it may show a bar, for no other training does."""

    def __init__(
        self,
        training: Training,
        write_line: Callable[[str, bool], None],
        alone: bool = False,
        after_report: Callable[[], None] = lambda: None,
    ):
        self.alone, self._write_line, self._after_report = alone, write_line, after_report
        self._report, self._file = Report(), training.folder / "progress.json"
        self._started, self._written = time.monotonic(), float("-inf")
        self._mark: float | None = None  # the end of the last step or of the evaluation after it

    def go_on_after(self, steps: int, evaluations: int) -> None:
        """Say what an earlier start has done; it is no part of the speed measured here."""
        self._report.steps, self._report.evaluations = steps, evaluations
        self._publish()

    def step(self) -> None:
        """A step has ended. The first one only starts the clock: loading comes before it."""
        now = time.monotonic()
        if self._mark is not None:
            self._report.timed_steps += 1
            self._report.step_seconds += now - self._mark
        self._mark = now
        self._report.steps += 1
        self._publish()

    def evaluation(self, seconds: float) -> None:
        """An evaluation of so many seconds has ended just now."""
        now, report = time.monotonic(), self._report
        report.evaluations += 1
        report.timed_evaluations += 1
        report.evaluation_seconds += seconds
        if self._mark is not None:  # what else happened since then, such as saving, goes to steps
            report.step_seconds += max(0.0, now - self._mark - seconds)
            self._mark = now
        self._publish()

    def say(self, line: str, time_left: bool = False) -> None:
        """Print a line where the run's output goes; time_left: with the minutes left at its end."""
        if time_left:
            self._publish(always=True)
        self._write_line(line, time_left)

    def finish(self) -> None:
        """The training has ended: loading and saving are spread over its steps."""
        report = self._report
        if self._mark is not None:
            report.timed_steps += 1  # the first one
            report.step_seconds = time.monotonic() - self._started - report.evaluation_seconds
        self._publish(always=True)

    def _publish(self, always: bool = False) -> None:
        if always or time.monotonic() - self._written >= REPORT_SECONDS:
            write_json(self._file, dataclasses.asdict(self._report))
            self._written = time.monotonic()
            self._after_report()


class RunBar:
    """The bar of a whole run; it knows the time left also where no terminal shows a bar."""

    def __init__(self, trainings: Sequence[Training], workers: int):
        """trainings in the order in which they will be done."""
        self.trainings, self.workers = trainings, workers
        self.here: set[Path] = set()  # folders of the trainings that this command runs now
        self.reports: dict[Path, Report] = {}
        self._written: dict[Path, int] = {}  # folder -> time stamp of the progress.json read last
        self._changed: dict[Path, float] = {}  # folder -> when it changed, by our own clock
        self._looked = float("-inf")
        shape = "{desc} {percentage:3.0f}% |{bar}| {elapsed}{postfix}"
        self._bar = tqdm(total=100, desc="whole run", bar_format=shape, disable=None)

    def refresh(self) -> None:
        """Show where all trainings are; looks at their reports at most once a second."""
        if time.monotonic() - self._looked >= REPORT_SECONDS:
            self._show()

    def write(self, line: str, time_left: bool = False, error: bool = False) -> None:
        """Print a whole line above the bar, on stdout or on stderr."""
        if time_left:
            self._show()
        left = self._time_left() if time_left else ""
        stream = sys.stderr if error else sys.stdout
        tqdm.write(f"{line}  {left}" if left else line, file=stream)
        stream.flush()

    def drop(self, training: Training) -> None:
        """It has failed: nobody waits for it any more."""
        self.trainings = [other for other in self.trainings if other != training]

    def close(self) -> None:
        self._show()
        self._bar.close()

    def _show(self) -> None:
        self._look()
        self._bar.n = round(100 * share_done(self.trainings, self._all_reports()), 1)
        self._bar.set_postfix_str(self._time_left(), refresh=False)
        self._bar.refresh()

    def _time_left(self) -> str:
        recently = time.monotonic() - STALE_SECONDS
        running = self.here | {path for path, when in self._changed.items() if when > recently}
        left = minutes_left(
            self.trainings,
            self._all_reports(),
            [training.folder in running for training in self.trainings],
            self.workers,
        )
        return "" if left is None else f"about {left:.0f} min left"

    def _all_reports(self) -> list[Report]:
        return [self.reports.get(training.folder, Report()) for training in self.trainings]

    def _look(self) -> None:
        first, self._looked = self._looked == float("-inf"), time.monotonic()
        for training in self.trainings:
            folder = training.folder
            finished = training.finished
            try:
                written = (folder / "progress.json").stat().st_mtime_ns
                if self._written.get(folder) != written:
                    self.reports[folder] = Report(**read_json(folder / "progress.json"))
                    self._written[folder] = written
                    if not first:
                        self._changed[folder] = self._looked
            except (OSError, UserError, TypeError):
                pass  # none yet, or not one of ours: nothing that a run should stop for
            if finished:
                report = self.reports.setdefault(folder, Report())
                report.steps, report.evaluations = training.steps, training.evaluations
                self._changed.pop(folder, None)


def minutes_left(
    trainings: Sequence[Training],
    reports: Sequence[Report],
    running: Sequence[bool],
    workers: int,
) -> float | None:
    """Minutes until all trainings are done; None before any step was measured.

    Trainings that run are finished where they are; the others follow in the given order, each as
    soon as one of the workers is free. Where more trainings run than this command has workers,
    other commands help, and go on helping.
    """
    seconds = seconds_left(trainings, reports)
    if seconds is None:
        return None
    ends = [left for left, runs in zip(seconds, running, strict=True) if runs]
    ends += [0.0] * (workers - len(ends))
    heapq.heapify(ends)
    for left, runs in zip(seconds, running, strict=True):
        if not runs:
            heapq.heapreplace(ends, ends[0] + left)
    return max(ends) / 60


def seconds_left(trainings: Sequence[Training], reports: Sequence[Report]) -> list[float] | None:
    """Expected seconds of work that each training has left; None before any step was measured."""
    units = unit_seconds(trainings, reports)
    if units is None:
        return None
    return [
        max(0, training.steps - report.steps) * step
        + max(0, training.evaluations - report.evaluations) * evaluation
        for training, report, (step, evaluation) in zip(trainings, reports, units, strict=True)
    ]


def share_done(trainings: Sequence[Training], reports: Sequence[Report]) -> float:
    """Share of the whole work that is done, 0 to 1, weighed by its seconds or else its priors."""
    units = unit_seconds(trainings, reports)
    units = units or [(training.cost, training.evaluation_cost) for training in trainings]
    done = total = 0.0
    for training, report, (step, evaluation) in zip(trainings, reports, units, strict=True):
        done += min(report.steps, training.steps) * step
        done += min(report.evaluations, training.evaluations) * evaluation
        total += training.steps * step + training.evaluations * evaluation
    return done / total if total else 1.0


def unit_seconds(
    trainings: Sequence[Training], reports: Sequence[Report]
) -> list[tuple[float, float]] | None:
    """Seconds of a step and of an evaluation of each training; None before any step was measured.

    Each kind has its own measured speed. Of a kind that is not measured yet the prior cost holds,
    in seconds by what the measured kinds have taken for theirs.
    """
    pairs = list(zip(trainings, reports, strict=True))
    steps, step_scale = measured_units(
        [(t.kind, t.cost, r.timed_steps, r.step_seconds) for t, r in pairs], PRIOR_STEPS
    )
    evaluations, evaluation_scale = measured_units(
        [(t.kind, t.evaluation_cost, r.timed_evaluations, r.evaluation_seconds) for t, r in pairs],
        0,  # every evaluation is over the same rows
    )
    if step_scale is None:
        return None
    evaluation_scale = step_scale if evaluation_scale is None else evaluation_scale
    return [
        (
            steps.get(training.kind, training.cost * step_scale),
            evaluations.get(training.kind, training.evaluation_cost * evaluation_scale),
        )
        for training in trainings
    ]


def measured_units(
    observed: Iterable[tuple[str, float, int, float]], prior_weight: int
) -> tuple[dict[str, float], float | None]:
    """From (kind, prior cost, units, their seconds): seconds of a unit of each measured kind, and
    seconds for a unit of prior cost over all of them (None when nothing is measured).

    The prior counts as prior_weight measured units, so that a new kind's first few do not jump.
    """
    costs: dict[str, float] = {}
    units: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for kind, cost, count, taken in observed:
        if count:
            costs[kind] = costs.get(kind, 0.0) + cost * count
            units[kind] = units.get(kind, 0) + count
            seconds[kind] = seconds.get(kind, 0.0) + taken
    if not units:
        return {}, None
    expected = sum(costs.values())
    scale = sum(seconds.values()) / expected if expected else 0.0
    return {
        kind: (seconds[kind] + prior_weight * scale * costs[kind] / units[kind])
        / (units[kind] + prior_weight)
        for kind in units
    }, scale
