"""Comparisons between models, between data sets and with published runs, and their log tables."""

import contextlib
import csv
import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from collapse.arms import find_arm
from collapse.measures.predictions import RowResults, compare_losses
from collapse.measures.statistics import (
    compare_models,
    difference_interval,
    independent_difference,
    paired_difference,
)
from collapse.report.markdown import Column, rows_of, text_table
from collapse.utils.errors import UserError
from collapse.utils.files import BEFORE, read_json, settings_difference

# Name -> (a, b, evaluation of a, evaluation of b): b is compared with a.
COMPARISONS = {
    "model2 - model1": ("model1", "model2", "cold", "cold"),
    "model3 - model2": ("model2", "model3", "cold", "cold"),
    "model3 - model1": ("model1", "model3", "cold", "cold"),
    "model3 carried - model2": ("model2", "model3", "cold", "carried"),
    "model3 carried - model3": ("model3", "model3", "cold", "carried"),
}


def pairs_of(models: Iterable[str]) -> dict[str, tuple[str, str, str, str]]:
    """COMPARISONS, and each control compared with models 1 and 2."""
    against = itertools.product(controls_of(models), ("model1", "model2"))
    return COMPARISONS | {f"{b} - {a}": (a, b, "cold", "cold") for b, a in against}


def controls_of(models: Iterable[str]) -> list[str]:
    """All but the three models themselves; a model with another weight, 2@0.1, is a control."""
    return [name for name in models if name not in ("model1", "model2", "model3")]


def compare_all(
    models: dict[str, dict[str, dict]], rows_of: dict[str, dict[str, dict[str, RowResults]]]
) -> dict[str, dict]:
    """compare_models for every pair at the final and the best epoch, over the seeds of both.

    rows_of: what predictions.read_rows gives; where both models are evaluated cold, the numbers of
    compare_losses are added.
    """
    comparisons: dict[str, dict] = {"final": {}, "best": {}}
    pairs = pairs_of(models).items()
    for epoch, (name, (a, b, kind_a, kind_b)) in itertools.product(comparisons, pairs):
        seeds = [seed for seed in models.get(a, {}) if seed in models.get(b, {})]
        if seeds:
            rows = [
                [list(map(int, models[m][s]["correct"][f"{epoch}_{kind}"])) for s in seeds]
                for m, kind in ((a, kind_a), (b, kind_b))
            ]
            comparison = compare_models(*map(np.array, rows))
            if kind_a == kind_b == "cold":
                comparison |= compare_losses(rows_of, a, b, epoch)
            comparisons[epoch][name] = comparison
    return comparisons


def comparisons_of(results: dict) -> dict[str, dict]:
    """The comparisons of a results.json, recomputed where an older version wrote them."""
    stored = results["comparisons"]
    if all("interval" in comparison for epoch in stored.values() for comparison in epoch.values()):
        return stored
    return compare_all(results["models"], {})


# Settings in which Experiments 2 and 3 may differ and still be compared: the first two by design;
# the last is the same for both models of a difference, and tables name it.
DIFFERS_BY_DATA = ("max_length", "engram_source", "compute_dtype")


# The data sets of Experiments 2 and 3, whose folders also hold runs on other data.
OTHER_DATA = {"SST-2": "AG News", "AG News": "SST-2"}


def find_other(folder: Path | None, results: dict) -> dict | None:
    """The results on the other of the two data sets that were made with the same settings.

    Among several, prefers the same compute type, then as many training rows, then the most. Prints
    the reasons if there are results but none can be compared.
    """
    candidates, reasons = [], []
    wanted = OTHER_DATA.get(data_name(results["settings"]))
    for path in sorted(folder.glob("**/results.json")) if folder is not None else ():
        with contextlib.suppress(UserError):  # damaged, and not part of this run
            other = read_json(path)
            if data_name(other["settings"]) != wanted:
                continue
            other_settings, own_settings = (
                comparable_settings(part["settings"]) for part in (other, results)
            )
            if reason := settings_difference(other_settings, own_settings):
                reasons.append(f"NOTE: not compared with {path}: {reason}")
                continue
            rows = other["settings"]["data"]["train_rows"]
            types = [compute_type(part) for part in (results, other)]
            as_many = rows == results["settings"]["data"]["train_rows"]
            candidates.append((types[0] == types[1], as_many, rows, str(path), other))
    if reasons and not candidates:
        print("\n".join(reasons), flush=True)
    return max(candidates)[-1] if candidates else None


def comparable_settings(settings: dict) -> dict:
    """The settings that must agree between two data sets, in the form of settings_difference."""
    config = {k: v for k, v in settings["config"].items() if k not in DIFFERS_BY_DATA}
    return {"config": config, "data": {}}


def compute_type(results: dict) -> str | None:
    return results["settings"]["config"].get("compute_dtype")


def data_name(settings: dict) -> str:
    """The data set's name; a subset has that of the whole set."""
    return settings["data"]["name"].partition(",")[0]


def study_name(settings: dict) -> str:
    """A study in words: data, rows, backbone, compute type, pooling other than mean."""
    data, config = settings["data"], BEFORE["config"] | settings["config"]
    backbone = Path(config["model"]).name if "model" in config else "small transformer"
    parts = (
        data_name(settings),
        f"{data['train_rows']:,} training rows",
        backbone,
        config.get("compute_dtype"),
        f"{config['pooling']} pooling" if config["pooling"] != "mean" else None,
    )
    return ", ".join(part for part in parts if part)


def compare_datasets(results: dict, other_results: dict) -> dict[str, Any]:
    """Each difference between two models on this data set and on the other one.

    Intervals are of the final epoch, for other seeds and rows. `more_here` is the difference here
    minus that of the other data set, unpaired: seeds of two data sets have nothing in common.
    """
    own_pairs, other_pairs = (comparisons_of(part)["final"] for part in (results, other_results))
    comparisons = {}
    for name in [name for name in own_pairs if name in other_pairs]:
        parts = {"here": own_pairs[name]["interval"], "there": other_pairs[name]["interval"]}
        more = independent_difference(parts["there"], parts["here"])
        comparisons[name] = parts | {"more_here": more}
    other = {"study": study_name(other_results["settings"])}
    return {"other": other, "comparisons": comparisons}


def p_values(row: dict) -> str:
    """McNemar's p of a comparison, one for each seed."""
    return ", ".join(f"{p:.2g}" for p in row["mcnemar_p"])


PAIR_COLUMNS = (
    Column("models", "pair"),
    Column("mean [95%]", "interval", 2, 100),
    Column("McNemar's p, each seed", p_values),
)
CROSS_COLUMNS = (
    Column("models", "pair"),
    Column("here", "here", 2, 100),
    Column("there", "there", 2, 100),
    Column("here - there", "more_here", 2, 100),
)
ACCURACY_COLUMNS = (
    Column("model", "title"),
    Column("final epoch", "runs.*.final.accuracy", 2, 100),
    Column("best epoch (flatters: chosen on this split)", "runs.*.best.accuracy", 2, 100),
)
CLUSTER_COLUMNS = (
    Column("engrams", "case"),
    Column("seed", "seed"),
    Column("ARI", "ari", 3),
    Column("cluster accuracy, %", "cluster_accuracy", 1, 100),
    Column("cosine within", "cosines.within", 3),
    Column("cosine between", "cosines.between", 3),
)


def cross_dataset_table(results: dict) -> str:
    """The log's table of differences on this data set and on the other one."""
    cross = results["cross_dataset"]
    return (
        "\ndifference in points on two data sets, final epoch [95% interval]\n"
        f"here: {study_name(results['settings'])}\nthere: {cross['other']['study']}\n"
        + text_table(CROSS_COLUMNS, rows_of(cross["comparisons"], "pair"))
    )


def summary_table(results: dict) -> str:
    """The log's tables of accuracy, differences and engrams."""
    models = [
        {"title": f"{key.removeprefix('model')} {find_arm(key).title} (n = {len(runs)})"}
        | {"runs": runs}
        for key, runs in results["models"].items()
    ]
    text = "\nvalidation accuracy in %, mean (lowest to highest seed)\n"
    text += text_table(ACCURACY_COLUMNS, models)
    if pairs := rows_of(comparisons_of(results)["final"], "pair"):
        text += "\n\ndifference in points, final epoch [95% interval for other seeds and rows]\n"
        text += text_table(PAIR_COLUMNS, pairs)
    engrams = [
        cluster | {"seed": seed, "case": case, "cosines": run["engram_cos"][case]}
        for seed, run in results["models"].get("model3", {}).items()
        for case, cluster in run["cluster"].items()
    ]
    return f"{text}\n\n{text_table(CLUSTER_COLUMNS, engrams)}" if engrams else text


REPRODUCTION_COLUMNS = (
    Column("model", "model"),
    Column("published", "published"),
    Column("yours", "yours"),
    Column("difference [95% interval]", "difference", 2, 100),
    Column("", "verdict"),
)


def reproduction_table(published: dict, results: dict) -> str:
    """The log's table of the results that were published in this folder and of this run's.

    Both use the same rows. Differences are paired over seeds if both ran two or more of the same
    seeds, otherwise seeds are independent.
    """
    rows = []
    for key in [key for key in results["models"] if key in published["models"]]:
        published_accuracy, own_accuracy = (
            {seed: run["final"]["accuracy"] for seed, run in part["models"][key].items()}
            for part in (published, results)
        )
        shared = published_accuracy.keys() & own_accuracy.keys()
        if len(shared) > 1:
            difference, how = paired_difference(published_accuracy, own_accuracy), "seed by seed, "
        else:
            difference, how = (
                difference_interval([*published_accuracy.values()], [*own_accuracy.values()]),
                "",
            )
        if difference["low"] is None:
            verdict = "one seed each: no interval"
        elif how and all(published_accuracy[seed] == own_accuracy[seed] for seed in shared):
            verdict = "the same in every seed"
        elif difference["low"] <= 0 <= difference["high"]:
            verdict = f"{how}no difference found"
        else:
            verdict = f"{how}yours differ from the published ones"
        row = {"model": key, "difference": difference, "verdict": verdict}
        for name, values in (("published", published_accuracy), ("yours", own_accuracy)):
            row[name] = f"{100 * np.mean([*values.values()]):.2f} (n={len(values)})"
        rows.append(row)
    title = "published results beside this run's: final validation accuracy in %"
    return f"\n{title}\n{text_table(REPRODUCTION_COLUMNS, rows)}"


def tidy_table(results: dict) -> str:
    """A CSV with a row for each study, model, seed and epoch; epoch 0 is before the first step."""
    data, study = results["settings"]["data"], study_name(results["settings"])
    rows = []
    for model, runs in results["models"].items():
        for seed, run in runs.items():
            identity = {"study": study, "data": data["name"], "model": model, "seed": seed}
            rows.append(identity | {"epoch": 0} | _flat("val", run["initial"]))
            for train, val in zip(run["train"], run["val"], strict=True):
                epoch = {"epoch": val["epoch"]}
                rows.append(identity | epoch | _flat("train", train) | _flat("val", val))
    head = ("study", "data", "model", "seed", "epoch")
    numbers = {column for row in rows for column in row}.difference(head)
    columns = [*head, *sorted(numbers)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(prefix: str, record: dict) -> dict:
    """The numbers of a record and of records inside it, names with a prefix; without None."""
    flat = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(f"{prefix}_{key}", value)
        elif key != "epoch" and value is not None:
            flat[f"{prefix}_{key}"] = value
    return flat
