"""Device, driver, threads and GPU memory of this process."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from collapse.utils.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device for --device. Raises UserError for cuda where torch sees no CUDA device."""
    if name == "cpu" or torch.cuda.is_available():
        return torch.device("cuda" if name == "auto" else name)
    driver = nvidia_driver()
    mismatch = (
        f"NVIDIA's driver {driver} is here, but torch {torch.__version__} sees no CUDA device"
    )
    version = torch.__version__.partition("+")[0]
    fix = (
        "its builds for CUDA 13 need driver 580 or newer: update the driver, or install the build "
        "for CUDA 12.9, `.venv/bin/pip install --force-reinstall --no-deps "
        f"torch=={version} --index-url URL/cu129` with the URL that PyTorch's installation page "
        "gives, then the packages that this build asks for"
    )
    if name == "cuda" and driver:
        raise UserError(f"--device cuda: {mismatch}; {fix}.")
    if name == "cuda":
        raise UserError(
            "--device cuda, but torch sees no CUDA device: "
            "use --device auto, or install a CUDA build of torch."
        )
    if driver:
        print(f"warning: {mismatch}; {fix}. This goes on with the CPU.", flush=True)
    return torch.device("cpu")


DRIVER_FILE = Path("/proc/driver/nvidia/version")


def set_allocator() -> None:
    """Let torch's GPU allocator use growing segments; call it before anything is on the GPU.

    Steps differ in length, and in segments that grow, freed memory fits a step of any size. A
    setting of the user's stays. Under WSL nothing is set: there the first allocation in such a
    segment can fail ("CUDA driver error: unknown error").
    """
    if not on_wsl():
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def on_wsl() -> bool:
    """Whether this is Linux under Windows, whose kernels are named after their maker."""
    return "microsoft" in platform.release().lower()


WSL_RESERVE = 2 * 2**30  # bytes


def cap_memory_on_wsl(device: torch.device) -> None:
    """Under WSL limit torch to the GPU memory that is free, less WSL_RESERVE.

    Windows reports memory as free that it does not give, and silently moves what exceeds it into
    main memory, which is a hundred times slower. With this limit torch raises an error instead.
    """
    if device.type != "cuda" or not on_wsl():
        return
    free, total = torch.cuda.mem_get_info(device)
    most = torch.cuda.memory_reserved(device) + free - WSL_RESERVE
    allowed = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(allowed, max(0.0, most / total)), device)


def cap_memory(gib: float) -> None:
    """Limit this process to so many GiB of the GPU, its CUDA context included."""
    torch.cuda.synchronize()  # makes the context
    free, total = torch.cuda.mem_get_info()
    # A context takes less than a GiB; other processes hold the rest.
    context = min(2**30, total - free - torch.cuda.memory_reserved())
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib * 2**30 - context) / total))


FIRST_WITH_BFLOAT16 = (8, 0)  # CUDA's compute capability: Ampere


def check_card(device: torch.device, dtype: str) -> None:
    """Raise UserError for a GPU too old for bfloat16, in which language models train here."""
    if device.type != "cuda" or dtype != "bfloat16" or not torch.cuda.is_available():
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_WITH_BFLOAT16:
        version = ".".join(map(str, capability))
        raise UserError(
            f"the {torch.cuda.get_device_name(device)} (compute capability {version}) "
            "does not compute in bfloat16, which takes 8.0 or more (RTX 30 and newer, A100, L4): "
            "give --compute-dtype float32 and a smaller model, as --model Qwen/Qwen2.5-0.5B."
        )


def set_threads(count: int) -> None:
    """Set the number of threads of torch and of numpy's linear algebra, in this process.

    With another number of threads sums differ in their last digits. And processes with several
    threads each block each other: with two of two threads an SVD of 1,000 x 128 takes 30 times as
    long.
    """
    import threadpoolctl

    torch.set_num_threads(count)
    threadpoolctl.threadpool_limits(count)


def nvidia_driver() -> str | None:
    """Version of the machine's NVIDIA driver; None without one."""
    if DRIVER_FILE.exists():
        version = re.search(r"(?<= )\d+(\.\d+)+(?= )", DRIVER_FILE.read_text(errors="replace"))
        return version and version[0]
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.match(r"\d+(\.\d+)+", answer.stdout)
    return version and version[0]
