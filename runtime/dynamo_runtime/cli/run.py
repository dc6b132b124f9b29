"""`dynamo-run`: stream the continuation of a prompt from a bundle."""

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundle import DEFAULT_BUNDLE, MANIFEST, load_bundle
from ..device.plan import threshold_for
from ..engine import Engine, TextStream
from ..errors import DynamoError, ParameterError, PromptError
from ..parameters import resolve_parameters
from ..strategies import Auto, Autoregressive, Dynamo, Speculative
from .arguments import Parser, add_backend, add_drafts, add_dynamo, add_sampling, backend, given_sampling

PROG = "dynamo-run"
# Parameters that mean something to strategy dynamo alone: whoever gives one wants it.
DYNAMO_ONLY = {"backoff_threshold", "cooccurrence_weight", "adaptive_threshold"}
DYNAMO_ONLY |= {"otsu_zeros", "normalize_joint", "premask_test", "first_token"}
SAMPLE_PROMPT = "class Stack:\n    def __init__(self):\n"
_INTERRUPTED, _BROKEN_PIPE = 130, 141  # as a shell reports the signals


def build_parser() -> argparse.ArgumentParser:
    """The command line; sampling flags that are not given come from the bundle."""
    parser = Parser(prog=PROG, description="Continue a prompt; only the continuation goes to stdout.")
    parser.add_argument(
        "bundle",
        nargs="?",
        help="ONNX file of a bundle, or its folder (default: the model of Python source code "
        "that ships with the package)",
    )
    parser.add_argument("prompt", nargs="?", help="text to continue; - reads it from stdin")
    parser.add_argument(
        "--strategy",
        help="auto (as many verified drafts as pay on this device); autoregressive; dynamo (parallel heads, not "
        "verified); speculative (verified drafts in every pass) (default: auto, or dynamo with a flag of it)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="exact limit (default: 128)")
    add_sampling(parser)
    dynamo = add_dynamo(parser)
    dynamo.add_argument("--backoff-threshold", type=float, metavar="E", help="ε_b: 0 most tokens a pass, 1 always one")
    dynamo.add_argument(
        "--target-speedup",
        type=float,
        metavar="S",
        help="instead of a threshold: times the speed of plain decoding, by the profile of dynamo-profile",
    )
    add_drafts(parser)
    parser.add_argument("--seed", type=int, help="for reproducible draws")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end in front of TEXT; repeatable")
    parser.add_argument("--max-length", type=int, metavar="N", help="most tokens of prompt and text (default: context)")
    parser.add_argument("--verify", action="store_true", help="compare the sha256 of every file first")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="afterwards run the prompt plainly as well, interleaved, and print the ratio of speeds on "
        "stderr; plain is --compare-with, else a plain bundle in the folder BUNDLE-plain beside this one, "
        "else strategy autoregressive on this bundle",
    )
    parser.add_argument(
        "--compare-with", metavar="PLAIN", help="plain bundle (exported with --heads 0); with --compare"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs a side for --compare (default: 3)")
    add_backend(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = build_parser().parse_args(arguments)
    try:
        return _run(args)
    except DynamoError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Nobody reads any more: no complaint, and none from the interpreter's last flush either.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        return _fail(f"cannot write the text: {error}")
    except KeyboardInterrupt:
        return _INTERRUPTED


def _fail(message: str) -> int:
    print(f"{PROG}: error: {message}", file=sys.stderr)
    return 1


def _run(args: argparse.Namespace) -> int:
    if args.repeats < 1:
        raise PromptError(f"repeats must be at least 1, not {args.repeats}")
    path, prompt = _bundle_and_prompt(args.bundle, args.prompt)
    prompt = _read_stdin() if prompt == "-" else prompt
    sampling = given_sampling(args)
    loading = backend(args) | {"max_length": args.max_length}
    engine = Engine(path, verify=args.verify, **loading)
    options = {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "stop": args.stop}
    strategy = args.strategy or (Dynamo.name if DYNAMO_ONLY & set(sampling) else Auto.name)
    if args.target_speedup is not None:
        if args.strategy not in (None, Dynamo.name) or args.backoff_threshold is not None:
            raise ParameterError("--target-speedup chooses --backoff-threshold, and is for strategy dynamo alone")
        strategy = Dynamo.name
        threshold = sampling["backoff_threshold"] = threshold_for(engine.profile, args.target_speedup)
        print(f"{PROG}: note: by its profile, a back-off threshold of {threshold:.3g}", file=sys.stderr)
    stream = engine.stream(prompt, strategy=strategy, **options, **sampling)
    plain = _plain_engine(args, engine, loading) if args.compare else None
    if path is DEFAULT_BUNDLE and not args.prompt and args.bundle is None:
        sys.stdout.write(prompt)
    _warn(engine, strategy)
    interrupted = _write(stream)
    if sys.stdout.isatty():
        print(file=sys.stderr)
    print(stream.statistics.line(), file=sys.stderr)
    if interrupted:
        return _INTERRUPTED
    if plain is not None:
        # The plain side gets the same parameters, whatever defaults its own bundle has.
        resolved = resolve_parameters(engine.bundle.sampling, sampling, has_counts=engine.bundle.has_cooccurrence)
        options |= dataclasses.asdict(resolved)
        print(
            _compare(engine, strategy, plain, prompt, args.repeats, options),
            file=sys.stderr,
        )
    return 0


def _bundle_and_prompt(bundle: str | None, prompt: str | None) -> tuple[str | Path, str]:
    """What to run and what to continue: whichever is not given is ours, and a single argument is the prompt."""
    if bundle is None:
        return DEFAULT_BUNDLE, SAMPLE_PROMPT
    if prompt is not None:
        return bundle, prompt
    if bundle.endswith(".onnx") or (Path(bundle) / MANIFEST).is_file():
        raise PromptError(f"there is no prompt behind the bundle {bundle}")
    return DEFAULT_BUNDLE, bundle


def _warn(engine: Engine, strategy: str) -> None:
    """Say on stderr what the user would not expect of this bundle."""
    bundle = engine.bundle
    command = " ".join(["dynamo-profile", *([] if bundle.folder == DEFAULT_BUNDLE else [str(bundle.folder)])])
    if engine.threads is not None:
        command += f" --threads {engine.threads}"
    if strategy == Auto.name and engine.profile is None and bundle.kind != "plain" and bundle.lossless:
        print(
            f"{PROG}: note: this device has not been profiled for this bundle, so drafting is planned by rules of "
            f"thumb; `{command}` measures it, once",
            file=sys.stderr,
        )
    if bundle.degraded:
        print(f"{PROG}: note: this bundle failed its quality gates when it was quantized", file=sys.stderr)
    if strategy == Speculative.name and not bundle.lossless:
        print(
            f"{PROG}: note: {bundle.precision} makes a pass depend on how many tokens it carries, so this is "
            "not exactly the text of autoregressive",
            file=sys.stderr,
        )


def _write(stream: TextStream) -> bool:
    """Write the pieces as they come; True if the user interrupted."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", newline="")
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        return True
    return False


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise PromptError("the prompt on stdin is not valid UTF-8") from None


def _plain_engine(args: argparse.Namespace, engine: Engine, loading: dict[str, Any]) -> Engine:
    """The engine to compare with; `engine` itself if there is no plain bundle."""
    if args.compare_with:
        plain = load_bundle(args.compare_with, verify=args.verify)
    else:
        folder = engine.bundle.folder.resolve()
        sibling = Path(f"{folder}-plain")
        if engine.bundle.n_heads == 1 or not sibling.is_dir():
            return engine
        plain = load_bundle(sibling, verify=args.verify)
    if plain.n_heads != 1:
        raise PromptError(f"{plain.folder} is not a plain bundle: it has {plain.n_heads} heads (export with --heads 0)")
    return Engine(plain, **loading)


def _compare(engine: Engine, strategy: str, plain: Engine, prompt: str, repeats: int, options: dict[str, Any]) -> str:
    """Run both sides in turn, each from an empty cache; returns a line with the ratio of median speeds."""
    sides = [(engine, strategy), (plain, Autoregressive.name)]
    speeds: list[list[float]] = [[], []]
    for repeat in range(repeats):
        for index in (0, 1) if repeat % 2 == 0 else (1, 0):
            side, name = sides[index]
            side.reset()
            result = side.generate(prompt, strategy=name, **options)
            speeds[index].append(result.statistics.tokens_per_second)
    ours, theirs = (statistics.median(speed) for speed in speeds)
    what = f"plain ({plain.bundle.folder})"
    if plain is engine:
        what = "autoregressive on the same bundle (no plain bundle found: export one with --heads 0)"
    return (
        f"compare: {strategy} {ours:.1f} tokens/s, {what} {theirs:.1f} tokens/s, "
        f"ratio {ours / theirs:.2f} (medians of {repeats} interleaved runs)"
    )


if __name__ == "__main__":
    sys.exit(main())
