"""Where the commands begin: with next to no imports, so that Ctrl-C during those of a command ends it quietly too."""

import importlib

from .ending import INTERRUPTED


def run() -> int:
    """`dynamo-run`."""
    return _start("run")


def profile() -> int:
    """`dynamo-profile`."""
    return _start("profile")


def _start(command: str) -> int:
    try:
        code: int = importlib.import_module(f".{command}", __package__).main()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
