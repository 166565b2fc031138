"""What is computed stays what it was: tiny runs against numbers that an earlier version stored.

tests/numbers.json was written at commit 654bba4, when all of this was one file: for each backbone
and model, classification loss, LM loss, accuracy, and mean gradient norm (train) or effective rank
(val) of two epochs, and the clusters' ARI under an untrained compressor.
"""

import json
from pathlib import Path

import pytest
from conftest import TINY, start_script

import experiment
import experiment_7b

STORED = json.loads((Path(__file__).parent / "numbers.json").read_text())
LANGUAGE_MODEL = "--device cpu --workers 1 --epochs 2 --batch-size 8 --max-length 12 --lora-rank 4"
LANGUAGE_MODEL += " --lora-dropout 0 --classifier-size 10 --engram-size 6 --learning-rate 3e-3"


@pytest.mark.parametrize("backbone", STORED)
def test_tiny_runs_give_the_numbers_that_were_stored(backbone, request, data_dir, tmp_path):
    script, options = experiment, TINY
    if backbone != "small":
        name, _, packed = backbone.partition(" ")
        script, options = experiment_7b, f"--model {request.getfixturevalue(name)} {LANGUAGE_MODEL}"
        options += " --quantization nf4" if packed else ""
    start_script(script, f"--data-dir {data_dir} --output-dir {tmp_path} --seeds 1 {options}")
    models = json.loads((tmp_path / "results.json").read_text())["models"]
    for key, stored in STORED[backbone].items():
        for split, last in (("train", "grad_norm"), ("val", "effective_rank")):
            names = ("cls_loss", "lm_loss", "accuracy", last)
            for record, numbers in zip(models[key]["1"][split], stored[split], strict=True):
                for name, number in zip(names, numbers, strict=True):
                    expected = number if number is None else pytest.approx(number, rel=1e-4)
                    assert record[name] == expected, (key, split, name)
        if "untrained_ari" in stored:
            found = models[key]["1"]["cluster"]["untrained"]["ari"]
            assert found == pytest.approx(stored["untrained_ari"], abs=1e-6)
