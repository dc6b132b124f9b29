"""What the commands of the runtime have in common on their command lines."""

import argparse
from typing import Any, NoReturn

from .errors import ParameterError
from .providers import OPTIMIZATIONS


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one line."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a graph is run."""
    group = parser.add_argument_group("where and how the graph runs")
    group.add_argument(
        "--provider",
        default="auto",
        help="execution provider: cpu, cuda or any other that the installed onnxruntime has; auto is cuda for bundles "
        "in half precision where it works, else cpu (default: auto)",
    )
    group.add_argument(
        "--provider-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of that provider, as onnxruntime names it; repeatable",
    )
    group.add_argument("--threads", type=int, metavar="N", help="threads within an operator (default: all cores)")
    group.add_argument(
        "--spinning",
        action="store_true",
        help="idle threads go on spinning: a little faster, at the cost of busy cores",
    )
    group.add_argument(
        "--graph-optimization",
        default="all",
        metavar="LEVEL",
        help=f"onnxruntime's graph optimizations: {', '.join(OPTIMIZATIONS)} (default: all)",
    )


def backend(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `Backend` from the flags.

    Raises:
        ParameterError: A provider option is not KEY=VALUE.
    """
    for option in args.provider_option:
        if "=" not in option:
            raise ParameterError(f"a provider option must be KEY=VALUE, not {option!r}")
    return {
        "provider": args.provider,
        "provider_options": dict(option.split("=", 1) for option in args.provider_option),
        "threads": args.threads,
        "spinning": args.spinning,
        "optimization": args.graph_optimization,
    }
