"""What a user's machine may be: under WSL, with an old GPU, with an old driver."""

import os
import platform

import pytest
import torch
from conftest import fails, start_script
from test_language_model import build

import experiment_7b
from collapse.data import registry
from collapse.models import pretrained, weights
from collapse.utils.device import WSL_RESERVE, cap_memory_on_wsl, check_card, set_allocator
from collapse.utils.errors import UserError
from studies import collapse_threshold

GIB = 2**30
WSL, LINUX = "5.15.167.4-microsoft-standard-WSL2", "6.8.0-45-generic"
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("release", "expected"), [(WSL, None), (LINUX, "expandable_segments:True")]
)
def test_segments_that_grow_are_not_asked_for_under_wsl(release, expected, monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    set_allocator()
    assert os.environ.pop("PYTORCH_ALLOC_CONF", None) == expected
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "mine")
    set_allocator()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "mine"


@pytest.fixture
def card(monkeypatch):
    """A card of 16 GiB with 14 free beside the one that this process holds; gives what was set."""
    caps = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (14 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1 * GIB)
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda _: caps[-1] if caps else 1.0
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: caps.append(share)
    )
    return caps


def test_under_wsl_torch_may_take_what_is_free_but_for_two_gib(card, monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: WSL)
    cap_memory_on_wsl(CUDA)
    assert card == [13 / 16] and WSL_RESERVE == 2 * GIB
    cap_memory_on_wsl(CUDA)  # a second model in the same process
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (15 * GIB, 16 * GIB))
    cap_memory_on_wsl(CUDA)  # a cap that is there is never lifted: it may be somebody's own
    assert card == [13 / 16] * 3


def test_nothing_is_capped_elsewhere(card, monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: LINUX)
    cap_memory_on_wsl(CUDA)
    monkeypatch.setattr(platform, "release", lambda: WSL)
    cap_memory_on_wsl(torch.device("cpu"))
    assert card == []


def test_a_plan_is_made_under_the_cap(qwen, monkeypatch):
    capped = []
    monkeypatch.setattr("collapse.models.memory.cap_memory_on_wsl", capped.append)
    build(1, qwen)
    assert capped == [torch.device("cpu")]


@pytest.fixture
def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))


def test_a_gpu_without_bfloat16_is_refused_with_a_way_out(old_gpu, monkeypatch):
    with pytest.raises(UserError, match=r"Tesla T4 \(compute capability 7\.5\).*float32.*--model"):
        check_card(CUDA, "bfloat16")
    check_card(CUDA, "float32")
    check_card(torch.device("cpu"), "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    check_card(CUDA, "bfloat16")


@pytest.mark.parametrize("script", [experiment_7b, collapse_threshold])
def test_it_is_refused_before_data_or_weights_are_asked_for(
    script, old_gpu, monkeypatch, capsys, tmp_path
):
    def asked(*_, **__):
        raise AssertionError("too late")

    for module, name in ((registry, "load_task"), (weights, "loading"), (pretrained, "loading")):
        monkeypatch.setattr(module, name, asked)
    monkeypatch.setattr("common.load_task", asked)
    line = f"--model Qwen/Qwen2.5-7B --output-dir {tmp_path / 'out'}"
    assert "compute capability 7.5" in fails(start_script, capsys, script, line)
    assert not (tmp_path / "out/state").exists()
