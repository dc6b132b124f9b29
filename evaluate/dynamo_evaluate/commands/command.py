"""What a command of `dynamo-eval` is, and what they have in common."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_runtime.errors import printable

from ..errors import EvaluationError
from ..loading import interruptible

PROG = "dynamo-eval"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: As it is typed.
        help: What it is for, in one line.
        add_arguments: Adds its flags to a parser.
        work: Does it, from checked arguments to tables.
        needs: Modules of the extra [eval] that the work imports; they take long, so only the work does.
        passes_on: Whether its flags are another program's, not ours to read.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    work: Callable[[argparse.Namespace], None]
    needs: Sequence[str] = ("scipy", "tqdm")
    passes_on: bool = False

    def run(self, args: argparse.Namespace) -> None:
        """Do it.

        Raises:
            EvaluationError: The extra is not installed.
            DynamoError: See there.
        """
        for module in self.needs:
            try:
                with interruptible():
                    importlib.import_module(module)
            except ImportError as error:
                raise EvaluationError(f"this needs {error.name}: pip install 'dynamo-edge[cpu,eval]'") from error
        self.work(args)


def note(text: str) -> None:
    """Say something on stderr."""
    print(f"{PROG}: note: {printable(text)}", file=sys.stderr)


def at_least(least: int, args: argparse.Namespace, *names: str) -> None:
    """Check numbers that may have been given.

    Raises:
        EvaluationError: One is too small.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise EvaluationError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def to_json(values: Any) -> str:
    """As it is written to a file; file names that are no text are in it as escapes."""
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace").decode()
