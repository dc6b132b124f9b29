"""`dynamo-eval harness`."""

from __future__ import annotations

import argparse
import importlib
import sys

from ..errors import EvaluationError
from .command import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see lm-eval --help; the model is called dynamo")


def _work(args: argparse.Namespace) -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise EvaluationError("this needs lm-evaluation-harness: pip install 'dynamo-edge[harness]'") from None
    importlib.import_module("dynamo_evaluate.harness")  # registers the model
    sys.argv = ["lm-eval", *args.arguments]
    cli_evaluate()


HARNESS = Command(
    "harness",
    "lm-evaluation-harness with a bundle as its model",
    _add_arguments,
    _work,
    needs=(),  # has an extra of its own
    passes_on=True,
)
