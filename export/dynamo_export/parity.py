"""The parity gate: the bundle, run as it ships, against the torch model run eagerly without a cache.

The torch side sees whole sequences at once and knows nothing of caches, positions or rows; it is computed first, so
that its weights need not be in memory together with the session. The other side is `dynamo_runtime.session.Session`
on the staged bundle: prefill, single tokens, several tokens, and all of that again after rolling back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dynamo_runtime.bundle import Bundle
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.session import Session, Step

from .attention import attention_implementation
from .errors import ExportError
from .graph import Subject

TOLERANCE = 1e-4
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


@dataclass(frozen=True)
class Case:
    """Two sequences around one boundary and what torch says of them.

    Attributes:
        name: What the boundary is.
        tokens: int64 [length].
        other: As `tokens` up to `fork`, other tokens from there on.
        start: First position whose logits are compared.
        fork: First position in which `other` differs.
        expected: Logits per head [length - start, vocab].
        expected_other: The same for `other`.
        implementation: transformers' attention that made them.
    """

    name: str
    tokens: np.ndarray
    other: np.ndarray
    start: int
    fork: int
    expected: list[np.ndarray]
    expected_other: list[np.ndarray]
    implementation: str


@dataclass
class Row:
    """One line of the table: one way of running one case, on one head.

    Attributes:
        case: Boundary.
        length: Tokens of the sequence.
        run: How it was run.
        head: Token head, from 1.
        difference: Largest |Δlogit|.
        limit: The largest allowed.
        rows: Positions compared.
        decided: Positions whose argmax torch decides by more than twice the difference.
        argmax: Of those, how many agree.
        topk: Whether the top-K outputs are the largest of the logits.
        passed: Whether all of that is as it should be.
    """

    case: str
    length: int
    run: str
    head: int
    difference: float
    limit: float
    rows: int
    decided: int
    argmax: int
    topk: bool
    passed: bool


def boundaries(subject: Subject, longest: int) -> list[Boundary]:
    """Every length the gate has to cross.

    Args:
        subject: What is exported.
        longest: Longest sequence the gate may run.

    Raises:
        ExportError: If a window or scaling boundary lies beyond that.
    """
    context = subject.context_length
    found = [Boundary("short", 0, True)]
    for window in sorted({s.window for s in subject.attention.values() if s.window is not None}):
        found.append(Boundary(f"window {window}", window, True))
    rope = getattr(subject.base.config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if original is not None and original < context:
        found.append(Boundary(f"rope {rope.get('rope_type')} {original}", int(original), True))
    found.append(Boundary(f"context {context}", context, False))
    for boundary in found:
        if boundary.must and boundary.position + 2 * _span(subject) > max(longest, 2 * _span(subject)):
            raise ExportError(
                f"the gate would have to run more than {longest} tokens to cross {boundary.name}: "
                f"allow it with --parity-length {boundary.position + 2 * _span(subject)}, or export a shorter "
                f"--context-length"
            )
    return found


def _span(subject: Subject) -> int:
    """Positions compared on each side of a boundary: room for a pass of every size."""
    return max(8, 2 * (subject.n_heads + 1))


def reference(subject: Subject, longest: int, seed: int = 0) -> tuple[list[Case], list[str]]:
    """Runs the torch model over whole sequences around every boundary.

    Args:
        subject: What is exported.
        longest: Longest sequence to run.
        seed: Of the random tokens.

    Returns:
        The cases, and the names of boundaries left out because they lie beyond `longest`.

    Raises:
        ExportError: See `boundaries`; or the base's logits are not simply its output embedding of its states.
    """
    rng = np.random.default_rng(seed)
    vocab = int(subject.base.get_output_embeddings().weight.shape[0])
    cases, left_out = [], []
    span = _span(subject)
    crossings = boundaries(subject, longest)
    for boundary in tqdm(crossings, desc="torch", unit="case", leave=False, disable=None):
        length = min(subject.context_length, SHORT if boundary.position == 0 else boundary.position + span)
        if length > longest and not boundary.must:
            left_out.append(boundary.name)
            continue
        start = 0 if length <= SHORT else max(1, min(boundary.position, length) - span)
        fork = start + (length - start) // 2
        tokens = rng.integers(0, vocab, length)
        other = tokens.copy()
        other[fork:] = (other[fork:] + rng.integers(1, vocab, length - fork)) % vocab
        implementation = _implementation(subject, length)
        expected, expected_other = (torch_logits(subject, ids, start, implementation) for ids in (tokens, other))
        if boundary.position == 0:
            _check_head(subject, tokens, expected[0], implementation)
        cases.append(Case(boundary.name, tokens, other, start, fork, expected, expected_other, implementation))
    return cases, left_out


def _implementation(subject: Subject, length: int) -> str:
    """Eager attention where its scores fit into memory, else torch's own fused one."""
    heads = max(spec.heads for spec in subject.attention.values())
    weights = sum(p.numel() for p in subject.model.parameters()) * 4
    return "eager" if 3 * heads * length**2 * 4 <= max(EAGER_BYTES, weights) else "sdpa"


def torch_logits(subject: Subject, tokens: np.ndarray, start: int, implementation: str) -> list[np.ndarray]:
    """Logits of every head from one pass without a cache.

    Args:
        subject: What is exported.
        tokens: int64 [length].
        start: First row wanted.
        implementation: transformers' attention implementation.

    Returns:
        Per head [length - start, vocab].
    """
    embedding = subject.base.get_output_embeddings()
    with attention_implementation(subject.model, implementation), torch.no_grad():
        states = subject.states(torch.from_numpy(tokens)[None], use_cache=False)
        return [embedding(state[0, start:]).numpy() for state in states]


def _check_head(subject: Subject, tokens: np.ndarray, expected: np.ndarray, implementation: str) -> None:
    """Makes sure that the base does nothing else to its logits (scaling, soft-capping)."""
    with attention_implementation(subject.model, implementation), torch.no_grad():
        own = subject.base(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    if own.shape != expected.shape or np.abs(own - expected).max() > TOLERANCE * max(1.0, float(np.abs(own).max())):
        raise ExportError(
            f"{type(subject.base).__name__} changes its logits after the output embedding (scaling or soft-capping): "
            "not supported"
        )


def gate(bundle: Bundle, cases: list[Case]) -> list[Row]:
    """Runs the bundle every way the runtime may, and compares.

    Args:
        bundle: The staged bundle.
        cases: From `reference`.

    Returns:
        The table.

    Raises:
        ExportError: The bundle does not even run.
    """
    rows: list[Row] = []
    try:
        session = Session(bundle, provider="cpu")
        for case in tqdm(cases, desc="parity", unit="case", leave=False, disable=None):
            for run, steps in _runs(session, case, bundle.n_heads):
                rows += _compare(case, run, steps, bundle.n_heads)
    except DynamoError as error:
        raise ExportError(f"the exported bundle does not run: {error}") from error
    return rows


# What one pass put out, and which positions of which sequence it is about: (step, expected per head, rows per head)
Passed = tuple[Step, list[np.ndarray]]


def _runs(session: Session, case: Case, n_heads: int) -> Iterator[tuple[str, list[Passed]]]:
    """Every way of running one case; the name says how many tokens a pass takes."""
    length, start, fork = len(case.tokens), case.start, case.fork
    most = n_heads + 1
    session.cache.reset()
    kept = length - start
    step = session.step(case.tokens.tolist(), rows=0 if start == 0 else kept, head_rows=list(range(start - length, 0)))
    yield "prefill", [(step, case.expected)]
    begin = max(start, 1)
    for size in range(1, most + 1):
        session.cache.rollback(begin)
        yield f"decode {size}", list(_steps(session, case.tokens, case.expected, begin, start, size))
    for size in sorted({1, 2, most}):
        session.cache.rollback(fork)
        yield f"rollback {size}", list(_steps(session, case.other, case.expected_other, fork, start, size))
    session.cache.reset()
    chunk = max(2, -(-length // 3) - 1)
    for at in range(0, begin, chunk):
        session.step(case.tokens[at : min(at + chunk, begin)].tolist())
    yield "chunks", list(_steps(session, case.tokens, case.expected, begin, start, chunk))


def _steps(
    session: Session, tokens: np.ndarray, expected: list[np.ndarray], begin: int, start: int, size: int
) -> Iterator[Passed]:
    """Continues at `begin` with `size` tokens a pass. Every other pass leaves the optional inputs at their defaults."""
    for turn, at in enumerate(range(begin, len(tokens), size)):
        part = tokens[at : at + size].tolist()
        upto = at + len(part) - start
        if turn % 2 and len(part) > 1:
            yield session.step(part), [head[upto - 1 : upto] for head in expected]
        else:
            step = session.step(part, rows=len(part), head_rows=list(range(len(part))))
            yield step, [head[at - start : upto] for head in expected]


def _compare(case: Case, run: str, steps: list[Passed], n_heads: int) -> list[Row]:
    rows = []
    for head in range(1, n_heads + 1):
        ours = np.concatenate([step.logits(head) for step, _ in steps])
        values, ids = (np.concatenate([step.topk(head)[i] for step, _ in steps]) for i in (0, 1))
        theirs = np.concatenate([expected[head - 1] for _, expected in steps])
        if ours.shape != theirs.shape:
            raise ExportError(f"head {head} puts out {ours.shape} where {theirs.shape} is expected")
        rows.append(_row(case, run, head, ours, theirs, values, ids))
    return rows


def _row(
    case: Case, run: str, head: int, ours: np.ndarray, theirs: np.ndarray, values: np.ndarray, ids: np.ndarray
) -> Row:
    delta = np.abs(ours - theirs)
    difference = float(delta.max())
    limit = TOLERANCE * max(1.0, float(np.abs(theirs).max()))
    best = np.partition(theirs, -2, axis=1)
    decided = best[:, -1] - best[:, -2] > 2 * delta.max(axis=1)
    agree = (ours.argmax(1) == theirs.argmax(1)) & decided
    largest = -np.sort(-ours, axis=1)[:, : values.shape[1]]
    topk = bool(np.array_equal(values, largest) and np.array_equal(np.take_along_axis(ours, ids, 1), values))
    finite = bool(np.isfinite(ours).all())
    passed = finite and difference <= limit and bool((agree == decided).all()) and topk
    return Row(
        case=case.name,
        length=len(case.tokens),
        run=run,
        head=head,
        difference=difference,
        limit=limit,
        rows=len(ours),
        decided=int(decided.sum()),
        argmax=int(agree.sum()),
        topk=topk,
        passed=passed,
    )


def table(rows: list[Row], left_out: list[str]) -> str:
    """The table as text: one line per case and run, the worst head in it."""
    lines = [f"{'case':<24}{'tokens':>7}  {'run':<12}{'max |Δlogit|':>13}{'limit':>9}  {'argmax':>11}  top-K"]
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.length, row.run), []).append(row)
    for (case, length, run), heads in groups.items():
        worst = max(heads, key=lambda row: (not row.passed, row.difference / row.limit))
        agreed = f"{sum(r.argmax for r in heads)}/{sum(r.decided for r in heads)}"
        mark = "" if all(r.passed for r in heads) else f"  FAILED on head {worst.head}"
        lines.append(
            f"{case:<24}{length:>7}  {run:<12}{worst.difference:>13.1e}{worst.limit:>9.1e}  {agreed:>11}  "
            f"{'ok' if all(r.topk for r in heads) else 'no':>5}{mark}"
        )
    lines += [f"{name:<24}{'':>7}  not run: longer than --parity-length allows" for name in left_out]
    return "\n".join(lines)


def as_json(rows: list[Row], cases: list[Case], left_out: list[str]) -> dict[str, Any]:
    """The table for the manifest."""
    return {
        "tolerance": TOLERANCE,
        "passed": all(row.passed for row in rows),
        "reference": sorted({case.implementation for case in cases}),
        "not_run": left_out,
        "rows": [asdict(row) for row in rows],
    }
