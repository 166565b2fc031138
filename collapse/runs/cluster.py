"""Trainings as jobs of a Slurm cluster, through submitit."""

import os
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from collapse.config import RunConfig
from collapse.runs.progress import Progress, RunBar, Training
from collapse.runs.queue import POLL_SECONDS, Queue, Train, attempt_and_tell
from collapse.utils.errors import UserError
from collapse.utils.files import is_held, write_file

SQUEUE_SECONDS = 15.0  # between two questions to Slurm, which is shared with others


@dataclass(frozen=True)
class ClusterConfig:
    """What a Slurm job, which is one training, asks for."""

    # Slurm partition. Default: the cluster's own.
    partition: str | None = None
    # Time limit of a job in minutes; a training that needs more is queued again and goes on.
    minutes: int = 240
    # Memory of a job in GiB.
    memory: int = 16
    # CPU cores of a job.
    threads: int = 1
    # GPUs of a job.
    gpus: int = 0


def cluster_of(config: RunConfig, device: torch.device) -> ClusterConfig | None:
    """What --cluster and its companions ask for; None without a cluster."""
    if config.cluster == "none":
        return None
    return ClusterConfig(
        partition=config.cluster_partition,
        minutes=config.cluster_minutes,
        memory=config.cluster_memory_gib,
        threads=config.threads,
        gpus=int(device.type == "cuda"),
    )


def run_on_cluster(
    queue: Queue, train: Train, bar: RunBar, workers: int, cluster: ClusterConfig
) -> None:
    """Hand every training that nobody holds to Slurm, and wait until all are finished."""
    if not queue.waiting:
        return
    folder = queue.waiting[0].folder.parent / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    train_file = folder / f"train-{socket.gethostname()}-{os.getpid()}.pickle"
    executor = slurm_executor(folder, workers, cluster)
    jobs: dict[Any, Training] = {}  # submitit job -> its training
    gone = GoneJobs()
    try:
        write_file(train_file, cloudpickle.dumps(train))  # once, for it may hold much data
        while queue.waiting or jobs:
            if free := take_free(queue):
                jobs |= zip(submit(executor, ClusterJob(train_file), free), free, strict=True)
                bar.write(f"{len(free)} Slurm jobs queued; their logs are in {folder}")
            if not jobs:
                queue.say_that_it_waits(bar)
            for job in [job for job in jobs if job.paths.result_pickle.exists()]:
                training, (outcome, text) = jobs.pop(job), result_of(job)
                queue.settle(training, outcome, text, bar)
                if outcome == "done":
                    bar.write(f"{training.name} is finished", time_left=True)
            for job in gone.among(jobs):
                training = jobs.pop(job)
                sentence = (
                    f"the Slurm job {job.job_id} training {training.name} ended without a result: "
                    f"its log is {job.paths.stdout}; the same command, without --fresh, goes on."
                )
                queue.settle(training, "failed", sentence, bar)
            bar.refresh()
            time.sleep(POLL_SECONDS if queue.waiting or jobs else 0)
    finally:
        cancel(jobs)
        train_file.unlink(missing_ok=True)


def slurm_executor(folder: Path, workers: int, cluster: ClusterConfig) -> Any:
    """submitit's executor. Raises UserError where there is no Slurm."""
    import submitit  # takes a second, which only this needs

    if not shutil.which("sbatch"):
        raise UserError(
            "--cluster slurm, but there is no sbatch: run it on a cluster's login node."
        )
    own = [path for path in sys.path if not path.startswith((sys.prefix, sys.base_prefix))]
    search = os.pathsep.join(str(Path(path).absolute()) for path in own)
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    executor.update_parameters(
        name=folder.parent.parent.name,
        timeout_min=cluster.minutes,
        mem_gb=cluster.memory,
        cpus_per_task=cluster.threads,
        slurm_array_parallelism=workers,
        slurm_setup=[f"export PYTHONPATH={shlex.quote(search)}"],
        stderr_to_stdout=True,
        **({"gpus_per_node": cluster.gpus} if cluster.gpus else {}),
        **({"slurm_partition": cluster.partition} if cluster.partition else {}),
    )
    return executor


def take_free(queue: Queue) -> list[Training]:
    """All waiting trainings that nobody holds."""
    free = []
    while training := queue.next():
        if is_held(training.folder):
            queue.put_back(training)
        else:
            free.append(training)
    return free


def submit(executor: Any, job: "ClusterJob", trainings: Sequence[Training]) -> list[Any]:
    try:
        return executor.map_array(job, trainings)
    except RuntimeError as error:  # submitit's own errors, with what sbatch said
        raise UserError(f"Slurm did not take the jobs: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class ClusterJob:
    """What runs on the node; submitit pickles it with each training."""

    train_file: Path

    def __call__(self, training: Training) -> tuple[str, str]:
        progress = Progress(training, lambda line, time_left: print(line, flush=True))
        return attempt_and_tell(training, pickle.loads(self.train_file.read_bytes()), progress)

    def checkpoint(self, training: Training) -> Any:
        """What to queue again when the job's time is up: the same, for trainings go on."""
        import submitit.helpers

        return submitit.helpers.DelayedSubmission(self, training)


def result_of(job: Any) -> tuple[str, str]:
    try:
        return job.result()
    except Exception as error:  # of submitit, with the job's traceback as text
        return "crashed", str(error)


class GoneJobs:
    """Finds jobs that Slurm does not know any more though they left no result: killed ones.

    squeue knows them on every cluster; submitit would ask sacct, which needs a data base.
    """

    def __init__(self):
        self._asked, self._missing = time.monotonic(), set()

    def among(self, jobs: dict[Any, Training]) -> list[Any]:
        """Those that two questions in a row did not find: results may come late over a network."""
        if not jobs or time.monotonic() - self._asked < SQUEUE_SECONDS:
            return []
        self._asked = time.monotonic()
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:  # the controller is busy: another time
            return []
        missing = {job for job in jobs if job.job_id not in answer.stdout.split()}
        gone, self._missing = missing & self._missing, missing
        return list(gone)


def cancel(jobs: dict[Any, Training]) -> None:
    """Cancel jobs; SIGUSR1 ends at once what would ignore scancel's SIGTERM for half a minute.

    It also makes submitit queue a job again, so that the last word is to jobs in any state.
    """
    numbers = [job.job_id for job in jobs]
    for option in (["--state=PENDING"], ["--signal=USR1"], []) if jobs else ():
        subprocess.run(["scancel", *option, *numbers], capture_output=True)
