"""A small causal language model, pretrained from its seed: the same weights also after a kill."""

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from collapse.config import RunConfig
from collapse.data.corpus import BLOCK_LENGTH
from collapse.models.losses import LinearCrossEntropy
from collapse.runs.progress import Progress
from collapse.training.checkpoints import optimizer_tensors, restore_optimizer
from collapse.training.steps import Step, steps
from collapse.utils.errors import UserError
from collapse.utils.files import digest_weights, read_json, read_tensors, write_json, write_tensors

CHECKPOINT_SECONDS = 60  # a kill costs at most this much work
EVALUATION_BLOCKS = 64  # in a forward pass without gradients
HEAD_SIZE = 32  # of an attention head
# Of AdamW. With them, the start of `build` and a rate above 3e-3, width 128 ends 0.11 nats lower.
BETAS = (0.8, 0.97)
STEP_COST = 4.0  # of a step without the model's own size, in units of 1e6 multiplications a token


@dataclass(frozen=True)
class Recipe:
    """All that the weights depend on, beside the tokens."""

    width: int = 128
    layers: int = 2
    epochs: int = 3
    seed: int = 0
    weight_decay: float = 0.1  # of matrices; norms' gains have none
    learning_rate: float = 4.5e-3  # at its peak; cosine to zero
    warmup_fraction: float = 0.05
    clip_norm: float = 1.0
    batch_blocks: int = 8  # blocks in a step

    def name(self) -> str:
        """Unique for width, layers, epochs, weight decay and seed."""
        size = f"w{self.width}-l{self.layers}-e{self.epochs}"
        return f"{size}-d{self.weight_decay:g}-s{self.seed}"

    def steps(self, blocks: int) -> int:
        return self.epochs * math.ceil(blocks / self.batch_blocks)


@dataclass
class State:
    """Where a pretraining stands, beside tensors."""

    step: int = 0
    loss: float = 0.0  # summed over the targets of the last epoch begun
    targets: int = 0
    seconds: float = 0.0


def build(recipe: Recipe, vocabulary: int) -> nn.Module:
    """A LlamaForCausalLM with weights drawn from the recipe's seed.

    Its LM head is the embedding, as in GPT-Neo, which Wu & Papyan 2024 train.
    """
    import transformers

    transformers.logging.disable_progress_bar()  # of every saved file
    torch.manual_seed(recipe.seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.width,
        intermediate_size=math.ceil(recipe.width / 6) * 16,  # as many weights as 4 x width in GPT
        num_hidden_layers=recipe.layers,
        num_attention_heads=max(1, recipe.width // HEAD_SIZE),
        max_position_embeddings=2 * BLOCK_LENGTH,  # no weights hang on it; room for a prefix
        # Near 1 / sqrt(width). At the 0.02 of transformers, for widths of thousands, width 128
        # is 0.15 nats higher after 300 steps.
        initializer_range=0.06,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    causal_lm = transformers.LlamaForCausalLM(config)
    for layer in causal_lm.model.layers:  # each begins as the identity: faster in so few steps
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return causal_lm


def pretrain(
    recipe: Recipe,
    blocks: np.ndarray,
    vocabulary: int,
    tokenizer: Path,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train on blocks (B, L) of token ids and leave a model's folder with the files of `tokenizer`.

    Goes on from a checkpoint in the folder. Returns the training's record: tokens seen (targets),
    training loss of the last epoch in nats, seconds, digest of the weights. Raises UserError when
    the folder holds another recipe or the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_recipe(folder / "recipe.json", recipe)
    run = Pretraining(recipe, blocks, build(recipe, vocabulary), folder, progress)
    state = run.run()
    run.causal_lm.save_pretrained(folder)
    for file in tokenizer.glob("token*.json"):
        shutil.copy(file, folder)
    (folder / "training.safetensors").unlink(missing_ok=True)
    return {
        "tokens_seen": recipe.epochs * blocks[:, 1:].size,
        "train_loss": state.loss / state.targets,
        "seconds": state.seconds,
        "weights_sha256": digest_weights(folder),
    }


def check_recipe(file: Path, recipe: Recipe) -> None:
    """Note the recipe of a model's folder. Raises UserError when it has another one."""
    wanted = dataclasses.asdict(recipe)
    if file.exists() and read_json(file) != wanted:
        raise UserError(f"{file.parent} holds a model of another recipe: delete that folder.")
    write_json(file, wanted)


class Pretraining:
    """One pretraining from its first step, or its last checkpoint, to its last step."""

    def __init__(
        self,
        recipe: Recipe,
        blocks: np.ndarray,
        causal_lm: nn.Module,
        folder: Path,
        progress: Progress,
    ):
        self.recipe, self.blocks, self.causal_lm = recipe, blocks, causal_lm
        self.progress, self.checkpoint = progress, folder / "training.safetensors"
        self.schedule = RunConfig(
            learning_rate=recipe.learning_rate, warmup_fraction=recipe.warmup_fraction
        )
        matrices = [p for p in causal_lm.parameters() if p.ndim > 1]
        gains = [p for p in causal_lm.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, foreach=True)
        # The two things that checkpoints want of a model.
        self.stored = SimpleNamespace(
            trainable=lambda: dict(causal_lm.named_parameters()), parameters=causal_lm.parameters
        )

    def run(self) -> State:
        state, self.started = self.resume(), time.monotonic()
        total = self.recipe.steps(len(self.blocks))
        self.causal_lm.train()
        saved = self.started
        for step in steps(self.shuffle, total, self.schedule, self.recipe.seed, state.step):
            if step.batch == 0:
                state.loss, state.targets = 0.0, 0
            loss, targets = self.step(step)
            state.step, state.loss = step.number + 1, state.loss + loss
            state.targets += targets
            self.progress.step()
            if time.monotonic() - saved > CHECKPOINT_SECONDS and state.step < total:
                self.save(state)
                saved = time.monotonic()
        state.seconds += time.monotonic() - self.started
        return state

    def shuffle(self, generator: np.random.Generator) -> list[np.ndarray]:
        """An epoch's blocks, batch by batch."""
        order, size = generator.permutation(len(self.blocks)), self.recipe.batch_blocks
        return [order[first : first + size] for first in range(0, len(order), size)]

    def step(self, step: Step) -> tuple[float, int]:
        """One step of AdamW; returns the summed loss and the number of its targets."""
        ids = torch.from_numpy(self.blocks[step.rows]).long()  # (B, L)
        for group in self.optimizer.param_groups:
            group["lr"] = step.learning_rate
        loss, targets = loss_sum(self.causal_lm, ids), ids[:, 1:].numel()
        (loss / targets).backward()
        norm = nn.utils.clip_grad_norm_(self.causal_lm.parameters(), self.recipe.clip_norm)
        if not torch.isfinite(norm):
            raise UserError(
                f"{self.checkpoint.parent.name} diverged at step {step.number + 1}: "
                "delete its folder and take a smaller learning rate."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), targets

    def resume(self) -> State:
        if not self.checkpoint.exists():
            return State()
        tensors, metadata = read_tensors(self.checkpoint)
        restore_optimizer(self.stored, self.optimizer, tensors)
        state = State(**metadata["state"])
        self.progress.resume_at(state.step, 0)
        return state

    def save(self, state: State) -> None:
        now = time.monotonic()
        state.seconds, self.started = state.seconds + now - self.started, now
        tensors = optimizer_tensors(self.stored, self.optimizer)
        write_tensors(self.checkpoint, tensors, {"state": dataclasses.asdict(state)})


def hidden_states(causal_lm: nn.Module, ids: Tensor) -> Tensor:
    """States (B, L, D) after the final norm, which the LM head reads, of token ids (B, L)."""
    return causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state


def loss_sum(causal_lm: nn.Module, ids: Tensor) -> Tensor:
    """Next-token cross-entropy in nats of ids (B, L), summed over all but each block's first."""
    states = hidden_states(causal_lm, ids)[:, :-1].flatten(0, 1)  # (T, D)
    return LinearCrossEntropy.apply(
        states, causal_lm.lm_head.weight, None, ids[:, 1:].flatten(), torch.is_grad_enabled()
    )


@torch.no_grad()
def validation_loss(causal_lm: nn.Module, blocks: np.ndarray) -> float:
    """Mean loss in nats over every token of blocks (B, L) but a block's first."""
    causal_lm.eval()
    parts = range(0, len(blocks), EVALUATION_BLOCKS)
    ids = (torch.from_numpy(blocks[i : i + EVALUATION_BLOCKS]).long() for i in parts)
    return sum(loss_sum(causal_lm, part).item() for part in ids) / blocks[:, 1:].size


@torch.no_grad()
def states_and_targets(causal_lm: nn.Module, blocks: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of states (T, D) and the tokens (T,) that follow them, over blocks (B, L)."""
    causal_lm.eval()
    for first in range(0, len(blocks), EVALUATION_BLOCKS):
        ids = torch.from_numpy(blocks[first : first + EVALUATION_BLOCKS]).long()
        yield hidden_states(causal_lm, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()


def step_cost(recipe: Recipe, vocabulary: int) -> float:
    """Of a step, in a unit that all sizes share: multiplications, and what every step costs."""
    weights = recipe.layers * 12 * recipe.width**2 + vocabulary * recipe.width
    return recipe.batch_blocks * (STEP_COST + weights / 1e6)
