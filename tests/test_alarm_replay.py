"""The replayed alarm: what counts as one, and what is told of it."""

import pytest

from collapse.utils.files import read_json, through_json
from studies import alarm_replay
from studies.alarm_replay import Replayed, best_bound, rates, share
from studies.collapse_threshold import Run, Trial
from studies.shared.sweep import to_nine_digits


def training(*way, end=60, seed=0, start=40.0):
    """Components on 256 rows every ten steps; on all rows 100 at first and `end` at last."""
    path = [{"step": 0.0, "rows": 1000.0, "dims_95pct": 100.0, "loss": 1.0}]
    path += [
        {"step": 10.0 * (i + 1), "rows": 256.0, "dims_95pct": value, "loss": 1.0}
        for i, value in enumerate(way)
    ]
    path.append({"step": 10.0 * (len(way) + 1), "rows": 1000.0, "dims_95pct": end, "loss": 1.0})
    run = Run(Trial(seed, "AG News", "model1", -3.0), path)
    return Replayed(run, {"dims_95pct": start})


def test_an_alarm_is_against_a_start_on_as_many_rows_and_twice_is_running():
    one = training(30, 9, 12, 9, 9, end=20)
    assert one.collapsed and not training(30, 9, end=25).collapsed
    assert one.alarm("dims_95pct", 0.25, 1) == 20  # 9 of 40, though 9 of 100 would be less
    assert one.alarm("dims_95pct", 0.25, 2) == 50  # 9, 12, 9 are not twice running
    assert one.alarm("dims_95pct", 0.2, 1) is None
    assert training(30, None, 9).alarm("dims_95pct", 0.25, 2) == 30  # not finite is below
    assert training(30, 5, end=5).alarm("dims_95pct", 0.25, 2) is None  # the end is too late


def test_rates_count_what_was_caught_what_was_not_and_how_early():
    trainings = [training(9, 9, 9, end=9), training(30, 30, 9, end=9), training(9, 30, 30)]
    found = rates([*trainings, training(30, 30, 30)], "dims_95pct", 0.25, 1)
    assert (found["caught"]["count"], found["caught"]["of"]) == (2, 2)
    assert (found["false"]["count"], found["false"]["of"]) == (1, 2)
    assert found["steps_before_the_end"] == {"median": 20, "least": 10, "most": 30}
    twice = rates(trainings, "dims_95pct", 0.25, 2)
    assert (twice["caught"]["count"], twice["false"]["count"]) == (1, 0)


def test_intervals_are_clopper_and_pearsons():
    found = share(0, 10)
    assert found["low"] == 0 and found["high"] == pytest.approx(1 - 0.025**0.1)
    assert share(0, 0)["mean"] is None


def test_the_bound_separates_best_and_is_the_nearest_to_a_quarter_of_equals():
    trainings = [training(*[12] * 3, end=9), training(*[20] * 3)]  # 0.30 and 0.50 of the start
    assert best_bound(trainings, "dims_95pct", 2) == 0.325
    assert best_bound([training(*[2] * 3, end=9), training(*[30] * 3)], "dims_95pct", 2) == 0.25


def test_the_published_results_are_those_of_the_published_starts():
    config = alarm_replay.Config()
    if not (config.output_dir / "results.json").exists():
        pytest.skip("nothing is published")
    published = read_json(config.output_dir / "results.json")
    assert through_json(to_nine_digits(alarm_replay.summary(config))) == published
