"""Where the commands begin: with next to no imports, so that Ctrl-C during those of a command ends it quietly too."""

import importlib

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
    try:
        code: int = importlib.import_module(module).main()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
