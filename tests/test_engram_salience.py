"""engram_salience.py: pairs that give nothing away, what the tables say, and the study in small."""

import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import cells_of_row, rehearse

import common
from collapse.data.task import Rows
from collapse.models.pretrained import load_tokenizer
from collapse.report.markdown import table
from collapse.utils.errors import UserError
from studies import engram_salience as study
from studies.report import own_models
from studies.shared import finetune
from studies.shared.tables import put_rows, read_rows

LETTERS = "abcdefghij"


def word(number: int) -> str:
    """A word of letters alone that no other number has."""
    return "".join(LETTERS[int(digit)] for digit in f"{number:05}")


def sentence(number: int, words: int = 9) -> str:
    return " ".join(word(20 * number + place) for place in range(words))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """60 sentences of SST-2 with two phrases of each; 50 headlines, 5 of them in both splits."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "SST-2").mkdir()
    rows = []
    for number in range(60):
        whole = sentence(number)
        rows += [(text, number % 2) for text in (whole, whole[:23], whole[-17:])]
    for name, part in (("train", rows), ("dev", [(sentence(n), n % 2) for n in range(60, 70)])):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in part)]
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "ag_news_csv").mkdir()
    for name, numbers in (("train", range(100, 150)), ("test", range(145, 180))):
        # A row goes on differently after the words that are kept.
        lines = [f'"{n % 4 + 1}","{sentence(n, 18)}","{name}"' for n in numbers]
        (folder / "ag_news_csv" / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


def texts_of(pairs: study.Pairs) -> tuple[set[str], set[str]]:
    """Sentences and headlines; of a headline always the first HEADLINE_WORDS words are there."""
    sentences, headlines = set(), set()
    for text, first in zip(pairs.texts, pairs.sentence_first, strict=True):
        words = text.split()
        place = len(words) - study.HEADLINE_WORDS if first else study.HEADLINE_WORDS
        sides = " ".join(words[:place]), " ".join(words[place:])
        sentences.add(sides[0] if first else sides[1])
        headlines.add(sides[1] if first else sides[0])
    return sentences, headlines


@pytest.mark.parametrize("on_tuning_rows", [False, True])
def test_nothing_that_is_measured_is_trained_on(data_dir, on_tuning_rows, monkeypatch):
    """No headline, and no sentence nor phrase of it: each sentence here has words of its own."""
    monkeypatch.setattr(study, "TUNING_ROWS", 8)
    pairs = study.load_pairs(data_dir, on_tuning_rows)
    train, held = map(texts_of, pairs)
    assert not train[1] & held[1] and len(train[1]) == (42 if on_tuning_rows else 45)
    assert len(pairs[1].texts) == (8 if on_tuning_rows else 35)
    assert held[0] <= {sentence(number) for number in range(70)}
    words = {word for text in held[0] for word in text.split()}
    assert not any(words & set(text.split()) for text in train[0])
    assert len({len(text.split()) for text in train[0]}) > 1  # phrases, too


def test_neither_label_nor_order_tells_of_another():
    sources = Rows([word(n) for n in range(700)], [int(n < 400) for n in range(700)])
    others = Rows([word(n) for n in range(700, 1000)], [int(n % 3 == 0) for n in range(300)])
    pairs = study.pair_up(sources, others, 12_000, seed=0)
    assert pairs.sentence_first.sum() == 6000
    columns = np.column_stack([pairs.labels, pairs.sentence_first])
    assert np.abs(np.corrcoef(columns.T) - np.eye(3)).max() < 0.03
    known = dict(zip(sources.texts, sources.labels, strict=True))
    told = dict(zip(others.texts, others.labels, strict=True))
    counts = dict.fromkeys([*known, *told], 0)
    for text, (a, b), first in zip(pairs.texts, pairs.labels, pairs.sentence_first, strict=True):
        one, two = text.split() if first else reversed(text.split())
        assert (known[one], told[two]) == (a, b)
        counts[one] += 1
        counts[two] += 1
    assert {counts[text] for text in known} == {17, 18} and {counts[text] for text in told} == {40}


def test_the_label_that_is_trained_is_the_splits(data_dir):
    train, _ = study.load_pairs(data_dir)
    for place, label in enumerate(study.LABELS):
        split = train.split(label, lambda texts: [[len(text)] for text in texts])
        assert split.labels.tolist() == train.labels[:, place].tolist()


def put(folder: Path, trial: study.Trial, **numbers: float | None) -> None:
    row = {"training": trial.name, **dataclasses.asdict(trial)}
    row |= {"step": 9} | dict.fromkeys(study.MEASURES) | numbers
    row |= {"git_commit": "", "weights_sha256": ""}
    put_rows(folder / f"seed-{trial.seed}.csv", [row], "training")


def test_p4_is_the_mean_of_both_directions_of_backbones_that_learned(tmp_path):
    rng, values, against = np.random.default_rng(0), [], []
    for seed in (0, 1, 2, 3, 4, 100):
        both = []
        for number, label in enumerate(study.LABELS):
            own, other, random_own, random_other = rng.uniform(0, 0.3, 4).round(3)
            both.append((own - other, random_own - random_other))
            indices = {f"ari_{label}": own, f"ari_{study.LABELS[1 - number]}": other}
            indices[f"ari_untrained_{label}"] = random_own
            indices[f"ari_untrained_{study.LABELS[1 - number]}"] = random_other
            accuracy = 0.7 if (seed, label) == (3, "topic") else 0.71  # 70% does not exceed it
            numbers = indices | {f"probe_{name}": 0.5 for name in study.LABELS}
            trial = study.Trial(seed, label, "model3")
            put(tmp_path / "newsgroups", trial, accuracy=accuracy, lm_loss=5.0, **numbers)
        if seed not in (3, 100):
            values.append(np.mean([a for a, _ in both]))
            against.append(np.mean([a - b for a, b in both]))
    config = study.Config(output_dir=tmp_path)
    results = study.summary(config)
    found = results["P4"]
    assert found["n"] == 4 and found["mean"] == pytest.approx(np.mean(values))
    test = scipy.stats.ttest_1samp(values, 0)
    for name, level in (("holm_at_most", 0.99), ("interval_90", 0.9)):
        expected = test.confidence_interval(level)
        assert (found[name]["low"], found[name]["high"]) == pytest.approx(tuple(expected))
    assert found["margin"] == 0.05 and "not all planned seeds ran" in found["text"]
    (arm,) = results["arms"]
    assert arm["less_random_compressor"]["mean"] == pytest.approx(np.mean(against))
    assert arm["all_backbones"]["n"] == 5
    learned = {row["trained"]: row["learned"] for row in results["trainings"]}
    assert learned == {"sentiment": 5, "topic": 4}
    topic = next(row for row in results["trainings"] if row["trained"] == "topic")
    random, own = (
        topic[f"ari{kind}_topic"]["mean"] - topic[f"ari{kind}_sentiment"]["mean"]
        for kind in ("_untrained", "")
    )
    assert topic["less_random"]["mean"] == pytest.approx(own - random)
    assert topic["less_random"]["n"] == 5


def test_the_figure_shows_each_backbone_with_either_label(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(study, "save_figure", lambda figure, _: drawn.append(figure))
    for seed in (0, 1):
        numbers = {"ari_sentiment": 0.1 + seed, "ari_topic": 0.3 + seed, "lm_loss": 5.0}
        numbers |= {"ari_untrained_sentiment": 0.5, "ari_untrained_topic": 0.7}
        put(tmp_path / "newsgroups", study.Trial(seed, "topic", "model3"), **numbers)
    study.draw(study.Config(output_dir=tmp_path), {})
    assert [axis.get_title() for axis in drawn[0].axes][1] == "topic is trained"
    dots = [list(line.get_ydata()) for line in drawn[0].axes[1].lines if line.get_marker() == "."]
    assert dots == [[0.1, 1.1], [0.3, 1.3], [0.5, 0.5], [0.7, 0.7]]


def test_p4_is_done_when_all_backbones_ran(tmp_path):
    whole = {name: 0.9 - 0.01 * place for place, name in enumerate(study.MEASURES)}
    for seed in range(20):
        for label in study.LABELS:
            if (seed, label) == (19, "topic"):
                config = study.Config(output_dir=tmp_path)
                assert not study.summary(config)["P4"]["done"]
            shifted = {name: value + 0.001 * seed for name, value in whole.items()}
            put(tmp_path / "newsgroups", study.Trial(seed, label, "model3"), **shifted)
    assert study.STUDY.report(config)["P4"]["done"]
    assert (config.folder / "engrams.png").exists()  # without a training of the LM loss alone


def test_measures_are_of_the_engrams_that_a_cold_reading_gives(monkeypatch):
    """Engrams tell of the topic alone; the states, that a random compressor reads, of the other."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (200, 2))
    sides = (2 * labels - 1.0)[:, :, None] + 0.1 * rng.standard_normal((200, 2, 6))
    cold = common.Evaluation(
        logits=np.eye(2)[labels[:, 0]],
        labels=labels[:, 0],
        pooled=sides[:, 0].astype(np.float32),
        pooled_without_first=sides[:, 0].astype(np.float32),
        intermediate=np.zeros((200, 3)),
        engrams=sides[:, 1],
        layers=None,
        cls_loss=0.5,
        lm_loss=4.0,
    )
    asked = []
    monkeypatch.setattr(common, "evaluate", lambda *given: asked.append(given) or cold)
    model = types.SimpleNamespace(engram_input=lambda pooled, intermediate: pooled)
    found = study.measures(model, "rows", labels, seed=3)
    assert asked == [(model, "rows")]  # no engram of a row before
    assert found["accuracy"] == 1 and found["lm_loss"] == 4
    assert found["ari_topic"] == 1 and found["probe_topic"] == 1
    assert abs(found["ari_sentiment"]) < 0.05 and abs(found["probe_sentiment"] - 0.5) < 0.15
    assert found["ari_untrained_sentiment"] > 0.9 and abs(found["ari_untrained_topic"]) < 0.05


def test_a_training_that_diverged_is_counted_and_its_backbone_left_out(tmp_path):
    whole = {
        f"{kind}_{label}": 0.1
        for kind in ("ari", "ari_untrained", "probe")
        for label in study.LABELS
    }
    for seed in range(2):
        for label in study.LABELS:
            numbers = (
                {} if (seed, label) == (1, "topic") else {"accuracy": 0.9, "lm_loss": 5.0} | whole
            )
            put(tmp_path / "newsgroups", study.Trial(seed, label, "model3"), **numbers)
    results = study.summary(study.Config(output_dir=tmp_path))
    assert [row["diverged"] for row in results["trainings"]] == [0, 1]
    assert results["P4"] is None and results["arms"][0]["all_backbones"]["n"] == 1
    assert study.text(results)
    row = cells_of_row(table(own_models.TRAINING_COLUMNS, results["trainings"]), "topic")
    assert (row["backbones"], row["diverged"], row["learned"]) == ("1", "1", "1")
    row = cells_of_row(table(own_models.SALIENCE_COLUMNS, results["arms"]), "Dual + Engram")
    assert row["of all backbones"] == "+0.000" and row["learned both labels"] == "1 of 2"


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("study")
    return folder, rehearse(study, folder)


def test_miniature_runs_every_trial_and_trains_only_what_is_lost_again(miniature):
    folder = miniature[0] / "limit-miniature" / "miniature"
    results = json.loads((folder / "results.json").read_text())
    assert results["runs"] == 2 * (2 * 2 + 1) and len(results["trainings"]) == 6
    assert miniature[1].count("adjusted Rand index") == 10 and (folder / "engrams.png").exists()
    table = folder / "seed-1.csv"
    before = read_rows(table)
    steps = [row["step"] for row in before if row["trained"] == study.NEITHER]
    assert steps == ["0", "10", "20"]
    lost = before[0]["training"]
    table.unlink()
    kept = [row for row in before if row["training"] != lost]
    for name in dict.fromkeys(row["training"] for row in kept):
        put_rows(table, [row for row in kept if row["training"] == name], "training")
    assert rehearse(study, miniature[0]).count("adjusted Rand index") == 1
    key = lambda row: (row["training"], int(row["step"]))  # noqa: E731
    assert sorted(read_rows(table), key=key) == sorted(before, key=key)


def test_rows_of_another_rate_are_refused(miniature):
    config = study.STUDY.miniature_config(study.Config(output_dir=miniature[0], learning_rate=0.1))
    with pytest.raises(UserError, match="learning_rate"):
        study.STUDY.run_missing(config)


def test_no_label_reaches_the_model_that_the_lm_loss_alone_trains(miniature):
    config = study.STUDY.miniature_config(study.Config(output_dir=miniature[0]))
    trial = study.Trial(0, study.NEITHER, "model3")
    recipe = study.recipe_of(config, trial)
    train, _ = study.load_pairs(None, toy=True)
    ends = []
    for label in study.LABELS:
        model, _ = finetune.build(recipe, 2)
        split = train.split(label, load_tokenizer(recipe.model))
        trainer = common.make_trainer(model, split, recipe.config(), study.arm_of(trial))
        finetune.train(recipe, trainer, lambda step: ())
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_arms_without_an_engram_and_no_arms_are_refused():
    with pytest.raises(UserError, match="has no engram"):
        study.STUDY.check_config(study.Config(arms=("3", "2")))
    for empty in ({"trained": ()}, {"arms": (), "trained": ("neither",)}):
        with pytest.raises(UserError, match="is empty"):
            study.STUDY.check_config(study.Config(**empty))


def test_only_the_labels_asked_for_are_trained():
    asked = study.Config(arms=("3", "lm-only-engram"), trained=("topic", "neither"))
    (trials,) = study.trials(dataclasses.replace(asked, seeds=(0,)))
    arms = [(trial.trained, trial.arm) for trial in trials]
    assert arms == [("topic", "model3"), ("topic", "lm-only-engram"), ("neither", "model3")]
    (everything,) = study.trials(study.Config(arms=("3",), seeds=(0,)))
    assert [trial.trained for trial in everything] == ["sentiment", "topic", "neither"]
