"""Tables of FINDINGS.md on the claims and experiments of the reference, and our repetitions."""

import numpy as np

from collapse.measures.statistics import mean_interval
from collapse.report.comparisons import compare_datasets, comparisons_of
from collapse.report.markdown import Column, at, cell, table
from collapse.report.records import values_of
from collapse.report.reference import REFERENCE, reference_for
from studies.report import own_models
from studies.report.experiments import (
    STUDIES,
    Study,
    change_cell,
    read_ranks,
    results_of,
    studies_with_results,
)
from studies.report.own_models import standing

CROSS = "results_agnews/smollm2-135m"  # whose gains are compared with the other data set's
SHORT = {study.folder: study.short for study in STUDIES}


def repeated() -> list[Study]:
    """Studies with all three models on data sets that the reference used."""
    studies = [study for study in studies_with_results() if reference_for(study.folder)]
    return [study for study in studies if "model3" in results_of(study)["models"]]


def full_tables(*kinds: str) -> list[str]:
    """Keys in RESULTS.md of the tables of these kinds, for each repeated study."""
    return [f"{study.folder} {kind}" for study in repeated() for kind in kinds]


def gains() -> dict[str, str]:
    """Model 2's gain in final accuracy over Model 1."""
    pairs = {s.short: comparisons_of(results_of(s))["final"]["model2 - model1"] for s in repeated()}
    return {name: cell(pair["interval"], 2, 100) for name, pair in pairs.items()}


def rank_changes(ranks: dict, pair: str) -> dict[str, str]:
    return {
        SHORT[result["folder"]]: change_cell(result["changes"][pair], "effective_rank", 1)
        for result in ranks.values()
    }


def aris(results: dict, case: str) -> list[float]:
    """ARI of Model 3's engrams, by seed."""
    return at(results["models"]["model3"], f"*.cluster.{case}.ari")


def ari_gain(study: Study) -> dict:
    """Engram ARI of the trained compressor minus the untrained one's, interval over seeds."""
    results = results_of(study)
    pairs = zip(aris(results, "trained"), aris(results, "untrained"), strict=True)
    return mean_interval(trained - untrained for trained, untrained in pairs)


def mild_collapse(ranks: dict) -> tuple[str, dict[str, str]]:
    """(verdict, study -> numbers before and after): does model 1 collapse mildly on SST-2?

    The reference's sign of it: stable rank and participation ratio fall while the effective rank
    does not. Judged by means over seeds.
    """
    met, shown = [], {}
    for result in [result for name, result in ranks.items() if name.startswith("SST-2")]:
        short = SHORT[result["folder"]]
        change = [
            [np.mean(values_of(result, key, name)) for key in ("pretrained", "model1")]
            for name in ("effective_rank", "stable_rank", "participation_ratio")
        ]
        if [after < before for before, after in change] == [False, True, True]:
            met.append(short)
        shown[short] = "; ".join(f"{before:.1f}→{after:.1f}" for before, after in change)
    return f"seen in the mean of {'; '.join(met) or 'none'}", shown


def endpoints_of_h3(ran: dict[str, dict]) -> str:
    """P4 is about a trained label; P4b about what training the compressor adds."""
    results = own_models.results_of(own_models.CONFIGS["engram_salience"])
    text = f"{standing(ran, 'P4')}, for the label that is trained"
    for row in results["arms"]:
        if row["arm"] == "model3" and row["less_random_compressor"]["n"]:
            added = cell(row["less_random_compressor"], 3)
            of_model3 = [t for t in results["trainings"] if t["arm"] == "model3"]
            by_label = [(t["trained"], t["less_random"]) for t in of_model3 if "less_random" in t]
            parts = ", ".join(f"{label} {interval['mean']:+.3f}" for label, interval in by_label)
            text += f"; {added} over an untrained compressor (P4b; {parts})"
    return text


def claim(text: str, reference: str, endpoint: str, cells: dict[str, str]) -> dict[str, str]:
    """A row of the table; cells: short name of a study -> its cell."""
    return cells | {"claim": text, "theirs": reference, "endpoint": endpoint}


def claims_of_accuracy(ran: dict[str, dict]) -> list[dict[str, str]]:
    """H1, H2, H3."""
    study = next(study for study in STUDIES if study.folder == CROSS)
    other = next(other for other in STUDIES if other.folder == study.other)
    compared = compare_datasets(results_of(study), results_of(other))["comparisons"]
    finals = [(SHORT[folder], reference["final"]) for folder, reference in REFERENCE.items()]
    gained = (f"{name} {final['model2'] - final['model1']:+.2f}" for name, final in finals)
    their_aris = [REFERENCE[folder]["ari"] for folder in ("results_7b", "results_agnews")]
    return [
        claim(
            "H1: Model 2 is more accurate than Model 1, points",
            "; ".join(gained),
            standing(ran, "P1"),
            gains(),
        ),
        claim(
            "H2: that gain grows with task complexity, points (ours: minus SST-2's)",
            "four classes against two: fourteen times",
            standing(ran, "P3"),
            {study.short: cell(compared["model2 - model1"]["more_here"], 2, 100)},
        ),
        claim(
            "H3: engrams group by class unsupervised, ARI (ours: minus an untrained compressor's)",
            "SST-2, 7B {}; AG News, 7B {}; no control".format(*their_aris),
            endpoints_of_h3(ran),
            {study.short: cell(ari_gain(study), 3) for study in repeated()},
        ),
    ]


def claims_of_rank(ran: dict[str, dict]) -> list[dict[str, str]]:
    """H4, and the mild collapse on SST-2."""
    ranks = {k: r for k, r in read_ranks().items() if reference_for(r["folder"])}
    sst2, ag_news = (REFERENCE[folder]["ranks"] for folder in ("results_7b", "results_agnews"))
    start, model1, model2 = (ag_news[key][0] for key in ("pretrained", "model1", "model2"))
    names = ("effective rank", "stable rank", "participation ratio")
    changes = zip(names, sst2["pretrained"], sst2["model1"], strict=False)
    met, shown = mild_collapse(ranks)
    return [
        claim(
            "H4: Model 1 loses effective rank (ours: minus the start's)",
            f"AG News, 7B {start}→{model1}",
            f"{standing(ran, 'P2')}, at high rates",
            rank_changes(ranks, "model1 - pretrained"),
        ),
        claim(
            "H4: Model 2 keeps it (ours: minus Model 1's)",
            f"AG News, 7B {start}→{model2}",
            standing(ran, "P5"),
            rank_changes(ranks, "model2 - model1"),
        ),
        claim(
            "Mild collapse: on SST-2 Model 1's stable rank and participation ratio fall, its "
            "effective rank does not",
            "; ".join(f"{name} {before}→{after}" for name, before, after in changes),
            met,
            shown,
        ),
    ]


def reference_claims() -> tuple[str, list[str]]:
    """Table of the reference's claims beside our results, and keys of the full tables."""
    ran, names = own_models.endpoints(), [study.short for study in repeated()]
    columns = [Column("claim of the reference", "claim"), Column("its number", "theirs")]
    columns += [Column(name, lambda row, name=name: row.get(name, "")) for name in names]
    columns.append(Column("our endpoint", "endpoint"))
    text = table(columns, [*claims_of_accuracy(ran), *claims_of_rank(ran)], numbers=False)
    keys = ["endpoints", "salience", *full_tables("comparisons", "engrams")]
    return text, [*keys, f"{CROSS} cross", "ranks levels", "ranks changes"]


EXPERIMENT_COLUMNS = (
    Column("data, backbone", "study"),
    Column("model", "model"),
    Column("accuracy, % (reference)", "accuracy"),
    Column("effective rank, of the start (reference)", "rank"),
    Column("engram ARI, untrained (reference)", "engrams"),
)


def table_repeated() -> str:
    """Accuracy, rank and engrams of the three models on each of the reference's data sets."""
    rows = []
    for ranks in read_ranks().values():
        folder, reference = ranks["folder"], reference_for(ranks["folder"])
        if not reference:
            continue
        study = next(study for study in STUDIES if study.folder == folder)
        results, empty = results_of(study), {"study": study.short, "rank": "", "engrams": ""}
        start = np.mean(values_of(ranks, "pretrained", "effective_rank"))
        for key, runs in results["models"].items():
            accuracy = 100 * np.mean(at(runs, "*.final.accuracy"))
            rank = np.mean(values_of(ranks, key, "effective_rank"))
            row = empty | {"model": key.removeprefix("model")}
            row["accuracy"] = f"{accuracy:.2f} ({reference['final'][key]:.2f})"
            row["rank"] = f"{rank:.1f}, {100 * rank / start:.0f}%"
            if "ranks" in reference:
                before, after = (reference["ranks"][name][0] for name in ("pretrained", key))
                row["rank"] += f" ({after}, {100 * after / before:.0f}%)"
            if key == "model3":
                means = [np.mean(aris(results, case)) for case in ("trained", "untrained")]
                row["engrams"] = "{:.3f}, {:.3f} ({:.3f})".format(*means, reference["ari"])
            rows.append(row)
        for accuracy in own_models.bag_of_words(folder).values():
            rows.append(empty | {"model": "bag of words", "accuracy": f"{100 * accuracy:.2f}"})
    return table(EXPERIMENT_COLUMNS, rows)
