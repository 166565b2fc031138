"""Trainings side by side, with toys that sleep; as a script, a command that trains such toys."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import psutil
import pytest

from collapse.runs.cluster import ClusterConfig
from collapse.runs.jobs import run_all
from collapse.runs.progress import Training
from collapse.runs.queue import Queue
from collapse.utils.errors import UserError

STEP_SECONDS = 0.01
SYSTEM_LOCKS = []


def toys(folder: Path, count: int, steps: int = 1) -> list[Training]:
    return [
        Training(f"model 1 seed {i}", folder / f"model1-seed{i}", "model1", 1, 1, steps, 0)
        for i in range(count)
    ]


def train(training: Training, progress) -> None:
    """Note name and process, sleep for every step, finish."""
    SYSTEM_LOCKS.append(multiprocessing.get_context("spawn").Lock())  # as libraries make some
    with open(training.folder.parent / "trained.txt", "a") as file:
        file.write(f"{training.name},{os.getpid()}\n")
    for _ in range(training.steps):
        time.sleep(STEP_SECONDS)
        progress.step()
    finish(training)


def finish(training: Training) -> None:
    (training.folder / "metrics.json").write_text("{}")


def trained(folder: Path) -> list[str]:
    """Names of the trainings that were begun, in their order."""
    return [line.split(",")[0] for line in (folder / "trained.txt").read_text().splitlines()]


def processes(folder: Path) -> set[str]:
    """Ids of the processes that trained."""
    return {line.split(",")[1] for line in (folder / "trained.txt").read_text().splitlines()}


def names(trainings) -> list[str]:
    return [training.name for training in trainings]


def start_command(folder: Path, count: int, steps: int, workers: int) -> subprocess.Popen:
    """This file as a script in a session of its own, as a shell gives every command one."""
    root = Path(__file__).parent.parent
    arguments = [str(folder), str(count), str(steps), str(workers)]
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.02)


def under_way(folder: Path, count: int) -> bool:
    """Whether so many trainings have been begun."""
    return (folder / "trained.txt").exists() and len(trained(folder)) == count


@contextlib.contextmanager
def running_command(folder: Path, count: int, workers: int):
    """A command in the middle of long trainings, with its process and those of its workers."""
    command = start_command(folder, count, 6000, workers)
    try:
        wait_until(lambda: under_way(folder, min(count, workers)))
        workers = psutil.Process(command.pid).children(recursive=True)
        yield command, [process for process in workers if process.is_running()]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        command.communicate()


def all_gone(processes) -> bool:
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    )


# Which training, where, and how often


def test_the_longest_training_comes_first_and_equal_ones_keep_their_order(tmp_path):
    a, b, c, d = toys(tmp_path, 4)
    longer = Training("longer", tmp_path / "longer", "model1", 1, 1, 3, 0)
    dearer = Training("dearer", tmp_path / "dearer", "model3", 4, 1, 1, 0)
    evaluated = Training("evaluated", tmp_path / "evaluated", "model1", 1, 2, 1, 2)
    queue = Queue([a, b, longer, c, dearer, d, evaluated], longest_first=True)
    found = names(queue.waiting)
    assert found == ["evaluated", "dearer", "longer", *names([a, b, c, d])]
    run_all([a, longer, b], train, workers=1)  # one after another: in the order that was asked for
    assert trained(tmp_path) == names([a, longer, b])


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_to_train_is_done_at_once(workers):
    run_all([], train, workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_finished_training_is_not_trained_again(tmp_path, workers):
    trainings = toys(tmp_path, 3)
    run_all(trainings[:1], train, workers=1)
    run_all(trainings, train, workers)
    assert sorted(trained(tmp_path)) == names(trainings)
    started = time.monotonic()
    run_all(trainings, train, workers)
    assert time.monotonic() - started < 0.5


def test_one_worker_trains_in_this_process_and_lets_interrupts_through(tmp_path):
    class Killed(BaseException):
        pass

    def killed(training, progress):
        raise Killed

    with pytest.raises(Killed):
        run_all(toys(tmp_path, 2), killed, workers=1)
    run_all(toys(tmp_path, 2), train, workers=1)  # the lock is free
    assert processes(tmp_path) == {str(os.getpid())}


def test_more_workers_train_a_closure_each_in_a_process_of_its_own(tmp_path):
    value, meeting = {"of": "this test"}, tmp_path / "meeting"
    meeting.mkdir()

    def meet(training, progress):
        (meeting / str(os.getpid())).touch()
        wait_until(lambda: len(list(meeting.iterdir())) == 2)  # both are here at one time
        (training.folder / "metrics.json").write_text(json.dumps(value))

    trainings = toys(tmp_path, 2)
    run_all(trainings, meet, workers=2)
    for training in trainings:
        assert json.loads((training.folder / "metrics.json").read_text()) == value
    assert str(os.getpid()) not in {path.name for path in meeting.iterdir()}


def test_a_hundred_short_trainings_share_two_workers(tmp_path):
    trainings = toys(tmp_path, 100)
    started = time.monotonic()
    run_all(trainings, train, workers=2)
    assert time.monotonic() - started < 15  # a new process for each would take a minute
    assert sorted(trained(tmp_path)) == sorted(names(trainings))
    assert len(processes(tmp_path)) == 2


# Several commands in one folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_training_that_is_held_elsewhere_comes_last_and_is_waited_for(tmp_path, workers, capsys):
    held, *others = trainings = toys(tmp_path, 3)
    held.folder.mkdir()
    lock = filelock.FileLock(held.folder / ".lock", thread_local=False)
    lock.acquire()

    def end_elsewhere():
        while not all(training.finished for training in others):
            time.sleep(0.05)
        time.sleep(1.5)  # long enough to be waited for
        finish(held)
        lock.release()

    other = threading.Thread(target=end_elsewhere)
    other.start()
    run_all(trainings, train, workers)
    other.join()
    assert sorted(trained(tmp_path)) == names(others)
    waiting = "waiting for model 1 seed 0, which another command trains"
    assert capsys.readouterr().out.splitlines() == [waiting]


def test_a_training_is_taken_over_from_a_command_that_was_killed(tmp_path):
    with running_command(tmp_path, 1, workers=1) as (command, _):
        threading.Timer(1.5, command.kill).start()
        run_all(toys(tmp_path, 1), train, workers=1)
    assert trained(tmp_path) == ["model 1 seed 0"] * 2  # by the one, then by the other


def test_two_commands_share_the_work_and_train_everything_once(tmp_path):
    commands = [start_command(tmp_path, 40, 5, workers) for workers in (2, 1)]
    for command in commands:
        _, errors = command.communicate(timeout=30)
        assert command.returncode == 0 and not errors
    trainings = toys(tmp_path, 40)
    assert sorted(trained(tmp_path)) == sorted(names(trainings))
    assert all(training.finished for training in trainings)


# What goes wrong


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_training_is_named_at_the_end_and_the_others_are_trained(tmp_path, workers):
    def some_fail(training, progress):
        if training.name in ("model 1 seed 0", "model 1 seed 2"):
            raise UserError(f"{training.name} diverged.")
        train(training, progress)

    with pytest.raises(UserError) as failed:
        run_all(toys(tmp_path, 4), some_fail, workers)
    sentences = [f"model 1 seed {seed} diverged." for seed in (0, 2)]
    first, second = str(failed.value).removeprefix("2 trainings failed: ").split(" / ")
    assert sorted([first, second]) == sentences
    assert sorted(trained(tmp_path)) == ["model 1 seed 1", "model 1 seed 3"]


def test_a_programming_error_ends_a_lone_process_at_once(tmp_path):
    def broken(training, progress):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_all(toys(tmp_path, 2), broken, workers=1)


def test_a_programming_error_in_a_worker_is_shown_once_and_its_training_named(tmp_path, capfd):
    def broken(training, progress):
        if training.name == "model 1 seed 1":
            raise ZeroDivisionError("no rows")
        train(training, progress)

    with pytest.raises(UserError, match=r"^model 1 seed 1 failed \(ZeroDivisionError: no rows\)"):
        run_all(toys(tmp_path, 3), broken, workers=2)
    assert capfd.readouterr().err.count("Traceback") == 1
    assert sorted(trained(tmp_path)) == ["model 1 seed 0", "model 1 seed 2"]


def test_a_training_without_a_result_is_an_error_and_no_endless_loop(tmp_path):
    with pytest.raises(UserError, match=r"left no metrics\.json"):
        run_all(toys(tmp_path, 1), lambda training, progress: None, workers=2)


def test_a_worker_that_is_killed_is_named_and_disturbs_no_other(tmp_path):
    def deadly(training, progress):
        train(training, progress)
        if training.name == "model 1 seed 1":
            (training.folder / "metrics.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match="worker training model 1 seed 1 was killed by signal 9"):
        run_all(toys(tmp_path, 6), deadly, workers=2)
    assert sorted(trained(tmp_path)) == names(toys(tmp_path, 6))  # each once, this one too
    run_all(toys(tmp_path, 6), train, workers=1)
    assert trained(tmp_path)[6:] == ["model 1 seed 1"]


def test_workers_that_cannot_start_end_the_command(tmp_path, capfd):
    class Unloadable:
        def __reduce__(self):
            return (sys.exit, (3,))

    with pytest.raises(UserError, match="ended with code 3 before it could start"):
        run_all(toys(tmp_path, 5), Unloadable(), workers=2)


@pytest.mark.parametrize("whom", ["the group", "the parent"])
def test_an_interrupt_ends_everything_without_a_word_from_the_workers(tmp_path, whom):
    with running_command(tmp_path, 4, workers=2) as (command, children):
        assert len(children) >= 2
        send = os.killpg if whom == "the group" else os.kill
        send(command.pid, signal.SIGINT)
        assert command.wait(5) == 130
        wait_until(lambda: all_gone(children), 2)
        assert command.stderr.read() == "stopped\n"
    run_all(toys(tmp_path, 1), train, workers=1)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    with running_command(tmp_path, 4, workers=2) as (command, children):
        assert len(children) >= 2
        command.kill()
        wait_until(lambda: all_gone(children), 2)
        assert "Traceback" not in command.stderr.read()
    for training in toys(tmp_path, 4):  # nothing bars the next start
        assert not training.finished
    run_all(toys(tmp_path, 4), train, workers=1)


# A cluster


@pytest.fixture
def slurm() -> None:
    if not shutil.which("sbatch"):
        pytest.skip("sbatch is not installed: see tests/slurm.sh")
    if subprocess.run(["scontrol", "ping"], capture_output=True).returncode:
        pytest.skip("no Slurm cluster answers: see tests/slurm.sh")


def test_without_slurm_a_cluster_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch"):
        run_all(toys(tmp_path, 1), train, 1, ClusterConfig())


def test_slurm_jobs_leave_what_a_local_run_leaves(slurm, tmp_path, capsys):
    def compute(training, progress):
        if training.name == "model 1 seed 2":
            raise UserError("model 1 seed 2 diverged.")
        value = sum(int(training.name[-1]) + 1 / 3 for _ in range(1000))
        (training.folder / "metrics.json").write_text(json.dumps(value))
        (training.folder / "job").write_text(os.environ.get("SLURM_JOB_ID", ""))

    local, jobs = toys(tmp_path / "local", 3), toys(tmp_path / "jobs", 3)
    for trainings, cluster in ((local, None), (jobs, ClusterConfig(minutes=2, memory=1))):
        with pytest.raises(UserError, match=r"^model 1 seed 2 diverged\.$"):
            run_all(trainings, compute, 2, cluster)
    for here, there in zip(local[:2], jobs, strict=False):
        results = [(training.folder / "metrics.json").read_text() for training in (here, there)]
        assert results[0] == results[1]
        assert (there.folder / "job").read_text() and not (here.folder / "job").read_text()


if __name__ == "__main__":
    root, count, steps, workers = Path(sys.argv[1]), *map(int, sys.argv[2:])
    try:
        run_all(toys(root, count, steps), train, workers)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
