"""Ranks, neural collapse and clusters: pure functions of arrays, in float64."""

import math
from typing import Any

import numpy as np
import scipy.optimize
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, confusion_matrix


def singular_values(features: np.ndarray) -> np.ndarray:
    """Singular values (min(N, D),) of features (N, D) minus their mean, largest first; what is
    rounding is 0. float64.
    """
    features = np.asarray(features, dtype=np.float64)
    s = np.linalg.svd(features - features.mean(0), compute_uv=False)
    return np.where(
        s > np.finfo(np.float64).eps * max(features.shape) * np.linalg.norm(features), s, 0.0
    )


def effective_rank(s: np.ndarray) -> float:
    """exp of the entropy of s / sum s (Roy & Vetterli 2007), s singular values; 0 for all zeros."""
    if not s.sum() > 0:
        return 0.0
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def rank_metrics(features: np.ndarray) -> dict[str, float | int]:
    """How many directions the rows of features (N, D) spread over, from the singular values s of
    the centred matrix.

    `effective_rank` is exp of the entropy of s / sum s; `stable_rank` sum s^2 / s_1^2;
    `participation_ratio` (sum s)^2 / sum s^2 and `participation_ratio_eigen` (sum s^2)^2 / sum s^4;
    `dims_XXpct` the fewest components with that share of the variance; `topK_variance` the share of
    the first K. At most N - 1 of the values are not zero, so ranks at different N must not be
    compared. float64. Features without any spread have rank 0.
    """
    s = singular_values(features)
    has_spread = s[0] > 0
    s = (
        s / s[0] if has_spread else s
    )  # every metric is free of scale; squares of tiny values stay above zero
    variance = s**2
    total = variance.sum() if has_spread else 1.0
    share = np.cumsum(variance) / total

    def components(
        target: float,
    ) -> int:  # the slack keeps a sum of equal shares from missing its mark by rounding
        return int(np.searchsorted(share, target - 1e-12) + 1) if has_spread else 0

    return {
        "effective_rank": effective_rank(s),
        "stable_rank": float(variance.sum()),
        "participation_ratio": float(s.sum() ** 2 / total),
        "participation_ratio_eigen": float(variance.sum() ** 2 / (variance**2).sum())
        if has_spread
        else 0.0,
        "dims_90pct": components(0.90),
        "dims_95pct": components(0.95),
        "dims_99pct": components(0.99),
        "top1_variance": float(variance[:1].sum() / total),
        "top10_variance": float(variance[:10].sum() / total),
        "top50_variance": float(variance[:50].sum() / total),
        "num_samples": len(features),
        "num_dimensions": len(s),
    }


def random_subsets(total: int, rows: int, draws: int) -> list[np.ndarray]:
    """Row numbers of random subsets, the same for every model on a split.

    Without replacement: a row drawn twice adds no rank.
    """
    rng = np.random.default_rng([0, rows])
    return [rng.permutation(total)[:rows] for _ in range(draws)]


def ranks_from_gram(features: np.ndarray) -> dict[str, float]:
    """Two of rank_metrics by the smaller Gram matrix of features (N, D): faster, to six digits."""
    features = features - features.mean(0, dtype=np.float64)
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    s = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    s = np.where(s > 1e-7 * s.max(), s, 0)
    stable_rank = float((s**2).sum() / (s.max() ** 2 or 1))
    return {"effective_rank": effective_rank(s), "stable_rank": stable_rank}


def neural_collapse_metrics(
    features: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> dict[str, float]:
    """How far features (N, D) with labels (N,) have collapsed to one point a class; weights (C, D),
    bias (C,) of a linear head.

    With class means m_c over C classes and m_G their unweighted mean, after Wu & Papyan 2024 and
    the works they cite: NC1 `cdnv`, mean over class pairs of (v_c + v_c') / (2 |m_c - m_c'|^2), v_c
    the mean squared distance to m_c (Galanti et al. 2021); `within_between_trace`, trace(S_W S_B^+)
    / C (Papyan et al. 2020). NC2 `norm_cv` of the |m_c - m_G|; `etf_error`, distance of their
    normalized Gram matrix from a simplex equiangular tight frame's (Kothapalli 2023);
    `hyperspherical_mean` and `hyperspherical_var` of log(1 / distance) over pairs of unit m_c - m_G
    (Liu et al. 2023). NC3, given weights: `self_duality_error`, the same distance for the products
    of weights and m_c - m_G; `uniform_duality_cv` of their cosines. NC4: `ncc_agreement`, share of
    rows that the head gives to the nearest class mean. A class without rows is left out; what has
    no pair or no spread to measure is 0. float64.
    """
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    classes, position = np.unique(labels, return_inverse=True)
    means = np.stack([features[labels == c].mean(0) for c in classes])  # (C, D)
    centred = means - means.mean(0)
    residuals = features - means[position]  # (N, D)
    spread = np.array([(residuals[labels == c] ** 2).sum(1).mean() for c in classes])  # (C,) v_c
    floor = np.finfo(np.float64).eps * (1 + np.abs(features).max())  # lengths below it are rounding
    first, second = np.triu_indices(len(classes), 1)  # a pair once: what follows is symmetric

    apart = ((means[first] - means[second]) ** 2).sum(1)
    directions = _unit(centred, floor)
    chords = np.linalg.norm(directions[first] - directions[second], axis=1)
    angles = -np.log(np.maximum(chords, np.finfo(np.float64).eps))
    # S_B = axes' s^2 axes
    _, s, axes = np.linalg.svd(centred / math.sqrt(len(classes)), full_matrices=False)
    kept = s > floor * max(centred.shape)
    within = ((residuals @ axes[kept].T) ** 2).mean(0)  # S_W along those axes
    metrics = {
        "cdnv": _mean((spread[first] + spread[second]) / (2 * np.maximum(apart, floor**2))),
        "within_between_trace": float((within / s[kept] ** 2).sum() / len(classes)),
        "norm_cv": _variation(np.linalg.norm(centred, axis=1), floor),
        "etf_error": _distance_from_simplex(centred @ centred.T, floor**2),
        "hyperspherical_mean": _mean(angles),
        "hyperspherical_var": float(angles.var()) if len(angles) else 0.0,
    }
    if weights is not None:
        weights = np.asarray(weights, dtype=np.float64)
        logits = features @ weights.T + (
            0.0 if bias is None else np.asarray(bias, dtype=np.float64)
        )  # (N, C)
        distances = (
            (features**2).sum(1, keepdims=True) - 2 * features @ means.T + (means**2).sum(1)
        )  # (N, C)
        weights = weights[classes]
        cosines = (_unit(weights, np.finfo(np.float64).tiny) * directions).sum(1)
        metrics["self_duality_error"] = _distance_from_simplex(weights @ centred.T, floor**2)
        metrics["uniform_duality_cv"] = _variation(cosines, np.finfo(np.float64).eps)
        metrics["ncc_agreement"] = float((logits.argmax(1) == classes[distances.argmin(1)]).mean())
    return metrics


def _unit(vectors: np.ndarray, floor: float) -> np.ndarray:
    """Rows at length 1; a row no longer than floor is 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > floor)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _variation(values: np.ndarray, floor: float) -> float:
    """Standard deviation over absolute mean; 0 for values that are all rounding."""
    mean = abs(values.mean())
    return float(values.std() / max(mean, floor)) if np.abs(values).max() > floor else 0.0


def _distance_from_simplex(products: np.ndarray, floor: float) -> float:
    """Frobenius distance of products (C, C), normalized, from the Gram matrix of a simplex
    equiangular tight frame.
    """
    count, size = len(products), np.linalg.norm(products)
    if count < 2:
        return 0.0
    simplex = (np.eye(count) - 1 / count) / math.sqrt(count - 1)
    return float(np.linalg.norm((products / size if size > floor else 0.0) - simplex))


def k_means(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Cluster number (N,) of each row of points (N, E), from the best of 10 starts."""
    points = np.asarray(points, dtype=np.float64)
    return KMeans(min(k, len(points)), n_init=10, random_state=seed).fit_predict(points)


def match_clusters(clusters: np.ndarray, labels: np.ndarray, n_classes: int) -> dict[str, Any]:
    """Clusters (N,) against labels (N,), see cluster_engrams."""
    counts = confusion_matrix(clusters, labels, labels=range(n_classes))  # (cluster, class)
    _, class_of = scipy.optimize.linear_sum_assignment(counts, maximize=True)
    right = class_of[clusters] == labels
    return {
        "ari": float(adjusted_rand_score(labels, clusters)),
        "cluster_accuracy": float(right.mean()),
        "mapping": {cluster: int(c) for cluster, c in enumerate(class_of)},
        "purity": {int(c): float(right[labels == c].mean()) for c in np.unique(labels)},
    }


def cluster_engrams(
    engrams: np.ndarray, labels: np.ndarray, n_classes: int, seed: int
) -> dict[str, Any]:
    """k-means (k = n_classes, 10 starts) on engrams (N, E), against labels (N,) it does not see.

    `ari` is the adjusted Rand index; `cluster_accuracy` the share of rows in the cluster matched to
    their class by the Hungarian algorithm; `mapping` cluster -> class; `purity` class -> share of
    its rows in its cluster.
    """
    return match_clusters(k_means(engrams, n_classes, seed), np.asarray(labels), n_classes)


def engram_cosine(engrams: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Mean cosine of pairs of different rows, `within` a class and `between` classes; None where
    there is no pair.

    For unit vectors u the sum of all pairs' cosines is (|sum u|^2 - N) / 2, so no N x N matrix is
    needed. A zero engram has cosine 0 with everything.
    """
    engrams, labels = np.asarray(engrams, dtype=np.float64), np.asarray(labels)
    unit = _unit(engrams, 0.0)

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
