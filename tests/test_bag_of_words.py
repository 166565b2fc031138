"""A bag of words learns what words tell, and chooses its penalty without the validation rows."""

import bag_of_words
import numpy as np

from collapse.data.task import Rows, Task

RNG = np.random.default_rng(0)


def task_of(train: Rows, validation: Rows) -> Task:
    return Task("toy", "", "made here", ("bad", "good"), train, validation)


def rows_of(count: int) -> Rows:
    """Ten words each, one of them of the class."""
    labels = RNG.integers(2, size=count).tolist()
    words = [[f"w{n}" for n in RNG.integers(50, size=9)] + [("poor", "fine")[y]] for y in labels]
    return Rows([" ".join(RNG.permutation(row)) for row in words], labels)


def test_a_word_of_the_class_is_learned_and_no_word_of_it_is_chance():
    train, validation = rows_of(300), rows_of(200)
    found = bag_of_words.measure(task_of(train, validation))
    assert found["accuracy"] > 0.95 and found["train_rows"] == 300 and found["classes"] == 2
    blind = Rows([text.replace("fine", "poor") for text in train.texts], train.labels)
    without = Rows([text.replace("fine", "poor") for text in validation.texts], validation.labels)
    assert abs(bag_of_words.measure(task_of(blind, without))["accuracy"] - 0.5) < 0.12


def test_validation_rows_choose_nothing():
    train, validation = rows_of(200), rows_of(100)
    found = bag_of_words.measure(task_of(train, validation))
    turned = Rows(validation.texts, [1 - label for label in validation.labels])
    other = bag_of_words.measure(task_of(train, turned))
    assert (found["C"], found["held_out_accuracy"]) == (other["C"], other["held_out_accuracy"])
    assert other["accuracy"] == 1 - found["accuracy"]
