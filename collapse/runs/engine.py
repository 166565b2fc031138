"""Runs jobs in parallel: copies of one loop, as processes of this machine or as Slurm jobs.

A worker takes the next job that nobody holds, until none is left (Worker.take_all). A single worker
runs in the command's own process; --workers N starts N processes, --cluster slurm an array of N.
Whoever runs a job holds the lock of its folder, so any number of commands may work in one results
folder. A lock is released with the process that held it, however that process ends.

A command and its workers communicate by files alone, in a folder of the command beside those of its
jobs: the pickled jobs and the function that runs them, lines to print, and a mark for each job that
a worker has begun. The mark is removed when the job is done, or stopped in an orderly way. So a
mark without a held lock means that the worker was killed. A marked job is not tried again.
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
from typing import TYPE_CHECKING, Any

import cloudpickle
import filelock
from tqdm import tqdm

from collapse.config import RunConfig
from collapse.runs.progress import Job, Progress, RunBar
from collapse.utils.errors import UserError, run_script, what_to_do
from collapse.utils.files import append_line, is_held, locked, read_json, write_file, write_json

if TYPE_CHECKING:  # torch takes seconds, and not every job needs it
    import torch

LOOK_SECONDS = 0.1  # how often a command checks on its workers
WAIT_SECONDS = 1.0  # how often a worker checks on jobs that other commands hold
SQUEUE_SECONDS = 15.0  # how often Slurm is asked, which serves other users, too
GO_ON = "the same command, without --fresh, goes on from its checkpoint"

RunJob = Callable[[Job, Progress], None]


def plan_workers(
    config: RunConfig, device: "torch.device", jobs: int
) -> tuple[int, dict[str, Any] | None]:
    """Number of workers for so many jobs, and parameters of the cluster, as run_all takes both.

    At most one per job. Default: one per core or GPU; on a cluster one per job.
    """
    cluster = None
    if config.cluster == "slurm":
        most = jobs
        cluster = {
            "timeout_min": config.cluster_minutes,
            "mem_gb": config.cluster_memory_gib,
            "cpus_per_task": config.threads,
            "gpus_per_node": 1 if device.type == "cuda" else None,
            "slurm_partition": config.cluster_partition,
        }
    elif device.type == "cuda":
        most = len(visible_gpus())
    elif hasattr(os, "sched_getaffinity"):  # not on macOS
        most = len(os.sched_getaffinity(0)) // config.threads
    else:
        most = (os.cpu_count() or 1) // config.threads
    return max(1, min(jobs, config.workers or most)), cluster


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them.

    A process that has not imported torch has use for none.
    """
    torch = sys.modules.get("torch")
    count = torch.cuda.device_count() if torch else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return names.split(",")[:count]


def share_of_device(workers: int, cluster: dict[str, Any] | None) -> float:
    """Share of its device's memory that a worker may use; a Slurm job has its own device."""
    return 1.0 if cluster else 1 / math.ceil(workers / max(1, len(visible_gpus())))


def run_all(
    jobs: Sequence[Job], run_job: RunJob, workers: int, cluster: dict[str, Any] | None = None
) -> None:
    """Finish every job, or wait until another command has finished it.

    run_job(job, progress) must write metrics.json into the job's folder as its last step, and after
    a kill go on from its own checkpoint when called again. With one worker it is called in this
    process, in the order of the jobs; with more, in separate processes, the longest job first (it
    may be a closure); with a cluster (parameters of submitit), in that many Slurm jobs. All jobs'
    folders have the same parent. If jobs fail, the others are still run, and UserError is raised at
    the end. An error that the user cannot fix ends a single worker at once.
    """
    open_jobs = [job for job in jobs if not job.finished]
    workers = min(workers, len(open_jobs))
    if not open_jobs:
        return
    if workers > 1:  # longest first, so that workers end at about the same time
        open_jobs.sort(key=lambda job: job.work, reverse=True)
    with (
        shared_folder(open_jobs[0].folder.parent) as folder,
        contextlib.closing(RunBar(jobs)) as bar,
    ):
        command = Command(folder, open_jobs, bar)
        if workers == 1 and not cluster:
            Worker(folder, f"process {os.getpid()}", command.look).take_all(open_jobs, run_job)
        else:
            write_file(folder / "work", cloudpickle.dumps((open_jobs, run_job)))
            run_on_slurm(command, workers, cluster) if cluster else run_here(command, workers)
    failures = list(command.failures.values())
    if len(failures) > 1:
        raise UserError(f"{len(failures)} jobs failed: {' / '.join(failures)}")
    if failures:
        raise UserError(failures[0])


@contextlib.contextmanager
def shared_folder(parent: Path) -> Iterator[Path]:
    """Make and lock a command's folder beside those of its jobs; delete those of dead commands.

    A dead command's folder stays while one of its jobs runs: Slurm jobs outlive a killed command.
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
        with locked(parent):  # so that no other command finds it half deleted
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)


def mark_of(folder: Path, job: Job) -> Path:
    return folder / f"{job.folder.name}.json"


class Command:
    """A command's view of its workers, through the files that they share."""

    def __init__(self, folder: Path, jobs: Sequence[Job], bar: RunBar):
        self.folder, self.jobs, self.bar = folder, jobs, bar
        self.failures: dict[Job, str] = {}  # job -> a sentence
        self._printed: dict[Path, int] = {}  # file of lines -> bytes

    def look(self) -> None:
        """Print new lines of the workers, note failures, update the progress bar."""
        for file in self.folder.glob("*.lines"):
            with open(file, "rb") as lines:
                lines.seek(self._printed.get(file, 0))
                for line in lines:
                    if line.endswith(b"\n"):  # otherwise it is still being written
                        self._printed[file] = self._printed.get(file, 0) + len(line)
                        self.bar.write(**json.loads(line))
        for job, mark in self.marks().items():
            if "failure" in mark:
                self.fail(job, mark["failure"], mark["traceback"])
        self.bar.refresh()

    def marks(self) -> dict[Job, dict[str, str]]:
        """Marks of the jobs that workers have begun, without those known to have failed."""
        begun, marks = {file.stem for file in self.folder.glob("*.json")}, {}
        for job in self.jobs:
            if job.folder.name in begun and job not in self.failures:
                with contextlib.suppress(FileNotFoundError):  # the job was done meanwhile
                    marks[job] = read_json(mark_of(self.folder, job))
        return marks

    def has_open_jobs(self) -> bool:
        """Whether there is a job that none of this command's workers has begun."""
        return not all(job.finished or mark_of(self.folder, job).exists() for job in self.jobs)

    def fail_lost_job(self, job: Job, how: str) -> None:
        """Record the failure of a job whose worker has died without reporting one."""
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
    """One copy of the loop. `look`: Command.look, where the worker is the command's own process."""

    folder: Path
    name: str
    look: Callable[[], None] | None = None

    def take_all(self, jobs: Sequence[Job], run_job: RunJob) -> None:
        """Run every job that nobody holds, in their order, until none is left."""
        passes = 0  # in a row that found all jobs held by others
        while jobs := [job for job in jobs if self.is_open(job)]:
            ran = [self.attempt(job, run_job) for job in jobs]
            passes = 0 if any(ran) else passes + 1
            if passes == 2:  # not after one: a lock may be held for a moment
                self.report_waiting(jobs)
            time.sleep(WAIT_SECONDS if passes else 0)

    def is_open(self, job: Job) -> bool:
        """Whether a job is neither done nor begun by this command."""
        return not job.finished and not mark_of(self.folder, job).exists()

    def attempt(self, job: Job, run_job: RunJob) -> bool:
        """Run a job under its lock. False if another worker holds the lock, or it is done."""
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
        """Run a job, marked meanwhile; if it fails, the mark stays and says why."""
        self.folder.mkdir(parents=True, exist_ok=True)  # --fresh may have deleted it
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
        finally:  # also when stopped: without a mark another worker may go on
            if failure:
                write_json(mark, {"worker": self.name, "failure": failure, "traceback": trace})
            else:
                mark.unlink(missing_ok=True)

    def say(self, line: str, time_left: bool = False) -> None:
        """Let the command print a line."""
        append_line(self.folder / f"{self.name}.lines", {"line": line, "time_left": time_left})
        if self.look:
            self.look()

    def report_waiting(self, jobs: Sequence[Job]) -> None:
        """Print, once per command, that the remaining jobs are run by other commands."""
        with contextlib.suppress(FileExistsError):
            (self.folder / "waits").touch(exist_ok=False)
            more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
            self.say(f"waiting for {jobs[0].name}{more}, which another command trains")


def work(folder: Path, name: str) -> None:
    """What a separate worker process does: run jobs until none is left."""
    # tqdm's default lock is a system semaphore, which Python reports as leaked after a kill.
    tqdm.set_lock(threading.RLock())
    # SIGTERM ends it as sys.exit does, so that libraries release system resources.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    jobs, run_job = cloudpickle.loads((folder / "work").read_bytes())
    Worker(folder, name).take_all(jobs, run_job)


def search_path() -> str:
    """sys.path for workers, as PYTHONPATH takes it."""
    return os.pathsep.join(str(Path(path).absolute()) for path in sys.path)


def run_here(command: Command, workers: int) -> None:
    """Start worker processes and wait for their end; replace one that is killed during a job."""
    processes: dict[int, subprocess.Popen] = {}
    last = ""  # how the last worker ended that died outside of a job
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
                if not lost:  # not replaced: a new one would probably fail, too
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
    """Start a worker process; Ctrl-C reaches its command alone, which then ends it.

    It ends with its command, however that ends, because then its stdin is closed.
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
    """Entry point of a worker process."""
    threading.Thread(target=end_with_command, daemon=True).start()
    run_script(lambda: work(Path(sys.argv[1]), f"process {os.getpid()}"))


def end_with_command() -> None:
    """Wait for the end of stdin, which is the command's end, and exit."""
    os.read(0, 1)  # sys.stdin would hold a lock that Python waits for when it ends
    os._exit(1)


def describe_exit(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "was killed by signal 9 (memory may have run out: try fewer --workers)"
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}"


def run_on_slurm(command: Command, workers: int, cluster: dict[str, Any]) -> None:
    """Queue an array of workers, and wait until every job is done or has failed."""
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
            if unknown == 2:  # not after one: files of the workers may arrive late
                raise UserError(f"the Slurm jobs {array} ended early: see {logs}; {GO_ON}.")
            time.sleep(LOOK_SECONDS)
        cancel.append("--state=PENDING")  # running ones find no job left and end
    finally:
        # In its own session, so that a second Ctrl-C does not stop it.
        subprocess.Popen(cancel, start_new_session=True, stderr=subprocess.DEVNULL).wait()
    command.look()


def submit(worker: "SlurmWorker", workers: int, logs: Path, cluster: dict[str, Any]) -> str:
    """Queue the array and return its id. Raises UserError if Slurm does not accept it."""
    import submitit  # here, because it takes a second

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
    """Whether Slurm still has the array. squeue works everywhere; sacct needs a database."""
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
        """What submitit queues again when the job reaches its time limit or is preempted."""
        import submitit.helpers

        return submitit.helpers.DelayedSubmission(self, number)
