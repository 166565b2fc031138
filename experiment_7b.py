"""Experiment 2: Qwen2.5-7B with QLoRA on SST-2 as models 1, 2 and 3, on one GPU of 16 GB.

Another causal LM goes by --model. Without a GPU: `make standin`, then --model smollm2-135m.
"""

from dataclasses import dataclass

import tyro

import common
from collapse.config import LanguageModelConfig
from collapse.utils.device import set_allocator
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT


@dataclass
class Config(LanguageModelConfig):
    """Settings of Experiment 2; the comment above a field is its --help text."""

    max_length: int = 128  # Longest input in tokens; the rest of a row is cut off.


def main() -> None:
    config = tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    set_allocator()
    common.run_language_model_experiment(
        "Experiment 2",
        results=ROOT / "results_7b",
        other=ROOT / "results_agnews",
        engram_source="pooled",
        config=config,
    )


if __name__ == "__main__":
    run_script(main)
