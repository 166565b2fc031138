"""Checkpoints that a disk or a hand has damaged: one sentence, or what was stored, never else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arm_of, random_split, tiny_config, tiny_model
from test_language_model import build

import common
from collapse.training.checkpoints import optimizer_tensors, save_weights
from collapse.utils.errors import UserError
from collapse.utils.files import read_tensors, write_tensors

KINDS = ("a flipped bit", "another byte", "cut short", "two bytes swapped")


def checkpoints(folder: Path, causal_lm: Path) -> list[Path]:
    """One small file of each kind that a training leaves."""
    model = tiny_model(3, hidden_size=8, vocabulary_size=20)
    split = random_split(rows=8, vocabulary=20)
    trainer = common.make_trainer(model, split, tiny_config(), arm_of(3))
    trainer.step(np.arange(8), 1e-3)
    history = {"epoch": 1, "batch": 0, "seconds": 2.5, "val": [{"accuracy": 0.5, "epoch": 1}]}
    tensors = optimizer_tensors(model, trainer.optimizer)
    write_tensors(folder / "training.safetensors", tensors, {"history": history})
    save_weights(folder, "final", model, 1)
    engrams = {"engrams": torch.rand(9, 4), "labels": torch.arange(9) % 2}
    write_tensors(folder / "engrams.safetensors", engrams, {})
    save_weights(folder, "best", build(1, causal_lm, lora_rank=2, classifier_size=4), 1)
    names = ("training", "final", "engrams", "best-adapter/adapter_model")
    return [folder / f"{name}.safetensors" for name in names]


def damage(whole: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """The file with one thing wrong; half of the places lie in its header, the rest anywhere."""
    header = 8 + int.from_bytes(whole[:8], "little")
    end = header if rng.random() < 0.5 else len(whole)
    place, other = rng.integers(end), rng.integers(end)
    damaged = bytearray(whole)
    if kind == "a flipped bit":
        damaged[place] ^= 1 << rng.integers(8)
    elif kind == "another byte":
        damaged[place] = rng.integers(256)
    elif kind == "cut short":
        del damaged[place:]
    else:
        damaged[place], damaged[other] = damaged[other], damaged[place]
    return bytes(damaged)


def same(found, expected) -> bool:
    (tensors, texts), (expected_tensors, expected_texts) = found, expected
    return (
        texts == expected_texts
        and tensors.keys() == expected_tensors.keys()
        and all(
            tensor.dtype == expected_tensors[name].dtype
            and torch.equal(tensor, expected_tensors[name])
            for name, tensor in tensors.items()
        )
    )


def try_damages(paths: list[Path], count: int, seed: int) -> dict[str, int]:
    """Damage files so often, each time anew; how many were refused and how many read as before.

    Anything but UserError, or other tensors than were stored, ends in an error here.
    """
    rng = np.random.default_rng(seed)
    wholes = [(path, path.read_bytes(), read_tensors(path)) for path in paths]
    outcomes = {"refused": 0, "as before": 0}
    for number in range(count):
        path, whole, expected = wholes[number % len(wholes)]
        kind = KINDS[number // len(wholes) % len(KINDS)]
        damaged = damage(whole, kind, rng)
        file = path.with_name("damaged.safetensors")
        file.write_bytes(damaged)
        try:
            assert same(read_tensors(file), expected), (
                f"{path.name}, {kind}: read, but not as before"
            )
            outcomes["as before"] += 1
        except UserError as error:
            assert "\n" not in str(error) and str(file) in str(error), str(error)
            assert damaged != whole, f"{path.name} is whole and refused: {error}"
            outcomes["refused"] += 1
    return outcomes


def test_a_damaged_checkpoint_is_refused_or_reads_as_it_was_stored(qwen, tmp_path):
    outcomes = try_damages(checkpoints(tmp_path, qwen), 300, seed=0)
    assert outcomes["refused"] > 250  # the others were left as they were, or changed a blank


@pytest.mark.parametrize("dtype", ["BOOL", "U64", "F64", "C64", "F8_E4M3", "F4", "X", ""])
def test_a_type_that_is_not_the_stored_one_is_refused(tmp_path, dtype):
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": torch.zeros(4, 8, dtype=torch.int32)}, {})
    whole = file.read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")].replace(
        b'"I32"', f'"{dtype}"'.encode()
    )
    shape = {
        "BOOL": b"128",
        "F8_E4M3": b"128",
        "F4": b"256",
        "U64": b"16",
        "F64": b"16",
        "C64": b"16",
    }
    header = header.replace(b"[4,8]", b"[" + shape.get(dtype, b"32") + b"]")
    file.write_bytes(len(header).to_bytes(8, "little") + header + whole[-128:])
    with pytest.raises(UserError, match="damaged or missing"):
        read_tensors(file)
