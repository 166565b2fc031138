"""Tiny models and data for the tests: every test runs in seconds on a CPU."""

import contextlib
import gc
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import common
import experiment
from collapse.data.batches import Split, length_grouped_batches
from collapse.data.sst2 import load_sst2_by_sentence
from collapse.data.task import Task
from collapse.measures.layers import POOLINGS
from collapse.report import plots
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
# Options of experiment.py for runs of a second or two.
TINY = "--device cpu --workers 1 --epochs 2 --batch-size 8 --max-length 12 --vocabulary-size 60"
TINY += " --hidden-size 16 --heads 2 --feed-forward-size 24 --classifier-size 10 --engram-size 6"
TINY += " --learning-rate 3e-3"
NORMAL = np.random.default_rng(0).normal(size=(50, 50))
DEGENERATE = [  # features and labels without a spread, a pair or a direction to measure
    (NORMAL[:9, :4], np.zeros(9, int)),  # one class
    (np.full((9, 4), 3.3), np.arange(9) % 3),  # no spread at all
    (np.tile(NORMAL[:3, :4], (3, 1)), np.repeat(np.arange(3), 3)),  # equal class means
    (NORMAL[:3], np.arange(3)),  # a row a class, N < D
    (NORMAL[:, :2], np.arange(50) % 3),
    (np.zeros((1, 4)), np.zeros(1, int)),
    (NORMAL[:1, :4], np.zeros(1, int)),  # one row
    (np.zeros((4, 1)), np.array([0, 0, 0, 1])),
]
SHARED_DATA = ROOT.parent / "shared" / "data"


def tiny_config(**changes) -> experiment.Config:
    settings = {
        "epochs": 2,
        "batch_size": 8,
        "max_length": 12,
        "vocabulary_size": 40,
        "hidden_size": 16,
        "heads": 2,
    }
    settings |= {"feed_forward_size": 24, "classifier_size": 10, "engram_size": 6} | changes
    return experiment.Config(**settings)


def random_split(
    rows: int = 30, seed: int = 0, longest: int = 12, vocabulary: int = 40, classes: int = 2
) -> Split:
    """Random rows of 1 to `longest` tokens; the label is the class of the row's first token, which
    is learnable.
    """
    rng = np.random.default_rng(seed)
    ids = [
        torch.from_numpy(rng.integers(2, vocabulary, length))
        for length in rng.integers(1, longest + 1, rows)
    ]
    return Split(ids, torch.tensor([int(i[0]) % classes for i in ids]))


def arm_of(number: int | str) -> common.Arm:
    return common.find_arm(str(number))


def tiny_model(number: int | str, seed: int = 0, **changes) -> common.DualHeadModel:
    """A small model in evaluation mode, so that dropout does not hide what a test looks for."""
    torch.manual_seed(seed)
    return experiment.build_model(arm_of(number), 2, tiny_config(**changes)).eval()


def trainer_of(name, split=None, model=None, **changes):
    config = tiny_config(**changes)
    model = model or tiny_model(name, **changes)
    return common.make_trainer(model, split or random_split(), config, arm_of(name))


def train(trainer, epochs, rate=3e-3):
    trainer.model.train()
    for epoch in range(epochs):
        rng = np.random.default_rng([0, epoch])
        for rows in length_grouped_batches(trainer.split.lengths, 8, rng):
            sums = trainer.step(rows, rate)
    return sums


def unpacked_nf4(linear: torch.nn.Module) -> torch.Tensor:
    """The weight of a layer in NF4, by its definition."""
    packed, state = linear.weight.data.view(-1), linear.weight.quant_state
    numbers = torch.stack([packed >> 4, packed & 15], 1).view(-1).long()[: state.shape.numel()]
    scales, blocks = state.absmax, torch.arange(len(state.absmax))
    if state.nested:  # scales in 8 bits, with scales of their own
        inner = state.state2
        scales = inner.code[scales.long()] * inner.absmax[blocks // inner.blocksize] + state.offset
    scales = scales[torch.arange(len(numbers)) // state.blocksize]
    return (state.code[numbers] * scales).view(state.shape)


@pytest.fixture(autouse=True, scope="module")
def freeze_imports() -> None:
    """Trainings collect garbage; a million objects of imported modules are none."""
    gc.unfreeze()  # what a module before has left may be garbage now
    gc.collect()
    gc.freeze()


@pytest.fixture(params=[1, 2, 3])
def model_number(request) -> int:
    return request.param


@pytest.fixture(params=POOLINGS)
def pooling(request) -> str:
    return request.param


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.exists():
        pytest.skip(
            f"needs the full data sets in {SHARED_DATA.relative_to(ROOT.parent)} "
            "beside the repository"
        )
    return SHARED_DATA


@pytest.fixture(scope="session")
def sst2_by_sentence() -> Task:
    """The whole of it; loading takes seconds."""
    if not SHARED_DATA.exists():
        pytest.skip("needs the whole of SST-2 beside the repository, in shared/data")
    return load_sst2_by_sentence(SHARED_DATA)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return write_tiny_sst2(tmp_path_factory.mktemp("data"))


def write_tiny_sst2(folder: Path) -> Path:
    """A tiny SST-2 in the official layout."""
    rng = np.random.default_rng(0)
    (folder / "SST-2").mkdir()
    for name, rows in (("train", 40), ("dev", 24)):
        lines = ["sentence\tlabel"]
        for _ in range(rows):
            words, label = (
                [f"word{i}" for i in rng.integers(0, 50, rng.integers(1, 14))],
                rng.integers(0, 2),
            )
            lines.append(" ".join([*words, ("bad", "good")[label]]) + f"\t{label}")
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def phrases_dir(tmp_path_factory) -> Path:
    """A tiny SST-2 whose training rows are 20 sentences and phrases of them; words have letters
    alone, which the language models' text keeps.
    """
    folder, rng = tmp_path_factory.mktemp("phrases"), np.random.default_rng(0)
    (folder / "SST-2").mkdir()
    for name, sentences in (("train", 20), ("dev", 6)):
        rows = {}
        for _ in range(sentences):
            words = ["".join(rng.choice(list("aeioubdfglmn"), 4)) for _ in range(8)]
            words.append(("bad", "good")[label := int(rng.integers(2))])
            phrases = [words, words[4:], words[:3], words[2:6]]
            rows |= {" ".join(words): label for words in (phrases if name == "train" else [words])}
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows.items())]
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def cells_of_row(table: str, *row: str) -> dict[str, str]:
    """Head -> cell of the one row of a table that holds these cells."""
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    (found,) = [line for line in lines if set(row) <= set(line)]
    return dict(zip(lines[0], found, strict=True))


def fails(run, capsys, *arguments, **keywords) -> str:
    """The one line that a failing run leaves on stderr; its exit code must be 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, **keywords)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


PLOTS = ("plot_learning_curves", "plot_measured", "plot_engram_clusters")


def start_script(script, line: str, with_plots: bool = False) -> None:
    """Run a script with this command line as a shell would, in this process; plots take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for plot in () if with_plots else PLOTS:
            patch.setattr(plots, plot, lambda *_: None)
        patch.setattr(sys, "argv", [script.__name__, *line.split()])
        run_script(script.main)


def rehearse(study, folder: Path) -> str:
    """Run the miniature of a study, or what is missing of it; what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        start_script(study, f"--miniature --output-dir {folder}")
    return printed.getvalue()


def run_tiny(data: Path, folder: Path, options: str = "", with_plots: bool = False) -> dict:
    """experiment.py in small, started as by a shell, in this process; its results.json."""
    line = f"--data-dir {data} --output-dir {folder} {TINY} {options}"
    start_script(experiment, line, with_plots)
    return json.loads((folder / "results.json").read_text())


def watch_steps(monkeypatch, kill_at: int | None = None, error=KeyboardInterrupt) -> list:
    """(trainer, rows, rate) of every optimizer step from here; the one of this number is killed,
    those after it are not.
    """
    seen, step = [], common.Trainer.step

    def watched(self, rows, rate):
        seen.append((self, rows, rate))
        if len(seen) == kill_at:
            raise error
        return step(self, rows, rate)

    monkeypatch.setattr(common.Trainer, "step", watched)
    return seen


@pytest.fixture
def run(data_dir, tmp_path):
    """run("--seeds 1 2", folder) starts experiment.py as a shell would, in this process; returns
    its results.json.
    """

    def run_experiment(arguments="", folder=tmp_path / "out", data=data_dir):
        return run_tiny(data, folder, arguments)

    return run_experiment


@pytest.fixture(scope="session")
def undisturbed(data_dir, tmp_path_factory):
    """Folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_tiny(data_dir, folder, "--seeds 1 2", with_plots=True)
    return folder


def without_times(value):
    """Results without what a stopped run may tell otherwise: times, and where it went on."""
    if isinstance(value, dict):
        kept = value.keys() - {"seconds", "resumed"}
        return {key: without_times(item) for key, item in value.items() if key in kept}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def save_tiny(model, folder):
    """A random causal LM and its tokenizer, as transformers stores them."""
    model.save_pretrained(folder)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    text = "good bad world sports business science word0 word1"
    tokenizer.train_from_iterator([text] * 9, SIZES["vocab_size"], show_progress=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """Its LM head is a matrix of its own, as in Qwen2.5-7B."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, tie_word_embeddings=False)
    )
    return save_tiny(model, tmp_path_factory.mktemp("models") / "tiny-qwen2")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Its LM head is the embedding, as in SmolLM2."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    )
    return save_tiny(model, tmp_path_factory.mktemp("models") / "tiny-llama")
