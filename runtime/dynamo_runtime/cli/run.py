"""`dynamo-run`: stream the continuation of a prompt, or answers, from a bundle."""

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundle import DEFAULT_BUNDLE, load_bundle
from ..chat import asked
from ..conversation import Conversation
from ..device.plan import threshold_for
from ..engine import Engine
from ..errors import DynamoError, PromptError
from ..manifest import MANIFEST
from ..registry import can_draft
from ..selection import parameters_for, read_by
from ..strategies import Auto, Autoregressive, Speculative
from .arguments import (
    Parser,
    add_backend,
    add_chat,
    add_control,
    add_drafts,
    add_dynamo,
    add_sampling,
    add_version,
    backend,
    check_chat,
    given_sampling,
    put,
)
from .conversation import check_stdin, converse, write
from .drafts import View, given, view
from .ending import INTERRUPTED, check_stdout, fail, nobody_reads, open_streams, put_out, say

PROG = "dynamo-run"
_REPEATS = 3
_NEW_TOKENS, _NEW_TOKENS_OF_AN_ANSWER = 128, 1024
SAMPLE_PROMPT = "class Stack:\n    def __init__(self):\n"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; sampling flags that are not given come from the bundle."""
    parser = Parser(prog=PROG, description="Continue a prompt; only the continuation goes to stdout.")
    _add_prompt(parser)
    parser.add_argument(
        "--strategy",
        default=Auto.name,
        help="auto (as many verified drafts as pay on this device); autoregressive; dynamo (parallel heads, not "
        "verified); speculative (verified drafts in every pass) (default: auto)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"exact limit (default: {_NEW_TOKENS}, with --chat {_NEW_TOKENS_OF_AN_ANSWER} an answer)",
    )
    add_chat(parser, question=True)
    add_sampling(parser)
    dynamo = add_dynamo(parser)
    dynamo.add_argument("--backoff-threshold", type=float, metavar="E", help="ε_b: 0 most tokens a pass, 1 always one")
    dynamo.add_argument(
        "--target-speedup",
        type=float,
        metavar="S",
        help="instead of a threshold: times the speed of plain decoding, by the profile of dynamo-profile",
    )
    group = add_drafts(parser)
    group.add_argument(
        "--draft-corpus",
        metavar="FILE",
        help="text or .jsonl file of earlier texts, which lookup searches too; indexed once",
    )
    parser.add_argument("--seed", type=int, help="for reproducible draws")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end in front of TEXT, special tokens in it or not; repeatable",
    )
    add_control(parser)
    parser.add_argument("--max-length", type=int, metavar="N", help="most tokens of prompt and text (default: context)")
    parser.add_argument(
        "--show-drafts",
        nargs="?",
        const="",
        metavar="PAGE.html",
        help="colour every token by how it came: a pass's own, an accepted draft by its depth, or lookup; where there "
        "are no colours drafts are in brackets; a name that ends in .html has a page written beside the bare text",
    )
    parser.add_argument("--verify", action="store_true", help="compare the sha256 of every file first")
    _add_compare(parser)
    add_backend(parser)
    add_version(parser)
    return parser


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        nargs="?",
        help="ONNX file of a bundle, or its folder (default: the model of Python source code "
        "that ships with the package); a single argument that is no path is the prompt",
    )
    parser.add_argument("prompt", nargs="?", help="text to continue; - reads it from stdin")
    parser.add_argument("-m", "--model", metavar="BUNDLE", help="the bundle, in place of the first argument")
    parser.add_argument("-p", "--prompt", dest="text", metavar="PROMPT", help="the prompt, in place of the last one")


def _add_compare(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--repeats", type=int, metavar="N", help=f"runs a side for --compare (default: {_REPEATS})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    open_streams()
    args = build_parser().parse_args(given(sys.argv[1:] if arguments is None else arguments))
    try:
        check_stdout()
        return _run(args)
    except DynamoError as error:
        return fail(PROG, error)
    except BrokenPipeError:
        return nobody_reads()
    except OSError as error:
        return fail(PROG, error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    if not args.compare and (args.compare_with is not None or args.repeats is not None):
        raise PromptError("--compare-with and --repeats are for --compare")
    repeats = _REPEATS if args.repeats is None else args.repeats
    if repeats < 1:
        raise PromptError(f"repeats must be at least 1, not {repeats}")
    check_chat(args)
    shown = view(args.show_drafts)
    path, text = _bundle_and_prompt(args)
    text = _read_stdin() if text == "-" else text
    sampling = given_sampling(args)
    if args.draft_corpus is not None and args.strategy not in (Auto.name, Speculative.name):
        raise PromptError(f"strategy {args.strategy} drafts nothing from a text: it takes no draft corpus")
    engine = Engine(path, backend(args), max_length=args.max_length, verify=args.verify, draft_corpus=args.draft_corpus)
    options = _options(args)
    ours = options | sampling | {"target_speedup": args.target_speedup, "drafter": args.drafter}
    if text is None:
        return _converse(args, engine, ours | {"strategy": args.strategy}, shown)
    prompt = put(args, engine.bundle, text)
    stream = engine.stream(prompt, strategy=args.strategy, origins=shown is not None, **ours)
    if args.target_speedup is not None:
        threshold = threshold_for(engine.profile, args.target_speedup)
        say(f"{PROG}: note: by its profile, a back-off threshold of {threshold:.3g}")
    plain = _plain_engine(args, engine) if args.compare else None
    if text is SAMPLE_PROMPT:  # which the user did not write
        put_out(text)
    _warn(engine, args.strategy)
    interrupted = write(stream, shown)
    if sys.stdout.isatty():
        say("")
    say(stream.statistics.line())
    if shown is not None:
        shown.finish(f"> {text}\n" if args.chat else text, stream)
    if interrupted:
        return INTERRUPTED
    if plain is not None:
        # The plain side gets the same parameters, whatever defaults its own bundle and strategy have.
        parameters = dataclasses.asdict(parameters_for(args.strategy, engine.bundle, sampling))
        theirs = options | read_by(Autoregressive.name, parameters)
        plainly = Side(plain, Autoregressive.name, theirs)
        say(_compare(Side(engine, args.strategy, ours), plainly, prompt, repeats))
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of `Engine.stream`, but for strategy and sampling.

    Raises:
        PromptError: Something is said of a prompt where there are questions.
    """
    if args.chat and args.plain_prompt:
        raise PromptError("--plain-prompt is for prompts: what is asked with --chat is text, unless --trust-content")
    limit = args.max_new_tokens
    if limit is None:
        limit = _NEW_TOKENS_OF_AN_ANSWER if args.chat else _NEW_TOKENS
    options = {"max_new_tokens": limit, "seed": args.seed, "stop": args.stop}
    return options | {"show_special": args.show_special, "plain_prompt": args.plain_prompt}


def _converse(args: argparse.Namespace, engine: Engine, options: dict[str, Any], shown: View | None) -> int:
    if args.compare:
        raise PromptError("--compare runs one question: give it behind --chat")
    engine.chat_stream(asked("?", args.system), **options)  # before anybody types: can it be talked to, and so?
    _warn(engine, args.strategy)
    conversation = Conversation(engine, args.system, trust_content=args.trust_content)
    return converse(PROG, conversation, options | {"origins": shown is not None}, shown)


def _bundle_and_prompt(args: argparse.Namespace) -> tuple[str | Path, str | None]:
    """Return what to run and what to continue: whichever is not given is ours.

    There is no prompt where there is to be a conversation.

    Raises:
        PromptError: One of them is given twice, or a bundle and no prompt, or a path in place of a prompt.
    """
    given = [argument for argument in (args.bundle, args.prompt) if argument is not None]
    question = args.chat if isinstance(args.chat, str) else None
    if question is not None and _is_bundle(question):  # dynamo-run --chat BUNDLE
        given, question = [question, *given], None
    texts = [text for text in (args.text, question) if text is not None]
    if len(texts) == 2:
        raise PromptError("there are two questions: one behind --chat, and one behind -p")
    if len(given) + (args.model is not None) + len(texts) > 2:
        raise PromptError("bundle and prompt are given twice: with -m or -p one argument less is wanted")
    model, text = args.model, texts[0] if texts else None
    if len(given) == 2:
        model, text = given
    elif given and model is not None:
        text = given[0]
    elif given and (text is not None or (args.chat and _is_bundle(given[0]))):
        model = given[0]
    elif given:
        text = _lone(given[0])
    if text is None and not args.chat:
        if model is not None:
            raise PromptError(f"there is no prompt behind the bundle {model}")
        text = SAMPLE_PROMPT
    return DEFAULT_BUNDLE if model is None else model, text


def _is_bundle(argument: str) -> bool:
    return os.path.isfile(os.path.join(argument, MANIFEST)) or (argument.endswith(".onnx") and os.path.exists(argument))


def _lone(argument: str) -> str:
    """Return a single argument, which is a prompt unless it can only be meant as a path.

    Raises:
        PromptError: It is one.
    """
    if not argument:
        return argument  # nothing at all: whatever begins a text
    exists = os.path.exists(argument)  # which takes whatever is too long for a path
    if _is_bundle(argument):
        raise PromptError(f"there is no prompt behind the bundle {argument}")
    if exists:
        raise PromptError(f"{argument} exists and is no bundle: a prompt of that name is given with -p")
    separated = os.sep in argument or (os.altsep or os.sep) in argument
    if len(argument.split()) == 1 and argument.strip() == argument and (separated or argument.endswith(".onnx")):
        raise PromptError(f"{argument} does not exist: a prompt that looks like a path is given with -p")
    return argument


def _warn(engine: Engine, strategy: str) -> None:
    """Say on stderr what the user would not expect of this bundle."""
    bundle = engine.bundle
    command = " ".join(["dynamo-profile", *([] if bundle.folder == DEFAULT_BUNDLE else [str(bundle.folder)])])
    if engine.backend.threads is not None:
        command += f" --threads {engine.backend.threads}"
    if strategy == Auto.name and engine.profile is None and bundle.lossless:
        say(
            f"{PROG}: note: this device has not been profiled for this bundle, so drafting is planned by rules of "
            f"thumb; `{command}` measures it, once"
        )
    if bundle.degraded:
        say(f"{PROG}: note: this bundle failed its quality gates when it was quantized")
    if engine.lossless or strategy not in (Auto.name, Speculative.name):
        return
    if strategy == Speculative.name and not bundle.lossless:
        say(
            f"{PROG}: note: {bundle.precision} makes a pass depend on how many tokens it carries, so this is "
            "not exactly the text of autoregressive"
        )
    elif bundle.lossless:
        follows = "nothing is drafted" if strategy == Auto.name else "this is not exactly the text of autoregressive"
        say(f"{PROG}: note: on this device a pass depends on how many tokens it carries (dynamo-profile), so {follows}")


def _read_stdin() -> str:
    check_stdin()
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise PromptError(f"stdin cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise PromptError("the prompt on stdin is not valid UTF-8") from None


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a comparison: what runs, and the options of `Engine.generate`."""

    engine: Engine
    strategy: str
    options: dict[str, Any]


def _plain_engine(args: argparse.Namespace, engine: Engine) -> Engine:
    """Return the engine to compare with; `engine` itself if there is no plain bundle."""
    if args.compare_with:
        plain = load_bundle(args.compare_with, verify=args.verify)
    else:
        folder = engine.bundle.folder.resolve()
        sibling = Path(f"{folder}-plain")
        if not can_draft(engine.bundle) or not sibling.is_dir():
            return engine
        plain = load_bundle(sibling, verify=args.verify)
    if can_draft(plain):
        raise PromptError(
            f"{plain.folder} is not a plain bundle: it predicts {plain.topology.n_tokens} tokens a pass (export with "
            "--heads 0)"
        )
    return Engine(plain, engine.backend, max_length=args.max_length)


def _compare(ours: Side, plain: Side, prompt: str | list[int], repeats: int) -> str:
    """Run both sides in turn, each from an empty cache; returns a line with the ratio of median speeds."""
    speeds: dict[str, list[float]] = {"ours": [], "plain": []}
    sides = [("ours", ours), ("plain", plain)]
    for repeat in range(repeats):
        for name, side in sides if repeat % 2 == 0 else reversed(sides):
            side.engine.reset()
            result = side.engine.generate(prompt, strategy=side.strategy, **side.options)
            speeds[name].append(result.statistics.tokens_per_second)
    of_ours, of_plain = (statistics.median(speed) for speed in speeds.values())
    what = f"plain ({plain.engine.bundle.folder})"
    if plain.engine is ours.engine:
        what = "autoregressive on the same bundle (no plain bundle found: export one with --heads 0)"
    return (
        f"compare: {ours.strategy} {of_ours:.1f} tokens/s, {what} {of_plain:.1f} tokens/s, "
        f"ratio {of_ours / of_plain:.2f} (medians of {repeats} interleaved runs)"
    )


if __name__ == "__main__":
    sys.exit(main())
