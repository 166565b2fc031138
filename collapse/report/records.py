"""Experiment 4: from records of single models to a study's means, changes and table."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collapse.arms import find_arm
from collapse.measures.statistics import (
    mean_interval,
    seeds_and_rows_interval,
)
from collapse.report import model_records
from collapse.report.comparisons import controls_of
from collapse.report.markdown import Column, text_table
from collapse.utils.errors import UserError
from collapse.utils.files import read_json, settings_difference

# Numbers whose changes get an interval for other seeds and rows, from random halves of the rows.
# Older results have the first three alone.
HALVED = ("effective_rank", "stable_rank", "cdnv", "effective_rank_within")
HALVED += ("effective_rank_without_first", "effective_rank_within_without_first")
# Entries of a record that are records themselves.
PARTS = ("intermediate", "train")


def summarize(studies: dict[str, dict]) -> dict[str, dict]:
    """What effective_rank_results.json holds: study -> settings, changes, means, intervals, seeds.

    studies: name -> folder, settings, num_samples, measured, records (model -> seed -> record).
    """
    rows_of_all = [study["num_samples"] for study in studies.values()]
    shared = [size for size in model_records.CURVE_ROWS if size < min(rows_of_all, default=0)]
    results = {}
    for name, study in studies.items():
        records = study["records"]
        result = {key: study[key] for key in ("folder", "settings", "num_samples", "measured")}
        result["matched_rows"] = shared[-1] if shared else None
        keys = sorted(records, key=lambda key: sort_key_of(key))
        for key in keys:
            result[key] = summarize_model(records[key], result["matched_rows"])
        pairs = {f"{b} - {a}": paired(records, a, b) for a, b in changes_of(keys)}
        result["changes"] = {name: change(found) for name, found in pairs.items() if found}
        results[name] = result
    return results


def sort_key_of(key: str) -> tuple:
    """Sorts keys of models: the baseline first, then the arms in their order."""
    return (-1,) if key == "pretrained" else find_arm(key).sort_key


def changes_of(keys: Iterable[str]) -> list[tuple[str, str]]:
    """(a, b) for every change from a to b that results hold."""
    pairs = [("pretrained", "model1"), ("model1", "model2"), ("model2", "model3")]
    pairs += [("model1", "model3"), ("pretrained", "model2"), ("pretrained", "model3")]
    controls = controls_of(key for key in keys if key != "pretrained")
    return pairs + [(a, b) for b in controls for a in ("pretrained", "model1", "model2")]


def summarize_model(records: dict[str, dict], matched_rows: int | None) -> dict[str, Any]:
    """Means over seeds, their intervals, and under `seeds` the records themselves."""
    flat = [scalars(record) for record in records.values()]
    shared = [number for number in flat[0] if all(number in f for f in flat)]
    intervals = {number: mean_interval(f[number] for f in flat) for number in shared}
    if matched_rows:
        draws = [record["subsets"][str(matched_rows)] for record in records.values()]
        intervals["effective_rank_matched"] = mean_interval(map(np.mean, draws))
    means: dict[str, Any] = {}
    for number, interval in intervals.items():
        *parts, last = number.split(".")
        level = means
        for part in parts:
            level = level.setdefault(part, {})
        level[last] = interval["mean"]
    return {**means, "intervals": intervals, "seeds": records}


def scalars(record: dict) -> dict[str, float]:
    """The numbers of a record, flat: those of PARTS are named intermediate.NAME and so on."""
    flat = {key: value for key, value in record.items() if isinstance(value, int | float)}
    for part in PARTS:
        inner = scalars(record[part]) if part in record else {}
        flat |= {f"{part}.{key}": value for key, value in inner.items()}
    return flat


def paired(records: dict, a: str, b: str) -> list[tuple[dict, dict]]:
    """Pairs of records of two models with the same seed.

    A single record of a pretrained model is paired with every seed.
    """
    first, second = records.get(a, {}), records.get(b, {})
    if a == "pretrained" and len(first) == 1:
        return [(next(iter(first.values())), record) for record in second.values()]
    return [(first[seed], record) for seed, record in second.items() if seed in first]


def change(pairs: list[tuple[dict, dict]]) -> dict[str, Any]:
    """How much the numbers of HALVED change: mean and interval for other seeds and other rows.

    On these claims rest. The change of log CDNV is there, too, as `cdnv_log_ratio`.
    """
    rows, total = pairs[0][0]["halves"]["rows"], pairs[0][0]["num_samples"]
    both: dict[str, Any] = {}
    for key in HALVED:
        if not all(key in part for pair in pairs for r in pair for part in (r, r["halves"])):
            continue  # records of an older version lack it
        values = np.array([[record[key] for record in pair] for pair in pairs])  # (S, 2)
        drawn = np.array([[record["halves"][key] for record in pair] for pair in pairs])
        draws = drawn[:, 1] - drawn[:, 0]  # (S, B)
        both[key] = seeds_and_rows_interval(values[:, 1] - values[:, 0], draws, rows, total)
        if key == "cdnv" and values.min() > 0 and drawn.min() > 0:
            ratios = np.log(values[:, 1] / values[:, 0])
            draws = np.log(drawn[:, 1] / drawn[:, 0])
            both["cdnv_log_ratio"] = seeds_and_rows_interval(ratios, draws, rows, total)
    return {"both": both}


def add_losses_of_training(records: dict[str, dict[str, dict]]) -> None:
    """Add to records (model -> seed -> record), in place, what training cost.

    `language_kept`: change of the LM loss, under the pretrained LM head or, for a model from
    scratch, its own. `transfer`: change of the accuracy on another data set's labels. Both are
    left out where a value is None.
    """
    names = {"language_kept": "lm_loss", "transfer": "transfer_accuracy"}
    before = records.get("pretrained", {})
    for by_seed in records.values():
        for seed, record in by_seed.items():
            start = before.get(seed) or next(iter(before.values()), {})
            for name, source in names.items():
                if None not in (record.get(source), start.get(source)):
                    record[name] = record[source] - start[source]


def earlier_studies(file: Path, measured: dict[str, Any], replace: bool) -> dict[str, dict]:
    """The studies of an earlier run's results file, as summarize takes them.

    measured: the settings of this run's measurements. Studies measured with other settings are left
    out if `replace` is set; otherwise UserError is raised.
    """
    studies = read_json(file) if file.exists() else {}
    alike = {name: study for name, study in studies.items() if study.get("measured") == measured}
    if len(alike) < len(studies) and not replace:
        how = ", ".join(f"{key} {value}" for key, value in measured.items())
        raise UserError(
            f"{file} was not measured with {how}: "
            "give another --output-dir, or --fresh to replace it."
        )
    return with_records(alike)


def keep_unmeasured(
    study: dict, earlier: dict | None, published: Collection[tuple[str, str]]
) -> list[str]:
    """Take over earlier records of published trainings (model, seed) whose weights are missing.

    earlier: the same folder's study in earlier results, ignored if its settings differ. Baselines
    of a small transformer's seeds are taken over, too. Returns the names of what was taken.
    """
    if earlier is None or settings_difference(earlier["settings"], study["settings"]):
        return []
    records, taken = study["records"], []
    seeds = {seed for _, seed in published}
    baselines = () if "model" in study["settings"]["config"] else {("pretrained", s) for s in seeds}
    for key, runs in earlier["records"].items():
        for seed, record in runs.items():
            if (key, seed) in {*published, *baselines} and seed not in records.get(key, {}):
                records.setdefault(key, {})[seed] = record
                taken.append(f"{key} seed {seed}")
    return taken


def with_records(results: dict[str, dict]) -> dict[str, dict]:
    """Studies as summarize takes them, from what it wrote."""
    return {
        name: study | {"records": {key: study[key]["seeds"] for key in keys_of(study)}}
        for name, study in results.items()
    }


def keys_of(result: dict) -> list[str]:
    """The models of a study, in order."""
    return [key for key, value in result.items() if isinstance(value, dict) and "seeds" in value]


def title_of(key: str, result: dict) -> str:
    if key != "pretrained":
        return find_arm(key).title
    return "Pretrained" if "model" in result["settings"]["config"] else "Untrained"


def title_of_change(pair: str, result: dict) -> str:
    before = "pretrained" if "model" in result["settings"]["config"] else "untrained"
    return pair.replace("pretrained", before)


def level(title: str, number: str, digits: int) -> Column:
    """A column with a number of each seed, for rows of `models_of`."""
    return Column(title, lambda row: values_of(row["result"], row["key"], number), digits)


@dataclass(frozen=True)
class Metric:
    """A number of saved models, as tables show it."""

    number: str  # in records, see scalars
    title: str  # in RESULTS.md; the log has the number's name
    digits: int = 1
    in_log: bool = False


# In the order of the tables' columns. A new number of a record is shown by a row here.
RANKS = (
    Metric("effective_rank", "effective rank", in_log=True),
    Metric("effective_rank_within", "within classes"),
    Metric("effective_rank_without_first", "without the first token"),
    Metric("effective_rank_within_without_first", "within, without first"),
    Metric("effective_rank_share", "over N - 1", 3, in_log=True),
    Metric("effective_rank_matched", "at matched rows"),
    Metric("stable_rank", "stable rank", in_log=True),
    Metric("participation_ratio", "participation ratio", in_log=True),
    Metric("participation_ratio_eigen", "the same, eigenvalues"),
    Metric("dims_95pct", "components for 95% of variance", 0, in_log=True),
    Metric("intermediate.effective_rank", "effective rank, intermediate"),
    Metric("length_share", "share of 1/length", 3),
)
NEURAL_COLLAPSE = (
    Metric("cdnv", "NC1 CDNV, pooled", 2, in_log=True),
    Metric("train.cdnv", "the same, training rows", 2),
    Metric("intermediate.cdnv", "NC1 CDNV, intermediate", 2, in_log=True),
    Metric("train.intermediate.cdnv", "the same, training rows", 2),
    Metric("intermediate.etf_error", "NC2 etf_error", 3),
    Metric("intermediate.self_duality_error", "NC3 self_duality_error", 3),
    Metric("intermediate.ncc_agreement", "NC4 ncc_agreement", 3, in_log=True),
    Metric("within_spread", "spread within classes", 2),
    Metric("between_spread", "spread between classes", 2),
    Metric("language_kept", "LM loss less the start's", 3),
    Metric("transfer", "accuracy on another data set less the start's", 3),
    Metric("accuracy", "accuracy", 3),
)
LOG_COLUMNS = (
    Column("", "title"),
    *(level(m.number, m.number, m.digits) for m in RANKS + NEURAL_COLLAPSE if m.in_log),
)
RANK_CHANGE_COLUMNS = (
    Column("changes of the effective rank", "title"),
    Column("[95% interval for other seeds and rows]", "both.effective_rank", 1),
)


def models_of(results: dict[str, dict]) -> list[dict[str, Any]]:
    """A row for each model of each study."""
    return [
        {"name": name, "result": result, "key": key, "title": title_of(key, result)}
        for name, result in results.items()
        for key in keys_of(result)
    ]


def table(results: dict[str, dict]) -> str:
    """The results as a text for the log."""
    parts = []
    for name, result in results.items():
        matched, columns = result["matched_rows"], LOG_COLUMNS
        if matched:
            title = f"effective rank at {matched} rows"
            columns = (*columns, level(title, "effective_rank_matched", 1))
        pairs = [
            changes | {"title": title_of_change(pair, result)}
            for pair, changes in result["changes"].items()
        ]
        parts += [
            f"\n{name}: {result['num_samples']:,} rows; mean (lowest to highest seed)",
            text_table(columns, models_of({name: result})),
            text_table(RANK_CHANGE_COLUMNS, pairs),
        ]
    return "\n".join(parts)


def values_of(result: dict, key: str, number: str) -> list[float]:
    """A number of each seed's record of a model; without records that lack it."""
    records = result[key]["seeds"].values()
    if number == "effective_rank_matched":
        drawn = [record["subsets"].get(str(result["matched_rows"])) for record in records]
        return [float(np.mean(ranks)) for ranks in drawn if ranks]
    flat = [scalars(record) for record in records]
    return [numbers[number] for numbers in flat if number in numbers]
