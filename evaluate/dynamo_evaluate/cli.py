"""`dynamo-eval`: what the speed costs in quality."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_runtime import Engine
from dynamo_runtime.arguments import (
    Parser,
    add_backend,
    add_drafts,
    add_dynamo,
    add_sampling,
    backend,
    given_sampling,
)
from dynamo_runtime.bundle import DEFAULT_BUNDLE, MANIFEST, Bundle, load_bundle
from dynamo_runtime.corpus import STANDARD_LIBRARY, Document, read_documents, standard_library
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.parameters import resolve_parameters
from dynamo_runtime.profiling.profile import check_writable, write_whole
from dynamo_runtime.profiling.tables import WIDTH, Table
from dynamo_runtime.session import Session
from dynamo_runtime.strategies import STRATEGIES, Autoregressive, Dynamo

from . import compare, generate, judge, perplexity, perplexity_tables, plots, report, similarity, summary
from .errors import EvaluationError
from .prompts import PAPER, fingerprint, load_prompts
from .results import Results, describe_bundle, describe_machine
from .settings import ABLATION, PLAIN, READINGS, Setting, curve, parse_thresholds, possible
from .summary import PAIR, SCORE, summarize

PROG = "dynamo-eval"
TEMPLATE = "{prompt}"
PERPLEXITY, GENERATE, ABLATE, JUDGE = "perplexity", "generate", "ablation", "judge"
REPORT, COMPARE, HARNESS = "report", "compare", "harness"
_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog=PROG,
        description="What a bundle's speed costs in quality, measured on the bundle.",
        epilog=f"{PROG} COMMAND --help says more.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help_text, add, _) in _COMMANDS.items():
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
        default=PAPER,
        metavar="SET",
        help="paper: its ten; stdlib: held-out Python modules of this machine; or a file: one prompt a line, or JSON "
        "lines as of Vicuna, MT-Bench, Spec-Bench or HumanEval (default: paper)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many prompts")
    parser.add_argument("--code", action="store_true", help="a file's prompts are Python: measure what parses")
    parser.add_argument(
        "--template", default=TEMPLATE, help="what a prompt is put into, e.g. 'USER: {prompt} ASSISTANT:'"
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
        choices=(SCORE, PAIR),
        default=[SCORE, PAIR],
        help="score: grades from 1 to 10; pair: which is better, this or plain's, in random order (default: both)",
    )
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="only these settings (default: all)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first so many prompts")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [HARNESS]:  # its flags are lm-eval's, not ours to read
        return _run(_harness, argparse.Namespace(arguments=given[1:]))
    args = build_parser().parse_args(given)
    return _run(_COMMANDS[args.command][2], args)


def _run(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    try:
        command(args)
        return 0
    except DynamoError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command goes on with what --out has kept", file=sys.stderr)
        return _INTERRUPTED


def _perplexity(args: argparse.Namespace) -> None:
    bundles, sources = _sort_inputs(args.inputs)
    given, thresholds = given_sampling(args), parse_thresholds(args.thresholds)
    sessions = [Session(bundle, **backend(args)) for bundle in bundles]
    sizes = [perplexity.window_size(session, args.window, args.stride) for session in sessions]
    if len(set(sizes)) > 1:
        raise EvaluationError("these bundles have contexts of different length: give --window")
    size, stride = sizes[0]
    for bundle in bundles:
        if bundle.kind == "parallel":  # are the parameters any good?
            for threshold in thresholds:
                perplexity.dynamo(bundle, threshold, given)
    documents = _documents(sources, args.limit)
    header = {
        "command": PERPLEXITY,
        "bundles": [describe_bundle(bundle) for bundle in bundles],
        "machine": describe_machine(sessions[0].provider),
        "texts": [Path(source).name for source in sources],
        "sha256": hashlib.sha256("\0".join(document.text for document in documents).encode()).hexdigest(),
        "documents": len(documents),
        "limit_tokens": args.limit_tokens,
        "window": size,
        "stride": stride,
        "thresholds": thresholds,
        "sampling": given,
    }
    if args.json:
        check_writable(args.json)
    results = Results.start(args.out, header, overwrite=args.overwrite)
    perplexity.run(results, sessions, documents, args.limit_tokens, size, stride, thresholds, given)
    found = perplexity_tables.figures(results)
    _show([*perplexity_tables.tables(found)], perplexity_tables.conditions(results, found))
    if args.json:
        write_whole(args.json, _json(perplexity_tables.as_json(results, found)))


def _sort_inputs(inputs: Sequence[str]) -> tuple[list[Bundle], list[str]]:
    """Which of them are bundles, which are texts."""
    is_bundle = [name.endswith(".onnx") or (Path(name) / MANIFEST).is_file() for name in inputs]
    bundles = [load_bundle(name) for name, yes in zip(inputs, is_bundle, strict=True) if yes]
    texts = [name for name, yes in zip(inputs, is_bundle, strict=True) if not yes]
    return bundles or [load_bundle(DEFAULT_BUNDLE)], texts or [STANDARD_LIBRARY]


def _documents(sources: Sequence[str], limit: int | None) -> list[Document]:
    found = []
    for source in sources:
        documents = standard_library(held_out=True) if source == STANDARD_LIBRARY else read_documents(source)
        found += [replace(document, name=f"{source}:{document.name}") for document in documents]
    if limit is not None and limit < 1:
        raise EvaluationError(f"the number of texts must be at least 1, not {limit}")
    if limit is None or limit >= len(found):
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, limit).round().astype(int)]


def _generate(args: argparse.Namespace) -> None:
    if args.seeds < 2:
        raise EvaluationError("two seeds or more are needed: quality is held against plain decoding's own spread")
    if "{prompt}" not in args.template:
        raise EvaluationError("the template must have {prompt} in it")
    if args.max_new_tokens < 1:
        raise EvaluationError(f"max-new-tokens must be at least 1, not {args.max_new_tokens}")
    multi, plain = _engines(args)
    prompts = load_prompts(args.prompts, plain, args.limit, args.code)
    resolved = resolve_parameters(multi.bundle.sampling, given_sampling(args), has_counts=multi.bundle.has_cooccurrence)
    shared = asdict(resolved)
    settings = curve(parse_thresholds(args.thresholds), ABLATION | READINGS if args.command == ABLATE else None)
    settings += [Setting(name, name) for name in dict.fromkeys(args.also)]
    settings, refused = possible(settings, multi.bundle, shared)
    for line in refused:
        print(f"{PROG}: note: left out, {line}", file=sys.stderr)
    settings = [Setting(PLAIN, Autoregressive.name, plain=True), *settings]
    generate.check_length([multi, plain], prompts, args.template, args.max_new_tokens)
    header = {
        "command": args.command,
        "bundle": describe_bundle(multi.bundle),
        "plain": describe_bundle(plain.bundle),
        "machine": describe_machine(multi.session.provider) | {"threads": args.threads},
        "prompts": {"source": Path(args.prompts).name, "sha256": fingerprint(prompts)},
        "texts": [prompt.record for prompt in prompts],
        "seeds": args.seeds,
        "max_new_tokens": args.max_new_tokens,
        "ignore_eos": args.ignore_eos,
        "template": args.template,
        "sampling": shared,
        "settings": [setting.record for setting in settings],
    }
    results = Results.start(args.out, header, overwrite=args.overwrite)
    generate.run(
        results,
        multi,
        plain,
        prompts,
        range(args.seeds),
        settings,
        sampling=shared,
        max_new_tokens=args.max_new_tokens,
        ignore_eos=args.ignore_eos,
        template=args.template,
    )
    found = summarize(results)
    _show(report.tables(found), report.conditions(found))


def _judge(args: argparse.Namespace) -> None:
    if not args.mauve and not args.model:
        raise EvaluationError("who is to judge? give --mauve FEATURES, or --model NAME and its --endpoint")
    if args.at_once < 1:
        raise EvaluationError(f"at-once must be at least 1, not {args.at_once}")
    results = Results.load(args.results)
    names = [setting["name"] for setting in summary.of_generations(results)["settings"]]
    wanted = args.settings or names
    if unknown := set(wanted) - set(names):
        raise EvaluationError(f"{args.results} has no setting {sorted(unknown)[0]!r}; there are {'; '.join(names)}")
    if args.mauve:
        similarity.judge(results, similarity.features_of(args.mauve, backend(args)))
    if args.model:
        model = judge.Judge(args.endpoint, args.model, args.key_variable)
        unread = judge.judge(results, model, args.ask, wanted, args.limit, args.at_once)
        if unread:
            print(f"{PROG}: note: {unread} answers had no grade or choice in them and do not count", file=sys.stderr)
    found = summarize(results)
    _show(report.tables(found), report.conditions(found))


def _report(args: argparse.Namespace) -> None:
    results = Results.load(args.results)
    if args.degree < 1:
        raise EvaluationError(f"the degree must be at least 1, not {args.degree}")
    if args.out:
        check_writable(args.out / "report.md")
    if results.header["command"] == PERPLEXITY:
        found = perplexity_tables.figures(results)
        made, where = perplexity_tables.tables(found), perplexity_tables.conditions(results, found)
        values = perplexity_tables.as_json(results, found)
    else:
        whole = summarize(results, args.degree)
        made, where, values = report.tables(whole), report.conditions(whole), report.as_json(whole)
        if args.out:
            plots.draw(whole, args.out)
    _show(made, where)
    if args.out:
        write_whole(args.out / "report.md", "\n\n".join([*(table.markdown() for table in made), where]) + "\n")
        write_whole(args.out / "report.json", _json(values))


def _compare(args: argparse.Namespace) -> None:
    made = compare.compare(Results.load(args.a), Results.load(args.b))
    _show(made, f"A is {args.a}, B is {args.b}. Brackets hold 95 % bootstrap intervals.")


def _harness(args: argparse.Namespace) -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise EvaluationError("this needs lm-evaluation-harness: pip install 'dynamo-edge[harness]'") from None
    importlib.import_module("dynamo_evaluate.harness")  # registers the model
    sys.argv = ["lm-eval", *args.arguments]
    cli_evaluate()


def _show(made: Sequence[Table], where: str) -> None:
    print("\n\n".join([*(table.text() for table in made), textwrap.fill(where, WIDTH)]))


def _json(values: Any) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _engines(args: argparse.Namespace) -> tuple[Engine, Engine]:
    """The multi-token bundle, and the plain one beside it, or the same where there is none."""
    options = backend(args)
    multi = Engine(args.bundle, **options)
    if multi.bundle.kind != "parallel":
        raise EvaluationError(f"{args.bundle} is a {multi.bundle.kind} bundle: strategy dynamo needs parallel heads")
    sibling = Path(f"{multi.bundle.folder.resolve()}-plain")
    if args.plain is None and not sibling.is_dir():
        print(
            f"{PROG}: note: no plain bundle is given, so this one's first head is what speed and quality are held "
            "against (export one with --heads 0)",
            file=sys.stderr,
        )
        return multi, Engine(multi.bundle, **options)
    plain = Engine(args.plain or sibling, **options)
    if plain.bundle.kind != "plain":
        raise EvaluationError(f"{plain.bundle.folder} is not a plain bundle: export one with --heads 0")
    if plain.bundle.vocab_size != multi.bundle.vocab_size:
        raise EvaluationError(f"{plain.bundle.folder} is of another model: it has another vocabulary")
    return multi, plain


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    PERPLEXITY: ("perplexities of every token ahead, and the dynamic one", _add_perplexity, _perplexity),
    GENERATE: (
        "continue prompts over a grid of back-off thresholds: speed, and quality against plain decoding's",
        _add_grid,
        _generate,
    ),
    ABLATE: (
        "the same for the paper's ablation (mask, Otsu, blur), and other readings of it",
        _add_ablation,
        _generate,
    ),
    JUDGE: ("add judgements to generations: MAUVE, or a language model's behind any endpoint", _add_judge, _judge),
    REPORT: ("results as tables, JSON and plots", _add_report, _report),
    COMPARE: ("two results files side by side", _add_compare, _compare),
    HARNESS: ("lm-evaluation-harness with a bundle as its model", _add_harness, _harness),
}


if __name__ == "__main__":
    sys.exit(main())
