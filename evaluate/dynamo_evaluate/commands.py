"""What the commands of `dynamo-eval` do, from checked arguments to tables."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_runtime import Engine
from dynamo_runtime.arguments import backend, given_sampling
from dynamo_runtime.bundle import DEFAULT_BUNDLE, MANIFEST, Bundle, load_bundle
from dynamo_runtime.corpus import STANDARD_LIBRARY, Document, read_documents, standard_library
from dynamo_runtime.parameters import resolve_parameters
from dynamo_runtime.profiling.profile import check_writable, write_whole
from dynamo_runtime.profiling.tables import WIDTH, Table
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
        found += [replace(document, name=f"{Path(source).name}:{document.name}") for document in documents]
    if limit is not None and limit < 1:
        raise EvaluationError(f"the number of texts must be at least 1, not {limit}")
    seen: Counter[str] = Counter()
    for i, document in enumerate(found):  # two folders may have the same name
        seen[document.name] += 1
        if seen[document.name] > 1:
            found[i] = replace(document, name=f"{document.name} ({seen[document.name]})")
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
    settings = curve(parse_thresholds(args.thresholds), ABLATION | READINGS if args.command == "ablation" else None)
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
    if results.header["command"] == "perplexity":
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
