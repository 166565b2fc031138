"""What a result was made with: git commit, versions of libraries, hardware."""

import contextlib
import importlib.metadata
import importlib.util
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from collapse.utils.files import ROOT


def git_commit() -> str | None:
    """The commit of the code, followed by -modified when the code differs from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            )
            return done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None  # no git, or not a clone

    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain", "--", "*.py", "requirements.txt"):
        commit += "-modified"
    return commit


# Read once in a process: every training asks, and a version takes milliseconds.
version_of = cache(importlib.metadata.version)


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Versions, hardware and git commit (default: the present one), for results.json."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "numpy", "scikit-learn", "scipy")
    versions = {name: version_of(name) for name in packages}
    if liger := liger_version(device):
        versions["liger-kernel"] = liger
    return {
        "versions": {"python": platform.python_version(), **versions},
        "hardware": {
            "device": hardware_name(device),
            "threads": torch.get_num_threads(),
        },
        "git_commit": commit or git_commit(),
    }


def liger_version(device: torch.device) -> str | None:
    """Version of the liger-kernel that models on this device use; None where they use none."""
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return None
    return importlib.metadata.version("liger-kernel")


def hardware_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    # The machine that submits jobs to a cluster may have no GPU itself.
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
