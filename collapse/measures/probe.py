"""A probe of frozen states: how well do they tell labels that they were not trained on?"""

from typing import Any

import numpy as np

# Inverse strengths of the transfer probe's L2 penalty; its loss is a sum over rows. The first is
# for hundreds of standardized features of noise, the last for ten rows a class.
PROBE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PROBE_FOLDS = 3


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
