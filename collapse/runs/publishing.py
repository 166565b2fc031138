"""Publishes the finished trainings of a run: results.json, a tidy CSV, plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collapse.arms import find_arm
from collapse.measures import predictions
from collapse.report import comparisons
from collapse.runs.folder import RunFolder
from collapse.utils.files import locked, read_tensors, through_json, write_file, write_json


def publish(
    folder: RunFolder,
    head: dict[str, Any],
    title: str,
    class_names: Sequence[str],
    other: Path | None,
    with_plots: bool,
) -> dict[str, Any]:
    """Write all published files of the folder; returns the content of results.json.

    It has the trainings that finished here, and published ones that were trained elsewhere.
    head: entries beside the trainings: experiment, settings, versions, hardware. other: results
    folder on the other data set. with_plots: draw them, too, which takes seconds. Commands that
    share the folder take turns. Raises UserError when the folder has become another study's.
    """
    with locked(folder.path):
        folder.check()
        trained_here, trained_elsewhere = folder.finished(), folder.trained_elsewhere()
        names = sorted(
            trained_here.keys() | trained_elsewhere, key=lambda name: find_arm(name).sort_key
        )
        models = {
            name: by_seed(trained_elsewhere.get(name, {}) | trained_here.get(name, {}))
            for name in names
        }
        results = {**through_json(head), "models": models}
        kept = {(name, seed) for name, runs in trained_elsewhere.items() for seed in runs}
        predictions.publish_rows(folder.path, kept)
        results["comparisons"] = comparisons.compare_all(models, predictions.read_rows(folder.path))
        if other_results := comparisons.find_other(other, results):
            results["cross_dataset"] = comparisons.compare_datasets(results, other_results)
        write_json(folder.results_file, results)
        write_file(folder.path / "results.csv", comparisons.tidy_table(results).encode())
        if with_plots:
            draw(folder, title, class_names, models, trained_here)
    return results


def by_seed(runs: dict[str, dict]) -> dict[str, dict]:
    return {seed: runs[seed] for seed in sorted(runs, key=int)}


def draw(
    folder: RunFolder,
    title: str,
    class_names: Sequence[str],
    models: dict[str, dict],
    trained_here: dict[str, dict],
) -> None:
    from collapse.report import plots  # here, because workers need no matplotlib, which is slow

    plots.plot_learning_curves(folder.path / "learning_curves.png", title, models)
    plots.plot_measured(folder.path / "rank_over_steps.png", title, models)
    path = folder.path / "engram_clusters.png"
    if "model3" not in models:
        path.unlink(missing_ok=True)
    elif runs := trained_here.get("model3"):  # else without its engrams: their figure stays
        seed = next(iter(runs))  # the first
        stored, _ = read_tensors(folder.training("model3", int(seed)) / "engrams.safetensors")
        arrays = [stored[name].numpy() for name in ("engrams", "untrained", "labels")]
        plots.plot_engram_clusters(path, f"{title}; seed {seed}", *arrays, class_names, int(seed))
