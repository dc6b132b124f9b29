"""`dynamo-eval generate` and `dynamo-eval ablation`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from dynamo_runtime import Engine
from dynamo_runtime.bundle import DEFAULT_BUNDLE
from dynamo_runtime.cli.arguments import (
    add_backend,
    add_chat,
    add_drafts,
    add_dynamo,
    add_sampling,
    backend,
    check_chat,
    given_sampling,
)
from dynamo_runtime.registry import can_draft
from dynamo_runtime.selection import STRATEGIES, read_by, refusal
from dynamo_runtime.strategies import Autoregressive, Dynamo, Speculative

from ..errors import EvaluationError
from ..prompts import fingerprint, load_prompts
from ..results import Results, describe_bundle, describe_machine
from ..settings import ABLATION, PLAIN, READINGS, Setting, curve, parse_thresholds, possible
from .command import Command, at_least, note
from .reporting import print_summary


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
    parser.set_defaults(also=[], drafter=None)


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
    add_chat(parser)
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


def _work(args: argparse.Namespace) -> None:
    from .. import generate, shapes

    at_least(1, args, "limit", "max_new_tokens")
    at_least(2, args, "seeds")  # quality is held against plain decoding's own spread
    if "{prompt}" not in args.template:
        raise EvaluationError("the template must have {prompt} in it")
    check_chat(args)
    if args.chat and args.template != "{prompt}":
        raise EvaluationError("--chat has a template already, the bundle's: leave out --template")
    multi, plain = _engines(args)
    prompts = load_prompts(args.prompts, plain, args.limit, args.code)
    resolved = multi.bundle.parameters(given_sampling(args))
    shared = asdict(resolved)  # named for every setting, so that plain and dynamo choose by the same
    settings = curve(parse_thresholds(args.thresholds), ABLATION | READINGS if args.command == "ablation" else None)
    settings += _also(args)
    settings, refused = possible(settings, multi.bundle, shared)
    read = {name for setting in settings for name in read_by(setting.strategy, shared)}
    if unread := sorted(set(given_sampling(args)) - read):
        raise EvaluationError(f"no setting reads {unread[0]}: --also names strategies that do")
    for line in refused:
        note(f"left out, {line}")
    if resolved.greedy:
        note("greedily every seed writes the same text, so plain decoding has no spread to hold quality against")
    settings = [Setting(PLAIN, Autoregressive.name, plain=True), *settings]
    experiment = generate.Experiment(
        prompts,
        settings,
        args.seeds,
        shared,
        args.max_new_tokens,
        args.ignore_eos,
        args.template,
        generate.Chat(args.system, args.trust_content) if args.chat else None,
    )
    generate.check_length([multi, plain], experiment)
    header = {
        "command": args.command,
        "bundle": describe_bundle(multi.bundle),
        "plain": describe_bundle(plain.bundle),
        "machine": describe_machine(multi.session.provider) | {"threads": args.threads},
        "prompts": {"source": Path(args.prompts).name, "sha256": fingerprint(prompts)},
        **experiment.record,
    }
    with Results.start(args.out, header, overwrite=args.overwrite) as results:
        generate.run(shapes.check(results), multi, plain, experiment)
    print_summary(results)


def _also(args: argparse.Namespace) -> list[Setting]:
    """Return the strategies beside the grid; those that draft with the drafter that was named.

    Raises:
        EvaluationError: None of them drafts, and one was named.
    """
    drafting = [name for name in args.also if issubclass(STRATEGIES[name], Speculative)]
    if args.drafter is not None and not drafting:
        raise EvaluationError("no setting drafts: --drafter is for --also auto and --also speculative")
    return [
        Setting(f"{name}, {args.drafter}", name, drafter=args.drafter)
        if args.drafter is not None and name in drafting
        else Setting(name, name)
        for name in dict.fromkeys(args.also)
    ]


def _engines(args: argparse.Namespace) -> tuple[Engine, Engine]:
    """Return the multi-token bundle, and the plain one beside it, or the same where there is none."""
    options = backend(args)
    multi = Engine(args.bundle, options)
    if why := refusal(Dynamo.name, multi.bundle, given_sampling(args)):
        raise EvaluationError(f"{args.bundle}: {why}")
    sibling = Path(f"{multi.bundle.folder.resolve()}-plain")
    if args.plain is None and not sibling.is_dir():
        note(
            "no plain bundle is given, so this one's first head is what speed and quality are held against "
            "(export one with --heads 0)"
        )
        return multi, Engine(multi.bundle, options)
    plain = Engine(args.plain or sibling, options)
    if can_draft(plain.bundle):
        raise EvaluationError(f"{plain.bundle.folder} is not a plain bundle: export one with --heads 0")
    if plain.bundle.vocab_size != multi.bundle.vocab_size:
        raise EvaluationError(f"{plain.bundle.folder} is of another model: it has another vocabulary")
    return multi, plain


GENERATE = Command(
    "generate",
    "continue prompts over a grid of back-off thresholds: speed, and quality against plain's",
    _add_grid,
    _work,
)
ABLATE = Command(
    "ablation", "the same for the paper's ablation (mask, Otsu, blur), and other readings of it", _add_ablation, _work
)
