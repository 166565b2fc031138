"""collapse_threshold.py: what counts as collapsed, where thresholds lie, and the study in small."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import fails, rehearse, start_script

import common
from collapse.measures.statistics import sign_flip_p
from collapse.measures.thresholds import Threshold
from collapse.training import monitor
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT
from studies import collapse_threshold as study
from studies.shared import finetune, pretrain, sweep
from studies.shared.tables import read_rows


def run_of(arm="model1", rate=-3.0, seed=0, dataset="AG News", start=40, end=40, accuracy=0.9):
    base = {"classes": 4, "chance": 0.3}
    path = [base | {"dims_95pct": start, "accuracy": 0.3, "loss": 1.0}]
    path.append(base | {"dims_95pct": end, "accuracy": accuracy, "loss": accuracy})
    return study.Run(study.Trial(seed, dataset, arm, rate), path)


@pytest.mark.parametrize(
    ("end", "accuracy", "outcome"),
    [
        (10, 0.6, "healthy"),  # a quarter of 40, half-way from 0.3 to 0.9: the bounds belong to it
        (9, 0.6, "collapsed, functional"),
        (9, 0.59, "collapsed, dead"),
        (10, 0.59, "not learning"),
        (None, None, "diverged"),
    ],
)
def test_outcomes_by_components_and_training_accuracy(end, accuracy, outcome):
    assert run_of(end=end, accuracy=accuracy).outcome(best=0.9) == outcome


def test_the_best_accuracy_is_that_of_the_same_backbone_and_data_set():
    runs = [run_of(accuracy=0.5), run_of("model2", accuracy=0.6), run_of(seed=1, accuracy=1.0)]
    found = study.outcomes_of([*runs, run_of(dataset="SST-2 by sentence", accuracy=1.0)])
    assert set(found.values()) == {"healthy"}  # 0.5 is more than (0.3 + 0.6) / 2
    found = study.outcomes_of([*runs, run_of("model2", rate=-2.5, accuracy=0.75)])
    assert found[runs[0].trial] == "not learning"
    found = study.outcomes_of([*runs, run_of("kl", accuracy=0.75)])  # a control judges nobody
    assert found[runs[0].trial] == "healthy"


def test_the_threshold_is_half_a_step_above_the_last_good_rate():
    rates = [-4.0, -3.5, -3.0, -2.5]
    for healthy in range(5):
        good = {rate: number < healthy for number, rate in enumerate(rates)}
        assert study.threshold_of(good) == pytest.approx(-4 + 0.5 * (healthy - 0.5))
    # Outcomes that are not monotone: it is their number that counts.
    swapped = {-4.0: True, -3.5: False, -3.0: True, -2.5: False}
    assert study.threshold_of(swapped) == pytest.approx(-3.25)
    # Where steps differ, too, it is half-way to the next rate.
    for last_good, threshold in ((-4.0, -3.75), (-3.5, -3.0), (-2.5, -2.0)):
        good = {rate: rate <= last_good for rate in (-4.0, -3.5, -2.5)}
        assert study.threshold_of(good) == pytest.approx(threshold)


def test_shifts_are_paired_and_a_backbone_without_all_rates_counts_for_nothing():
    outcomes = {}
    healthy = {("model1", 0): 1, ("model2", 0): 3, ("model1", 1): 2, ("model2", 1): 2}
    for (arm, seed), count in healthy.items():
        for number, rate in enumerate((-4.0, -3.5, -3.0, -2.5)):
            kind = "healthy" if number < count else "collapsed, dead"
            outcomes[study.Trial(seed, "AG News", arm, rate)] = kind
    outcomes[study.Trial(2, "AG News", "model1", -4.0)] = "healthy"
    outcomes[study.Trial(0, "AG News", "model1", -2.0)] = "healthy"  # no rate of the plan
    rates = {"AG News": (-4.0, -3.5, -3.0, -2.5)}
    thresholds = study.thresholds_of(study.good_by_rate(outcomes, {"healthy"}), rates)
    found = study.shift(thresholds, "model2", ["AG News"])
    assert found["n"] == 2 and found["mean"] == pytest.approx(0.5)
    expected = scipy.stats.ttest_1samp([1.0, 0.0], 0).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert study.shift(thresholds, "kl", ["AG News"])["n"] == 0


def test_another_bound_of_collapse_moves_a_threshold(monkeypatch):
    """Of Model 2, which keeps 16 of 40 components at the higher rate, and not of Model 1."""
    ends = {("model1", -4.0): 40, ("model1", -3.5): 2, ("model2", -4.0): 40, ("model2", -3.5): 16}
    runs = [run_of(arm, rate, end=end) for (arm, rate), end in ends.items()]
    monkeypatch.setattr(study, "read_runs", lambda folder: runs)
    monkeypatch.setattr(study, "mean_ends", lambda *place: {})
    found = study.summary(study.Config(rates=(-4.0, -3.5), datasets=("AG News",)))
    assert found["arms"][1]["shift"]["healthy"]["mean"]["mean"] == pytest.approx(0.5)
    means = {bound: difference["mean"] for bound, difference in found["other_bounds"].items()}
    assert means == {"0.1": pytest.approx(0.5), "0.5": 0}


def test_sign_flips_agree_with_all_of_them_counted():
    values = np.array([0.5, 0.2, 0.9, -0.1, 0.4, 0.7])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    exact = np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12)
    assert sign_flip_p(values) == pytest.approx(exact, abs=0.005)
    assert sign_flip_p([1.0, -1.0]) == 1.0


def measured_run(shares, arm="model1", rate=-3.0, seed=0):
    """At 0 on 256 rows and on 1,000, along the way on 256, at the end on both; of 64 components."""
    steps = (0, *range(10, 10 * len(shares), 10))
    base = {"accuracy": 0.9, "chance": 0.3, "classes": 4, "loss": 1.0}
    rows = [(0, 1000, 64), (0, 256, 40)]
    rows += [
        (step, 256, share and share * 40)
        for step, share in zip(steps[1:], shares[:-1], strict=True)
    ]
    rows += [
        (steps[-1] + 10, n, shares[-1] and shares[-1] * of) for n, of in ((256, 40), (1000, 64))
    ]
    path = [base | {"step": float(s), "rows": n, "dims_95pct": d} for s, n, d in rows]
    return study.Run(study.Trial(seed, "AG News", arm, rate), path)


@pytest.mark.parametrize(
    ("shares", "fell", "back"),
    [
        ([0.9, 0.9, 0.9, 0.9], None, False),
        ([0.1, 0.1, 0.9, 0.9], None, False),  # at steps 10 and 20: too early to be judged
        ([0.9, 0.9, 0.2, 0.2], 30, False),
        ([0.9, 0.9, 0.2, 0.9], 30, True),
        ([0.9, 0.9, 0.9, 0.25], None, False),
        ([0.9, 0.9, 0.9, None], 40, False),
    ],
)
def test_a_fall_counts_from_step_25_on_and_at_as_many_rows_as_the_start(shares, fell, back):
    """15 components on 256 rows would be too few of 64 on 1,000; of 40 on 256 they are not."""
    run = measured_run(shares)
    assert (run.fell_at(), run.came_back()) == (fell, back)


GRID = (-3.7, -3.4, -3.1, -2.8)


def planted(thresholds, rates=GRID):
    """Runs of (arm, seed) -> rate from which on they fall."""
    return [
        measured_run([1.0, 1.0, 0.1 if rate >= at else 0.9, 0.1 if rate >= at else 0.9], a, rate, s)
        for (a, s), at in thresholds.items()
        for rate in rates
    ]


def test_thresholds_by_components_and_their_shift():
    at = {("model1", 0): -3.4, ("model1", 1): -3.1, ("model2", 0): -2.8, ("model2", 1): -2.8}
    found = study.by_components(planted(at), GRID)
    values = {arm: [t["value"] for t in by.values()] for arm, by in found["arms"].items()}
    assert values["model1"] == pytest.approx([-3.55, -3.25])
    assert values["model2"] == pytest.approx([-2.95, -2.95])
    assert found["shift"]["mean"] == pytest.approx(0.45) and not found["shift"]["lower_bound"]
    assert found["runs"]["model1"]["-3.1"]["fell_after_step"] == [30, 30]
    assert "not all planned seeds ran" in found["shift"]["text"]


def test_a_threshold_needs_its_two_neighbours_alone():
    at = {("model1", 0): -3.4, ("model1", 1): -3.1}
    found = study.thresholds_by_components(planted(at, (-3.7, -3.4)), GRID)["model1"]
    assert found == {0: Threshold(-3.7, -3.4)}  # the other: kept up to -3.4, and -3.1 untried


@pytest.mark.parametrize("at", [[-3.7] * 3, [-3.1] * 3, [0.0] * 3, [-3.4, -2.8, -3.7]])
def test_a_bracket_is_found_with_few_runs_and_is_what_all_would_give(monkeypatch, at):
    runs, tried = [], []
    monkeypatch.setattr(study, "read_runs", lambda folder: runs)
    asked = {"model": "any", "bracket": True, "rates": GRID, "datasets": ("AG News",)}
    config = study.Config(**asked, seeds=(0, 1, 2), arms=("1",))
    for batch in study.trials(config):
        tried.append([trial.seed for trial in batch])
        for trial in batch:
            fallen = 0.1 if trial.rate >= at[trial.seed] else 0.9
            path = [1.0, 1.0, fallen, fallen]
            runs.append(measured_run(path, trial.arm, trial.rate, trial.seed))
    every_rate = planted({("model1", seed): rate for seed, rate in enumerate(at)})
    found, whole = (study.thresholds_by_components(r, GRID) for r in (runs, every_rate))
    assert found == whole and len(found["model1"]) == 3
    assert len(runs) < len(every_rate) and tried == sorted(tried)
    assert max(sum(run.trial.seed == seed for run in runs) for seed in (1, 2)) <= 4
    if at == [-3.1] * 3:
        assert len(runs) == 6


def test_a_bracket_of_a_pilot_would_never_end_and_is_refused(capsys):
    error = fails(start_script, capsys, study, "--model any --bracket --seeds 100 --measure-at 10")
    assert "seeds below 20" in error


def test_what_is_kept_at_every_rate_bounds_the_shift_and_a_base_that_is_decides_nothing():
    shifted = {("model1", seed): -3.1 for seed in range(5)}
    shifted |= {("model2", seed): 0.0 for seed in range(5)}
    found = study.by_components(planted(shifted), GRID)["shift"]
    assert found["lower_bound"] and found["verdict"] == "supported"
    assert found["mean"] == pytest.approx(-2.8 + 3.25) and "a lower bound" in found["text"]
    reversed_arms = {
        ("model1" if arm == "model2" else "model2", s): r for (arm, s), r in shifted.items()
    }
    found = study.by_components(planted(reversed_arms), GRID)["shift"]
    assert found["verdict"] == "not decided" and "no interval" in found["text"]


def test_a_model_of_a_file_is_named_by_it_and_rows_say_how_it_was_computed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(study, "weights_of", lambda name: "4-bit GGUF weights (Q4_K_M)")
    config = study.Config(model="data/small-1.5b.gguf", compute_dtype="bfloat16")
    assert config.folder.name == "small-1.5b"
    assert study.settings_of_model(config) == {
        "model": "small-1.5b",
        "weights": "4-bit GGUF weights (Q4_K_M)",
        "quantization": "none",
        "compute_dtype": "bfloat16",
    }
    assert study.settings_of_model(study.Config()) == {}


def test_a_table_made_in_another_type_is_not_gone_on_with(tmp_path):
    table = tmp_path / "seed-0.csv"
    table.write_text("training,steps,compute_dtype\na,150,float32\n")
    sweep.check_settings(table, lambda row: {"steps": 150, "compute_dtype": "float32"})
    with pytest.raises(UserError, match="compute_dtype float32, not bfloat16"):
        sweep.check_settings(table, lambda row: {"steps": 150, "compute_dtype": "bfloat16"})
    with pytest.raises(UserError, match="quantization"):
        sweep.check_settings(table, lambda row: {"quantization": "nf4"})


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    rehearse(study, folder)
    return folder


def backbone_in(miniature: Path, seed: int = 0) -> Path:
    return miniature / "limit-miniature" / "state" / "lm" / f"miniature-w32-l1-e1-d0.1-s{seed}"


def recipe_in(miniature: Path, arm: str = "1", rate: float = 1e-3, steps: int = 10):
    model = str(backbone_in(miniature))
    return finetune.Recipe(model, finetune.TOY, arm, rate, 0, steps, 64, True, True)


def test_miniature_runs_every_trial_and_keeps_those_that_diverge(miniature):
    folder = miniature / "limit-miniature" / "miniature"
    results = json.loads((folder / "results.json").read_text())
    assert results["runs"] == 2 * 3 * 3 and {row["arm"] for row in results["arms"]} == {
        "model1",
        "model2",
        "l2-start",
    }
    counts = [row["outcomes"][finetune.TOY] for row in results["arms"]]
    assert all(sum(kinds.values()) == 2 for by_rate in counts for kinds in by_rate.values())
    assert all(by_rate["3"]["diverged"] == 2 for by_rate in counts)  # a learning rate of 1000
    assert results["P2"]["n"] == 2 and "not all planned seeds ran" in results["P2"]["text"]
    assert (folder / "collapse.png").exists()


def test_what_is_lost_is_trained_again_to_the_same_numbers(miniature):
    """By two workers of the script itself, what one process trained: backbones, one trial each."""
    tables = [miniature / "limit-miniature" / "miniature" / f"seed-{seed}.csv" for seed in (0, 1)]
    before = [read_rows(table) for table in tables]
    for seed, (table, rows) in enumerate(zip(tables, before, strict=True)):
        shutil.rmtree(backbone_in(miniature, seed))
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows([row for row in rows if row["training"] != rows[0]["training"]])
    command = [sys.executable, "studies/collapse_threshold.py", "--miniature", "--workers", "2"]
    done = subprocess.run(
        [*command, "--output-dir", str(miniature)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("components") == 2  # two trainings alone
    key = lambda row: (row["training"], int(row["step"]))  # noqa: E731
    for table, rows in zip(tables, before, strict=True):
        assert sorted(read_rows(table), key=key) == sorted(rows, key=key)


def test_all_arms_begin_alike_and_measures_say_when_they_are_of_which_rows(miniature):
    rows = read_rows(miniature / "limit-miniature" / "miniature" / "seed-0.csv")
    starts = {
        tuple(row[name] for name in ("dims_95pct", "effective_rank", "loss", "lm_loss"))
        for row in rows
        if row["step"] == "0"
    }
    assert len(starts) == 1
    steps = [int(row["step"]) for row in rows if row["training"] == rows[0]["training"]]
    assert steps == [0, 4, 8, 12, 16, 20]
    ends = [row for row in rows if row["step"] == "20"]
    assert all(float(row["lm_loss"]) > 0 for row in ends)


def test_language_kept_is_measured_under_the_lm_head_of_the_start(miniature):
    """Training moves a tied LM head; the loss under the start's must be taken with its copy."""
    recipe = recipe_in(miniature, "2", rate=0.1)
    model, head = finetune.build(recipe, 2)
    before = head.weight.clone()
    data = finetune.load_data(recipe, None)
    trainer = common.make_trainer(model, data.train, recipe.config(), common.find_arm(recipe.arm))
    trainer.step(np.arange(16), 0.1)
    assert torch.equal(head.weight, before)
    assert not torch.equal(model.lm_head.weight, before)
    found = finetune.lm_loss(model.eval(), data.language, head)
    ids = data.language.token_ids
    total = count = 0
    for row in ids:
        hidden = model(row[None], torch.ones(1, len(row), dtype=torch.bool)).hidden
        logits = hidden[0, :-1] @ before.T
        total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
        count += len(row) - 1
    assert found == pytest.approx(total / count, rel=1e-5)


def test_both_ends_are_measured_on_the_rows_of_the_way_where_asked(miniature, monkeypatch):
    recipe = recipe_in(miniature)
    data = finetune.load_data(recipe, None)
    records = finetune.watch(recipe, data, (5,), few_rows_too=True)
    assert [(r["step"], r["lm_loss"] is None) for r in records] == [
        (0, False),
        (0, True),
        (5, True),
        (10, True),
        (10, False),
    ]
    again = finetune.watch(recipe, data, (5,), few_rows_too=True)
    monkeypatch.setattr(finetune, "measured_starts", {})
    anew = finetune.watch(recipe, data, (5,), few_rows_too=True)
    assert again == records == anew  # what is spared draws no random number


def test_one_pass_gives_what_fewer_rows_give_by_themselves(miniature):
    recipe = recipe_in(miniature)
    data = finetune.load_data(recipe, None)
    model, _ = finetune.build(recipe, 2)
    some, all_rows = (
        monitor.measures_on(model, data.measured_train, data.validation, [limit])[0]
        for limit in (20, None)
    )
    both = monitor.measures_on(model, data.measured_train, data.validation, [None, 20])
    assert both == [all_rows, some] and (some["rows"], all_rows["rows"]) == (20, 80)
    fewer = [monitor.draw_rows(split, 20) for split in (data.measured_train, data.validation)]
    alone = monitor.measures(model, *fewer)
    assert alone == pytest.approx(some, rel=1e-4)


def test_a_given_models_start_is_measured_once_a_seed(miniature, tmp_path, monkeypatch):
    """A folder as --model: the second training takes over what the first one measured."""
    measured, full_records = [], finetune.full_records
    monkeypatch.setattr(
        finetune, "full_records", lambda *given: measured.append(1) or full_records(*given)
    )
    folder = backbone_in(miniature)
    config = study.Config(
        model=str(folder),
        datasets=(finetune.TOY,),
        arms=("1", "2"),
        rates=(-3.0,),
        seeds=(0,),
        steps=20,
        measure_at=(10,),
        output_dir=tmp_path,
    )
    config.folder.mkdir()
    study.STUDY.run_missing(config)
    rows = read_rows(sweep.table_of(config.folder, 0))
    assert [int(row["step"]) for row in rows] == [0, 0, 10, 20, 20] * 2
    start = {(row["arm"], row["rows"], row["lm_loss"], row["dims_95pct"]) for row in rows[:2]}
    again = {("model1", *(row[k] for k in ("rows", "lm_loss", "dims_95pct"))) for row in rows[5:7]}
    assert start == again and {row["model"] for row in rows} == {folder.name}
    assert len(measured) == 1 + 2
    one, two, three, other_seed = (
        finetune.start_of(study.recipe_of(config, study.Trial(seed, finetune.TOY, arm, rate)))
        for seed, arm, rate in ((0, "1", -3), (0, "2", -2), (0, "3", -3), (1, "1", -3))
    )
    assert one == two and len({one, three, other_seed}) == 3
    results = study.summary(config)
    found = results["by_components"][finetune.TOY]
    assert found["runs"]["model1"]["-3"]["runs"] == 1 and found["shift"] is None


@pytest.mark.parametrize("arm", study.Config().arms)
def test_every_arm_trains_all_weights_of_a_network_with_one_embedding_for_both_ends(arm, miniature):
    recipe = recipe_in(miniature, arm, steps=3)
    start, end = finetune.watch(recipe, finetune.load_data(recipe, None), ())
    assert end["step"] == 3 and None not in end.values()
    assert (start["rows"], end["loss"] != start["loss"]) == (80, True)
    plain = recipe_in(miniature, steps=3)
    assert finetune.watch(plain, finetune.load_data(plain, None), ())[0] == start


def test_a_model_that_cannot_run_here_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = fails(start_script, capsys, study, f"--model {common.DEFAULT_MODEL} --seeds 0")
    assert error.count("needs a CUDA GPU") == 1


def test_a_model_that_is_not_there_is_one_sentence_and_a_summary_needs_none(
    monkeypatch, capsys, tmp_path
):
    def load(name):
        raise UserError(f"{name} is not there")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the GPU is no reason then
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(study, "load_tokenizer", load)
    options = f"--model {common.DEFAULT_MODEL} --seeds 0 --output-dir {tmp_path}"
    assert fails(start_script, capsys, study, options).count("is not there") == 1
    assert not list(tmp_path.iterdir())
    start_script(study, f"{options} --summarize")


def test_a_table_of_other_weights_is_not_gone_on_with(miniature, tmp_path):
    """As on another kind of machine, whose pretraining ends with other last digits."""
    model = str(backbone_in(miniature))
    table = miniature / "limit-miniature" / "miniature" / "seed-0.csv"
    sweep.check_weights(table, model)
    sweep.check_weights(tmp_path / "none.csv", model)
    other = tmp_path / "seed-0.csv"
    digest = read_rows(table)[0]["weights_sha256"]
    other.write_text(table.read_text().replace(digest, "0" * 64, 1))
    with pytest.raises(UserError, match="other weights"):
        sweep.check_weights(other, model)


def test_a_folder_with_another_recipe_is_not_taken_for_a_backbone(miniature, tmp_path):
    models = tmp_path / "lm"
    shutil.copytree(miniature / "limit-miniature" / "state" / "lm", models)
    file = models / "miniature-w32-l1-e1-d0.1-s0" / "recipe.json"
    file.write_text(file.read_text().replace("0.0045", "0.003"))
    with pytest.raises(UserError, match="another recipe"):
        pretrain.backbones([0], "miniature", models)


def test_a_training_that_is_not_finite_ends_with_a_row_without_numbers(miniature):
    rows = read_rows(miniature / "limit-miniature" / "miniature" / "seed-0.csv")
    diverged = [row for row in rows if row["rate"] == "3.0" and row["step"] != "0"]
    last = {row["training"]: row for row in diverged}.values()
    assert last and all(row["dims_95pct"] == "" and row["accuracy"] == "" for row in last)
    assert all(int(row["step"]) < 20 for row in last)
