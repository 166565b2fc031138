"""Smaller sections of RESULTS.md.

The first token as an attention sink, resolution of the statistics, speed, and the reference's
numbers.
"""

from pathlib import Path

from collapse.report.markdown import Column, markdown, rows_of, table
from collapse.report.reference import REFERENCE
from collapse.utils.files import ROOT, read_json
from studies.report.experiments import THREE_MODELS, model_name, origin, short_commit
from studies.report.page import Page

SINK = "studies/results/sink/sink.json"
SIMULATION = "studies/results/statistics/simulation.json"

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


def add_sink(page: Page) -> None:
    results = read_json(ROOT / SINK)
    lengths, data = results["lengths"], results["data"]
    title = "The first token as an attention sink"
    page.section(title, "Can one token make a healthy model look collapsed?")
    page.text("Command: `python studies/sink.py --data-dir DIR`")
    page.text(
        f"*{results['model']} before fine-tuning, {data['name']}: {data['validation_rows']:,} "
        f"validation rows of {lengths['mean']:.1f} tokens. Source: `{SINK}`, measured "
        f"{origin([results])}.*"
    )
    page.table("sink", "By layer; layer 0 are the embeddings.", table_sink(results))
    page.figure(SINK.replace(".json", ".png"), "Rank, length and norms by layer")


FALSE_POSITIVE_COLUMNS = (
    Column("where the variance lies", "case"),
    Column("seeds, rows", "seeds"),
    Column("crossed interval, % wrong", "crossed", 1),
    Column("seeds alone", "seeds alone", 1),
    Column("rows alone", "rows alone", 1),
)


def table_half_widths(results: dict) -> str:
    """Half-widths of intervals with ten seeds, from variances in our runs."""
    cases = results["half_widths_in_points"]
    kinds = ("as seen", "cautious")
    by_kind = {case: {kind: numbers[kind] for kind in kinds} for case, numbers in cases.items()}
    rows = rows_of(by_kind, "case", "kind")
    columns = [Column("half-width of 95%, points", "case"), Column("variance of seeds", "kind")]
    columns += [Column(name, (name,)) for name in rows[-1] if name.endswith("rows")]
    return table(columns, rows)


def table_false_positives(results: dict) -> str:
    rows = rows_of(results["false_positives"], "case", "seeds")
    return table(
        FALSE_POSITIVE_COLUMNS, (row for row in rows if row["seeds"].endswith(" 872 rows"))
    )


def add_statistics(page: Page) -> None:
    simulation = read_json(ROOT / SIMULATION)
    title = "What the statistics resolve"
    page.section(title, "How small a difference could be seen, and how often is one seen in error?")
    page.text(f"Command: `python studies/statistics_simulation.py`. Source: `{SIMULATION}`.")
    caption = "Half-widths that ten seeds would have, by the variances of our runs."
    page.table("half widths", caption, table_half_widths(simulation))
    caption = "How often an interval excludes zero where there is no difference, %."
    page.table("false positives", caption, table_false_positives(simulation))


def table_throughput(results: dict) -> str:
    rows = []
    for key in [key for key in THREE_MODELS if key in results]:
        speeds = results[key]
        rates, ratio = speeds["examples_per_second"], speeds["ratio"]["conventional"]
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
    """Estimated hours by card, the reference's hours, and the largest possible speed-up.

    counts_of: results folder -> output of studies/hours.py.
    """
    rows, sources, cards = [], [], []
    for place, counts in counts_of.items():
        reference, cards = REFERENCE[place], list(counts["cards"])
        for key in THREE_MODELS:
            rates = counts[key]["examples_per_second"]
            cells = [hours_range(counts, key, card) for card in cards]
            cells += [f"{reference['minutes'][key] / 60:.1f}"]
            cells += [f"{rates['ours'] / rates[other]:.1f}" for other in rates if other != "ours"]
            rows.append([f"{reference['data']}, {model_name(key)}", *cells])
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
    """For README.md: estimated hours of a training, by card, model and data set."""
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
    """7B runs by others, from folder/NAME/results.json; a row for each training."""
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
        return ""
    header = ["run", "card", "data", "hours", "peak, GiB", "final accuracy, %"]
    return markdown(header, rows)


def hours_range(counts: dict, key: str, card: str) -> str:
    least = counts[key]["least_hours"][card]
    return " to ".join(f"{least * ratio:.1f}" for ratio in counts["assumed_ratio"])


def paper_hours() -> dict[str, dict]:
    places = ("results_7b", "results_agnews")
    return {place: read_json(ROOT / place / "throughput_on_paper.json") for place in places}


def add_speed(page: Page) -> None:
    page.section("Speed", "How fast does training run, and how long would 7B take?")
    page.text("Commands: `python studies/throughput.py`, `python studies/hours.py`")
    measured = read_json(ROOT / "results/throughput.json")
    caption = "Experiment 1, measured against padding to the maximum length."
    page.table("throughput", caption, table_throughput(measured))
    caption = "The 7B experiments: hours of a training, by card."
    page.table("paper", caption, table_paper(paper_hours()))
    if runs := table_by_others(ROOT / "results_7b/by-others"):
        caption = "7B runs on other people's cards (`results_7b/by-others/`), not checked by us."
        page.table("by others", caption, runs)
    else:
        page.text("Nobody has sent a 7B run on a card of their own yet (`results_7b/by-others/`).")


def table_reference_accuracy() -> str:
    rows = []
    for reference in REFERENCE.values():
        for key in THREE_MODELS:
            numbers = [reference.get(epoch, {}).get(key) for epoch in ("first", "final", "best")]
            numbers += reference.get("training", {}).get(key, (None, None, None))
            cells = ["n/a" if number is None else f"{number:g}" for number in numbers]
            rows.append([f"{reference['data']}, {reference['model']}", model_name(key), *cells])
    header = ["reference: data, backbone", "model", "accuracy, first epoch", "final", "best"]
    return markdown([*header, "train cls loss", "train LM loss", "train accuracy"], rows)


def table_reference_ranks() -> str:
    rows = []
    for reference in REFERENCE.values():
        for key, ranks in reference.get("ranks", {}).items():
            place = f"{reference['data']}, {reference['model']}; {reference['rank_rows']:,} rows"
            name = "Pretrained" if key == "pretrained" else model_name(key)
            rows.append([place, name, *map(str, ranks)])
    header = ["reference: data, backbone", "model", "effective rank", "stable rank"]
    return markdown([*header, "participation ratio", "components for 95% of variance"], rows)


def add_reference(page: Page) -> None:
    page.section("The reference's numbers", "What did the published study report?")
    page.text("One seed each; ranks of its two data sets at other N.")
    page.table("reference accuracy", "Accuracy, %.", table_reference_accuracy())
    page.table("reference ranks", "Ranks.", table_reference_ranks())
