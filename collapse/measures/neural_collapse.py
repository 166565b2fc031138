"""Neural collapse: do classes become points, and the points a simplex? Pure functions, float64."""

import math

import numpy as np


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
    directions = unit_rows(centred, floor)
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
        cosines = (unit_rows(weights, np.finfo(np.float64).tiny) * directions).sum(1)
        metrics["self_duality_error"] = _distance_from_simplex(weights @ centred.T, floor**2)
        metrics["uniform_duality_cv"] = _variation(cosines, np.finfo(np.float64).eps)
        metrics["ncc_agreement"] = float((logits.argmax(1) == classes[distances.argmin(1)]).mean())
    return metrics


def unit_rows(vectors: np.ndarray, floor: float) -> np.ndarray:
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
