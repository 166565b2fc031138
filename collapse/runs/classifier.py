"""A trained model in use: classes of texts, and their continuation; load_classifier makes one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from collapse.data.batches import Split, encode_rows
from collapse.data.task import Rows


@dataclass
class TextClassifier:
    """A trained model with its tokenizer."""

    model: Any  # a DualHeadModel
    tokenizer: Any
    class_names: tuple[str, ...]
    max_length: int  # tokens of a text that the training read
    evaluate: Callable[[Any, Split], Any]  # model, rows -> what has their logits (N, C)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Class probabilities (N, C) of N texts, in the order of class_names.

        Model 3 reads each with the zero engram. Raises UserError for a text without a token.
        """
        if not texts:
            return np.empty((0, len(self.class_names)), np.float32)
        rows = Rows(list(texts), [0] * len(texts))  # labels that nothing here asks for
        split = encode_rows(rows, lambda texts: self.tokenizer(texts)["input_ids"], self.max_length)
        logits = torch.from_numpy(self.evaluate(self.model, split).logits)
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
