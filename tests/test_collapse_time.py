"""collapse_time.py: thresholds planted in rows are found, and the study in small."""

import dataclasses
import json
import math

import numpy as np
import pytest
from conftest import cells_of_row, fails, rehearse, start_script

from collapse.training.steps import learning_rate_at
from collapse.utils.errors import UserError
from studies import collapse_time as study
from studies.report import thresholds
from studies.shared import finetune, sweep
from studies.shared.tables import put_rows, read_rows

CONFIG = study.Config()
STEPS = CONFIG.measured


def test_the_plan_is_that_of_the_protocol():
    assert STEPS == [50, 100, 200, 400, 800, 1600, 3200, 6400]
    trials = trials_of(*study.BACKBONES, *study.LATER)
    counts = {part: sum(t.part == part for t in trials) for part in study.PARTS}
    assert counts == {
        "model1": 8 * 11,
        "model2": 8 * 8,
        "cosine": 2,
        "all rows": 3 * 5,
        "2,000 rows": 3 * 5,
        "SST-2": 3 * 6,
        "kl": 2 * 7,
    }
    rates = {
        steps: sorted(
            t.rate for t in trials_of(200) if t.part == "model2" and settings(t)["steps"] == steps
        )
        for steps in (6400, 400)
    }
    assert rates == {6400: [-3.5, -3.0, -2.5, -2.0, -1.5], 400: [-1.25, -1.0, -0.75]}
    assert len({(t.seed, t.name) for t in trials}) == len(trials)
    assert trials_of(299, rates=(-3.0,), parts=("model1",)) == [
        study.Trial(299, "model1", "model1", -3.0)  # a pilot's backbone takes every part
    ]


def trials_of(*seeds, **other):
    (trials,) = study.trials(dataclasses.replace(CONFIG, seeds=seeds, **other))
    return trials


def settings(trial):
    return study.settings(CONFIG, dataclasses.asdict(trial))


@pytest.mark.parametrize("steps", [147, 294, 400, 6400])
def test_ten_steps_of_warm_up_whatever_the_number_of_steps(steps):
    recipe = finetune.Recipe("m", "AG News", "1", 1e-3, 0, steps, 64, True, True)
    rates = [learning_rate_at(step, steps, recipe.config()) for step in range(12)]
    assert rates[8] < 1e-3 and rates[9:] == [1e-3] * 3


def test_a_recipe_takes_any_setting_of_a_training():
    fields = dataclasses.asdict(finetune.Recipe("m", "AG News", "1", 1e-3, 0, 50, 64, True, True))
    del fields["settings"]
    plain, other = (
        finetune.Recipe.of(**fields, **own) for own in ({}, {"weight_decay": 0.5, "clip_norm": 2})
    )
    assert plain.config().schedule == "constant" and other.config().weight_decay == 0.5
    assert other.config() == dataclasses.replace(plain.config(), weight_decay=0.5, clip_norm=2)
    assert hash(other) != hash(plain)  # data and starts are kept by recipe
    with pytest.raises(TypeError, match="heat"):
        finetune.Recipe.of(**fields, heat=1).config()


def path_of(trial, fell_at, back_at=None, diverged_at=None):
    """Rows of a training whose components fall from 64 to 8 after so many steps."""
    steps = settings(trial)["steps"]
    rows = []
    for step in [0, *(step for step in STEPS if step <= steps)]:
        if diverged_at is not None and step >= diverged_at:
            rows.append({"step": step, "steps": steps, "dims_95pct": None, "loss": None})
            break
        low = step and step >= fell_at and (back_at is None or step < back_at)
        rows.append({"step": step, "steps": steps, "dims_95pct": 8 if low else 64, "loss": 1.0})
    numbers = {"validation_accuracy": 0.5}
    best = {"validation_accuracy": 0.9}  # on the way
    return [numbers | (best if row["step"] == 100 else {}) | row for row in rows]


def planted(part, at_200, slope, seed=200, **other):
    """Runs of a backbone whose threshold lies on a line in log10 steps."""
    runs = []
    for trial in trials_of(seed):
        if trial.part == part:
            # It falls when the threshold has come down to its rate.
            decades = (trial.rate - at_200) / slope if slope else math.inf * (at_200 - trial.rate)
            fell_at = 200 * 10 ** min(decades, 9)
            runs.append(study.Run(trial, path_of(trial, fell_at, **other)))
    return runs


def test_a_planted_line_of_thresholds_is_found_to_the_grid():
    runs = planted("model1", -2.4, -0.8)
    by_seed = study.thresholds_of(CONFIG, "model1", runs)
    values = {step: threshold.value for step, threshold in by_seed[200].items()}
    for step, value in values.items():
        assert abs(value - (-2.4 - 0.8 * math.log10(step / 200))) <= 0.126, step
    assert study.slopes_of(CONFIG, by_seed)[200] == pytest.approx(-0.8, abs=0.1)


def test_thresholds_beyond_the_grid_are_bounds_and_none_known_is_no_slope():
    runs = planted("model1", -1.0, -1e-9)  # above every rate at every time
    by_seed = study.thresholds_of(CONFIG, "model1", runs)
    assert by_seed[200][400].censored == ">=" and by_seed[200][400].value == -1.75
    assert by_seed[200][800].value == -2.25
    assert study.slopes_of(CONFIG, by_seed) == {}
    assert study.p6(CONFIG, {}) is None
    runs = planted("model1", -3.4, -1.2)  # below the lowest at the end
    by_seed = study.thresholds_of(CONFIG, "model1", runs)
    assert by_seed[200][6400].censored == "<=" and by_seed[200][6400].value == -4.25
    assert study.slopes_of(CONFIG, by_seed)[200] == pytest.approx(-1.2, abs=0.15)


def test_a_backbone_without_a_planned_rate_has_no_threshold():
    runs = planted("model1", -2.4, -0.8)
    assert study.thresholds_of(CONFIG, "model1", runs[1:]) == {200: {}}
    without_short = [run for run in runs if run.trial.rate != -1.75]
    steps = list(study.thresholds_of(CONFIG, "model1", without_short)[200])
    assert steps == [800, 1600, 3200, 6400]


def test_one_that_comes_back_from_one_measurement_is_kept_and_counted():
    trial = trials_of(200)[0]
    run = study.Run(trial, path_of(trial, 800, back_at=1600))
    assert [step for step, fell in run.collapsed(STEPS).items() if fell] == [800]
    assert study.recovered(run, STEPS, 1600) and not study.recovered(run, STEPS, 800)
    run = study.Run(trial, path_of(trial, 400, back_at=1600))  # two measurements: for good
    assert [step for step, fell in run.collapsed(STEPS).items() if fell] == STEPS[3:]
    run = study.Run(trial, path_of(trial, math.inf, diverged_at=333))
    assert [step for step, fell in run.collapsed(STEPS).items() if fell] == STEPS[3:]


def test_a_step_that_was_not_measured_is_no_collapse():
    run = study.Run(trials_of(200)[0], path_of(trials_of(200)[0], math.inf))
    with pytest.raises(UserError, match="not measured after 25 steps"):
        run.collapsed([25, *STEPS])


def write(folder, runs):
    tail = dict.fromkeys(sweep.PROVENANCE_COLUMNS, "x")
    for run in runs:
        head = {"training": run.trial.name, **dataclasses.asdict(run.trial)}
        rows = [head | {"steps": row["steps"]} | row | tail for row in run.path]
        put_rows(sweep.table_of(folder, run.trial.seed), rows, "training")


@pytest.fixture
def tables(tmp_path):
    """Model 1 drifts by -0.8 decades a decade, Model 2 not at all."""
    config = dataclasses.replace(CONFIG, output_dir=tmp_path)
    config.folder.mkdir()
    rng = np.random.default_rng(0)
    for seed in study.BACKBONES:
        write(config.folder, planted("model1", -2.4 + 0.1 * rng.standard_normal(), -0.8, seed))
    for seed in study.BACKBONES:
        at_200 = -1.3 + 0.05 * rng.standard_normal()
        runs = planted("model2", at_200, -1e-9, seed)
        high = [run for run in runs if run.trial.rate > at_200]
        fell = [study.Run(run.trial, path_of(run.trial, 0)) for run in high]
        write(config.folder, [*[run for run in runs if run not in high], *fell])
    return config


def test_a_drift_that_the_lm_loss_stops_is_supported(tables):
    results = study.STUDY.report(tables)
    assert results["P6"]["verdict"] == "supported" and results["P6"]["n"] == 8
    assert results["P6"]["mean"] == pytest.approx(0.8, abs=0.1)
    # Between -1.25 and -1.5 after 200 steps, at least -1.5 after 6,400: (-1.5 + 1.25) / 1.505.
    assert results["P7"]["mean"] == pytest.approx(0.8 - 0.25 / math.log10(32), abs=0.12)
    assert results["P7"]["lower_bound"] and results["P7"]["missing"] == []
    told = results["parts"]["model2"]["thresholds"]["6400"]
    assert told["at_least"] == 8 and told["threshold"]["mean"] == -1.5
    assert results["parts"]["model1"]["thresholds"]["200"]["not_monotone"] == 0
    assert (tables.folder / "collapse_time.png").exists()
    assert "P6: supported" in study.text(results)
    json.dumps(results, allow_nan=False)
    slope = results["parts"]["model1"]["slope"]["mean"]
    assert slope == float(f"{slope:.9g}")  # machines differ in later digits


@pytest.mark.parametrize(
    ("few_fall_at", "reading"),
    [({}, "time alone"), ({208: 1600, 209: 1600, 210: 1600}, "repetition"), ({209: 99}, "open")],
)
def test_repetition_is_told_from_time(few_fall_at, reading):
    """Components end at 8 of 64 where they fall: on 2,000 rows, in some backbones or in all."""
    runs = {"all rows": [], "2,000 rows": []}
    for trial in trials_of(*study.LATER, parts=tuple(runs)):
        fell_at = few_fall_at.get(trial.seed, math.inf) if trial.part == "2,000 rows" else math.inf
        if reading == "open" and trial.rate > -3:  # at some rates more is left on 2,000 rows
            fell_at = 99 if trial.part == "all rows" and trial.seed == 210 else fell_at
        runs[trial.part].append(study.Run(trial, path_of(trial, fell_at)))
    found = study.repetition(CONFIG, runs)
    assert found["reading"] == reading and found["backbones"] == [208, 209, 210]
    expected = {"time alone": 0, "repetition": -7 / 8, "open": (5 - 2) / 5 / 3 * -7 / 8}[reading]
    assert found["mean"] == pytest.approx(expected)
    assert study.repetition(CONFIG, runs | {"all rows": runs["all rows"][1:]})["reading"] is None
    assert study.repetition(CONFIG, {"all rows": runs["all rows"]}) is None


def test_the_table_of_what_is_kept(tables):
    table = thresholds.table_kept(study.summary(tables))
    kept = cells_of_row(table, "model2", "1.0e-03")
    assert {kept[f"after {step}, %"] for step in STEPS} == {"100"}
    short = cells_of_row(table, "model2", "1.8e-01")  # trained for 400 steps, and fell in the first
    assert (short["after 50, %"], short["after 400, %"], short["after 800, %"]) == (
        "12",
        "12",
        "n/a",
    )
    assert kept["accuracy, best of these, %"] == "90.0" and kept["accuracy at the end, %"] == "50.0"


def test_p7_needs_both_ends_and_is_refuted_by_the_largest_slope_alone():
    slopes = dict.fromkeys(study.BACKBONES, -0.8)
    slopes = {seed: slope + 0.01 * (seed - 202) for seed, slope in slopes.items()}
    ends = dict.fromkeys(slopes, (-0.5, math.inf))
    found = study.p7(CONFIG, slopes, ends)
    assert found["verdict"] == "supported" and found["done"] and found["at_most"] is None
    found = study.p7(CONFIG, slopes, ends | {204: (-math.inf, 0.0)})
    assert found["verdict"] == "not decided" and found["missing"] == [204]
    found = study.p7(CONFIG, slopes, dict.fromkeys(slopes, (-math.inf, math.inf)))
    assert found["verdict"] == "not decided" and found["mean"] is None
    assert "no slope on 8 of 8 backbones" in found["text"]
    found = study.p7(CONFIG, slopes, dict.fromkeys(slopes, (-0.9, -0.7)))
    assert found["verdict"] == "not decided"  # alike, as far as half decades can tell
    found = study.p7(CONFIG, slopes, dict.fromkeys(slopes, (-2.0, -1.4)))
    assert found["verdict"] == "refuted" and found["text"].startswith("refuted")


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    rehearse(study, folder)
    return folder / "limit-miniature" / "miniature"


def test_the_miniature_measures_every_training_on_the_same_rows(miniature):
    rows = read_rows(miniature / "seed-200.csv")
    kept = [row for row in rows if row["part"] == "model1" and row["rate"] == "-3.0"]
    assert [int(row["step"]) for row in kept] == [0, 5, 10, 20, 40, 80]
    assert len({row["rows"] for row in kept}) == 1
    assert kept[0]["step_size"] == "" and all(float(row["step_size"]) > 0 for row in kept[1:])
    assert all(0 <= float(row["length_share"]) <= 1 for row in kept)
    far = [float(row["distance"]) for row in kept]
    assert far[0] == 0 and far == sorted(far)
    diverged = [row for row in rows if row["rate"] == "3.0"][-1]
    assert diverged["dims_95pct"] == "" and int(diverged["step"]) < 40
    results = json.loads((miniature / "results.json").read_text())
    assert results["runs"] == 2 * 3 + 2 * 3 + 1 and set(results["parts"]) == set(study.MINIATURE)
    assert results["P6"]["n"] == 2


def test_a_step_is_as_long_as_its_rate_makes_it(miniature):
    """Adam's first steps move each weight by about the rate: a tenth of it moves a tenth as far."""
    folder = miniature.parent / "state" / "lm" / "miniature-w32-l1-e1-d0.1-s200"
    data = None
    sizes = []
    for rate in (1e-3, 1e-4):
        recipe = finetune.Recipe(str(folder), finetune.TOY, "1", rate, 0, 20, 64, True, True)
        data = data or finetune.load_data(recipe, None)
        records = study.measured_run(recipe, data, (1, 2))
        assert [record["step"] for record in records] == [0, 1, 2]
        assert records[1]["step_size"] == pytest.approx(records[1]["distance"])
        sizes.append(records[1]["step_size"])
    assert sizes[0] / sizes[1] == pytest.approx(10, rel=0.05)


def test_an_unknown_part_is_one_sentence(capsys):
    said = fails(start_script, capsys, study, "--parts model9")
    assert "--parts knows no model9: it takes model1 " in said


def test_a_table_of_other_steps_is_not_gone_on_with(miniature):
    config = dataclasses.replace(CONFIG, output_dir=miniature.parent, corpus="miniature")
    with pytest.raises(UserError, match="made with steps"):
        sweep.check_settings(miniature / "seed-200.csv", lambda row: study.settings(config, row))
