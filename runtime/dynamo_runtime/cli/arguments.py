"""What the commands of the runtime have in common on their command lines."""

import argparse
import dataclasses
from typing import Any, NoReturn

from ..bundle import Bundle
from ..chat import asked
from ..errors import ParameterError, printable
from ..parameters import DRAFT_CHOICES, FIRST_TOKENS, SamplingParameters
from ..providers import OPTIMIZATIONS, Backend
from ..version import __version__


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one line."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add `--version`."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the sampling flags of every strategy; what is not given comes from the bundle."""
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    parser.add_argument("--top-k", type=int, metavar="K", help="candidates per head; 0: all (not with dynamo)")
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus among those; 1: all")
    parser.add_argument("--min-p", type=float, metavar="P", help="least probability relative to the largest; 0: any")
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="1: none")


def add_dynamo(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of strategy dynamo but the back-off threshold; returns their group.

    Python has more: `parameters.READINGS_OF_THE_PAPER`.
    """
    group = parser.add_argument_group("strategy dynamo (the paper's Algorithm 1)")
    group.add_argument("--cooccurrence-weight", type=float, metavar="A", help="α_c: 1 full mask, 0 none")
    group.add_argument(
        "--first-token", choices=FIRST_TOKENS, help="joint: drawn with the others, as in the paper; base: as plain does"
    )
    return group


def add_drafts(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the sampling flags of the strategies that draft, and whose drafts they are; returns their group."""
    group = parser.add_argument_group("strategies auto and speculative (drafts that the first head verifies)")
    group.add_argument(
        "--drafter",
        metavar="NAME",
        help="lookup (what followed in the text before; any bundle), the bundle's own by its kind (parallel, cp, "
        "lookahead), or both (default: auto both or whichever there is, speculative the bundle's own or else lookup)",
    )
    group.add_argument("--draft-tokens", type=int, metavar="N", help="most drafts a pass (default: all there are)")
    group.add_argument(
        "--draft-choice", choices=DRAFT_CHOICES, help="argmax (same seed, same text as autoregressive) or sample"
    )
    group.add_argument(
        "--draft-cooccurrence-weight", type=float, metavar="A", help="α_c of the mask on drafts: 1 full, 0 none"
    )
    group.add_argument("--draft-confidence", type=float, metavar="P", help="stop drafting below this; 0: never")
    return group


def add_control(parser: argparse.ArgumentParser) -> None:
    """Add the flags of control tokens in prompts and texts."""
    parser.add_argument("--show-special", action="store_true", help="show special tokens in the text")
    parser.add_argument(
        "--plain-prompt", action="store_true", help="what looks like a control token in the prompt is text"
    )


def add_chat(parser: argparse.ArgumentParser, *, question: bool = False) -> None:
    """Add the flags of chat models.

    Args:
        parser: To add them to.
        question: Whether `--chat` may be followed by what is asked.
    """
    group = parser.add_argument_group("models to talk to")
    if question:
        group.add_argument(
            "--chat",
            nargs="?",
            const=True,
            metavar="QUESTION",
            help="ask, by the bundle's chat template; without a question, talk: every line is one",
        )
    else:
        group.add_argument(
            "--chat", action="store_true", help="prompts are questions: they go through the chat template"
        )
    group.add_argument("--system", metavar="TEXT", help="what stands in front of all questions; with --chat")
    group.add_argument(
        "--trust-content",
        action="store_true",
        help="control tokens in questions are control tokens, else text; with --chat",
    )


def check_chat(args: argparse.Namespace) -> None:
    """See that nothing of a chat is said where there is none.

    Raises:
        ParameterError: It is.
    """
    if not args.chat and (args.system is not None or args.trust_content):
        raise ParameterError("--system and --trust-content are for --chat")


def put(args: argparse.Namespace, bundle: Bundle, prompt: str) -> str | list[int]:
    """Return a prompt as the flags want it: with `--chat` the tokens of a question.

    Raises:
        DynamoError: The bundle has no chat template, or it does not want the question.
    """
    check_chat(args)
    if not args.chat:
        return prompt
    messages, control = asked(prompt, args.system), bundle.control_tokens
    return bundle.chat_template.encode(messages, control, trust_content=args.trust_content).encoded.ids


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling parameters that were given as flags, by their names in `SamplingParameters`."""
    names = [field.name for field in dataclasses.fields(SamplingParameters)]
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


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
        "--graph-optimization",
        default="all",
        metavar="LEVEL",
        help=f"onnxruntime's graph optimizations: {', '.join(OPTIMIZATIONS)} (default: all)",
    )


def backend(args: argparse.Namespace) -> Backend:
    """Return how a graph is run, from the flags.

    Raises:
        ParameterError: A provider option is not KEY=VALUE, or a value is out of range.
    """
    for option in args.provider_option:
        if "=" not in option:
            raise ParameterError(f"a provider option must be KEY=VALUE, not {option!r}")
    return Backend(
        provider=args.provider,
        provider_options=dict(option.split("=", 1) for option in args.provider_option),
        threads=args.threads,
        optimization=args.graph_optimization,
    )
