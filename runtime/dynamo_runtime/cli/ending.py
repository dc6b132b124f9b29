"""How commands end: their exit codes, as a shell reports signals, and what they say to whoever can read it."""

import contextlib
import os
import sys
from typing import TextIO

from ..errors import OutputError, printable

INTERRUPTED, BROKEN_PIPE = 130, 141


def open_streams() -> None:
    """Have stdin, stdout and stderr lead nowhere if they are closed.

    Else the next file that is opened would take the place of one of them, and `print` write into another.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the command runs)


def check_stdout() -> None:
    """See that what a command is asked for can be written.

    Raises:
        OutputError: Stdout was closed when it began.
    """
    if sys.stdout is None:
        raise OutputError("stdout is closed: there is nowhere to write to")


def put_out(text: str) -> None:
    """Write to stdout, at once.

    Raises:
        OutputError: It cannot be written.
        BrokenPipeError: Nobody reads it any more.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _lead_nowhere(sys.stdout)
        raise OutputError(f"cannot write the text: {error.strerror or error}") from error


def say(lines: object, *, styled: bool = False) -> None:
    """Write to stderr; where it cannot be written, it is not.

    Args:
        lines: What is said, with nothing in it that moves a cursor: that is shown escaped.
        styled: Whether colours in it are our own, and to be shown as such.
    """
    text = str(lines)
    try:
        print(text if styled else "\n".join(map(printable, text.split("\n"))), file=sys.stderr)
    except OSError:
        _lead_nowhere(sys.stderr)


def fail(prog: str, message: object) -> int:
    """Complain in one line; returns the exit code."""
    if isinstance(message, OSError) and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"
    say(f"{prog}: error: {printable(str(message))}")
    return 1


def nobody_reads() -> int:
    """End after a `BrokenPipeError` without a complaint, nor one of the interpreter's last flush; returns the code."""
    _lead_nowhere(sys.stdout)
    return BROKEN_PIPE


def _lead_nowhere(stream: TextIO) -> None:
    """Lose what a stream has not written, so that the interpreter does not try again at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
