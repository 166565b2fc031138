"""Commands as a shell starts them: killed, interrupted, several at once, out of disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import filelock
import psutil
import pytest
from conftest import TINY, fails, without_times

from collapse.runs import engine
from collapse.utils.files import ROOT

LONG = "--models 3 1 --epochs 60"  # long enough to be killed in its middle


def start(line: str, folder, data_dir) -> subprocess.Popen:
    """experiment.py in a session of its own, as a shell gives every command one."""
    line = f"--data-dir {data_dir} --output-dir {folder} {TINY} {line}"
    return subprocess.Popen(
        [sys.executable, str(ROOT / "experiment.py"), *line.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def results_of(folder) -> dict:
    return without_times(json.loads((folder / "results.json").read_text()))


def workers_of(command: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(command.pid).children()


def wait_for(files, count: int, command: subprocess.Popen) -> None:
    """Until so many files that a training leaves are there."""
    end = time.monotonic() + 200
    while len(list(files())) < count:
        assert command.poll() is None and time.monotonic() < end, command.communicate()
        time.sleep(0.01)


@pytest.fixture
def long_command(data_dir, tmp_path):
    """Two trainings side by side, in their middle."""
    folder = tmp_path / "out"
    command = start(f"{LONG} --seeds 1 --workers 2", folder, data_dir)
    try:
        wait_for(lambda: folder.glob("state/*/training.safetensors"), 2, command)
        yield command
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
        command.communicate()


def test_killed_at_random_moments_runs_end_in_the_numbers_of_one_that_nothing_disturbed():
    """tests/kill.py does it as often as one likes."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/kill.py"), "--kills", "6", "--seed", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("6 kills in ")


def test_two_commands_at_once_train_everything_once_and_publish_as_one(
    undisturbed, data_dir, tmp_path
):
    folder = tmp_path / "out"
    commands = [
        start(f"--seeds {seeds} --models {models}", folder, data_dir)
        for seeds, models in (("1 2", "1 2 3"), ("2 1", "3 2 1"))
    ]
    said = [command.communicate() for command in commands]
    assert [command.returncode for command in commands] == [0, 0], said
    lines = "\n".join(out for out, _ in said)
    for number in (1, 2, 3):
        for seed in (1, 2):
            assert lines.count(f"model {number} seed {seed}  epoch 2/2") == 1
    assert all("epoch 2/2" in out for out, _ in said)  # each did a part of it
    assert results_of(folder) == results_of(undisturbed)


def test_two_workers_give_the_numbers_of_one_in_any_order_of_models(
    undisturbed, data_dir, tmp_path, run
):
    command = start("--models 2 3 1 --seeds 1 2 --workers 2", tmp_path / "two", data_dir)
    assert not command.communicate()[1] and command.returncode == 0
    assert results_of(tmp_path / "two") == results_of(undisturbed)
    assert without_times(run("--models 3 1 2 --seeds 2 1")) == results_of(undisturbed)


def test_a_worker_killed_in_its_middle_is_named_and_the_next_start_ends_in_the_same_numbers(
    long_command, run, tmp_path
):
    workers_of(long_command)[0].kill()
    _, error = long_command.communicate()
    published = set(results_of(tmp_path / "out")["models"])
    assert long_command.returncode == 2
    (lost,) = {"model1", "model3"} - published
    assert error == (
        f"error: the worker training model {lost[-1]} seed 1 was killed by signal 9 (memory may "
        "have run out: try fewer --workers); the same command, without --fresh, goes on from its "
        "checkpoint.\n"
    )
    whole = run(f"{LONG} --seeds 1", folder=tmp_path / "whole")
    assert without_times(run(f"{LONG} --seeds 1")) == without_times(whole)


def test_an_interrupt_is_one_sentence_and_leaves_no_process(long_command):
    family = psutil.Process(long_command.pid).children(recursive=True)
    assert len(workers_of(long_command)) == 2
    os.killpg(long_command.pid, signal.SIGINT)
    _, error = long_command.communicate()
    assert long_command.returncode == 130
    assert error == (
        "error: stopped; the same command, without --fresh, goes on from the last checkpoint.\n"
    )
    assert not psutil.wait_procs(family, timeout=5)[1]


def test_what_another_command_finished_and_could_not_publish_is_published(
    run, undisturbed, tmp_path, monkeypatch
):
    """It was killed between a training's metrics.json and results.json, while this one waited."""
    state = tmp_path / "out/state"
    run("--seeds 1 --models 3")
    (state / "model1-seed1").mkdir()
    lock = filelock.FileLock(state / "model1-seed1/.lock", thread_local=False)
    lock.acquire()

    def killed_before_it_publishes():
        shutil.copy(undisturbed / "state/model1-seed1/metrics.json", state / "model1-seed1")
        lock.release()

    threading.Timer(1.5, killed_before_it_publishes).start()
    assert list(run("--seeds 1 --models 3 1")["models"]) == ["model1", "model3"]


def test_a_command_does_not_go_on_in_a_folder_that_another_study_has_taken(
    run, capsys, tmp_path, monkeypatch
):
    """--fresh came before the first command began to work; until then it holds no lock."""
    plan_workers, taken = engine.plan_workers, []

    def take_over(*arguments):
        if not taken:
            taken.append(True)
            run("--models 2 --lm-weight 0.25 --fresh")
        return plan_workers(*arguments)

    monkeypatch.setattr(engine, "plan_workers", take_over)
    error = fails(run, capsys, "--models 1 2")
    assert "lm_weight is 0.25 there and 0.5 here" in error and "--output-dir" in error
    assert list(results_of(tmp_path / "out")["models"]) == ["model2"]


def test_fresh_after_a_kill_begins_anew(long_command, run, undisturbed, tmp_path):
    family = psutil.Process(long_command.pid).children(recursive=True)
    os.killpg(long_command.pid, signal.SIGKILL)
    long_command.wait()
    psutil.wait_procs(family, timeout=30)  # a worker that is dying still holds its lock
    results = run("--models 1 --seeds 1 --fresh")
    expected = results_of(undisturbed)["models"]["model1"]["1"]
    assert without_times(results)["models"] == {"model1": {"1": expected}}


@pytest.mark.parametrize(
    "full", ["results.json", "results.csv", "metrics.json", "training.safetensors"]
)
def test_a_disk_that_is_full_while_it_publishes_leaves_the_old_results(
    run, capsys, undisturbed, monkeypatch, tmp_path, full
):
    run("--seeds 1 --models 1 3")
    before = (tmp_path / "out/results.json").read_bytes()
    replace = os.replace

    def full_disk(source, target):
        if target.name == full:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        error = fails(run, capsys, "--seeds 1 2 --models 1 3")
        assert "the disk is full" in error and "goes on from the last checkpoint" in error
    if full != "results.csv":  # which is written after it
        assert (tmp_path / "out/results.json").read_bytes() == before
    assert without_times(run("--seeds 1 2")) == results_of(undisturbed)
