"""A finished training as a classifier: its probabilities, what it generates, what it refuses; and
what a run puts on the hub.
"""

import contextlib
import io
import json
import re
import shutil
import textwrap

import datasets
import huggingface_hub
import numpy as np
import pandas
import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import fails, start_script

import common
import experiment_7b
from collapse.data.registry import preparation
from collapse.data.sst2 import load_sst2
from collapse.runs import sharing
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


def test_a_classifier_pools_as_its_training_did(train, tmp_path, data_dir):
    train(tmp_path, "--models 1 --epochs 1 --pooling last")
    training, rows = tmp_path / "state/model1-seed42", load_sst2(data_dir).validation
    right = load_classifier(training, device="cpu")(rows.texts)[range(24), rows.labels]
    end = read_json(training / "metrics.json")["val"][-1]
    assert -np.log(right).mean() == pytest.approx(end["cls_loss"], rel=1e-4)


def test_it_generates_what_peft_does(folder, qwen):
    training = folder / "results_7b/smollm2-135m/state/model2-seed42"
    classify = load_classifier(training, device="cpu")
    plain = transformers.AutoModelForCausalLM.from_pretrained(qwen)
    plain = peft.PeftModel.from_pretrained(plain, training / "final-adapter").eval()
    ids = torch.tensor(classify.tokenizer(["good word1"])["input_ids"])
    expected = plain.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    for module in classify.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9  # which is off
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


# --- what it is handed ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classify(folder):
    return load_classifier(folder / "results_7b/smollm2-135m/state/model3-seed42", device="cpu")


TEXTS = ["good word1 word2", "bad word3", "word4"]


@pytest.mark.parametrize(
    "texts",
    [
        tuple(TEXTS),
        (text for text in TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        pandas.Series(TEXTS, index=[7, 3, 5]),
        pandas.Index(TEXTS),
        dict.fromkeys(TEXTS).keys(),
        io.StringIO("\n".join(TEXTS) + "\n"),
        datasets.Dataset.from_dict({"text": TEXTS})["text"],
        [f" \n{text}\t\n" for text in TEXTS],
    ],
    ids=lambda texts: type(texts).__name__,
)
def test_any_iterable_of_strings_is_read_as_the_training_read_it(classify, texts):
    np.testing.assert_array_equal(classify(texts), classify(TEXTS))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a film", r"a list of texts is needed, and this is a str: give \[text\]"),
        (b"a film", "this is a bytes"),
        (None, "this is a NoneType"),
        (3, "this is a int"),
        (np.array("a film"), "this is a ndarray"),
        ({"a film": 1}, "this is a dict"),
        (pandas.DataFrame({"text": TEXTS}), "this is a DataFrame"),
        (["good", None], r"row 2 is a NoneType \('None'\) and no text: leave it out"),
        (["good", float("nan")], "row 2 is a float"),
        (pandas.Series(["good", pandas.NA], dtype="string"), "row 2 is a NAType"),
        (np.array([["good", "bad"]]), "row 1 is a ndarray"),
        ([("title", "body")], r"row 1 is a tuple .*joined parts by a space"),
        ([["good"]], "row 1 is a list"),
        ([5], "row 1 is a int"),
        (datasets.Dataset.from_dict({"text": TEXTS}), "row 1 is a dict"),
        (["good", " \n"], "row 2 is an empty text"),
        (["good", "\ud83d"], "row 2 holds an unpaired surrogate"),
    ],
    ids=str,
)
def test_what_is_no_list_of_texts_is_one_sentence(classify, texts, message):
    with pytest.raises(UserError, match=message) as refused:
        classify(texts)
    assert "\n" not in str(refused.value)


def test_white_space_inside_a_text_is_as_in_training():
    kept, run = ("own.csv", "SST-2", "AG News, 9-row training subset"), " a  b\n"
    for name in kept:
        origin = {"origin": {"dataset": name}} if name == "own.csv" else {}
        assert preparation({"name": name, **origin})(run) == "a  b"
    for name in ("CLINC150", "Banking77", "20 Newsgroups"):
        assert preparation({"name": name})(run) == "a b"


def test_a_token_that_the_model_has_not_is_named(classify, monkeypatch):
    monkeypatch.setattr(classify.model.backbone.get_input_embeddings(), "num_embeddings", 5)
    for call in (lambda: classify(["good"]), lambda: classify.generate("good")):
        with pytest.raises(UserError, match="the model's embedding has 5 rows"):
            call()


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [2, [2, 3], [], None])
@pytest.mark.parametrize("pad", [None, 4])
def test_models_with_several_end_tokens_or_none_generate(classify, end, pad, monkeypatch):
    settings = classify.model.adapters.get_base_model().generation_config
    expected = classify.generate("good", 4)
    monkeypatch.setattr(settings, "eos_token_id", end)
    monkeypatch.setattr(settings, "pad_token_id", pad)
    assert isinstance(classify.generate("good", 4), str)
    if end is None:
        assert classify.generate("good", 4) == expected


def test_no_text_begins_with_the_models_own_first_token_or_is_refused(classify, monkeypatch):
    settings = classify.model.adapters.get_base_model().generation_config
    monkeypatch.setattr(settings, "bos_token_id", None)
    with pytest.raises(UserError, match="no token to go on from: give a word"):
        classify.generate("")
    monkeypatch.setattr(settings, "bos_token_id", 7)
    begin = classify.tokenizer.convert_ids_to_tokens(7)
    assert classify.generate("", 5) == classify.generate(begin, 5)


@pytest.mark.parametrize("text", [["a film"], ("a", "b"), None, 3, b"a"])
def test_generate_takes_one_text(classify, text):
    with pytest.raises(UserError, match="generate continues one text, and this is a"):
        classify.generate(text)


def test_generate_takes_a_length(classify):
    for length in (0, -1):
        with pytest.raises(UserError, match=f"max_new_tokens is {length}: it must be 1 or more"):
            classify.generate("good", length)


# --- a study that moved ---------------------------------------------------------------------------


@pytest.fixture
def moved(train, qwen, tmp_path):
    """A training of model 1, and the pretrained model in a place of its own."""
    model = shutil.copytree(qwen, tmp_path / "models/mine")
    train(tmp_path / "out", f"--models 1 --epochs 1 --model {model}")
    return tmp_path / "out/state/model1-seed42", model


def test_a_base_model_that_moved_is_named_and_its_new_place_given(moved, tmp_path, qwen):
    training, model = moved
    before = load_classifier(training, device="cpu")(TEXTS)
    new = model.rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=rf"{model} .* is not there: .*model=FOLDER.*--model FOLDER"
    ):
        load_classifier(training, device="cpu")
    np.testing.assert_array_equal(load_classifier(training, device="cpu", model=new)(TEXTS), before)
    file = new / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.norm.weight"] += 1
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="holds other weights"):
        load_classifier(training, device="cpu", model=str(new))


def test_a_model_of_the_hub_may_have_a_name_without_an_owner(moved, monkeypatch):
    training, _ = moved
    file = training.parent / "settings.json"
    settings = json.loads(file.read_text())
    settings["config"] |= {"model": "gpt2", "model_commit": "c0ffee"}
    file.write_text(json.dumps(settings))

    def load_tokenizer(name, revision):
        raise UserError(f"{name} at {revision}")

    monkeypatch.setattr(common, "load_tokenizer", load_tokenizer)  # the hub is not asked here
    with pytest.raises(UserError, match="gpt2 at c0ffee"):
        load_classifier(training, device="cpu")


def test_a_training_is_found_from_inside_and_names_what_a_copy_of_it_lacks(
    moved, tmp_path, monkeypatch
):
    training, _ = moved
    monkeypatch.chdir(training)
    expected = load_classifier(".", device="cpu")(TEXTS)
    alone = shutil.copytree(training, tmp_path / "alone/model1-seed42")
    with pytest.raises(UserError, match=r"has no settings\.json of its run beside it or in it"):
        load_classifier(alone, device="cpu")
    shutil.copy(training.parent / "settings.json", alone)
    np.testing.assert_array_equal(load_classifier(alone, device="cpu")(TEXTS), expected)
    with pytest.raises(UserError, match="named like model2-seed42"):
        load_classifier(shutil.copytree(alone, tmp_path / "mine"), device="cpu")
    for name in ("final-adapter/adapter_config.json", "final.safetensors"):
        (alone / name).unlink()
        with pytest.raises(UserError, match=f"lacks {name}: copy the whole folder"):
            load_classifier(alone, device="cpu")
    with pytest.raises(UserError, match="holds no finished training"):
        load_classifier("~/nothing", device="cpu")


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


def test_published_trainings_that_were_made_elsewhere_are_not_pushed(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "results_7b/smollm2-135m", run)
    shutil.rmtree(run / "state/model3-seed42")  # as in a fresh clone
    pushed = sharing.lay_out(run, tmp_path / "hub", "someone/thing")
    assert pushed == ["model1-seed42", "model2-seed42"]


def test_the_model_card_has_the_numbers_of_the_run_and_its_code_runs(
    folder, train, hub, qwen, monkeypatch
):
    run = folder / "results_7b/smollm2-135m"
    train(run, "--push-to-hub someone/thing")
    card = (hub / "someone/thing/README.md").read_text()
    assert "pooled by mean." in card
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
