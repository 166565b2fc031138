"""A run's folder: published files at its top, checkpoints and metrics of trainings in state/."""

import contextlib
import shutil
from pathlib import Path

from collapse.utils.errors import UserError
from collapse.utils.files import (
    finished_trainings,
    is_held,
    locked,
    read_json,
    settings_difference,
    through_json,
    write_json,
)


class RunFolder:
    """A results folder: published files at its top, the state of its trainings in state/.

    Attributes: `published`: the results.json that was here before this run began, or None.
    """

    def __init__(self, path: Path, settings: dict, fresh: bool):
        """settings: configuration and data, which define the study; a folder holds one study.

        Raises UserError when the folder holds another study's results and fresh is not set, or
        when fresh is set while another command trains here.
        """
        self.path, self.state, self.results_file = path, path / "state", path / "results.json"
        self.published, self.settings = None, through_json(settings)
        with locked(path):
            locks = [*self.state.glob("*-seed*/.lock"), *self.state.glob(".command-*/.lock")]
            if fresh and any(is_held(lock.parent) for lock in locks):
                raise UserError(
                    f"another command trains in {path}, and --fresh would delete its work: "
                    "stop it, wait for its end, or choose another --output-dir."
                )
            self._open(self.settings, fresh)

    @property
    def settings_file(self) -> Path:
        return self.state / "settings.json"

    @property
    def rows_file(self) -> Path:
        return self.path / "rows.safetensors"

    @property
    def figures(self) -> dict[str, Path]:
        names = ("learning_curves", "rank_over_steps", "engram_clusters")
        return {name: self.path / f"{name}.png" for name in names}

    def check(self) -> None:
        """Raise UserError when another command has since begun another study here by --fresh."""
        stored = read_json(self.settings_file) if self.settings_file.exists() else self.settings
        if difference := settings_difference(stored, self.settings):
            raise UserError(
                f"another command has begun another configuration in {self.path} with --fresh "
                f"({difference}): choose another folder with --output-dir."
            )

    def _open(self, settings: dict, fresh: bool) -> None:
        settings_file, published_file = self.settings_file, self.state / "published.json"
        for file in () if fresh else (settings_file, self.results_file):
            if not file.exists():
                continue
            if difference := settings_difference(read_json(file), settings):
                raise UserError(
                    f"{self.path} holds results of another configuration ({difference}): "
                    "choose another folder with --output-dir, or replace them with --fresh."
                )
        # This run will be compared with the results.json that was here before its state began, or
        # that --fresh replaces.
        published = published_file if published_file.exists() else self.results_file
        if published == published_file or fresh or not settings_file.exists():
            # --fresh replaces any file, also a damaged one.
            with contextlib.suppress(FileNotFoundError, UserError):
                before = read_json(published)
                self.published = None if settings_difference(before, settings) else before
        if fresh and self.state.exists():
            discarded = self.path / "state-discarded"
            shutil.rmtree(discarded, ignore_errors=True)
            # Renamed first, because a kill during rmtree must not leave half of a run.
            self.state.rename(discarded)
            shutil.rmtree(discarded)
        self.state.mkdir(parents=True, exist_ok=True)
        if self.published:
            write_json(published_file, self.published)
        if fresh:  # otherwise published trainings stay published until they are trained again
            for file in (self.results_file, self.rows_file, *self.figures.values()):
                file.unlink(missing_ok=True)
        write_json(settings_file, settings)

    def training(self, model: str, seed: int) -> Path:
        """Folder of one training: training.safetensors while it runs, weights and metrics.json."""
        return self.state / f"{model}-seed{seed}"

    def finished(self) -> dict[str, dict[str, dict]]:
        """Metrics of every finished training of this folder: model -> seed -> metrics."""
        done: dict[str, dict[str, dict]] = {}
        for model, seed in finished_trainings(self.path):
            metrics = read_json(self.training(model, seed) / "metrics.json")
            done.setdefault(model, {})[str(seed)] = metrics
        return done

    def trained_elsewhere(self) -> dict[str, dict[str, dict]]:
        """Metrics of published trainings without a state in this folder, as `finished` gives them.

        In a fresh clone these are all of them, until they are trained again.
        """
        published = read_json(self.results_file)["models"] if self.results_file.exists() else {}
        finished = {(model, str(seed)) for model, seed in finished_trainings(self.path)}
        return {
            model: unfinished
            for model, runs in published.items()
            if (
                unfinished := {
                    seed: run for seed, run in runs.items() if (model, seed) not in finished
                }
            )
        }
