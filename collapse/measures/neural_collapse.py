"""Neural collapse: do classes become points, and the points a simplex?

Pure functions of arrays, float64. Features are (N, D), one row a text, labels (N,).
"""

import math

import numpy as np

from collapse.measures.rank import ranks_from_gram

EPSILON = np.finfo(np.float64).eps


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
    classes, means = np.unique(labels), class_means(features, labels)  # (C,), (C, D)
    centred, residuals = means - means.mean(0), within_classes(features, labels)
    floor = _rounding(features)
    first, second = np.triu_indices(len(classes), 1)  # a pair once: what follows is symmetric

    directions = unit_rows(centred, floor)
    chords = np.linalg.norm(directions[first] - directions[second], axis=1)
    angles = -np.log(np.maximum(chords, EPSILON))
    # S_B = axes' s^2 axes
    _, s, axes = np.linalg.svd(centred / math.sqrt(len(classes)), full_matrices=False)
    kept = s > floor * max(centred.shape)
    within = ((residuals @ axes[kept].T) ** 2).mean(0)  # S_W along those axes
    metrics = {
        "cdnv": cdnv(features, labels),
        "within_between_trace": float((within / s[kept] ** 2).sum() / len(classes)),
        "norm_cv": variation(np.linalg.norm(centred, axis=1), floor),
        "etf_error": _distance_from_simplex(centred @ centred.T, floor**2),
        "hyperspherical_mean": _mean(angles),
        "hyperspherical_var": float(angles.var()) if len(angles) else 0.0,
    }
    if weights is not None:
        of_all = class_means(features, labels, len(weights))
        metrics["ncc_agreement"] = ncc_agreement(features, of_all, weights, bias)
        weights = np.asarray(weights, dtype=np.float64)[classes]
        cosines = (unit_rows(weights, np.finfo(np.float64).tiny) * directions).sum(1)
        metrics["self_duality_error"] = _distance_from_simplex(weights @ centred.T, floor**2)
        metrics["uniform_duality_cv"] = variation(cosines, EPSILON)
    return metrics


def cdnv(features: np.ndarray, labels: np.ndarray) -> float:
    """NC1 alone, see neural_collapse_metrics: cheap, without any decomposition."""
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    means = class_means(features, labels)  # (C, D)
    squares = (within_classes(features, labels) ** 2).sum(1)  # (N,)
    spread = np.array([squares[labels == c].mean() for c in np.unique(labels)])  # (C,) v_c
    first, second = np.triu_indices(len(means), 1)
    apart = ((means[first] - means[second]) ** 2).sum(1)
    apart = np.maximum(apart, _rounding(features) ** 2)
    return _mean((spread[first] + spread[second]) / (2 * apart))


def ncc_agreement(
    features: np.ndarray, means: np.ndarray, weights: np.ndarray, bias: np.ndarray | None = None
) -> float:
    """NC4: share of rows that a linear head gives to the class whose mean is nearest.

    Papyan et al. 2020 take the means of training rows, and features of others. means (C, D) has a
    row for each of the head's classes, NaN for one without training rows: it is nearest to nothing.
    weights (C, D), bias (C,).
    """
    features, weights = (np.asarray(array, dtype=np.float64) for array in (features, weights))
    logits = features @ weights.T + (0.0 if bias is None else np.asarray(bias))  # (N, C)
    centre = np.nanmean(means, axis=0)  # near the rows: squares of what all rows share would cancel
    features, means = features - centre, means - centre
    distances = (means**2).sum(1) - 2 * features @ means.T  # (N, C), each row's less its |x|^2
    distances[:, np.isnan(means).any(1)] = np.inf
    return float((logits.argmax(1) == distances.argmin(1)).mean())


def effective_rank_within(features: np.ndarray, labels: np.ndarray) -> float:
    """Effective rank of the rows less their class means: no move of a class as a whole changes it.

    To six digits, see ranks_from_gram; at most min(N - C, D) for N rows of C classes; 0 where every
    class is one point.
    """
    return ranks_from_gram(within_classes(features, labels))["effective_rank"]


def spreads(features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How far rows lie from their class and classes from each other: squared distances.

    `within_spread` is the mean over rows of |x - m_c|^2, the trace of neural_collapse_metrics' S_W;
    `between_spread` the mean over classes of |m_c - m_G|^2, the trace of its S_B, where m_G is the
    unweighted mean of the class means. They add up to the variance where classes have equal sizes.
    """
    within = within_classes(features, labels)  # (N, D)
    means = class_means(features, labels)  # (C, D)
    centred = _centred(means)
    return {
        "within_spread": float((within**2).sum(1).mean()),
        "between_spread": float((centred**2).sum(1).mean()),
    }


def length_share(features: np.ndarray, lengths: np.ndarray) -> float:
    """Share of the variance that a regression of features (N, D) on 1 / lengths (N,) explains.

    Least squares with an intercept, summed over the dimensions: between 0 and 1, about 1 / (N - 1)
    where length has no influence. 0 for texts of equal length and for features without spread.
    A first token that is the same vector in every text adds vector / length to a mean over tokens.
    """
    centred = _centred(features)  # (N, D)
    inverse = _centred(1 / np.asarray(lengths, dtype=np.float64))  # (N,)
    total, square = (centred**2).sum(), (inverse**2).sum()
    if not (total > 0 and square > 0):
        return 0.0
    return float(min(1.0, ((inverse @ centred) ** 2).sum() / square / total))


def sink_ratio(first_norms: np.ndarray, other_norms: np.ndarray) -> np.ndarray:
    """How much longer first tokens' states are than others': ratio of their mean norms.

    Args:
        first_norms: (..., N), a row's first token; leading axes, such as layers, are kept.
        other_norms: (..., N), mean over a row's other tokens; its first's where it has no other.

    Returns (...,); 1 where all norms are 0.
    """
    first = np.asarray(first_norms, dtype=np.float64).mean(-1)
    other = np.asarray(other_norms, dtype=np.float64).mean(-1)
    return np.divide(first, other, out=np.ones_like(first), where=other > 0)


def within_classes(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Features (N, D), each row less its class mean. Exact zeros where a class is one point."""
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    residuals = np.empty_like(features)
    for c in np.unique(labels):
        residuals[labels == c] = _centred(features[labels == c])
    return residuals


def class_means(features: np.ndarray, labels: np.ndarray, classes: int | None = None) -> np.ndarray:
    """Means (C, D) of the classes that have rows; given their number, NaN for one without."""
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    wanted = np.unique(labels) if classes is None else np.arange(classes)
    means = np.full((len(wanted), features.shape[1]), np.nan)
    for place, c in enumerate(wanted):
        if (labels == c).any():
            rows = features[labels == c]
            means[place] = rows[0] + (rows - rows[0]).mean(0)
    return means


def _centred(values: np.ndarray) -> np.ndarray:
    """Values (N, ...) less their mean; less the first before, so that equal ones are exactly 0."""
    values = np.asarray(values, dtype=np.float64)
    values = values - values[0]
    return values - values.mean(0)


def _rounding(features: np.ndarray) -> float:
    """The length below which a difference of features is rounding."""
    return EPSILON * (1 + np.abs(features).max())


def unit_rows(vectors: np.ndarray, floor: float) -> np.ndarray:
    """Rows at length 1; a row no longer than floor is 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > floor)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def variation(values: np.ndarray, floor: float) -> float:
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
