"""A conversation at the terminal: a line is a question, and its answer comes as it is written."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from ..conversation import Conversation
from ..errors import DynamoError, PromptError
from ..stream import TextStream
from .drafts import View
from .ending import INTERRUPTED, fail, put_out, say

EXIT, RESET = "/exit", "/reset"


def converse(prog: str, conversation: Conversation, options: dict[str, Any], view: View | None = None) -> int:
    """Answer line after line until there are no more; returns the command's exit code.

    At a terminal a question that cannot be answered is complained of, and Ctrl-C stops an answer; elsewhere both are
    the end.

    Args:
        prog: Name of the command.
        conversation: What is gone on with.
        options: Of `Engine.stream`.
        view: How tokens show where they come from; options then have `origins`.
    """
    check_stdin()
    if not sys.stdin.isatty():
        return _take_turns(prog, conversation, options, _piped(), view, typed=False)
    say(f"{prog}: Ctrl-C stops an answer, {RESET} begins anew, {EXIT} or Ctrl-D ends")
    with _on_interrupt(lambda number, frame: None):  # where neither a line nor an answer is under way
        return _take_turns(prog, conversation, options, _typed(), view, typed=True)


def check_stdin() -> None:
    """See that there is something to read.

    Raises:
        PromptError: Stdin was closed when the command began.
    """
    if sys.stdin is None:
        raise PromptError("stdin is closed: there is nothing to read from it")


def _take_turns(
    prog: str,
    conversation: Conversation,
    options: dict[str, Any],
    lines: Iterator[str],
    view: View | None,
    *,
    typed: bool,
) -> int:
    for line in lines:
        if line.strip() == EXIT:
            break
        if line.strip() == RESET:
            conversation.reset()
        elif line.strip():
            try:
                stream = conversation.say(line, **options)
                interrupted = _answer(stream, view, typed)
                if view is not None:
                    view.finish(f"> {line}\n", stream)
            except DynamoError as error:
                if not typed:
                    raise
                fail(prog, error)
                continue
            if interrupted:
                return INTERRUPTED
    return 0


def write(stream: TextStream, view: View | None = None) -> bool:
    """Write the pieces as they come; True if the user interrupted.

    Args:
        stream: The text.
        view: How its tokens show where they come from.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", newline="")
    try:
        for piece in stream if view is None else view.pieces(stream):
            put_out(piece)
    except KeyboardInterrupt:
        return True
    return False


def _answer(stream: TextStream, view: View | None, typed: bool) -> bool:
    # Behind the pass that runs, so that cache and text are whole.
    with _on_interrupt(lambda number, frame: stream.cancel()) if typed else contextlib.nullcontext():
        interrupted = write(stream, view)
    put_out("\n")
    say(stream.statistics.line())
    return interrupted


@contextlib.contextmanager
def _on_interrupt(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Yield what Ctrl-C does meanwhile."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
    """Yield lines of a terminal, edited with readline where there is one."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (makes `input` an editor)
    while True:
        try:
            with _on_interrupt(signal.default_int_handler):
                line = input("> " if sys.stdout.isatty() else "")
        except KeyboardInterrupt:
            say("")
            continue
        except EOFError:
            say("")
            return
        yield line


def _piped() -> Iterator[str]:
    lines = iter(sys.stdin.buffer)
    while True:
        try:
            line = next(lines, b"")
        except OSError as error:
            raise PromptError(f"stdin cannot be read: {error.strerror or error}") from error
        if not line:
            return
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise PromptError("a question on stdin is not valid UTF-8") from None
