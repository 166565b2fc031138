"""Experiment 4: what is measured is what the models compute, planted collapse is found, and the
script's runs.
"""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import (
    arm_of,
    fails,
    random_split,
    run_tiny,
    start_script,
    tiny_config,
    tiny_model,
    train,
    trainer_of,
    without_times,
)

import common
import effective_rank_analysis as analysis
import experiment
import experiment_7b
from collapse.data.registry import load_again
from collapse.measures.rank import random_subsets, rank_metrics, ranks_from_gram, singular_values
from collapse.measures.statistics import mean_interval, seeds_and_rows_interval
from collapse.models.pretrained import load_causal_lm
from collapse.report import model_records, rank_plots, records
from collapse.report.model_records import Splits
from collapse.utils.files import read_json

SHORT = "--epochs 1 --learning-rate 2e-4"
STUDY, BACKBONE = "SST-2, ", " training rows, small transformer"


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """A results folder of Experiment 1: three tiny models, two seeds."""
    folder = tmp_path_factory.mktemp("trained")
    run_tiny(data_dir, folder, f"{SHORT} --seeds 1 2")
    return folder


@pytest.fixture
def run(data_dir, tmp_path, monkeypatch, request):
    """run(arguments) starts the script as a shell would, in this process; returns
    effective_rank_results.json.
    """
    if "design_asks" not in request.node.name:  # seconds each; one test draws them
        monkeypatch.setattr(rank_plots, "plot_all", lambda *_: None)

    def run_analysis(arguments="", folder=tmp_path / "out"):
        start_script(
            analysis,
            f"--data-dir {data_dir} --output-dir {folder} --device cpu --draws 5 {arguments}",
        )
        return json.loads((folder / "effective_rank_results.json").read_text())

    return run_analysis


class ProjectedBackbone(torch.nn.Module):
    """A backbone whose states are squeezed into C - 1 dimensions."""

    def __init__(self, backbone, dimensions):
        super().__init__()
        self.backbone, self.layers = backbone, backbone.layers
        directions = torch.linalg.qr(torch.randn(16, dimensions)).Q  # (D, C - 1)
        self.register_buffer("projection", directions @ directions.T)

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def forward(self, inputs_embeds):
        output = self.backbone(inputs_embeds)
        output.last_hidden_state = output.last_hidden_state @ self.projection
        return output


def test_a_planted_collapse_is_found_and_none_where_there_is_none():
    split = random_split(rows=64, longest=6, classes=3)
    found = []
    for planted in (False, True):
        torch.manual_seed(0)
        model = experiment.build_model(arm_of(1), 3, tiny_config())
        if planted:
            model.backbone = ProjectedBackbone(model.backbone, dimensions=2)
        train(trainer_of(1, split, model, learning_rate=3e-3), epochs=30)
        found.append(analysis.measure(model, Splits(split, split, split), draws=3))
    healthy, collapsed = found
    assert healthy["accuracy"] > 0.9 and collapsed["accuracy"] > 0.6  # both learnt something
    assert collapsed["effective_rank"] <= 2 + 1e-6 and collapsed["dims_99pct"] <= 2
    assert collapsed["cdnv"] < healthy["cdnv"]
    assert healthy["effective_rank"] > 5
    assert (
        collapsed["layers"][-2]["effective_rank"] > 5
    )  # and it sits where it was planted: behind the last layer
    for subset in collapsed["subsets"].values():
        assert max(subset) <= 2 + 1e-3
    assert (
        max(collapsed["halves"]["effective_rank"])
        <= 2 + 1e-3
        < min(healthy["halves"]["effective_rank"])
    )
    assert np.mean(collapsed["halves"]["cdnv"]) < np.mean(healthy["halves"]["cdnv"])


def test_features_are_those_that_the_trainer_pooled(model_number, trained, data_dir):
    """The loaded model's features equal what a training step pools, first half of the pair: the
    cold prefix included.
    """
    settings = read_json(trained / "state" / "settings.json")
    task = load_again(settings["data"], data_dir)
    encode, models = analysis.models_of(trained, settings, task, "final", torch.device("cpu"))
    split = encode(task.validation)
    model = next(model for key, seed, model in models if (key, seed) == (f"model{model_number}", 2))
    features = common.evaluate(model, split, with_layers=True)
    pooled = []
    model.register_forward_hook(
        lambda module, inputs, output: pooled.append(output.pooled.detach())
    )
    config = tiny_config(batch_size=24)
    trainer = common.make_trainer(model, split, config, arm_of(model_number))
    trainer.accumulate_gradients(np.arange(24))  # evaluation mode: no dropout
    first = pooled[0].numpy()
    assert len(first) == (12 if model_number == 3 else 24)
    np.testing.assert_allclose(features.pooled[: len(first)], first, atol=1e-5)
    assert np.array_equal(features.layers.pooled[-1, 0], features.pooled)
    if model_number == 3:
        model.projector = model.compressor = None
        assert (
            np.abs(common.evaluate(model, split).pooled - features.pooled).max() > 1e-2
        )  # the prefix was there


def test_a_training_is_measured_with_the_pooling_of_its_settings(run, data_dir, tmp_path):
    run_tiny(data_dir, tmp_path / "last", f"{SHORT} --seeds 1 --models 2 --pooling last")
    (study,) = run(f"--folders {tmp_path / 'last'}").values()
    training = read_json(tmp_path / "last/state/model2-seed1/metrics.json")
    found, expected = study["model2"], training["val"][-1]
    for number in ("accuracy", "effective_rank"):
        assert found[number] == pytest.approx(expected[number], rel=1e-4)
    ranks = found["effective_rank_without_first"], expected["effective_rank"]
    assert ranks[0] == pytest.approx(ranks[1], rel=1e-4)  # the last token's state in both


@pytest.mark.parametrize("model_number", [1, 3])
def test_layers_are_pooled_as_the_whole_hidden_states_would_be(model_number, pooling):
    """Against Hugging Face's output_hidden_states, row by row: its last entry is behind the final
    norm, as our last is.
    """
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    causal_lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    engram_size = 6 if model_number == 3 else None
    model = common.DualHeadModel(
        causal_lm.model,
        16,
        common.ClassificationHead(16, 10, 2),
        engram_size=engram_size,
        pooling=pooling,
    ).eval()
    split = random_split(9)
    states = common.evaluate(model, split, with_layers=True).layers
    found, rest = states.pooled[:, 0], states.pooled[:, 1]
    assert found.shape == (5, 9, 16)  # embeddings, three layers, final norm
    assert min(split.lengths) == 1  # a row that keeps its first token
    for row, ids in enumerate(split.token_ids):
        embeddings = causal_lm.model.embed_tokens(ids[None])
        if model_number == 3:
            embeddings = torch.cat([model.projector(torch.zeros(1, 6)), embeddings], dim=1)
        whole = causal_lm.model(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
        whole = torch.stack(whole).detach()[:, 0, -len(ids) :]  # (depth, tokens, D)
        others = whole[:, 1:] if len(ids) > 1 else whole
        norms = whole.norm(dim=-1)
        expected = norms[:, 0], norms[:, 1:].mean(1) if len(ids) > 1 else norms[:, 0]

        def depths(array):
            return np.delete(array, -2, axis=0)  # what the final norm gets is not among them

        pool = {"mean": lambda some: some.mean(1), "last": lambda some: some[:, -1]}[pooling]
        np.testing.assert_allclose(depths(found[:, row]), pool(whole), atol=1e-5)
        np.testing.assert_allclose(depths(rest[:, row]), pool(others), atol=1e-5)
        np.testing.assert_allclose(depths(states.norms[:, :, row]).T, torch.stack(expected), 1e-4)
        last_layer = causal_lm.model.layers[-1]
        raw = []
        handle = last_layer.register_forward_hook(
            lambda module, inputs, output, raw=raw: raw.append(output)
        )
        causal_lm.model(inputs_embeds=embeddings)
        handle.remove()
        np.testing.assert_allclose(
            found[-2, row], pool(raw[0][:, -len(ids) :])[0].detach().numpy(), atol=1e-5
        )


def test_no_hook_stays_behind():
    model = tiny_model(1)
    common.evaluate(model, random_split(5), with_layers=True)
    assert not model._forward_pre_hooks and not model.backbone.layers[0]._forward_pre_hooks


@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (30, 30)])
def test_ranks_from_the_gram_matrix_are_those_from_singular_values(shape):
    features = np.random.default_rng(0).normal(size=shape) * np.geomspace(1, 1e-3, shape[1]) + 5
    for given in (features, features.astype(np.float32)):
        found, expected = ranks_from_gram(given), rank_metrics(given)
        assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-5)
    assert ranks_from_gram(np.ones(shape)) == {"effective_rank": 0.0, "stable_rank": 0.0}


def test_random_subsets_are_of_different_rows_and_the_same_for_every_model():
    first, second = random_subsets(40, 20, 3), random_subsets(40, 20, 3)
    assert np.array_equal(first, second) and all(len(set(rows)) == 20 for rows in first)
    assert not np.array_equal(first[0], first[1])


def test_results_hold_what_the_design_asks_for(run, trained, tmp_path):
    results = run(f"--folders {trained}")
    (study,) = results.values()
    assert list(results) == [f"{STUDY}40{BACKBONE}"] and study["folder"] == str(trained)
    assert study["num_samples"] == 24
    metrics = json.loads((trained / "results.json").read_text())["models"]
    for key in ("pretrained", "model1", "model2", "model3"):
        assert list(study[key]["seeds"]) == ["1", "2"]
        ranks = []
        for seed, record in study[key]["seeds"].items():
            assert len(record["layers"]) == 3  # embeddings and two layers
            expected = (
                metrics["model1"][seed]["initial"]
                if key == "pretrained"
                else metrics[key][seed]["val"][-1]
            )
            assert record["effective_rank"] == pytest.approx(expected["effective_rank"], rel=1e-4)
            assert record["accuracy"] == expected["accuracy"]
            assert {"etf_error", "cdnv", "sink_ratio", "length_share"} <= record.keys()
            names = {"ncc_agreement", "ncc_agreement_train_means", "self_duality_error"}
            assert names <= record["intermediate"].keys()
            assert {"cdnv", "etf_error", "within_spread"} <= record["train"].keys()
            assert "self_duality_error" in record["train"]["intermediate"]
            for depth in record["layers"]:
                assert {"effective_rank_within_without_first", "between_spread"} <= depth.keys()
            assert record["transfer_accuracy"] is None and "transfer" not in record
            if key == "model1":  # of the small models, it alone has no LM head
                assert record["lm_loss"] is None and "language_kept" not in record
            elif key != "pretrained":
                assert record["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-4)
                start = metrics[key][seed]["initial"]["lm_loss"]
                kept = expected["lm_loss"] - start
                assert key == "model3" or record["language_kept"] == pytest.approx(kept, abs=1e-4)
            ranks.append(record["effective_rank"])
        assert study[key]["effective_rank"] == pytest.approx(np.mean(ranks))
        assert study[key]["effective_rank_share"] == pytest.approx(np.mean(ranks) / 23)
        assert study[key]["intervals"]["effective_rank"] == mean_interval(ranks)
    seeds = [
        study["model1"]["seeds"][seed]["effective_rank"]
        - study["pretrained"]["seeds"][seed]["effective_rank"]
        for seed in "12"
    ]
    change = study["changes"]["model1 - pretrained"]["both"]["effective_rank"]
    assert (change["mean"], change["n_seeds"]) == (pytest.approx(np.mean(seeds)), 2)
    assert study["changes"].keys() == {f"{b} - {a}" for a, b in records.changes_of(())}
    assert study["model2"]["intermediate"]["ncc_agreement"] == pytest.approx(
        np.mean(
            [
                record["intermediate"]["ncc_agreement"]
                for record in study["model2"]["seeds"].values()
            ]
        )
    )
    both = study["changes"]["model2 - model1"]["both"]
    pairs = [[study[m]["seeds"][seed] for m in ("model1", "model2")] for seed in "12"]
    values = [
        second["effective_rank_within"] - first["effective_rank_within"] for first, second in pairs
    ]
    draws = [
        np.subtract(*(r["halves"]["effective_rank_within"] for r in pair[::-1])) for pair in pairs
    ]
    expected = seeds_and_rows_interval(values, draws, 12, 24)
    assert both["effective_rank_within"] == pytest.approx(expected)
    ratios = [np.log(second["cdnv"] / first["cdnv"]) for first, second in pairs]
    assert both["cdnv_log_ratio"]["mean"] == pytest.approx(np.mean(ratios))
    for plot in ("effective_rank.png", "neural_collapse.png", "overview.png"):
        assert (tmp_path / "out" / plot).stat().st_size > 10_000
    assert not (tmp_path / "out/rank_by_layer.png").exists()  # no line through three depths


def test_transfer_is_told_where_the_other_data_set_lies_beside(run, trained, data_dir, tmp_path):
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    shutil.copytree(data_dir, folder)
    (folder / "ag_news_csv").mkdir()
    for name, rows in (("train", 24), ("test", 12)):
        lines = [
            f'"{1 + i % 4}","word{i % 4} word{rng.integers(4, 50)}","word{i % 4}"'
            for i in range(rows)
        ]
        (folder / "ag_news_csv" / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (study,) = run(f"--folders {trained} --data-dir {folder}").values()
    for key in ("model1", "model2", "model3"):
        for seed, record in study[key]["seeds"].items():
            before = study["pretrained"]["seeds"][seed]["transfer_accuracy"]
            assert record["transfer_accuracy"] > 0.3  # one word tells the class; chance is 0.25
            assert record["transfer"] == record["transfer_accuracy"] - before


def test_results_of_an_older_run_are_summarized_as_far_as_they_go():
    """With the first three halves alone, and neither training rows nor language."""
    rng = np.random.default_rng(0)

    def record():
        numbers = {key: rng.random() for key in ("effective_rank", "stable_rank", "cdnv")}
        halves = {key: list(rng.random(4)) for key in numbers}
        intermediate = {"cdnv": 1.0}
        return {**numbers, "intermediate": intermediate, "halves": {"rows": 5, **halves}} | {
            "num_samples": 10
        }

    old = {key: {"1": record(), "2": record()} for key in ("model1", "model2")}
    study = {"folder": "f", "settings": {}, "num_samples": 10, "measured": {}, "records": old}
    found = records.summarize({"study": study})["study"]
    change = found["changes"]["model2 - model1"]
    assert set(change["both"]) == {"effective_rank", "stable_rank", "cdnv", "cdnv_log_ratio"}
    again = records.summarize(records.with_records({"study": found}))
    assert again == {"study": found}


def test_a_second_run_measures_only_what_is_new(run, trained, monkeypatch):
    first, measured = run(f"--folders {trained}"), []
    monkeypatch.setattr(  # once for each model that is measured
        model_records,
        "singular_values",
        lambda states: measured.append(1) or singular_values(states),
    )
    assert run(f"--folders {trained}") == first and not measured
    monkeypatch.setattr(analysis, "MEASURED_WITH", ("common.py",))  # stands for other code
    run(f"--folders {trained}")
    assert len(measured) == 8  # what other code measured is measured anew


def test_results_that_were_measured_otherwise_are_not_replaced_unasked(
    run, capsys, trained, tmp_path
):
    first = run(f"--folders {trained}")
    error = fails(run, capsys, f"--folders {trained} --weights best")
    assert "weights best" in error and "--fresh" in error
    assert json.loads((tmp_path / "out/effective_rank_results.json").read_text()) == first
    (study,) = run(f"--folders {trained} --weights best --fresh").values()
    assert study["measured"] == {"rows": 2000, "draws": 5, "weights": "best"}


def test_too_few_rows_are_refused(run, capsys, data_dir, tmp_path):
    folder = tmp_path / "few"
    run_tiny(data_dir, folder, f"{SHORT} --models 1 --eval-limit 3")
    assert "3 validation rows are too few" in fails(run, capsys, f"--folders {folder}")


def test_studies_without_checkpoints_here_stay(run, capsys, trained, data_dir, tmp_path):
    """As in a fresh clone, where only one of the published studies is trained again."""
    other = tmp_path / "other"
    run_tiny(data_dir, other, f"{SHORT} --models 1 --train-limit 20")
    both = run(f"--folders {other} {trained}")
    assert len(both) == 2
    assert run(f"--folders {trained}") == both
    assert f"{STUDY}20{BACKBONE} stays" in capsys.readouterr().out
    found = run(f"--folders {trained} --fresh")  # measures the one anew and keeps the other
    assert (
        without_times(found) == without_times(both)
        and found[f"{STUDY}20{BACKBONE}"] == both[f"{STUDY}20{BACKBONE}"]
    )
    assert f"{STUDY}20{BACKBONE} stays" in capsys.readouterr().out


def test_records_of_published_trainings_stay_where_their_weights_are_gone(
    run, capsys, trained, tmp_path
):
    """As in a fresh clone that has trained one of the models again."""
    folder = tmp_path / "clone"
    shutil.copytree(trained, folder)
    (before,) = run(f"--folders {folder}").values()
    shutil.rmtree(folder / "state/model2-seed1")
    (after,) = run(f"--folders {folder} --fresh").values()
    assert "whose weights are not here: model2 seed 1\n" in capsys.readouterr().out
    assert after["model2"]["seeds"].keys() == before["model2"]["seeds"].keys()
    assert after["model2"]["seeds"]["1"] == before["model2"]["seeds"]["1"]
    assert without_times(after["changes"]) == without_times(before["changes"])
    results = json.loads((folder / "results.json").read_text())
    del results["models"]["model2"]["1"]  # no longer published: nothing of it stays
    (folder / "results.json").write_text(json.dumps(results))
    (last,) = run(f"--folders {folder}").values()
    assert "1" not in last["model2"]["seeds"]


def test_a_study_is_replaced_by_its_own_folder_alone(run, trained, data_dir, tmp_path):
    """Two folders of the same data and backbone: neither order nor absence makes one take the
    other's place.
    """
    other = tmp_path / "other"
    run_tiny(data_dir, other, f"{SHORT} --models 1 --learning-rate 0.1")
    both = run(f"--folders {trained} {other}")
    assert list(both) == [f"{STUDY}40{BACKBONE}", f"{STUDY}40{BACKBONE}, {other}"]
    assert run(f"--folders {other}") == both
    assert run(f"--folders {other} {trained}") == both


def test_another_command_may_add_a_study_meanwhile(run, trained, data_dir, tmp_path, monkeypatch):
    other, measure_study = tmp_path / "other", analysis.measure_study
    run_tiny(data_dir, other, f"{SHORT} --models 1 --learning-rate 0.1")

    def measure(folder, *rest):
        study = measure_study(folder, *rest)
        if folder == trained:
            run(f"--folders {other}")
        return study

    monkeypatch.setattr(analysis, "measure_study", measure)
    assert len(run(f"--folders {trained}")) == 2


def test_adapters_are_exchanged_on_one_base_model(
    run, capsys, qwen, data_dir, tmp_path, monkeypatch
):
    """A fine-tuned language model: each seed's adapters give the rank that its training ended with;
    one load of the base.
    """
    folder, loads, load = tmp_path / "trained", [], load_causal_lm
    line = f"--model {qwen} --data-dir {data_dir} --output-dir {folder} --device cpu --seeds 1 2"
    line += " --epochs 1 --max-length 12 --workers 1"
    start_script(
        experiment_7b,
        f"{line} --lora-rank 4 --classifier-size 10 --engram-size 6 --learning-rate 1e-2",
    )
    monkeypatch.setattr(
        common, "load_causal_lm", lambda *arguments: loads.append(1) or load(*arguments)
    )
    (study,) = run(f"--folders {folder}").values()
    assert len(loads) == 1 and list(study["pretrained"]["seeds"]) == ["1"]
    metrics = json.loads((folder / "results.json").read_text())["models"]
    for key in ("model1", "model2", "model3"):
        for seed, record in study[key]["seeds"].items():
            assert record["effective_rank"] == pytest.approx(
                metrics[key][seed]["val"][-1]["effective_rank"], rel=1e-4
            )
            assert record["effective_rank"] != pytest.approx(
                study["pretrained"]["effective_rank"], rel=1e-3
            )
    assert study["pretrained"]["effective_rank"] == pytest.approx(
        metrics["model1"]["1"]["initial"]["effective_rank"], rel=1e-4
    )
    assert (
        study["changes"]["model1 - pretrained"]["both"]["effective_rank"]["n_seeds"] == 2
    )  # the one baseline serves both seeds
    for key in ("model1", "model2", "model3"):
        for seed, record in study[key]["seeds"].items():
            base = study["pretrained"]["seeds"]["1"]["lm_loss"]
            assert record["language_kept"] == pytest.approx(record["lm_loss"] - base)
            if key == "model2":
                last = metrics[key][seed]["val"][-1]["lm_loss"]
                assert record["lm_loss"] == pytest.approx(last, rel=1e-4)
    other = tmp_path / "other-weights"
    shutil.copytree(qwen, other)
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    safetensors.torch.save_file(
        tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1},
        other / "model.safetensors",
    )
    for config in folder.glob("state/*/*/adapter_config.json"):
        config.write_text(config.read_text().replace(str(qwen), str(other)))
    assert "other weights than the models were trained on" in fails(
        run, capsys, f"--folders {folder}"
    )


def test_ranks_of_several_studies_are_compared_at_matched_rows(
    run, trained, data_dir, tmp_path, monkeypatch
):
    """Two folders of the same data and backbone stay two studies, with a baseline each; a broken
    one is passed over.
    """
    other = tmp_path / "wide"
    run_tiny(data_dir, other, f"{SHORT} --hidden-size 32 --seeds 1 --models 1")
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    (broken / "state/model1-seed1/final.safetensors").write_bytes(b"cut short")
    monkeypatch.setattr(model_records, "CURVE_ROWS", (6, 9, 50))
    results = run(f"--folders {trained} {other} {broken}")
    assert list(results) == [f"{STUDY}40{BACKBONE}", f"{STUDY}40{BACKBONE}, {other}"]
    assert [study["pretrained"]["num_dimensions"] for study in results.values()] == [16, 24]
    for study in results.values():
        assert study["matched_rows"] == 9
        expected = np.mean(
            [np.mean(record["subsets"]["9"]) for record in study["model1"]["seeds"].values()]
        )
        assert study["model1"]["intervals"]["effective_rank_matched"]["mean"] == pytest.approx(
            expected
        )


def test_missing_checkpoints_are_listed_by_the_command_that_makes_them(
    run, capsys, monkeypatch, tmp_path, trained
):
    monkeypatch.setattr(analysis, "ROOT", tmp_path)
    error = fails(run, capsys)
    for script in analysis.SCRIPTS.values():
        assert f"python {script}" in error
    (tmp_path / "results").symlink_to(trained)
    run()
    notes = capsys.readouterr().out
    assert "python experiment_7b.py" in notes and "python experiment.py" not in notes
    (tmp_path / "results").rename(tmp_path / "results-of-tests")
    (tmp_path / "results").mkdir()
    shutil.copytree(trained, tmp_path / "results/movie-snippets")
    shutil.rmtree(tmp_path / "results/movie-snippets/state/model2-seed1")
    shutil.rmtree(tmp_path / "results/movie-snippets/state/model2-seed2")
    run()
    notes = capsys.readouterr().out
    assert "python experiment.py" in notes and "movie-snippets lacks model2: " in notes
    shutil.rmtree(tmp_path / "results/movie-snippets")
    shutil.copytree(trained, tmp_path / "results/limit-20-24")
    assert f"--folders {tmp_path / 'results/limit-20-24'} takes it" in fails(run, capsys)
    assert "holds no finished training" in fails(run, capsys, f"--folders {tmp_path / 'nowhere'}")


def test_other_rows_than_those_of_the_training_are_refused(
    run, capsys, trained, data_dir, tmp_path
):
    (tmp_path / "SST-2").mkdir()
    for name in ("train", "dev"):
        text = (data_dir / "SST-2" / f"{name}.tsv").read_text().replace("word1", "word2")
        (tmp_path / "SST-2" / f"{name}.tsv").write_text(text)
    assert "other rows of SST-2" in fails(run, capsys, f"--folders {trained} --data-dir {tmp_path}")
