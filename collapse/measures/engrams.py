"""Do engrams group by class? Clusters and cosines: pure functions of arrays, in float64."""

import math
from typing import Any

import numpy as np

from collapse.measures.neural_collapse import unit_rows


def k_means(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Cluster number (N,) of each row of points (N, E), from the best of 10 starts."""
    from sklearn.cluster import KMeans

    points = np.asarray(points, dtype=np.float64)
    return KMeans(min(k, len(points)), n_init=10, random_state=seed).fit_predict(points)


def match_clusters(clusters: np.ndarray, labels: np.ndarray, n_classes: int) -> dict[str, Any]:
    """Clusters (N,) against labels (N,) that k-means did not see.

    `ari` is the adjusted Rand index; `cluster_accuracy` the share of rows in the cluster matched to
    their class by the Hungarian algorithm; `mapping` cluster -> class; `purity` class -> share of
    its rows in its cluster.
    """
    import scipy.optimize
    from sklearn.metrics import adjusted_rand_score, confusion_matrix

    counts = confusion_matrix(clusters, labels, labels=range(n_classes))  # (cluster, class)
    _, class_of = scipy.optimize.linear_sum_assignment(counts, maximize=True)
    right = class_of[clusters] == labels
    return {
        "ari": float(adjusted_rand_score(labels, clusters)),
        "cluster_accuracy": float(right.mean()),
        "mapping": {cluster: int(c) for cluster, c in enumerate(class_of)},
        "purity": {int(c): float(right[labels == c].mean()) for c in np.unique(labels)},
    }


def engram_cosine(engrams: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Mean cosine of pairs of different rows, `within` a class and `between` classes; None where
    there is no pair.

    For unit vectors u the sum of all pairs' cosines is (|sum u|^2 - N) / 2, so no N x N matrix is
    needed. A zero engram has cosine 0 with everything.
    """
    engrams, labels = np.asarray(engrams, dtype=np.float64), np.asarray(labels)
    unit = unit_rows(engrams, 0.0)

    def pair_sum(rows: np.ndarray) -> float:
        return float(((rows.sum(0) ** 2).sum() - (rows**2).sum()) / 2)

    groups = [unit[labels == c] for c in np.unique(labels)]
    within, within_pairs = (
        sum(map(pair_sum, groups)),
        sum(math.comb(len(group), 2) for group in groups),
    )
    between, between_pairs = pair_sum(unit) - within, math.comb(len(unit), 2) - within_pairs
    return {
        "within": within / within_pairs if within_pairs else None,
        "between": between / between_pairs if between_pairs else None,
    }


def shuffled_labels(labels: np.ndarray, seed: int) -> np.ndarray:
    """The labels (N,) dealt out at random: whatever still matches them does so by chance."""
    return np.random.default_rng(seed).permutation(labels)


def analyse_engrams(
    engrams: np.ndarray, untrained: np.ndarray, labels: np.ndarray, n_classes: int, seed: int
) -> dict[str, dict]:
    """Do engrams group by class? Clusters and cosines, each with a chance level and a control.

    `chance` has the labels shuffled. `untrained` is the control of untrained_engrams: what it
    reaches is the backbone's doing, not the compressor's training.
    """
    clusters, control_clusters = (
        k_means(points, n_classes, seed) for points in (engrams, untrained)
    )
    shuffled = shuffled_labels(labels, seed)
    cases = {
        "trained": (engrams, clusters, labels),
        "chance": (engrams, clusters, shuffled),
        "untrained": (untrained, control_clusters, labels),
    }
    return {
        "cluster": {
            name: match_clusters(found, y, n_classes) for name, (_, found, y) in cases.items()
        },
        "engram_cos": {name: engram_cosine(points, y) for name, (points, _, y) in cases.items()},
    }
