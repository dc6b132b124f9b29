"""`dynamo-eval`: what the speed costs in quality."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .loading import interruptible

INTERRUPTED = 130  # as in `dynamo_runtime.cli.ending`, which takes its time to load


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        with interruptible():
            from .commands.run import run

        return run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("dynamo-eval: interrupted; the same command goes on from what its results file has kept", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
