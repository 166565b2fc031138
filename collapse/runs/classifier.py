"""Uses a trained model to classify texts and to continue them; see common.load_classifier."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collapse.data.batches import Split, encode_rows
from collapse.data.task import Rows
from collapse.models.architectures import longest_input
from collapse.models.pretrained import token_ids
from collapse.utils.errors import UserError
from collapse.utils.files import read_json


@dataclass
class TextClassifier:
    """A trained model with its tokenizer."""

    model: Any  # a DualHeadModel
    tokenizer: Any
    class_names: tuple[str, ...]
    max_length: int  # tokens of a text that the training read
    evaluate: Callable[[Any, Split], Any]  # model, rows -> an object with their logits (N, C)
    prepare: Callable[[str], str]  # what was done to a text in training before it was tokenized

    def __call__(self, texts: Iterable[str]) -> np.ndarray:
        """Class probabilities (N, C) of N texts, in the order of class_names.

        Model 3 reads each text with the zero engram. Raises UserError if texts is no list of texts,
        or names the row that is empty or no text.
        """
        texts = [self.prepare(text) for text in checked_texts(texts)]
        if not texts:
            return np.empty((0, len(self.class_names)), np.float32)
        if "" in texts:
            raise UserError(f"row {texts.index('') + 1} is an empty text: leave it out.")
        rows = Rows(texts, [0] * len(texts))  # labels are not used
        split = encode_rows(rows, self.encode, self.max_length)
        logits = torch.from_numpy(self.evaluate(self.model, split).logits)
        return logits.softmax(1).numpy()

    def encode(self, texts: list[str]) -> list[list[int]]:
        rows = self.model.backbone.get_input_embeddings().num_embeddings
        return token_ids(self.tokenizer, rows, texts)

    def generate(self, text: str, max_new_tokens: int = 20) -> str:
        """The text's greedy continuation by the language model with its trained adapters.

        Uses transformers' generate, without an engram before the text. Raises UserError for an
        argument that is not a single text, or too long a text.
        """
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UserError(f"generate continues one text, and this is a {kind}: call it for each.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: it must be 1 or more.")
        causal_lm = self.model.adapters.get_base_model()
        settings, (ids,) = causal_lm.generation_config, self.encode(checked_texts([text]))
        if not ids:
            begin = first(self.tokenizer.bos_token_id, settings.bos_token_id)
            if begin is None:
                raise UserError("the text has no token to go on from: give a word or more.")
            ids = [begin]
        room = longest_input(causal_lm)  # less by one for a prefix, which is not used here
        if room is not None and len(ids) + max_new_tokens > room + 1:
            raise UserError(
                f"the text has {len(ids)} tokens and {max_new_tokens} are to follow, and the model "
                f"has positions for {room + 1}: give a shorter text or a lower max_new_tokens."
            )
        inputs = torch.tensor([ids], device=causal_lm.device)
        tokens = causal_lm.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,  # load_causal_lm switches it off, for training
            pad_token_id=first(
                settings.pad_token_id, self.tokenizer.pad_token_id, settings.eos_token_id
            ),
        )
        return self.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)


def first(*ids: int | list[int] | None) -> int | None:
    """The first id that is not None; a model may have a list of ids for one purpose."""
    ids = [token[0] if isinstance(token, list) and token else token for token in ids]
    return next((token for token in ids if isinstance(token, int)), None)


def checked_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list. Raises UserError for one text, a table, or a row that is no text."""
    kind = type(texts).__name__
    # Iterating over these would give characters, keys or names of columns.
    single = isinstance(texts, str | bytes | Mapping) or hasattr(texts, "columns")
    if single or not hasattr(texts, "__iter__") or getattr(texts, "shape", None) == ():
        raise UserError(
            f"a list of texts is needed, and this is a {kind}: give [text], or a column."
        )
    texts = list(texts)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise UserError(
                f"row {number} is a {type(text).__name__} ({str(text)[:60]!r}) and no text: leave "
                "it out, or make one string of it (training joined parts by a space)."
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"row {number} holds an unpaired surrogate: fix or remove it."
            ) from None
    return texts


def base_model_of(adapter: Path) -> str:
    """The pretrained model's folder that is named in an adapter's folder.

    Raises UserError where one of the two does not exist.
    """
    file = adapter / "adapter_config.json"
    if not file.exists():
        raise UserError(f"{file} is not there: copy the whole folder of the training.")
    model = read_json(file)["base_model_name_or_path"]
    if not Path(model).exists():
        raise UserError(
            f"the pretrained model {model} of the training is not there: give its new place, by "
            "load_classifier(..., model=FOLDER) or Experiment 4's --model FOLDER."
        )
    return model


def settings_beside(folder: Path, weights: str) -> Path:
    """The settings.json of the run that a training's folder belongs to, beside it or in it.

    Raises UserError that names what is missing.
    """
    if not (folder / "metrics.json").exists():
        raise UserError(
            f"{folder} holds no finished training: give a folder like "
            "results_7b/smollm2-135m/state/model2-seed42."
        )
    if not re.fullmatch(r".+-seed\d+", folder.name):
        raise UserError(f"{folder} was named like model2-seed42 when it was trained: name it so.")
    folders = [place for place in (folder.parent, folder) if (place / "settings.json").exists()]
    if not folders:
        raise UserError(
            f"{folder} has no settings.json of its run beside it or in it: copy that, too, from "
            "the state folder that the training was copied from."
        )
    settings = folders[0] / "settings.json"
    adapter = (
        f"{weights}-adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    for name in (f"{weights}.safetensors", *adapter):
        if '"model"' in settings.read_text() and not (folder / name).exists():
            raise UserError(f"{folder} lacks {name}: copy the whole folder of the training.")
    return settings
