"""Tables of smaller sections of RESULTS.md.

The first token as an attention sink, resolution of the statistics, speed, and the reference's
numbers.
"""

from pathlib import Path

import numpy as np

from collapse.report.markdown import Column, at, rows_of, table
from collapse.report.reference import REFERENCE
from collapse.utils.files import ROOT, read_json
from studies import lora_speed
from studies.report.experiments import THREE_MODELS, model_name

SINK = ROOT / "studies" / "results" / "sink" / "sink.json"
SIMULATION = ROOT / "studies" / "results" / "statistics" / "simulation.json"
THROUGHPUT = ROOT / "results" / "throughput.json"

SINK_COLUMNS = (
    Column("layer", "layer"),
    Column("effective rank", "effective_rank", 1),
    Column("within classes", "effective_rank_within", 1),
    Column("without the first token", "effective_rank_without_first", 1),
    Column("within, without first", "effective_rank_within_without_first", 1),
    Column("share of 1/length", "length_share", 3),
    Column("the same, without first", "length_share_without_first", 3),
    Column("first token's norm over the others'", "sink_ratio", 1),
)


def table_sink(results: dict) -> str:
    """Ranks and norms of each layer of a pretrained model; layer 0 are the embeddings."""
    rows = (numbers | {"layer": layer} for layer, numbers in enumerate(results["layers"]))
    return table(SINK_COLUMNS, rows)


FALSE_POSITIVE_COLUMNS = (
    Column("where the variance lies", "case"),
    Column("seeds, rows", "seeds"),
    Column("crossed interval, % wrong", "crossed", 1),
    Column("seeds alone", "seeds alone", 1),
    Column("rows alone", "rows alone", 1),
)


def table_half_widths(results: dict) -> str:
    """Half-widths of intervals with ten seeds, from variances in our runs."""
    rows = rows_of(results["half_widths_in_points"], "case", "kind")
    columns = [Column("half-width of 95%, points", "case"), Column("variance of seeds", "kind")]
    columns += [Column(name, (name,)) for name in rows[-1] if name.endswith("rows")]
    return table(columns, rows)


SHARE_OF_PRODUCTS = Column("matrix products, % of our time", "matrix_share", 0, 100)
THROUGHPUT_COLUMNS = (
    Column("model", lambda row: model_name(row["key"])),
    Column("reference's script, examples/s", "examples_per_second.reference", ",.0f"),
    Column("padded, examples/s", "examples_per_second.conventional", ",.0f"),
    Column("ours, examples/s", "examples_per_second.ours", ",.0f"),
    Column("times the script's [lowest, highest round]", lambda row: ratio(row, "reference")),
    Column("times the padded", lambda row: ratio(row, "conventional")),
    SHARE_OF_PRODUCTS,
)


def ratio(row: dict, recipe: str) -> str | None:
    found = row["ratio"].get(recipe)
    return found and f"{found['median']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"


LORA_SPEED_COLUMNS = (
    Column("model", lambda row: model_name(row["key"])),
    Column("ours, s a step", lambda row: f"{np.median(row['seconds']['ours']):.2f}"),
    SHARE_OF_PRODUCTS,
    *(
        Column(
            f"{name}: times ours [lowest, highest round]",
            lambda row, name=name: lora_speed.speedup_text(row["seconds"], name),
        )
        for name in lora_speed.OTHERS
    ),
)


def rows_by_model(results: dict) -> list[dict]:
    return [{"key": key} | results[key] for key in THREE_MODELS if key in results]


def paper_hours() -> dict[str, dict]:
    """Results folder -> output of studies/hours.py."""
    places = ("results_7b", "results_agnews")
    return {place: read_json(ROOT / place / "throughput_on_paper.json") for place in places}


def hours_range(counts: dict, key: str, card: str) -> str:
    least = counts[key]["least_hours"][card]
    return " to ".join(f"{least * ratio:.1f}" for ratio in counts["assumed_ratio"])


def table_paper(counts_of: dict[str, dict]) -> str:
    """Estimated hours by card, the reference's hours, and the largest possible speed-up.

    counts_of: as paper_hours gives it.
    """

    def hours(card: str) -> Column:
        title = f"hours, {card}"
        return Column(title, lambda row: hours_range(row["counts"], row["key"], card))

    def speed_up(title: str, other: str) -> Column:
        return Column(title, lambda row: row["rates"]["ours"] / row["rates"][other], 1)

    rows = [
        {"counts": counts, "key": key, "rates": counts[key]["examples_per_second"]}
        | {"name": f"{REFERENCE[place]['data']}, {model_name(key)}"}
        | {"reference": REFERENCE[place]["minutes"][key] / 60}
        for place, counts in counts_of.items()
        for key in THREE_MODELS
    ]
    columns = [Column("data, model", "name"), *map(hours, rows[0]["counts"]["cards"])]
    columns += [Column("reference: hours", "reference", 1)]
    columns += [speed_up("times as fast as conventional, at most", "conventional")]
    columns += [speed_up("as transformers' Trainer, at most", "ecosystem")]
    return table(columns, rows)


def table_hours(counts_of: dict[str, dict]) -> str:
    """For README.md: estimated hours of a training, by card, model and data set."""

    def hours(place: str, key: str) -> Column:
        title = f"{REFERENCE[place]['data']}, Model {key[-1]}"
        return Column(title, lambda card: hours_range(counts_of[place], key, card))

    columns = [hours(place, key) for place in counts_of for key in THREE_MODELS]
    return table([Column("card", ""), *columns], next(iter(counts_of.values()))["cards"])


BY_OTHERS_COLUMNS = (
    Column("run", lambda row: f"{row['name']}, {row['model']} seed {row['seed']}"),
    Column("card", "hardware.device"),
    Column("data", "data"),
    Column("hours", "seconds", 1, 1 / 3600),
    Column("peak, GiB", "peak_memory_bytes", ".1f", 2**-30),
    Column("final accuracy, %", "final.accuracy", 2, 100),
)


def table_by_others(folder: Path) -> str:
    """7B runs by others, from folder/NAME/results.json; a row for each training."""
    rows = []
    for file in sorted(folder.glob("*/results.json")):
        results = read_json(file)
        about = {"name": file.parent.name, "data": results["settings"]["data"]["name"]}
        rows += [run | about for run in rows_of(results["models"], "model", "seed")]
    return table(BY_OTHERS_COLUMNS, rows) if rows else ""


REFERENCE_COLUMNS = (
    Column("reference: data, backbone", "place"),
    Column("model", "name"),
    Column("accuracy, first epoch", "first", "g"),
    Column("final", "final", "g"),
    Column("best", "best", "g"),
    Column("train cls loss", "training.0", "g"),
    Column("train LM loss", "training.1", "g"),
    Column("train accuracy", "training.2", "g"),
)
REFERENCE_RANK_COLUMNS = (
    Column("reference: data, backbone", "place"),
    Column("model", "name"),
    Column("effective rank", "ranks.0", 1),
    Column("stable rank", "ranks.1", 1),
    Column("participation ratio", "ranks.2", 1),
    Column("components for 95% of variance", "ranks.3"),
)


def table_reference_accuracy() -> str:
    kinds = ("first", "final", "best", "training")
    rows = (
        {kind: at(reference, (kind, key)) for kind in kinds}
        | {"place": f"{reference['data']}, {reference['model']}", "name": model_name(key)}
        for reference in REFERENCE.values()
        for key in THREE_MODELS
    )
    return table(REFERENCE_COLUMNS, rows)


def table_reference_ranks() -> str:
    rows = (
        {"place": f"{reference['data']}, {reference['model']}; {reference['rank_rows']:,} rows"}
        | {"name": "Pretrained" if key == "pretrained" else model_name(key), "ranks": ranks}
        for reference in REFERENCE.values()
        for key, ranks in reference.get("ranks", {}).items()
    )
    return table(REFERENCE_RANK_COLUMNS, rows)
