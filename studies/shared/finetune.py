"""Fine-tuning as the studies do it: many short trainings of one backbone, measured as they go."""

import copy
import functools
import gc
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import common
from collapse.config import LanguageModelConfig
from collapse.data.batches import (
    EVALUATION_TOKENS,
    Split,
    collate,
    count_targets,
    encode_rows,
    length_grouped_batches,
    token_budget_batches,
)
from collapse.data.corpus import miniature_documents
from collapse.data.registry import LOADERS
from collapse.data.task import Rows, Task, in_corpus_text, limit_task
from collapse.models.losses import lm_loss_sum
from collapse.models.pretrained import find_model, load_causal_lm, load_tokenizer
from collapse.training.monitor import Measuring, draw_rows, measures
from collapse.training.optimizer import learning_rate_at
from collapse.utils.errors import UserError
from collapse.utils.files import digest_weights

WARMUP_STEPS = 10


@dataclass(frozen=True)
class Recipe:
    """All that the numbers of one training depend on, beside code and machine."""

    model: str  # as --model takes it
    dataset: str  # a name of LOADERS
    arm: str  # as --models takes it
    learning_rate: float
    seed: int  # of adapters, heads and the order of rows
    steps: int
    train_rows: int  # a fixed draw
    letters: bool  # texts as the corpus of the own language models has them
    all_weights: bool = False  # instead of LoRA adapters
    device: str = "cpu"
    max_length: int = 64
    batch_size: int = 16
    schedule: str = "constant"  # after the warm-up
    # Of frozen weights under LoRA adapters; None: by the device, as the experiments choose.
    quantization: str | None = None
    compute_dtype: str | None = None

    def config(self) -> LanguageModelConfig:
        kind = {"quantization": self.quantization, "compute_dtype": self.compute_dtype}
        if self.all_weights:
            kind = {"quantization": "none", "compute_dtype": "float32"}
        return LanguageModelConfig(
            model=self.model,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup_fraction=WARMUP_STEPS / self.steps,
            batch_size=self.batch_size,
            **kind,
        )


@dataclass(frozen=True)
class Data:
    """Rows as token ids; the last three are fixed draws that every training is measured on.

    On the way it is measured on fewer of them, see Measuring.
    """

    classes: int
    train: Split
    validation: Split  # for ranks and accuracy
    measured_train: Split  # of the training rows, for loss and accuracy in evaluation mode
    language: Split  # of the validation rows, for the LM loss


MEASURED_ROWS, MEASURED_TRAIN_ROWS, LANGUAGE_ROWS = 1000, 512, 200


MADE_UP = "made-up"  # data for rehearsals


def made_up_task(data_dir: Path | None) -> Task:
    """Made-up texts; the class tells if a first word's first letter is of the alphabet's half."""
    texts = miniature_documents(count=160, words=12)
    rows = Rows(texts, [int(text[0] < "l") for text in texts])
    half = len(texts) // 2
    parts = rows.take(range(half)), rows.take(range(half, len(texts)))
    return Task(MADE_UP, "", "made up here", ("late", "early"), *parts)


def load_task(dataset: str, data_dir: Path | None) -> Task:
    """A data set of LOADERS, or the made-up one. Raises UserError where it cannot be had."""
    task = (LOADERS | {MADE_UP: made_up_task})[dataset](data_dir)
    if task is None:
        raise UserError(f"{dataset} is not at hand: give --data-dir a folder with a download.")
    return task


def load_data(recipe: Recipe, data_dir: Path | None) -> Data:
    """The recipe's data set as its model's tokens. Raises UserError where rows cannot be had."""
    what = recipe.dataset, recipe.train_rows, recipe.letters, recipe.max_length
    return _load_data(*what, recipe.model, data_dir)


@functools.lru_cache(maxsize=4)
def _load_data(
    dataset: str, train_rows: int, letters: bool, max_length: int, model: str, data_dir: Path | None
) -> Data:
    task = load_task(dataset, data_dir)
    task, encode = limit_task(task, train_rows, MEASURED_ROWS), load_tokenizer(model)
    if letters:
        task = in_corpus_text(task)
    train, validation = (encode_rows(r, encode, max_length) for r in (task.train, task.validation))
    return Data(
        classes=len(task.class_names),
        train=train,
        validation=validation,
        measured_train=draw_rows(train, MEASURED_TRAIN_ROWS),
        language=draw_rows(validation, LANGUAGE_ROWS),
    )


@functools.cache  # a process runs many cells of one model
def digest_of_model(name: str) -> str | None:
    """Digest of the weights of a model in a folder; None of one of the hub."""
    folder = Path(find_model(name))
    return digest_weights(folder) if folder.exists() else None


def build(recipe: Recipe, classes: int) -> tuple[common.DualHeadModel, nn.Linear]:
    """The recipe's model before its first step, drawn from its seed, and its LM head as it is now.

    The second is what `language_kept` is measured under: Model 1 has no LM head of its own.
    """
    gc.collect()  # the model before is gone; its memory is not, while a ring of references is
    torch.manual_seed(recipe.seed)
    arm, config, device = common.find_arm(recipe.arm), recipe.config(), torch.device(recipe.device)
    if not recipe.all_weights:
        model = common.build_language_model(arm, classes, "pooled", config, device)
        return model, model.adapters.get_base_model().get_output_embeddings()
    causal_lm = load_causal_lm(config, device).requires_grad_(True)
    start_head = copy.deepcopy(causal_lm.get_output_embeddings()).requires_grad_(False)
    return common.put_heads_on(causal_lm, arm, classes, "pooled", config), start_head


def batches_of(recipe: Recipe, train: Split) -> Iterator[np.ndarray]:
    """Row numbers of the steps, epoch after epoch; from the seed: the same for every arm."""
    lengths = train.lengths
    for epoch in itertools.count():
        rng = np.random.default_rng([recipe.seed, epoch])
        yield from length_grouped_batches(lengths, recipe.batch_size, rng)


def tune(
    recipe: Recipe,
    data: Data,
    measure_at: Collection[int],
    after_step: Callable[[], None] = lambda: None,
    few_rows_too: bool = False,
) -> list[dict[str, Any]]:
    """Train, and return what was measured: before the first step, after these steps and the last.

    Along the way on fewer rows, see Measuring; with few_rows_too at both ends on these, too, so
    that any two steps can be compared at as many rows: ranks grow with them. The first record and
    the last are of all measured rows. A training that meets a number that is not finite ends
    there: its last record has None for every measure.
    """
    model, start_head = build(recipe, data.classes)
    along_the_way = Measuring(model, data.measured_train, data.validation)

    def few_rows(step: int) -> dict[str, Any]:
        return {"step": step, **along_the_way(), "lm_loss": None}

    records = [{"step": 0, **full_record(model, data, start_head)}]
    if few_rows_too:
        records.append(few_rows(0))
    try:
        for step in steps_of(recipe, trainer_of(recipe, model, data.train)):
            after_step()
            if (step in measure_at and step < recipe.steps) or (
                few_rows_too and step == recipe.steps
            ):
                records.append(few_rows(step))
    except Diverged as error:
        return [*records, {"step": error.step} | dict.fromkeys(records[0].keys() - {"step"})]
    return [*records, {"step": recipe.steps, **full_record(model, data, start_head)}]


@dataclass
class Diverged(Exception):
    """A loss or gradient was not finite; no weight has changed by it."""

    step: int


def steps_of(
    recipe: Recipe, trainer: common.Trainer, batches: Iterator[np.ndarray] | None = None
) -> Iterator[int]:
    """Train; after each step its number, from 1 on. Raises Diverged.

    batches: row numbers of the steps, by default those of batches_of.
    """
    config, batches = recipe.config(), batches or batches_of(recipe, trainer.split)
    for step in range(1, recipe.steps + 1):
        trainer.model.train()
        try:
            trainer.step(next(batches), learning_rate_at(step - 1, recipe.steps, config))
        except FloatingPointError:
            raise Diverged(step) from None
        yield step


def trainer_of(recipe: Recipe, model: common.DualHeadModel, train: Split) -> common.Trainer:
    if plan := model.memory_plan:
        plan.unpack_what_fits(train, recipe.batch_size)
    return common.make_trainer(model, train, recipe.config(), common.find_arm(recipe.arm))


def full_record(model: nn.Module, data: Data, start_head: nn.Linear) -> dict[str, float | None]:
    """`measures` on all measured rows, and the LM loss under the LM head of the start."""
    model.eval()
    record = measures(model, data.measured_train, data.validation)
    loss = lm_loss(model, data.language, start_head)
    return record | {"lm_loss": loss if math.isfinite(loss) else None}


@torch.inference_mode()
def lm_loss(model: nn.Module, split: Split, lm_head: nn.Linear) -> float:
    """Mean next-token loss in nats over the split's targets, under that LM head."""
    total, device = 0.0, lm_head.weight.device
    for rows in token_budget_batches(split.lengths, EVALUATION_TOKENS[device.type]):
        batch = collate(split, rows, device)
        total += lm_loss_sum(model(batch.input_ids, batch.text_mask).hidden, batch, lm_head).item()
    return total / count_targets(split, range(len(split.labels)))
