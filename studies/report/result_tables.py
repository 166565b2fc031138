"""Markdown tables of what the results folders hold: dicts of a JSON file in, a table out.

Levels are told as the mean of the seeds (lowest to highest), differences as mean [95% interval for
other seeds and other rows]. Columns and rows of the reference are named so.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import common
from collapse.measures.statistics import format_interval, format_spread
from collapse.report.comparisons import compare_datasets, comparisons_of, compute_type
from collapse.report.records import keys_of, title_of, title_of_change, values_of
from collapse.report.reference import REFERENCE, reference_for
from collapse.utils.files import read_json

THREE_MODELS = ("model1", "model2", "model3")


def markdown(header: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    """Columns after the first end at the right where they hold numbers."""
    rule = "|---" + ("|--:" if numbers else "|---") * (len(header) - 1) + "|"
    head, *body = ("| " + " | ".join(line) + " |" for line in (header, *rows))
    return "\n".join((head, rule, *body))


def interval_cell(
    interval: dict | None, digits: int = 2, scale: float = 1.0, sign: str = "+"
) -> str:
    """mean [95%], or the mean alone; n/a where there is none: too few seeds, or all diverged."""
    if not interval or interval["mean"] is None:
        return "n/a"
    return format_interval(interval, digits, scale, sign)


def mean_cell(interval: dict | None, digits: int = 2, scale: float = 1.0, sign: str = "") -> str:
    """The mean of an interval, n/a where there is none."""
    if not interval or interval["mean"] is None:
        return "n/a"
    return f"{scale * interval['mean']:{sign}.{digits}f}"


def told_once(counts: Sequence[str]) -> str:
    """Counts of several columns; one where they agree."""
    return counts[0] if len(set(counts)) == 1 else ", ".join(counts)


def short_commit(commit: str | None) -> str:
    """Ten digits, and -modified where the code was; a run outside of a clone has none."""
    if commit is None:
        return "unknown"
    return commit[:10] + ("-modified" if commit.endswith("-modified") else "")


def threads(run: dict) -> str:
    count = run["hardware"]["threads"]
    return f"{count} thread{'s' * (count > 1)}"


def origin(runs: list[dict]) -> str:
    """By which code on which machines trainings or records were made."""
    commits = ", ".join(sorted({short_commit(run["git_commit"]) for run in runs}))
    devices = ", ".join(sorted({f"{run['hardware']['device']}, {threads(run)}" for run in runs}))
    return f"by commit {commits} on {devices}"


def provenance(folder: Path, results: dict) -> str:
    """Which data, rows, seeds, code and machine a study's numbers come from."""
    data, config = results["settings"]["data"], results["settings"]["config"]
    runs = [run for seeds in results["models"].values() for run in seeds.values()]
    seeds = sorted({int(seed) for found in results["models"].values() for seed in found})
    backbone = f"{config['model']}; " if "model" in config else ""
    return (
        f"*{backbone}{data['name']}: {data['train_rows']:,} training, "
        f"{data['validation_rows']:,} validation rows; {config['epochs']} epochs; "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. "
        f"Source: `{folder}/results.json`, made {origin(runs)}.*"
    )


def provenance_of_ranks(file: str, results: dict) -> str:
    """How the records of Experiment 4 were measured, and by which code on which machine."""
    records = [
        record
        for result in results.values()
        for key in keys_of(result)
        for record in result[key]["seeds"].values()
    ]
    measured = next(iter(results.values()))["measured"]
    return (
        f"*Weights of the {measured['weights']} epoch, up to {measured['rows']:,} validation rows, "
        f"{measured['draws']} random halves. Source: `{file}`, measured {origin(records)}.*"
    )


def model_name(key: str) -> str:
    arm = common.find_arm(key)
    return f"{key.removeprefix('model')}: {arm.title}" if key.startswith("model") else arm.title


def table_accuracy(folder: Path, results: dict) -> str:
    theirs, rows = reference_for(folder), []
    for key, runs in results["models"].items():
        cells = [
            format_spread((run[epoch]["accuracy"] for run in runs.values()), scale=100)
            for epoch in ("final", "best")
        ]
        carried = "n/a"
        if key == "model3":
            values = (run["val"][-1]["carried"]["accuracy"] for run in runs.values())
            carried = format_spread(values, scale=100)
        parameters = f"{next(iter(runs.values()))['parameters']['trainable']:,}"
        reference = [f"{theirs[epoch][key]:.2f}" for epoch in ("final", "best")] if theirs else []
        rows.append([model_name(key), parameters, cells[0], carried, cells[1], *reference])
    header = ["validation accuracy, %", "trained parameters", "final epoch"]
    header += ["final, engram carried", "best epoch"]
    if theirs:
        header += [f"reference, {theirs['model']}: final", "reference: best"]
    return markdown(header, rows)


def table_comparisons(folder: Path, results: dict) -> str:
    theirs, rows = reference_for(folder), []
    for epoch, comparisons in comparisons_of(results).items():
        for name, found in comparisons.items():
            p = ", ".join(f"{value:.2g}" for value in found["mcnemar_p"])
            shown = format_interval(found["interval"], 2, 100, "+")
            row = [f"{name}, {epoch} epoch", shown, p]
            if theirs:  # published accuracies of the same pair and epoch
                b, a = name.split(" - ")
                published = theirs[epoch].get(b), theirs[epoch].get(a)
                row.append("n/a" if None in published else f"{published[0] - published[1]:+.2f}")
            rows.append(row)
    header = ["difference in accuracy, points", "mean [95%]", "McNemar's exact p, each seed"]
    return markdown([*header, *([f"reference, {theirs['model']}"] if theirs else [])], rows)


def table_training(_folder: Path, results: dict) -> str:
    def last(runs: dict, split: str, key: str, digits: int, scale: float = 1.0) -> str:
        values = [run[split][-1][key] for run in runs.values()]
        return "n/a" if values[0] is None else format_spread(values, digits, scale)

    rows = []
    for key, runs in results["models"].items():
        cells = [
            last(runs, "train", "accuracy", 2, 100),
            last(runs, "train", "cls_loss", 3),
            last(runs, "val", "cls_loss", 3),
            last(runs, "train", "lm_loss", 3),
            last(runs, "val", "lm_loss", 3),
            last(runs, "train", "grad_norm", 2),
        ]
        initial = format_spread((run["initial"]["effective_rank"] for run in runs.values()), 1)
        rows.append([model_name(key), *cells, initial, last(runs, "val", "effective_rank", 1)])
    losses = ["train cls loss", "val cls loss", "train LM loss", "val LM loss"]
    ranks = ["effective rank before training", "effective rank after"]
    header = ["model, final epoch", "train accuracy, %", *losses, "gradient norm", *ranks]
    return markdown(header, rows)


def table_seeds(_folder: Path, results: dict) -> str:
    """What stands behind the means: each training by itself."""
    rows = []
    for key, runs in results["models"].items():
        for seed, run in runs.items():
            last, engrams = run["val"][-1], run.get("cluster")
            cells = [
                f"{100 * last['accuracy']:.2f}",
                f"{last['cls_loss']:.3f}",
                f"{last['effective_rank']:.1f}",
                f"{max(epoch['max_grad_norm'] for epoch in run['train']):.1f}",
            ]
            cells += [
                f"{engrams[case]['ari']:.3f}" if engrams else "n/a"
                for case in ("trained", "untrained")
            ]
            rows.append([model_name(key), seed, *cells])
    header = ["model, final epoch", "seed", "accuracy, %", "val cls loss", "effective rank"]
    header += ["largest gradient norm of a step", "engram ARI", "the same, untrained compressor"]
    return markdown(header, rows)


ENGRAM_CASES = {
    "trained": "trained compressor",
    "chance": "chance: the same, labels shuffled",
    "untrained": "control: untrained compressor, trained backbone",
}


def table_measured(folder: Path, results: dict) -> str:
    """Each training that was measured on the way: its start, its least components, its end."""
    rows = []
    for key, runs in results["models"].items():
        for seed, run in runs.items():
            path = [found for found in run.get("measured", ()) if found["dims_95pct"] is not None]
            if not path:
                continue
            least = min(path, key=lambda found: found["dims_95pct"])
            for place, found in (("start", path[0]), ("fewest", least), ("end", path[-1])):
                share = f"{100 * found['dims_95pct'] / path[0]['dims_95pct']:.0f}%"
                ranks = (found[name] for name in RANKS_ON_THE_WAY)
                cells = [f"{found['dims_95pct']}, {share}", *(f"{rank:.1f}" for rank in ranks)]
                cells += ["n/a" if found["loss"] is None else f"{found['loss']:.3f}"]
                cells += ["n/a" if found["loss"] is None else f"{100 * found['accuracy']:.1f}"]
                rows.append(
                    [f"{model_name(key)}, seed {seed}", place, f"{found['step']:,}", *cells]
                )
    if not rows:
        return ""
    header = ["training", "at", "step", "components, of the start", "effective rank"]
    header += ["without first token", "within classes", "training loss", "training accuracy, %"]
    return markdown(header, rows)


RANKS_ON_THE_WAY = ("effective_rank", "effective_rank_without_first", "effective_rank_within")


def table_engrams(folder: Path, results: dict) -> str:
    if "model3" not in results["models"]:
        return ""
    theirs, runs = reference_for(folder), list(results["models"]["model3"].values())
    rows = []
    for case, name in ENGRAM_CASES.items():
        clusters = [run["cluster"][case] for run in runs]
        cosines = [run["engram_cos"][case] for run in runs]
        cells = [
            format_spread((c["ari"] for c in clusters), 3),
            format_spread((c["cluster_accuracy"] for c in clusters), 1, 100),
        ]
        cells += [format_spread((c[kind] for c in cosines), 3) for kind in ("within", "between")]
        rows.append([name, *cells])
    if theirs:
        cosines = [
            f"{theirs[kind]:.3f}" if kind in theirs else "n/a" for kind in ("within", "between")
        ]
        ari, accuracy = f"{theirs['ari']:.3f}", f"{theirs['cluster_accuracy']:.1f}"
        rows.append([f"reference: {theirs['model']}", ari, accuracy, *cosines])
    names = results["settings"]["data"]["class_names"]
    purity = [
        format_spread((run["cluster"]["trained"]["purity"][str(c)] for run in runs), 1, 100)
        for c in range(len(names))
    ]
    purities = "; ".join(f"{name} {value}" for name, value in zip(names, purity, strict=True))
    header = ["engrams of model 3, final epoch", "ARI", "cluster accuracy, %"]
    header += ["cosine within class", "cosine between classes"]
    note = f"Share of each class's rows in its own cluster, trained compressor, %: {purities}."
    return f"{markdown(header, rows)}\n\n{note}"


def table_cross(here: dict, there: dict) -> str:
    """Differences in accuracy on two data sets, and the difference of the differences."""
    heads = []
    for part in (here, there):
        data, kind = part["settings"]["data"], compute_type(part)
        counts = f"{data['train_rows']:,} / {data['validation_rows']:,} rows"
        heads.append(f"{data['name']} ({counts}{f', {kind}' if kind else ''})")
    rows = [
        [
            name,
            *(format_interval(found[k], 2, 100, "+") for k in ("here", "there", "more_here")),
        ]
        for name, found in compare_datasets(here, there)["comparisons"].items()
    ]
    header = ["difference in final accuracy, points [95%]", *heads, "difference of the two"]
    return markdown(header, rows)


# --------------------------------------------------------------------------------------------------
# Experiment 4
# --------------------------------------------------------------------------------------------------

MEASURES_WITHOUT = (
    ("effective_rank_within", "within classes", 1),
    ("effective_rank_without_first", "without the first token", 1),
    ("effective_rank_within_without_first", "within, without first", 1),
)
RANK_COLUMNS = (
    ("effective_rank", "effective rank", 1),
    *MEASURES_WITHOUT,
    ("effective_rank_share", "over N - 1", 3),
    ("effective_rank_matched", "at matched rows", 1),
    ("stable_rank", "stable rank", 1),
    ("participation_ratio", "participation ratio", 1),
    ("participation_ratio_eigen", "the same, eigenvalues", 1),
    ("dims_95pct", "components for 95% of variance", 0),
    ("intermediate.effective_rank", "effective rank, intermediate", 1),
    ("length_share", "share of 1/length", 3),
)
COLLAPSE_COLUMNS = (
    ("cdnv", "NC1 CDNV, pooled", 2),
    ("train.cdnv", "the same, training rows", 2),
    ("intermediate.cdnv", "NC1 CDNV, intermediate", 2),
    ("train.intermediate.cdnv", "the same, training rows", 2),
    ("intermediate.etf_error", "NC2 etf_error", 3),
    ("intermediate.self_duality_error", "NC3 self_duality_error", 3),
    ("intermediate.ncc_agreement", "NC4 ncc_agreement", 3),
    ("within_spread", "spread within classes", 2),
    ("between_spread", "spread between classes", 2),
    ("language_kept", "LM loss less the start's", 3),
    ("transfer", "accuracy on another data set less the start's", 3),
    ("accuracy", "accuracy", 3),
)


def table_records(results: dict, columns: tuple[tuple[str, str, int], ...]) -> str:
    """A row for each study and model: mean (lowest to highest seed) of each number.

    What no record holds has no column; what some lack (of an older run) is n/a there.
    """
    places = [(name, result, key) for name, result in results.items() for key in keys_of(result)]
    columns = tuple(c for c in columns if any(values_of(r, key, c[0]) for _, r, key in places))
    rows = []
    for name, result, key in places:
        values = [(values_of(result, key, number), digits) for number, _, digits in columns]
        cells = [format_spread(v, digits) if v else "n/a" for v, digits in values]
        title, seeds = title_of(key, result), str(len(result[key]["seeds"]))
        rows.append([name, f"{result['num_samples']:,}", title, seeds, *cells])
    return markdown(["data, backbone", "rows", "model", "seeds", *(c[1] for c in columns)], rows)


CHANGE_COLUMNS = (
    ("effective_rank", "effective rank", 1),
    *MEASURES_WITHOUT,
    ("stable_rank", "stable rank", 1),
    ("cdnv_log_ratio", "NC1 CDNV, pooled, as a factor", 2),
)


def change_cell(found: dict, number: str, digits: int) -> str:
    """Mean [95%] of a change; of a log ratio as a factor; the mean alone where rows have no
    interval; n/a where an older run lacks it.
    """
    interval = found["both"].get(number)
    if interval is None:
        return f"{found[number]['mean']:+.{digits}f}" if number in found else "n/a"
    if not number.endswith("log_ratio"):
        return format_interval(interval, digits, sign="+")
    ends = {k: None if interval[k] is None else math.exp(interval[k]) for k in ("low", "high")}
    return format_interval({"mean": math.exp(interval["mean"]), **ends}, digits)


def table_changes(results: dict) -> str:
    changes = [
        (name, result, pair, found)
        for name, result in results.items()
        for pair, found in result["changes"].items()
    ]
    columns = [c for c in CHANGE_COLUMNS if any(c[0] in found["both"] for *_, found in changes)]
    rows = [
        [
            name,
            title_of_change(pair, result),
            str(found["effective_rank"]["n"]),
            *(change_cell(found, number, digits) for number, _, digits in columns),
        ]
        for name, result, pair, found in changes
    ]
    header = ["data, backbone", "change, mean [95%]", "seeds"]
    return markdown([*header, *(head for _, head, _ in columns)], rows)


DEPTH_COLUMNS = (("effective_rank", "effective rank", 1), *MEASURES_WITHOUT)


def table_depth(results: dict) -> str:
    """Of language models: ranks of the embeddings, of the layer between where each seed's is
    lowest, and of the last state; for each measure that the records have.
    """
    rows = []
    of_language_models = [r for r in results.items() if "model" in r[1]["settings"]["config"]]
    for name, result in of_language_models:
        for key in keys_of(result):
            layers = [record["layers"] for record in result[key]["seeds"].values()]
            for number, label, digits in DEPTH_COLUMNS:
                if not all(number in layer for depths in layers for layer in depths):
                    continue
                ranks = np.array([[layer[number] for layer in depths] for depths in layers])
                lowest = ranks[:, 1:-1].min(1)
                places = sorted({int(layer) for layer in 1 + ranks[:, 1:-1].argmin(1)})
                at = " or ".join(map(str, places))
                cells = [
                    format_spread(ranks[:, 0], digits),
                    f"{format_spread(lowest, digits)} at {at}",
                    format_spread(ranks[:, -1], digits),
                ]
                model = title_of(key, result)
                rows.append([name, model, label, *cells])
    header = ["data, backbone", "model", "measure", "at the embeddings"]
    return markdown([*header, "lowest between, at layer", "at the end"], rows)


# --------------------------------------------------------------------------------------------------
# Other studies, speed, the reference
# --------------------------------------------------------------------------------------------------


def table_sink(results: dict) -> str:
    """Of each layer of a pretrained model; layer 0 are the embeddings."""
    rows = [
        [
            str(number),
            f"{layer['effective_rank']:.1f}",
            f"{layer['effective_rank_within']:.1f}",
            f"{layer['effective_rank_without_first']:.1f}",
            f"{layer['effective_rank_within_without_first']:.1f}",
            f"{layer['length_share']:.3f}",
            f"{layer['length_share_without_first']:.3f}",
            f"{layer['sink_ratio']:.1f}",
        ]
        for number, layer in enumerate(results["layers"])
    ]
    header = ["layer", "effective rank", "within classes", "without the first token"]
    header += ["within, without first", "share of 1/length", "the same, without first"]
    return markdown([*header, "first token's norm over the others'"], rows)


def table_half_widths(results: dict) -> str:
    """What ten seeds resolve, from variances seen in our runs."""
    rows = []
    for case, found in results["half_widths_in_points"].items():
        for kind in ("as seen", "cautious"):
            numbers = {k: v for k, v in found[kind].items() if k.endswith("rows")}
            rows.append([case, kind, *(f"{value:.2f}" for value in numbers.values())])
    return markdown(["half-width of 95%, points", "variance of seeds", *numbers], rows)


def table_false_positives(results: dict) -> str:
    rows = [
        [case, seeds, *(f"{found[k]:.1f}" for k in ("crossed", "seeds alone", "rows alone"))]
        for case, counts in results["false_positives"].items()
        for seeds, found in counts.items()
        if seeds.endswith(" 872 rows")
    ]
    header = ["where the variance lies", "seeds, rows", "crossed interval, % wrong"]
    return markdown([*header, "seeds alone", "rows alone"], rows)


def table_throughput(results: dict) -> str:
    rows = []
    for key in [key for key in THREE_MODELS if key in results]:
        found = results[key]
        rates, ratio = found["examples_per_second"], found["ratio"]["conventional"]
        cells = [f"{rates['conventional']:,.0f}", f"{rates['ours']:,.0f}", f"{ratio['median']:.1f}"]
        rows.append([model_name(key), *cells, f"{ratio['low']:.1f} to {ratio['high']:.1f}"])
    header = ["model", "conventional, examples/s", "ours, examples/s", "ratio"]
    note = (
        f"*{results['data']['name']}, {results['tokens_per_row']:.1f} tokens a row; "
        f"medians of {results['settings']['rounds']} rounds, both recipes in turn; "
        f"made {origin([results])}.*"
    )
    return f"{markdown([*header, 'lowest to highest round'], rows)}\n\n{note}"


def table_paper(counts_of: dict[str, dict]) -> str:
    """Hours expected by card for data sets (folder -> counts of studies/hours.py), and the
    reference's; how many times as fast as other recipes ours can be at most.
    """
    rows, sources, cards = [], [], []
    for place, counts in counts_of.items():
        theirs, cards = REFERENCE[place], list(counts["cards"])
        for key in THREE_MODELS:
            rates = counts[key]["examples_per_second"]
            cells = [hours_range(counts, key, card) for card in cards]
            cells += [f"{theirs['minutes'][key] / 60:.1f}"]
            cells += [f"{rates['ours'] / rates[other]:.1f}" for other in rates if other != "ours"]
            rows.append([f"{theirs['data']}, {model_name(key)}", *cells])
        sources.append(f"{counts['tokens_per_row']:.1f} tokens a row of {counts['data']['name']}")
    low, high = counts["assumed_ratio"]
    note = (
        f"*Estimated, not measured: operations and bytes of three epochs with evaluations over the "
        f"card's specifications, times {low:g} to {high:g}, as assumed until studies/gpu_check.py "
        f"has measured it; {'; '.join(sources)}; hours are for the reference's rows. Made by "
        f"commit {short_commit(counts['git_commit'])}.*"
    )
    header = ["data, model", *(f"hours, {card}" for card in cards), "reference: hours"]
    header += ["times as fast as conventional, at most", "as transformers' Trainer, at most"]
    return f"{markdown(header, rows)}\n\n{note}"


def table_hours(counts_of: dict[str, dict]) -> str:
    """For the README: hours of a training by card, models 1 to 3 and data sets."""
    first = next(iter(counts_of.values()))
    rows = [
        [
            card,
            *(
                hours_range(counts, key, card)
                for counts in counts_of.values()
                for key in THREE_MODELS
            ),
        ]
        for card in first["cards"]
    ]
    names = [REFERENCE[place]["data"].partition(",")[0] for place in counts_of]
    header = [f"{name}, Model {key[-1]}" for name in names for key in THREE_MODELS]
    return markdown(["card", *header], rows)


def table_by_others(folder: Path) -> str:
    """7B runs that people sent, a row for each training: folder/NAME/results.json."""
    rows = []
    for file in sorted(folder.glob("*/results.json")):
        results = read_json(file)
        for key, runs in results["models"].items():
            for seed, run in runs.items():
                peak, name = run["peak_memory_bytes"], f"{file.parent.name}, {key} seed {seed}"
                cells = [results["settings"]["data"]["name"], f"{run['seconds'] / 3600:.1f}"]
                cells += [f"{peak / 2**30:.1f}" if peak else "n/a"]
                cells += [f"{100 * run['final']['accuracy']:.2f}"]
                rows.append([name, run["hardware"]["device"], *cells])
    if not rows:
        return "*None yet.*"
    header = ["run", "card", "data", "hours", "peak, GiB", "final accuracy, %"]
    return markdown(header, rows)


def hours_range(counts: dict, key: str, card: str) -> str:
    least = counts[key]["least_hours"][card]
    return " to ".join(f"{least * ratio:.1f}" for ratio in counts["assumed_ratio"])


def table_reference_accuracy() -> str:
    rows = []
    for theirs in REFERENCE.values():
        for key in THREE_MODELS:
            numbers = [theirs.get(epoch, {}).get(key) for epoch in ("first", "final", "best")]
            numbers += theirs.get("training", {}).get(key, (None, None, None))
            cells = ["n/a" if number is None else f"{number:g}" for number in numbers]
            rows.append([f"{theirs['data']}, {theirs['model']}", model_name(key), *cells])
    header = ["reference: data, backbone", "model", "accuracy, first epoch", "final", "best"]
    return markdown([*header, "train cls loss", "train LM loss", "train accuracy"], rows)


def table_reference_ranks() -> str:
    rows = []
    for theirs in REFERENCE.values():
        for key, ranks in theirs.get("ranks", {}).items():
            place = f"{theirs['data']}, {theirs['model']}; {theirs['rank_rows']:,} rows"
            name = "Pretrained" if key == "pretrained" else model_name(key)
            rows.append([place, name, *map(str, ranks)])
    header = ["reference: data, backbone", "model", "effective rank", "stable rank"]
    return markdown([*header, "participation ratio", "components for 95% of variance"], rows)
