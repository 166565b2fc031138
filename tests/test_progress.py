"""What trainings report and print, and when all will be done: closed forms, simulated runs."""

import io
import itertools
import json
import sys
import types

import numpy as np
import pytest
from test_jobs import finish, toys, train

import collapse.runs.progress
from collapse.runs.jobs import run_all
from collapse.runs.progress import (
    Progress,
    Report,
    RunBar,
    Training,
    minutes_left,
    share_done,
    unit_seconds,
)
from collapse.utils.errors import UserError


def training(tmp_path, kind="a", cost=1.0, evaluation_cost=1.0, steps=100, evaluations=0, name=""):
    return Training(
        kind, tmp_path / (name or kind), kind, cost, evaluation_cost, steps, evaluations
    )


def measured(steps=0, seconds=1.0, evaluations=0, evaluation_seconds=0.0) -> Report:
    """A report of so many steps at these seconds each."""
    return Report(
        steps, evaluations, steps, steps * seconds, evaluations, evaluations * evaluation_seconds
    )


@pytest.fixture
def clock(monkeypatch):
    """Time as the test sets it: clock.now, in seconds."""
    clock = types.SimpleNamespace(now=1000.0)
    fake = types.SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(collapse.runs.progress, "time", fake)
    return clock


# What a training reports


@pytest.fixture
def reporting(tmp_path, clock):
    """A training that may report, and a function that reads what it has reported."""
    toy = training(tmp_path, evaluations=3)
    toy.folder.mkdir()
    return Progress(toy, lambda *_: None), lambda: RunBar([toy], 1)


def report_of(bar: RunBar) -> Report:
    bar.refresh()
    return bar.reports[bar.trainings[0].folder]


def test_steps_are_timed_from_the_first_one_on_and_evaluations_apart(reporting, clock):
    progress, bar = reporting
    clock.now += 500  # loading
    for _ in range(5):
        clock.now += 2
        progress.step()
    clock.now += 11  # an evaluation of 10 seconds, and 1 second of saving
    progress.evaluation(10)
    clock.now += 2
    progress.step()
    report = report_of(bar())
    assert (report.steps, report.timed_steps, report.step_seconds) == (6, 5, 11)
    assert (report.evaluations, report.timed_evaluations, report.evaluation_seconds) == (1, 1, 10)


def test_what_an_earlier_start_has_done_is_not_timed(reporting, clock):
    progress, bar = reporting
    progress.go_on_after(steps=50, evaluations=2)
    for _ in range(3):
        clock.now += 2
        progress.step()
    report = report_of(bar())
    assert (report.steps, report.evaluations) == (53, 2)
    assert (report.timed_steps, report.step_seconds, report.timed_evaluations) == (2, 4, 0)


def test_a_finished_training_has_spread_all_of_its_time(reporting, clock):
    progress, bar = reporting
    clock.now += 6  # loading
    for _ in range(10):
        clock.now += 1
        progress.step()
    clock.now += 5
    progress.evaluation(5)
    clock.now += 4  # saving
    progress.finish()
    report = report_of(bar())
    assert (report.timed_steps, report.step_seconds, report.evaluation_seconds) == (10, 20, 5)


def test_reports_are_written_at_most_once_a_second(reporting, clock, monkeypatch):
    progress, _ = reporting
    writes = []
    monkeypatch.setattr(collapse.runs.progress, "write_json", lambda *write: writes.append(write))
    for _ in range(1000):
        clock.now += 0.0101
        progress.step()
    assert 9 <= len(writes) <= 11


def test_a_damaged_report_stops_no_run(tmp_path):
    trainings = [training(tmp_path, name=name) for name in ("cut", "foreign", "absent", "binary")]
    for toy, content in zip(
        trainings, (b'{"steps": 1', b'{"left": 3}', None, b"\xff\x00"), strict=True
    ):
        toy.folder.mkdir()
        if content:
            (toy.folder / "progress.json").write_bytes(content)
    bar = RunBar(trainings, 1)
    bar.refresh()
    bar.close()
    assert not bar.reports


# What a run prints


@pytest.mark.parametrize("workers", [1, 2])
def test_lines_come_whole_and_may_end_in_the_time_left(tmp_path, workers, capfd):
    def talk(training, progress):
        for number in range(50):
            progress.step()
            progress.say(f"{training.name} line {number} " + "x" * 200)
        progress.say(f"{training.name} ends", time_left=True)
        finish(training)

    run_all(toys(tmp_path, 2, steps=50), talk, workers)
    out, err = capfd.readouterr()
    expected = {f"model 1 seed {i} line {j} " + "x" * 200 for i in range(2) for j in range(50)}
    ends = [line for line in out.splitlines() if "ends" in line]
    assert sorted(set(out.splitlines()) - set(ends)) == sorted(expected)
    assert all(line.endswith("ends  about 0 min left") for line in ends) and err == ""


def test_nobody_waits_for_what_has_failed(tmp_path, capsys):
    long = Training("long", tmp_path / "long", "model1", 1, 1, 10**6, 0)

    def fail_or_talk(training, progress):
        if training is long:
            raise UserError("long diverged.")
        train(training, progress)
        progress.say("done", time_left=True)

    with pytest.raises(UserError, match=r"^long diverged\.$"):
        run_all([long, *toys(tmp_path, 1, steps=30)], fail_or_talk, workers=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["one failed, the others go on: long diverged.", "done  about 0 min left"]


def test_only_a_lone_training_may_show_a_bar_of_its_own(tmp_path):
    def look(training, progress):
        (training.folder / "metrics.json").write_text(json.dumps(progress.alone))

    for workers, expected in ((1, "true"), (2, "false")):
        training = toys(tmp_path / str(workers), 1)[0]
        run_all([training], look, workers)
        assert (training.folder / "metrics.json").read_text() == expected


def test_the_bar_ends_at_all_of_the_work(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run_all(toys(tmp_path, 3, steps=2), train, workers=1)
    assert "whole run 100%" in terminal.getvalue()


# When all will be done


def test_no_time_is_named_before_a_step_was_measured(tmp_path):
    trainings = [training(tmp_path)]
    assert minutes_left(trainings, [Report()], [True], 1) is None
    assert minutes_left(trainings, [Report(steps=40)], [True], 1) is None
    assert share_done(trainings, [Report(steps=40)]) == 0.4


def test_one_worker_needs_the_sum_of_what_is_left(tmp_path):
    trainings = [
        training(tmp_path, "a", steps=100, evaluations=4),
        training(tmp_path, "b", steps=200, evaluations=1),
    ]
    reports = [measured(60, 2.0, 3, 30.0), measured(100, 5.0, 1, 7.0)]
    scale = (60 * 2 + 100 * 5) / 160  # seconds of a prior step, which counts as twenty
    a, b = (60 * 2 + 20 * scale) / 80, (100 * 5 + 20 * scale) / 120
    expected = 40 * a + 1 * 30 + 100 * b
    assert minutes_left(trainings, reports, [True, False], 1) == pytest.approx(expected / 60)
    done = 60 * a + 90 + 100 * b + 7
    assert share_done(trainings, reports) == pytest.approx(done / (done + expected))


def test_a_kind_that_is_not_measured_costs_its_prior_in_the_seconds_of_the_others(tmp_path):
    trainings = [
        training(tmp_path, "a", cost=10, evaluation_cost=40, evaluations=1),
        training(tmp_path, "b", cost=30, evaluation_cost=20, evaluations=1),
    ]
    reports = [measured(50, 2.0), Report()]
    assert unit_seconds(trainings, reports)[1] == pytest.approx((6.0, 4.0))
    reports = [measured(50, 2.0, 1, 80.0), Report()]  # evaluations have a scale of their own
    assert unit_seconds(trainings, reports)[1] == pytest.approx((6.0, 40.0))


def test_trainings_of_one_kind_share_their_speed(tmp_path):
    trainings = [training(tmp_path, "a", name=str(i)) for i in range(3)]
    reports = [measured(10, 1.0), measured(30, 2.0), Report()]
    assert unit_seconds(trainings, reports)[2][0] == pytest.approx(70 / 40)


def test_many_workers_take_what_is_left_in_its_order(tmp_path):
    lengths = (50, 40, 30, 20, 10, 5)
    trainings = [training(tmp_path, "a", steps=n, name=str(n)) for n in lengths]
    reports = [measured(20, 1.0), *[Report()] * 5]
    running = [True, True, *[False] * 4]
    # left: 30 and 40 where they run; then 30 at second 30, 20 at 40, 10 at 60, 5 at 60
    assert minutes_left(trainings, reports, running, 2) == pytest.approx(70 / 60)


def test_workers_that_other_commands_have_count_as_well(tmp_path):
    trainings = [training(tmp_path, "a", steps=60, name=str(i)) for i in range(4)]
    reports = [measured(30, 1.0), measured(30, 1.0), Report(), Report()]
    assert minutes_left(trainings, reports, [True, True, False, False], 1) == pytest.approx(90 / 60)
    assert minutes_left(trainings, reports, [True, False, False, False], 1) == pytest.approx(
        180 / 60
    )


def simulated_run(trainings, seconds, workers):
    """Start and end of each training when workers take them in this order; seconds: true ones."""
    free, spans = [0.0] * workers, []
    for toy in trainings:
        step, evaluation = seconds[toy.kind]
        start = min(free)
        end = start + toy.steps * step + toy.evaluations * evaluation
        free[free.index(start)] = end
        spans.append((start, end))
    return spans


def state_at(now, trainings, spans, seconds):
    """(reports, running) at a time of a simulated run; evaluations lie evenly among the steps."""
    reports, running = [], []
    for toy, (start, end) in zip(trainings, spans, strict=True):
        share = min(1.0, max(0.0, (now - start) / (end - start)))
        steps, evaluations = int(share * toy.steps), int(share * toy.evaluations)
        step, evaluation = seconds[toy.kind]
        reports.append(measured(steps, step, evaluations, evaluation))
        running.append(start <= now < end)
    return reports, running


def shown_ends(trainings, spans, seconds, workers):
    """The finishing time that is shown, at 200 moments of a simulated run; its true end is 1."""
    total = max(end for _, end in spans)
    moments = np.linspace(0.01, 0.999, 200)
    shown = []
    for moment in moments:
        reports, running = state_at(moment * total, trainings, spans, seconds)
        left = minutes_left(trainings, reports, running, workers)
        shown.append(moment + 60 * left / total)
    return moments, np.array(shown)


def plain_average_ends(trainings, spans, seconds):
    """The same, from the average time of all steps so far, for one worker."""
    total, steps = max(end for _, end in spans), sum(toy.steps for toy in trainings)
    moments = np.linspace(0.01, 0.999, 200)
    done = [
        sum(report.steps for report in state_at(moment * total, trainings, spans, seconds)[0])
        for moment in moments
    ]
    return moments, np.array([m + m / n * (steps - n) for m, n in zip(moments, done, strict=True)])


def models_run(tmp_path, priors, seeds=1):
    """Models 3, 2 and 1, whose true costs are 3, 1.8 and 1; the dearest by its prior first."""
    trainings = [
        training(tmp_path, f"model{number}", prior, prior * 4, 1000, 8, f"{number}-{seed}")
        for seed, (number, prior) in itertools.product(range(seeds), priors.items())
    ]
    return sorted(trainings, key=lambda toy: -toy.cost)


TRUE_SECONDS = {"model1": (1.0, 5.0), "model2": (1.8, 8.0), "model3": (3.0, 9.0)}


def test_the_time_left_holds_where_a_plain_average_over_steps_is_far_off(tmp_path):
    trainings = models_run(tmp_path, {1: 1.0, 2: 1.8, 3: 3.0})
    spans = simulated_run(trainings, TRUE_SECONDS, 1)
    _, shown = shown_ends(trainings, spans, TRUE_SECONDS, 1)
    assert np.abs(shown - 1).max() < 0.02
    cheap_first = trainings[::-1]
    spans = simulated_run(cheap_first, TRUE_SECONDS, 1)
    _, shown = shown_ends(cheap_first, spans, TRUE_SECONDS, 1)
    moments, plain = plain_average_ends(cheap_first, spans, TRUE_SECONDS)
    assert np.abs(shown - 1).max() < 0.02
    assert plain.max() - plain.min() > 0.4 and (np.diff(plain - moments) > 0).any()


def test_priors_off_by_thirty_percent_move_the_shown_end_by_less(tmp_path):
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(60):
        seeds, workers = rng.integers(1, 4), int(rng.integers(1, 4))
        errors = 1.3 ** rng.uniform(-0.5, 0.5, 3)
        costs = (TRUE_SECONDS[f"model{n}"][0] for n in (1, 2, 3))
        priors = {n: c * e for n, c, e in zip((1, 2, 3), costs, errors, strict=True)}
        trainings = models_run(tmp_path, priors, seeds)
        spans = simulated_run(trainings, TRUE_SECONDS, workers)
        moments, shown = shown_ends(trainings, spans, TRUE_SECONDS, workers)
        worst = max(worst, np.abs(shown - 1).max())
        left = shown - moments
        for gap in (20, 100):  # over a tenth, and over half, of the run the time left falls
            assert (left[gap:] < left[:-gap]).all()
    assert worst < 0.3
