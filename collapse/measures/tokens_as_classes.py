"""Neural collapse of the tokens of a vocabulary, without vocabulary x vocabulary x width memory.

The measures of "Linguistic Collapse" (Wu & Papyan 2024): a class is a next token, its rows are the
states that it follows. States come in batches, in two passes over training text and one over
validation text; pairs of classes in tiles. All sums are float64.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from collapse.measures.neural_collapse import unit_rows, variation

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # states (T, D), next tokens (T,)

TILE = 1024  # classes; a tile of pairs takes 8 MiB
FREQUENT = 20  # tokens of a class: with fewer its spread is mostly unknown
# Squared distances below this share of the lengths lose digits in |a|^2 + |b|^2 - 2ab.
CLOSE = 1e-5
EPSILON = torch.finfo(torch.float64).eps


@dataclass
class ClassMeans:
    """Of the C classes seen in training text: which, how often, their means and spreads."""

    classes: Tensor  # (C,) token ids
    counts: Tensor  # (C,)
    means: Tensor  # (C, D)
    spreads: Tensor  # (C,) mean squared distance of a class's rows to its mean
    floor: float  # lengths below it are rounding


def token_collapse_metrics(
    train: Batches, validation: Batches, vocabulary: int, weights: Tensor
) -> dict[str, float | int]:
    """How far states have collapsed to one point a next token, under an LM head's weights (V, D).

    `train` and `validation` give batches of states and next tokens, anew at each call. NC1 to NC3
    are of training text, over the classes seen in it; means m_c, spreads v_c, m_G the mean of the
    m_c. NC1: `cdnv`, mean over pairs of (v_c + v_c') / (2 |m_c - m_c'|^2), and `cdnv_quartic` with
    the power 4, which is what Wu & Papyan's table holds and depends on the scale of states; both
    also `_frequent`: over classes of 20 tokens or more, with v n / (n - 1) for v. NC2: `norm_cv` of
    the |m_c - m_G|; `participation_ratio` (sum l)^2 / sum l^2 of the eigenvalues l of their
    scatter; `etf_error`, distance from a simplex equiangular tight frame, which is a function of
    that ratio R alone, sqrt(2 - 2 sqrt(R / (C - 1))): a rank in disguise; `interference_mean` and
    `interference_var` of the cosines of pairs; `log_kernel_mean`, `log_kernel_var` of log(1 /
    distance) of pairs on the unit sphere. NC3: `self_duality_error`, the distance of the products
    of heads and m_c - m_G from the frame; `cosine_mean`, `cosine_cv` of their cosines. NC4:
    `agreement`, the share of validation rows that the head gives to the token with the nearest
    training mean; a class never seen has no mean and cannot be the nearest, the head may choose it.

    What has no pair or no spread is 0, as in neural_collapse_metrics. Raises ValueError when train
    has no row.
    """
    found = class_means(train, vocabulary, weights.shape[1])
    centred = found.means - found.means.mean(0)  # (C, D)
    result = {
        "classes": len(found.classes),
        "frequent_classes": int((found.counts >= FREQUENT).sum()),
        "train_tokens": int(found.counts.sum()),
    }
    result |= _variability(found)
    result |= _geometry(centred, found.floor)
    result |= _duality(centred, weights.double()[found.classes], found.floor)
    return result | _agreement(validation, found, weights.double())


def class_means(train: Batches, vocabulary: int, width: int) -> ClassMeans:
    """Two passes: sums and counts, then spreads around the final means (one pass would cancel)."""
    sums = torch.zeros(vocabulary, width, dtype=torch.float64)
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    largest = 0.0
    for states, tokens in train():
        states = states.double()
        sums.index_add_(0, tokens, states)
        counts += torch.bincount(tokens, minlength=vocabulary)
        largest = max(largest, states.abs().max().item()) if len(states) else largest
    seen = counts > 0
    if not seen.any():
        raise ValueError("no row of training text")
    means = sums / counts.clamp(min=1)[:, None]
    squares = torch.zeros(vocabulary, dtype=torch.float64)
    for states, tokens in train():
        squares.index_add_(0, tokens, (states.double() - means[tokens]).square().sum(1))
    spreads = squares[seen] / counts[seen]
    classes = seen.nonzero().squeeze(1)
    return ClassMeans(classes, counts[seen], means[seen], spreads, EPSILON * (1 + largest))


def pair_tiles(points: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances of pairs of points (C, D): rows, columns and a tile (TILE, TILE) of them.

    Each pair stands in one tile; its other place, and a point with itself, are infinite.
    """
    for a in range(0, len(points), TILE):
        for b in range(a, len(points), TILE):
            left, right = points[a : a + TILE], points[b : b + TILE]
            lengths = left.square().sum(1)[:, None] + right.square().sum(1)
            apart = torch.addmm(lengths, left, right.T, alpha=-2)  # (TILE, TILE)
            if a == b:
                apart += torch.full_like(apart, math.inf).tril()
            rows, columns = (apart < CLOSE * lengths).nonzero(as_tuple=True)
            for part in torch.arange(len(rows)).split(TILE):  # pairs x D at a time
                i, j = rows[part], columns[part]
                apart[i, j] = (left[i] - right[j]).square().sum(1)
            yield slice(a, a + TILE), slice(b, b + TILE), apart


def _variability(found: ClassMeans) -> dict[str, float]:
    """NC1 over all classes, and over frequent ones with unbiased spreads."""
    frequent = found.counts >= FREQUENT
    unbiased = found.spreads * found.counts / (found.counts - 1).clamp(min=1)
    cases = {
        "": (found.means, found.spreads),
        "_frequent": (found.means[frequent], unbiased[frequent]),
    }
    result = {}
    for ending, (means, spreads) in cases.items():
        total = quartic = 0.0
        # Distances do not depend on the origin; their digits do.
        for rows, columns, apart in pair_tiles(means - means.mean(0)) if len(means) else ():
            spread = (spreads[rows, None] + spreads[columns]) / 2  # (TILE, TILE)
            apart = apart.clamp(min=found.floor**2)
            total += (spread / apart).sum().item()
            quartic += (spread / apart**2).sum().item()
        pairs = max(1, math.comb(len(means), 2))
        result |= {f"cdnv{ending}": total / pairs, f"cdnv_quartic{ending}": quartic / pairs}
    return result


def _geometry(centred: Tensor, floor: float) -> dict[str, float]:
    """NC2 of class means less their mean (C, D)."""
    scatter = centred.T @ centred  # (D, D): its squares sum to those of the (C, C) products
    size, trace = scatter.norm().item(), scatter.trace().item()
    unit = torch.from_numpy(unit_rows(centred.numpy(), floor))
    classes = len(unit)
    pairs = max(1, math.comb(classes, 2))
    own = unit.square().sum().item()  # cosines of classes with themselves
    cosines = (unit.sum(0).square().sum().item() - own) / 2
    squared = (unit.T @ unit).square().sum().item() - unit.square().sum(1).square().sum().item()
    mean = cosines / pairs
    return {
        "norm_cv": variation(centred.norm(dim=1).numpy(), floor),
        "participation_ratio": (trace / size) ** 2 if size > floor**2 else 0.0,
        "etf_error": _frame_distance(trace, size, classes, floor),
        "interference_mean": mean,
        "interference_var": max(0.0, squared / 2 / pairs - mean**2),
        **_log_kernel(unit),
    }


def _log_kernel(unit: Tensor) -> dict[str, float]:
    """Mean and variance of -log distance over pairs of unit vectors (C, D) (Liu et al. 2023)."""
    pairs, mean, squares = 0, 0.0, 0.0  # squares: of what is off the running mean
    for _, _, apart in pair_tiles(unit):
        apart = apart[apart.isfinite()]  # (P,)
        if not len(apart):
            continue
        values = -apart.clamp(min=0).sqrt().clamp(min=EPSILON).log()
        here, shift = len(values), values.mean().item() - mean
        squares += values.var(correction=0).item() * here
        squares += shift**2 * pairs * here / (pairs + here)
        pairs += here
        mean += shift * here / pairs
    return {"log_kernel_mean": mean, "log_kernel_var": squares / pairs if pairs else 0.0}


def _duality(centred: Tensor, heads: Tensor, floor: float) -> dict[str, float]:
    """NC3: heads (C, D) of the classes against their centred means (C, D)."""
    # The products (C, C) are heads @ centred.T; as the means are centred, their sum is 0.
    size = ((heads.T @ heads) * (centred.T @ centred)).sum().clamp(min=0).sqrt().item()
    trace = (heads * centred).sum().item()
    tiny = torch.finfo(torch.float64).tiny
    cosines = (unit_rows(heads.numpy(), tiny) * unit_rows(centred.numpy(), floor)).sum(1)
    return {
        "self_duality_error": _frame_distance(trace, size, len(centred), floor),
        "cosine_mean": float(cosines.mean()),
        "cosine_cv": variation(cosines, EPSILON),
    }


def _agreement(validation: Batches, found: ClassMeans, weights: Tensor) -> dict[str, float]:
    """NC4: share of rows where argmax of W x is the class with the nearest mean."""
    right = rows = 0
    half_squares = found.means.square().sum(1) / 2  # (C,)
    for states, _ in validation():
        for part in states.double().split(TILE):  # (TILE, D)
            nearest = (part @ found.means.T - half_squares).argmax(1)  # |x|^2 is one for all
            chosen = (part @ weights.T).argmax(1)
            right += int((found.classes[nearest] == chosen).sum())
            rows += len(part)
    return {"agreement": right / rows if rows else 0.0, "validation_tokens": rows}


def _frame_distance(trace: float, size: float, classes: int, floor: float) -> float:
    """Frobenius distance of products, normalized, from a simplex equiangular tight frame's.

    They are known by their trace and Frobenius norm; all of them sum to 0. Both sides have norm 1,
    so the squared distance is 2 - 2 x their inner product.
    """
    if classes < 2:
        return 0.0
    if size <= floor**2:
        return 1.0  # nothing but rounding: the frame's own norm
    return math.sqrt(max(0.0, 2 - 2 * trace / size / math.sqrt(classes - 1)))
