"""Liger's kernels are asked for on a GPU alone, where they are installed, and before adapters."""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types

import pytest
import torch
from test_language_model import build, tiny_settings

from collapse.models import pretrained
from collapse.models.liger import use_liger
from collapse.utils.provenance import environment, liger_version

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def liger(monkeypatch):
    """A module in its place, which notes the calls."""
    calls, find, version = [], importlib.util.find_spec, importlib.metadata.version
    package, part, patches = (
        types.ModuleType(f"liger_kernel{end}")
        for end in ("", ".transformers", ".transformers.monkey_patch")
    )
    patches._apply_liger_kernel_to_instance = lambda **given: calls.append(given)
    for module in (package, part, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.machinery.ModuleSpec("liger_kernel", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "liger_kernel" else find(name)
    )
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: "0.8.5" if name == "liger-kernel" else version(name),
    )
    return calls


def test_it_is_called_on_a_gpu_for_three_kernels_and_no_loss(liger):
    causal_lm = types.SimpleNamespace(device=CUDA)
    use_liger(causal_lm)
    (given,) = liger
    assert given.pop("model") is causal_lm
    assert {name for name, on in given.items() if on} == {"rope", "rms_norm", "swiglu"}
    assert {name for name, on in given.items() if not on} == {
        "cross_entropy",
        "fused_linear_cross_entropy",
    }
    assert liger_version(CUDA) == "0.8.5"
    assert environment(CUDA)["versions"]["liger-kernel"] == "0.8.5"  # as results hold it


def test_it_is_not_called_on_a_cpu(liger, qwen):
    build(2, qwen)
    assert not liger and liger_version(CPU) is None
    assert "liger-kernel" not in environment(CPU)["versions"]


def test_it_is_not_called_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    use_liger(types.SimpleNamespace(device=CUDA))
    assert liger_version(CUDA) is None and "liger-kernel" not in environment(CUDA)["versions"]


def test_it_comes_before_the_adapters_and_can_be_left_out(qwen, monkeypatch):
    seen = []

    def noted(causal_lm):
        seen.append(any(".lora_" in name for name, _ in causal_lm.named_parameters()))

    monkeypatch.setattr(pretrained, "use_liger", noted)
    settings = tiny_settings(qwen)
    pretrained.add_lora(pretrained.load_causal_lm(settings, CPU), settings)
    assert seen == [False]
    pretrained.add_lora(pretrained.load_causal_lm(settings, CPU), settings, liger=False)
    assert seen == [False]
