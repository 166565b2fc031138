"""Trainings side by side: in this process, in worker processes, or as jobs of a Slurm cluster."""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from tqdm import tqdm

from collapse.config import RunConfig
from collapse.runs.cluster import ClusterConfig, run_on_cluster
from collapse.runs.progress import Progress, RunBar, Training
from collapse.runs.queue import POLL_SECONDS, Queue, Train, attempt, attempt_and_tell
from collapse.utils.errors import UserError


def run_all(
    trainings: Sequence[Training], train: Train, workers: int, cluster: ClusterConfig | None = None
) -> None:
    """Have every training finished, by this command or another one.

    train(training, progress) leaves metrics.json in the training's folder as the last thing it
    does; killed before, it goes on from a checkpoint of its own when it is called again. With one
    worker it is called in this process, with more in processes of their own (it may be a
    closure), on a cluster in jobs, at most `workers` at a time. Raises UserError at the end when
    trainings failed; the others are done by then.
    """
    queue = Queue(trainings, longest_first=workers > 1)  # where several must end together
    with contextlib.closing(RunBar(tuple(queue.waiting), workers)) as bar:
        if cluster:
            run_on_cluster(queue, train, bar, workers, cluster)
        elif workers > 1:
            pool = WorkerPool(queue, train, bar, workers)
            try:
                pool.run()
            finally:
                pool.stop()
        else:
            run_here(queue, train, bar)
    if len(queue.failures) > 1:
        raise UserError(f"{len(queue.failures)} trainings failed: {' / '.join(queue.failures)}")
    if queue.failures:
        raise UserError(queue.failures[0])


def run_here(queue: Queue, train: Train, bar: RunBar) -> None:
    """One training after another in this process; an exception that is no UserError ends it."""
    while queue.waiting:
        training = queue.next()
        if training is None:
            queue.say_that_it_waits(bar)
            bar.refresh()
            time.sleep(POLL_SECONDS if queue.waiting else 0)
            continue
        bar.here = {training.folder}
        progress = Progress(training, bar.write, alone=True, after_report=bar.refresh)
        outcome, sentence = "failed", ""
        try:
            outcome = attempt(training, train, progress)
        except UserError as error:
            sentence = str(error)
        bar.here = set()
        queue.settle(training, outcome, sentence, bar)


def how_many(config: RunConfig, device: torch.device, trainings: int) -> int:
    """--workers, or by default one for each core that trainings have use for; on a GPU one."""
    if config.workers:
        return config.workers
    if config.cluster != "none":
        return max(1, trainings)
    if device.type == "cuda":
        return 1
    return max(1, min(trainings, len(os.sched_getaffinity(0)) // config.threads))


@dataclass
class Worker:
    """A worker process as its parent sees it."""

    process: Any  # of multiprocessing's spawn context
    pipe: multiprocessing.connection.Connection
    training: Training | None = None  # what it is to do or does
    ready: bool = False  # it has loaded what it needs


class WorkerPool:
    """Long-lived worker processes, for hundreds of short trainings must not import torch each."""

    def __init__(self, queue: Queue, train: Train, bar: RunBar, size: int):
        self.queue, self.bar, self.size = queue, bar, size
        self.workers: list[Worker] = []
        self.train = cloudpickle.dumps(train)
        multiprocessing.resource_tracker.ensure_running()  # it would lift the block of SIGINT below

    def run(self) -> None:
        while True:
            self.hand_out()
            self.bar.here = {worker.training.folder for worker in self.workers if worker.training}
            if not self.bar.here:
                if not self.queue.waiting:
                    return
                self.queue.say_that_it_waits(self.bar)
            pipes = [worker.pipe for worker in self.workers]
            ends = [worker.process.sentinel for worker in self.workers]
            multiprocessing.connection.wait([*pipes, *ends], POLL_SECONDS)
            for worker in list(self.workers):
                ended = not worker.process.is_alive()  # before its last messages are read
                self.listen(worker)
                if ended:
                    self.bury(worker)
            self.bar.refresh()

    def hand_out(self) -> None:
        """Give every idle worker, and new ones up to the size of the pool, a training."""
        idle = [worker for worker in self.workers if not worker.training]
        while (idle or len(self.workers) < self.size) and (training := self.queue.next()):
            worker = idle.pop() if idle else self.start()
            worker.training = training
            if worker.ready:
                self.send(worker, pickle.dumps(training))

    def start(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs,), daemon=True)
        worker = Worker(process, ours)
        with without_interrupts():  # the child inherits that: a Ctrl-C is its parent's business
            process.start()
            self.workers.append(worker)
        theirs.close()
        return worker

    def send(self, worker: Worker, content: bytes) -> None:
        with contextlib.suppress(OSError):  # it has died: its sentinel tells
            worker.pipe.send_bytes(content)

    def listen(self, worker: Worker) -> None:
        with contextlib.suppress(EOFError, OSError):  # it has died: its sentinel tells
            while worker.pipe.poll():
                what, text, time_left = worker.pipe.recv()
                if what == "say":
                    self.bar.write(text, time_left)
                elif what == "started":
                    self.send(worker, self.train)
                elif what == "ready":
                    worker.ready = True
                    self.send(worker, pickle.dumps(worker.training))
                else:
                    training, worker.training = worker.training, None
                    self.queue.settle(training, what, text, self.bar)

    def bury(self, worker: Worker) -> None:
        """Name what a worker that died was doing; the next training gets a new worker."""
        self.workers.remove(worker)
        worker.process.join()
        how = how_it_ended(worker.process.exitcode)
        if not worker.ready:
            self.queue.waiting.appendleft(worker.training)
            self.size = len(self.workers)  # the next one would hardly do better
            if not self.workers:
                raise UserError(f"a worker process {how} before it could start: try --workers 1.")
        elif worker.training:
            sentence = (
                f"the worker training {worker.training.name} {how}; "
                "the same command, without --fresh, goes on from its checkpoint."
            )
            self.queue.settle(worker.training, "failed", sentence, self.bar)

    def stop(self) -> None:
        """End all workers; what they were doing goes on from its checkpoint another time."""
        with without_interrupts():
            for worker in self.workers:
                worker.process.terminate()
            for worker in self.workers:
                worker.process.join(5)
                worker.process.kill()
                worker.process.join()


def how_it_ended(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "was killed by signal 9 (memory may have run out: try fewer --workers)"
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}"


def serve(pipe: multiprocessing.connection.Connection) -> None:
    """The life of a worker process: it trains what its parent names, until the parent ends it."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    # Its own lock is a semaphore of the system, which Python would complain of after a kill.
    tqdm.set_lock(threading.RLock())
    # SIGTERM ends it as sys.exit does, so that libraries give back what they hold of the system.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def tell(what: str, text: str = "", time_left: bool = False) -> None:
        try:
            pipe.send((what, text, time_left))
        except OSError:  # the parent is gone
            os._exit(1)

    tell("started")
    train = pipe.recv()
    tell("ready")
    while True:
        try:
            training = pipe.recv()
        except EOFError:
            os._exit(1)
        progress = Progress(training, lambda line, time_left: tell("say", line, time_left))
        tell(*attempt_and_tell(training, train, progress))


def end_with_parent() -> None:
    """End this process, in the middle of whatever it does, when its parent is gone."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Put a Ctrl-C off until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
