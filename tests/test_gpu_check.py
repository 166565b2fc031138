"""The check that comes first on a new GPU: in miniature it runs on a CPU, goes on, and says why."""

import json
import re

import pytest
import torch
from conftest import fails, start_script

from studies import gpu_check, gpu_steps


def check(folder, steps: str, options: str = "--tiny") -> dict:
    start_script(gpu_check, f"{options} --output-dir {folder} --steps {steps}")
    return json.loads((folder / "gpu_check.json").read_text())["steps"]


def test_all_steps_run_in_miniature_and_print_what_was_expected_and_found(tmp_path, capsys):
    steps = check(tmp_path, "1 2 3 4 5 6 7 8 9")
    assert list(steps) == [str(number) for number in range(1, 10)]
    printed = re.findall("expected .+, found ", capsys.readouterr().out)
    assert len(printed) == sum(len(step["checks"]) for step in steps.values()) > 40
    assert all(c["right"] is not False for step in steps.values() for c in step["checks"])


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


def test_what_is_not_as_expected_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.STEPS, 4, lambda card: iter([("a number", "three", 4, False)]))
    assert "not as expected: step 4" in fails(check, capsys, tmp_path, "4")
    assert "between 1 and 9" in fails(check, capsys, tmp_path, "10")


def test_a_leak_is_found(tmp_path, monkeypatch, capsys):
    """Step 2, with a plan that holds on to a megabyte and more."""
    kept, make = [], gpu_steps.MemoryPlan
    monkeypatch.setattr(
        gpu_steps, "MemoryPlan", lambda *a: kept.append(torch.zeros(2**20)) or make(*a)
    )
    assert "step 2" in fails(check, capsys, tmp_path, "2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_sentence(tmp_path, capsys):
    assert "torch sees no CUDA device" in fails(check, capsys, tmp_path, "1", "")
