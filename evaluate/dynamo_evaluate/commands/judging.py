"""`dynamo-eval judge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dynamo_runtime.cli.arguments import add_backend, backend
from dynamo_runtime.corpus import json_object

from ..errors import EvaluationError
from ..results import Results
from .command import Command, at_least, note
from .reporting import print_summary

_JUDGEMENTS = ("score", "pair")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
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
        choices=_JUDGEMENTS,
        default=list(_JUDGEMENTS),
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


def _work(args: argparse.Namespace) -> None:
    if not args.mauve and not args.model:
        raise EvaluationError("who is to judge? give --mauve FEATURES, or --model NAME and its --endpoint")
    at_least(1, args, "at_once", "limit")
    request = json_object(args.request)
    if request is None:
        raise EvaluationError(f"--request must be a JSON object, not {args.request!r}")
    with Results.load(args.results, to_append=True) as results:
        _judge(results, args, request)
    print_summary(results)


def _judge(results: Results, args: argparse.Namespace, request: dict[str, Any]) -> None:
    """Add what is asked for."""
    from .. import judge, shapes, similarity, summary

    shapes.check(results)
    names = [setting["name"] for setting in summary.of_generations(results)["settings"]]
    wanted = args.settings or names
    if unknown := set(wanted) - set(names):
        raise EvaluationError(f"{args.results} has no setting {sorted(unknown)[0]!r}; there are {'; '.join(names)}")
    if args.mauve:
        features = similarity.features_of(args.mauve, backend(args))
        similarity.judge(results, features, Path(args.mauve).resolve().name, wanted)
    if args.model:
        model = judge.Judge(args.endpoint, args.model, args.key_variable, request)
        unread = judge.judge(results, model, judge.Questions(args.ask, wanted, args.limit), args.at_once)
        if unread:
            note(
                f"{unread} answers had no grade or choice in them; they do not count, and are asked for again next time"
            )


JUDGE = Command(
    "judge",
    "add judgements to generations: MAUVE, or a language model's behind any endpoint",
    _add_arguments,
    _work,
)
