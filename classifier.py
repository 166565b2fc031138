"""A finished training of a pretrained model as a classifier of texts, which can also continue them.

from classifier import load_classifier
classify = load_classifier("results_7b/smollm2-135m/state/model2-seed42")
print(classify.class_names, classify(["A wonderful film."]), classify.generate("The plot is"))
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import common
from collapse.batches import encode_rows
from collapse.checkpoints import load_weights
from collapse.data import Rows
from collapse.files import read_json
from collapse.language_models import whole_tokenizer
from collapse.settings import UserError, pick_device
from effective_rank_analysis import language_model_of


@dataclass
class TextClassifier:
    """A trained model with its tokenizer; `model` is in evaluation mode."""

    model: common.DualHeadModel
    tokenizer: Any
    class_names: tuple[str, ...]
    max_length: int  # tokens of a text that the training read

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Class probabilities (N, C) of N texts, in the order of class_names.

        Model 3 reads each with the zero engram. Raises UserError for a text without a token.
        """
        if not texts:
            return np.empty((0, len(self.class_names)), np.float32)
        rows = Rows(list(texts), [0] * len(texts))  # labels that nothing here asks for
        split = encode_rows(rows, lambda texts: self.tokenizer(texts)["input_ids"], self.max_length)
        logits = torch.from_numpy(common.evaluate(self.model, split).logits)
        return logits.softmax(1).numpy()

    def generate(self, text: str, max_new_tokens: int = 20) -> str:
        """The text's continuation, greedy, by the language model with its trained adapters.

        It is transformers' own generation; no engram stands before the text.
        """
        causal_lm = self.model.adapters.get_base_model()
        inputs = self.tokenizer([text], return_tensors="pt").to(causal_lm.device)
        tokens = causal_lm.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,  # load_causal_lm switches it off, for training
            pad_token_id=causal_lm.generation_config.eos_token_id,
        )
        new = tokens[0, inputs["input_ids"].shape[1] :]
        return self.tokenizer.decode(new, skip_special_tokens=True)


def load_classifier(
    folder: str | Path,
    weights: Literal["final", "best"] = "final",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> TextClassifier:
    """The model that a training left in its folder, results_.../state/MODEL-seedN.

    Raises UserError for a folder without a finished training of a pretrained language model.
    """
    folder = Path(folder)
    if not (folder / "metrics.json").exists():
        raise UserError(
            f"{folder} holds no finished training: give a folder like "
            "results_7b/smollm2-135m/state/model2-seed42."
        )
    settings = read_json(folder.parent / "settings.json")
    stored, class_names = settings["config"], tuple(settings["data"]["class_names"])
    if "model" not in stored:
        raise UserError(f"{folder} is of the small transformer: give a pretrained model's folder.")
    adapter, classes = folder / f"{weights}-adapter", len(class_names)
    config, _, build = language_model_of(stored, adapter, classes, pick_device(device))
    model = build(common.find_arm(folder.name.rpartition("-seed")[0]))
    load_weights(folder, weights, model)
    model.lm_head = None  # nobody asks for an LM loss here
    tokenizer = whole_tokenizer(config.model, config.revision)
    return TextClassifier(model.eval(), tokenizer, class_names, config.max_length)
