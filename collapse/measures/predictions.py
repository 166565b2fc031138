"""What a training finds of each validation row: right or wrong, log probability of the true class.

From these, losses have intervals as accuracies have. They are kept for the best and the
last epoch, evaluated with the zero engram, and published together as rows.safetensors.

A training's log probabilities are kept twice, the second time after temperature scaling (Guo et al.
2017), since a model that has overtrained is above all too sure. A temperature must not come from
the rows it is used on. A study that holds tuning rows out fits it on them (`fit_temperature`); the
experiments train on all training rows, on which a model is sure and right, and hold none out. So
theirs is cross-fitted: the validation rows are cut in two fixed halves, and each half is scaled by
the temperature that fits the other one best.
"""

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from collapse.measures.statistics import crossed_interval
from collapse.utils.files import finished_trainings, read_tensors, write_tensors

EPOCHS = ("best", "final")
HOTTEST = 20.0  # temperatures lie between its inverse and it


@dataclass(frozen=True)
class RowResults:
    """One model on N rows, in the order of the validation split."""

    correct: np.ndarray  # (N,) bool
    log_probability: np.ndarray  # (N,) of the true class, in nats; float64
    scaled: np.ndarray  # (N,) the same after temperature scaling


def measure_rows(logits: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    """Tensors to store of logits (N, C) and labels (N,); `unpack` reads them back."""
    scaled = log_probabilities(logits, labels, cross_fitted_temperatures(logits, labels))
    return pack(
        logits.argmax(1) == labels, log_probabilities(logits, labels, np.ones(len(labels))), scaled
    )


def log_probabilities(
    logits: np.ndarray, labels: np.ndarray, temperatures: np.ndarray
) -> np.ndarray:
    """Log probability (N,) of the true class, each row's logits (N, C) divided by its own (N,)."""
    from scipy.special import log_softmax

    logits = np.asarray(logits, dtype=np.float64) / temperatures[:, None]
    return log_softmax(logits, axis=1)[np.arange(len(labels)), labels]


def cross_fitted_temperatures(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Temperature (N,) of each row, fitted on the half that it is not in; 1 for a single row."""
    halves = np.array_split(np.random.default_rng(0).permutation(len(labels)), 2)
    temperatures = np.ones(len(labels))
    for here, other in (halves, halves[::-1]):
        if len(other):
            temperatures[here] = fit_temperature(logits[other], labels[other])
    return temperatures


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The one temperature that gives labels (N,) the least cross-entropy from logits (N, C).

    Between 1 / HOTTEST and HOTTEST: where every row is right, colder would always be better.
    """
    import scipy.optimize

    def loss(log_temperature: float) -> float:
        temperatures = np.full(len(labels), np.exp(log_temperature))
        return -float(log_probabilities(logits, labels, temperatures).mean())

    bounds = (-np.log(HOTTEST), np.log(HOTTEST))
    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x))


def pack(correct: np.ndarray, log_probability: np.ndarray, scaled: np.ndarray) -> dict[str, Tensor]:
    """RowResults' arrays in few bytes: bits, and float16, whose three digits suffice for a mean."""
    lowest = float(np.finfo(np.float16).min)
    halves = (np.maximum(array, lowest).astype(np.float16) for array in (log_probability, scaled))
    arrays = (np.packbits(correct), *halves)
    names = ("correct", "log_probability", "scaled")
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def unpack(tensors: dict[str, Tensor]) -> RowResults:
    """What `pack` packed."""
    log_probability, scaled = (
        tensors[name].numpy().astype(np.float64) for name in ("log_probability", "scaled")
    )
    correct = np.unpackbits(tensors["correct"].numpy(), count=len(scaled)).astype(bool)
    return RowResults(correct, log_probability, scaled)


def file_of(training: Path, epoch: str) -> Path:
    """Where the training in this folder keeps its rows of the best or final epoch."""
    return training / f"{epoch}-rows.safetensors"


def publish_rows(folder: Path, trained_elsewhere: Collection[tuple[str, str]] = ()) -> None:
    """Write rows.safetensors of a results folder from all its finished trainings that have rows.

    Of trainings (model, seed) that were trained elsewhere the rows stay that are published.
    """
    path, tensors = folder / "rows.safetensors", {}
    if trained_elsewhere and path.exists():
        published, counts = read_tensors(path)
        if counts.get("rows") == counts.get("of"):  # an older version drew some of many rows
            kept = (name for name in published if tuple(name.split(" ")[:2]) in trained_elsewhere)
            tensors = {name: published[name] for name in kept}
    for (model, seed), epoch in itertools.product(finished_trainings(folder), EPOCHS):
        file = file_of(folder / "state" / f"{model}-seed{seed}", epoch)
        if file.exists():  # not of trainings from before there were rows
            rows = read_tensors(file)[0].items()
            tensors |= {f"{model} {seed} {epoch} {part}": tensor for part, tensor in rows}
    if tensors:
        write_tensors(path, tensors, {})
    else:
        path.unlink(missing_ok=True)


def read_named_rows(path: Path, separator: str) -> dict[str, RowResults]:
    """Name -> rows, of a file whose tensors are named NAME, separator, part; empty without one.

    Raises UserError when the file is damaged.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in (read_tensors(path)[0] if path.exists() else {}).items():
        name, _, part = key.rpartition(separator)
        parts.setdefault(name, {})[part] = tensor
    return {name: unpack(tensors) for name, tensors in parts.items()}


def read_rows(folder: Path) -> dict[str, dict[str, dict[str, RowResults]]]:
    """Published rows of a results folder: model -> seed -> "best" or "final" -> RowResults."""
    results: dict[str, dict[str, dict[str, RowResults]]] = {}
    for name, rows in read_named_rows(folder / "rows.safetensors", " ").items():
        model, seed, epoch = name.split(" ")
        results.setdefault(model, {}).setdefault(seed, {})[epoch] = rows
    return results


def compare_losses(
    rows: dict[str, dict[str, dict[str, RowResults]]], a: str, b: str, epoch: str
) -> dict[str, dict]:
    """crossed_interval of b's classification loss less a's, as it is and after temperature scaling.

    rows as read_rows gives them; empty where the two have no seed in common.
    """
    have = [{seed for seed, found in rows.get(m, {}).items() if epoch in found} for m in (a, b)]
    both = sorted(have[0] & have[1])
    if not both:
        return {}

    def losses(model: str, part: str) -> np.ndarray:  # (S, N)
        return -np.stack([getattr(rows[model][seed][epoch], part) for seed in both])

    parts = {"cls_loss": "log_probability", "cls_loss_scaled": "scaled"}
    return {key: crossed_interval(losses(b, part) - losses(a, part)) for key, part in parts.items()}
