"""Publishes the finished trainings of a run: results.json, a tidy CSV, figures."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collapse.arms import find_arm
from collapse.measures import predictions
from collapse.report import comparisons
from collapse.runs.folder import RunFolder
from collapse.utils.files import locked, read_tensors, through_json, write_file, write_json

FIGURE_SECONDS = 60.0  # drawing takes seconds: while a command runs, figures may be so old


def publish(
    folder: RunFolder,
    head: dict[str, Any],
    title: str,
    class_names: Sequence[str],
    other: Path | None,
    at_end: bool,
) -> dict[str, Any]:
    """Write the published files of the folder; returns the content of results.json.

    It has the trainings that finished here, and published ones that were trained elsewhere.
    head: entries beside the trainings: experiment, settings, versions, hardware. other: results
    folder on the other data set. at_end: of a command; before that, figures are drawn only where
    those in the folder are old. Commands that share the folder take turns. Raises UserError when
    the folder has become another study's.
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
        if at_end or figures_are_old(folder):
            draw_figures(folder, title, class_names, models, trained_here)
    return results


def by_seed(runs: dict[str, dict]) -> dict[str, dict]:
    return {seed: runs[seed] for seed in sorted(runs, key=int)}


def figures_are_old(folder: RunFolder) -> bool:
    """Whether the last were drawn, and the last command began, more than a minute ago."""
    files = folder.settings_file, folder.figures["learning_curves"]
    newest = max(file.stat().st_mtime for file in files if file.exists())
    return time.time() - newest > FIGURE_SECONDS


def draw_figures(
    folder: RunFolder,
    title: str,
    class_names: Sequence[str],
    models: dict[str, dict],
    trained_here: dict[str, dict],
) -> None:
    """Engrams are those of the first seed; without model 3 an older figure of them goes."""
    from collapse.report import plots  # here: a worker that draws nothing needs no matplotlib

    plots.plot_learning_curves(folder.figures["learning_curves"], title, models)
    plots.plot_measured(folder.figures["rank_over_steps"], title, models)
    path = folder.figures["engram_clusters"]
    if "model3" not in models:
        path.unlink(missing_ok=True)
    elif runs := trained_here.get("model3"):  # else without its engrams: their figure stays
        seed = next(iter(runs))
        stored, _ = read_tensors(folder.training("model3", int(seed)) / "engrams.safetensors")
        arrays = [stored[name].numpy() for name in ("engrams", "untrained", "labels")]
        plots.plot_engram_clusters(path, f"{title}; seed {seed}", *arrays, class_names, int(seed))
