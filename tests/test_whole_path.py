"""The 7B path from start to end in small: Qwen2.5-7B's shape in shards and bfloat16, NF4 on a CPU.

Interrupted, resumed, more models and seeds, Experiment 4, load_classifier.
"""

import json

import pytest
import safetensors
import torch
import transformers
from conftest import fails, start_script, watch_steps, without_times

import common
import effective_rank_analysis
import experiment_7b
from collapse.models.pretrained import load_causal_lm, resolve_model
from studies import random_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random-qwen"
    line = f"--folder {folder} --width 64 --depth 3 --vocabulary 400 --shard-gb 0.0001"
    start_script(random_checkpoint, line)
    return folder


def test_it_is_stored_as_the_real_one_is(checkpoint, capsys):
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("qwen2", 3, 64)
    assert config.dtype == torch.bfloat16 and not config.tie_word_embeddings
    files = sorted(checkpoint.glob("model-*-of-*.safetensors"))
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == {file.name for file in files}
    for file in files:
        with safetensors.safe_open(file, "pt") as stored:
            names = stored.keys()
            assert all(stored.get_tensor(name).dtype == torch.bfloat16 for name in names)
    total = sum(2 * p.numel() for p in load_causal_lm(settings(checkpoint), CPU).parameters())
    assert index["metadata"]["total_size"] == total
    assert "is there" in fails(
        start_script, capsys, random_checkpoint, f"--folder {checkpoint} --width 64"
    )


CPU = torch.device("cpu")


def settings(folder):
    given = experiment_7b.Config(model=str(folder), quantization="none", compute_dtype="bfloat16")
    return resolve_model(given)[0]


def test_at_full_width_it_has_the_shape_of_qwen2_5_7b(tmp_path):
    sizes = random_checkpoint.sizes_of(random_checkpoint.Config(folder=tmp_path))
    assert sizes == random_checkpoint.QWEN
    with torch.device("meta"):
        causal_lm = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**sizes))
    assert causal_lm.num_parameters() == pytest.approx(7.6e9, rel=0.01)


def test_the_whole_path_in_nf4_on_a_cpu(checkpoint, data_dir, tmp_path, monkeypatch, capsys):
    line = f"--model {checkpoint} --quantization nf4 --data-dir {data_dir} --epochs 2 --device cpu"
    line += " --workers 1 --batch-size 8 --max-length 12 --lora-rank 2 --classifier-size 8"
    line += " --engram-size 4 --learning-rate 1e-3 --output-dir "
    steps = watch_steps(monkeypatch, kill_at=8)  # five an epoch: the third of the second epoch
    with pytest.raises(SystemExit) as stopped:
        start_script(experiment_7b, f"{line}{tmp_path / 'out'} --models 1")
    assert stopped.value.code == 130 and "goes on" in capsys.readouterr().err
    start_script(experiment_7b, f"{line}{tmp_path / 'out'} --models 1")
    assert len(steps) < 8 + 10  # it went on, and did not start anew
    resumed = results_in(tmp_path / "out")["models"]["model1"]["42"]
    assert resumed["resumed"]
    start_script(experiment_7b, f"{line}{tmp_path / 'undisturbed'} --models 1")
    alone = results_in(tmp_path / "undisturbed")["models"]["model1"]["42"]
    assert without_times(resumed) == without_times(alone)  # on a CPU, to the last digit
    start_script(experiment_7b, f"{line}{tmp_path / 'out'} --models 1 3 --seeds 42 43")
    found = results_in(tmp_path / "out")
    assert {key: set(runs) for key, runs in found["models"].items()} == {
        "model1": {"42", "43"},
        "model3": {"42", "43"},
    }
    assert found["settings"]["config"]["quantization"] == "nf4"
    target = f"--output-dir {tmp_path / 'ranks'} --draws 3 --data-dir {data_dir}"
    start_script(
        effective_rank_analysis,
        f"--folders {tmp_path / 'out'} --model {checkpoint} --device cpu {target}",
    )
    ranks = json.loads((tmp_path / "ranks/effective_rank_results.json").read_text())
    assert "model3" in json.dumps(ranks)
    folder = tmp_path / "out/state/model3-seed43"
    classify = common.load_classifier(folder, device="cpu", model=checkpoint)
    assert classify(["a good film"]).shape == (1, 2)


def results_in(folder):
    return json.loads((folder / "results.json").read_text())
