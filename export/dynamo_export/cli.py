"""`dynamo-export`: the command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

DESCRIPTION = "Export a multi-token model as a bundle: an ONNX graph and everything a device needs to run it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments; `optimum-cli export dynamo` takes the same."""
    parser.add_argument("output", metavar="OUT/model.onnx", help="the graph; its folder becomes the bundle")
    parser.add_argument(
        "-m",
        "--model",
        metavar="FOLDER_OR_HUB_ID",
        help="multi-token checkpoint (default: the model of Python source code that ships with the package)",
    )
    parser.add_argument(
        "--drafter",
        choices=["parallel", "cp", "lookahead"],
        help="what predicts further tokens, where the checkpoint has several (default: its parallel heads, or else "
        "the only one it has)",
    )
    parser.add_argument(
        "--heads", type=int, metavar="N", help="parallel heads to export; 0: the plain language model (default: all)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export of the same name")
    parser.add_argument(
        "--external-data", action="store_true", help="weights in a file of their own, as they are from 1.5 GB on"
    )
    parser.add_argument(
        "--context-length", type=int, metavar="TOKENS", help="positions to cover (default: all the model has)"
    )
    parser.add_argument(
        "--parity-length",
        type=int,
        default=16_384,
        metavar="TOKENS",
        help="longest sequence that is compared with the torch model (default: %(default)s)",
    )


def run(arguments: argparse.Namespace, name: str = "dynamo-export") -> int:
    """Runs the command.

    Returns:
        The exit status.
    """
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("dynamo_export").setLevel(logging.INFO)
    from .errors import ExportError
    from .export import export_bundle

    try:
        export_bundle(
            arguments.output,
            arguments.model,
            heads=arguments.heads,
            drafter=arguments.drafter,
            overwrite=arguments.overwrite,
            external_data=arguments.external_data,
            context_length=arguments.context_length,
            parity_length=arguments.parity_length,
        )
    except ExportError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `dynamo-export`."""
    parser = argparse.ArgumentParser(prog="dynamo-export", description=DESCRIPTION)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
