"""The folder of a run: published files at its top, the state of trainings below state/."""

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
    """A folder of results: published files at its top, the state of the run under state/.

    Attributes: `published` is the results.json that stood here before this run's state began, or
    None.
    """

    def __init__(self, path: Path, settings: dict, fresh: bool):
        """settings define the study (configuration and data); a folder holds one such study.

        Raises UserError when the folder holds another study's results and fresh is not set, or
        when fresh is set while another command trains here.
        """
        self.path, self.state, self.results_file = path, path / "state", path / "results.json"
        self.published, self.settings = None, through_json(settings)
        with locked(path):
            if fresh and any(is_held(lock.parent) for lock in self.state.glob("*-seed*/.lock")):
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

    def check(self) -> None:
        """Raise UserError when another command has begun another study here since, with --fresh."""
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
        # What this run will be compared with: the results.json that stood here before our state, or
        # that --fresh replaces.
        published = published_file if published_file.exists() else self.results_file
        if published == published_file or fresh or not settings_file.exists():
            # With --fresh it may be any file.
            with contextlib.suppress(FileNotFoundError, UserError):
                before = read_json(published)
                self.published = None if settings_difference(before, settings) else before
        if fresh and self.state.exists():
            discarded = self.path / "state-discarded"
            shutil.rmtree(discarded, ignore_errors=True)
            # At once: a kill in rmtree must not leave half of another run.
            self.state.rename(discarded)
            shutil.rmtree(discarded)
        self.state.mkdir(parents=True, exist_ok=True)
        if self.published:
            write_json(published_file, self.published)
        if fresh:  # what is published stays published until it is trained again: nothing stays now
            self.results_file.unlink(missing_ok=True)
            self.rows_file.unlink(missing_ok=True)
        write_json(settings_file, settings)

    def training(self, model: str, seed: int) -> Path:
        """Folder of one training: training.safetensors while it runs, weights and metrics.json."""
        return self.state / f"{model}-seed{seed}"

    def finished(self) -> dict[str, dict[str, dict]]:
        """Metrics of every training that finished here: model -> seed -> metrics."""
        done: dict[str, dict[str, dict]] = {}
        for model, seed in finished_trainings(self.path):
            metrics = read_json(self.training(model, seed) / "metrics.json")
            done.setdefault(model, {})[str(seed)] = metrics
        return done

    def trained_elsewhere(self) -> dict[str, dict[str, dict]]:
        """Metrics of the published trainings whose state is not here, as `finished` gives them.

        In a fresh clone that is every one of them, until it is trained again.
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
