"""Jobs side by side: copies of one loop, as processes of this machine or as Slurm jobs.

A worker takes the next job that nobody holds, until none is left (Worker.take_all). One worker is
the command's own process; --workers N starts N of them, --cluster slurm an array of N. Whoever runs
a job holds the lock of its folder, so any number of commands may work in one results folder; a lock
falls with the process that held it, however that process ended.

A command and its workers share files alone, in a folder of the command beside those of its jobs:
the pickled jobs and what runs them, the lines that workers want printed, and a mark for each job
that a worker has begun. The mark goes when the job is done, or stopped in an orderly way. So a mark
whose lock nobody holds means that the worker was killed; and what is marked is not tried again.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import filelock
import torch
from tqdm import tqdm

from collapse.config import RunConfig
from collapse.runs.progress import Job, Progress, RunBar
from collapse.utils.errors import UserError, run_script, what_to_do
from collapse.utils.files import append_line, is_held, locked, read_json, write_file, write_json

LOOK_SECONDS = 0.1  # between two looks of a command at its workers
WAIT_SECONDS = 1.0  # between two looks at jobs that other commands hold
SQUEUE_SECONDS = 15.0  # between two questions to Slurm, which is shared with others
GO_ON = "the same command, without --fresh, goes on from its checkpoint"

RunJob = Callable[[Job, Progress], None]


def plan_workers(
    config: RunConfig, device: torch.device, jobs: int
) -> tuple[int, dict[str, Any] | None]:
    """How many workers so many jobs get, and the cluster to run them on, as run_all takes both.

    By default one for each core or GPU that jobs have use for; on a cluster one for each job.
    """
    cluster = None
    if config.cluster == "slurm":
        places = jobs
        cluster = {
            "timeout_min": config.cluster_minutes,
            "mem_gb": config.cluster_memory_gib,
            "cpus_per_task": config.threads,
            "gpus_per_node": 1 if device.type == "cuda" else None,
            "slurm_partition": config.cluster_partition,
        }
    elif device.type == "cuda":
        places = len(visible_gpus())
    elif hasattr(os, "sched_getaffinity"):  # not on macOS
        places = len(os.sched_getaffinity(0)) // config.threads
    else:
        places = (os.cpu_count() or 1) // config.threads
    return config.workers or max(1, min(jobs, places)), cluster


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return names.split(",")[:count]


def share_of_device(workers: int, cluster: dict[str, Any] | None) -> float:
    """What a worker may use of the memory of its device; a Slurm job has one of its own."""
    return 1.0 if cluster else 1 / math.ceil(workers / max(1, len(visible_gpus())))


def run_all(
    jobs: Sequence[Job], run_job: RunJob, workers: int, cluster: dict[str, Any] | None = None
) -> None:
    """Have every job finished, by this command or another one.

    run_job(job, progress) leaves metrics.json in the job's folder as the last thing it does;
    killed before, it goes on from a checkpoint of its own when it is called again. With one worker
    it is called in this process, in the order of the jobs; with more, the longest first, in
    processes of their own (it may be a closure); with a cluster (parameters of submitit), in
    that many Slurm jobs. The jobs' folders lie side by side. Raises UserError at the end when jobs
    failed; the others are done by then. What the user cannot fix ends a lone worker at once.
    """
    left = [job for job in jobs if not job.finished]
    workers = min(workers, len(left))
    if not left:
        return
    if workers > 1:  # they are to end together
        left.sort(key=lambda job: job.work, reverse=True)
    with (
        shared_folder(left[0].folder.parent) as folder,
        contextlib.closing(RunBar(jobs)) as bar,
    ):
        command = Command(folder, left, bar)
        if workers == 1 and not cluster:
            Worker(folder, f"process {os.getpid()}", command.look).take_all(left, run_job)
        else:
            write_file(folder / "work", cloudpickle.dumps((left, run_job)))
            run_on_slurm(command, workers, cluster) if cluster else run_here(command, workers)
    failures = list(command.failures.values())
    if len(failures) > 1:
        raise UserError(f"{len(failures)} jobs failed: {' / '.join(failures)}")
    if failures:
        raise UserError(failures[0])


@contextlib.contextmanager
def shared_folder(parent: Path) -> Iterator[Path]:
    """A command's folder beside those of its jobs, which it holds; those of dead commands go.

    One with a job that is still run stays: Slurm jobs outlive a command that is killed.
    """
    folder = parent / f".command-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    with locked(parent):
        for old in parent.glob(".command-*"):
            jobs = (parent / mark.stem for mark in old.glob("*.json"))
            if not is_held(old) and not any(job.exists() and is_held(job) for job in jobs):
                shutil.rmtree(old, ignore_errors=True)
        folder.mkdir()
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire()
    try:
        yield folder
    finally:
        with locked(parent):  # no other command looks at it meanwhile
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)


def mark_of(folder: Path, job: Job) -> Path:
    return folder / f"{job.folder.name}.json"


class Command:
    """What a command knows of its workers from the files that they share."""

    def __init__(self, folder: Path, jobs: Sequence[Job], bar: RunBar):
        self.folder, self.jobs, self.bar = folder, jobs, bar
        self.failures: dict[Job, str] = {}  # job -> a sentence
        self._printed: dict[Path, int] = {}  # file of lines -> bytes

    def look(self) -> None:
        """Print what is new, and move the bar."""
        for file in self.folder.glob("*.lines"):
            with open(file, "rb") as lines:
                lines.seek(self._printed.get(file, 0))
                for line in lines:
                    if line.endswith(b"\n"):  # else it is being written
                        self._printed[file] = self._printed.get(file, 0) + len(line)
                        self.bar.write(**json.loads(line))
        for job, mark in self.marks().items():
            if "failure" in mark:
                self.fail(job, mark["failure"], mark["traceback"])
        self.bar.refresh()

    def marks(self) -> dict[Job, dict[str, str]]:
        """Of the jobs that are begun, and not known as failed."""
        begun, marks = {file.stem for file in self.folder.glob("*.json")}, {}
        for job in self.jobs:
            if job.folder.name in begun and job not in self.failures:
                with contextlib.suppress(FileNotFoundError):  # it is done by now
                    marks[job] = read_json(mark_of(self.folder, job))
        return marks

    def has_open_jobs(self) -> bool:
        """Is there a job that none of this command's workers has begun?"""
        return not all(job.finished or mark_of(self.folder, job).exists() for job in self.jobs)

    def fail_lost_job(self, job: Job, how: str) -> None:
        """Fail a job whose worker is gone, if that has left nothing else to tell of it."""
        self.look()
        if job in self.marks() and not job.finished:
            self.fail(job, f"the worker training {job.name} {how}; {GO_ON}.")

    def fail(self, job: Job, failure: str, traceback: str = "") -> None:
        self.failures[job] = failure = failure if job.name in failure else f"{job.name}: {failure}"
        self.bar.drop(job)
        if traceback:
            self.bar.write(traceback.rstrip(), error=True)
        if not all(other.finished or other in self.failures for other in self.jobs):
            self.bar.write(f"one failed, the others go on: {failure}")


@dataclass
class Worker:
    """One of the copies of the loop. A command that is its own worker looks (`look`) meanwhile."""

    folder: Path
    name: str
    look: Callable[[], None] | None = None

    def take_all(self, jobs: Sequence[Job], run_job: RunJob) -> None:
        """Run every job that nobody holds, in their order, until none is left."""
        passes = 0  # in a row in which others held all jobs
        while jobs := [job for job in jobs if self.is_open(job)]:
            ran = [self.attempt(job, run_job) for job in jobs]
            passes = 0 if any(ran) else passes + 1
            if passes == 2:  # in the first it may have been for a moment
                self.report_waiting(jobs)
            time.sleep(WAIT_SECONDS if passes else 0)

    def is_open(self, job: Job) -> bool:
        """Not done, and not begun by this command."""
        return not job.finished and not mark_of(self.folder, job).exists()

    def attempt(self, job: Job, run_job: RunJob) -> bool:
        """Run a job under its lock. False where another one holds it, or it is done."""
        if not self.is_open(job):
            return False
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(job.folder / ".lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            return False
        try:
            if is_open := self.is_open(job):
                self.run(job, run_job)
            return is_open
        finally:
            lock.release()
            if self.look:
                self.look()

    def run(self, job: Job, run_job: RunJob) -> None:
        """Run a job, marked meanwhile; the mark of one that fails stays and says why."""
        self.folder.mkdir(parents=True, exist_ok=True)  # --fresh may have taken it away
        mark, failure, trace = mark_of(self.folder, job), "", ""
        write_json(mark, {"worker": self.name})
        try:
            run_job(job, Progress(job, self.say, bool(self.look), self.look or (lambda: None)))
            if not job.finished:
                failure = f"the training of {job.name} left no metrics.json"
        except Exception as error:
            if self.look and not isinstance(error, UserError):
                raise
            failure = what_to_do(error)
            if not failure:
                cause = traceback.format_exception_only(error)[-1].strip()
                failure = f"{job.name} failed ({cause}); its traceback is above."
                trace = traceback.format_exc()
        finally:  # also when it is stopped: then another worker may go on
            if failure:
                write_json(mark, {"worker": self.name, "failure": failure, "traceback": trace})
            else:
                mark.unlink(missing_ok=True)

    def say(self, line: str, time_left: bool = False) -> None:
        """Have a line printed by the command."""
        append_line(self.folder / f"{self.name}.lines", {"line": line, "time_left": time_left})
        if self.look:
            self.look()

    def report_waiting(self, jobs: Sequence[Job]) -> None:
        """Say, once in a command, that nothing is left but what others do."""
        with contextlib.suppress(FileExistsError):
            (self.folder / "waits").touch(exist_ok=False)
            more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
            self.say(f"waiting for {jobs[0].name}{more}, which another command trains")


def work(folder: Path, name: str) -> None:
    """The life of a worker that is a process of its own."""
    # tqdm's own lock is a semaphore of the system, which Python would complain of after a kill.
    tqdm.set_lock(threading.RLock())
    # SIGTERM ends it as sys.exit does, so that libraries give back what they hold of the system.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    jobs, run_job = cloudpickle.loads((folder / "work").read_bytes())
    Worker(folder, name).take_all(jobs, run_job)


def search_path() -> str:
    """sys.path for workers, as PYTHONPATH takes it."""
    return os.pathsep.join(str(Path(path).absolute()) for path in sys.path)


def run_here(command: Command, workers: int) -> None:
    """Start so many worker processes, and wait for their end; one killed in a job is replaced."""
    processes: dict[int, subprocess.Popen] = {}
    last = ""  # how the last worker ended that took no job with it
    try:
        for number in range(workers):
            processes[number] = start_worker(command.folder, number)
        while processes:
            for number, process in list(processes.items()):
                if process.poll() is None:
                    continue
                del processes[number]
                how, name = describe_exit(process.returncode), f"process {process.pid}"
                lost = [job for job, mark in command.marks().items() if mark["worker"] == name]
                for job in lost:
                    command.fail_lost_job(job, how)
                if not lost:  # another one would hardly do better
                    last = how
                elif command.has_open_jobs():
                    processes[number] = start_worker(command.folder, number)
            command.look()
            time.sleep(LOOK_SECONDS if processes else 0)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
    if command.has_open_jobs():
        raise UserError(f"no worker process is left, the last one {last}: try --workers 1.")


def start_worker(folder: Path, number: int) -> subprocess.Popen:
    """A worker that a Ctrl-C does not reach, for that is its command's business.

    It ends with its command, however that ends, for then its stdin does.
    """
    environment = os.environ | {"PYTHONPATH": search_path()}
    if len(gpus := visible_gpus()) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return subprocess.Popen(
        [sys.executable, "-c", "from collapse.runs.engine import main; main()", str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def main() -> None:
    """Of a worker process."""
    threading.Thread(target=end_with_command, daemon=True).start()
    run_script(lambda: work(Path(sys.argv[1]), f"process {os.getpid()}"))


def end_with_command() -> None:
    os.read(0, 1)  # sys.stdin would hold a lock that Python waits for when it ends
    os._exit(1)


def describe_exit(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "was killed by signal 9 (memory may have run out: try fewer --workers)"
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}"


def run_on_slurm(command: Command, workers: int, cluster: dict[str, Any]) -> None:
    """Queue an array of so many workers, and wait until every job is done or has failed."""
    logs = command.folder.parent / "slurm"
    array = submit(SlurmWorker(command.folder.absolute()), workers, logs, cluster)
    command.bar.write(f"{workers} Slurm jobs queued ({array}); their logs are in {logs}")
    asked, unknown, cancel = time.monotonic(), 0, ["scancel", array]
    try:
        while command.has_open_jobs() or any(is_held(job.folder) for job in command.marks()):
            command.look()
            for job, mark in command.marks().items():
                if not is_held(job.folder):
                    log = logs / f"{mark['worker'].split()[-1]}_0_log.out"
                    command.fail_lost_job(job, f"ended without a result (its log is {log})")
            if time.monotonic() - asked >= SQUEUE_SECONDS:
                asked, unknown = time.monotonic(), 0 if is_queued(array) else unknown + 1
            if unknown == 2:  # not after one: what the workers have left may come late
                raise UserError(f"the Slurm jobs {array} ended early: see {logs}; {GO_ON}.")
            time.sleep(LOOK_SECONDS)
        cancel.append("--state=PENDING")  # the others end in good order
    finally:
        # In a session of its own: a second Ctrl-C does not keep it from ending the workers.
        subprocess.Popen(cancel, start_new_session=True, stderr=subprocess.DEVNULL).wait()
    command.look()


def submit(worker: "SlurmWorker", workers: int, logs: Path, cluster: dict[str, Any]) -> str:
    """Queue the array; its number. Raises UserError where Slurm does not take it."""
    import submitit  # takes a second, which only this needs

    if not shutil.which("sbatch"):
        raise UserError(
            "--cluster slurm, but there is no sbatch: run it on a cluster's login node."
        )
    executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=1000)
    executor.update_parameters(
        name=logs.parent.parent.name,
        slurm_setup=[f"export PYTHONPATH={shlex.quote(search_path())}"],
        stderr_to_stdout=True,
        **{name: value for name, value in cluster.items() if value is not None},
    )
    try:
        return executor.map_array(worker, range(workers))[0].job_id.split("_")[0]
    except RuntimeError as error:  # submitit's own errors, with what sbatch said
        raise UserError(f"Slurm did not take the jobs: {' '.join(str(error).split())}") from None


def is_queued(array: str) -> bool:
    """Does Slurm know it? squeue answers on every cluster; sacct would need a data base."""
    squeue = ["squeue", "--me", "--noheader", "--format=%F"]
    answer = subprocess.run(squeue, capture_output=True, text=True)
    return bool(answer.returncode) or array in answer.stdout.split()  # it may be too busy to answer


@dataclass(frozen=True)
class SlurmWorker:
    """What submitit runs on a node."""

    folder: Path

    def __call__(self, number: int) -> None:
        import submitit

        work(self.folder, f"Slurm job {submitit.JobEnvironment().job_id}")

    def checkpoint(self, number: int) -> Any:
        """What to queue again when its time is up, or its node is wanted: the same."""
        import submitit.helpers

        return submitit.helpers.DelayedSubmission(self, number)
