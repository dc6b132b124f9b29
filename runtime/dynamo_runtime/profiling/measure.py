"""Measures a bundle on the machine at hand: everything in a `Profile`, in rounds that take turns, against drift."""

from __future__ import annotations

import datetime
import json
import math
import os
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..device.inspection import cores, inspect_device, optional
from ..device.plan import bin_of, middle_of
from ..device.profile import (
    Acceptance,
    Conditions,
    Floor,
    Operator,
    Pass,
    Prefill,
    Profile,
    Quantiles,
    Resume,
    Subject,
)
from ..engine import Engine
from ..errors import ProfileError
from ..session import Session
from . import trials

ROWS = range(1, 9)
_PASTS, _QUICK_PASTS = (32, 256, 1024, 4096), (32, 512)
_PROMPTS, _QUICK_PROMPTS = (16, 64, 256, 1024), (32, 256)
_SKIPPED, _QUICK_SKIPPED = (8, 32, 128, 512), (16, 128)
_BLOCK = 4  # passes of a kind in a row; the first of them warms up what the kind before has cooled down
_BUSY, _DRIFT = 0.1, 0.1  # more of either, and the machine was not idle
_READ_BYTES = 128 << 20  # for the bandwidth: more than any cache holds

Progress = Callable[[str, float], None]
"""Told the stage at work and how much of the whole is done, in [0, 1]."""


class Budget:
    """Seconds for every stage; one that is over its share still does the least it must."""

    def __init__(self, total: float):
        """Split `total` seconds."""
        self.passes, self.prefill, self.resume = 0.3 * total, 0.1 * total, 0.05 * total
        self.trials, self.backoff, self.bandwidth = 0.35 * total, 0.15 * total, 0.03 * total


def rounds(seconds: float, least: int, most: int = 1000) -> Iterator[int]:
    """Count rounds, `least` or more, until the time is up."""
    started = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - started > seconds:
            return
        yield turn


def quantiles(milliseconds: Sequence[float]) -> Quantiles:
    """Median and tail of some times."""
    p50, p90, p99 = (float(p) for p in np.percentile(milliseconds, [50, 90, 99]))
    return Quantiles(p50, p90, p99, len(milliseconds))


def measure(
    bundle: Bundle,
    *,
    quick: bool = False,
    prompts: Sequence[str | Sequence[int]] | None = None,
    plain: Bundle | None = None,
    progress: Progress = lambda stage, share: None,
    **backend: Any,
) -> Profile:
    """Measure everything.

    Args:
        bundle: What to run.
        quick: In about 20 seconds, else in about two minutes; more where a single pass takes long.
        prompts: To decode with every strategy; None for built-in ones.
        plain: The same model without further heads, to compare strategies with; None for this bundle's passes without
            heads.
        progress: Told how far it is.
        **backend: Fields of `Backend`.

    Raises:
        ProfileError: There is no room for a measurement, or no prompt.
        DynamoError: The bundle does not run.
    """
    budget = Budget(20.0 if quick else 120.0)
    progress("loading", 0.0)
    with watched() as watch:
        started = time.perf_counter()
        engine = Engine(bundle, **backend)
        load_s = time.perf_counter() - started
        session = engine.session
        if session.max_length < 2 * ROWS[-1] + 2:
            raise ProfileError(f"{bundle.folder} has a context of {session.max_length}, too short to be measured")
        texts = trials.encoded(engine, prompts)[: 3 if quick and prompts is None else None]
        progress("memory bandwidth", 0.03)
        bandwidth = read_bandwidth(backend.get("threads") or cores(), budget.bandwidth)
        pulses = [reference_pass(session)]
        progress("passes", 0.06)
        passes = measure_passes(session, _fitting(_QUICK_PASTS if quick else _PASTS, session, ROWS[-1]), budget.passes)
        pulses.append(reference_pass(session))
        progress("prompts", 0.36)
        prefill = measure_prefill(engine, _fitting(_QUICK_PROMPTS if quick else _PROMPTS, session, 2), budget.prefill)
        steady = memory("VmRSS")
        progress("resuming", 0.46)
        resume = measure_resume(session, _QUICK_SKIPPED if quick else _SKIPPED, budget.resume)
        pulses.append(reference_pass(session))
        progress("operators", 0.5)
        operators = measure_operators(bundle, backend)
        progress("strategies", 0.52)
        per_token = next(each.time.p50 for each in passes if each.rows == 1) + 0.2
        new_tokens = int(np.clip(budget.trials * 1e3 / per_token / (30 * len(texts)), 16, 64))
        new_tokens = min(new_tokens, session.max_length // 2)
        outside = trials.look_outside(engine, texts, new_tokens)
        files = [entry for name, entry in bundle.files.items() if name.startswith(bundle.graph)]
        engine.profile = profile = Profile(
            device=inspect_device(session.provider),
            bundle=Subject(
                name=bundle.folder.resolve().name,
                graph_sha256=str(bundle.files.get(bundle.graph, {}).get("sha256", "")),
                kind=bundle.kind,
                precision=bundle.precision,
                model_type=bundle.model_type,
                n_tokens=bundle.n_tokens,
                graph_bytes=sum(entry["bytes"] for entry in files),
            ),
            conditions=Conditions(True, None, 1.0),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            threads=backend.get("threads") or 0,
            quick=quick,
            bandwidth=bandwidth,
            load_s=load_s,
            peak_bytes=0,
            steady_bytes=steady,
            drafting=outside.drafting,
            overhead=outside.overhead,
            passes=passes,
            prefill=prefill,
            resume=resume,
            roofline=roofline(bundle, session, passes, bandwidth),
            operators=operators,
            acceptance=[
                Acceptance(depth, middle_of(index), seen, accepted, greedy)
                for greedy, judged in outside.judged.items()
                for (depth, index), (seen, accepted) in sorted(_binned(judged).items())
            ],
        )
        base = engine if plain is None else Engine(plain, **backend)
        runs = trials.run_strategies(engine, base, texts, budget.trials, new_tokens)
        pulses.append(reference_pass(session))
        progress("back-off thresholds", 0.85)
        thresholds = trials.QUICK_THRESHOLDS if quick else trials.THRESHOLDS
        backoff = trials.run_backoff(engine, base, texts, budget.backoff, new_tokens, thresholds)
        pulses.append(reference_pass(session))
    progress("done", 1.0)
    return replace(
        profile,
        strategies=runs,
        backoff=backoff,
        conditions=watch.conditions(max(pulses) / min(pulses)),
        peak_bytes=memory("VmHWM"),
    )


def _fitting(lengths: Sequence[int], session: Session, more: int) -> list[int]:
    """Those lengths that leave room in the context; at least one."""
    longest = session.max_length - more
    return [length for length in lengths if length <= longest] or [longest]


def _binned(judged: Sequence[tuple[int, float, bool]]) -> dict[tuple[int, int], tuple[int, int]]:
    found: dict[tuple[int, int], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for depth, confidence, accepted in judged:
        seen, right = found[depth, bin_of(confidence)]
        found[depth, bin_of(confidence)] = seen + 1, right + accepted
    return found


def behind(session: Session, past: int) -> None:
    """Have the cache hold `past` positions; what they hold does not change what a pass costs."""
    if session.cache.length < past:
        session.cache.rollback(0)
        while session.cache.length < past:
            session.step([1] * min(256, past - session.cache.length), head_rows=None)
    session.cache.rollback(past)


def timed_step(session: Session, rows: int, heads: bool) -> tuple[float, float]:
    """Run a pass over `rows` tokens, then roll it back; milliseconds of it all, and of that inside onnxruntime."""
    past, inside = session.cache.length, session.ort_seconds
    wanted = range(rows) if heads else ()
    started = time.perf_counter()
    step = session.step([1] * rows, rows=rows, head_rows=wanted)
    step.topk()
    elapsed = time.perf_counter() - started
    session.cache.rollback(past)
    return elapsed * 1e3, (session.ort_seconds - inside) * 1e3


def reference_pass(session: Session, count: int = 30) -> float:
    """Median milliseconds of a pass over one token: the same whenever it is taken, unless something drifts."""
    behind(session, 8)
    return float(np.median([timed_step(session, 1, False)[0] for _ in range(count)]))


def measure_passes(session: Session, pasts: Sequence[int], seconds: float) -> list[Pass]:
    """What a pass costs by tokens, past and whether further heads take part; rounds over all kinds, in random order."""
    kinds = [(heads, m, past) for past in pasts for m in ROWS for heads in _heads(session)]
    times: dict[tuple[bool, int, int], list[tuple[float, float]]] = {kind: [] for kind in kinds}
    rng = np.random.default_rng(0)
    for _ in rounds(seconds, 3):
        for past in sorted(pasts, reverse=True):  # longest first: going back is free
            behind(session, past)
            here = [kind for kind in kinds if kind[2] == past]
            for place in rng.permutation(len(here)):
                heads, m, _ = here[place]
                block = [timed_step(session, m, heads) for _ in range(_BLOCK)]
                times[here[place]] += block[1:]
    return [
        Pass(
            heads, m, past, quantiles([whole for whole, _ in found]), float(np.median([inside for _, inside in found]))
        )
        for (heads, m, past), found in times.items()
    ]


def _heads(session: Session) -> list[bool]:
    return [False, True] if session.bundle.has_head_rows else [False]


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


def measure_resume(session: Session, lengths: Sequence[int], seconds: float) -> list[Resume]:
    """What further heads cost to come back, by the positions that they have to catch up on."""
    if not session.skips_heads:
        return []
    lengths = [length for length in lengths if length + 10 <= session.max_length] or [session.max_length - 10]
    extra: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in rounds(seconds, 3, 30):
        for length in lengths:
            session.cache.rollback(0)
            behind(session, 8)
            session.step([1] * length, head_rows=())
            late = _step_with_heads(session)
            session.cache.rollback(8 + length)  # now the heads have seen all of it
            extra[length].append(late - _step_with_heads(session))
    session.cache.rollback(0)
    return [Resume(length, float(np.median(found))) for length, found in extra.items()]


def _step_with_heads(session: Session) -> float:
    started = time.perf_counter()
    session.step([1])
    return (time.perf_counter() - started) * 1e3


def measure_operators(bundle: Bundle, backend: dict[str, Any], count: int = 20, most: int = 12) -> list[Operator]:
    """The slowest operators of a pass over one token, by onnxruntime's own profile, which slows small ones down."""
    with tempfile.TemporaryDirectory(prefix="dynamo-profile-") as folder:
        session = Session(bundle, **backend, profile_prefix=str(Path(folder) / "ort"))
        behind(session, min(256, session.max_length - 9))
        warm = 3
        for _ in range(warm + count):
            timed_step(session, 1, bundle.has_head_rows)
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


def read_bandwidth(threads: int, seconds: float) -> float:
    """Bytes a second that so many threads read from memory at once: the best of several tries."""
    size = _READ_BYTES // 4
    parts = [np.ones(size // threads, np.float32) for _ in range(threads)]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in rounds(seconds, 3):
            started = time.perf_counter()
            list(pool.map(np.max, parts))  # one pass over the memory, in the kernel that numpy vectorises best
            best = min(best, time.perf_counter() - started)
    return sum(part.nbytes for part in parts) / best


def roofline(bundle: Bundle, session: Session, passes: Sequence[Pass], bandwidth: float) -> list[Floor]:
    """How close plain passes come to the time that reading weights and cache must take."""
    weights = bundle.manifest.get("pass_bytes", {}).get("plain", 0)
    if not weights:
        return []
    layers = bundle.kv_layers - len(bundle.head_layers)
    position = 2 * layers * bundle.kv_heads * bundle.head_size * session.cache.dtype.itemsize
    floors = []
    for each in passes:
        if each.rows == 1 and not each.heads:
            size = int(weights + position * each.past)
            floors.append(Floor(each.past, size, size / bandwidth * 1e3, each.inside))
    return floors


def memory(field: str) -> int:
    """Bytes of this process's memory: "VmHWM" its peak, "VmRSS" now; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        psutil = optional("psutil")
        if psutil is None:
            return 0
        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss) if field == "VmHWM" else info.rss)


class _Watch:
    """What else the machine did."""

    def __init__(self) -> None:
        self._psutil = optional("psutil")
        self._frequencies: list[float] = []
        self._temperatures: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        self._started, self._all, self._own = time.perf_counter(), self._busy(), time.process_time()
        if self._psutil:
            self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        elapsed = (time.perf_counter() - self._started) * cores()
        others = None if self._all is None else self._busy() - self._all - (time.process_time() - self._own)
        self._others = None if others is None else max(others, 0.0) / elapsed

    def conditions(self, drift: float) -> Conditions:
        idle = (self._others is None or self._others < _BUSY) and drift < 1 + _DRIFT
        ends = [min(self._frequencies), max(self._frequencies)] if self._frequencies else []
        return Conditions(idle, self._others, drift, ends, max(self._temperatures, default=None))

    def _busy(self) -> Any:
        """Seconds that our cores have been busy since they were started, or None."""
        if self._psutil is None:
            return None
        ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        times = self._psutil.cpu_times(percpu=True)
        chosen = [each for i, each in enumerate(times) if i in ours or len(times) < len(ours)]
        return sum(sum(each) - each.idle - getattr(each, "iowait", 0.0) for each in chosen)

    def _sample(self) -> None:
        while not self._done.wait(0.5):
            if frequency := self._psutil.cpu_freq():
                self._frequencies.append(frequency.current)
            sensors: dict[str, Any] = getattr(self._psutil, "sensors_temperatures", dict)()
            self._temperatures += [sensor.current for group in sensors.values() for sensor in group if sensor.current]


@contextmanager
def watched() -> Iterator[_Watch]:
    """Watch clock, temperature and other processes meanwhile."""
    watch = _Watch()
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
