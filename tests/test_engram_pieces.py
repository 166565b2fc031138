"""engram_pieces.py: engrams go from a post's first piece to its second, and the study in small."""

import json

import numpy as np
import pytest
import torch
from conftest import arm_of, cells_of_row, fails, rehearse, start_script, tiny_config, tiny_model

import common
from collapse.data.batches import Split
from collapse.measures.statistics import paired_difference
from collapse.report.markdown import rows_of, table
from collapse.utils.errors import UserError
from studies import engram_pieces as study
from studies.report import own_models
from studies.shared import sweep
from studies.shared.tables import put_rows, read_rows


def words_as_tokens(texts: list[str]) -> list[list[int]]:
    """A token for each word, the same in every text."""
    words = sorted({word for text in texts for word in text.split()})
    numbers = {word: number for number, word in enumerate(words)}
    return [[numbers[word] for word in text.split()] for text in texts]


@pytest.fixture
def pieces() -> tuple[study.Pieces, study.Pieces]:
    config = study.STUDY.miniature_config(study.Config(miniature=True))
    train, validation, classes = study.load_pieces(config, words_as_tokens)
    assert classes == 2
    return train, validation


def whole_posts(pieces: study.Pieces) -> set[tuple[int, ...]]:
    both = zip(pieces.first.token_ids, pieces.second.token_ids, strict=True)
    return {tuple(torch.cat(ids).tolist()) for ids in both}


def passages(posts: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Six tokens in a row."""
    return {post[start : start + 6] for post in posts for start in range(len(post) - 5)}


def test_pieces_go_on_where_the_first_ends_and_training_shares_no_passage_with_validation(pieces):
    texts, _, _ = study.labelled_posts(True)
    beginnings = {tuple(ids[:32]) for ids in words_as_tokens(texts)}
    train, validation = map(whole_posts, pieces)
    assert len(validation) == 8 and train | validation <= beginnings
    assert [len(side.first.labels) for side in pieces] == [len(train), 8]  # none stands twice
    assert not passages(train) & passages(validation)
    for left_out in beginnings - train - validation:
        assert passages({left_out}) & passages(validation)


def test_the_engram_of_a_posts_first_piece_stands_before_its_second(pieces):
    train, _ = pieces
    posts, joined = len(train.first.labels), train.joined
    config, arm = tiny_config(batch_size=16), arm_of(3)
    trainer = common.make_trainer(tiny_model(3), joined, config, arm)
    batches, seen = study.post_batches(posts, 16, np.random.default_rng(0)), []
    sizes = [8] * (posts // 8) + [posts % 8]  # the last batch of an epoch is short
    for size, batch in zip(sizes, batches, strict=True):
        ((first, second),) = trainer.sequences(batch)
        assert len(first) == size > 0
        assert (first < posts).all() and (second == first + posts).all()
        seen += first.tolist()
    assert sorted(seen) == list(range(posts))
    assert all(joined.token_ids[posts + 3] == train.second.token_ids[3])
    assert joined.labels[posts:].tolist() == joined.labels[:posts].tolist()


def test_own_and_other_engrams_are_those_of_first_pieces():
    """A model whose engram moves it is read with each; a constant prefix has the zero one alone."""
    ids = [torch.arange(2, 10) + shift for shift in range(6)]
    labels = torch.tensor([0, 1] * 3)
    pieces = study.Pieces(Split(ids, labels), Split([row.flip(0) for row in ids], labels))
    model = tiny_model(3)
    with torch.no_grad():
        model.projector.linear.weight.mul_(50)
    found = study.measures(model, pieces)
    engrams = common.evaluate(model, pieces.first).engrams
    alike, other = (engrams[rows] for rows in study.partners(labels.numpy()))
    for prefix, given in (("own", engrams), ("alike", alike), ("other", other), ("zero", None)):
        expected = common.evaluate(model, pieces.second, given).lm_loss
        assert found[f"lm_loss_{prefix}"] == pytest.approx(expected)
    assert len({round(found[f"lm_loss_{prefix}"], 5) for prefix in study.PREFIXES}) == 4
    constant = study.measures(tiny_model("constant-prefix"), pieces)
    assert constant["lm_loss_own"] is None and constant["lm_loss_zero"] > 0


def test_partners_are_other_posts_of_the_same_and_of_another_label():
    """Also where posts stand in the order of their labels, as those of 20 Newsgroups do."""
    labels = np.repeat([0, 1, 2], [30, 2, 18])
    alike, other = study.partners(labels)
    assert (labels[alike] == labels).all() and (alike != np.arange(50)).all()
    assert (labels[other] != labels).all() and len(set(other)) > 20


def test_differences_are_paired_over_backbones_and_pilots_count_for_nothing(tmp_path):
    config = study.Config(output_dir=tmp_path)
    rng = np.random.default_rng(0)
    losses = rng.uniform(4, 5, (3, 5)).round(3)  # of the four prefixes; of the constant prefix
    for seed, (*of_prefixes, constant) in zip((0, 1, 100), losses, strict=True):
        names = [f"lm_loss_{prefix}" for prefix in study.PREFIXES]
        numbers = dict(zip(names, of_prefixes, strict=True))
        for arm, known in (("model3", numbers), ("constant-prefix", {"lm_loss_zero": constant})):
            row = {"training": arm, "seed": seed, "arm": arm} | dict.fromkeys(study.MEASURES)
            row |= {"git_commit": "", "weights_sha256": ""}
            put_rows(sweep.table_of(config.folder, seed), [row | known], "training")
    found = study.summary(config)
    for title, column in zip(study.COMPARISONS, (1, 2, 3, 4), strict=True):
        sides = (dict(enumerate(losses[:2, place])) for place in (0, column))
        assert found[title]["lm_loss"] == pytest.approx(paired_difference(*sides))
        assert found[title]["accuracy"]["n"] == 0
        row = cells_of_row(table(own_models.PIECES_COLUMNS, rows_of(found, "title")), title)
        assert row["LM loss, nats"].startswith(f"{found[title]['lm_loss']['mean']:+.4f} [")


def test_miniature_goes_on_with_what_a_table_lacks(tmp_path):
    assert rehearse(study, tmp_path).count("LM loss (accuracy)") == 4
    folder = tmp_path / "limit-miniature" / "miniature"
    found = json.loads((folder / "results.json").read_text())
    assert [pair["lm_loss"]["n"] for pair in found.values()] == [2, 2, 2, 2]
    table = folder / "seed-1.csv"
    before = read_rows(table)
    table.unlink()
    put_rows(table, before[:1], "training")
    assert rehearse(study, tmp_path).count("LM loss (accuracy)") == 1
    assert read_rows(table) == before
    config = study.STUDY.miniature_config(study.Config(output_dir=tmp_path, learning_rate=0.1))
    with pytest.raises(UserError, match="learning_rate"):
        study.STUDY.run_missing(config)


def test_pieces_of_more_tokens_than_were_pretrained_are_refused(capsys):
    said = fails(start_script, capsys, study, "--piece-tokens 128")
    assert "--piece-tokens is 128: it must be between 2 and 127" in said
