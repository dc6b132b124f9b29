"""Multi-token perplexity of a bundle on real text (DynaMo, section "Evaluation")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from dynamo_runtime.bundle import Bundle
from dynamo_runtime.corpus import Document
from dynamo_runtime.sampling import Context
from dynamo_runtime.scores import Scores
from dynamo_runtime.scoring import LOOK_AHEAD_STRIDE, Stretch, score_window
from dynamo_runtime.selection import parameters_for
from dynamo_runtime.session import Session
from dynamo_runtime.strategies import Dynamo

from .errors import EvaluationError
from .results import Record, Results

DOCUMENT = "document"


@dataclass(frozen=True)
class Window:
    """Positions `first` … `end` - 1 of a text, scored by a model that sees it from `begin` on."""

    begin: int
    first: int
    end: int


def windows(length: int, size: int, stride: int) -> Iterator[Window]:
    """Yield windows over a text of some positions, such that each is scored once, behind at least size - stride others.

    Args:
        length: Positions of the text.
        size: Of a window.
        stride: By how much the next begins later, 1 … size.
    """
    begin = first = 0
    while first < length:
        yield Window(begin, first, min(begin + size, length))
        first, begin = begin + size, begin + stride


@dataclass
class Walk:
    """One way through a text, as Alg. 1 would have gone at one ε_b had it written this very text.

    Every pass predicts the n tokens behind it, n by the back-off rule, and the next stands behind those. Mask and
    thresholds choose n alone; the likelihood is that of the heads themselves, or it would be 0 for any n-gram that was
    never counted.

    Attributes:
        strategy: Alg. 1 with its ε_b.
        position: Where the next pass stands.
        passes: So far.
        tokens: They predicted.
        covered: Tokens of those that the heads may say.
        nll: -log Π f^i of the covered ones, in nats.
    """

    strategy: Dynamo
    position: int = 0
    passes: int = 0
    tokens: int = 0
    covered: int = 0
    nll: float = 0.0

    def follow(self, stretch: Stretch, tokens: Sequence[int], begin: int, vocab_size: int) -> None:
        """Take the passes that stand in a stretch of the text, which the model sees from `begin` on."""
        while self.position in stretch.positions:
            row = self.position - stretch.positions.start
            known = Context(tokens[begin : self.position + 1], vocab_size)
            n = self.strategy.length(stretch.step, known, row, tokens[self.position + 1])
            nll = stretch.scores.nll[:n, row]
            covered = np.isfinite(nll)
            self.nll += float(nll[covered].sum())
            self.covered += int(covered.sum())
            self.passes += 1
            self.tokens += n
            self.position += n


@dataclass(frozen=True)
class Scoring:
    """How texts are scored.

    Attributes:
        size: Positions of a window.
        stride: See `windows`.
        ahead: Positions must have so many tokens behind them, or as many as the bundle predicts, if those are more.
        thresholds: ε_b of the dynamic perplexities; there are none without parallel heads.
        sampling: What else Alg. 1 is to do; the bundle's defaults where it says nothing.
    """

    size: int
    stride: int
    ahead: int = 0
    thresholds: Sequence[float] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


def score_document(session: Session, tokens: Sequence[int], scoring: Scoring) -> Record:
    """Sum from which `Perplexities` are made.

    Args:
        session: Of the bundle.
        tokens: The text.
        scoring: How.

    Returns:
        "positions" scored, "nll" of every token ahead, "joint" nll of all, and "dynamic": by ε_b, "passes", "tokens"
        and "nll". Where a draft vocabulary does not cover every token (see `Scores`), the others are in no nll, and
        "covered" says what the sums are over: `Coverage` as a record.

    Raises:
        DynamoError: The text has tokens outside the vocabulary, or a parameter does not fit.
        ValueError: The text is too short.
    """
    bundle = session.bundle
    thresholds, sampling = scoring.thresholds, scoring.sampling
    walks = {f"{e:g}": Walk(dynamo(bundle, e, sampling)) for e in thresholds if Dynamo.fits(bundle)}
    coverage = Coverage.none(bundle.topology.n_tokens)
    nll, joint, positions = np.zeros(bundle.topology.n_tokens), 0.0, 0
    for window in windows(len(tokens) - max(scoring.ahead, bundle.topology.n_tokens), scoring.size, scoring.stride):
        for stretch in score_window(session, tokens, window.begin, window.first, window.end):
            scores = stretch.scores
            nll += np.where(np.isfinite(scores.nll), scores.nll, 0.0).sum(1)
            joint += float(scores.joint[np.isfinite(scores.joint)].sum())
            coverage.add(scores)
            positions += len(stretch.positions)
            for walk in walks.values():
                walk.follow(stretch, tokens, window.begin, bundle.vocab_size)
    sums: Record = {
        "positions": positions,
        "nll": nll.tolist(),
        "joint": joint,
        "dynamic": {
            threshold: {"passes": walk.passes, "tokens": walk.tokens, "nll": walk.nll}
            for threshold, walk in walks.items()
        },
    }
    if min(*coverage.tokens, coverage.joint) == positions:
        return sums
    return sums | {"covered": coverage.record({threshold: walk.covered for threshold, walk in walks.items()})}


@dataclass
class Coverage:
    """How many positions have tokens ahead that the heads may say.

    Attributes:
        tokens: Of every token ahead.
        runs: Of the first one, of the first two and so on, all of them.
        runs_nll: -log Π p of those, in nats.
        joint: Of all tokens ahead, as the joint distribution has them.
    """

    tokens: np.ndarray
    runs: np.ndarray
    runs_nll: np.ndarray
    joint: int = 0

    @classmethod
    def none(cls, n: int) -> Coverage:
        """Of no position yet, n tokens ahead."""
        return cls(np.zeros(n, int), np.zeros(n, int), np.zeros(n))

    def add(self, scores: Scores) -> None:
        """Count further positions."""
        runs = np.cumsum(scores.nll, axis=0)
        self.tokens += np.isfinite(scores.nll).sum(1)
        self.runs += np.isfinite(runs).sum(1)
        self.runs_nll += np.where(np.isfinite(runs), runs, 0.0).sum(1)
        self.joint += int(np.isfinite(scores.joint).sum())

    def record(self, dynamic: Mapping[str, int]) -> Record:
        """As it is written down, with the covered tokens of dynamic passes by ε_b."""
        found = {name: getattr(self, name).tolist() for name in ("tokens", "runs", "runs_nll")}
        return found | {"joint": self.joint, "dynamic": dict(dynamic)}


def run(
    results: Results,
    sessions: Sequence[Session],
    documents: Sequence[Document],
    scoring: Scoring,
    limit_tokens: int | None = None,
) -> None:
    """Score what is not scored yet.

    All bundles are scored at the same positions, those that have enough tokens behind them for each of them.

    Args:
        results: Grow by a record for every bundle and text.
        sessions: Of the bundles.
        documents: The texts.
        scoring: How.
        limit_tokens: Of every text the first so many; None means all.
    """
    scoring = replace(scoring, ahead=max(session.bundle.topology.n_tokens for session in sessions))
    done = results.done(DOCUMENT, lambda record: (record["bundle"], record["document"]))
    for document in tqdm(documents, desc="texts", disable=None):
        for number, session in enumerate(sessions):
            if (number, document.name) in done:
                continue
            tokens = session.bundle.tokenizer.encode(document.text).ids[:limit_tokens]
            sums = score_document(session, tokens, scoring)
            results.append({"kind": DOCUMENT, "bundle": number, "document": document.name, **sums})


def long_enough(documents: Sequence[Document], bundles: Sequence[Bundle], limit_tokens: int | None) -> list[Document]:
    """Return the texts that every bundle can score.

    Raises:
        EvaluationError: There is none.
    """
    # A look-ahead bundle scores only some positions.
    least = max(bundle.topology.n_tokens for bundle in bundles) + LOOK_AHEAD_STRIDE
    found = [
        document
        for document in documents
        if all(len(bundle.tokenizer.encode(document.text).ids[:limit_tokens]) > least for bundle in bundles)
    ]
    if not found:
        raise EvaluationError(f"no text has more than {least} tokens, which is the least that can be scored")
    return found


def window_size(session: Session, size: int | None, stride: int | None) -> tuple[int, int]:
    """Return the size and stride of the windows: by default the whole context, and half of it.

    Raises:
        EvaluationError: They do not fit the context, or each other.
    """
    most = session.max_length - len(session.bundle.look_ahead)
    size = most if size is None else size
    stride = max(1, size // 2) if stride is None else stride
    if not 1 <= size <= most:
        raise EvaluationError(f"a window must have 1 to {most} tokens in this bundle, not {size}")
    if not 1 <= stride <= size:
        raise EvaluationError(f"the stride must be from 1 to the window's {size} tokens, not {stride}")
    return size, stride


def dynamo(bundle: Bundle, threshold: float, sampling: Mapping[str, Any]) -> Dynamo:
    """Alg. 1 at one ε_b, the paper's parameters where `sampling` says nothing.

    Raises:
        ParameterError: The parameters do not fit the bundle.
    """
    given = {**sampling, "backoff_threshold": threshold}
    return Dynamo(bundle, parameters_for(Dynamo.name, bundle, given))
