"""The documents say what the JSON files say, and keep to their sizes."""

import csv
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import cells_of_row

from collapse.measures.statistics import format_interval
from collapse.report import plots, rank_plots, records
from collapse.report.comparisons import (
    comparisons_of,
    cross_dataset_table,
    summary_table,
    tidy_table,
)
from collapse.report.markdown import rows_of
from collapse.report.markdown import table as table_of
from collapse.report.reference import reference_for
from collapse.utils.files import ROOT, read_json
from studies.report import claims, experiments, findings, own_models


@pytest.fixture(scope="module")
def published():
    """Skips where results are a run of the reader's own: documents tell of the published ones."""
    listing = ["git", "status", "--porcelain", "-uall", "--", "*.json"]
    found = subprocess.run(listing, cwd=ROOT, check=False, capture_output=True, text=True)
    if found.stdout.strip():
        pytest.skip("results are a run of your own; `make findings` fills the tables from them")


@pytest.fixture(scope="module")
def page(published):
    return findings.results_page()


@pytest.mark.parametrize("name", findings.DOCUMENTS)
def test_the_tables_of_the_documents_are_those_of_the_json(name, page):
    text = (ROOT / name).read_text()
    assert findings.BLOCK.search(text), f"{name} has no marked table"
    assert findings.fill(text, page) == text, "run `make findings`"


def test_results_md_is_that_of_the_json(page):
    assert (ROOT / "RESULTS.md").read_text() == page.text, "run `make findings`"


def test_every_column_of_results_md_has_a_value(page):
    """A path that leads nowhere gives n/a; of Model 3, studies without it have nothing to tell."""
    of_model3 = {"final, engram carried", "engram ARI", "the same, untrained compressor"}
    tables = re.findall(r"((?:^\|.*\n)+)", page.text, re.MULTILINE)
    assert len(tables) == len(page.numbers)
    for table in tables:
        header, _, *rows = (line.split("|")[1:-1] for line in table.splitlines())
        for title, *cells in zip(header, *rows, strict=True):
            assert set(cells) != {" n/a "} or title.strip() in of_model3, title


def test_every_published_run_has_its_place_in_the_documents(page):
    folders = {str(path.parent.relative_to(ROOT)) for path in PUBLISHED}
    assert folders == {study.folder for study in experiments.studies_with_results()}
    for folder in folders:
        assert f"{folder} accuracy" in page.numbers
        models = read_json(ROOT / folder / "results.json")["models"]
        runs = [run for seeds in models.values() for run in seeds.values()]
        seeds = f"seed{'s' * (len(models['model1']) > 1)} {', '.join(models['model1'])}"
        made = f"{seeds}. Source: `{folder}/results.json`, made {experiments.origin(runs)}."
        assert made in page.text
    measured = read_json(ROOT / experiments.RANKS)
    assert list(experiments.read_ranks()) == list(measured)  # none left out, one order


def table_of_records(results: dict, columns: tuple) -> str:
    return table_of(columns, records.models_of(results), hide_unknown=True)


def prose(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


NUMBER = re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?!\w)")


def test_every_number_in_the_findings_is_in_a_table(page):
    text = (ROOT / "FINDINGS.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    known = set(NUMBER.findall("\n".join([*rows, page.text])))
    told = NUMBER.findall(prose(text))
    assert len(told) > 20 and not set(told) - known


def test_the_answer_in_the_findings_is_that_of_the_json(published):
    """What the sentences say without a number that a table has."""
    ranks = experiments.read_ranks()
    text = " ".join((ROOT / "FINDINGS.md").read_text().split())
    said = "in seven such studies (Table 4 has three) Model 1 ends, on average, with over four "
    said += "fifths of its effective rank and seven tenths of its components, and no difference in "
    said += "accuracy is found at the final epoch"
    all_studies = experiments.studies_with_results()
    compared = [s for s in all_studies if "model2" in experiments.results_of(s)["models"]]
    assert said in text and len(compared) == 7
    for study in compared:
        for found in comparisons_of(experiments.results_of(study))["final"].values():
            assert found["interval"]["low"] < 0 < found["interval"]["high"]
    for result in ranks.values():
        for number, share in (("effective_rank", 0.8), ("dims_95pct", 0.7)):  # nothing collapses
            assert result["model1"][number] > share * result["pretrained"][number]
        assert result["changes"]["model2 - model1"]["both"]["cdnv_log_ratio"]["low"] > 0


def test_the_endpoints_told_in_sentences_are_those_of_the_csv(published):
    """And the verdicts that the sentences give in other words."""
    ran, told = own_models.endpoints(), prose((ROOT / "FINDINGS.md").read_text())
    gain = {**ran["P1"]["interval"], "mean": ran["P1"]["mean"]}
    assert f"(P1, {format_interval(gain, 2, 100, '+')} points" in told
    verdicts = {"P1": "refuted", "P2": "supported", "P3": "refuted", "P4": "supported"}
    assert {name: ran[name]["verdict"] for name in verdicts} == verdicts
    assert ran["P5"]["verdict"] == "supported"


def test_the_documents_are_read_in_ten_minutes():
    text, readme = ((ROOT / name).read_text() for name in ("FINDINGS.md", "README.md"))
    assert text.count("\n") <= 250 and readme.count("\n") <= 160
    outside = [line for line in readme.splitlines() if not line.startswith("|")]
    assert len(outside) <= 137
    assert max(len(line) for line in outside if not line.startswith("    ")) <= 140
    assert len(prose(text).split()) <= 1950
    aside = ("|", "#", "!", "<!--", "*Full", "**Figure", "**Table")
    running = [part for part in text.split("\n\n") if not part.startswith(aside)]
    assert len(" ".join(running).split()) <= 1600
    found = {kind: re.findall(rf"\*\*{kind} (\d+)\.\*\*", text) for kind in ("Table", "Figure")}
    for kind, most in (("Table", 5), ("Figure", 4)):  # numbered as they come
        assert found[kind] == [str(1 + place) for place in range(len(found[kind]))]
        assert len(found[kind]) <= most
    heads = [line for line in text.splitlines() if re.match(r"\|( ?-+:? ?\|)+$", line)]
    assert len(heads) == len(found["Table"]) and text.count("![") == len(found["Figure"])


def test_the_documents_tell_one_interval():
    for name in (*findings.DOCUMENTS, "RESULTS.md"):
        text = (ROOT / name).read_text()
        for words in ("over seeds", "over examples", "over rows", "both intervals"):
            assert words not in text, name
    for path in [*(ROOT / "collapse").glob("*.py"), *(ROOT / "studies").glob("*.py")]:
        assert "both intervals" not in path.read_text(), path.name


def test_a_table_follows_its_json(monkeypatch):
    run = {
        "parameters": {"trainable": 5},
        "final": {"accuracy": 0.5},
        "best": {"accuracy": 0.75},
        "git_commit": "c0ffee",
        "hardware": {"device": "abacus", "threads": 1},
    }
    data = {"name": "Data", "train_rows": 4, "validation_rows": 4}
    settings = {"data": data, "config": {"epochs": 1}}
    results = {"settings": settings, "models": {"model1": {"7": run}}}
    told = experiments.origin(list(results["models"]["model1"].values()))
    assert told == "by commit c0ffee on abacus, 1 thread"
    table = experiments.table_accuracy(None, results)
    monkeypatch.setitem(findings.BLOCKS, "some", lambda: (table, ["more"]))
    text = "before\n<!--begin some-->\nold\n<!--end-->\nafter\n"
    page = findings.Page("", {"more": "A7"})
    filled = findings.fill(text, page)
    assert "| 1: Classification Only | 5 | 50.00 | n/a | 75.00 |" in filled
    assert filled.startswith("before\n") and filled.endswith("*Full: A7.*\n\n<!--end-->\nafter\n")
    assert findings.fill(filled, page) == filled and "old" not in filled


def test_claims_are_those_of_the_json(page):
    """Signs and pairs of what stands beside each claim, from the stored rows and records."""
    table, keys = claims.reference_claims()
    assert set(keys) <= page.numbers.keys()
    told = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    h1, h2, h3, less_start, less_model1 = (
        cells_of_row(table, next(claim for claim in told if claim.startswith(start)))
        for start in ("H1:", "H2:", "H3:", "H4: Model 1", "H4: Model 2")
    )
    more = float(h1["AG News, stand-in"].split()[0]) - float(h1["SST-2, stand-in"].split()[0])
    assert float(h2["AG News, stand-in"].split()[0]) == pytest.approx(more, abs=0.011)
    standing = own_models.standing(own_models.endpoints(), "P3")
    assert h2["our endpoint"] == standing and "P4b" in h3["our endpoint"]
    for study in claims.repeated():
        runs = experiments.results_of(study)["models"]
        accuracy = [
            np.mean([run["final"]["accuracy"] for run in runs[key].values()])
            for key in ("model1", "model2")
        ]
        assert h1[study.short].startswith(f"{100 * (accuracy[1] - accuracy[0]):+.2f} [")
        clusters = [run["cluster"] for run in runs["model3"].values()]
        ari = np.mean([c["trained"]["ari"] - c["untrained"]["ari"] for c in clusters])
        assert h3[study.short].startswith(f"{ari:+.3f} [")
    for result in experiments.read_ranks().values():
        short = claims.SHORT[result["folder"]]
        ranks = [result[key]["effective_rank"] for key in ("pretrained", "model1", "model2")]
        if short in {study.short for study in claims.repeated()}:
            assert less_start[short].startswith(f"{ranks[1] - ranks[0]:+.1f} [")
            assert less_model1[short].startswith(f"{ranks[2] - ranks[1]:+.1f} [")


def test_a_mild_collapse_is_stable_rank_and_participation_without_effective_rank():
    def study(folder, *after):
        names = ("effective_rank", "stable_rank", "participation_ratio")
        parts = {"pretrained": (9.0, 9.0, 9.0), "model1": after}
        found = {k: {"seeds": {"1": dict(zip(names, v, strict=True))}} for k, v in parts.items()}
        return found | {"folder": folder}

    ranks = {
        "SST-2, a": study("results", 8.0, 8.0, 8.0),
        "SST-2, b": study("results_7b", 10.0, 3.0, 4.0),
        "AG News": study("results_agnews", 10.0, 3.0, 4.0),
    }
    met, shown = claims.mild_collapse(ranks)
    assert met == "seen in the mean of SST-2, 7B"
    assert shown["SST-2, 7B"] == "9.0→10.0; 9.0→3.0; 9.0→4.0"
    assert shown["SST-2, small"] == "9.0→8.0; 9.0→8.0; 9.0→8.0"


def test_comparisons_of_an_older_run_are_made_anew(published):
    old = read_json(ROOT / "results_agnews/smollm2-135m/results.json")
    found = comparisons_of(old)
    assert found["final"].keys() == old["comparisons"]["final"].keys()
    for epoch, comparisons in old["comparisons"].items():
        for name, stored in comparisons.items():
            anew = found[epoch][name]
            assert anew["interval"]["mean"] == pytest.approx(stored["difference"])
            assert anew["mcnemar_p"] == pytest.approx(stored["mcnemar_p"])
    assert comparisons_of({"comparisons": found}) is found


def test_accuracies_of_another_run_stand_beside_no_rank(published):
    result = next(iter(experiments.read_ranks().values()))
    other = result["settings"]["config"] | {"pooling": "last"}
    assert rank_plots.accuracy_gains(result)
    assert not rank_plots.accuracy_gains(
        result | {"settings": result["settings"] | {"config": other}}
    )


def test_each_table_of_experiment_4_puts_each_number_below_its_head():
    keys = [
        "effective_rank",
        "effective_rank_share",
        "stable_rank",
        "participation_ratio",
        "participation_ratio_eigen",
    ]
    keys += ["dims_95pct", "cdnv", "accuracy"]
    inner = ["cdnv", "etf_error", "self_duality_error", "ncc_agreement"]

    origin = {"git_commit": "c0ffee0123456789", "hardware": {"device": "abacus", "threads": 2}}

    def record(base):
        found = {key: base + place for place, key in enumerate(keys)}
        found |= {
            "intermediate": {key: base + 20 + place for place, key in enumerate(inner)},
            "num_samples": 100,
        }
        found["layers"] = [{"effective_rank": base + rank} for rank in (7, 9, 3, 5)]
        halves = {
            key: [base * (2 + i) + draw for draw in (-1, 0, 1)]
            for i, key in enumerate(records.HALVED[:3])  # as older records have them
        }
        return (
            found
            | {
                "subsets": {"50": [base + 40 + draw for draw in (-1, 0, 1)]},
                "halves": {"rows": 50, **halves},
            }
            | origin
        )

    bases = {"pretrained": 100, "model1": 200, "model2": 300, "model3": 500}
    settings = {"config": {"model": "some/backbone"}}
    measured = {"weights": "final", "draws": 3, "rows": 2000}
    study = {
        "folder": "f",
        "settings": settings,
        "num_samples": 100,
        "measured": measured,
        "records": {key: {"1": record(base)} for key, base in bases.items()},
    }
    results = records.summarize({"S": study})
    told = experiments.origin(experiments.records_of(results))
    assert told == "by commit c0ffee0123 on abacus, 2 threads"
    row = cells_of_row(table_of_records(results, experiments.RANK_COLUMNS), "Classification Only")
    heads = ["effective rank", "over N - 1", "stable rank", "participation ratio"]
    heads += ["the same, eigenvalues", "components for 95% of variance"]
    assert [float(row[head]) for head in heads] == [200, 201, 202, 203, 204, 205]
    assert (row["rows"], row["seeds"], row["at matched rows"]) == ("100", "1", "240.0")
    assert "within classes" not in row  # no record has it
    row = cells_of_row(table_of_records(results, experiments.COLLAPSE_COLUMNS), "Dual Head")
    heads = ["NC1 CDNV, pooled", "NC1 CDNV, intermediate", "NC2 etf_error"]
    heads += ["NC3 self_duality_error", "NC4 ncc_agreement", "accuracy"]
    assert [float(row[head]) for head in heads] == [306, 320, 321, 322, 323, 307]
    row = cells_of_row(experiments.table_depth(results), "Dual + Engram")
    assert list(row.values())[3:] == ["507.0", "503.0 at 2", "505.0"]
    for change, first, second in (
        ("model1 - pretrained", 100, 200),
        ("model3 - model1", 200, 500),
        ("model3 - model2", 300, 500),
    ):
        row = cells_of_row(experiments.table_changes(results), change)
        for number in ("effective rank", "stable rank"):
            assert float(row[number].split(" [")[0]) == second - first
        factor = float(row["NC1 CDNV, pooled, as a factor"].split(" [")[0])
        assert factor == pytest.approx((second + 6) / (first + 6), abs=0.006)


def test_newer_measures_have_columns_and_older_records_say_that_they_lack_them():
    """Ranks within classes and without the first token, of one study of two."""
    rng = np.random.default_rng(0)

    def record(numbers):
        found = {number: float(rng.uniform(1, 9)) for number in numbers}
        halves = {number: list(rng.uniform(1, 9, 4)) for number in numbers}
        layers = [{n: found[n] for n in numbers if n.startswith("effective")} for _ in range(4)]
        found |= {"halves": {"rows": 5, **halves}, "num_samples": 10, "layers": layers}
        return found | {"subsets": {}}

    studies = {}
    for name, numbers in (("old", records.HALVED[:3]), ("new", records.HALVED)):
        found = {key: {"1": record(numbers)} for key in ("pretrained", "model1")}
        settings = {"config": {"model": "some/backbone"}}
        study = {"folder": "f", "settings": settings, "num_samples": 10, "measured": {}}
        studies[name] = study | {"records": found}
    results = records.summarize(studies)
    heads = ["within classes", "without the first token", "within, without first"]
    for shown in (
        table_of_records(results, experiments.RANK_COLUMNS),
        experiments.table_changes(results),
    ):
        old, new = (
            [cells_of_row(part, name)[head] for head in heads]
            for name in ("old", "new")
            for part in [with_one_row_of(shown, name)]
        )
        assert old == ["n/a"] * 3 and "n/a" not in new
    assert experiments.table_depth(results).count("| new |") == 2 * 4  # models by measures
    assert experiments.table_depth(results).count("| old |") == 2


def with_one_row_of(table: str, name: str) -> str:
    """The table's head, and the last row that starts with the name."""
    lines = table.splitlines()
    return "\n".join([lines[0], [line for line in lines if line.startswith(f"| {name} ")][-1]])


def test_each_table_of_a_training_puts_each_number_below_its_head():
    def run(base):
        train = {
            "accuracy": base / 1000,
            "cls_loss": base + 1,
            "lm_loss": base + 2,
            "grad_norm": base + 3,
        }
        val = {
            "accuracy": base / 500,
            "cls_loss": base + 4,
            "lm_loss": base + 5,
            "effective_rank": base + 6,
        }
        earlier = {"max_grad_norm": base + 9}
        names = ("trained", "chance", "untrained")
        cluster = {
            name: {
                "ari": base + 10 + i,
                "cluster_accuracy": (base + 13 + i) / 100,
                "purity": {"0": 0.25, "1": 0.75},
            }
            for i, name in enumerate(names)
        }
        cosines = {
            name: {"within": base + 16 + i, "between": base + 19 + i}
            for i, name in enumerate(names)
        }
        initial = {"effective_rank": base + 7}
        train = [train | earlier, train | {"max_grad_norm": base + 8}]
        return {
            "train": train,
            "val": [{}, val],
            "initial": initial,
            "cluster": cluster,
            "engram_cos": cosines,
        }

    interval = {"mean": 0.01, "low": -0.02, "high": 0.03, "se": 0.01, "df": 9.0}
    found = {"final": {"model2 - model1": {"interval": interval, "mcnemar_p": [0.5, 0.125]}}}
    data = {"name": "Data", "train_rows": 9, "validation_rows": 8, "class_names": ["no", "yes"]}
    results = {
        "settings": {"config": {"model": "m", "compute_dtype": "bfloat16"}, "data": data},
        "models": {"model1": {"7": run(100)}, "model2": {"7": run(200)}, "model3": {"7": run(300)}},
        "comparisons": found | {"best": {}},
    }
    pair = "model2 - model1, final epoch"
    row = cells_of_row(experiments.table_comparisons(None, results), pair)
    assert list(row.values())[1:] == ["+1.00 [-2.00, +3.00]", "0.5, 0.12"]
    reference = reference_for(Path("results_7b"))
    row = cells_of_row(experiments.table_comparisons(reference, results), pair)
    assert list(row.values())[-1] == "+0.34" and list(row)[-1].startswith("reference")
    models = experiments.trainings_by_model(results)
    row = cells_of_row(table_of(experiments.TRAINING_COLUMNS, models), "2: Dual Head")
    assert list(map(float, list(row.values())[1:])) == [20, 201, 204, 202, 205, 203, 207, 206]
    trainings = rows_of(results["models"], "model", "seed")
    row = cells_of_row(table_of(experiments.SEED_COLUMNS, trainings), "3: Dual + Engram")
    assert list(map(float, list(row.values())[1:])) == [7, 60, 304, 306, 309, 310, 312]
    engrams = experiments.table_engrams(None, results)
    row = cells_of_row(engrams, "control: untrained compressor, trained backbone")
    assert list(map(float, list(row.values())[1:])) == [312, 315, 318, 321]
    assert "no 25.0; yes 75.0" in engrams
    still = {"final": {"model2 - model1": {"interval": interval | {"mean": 0.0}}}}
    there = {
        "settings": {"config": {"model": "m"}, "data": data | {"name": "Other"}},
        "comparisons": still,
        "models": {},
    }
    row = cells_of_row(experiments.table_cross(results, there), "model2 - model1")
    assert list(row)[1:3] == ["Data (9 / 8 rows, bfloat16)", "Other (9 / 8 rows)"]
    assert [cell.split()[0] for cell in list(row.values())[1:]] == ["+1.00", "+0.00", "+1.00"]


PUBLISHED = sorted(p for p in ROOT.glob("results*/**/results.json") if "limit-" not in str(p))


def measured(step: int, components: int | None, loss: float | None = 0.5) -> dict:
    ranks = {"effective_rank": 9.0, "effective_rank_without_first": 8.0}
    ranks |= {"effective_rank_within": 7.0, "accuracy": 0.75, "rows": 24}
    return {"step": step, "dims_95pct": components, "loss": loss} | ranks


def test_a_path_is_told_by_its_start_its_fewest_components_and_its_end():
    path = [measured(0, 40), measured(5, 4), measured(10, 20, None), measured(15, None, None)]
    trainings = {"model1": {"7": {"measured": path}}, "model2": {"7": {"measured": []}}}
    lines = experiments.table_measured({"models": trainings}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1:4] for row in cells] == [
        ["start", "0", "40, 100%"],
        ["fewest", "5", "4, 10%"],
        ["end", "10", "20, 50%"],  # the last one that is finite
    ]
    assert cells[0][4:] == ["9.0", "8.0", "7.0", "0.500", "75.0"] and cells[2][7:] == ["n/a"] * 2
    assert experiments.table_measured({"models": {"model2": {"7": {}}}}) == ""
    later = {"models": {"model1": {"7": {"measured": path[1:]}}}}  # first measured after a resume
    assert experiments.table_measured(later) == ""


def test_a_path_is_drawn_where_there_is_one(tmp_path):
    path = [measured(0, 40), measured(5, None, None)]
    figure = tmp_path / "rank_over_steps.png"
    plots.plot_measured(figure, "title", {"model1": {"7": {"measured": path}}})
    assert figure.exists()
    plots.plot_measured(figure, "title", {"model1": {"7": {}}})
    assert not figure.exists()


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_published_results_are_readable_and_their_csv_says_the_same(path):
    results = read_json(path)
    assert summary_table(results).count("(n = ") == len(results["models"])
    assert cross_dataset_table(results) if "cross_dataset" in results else True
    if not results["git_commit"].endswith("-modified"):  # a run of your own writes its CSV itself
        assert (path.parent / "results.csv").read_text() == tidy_table(results)
    rows = list(csv.DictReader((path.parent / "results.csv").open()))
    for row in rows:
        run = results["models"][row["model"]][row["seed"]]
        record = run["val"][int(row["epoch"]) - 1] if row["epoch"] != "0" else run["initial"]
        assert float(row["val_accuracy"]) == record["accuracy"]
    epochs = results["settings"]["config"]["epochs"]
    assert len(rows) == (epochs + 1) * sum(map(len, results["models"].values()))


def test_published_ranks_are_readable():
    results = read_json(ROOT / "results_effective_rank/effective_rank_results.json")
    again = records.summarize(records.with_records(results))
    table = records.table(again)
    for name, result in results.items():
        assert name in table
        shown = rank_plots.shown_models(result)
        models = read_json(ROOT / result["folder"] / "results.json")["models"]
        assert [model.key for model in shown] == ["pretrained", *models]


def test_depths_are_drawn_for_each_measure_that_the_records_have(tmp_path, monkeypatch):
    """A panel a measure and study; older records have the first measure alone."""
    drawn = []
    monkeypatch.setattr(rank_plots, "save_figure", lambda figure, _: drawn.append(figure))
    results = read_json(ROOT / "results_effective_rank/effective_rank_results.json")
    deep = {name: r for name, r in results.items() if "model" in r["settings"]["config"]}
    rank_plots.plot_layers(tmp_path / "old.png", results)
    assert len(drawn[-1].axes) == len(deep)  # none of the small transformer
    for result in deep.values():
        for key in records.keys_of(result):
            for record in result[key]["seeds"].values():
                for layer in record["layers"]:
                    layer |= dict.fromkeys(rank_plots.DEPTH_PANELS, layer["effective_rank"])
    rank_plots.plot_layers(tmp_path / "new.png", deep)
    assert len(drawn[-1].axes) == 4 * len(deep)
    titles = [axis.get_title(loc="left") for axis in drawn[-1].axes]
    assert sum("without the first token" in title for title in titles) == 2 * len(deep)


def test_the_overview_shows_the_numbers_of_the_json(tmp_path, monkeypatch):
    """Centres of AG News' bars, and the reference's fall of the rank to 1.3%."""
    drawn = []
    monkeypatch.setattr(rank_plots, "save_figure", lambda figure, _: drawn.append(figure))
    stored = read_json(ROOT / "results_effective_rank/effective_rank_results.json")
    results = records.summarize(records.with_records(stored))
    name = next(name for name in results if name.startswith("AG News"))
    rank_plots.plot_overview(tmp_path / "a.png", {name: results[name]})
    centres = [
        [float(line.get_xdata()[0]) for line in axis.lines if len(line.get_xdata()) == 1]
        for axis in drawn[-1].axes
    ]
    runs = read_json(ROOT / results[name]["folder"] / "results.json")["models"]
    gains = [
        np.mean([run["final"]["accuracy"] for run in runs[b].values()])
        - np.mean([run["final"]["accuracy"] for run in runs["model1"].values()])
        for b in ("model2", "model3")
    ]
    assert set(np.round(100 * np.array(gains), 4)) <= set(np.round(centres[0], 4))
    start, end = (results[name][key]["effective_rank"] for key in ("pretrained", "model1"))
    assert round(100 * end / start, 4) in np.round(centres[1], 4)
    assert round(100 * 12.6 / 984.0, 4) in np.round(centres[1], 4)
    assert all(factor > 1 for factor in centres[2])
    name = "snippets, 9 training rows, small, results/snippets/24-epochs"
    assert rank_plots.in_two_lines(name) == "snippets, 9 training rows\nsmall, 24-epochs"
