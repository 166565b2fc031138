"""The check that comes first on a new GPU: in miniature it runs on a CPU, goes on, and says why."""

import contextlib
import functools
import io
import json
import re
import sys
import types

import pytest
import torch
from conftest import fails, start_script

from studies import gpu_check


def check(folder, steps: str, options: str = "--tiny") -> dict:
    start_script(gpu_check, f"{options} --output-dir {folder} --steps {steps}")
    return json.loads((folder / "gpu_check.json").read_text())["steps"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A check of all steps: its file, what it printed, and trainer and rows of step 7's steps."""
    folder, profiles, profiled = tmp_path_factory.mktemp("gpu"), gpu_check.STEPS[7], []
    step = gpu_check.common.Trainer.step

    def noted(self, rows, rate):
        profiled.append((self, rows))
        return step(self, rows, rate)

    @functools.wraps(profiles)
    def watched(card):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(gpu_check.common.Trainer, "step", noted)
            yield from profiles(card)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu_check.STEPS, 7, watched)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            check(folder, "1 2 3 4 5 6 7 8")
    return json.loads((folder / "gpu_check.json").read_text()), printed.getvalue(), profiled


def test_all_steps_run_in_miniature_and_print_what_was_expected_and_found(whole):
    results, said, _ = whole
    steps = results["steps"]
    assert list(steps) == [str(number) for number in range(1, 9)]
    printed = re.findall("expected .+, found ", said)
    assert len(printed) == sum(len(step["checks"]) for step in steps.values()) > 40
    assert all(c["right"] is not False for step in steps.values() for c in step["checks"])
    (low, high) = results["ratio"]["busy"]
    assert said.splitlines()[-1] == f"busy time / time at the least: {low:.1f} to {high:.1f}"
    assert 0 < low <= high


def test_batches_of_the_profile_are_grouped_and_only_kernels_count(whole):
    results, _, rows = whole
    found = results["steps"]["7"]["checks"]
    assert sum(c["what"].startswith("model ") for c in found) == 4
    times = [
        float(x) for c in found if c["what"].startswith("model") for x in c["found"].split(",")
    ]
    assert all(time > 0 for time in times)
    assert rows
    padded = sum(len(r) * int(t.split.lengths[r].max()) for t, r in rows)
    true = sum(int(t.split.lengths[r].sum()) for t, r in rows)
    assert padded < 1.4 * true  # at random it is about twice as many


def test_as_rtx_has_bitsandbytes_choose_as_on_such_a_card(tmp_path, monkeypatch, capsys):
    """Its module for CUDA cannot be imported without one: this has its function alone."""
    kernels = types.ModuleType("ops")
    kernels._gpu_dispatch_props = lambda device_index: (132, 9, 0)
    monkeypatch.setitem(sys.modules, "bitsandbytes.backends.cuda.ops", kernels)
    gpu_check.pretend_rtx_4080()
    assert kernels._gpu_dispatch_props(0) == (76, 8, 9)
    monkeypatch.setitem(gpu_check.STEPS, 2, lambda card: iter([("a number", "3", 3, True)]))
    check(tmp_path, "2", "--tiny --as-rtx")
    assert json.loads((tmp_path / "gpu_check.json").read_text())["as_rtx"]
    assert "another kind of check" in fails(check, capsys, tmp_path, "2")  # results are not mixed


def test_steps_that_are_done_are_skipped_unless_asked_for_again(tmp_path, monkeypatch, capsys):
    done = []
    for number in gpu_check.STEPS:

        def step(card, number=number):
            done.append(number)
            if number == 3 and done.count(3) == 1:
                raise RuntimeError("broken")
            yield "a number", "three", 3, True

        monkeypatch.setitem(gpu_check.STEPS, number, step)
    assert list(check(tmp_path, "2 1")) == ["2", "1"] and done == [2, 1]
    error = fails(check, capsys, tmp_path, "1 2 3 5")
    assert "step 3" in error and done == [2, 1, 3, 5]  # what comes after a broken one runs
    steps = check(tmp_path, "1 2 3 5")
    assert done == [2, 1, 3, 5, 3] and set(steps) == {"1", "2", "3", "5"}
    steps = check(tmp_path, "2", "--tiny --fresh")
    assert done[-1] == 2 and len(done) == 6 and set(steps) == {"1", "2", "3", "5"}


def test_what_another_card_did_is_not_done_here(tmp_path, monkeypatch):
    """The published file is of one: somebody's first check starts anew."""
    done = []
    monkeypatch.setitem(gpu_check.STEPS, 2, lambda card: iter([("n", "3", done.append(2), True)]))
    check(tmp_path, "2")
    file = tmp_path / "gpu_check.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hardware": {"device": "Abacus"}}))
    check(tmp_path, "2")
    check(tmp_path, "2")
    assert done == [2, 2]


def test_what_is_not_as_expected_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.STEPS, 4, lambda card: iter([("a number", "three", 4, False)]))
    assert "not as expected: step 4" in fails(check, capsys, tmp_path, "4")
    assert "between 1 and 8" in fails(check, capsys, tmp_path, "10")


def test_a_leak_is_found(tmp_path, monkeypatch, capsys):
    """Step 2, with a plan that holds on to a megabyte and more."""
    kept, make = [], gpu_check.MemoryPlan
    monkeypatch.setattr(
        gpu_check, "MemoryPlan", lambda *a: kept.append(torch.zeros(2**20)) or make(*a)
    )
    assert "step 2" in fails(check, capsys, tmp_path, "2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_sentence(tmp_path, capsys):
    assert "torch sees no CUDA device" in fails(check, capsys, tmp_path, "1", "")
