"""Perplexities from the sums of documents, and tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamo_runtime.interval import Interval
from dynamo_runtime.registry import TOPOLOGIES
from dynamo_runtime.tables import MISSING, Table, number
from dynamo_runtime.tables import interval as with_ends

from .bootstrap import Draws, Quotient, interval
from .errors import EvaluationError
from .perplexity import DOCUMENT
from .results import Record, Results, machine_line


@dataclass(frozen=True)
class Figures:
    """What one bundle's documents add up to; every quotient has one column a document.

    Attributes:
        bundle: Its description.
        documents: Their names.
        log_perplexities: Logarithms of the perplexities by name: PPL_1, …, and PPL_1:n, which is the geometric mean of
            the first n where heads are independent.
        dynamic: By ε_b: the logarithm of PPL_d, and tokens per pass.
        coverage: Of every token ahead, the share of positions where its head may say it: perplexities are over those.
    """

    bundle: Mapping[str, Any]
    documents: list[str]
    log_perplexities: dict[str, Quotient]
    dynamic: dict[str, tuple[Quotient, Quotient]]
    coverage: list[float]


def figures(results: Results, documents: Sequence[str] | None = None) -> list[Figures]:
    """Of every bundle, over the documents that all bundles have finished.

    Args:
        results: Of `dynamo-eval perplexity`.
        documents: Only these.

    Raises:
        EvaluationError: They are of something else, or no document is finished.
    """
    results.demand("perplexity")
    bundles = results.header["bundles"]
    found = {(record["bundle"], record["document"]): record for record in results.of(DOCUMENT)}
    names = list(dict.fromkeys(name for _, name in found)) if documents is None else list(documents)
    names = [name for name in names if all((number, name) in found for number in range(len(bundles)))]
    if not names:
        raise EvaluationError(f"{results.path} has no document yet that every bundle has finished")
    return [_figures(bundle, names, [found[number, name] for name in names]) for number, bundle in enumerate(bundles)]


def _figures(bundle: Mapping[str, Any], names: list[str], records: list[Record]) -> Figures:
    positions = np.array([[record["positions"] for record in records]], float)
    covered = [_covered(record) for record in records]
    tokens = np.array([each["tokens"] for each in covered], float).T  # [n_tokens, documents]
    nll = np.array([record["nll"] for record in records]).T  # [n_tokens, documents]
    n = len(nll)
    logs = {f"PPL_{i}": Quotient(row[None], own[None]) for i, (row, own) in enumerate(zip(nll, tokens, strict=True), 1)}
    if TOPOLOGIES[bundle["kind"]].independent:
        for m in range(2, n):
            sums, counts = (np.array([[each[name][m - 1] for each in covered]], float) for name in ("runs_nll", "runs"))
            logs[f"PPL_1:{m}"] = Quotient(sums, m * counts)
    if n > 1:
        counts = np.array([[each["joint"] for each in covered]], float)
        logs[f"PPL_1:{n}"] = Quotient(np.array([[record["joint"] for record in records]]), n * counts)
    dynamic = {}
    for threshold in records[0]["dynamic"]:
        passes, emitted, sums = (
            np.array([[record["dynamic"][threshold][name] for record in records]], float)
            for name in ("passes", "tokens", "nll")
        )
        known = np.array([[each["dynamic"][threshold] for each in covered]], float)
        dynamic[threshold] = Quotient(sums, known), Quotient(emitted, passes)
    return Figures(bundle, names, logs, dynamic, (tokens.sum(1) / positions.sum()).tolist())


def _covered(record: Record) -> Record:
    """Return what a record says is covered, which is everything where it says nothing: see `Coverage`."""
    n, positions = len(record["nll"]), record["positions"]
    every = {"tokens": [positions] * n, "runs": [positions] * n, "runs_nll": np.cumsum(record["nll"]).tolist()}
    every |= {"joint": positions, "dynamic": {name: each["tokens"] for name, each in record["dynamic"].items()}}
    found: Record = record.get("covered", every)
    return found


def perplexity(log: Quotient) -> Interval:
    """With its interval over the documents."""
    draws = Draws.make(range(log.top.shape[1]), 1)
    return interval(float(np.exp(log.value)), np.exp(log.replicates(draws)))


def change(log: Quotient, reference: Quotient) -> Interval:
    """Return a perplexity over another one of the same documents, with its interval over them."""
    draws = Draws.make(range(log.top.shape[1]), 1)
    replicates = np.exp(log.replicates(draws) - reference.replicates(draws))
    return interval(float(np.exp(log.value - reference.value)), replicates)


def tables(found: Sequence[Figures]) -> list[Table]:
    """Return perplexities of the bundles side by side, and the dynamic ones."""
    names = list(dict.fromkeys(name for each in found for name in each.log_perplexities))
    first = found[0].log_perplexities["PPL_1"]
    rows = []
    for each in found:
        cells = [number(_value(each.log_perplexities[n])) if n in each.log_perplexities else MISSING for n in names]
        own = each.log_perplexities["PPL_1"]
        ratio = MISSING  # of other positions, which a look-ahead bundle or another tokenizer has
        if (own.bottom == first.bottom).all():
            value = change(own, first)
            ratio = f"{value.value:.4f} [{value.low:.4f}, {value.high:.4f}]"
        rows.append([each.bundle["name"], f"{int(own.bottom.sum()):,}", *cells, ratio])
    made = [Table("Perplexity", ["bundle", "positions", *names, "PPL_1 ÷ first's"], rows, cell_width=28)]
    some = [each for each in found if min(each.coverage) < 1]
    most = max(len(each.coverage) for each in found)
    shares = [
        [each.bundle["name"], *(f"{share:.1%}" for share in each.coverage), *[MISSING] * (most - len(each.coverage))]
        for each in some
    ]
    title = "Tokens ahead that are in the draft vocabulary; perplexities are over these"
    made.append(Table(title, ["bundle", *(f"token {i}" for i in range(1, most + 1))], shares))
    with_walks = [each for each in found if each.dynamic]
    columns = [c for each in with_walks for c in (f"{each.bundle['name']}: PPL_d", "tokens/pass")]
    thresholds = list(with_walks[0].dynamic) if with_walks else []
    rows = [
        [f"ε_b {threshold}", *(cell for each in with_walks for cell in _dynamic(*each.dynamic[threshold]))]
        for threshold in thresholds
    ]
    made.append(Table("Dynamic perplexity, by back-off threshold", ["", *columns], rows))
    return [table for table in made if table.rows]


def conditions(results: Results, found: Sequence[Figures]) -> str:
    """Return what it was run on, in one paragraph."""
    header = results.header
    missing = header["documents"] - len(found[0].documents)
    unfinished = f" of {header['documents']} (the run is not finished)" if missing else ""
    return (
        f"{len(found[0].documents)} texts{unfinished} ({', '.join(header['texts'])}), windows of "
        f"{header['window']} tokens every {header['stride']}. {machine_line(header['machine'])}."
    )


def as_json(results: Results, found: Sequence[Figures]) -> dict[str, Any]:
    """Return all figures as JSON values."""
    return {
        **results.header,
        "documents_finished": len(found[0].documents),
        "perplexities": [
            {
                "bundle": each.bundle["name"],
                **{name: _json(perplexity(log)) for name, log in each.log_perplexities.items()},
                "coverage": [round(share, 6) for share in each.coverage],
                "dynamic": {
                    threshold: {"PPL_d": _json(perplexity(log)), "tokens_per_pass": round(speed.value, 5)}
                    for threshold, (log, speed) in each.dynamic.items()
                },
            }
            for each in found
        ],
    }


def _dynamic(log: Quotient, tokens_per_pass: Quotient) -> list[str]:
    return [with_ends(perplexity(log)), f"{tokens_per_pass.value:.2f}"]


def _value(log: Quotient) -> float:
    return float(np.exp(log.value))


def _json(value: Interval) -> dict[str, float]:
    return {name: float(f"{getattr(value, name):.6g}") for name in ("value", "low", "high")}
