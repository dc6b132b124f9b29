"""`dynamo-export`: the command."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dynamo_graph.errors import WriteError
from dynamo_quantize.schemes import ALGORITHMS, BLOCK_SIZES, KV_CACHES, PRECISIONS, SCHEMES, Options, Part
from dynamo_runtime.bundle import MANIFEST

DESCRIPTION = "Export a multi-token model as a bundle: an ONNX graph and everything a device needs to run it."


PART_NAMES = {
    Part.STEM: "layers before the base's last",
    Part.FIRST_HEAD: "base's last layer",
    Part.HEADS: "further heads, or the joint head",
    Part.OUTPUT: "output embedding",
    Part.INPUT: "input embedding",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments; `optimum-cli export dynamo` takes the same."""
    parser.add_argument("output", metavar="OUT/model.onnx", help="the graph; its folder becomes the bundle")
    parser.add_argument(
        "-m",
        "--model",
        metavar="FOLDER_OR_HUB_ID",
        help="multi-token checkpoint, or with --quantize a bundle in fp32, for which no torch is needed (default: the "
        "model of Python source code that ships with the package)",
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
        metavar="TOKENS",
        help="longest sequence that is compared with the torch model (default: 16384)",
    )
    group = parser.add_argument_group("quantization (defaults are the scheme's: docs/quantization.md)")
    group.add_argument(
        "--quantize", choices=["none", *SCHEMES], default="none", help="int8 is best on most CPUs (default: none)"
    )
    for part in Part:
        group.add_argument(
            f"--{part.replace('_', '-')}-precision", choices=PRECISIONS, help=f"of the {PART_NAMES[part]}"
        )
    group.add_argument("--block-size", type=int, choices=BLOCK_SIZES, help="weights that share a scale")
    group.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        help="of 4-bit weights: rounded to nearest, or by what they meet in the calibration text",
    )
    group.add_argument(
        "--symmetric", action=argparse.BooleanOptionalAction, help="4-bit blocks without zero points, or with them"
    )
    group.add_argument("--kv-cache", choices=KV_CACHES, help="int8: a scale per channel, from the calibration text")
    group.add_argument(
        "--calibration",
        metavar="TEXT",
        help="a folder of text files, a text file or a .jsonl file (default: Python's standard library)",
    )
    group.add_argument(
        "--gate-text",
        metavar="TEXT",
        help="what the gates run on (default: the part of the standard library that training holds out)",
    )
    group.add_argument("--max-perplexity-loss", type=float, metavar="PERCENT", help="over fp32, of the quality gate")
    group.add_argument("--max-acceptance-loss", type=float, metavar="PERCENT", help="of the tokens per pass")
    group.add_argument(
        "--allow-degraded", action="store_true", help="write the bundle even if a gate fails, and mark it"
    )


def run(arguments: argparse.Namespace, name: str = "dynamo-export") -> int:
    """Runs the command.

    Returns:
        The exit status.
    """
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
    for package in ("dynamo_export", "dynamo_quantize"):
        logging.getLogger(package).setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run(arguments)
    except WriteError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def _run(arguments: argparse.Namespace) -> None:
    quantization = _quantization(arguments)
    writing = {"overwrite": arguments.overwrite, "external_data": arguments.external_data}
    if _is_bundle(arguments.model):
        given = [
            f for f in ("drafter", "heads", "context_length", "parity_length") if getattr(arguments, f) is not None
        ]
        if given:
            raise WriteError(f"--{given[0].replace('_', '-')} is settled in a bundle: export the checkpoint again")
        if not quantization:
            raise WriteError(f"{arguments.model} is a bundle already: choose a scheme with --quantize")
        with _needing("quantize", "quantizing"):
            from dynamo_quantize import quantize_bundle

        quantize_bundle(arguments.model, arguments.output, quantization.pop("quantize"), **writing, **quantization)
        return
    with _needing("export", "exporting a checkpoint (a bundle has a dynamo_config.json)"):
        from .export import export_bundle

    if arguments.parity_length is not None:
        writing["parity_length"] = arguments.parity_length
    export_bundle(
        arguments.output,
        arguments.model,
        heads=arguments.heads,
        drafter=arguments.drafter,
        context_length=arguments.context_length,
        **writing,
        **quantization,
    )


@contextmanager
def _needing(extra: str, what: str) -> Iterator[None]:
    """Says which extra is missing where an import fails.

    Raises:
        WriteError: The import failed.
    """
    try:
        yield
    except ImportError as error:
        raise WriteError(f"{what} needs {error.name}: pip install 'dynamo-edge[cpu,{extra}]'") from error


def _terminate(number: int, frame: object) -> NoReturn:
    """Ends the process as a signal would, but not before what was staged is removed."""
    raise SystemExit(128 + number)


def _is_bundle(model: str | None) -> bool:
    if model is None:
        return False
    path = Path(model)
    return path.suffix == ".onnx" or (path / MANIFEST).is_file()


def _quantization(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `quantize_bundle` takes; empty without --quantize.

    Raises:
        WriteError: Something of it was given without --quantize.
    """
    parts = {part: getattr(arguments, f"{part}_precision") for part in Part}
    options = Options(
        parts={str(part): precision for part, precision in parts.items() if precision is not None},
        block_size=arguments.block_size,
        symmetric=arguments.symmetric,
        algorithm=arguments.algorithm,
        kv_cache=arguments.kv_cache,
        perplexity_limit=arguments.max_perplexity_loss,
        tokens_per_pass_limit=arguments.max_acceptance_loss,
    )
    texts = {"calibration": arguments.calibration, "gate_text": arguments.gate_text}
    if arguments.quantize == "none":
        if options != Options() or any(texts.values()) or arguments.allow_degraded:
            raise WriteError("options of quantization need a scheme: --quantize " + "|".join(SCHEMES))
        return {}
    return {"quantize": arguments.quantize, "options": options, "allow_degraded": arguments.allow_degraded, **texts}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `dynamo-export`."""
    parser = argparse.ArgumentParser(prog="dynamo-export", description=DESCRIPTION)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
