"""What a rank alone cannot tell: spread within and between classes, the first token, transfer.

Pure functions of arrays, float64. Features are (N, D), one row a text, labels (N,).
"""

from typing import Any

import numpy as np

from collapse.measures.rank import effective_rank, singular_values

# Inverse strengths of the transfer probe's L2 penalty; its loss is a sum over rows. The first is
# for hundreds of standardized features of noise, the last for ten rows a class.
PROBE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PROBE_FOLDS = 3


def effective_rank_within(features: np.ndarray, labels: np.ndarray) -> float:
    """Effective rank of the rows less their class means: no move of a class as a whole changes it.

    At most min(N - C, D) for N rows of C classes; 0 where every class is one point.
    """
    return effective_rank(singular_values(within_classes(features, labels)))


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


def transfer_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    seed: int,
) -> dict[str, float | None]:
    """Accuracy of a logistic regression on frozen features, for labels they were not trained on.

    Every feature is standardized by the training rows. The penalty is the one of PROBE_STRENGTHS
    with the least cross-entropy on held-out folds of the training rows, drawn by the seed; then the
    regression is fitted to all of them. What fine-tuning takes from this accuracy is what
    Aghajanyan et al. 2020 call representational collapse. `C` is the inverse strength chosen: None
    where nothing can be held out, as a class has one training row or there is one class.
    """
    train_features = np.asarray(train_features, dtype=np.float64)
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    classes, counts = np.unique(train_labels, return_counts=True)
    if len(classes) == 1:
        return {"accuracy": float((test_labels == classes[0]).mean()), "C": None}
    folds = min(PROBE_FOLDS, int(counts.min()))
    strength = _probe_strength(train_features, train_labels, folds, seed) if folds > 1 else None
    probe = _probe(strength or PROBE_STRENGTHS[1]).fit(train_features, train_labels)
    predicted = probe.predict(np.asarray(test_features, dtype=np.float64))
    return {"accuracy": float((predicted == test_labels).mean()), "C": strength}


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


def _probe(strength: float) -> Any:
    """scikit-learn's pipeline of standardization and logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=strength, max_iter=5000, warm_start=True)
    return make_pipeline(StandardScaler(), regression)


def _probe_strength(features: np.ndarray, labels: np.ndarray, folds: int, seed: int) -> float:
    """The one of PROBE_STRENGTHS with the least cross-entropy on held-out rows."""
    from sklearn.model_selection import StratifiedKFold

    losses = np.zeros(len(PROBE_STRENGTHS))
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for train, held_out in splits.split(features, labels):
        probe = _probe(PROBE_STRENGTHS[0])
        true = np.searchsorted(np.unique(labels), labels[held_out])
        for place, strength in enumerate(PROBE_STRENGTHS):  # each starts where the weaker one ended
            probe[-1].C = strength
            log_probability = probe.fit(features[train], labels[train]).predict_log_proba(
                features[held_out]
            )
            losses[place] -= log_probability[np.arange(len(true)), true].sum()
    return PROBE_STRENGTHS[int(losses.argmin())]
