"""Tables of the studies' own results, for RESULTS.md and FINDINGS.md."""

from collections.abc import Sequence

from result_tables import markdown

from collapse.arms import find_arm
from collapse.statistics import format_interval

KINDS = ("healthy", "not learning", "collapsed, functional", "collapsed, dead", "diverged")


SHIFTS = {
    "healthy": "shift of the edge",
    "not collapsed": "of collapse alone",
    "learning": "of learning",
    "not dead": "of dead runs",
}


def table_threshold(results: dict, kinds: Sequence[str] = tuple(SHIFTS)) -> str:
    """Where runs of each arm stop being healthy, against Model 1."""
    datasets = list(results["arms"][0]["edge"])
    header = ["arm", *(f"edge, {name}" for name in datasets)]
    header += [*(SHIFTS[kind] for kind in kinds), "backbones"]
    rows = []
    for row in results["arms"]:
        edges = [
            f"{'≥ ' if row['at_the_top'][data] else ''}{10 ** e['mean']:.1e}" if e else "n/a"
            for data, e in row["edge"].items()
        ]
        shifts = [row["shift"].get(kind, {}).get("mean", {}) for kind in kinds]
        cells = [format_interval(s, 2, sign="+") if s.get("n") else "0" for s in shifts]
        count = max([e["n"] for e in row["edge"].values() if e], default=0)
        rows.append([find_arm(row["arm"]).title, *edges, *cells, str(count)])
    return markdown(header, rows)


def table_ends(results: dict, dataset: str) -> str:
    """What runs of each arm and rate end as, and means over backbones."""
    columns = (
        ("components", "dims_95pct", 1, 1),
        ("effective rank", "effective_rank", 1, 1),
        ("within classes", "effective_rank_within", 1, 1),
        ("without first token", "effective_rank_without_first", 1, 1),
        ("stable rank", "stable_rank", 1, 2),
        ("top-10 variance", "top10_variance", 1, 4),
        ("training accuracy, %", "accuracy", 100, 1),
        ("validation accuracy, %", "validation_accuracy", 100, 1),
        ("LM loss less before, nats", "language_kept", 1, 2),
    )
    header = ["arm", "rate", *KINDS, *(title for title, *_ in columns)]
    rows = []
    for row in results["arms"]:
        for rate, kinds in row["outcomes"][dataset].items():
            ends = row["ends"][dataset].get(rate)
            cells = [
                f"{ends[key] * scale:.{d}f}" if ends else "n/a" for _, key, scale, d in columns
            ]
            title = find_arm(row["arm"]).title
            rows.append(
                [title, f"{10 ** float(rate):.1e}", *(str(kinds[k]) for k in KINDS), *cells]
            )
    return markdown(header, rows)


def table_rates(results: dict) -> str:
    """Components and validation accuracy (%) of Models 1 and 2 at every second rate."""
    models = {row["arm"]: row["ends"] for row in results["arms"]}
    pairs = [(key, data) for data in models["model1"] for key in ("model1", "model2")]
    header = ["learning rate"]
    for key, data in pairs:
        where = f"{data.removesuffix(' by sentence')}, Model {key[-1]}"
        header += [f"{where}: components", "accuracy"]
    rows = []
    for rate in list(models["model1"][pairs[0][1]])[1::2]:
        row = [f"{10 ** float(rate):.1e}"]
        for key, data in pairs:
            ends = models[key][data][rate]
            row += [f"{ends['dims_95pct']:.1f}", f"{100 * ends['validation_accuracy']:.1f}"]
        rows.append(row)
    return markdown(header, rows)


def table_finetuned(results: dict) -> str:
    """What pretraining is worth: accuracy from the backbones' weights and from random ones."""
    rows = [
        [
            dataset,
            *(f"{found['accuracy'][start] * 100:.1f}" for start in ("pretrained", "random")),
            format_interval(found["pretrained - random"], 1, 100, "+"),
            str(found["pretrained - random"]["n"]),
        ]
        for dataset, found in results.items()
    ]
    header = ["data", "pretrained, %", "random, %", "difference, points [95 %]", "backbones"]
    return markdown(header, rows)


def table_linguistic(results: dict, titles: dict[str, str]) -> str:
    """Rank correlation of each measure with validation loss: at one size, over sizes, theirs."""
    paper = results["paper"] or {"fixed_scale": {}, "grid": {}}
    rows = []
    for name, title in titles.items():
        at_one_size, over_sizes = results["fixed_scale"][name], results["grid"][name]
        p = at_one_size.get("p_holm")
        rows.append(
            [
                title,
                correlation(at_one_size),
                "n/a" if p is None else f"{p:.2g}",
                correlation(paper["fixed_scale"].get(name)),
                correlation(over_sizes["spearman"]),
                correlation(over_sizes.get("without_size")),
                correlation(paper["grid"].get(name)),
            ]
        )
    header = ["measure", "one size", "p, Holm", "theirs", "over sizes", "size taken out", "theirs"]
    return markdown(header, rows)


def correlation(found: dict | None) -> str:
    """r [95 %]; n/a where it is not known."""
    if not found or found["r"] is None:
        return "n/a"
    return format_interval(found | {"mean": found["r"]}, 2, sign="+")


def table_language_models(rows: list[dict[str, float]]) -> str:
    """Every language model: its size, its loss beside a bigram's, its measures."""
    columns = (
        ("width", "width", 0),
        ("layers", "layers", 0),
        ("epochs", "epochs", 0),
        ("weight decay", "weight_decay", 4),
        ("seed", "seed", 0),
        ("validation loss, nats", "validation_loss", 3),
        ("ahead of the bigram", "ahead_of_bigram", 3),
        ("CDNV", "cdnv", 2),
        ("log-kernel variance", "log_kernel_var", 4),
        ("variation of cosines", "cosine_cv", 2),
        ("agreement", "agreement", 4),
    )
    cells = [[f"{row[key]:.{digits}f}" for _, key, digits in columns] for row in rows]
    return markdown([title for title, *_ in columns], cells)
