"""Tables of what the LM loss gains: of benefit.py and class_count.py, for both documents."""

import math

from collapse.arms import find_arm
from collapse.measures.statistics import format_bounds
from studies.report.result_tables import interval_cell, markdown, mean_cell, told_once

MODELS = ("model1", "model2")


def backbones(interval: dict | None) -> str:
    """Over how many backbones it is."""
    if not interval:
        return "n/a"
    return str(interval.get("n", interval.get("n_seeds")))


def table_differences(results: dict) -> str:
    """Accuracy of each arm less Model 1's, of controls less Model 2's too; points [95%]."""
    places = [*results["arms"], "mean"]
    rows = []
    for base, kind in zip(MODELS, ("accuracy_differences", "less_model2"), strict=True):
        for arm, found in results[kind].items():
            cells = [interval_cell(found.get(place), 2, 100) for place in places]
            title = f"{find_arm(arm).title} less Model {base[-1]}"
            rows.append([title, *cells, backbones(found["mean"])])
    header = ["accuracy, points [95%]", *results["arms"]]
    return markdown([*header, "mean of its sets", "backbones with all its sets"], rows)


def table_p1(results: dict) -> str:
    """P1 with the bootstrap of its seeds and rows, and whether it is within the margin."""
    found, within = results["P1"], results["P1_equivalence"]
    cells = ["n/a"] * 5
    if found:
        anew = found.get("pigeonhole")
        cells = [interval_cell(end, 2, 100) for end in (found, anew)]
        cells.append(format_bounds(within, 2, 100, "+") if within else "n/a")
        cells += [f"{100 * found['margin']:g}", f"{within['p']:.2g}" if within else "n/a"]
    header = ["accuracy, points", "mean of the sets [95%]", "seeds and rows drawn anew [95%]"]
    header += ["90%", "margin", "p of an effect outside it", "backbones"]
    return markdown(header, [["Model 2 - Model 1", *cells, backbones(found)]])


def table_ends(results: dict) -> str:
    """Each arm on each data set, at its best epoch on tuning rows; means over backbones."""
    columns = (
        ("accuracy, %", "best_accuracy", 1, 100, ""),
        ("loss, nats", "best_loss", 3, 1, ""),
        ("scaled by temperature", "best_scaled_loss", 3, 1, ""),
        ("best epoch", "best_epoch", 1, 1, ""),
        ("LM loss less before, nats", "language_kept", 2, 1, "+"),
        ("probe of another set less before, points", "transfer_kept", 1, 100, "+"),
    )
    rows = [
        [
            dataset,
            find_arm(arm).title,
            *(
                mean_cell(found[key], digits, scale, sign)
                for _, key, digits, scale, sign in columns
            ),
            str(found["n"]),
            str(found["diverged"]),
        ]
        for dataset, arms in results["arms"].items()
        for arm, found in arms.items()
    ]
    header = ["data", "arm", *(title for title, *_ in columns)]
    return markdown([*header, "backbones", "diverged"], rows)


def table_kept(results: dict) -> str:
    """What is left beside the task at one rate; how sure each model is at its own."""
    columns = (
        ("LM loss, nats", "language_kept", 2, 1),
        ("probe of another set, points", "transfer_kept", 1, 100),
        ("validation loss at own rates, scaled, nats", "best_scaled_loss", 3, 1),
    )
    rows = []
    for place, found in results["kept"].items():
        cells = [interval_cell(found[key], digits, scale) for _, key, digits, scale in columns]
        counts = [backbones(found[key]) for _, key, *_ in columns]
        rows.append([place, *cells, told_once(counts)])
    header = ["Model 2 - Model 1 [95%]", *(title for title, *_ in columns)]
    return markdown([*header, "backbones"], rows)


def table_times(results: dict) -> str:
    """Time of all steps over Model 1's of the same backbone and set."""
    rows = [
        [dataset, find_arm(arm).title, f"{found['mean']:.2f}", str(found["n"])]
        for dataset, arms in results["times"].items()
        for arm, found in sorted(arms.items(), key=lambda pair: find_arm(pair[0]).place)
    ]
    return markdown(["data", "arm", "time over Model 1's", "backbones"], rows)


def table_rank_at_equal_loss(results: dict) -> str:
    """P5 and its parts: log rank within classes where both models have the same training loss."""
    rows = []
    for place, found in [*results["rank_at_equal_loss"].items(), ("mean, P5", results["P5"])]:
        ratio = "n/a"
        if found and found["mean"] is not None:
            ratio = f"{math.exp(found['mean']):.2f}"
        rows.append([place, interval_cell(found), ratio, backbones(found)])
    header = ["data", "log rank, Model 2 - Model 1 [95%]", "as a factor", "backbones"]
    return markdown(header, rows)


def table_classes(results: dict) -> str:
    """Models 1 and 2 at every number of classes, labels merged in two ways."""
    columns = (
        ("accuracy, %", "best_accuracy", 1, 100),
        ("components", "dims_95pct", 1, 1),
        ("effective rank", "effective_rank", 1, 1),
        ("within classes", "effective_rank_within", 1, 1),
    )
    rows = []
    for row in results["table"]:
        cells = [interval_cell(row["accuracy_difference"], 2, 100)]
        cells.append(interval_cell(row["logit_gain"], 3))
        for _, key, digits, scale in columns:
            cells += [mean_cell(row[model].get(key), digits, scale) for model in MODELS]
        rows.append([row["merge"], str(row["classes"]), *cells, str(row["seeds"])])
    header = ["merge", "classes", "accuracy, Model 2 - Model 1, points [95%]", "in logits [95%]"]
    for title, *_ in columns:
        header += [f"{title}, Model {model[-1]}" for model in MODELS]
    return markdown([*header, "backbones"], rows)


def table_gains(results: dict, bag_of_words: dict[str, float]) -> str:
    """For FINDINGS.md: Model 2 less Model 1 on each data set; the means are P1 and P5.

    Beside them the accuracy of Model 1, and that of a bag of words on the same rows.
    """
    differences = results["accuracy_differences"].get("model2", {})
    rows = []
    for dataset, rank in results["rank_at_equal_loss"].items():
        gain = differences.get(dataset)
        cells = [interval_cell(gain, 2, 100), interval_cell(rank)]
        cells.append(mean_cell(results["arms"][dataset]["model1"]["best_accuracy"], 1, 100))
        cells.append(f"{100 * bag_of_words[dataset]:.1f}" if dataset in bag_of_words else "n/a")
        rows.append([dataset, *cells])
    header = ["data", "accuracy, points [95%]", "log rank at equal loss"]
    return markdown([*header, "Model 1, %", "bag of words, %"], rows)
