"""Kill tiny runs of experiment.py at random moments until each is done, and compare the results.

    .venv/bin/python tests/kill.py --kills 200 --seed 0

A third of the kills is of commands with two workers: of the whole process group, of the parent
alone, or of one worker alone. Half of the runs write a checkpoint after every step. Exit code 1
when a file that a run leaves differs, but for times, from that of a run that nothing disturbed.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch._dynamo  # noqa: F401 (here once, where every command would import it)
from conftest import TINY, without_times, write_tiny_sst2

from collapse.utils.files import read_tensors

STUDY = "--models 1 3 kl shared-scale --seeds 1 2"
# The script that is killed: experiment.py, with some settings changed, in its workers too.
SCRIPT = """
import experiment
from collapse.report import plots
from collapse.runs import engine, publishing
from collapse.training import loop
from collapse.utils.errors import run_script

def change():
    loop.CHECKPOINT_SECONDS = {seconds}
    if {with_plots}:
        publishing.FIGURE_SECONDS = -1.0  # after every training
    else:  # they take longer than such trainings
        plots.plot_learning_curves = plots.plot_engram_clusters = lambda *_: None

def run_all(jobs, run_job, workers, cluster):
    def run_changed(job, progress):
        change()
        run_job(job, progress)
    inside(jobs, run_changed, workers, cluster)

if __name__ == "__main__":
    change()
    inside, engine.run_all = engine.run_all, run_all
    run_script(experiment.main)
"""
WHOM = ("the group", "the parent", "a worker", "a worker")  # a command outlives the last kind
MOST_KILLS = 10  # of one run
PATIENCE = 120.0  # seconds that any command may take


@dataclass
class Command:
    """A running command in a session of its own; it is forked, for imports take seconds."""

    script: Path
    line: str
    log: Path

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self.become_the_script()
        self.code: int | None = None

    def become_the_script(self) -> None:
        code = 1
        try:
            os.setsid()
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.argv = [str(self.script), *self.line.split()]
            runpy.run_path(str(self.script), run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self) -> int:
        while not self.ended():
            if time.monotonic() - self.started > PATIENCE:
                os.killpg(self.pid, signal.SIGKILL)
                raise SystemExit(f"{self.line} hangs:\n{self.log.read_text()}")
            time.sleep(0.01)
        return self.code

    def workers(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children()
        return []

    def kill(self, whom: str, rng: random.Random) -> bool:
        """SIGKILL; False where there is none to kill any more."""
        workers = self.workers()
        try:
            if whom == "a worker":
                if not workers:
                    return False
                rng.choice(workers).kill()
            elif self.ended():
                return False
            elif whom == "the group":
                os.killpg(self.pid, signal.SIGKILL)
            else:
                os.kill(self.pid, signal.SIGKILL)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False
        if whom != "a worker":
            self.wait()
            _, alive = psutil.wait_procs(workers, timeout=60)  # one that starts imports first
            if alive:
                raise SystemExit(f"workers outlive {whom}: {alive}")
        return True

    def complaint(self) -> str:
        """What is wrong with how it ended; a worker that was killed is one sentence and code 2."""
        text = self.log.read_text()
        errors = text.count("error: ")
        if "Traceback" in text or self.code not in (0, 2) or errors != (self.code == 2):
            return f"exit code {self.code}:\n{text}"
        return ""


def state_of(folder: Path) -> str:
    """How far a run is: finished trainings and those with a checkpoint."""
    done = len(list(folder.glob("state/*/metrics.json")))
    return f"{done} done, {len(list(folder.glob('state/*/training.safetensors')))} checkpoints"


def begun_since(folder: Path, when: float) -> bool:
    """Has a training been begun, or gone on, since then?"""
    files = folder.glob("state/*/progress.json")
    with contextlib.suppress(FileNotFoundError):
        return any(file.stat().st_mtime > when for file in files)
    return False


def outcome(folder: Path) -> dict[str, object]:
    """What a run leaves, but for times and progress: file -> content."""
    found: dict[str, object] = {"results.csv": (folder / "results.csv").read_text()}
    for name in ("results.json", *(str(f.relative_to(folder)) for f in jsons(folder))):
        found[name] = without_times(json.loads((folder / name).read_text()))
    for file in sorted(folder.glob("state/*/*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[str(file.relative_to(folder))] = without_times(lines)
    for file in sorted(folder.glob("state/*/*.safetensors")):
        if file.name != "training.safetensors":  # stays after a kill between the last two writes
            tensors, metadata = read_tensors(file)
            tensors = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
            found[str(file.relative_to(folder))] = tensors, metadata
    return found


def jsons(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.glob("state/*/*.json")) if f.name != "progress.json"]


def different(folder: Path, expected: dict[str, object]) -> list[str]:
    """Names of the files that are not as expected, or on one side only."""
    found = outcome(folder)
    return sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))


def kill_until_done(
    folder: Path, start, workers: int, kills: int, duration: float, rng: random.Random
) -> tuple[int, list[str]]:
    """One run: started and killed, up to so many times, then left alone. Kills, complaints."""
    done, complaints = 0, []
    while done < kills:
        now = time.time()
        command = start()
        early = rng.random() < 0.25  # also while it starts
        while workers > 1 and not early and not begun_since(folder, now) and not command.ended():
            time.sleep(0.005)
        killed = False
        while done < kills and not command.ended():
            end = time.monotonic() + rng.uniform(0, duration * (2 if early else 1))
            while time.monotonic() < end and not command.ended():
                time.sleep(0.001)
            whom = rng.choice(WHOM) if workers > 1 else "the group"
            killed = command.kill(whom, rng)
            if killed:
                done += 1
                after = time.monotonic() - command.started
                print(f"  kill of {whom} after {after:.2f} s: {state_of(folder)}", flush=True)
            if whom != "a worker":
                break
        if not killed or whom == "a worker":
            command.wait()
            if complaint := command.complaint():
                complaints.append(complaint)
        if command.code == 0:
            break
    for _ in range(2):  # a worker that was killed last may be named by the first of them
        last = start()
        code = last.wait()
        if complaint := last.complaint():
            complaints.append(complaint)
        if code == 0:
            return done, complaints
    return done, [*complaints, f"it does not end:\n{last.log.read_text()}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, kills = random.Random(arguments.seed), arguments.kills
    gc.freeze()  # else every training collects what was imported here
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        data = scratch / "data"
        data.mkdir()
        line = f"--data-dir {write_tiny_sst2(data)} {TINY} {STUDY} --output-dir"

        def script(seconds: float, with_plots: bool = False) -> Path:
            file = scratch / f"script-{seconds:.0f}-{with_plots}.py"
            file.write_text(SCRIPT.format(seconds=seconds, with_plots=with_plots))
            return file

        whole = Command(script(600.0), f"{line} {scratch / 'whole'}", scratch / "whole.log")
        if whole.wait() or whole.complaint():
            raise SystemExit(f"the undisturbed run failed:\n{whole.log.read_text()}")
        duration = time.monotonic() - whole.started
        expected = outcome(scratch / "whole")
        print(
            f"the undisturbed run took {duration:.1f} s and left {len(expected)} files", flush=True
        )
        # Two workers first: their share is a third.
        count, runs, wrong, by_workers = 0, 0, 0, {1: 0, 2: 0}
        while count < kills:
            workers = 2 if by_workers[2] < kills / 3 else 1
            seconds = (-1.0, 600.0)[runs % 2]
            with_plots = workers == 1 and rng.random() < 0.2
            folder, log = scratch / f"run-{runs}", scratch / f"run-{runs}.log"
            own = f"{line} {folder} --workers {workers}"
            often = "after every step" if seconds < 0 else "after every epoch"
            shown = f"run {runs}: {workers} workers, a checkpoint {often}"
            shown += ", with plots" * with_plots
            print(shown, flush=True)
            start = partial(Command, script(seconds, with_plots), own, log)
            most = min(MOST_KILLS, kills - count)
            if workers == 2:
                most = min(most, -(-kills // 3) - by_workers[2])
            one = duration * 0.3  # that is, some kills in a run
            killed, complaints = kill_until_done(folder, start, workers, most, one, rng)
            count, runs = count + killed, runs + 1
            by_workers[workers] += killed
            for complaint in complaints:
                print(f"  WRONG: {complaint}", flush=True)
            if names := different(folder, expected):
                print(f"  DIFFERENT: {', '.join(names)}", flush=True)
            wrong += bool(complaints or names)
    print(
        f"{count} kills in {runs} runs ({by_workers[2]} with two workers): "
        f"{runs - wrong} runs left what an undisturbed one leaves, {wrong} did not"
    )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
