"""Finds the layers of a causal LM, and refuses models that cannot carry our heads."""

from typing import Any

import torch
from torch import Tensor, nn

from collapse.config import LanguageModelConfig
from collapse.utils.errors import UserError


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The layers of a backbone, in order: the longest module list that is inside no other list.

    A layer itself may hold a longer one, such as a mixture's experts. Raises ValueError for a
    backbone without module lists.
    """
    module_lists, inside = [], ()
    for name, module in backbone.named_modules():  # parents come before children
        if isinstance(module, nn.ModuleList) and not name.startswith(inside):
            module_lists.append(module)
            inside += (f"{name}.",)
    return max(module_lists, key=len)


def check_is_text_decoder(config: Any, name: str) -> None:
    """Raise UserError for a model whose configuration says that it is no decoder of text alone.

    config is a transformers.PreTrainedConfig, read before any weights are.
    """
    unsuitable = None
    if config.is_encoder_decoder:
        unsuitable = "an encoder-decoder"
    elif config.get_text_config() is not config:
        unsuitable = "made for more than text"
    if unsuitable:
        raise UserError(
            f"{name} ({config.model_type}) is {unsuitable}: choose a decoder of text alone."
        )


def check_causal_lm(causal_lm: nn.Module, config: LanguageModelConfig) -> None:
    """Raise UserError for a model that cannot carry our heads, or not with these settings.

    causal_lm: as transformers loads it, without adapters, in evaluation mode.
    """

    def refuse(why: str) -> None:
        raise UserError(f"{config.model} ({causal_lm.config.model_type}) cannot be used: {why}.")

    if causal_lm._is_stateful:
        refuse("it is recurrent or a state space model, so choose one whose layers all attend")
    backbone, head = causal_lm.base_model, causal_lm.get_output_embeddings()
    embedding, size = causal_lm.get_input_embeddings(), causal_lm.config.hidden_size
    sizes = {getattr(head, "in_features", None), getattr(embedding, "embedding_dim", None), size}
    if not any(isinstance(module, nn.ModuleList) for module in backbone.modules()):
        refuse("it has no list of layers, so choose one built as GPT-2 or Llama are")
    if len(sizes) > 1:
        refuse(f"embeddings, layers and LM head differ in size ({sizes}), so choose another model")
    if (longest := longest_input(causal_lm)) is not None and config.max_length > longest:
        refuse(f"it has positions for {longest} tokens and a prefix, so lower --max-length to that")
    if why := incompatibility(causal_lm):
        refuse(f"{why}, so choose another model")


def longest_input(causal_lm: nn.Module) -> int | None:
    """Longest text beside a prefix, for a model with learned positions; None for any other."""
    backbone = causal_lm.base_model
    outside = set(backbone.modules()) - set(decoder_layers(backbone).modules())
    tables = [module for module in outside if isinstance(module, nn.Embedding)]
    positions = getattr(causal_lm.config, "max_position_embeddings", None)
    return positions - 1 if positions and len(tables) > 1 else None


@torch.no_grad()
def incompatibility(causal_lm: nn.Module) -> str | None:
    """Why a model cannot be a DualHeadModel's backbone, by passes over random tokens, or None."""
    backbone, embedding = causal_lm.base_model, causal_lm.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    vocabulary = causal_lm.config.vocab_size
    ids = torch.randint(vocabulary, (2, 12), generator=generator)
    ids = ids.to(causal_lm.device)
    try:
        states_from_ids = backbone(input_ids=ids).last_hidden_state
        states = backbone(inputs_embeds=embedding(ids)).last_hidden_state
        ids[:, -1] = (ids[:, -1] + 1) % vocabulary
        states_after_change = backbone(inputs_embeds=embedding(ids)).last_hidden_state
    except (AttributeError, TypeError, ValueError) as error:
        return f"its layers do not run on embeddings ({str(error).partition(chr(10))[0]})"
    if differs(states, states_from_ids):
        return "its layers give other states for embeddings than for the tokens they are of"
    if differs(states_after_change[:, :-1], states[:, :-1]):
        return "its states of a token change with the tokens behind it, it is not causal"
    return None


def differs(states: Tensor, expected: Tensor) -> bool:
    """Whether states (B, L, D) differ by more than the rounding of their type."""
    tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
    return bool((states - expected).float().norm() > tolerance * expected.float().norm())
