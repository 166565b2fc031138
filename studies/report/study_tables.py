"""Tables of the studies' own results, for RESULTS.md and FINDINGS.md."""

from collections.abc import Sequence

from collapse.arms import find_arm
from collapse.measures.statistics import format_interval
from studies.report.result_tables import interval_cell, markdown, mean_cell, told_once

KINDS = ("healthy", "not learning", "collapsed, functional", "collapsed, dead", "diverged")


SHIFTS = {
    "healthy": "shift of the edge",
    "not collapsed": "of collapse alone",
    "learning": "of learning",
    "not dead": "of dead runs",
}


def table_threshold(
    results: dict, kinds: Sequence[str] = tuple(SHIFTS), unit: str | None = "backbones"
) -> str:
    """Where runs of each arm stop being healthy, against Model 1; unit: what repeats.

    Its number is that on each data set, told once where they agree; without a unit it is left out.
    """
    datasets = list(results["arms"][0]["edge"])
    header = ["arm", *(f"edge, {name}" for name in datasets)]
    header += [*(SHIFTS[kind] for kind in kinds), *([unit] if unit else [])]
    rows = []
    for row in results["arms"]:
        edges = [edge_cell(row, data) for data in datasets]
        cells = ["0"] * len(kinds)
        if row["arm"] != "model1":
            cells = [interval_cell(row["shift"][kind]["mean"]) for kind in kinds]
        counts = [str(e["n"] if e else 0) for e in row["edge"].values()]
        cells += [told_once(counts)] if unit else []
        rows.append([find_arm(row["arm"]).title, *edges, *cells])
    return markdown(header, rows)


def edge_cell(row: dict, dataset: str) -> str:
    """Mean edge of an arm as a rate; a bound where some are healthy at every rate, or at none."""
    if not row["edge"][dataset]:
        return "n/a"
    bound = "≥ " * bool(row["at_the_top"][dataset]) + "≤ " * bool(row["at_the_bottom"][dataset])
    return f"{bound}{10 ** row['edge'][dataset]['mean']:.1e}"


def table_shifts(results: dict, kinds: Sequence[str] = tuple(SHIFTS)) -> str:
    """Shifts of table_threshold on each data set by itself, where each may have other seeds."""
    rows = []
    for row in [row for row in results["arms"] if row["arm"] != "model1"]:
        for dataset in row["edge"]:
            shifts = [row["shift"][kind][dataset] for kind in kinds]
            cells = [*map(interval_cell, shifts), str(shifts[0]["n"])]
            rows.append([find_arm(row["arm"]).title, dataset, *cells])
    return markdown(["arm", "data", *(SHIFTS[kind] for kind in kinds), "pairs"], rows)


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
    header = ["data", "pretrained, %", "random, %", "difference, points [95%]", "backbones"]
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
    header = ["measure", "one size", "p, Holm", "theirs, one size", "over sizes"]
    return markdown([*header, "size taken out", "theirs, over sizes"], rows)


def table_decay(results: dict, titles: dict[str, str]) -> str:
    """What less weight decay does to each measure, and to validation loss."""
    rows = []
    for name, title in {"validation_loss": "validation loss, nats", **titles}.items():
        found = results["less_weight_decay"][name]
        rows.append([title, interval_cell(found, 4), str(found["n"])])
    return markdown(["measure", "difference [95%]", "pairs"], rows)


def correlation(found: dict | None) -> str:
    """r [95%]; n/a where it is not known."""
    return interval_cell(found and found | {"mean": found["r"]})


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


def table_trainings(results: dict, labels: Sequence[str]) -> str:
    """Engrams by trained label and arm: agreement with each of the labels, beside controls."""
    rows = []
    for row in results["trainings"]:
        title = "before training" if row["arm"] == "start" else find_arm(row["arm"]).title
        cells = [mean_cell(row.get("accuracy"), 1, 100)]
        for kind in ("ari", "ari_untrained"):
            cells += [interval_cell(row.get(f"{kind}_{label}"), 3) for label in labels]
        cells.append(interval_cell(row.get("less_random"), 3))
        cells += [mean_cell(row.get(f"probe_{label}"), 1, 100) for label in labels]
        counts = [row.get("learned", "n/a"), row["backbones"], row["diverged"]]
        cells += [mean_cell(row.get("lm_loss"), 3), *map(str, counts)]
        rows.append([row["trained"], title, *cells])
    header = ["trained label", "arm", "accuracy, %", *(f"ARI, {label}" for label in labels)]
    header += [f"untrained compressor's, {label}" for label in labels]
    header.append("trained less other, less an untrained compressor's")
    header += [f"probe, {label}, %" for label in labels]
    header += ["LM loss, nats", "learned", "backbones", "diverged"]
    return markdown(header, rows)


def table_indices(results: dict, labels: Sequence[str]) -> str:
    """Of table_trainings what FINDINGS.md tells: a column an arm, means with either label."""
    rows = [row for row in results["trainings"] if row["arm"] != "start"]
    trainings = {(row["arm"], row["trained"]): row for row in rows}
    columns = []
    for arm in dict.fromkeys(arm for arm, _ in trainings):
        columns.append((find_arm(arm).title, arm, "ari"))
        if arm == "model3":
            columns.append(("untrained, same states", arm, "ari_untrained"))

    def cell(arm: str, kind: str, trained: str) -> str:
        if (arm, trained) not in trainings:
            return ""
        row = trainings[arm, trained]
        means = (mean_cell(row.get(f"{kind}_{label}"), 3) for label in labels)
        return f"{', '.join(means)} ({row['backbones']})"

    lines = []
    for trained in dict.fromkeys(trained for _, trained in trainings):
        lines.append([trained, *(cell(arm, kind, trained) for _, arm, kind in columns)])
    return markdown(["trained", *(title for title, *_ in columns)], lines)


def table_salience(results: dict) -> str:
    """Index with the trained label less that with the other, of each arm."""
    rows = []
    for row in results["arms"]:
        kinds = ("learned", "less_random_compressor", "all_backbones")
        cells = [interval_cell(row[kind], 3) for kind in kinds]
        counts = f"{row['learned']['n']} of {row['ran']}"
        rows.append([find_arm(row["arm"]).title, *cells, counts])
    header = ["arm", "ARI, trained label - other label", "less an untrained compressor's"]
    return markdown([*header, "of all backbones", "learned both labels"], rows)


def table_pieces(results: dict) -> str:
    """What second pieces of posts lose when they are read the second way instead of the first."""
    rows = []
    for title, found in results.items():
        cells = [interval_cell(found["lm_loss"], 4), interval_cell(found["accuracy"], 2, 100)]
        rows.append([title, *cells, str(found["lm_loss"]["n"])])
    return markdown(["reading with", "LM loss, nats", "accuracy, points", "backbones"], rows)
