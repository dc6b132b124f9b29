"""Where the commands begin: with next to no imports, so that Ctrl-C during those of a command ends it quietly too."""

import importlib
import signal
from types import FrameType

from .ending import INTERRUPTED


def run() -> int:
    """`dynamo-run`."""
    return _start("dynamo_runtime.cli.run")


def profile() -> int:
    """`dynamo-profile`."""
    return _start("dynamo_runtime.cli.profile")


def quantize() -> int:
    """`dynamo-quantize`."""
    return _start("dynamo_quantize.cli")


def export() -> int:
    """`dynamo-export`."""
    return _start("dynamo_export.cli")


def train() -> int:
    """`dynamo-train`."""
    return _start("dynamo_train.train")


def _start(module: str) -> int:
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, press)
        code: int = importlib.import_module(module).main()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        if not pressed:  # else it is why something failed
            raise
        return INTERRUPTED
    # A library that is interrupted while it loads may call that another error.
    return INTERRUPTED if pressed and code == 1 else code
