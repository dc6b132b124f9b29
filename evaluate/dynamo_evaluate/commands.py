"""What the commands of `dynamo-eval` do, from checked arguments to tables."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_runtime import Engine
from dynamo_runtime.bundle import DEFAULT_BUNDLE, MANIFEST, Bundle, load_bundle
from dynamo_runtime.cli.arguments import backend, given_sampling
from dynamo_runtime.corpus import STANDARD_LIBRARY, Document, read_documents, standard_library
from dynamo_runtime.files import check_writable, write_whole
from dynamo_runtime.parameters import resolve_parameters
from dynamo_runtime.session import Session
from dynamo_runtime.strategies import Autoregressive

from . import compare, generate, judge, perplexity, perplexity_tables, plots, report, similarity, summary
from .cli import PROG
from .errors import EvaluationError
from .prompts import fingerprint, load_prompts
from .results import Results, describe_bundle, describe_machine
from .settings import ABLATION, PLAIN, READINGS, Setting, curve, parse_thresholds, possible
from .summary import summarize


def _perplexity(args: argparse.Namespace) -> None:
    _at_least(1, args, "limit", "limit_tokens")
    bundles, sources = _sort_inputs(args.inputs)
    given, thresholds = given_sampling(args), parse_thresholds(args.thresholds)
    sessions = [Session(bundle, **backend(args)) for bundle in bundles]
    sizes = [perplexity.window_size(session, args.window, args.stride) for session in sessions]
    if len(set(sizes)) > 1:
        lengths = ", ".join(str(each) for each, _ in sizes)
        raise EvaluationError(f"these bundles take windows of {lengths} tokens: give --window {min(sizes)[0]} or less")
    size, stride = sizes[0]
    for bundle in bundles:
        if bundle.kind == "parallel":  # are the parameters any good?
            for threshold in thresholds:
                perplexity.dynamo(bundle, threshold, given)
    found = _documents(sources, args.limit)
    documents = perplexity.long_enough(found, bundles, args.limit_tokens)
    if len(documents) < len(found):
        _note(f"{len(found) - len(documents)} texts are too short and left out")
    header = {
        "command": args.command,
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
    figures = perplexity_tables.figures(results)
    print(report.text(perplexity_tables.tables(figures), perplexity_tables.conditions(results, figures)))
    if args.json:
        write_whole(args.json, _json(perplexity_tables.as_json(results, figures)))


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
        found += [replace(document, name=f"{Path(source).name}:{document.name}") for document in documents]
    seen: Counter[str] = Counter()
    for i, document in enumerate(found):  # two folders may have the same name
        seen[document.name] += 1
        if seen[document.name] > 1:
            found[i] = replace(document, name=f"{document.name} ({seen[document.name]})")
    if limit is None or limit >= len(found):
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, limit).round().astype(int)]


def _generate(args: argparse.Namespace) -> None:
    _at_least(1, args, "limit", "max_new_tokens")
    _at_least(2, args, "seeds")  # quality is held against plain decoding's own spread
    if "{prompt}" not in args.template:
        raise EvaluationError("the template must have {prompt} in it")
    multi, plain = _engines(args)
    prompts = load_prompts(args.prompts, plain, args.limit, args.code)
    resolved = resolve_parameters(multi.bundle.sampling, given_sampling(args), has_counts=multi.bundle.has_cooccurrence)
    shared = asdict(resolved)
    settings = curve(parse_thresholds(args.thresholds), ABLATION | READINGS if args.command == "ablation" else None)
    settings += [Setting(name, name) for name in dict.fromkeys(args.also)]
    settings, refused = possible(settings, multi.bundle, shared)
    for line in refused:
        _note(f"left out, {line}")
    if resolved.greedy:
        _note("greedily every seed writes the same text, so plain decoding has no spread to hold quality against")
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
    _print_summary(results)


def _judge(args: argparse.Namespace) -> None:
    if not args.mauve and not args.model:
        raise EvaluationError("who is to judge? give --mauve FEATURES, or --model NAME and its --endpoint")
    _at_least(1, args, "at_once", "limit")
    try:
        request = json.loads(args.request)
    except ValueError:
        request = None
    if not isinstance(request, dict):
        raise EvaluationError(f"--request must be a JSON object, not {args.request!r}")
    results = Results.load(args.results, repair=True)
    names = [setting["name"] for setting in summary.of_generations(results)["settings"]]
    wanted = args.settings or names
    if unknown := set(wanted) - set(names):
        raise EvaluationError(f"{args.results} has no setting {sorted(unknown)[0]!r}; there are {'; '.join(names)}")
    if args.mauve:
        features = similarity.features_of(args.mauve, backend(args))
        similarity.judge(results, features, Path(args.mauve).resolve().name, wanted)
    if args.model:
        model = judge.Judge(args.endpoint, args.model, args.key_variable, request)
        unread = judge.judge(results, model, args.ask, wanted, args.limit, args.at_once)
        if unread:
            _note(
                f"{unread} answers had no grade or choice in them; they do not count, and are asked for again next time"
            )
    _print_summary(results)


def _report(args: argparse.Namespace) -> None:
    _at_least(1, args, "degree")
    results = Results.load(args.results)
    if args.out:
        check_writable(args.out / "report.md")
    drawn: list[Path] = []
    if results.header["command"] == "perplexity":
        found = perplexity_tables.figures(results)
        made, where = perplexity_tables.tables(found), perplexity_tables.conditions(results, found)
        values = perplexity_tables.as_json(results, found)
    else:
        whole = summarize(results, args.degree)
        made, where, values = report.tables(whole), report.conditions(whole), report.as_json(whole)
        drawn = plots.draw(whole, args.out) if args.out else []
    print(report.text(made, where))
    if args.out:
        write_whole(args.out / "report.md", report.markdown(made, where))
        write_whole(args.out / "report.json", _json(values))
        names = ["report.md", "report.json", *(path.name for path in drawn)]
        print(f"{PROG}: wrote {', '.join(names)} in {args.out}", file=sys.stderr)


def _compare(args: argparse.Namespace) -> None:
    made = compare.compare(Results.load(args.a), Results.load(args.b))
    print(report.text(made, f"A is {args.a}, B is {args.b}. Brackets hold 95 % bootstrap intervals."))


def _harness(args: argparse.Namespace) -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise EvaluationError("this needs lm-evaluation-harness: pip install 'dynamo-edge[harness]'") from None
    importlib.import_module("dynamo_evaluate.harness")  # registers the model
    sys.argv = ["lm-eval", *args.arguments]
    cli_evaluate()


def _print_summary(results: Results) -> None:
    found = summarize(results)
    print(report.text(report.tables(found), report.conditions(found)))


def _note(text: str) -> None:
    print(f"{PROG}: note: {text}", file=sys.stderr)


def _at_least(least: int, args: argparse.Namespace, *names: str) -> None:
    """Check numbers that may have been given.

    Raises:
        EvaluationError: One is too small.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise EvaluationError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


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
        _note(
            "no plain bundle is given, so this one's first head is what speed and quality are held against "
            "(export one with --heads 0)"
        )
        return multi, Engine(multi.bundle, **options)
    plain = Engine(args.plain or sibling, **options)
    if plain.bundle.kind != "plain":
        raise EvaluationError(f"{plain.bundle.folder} is not a plain bundle: export one with --heads 0")
    if plain.bundle.vocab_size != multi.bundle.vocab_size:
        raise EvaluationError(f"{plain.bundle.folder} is of another model: it has another vocabulary")
    return multi, plain


RUN: dict[str, Callable[[argparse.Namespace], None]] = {
    "perplexity": _perplexity,
    "generate": _generate,
    "ablation": _generate,
    "judge": _judge,
    "report": _report,
    "compare": _compare,
    "harness": _harness,
}
"""By name."""
