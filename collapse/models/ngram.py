"""The bigram baseline of a language model: interpolated Kneser-Ney, on token ids."""

import numpy as np


class KneserNeyBigram:
    """Interpolated Kneser-Ney (Kneser & Ney 1995; Chen & Goodman 1999) of blocks (B, L) of ids.

    P(w | v) = max(c(vw) - D, 0) / c(v) + D N(v.) / c(v) Q(w), c counts pairs inside a block, N(v.)
    the different tokens after v. Q(w), for all that follows from no pair, counts in how many
    different contexts w was seen, discounted in the same way towards 1 / V. A discount is
    n1 / (n1 + 2 n2), from how many counts are 1 and 2. After a token never seen, P is Q.
    """

    def __init__(self, blocks: np.ndarray, vocabulary: int):
        self.vocabulary = vocabulary
        codes = blocks[:, :-1].astype(np.int64) * vocabulary + blocks[:, 1:]
        self.pairs, self.counts = np.unique(codes, return_counts=True)  # sorted codes v V + w
        first, second = np.divmod(self.pairs, vocabulary)
        contexts = np.bincount(second, minlength=vocabulary)  # (V,) N(.w)
        discount = _discount(contexts[contexts > 0])
        spared = discount * np.count_nonzero(contexts) / vocabulary
        self.lower = (np.maximum(contexts - discount, 0) + spared) / contexts.sum()  # (V,) Q
        self.discount = _discount(self.counts)
        self.totals = np.bincount(first, self.counts, minlength=vocabulary)  # (V,) c(v)
        followers = np.bincount(first, minlength=vocabulary)  # (V,) N(v.)
        seen = np.maximum(self.totals, 1)
        self.rest = np.where(self.totals > 0, self.discount * followers / seen, 1.0)  # (V,)

    def probabilities(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """P(second | first) of arrays of ids of one shape."""
        codes = np.asarray(first, dtype=np.int64) * self.vocabulary + second
        position = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
        count = np.where(self.pairs[position] == codes, self.counts[position], 0)
        seen = np.maximum(count - self.discount, 0) / np.maximum(self.totals[first], 1)
        return seen + self.rest[first] * self.lower[second]

    def loss(self, blocks: np.ndarray) -> float:
        """Mean of -log P in nats over every token of blocks (B, L) but a block's first."""
        return float(-np.log(self.probabilities(blocks[:, :-1], blocks[:, 1:])).mean())


def _discount(counts: np.ndarray) -> float:
    ones, twos = (counts == 1).sum(), (counts == 2).sum()
    return float(ones / (ones + 2 * twos)) if ones and twos else 0.5  # too few to estimate it
