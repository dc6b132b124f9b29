"""`dynamo-eval`: what the speed costs in quality."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dynamo_runtime.bundle import DEFAULT_BUNDLE
from dynamo_runtime.cli.arguments import Parser, add_backend, add_drafts, add_dynamo, add_sampling
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.strategies import STRATEGIES, Dynamo

from .errors import EvaluationError

PROG = "dynamo-eval"
HARNESS = "harness"
JUDGEMENTS = ("score", "pair")
_INTERRUPTED, _BROKEN_PIPE = 130, 141  # as a shell reports the signals


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog=PROG,
        description="What a bundle's speed costs in quality, measured on the bundle.",
        epilog=f"{PROG} COMMAND --help says more.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help_text, add) in COMMANDS.items():
        add(commands.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}."))
    return parser


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="BUNDLE|TEXT",
        help="bundles (.onnx files or their folders) side by side; then texts: files, folders, .jsonl with a field "
        "text, or stdlib, the held-out Python modules of this machine (default: the bundle that ships, and stdlib)",
    )
    parser.add_argument("--window", type=int, metavar="N", help="tokens of a window (default: the context)")
    parser.add_argument("--stride", type=int, metavar="N", help="how much later the next begins (default: half of it)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many texts, evenly spread")
    parser.add_argument("--limit-tokens", type=int, metavar="N", help="of every text the first so many tokens")
    parser.add_argument(
        "--thresholds",
        nargs="*",
        default=["0:1:0.1"],
        metavar="E",
        help="ε_b of the dynamic perplexities: numbers, or BEGIN:END:STEP; nothing for none (default: 0:1:0.1)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="results, as .jsonl; a run goes on in it")
    parser.add_argument("--overwrite", action="store_true", help="begin the results anew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    add_sampling(parser)
    add_dynamo(parser)
    add_backend(parser)


def _add_grid(parser: argparse.ArgumentParser) -> None:
    _add_generation(parser, ["0:1:0.02"], 10)
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        choices=[name for name in STRATEGIES if name != Dynamo.name],
        help="another strategy of the same bundle, beside the grid; repeatable",
    )
    add_dynamo(parser)
    add_drafts(parser)


def _add_ablation(parser: argparse.ArgumentParser) -> None:
    _add_generation(parser, ["0.1:0.9:0.2"], 3)
    parser.set_defaults(also=[])


def _add_generation(parser: argparse.ArgumentParser, thresholds: list[str], seeds: int) -> None:
    parser.add_argument("bundle", nargs="?", default=DEFAULT_BUNDLE, help="bundle with parallel heads (default: ours)")
    parser.add_argument(
        "--plain",
        metavar="BUNDLE",
        help="the same model exported with --heads 0, to compare with (default: BUNDLE-plain beside it, else this "
        "bundle without its heads)",
    )
    parser.add_argument(
        "--prompts",
        default="paper",
        metavar="SET",
        help="paper: its ten; stdlib: held-out Python modules of this machine; or a file: one prompt a line, or JSON "
        "lines as of Vicuna, MT-Bench, Spec-Bench or HumanEval (default: paper)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many prompts")
    parser.add_argument("--code", action="store_true", help="a file's prompts are Python: measure what parses")
    parser.add_argument(
        "--template", default="{prompt}", help="what a prompt is put into, e.g. 'USER: {prompt} ASSISTANT:'"
    )
    parser.add_argument(
        "--seeds", type=int, default=seeds, metavar="N", help=f"draws of every setting (default: {seeds})"
    )
    parser.add_argument(
        "--thresholds",
        nargs="+",
        default=thresholds,
        metavar="E",
        help=f"ε_b of the grid: numbers, or BEGIN:END:STEP (default: {' '.join(thresholds)})",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="a turn (default: 128)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on behind the end of a text, for equal lengths")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="results, as .jsonl; a run goes on in it"
    )
    parser.add_argument("--overwrite", action="store_true", help="begin the results anew")
    add_sampling(parser)
    add_backend(parser)


def _add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="of generate or ablation; the judgements are added to it")
    parser.add_argument(
        "--mauve",
        metavar="FEATURES",
        help="MAUVE against plain's texts, with features of a bundle with heads, or of a Hugging Face model's folder",
    )
    parser.add_argument("--model", metavar="NAME", help="a language model as judge, by its name at the endpoint")
    parser.add_argument(
        "--endpoint", metavar="URL", help="of any server that speaks OpenAI's protocol (default: OpenAI's own)"
    )
    parser.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the key, which is never written anywhere (default: OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--ask",
        nargs="+",
        choices=JUDGEMENTS,
        default=list(JUDGEMENTS),
        help="score: grades from 1 to 10; pair: which is better, this or plain's, in random order (default: both)",
    )
    parser.add_argument(
        "--request",
        default='{"temperature": 0}',
        metavar="JSON",
        help="what the model is asked for beside its answer, for servers that want something else (default: "
        '{"temperature": 0})',
    )
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="only these settings (default: all)")
    parser.add_argument("--limit", type=int, metavar="N", help="ask only about the first so many prompts")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="questions under way (default: 4)")
    add_backend(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="of generate, ablation or perplexity")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.md, report.json and plots there")
    parser.add_argument("--degree", type=int, default=2, metavar="N", help="of the regressions (default: 2)")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="results of generate, ablation or perplexity")
    parser.add_argument("b", type=Path, help="others of the same command")


def _add_harness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see lm-eval --help; the model is called dynamo")


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "perplexity": ("perplexities of every token ahead, and the dynamic one", _add_perplexity),
    "generate": ("continue prompts over a grid of back-off thresholds: speed, and quality against plain's", _add_grid),
    "ablation": ("the same for the paper's ablation (mask, Otsu, blur), and other readings of it", _add_ablation),
    "judge": ("add judgements to generations: MAUVE, or a language model's behind any endpoint", _add_judge),
    "report": ("results as tables, JSON and plots", _add_report),
    "compare": ("two results files side by side", _add_compare),
    HARNESS: ("lm-evaluation-harness with a bundle as its model", _add_harness),
}
"""What each is for, and its flags; what it does is in `commands.RUN`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [HARNESS]:  # its flags are lm-eval's, not ours to read
        args = argparse.Namespace(command=HARNESS, arguments=given[1:])
    else:
        args = build_parser().parse_args(given)
    try:
        _command(args.command)(args)
        return 0
    except DynamoError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command goes on from what its results file has kept", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more: no complaint, and none from the interpreter's last flush either.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _command(name: str) -> Callable[[argparse.Namespace], None]:
    try:
        from . import commands
    except ImportError as error:
        raise EvaluationError(f"this needs {error.name}: pip install 'dynamo-edge[cpu,eval]'") from error
    return commands.RUN[name]


if __name__ == "__main__":
    sys.exit(main())
