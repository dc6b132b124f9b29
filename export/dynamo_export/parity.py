"""The parity gate: the bundle, run as it ships, against the torch model run eagerly without a cache.

The torch side sees whole sequences at once and knows nothing of caches, positions or rows; it is computed first, so
that its weights need not be in memory together with the session. The other side is `dynamo_runtime.session.Session`
on the staged bundle: prefill, single tokens, several tokens, and all of that again after rolling back; look-ahead
tokens as the runtime uses them, fed behind a text and dropped again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dynamo_model.attention import attention_implementation
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.session import Session
from dynamo_runtime.step import ALL, NONE, At, Last

from .deviation import TOLERANCE, Case, Deviation, PassOutputs, Values, between, deviations
from .errors import ExportError
from .graph import InspectedModel
from .registry import EXPORTS

SHORT = 24  # tokens of the case that crosses nothing
DEFAULT_LENGTH = 16_384
EAGER_BYTES = 256 << 20  # attention scores of one layer that may be held at once besides the weights

log = logging.getLogger("dynamo_export")


@dataclass(frozen=True)
class Boundary:
    """A length at which the model may change its behaviour.

    Attributes:
        name: What lies there.
        position: The first position on its far side.
        must: Whether a bundle is worthless if it was not crossed.
    """

    name: str
    position: int
    must: bool


def boundaries(inspected: InspectedModel, longest: int) -> list[Boundary]:
    """Return every length the gate has to cross.

    Args:
        inspected: The model to export.
        longest: Longest sequence the gate may run.

    Raises:
        ExportError: If a window or scaling boundary lies beyond that.
    """
    context = inspected.context_length
    found = [Boundary("short", 0, True)]
    for window in sorted({s.window for s in inspected.attention.values() if s.window is not None}):
        found.append(Boundary(f"window {window}", window, True))
    rope = getattr(inspected.base.config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if original is not None and original < context:
        found.append(Boundary(f"rope {rope.get('rope_type')} {original}", int(original), True))
    found.append(Boundary(f"context {context}", context, False))
    for boundary in found:
        if boundary.must and boundary.position + 2 * _span(inspected) > max(longest, 2 * _span(inspected)):
            raise ExportError(
                f"the gate would have to run more than {longest} tokens to cross {boundary.name}: "
                f"allow it with --parity-length {boundary.position + 2 * _span(inspected)}, or export a shorter "
                f"--context-length"
            )
    return found


def _span(inspected: InspectedModel) -> int:
    """Return positions compared on each side of a boundary: room for a pass of every size."""
    return max(8, 2 * (inspected.exported.topology.n_tokens + 1))


def reference(inspected: InspectedModel, longest: int, seed: int = 0) -> tuple[list[Case], list[str]]:
    """Run the torch model over whole sequences around every boundary.

    Args:
        inspected: The model to export.
        longest: Longest sequence to run.
        seed: Of the random tokens.

    Returns:
        The cases, and the names of boundaries left out because they lie beyond `longest`.

    Raises:
        ExportError: See `boundaries`.
    """
    rng = np.random.default_rng(seed)
    vocab = int(inspected.base.get_output_embeddings().weight.shape[0])
    cases, left_out = [], []
    span = _span(inspected)
    crossings = boundaries(inspected, longest)
    for boundary in tqdm(crossings, desc="torch", unit="case", leave=False, disable=None):
        short = boundary.position == 0
        length = min(inspected.context_length, max(SHORT, 2 * span) if short else boundary.position + span)
        if length > longest and not boundary.must:
            left_out.append(boundary.name)
            continue
        start = 0 if short else max(1, min(boundary.position, length) - span)
        fork = start + (length - start) // 2
        tokens = rng.integers(0, vocab, length)
        other = tokens.copy()
        other[fork:] = (other[fork:] + rng.integers(1, vocab, length - fork)) % vocab
        inspected.exported.prepare(tokens, other, fork)
        implementation = _implementation(inspected, length)
        expected, expected_other = (torch_values(inspected, ids, start, implementation) for ids in (tokens, other))
        cases.append(Case(boundary.name, tokens, other, start, fork, expected, expected_other, implementation))
    return cases, left_out


def _implementation(inspected: InspectedModel, length: int) -> str:
    """Name eager attention where its scores fit into memory, else torch's own fused one, which knows no soft cap."""
    if any(spec.softcap for spec in inspected.attention.values()):
        return "eager"
    heads = max(spec.heads for spec in inspected.attention.values())
    weights = sum(p.numel() for p in inspected.exported.layered.parameters()) * 4
    return "eager" if 3 * heads * length**2 * 4 <= max(EAGER_BYTES, weights) else "sdpa"


def torch_values(inspected: InspectedModel, tokens: np.ndarray, start: int, implementation: str) -> Values:
    """Return every output that is compared, from one pass of the torch model without a cache.

    Args:
        inspected: The model to export.
        tokens: int64 [length].
        start: First row wanted.
        implementation: transformers' attention implementation.

    Returns:
        Arrays [length - start, parts, width].
    """
    with attention_implementation(inspected.exported.layered, implementation), torch.no_grad():
        return inspected.exported.values(torch.from_numpy(tokens)[None], start)


def gate(bundle: Bundle, cases: list[Case]) -> list[Deviation]:
    """Run the bundle every way the runtime may, and compare.

    Args:
        bundle: The staged bundle.
        cases: From `reference`.

    Returns:
        The table.

    Raises:
        ExportError: The bundle does not even run.
    """
    rows: list[Deviation] = []
    put_out = partial(EXPORTS[bundle.topology.kind].put_out, bundle)
    try:
        session = Session(bundle, provider="cpu")
        for case in tqdm(cases, desc="parity", unit="case", leave=False, disable=None):
            for run, steps in _runs(session, case):
                rows += deviations(case, run, steps, put_out)
    except (DynamoError, RuntimeError) as error:  # the second is onnxruntime's, when a pass fails
        raise ExportError(f"the exported bundle does not run: {error}") from error
    return rows


def _runs(session: Session, case: Case) -> Iterator[tuple[str, Iterable[PassOutputs]]]:
    """Yield every way of running one case; the name says how many tokens a pass takes."""
    length, start, fork = len(case.tokens), case.start, case.fork
    topology = session.bundle.topology
    most = topology.n_tokens + 1
    session.cache.reset()
    kept = length - start
    step = session.step(case.tokens.tolist(), rows=Last(kept), heads=Last(kept))
    yield "prefill", [(step, case.expected)]
    begin = max(start, 1)
    for size in range(1, most + 1):
        session.cache.rollback(begin)
        yield f"decode {size}", _steps(session, case.tokens, case.expected, begin, start, size)
    for size in sorted({1, 2, most}):
        session.cache.rollback(fork)
        yield f"rollback {size}", _steps(session, case.other, case.expected_other, fork, start, size)
    if session.skips_heads:
        for size in (1, most):
            session.cache.rollback(begin)
            yield f"skip {size}", _skipping(session, case, begin, size)
    yield from EXPORTS[topology.kind].runs(session, case)
    session.cache.reset()
    chunk = max(2, -(-length // 3) - 1)
    for at in range(0, begin, chunk):
        session.step(case.tokens[at : min(at + chunk, begin)].tolist())
    yield "chunks", _steps(session, case.tokens, case.expected, begin, start, chunk)


def _steps(
    session: Session, tokens: np.ndarray, expected: Values, begin: int, start: int, size: int
) -> Iterator[PassOutputs]:
    """Continue at `begin` with `size` tokens a pass, and ask for rows in turn in the three ways there are.

    All rows of everything; what is the default, the last; all of the first head's and one of the further heads', as
    verification does.
    """
    for turn, at in enumerate(range(begin, len(tokens), size)):
        part = tokens[at : at + size].tolist()
        first, last = at - start, at + len(part) - start
        if turn % 3 == 1 and len(part) > 1:
            yield session.step(part), between(expected, last - 1, last)
        elif turn % 3 == 2 and len(part) > 1:
            row = len(part) // 2 - 1
            step = session.step(part, rows=ALL, heads=At([row]))
            theirs = between(expected, first + row, first + row + 1)
            yield step, theirs | {"logits": expected["logits"][first:last]}
        else:
            step = session.step(part, rows=ALL, heads=ALL)
            yield step, between(expected, first, last)


def _skipping(session: Session, case: Case, begin: int, size: int) -> Iterator[PassOutputs]:
    """Leave the further heads out of most passes, rolling back among them, and have them catch up in the others."""
    tokens, expected, start = case.tokens, case.expected, case.start
    at, turn = begin, 0
    while at < len(tokens):
        part = tokens[at : at + size].tolist()
        if turn % 4 == 3 or at + size >= len(tokens):
            step = session.step(part, rows=ALL, heads=ALL)
            yield step, between(expected, at - start, at + len(part) - start)
        else:
            session.step(part, heads=NONE)
            session.cache.rollback(at + (len(part) + 1) // 2)
        at, turn = session.cache.length, turn + 1


def as_json(rows: list[Deviation], cases: list[Case], left_out: list[str]) -> dict[str, Any]:
    """Return the table for the report."""
    return {
        "tolerance": TOLERANCE,
        "passed": all(row.passed for row in rows),
        "reference": sorted({case.implementation for case in cases}),
        "not_run": left_out,
        "rows": [asdict(row) for row in rows],
    }
