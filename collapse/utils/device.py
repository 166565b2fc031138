"""Where to compute: the device, its driver, threads, the allocator."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

from collapse.utils.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device for --device: a CUDA device that is asked for and absent is an error."""
    if name == "cpu" or torch.cuda.is_available():
        return torch.device("cuda" if name == "auto" else name)
    driver = nvidia_driver()
    found = f"NVIDIA's driver {driver} is here, but torch {torch.__version__} sees no CUDA device"
    mend = "its builds for CUDA 13 need driver 580 or newer: update the driver, or install a build "
    mend += "of torch for an older CUDA"
    if name == "cuda" and driver:
        raise UserError(f"--device cuda: {found}; {mend}.")
    if name == "cuda":
        raise UserError(
            "--device cuda, but torch sees no CUDA device: "
            "use --device auto, or install a CUDA build of torch."
        )
    if driver:
        print(f"warning: {found}; {mend}. This goes on with the CPU.", flush=True)
    return torch.device("cpu")


DRIVER_FILE = Path("/proc/driver/nvidia/version")


def set_allocator() -> None:
    """Have torch's memory on a GPU grow in segments; call it before anything is on the GPU.

    Steps differ in length: in segments that grow, freed memory fits a step of any size. A setting
    that is there already stays.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def set_threads(count: int) -> None:
    """Threads of torch and of the libraries below numpy, in this process.

    Sums in other threads end in other digits, and two processes of two threads each wait for each
    other: an SVD of 1,000 x 128 then takes 30 times as long.
    """
    import threadpoolctl

    torch.set_num_threads(count)
    threadpoolctl.threadpool_limits(count)


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver that the machine has; None where no GPU shows one."""
    if DRIVER_FILE.exists():
        found = re.search(r"(?<= )\d+(\.\d+)+(?= )", DRIVER_FILE.read_text(errors="replace"))
        return found and found[0]
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"\d+(\.\d+)+", answer.stdout)
    return found and found[0]
