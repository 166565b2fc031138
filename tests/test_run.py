"""Whole runs through the command line: reproducible, resumable, and clear about what went wrong."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from conftest import fails, start_script, tiny_model, watch_steps, without_times

import common
import effective_rank_analysis
import experiment
import experiment_7b
import experiment_agnews_7b
from collapse.data.batches import encode_rows
from collapse.data.sst2 import load_sst2
from collapse.measures.predictions import read_rows
from collapse.measures.rank import rank_metrics
from collapse.report.comparisons import COMPARISONS
from collapse.runs import publishing
from collapse.training import loop
from collapse.training.steps import learning_rate_at
from collapse.utils import files
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT, read_tensors, write_file
from studies import (
    hours,
    sensitivity,
    statistics_simulation,
    threshold_simulation,
    throughput,
)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def initial_rank(number, seed, data_dir):
    """Effective rank of an untrained model's validation features."""
    task = load_sst2(data_dir)
    split = encode_rows(task.validation, experiment.WordVocabulary(task.train.texts, 60).encode, 12)
    return rank_metrics(
        common.evaluate(tiny_model(number, seed, vocabulary_size=60), split).pooled
    )["effective_rank"]


def test_results_hold_everything_that_the_design_asks_for(undisturbed, data_dir):
    results = json.loads((undisturbed / "results.json").read_text())
    assert (
        results["settings"]["data"]["train_rows"] == 40
        and results["settings"]["config"]["epochs"] == 2
    )
    assert {
        "versions",
        "hardware",
        "git_commit",
        "experiment",
        "models",
        "comparisons",
    } <= results.keys()
    for number in (1, 2, 3):
        assert list(results["models"][f"model{number}"]) == ["1", "2"]
        for seed, metrics in results["models"][f"model{number}"].items():
            assert metrics["initial"]["effective_rank"] == pytest.approx(
                initial_rank(number, int(seed), data_dir), rel=1e-4
            )
            for split in ("train", "val"):
                assert [record["epoch"] for record in metrics[split]] == [1, 2]
                for record in metrics[split]:
                    assert {"loss", "cls_loss", "lm_loss", "accuracy"} <= record.keys()
                    assert (record["lm_loss"] is None) == (number == 1)
                    if number > 1:
                        assert record["loss"] == pytest.approx(
                            0.5 * record["lm_loss"] + 0.5 * record["cls_loss"]
                        )
            assert all(record["grad_norm"] > 0 for record in metrics["train"])
            assert all(
                record["effective_rank"] > 0 for record in [metrics["initial"], *metrics["val"]]
            )
            assert len(metrics["correct"]["final_cold"]) == 24
            assert metrics["final"]["accuracy"] == pytest.approx(
                metrics["correct"]["final_cold"].count("1") / 24
            )
            assert metrics["best"]["accuracy"] == max(
                record["accuracy"] for record in metrics["val"]
            )
            assert ("cluster" in metrics) == ("engram_cos" in metrics) == (number == 3)
            if number == 3:
                assert (
                    metrics["cluster"].keys()
                    == metrics["engram_cos"].keys()
                    == {"trained", "chance", "untrained"}
                )
                assert all(
                    {"accuracy", "lm_loss", "cls_loss"} <= record["carried"].keys()
                    for record in metrics["val"]
                )
    for epoch in ("final", "best"):
        assert results["comparisons"][epoch].keys() == COMPARISONS.keys()
        for name, (a, b, kind_a, kind_b) in COMPARISONS.items():
            count = [
                sum(
                    m["correct"][f"{epoch}_{kind}"].count("1")
                    for m in results["models"][model].values()
                )
                for model, kind in ((a, kind_a), (b, kind_b))
            ]
            assert results["comparisons"][epoch][name]["interval"]["mean"] == pytest.approx(
                (count[1] - count[0]) / 48
            )
    for plot in ("learning_curves.png", "engram_clusters.png"):
        assert (undisturbed / plot).read_bytes().startswith(b"\x89PNG")


def test_a_seed_reproduces_and_seeds_and_models_are_added(run, undisturbed):
    first = run("--seeds 2 --models 3")
    assert list(first["models"]) == ["model3"] and list(first["models"]["model3"]) == ["2"]
    run("--seeds 1 --models 3 1")
    last = run("--seeds 1 2")
    assert without_times(last) == without_times(
        json.loads((undisturbed / "results.json").read_text())
    )


def test_every_weight_of_every_model_is_trained_in_a_whole_run(undisturbed):
    for number in (1, 2, 3):
        weights, _ = read_tensors(undisturbed / f"state/model{number}-seed1/final.safetensors")
        start = tiny_model(number, seed=1, vocabulary_size=60).state_dict()
        assert not [name for name, weight in weights.items() if torch.equal(weight, start[name])]


def test_all_models_see_the_same_batches_at_the_scheduled_rates(run, monkeypatch):
    seen = watch_steps(monkeypatch)
    run("--seeds 1 2 --models 1 3 --schedule cosine --warmup-fraction 0.2")
    steps = [(list(rows), rate) for _, rows, rate in seen]
    config = experiment.Config(learning_rate=3e-3, schedule="cosine", warmup_fraction=0.2)
    trainings = [
        steps[i : i + 10] for i in range(0, 40, 10)
    ]  # seed 1: models 1 and 3, seed 2: the same; 2 epochs of 5 steps
    for training in trainings:
        assert [rate for _, rate in training] == [
            learning_rate_at(number, 10, config) for number in range(10)
        ]
    batches = [[rows for rows, _ in training] for training in trainings]
    assert batches[0] == batches[1] and batches[2] == batches[3] and batches[0] != batches[2]
    for epochs in ((b[:5], b[5:]) for b in batches):
        assert all(
            sorted(row for rows in epoch for row in rows) == list(range(40)) for epoch in epochs
        )
        assert epochs[0] != epochs[1]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


def same_model3(results, undisturbed) -> bool:
    """Are model 3's numbers with seed 1 those of the run that nothing disturbed?"""
    expected = json.loads((undisturbed / "results.json").read_text())["models"]["model3"]["1"]
    return without_times(results["models"]["model3"]["1"]) == without_times(expected)


@pytest.mark.parametrize("step", range(1, 11))
def test_killed_in_any_step_a_run_resumes_to_the_same_numbers(run, undisturbed, monkeypatch, step):
    monkeypatch.setattr(
        loop, "CHECKPOINT_SECONDS", -1.0 if step % 2 else 600
    )  # after every step, or every epoch
    watch_steps(monkeypatch, step, Killed)
    with pytest.raises(Killed):
        run("--seeds 1 --models 3")
    assert same_model3(run("--seeds 1 --models 3"), undisturbed)


def test_what_was_measured_on_the_way_survives_a_kill_and_results_say_where_it_went_on(
    run, monkeypatch, tmp_path, capsys
):
    line = "--seeds 1 --models 2 --measure-every 2"
    whole = run(line, tmp_path / "whole")["models"]["model2"]["1"]
    assert whole["resumed"] == [] and [m["step"] for m in whole["measured"]] == [0, 2, 4, 6, 8, 10]
    start, *_, end = (m["dims_95pct"] for m in whole["measured"])
    assert f"  step 10: {end} components ({start} at step 0), accuracy " in capsys.readouterr().out
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # after every step
    watch_steps(monkeypatch, 4, Killed)
    with pytest.raises(Killed):
        run(line)
    found = run(line)["models"]["model2"]["1"]
    assert found["resumed"] == [3] and found["measured"] == whole["measured"]


@pytest.mark.parametrize("write", range(1, 9))
def test_killed_while_it_writes_a_file_a_run_resumes_to_the_same_numbers(
    run, undisturbed, monkeypatch, write
):
    count, whole_write = 0, write_file

    def killed_write(path, content):
        nonlocal count
        count += 1
        if count == write:
            path.with_name(f".{path.name}.partial").write_bytes(content[: len(content) // 2])
            raise Killed
        whole_write(path, content)

    for module in (files, publishing):
        monkeypatch.setattr(module, "write_file", killed_write)
    with pytest.raises(Killed):
        run("--seeds 1 --models 3")
    assert same_model3(run("--seeds 1 --models 3"), undisturbed)


def test_another_configuration_is_refused_and_nothing_is_overwritten(run, capsys, tmp_path):
    run("--models 1")
    before = contents(tmp_path / "out")
    error = fails(run, capsys, "--models 1 --lm-weight 0.25")
    assert (
        "lm_weight is 0.5 there and 0.25 here" in error
        and "--output-dir" in error
        and "--fresh" in error
    )
    assert "train_rows is 40 there and 9 here" in fails(run, capsys, "--models 1 --train-limit 9")
    assert contents(tmp_path / "out") == before
    assert run("--models 1 --lm-weight 0.25 --fresh")["settings"]["config"]["lm_weight"] == 0.25


def test_a_folder_keeps_its_pooling(run, capsys):
    results = run("--models 3 --epochs 1 --pooling last")
    assert results["settings"]["config"]["pooling"] == "last"
    assert run("--models 3 --epochs 1 --pooling last") == results  # nothing trains
    error = fails(run, capsys, "--models 1 --epochs 1")
    assert "another configuration (pooling is last there and mean here)" in error
    assert "--pooling no is none of mean, last" in fails(run, capsys, "--models 1 --pooling no")


def test_killed_after_fresh_with_another_configuration_the_run_goes_on_without_fresh(
    run, monkeypatch
):
    run("--models 1")
    watch_steps(monkeypatch, 8, Killed)
    with pytest.raises(Killed):
        run("--models 1 --lm-weight 0.25 --fresh")
    assert run("--models 1 --lm-weight 0.25")["settings"]["config"]["lm_weight"] == 0.25


def test_fresh_does_not_delete_what_another_command_trains(run, capsys, tmp_path):
    run("--models 1")
    with filelock.FileLock(tmp_path / "out/state/model1-seed42/.lock"):
        error = fails(run, capsys, "--models 1 --fresh")
        assert "another command trains in" in error and "--output-dir" in error
        assert run("--models 1 --fresh", folder=tmp_path / "elsewhere")
    (starting := tmp_path / "out/state/.command-here-1-1").mkdir()  # its workers hold no job yet
    with filelock.FileLock(starting / ".lock"):
        assert "another command trains in" in fails(run, capsys, "--models 1 --fresh")
    assert run("--models 1 --fresh")


def test_a_copy_of_a_trainings_folder_is_no_training(run, tmp_path):
    first = run("--models 1")
    training = tmp_path / "out/state/model1-seed42"
    shutil.copytree(training, training.with_name("model1-seed42 copy"))
    assert run("--models 1")["models"] == first["models"]


def test_a_clone_without_state_trains_anew_and_compares_with_what_was_published(
    run, capsys, undisturbed, tmp_path
):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "results.json").write_bytes((undisturbed / "results.json").read_bytes())
    assert "another configuration" in fails(run, capsys, "--epochs 1")
    capsys.readouterr()
    run("--seeds 1 --models 1 2")
    table = capsys.readouterr().out.split("published results beside this run's")[1]
    rows = [line for line in table.splitlines() if line.startswith("model")][1:]
    assert [row.split()[0] for row in rows] == ["model1", "model2"]
    assert all("(n=2)" in row and "(n=1)" in row and "no difference found" in row for row in rows)
    (folder / "results.json").write_text('{"something": "else"}')
    assert "names no config" in fails(run, capsys, "--seeds 1 --models 1 2")


def test_published_trainings_survive_a_fresh_clone_that_adds_one(
    run, capsys, undisturbed, tmp_path
):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("results.json", "rows.safetensors", "engram_clusters.png"):
        shutil.copy(undisturbed / name, folder)
    published = json.loads((undisturbed / "results.json").read_text())["models"]
    rows_before = read_rows(folder)
    models = run("--seeds 3 --models 2")["models"]
    told = (
        "model1 seed 1, model1 seed 2, model2 seed 1, model2 seed 2, model3 seed 1, model3 seed 2"
    )
    assert f"published before and not trained here: {told}\n" in capsys.readouterr().out
    assert list(models["model2"]) == ["1", "2", "3"]
    assert {name: {s: models[name][s] for s in "12"} for name in models} == published
    rows = read_rows(folder)
    assert rows["model2"].keys() == {"1", "2", "3"} and rows["model1"].keys() == {"1", "2"}
    for part in ("correct", "log_probability", "scaled"):
        kept, before = (getattr(r["model3"]["2"]["best"], part) for r in (rows, rows_before))
        assert np.array_equal(kept, before)
    figure = (folder / "engram_clusters.png").read_bytes()
    assert figure == (undisturbed / "engram_clusters.png").read_bytes()
    again = run("--seeds 1 --models 1")["models"]  # trained again: those published go
    assert again["model1"]["1"]["versions"] and again["model1"]["1"] != published["model1"]["1"]
    assert without_times(again["model1"]["1"]) == without_times(published["model1"]["1"])
    assert list(run("--seeds 2 --models 1 --fresh")["models"]) == ["model1"]
    assert list(read_rows(folder)["model1"]) == ["2"]


def test_fresh_trains_anew_and_still_compares(run, capsys, tmp_path):
    run("--models 1 --seeds 1 2")
    mark = tmp_path / "out/state/model1-seed2/mark"
    mark.touch()
    capsys.readouterr()
    assert list(run("--models 1 --seeds 1 --fresh")["models"]["model1"]) == ["1"]
    assert not mark.exists() and "published results beside this run's" in capsys.readouterr().out
    for file in ("results.json", "state/settings.json"):
        (tmp_path / "out" / file).write_text("{")
        assert "not valid JSON" in fails(run, capsys, "--models 1 --seeds 1")
        run("--models 1 --seeds 1 --fresh")


def test_killed_in_a_fresh_clone_the_published_results_are_still_compared(
    run, capsys, undisturbed, tmp_path, monkeypatch
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_bytes((undisturbed / "results.json").read_bytes())
    watch_steps(monkeypatch, 13, Killed)  # model 1 is done and published, model 2 is not
    with pytest.raises(Killed):
        run("--seeds 1")
    capsys.readouterr()
    run("--seeds 1")
    table = capsys.readouterr().out.split("published results beside this run's")[1]
    assert all(f"model{number}" in table for number in (1, 2, 3)) and table.count("(n=2)") == 3


@pytest.mark.parametrize(
    "arguments",
    ["--train-limit 1", "--eval-limit 1", "--max-length 1", "--batch-size 7", "--seeds 3 3"],
)
def test_the_smallest_sizes_run_and_resume(run, monkeypatch, arguments):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    watch_steps(monkeypatch, 2, Killed)
    with pytest.raises(Killed):
        run(arguments)
    assert list(run(arguments)["models"]) == ["model1", "model2", "model3"]


def test_weights_that_overflow_in_the_last_step_are_a_divergence_too(run, capsys, tmp_path):
    error = fails(
        run,
        capsys,
        "--models 2 --epochs 1 --train-limit 8 --batch-size 1"
        " --learning-rate 1000 --weight-decay 1000",
    )
    assert "diverged at step" in error and not list(
        (tmp_path / "out").glob("state/model2*/training.safetensors")
    )


def test_limited_rows_go_to_a_folder_of_their_own(data_dir):
    config = experiment.Config(data_dir=data_dir, train_limit=10, eval_limit=5)
    assert experiment.load_task(config).folder == "limit-10-5"
    assert experiment.load_task(experiment.Config(data_dir=data_dir)).folder == ""


def test_bad_command_lines_end_in_one_sentence(run, capsys, tmp_path, data_dir):
    assert "--seeds is empty" in fails(run, capsys, "--seeds")
    assert "--epochs is 0" in fails(run, capsys, "--epochs 0")
    assert "--clip-norm is inf" in fails(run, capsys, "--clip-norm inf")
    assert "--hidden-size is 0" in fails(run, capsys, "--hidden-size 0")
    assert "point --data-dir" in fails(run, capsys, data=tmp_path)
    (tmp_path / "a_file").write_text("")
    assert "cannot write to" in fails(run, capsys, folder=tmp_path / "a_file" / "out")
    assert "cannot write to" in fails(run, capsys, folder=Path("/proc/nothing/here"))
    if not torch.cuda.is_available():
        assert "no CUDA device" in fails(run, capsys, "--device cuda")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    watch_steps(monkeypatch, 3, Killed)
    with pytest.raises(Killed):
        run("--models 1")
    checkpoint = tmp_path / "out/state/model1-seed42/training.safetensors"
    whole = checkpoint.read_bytes()
    for damaged in (whole[:-100], whole[:5], b"", b"x" * len(whole)):
        checkpoint.write_bytes(damaged)
        before = contents(tmp_path / "out")
        error = fails(run, capsys, "--models 1")
        assert (
            str(checkpoint) in error
            and "damaged" in error
            and f"delete the folder {checkpoint.parent}" in error
        )
        assert contents(tmp_path / "out") == before
    shutil.rmtree(checkpoint.parent)
    assert len(run("--models 1")["models"]["model1"]["42"]["val"]) == 2


@pytest.mark.parametrize(("seconds", "drawn"), [(60.0, 1), (-1.0, 3)])
def test_figures_are_drawn_at_the_end_and_before_it_where_they_are_old(
    run, monkeypatch, seconds, drawn
):
    calls = []
    monkeypatch.setattr(publishing, "draw_figures", lambda *args: calls.append(list(args[3])))
    monkeypatch.setattr(publishing, "FIGURE_SECONDS", seconds)
    run("--models 1 2")
    assert len(calls) == drawn and calls[-1] == ["model1", "model2"]


def test_figures_show_what_finished_beside_a_training_that_failed(run, capsys, monkeypatch):
    calls, whole = [], common.Trainer.step

    def broken(self, *args):
        if self.arm.name == "model2":
            raise UserError("broken")
        return whole(self, *args)

    monkeypatch.setattr(publishing, "draw_figures", lambda *args: calls.append(list(args[3])))
    monkeypatch.setattr(common.Trainer, "step", broken)
    assert "broken" in fails(run, capsys, "--models 1 2")
    assert calls == [["model1"]]


def test_what_is_measured_on_the_way_is_told_beside_the_first_measurement():
    def of(step, components):
        return {"step": step, "dims_95pct": components, "validation_accuracy": 0.5, "rows": 1000}

    start, later, lost = of(0, 40), of(250, 9), of(500, None)
    tell = partial(loop.measured_line, "model 1")
    half = "accuracy 50.00% on 1,000 validation rows"
    assert tell([start]) == f"model 1  step 0: 40 components, {half}"
    assert tell([start, later]) == f"model 1  step 250: 9 components (40 at step 0), {half}"
    assert tell([later, of(300, 8)]).startswith("model 1  step 300: 8 components (9 at step 250)")
    assert tell([start, lost]) == "model 1  step 500: states are not finite"


def test_a_diverging_run_names_step_model_rate_and_checkpoint(run, capsys, tmp_path, monkeypatch):
    whole = common.Trainer.accumulate_gradients

    def poisoned(self, rows):
        sums = whole(self, rows)
        if self.optimizer.state and next(iter(self.optimizer.state.values()))["step"] == 7:
            next(self.model.parameters()).grad[0, 0] = float("inf")
        return sums

    monkeypatch.setattr(common.Trainer, "accumulate_gradients", poisoned)
    error = fails(run, capsys, "--models 2")
    checkpoint = tmp_path / "out/state/model2-seed42/training.safetensors"
    assert (
        "model 2 seed 42 diverged at step 8" in error
        and "learning rate 0.003" in error
        and str(checkpoint) in error
    )
    assert read_tensors(checkpoint)[1]["history"]["epoch"] == 1
    assert not (tmp_path / "out/results.json").exists()


def test_saved_weights_load_to_the_models_that_were_evaluated(run, tmp_path, data_dir):
    results = run("--models 3")
    task = load_sst2(data_dir)
    vocabulary = experiment.WordVocabulary(task.train.texts, 60)
    split = encode_rows(task.validation, vocabulary.encode, 12)
    for kind in ("best", "final"):
        weights, metadata = read_tensors(tmp_path / f"out/state/model3-seed42/{kind}.safetensors")
        model = tiny_model(3, vocabulary_size=60)
        model.load_state_dict(weights)
        metrics = results["models"]["model3"]["42"]
        assert metadata["epoch"] == metrics[kind]["epoch"]
        cold = common.evaluate(model, split)
        carried = common.evaluate(model, split, common.carried_engrams(cold.engrams))
        recorded = metrics["val"][metadata["epoch"] - 1]
        for name, found, record in (
            ("cold", cold, recorded),
            ("carried", carried, recorded["carried"]),
        ):
            assert found.correct() == metrics["correct"][f"{kind}_{name}"]
            assert (found.cls_loss, found.lm_loss) == pytest.approx(
                (record["cls_loss"], record["lm_loss"]), rel=1e-6
            )
        assert carried.lm_loss != pytest.approx(cold.lm_loss, rel=1e-5)


@pytest.mark.parametrize(
    "script",
    [
        experiment,
        experiment_7b,
        experiment_agnews_7b,
        effective_rank_analysis,
        throughput,
        hours,
    ],
)
def test_help_explains_every_setting(capsys, script):
    with pytest.raises(SystemExit) as stopped:
        start_script(script, "--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(script.Config):
        start = text.index(f"--{field.name.replace('_', '-')} ")
        assert "." in text[start : text.index("(default", start)], f"{field.name} has no help"


@pytest.mark.parametrize("script", [sensitivity, statistics_simulation, threshold_simulation])
def test_scripts_without_settings_have_a_help_too_and_do_nothing_else(capsys, script):
    with pytest.raises(SystemExit, match="0"):
        start_script(script, "--help")
    assert "studies/results/" in capsys.readouterr().out


@pytest.mark.parametrize("cached", [True, False])
def test_without_a_hub_its_cache_is_used_and_then_the_snippets(tmp_path, cached):
    """Offline, with the cache that `datasets` leaves behind, the run is on SST-2; without it, on
    the snippets, loudly.
    """
    if cached:
        write_hub_cache(tmp_path / "datasets/stanfordnlp___sst2/default/0.0.0/0123")
    code = "import experiment; print('TASK', experiment.load_task(experiment.Config()).name)"
    if cached:  # the same set by its name on the hub
        code += "; own = {'dataset': 'stanfordnlp/sst2', 'text_column': ('sentence',)}"
        code += "; task = experiment.load_task(experiment.Config(**own))"
        code += "; print('OWN', task.title(), task.class_names, task.train.texts[0], task.origin)"
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }  # nothing listens there
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if cached:
        assert "TASK SST-2" in done.stdout, done.stderr
        own = "OWN stanfordnlp/sst2 (10 training, 10 validation rows) ('negative', 'positive')"
        assert f"{own} sentence 0 {{'dataset': 'stanfordnlp/sst2'" in done.stdout, done.stderr
    else:
        assert "NOT SST-2" in done.stdout
        assert "TASK movie-review snippets" in done.stdout or "make data" in done.stderr


def write_hub_cache(folder):
    import datasets
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir(parents=True)
    labels = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features(
        {"idx": datasets.Value("int32"), "sentence": datasets.Value("string"), "label": labels}
    )
    info = datasets.DatasetInfo(
        features=features,
        builder_name="parquet",
        dataset_name="sst2",
        config_name="default",
        version="0.0.0",
    )
    info.splits = datasets.SplitDict(dataset_name="sst2")
    for name in ("train", "validation"):
        with ArrowWriter(features=features, path=str(folder / f"sst2-{name}.arrow")) as writer:
            for i in range(10):
                writer.write({"idx": i, "sentence": f"sentence {i} ", "label": i % 2})
            writer.finalize()
        info.splits.add(datasets.SplitInfo(name=name, num_examples=10, dataset_name="sst2"))
    info.write_to_directory(str(folder))
