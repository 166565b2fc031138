"""Fill the marked tables of FINDINGS.md and README.md from the results folders.

A block stands between <!-- begin FOLDER TABLE --> and <!-- end -->; FOLDER holds the JSON file that
FILES names, TABLE is a function below named table_TABLE. Everything between the marks is replaced.
"""

import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from collapse.files import read_json, write_file
from collapse.records import keys_of, title_of, title_of_change
from collapse.reports import compute_type, study_name
from collapse.settings import ROOT, run_script
from collapse.statistics import format_bounds, format_interval, mean_interval

DOCUMENTS = ("FINDINGS.md", "README.md")
BLOCK = re.compile(
    r"(?P<begin><!-- begin (?P<folder>\S+) (?P<table>\S+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)

# TABLE -> its JSON file, where that is not results.json
FILES = {"throughput": "throughput.json", "paper": "throughput_on_paper.json"}
RANK_TABLES = (
    "collapse",
    "collapse_changes",
    "neural_collapse",
    "depth",
)  # of records of Experiment 4 alone
FILES |= dict.fromkeys((*RANK_TABLES, "effects", "reference"), "effective_rank_results.json")

# Published numbers of the documents this study starts from: one seed each, their own code.
# Accuracies in %.
REFERENCE = {
    "results": {
        "model": "its small transformer",
        "final": {"model1": 79.82, "model2": 80.96, "model3": 79.36},
        "best": {"model1": 80.28, "model2": 80.96, "model3": 79.36},
        "ari": 0.236,
        "cluster_accuracy": 74.3,
    },
    "results_7b": {
        "model": "Qwen2.5-7B, 67,349 training rows",
        "train_rows": 67_349,
        "minutes": {"model1": 380, "model2": 417, "model3": 635},
        "final": {"model1": 96.22, "model2": 96.56, "model3": 96.67},
        "best": {"model1": 96.22, "model2": 96.79, "model3": 96.67},
        "ari": 0.833,
        "cluster_accuracy": 95.64,
        "within": 0.953,
        "between": 0.838,
    },
    "results_agnews": {
        "model": "Qwen2.5-7B, 120,000 training rows",
        "train_rows": 120_000,
        "minutes": {"model1": 1358, "model2": 1488, "model3": 1953},
        "final": {"model1": 90.76, "model2": 95.54, "model3": 95.92},
        "best": {"model1": 90.76, "model2": 95.63, "model3": 95.92},
        "ari": 0.889,
        "cluster_accuracy": 95.64,
        "within": 0.862,
        "between": 0.576,
    },
}

# Its ranks of Qwen2.5-7B: effective rank, stable rank, participation ratio, components for 95 % of
# the variance.
REFERENCE_RANKS = {
    "SST-2, 67,349 training rows, Qwen2.5-7B; 872 rows": {
        "Pretrained": (498.1, 5.5, 224.3, 249),
        "Classification Only": (556.8, 1.5, 163.6, 261),
        "Dual Head": (658.0, 5.0, 408.6, 510),
        "Dual + Engram": (653.8, 5.4, 400.6, 506),
    },
    "AG News, 120,000 training rows, Qwen2.5-7B; 2,000 rows": {
        "Pretrained": (984.0, 7.1, 375.3, 374),
        "Classification Only": (12.6, 1.9, 5.2, 3),
        "Dual Head": (1097.4, 8.1, 464.4, 515),
        "Dual + Engram": (1095.9, 8.1, 466.2, 516),
    },
}


def reference_for(folder: Path) -> dict | None:
    """The published numbers beside which a folder's tables stand: none for data that the reference
    did not use.
    """
    return None if "movie-snippets" in folder.parts else REFERENCE.get(folder.parts[0])


def interval(values, digits: int = 2, scale: float = 1.0, sign: str = "") -> str:
    """Mean [95 % t interval over seeds], or the mean alone for one seed."""
    return format_interval(mean_interval(values), digits, scale, sign)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short_commit(commit: str | None) -> str:
    """Ten digits, and -modified where the code was; a run outside of a clone has none."""
    return (
        "unknown"
        if commit is None
        else commit[:10] + ("-modified" if commit.endswith("-modified") else "")
    )


def threads(run: dict) -> str:
    count = run["hardware"]["threads"]
    return f"{count} thread{'s' * (count > 1)}"


def origin(runs: list[dict]) -> str:
    """By which code on which machines trainings or records were made."""
    commits = ", ".join(sorted({short_commit(run["git_commit"]) for run in runs}))
    devices = ", ".join(sorted({f"{run['hardware']['device']}, {threads(run)}" for run in runs}))
    return f"by commit {commits} on {devices}"


def caption(folder: Path, results: dict) -> str:
    """Which data, rows, seeds, code and machine a table's numbers come from."""
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


def analysis_caption(folder: Path, results: dict) -> str:
    """How the records of Experiment 4 were measured, and by which code on which machine."""
    records = [
        record
        for result in results.values()
        for key in keys_of(result)
        for record in result[key]["seeds"].values()
    ]
    measured = next(iter(results.values()))["measured"]
    return (
        f"*Weights of the {measured['weights']} epoch, {measured['draws']} random subsets "
        "for an interval over rows. "
        f"Source: `{folder}/{FILES['collapse']}`, measured {origin(records)}.*"
    )


def model_name(key: str) -> str:
    arm = common.find_arm(key)
    return f"{key.removeprefix('model')}: {arm.title}" if key.startswith("model") else arm.title


def table_accuracy(folder: Path, results: dict) -> str:
    theirs, rows = reference_for(folder), []
    for key, runs in results["models"].items():
        cells = [
            interval((run[epoch]["accuracy"] for run in runs.values()), scale=100)
            for epoch in ("final", "best")
        ]
        carried = "n/a"
        if key == "model3":
            carried = interval(
                (run["val"][-1]["carried"]["accuracy"] for run in runs.values()), scale=100
            )
        minutes = f"{np.mean([run['seconds'] for run in runs.values()]) / 60:.0f}"
        parameters = f"{next(iter(runs.values()))['parameters']['trainable']:,}"
        reference = [f"{theirs[epoch][key]:.2f}" for epoch in ("final", "best")] if theirs else []
        rows.append([model_name(key), parameters, minutes, cells[0], carried, cells[1], *reference])
    header = [
        "model",
        "trained parameters",
        "minutes a seed",
        "final epoch",
        "final, engram carried",
        "best epoch",
    ]
    if theirs:
        header += ["reference: final", "reference: best"]
    note = "Validation accuracy in %, mean and 95 % t interval over seeds; "
    note += "evaluated with the zero engram unless carried."
    if theirs:
        note += f" The reference columns are its published numbers, of {theirs['model']}: "
        note += "one seed, its own code."
    return f"{note}\n\n{markdown(header, rows)}"


def table_comparisons(folder: Path, results: dict) -> str:
    theirs, rows = reference_for(folder), []
    for epoch, comparisons in results["comparisons"].items():
        for name, found in comparisons.items():
            over_seeds, over_examples = (
                format_bounds(found[kind], 2, 100, "+") or "n/a" for kind in ("seeds", "examples")
            )
            p = ", ".join(f"{value:.2g}" for value in found["mcnemar_p"])
            row = [
                f"{name}, {epoch} epoch",
                f"{100 * found['difference']:+.2f}",
                over_seeds,
                over_examples,
                p,
            ]
            if theirs:  # published accuracies of the same pair and epoch
                b, a = name.split(" - ")
                published = theirs[epoch].get(b), theirs[epoch].get(a)
                row.append("n/a" if None in published else f"{published[0] - published[1]:+.2f}")
            rows.append(row)
    header = [
        "difference in accuracy, points",
        "mean",
        "95 % over seeds (t)",
        "95 % over examples (paired bootstrap)",
    ]
    return markdown(
        [
            *header,
            "McNemar's exact p, each seed",
            *([f"reference, one seed, {theirs['model']}"] if theirs else []),
        ],
        rows,
    )


def table_training(folder: Path, results: dict) -> str:
    def last(runs: dict, split: str, key: str, digits: int, scale: float = 1.0) -> str:
        values = [run[split][-1][key] for run in runs.values()]
        return "n/a" if values[0] is None else interval(values, digits, scale)

    rows = []
    for key, runs in results["models"].items():
        cells = [
            last(runs, "train", "accuracy", 2, 100),
            last(runs, "train", "cls_loss", 3),
            last(runs, "val", "cls_loss", 3),
        ]
        cells += [
            last(runs, "train", "lm_loss", 3),
            last(runs, "val", "lm_loss", 3),
            last(runs, "train", "grad_norm", 2),
        ]
        initial = interval((run["initial"]["effective_rank"] for run in runs.values()), 1)
        rows.append([model_name(key), *cells, initial, last(runs, "val", "effective_rank", 1)])
    losses = ["train cls loss", "val cls loss", "train LM loss", "val LM loss"]
    ranks = ["effective rank before training", "effective rank after"]
    header = ["model, final epoch", "train accuracy, %", *losses, "gradient norm", *ranks]
    n = min(results["settings"]["data"]["validation_rows"], common.RANK_ROWS)
    size = results["settings"]["config"].get("hidden_size")
    note = "Losses in nats (LM: per token); training values are running means with dropout. "
    note += f"Ranks of {n:,} pooled validation"
    return f"{note} features{f' of size {size}' if size else ''}.\n\n{markdown(header, rows)}"


def differences_by_seed(results: dict, a: str, b: str, number) -> list[float]:
    """number(run) of model b minus that of model a, for each seed that both have."""
    first, second = (results["models"].get(key, {}) for key in (a, b))
    return [number(second[seed]) - number(first[seed]) for seed in first if seed in second]


def table_rank(folder: Path, results: dict) -> str:
    models, rows = results["models"], []
    for a, b in (("model1", "model2"), ("model2", "model3"), ("model1", "model3")):
        if differences := differences_by_seed(
            results, a, b, lambda run: run["val"][-1]["effective_rank"]
        ):
            rows.append([f"{b} - {a}", interval(differences, 1, sign="+"), str(len(differences))])
    for key, runs in models.items():
        change = [
            run["val"][-1]["effective_rank"] - run["initial"]["effective_rank"]
            for run in runs.values()
        ]
        rows.append(
            [f"{key}: after training - before", interval(change, 1, sign="+"), str(len(runs))]
        )
    return markdown(
        [
            "effective rank of pooled validation features, final epoch",
            "mean [95 % t interval over seeds]",
            "seeds",
        ],
        rows,
    )


def table_engrams(folder: Path, results: dict) -> str:
    theirs, runs = reference_for(folder), list(results["models"].get("model3", {}).values())
    if not runs:
        return "No training of model 3 is finished."
    cases = {
        "trained": "trained compressor",
        "chance": "chance: the same, labels shuffled",
        "untrained": "control: untrained compressor, trained backbone",
    }
    rows = []
    for case, name in cases.items():
        clusters, cosines = (
            [run["cluster"][case] for run in runs],
            [run["engram_cos"][case] for run in runs],
        )
        cells = [
            interval((c["ari"] for c in clusters), 3),
            interval((c["cluster_accuracy"] for c in clusters), 1, 100),
        ]
        cells += [interval((c[kind] for c in cosines), 3) for kind in ("within", "between")]
        rows.append([name, *cells])
    if theirs:
        cosines = [
            f"{theirs[kind]:.3f}" if kind in theirs else "n/a" for kind in ("within", "between")
        ]
        name = f"reference: {theirs['model']}, one seed, its code"
        rows.append([name, f"{theirs['ari']:.3f}", f"{theirs['cluster_accuracy']:.1f}", *cosines])
    names = results["settings"]["data"]["class_names"]
    purity = [
        interval((run["cluster"]["trained"]["purity"][str(c)] for run in runs), 1, 100)
        for c in range(len(names))
    ]
    purities = "; ".join(f"{name} {value}" for name, value in zip(names, purity, strict=True))
    header = [
        "engrams of model 3, final epoch",
        "ARI",
        "cluster accuracy, %",
        "cosine within class",
        "cosine between classes",
    ]
    note = f"Share of each class's rows in its own cluster, trained compressor, %: {purities}."
    return f"{markdown(header, rows)}\n\n{note}"


def table_seeds(folder: Path, results: dict) -> str:
    """What stands behind the means: each training by itself."""
    rows = []
    for key, runs in results["models"].items():
        for seed, run in runs.items():
            last, engrams = run["val"][-1], run.get("cluster")
            cells = [
                f"{100 * last['accuracy']:.2f}",
                f"{last['cls_loss']:.3f}",
                f"{last['effective_rank']:.1f}",
            ]
            cells += [f"{max(epoch['max_grad_norm'] for epoch in run['train']):.1f}"]
            cells += [
                f"{engrams[case]['ari']:.3f}" if engrams else "n/a"
                for case in ("trained", "untrained")
            ]
            rows.append([model_name(key), seed, *cells])
    header = [
        "model, final epoch",
        "seed",
        "accuracy, %",
        "val cls loss",
        "effective rank",
        "largest gradient norm of a step",
    ]
    return markdown([*header, "engram ARI", "the same, untrained compressor"], rows)


def table_cross(folder: Path, results: dict) -> str:
    cross = results["cross_dataset"]
    heads = [
        f"{data['name']} ({data['train_rows']:,} / {data['validation_rows']:,} rows, "
        f"{data['compute_dtype']})"
        for data in (
            results["settings"]["data"] | {"compute_dtype": compute_type(results)},
            cross["other"],
        )
    ]
    rows = [
        [
            name,
            *(
                format_interval(found[key], scale=100, sign="+")
                for key in ("here", "there", "more_here")
            ),
        ]
        for name, found in cross["comparisons"].items()
    ]
    return markdown(
        ["difference in final accuracy, points [95 % over seeds]", *heads, "difference of the two"],
        rows,
    )


def collapse_rows(results: dict, columns: tuple[tuple[str, str, int], ...]) -> str:
    """A row for each study and model: mean [95 % interval over seeds] of each number."""
    rows = []
    for name, result in results.items():
        for key in keys_of(result):
            intervals = result[key]["intervals"]
            cells = [
                format_interval(intervals[number], digits) if number in intervals else "n/a"
                for number, _, digits in columns
            ]
            seeds = str(intervals["effective_rank"]["n"])
            rows.append(
                [
                    name,
                    f"{result['num_samples']:,}",
                    title_of(key, result, common.find_arm),
                    seeds,
                    *cells,
                ]
            )
    return markdown(
        ["data, backbone", "rows", "model", "seeds", *(head for _, head, _ in columns)], rows
    )


def table_collapse(folder: Path, results: dict) -> str:
    matched = next(iter(results.values()))["matched_rows"]
    columns = (
        ("effective_rank", "effective rank", 1),
        ("effective_rank_share", "over N - 1", 3),
        ("effective_rank_matched", f"effective rank at {matched} rows", 1),
        ("stable_rank", "stable rank", 1),
        ("participation_ratio", "participation ratio", 1),
        ("participation_ratio_eigen", "the same, eigenvalues", 1),
        ("dims_95pct", "components for 95 % of variance", 0),
    )
    return collapse_rows(results, columns)


def table_neural_collapse(folder: Path, results: dict) -> str:
    columns = (
        ("cdnv", "NC1 cdnv, pooled", 2),
        ("intermediate.cdnv", "NC1 cdnv, intermediate", 2),
        ("intermediate.etf_error", "NC2 etf_error", 3),
        ("intermediate.self_duality_error", "NC3 self_duality_error", 3),
        ("intermediate.ncc_agreement", "NC4 ncc_agreement", 3),
        ("accuracy", "accuracy", 3),
    )
    return collapse_rows(results, columns)


def table_reference(folder: Path, results: dict) -> str:
    rows = [
        [f"reference: {data}", model, *map(str, ranks)]
        for data, found in REFERENCE_RANKS.items()
        for model, ranks in found.items()
    ]
    header = ["data, backbone", "model", "effective rank", "stable rank", "participation ratio"]
    return markdown([*header, "components for 95 % of variance"], rows)


def table_depth(folder: Path, results: dict) -> str:
    """Effective rank of the embeddings, of the layer between where it is lowest, and of the last
    state; of language models.
    """
    rows = []
    for name, result in (
        (name, result)
        for name, result in results.items()
        if "model" in result["settings"]["config"]
    ):
        for key in keys_of(result):
            ranks = np.array(
                [
                    [layer["effective_rank"] for layer in seed["layers"]]
                    for seed in result[key]["seeds"].values()
                ]
            )
            lowest, places = (
                ranks[:, 1:-1].min(1),
                sorted({str(layer) for layer in 1 + ranks[:, 1:-1].argmin(1)}),
            )
            cells = [
                interval(ranks[:, 0], 1),
                f"{interval(lowest, 1)} at {' or '.join(places)}",
                interval(ranks[:, -1], 1),
            ]
            rows.append([name, title_of(key, result, common.find_arm), str(len(ranks)), *cells])
    header = [
        "data, backbone",
        "model",
        "seeds",
        "effective rank at the embeddings",
        "lowest between, at layer",
        "at the end",
    ]
    return markdown(header, rows)


def table_collapse_changes(folder: Path, results: dict) -> str:
    rows = []
    for name, result in results.items():
        for pair, found in result["changes"].items():
            cells = [str(found["effective_rank"]["n"]), f"{found['half']['rows']:,}"]
            for number, digits in (("effective_rank", 1), ("stable_rank", 1), ("cdnv", 2)):
                cells += [
                    format_interval(kind[number], digits, sign="+")
                    for kind in (found, found["half"])
                ]
            rows.append([name, title_of_change(pair, result), *cells])
    header = ["data, backbone", "change", "seeds", "half the rows"]
    numbers = ("effective rank", "stable rank", "NC1 cdnv, pooled")
    kinds = ("mean [95 % over seeds]", "at half the rows [95 % over rows]")
    return markdown([*header, *(f"{number}, {kind}" for number in numbers for kind in kinds)], rows)


def studied_folders() -> list[str]:
    """Results folders that FINDINGS.md has a section on, in its order."""
    blocks = BLOCK.finditer((ROOT / "FINDINGS.md").read_text())
    return [match["folder"] for match in blocks if match["table"] == "accuracy"]


def table_effects(folder: Path, results: dict) -> str:
    """What bears on each hypothesis, one row for each study: mean effect, and its intervals over
    seeds and over rows.
    """
    rows: dict[str, list[list[str]]] = {"H1": [], "H2": [], "H3": [], "H4": []}
    folders = studied_folders()
    for study_folder in folders:
        run = read_json(ROOT / study_folder / "results.json")
        study, found = (
            study_name(run["settings"]),
            run["comparisons"]["final"].get("model2 - model1"),
        )
        if not found or "model3" not in run["models"]:
            continue  # not all three models are trained
        seeds = str(found["seeds"]["n"])
        over_rows = format_bounds(found["examples"], 2, 100, "+")
        accuracy = format_interval(found["seeds"], 2, 100, "+")
        rows["H1"].append(["accuracy, points: model2 - model1", study, seeds, accuracy, over_rows])
        loss = interval(
            differences_by_seed(run, "model1", "model2", lambda r: r["val"][-1]["cls_loss"]),
            3,
            sign="+",
        )
        rows["H1"].append(
            ["validation classification loss, nats: model2 - model1", study, seeds, loss, "n/a"]
        )
        overfit = differences_by_seed(
            run, "model1", "model2", lambda r: r["val"][-1]["cls_loss"] - r["train"][-1]["cls_loss"]
        )
        rows["H1"].append(
            [
                "the same, validation less training",
                study,
                seeds,
                interval(overfit, 3, sign="+"),
                "n/a",
            ]
        )
        if "cross_dataset" in run:
            gains = run["cross_dataset"]["comparisons"]["model2 - model1"]
            pair = f"{study}, less {run['cross_dataset']['other']['study']}"
            both = f"{gains['here']['n']} and {gains['there']['n']}"
            more = format_interval(gains["more_here"], 2, 100, "+")
            rows["H2"].append(["accuracy gain, points", pair, both, more, "n/a"])
        engrams = [r["cluster"] for r in run["models"]["model3"].values()]
        gain = interval([c["trained"]["ari"] - c["untrained"]["ari"] for c in engrams], 3, sign="+")
        rows["H3"].append(
            ["engram ARI: trained - untrained compressor", study, str(len(engrams)), gain, "n/a"]
        )
    for study, result in results.items():
        for pair in ("model1 - pretrained", "model2 - model1"):
            if pair not in result["changes"]:
                continue
            change, shown = result["changes"][pair], title_of_change(pair, result)
            numbers = [("effective_rank", "effective rank", 1), ("stable_rank", "stable rank", 1)]
            for number, label, digits in numbers + [("cdnv", "NC1 cdnv", 2)] * (
                pair == "model2 - model1"
            ):
                over_seeds, half = (
                    format_interval(kind[number], digits, sign="+")
                    for kind in (change, change["half"])
                )
                n = str(change[number]["n"])
                rows["H4"].append(
                    [
                        f"{label}: {shown}",
                        study,
                        n,
                        over_seeds,
                        f"{half} at {change['half']['rows']:,} rows",
                    ]
                )
    header = [
        "hypothesis",
        "effect, final epoch",
        "data, backbone",
        "seeds",
        "mean [95 % over seeds]",
        "95 % over examples or rows",
    ]
    files = [
        *(f"`{study_folder}/results.json`" for study_folder in folders),
        f"`{folder}/{FILES['effects']}`",
    ]
    table = markdown(header, [[name, *row] for name, found in rows.items() for row in found])
    return f"{table}\n\n*Sources: {', '.join(files)}.*"


def table_throughput(folder: Path, results: dict) -> str:
    rows = []
    for key in [key for key in ("model1", "model2", "model3") if key in results]:
        found = results[key]
        rates, ratio = found["examples_per_second"], found["ratio"]["conventional"]
        cells = [f"{rates['conventional']:,.0f}", f"{rates['ours']:,.0f}", f"{ratio['median']:.1f}"]
        rows.append([model_name(key), *cells, f"{ratio['low']:.1f} to {ratio['high']:.1f}"])
    header = [
        "model",
        "conventional, examples/s",
        "ours, examples/s",
        "ratio",
        "lowest to highest round",
    ]
    data, hardware = results["data"], results["hardware"]
    note = (
        f"*{data['name']}, {results['tokens_per_row']:.1f} tokens a row; "
        f"medians of {results['settings']['rounds']} rounds, both recipes in turn; "
        f"{hardware['device']}, {threads(results)}; "
        f"commit {short_commit(results['git_commit'])}. Source: `{folder}/throughput.json`.*"
    )
    return f"{markdown(header, rows)}\n\n{note}"


def table_paper(folder: Path, results: dict) -> str:
    """Counts for both data sets beside the reference's published times, which are of its own number
    of training rows.
    """
    rows, sources = [], []
    for place in ("results_7b", "results_agnews"):
        counts, theirs = read_json(ROOT / place / FILES["paper"]), REFERENCE[place]
        for key in ("model1", "model2", "model3"):
            rates, step = counts[key]["examples_per_second"], counts[key]["step"]["ours"]
            ratios = [
                f"{rates['ours'] / rates[other]:.1f}" for other in ("conventional", "ecosystem")
            ]
            seen = counts["settings"]["epochs"] * theirs["train_rows"]
            hours = []
            for recipe in ("ours", "conventional"):
                means = counts[key]["step"][recipe]
                evaluations = means["evaluation_passes"] * means["evaluation_seconds"]
                hours.append(f"{(seen / rates[recipe] + evaluations) / 3600:.1f}")
            cells = [
                f"{step['limit_share']:.0%}",
                f"{step['unpacked']:.0%}",
                *hours,
                f"{theirs['minutes'][key] / 60:.1f}",
            ]
            rows.append(
                [f"{counts['data']['name'].partition(',')[0]}, {model_name(key)}", *ratios, *cells]
            )
        sources.append(f"{counts['tokens_per_row']:.1f} tokens a row of {counts['data']['name']}")
    header = [
        "data, model",
        "examples/s over conventional",
        "over ecosystem's",
        "share of the limit",
        "layers kept unpacked",
    ]
    header += [
        "hours for the reference's rows, ours",
        "the same, conventional",
        "reference's published hours",
    ]
    card = f"{results['rates']['name']}, {results['settings']['memory_gib']:.0f} GiB"
    note = (
        f"*On paper, not measured: {'; '.join(sources)}; {card}; evaluations included. "
        "Sources: `throughput_on_paper.json` in `results_7b/` and `results_agnews/`, "
        f"commit {short_commit(results['git_commit'])}.*"
    )
    return f"{markdown(header, rows)}\n\n{note}"


def fill(text: str) -> str:
    """The document with every block made anew."""

    def replace(match: re.Match) -> str:
        folder, table = Path(match["folder"]), match["table"]
        file = FILES.get(table, "results.json")
        results = read_json(ROOT / folder / file)
        content = globals()[f"table_{table}"](folder, results)
        if file == "results.json":
            content += f"\n\n{caption(folder, results)}"
        elif table in RANK_TABLES:
            content += f"\n\n{analysis_caption(folder, results)}"
        return f"{match['begin']}\n{content}\n\n{match['end']}"

    return BLOCK.sub(replace, text)


def main() -> None:
    for name in DOCUMENTS:
        path = ROOT / name
        write_file(path, fill(path.read_text()).encode())
        print(f"filled the tables of {name}")


if __name__ == "__main__":
    run_script(main)
