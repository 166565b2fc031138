"""Experiment 2: Qwen2.5-7B with QLoRA on SST-2 as models 1, 2 and 3, on one GPU of 16 GB.

--model takes any other causal LM. Without a GPU: `make standin`, then --model smollm2-135m.
"""

import common
from collapse.config import LanguageModelConfig as Config
from collapse.utils import command_line
from collapse.utils.device import set_allocator
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT


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
