"""Times passes, by their rows, behind a past and by operator, and what the drafter's graph does between them."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..device.records import DrafterRuns, DraftRun, LayersRun, Operator, Pass, Prefill, Quantiles, Resume
from ..engine import Engine
from ..session import Session
from ..step import ALL, NONE
from ..topology import Plain

ROWS = (*range(1, 9), 12, 16)
POSITIONS = (1, 2, 4, 8)
"""That the layers of a drafter's graph read in a round: what became final with one pass."""
_BLOCK = 4  # passes of a kind in a row; the first of them warms up what the kind before has cooled down

Clock = Callable[[], float]
"""Seconds since some moment."""


def rounds(seconds: float, least: int, most: int = 1000, clock: Clock = time.perf_counter) -> Iterator[int]:
    """Count rounds, `least` or more, until the time is up."""
    started = clock()
    for turn in range(most):
        if turn >= least and clock() - started > seconds:
            return
        yield turn


def quantiles(milliseconds: Sequence[float]) -> Quantiles:
    """Return the median and tail of some times."""
    p50, p90, p99 = (float(p) for p in np.percentile(milliseconds, [50, 90, 99]))
    return Quantiles(p50, p90, p99, len(milliseconds))


class PassTimer:
    """Times passes of a session. What they are fed does not matter, as it does not change what they cost."""

    def __init__(self, session: Session, clock: Clock = time.perf_counter):
        """Take over a session, whose cache then holds whatever was timed last."""
        self.session, self._clock = session, clock

    def behind(self, past: int) -> None:
        """Have the cache hold `past` positions."""
        cache = self.session.cache
        if cache.length < past:
            cache.rollback(0)
            while cache.length < past:
                self.session.step([1] * min(256, past - cache.length))
        cache.rollback(past)

    def step(self, rows: int, heads: bool) -> tuple[float, float]:
        """Run a pass over `rows` tokens and roll it back; milliseconds of it all, and of that inside onnxruntime."""
        session = self.session
        past, inside = session.cache.length, session.ort_seconds
        started = self._clock()
        step = session.step([1] * rows, rows=ALL, heads=ALL if heads else NONE)
        step.topk()
        elapsed = self._clock() - started
        session.cache.rollback(past)
        return elapsed * 1e3, (session.ort_seconds - inside) * 1e3

    def reference(self, count: int = 30) -> float:
        """Return median milliseconds of a pass over one token: the same at any time, unless something drifts."""
        self.behind(8)
        return float(np.median([self.step(1, False)[0] for _ in range(count)]))

    def passes(self, pasts: Sequence[int], seconds: float) -> list[Pass]:
        """Return what a pass costs by tokens, past and whether heads inside the graph take part.

        Rounds are in random order.
        """
        inside = self.session.bundle.topology.has_head_rows and self.session.heads is None
        with_heads = [False, True] if inside else [False]
        kinds = [(heads, m, past) for past in pasts for m in ROWS for heads in with_heads]
        times: dict[tuple[bool, int, int], list[tuple[float, float]]] = {kind: [] for kind in kinds}
        rng = np.random.default_rng(0)
        for _ in rounds(seconds, 3, clock=self._clock):
            for past in sorted(pasts, reverse=True):  # longest first: going back is free
                self.behind(past)
                here = [kind for kind in kinds if kind[2] == past]
                for place in rng.permutation(len(here)):
                    heads, m, _ = here[place]
                    block = [self.step(m, heads) for _ in range(_BLOCK)]
                    times[here[place]] += block[1:]
        return [_pass(heads, m, past, found) for (heads, m, past), found in times.items()]

    def resume(self, lengths: Sequence[int], seconds: float) -> list[Resume]:
        """Return what heads inside the graph cost to come back, by the positions that they have to catch up on."""
        session = self.session
        if not session.skips_heads or session.heads is not None:
            return []
        lengths = [length for length in lengths if length + 10 <= session.max_length] or [session.max_length - 10]
        extra: dict[int, list[float]] = {length: [] for length in lengths}
        for _ in rounds(seconds, 3, 30, self._clock):
            for length in lengths:
                session.cache.rollback(0)
                self.behind(8)
                session.step([1] * length, heads=NONE)
                late = self._with_heads()
                session.cache.rollback(8 + length)  # now the heads have seen all of it
                extra[length].append(late - self._with_heads())
        session.cache.rollback(0)
        return [Resume(length, float(np.median(found))) for length, found in extra.items()]

    def _with_heads(self) -> float:
        """Return milliseconds of a pass over one token with further heads, which stays in the cache."""
        started = self._clock()
        self.session.step([1])
        return (self._clock() - started) * 1e3


class DrafterTimer:
    """Times the runs of a drafter's graph. As in `PassTimer` it does not matter what they are about.

    A pass goes before them, as it does in decoding: it leaves little of the drafter's weights in the processor's
    caches, and runs one behind the other would seem to cost far less than they do.
    """

    def __init__(self, timer: PassTimer, clock: Clock = time.perf_counter):
        """Take over the session of a timer, which has such a graph."""
        assert timer.session.heads is not None
        self._timer, self._clock, self._heads = timer, clock, timer.session.heads
        self._cache = timer.session.cache

    def runs(self, pasts: Sequence[int], lengths: Sequence[int], seconds: float) -> DrafterRuns:
        """Return what layers and drafts cost; rounds over all, in random order.

        Args:
            pasts: Positions that the layers have read before.
            lengths: Positions that they have to catch up on; behind the shortest past, and as far as there is room.
            seconds: For all of it.
        """
        shortest, longest = min(pasts), self._timer.session.max_length
        layers = [(positions, past) for past in pasts for positions in POSITIONS]
        layers += [(length, shortest) for length in lengths if shortest + length <= longest and length > POSITIONS[-1]]
        drafter = self._timer.session.bundle.drafter
        assert drafter is not None
        depths = range(1, self._timer.session.bundle.topology.parts + 1) if drafter.conditioned else [0]
        kinds = [*((self._layers, kind) for kind in layers), *((self._draft, (depth,)) for depth in depths)]
        times: list[list[tuple[float, float]]] = [[] for _ in kinds]
        self._timer.behind(max(sum(kind) for kind in layers))
        self._heads.ahead([self._cache.length - 1])  # from now on they have keys and values of all positions
        rng = np.random.default_rng(0)
        for _ in rounds(seconds, 3, clock=self._clock):
            for place in rng.permutation(len(kinds)):
                run, kind = kinds[place]
                block = [run(*kind) for _ in range(_BLOCK)]
                times[place] += block[1:]
        found = [_summary(each) for each in times]
        return DrafterRuns(
            [LayersRun(*kind, *of_kind) for kind, of_kind in zip(layers, found, strict=False)],
            [DraftRun(depth, *of_depth) for depth, of_depth in zip(depths, found[len(layers) :], strict=True)],
        )

    def _layers(self, positions: int, past: int) -> tuple[float, float]:
        """Return milliseconds of the layers over some positions, and of that inside onnxruntime."""
        self._timer.step(1, heads=False)
        self._cache.seen = past
        return self._timed(lambda: self._heads.ahead([past + positions - 1]))

    def _draft(self, depth: int) -> tuple[float, float]:
        """Return the same of what goes from states to words, at a depth, or at all of them."""
        self._timer.step(1, heads=False)
        ahead = self._heads.ahead([self._cache.length - 1])
        for before in range(depth - 1):
            ahead.topk(before, [1])
        return self._timed(lambda: ahead.topk(max(depth - 1, 0), [1]))

    def _timed(self, run: Callable[[], object]) -> tuple[float, float]:
        inside, started = self._heads.seconds, self._clock()
        run()
        return (self._clock() - started) * 1e3, (self._heads.seconds - inside) * 1e3


def _summary(times: Sequence[tuple[float, float]]) -> tuple[Quantiles, float]:
    """Return the whole of some runs, and the median of what was inside onnxruntime."""
    whole, inside = zip(*times, strict=True)
    return quantiles(whole), float(np.median(inside))


def _pass(heads: bool, rows: int, past: int, times: Sequence[tuple[float, float]]) -> Pass:
    return Pass(heads, rows, past, *_summary(times))


def measure_prefill(engine: Engine, lengths: Sequence[int], seconds: float) -> list[Prefill]:
    """Time from a prompt to its first token, from an empty cache."""
    times: dict[int, list[float]] = {length: [] for length in lengths}
    rng = np.random.default_rng(1)
    for turn in rounds(seconds, 3):
        for length in lengths:
            prompt = rng.integers(1, engine.bundle.vocab_size, length).tolist()
            engine.reset()
            result = engine.generate(prompt, strategy="autoregressive", max_new_tokens=1, ignore_eos=True)
            if turn:  # the first round lets the cache grow
                times[length].append(result.statistics.ttft_s * 1e3)
    engine.reset()
    return [
        Prefill(length, quantiles(found), length / float(np.median(found)) * 1e3) for length, found in times.items()
    ]


def measure_operators(engine: Engine, count: int = 20, most: int = 12) -> list[Operator]:
    """Return the slowest operators of a pass over one token, by onnxruntime's own profile, which slows small ones down.

    Of the base's graph, with heads that are inside it: each graph would write a profile, all under one name.
    """
    bundle = engine.bundle
    if bundle.drafter is not None:
        bundle = replace(bundle, drafter=None, topology=Plain())
    with tempfile.TemporaryDirectory(prefix="dynamo-profile-") as folder:
        session = Session(bundle, engine.backend, profile_prefix=str(Path(folder) / "ort"))
        timer = PassTimer(session)
        timer.behind(min(256, session.max_length - 9))
        warm = 3
        for _ in range(warm + count):
            timer.step(1, bundle.topology.has_head_rows)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    nodes = {event["name"] for event in kernels}
    times: Counter[str] = Counter()
    for event in kernels:
        if event["args"]["op_name"] != "If":  # what is in it is listed itself
            times[event["args"]["op_name"]] += event["dur"] / 1e3
    passes = max(Counter(event["name"] for event in kernels).values(), default=1)
    of_kind = Counter({event["name"]: event["args"]["op_name"] for event in kernels}[name] for name in nodes)
    return [Operator(name, spent / passes, of_kind[name]) for name, spent in times.most_common(most)]
