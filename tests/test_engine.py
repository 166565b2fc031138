"""Jobs side by side, with toys that sleep; as a script, a command that runs such toys."""

import contextlib
import io
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

from collapse.config import RunConfig
from collapse.runs import engine, progress
from collapse.runs.engine import plan_workers, run_all
from collapse.runs.progress import Job, Progress, RunBar
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT

STEP_SECONDS = 0.01
SYSTEM_LOCKS = []
SLURM = {"timeout_min": 5, "mem_gb": 1, "cpus_per_task": 1}


def toys(folder: Path, count: int, steps: int = 1) -> list[Job]:
    return [Job(f"model 1 seed {i}", folder / f"model1-seed{i}", steps) for i in range(count)]


def train(job: Job, progress: Progress) -> None:
    """Note name and process, sleep for every step, finish."""
    SYSTEM_LOCKS.append(multiprocessing.get_context("spawn").Lock())  # as libraries make some
    with open(job.folder.parent / "trained.txt", "a") as file:
        file.write(f"{job.name},{os.getpid()}\n")
    for _ in range(job.steps):
        time.sleep(STEP_SECONDS)
        progress.step()
    finish(job)


def finish(job: Job, value: object = None) -> None:
    (job.folder / "metrics.json").write_text(json.dumps(value))


def trained(folder: Path) -> list[str]:
    """Names of the jobs that were begun, in their order."""
    file = folder / "trained.txt"
    return [line.split(",")[0] for line in file.read_text().splitlines()] if file.exists() else []


def processes(folder: Path) -> set[int]:
    """Ids of the processes that trained."""
    lines = (folder / "trained.txt").read_text().splitlines()
    return {int(line.split(",")[1]) for line in lines}


def names(jobs) -> list[str]:
    return [job.name for job in jobs]


def shared_folders(folder: Path) -> list[Path]:
    return list(folder.glob(".command-*"))


def start_command(folder: Path, count: int, steps: int, *more: str, **environment: str):
    """This file as a script in a session of its own, as a shell gives every command one."""
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, (folder, count, steps, *more))],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.02)


@contextlib.contextmanager
def running_command(folder: Path, count: int, workers: int, *more: str, steps: int = 6000):
    """A command in the middle of long jobs, with its process and those of its workers."""
    command = start_command(folder, count, steps, workers, *more)
    try:
        wait_until(lambda: len(trained(folder)) >= min(count, workers))
        yield command, [psutil.Process(process) for process in processes(folder)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        command.communicate()


def all_gone(processes) -> bool:
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    )


# Which job, where, and how often


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_to_do_is_done_at_once_and_leaves_nothing(tmp_path, workers):
    run_all([], train, workers)
    done = toys(tmp_path, 3)
    run_all(done[1:], train, workers=1)
    run_all(done, train, workers)
    started = time.monotonic()
    run_all(done, train, workers)
    assert time.monotonic() - started < 0.5
    assert trained(tmp_path) == names([*done[1:], done[0]]) and not shared_folders(tmp_path)


def test_one_worker_works_in_this_process_in_the_given_order_and_lets_interrupts_through(tmp_path):
    class Killed(BaseException):
        pass

    def killed(job, progress):
        raise Killed

    jobs = [*toys(tmp_path, 2), Job("longer", tmp_path / "longer", 3)]
    with pytest.raises(Killed):
        run_all(jobs, killed, workers=1)
    run_all(jobs, train, workers=1)  # lock and mark are gone
    assert trained(tmp_path) == names(jobs) and processes(tmp_path) == {os.getpid()}


def test_workers_run_a_closure_side_by_side_the_longest_job_first(tmp_path):
    value = {"of": "this test"}

    def meet(job, progress):
        train(job, progress)
        # The first two are here at one time.
        wait_until(lambda: len(processes(tmp_path)) == 2)
        finish(job, value)

    evaluated = Job("evaluated", tmp_path / "evaluated", 1, evaluations=2, evaluation_cost=2)
    dearer = Job("dearer", tmp_path / "dearer", 1, cost=4)
    jobs = [*toys(tmp_path, 100), evaluated, dearer]
    started = time.monotonic()
    run_all(jobs, meet, workers=2)
    assert time.monotonic() - started < 30  # a new process for each would take minutes
    begun = trained(tmp_path)
    assert sorted(begun) == sorted(names(jobs)) and set(begun[:2]) == {"evaluated", "dearer"}
    assert len(processes(tmp_path)) == 2 and os.getpid() not in processes(tmp_path)
    assert all(json.loads((job.folder / "metrics.json").read_text()) == value for job in jobs)


def test_workers_take_a_core_or_a_gpu_each(tmp_path, monkeypatch):
    import torch  # here alone: every worker imports this file

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert plan_workers(RunConfig(), cpu, 99) == (8, None)
    assert plan_workers(RunConfig(threads=3), cpu, 99) == (2, None)
    assert plan_workers(RunConfig(workers=5), cpu, 2) == (2, None)
    workers, cluster = plan_workers(RunConfig(cluster="slurm", cluster_minutes=9), cuda, 3)
    assert workers == 3 and cluster["timeout_min"] == 9 and cluster["gpus_per_node"] == 1
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert plan_workers(RunConfig(), cpu, 99) == (4, None)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert plan_workers(RunConfig(), cuda, 99) == (2, None)
    assert [engine.share_of_device(workers, None) for workers in (1, 2, 3)] == [1, 1, 0.5]

    def meet(job, progress):
        finish(job, os.environ["CUDA_VISIBLE_DEVICES"])
        wait_until(lambda: all(job.finished for job in jobs))

    jobs = toys(tmp_path, 2)
    run_all(jobs, meet, workers=2)
    found = [json.loads((job.folder / "metrics.json").read_text()) for job in jobs]
    assert sorted(found) == ["5", "7"]


# Several commands in one folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_is_held_elsewhere_comes_last_and_is_waited_for(tmp_path, workers, capfd):
    held, *others = jobs = toys(tmp_path, 3)
    held.folder.mkdir()
    lock = filelock.FileLock(held.folder / ".lock", thread_local=False)
    lock.acquire()

    def end_elsewhere():
        wait_until(lambda: all(job.finished for job in others))
        time.sleep(2.5)  # long enough to be waited for
        finish(held)
        lock.release()

    other = threading.Thread(target=end_elsewhere)
    other.start()
    run_all(jobs, train, workers)
    other.join()
    assert sorted(trained(tmp_path)) == names(others)
    waiting = "waiting for model 1 seed 0, which another command trains"
    assert capfd.readouterr().out.splitlines() == [waiting]


def test_two_commands_share_the_work_and_do_everything_once(tmp_path):
    commands = [start_command(tmp_path, 40, 5, workers) for workers in (2, 1)]
    for command in commands:
        _, errors = command.communicate(timeout=60)
        assert command.returncode == 0 and not errors
    jobs = toys(tmp_path, 40)
    assert sorted(trained(tmp_path)) == sorted(names(jobs)) and all(job.finished for job in jobs)
    assert not shared_folders(tmp_path)


# What goes wrong


@pytest.mark.parametrize("workers", [1, 2])
def test_what_fails_is_named_at_the_end_tried_once_and_stops_no_other(tmp_path, workers, capfd):
    def some_fail(job, progress):
        train(job, progress)
        seed = int(job.name[-1])
        if seed < len(expected):
            (job.folder / "metrics.json").unlink()
            if seed == 0:
                raise UserError("its loss is not finite.")
            if seed == 2:
                raise ZeroDivisionError("no rows")
            if seed == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        else:
            time.sleep(0.3)  # so that there are others that go on when a command looks

    expected = [
        "model 1 seed 0: its loss is not finite.",
        "the training of model 1 seed 1 left no metrics.json",
        "model 1 seed 2 failed (ZeroDivisionError: no rows); its traceback is above.",
        "the worker training model 1 seed 3 was killed by signal 9 (memory may have run out: try "
        "fewer --workers); the same command, without --fresh, goes on from its checkpoint.",
    ]
    expected = expected[: 4 if workers > 1 else 2]  # the others would end a lone process
    jobs = toys(tmp_path, 8)
    with pytest.raises(UserError) as failed:
        run_all(jobs, some_fail, workers)
    said, errors = capfd.readouterr()
    for sentence in expected:
        assert sentence in str(failed.value) and f"the others go on: {sentence}" in said
    assert str(failed.value).startswith(f"{len(expected)} jobs failed: ")
    assert errors.count("Traceback") == (workers == 2)
    assert sorted(trained(tmp_path)) == names(jobs) and not shared_folders(tmp_path)
    run_all(jobs, train, workers=1)  # the next command tries again
    assert sorted(trained(tmp_path)[8:]) == names(job for job in jobs[: len(expected)])


def test_a_programming_error_ends_a_lone_process_at_once(tmp_path):
    def broken(job, progress):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_all(toys(tmp_path, 2), broken, workers=1)


def test_workers_that_cannot_start_end_the_command(tmp_path, capfd):
    class Unloadable:
        def __reduce__(self):
            return (sys.exit, (3,))

    with pytest.raises(UserError, match="no worker process is left, the last one ended with code"):
        run_all(toys(tmp_path, 5), Unloadable(), workers=2)


@pytest.mark.parametrize("whom", ["the group", "the parent", "the group, twice"])
def test_an_interrupt_ends_everything_without_a_word_from_the_workers(tmp_path, whom):
    with running_command(tmp_path, 4, 2) as (command, workers):
        send = os.kill if whom == "the parent" else os.killpg
        send(command.pid, signal.SIGINT)
        if whom == "the group, twice":
            time.sleep(0.02)
            send(command.pid, signal.SIGINT)
        assert command.wait(20) in (130, -signal.SIGINT)  # twice: in its own last words
        wait_until(lambda: all_gone(workers), 5)
        if whom != "the group, twice":
            assert command.stderr.read() == "stopped\n"
    run_all(toys(tmp_path, 1), train, workers=1)


def test_workers_end_with_a_command_that_is_killed_and_another_one_takes_over(tmp_path):
    with running_command(tmp_path, 4, 2) as (command, workers):
        command.kill()
        wait_until(lambda: all_gone(workers), 5)
        assert "Traceback" not in command.stderr.read()
    jobs = toys(tmp_path, 4)
    assert not any(job.finished for job in jobs) and len(shared_folders(tmp_path)) == 1
    run_all(jobs, train, workers=1)
    assert sorted(trained(tmp_path)[2:]) == names(jobs) and not shared_folders(tmp_path)


def test_a_command_needs_neither_a_temporary_folder_nor_a_network(tmp_path):
    alone = ["unshare", "--net"] if not subprocess.call(["unshare", "--net", "true"]) else []
    line = [*alone, sys.executable, __file__, str(tmp_path), "3", "1", "2"]
    places = {"PYTHONPATH": str(ROOT), "TMPDIR": "/nowhere/" + "long" * 50}
    subprocess.run(line, env=os.environ | places, check=True)
    assert sorted(trained(tmp_path)) == names(toys(tmp_path, 3))


# What a job reports, and what a run prints


@pytest.fixture
def clock(monkeypatch):
    """Time as the test sets it: clock.now, in seconds."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    monkeypatch.setattr(progress, "time", clock := Clock())
    return clock


def test_reports_come_at_most_once_a_second_and_tell_all_that_is_done(tmp_path, clock, monkeypatch):
    (job,) = toys(tmp_path, 1, 9999)
    job.folder.mkdir()
    reports, write = [], progress.write_json
    monkeypatch.setattr(progress, "write_json", lambda *report: reports.append(write(*report)))
    report = Progress(job, lambda *_: None)
    report.resume_at(steps=50, evaluations=2)
    for _ in range(1000):
        clock.now += 0.0101
        report.step()
    assert 10 <= len(reports) <= 12
    clock.now += 1
    report.evaluation()
    stored = json.loads((job.folder / "progress.json").read_text())
    assert stored == {"steps": 1050, "evaluations": 3} and job.work_done() == 1050


def test_a_damaged_report_stops_no_run(tmp_path):
    jobs = toys(tmp_path, 4)
    for job, content in zip(
        jobs, (b'{"steps": 1', b'{"left": 3}', b"[]", b"\xff\x00"), strict=True
    ):
        job.folder.mkdir()
        (job.folder / "progress.json").write_bytes(content)
    assert [job.work_done() for job in jobs] == [0, 0, 0, 0]


def test_the_time_left_follows_from_the_work_done_since_the_start(tmp_path, clock, capsys):
    a = Job("a", tmp_path / "a", 100, evaluations=4, evaluation_cost=5)  # 120
    b = Job("b", tmp_path / "b", 60, cost=3)  # 180
    for job in (a, b):
        job.folder.mkdir()

    def report(job, steps, evaluations):
        text = json.dumps({"steps": steps, "evaluations": evaluations})
        (job.folder / "progress.json").write_text(text)

    report(a, 40, 0)  # by an earlier start, of which 10 are lost
    bar = RunBar([a, b])

    def shown(minutes: float) -> str:
        clock.now += 60 * minutes
        bar.write("line", time_left=True)
        return capsys.readouterr().out.strip()

    report(a, 30, 0)
    assert shown(1) == "line"  # no work is done yet
    report(a, 40, 2)  # 20 in 2 minutes; 70 and 180 are left
    assert shown(1) == "line  about 25 min left"
    report(b, 30, 0)  # 110 in 4 minutes, whichever command did it; 70 and 90 are left
    assert shown(2) == "line  about 6 min left"
    bar.drop(b)  # it failed
    assert shown(0) == "line  about 3 min left"
    finish(a)
    assert shown(3) == "line  about 0 min left"


@pytest.mark.parametrize("workers", [1, 2])
def test_lines_come_whole_and_may_end_in_the_time_left(tmp_path, workers, capfd):
    def talk(job, progress):
        for number in range(50):
            progress.step()
            progress.say(f"{job.name} line {number} " + "x" * 200)
        progress.say(f"{job.name} ends", time_left=True)
        finish(job, progress.alone)

    jobs = toys(tmp_path, 2, steps=50)
    run_all(jobs, talk, workers)
    out, err = capfd.readouterr()
    expected = {f"model 1 seed {i} line {j} " + "x" * 200 for i in range(2) for j in range(50)}
    ends = [line for line in out.splitlines() if "ends" in line]
    assert sorted(set(out.splitlines()) - set(ends)) == sorted(expected)
    assert all(line.endswith("ends  about 0 min left") for line in ends) and err == ""
    # A lone process may show a bar of its own.
    alone = [json.loads((job.folder / "metrics.json").read_text()) for job in jobs]
    assert alone == [workers == 1] * 2


def test_the_bar_ends_at_all_of_the_work(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run_all(toys(tmp_path, 3, steps=2), train, workers=1)
    assert "whole run 100%" in terminal.getvalue()


# A cluster: tests/slurm.sh runs these on one of this machine


@pytest.fixture
def slurm() -> None:
    if not shutil.which("sbatch"):
        pytest.skip("sbatch is not installed: see tests/slurm.sh")
    if subprocess.run(["scontrol", "ping"], capture_output=True).returncode:
        pytest.skip("no Slurm cluster answers: see tests/slurm.sh")


def queued() -> list[str]:
    """Ids of the Slurm jobs that are there."""
    squeue = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    return subprocess.run(squeue, capture_output=True, text=True, check=True).stdout.split()


def test_without_slurm_a_cluster_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch"):
        run_all(toys(tmp_path, 1), train, 1, SLURM)


def test_slurm_jobs_do_what_local_workers_do(slurm, tmp_path, capfd):
    def compute(job, progress):
        if job.name == "model 1 seed 2":
            raise UserError("model 1 seed 2 diverged.")
        progress.say(f"{job.name} is here")
        finish(job, "SLURM_JOB_ID" in os.environ)

    jobs = toys(tmp_path / "state", 5)
    with pytest.raises(UserError, match=r"^model 1 seed 2 diverged\.$"):
        run_all(jobs, compute, 2, SLURM)
    assert [job.finished for job in jobs] == [True, True, False, True, True]
    assert json.loads((jobs[0].folder / "metrics.json").read_text()) is True
    said = capfd.readouterr().out
    assert "2 Slurm jobs queued" in said and said.count("is here") == 4
    assert len(list(tmp_path.glob("state/slurm/*_log.out"))) == 2


def test_a_slurm_job_whose_node_is_wanted_is_queued_again_and_goes_on(slurm, tmp_path):
    with running_command(tmp_path / "state", 1, 1, "slurm") as (command, _):
        (number,) = queued()
        subprocess.run(["scancel", "--signal=USR2", number], check=True)
        wait_until(
            lambda: len(trained(tmp_path / "state")) == 2, 240
        )  # Slurm waits for two minutes
        assert command.poll() is None and queued() == [number]
        os.killpg(command.pid, signal.SIGINT)
        command.wait(20)
    wait_until(lambda: not queued())


@pytest.mark.parametrize("killed", [1, 2])
def test_slurm_workers_that_are_killed_are_named_and_stop_no_other(slurm, tmp_path, killed):
    state = tmp_path / "state"
    with running_command(state, 4, 2, "slurm", steps=400) as (command, workers):
        for worker in workers[:killed]:
            worker.kill()
        out, error = command.communicate(timeout=120)
    wait_until(lambda: not queued())
    assert command.returncode == 2
    assert out.count("ended without a result (its log is ") == killed
    assert sum(job.finished for job in toys(state, 4)) == (3 if killed == 1 else 0)
    assert ("ended early" in error) == (killed == 2)


def test_a_slurm_command_that_is_interrupted_cancels_its_jobs(slurm, tmp_path):
    with running_command(tmp_path / "state", 4, 2, "slurm") as (command, workers):
        os.killpg(command.pid, signal.SIGINT)
        assert command.wait(20) == 130
        wait_until(lambda: all_gone(workers), 5)
        wait_until(lambda: not queued(), 30)


def test_slurm_jobs_outlive_a_command_that_is_killed(slurm, tmp_path):
    state = tmp_path / "state"
    with running_command(state, 2, 2, "slurm") as (command, workers):
        command.kill()
        command.wait()
        run_all(toys(state, 4)[2:], train, workers=1)  # the folder that they share stays
        assert not all_gone(workers) and len(shared_folders(state)) == 1
        subprocess.run(["scancel", *queued()], check=True)
        wait_until(lambda: all_gone(workers), 5)
    run_all(toys(state, 4), train, workers=1)
    assert not shared_folders(state)


if __name__ == "__main__":
    root, count, steps, workers = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    try:
        run_all(toys(root, count, steps), train, workers, SLURM if sys.argv[5:] else None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
