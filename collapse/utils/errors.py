"""Errors the user can fix, and how a script starts and ends."""

import errno
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something the person at the keyboard can mend; its message is one sentence that says how."""


def check_name(path: str | Path) -> None:
    """Raise UserError for a path that no results file can hold: bytes that are no UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        readable = str(path).encode(errors="replace").decode()
        raise UserError(f"the name {readable} is no UTF-8: rename it.") from None


def expand_home(argument: str) -> str:
    """An argument of the command line whose ~ the shell left, as in --output-dir=~/x.

    Raises UserError for a path that no results file can hold.
    """
    check_name(argument)
    match = re.fullmatch(r"(--[\w-]+=)?(~(?:/.*)?)", argument, re.DOTALL)
    return f"{match[1] or ''}{Path(match[2]).expanduser()}" if match else argument


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: what a person can mend ends in one sentence and exit code 2."""
    try:
        sys.argv[1:] = map(expand_home, sys.argv[1:])
        return main()
    except KeyboardInterrupt:
        message = "stopped; the same command, without --fresh, goes on from the last checkpoint."
        code = 130
    except Exception as error:
        message, code = what_to_do(error), 2
        if message is None:
            raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def what_to_do(error: Exception) -> str | None:
    """The sentence for a person who can mend what was raised; None for an error of the code."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return "GPU memory is full: end other programs that use the GPU, or use a smaller model."
    if not isinstance(error, OSError):
        return None
    if error.errno in DISK_FULL:
        go_on = "the same command, without --fresh, goes on from the last checkpoint."
        return f"the disk is full: free some space; {go_on}"
    if (
        isinstance(error, PermissionError | NotADirectoryError | FileExistsError)
        or error.errno == errno.EROFS
    ):
        where = f"{error.filename} ({error.strerror})"
        return f"cannot write {where}: choose another folder with --output-dir."
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory was too small: torch's allocator says so, CUDA, or cuBLAS."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and (  # torch.AcceleratorError is one
        "out of memory" in message or "cublas_status_alloc_failed" in message
    )
