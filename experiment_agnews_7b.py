"""Experiment 3: Qwen2.5-7B with QLoRA on AG News as models 1, 2 and 3, on one GPU of 16 GB.

The engram of model 3 is made from the classifier's intermediate features, where Experiment 2 takes
the pooled hidden state. --model takes any other causal LM. Without a GPU: `make standin`, then
--model smollm2-135m.
"""

from dataclasses import dataclass

import common
from collapse.config import DATA, LanguageModelConfig, run_setting, study_setting
from collapse.utils import command_line
from collapse.utils.device import set_allocator
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT


@dataclass
class Config(LanguageModelConfig):
    """Settings of Experiment 3; the comment above a field is its --help text.

    The first has another default than RunConfig's, and its text.
    """

    max_length: int = study_setting(256, DATA)
    # Data set: a name of LOADERS in collapse/data/registry.py, a file, a folder or a hub set, as in
    # experiment_7b.py. Any but AG News gets a results subfolder of its own.
    dataset: str = run_setting("AG News", DATA)


def main() -> None:
    config = command_line.parse(Config, __doc__, negative_flags=False)
    set_allocator()
    common.run_language_model_experiment(
        "Experiment 3",
        results=ROOT / "results_agnews",
        other=ROOT / "results_7b",
        engram_source="intermediate",
        config=config,
    )


if __name__ == "__main__":
    run_script(main)
