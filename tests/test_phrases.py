"""Rows that are phrases of one another: no phrase of a held-out sentence is left to train on."""

import numpy as np
import pytest

from collapse.data.phrases import maximal_phrases, rows_without_overlap
from collapse.data.sst2 import load_sst2, load_sst2_by_sentence
from collapse.data.text import corpus_text


def random_phrases(seed: int) -> list[str]:
    """Rows of 1 to 7 of four words and a comma: most are parts of others, some are equal."""
    rng = np.random.default_rng(seed)
    words = ["good", "bad", "film", "a", ","]
    return [" ".join(rng.choice(words, rng.integers(1, 8))) for _ in range(120)]


def stands_in(part: str, whole: str) -> bool:
    return f" {part} " in f" {whole} "


@pytest.mark.parametrize("seed", range(5))
def test_maximal_phrases_are_those_of_a_brute_force(seed):
    texts = random_phrases(seed)
    expected = [
        number
        for number, text in enumerate(texts)
        if text not in texts[:number]
        and not any(other != text and stands_in(text, other) for other in texts)
    ]
    assert maximal_phrases(texts) == expected
    assert len(expected) < len(texts)


@pytest.mark.parametrize("seed", range(5))
def test_rows_apart_are_those_of_a_brute_force(seed):
    texts, others = random_phrases(seed), random_phrases(seed + 10)[:6]

    def touch(text, other):
        return bool(other) and (stands_in(text, other) or stands_in(other, text))

    bare = [corpus_text(text) for text in texts]
    others_bare = [corpus_text(text) for text in others]
    apart = rows_without_overlap(texts, others)
    expected = [
        number
        for number, text in enumerate(bare)
        if text and not any(touch(text, other) for other in others_bare)
    ]
    assert apart == expected and 0 < len(apart) < len(texts)


def test_rows_apart_looks_through_punctuation_and_drops_rows_without_letters():
    texts = ["a good , film", "film", "10000 ...", "so bad", "not so bad !", "goodness"]
    assert rows_without_overlap(texts, ["a good film .", "so - bad", "!"]) == [5]


def test_sst2_by_sentence_of_a_small_set(phrases_dir):
    whole, task = load_sst2(phrases_dir), load_sst2_by_sentence(phrases_dir)
    sentences = maximal_phrases(whole.train.texts)
    half = len(sentences) // 2
    assert task.validation.texts[half:] == whole.validation.texts
    assert set(task.validation.texts[:half]) <= {whole.train.texts[i] for i in sentences}
    labels = dict(zip(whole.train.texts, whole.train.labels, strict=True))
    assert task.train.labels == [labels[text] for text in task.train.texts]
    assert len(task.train) > len(sentences) - half  # the others' phrases are kept
    assert task.folder and task.name == "SST-2 by sentence"
    assert load_sst2_by_sentence(phrases_dir) == task


def test_the_whole_of_sst2_by_sentence_leaks_nothing(shared_data, sst2_by_sentence):
    whole = load_sst2(shared_data)
    assert len(maximal_phrases(whole.train.texts)) == 6_886
    task = sst2_by_sentence
    assert (len(task.train), len(task.validation)) == (35_074, 3_872)
    assert task.validation.texts[3000:] == whole.validation.texts
    assert task.validation.labels[3000:] == whole.validation.labels
    assert 0.4 < np.mean(task.train.labels) < 0.6 and 0.4 < np.mean(task.validation.labels) < 0.6

    # brute force: one search of all validation rows for each training row, and the other way round
    train = set(task.train.texts)
    held = "\n".join(f" {text} " for text in task.validation.texts)
    assert not [text for text in train if f" {text} " in held]
    rest = "\n".join(f" {text} " for text in train)
    assert not [text for text in task.validation.texts if f" {text} " in rest]
