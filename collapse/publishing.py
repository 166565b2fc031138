"""What a run publishes of its finished trainings: results.json, a tidy CSV, plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collapse import plots, reports, rows
from collapse.arms import find_arm
from collapse.files import locked, read_tensors, through_json, write_file, write_json
from collapse.folder import RunFolder


def publish(
    folder: RunFolder,
    head: dict[str, Any],
    title: str,
    class_names: Sequence[str],
    other: Path | None,
) -> dict[str, Any]:
    """Write all that the folder shows; returns what results.json holds.

    head is what it tells beside the trainings: experiment, settings, versions, hardware. other is
    the results folder on the other data set. Commands that share the folder take turns. Raises
    UserError when the folder has become another study's.
    """
    with locked(folder.path):
        folder.check()
        models = folder.finished()
        models = {name: models[name] for name in sorted(models, key=lambda n: find_arm(n).place)}
        results = {**through_json(head), "models": models}
        rows.publish_rows(folder.path)
        results["comparisons"] = reports.compare_all(models, rows.read_rows(folder.path))
        if found := reports.find_other(other, results):
            results["cross_dataset"] = reports.compare_datasets(results, found)
        write_json(folder.results_file, results)
        write_file(folder.path / "results.csv", reports.tidy_table(results).encode())
        curves = folder.path / "learning_curves.png"
        plots.plot_learning_curves(curves, title, models)
        plot_engrams(folder, title, class_names, models.get("model3", {}))
    return results


def plot_engrams(
    folder: RunFolder, title: str, class_names: Sequence[str], runs: dict[str, dict]
) -> None:
    """t-SNE of the first seed's engrams; without any, the plot of an older run does not stay."""
    path = folder.path / "engram_clusters.png"
    if not runs:
        path.unlink(missing_ok=True)
        return
    seed = next(iter(runs))
    stored, _ = read_tensors(folder.training("model3", int(seed)) / "engrams.safetensors")
    arrays = [stored[name].numpy() for name in ("engrams", "untrained", "labels")]
    plots.plot_engram_clusters(path, f"{title}; seed {seed}", *arrays, class_names, int(seed))
