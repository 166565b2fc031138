"""Ranks: over how many directions rows spread. Pure functions of arrays, in float64."""

import numpy as np


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
