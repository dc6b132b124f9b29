"""How commands end: their exit codes, as a shell reports signals, and what they still say."""

import contextlib
import os
import sys

INTERRUPTED, BROKEN_PIPE = 130, 141


def fail(prog: str, message: object) -> int:
    """Complain in one line; returns the exit code."""
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 1


def nobody_reads() -> int:
    """End after a `BrokenPipeError` without a complaint, nor one of the interpreter's last flush; returns the code."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE
