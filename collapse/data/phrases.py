"""Finds whole sentences among rows that are phrases, and rows that share no phrase with others."""

from collections.abc import Iterator, Sequence

from collapse.data.text import corpus_text

Words = tuple[str, ...]


def contiguous_parts(words: Words) -> Iterator[Words]:
    """All n (n + 1) / 2 runs of neighbouring words among n, the whole included."""
    for first in range(len(words)):
        for end in range(first + 1, len(words) + 1):
            yield words[first:end]


def maximal_phrases(texts: Sequence[str]) -> list[int]:
    """Indices of the rows that are no part of another row, word for word, in order.

    Words are separated by spaces. Of equal rows only the first is listed.
    """
    first: dict[Words, int] = {}
    for number, text in enumerate(texts):
        first.setdefault(tuple(text.split()), number)
    inside: set[Words] = set()
    maximal = []
    # The longest first: the parts of a part are known already, so half of the rows cost nothing.
    for words in sorted(first, key=len, reverse=True):
        if words not in inside:
            maximal.append(first[words])
            inside.update(part for part in contiguous_parts(words) if part in first)
    return sorted(maximal)


def rows_without_overlap(texts: Sequence[str], others: Sequence[str]) -> list[int]:
    """Indices of the texts that neither stand in one of `others`, word for word, nor hold one.

    Both are compared as corpus_text writes them: a language model that reads no punctuation must
    not see an overlap either. A text without letters is left out; among `others` it is ignored.
    """
    own = [tuple(corpus_text(text).split()) for text in texts]
    whole = {tuple(corpus_text(text).split()) for text in others} - {()}
    known = set(own)
    inside = {part for words in whole for part in contiguous_parts(words) if part in known}
    return [
        number
        for number, words in enumerate(own)
        if words and words not in inside and whole.isdisjoint(contiguous_parts(words))
    ]
