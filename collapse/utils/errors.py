"""Errors the user can fix, and how a script starts and ends."""

import errno
import re
import sys
from collections.abc import Callable
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """An error the user can fix; its message is one sentence that says how."""


def check_name(path: str | Path) -> None:
    """Raise UserError for a path that is not valid UTF-8, which JSON files cannot store."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        readable = str(path).encode(errors="replace").decode()
        raise UserError(f"the name {readable} is not valid UTF-8: rename it.") from None


def expand_home(argument: str) -> str:
    """A command-line argument with ~ expanded, which the shell does not do in --output-dir=~/x.

    Raises UserError for a path that is not valid UTF-8.
    """
    check_name(argument)
    match = re.fullmatch(r"(--[\w-]+=)?(~(?:/.*)?)", argument, re.DOTALL)
    return f"{match[1] or ''}{Path(match[2]).expanduser()}" if match else argument


GO_ON = "the same command, without --fresh, goes on from the last checkpoint."


def run_script(main: Callable[[], None], stopped: str = f"stopped; {GO_ON}") -> None:
    """Run a script's main; an error the user can fix ends in one sentence and exit code 2.

    stopped: what is printed after Ctrl-C.
    """
    try:
        sys.argv[1:] = map(expand_home, sys.argv[1:])
        return main()
    except KeyboardInterrupt:
        message, code = stopped, 130
    except Exception as error:
        message, code = what_to_do(error), 2
        if message is None:
            raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def what_to_do(error: Exception) -> str | None:
    """The sentence to print for an error that the user can fix; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return "GPU memory is full: end other programs that use the GPU, or use a smaller model."
    if not isinstance(error, OSError):
        return None
    if error.errno in DISK_FULL:
        return f"the disk is full: free some space; {GO_ON}"
    if (
        isinstance(error, PermissionError | NotADirectoryError | FileExistsError)
        or error.errno == errno.EROFS
    ):
        where = f"{error.filename} ({error.strerror})"
        return f"cannot open {where}: fix that, or choose another folder with --output-dir."
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU ran out of memory, as torch's allocator, CUDA or cuBLAS report it."""
    if not isinstance(error, RuntimeError):  # as torch's OutOfMemoryError and AcceleratorError are
        return False
    import torch  # takes seconds, and whoever only starts jobs needs none of it

    message = str(error).lower()
    full = "out of memory" in message or "cublas_status_alloc_failed" in message
    return full or isinstance(error, torch.OutOfMemoryError)
