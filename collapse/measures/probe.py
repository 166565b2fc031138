"""A probe of frozen states: how well do they tell labels that they were not trained on?"""

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
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = (np.asarray(x, dtype=np.float64) for x in (train_features, test_features))
    classes, counts = np.unique(train_labels, return_counts=True)
    if len(classes) == 1:
        return {"accuracy": float((np.asarray(test_labels) == classes[0]).mean()), "C": None}
    regression = LogisticRegression(C=PROBE_STRENGTHS[1], max_iter=5000)
    probe, strength = make_pipeline(StandardScaler(), regression), None
    if (folds := min(PROBE_FOLDS, int(counts.min()))) > 1:
        held_out = StratifiedKFold(folds, shuffle=True, random_state=seed)
        grid = {"logisticregression__C": PROBE_STRENGTHS}
        probe = GridSearchCV(probe, grid, scoring="neg_log_loss", cv=held_out)
    probe.fit(train, train_labels)
    if folds > 1:
        strength = probe.best_params_["logisticregression__C"]
    accuracy = float((probe.predict(test) == np.asarray(test_labels)).mean())
    return {"accuracy": accuracy, "C": strength}
