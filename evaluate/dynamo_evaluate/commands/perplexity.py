"""`dynamo-eval perplexity`."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dynamo_runtime.bundle import DEFAULT_BUNDLE, MANIFEST, Bundle, load_bundle
from dynamo_runtime.cli.arguments import add_backend, add_dynamo, add_sampling, backend, given_sampling
from dynamo_runtime.corpus import STANDARD_LIBRARY, Document, read_documents, standard_library
from dynamo_runtime.files import check_writable, write_whole
from dynamo_runtime.session import Session
from dynamo_runtime.strategies import Dynamo

from ..errors import EvaluationError
from ..results import Results, describe_bundle, describe_machine
from ..settings import parse_thresholds
from .command import Command, at_least, note, to_json


def _add_arguments(parser: argparse.ArgumentParser) -> None:
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


def _work(args: argparse.Namespace) -> None:
    from .. import perplexity, perplexity_tables, report, shapes

    at_least(1, args, "limit", "limit_tokens")
    bundles, sources = _sort_inputs(args.inputs)
    given, thresholds = given_sampling(args), parse_thresholds(args.thresholds)
    sessions = [Session(bundle, backend(args)) for bundle in bundles]
    size, stride = _window(sessions, args)
    if given and not (thresholds and any(map(Dynamo.fits, bundles))):
        raise EvaluationError(f"{sorted(given)[0]} is for dynamic perplexities, and there are none here")
    for bundle in bundles:
        if Dynamo.fits(bundle):  # are the parameters any good?
            for threshold in thresholds:
                perplexity.dynamo(bundle, threshold, given)
    found = _documents(sources, args.limit)
    documents = perplexity.long_enough(found, bundles, args.limit_tokens)
    if len(documents) < len(found):
        note(f"{len(found) - len(documents)} texts are too short and left out")
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
    scoring = perplexity.Scoring(size, stride, thresholds=thresholds, sampling=given)
    with Results.start(args.out, header, overwrite=args.overwrite) as results:
        perplexity.run(shapes.check(results), sessions, documents, scoring, args.limit_tokens)
    figures = perplexity_tables.figures(results)
    print(report.text(perplexity_tables.tables(figures), perplexity_tables.conditions(results, figures)))
    if args.json:
        write_whole(args.json, to_json(perplexity_tables.as_json(results, figures)))


def _window(sessions: Sequence[Session], args: argparse.Namespace) -> tuple[int, int]:
    """Return the size and stride of the windows, the same for all bundles."""
    from ..perplexity import window_size

    sizes = [window_size(session, args.window, args.stride) for session in sessions]
    if len(set(sizes)) > 1:
        lengths = ", ".join(str(each) for each, _ in sizes)
        raise EvaluationError(f"these bundles take windows of {lengths} tokens: give --window {min(sizes)[0]} or less")
    return sizes[0]


def _sort_inputs(inputs: Sequence[str]) -> tuple[list[Bundle], list[str]]:
    """Return which of them are bundles, which are texts."""
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


PERPLEXITY = Command("perplexity", "perplexities of every token ahead, and the dynamic one", _add_arguments, _work)
