"""Experiment 1: a small causal transformer trained from scratch on SST-2 as models 1, 2 and 3.

Without SST-2 (no --data-dir, nothing in the Hugging Face cache, no hub) it runs on 10,568
movie-review snippets (9,473 to train, 1,095 to validate) and writes to results/movie-snippets/.
"""

import collections
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from collapse.config import DATA, OPTIMIZATION, RunConfig, check_bounds, study_setting
from collapse.config import check_config as check_run_config
from collapse.data import registry
from collapse.data.task import Task, limit_task
from collapse.measures.layers import find_pooling
from collapse.utils import command_line
from collapse.utils.device import set_allocator
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT

TRANSFORMER = "transformer"  # a group of --help


@dataclass
class Config(RunConfig):
    """Settings of Experiment 1; the comment above a field is its --help text.

    The first have other defaults than RunConfig's, and its text.
    """

    epochs: int = study_setting(8, OPTIMIZATION)
    batch_size: int = study_setting(64, OPTIMIZATION)
    learning_rate: float = study_setting(3e-4, OPTIMIZATION)
    weight_decay: float = study_setting(0.0, OPTIMIZATION)
    schedule: Literal["constant", "cosine"] = study_setting("constant", OPTIMIZATION)
    warmup_fraction: float = study_setting(0.0, OPTIMIZATION)
    clip_norm: float = study_setting(0.0, OPTIMIZATION)
    # Longest input in words; the rest of a row is cut off.
    max_length: int = study_setting(64, DATA)
    # Size of the vocabulary: the most frequent words of the training split, and one entry each for
    # padding and for unknown words.
    vocabulary_size: int = study_setting(8000, TRANSFORMER)
    # Size of the hidden states.
    hidden_size: int = study_setting(128, TRANSFORMER)
    # Transformer layers.
    layers: int = study_setting(2, TRANSFORMER)
    # Attention heads.
    heads: int = study_setting(4, TRANSFORMER)
    # Inner size of the feed-forward layers.
    feed_forward_size: int = study_setting(256, TRANSFORMER)
    # Dropout on embeddings, sub-layer outputs, feed-forward and classifier, not on attention
    # weights.
    dropout: float = study_setting(0.1, TRANSFORMER)
    # Size of the classifier's intermediate layer.
    classifier_size: int = study_setting(64, TRANSFORMER)
    # Size of the engram of model 3.
    engram_size: int = study_setting(32, TRANSFORMER)


class WordVocabulary:
    """The most frequent lower-cased words and runs of punctuation of some texts.

    Id 0 is padding, id 1 stands for every word that is not in the vocabulary.
    """

    WORD = re.compile(r"\w+(?:['\-]\w+)*|'\w+|[^\w\s]+")

    def __init__(self, texts: list[str], size: int):
        counts = collections.Counter(
            word for text in texts for word in self.WORD.findall(text.lower())
        )
        by_rank = sorted(
            counts, key=lambda word: (-counts[word], word)
        )  # ties in alphabetical order
        self.ids = {word: number for number, word in enumerate(by_rank[: size - 2], 2)}

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [
            [self.ids.get(word, 1) for word in self.WORD.findall(text.lower())] for text in texts
        ]


class Layer(nn.Module):
    """Causal self-attention and feed-forward, each followed by residual and LayerNorm (post-norm,
    Vaswani et al. 2017).
    """

    def __init__(self, config: Config):
        super().__init__()
        size = config.hidden_size
        self.heads = config.heads
        self.qkv, self.attention_out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.inner, self.outer = (
            nn.Linear(size, config.feed_forward_size),
            nn.Linear(config.feed_forward_size, size),
        )
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each (B, heads, L, D / heads)
        attended = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )  # (B, L, D)
        x = self.attention_norm(x + self.dropout(self.attention_out(attended)))
        return self.feed_forward_norm(
            x + self.dropout(self.outer(self.dropout(F.gelu(self.inner(x)))))
        )


class SmallTransformer(nn.Module):
    """Causal transformer, called as Hugging Face's base models are (see common.DualHeadModel)."""

    def __init__(self, config: Config):
        super().__init__()
        size, length = config.hidden_size, config.max_length + 1  # + 1 for the engram's prefix
        self.embedding = nn.Embedding(config.vocabulary_size, size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.dropout = nn.Dropout(config.dropout)
        angle = torch.arange(length)[:, None] * torch.exp(
            torch.arange(0, size, 2) * (-math.log(10_000) / size)
        )  # (length, D / 2)
        positions = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (length, D)
        self.register_buffer("positions", positions, persistent=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, inputs_embeds: Tensor) -> SimpleNamespace:  # (B, L, D)
        x = self.dropout(inputs_embeds + self.positions[: inputs_embeds.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(last_hidden_state=x)  # (B, L, D)


def build_model(arm: common.Arm, num_classes: int, config: Config) -> common.DualHeadModel:
    """A model with random weights, as its arm asks.

    Backbone and classifier are drawn first, so that with one seed they are the same in every arm.
    """
    return common.DualHeadModel(
        SmallTransformer(config),
        config.hidden_size,
        common.ClassificationHead(
            config.hidden_size, config.classifier_size, num_classes, config.dropout
        ),
        lm_head=nn.Linear(config.hidden_size, config.vocabulary_size)
        if arm.needs_lm_head
        else None,
        engram_size=None if arm.prefix == "none" else config.engram_size,
        constant_prefix=arm.prefix == "constant",
        pooling=config.pooling,
    )


def check_config(config: Config) -> None:
    """Raise UserError for settings that cannot be run."""
    check_run_config(config)
    for name, low in (
        ("vocabulary_size", 3),
        ("layers", 1),
        ("hidden_size", 1),
        ("heads", 1),
        ("feed_forward_size", 1),
        ("classifier_size", 1),
    ):
        check_bounds(name, getattr(config, name), low, math.inf)
    check_bounds("engram_size", config.engram_size, 2, math.inf)  # two, for a plane to plot them in
    check_bounds("dropout", config.dropout, 0, 0.99)
    find_pooling(config.pooling)
    if config.hidden_size % (2 * config.heads):
        raise UserError(
            f"--hidden-size is {config.hidden_size}: "
            f"it must be a multiple of twice the {config.heads} heads."
        )


def load_task(config: Config) -> Task:
    """The data set of the settings; movie-review snippets where SST-2 cannot be loaded."""
    task = registry.load_task(config)
    if task is None and config.dataset != "SST-2":
        raise UserError(f"{config.dataset} cannot be loaded: give --data-dir.")
    if task is None:
        print(
            "NOTE: running on the MOVIE-REVIEW SNIPPETS instead. "
            "These are NOT SST-2 results; for those use --data-dir."
        )
        snippets = registry.load_movie_snippets()
        task = limit_task(snippets, config.train_limit, config.eval_limit)
    return task


def main() -> None:
    config = command_line.parse(Config, __doc__, negative_flags=False)
    set_allocator()
    check_config(config)
    task = load_task(config)
    vocabulary = WordVocabulary(task.train.texts, config.vocabulary_size)
    experiment = common.Experiment(
        name="Experiment 1: small transformer",
        results=ROOT / "results",
        task=task,
        encode=vocabulary.encode,
        build_model=lambda arm: build_model(arm, len(task.class_names), config),
    )
    common.run_experiment(experiment, config)


if __name__ == "__main__":
    run_script(main)
