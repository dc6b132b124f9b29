"""`dynamo-quantize`: the command, and the arguments that `dynamo-export` shares with it."""

from __future__ import annotations

import argparse
import logging
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dynamo_graph.errors import WriteError
from dynamo_runtime.cli.arguments import add_version
from dynamo_runtime.cli.ending import open_streams

from .schemes import ALGORITHMS, BLOCK_SIZES, KV_CACHES, PRECISIONS, SCHEMES, Options, Part

DESCRIPTION = "Make a bundle in fp32 smaller, and prove what that costs. Needs no torch."
GRAPH = "model.onnx"
NOTHING: dict[str, Any] = {"options": Options(), "calibration": None, "gate_text": None, "allow_degraded": False}
PART_NAMES = {
    Part.STEM: "layers before the base's last",
    Part.FIRST_HEAD: "base's last layer",
    Part.HEADS: "further heads, or the joint head",
    Part.OUTPUT: "output embedding",
    Part.INPUT: "input embedding",
}


def add_writing(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add the arguments on how a bundle is written, and return them."""
    return [
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier export of the same name"),
        parser.add_argument(
            "--external-data", action="store_true", help="weights in a file of their own, as they are from 1.5 GB on"
        ),
        parser.add_argument("--debug", action="store_true", help="show where an error comes from, all of it"),
    ]


def add_quantization(parser: argparse.ArgumentParser, scheme: str, **settings: Any) -> list[argparse.Action]:
    """Add the arguments of quantization.

    Args:
        parser: Where to.
        scheme: The argument that chooses the scheme.
        **settings: What argparse is told of it.

    Returns:
        All the others.
    """
    group = parser.add_argument_group("quantization (defaults are the scheme's: docs/quantization.md)")
    group.add_argument(scheme, **settings)
    parts = [
        group.add_argument(
            f"--{part.replace('_', '-')}-precision", choices=PRECISIONS, help=f"of the {PART_NAMES[part]}"
        )
        for part in Part
    ]
    return [
        *parts,
        group.add_argument(
            "--block-size",
            type=int,
            choices=BLOCK_SIZES,
            help="weights that share a scale (without it 64 at 8 bits and 32 at 4; int4's output embedding: 128)",
        ),
        group.add_argument(
            "--algorithm",
            choices=ALGORITHMS,
            help="of 4-bit weights: rounded to nearest, or by what they meet in the calibration text",
        ),
        group.add_argument(
            "--symmetric", action=argparse.BooleanOptionalAction, help="4-bit blocks without zero points, or with them"
        ),
        group.add_argument(
            "--kv-cache", choices=KV_CACHES, help="int8: a scale per channel, from the calibration text"
        ),
        group.add_argument(
            "--calibration",
            metavar="TEXT",
            help="a folder of text files, a text file or a .jsonl file (default: what the model itself answers to "
            "questions of ours, where it has a chat template, else Python's standard library)",
        ),
        group.add_argument(
            "--gate-text",
            metavar="TEXT",
            help="what the gates run on (default: its answers to other questions, else the part of the standard "
            "library that training holds out)",
        ),
        group.add_argument(
            "--max-perplexity-loss", type=float, metavar="PERCENT", help="over fp32, of the quality gate"
        ),
        group.add_argument("--max-acceptance-loss", type=float, metavar="PERCENT", help="of the tokens per pass"),
        group.add_argument(
            "--allow-degraded", action="store_true", help="write the bundle even if a gate fails, and mark it"
        ),
    ]


def requested(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what `quantize_bundle` takes of the arguments of `add_quantization`; `NOTHING` where none was given."""
    parts = {str(part): getattr(arguments, f"{part}_precision") for part in Part}
    options = Options(
        parts={part: precision for part, precision in parts.items() if precision is not None},
        block_size=arguments.block_size,
        symmetric=arguments.symmetric,
        algorithm=arguments.algorithm,
        kv_cache=arguments.kv_cache,
        perplexity_limit=arguments.max_perplexity_loss,
        tokens_per_pass_limit=arguments.max_acceptance_loss,
    )
    return {
        "options": options,
        "calibration": arguments.calibration,
        "gate_text": arguments.gate_text,
        "allow_degraded": arguments.allow_degraded,
    }


def graph_in(folder: str) -> str:
    """Return the graph that `-o` names: the folder's `model.onnx`, or itself where it is an `.onnx` file."""
    return folder if Path(folder).suffix == ".onnx" else str(Path(folder) / GRAPH)


def command_line(bundle: str, graph: str, scheme: str, arguments: argparse.Namespace) -> str:
    """Return the `dynamo-quantize` command, quoted for a shell, that does what a command with its arguments does.

    Args:
        bundle: What is quantized.
        graph: The graph to write.
        scheme: Name of the scheme.
        arguments: Those of `add_writing` and `add_quantization`.
    """
    path = Path(graph)
    words = ["dynamo-quantize", bundle, "-o", str(path.parent if path.name == GRAPH else path), "--scheme", scheme]
    parser = argparse.ArgumentParser()
    for action in [*add_writing(parser), *add_quantization(parser, "--scheme")]:
        value = getattr(arguments, action.dest)
        if isinstance(value, bool) and value != action.default:
            words.append(action.option_strings[0 if value else 1])
        elif value != action.default:
            words += [action.option_strings[0], str(value)]
    return shlex.join(words)


def guarded(work: Callable[[], None], name: str, debug: bool = False) -> int:
    """Run a command that writes a bundle.

    Args:
        work: What it does.
        name: What it is called in messages.
        debug: Whether an error's traceback is shown as well.

    Returns:
        The exit status.
    """
    open_streams()
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
    for package in ("dynamo_model", "dynamo_export", "dynamo_quantize"):
        logging.getLogger(package).setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        work()
    except KeyboardInterrupt as interrupt:  # its message is what was on disk when the destination was left
        print(f"{name}: interrupted, {interrupt or 'nothing was written'}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"{name}: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    """Return what there is to say of an error: ours say it all, those of other libraries only what they are."""
    said = " ".join(str(error).split())
    if isinstance(error, WriteError):
        return said
    return f"{type(error).__name__}: {said[:300]} (nobody expected this: --debug shows where it comes from)"


def _terminate(number: int, frame: object) -> NoReturn:
    """End the process as a signal would, but not before what was staged is removed."""
    raise SystemExit(128 + number)


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Say which extra is missing where an import fails.

    Raises:
        WriteError: The import failed.
    """
    try:
        yield
    except ImportError as error:
        raise WriteError(f"{what} needs {error.name}: pip install 'dynamo-edge[cpu,{extra}]'") from error


def quantize(bundle: str, graph: str, scheme: str, arguments: argparse.Namespace) -> None:
    """Quantize a bundle; arguments as of `command_line`.

    Raises:
        WriteError: As `quantize_bundle`, or its libraries are missing.
    """
    with needing("quantize", "quantizing"):
        from dynamo_quantize import quantize_bundle

    quantize_bundle(
        bundle,
        graph,
        scheme,
        overwrite=arguments.overwrite,
        external_data=arguments.external_data,
        **requested(arguments),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dynamo-quantize`."""
    parser = argparse.ArgumentParser(prog="dynamo-quantize", description=DESCRIPTION)
    add_version(parser)
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle in fp32, or its .onnx file; it is only read")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help=f"the new bundle; its graph will be FOLDER/{GRAPH}"
    )
    add_writing(parser)
    add_quantization(parser, "--scheme", choices=SCHEMES, required=True, help="int8 is best on most CPUs")
    given = parser.parse_args(argv)
    return guarded(
        lambda: quantize(given.bundle, graph_in(given.output), given.scheme, given), parser.prog, given.debug
    )


if __name__ == "__main__":
    sys.exit(main())
