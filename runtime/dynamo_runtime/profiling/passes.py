"""Times passes: by their rows, behind a past, with and without further heads, and by operator."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..device.profile import Operator, Pass, Prefill, Quantiles, Resume
from ..engine import Engine
from ..session import Session
from ..step import ALL, NONE

ROWS = range(1, 9)
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
    """Median and tail of some times."""
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
        """Median milliseconds of a pass over one token: the same whenever it is taken, unless something drifts."""
        self.behind(8)
        return float(np.median([self.step(1, False)[0] for _ in range(count)]))

    def passes(self, pasts: Sequence[int], seconds: float) -> list[Pass]:
        """What a pass costs by tokens, past and whether further heads take part; rounds over all, in random order."""
        with_heads = [False, True] if self.session.bundle.topology.has_head_rows else [False]
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
        """What further heads cost to come back, by the positions that they have to catch up on."""
        session = self.session
        if not session.skips_heads:
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
        """Milliseconds of a pass over one token with further heads, which stays in the cache."""
        started = self._clock()
        self.session.step([1])
        return (self._clock() - started) * 1e3


def _pass(heads: bool, rows: int, past: int, times: Sequence[tuple[float, float]]) -> Pass:
    whole, inside = zip(*times, strict=True)
    return Pass(heads, rows, past, quantiles(whole), float(np.median(inside)))


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
    """The slowest operators of a pass over one token, by onnxruntime's own profile, which slows small ones down."""
    with tempfile.TemporaryDirectory(prefix="dynamo-profile-") as folder:
        session = Session(engine.bundle, engine.backend, profile_prefix=str(Path(folder) / "ort"))
        timer = PassTimer(session)
        timer.behind(min(256, session.max_length - 9))
        warm = 3
        for _ in range(warm + count):
            timer.step(1, engine.bundle.topology.has_head_rows)
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
