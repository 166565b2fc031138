"""One causal backbone under two heads and an engram: training, evaluation, a study's run.

Shapes in comments: B rows of a batch, L tokens of its longest row, D hidden size, C classes,
E engram size, T target tokens, V vocabulary, N rows of a split, S seeds.
"""

import contextlib
import copy
import dataclasses
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from collapse.arms import Arm, chosen_arms, find_arm
from collapse.config import (
    DEFAULT_MODEL,
    STANDIN_MODEL,
    LanguageModelConfig,
    RunConfig,
    check_config,
    fingerprint,
)
from collapse.data.batches import (
    Batch,
    Split,
    collate,
    count_targets,
    encode_rows,
)
from collapse.data.registry import load_task, preparation
from collapse.data.task import Task, fixed_draw
from collapse.measures.engrams import analyse_engrams
from collapse.measures.layers import find_pooling
from collapse.measures.predictions import measure_rows
from collapse.measures.rank import rank_metrics
from collapse.models.losses import combined_loss, kl_from_start_sum, lm_loss_sum
from collapse.models.memory import DOES_NOT_FIT, MemoryPlan, count_parameters
from collapse.models.pretrained import (
    add_lora,
    check_lm_loss,
    fill_in_for,
    find_model,
    load_causal_lm,
    load_tokenizer,
    resolve_model,
    whole_tokenizer,
    without_mask,
)
from collapse.report import comparisons
from collapse.runs import engine, publishing, sharing
from collapse.runs.announcement import announce_run, check_device_for
from collapse.runs.classifier import TextClassifier, base_model_of, settings_beside
from collapse.runs.folder import RunFolder
from collapse.runs.progress import Job, Progress
from collapse.runs.tracking import load_tracker, tracked
from collapse.training.checkpoints import load_weights
from collapse.training.evaluation import Evaluation, evaluate
from collapse.training.loop import History, StepSums, TrainingLoop, Validation
from collapse.training.monitor import draw_rows, measures
from collapse.training.optimizer import SharedScaleAdamW
from collapse.utils.device import pick_device, set_threads
from collapse.utils.errors import UserError, is_out_of_memory
from collapse.utils.files import digest_weights, read_json, write_json, write_tensors
from collapse.utils.provenance import environment, git_commit

# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


class ClassificationHead(nn.Module):
    """Linear -> GELU -> Dropout -> Linear, in fp32; the GELU's output is its intermediate."""

    def __init__(
        self, input_size: int, intermediate_size: int, num_classes: int, dropout: float = 0.1
    ):
        super().__init__()
        self.inner = nn.Linear(input_size, intermediate_size)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(intermediate_size, num_classes)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """pooled (B, D) -> logits (B, C), intermediate (B, intermediate_size)."""
        intermediate = F.gelu(self.inner(pooled))
        return self.outer(self.dropout(intermediate)), intermediate


class EngramCompressor(nn.Module):
    """One input's summary squeezed into a small vector in (-1, 1): the engram."""

    def __init__(self, input_size: int, engram_size: int):
        super().__init__()
        self.linear = nn.Linear(input_size, engram_size)

    def forward(self, summary: Tensor) -> Tensor:  # (B, input_size) -> (B, E)
        return torch.tanh(self.linear(summary))


class EngramProjector(nn.Module):
    """An engram as one embedding that stands before the next input's tokens."""

    def __init__(self, engram_size: int, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(engram_size, hidden_size)

    def forward(self, engram: Tensor) -> Tensor:  # (B, E) -> (B, 1, D)
        return self.linear(engram).unsqueeze(1)


@dataclass
class ModelOutput:
    """What DualHeadModel makes of a batch."""

    hidden: Tensor  # (B, L, D) last hidden states of the tokens, the prefix's left out
    pooled: Tensor  # (B, D) fp32, what the classifier reads
    intermediate: Tensor  # (B, classifier's inner size)
    logits: Tensor  # (B, C)
    engram: Tensor | None  # (B, E), model 3 only


class DualHeadModel(nn.Module):
    """A causal backbone under a classification head and, as the arm has them, LM head and engram.

    The backbone is called as Hugging Face's are: `get_input_embeddings()` gives the embedding, and
    `backbone(inputs_embeds=(B, L, D)).last_hidden_state` is (B, L, D). It must be causal. That is
    also why it needs no attention mask here: rows are padded on the right, where no text token
    looks.

    Args:
        backbone: see above; `model.model` of a Hugging Face causal LM fits.
        hidden_size: D.
        classifier: head on the pooled text tokens.
        lm_head: D -> V, or None for model 1.
        engram_size: E for model 3, None for models 1 and 2.
        engram_source: what the compressor reads, the pooled hidden state or the classifier's
            intermediate.
        constant_prefix: no compressor, so that every prefix is that of the zero engram: one learned
            embedding, which starts as model 3's.
        adapters: the peft.PeftModel around the backbone's causal LM, where adapters alone train.
        pooling: a name of POOLINGS in collapse/measures/layers.py.

    `memory_plan`, when it is set, decides which of the backbone's layers recompute.
    """

    memory_plan: MemoryPlan | None = None

    def __init__(
        self,
        backbone: nn.Module,
        hidden_size: int,
        classifier: ClassificationHead,
        lm_head: nn.Linear | None = None,
        engram_size: int | None = None,
        engram_source: Literal["pooled", "intermediate"] = "pooled",
        constant_prefix: bool = False,
        adapters: Any = None,
        pooling: str = "mean",
    ):
        super().__init__()
        self.pool = find_pooling(pooling)
        self.backbone, self.classifier, self.lm_head = backbone, classifier, lm_head
        self.engram_source = engram_source
        self.__dict__["adapters"] = adapters  # no submodule: it holds the backbone once more
        self.compressor = self.projector = None
        if engram_size is not None:
            inner_size = classifier.inner.out_features
            source_size = hidden_size if engram_source == "pooled" else inner_size
            self.compressor = EngramCompressor(source_size, engram_size)
            self.projector = EngramProjector(engram_size, hidden_size)
        if constant_prefix:
            self.compressor = None
            self.projector.linear.weight.requires_grad_(False)  # its input is always zero

    def forward(
        self, input_ids: Tensor, text_mask: Tensor, engram: Tensor | None = None
    ) -> ModelOutput:
        """input_ids, text_mask (B, L) as in Batch; engram (B, E), None: the zero engram."""
        embeddings = self.backbone.get_input_embeddings()(input_ids)  # (B, L, D)
        if self.projector is not None:
            if engram is None:
                size = len(input_ids), self.projector.linear.in_features
                engram = embeddings.new_zeros(size, dtype=torch.float32)
            prefix = self.projector(engram).to(embeddings.dtype)
            embeddings = torch.cat([prefix, embeddings], dim=1)  # (B, 1 + L, D)
        hidden = self.run_backbone(embeddings)
        hidden = hidden[:, -input_ids.shape[1] :]  # (B, L, D): the prefix does not predict
        pooled = self.pool(hidden, text_mask)
        logits, intermediate = self.classifier(pooled)
        new_engram = None
        if self.compressor is not None:
            new_engram = self.compressor(self.engram_input(pooled, intermediate))
        return ModelOutput(hidden, pooled, intermediate, logits, new_engram)

    def run_backbone(self, embeddings: Tensor) -> Tensor:
        """Last hidden states (B, L, D) of embeddings (B, L, D)."""
        output = self.backbone(inputs_embeds=embeddings, **without_mask(self.backbone))
        return output.last_hidden_state

    def engram_input(self, pooled, intermediate):
        """What the compressor reads of the two, tensors or arrays."""
        return pooled if self.engram_source == "pooled" else intermediate

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def wrap_causal_lm(
    language_model: Any,
    arm: Arm,
    num_classes: int,
    engram_source: Literal["pooled", "intermediate"],
    config: LanguageModelConfig,
) -> DualHeadModel:
    """An arm's model with fresh heads on a causal LM or on what add_lora gave, on its device.

    What is not frozen trains.
    """
    adapters = language_model if hasattr(language_model, "get_base_model") else None
    causal_lm = adapters.get_base_model() if adapters else language_model
    hidden_size = causal_lm.config.hidden_size
    return DualHeadModel(
        causal_lm.base_model,
        hidden_size,
        ClassificationHead(hidden_size, config.classifier_size, num_classes),
        lm_head=causal_lm.get_output_embeddings() if arm.needs_lm_head else None,
        engram_size=None if arm.prefix == "none" else config.engram_size,
        engram_source=engram_source,
        constant_prefix=arm.prefix == "constant",
        adapters=adapters,
        pooling=config.pooling,
    ).to(causal_lm.device)


def build_language_model(
    arm: Arm,
    num_classes: int,
    engram_source: Literal["pooled", "intermediate"],
    config: LanguageModelConfig,
    device: torch.device,
) -> DualHeadModel:
    """An arm's model on a pretrained causal LM, ready to train.

    A seed gives all arms the same adapters and classifier.
    """
    causal_lm = load_causal_lm(config, device)
    if arm.needs_lm_head:
        check_lm_loss(causal_lm, config.model)
    adapters = add_lora(causal_lm, config)
    model = wrap_causal_lm(adapters, arm, num_classes, engram_source, config)
    model.memory_plan = MemoryPlan(model, config.gradient_checkpointing)
    return model


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


class Trainer:
    """Optimizer steps of one arm; knows nothing of epochs or files.

    Made before a checkpoint is restored: what anchors hold to is the model as it is now.
    """

    smallest_micro_batch = 1

    def __init__(self, model: DualHeadModel, split: Split, config: RunConfig, arm: Arm):
        self.model, self.split, self.config, self.arm = model, split, config, arm
        self.weight = arm.weight_in(config)
        self.device = next(model.parameters()).device
        # Rows in one backward pass; halved when memory runs out.
        self.micro_batch_size = config.batch_size
        self.parameters = list(model.trainable().values())
        settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        if arm.shared_scale:
            self.optimizer = SharedScaleAdamW(self.parameters, **settings)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, **settings, fused=True)
        # shuffled-lm: row -> its targets in this step
        self.shuffled_targets: dict[int, Tensor] = {}
        # Parameters whose LM gradient is computed separately: shared-scale, controls of model 3.
        self.separate_lm_parameters = self.parameters if arm.shared_scale else []
        if arm.compressor != "both":
            self.separate_lm_parameters = list(model.compressor.parameters())
        self.lm_gradients: list[Tensor | None] = []  # of those
        self.start_model = None  # kl without adapters: the model before its first step
        if arm.anchor == "kl" and model.adapters is None:
            self.start_model = copy.deepcopy(model).requires_grad_(False).eval()
        self.start_weights: dict[str, Tensor] = {}  # l2-start
        if arm.anchor == "l2":
            trained = model.trainable().items()
            backbone = ((name, p) for name, p in trained if name.startswith("backbone."))
            self.start_weights = {name: p.detach().clone() for name, p in backbone}

    def step(self, rows: np.ndarray, learning_rate: float) -> StepSums:
        """One optimizer step.

        Raises FloatingPointError, before any weight changes, when a loss or gradient is not finite.
        """
        while True:
            self.optimizer.zero_grad()
            try:
                sums = self.accumulate_gradients(rows)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self.use_less_memory()  # outside of `except`, where the failed pass is no longer held
        sums.grad_norm = sums.max_grad_norm = norm = self.clip()
        if not math.isfinite(sums.cls_loss + sums.lm_loss + sums.anchor_loss + norm):
            losses = f"{sums.cls_loss} and, LM, {sums.lm_loss}"
            raise FloatingPointError(f"sums of losses {losses}, gradient norm {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return sums

    def accumulate_gradients(self, rows: np.ndarray) -> StepSums:
        """Gradients of the mean loss over all rows and targets of the step, however it is cut."""
        targets = count_targets(self.split, rows) if self.arm.needs_lm_head else 0
        sums = StepSums(rows=len(rows), targets=targets, steps=1)
        if self.arm.lm == "shuffled":
            self.shuffle_targets(rows)
        self.lm_gradients = [None] * len(self.separate_lm_parameters)
        parts = []  # read after the last backward pass: each read waits for the GPU
        for sequence in self.sequences(rows):
            loss, lm_loss, numbers = self.losses(sequence, sums)
            if self.arm.shared_scale or self.arm.compressor == "lm":
                self.add_lm_gradients(lm_loss)
            loss.backward()
            parts += numbers
        if self.arm.compressor != "both":  # the LM's alone, or none: then no step moves it
            for parameter, gradient in zip(
                self.separate_lm_parameters, self.lm_gradients, strict=True
            ):
                parameter.grad = gradient
        columns = zip(*torch.stack(parts).tolist(), strict=True)
        sums.cls_loss, other_loss, correct = (sum(column) for column in columns)
        sums.correct = int(correct)
        if self.arm.anchors_tokens:
            sums.anchor_loss = self.weight * other_loss / max(1, targets)
        else:
            sums.lm_loss = other_loss
        if self.arm.anchor == "l2":
            sums.anchor_loss = self.add_l2_penalty()
        return sums

    def sequences(self, rows: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """The step's rows in pieces that each get a backward pass.

        The parts of a piece run one after another.
        """
        size = self.micro_batch_size
        return [(rows[i : i + size],) for i in range(0, len(rows), size)]

    def losses(
        self, sequence: tuple[np.ndarray, ...], sums: StepSums
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """For one piece: the loss to call backward on, weight x LM loss, and sums of each part.

        The sums: classification loss, the other loss, right rows.
        """
        cls_total = other_total = torch.zeros((), device=self.device)
        engram, numbers = None, []
        batches = [self.collate(part) for part in sequence]
        if plan := self.model.memory_plan:
            prefixes = plan.prefix_tokens * sum(len(part) for part in sequence)
            plan.fit(sum(batch.input_ids.numel() for batch in batches) + prefixes)
        for part, batch in zip(sequence, batches, strict=True):
            # Model 3's engrams are not detached: this part's losses train the compressor.
            carried = None if engram is None else engram[: len(part)]
            output = self.model(batch.input_ids, batch.text_mask, carried)
            cls_loss = F.cross_entropy(output.logits, batch.labels, reduction="sum")
            other = self.other_loss_sum(output, batch, part)
            cls_total = cls_total + cls_loss / sums.rows
            other_total = other_total + other / max(1, sums.targets)
            engram = output.engram
            correct = (output.logits.argmax(1) == batch.labels).sum()
            numbers.append(torch.stack([cls_loss.detach(), other.detach(), correct]))
        if self.arm.shared_scale:
            loss = (1 - self.weight) * cls_total  # its LM loss scales the steps alone
        else:
            weighted = other_total if self.arm.needs_lm_head else None
            loss = combined_loss(cls_total, weighted, self.weight)
        return loss, self.weight * other_total, numbers

    def other_loss_sum(self, output: ModelOutput, batch: Batch, part: np.ndarray) -> Tensor:
        """What is minimized beside the classification loss, summed over targets; 0: nothing."""
        if self.arm.lm == "true":
            return self.lm_loss_sum(output.hidden, batch)
        if self.arm.lm == "shuffled":
            targets = torch.cat([self.shuffled_targets[row] for row in part]).to(self.device)
            return self.lm_loss_sum(output.hidden, batch, targets)
        if self.arm.anchor == "kl":
            start_hidden, start_head = self.start_of(batch)
            return kl_from_start_sum(
                output.hidden, batch, self.model.lm_head, start_hidden, start_head
            )
        return torch.zeros((), device=self.device)

    def collate(self, rows: np.ndarray) -> Batch:
        return collate(self.split, rows, self.device)

    def lm_loss_sum(self, hidden: Tensor, batch: Batch, targets: Tensor | None = None) -> Tensor:
        return lm_loss_sum(hidden, batch, self.model.lm_head, targets)

    def shuffle_targets(self, rows: np.ndarray) -> None:
        """Give the LM targets of all rows of the step to their positions at random."""
        own = [self.split.token_ids[row][1:] for row in rows]
        tokens = torch.cat(own)
        dealt = tokens[torch.randperm(len(tokens))].split([len(ids) for ids in own])
        self.shuffled_targets = dict(zip(rows, dealt, strict=True))

    @torch.no_grad()
    def start_of(self, batch: Batch) -> tuple[Tensor, nn.Linear]:
        """Hidden states (B, L, D) of the model as it began, and its LM head."""
        if self.start_model is not None:
            hidden = self.start_model(batch.input_ids, batch.text_mask).hidden
            return hidden, self.start_model.lm_head
        was_training = self.model.training
        self.model.eval()
        try:
            with self.model.adapters.disable_adapter():
                hidden = self.model(batch.input_ids, batch.text_mask).hidden
        finally:  # the step is taken again where memory ran out
            self.model.train(was_training)
        return hidden, self.model.lm_head

    def add_lm_gradients(self, lm_loss: Tensor) -> None:
        gradients = torch.autograd.grad(
            lm_loss, self.separate_lm_parameters, retain_graph=True, allow_unused=True
        )
        self.lm_gradients = [_sum(*two) for two in zip(self.lm_gradients, gradients, strict=True)]

    def add_l2_penalty(self) -> float:
        """Add the gradient of weight / 2 times the squared distance to the start; returns that."""
        distance, trained = 0.0, self.model.trainable()
        for name, start in self.start_weights.items():
            away = trained[name].detach() - start
            trained[name].grad.add_(away, alpha=self.weight)
            distance += away.square().sum()
        return 0.5 * self.weight * float(distance)

    def clip(self) -> float:
        """Scale gradients down to the longest that the settings allow; returns their norm before.

        shared-scale: norm and scale are those of both gradients together, as in model 2.
        """
        gradients = [p.grad for p in self.parameters]
        if self.arm.shared_scale:
            gradients = [_sum(*two) for two in zip(gradients, self.lm_gradients, strict=True)]
        norm = nn.utils.get_total_norm([g for g in gradients if g is not None])
        if self.arm.shared_scale:
            for parameter, gradient in zip(self.parameters, self.lm_gradients, strict=True):
                if parameter.grad is None:  # an LM head that trains: the LM's alone, as in model 2
                    parameter.grad = gradient
            longest = self.config.clip_norm or math.inf
            scale = torch.clamp(longest / (norm + 1e-6), max=1.0)
            self.optimizer.scale_gradients = [None if g is None else g * scale for g in gradients]
        if self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        return norm.item()

    def use_less_memory(self) -> None:
        """After an out-of-memory error: shrink the memory plan, or else halve micro-batches.

        Raises UserError when neither is left.
        """
        plan = self.model.memory_plan
        if plan and plan.shrink():
            count = plan.layers_to_recompute(plan.tokens)
            change = f"{plan.unpacked} layers unpacked, {count} recomputed"
        elif self.micro_batch_size <= self.smallest_micro_batch:
            raise UserError(DOES_NOT_FIT)
        else:
            self.micro_batch_size //= 2
            change = f"micro-batches of {self.micro_batch_size} rows"
        tqdm.write(f"out of GPU memory: {change} from here, the same step")
        torch.cuda.empty_cache()

    def record(self, sums: StepSums) -> dict[str, float | None]:
        """Means, as results.json has them.

        `loss` is what was minimized; of shared-scale, which minimizes none, the classification's.
        """
        arm, cls_loss = self.arm, sums.cls_loss / sums.rows
        lm_loss = sums.lm_loss / max(1, sums.targets) if arm.lm != "none" else None
        anchor, shuffled = sums.anchor_loss / sums.steps, arm.lm == "shuffled"
        kept = 1 - self.weight if arm.anchors_tokens else 1.0
        return {
            "loss": kept * arm.loss(cls_loss, lm_loss, self.config) + anchor,
            "cls_loss": cls_loss,
            "lm_loss": None if shuffled else lm_loss,
            **({"shuffled_lm_loss": lm_loss} if shuffled else {}),
            **({"anchor_loss": anchor} if arm.anchor != "none" else {}),
            "accuracy": sums.correct / sums.rows,
            "grad_norm": sums.grad_norm / sums.steps,
            "max_grad_norm": sums.max_grad_norm,
        }


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class SequentialPairTrainer(Trainer):
    """Model 3: a step's first half runs with a zero engram, its engrams prefix the second half.

    Row by row: the engram of the first half's row i stands before row i of the second.
    """

    smallest_micro_batch = 2  # a pair

    def sequences(self, rows: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        half, size = (len(rows) + 1) // 2, max(1, self.micro_batch_size // 2)
        first, second = rows[:half], rows[half:]
        pieces = [(first[i : i + size], second[i : i + size]) for i in range(0, half, size)]
        return [tuple(part for part in piece if len(part)) for piece in pieces]


def make_trainer(model: DualHeadModel, split: Split, config: RunConfig, arm: Arm) -> Trainer:
    kind = SequentialPairTrainer if arm.prefix == "engram" else Trainer
    return kind(model, split, config, arm)


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


RANK_ROWS = 2000  # validation rows, a fixed draw, whose features give the rank after each epoch


def validate(trainer: Trainer, split: Split) -> Validation:
    """Evaluate the model on the validation split. A new measure of every epoch goes into `record`.

    Raises FloatingPointError when a state or loss is not finite.
    """
    cold = evaluate(trainer.model, split)
    losses = cold.cls_loss + (cold.lm_loss or 0)
    if not (np.isfinite(cold.pooled).all() and math.isfinite(losses)):
        raise FloatingPointError(f"validation loss {cold.cls_loss}, LM {cold.lm_loss}")
    features = cold.pooled[fixed_draw(len(cold.pooled), RANK_ROWS)]
    record = cold.record(trainer.arm, trainer.config)
    record["effective_rank"] = rank_metrics(features)["effective_rank"]
    correct = {"cold": cold.correct()}
    if cold.engrams is not None and trainer.optimizer.state:  # some training to carry
        carried = evaluate(trainer.model, split, carried_engrams(cold.engrams))
        record["carried"] = carried.record(trainer.arm, trainer.config)
        correct["carried"] = carried.correct()
    return Validation(record, correct, measure_rows(cold.logits, cold.labels), cold)


def carried_engrams(engrams: np.ndarray) -> np.ndarray:
    """(N, E): for each row the cold engram of the row before it, in a fixed order that is a ring.

    One step, as in training: the engram that is carried was itself made with the zero engram.
    """
    order = np.random.default_rng(0).permutation(len(engrams))
    carried = np.empty_like(engrams)
    carried[order] = engrams[np.roll(order, 1)]
    return carried


def untrained_engrams(model: DualHeadModel, evaluation: Evaluation, seed: int) -> np.ndarray:
    """(N, E): what a compressor fresh from its initialization makes of the trained backbone."""
    summary = model.engram_input(evaluation.pooled, evaluation.intermediate)  # (N, D) or (N, inner)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        compressor = EngramCompressor(summary.shape[1], evaluation.engrams.shape[1])
        return compressor(torch.from_numpy(summary)).numpy()


# --------------------------------------------------------------------------------------------------
# One run of a study
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """What differs between the scripts."""

    name: str  # as in titles: "Experiment 1: small transformer"
    results: Path  # folder for the default data set
    task: Task
    encode: Callable[[list[str]], list[list[int]]]
    build_model: Callable[[Arm], DualHeadModel]  # a new one, drawn from torch's generator
    # Settings of the study that no command line gives.
    details: dict[str, Any] = field(default_factory=dict)
    other: Path | None = None  # folder of the experiment on the other data set, to compare with

    def folder(self, config: RunConfig) -> Path:
        return config.output_dir or self.results / self.task.folder

    def title(self) -> str:
        return f"{self.name} on {self.task.title()}"


def run_experiment(experiment: Experiment, config: RunConfig) -> dict:
    """Train every arm with every seed, evaluate, analyse engrams, publish results.json and plots.

    Trainings that are finished in the run folder are kept, an unfinished one goes on; any number of
    commands may share the folder. Returns what results.json holds.
    """
    arms, device, task = chosen_arms(config), training_device(config), experiment.task
    set_threads(config.threads)
    load_tracker(config.log_to)  # now: one that is not installed costs no training
    settings = {
        "config": fingerprint(config) | experiment.details,
        "data": task.summary(),
    }
    path = experiment.folder(config)
    splits = encode_task(experiment, config)  # now: a text that has no ids leaves no folder
    folder = RunFolder(path, settings, config.fresh)
    print(
        f"{experiment.title()}\ndata: {task.source}\nresults: {path}\ndevice: {device}", flush=True
    )
    run = Run(experiment, dataclasses.replace(config), device, folder, settings)
    run.splits = splits
    jobs = [run.job(arm, seed) for seed in dict.fromkeys(config.seeds) for arm in arms]
    left = sum(not job.finished for job in jobs)
    workers, cluster = engine.plan_workers(config, device, left)
    run.share = engine.share_of_device(workers, cluster)
    try:
        engine.run_all(jobs, run, workers, cluster)
    except UserError:  # some failed; figures show the others
        with contextlib.suppress(UserError, OSError):  # the training's error is reported, not these
            if folder.finished():
                run.publish(at_end=True)
        raise
    results = run.publish(at_end=True)  # with what other commands finished in this folder
    print(comparisons.summary_table(results), flush=True)
    if elsewhere := folder.trained_elsewhere():
        names = [f"{key} seed {seed}" for key, runs in elsewhere.items() for seed in runs]
        print(f"published before and not trained here: {', '.join(names)}", flush=True)
    if "cross_dataset" in results:
        print(comparisons.cross_dataset_table(results), flush=True)
    if folder.published:
        here = {"models": folder.finished()}
        print(comparisons.reproduction_table(folder.published, here), flush=True)
    return results


def encode_task(experiment: Experiment, config: RunConfig) -> tuple[Split, Split]:
    """Training and validation rows as token ids."""
    rows = experiment.task.train, experiment.task.validation
    return tuple(encode_rows(split, experiment.encode, config.max_length) for split in rows)


def training_device(config: RunConfig) -> torch.device:
    """Where trainings compute; the machine that hands them to a cluster may lack the device."""
    if config.cluster == "none":
        return pick_device(config.device)
    if config.device == "auto":
        raise UserError("--cluster needs --device cpu or --device cuda: other machines compute.")
    return torch.device(config.device)


@dataclass
class Run:
    """Trains one model of a study and publishes the study; pickled for worker processes."""

    experiment: Experiment
    config: RunConfig
    device: torch.device
    folder: RunFolder
    settings: dict
    share: float = 1.0  # of the device's free memory, for others run beside

    def __post_init__(self) -> None:
        self.commit = git_commit()  # now: the code may be edited while a long run goes on

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "splits"}

    @cached_property
    def splits(self) -> tuple[Split, Split]:
        return encode_task(self.experiment, self.config)

    def job(self, arm: Arm, seed: int) -> Job:
        config = arm.config_in(self.config)
        steps = math.ceil(len(self.experiment.task.train) / config.batch_size)
        return Job(
            name=f"{arm.label} seed {seed}",
            folder=self.folder.training(arm.name, seed),
            steps=config.epochs * steps,
            cost=arm.cost,
            evaluations=1 + config.epochs,
            evaluation_cost=arm.cost * EVALUATION_COST * len(self.experiment.task.validation),
        )

    def __call__(self, job: Job, progress: Progress) -> None:
        """Train one model from start to metrics, and publish; nothing of it stays on the device."""
        gc.collect()  # frees the previous model, which reference cycles keep alive
        set_threads(self.config.threads)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.folder.check()
        name, _, seed = job.folder.name.rpartition("-seed")
        arm, seed = find_arm(name), int(seed)
        config = arm.config_in(self.config)
        torch.manual_seed(seed)
        train, validation = self.splits
        model = self.experiment.build_model(arm).to(self.device)
        trainer = make_trainer(model, train, config, arm)
        if plan := model.memory_plan:
            plan.take_share(self.share)
            count = count_parameters(model)
            plan.unpack_what_fits(train, config.batch_size)
            trained = f"{count['trainable']:,} of {count['total']:,} parameters train"
            progress.say(f"{job.name}: {trained}\n{job.name}: {plan.describe()}")
        settings = {**self.folder.settings["config"], "arm": arm.name, "seed": seed}
        title = self.experiment.title()
        watched = draw_rows(train), draw_rows(validation, WATCHED_ROWS)
        with tracked(config.log_to, job.folder, job.name, title, settings) as track:
            loop = TrainingLoop(
                label=job.name,
                trainer=trainer,
                validate=partial(validate, trainer, validation),
                measure=partial(measures, model, *watched),
                config=config,
                seed=seed,
                folder=job.folder,
                progress=progress,
                track=track,
            )
            history, evaluation = loop.run()
        metrics = self.metrics(trainer.model, history)
        if evaluation.engrams is not None:
            metrics |= engram_analysis(trainer.model, evaluation, seed, job.folder)
        here = environment(self.device, self.commit)
        write_json(job.folder / "metrics.json", {**metrics, **here})
        loop.checkpoint.unlink(missing_ok=True)
        self.publish(at_end=False)

    def metrics(self, model: DualHeadModel, history: History) -> dict[str, Any]:
        """What results.json holds of one training. A new measure of its end goes here."""
        best, on_gpu = history.best_epoch(), self.device.type == "cuda"
        return {
            "parameters": count_parameters(model),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            "initial": history.initial,
            "train": history.train,
            "val": history.val,
            "best": {"epoch": best, "accuracy": history.val[best - 1]["accuracy"]},
            "final": {"epoch": history.epoch, "accuracy": history.val[-1]["accuracy"]},
            "correct": {
                f"{kind}_{name}": rows[epoch - 1]
                for name, rows in history.correct.items()
                for kind, epoch in (("best", best), ("final", history.epoch))
            },
            "measured": history.measured,
            "resumed": history.resumed,
            "seconds": history.seconds,
        }

    def publish(self, at_end: bool) -> dict:
        """Write results.json and what else publishing.publish does, from all finished trainings."""
        experiment = self.experiment
        here = environment(self.device, self.commit)
        head = {"experiment": experiment.name, "settings": self.settings, **here}
        title, classes = experiment.title(), experiment.task.class_names
        return publishing.publish(self.folder, head, title, classes, experiment.other, at_end)


WATCHED_ROWS = 1000  # validation rows, a fixed draw, that --measure-every measures
EVALUATION_COST = 1 / 200  # of a validation row, in training steps: a guess


def engram_analysis(
    model: DualHeadModel, evaluation: Evaluation, seed: int, folder: Path
) -> dict[str, dict]:
    """Clusters and cosines of the last epoch's engrams; keeps the engrams for the plot."""
    untrained, labels = untrained_engrams(model, evaluation, seed), evaluation.labels
    arrays = {"engrams": evaluation.engrams, "untrained": untrained, "labels": labels}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    write_tensors(folder / "engrams.safetensors", tensors, {})
    classes = evaluation.logits.shape[1]
    return analyse_engrams(evaluation.engrams, untrained, labels, classes, seed)


def run_language_model_experiment(
    name: str,
    results: Path,
    other: Path | None,
    engram_source: Literal["pooled", "intermediate"],
    config: LanguageModelConfig,
) -> dict:
    """run_experiment on a pretrained causal LM.

    Another model than the default one has subfolders of `results` and `other`.
    """
    device = training_device(config)
    config = fill_in_for(device, config)
    check_config(config)
    chosen_arms(config)  # now: a wrong name costs no download
    find_pooling(config.pooling)
    check_device_for(config.model, device, config.compute_dtype)
    task = load_task(config)
    if task is None:
        raise UserError(
            "the data is neither in the Hugging Face cache nor on the hub: "
            "give --data-dir a folder with a download."
        )
    settings, name_in_results, identity = resolve_model(config, partial(announce_run, task, device))
    packed = settings.quantization  # by us
    short_name, details = Path(name_in_results).name, {"engram_source": engram_source, **identity}
    subfolder = "" if config.model == DEFAULT_MODEL else short_name
    classes = len(task.class_names)
    experiment = Experiment(
        name=f"{name}: {short_name}, LoRA" + (" on NF4" if packed == "nf4" else ""),
        results=results / subfolder,
        task=task,
        encode=load_tokenizer(settings.model, settings.revision),
        build_model=lambda arm: build_language_model(arm, classes, engram_source, settings, device),
        details=details,
        other=other and other / subfolder,
    )
    config = dataclasses.replace(config, model=name_in_results, quantization=packed)
    if config.push_to_hub is None:
        return run_experiment(experiment, config)
    repository = sharing.open_repository(config.push_to_hub)
    results = run_experiment(experiment, config)
    sharing.push(experiment.folder(config), repository)
    return results


# --------------------------------------------------------------------------------------------------
# Loading trained models
# --------------------------------------------------------------------------------------------------


def language_model_of(
    stored: dict, adapter: Path, classes: int, device: torch.device, model: str | None = None
) -> tuple[LanguageModelConfig, Callable, Callable[[Arm], DualHeadModel]]:
    """Settings, tokenizer, and what wraps one copy of a pretrained model for an arm.

    model: where the pretrained model is now. Raises UserError where it is not, or is another.
    """
    config = known_settings(LanguageModelConfig, stored)
    config.revision = stored.get("model_commit")  # None where results are older, or of a folder
    if device.type == "cpu" and config.model == DEFAULT_MODEL:
        raise UserError(f"{config.model} needs a CUDA GPU, and this would run on the CPU.")
    if model is not None:
        config.model, config.revision = str(Path(model).expanduser()), None
    elif not ("/" in config.model or config.revision or config.model == STANDIN_MODEL):
        config.model = base_model_of(adapter)  # a folder: results keep its name alone
    encode = load_tokenizer(config.model, config.revision)
    if stored.get("model_sha256") not in (None, digest_weights(find_model(config.model))):
        raise UserError(f"{config.model} holds other weights than the models were trained on.")
    adapters = add_lora(load_causal_lm(config, device), config)

    def build(arm: Arm) -> DualHeadModel:
        model = wrap_causal_lm(adapters, arm, classes, stored["engram_source"], config)
        model.lm_head = adapters.get_base_model().get_output_embeddings()
        return model

    return config, encode, build


def known_settings(config_class: type, stored: dict) -> Any:
    names = [field.name for field in dataclasses.fields(config_class)]
    return config_class(**{name: stored[name] for name in names if name in stored})


def load_classifier(
    folder: str | Path,
    weights: Literal["final", "best"] = "final",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    model: str | Path | None = None,
) -> TextClassifier:
    """The trained classifier of a training's folder, results_.../state/MODEL-seedN.

    model: where the pretrained model lies now, if it has moved. Raises UserError for a folder
    without a finished training of such a model.
    """
    folder = Path(folder).expanduser().resolve()  # "." has no name of its own
    settings = read_json(settings_beside(folder, weights))
    stored, class_names = settings["config"], tuple(settings["data"]["class_names"])
    if "model" not in stored:
        raise UserError(f"{folder} is of the small transformer: give a pretrained model's folder.")
    adapter, arm = folder / f"{weights}-adapter", find_arm(folder.name.rpartition("-seed")[0])
    classes, where = len(class_names), pick_device(device)
    config, _, build = language_model_of(stored, adapter, classes, where, model)
    model = build(arm)
    load_weights(folder, weights, model)
    model.eval()
    model.lm_head = None  # nobody asks for an LM loss here
    tokenizer = whole_tokenizer(config.model, config.revision)
    prepare = preparation(settings["data"])
    return TextClassifier(model, tokenizer, class_names, config.max_length, evaluate, prepare)
