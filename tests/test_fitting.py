"""benefit.py and class_count.py: choice of the epoch, merged labels, P1, P3, P5 from tables."""

import collections
import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import cells_of_row

from collapse.data.clinc_domains import CLINC_DOMAINS
from collapse.measures.predictions import pack, read_named_rows, unpack
from collapse.measures.statistics import crossed_interval, sets_interval
from collapse.report.markdown import rows_of, table
from collapse.utils.errors import UserError
from studies import benefit, class_count
from studies.report import own_models
from studies.shared import finetune, pilots, sweep
from studies.shared.tables import put_rows, read_rows

# --------------------------------------------------------------------------------------------------
# Merged labels
# --------------------------------------------------------------------------------------------------


def test_merges_are_nested_within_domains():
    """Whoever knows the finer class knows the coarser one."""
    for fine, coarse in itertools.pairwise(sorted(class_count.COUNTS, reverse=True)):
        small, large = class_count.nested_classes(fine), class_count.nested_classes(coarse)
        pairs = {(small[intent], large[intent]) for intent in CLINC_DOMAINS}
        assert len(pairs) == fine
        assert set(large.values()) == set(range(coarse))
    ten = class_count.nested_classes(10)
    assert len({(ten[intent], domain) for intent, domain in CLINC_DOMAINS.items()}) == 10


def test_classes_of_a_merge_have_like_sizes():
    for count in (10, 30, 75, 150):
        sizes = collections.Counter(class_count.nested_classes(count).values())
        assert max(sizes.values()) - min(sizes.values()) <= (2 if count == 75 else 0)
    with pytest.raises(UserError, match="no 20 classes"):
        class_count.nested_classes(20)


def test_random_merges_differ_between_seeds_and_are_balanced():
    one, two = class_count.random_classes(30, 0), class_count.random_classes(30, 1)
    assert one != two and one == class_count.random_classes(30, 0)
    assert set(collections.Counter(one.values()).values()) == {5}


def test_a_balanced_draw_has_as_many_rows_of_each_label():
    labels = [0] * 7 + [1] * 5 + [2] * 9
    drawn = class_count.balanced_draw(labels, 4)
    assert collections.Counter(labels[n] for n in drawn) == {0: 4, 1: 4, 2: 4}
    assert list(drawn) == sorted(set(drawn))


# --------------------------------------------------------------------------------------------------
# What a training gives
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny backbone, its recipe and data."""
    folder = tmp_path_factory.mktemp("lm")
    config = benefit.Config(corpus="miniature", models_dir=folder)
    sweep.pretrain.backbones([0], "miniature", folder)
    recipe = finetune.Recipe(
        model=sweep.model_of(config, 0),
        dataset=finetune.TOY,
        arm="1",
        learning_rate=1e-2,
        seed=0,
        steps=0,
        train_rows=64,
        corpus_text=True,
        all_weights=True,
        max_length=32,
    )
    split = finetune.load_split(finetune.TOY, None)
    data = finetune.as_tokens(recipe.model, recipe.max_length, *split)
    return finetune.whole_epochs(recipe, data, 3), data


def test_tuning_rows_are_no_training_rows(made):
    _, data = made
    train, tuned = ({tuple(ids.tolist()) for ids in s.token_ids} for s in (data.train, data.tuning))
    assert len(data.tuning.labels) == 16 and not train & tuned


def test_the_epoch_is_that_of_the_best_tuning_accuracy_whatever_validation_says(made):
    recipe, data = made
    records, stored = finetune.to_best_epoch(recipe, data)
    asked = [r["tuning_accuracy"] for r in records if r["tuning_accuracy"] is not None]
    assert len(asked) == 3
    end = records[-1]
    assert end["best_epoch"] == 1 + int(np.argmax(asked))
    rows = unpack(stored)
    assert rows.correct.mean() == pytest.approx(end["best_accuracy"])
    assert -rows.log_probability.mean() == pytest.approx(end["best_loss"], rel=1e-2)
    # Other validation labels change no choice, and no training.
    wrong = dataclasses.replace(data.all_validation, labels=1 - data.all_validation.labels)
    other, _ = finetune.to_best_epoch(recipe, dataclasses.replace(data, all_validation=wrong))
    assert other[-1]["best_epoch"] == end["best_epoch"]
    assert other[-1]["best_accuracy"] == pytest.approx(1 - end["best_accuracy"])
    assert [r["loss"] for r in other] == [r["loss"] for r in records]


def test_measuring_and_validating_leave_the_training_as_it_is(made):
    recipe, data = made
    watched, _ = finetune.to_best_epoch(recipe, data)
    alone, rows = finetune.to_best_epoch(recipe, data, validate=False)
    assert rows is None and "effective_rank" not in alone[0]
    for one, two in zip(watched, alone, strict=True):
        assert one["tuning_loss"] == two["tuning_loss"]
    assert watched[-1]["lm_loss"] == alone[-1]["lm_loss"]


def test_a_training_that_diverges_keeps_the_epochs_before(made):
    recipe, data = made
    wild = dataclasses.replace(recipe, learning_rate=1e6, arm="2")
    records, _ = finetune.to_best_epoch(wild, data)
    end = records[-1]
    assert end["loss"] is None and end["step"] < recipe.steps
    assert set(end) == set(records[0])


def test_a_measure_that_is_not_finite_ends_a_training_with_a_record_of_none(made):
    recipe, data = made
    model, _ = finetune.build(recipe, data.classes)

    def measure(step):
        if step != 1:
            yield {"step": step, "loss": 1.0}
        if step == 2:
            raise FloatingPointError("an output is not finite")

    records = finetune.train(recipe, finetune.trainer_of(recipe, model, data.train), measure)
    assert [(record["step"], record["loss"]) for record in records] == [(0, 1), (2, 1), (2, None)]


def test_rows_of_many_trainings_share_a_file(tmp_path):
    rng = np.random.default_rng(0)
    stored = {}
    for name in ("AG News, model1, 1e-3", "AG News, model2, 1e-3"):
        correct = rng.random(21) < 0.5
        stored[name] = correct
        pilots.put_rows(tmp_path / "rows-0.safetensors", name, pack(correct, *-rng.random((2, 21))))
    found = read_named_rows(tmp_path / "rows-0.safetensors", "/")
    assert found.keys() == stored.keys()
    assert all((found[name].correct == stored[name]).all() for name in stored)
    assert read_named_rows(tmp_path / "rows-1.safetensors", "/") == {}


# --------------------------------------------------------------------------------------------------
# P5: rank at equal training loss
# --------------------------------------------------------------------------------------------------


def run_of(losses, ranks, **trial):
    kind = {"seed": 0, "dataset": "AG News", "arm": "model1", "rate": -3.0} | trial
    path = [
        {"loss": loss, "effective_rank_within": rank}
        for loss, rank in zip(losses, ranks, strict=True)
    ]
    return pilots.Run(benefit.Trial(**kind), path)


def test_ranks_are_compared_where_both_have_the_same_loss():
    """One falls to 0.1, the other to 0.4: at 0.4 the first had rank 20, by a straight line."""
    one = run_of([1.6, 0.4, 0.1], [80, 20, 5])
    two = run_of([1.6, 0.8, 0.4], [80, 60, 40])
    assert benefit.rank_at_equal_loss(one, two) == pytest.approx(math.log(40 / 20))
    assert benefit.rank_at_equal_loss(two, one) == pytest.approx(-math.log(40 / 20))
    # Between two measurements log rank is linear in log loss: half-way from 1.6 to 0.4 is 0.8.
    assert benefit.log_rank_at(one.path, 0.8) == pytest.approx(math.log(40))


def test_the_first_time_a_loss_is_reached_counts_and_a_loss_never_reached_has_no_rank():
    path = run_of([1.0, 0.5, 0.7, 0.2], [64, 32, 16, 8]).path
    assert benefit.log_rank_at(path, 0.5) == pytest.approx(math.log(32))
    assert benefit.log_rank_at(path, 0.1) is None
    diverged = run_of([1.0, None], [64, None])
    assert benefit.rank_at_equal_loss(diverged, run_of([1.0, 0.5], [64, 32])) == pytest.approx(0)


# --------------------------------------------------------------------------------------------------
# Endpoints from tables
# --------------------------------------------------------------------------------------------------


def write_study(config, seeds, rng):
    """Tables as the study writes them: pilots that choose 1e-3 and 1e-2.5, rows at random."""
    truth = {}
    for seed in (*sweep.PILOTS, *seeds):
        pilot = seed in sweep.PILOTS
        for dataset, arm in itertools.product(config.datasets, ("model1", "model2")):
            best = -3.0 if arm == "model1" else -2.5
            for rate in config.rates if pilot else dict.fromkeys((best, -3.0)):
                trial = benefit.Trial(seed, dataset, arm, rate)
                correct = rng.random(40) < (0.6 if arm == "model1" else 0.7)
                write_run(config.folder, trial, correct, rng, 0.8 if rate == best else 0.7)
                truth[seed, dataset, arm, rate] = correct
    return truth


def write_run(folder, trial, correct, rng, tuned=0.8):
    """A training in a table, with its validation rows where it is no pilot."""
    rows = path_of(trial, tuned, rng, correct.mean())
    put_rows(sweep.table_of(folder, trial.seed), rows, "training")
    if trial.seed not in sweep.PILOTS:
        packed = pack(correct, *np.zeros((2, len(correct))))
        pilots.put_rows(pilots.rows_file(folder, trial.seed), trial.name, packed)


def path_of(trial, tuned, rng, right):
    head = {"training": trial.name, **dataclasses.asdict(trial)}
    end = dict.fromkeys(finetune.AT_THE_END, 0.5) | {"best_epoch": 1, "seconds": 2.0}
    end["best_accuracy"] = right
    losses, ranks = (1.0, 0.5 * rng.random()), (90.0, 30 + 30 * rng.random())
    return [
        head
        | {"step": step, "epoch": step, "loss": losses[step]}
        | {"effective_rank_within": ranks[step], "tuning_accuracy": tuned if step else None}
        | (end if step else dict.fromkeys(end, 0.5))
        | {"git_commit": "none", "weights_sha256": "none", "hardware": "a CPU"}
        for step in (0, 1)
    ]


@pytest.fixture
def study(tmp_path):
    config = benefit.Config(
        datasets=("AG News", "Banking77"), output_dir=tmp_path, rates=(-3.0, -2.5)
    )
    config.folder.mkdir(parents=True)
    return config, write_study(config, range(4), np.random.default_rng(0))


def test_the_rate_is_chosen_by_tuning_accuracy_on_pilots(study):
    config, _ = study
    rates = benefit.chosen_rates(config)
    assert rates["AG News", "model1"] == -3.0 and rates["Banking77", "model2"] == -2.5
    with pytest.raises(UserError, match=r"CLINC150.*not run whole"):
        benefit.chosen_rates(dataclasses.replace(config, datasets=("CLINC150",)))


def test_a_pilot_that_is_not_whole_chooses_nothing(study):
    config, _ = study
    tried = dataclasses.replace(config, rates=(-3.0, -2.5, -2.0))
    with pytest.raises(UserError, match="not run whole"):
        benefit.chosen_rates(tried)


def test_a_backbone_without_one_of_the_sets_is_not_in_the_mean(study):
    """Sets with other seeds: the mean pairs by seed, not by place."""
    config, truth = study
    trial = benefit.Trial(0, "AG News", "model2", -2.5)
    other = benefit.Trial(3, "Banking77", "model2", -2.5)
    for lost in (trial, other):
        diverged = path_of(lost, 0.8, np.random.default_rng(0), None)
        diverged[-1]["best_epoch"] = None
        put_rows(sweep.table_of(config.folder, lost.seed), diverged, "training")
    found = benefit.summary(config)
    means = [
        np.mean(truth[s, d, "model2", -2.5]) - np.mean(truth[s, d, "model1", -3.0])
        for s in (1, 2)
        for d in config.datasets
    ]
    assert found["P1"]["n"] == 2 and found["P1"]["mean"] == pytest.approx(np.mean(means))
    assert found["arms"]["AG News"]["model2"]["diverged"] == 1


def test_rows_of_another_training_than_the_tables_are_refused(study):
    config, _ = study
    trial = benefit.Trial(0, "AG News", "model1", -3.0)
    packed = pack(np.zeros(40, dtype=bool), *np.zeros((2, 40)))
    pilots.put_rows(pilots.rows_file(config.folder, 0), trial.name, packed)
    with pytest.raises(UserError, match="are of two trainings"):
        benefit.summary(config)


def test_endpoints_of_some_of_the_sets_are_not_done(study):
    config, _ = study
    write_study(config, range(4, sweep.PLANNED), np.random.default_rng(1))
    found = benefit.summary(config)
    assert found["P1"]["n"] == found["P5"]["n"] == sweep.PLANNED
    boot = found["P1"]["pigeonhole"]  # asks for the same, without a normal distribution
    assert boot["mean"] == pytest.approx(found["P1"]["mean"])
    assert 0.7 < boot["se"] / found["P1"]["se"] < 1.8
    assert all("not all planned" in found[name]["text"] for name in ("P1", "P5"))


def test_rows_made_with_another_size_are_not_gone_on_with(tmp_path):
    table = tmp_path / "seed-0.csv"
    put_rows(table, [{"training": "a", "rate": 0.00177828, "epochs": 4}], "training")
    settings = {"rate": 10**-2.75, "epochs": 4}  # rows hold six digits
    sweep.check_settings(table, lambda row: settings)
    with pytest.raises(UserError, match="epochs 4, not 3"):
        sweep.check_settings(table, lambda row: settings | {"epochs": 3})


def test_p1_is_the_mean_over_sets_of_each_model_at_its_own_rate(study):
    config, truth = study
    found = benefit.summary(config)
    arrays = [
        np.stack(
            [truth[s, d, "model2", -2.5] * 1.0 - truth[s, d, "model1", -3.0] for s in range(4)]
        )
        for d in config.datasets
    ]
    assert found["P1"]["mean"] == pytest.approx(np.mean([a.mean() for a in arrays]))
    assert found["P1"]["se"] == pytest.approx(sets_interval(arrays)["se"])
    assert "not all planned seeds ran" in found["P1"]["text"]
    per_set = found["accuracy_differences"]["model2"]["AG News"]
    assert per_set["mean"] == pytest.approx(crossed_interval(arrays[0])["mean"])


def test_tables_tell_what_the_summary_holds(study):
    config, truth = study
    found = benefit.summary(config)
    row = cells_of_row(own_models.table_differences(found), "Dual Head minus Model 1")
    assert row["mean of its sets"].startswith(f"{100 * found['P1']['mean']:+.2f} [")
    assert row["backbones with all its sets"] == "4"
    row = cells_of_row(
        table(own_models.BENEFIT_COLUMNS, rows_of(found["arms"], "data", "arm")),
        "Banking77",
        "Dual Head",
    )
    mean = 100 * np.mean([truth[seed, "Banking77", "model2", -2.5].mean() for seed in range(4)])
    assert row["accuracy, %"] == f"{mean:.1f}"
    row = cells_of_row(own_models.table_rank_at_equal_loss(found), "mean, P5")
    assert list(row.values())[1].startswith(f"{found['P5']['mean']:+.2f} [")


def put_seconds(folder, seed, arm, rate, seconds, hardware="a CPU", ended=True):
    rows = path_of(benefit.Trial(seed, "AG News", arm, rate), 0.8, np.random.default_rng(0), 0.5)
    rows[0]["seconds"] = None
    rows[-1] |= {"seconds": seconds, "lm_loss": 5.0 if ended else None}
    rows = [row | {"hardware": hardware} for row in rows]
    put_rows(sweep.table_of(folder, seed), rows, "training")


def test_times_are_of_one_backbone_on_one_cpu_at_each_models_own_rate(study):
    """Not at another's rate, not on a GPU, not over another backbone's, nor of one that diverged.

    Pairs that count are first, so that one that should not would take their place.
    """
    config, _ = study
    for seed in (*range(4), *sweep.PILOTS):  # the fixture's are of a GPU here
        table = sweep.table_of(config.folder, seed)
        table.write_text(table.read_text().replace("a CPU", "NVIDIA H100"))
    for seed, slow in ((20, 1.0), (21, 10.0)):  # two machines of unlike speed
        put_seconds(config.folder, seed, "model1", -3.0, 2.0 * slow)
        put_seconds(config.folder, seed, "model2", -2.5, (6.0 if seed == 20 else 8.0) * slow)
        put_seconds(config.folder, seed, "model2", -3.0, 500.0)
        put_seconds(config.folder, seed, "model1", -2.5, 700.0)
    put_seconds(config.folder, 22, "model1", -3.0, 2.0)
    put_seconds(config.folder, 22, "model2", -2.5, 900.0, hardware="another CPU")
    put_seconds(config.folder, 23, "model1", -3.0, 2.0)
    put_seconds(config.folder, 23, "model2", -2.5, 0.1, ended=False)
    found = benefit.summary(config)["times"]
    assert list(found) == ["AG News"] and list(found["AG News"]) == ["model2"]
    assert found["AG News"]["model2"]["mean"] == 3.5 and found["AG News"]["model2"]["n"] == 2


def test_what_is_kept_is_model_2s_change_less_model_1s_at_model_1s_rate(study):
    config, _ = study
    rng = np.random.default_rng(1)
    changes = {}
    for seed, dataset in itertools.product(range(4), config.datasets):
        table = sweep.table_of(config.folder, seed)
        for arm, rate in (("model1", -3.0), ("model2", -3.0), ("model2", -2.5)):
            trial = benefit.Trial(seed, dataset, arm, rate)
            rows = [dict(row) for row in read_rows(table) if row["training"] == trial.name]
            change, scaled = rng.normal(size=2)
            lost = (seed, dataset, arm, rate) == (3, "Banking77", "model2", -3.0)
            before = float(rows[0]["transfer_accuracy"])
            rows[-1]["transfer_accuracy"] = None if lost else before + change
            rows[-1]["best_scaled_loss"] = scaled
            put_rows(table, rows, "training")
            changes[seed, dataset, arm, rate] = change, scaled
    read = benefit.read_study(config)
    found = benefit.kept_differences(read, config.datasets)
    for number, name, rate, seeds in (
        (0, "transfer_kept", -3.0, range(3)),
        (1, "best_scaled_loss", -2.5, range(4)),
    ):
        values = [
            changes[s, "Banking77", "model2", rate][number]
            - changes[s, "Banking77", "model1", -3.0][number]
            for s in seeds
        ]
        assert found["Banking77"][name]["mean"] == pytest.approx(np.mean(values))
        assert found["Banking77"][name]["n"] == found["mean"][name]["n"] == len(values)
    assert found["mean"]["language_kept"]["mean"] == 0  # the fixture changes none
    kept = [changes[s, "AG News", "model2", -2.5][0] for s in range(4)]
    ends = benefit.summarize_arm(read, "AG News", "model2")
    assert ends["transfer_kept"]["mean"] == pytest.approx(np.mean(kept))


def test_p5_is_at_model_1s_rate_for_both(study):
    config, _ = study
    read = benefit.read_study(config)
    values = {}
    for seed in range(4):
        sides = []
        for d in config.datasets:
            pair = [read.runs[d, m, -3.0][seed] for m in ("model1", "model2")]
            sides.append(benefit.rank_at_equal_loss(*pair))
        values[seed] = np.mean(sides)
    found = benefit.summary(config)["P5"]
    expected = scipy.stats.ttest_1samp(list(values.values()), 0).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


def test_sets_are_counted_alike_and_one_set_is_the_crossed_interval():
    rng = np.random.default_rng(0)
    small, large = rng.normal(size=(5, 10)), 1 + rng.normal(size=(5, 1000))
    found = sets_interval([small, large])
    assert found["mean"] == pytest.approx((small.mean() + large.mean()) / 2)
    one, crossed = sets_interval([small]), crossed_interval(small)
    assert one["se"] == pytest.approx(crossed["se"]) and one["df"] == pytest.approx(crossed["df"])
    with pytest.raises(ValueError, match="seeds differ"):
        sets_interval([small, large[:4]])


@pytest.mark.parametrize(
    ("seeds_vary", "rows_vary"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.5), (0.2, 0.5)]
)
def test_the_interval_over_sets_excludes_no_effect_rarely(seeds_vary, rows_vary):
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(400):
        of_seed = seeds_vary * rng.normal(size=(10, 1))
        arrays = [
            of_seed + rows_vary * rng.normal(size=(1, n)) + rng.normal(size=(10, n))
            for n in (60, 40, 30)
        ]
        found = sets_interval(arrays)
        wrong += found["low"] > 0 or found["high"] < 0
    assert wrong / 400 <= 0.075  # 0.05 and two and a half standard errors


def test_p3_is_the_slope_of_the_gain_in_logits(tmp_path):
    """Made-up rows: Model 2 gains a tenth of a logit with each doubling of the classes."""
    config = class_count.Config(output_dir=tmp_path, rates=(-3.0, -2.5))
    config.folder.mkdir(parents=True)
    n = 100_000
    for seed in (*sweep.PILOTS, *range(3)):
        for count, arm in itertools.product(class_count.COUNTS, class_count.MODELS):
            trial = class_count.Trial(seed, count, "nested", arm, -3.0)
            gain = 0.1 * math.log2(count) + 0.02 * (seed - 1) if arm == "model2" else 0.0
            correct = np.arange(n) < round(n / (1 + math.exp(-0.5 - gain)))
            rng = np.random.default_rng([seed, count])
            write_run(config.folder, trial, correct, rng)
            other = dataclasses.replace(trial, rate=-2.5)  # a rate that was not chosen
            write_run(config.folder, other, ~correct, rng, 0.7)
    study = class_count.read_study(config)
    gains = class_count.gains_of(study, "nested", class_count.COUNTS)
    slopes = [class_count.slope(by_count) for by_count in gains.values()]
    assert len(slopes) == 3 and slopes == pytest.approx([0.1] * 3, abs=1e-3)
    assert class_count.logit(np.array([True, True, False])) == pytest.approx(math.log(2.5 / 1.5))
    boot = class_count.pigeonhole_slope(study, class_count.COUNTS, draws=50)
    assert boot["low"] < 0.1 < boot["high"]


def test_no_text_is_trained_on_and_measured(shared_data):
    """In corpus text some rows of the official splits are the same."""
    for task, tuned in (
        finetune.load_split("Banking77", shared_data),
        class_count.load_merged(10, "nested", 0, shared_data),
    ):
        train, held = set(task.train.texts), set(task.validation.texts)
        assert not train & held and not set(tuned.texts) & (train | held)


def test_merged_rows_are_the_same_whatever_the_number_of_classes(shared_data):
    two, twos = class_count.load_merged(2, "nested", 0, shared_data)
    all_, alls = class_count.load_merged(150, "nested", 0, shared_data)
    assert two.train.texts == all_.train.texts and twos.texts == alls.texts
    assert set(collections.Counter(all_.train.labels).values()) == {50}
    assert len(twos) == finetune.TUNING_ROWS and not set(twos.texts) & set(two.train.texts)
    intents = sorted(CLINC_DOMAINS)
    to_class = class_count.nested_classes(2)
    assert all(
        to_class[intents[fine]] == coarse
        for fine, coarse in zip(all_.train.labels, two.train.labels, strict=True)
    )
    assert torch.tensor(two.validation.labels).bincount().min() > 0
