"""--log-to: what a tracker gets of a run. None is installed here: modules stand in for them."""

import json
import sys
import types

import pytest
from conftest import fails, without_times

from collapse.config import TRACKERS
from collapse.runs.tracking import numbers_of
from collapse.training import loop


@pytest.fixture(params=TRACKERS)
def tracker(request, monkeypatch):
    """A tracker's kind, and its runs as the module's calls show them."""
    runs: dict[str, dict] = {}

    class Run:
        """Of trackio and wandb; a SummaryWriter, too."""

        stops_at = None  # a step at which its process is killed

        def __init__(self, key, details=None):
            self.run = runs.setdefault(key, {"logged": [], "starts": 0, "ends": 0})
            self.run |= {"details": details, "starts": self.run["starts"] + 1}

        def log(self, numbers, step):
            if step == Run.stops_at:
                raise KeyboardInterrupt
            self.run["logged"].append((step, numbers))

        def add_scalar(self, key, value, step):
            self.log({key: value}, step)

        def finish(self):
            self.run["ends"] += 1

        close = finish

    def init(project, name, group, config, resume, **own):
        assert resume == "allow" and bool(own) == (request.param == "wandb")
        return Run(own.get("id", name), {"name": name, "group": group, "config": config})

    module = types.ModuleType(request.param)
    module.init, module.SummaryWriter = init, lambda folder: Run(str(folder))
    monkeypatch.setitem(sys.modules, TRACKERS[request.param], module)
    monkeypatch.setattr(loop, "LOG_STEPS", 2)
    return request.param, runs, Run


def lines_of(folder, model="model1"):
    file = folder / f"state/{model}-seed1/metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_training_is_a_run_with_the_numbers_of_its_metrics(
    tracker, run, undisturbed, tmp_path
):
    kind, runs, _ = tracker
    results = run(f"--models 1 2 --seeds 1 --measure-every 4 --log-to {kind}")
    assert len(runs) == 2
    for model, found in zip(("model1", "model2"), runs.values(), strict=True):
        expected = {
            (line["step"], key, value)
            for line in lines_of(tmp_path / "out", model)
            for key, value in numbers_of(line).items()
        }
        assert {key.split("/")[0] for _, key, _ in expected} >= {"loss", "validation", "measured"}
        logged = {(step, key, v) for step, numbers in found["logged"] for key, v in numbers.items()}
        assert logged == expected
        assert found["starts"] == found["ends"] == 1
        if kind != "tensorboard":
            assert found["details"]["config"]["seed"] == 1 and "SST-2" in found["details"]["group"]
    before = json.loads((undisturbed / "results.json").read_text())
    for model in ("model1", "model2"):
        ours, theirs = (without_times(part["models"][model]["1"]) for part in (results, before))
        assert ours["val"] == theirs["val"]


def test_a_training_that_goes_on_goes_on_in_its_run(tracker, run, tmp_path):
    kind, runs, fake = tracker
    fake.stops_at = 8  # of 10 steps, in the second epoch
    with pytest.raises(SystemExit):
        run(f"--models 1 --seeds 1 --log-to {kind}")
    fake.stops_at = None
    run(f"--models 1 --seeds 1 --log-to {kind}")
    (found,) = runs.values()
    assert found["starts"] == found["ends"] == 2
    assert {step for step, _ in found["logged"]} == {
        line["step"] for line in lines_of(tmp_path / "out")
    }


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_tracker_that_is_not_installed_is_named_before_anything_trains(
    kind, run, monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(sys.modules, TRACKERS[kind], None)
    assert f"pip install {kind}" in fails(run, capsys, f"--log-to {kind}")
    assert not (tmp_path / "out").exists()
