"""Experiment 2: Qwen2.5-7B with QLoRA on SST-2 as models 1, 2 and 3, on one GPU of 16 GB.

--model takes any other causal LM. Without a GPU: `make standin`, then --model smollm2-135m.
"""

from dataclasses import dataclass

import common
from collapse.config import DATA, LanguageModelConfig, study_setting
from collapse.utils import command_line
from collapse.utils.device import set_allocator
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT


@dataclass
class Config(LanguageModelConfig):
    """Settings of Experiment 2; the comment above a field is its --help text."""

    # Longest input in tokens; the rest of a row is cut off.
    max_length: int = study_setting(128, DATA)


def main() -> None:
    config = command_line.parse(Config, __doc__, negative_flags=False)
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
