"""A finished training as a classifier: its probabilities, what it generates, what it refuses; and
what a run puts on the hub.
"""

import contextlib
import io
import re
import shutil
import textwrap

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import fails, start_script

import experiment_7b
from collapse.data.sst2 import load_sst2
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT, read_json
from common import load_classifier


@pytest.fixture(scope="module")
def train(qwen, data_dir):
    """train(output folder, options): experiment_7b.py in small."""
    line = f"--model {qwen} --data-dir {data_dir} --device cpu --workers 1 --epochs 2"
    line += " --batch-size 8 --max-length 12 --lora-rank 4 --classifier-size 10 --engram-size 6"

    def start(output, options=""):
        options = f"--learning-rate 3e-3 --output-dir {output} {options}"
        start_script(experiment_7b, f"{line} {options}")

    return start


@pytest.fixture(scope="module")
def folder(train, tmp_path_factory):
    top = tmp_path_factory.mktemp("repository")
    train(top / "results_7b/smollm2-135m")
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


def test_the_lines_that_the_readme_shows_run(folder, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    lines = readme[readme.index("    from common import load_classifier") :].partition("\n\n")[0]
    named = tmp_path / re.search(r"results_7b/.+(?=/state/)", lines)[0]
    named.parent.mkdir(parents=True)
    named.symlink_to(folder / "results_7b/smollm2-135m")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(textwrap.dedent(lines), {})
    assert "negative" in printed.getvalue()


def test_folders_without_a_pretrained_model_are_refused(tmp_path, undisturbed):
    with pytest.raises(UserError, match="no finished training"):
        load_classifier(tmp_path)
    with pytest.raises(UserError, match="small transformer"):
        load_classifier(undisturbed / "state/model1-seed1")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in this folder: repositories are OWNER/NAME below it, and others are refused."""

    class Hub:
        def create_repo(self, name, private, exist_ok):
            huggingface_hub.utils.validate_repo_id(name)
            if "/" not in name:
                raise OSError("no token here")
            assert private and exist_ok
            return huggingface_hub.RepoUrl(f"{huggingface_hub.constants.ENDPOINT}/{name}")

        def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name: str(tmp_path / name), raising=False
    )
    return tmp_path


def test_what_is_pushed_to_the_hub_works_where_it_was_downloaded(
    folder, train, hub, qwen, data_dir, monkeypatch
):
    run = folder / "results_7b/smollm2-135m"
    train(run, "--models 1 --push-to-hub someone/thing")  # the folder's models 2 and 3 go, too
    monkeypatch.chdir(qwen.parent)  # where the pretrained model is found by its name
    texts = load_sst2(data_dir).validation.texts
    for name in ("model1-seed42", "model2-seed42", "model3-seed42"):
        here, there = (
            load_classifier(path / name) for path in (run / "state", hub / "someone/thing")
        )
        np.testing.assert_array_equal(here(texts), there(texts))
        assert here.generate("good word1") == there.generate("good word1")
    shared = [path for path in (hub / "someone/thing").rglob("*") if path.is_file()]
    assert not [path for path in shared if str(qwen.parent).encode() in path.read_bytes()]


def test_the_model_card_has_the_numbers_of_the_run_and_its_code_runs(
    folder, train, hub, qwen, monkeypatch
):
    run = folder / "results_7b/smollm2-135m"
    train(run, "--push-to-hub someone/thing")
    card = (hub / "someone/thing/README.md").read_text()
    for key, runs in read_json(run / "results.json")["models"].items():
        line = next(line for line in card.splitlines() if line.startswith(f"| `{key}-seed42`"))
        final = runs["42"]["val"][-1]
        assert f"{final['accuracy']:.2%}" in line and f"{final['effective_rank']:.1f}" in line
    monkeypatch.chdir(qwen.parent)
    monkeypatch.syspath_prepend(ROOT)
    ours, plain = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(ours, {})
    assert "negative" in printed.getvalue()
    exec(plain.replace('"someone/thing"', f'"{hub}/someone/thing"'), {})


def test_a_hub_that_refuses_costs_no_training(train, hub, tmp_path, capsys):
    for name, reason in (("thing", "no token here"), ("a/b/c", "HFValidationError")):
        error = fails(train, capsys, tmp_path / "run", f"--push-to-hub {name}")
        assert reason in error and "auth login" in error
    assert not (tmp_path / "run").exists()
