"""Tables of the studies on own models: each number in its cell, n/a where there is none."""

import dataclasses
import json

import pytest
from conftest import cells_of_row

from collapse.measures.statistics import paired_difference
from collapse.report.markdown import rows_of
from collapse.report.markdown import table as table_of
from collapse.utils.files import write_json
from studies import class_count as class_count_study
from studies import collapse_threshold, engram_pieces, linguistic_collapse
from studies.report import findings, own_models, side_studies, thresholds
from studies.shared import sweep
from studies.shared.tables import put_rows


def interval(mean: float, n: int = 4, half: float = 0.01) -> dict:
    numbers = {"mean": mean, "low": mean - half, "high": mean + half, "se": half / 3}
    return numbers | {"df": n - 1.0, "p": 0.5, "n": n}


def endpoint(mean: float, margin: float) -> dict:
    said = {"margin": margin, "done": False, "interval_90": interval(mean, half=0.008)}
    return interval(mean) | said


NOTHING = paired_difference({}, {})  # of no seeds


# --------------------------------------------------------------------------------------------------
# benefit.py and class_count.py
# --------------------------------------------------------------------------------------------------


def ends(accuracy: float) -> dict:
    numbers = {"best_accuracy": accuracy, "best_loss": 0.512, "best_scaled_loss": 0.487}
    numbers |= {"best_epoch": 2.5, "language_kept": -0.25, "transfer_kept": -0.031}
    return {name: interval(value) for name, value in numbers.items()} | {"n": 4, "diverged": 0}


@pytest.fixture
def benefit() -> dict:
    """Two sets, a control on the first of them; Model 2 diverged everywhere on the second."""
    diverged = dict.fromkeys(ends(0)) | {"n": 3, "diverged": 3}
    both = {"AG News": interval(0.0123), "Banking77": None, "mean": None}
    control = {"AG News": interval(-0.021), "mean": interval(-0.021, n=3)}
    return {
        "rates": {"AG News, model1": -3.0, "AG News, model2": -2.5},
        "P1": endpoint(0.0042, 0.005) | {"pigeonhole": interval(0.0042, half=0.02)},
        "P1_equivalence": {"p": 0.031, "low": -0.0011, "high": 0.0047, "margin": 0.005},
        "accuracy_differences": {"model2": both, "longer": control},
        "less_model2": {"longer": {"AG News": interval(-0.033), "mean": interval(-0.033)}},
        "P5": endpoint(0.25, 0.1),
        "rank_at_equal_loss": {"AG News": interval(0.5), "Banking77": NOTHING},
        "arms": {
            "AG News": {"model1": ends(0.71), "model2": ends(0.7223), "longer": ends(0.69)},
            "Banking77": {"model1": ends(0.81), "model2": diverged},
        },
        "kept": {
            "AG News": {
                "language_kept": interval(-1.25),
                "transfer_kept": interval(-0.0215),
                "best_scaled_loss": interval(0.0123, n=3),
            },
            "Banking77": dict.fromkeys(
                ("language_kept", "transfer_kept", "best_scaled_loss"), NOTHING
            ),
        },
        "times": {"AG News": {"longer": interval(2.5, n=1), "model2": interval(2.75, n=1)}},
    }


def test_differences_in_accuracy_stand_below_their_set_and_base(benefit):
    table = own_models.table_differences(benefit)
    row = cells_of_row(table, "Dual Head minus Model 1")
    assert row["AG News"] == "+1.23 [+0.23, +2.23]" and row["Banking77"] == "n/a"
    assert row["mean of its sets"] == row["backbones with all its sets"] == "n/a"
    row = cells_of_row(table, "Longer minus Model 1")
    assert row["AG News"].startswith("-2.10") and row["backbones with all its sets"] == "3"
    assert cells_of_row(table, "Longer minus Model 2")["AG News"].startswith("-3.30")


def shown(table: str, *row: str) -> list[str]:
    """The cells after these of the one row that has them."""
    return list(cells_of_row(table, *row).values())[len(row) :]


def test_p1_stands_beside_its_bootstrap_and_its_equivalence(benefit):
    few = benefit | {"P1": endpoint(0.0042, 0.005), "P1_equivalence": None}  # no bootstrap yet
    none = benefit | {"P1": None, "P1_equivalence": None}
    whole, few, none = (
        shown(table_of(own_models.P1_COLUMNS, [results]), "Model 2 - Model 1")
        for results in (benefit, few, none)
    )
    assert whole[:3] == ["+0.42 [-0.58, +1.42]", "+0.42 [-1.58, +2.42]", "[-0.11, +0.47]"]
    assert whole[3:] == ["0.5", "0.031", "4"]
    assert few[1:3] == ["n/a", "n/a"] and set(none) == {"n/a"}


def test_ends_of_each_arm_on_each_set(benefit):
    table = table_of(own_models.BENEFIT_COLUMNS, rows_of(benefit["arms"], "data", "arm"))
    expected = ["72.2", "0.512", "0.487", "2.5", "-0.25", "-3.1", "4", "0"]
    assert shown(table, "AG News", "Dual Head") == expected
    assert shown(table, "Banking77", "Dual Head") == ["n/a"] * 6 + ["3", "3"]


def test_what_is_kept_beside_the_task(benefit):
    table = table_of(own_models.KEPT_COLUMNS, rows_of(benefit["kept"], "data"))
    expected = ["-1.25 [-1.26, -1.24]", "-2.1 [-3.1, -1.1]", "+0.012 [+0.002, +0.022]", "4, 4, 3"]
    assert shown(table, "AG News") == expected
    assert shown(table, "Banking77") == ["n/a"] * 3 + ["0"]


def test_times_of_each_arm_on_each_set(benefit):
    table = own_models.table_times(benefit)
    assert shown(table, "AG News", "Dual Head") == ["2.75", "1"]
    assert table.index("Dual Head") < table.index("Longer")


def test_ranks_at_equal_loss_of_each_set_and_p5(benefit):
    table = own_models.table_rank_at_equal_loss(benefit)
    assert shown(table, "AG News") == ["+0.50 [+0.49, +0.51]", "1.65", "4"]
    assert shown(table, "Banking77") == ["n/a", "n/a", "0"]
    assert shown(table, "mean, P5")[1] == "1.28"
    table = own_models.table_rank_at_equal_loss(benefit | {"P5": None})
    assert shown(table, "mean, P5") == ["n/a"] * 3


@pytest.fixture
def class_count() -> dict:
    def row(merge: str, classes: int) -> dict:
        ranks = {"effective_rank": 30.0 + classes, "effective_rank_within": 40.0 + classes}
        one = {"best_accuracy": interval(0.9 - classes / 1000)}
        one |= {name: interval(value) for name, value in ranks.items()}
        gains = {"accuracy_difference": interval(classes / 1000), "logit_gain": interval(0.128)}
        two = one | {"dims_95pct": interval(17.0)}
        head = {"merge": merge, "classes": classes, "seeds": 4}
        return head | gains | {"model1": one, "model2": two}  # no component of Model 1 is known

    table = [row("nested", 2), row("nested", 10), row("random", 10)]
    slope = {"low": 0.0126, "high": 0.0434, "n": 4}
    return {"rates": {"model1": -3.0}, "P3": endpoint(0.02, 0.05), "P3_rows_too": slope} | {
        "table": table
    }


def test_a_row_for_each_number_of_classes_and_merge(class_count):
    row = cells_of_row(table_of(own_models.CLASS_COLUMNS, class_count["table"]), "nested", "10")
    shown = ["+1.00 [+0.00, +2.00]", "+0.128 [+0.118, +0.138]"]
    assert [row[head] for head in list(row)[2:4]] == shown
    assert (row["accuracy, %, Model 1"], row["components, Model 1"]) == ("89.0", "n/a")
    assert (row["effective rank, Model 1"], row["within classes, Model 1"]) == ("40.0", "50.0")
    assert row["backbones"] == "4"


# --------------------------------------------------------------------------------------------------
# Engrams
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def salience() -> dict:
    """Model 3 with both labels, and one whose every training with the topic diverged."""
    numbers = {"accuracy": 0.75, "lm_loss": 5.125}
    numbers |= {"ari_sentiment": 0.3, "ari_topic": 0.1, "probe_sentiment": 0.8, "probe_topic": 0.6}
    numbers |= {"ari_untrained_sentiment": 0.05, "ari_untrained_topic": 0.02}
    known = {name: interval(value) for name, value in numbers.items()}
    without_accuracy = {name: value for name, value in known.items() if name != "accuracy"}
    both = {"backbones": 4, "diverged": 0}
    arm = {"learned": interval(0.2, n=3), "less_random_compressor": interval(0.17, n=3)}
    none = dict.fromkeys(("learned", "less_random_compressor", "all_backbones"), NOTHING)
    return {
        "runs": 9,
        "trainings": [
            {"trained": "neither", "arm": "start"} | both | without_accuracy,
            {"trained": "neither", "arm": "model3"} | both | without_accuracy,
            {"trained": "sentiment", "arm": "model3", "learned": 3, "less_random": interval(0.25)}
            | both
            | known,
            {"trained": "topic", "arm": "lm-only-engram", "learned": 0}
            | {"backbones": 0, "diverged": 4},
        ],
        "arms": [
            {"arm": "model3", "ran": 5, "all_backbones": interval(0.15)} | arm,
            {"arm": "lm-only-engram", "ran": 0} | none,
        ],
        "P4": endpoint(0.2, 0.05),
    }


def test_engrams_of_each_trained_label_beside_both_labels(salience):
    table = table_of(own_models.TRAINING_COLUMNS, salience["trainings"])
    row = cells_of_row(table, "sentiment", "Dual + Engram")
    assert (row["accuracy, %"], row["ARI, topic"]) == ("75.0", "+0.100 [+0.090, +0.110]")
    assert row["untrained compressor's, sentiment"].startswith("+0.050")
    assert row["trained - other, minus an untrained compressor's"].startswith("+0.250")
    assert (row["probe, topic, %"], row["LM loss, nats"], row["learned"]) == ("60.0", "5.125", "3")
    row = cells_of_row(table, "before training")
    assert (row["accuracy, %"], row["learned"], row["backbones"]) == ("n/a", "n/a", "4")
    assert row["ARI, sentiment"].startswith("+0.300")
    assert shown(table, "topic")[1:] == ["n/a"] * 9 + ["0", "0", "4"]


def test_salience_of_each_arm(salience):
    table = table_of(own_models.SALIENCE_COLUMNS, salience["arms"])
    row = list(cells_of_row(table, "Dual + Engram").values())
    assert [cell.split()[0] for cell in row[-4:-1]] == ["+0.200", "+0.170", "+0.150"]
    assert row[-1] == "3 of 5"
    row = next(line for line in table.splitlines() if line.endswith("| 0 of 0 |"))
    assert row.count("| n/a ") == 3


def pieces() -> dict:
    titles = list(engram_pieces.COMPARISONS)
    found = {"lm_loss": interval(0.0625), "accuracy": interval(-0.0125)}
    return {titles[0]: found, titles[1]: {"lm_loss": NOTHING, "accuracy": NOTHING}}


def test_what_second_pieces_lose():
    table = table_of(own_models.PIECES_COLUMNS, rows_of(pieces(), "title"))
    first, second = engram_pieces.COMPARISONS, list(engram_pieces.COMPARISONS)[1]
    row = list(cells_of_row(table, next(iter(first))).values())
    assert row[1:] == ["+0.0625 [+0.0525, +0.0725]", "-1.25 [-2.25, -0.25]", "4"]
    assert list(cells_of_row(table, second).values())[1:] == ["n/a", "n/a", "0"]


# --------------------------------------------------------------------------------------------------
# The collapse threshold of a given model
# --------------------------------------------------------------------------------------------------


def put_run(folder, trial: collapse_threshold.Trial, kept: float | None) -> None:
    """A training that ends with a share of its 40 components; None: it diverged."""
    head = {"training": trial.name} | dataclasses.asdict(trial) | {"steps": 150}
    numbers = dict.fromkeys(collapse_threshold.ENDS, 0.9) | {"loss": 0.5, "lm_loss": 4.0}
    known = {"chance": 0.3, "classes": 2, "rows": 1000}
    start = numbers | {"dims_95pct": 40, "accuracy": 0.3}
    end = numbers | {"dims_95pct": kept and 40 * kept} if kept else dict.fromkeys(numbers)
    tail = {"git_commit": "c0ffee0123456789", "weights_sha256": "", "hardware": "abacus"}
    rows = [head | {"step": step} | part | known | tail for step, part in ((0, start), (150, end))]
    put_rows(sweep.table_of(folder, trial.seed), rows, "training")


@pytest.fixture
def standin(tmp_path) -> collapse_threshold.Config:
    """SST-2 at three rates with three seeds, AG News at two others with two; Model 1 gives way."""
    config = collapse_threshold.Config(model="some/standin", output_dir=tmp_path)
    config.folder.mkdir()
    for dataset, rates, seeds in (("SST-2", (-3.0, -2.75, -2.5), 3), ("AG News", (-2.0, -1.0), 2)):
        for seed in range(seeds):
            for place, rate in enumerate(rates):
                trial = collapse_threshold.Trial(seed, dataset, "model2", rate)
                put_run(config.folder, trial, 0.5 if place < 2 else None)
                healthy = dataset == "SST-2" and place < (1 if seed else 2)
                trial = dataclasses.replace(trial, arm="model1")
                put_run(config.folder, trial, 0.5 if healthy else 0.1)
    return config


def test_edges_of_a_given_model_are_over_the_rates_that_ran_on_each_set(standin):
    found = collapse_threshold.summary(standin)
    one, two = found["arms"]
    assert two["edge"]["SST-2"]["mean"] == pytest.approx(-2.625)  # half-way to what diverged
    assert two["edge"]["SST-2"]["n"] == 3 and two["edge"]["AG News"]["n"] == 2
    assert two["edge"]["AG News"]["mean"] == pytest.approx(-0.5) and two["at_the_top"]["AG News"]
    assert one["edge"]["AG News"]["mean"] == pytest.approx(-2.5)
    assert one["at_the_bottom"] == {"SST-2": 0, "AG News": 2}
    assert two["shift"]["healthy"]["SST-2"]["mean"] == pytest.approx(0.5 / 3)
    assert two["shift"]["healthy"]["mean"]["n"] == 2 and found["P2"] is None
    planned = dataclasses.replace(standin, model=None, corpus="standin", rates=(-2.0, -1.0))
    assert collapse_threshold.summary(planned)["arms"][0]["edge"]["SST-2"] is None


def test_tables_of_a_given_model(standin):
    found = collapse_threshold.summary(standin)
    table = thresholds.table_threshold(found, unit="seeds")
    row = cells_of_row(table, "Dual Head")
    assert row["threshold, SST-2"] == "2.4e-03" and row["threshold, AG News"] == "≥ 3.2e-01"
    assert row["seeds"] == "3, 2"
    row = cells_of_row(table, "Classification Only")
    assert row["threshold, AG News"] == "≤ 3.2e-03" and row["shift of healthy runs"] == "0"
    row = cells_of_row(thresholds.table_shifts(found), "AG News")
    assert row["shift of healthy runs"] == "≥ +2.00 [+2.00, +2.00]" and row["pairs"] == "2"


def test_a_shift_without_pairs_is_no_shift_of_zero(standin):
    found = collapse_threshold.summary(standin)
    for row in found["arms"]:
        for shifts in row["shift"].values():
            shifts |= dict.fromkeys(shifts, NOTHING)
        row["edge"]["AG News"] = None
    row = cells_of_row(thresholds.table_threshold(found), "Dual Head")
    assert row["shift of healthy runs"] == row["threshold, AG News"] == "n/a"
    assert row["backbones"] == "3, 0"


def test_the_figure_shows_means_and_the_commonest_end(standin, monkeypatch):
    drawn = []
    monkeypatch.setattr(collapse_threshold, "save_figure", lambda figure, _: drawn.append(figure))
    collapse_threshold.draw(standin, {})
    above, other_set, below, _ = drawn[0].axes
    lines = [{line.get_label(): line for line in axis.lines} for axis in (above, below)]
    kept, accuracy = (list(found["Dual Head"].get_ydata()) for found in lines)
    assert kept == [0.5, 0.5, 0] and accuracy == [90, 90, 0]  # the last rate's diverged
    kept = list(lines[0]["Classification Only"].get_ydata())
    assert kept == pytest.approx([0.5, (0.5 + 0.2) / 3, 0.1])
    assert list(lines[0]["collapsed below"].get_ydata()) == [0.25, 0.25]
    markers = [line.get_marker() for line in above.lines if len(line.get_xdata()) == 1]
    assert markers == ["o", "v", "v", "o", "o", "*"]  # Model 1's, then Model 2's
    assert len(above.collections) == 2 and above.get_ylim() == other_set.get_ylim()


def test_the_figure_of_classes_shows_components(class_count, monkeypatch):
    drawn = []
    monkeypatch.setattr(class_count_study, "save_figure", lambda figure, _: drawn.append(figure))
    for row in class_count["table"]:
        for number, model in enumerate(class_count_study.MODELS):
            row[model]["dims_95pct"] = interval(row["classes"] + number)
    class_count_study.draw(class_count_study.Config(), class_count)
    gain, components = drawn[0].axes
    shown = {line.get_label(): list(line.get_ydata()) for line in components.lines}
    assert shown["Dual Head, within domains"] == [3, 11]
    assert shown["Classification Only, at random"] == [10]
    expected = [row["logit_gain"]["mean"] for row in class_count["table"][:2]]
    assert expected in [list(line.get_ydata()) for line in gain.lines]


# --------------------------------------------------------------------------------------------------
# In the documents
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch, benefit, class_count, salience, standin) -> dict:
    """Every study's results in a folder that stands for the repository; a table of each."""
    configs = dict(own_models.CONFIGS)
    made = {"benefit": benefit, "class_count": class_count, "engram_salience": salience}
    for name, results in (made | {"engram_pieces": pieces()}).items():
        configs[name] = dataclasses.replace(configs[name], output_dir=tmp_path / name)
        configs[name].folder.mkdir(parents=True)
        write_json(configs[name].folder / "results.json", results)
        settings = {"steps": 700, "learning_rate": 0.001, "piece_tokens": 48}
        for seed, training in ((0, "a"), (0, "b"), (sweep.PILOTS[0], "a")):
            row = {"training": training, "seed": seed} | settings
            row |= {"git_commit": "c0ffee0123456789", "weights_sha256": "", "hardware": "abacus"}
            table = sweep.table_of(configs[name].folder, seed)
            put_rows(table, [row, row | {"steps": 700}], "training")
    monkeypatch.setattr(own_models, "CONFIGS", configs)
    monkeypatch.setattr(own_models, "STANDIN", standin)
    monkeypatch.setattr(own_models, "BAG_OF_WORDS", tmp_path / "words.json")
    folder = own_models.relative(configs["benefit"].folder)
    words = [{"data": "AG News", "accuracy": 0.8, "folder": folder, "train_rows": 9, "classes": 4}]
    made_by = {"git_commit": None, "hardware": {"device": "abacus", "threads": 1}}
    write_json(tmp_path / "words.json", {"rows": words} | made_by)
    write_json(standin.folder / "results.json", collapse_threshold.summary(standin))
    return configs


def test_each_study_is_in_results_with_its_command_source_and_figure(published):
    (published["benefit"].folder / "benefit.png").touch()
    page = findings.results_page()
    text = page.text
    assert "`python studies/benefit.py --data-dir DIR`" in text
    made = "6 rows of 3 trainings, those of pilots among them, made by commit c0ffee0123 on abacus."
    assert text.count(made) == 4
    assert "/benefit.png)" in text and "rank_at_equal_loss.png" not in text  # it was not drawn
    assert "--model some/standin --arms 1 2 --steps 150 --data-dir DIR" in text
    assert "52 rows of 26 trainings, made by" in text
    assert "--learning-rate 0.001 --steps 700" in text and "--piece-tokens 48" in text
    assert "--arms 3 lm-only-engram --trained neither sentiment topic --learning" in text
    assert "class_count.py --data-dir" in text  # whole: random merges, too
    assert "AG News, model2 3.2e-03" in text and "drawn anew: [0.013, 0.043]" in text
    keys = {"standin threshold", "benefit differences", "classes", "salience", "pieces"}
    assert keys <= page.numbers.keys()


def test_blocks_of_the_findings(published):
    page = findings.results_page()
    gains = findings.fill("<!--begin gains-->\nold\n<!--end-->", page)
    assert shown(gains, "AG News") == [
        "+1.23 [+0.23, +2.23]",
        "+0.50 [+0.49, +0.51]",
        "71.0",
        "80.0",
    ]
    assert shown(gains, "Banking77") == ["n/a", "n/a", "81.0", "n/a"]
    assert f"*Full: {page.numbers['benefit differences']}, " in gains


def test_correlations_at_one_size_over_sizes_and_of_the_paper():
    titles = linguistic_collapse.TITLES
    known = {"r": 0.4, "low": 0.1, "high": 0.6, "p": 0.01, "n": 30, "p_holm": 0.04}
    unknown = {"r": None, "low": None, "high": None, "p": None, "n": 2}
    results = {"fixed_scale": dict.fromkeys(titles, known)}
    results |= {"grid": {name: {"spearman": unknown} for name in titles}}
    results |= {"paper": {"fixed_scale": {"agreement": known | {"r": -0.5}}, "grid": {}}}
    assert shown(own_models.table_linguistic(results), titles["agreement"]) == [
        "+0.40 [+0.10, +0.60]",
        "0.04",
        "-0.50 [+0.10, +0.60]",
        *["n/a"] * 3,
    ]


def test_endpoints_are_those_of_every_study(published, standin):
    published["collapse_threshold"] = standin  # whose P2 is none
    ran = own_models.endpoints()
    assert list(ran) == ["P1", "P3", "P4", "P5"] and ran["P3"]["mean"] == 0.02


def test_runs_by_others_stand_apart(tmp_path):
    assert side_studies.table_by_others(tmp_path) == ""  # a sentence says so
    run = {"seconds": 5400.0, "peak_memory_bytes": 14 * 2**30, "final": {"accuracy": 0.9}}
    run["hardware"] = {"device": "Abacus 16"}
    results = {"settings": {"data": {"name": "AG News"}}, "models": {"model1": {"42": run}}}
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody/results.json").write_text(json.dumps(results))
    cells = cells_of_row(side_studies.table_by_others(tmp_path), "Abacus 16")
    assert cells["run"] == "somebody, model1 seed 42" and cells["data"] == "AG News"
    assert (cells["hours"], cells["peak, GiB"]) == ("1.5", "14.0")
    assert cells["final accuracy, %"] == "90.00"


def test_hours_by_card_are_the_least_times_what_is_assumed():
    counts = {"cards": {"Abacus": {}}, "assumed_ratio": [2.0, 3.0], "git_commit": None}
    rates = {"conventional": 1.0, "ecosystem": 5.0, "ours": 10.0}
    for number in (1, 2, 3):
        found = {"examples_per_second": rates, "least_hours": {"Abacus": float(number)}}
        counts[f"model{number}"] = found
    cells = cells_of_row(side_studies.table_hours({"results_7b": counts}), "Abacus")
    assert cells["SST-2, Model 1"] == "2.0 to 3.0" and cells["SST-2, Model 3"] == "6.0 to 9.0"
    cells = cells_of_row(side_studies.table_paper({"results_7b": counts}), "4.0 to 6.0")
    assert cells["times as fast as conventional, at most"] == "10.0"
