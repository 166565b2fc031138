"""What RESULTS.md tells beside the experiments and the studies on own models: the first token as
an attention sink, what the statistics resolve, speed, and the reference's numbers.
"""

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
    """Of each layer of a pretrained model; layer 0 are the embeddings."""
    rows = (numbers | {"layer": layer} for layer, numbers in enumerate(results["layers"]))
    return table(SINK_COLUMNS, rows)


def add_sink(page: Page) -> None:
    results = read_json(ROOT / SINK)
    lengths, data = results["lengths"], results["data"]
    page.text("## The first token as an attention sink")
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
    """What ten seeds resolve, from variances seen in our runs."""
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
    page.text("## What the statistics resolve")
    page.text(f"Command: `python studies/statistics_simulation.py`. Source: `{SIMULATION}`.")
    caption = "Half-widths that ten seeds would have, by the variances of our runs."
    page.table("half widths", caption, table_half_widths(simulation))
    caption = "How often an interval excludes zero where there is no difference, %."
    page.table("false positives", caption, table_false_positives(simulation))


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
    """Counts for data sets (folder -> counts) beside the reference's published times, which are of
    its own number of training rows.
    """
    rows, sources = [], []
    for place, counts in counts_of.items():
        theirs = REFERENCE[place]
        for key in THREE_MODELS:
            rates, step = counts[key]["examples_per_second"], counts[key]["step"]["ours"]
            ratios = [
                f"{rates['ours'] / rates[other]:.1f}" for other in ("conventional", "ecosystem")
            ]
            seen, hours = counts["settings"]["epochs"] * theirs["train_rows"], []
            for recipe in ("ours", "conventional"):
                means = counts[key]["step"][recipe]
                evaluations = means["evaluation_passes"] * means["evaluation_seconds"]
                hours.append(f"{(seen / rates[recipe] + evaluations) / 3600:.1f}")
            cells = [f"{step['limit_share']:.0%}", f"{step['unpacked']:.0%}", *hours]
            name = f"{theirs['data']}, {model_name(key)}"
            rows.append([name, *ratios, *cells, f"{theirs['minutes'][key] / 60:.1f}"])
        sources.append(f"{counts['tokens_per_row']:.1f} tokens a row of {counts['data']['name']}")
    header = ["data, model", "examples/s over conventional", "over ecosystem's"]
    header += ["share of the limit", "layers kept unpacked", "hours, ours", "hours, conventional"]
    card = f"{counts['rates']['name']}, {counts['settings']['memory_gib']:.0f} GiB"
    note = (
        f"*On paper, not measured: {'; '.join(sources)}; {card}; evaluations included; hours are "
        f"for the reference's rows. Made by commit {short_commit(counts['git_commit'])}.*"
    )
    return f"{markdown([*header, 'reference: hours'], rows)}\n\n{note}"


def add_speed(page: Page) -> None:
    page.text("## Speed\n\nCommand: `python studies/throughput.py --help`")
    measured = read_json(ROOT / "results/throughput.json")
    caption = "Experiment 1, measured against padding to the maximum length."
    page.table("throughput", caption, table_throughput(measured))
    paper = {
        place: read_json(ROOT / place / "throughput_on_paper.json")
        for place in ("results_7b", "results_agnews")
    }
    caption = "The 7B experiments, counted: bytes over bandwidth plus operations over their rate."
    page.table("paper", caption, table_paper(paper))
    page.figure("results_7b/throughput_on_paper.png", "Counted throughput, SST-2")


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


def add_reference(page: Page) -> None:
    page.text("## The reference's numbers\n\nOne seed each; ranks of its two data sets at other N.")
    page.table("reference accuracy", "Accuracy, %.", table_reference_accuracy())
    page.table("reference ranks", "Ranks.", table_reference_ranks())
