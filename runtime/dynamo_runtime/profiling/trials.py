"""Decodes prompts with every strategy in turn: what they gain over plain decoding on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..device.records import Backoff, DrafterRuns, Quantiles, StrategyRun
from ..engine import Engine
from ..errors import ProfileError
from ..generation_statistics import Statistics
from ..interval import Interval
from ..lookup import Lookup
from ..parameters import SamplingParameters
from ..registry import can_draft
from ..sampling import Context
from ..selection import refusal
from ..session import Session
from ..step import Step
from ..strategies import Auto, Autoregressive, Dynamo, Speculative, Strategy, Turn
from ..verification import Draft

PROMPTS = (
    "class Stack:\n    def __init__(self):\n",
    "import os\n\ndef walk(path):\n    ",
    "def parse(text):\n    result = []\n    for line in text",
    "The weather in the mountains changes quickly, so before we ",
    "Question: Why is the sky blue?\nAnswer:",
    "for index, value in enumerate(values):\n    if value",
)
"""Of code and prose; what they say matters less than that they are always the same."""

THRESHOLDS, QUICK_THRESHOLDS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (0.0, 0.4, 0.6, 0.8)
_RESAMPLES = 1000


@dataclass(frozen=True)
class Trials:
    """What is decoded, and with what.

    Attributes:
        engine: On the bundle; with a profile for "auto" to plan with.
        plain: What speeds are compared with.
        prompts: Tokens.
        new_tokens: For each prompt.
    """

    engine: Engine
    plain: Engine
    prompts: Sequence[Sequence[int]]
    new_tokens: int


@dataclass(frozen=True)
class Way:
    """One way to decode: an engine, and options of its `stream`."""

    engine: Engine
    options: Mapping[str, Any]

    def sample(self, prompt: Sequence[int], place: int, new_tokens: int, seed: int) -> Sample:
        """Decode the prompt at some place once."""
        self.engine.reset()
        stream = self.engine.stream(prompt, max_new_tokens=new_tokens, seed=seed, ignore_eos=True, **self.options)
        gaps: list[float] = []
        ended, given = 0.0, 0
        for _ in stream:
            now = time.perf_counter()
            if given:  # tokens of one round come at once
                more = len(stream.tokens) - given
                gaps += [(now - ended) * 1e3, *[0.0] * (more - 1)]
            ended, given = now, len(stream.tokens)
        return Sample(place, stream.statistics, gaps)


@dataclass
class Outside:
    """What decoding costs in Python, in milliseconds, and what became of drafts.

    Attributes:
        overhead: A plain token, outside the pass.
        drafting: A draft, besides, outside the pass and the runs of a drafter's graph.
        judged: Depth, confidence and acceptance of every draft that was judged, with sampling and greedily.
    """

    overhead: float = 0.0
    drafting: float = 0.0
    judged: dict[bool, list[tuple[int, float, bool]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One prompt decoded once: which, what it cost, and the milliseconds between its tokens."""

    prompt: int
    statistics: Statistics
    gaps: list[float]


class _Recorded(Speculative):
    """`speculative`, noting what becomes of its drafts."""

    def __init__(self, bundle: Bundle, parameters: SamplingParameters):
        super().__init__(bundle, parameters)
        self.judged: list[tuple[int, float, bool]] = []

    def advance(self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator) -> Turn:
        turn = super().advance(step, context, drafts, rng)
        for depth, draft in enumerate(drafts[: turn.accepted + 1], 1):
            self.judged.append((depth, draft.confidence, depth <= turn.accepted))
        return turn


def encoded(engine: Engine, prompts: Sequence[str | Sequence[int]] | None) -> list[list[int]]:
    """Return prompts as tokens, cut to half the context.

    Raises:
        ProfileError: There are none.
        PromptError: One is empty, or not text.
    """
    if prompts is not None and not prompts:
        raise ProfileError("there are no prompts to decode")
    room = engine.session.max_length // 2
    return [engine.encode(prompt)[:room] for prompt in (PROMPTS if prompts is None else prompts)]


def time_outside(trials: Trials, drafter: DrafterRuns | None = None) -> Outside:
    """Return what plain decoding and drafting do between passes, and how good the drafts are.

    Args:
        trials: What to decode.
        drafter: Costs of the drafter's graph, of whose runs a part is in Python.
    """
    engine, found = trials.engine, Outside()
    bundle = engine.bundle
    plain = _outside_ms(trials, Autoregressive.name)
    found.overhead = sum(spent for spent, _ in plain) / sum(drafts + 1 for _, drafts in plain)
    if not can_draft(bundle):
        return found
    drafting = []
    for greedy in (False, True):
        given = {"temperature": 0.0} if greedy else {}
        parameters = bundle.parameters(given)
        recorded = _Recorded(bundle, parameters)
        drafting += _outside_ms(trials, recorded)
        found.judged[greedy] = recorded.judged
    drafts = sum(drafts for _, drafts in drafting)
    a_round, a_draft = (0.0, 0.0) if drafter is None else _in_python(drafter)
    spent = sum(spent - found.overhead - a_round - a_draft * drafts for spent, drafts in drafting)
    found.drafting = max(spent / max(drafts, 1), 0.0)
    return found


def _in_python(drafter: DrafterRuns) -> tuple[float, float]:
    """Return milliseconds that the runs of a drafter's graph take outside onnxruntime.

    There are those of a round, and those of every draft.
    """
    layers = min(drafter.layers, key=lambda run: (run.positions, run.past))
    once = layers.time.p50 - layers.inside
    draft = sum(run.time.p50 - run.inside for run in drafter.drafts) / len(drafter.drafts)
    return (once, draft) if all(run.depth for run in drafter.drafts) else (once + draft, 0.0)


def _inside_s(session: Session) -> float:
    """Return seconds spent in passes so far, and in onnxruntime for the drafter's graph."""
    return session.step_seconds + (0.0 if session.heads is None else session.heads.seconds)


def _outside_ms(trials: Trials, strategy: str | Strategy) -> list[tuple[float, int]]:
    """Of every round: milliseconds outside the passes and the runs of a drafter's graph, and drafts judged."""
    engine, found = trials.engine, []
    for prompt in trials.prompts:
        engine.reset()
        stream = engine.stream(prompt, strategy=strategy, max_new_tokens=trials.new_tokens, seed=0, ignore_eos=True)
        session, statistics = engine.session, stream.statistics
        ended = before = proposed = 0.0
        for turn, _ in enumerate(stream):
            now, inside = time.perf_counter(), _inside_s(session)
            if turn:  # the first round is the prompt's
                judged = statistics.draft_tokens_proposed - proposed
                found.append(((now - ended - inside + before) * 1e3, int(judged)))
            proposed = statistics.draft_tokens_proposed
            before, ended = _inside_s(session), time.perf_counter()
    return found


def run_strategies(trials: Trials, seconds: float) -> list[StrategyRun]:
    """Return every strategy that the bundle allows, on all prompts, in turn.

    Args:
        trials: What to decode.
        seconds: For all of it; every strategy runs at least once on every prompt.
    """
    engine = trials.engine
    ways = {"plain": Way(trials.plain, {"strategy": Autoregressive.name})}
    if trials.plain is not engine:
        ways["autoregressive"] = Way(engine, {"strategy": Autoregressive.name})
    if can_draft(engine.bundle):
        for depth in range(1, engine.bundle.topology.n_tokens):
            name = f"speculative, {depth} draft{'s' * (depth > 1)}"
            ways[name] = Way(engine, {"strategy": Speculative.name, "draft_tokens": depth})
    if engine.lossless:
        ways["speculative, lookup"] = Way(engine, {"strategy": Speculative.name, "drafter": Lookup.name})
    if engine.lossless or can_draft(engine.bundle):
        ways["auto"] = Way(engine, {"strategy": Auto.name})
    if _allows_dynamo(engine):
        ways["dynamo"] = Way(engine, {"strategy": Dynamo.name})
    return _take_turns(ways, trials, seconds)


def run_backoff(trials: Trials, seconds: float, thresholds: Sequence[float]) -> list[Backoff]:
    """Return what `dynamo` gains by back-off threshold, if it can run with one.

    The other arguments are those of `run_strategies`.
    """
    bundle = trials.engine.bundle
    thresholds = [t for t in thresholds if refusal(Dynamo.name, bundle, {"backoff_threshold": t}) is None]
    if not thresholds:
        return []
    ways = {"plain": Way(trials.plain, {"strategy": Autoregressive.name})}
    for threshold in thresholds:
        ways[str(threshold)] = Way(trials.engine, {"strategy": Dynamo.name, "backoff_threshold": threshold})
    runs = {run.name: run for run in _take_turns(ways, trials, seconds)}
    return [Backoff(t, runs[str(t)].tokens_per_pass.value, runs[str(t)].ratio) for t in thresholds]


def _allows_dynamo(engine: Engine) -> bool:
    return refusal(Dynamo.name, engine.bundle) is None


def _take_turns(ways: Mapping[str, Way], trials: Trials, seconds: float) -> list[StrategyRun]:
    """Decode every prompt in every way, in rounds whose order alternates, until the time is up.

    Args:
        ways: By name, "plain" among them.
        trials: What to decode.
        seconds: For all of it; there are at least two rounds, of which the first only warms up.
    """
    found: dict[str, list[Sample]] = {name: [] for name in ways}
    started, turn = time.perf_counter(), 0
    while turn < 2 or time.perf_counter() - started < seconds:
        for place, prompt in enumerate(trials.prompts):
            for name in list(ways) if turn % 2 else reversed(list(ways)):
                sample = ways[name].sample(prompt, place, trials.new_tokens, turn)
                if turn:  # the first round warms up
                    found[name].append(sample)
        turn += 1
    return [_summary(name, samples, found["plain"]) for name, samples in found.items()]


def _summary(name: str, samples: Sequence[Sample], plain: Sequence[Sample]) -> StrategyRun:
    """Return speeds of all tokens together, with intervals over prompts; rounds are paired with plain decoding's."""
    count = 1 + max(sample.prompt for sample in samples)
    sums = np.zeros((count, 5))  # by prompt: tokens, seconds, passes, plain tokens, plain seconds
    for ours, theirs in zip(samples, plain, strict=True):
        sums[ours.prompt] += [*_decoded(ours.statistics), ours.statistics.rounds - 1, *_decoded(theirs.statistics)]
    chosen = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    resampled = np.concatenate([sums.sum(0)[None], sums[chosen].sum(1)])
    tokens, seconds, passes, plain_tokens, plain_seconds = resampled.T
    proposed, accepted = (
        np.sum([np.pad(counts, (0, 16 - len(counts))) for counts in by_depth], axis=0)
        for by_depth in (
            [sample.statistics.proposed_at_depth for sample in samples],
            [sample.statistics.accepted_at_depth for sample in samples],
        )
    )
    depth = int(np.count_nonzero(proposed))
    gaps = [gap for sample in samples for gap in sample.gaps]
    p50, p90, p99 = (float(p) for p in np.percentile(gaps or [0.0], [50, 90, 99]))
    return StrategyRun(
        name=name,
        tokens_per_pass=_interval(tokens / np.maximum(passes, 1)),
        tokens_per_s=_interval(tokens / seconds),
        # Multiplied crosswise, the ratio of plain decoding to itself is 1 without rounding.
        ratio=_interval((tokens * plain_seconds) / (seconds * plain_tokens)),
        acceptance=[float(rate) for rate in accepted[:depth] / proposed[:depth]],
        between_tokens=Quantiles(p50, p90, p99, len(gaps)),
        drafters=_by_drafter([sample.statistics for sample in samples]),
    )


def _by_drafter(texts: Sequence[Statistics]) -> dict[str, list[int]]:
    """See `StrategyRun.drafters`."""
    names = sorted({name for text in texts for name in text.proposed_by})
    return {
        name: [sum(text.proposed_by[name] for text in texts), sum(text.accepted_by[name] for text in texts)]
        for name in names
    }


def _decoded(statistics: Statistics) -> tuple[int, float]:
    """Return tokens after the first pass, and the time they took."""
    return statistics.new_tokens - statistics.first_tokens, max(statistics.total_s - statistics.ttft_s, 1e-9)


def _interval(values: np.ndarray) -> Interval:
    """Return an estimate [0] with the middle 95 % of its resamples [1:]."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))
