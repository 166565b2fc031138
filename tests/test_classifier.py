"""A finished training as a classifier: its probabilities, what it generates, what it refuses."""

import contextlib
import io
import textwrap

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import start_script

import experiment_7b
from collapse.files import read_json
from collapse.settings import ROOT, UserError
from collapse.sst2 import load_sst2
from common import load_classifier


@pytest.fixture(scope="module")
def folder(qwen, data_dir, tmp_path_factory):
    """Of a run as the README's example has it."""
    top = tmp_path_factory.mktemp("repository")
    line = f"--model {qwen} --data-dir {data_dir} --output-dir {top}/results_7b/smollm2-135m"
    line += " --device cpu --workers 1 --epochs 2 --batch-size 8 --max-length 12 --lora-rank 4"
    start_script(experiment_7b, f"{line} --classifier-size 10 --engram-size 6 --learning-rate 3e-3")
    return top


@pytest.mark.parametrize("kind", ["final", "best"])
def test_probabilities_are_those_of_the_training(folder, model_number, kind, data_dir):
    training = folder / f"results_7b/smollm2-135m/state/model{model_number}-seed42"
    classify, task = load_classifier(training, kind, "cpu"), load_sst2(data_dir)
    found = classify(task.validation.texts)
    assert classify.class_names == task.class_names and found.shape == (24, 2)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    right = found.argmax(1) == task.validation.labels
    correct = read_json(training / "metrics.json")["correct"][f"{kind}_cold"]
    assert "".join("01"[row] for row in right.astype(int)) == correct
    np.testing.assert_allclose(classify(task.validation.texts[3:4]), found[3:4], rtol=1e-4)
    assert classify([]).shape == (0, 2)


def test_it_generates_what_peft_does(folder, qwen):
    training = folder / "results_7b/smollm2-135m/state/model2-seed42"
    classify = load_classifier(training, device="cpu")
    plain = transformers.AutoModelForCausalLM.from_pretrained(qwen)
    plain = peft.PeftModel.from_pretrained(plain, training / "final-adapter").eval()
    ids = torch.tensor(classify.tokenizer(["good word1"])["input_ids"])
    expected = plain.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    found = classify.generate("good word1", max_new_tokens=6)
    assert found == classify.tokenizer.decode(expected, skip_special_tokens=True)


def test_the_lines_that_the_readme_shows_run(folder, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    lines = readme[readme.index("    from common import load_classifier") :].partition("\n\n")[0]
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(textwrap.dedent(lines), {})
    assert "negative" in printed.getvalue()


def test_folders_without_a_pretrained_model_are_refused(tmp_path, undisturbed):
    with pytest.raises(UserError, match="no finished training"):
        load_classifier(tmp_path)
    with pytest.raises(UserError, match="small transformer"):
        load_classifier(undisturbed / "state/model1-seed1")
