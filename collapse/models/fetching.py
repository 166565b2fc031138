"""Downloads a model of the hub before training begins, and announces the size first.

A silent download of 15 GB inside the first training would look like a hang.
"""

import shutil
from pathlib import Path
from typing import Any

from collapse.models.weights import loading
from collapse.utils.errors import DISK_FULL, UserError
from collapse.utils.hub import use_cache_if_hub_is_silent

GB = 10**9
SPARE_BYTES = GB  # to leave free on the disk
# Files of a repository that load_causal_lm and a tokenizer read.
FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
FILES += ["model.safetensors", "model-*.safetensors"]


def fetch(name: str, revision: str | None) -> None:
    """Print a model's size and place, and download the files that are missing.

    name: a folder, or a model of the hub. After an interrupted download only the missing files are
    fetched. Raises UserError if the disk lacks room, before any download, or if a download fails.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if Path(name).exists():
        size = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
        return print(f"model: {name}, {size / GB:.3g} GB of weights", flush=True)
    what = {"revision": revision, "allow_patterns": FILES, "ignore_patterns": ["*/*"]}
    with loading(name):
        if use_cache_if_hub_is_silent():
            return print(f"model: {name}, from {constants.HF_HUB_CACHE}: the hub is not asked")
        files = snapshot_download(name, dry_run=True, **what)
    size, missing = (
        sum(file.file_size or 0 for file in group)
        for group in (files, [file for file in files if file.will_download])
    )
    folder, free = Path(constants.HF_HUB_CACHE), free_bytes(constants.HF_HUB_CACHE)
    print(f"model: {name}, {size / GB:.3g} GB in {len(files)} files", flush=True)
    if not missing:
        return print(f"download: none, all files are in {folder}", flush=True)
    where = f"{missing / GB:.3g} GB into {folder}, where {free / GB:.3g} GB are free"
    if free < missing + SPARE_BYTES:
        raise UserError(
            f"{name} needs {where}: free some space, or set HF_HOME to a folder of another disk."
        )
    print(f"download: {where} (HF_HOME=FOLDER before the command moves it)", flush=True)
    enable_progress_bars()  # transformers' own are off, and with them the hub's
    try:
        snapshot_download(name, **what)
    except Exception as error:  # each of these libraries raises its own kinds
        raise download_error(name, error) from None
    finally:
        disable_progress_bars()
    return None


def download_error(name: str, error: Exception) -> Exception:
    """The exception to raise for an error during a download."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return error
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return UserError(
        f"the download of {name} broke off ({reason}): run the same command again, "
        "files that are finished are kept."
    )


def free_bytes(folder: str | Path) -> int:
    """Free bytes of the disk of a folder, which need not exist yet."""
    folder = Path(folder).expanduser().absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def describe_card(device: Any, quantization: str, dtype: str) -> str:
    """A line with the GPU, its free memory, and the types that a model computes in."""
    import torch

    packed = "weights in 4 bits (NF4), " if quantization == "nf4" else ""
    computed = f"{packed}computing in {dtype}"
    if device.type == "cpu":
        return f"card: none, this runs on the CPU; {computed}"
    if not torch.cuda.is_available():
        return f"card: that of another machine; {computed}"
    free, total = torch.cuda.mem_get_info(device)
    card = torch.cuda.get_device_name(device)
    return f"card: {card}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; {computed}"
