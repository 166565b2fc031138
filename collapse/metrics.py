"""How many directions features spread over: pure functions of arrays."""

import numpy as np


def singular_values(features: np.ndarray) -> np.ndarray:
    """Singular values (min(N, D),) of features (N, D) minus their mean, largest first. float64.

    What is rounding is 0.
    """
    features = np.asarray(features, dtype=np.float64)
    s = np.linalg.svd(features - features.mean(0), compute_uv=False)
    return np.where(
        s > np.finfo(np.float64).eps * max(features.shape) * np.linalg.norm(features), s, 0.0
    )


def effective_rank(s: np.ndarray) -> float:
    """exp of the entropy of singular values over their sum (Roy & Vetterli 2007); 0 if all are."""
    if not s.sum() > 0:
        return 0.0
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))
