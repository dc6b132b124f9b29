"""Measures a bundle on the machine at hand: everything in a `Profile`, stage by stage."""

from __future__ import annotations

import datetime
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..bundle import Bundle
from ..device.acceptance import bin_of, middle_of
from ..device.inspection import cores, inspect_device
from ..device.profile import Profile
from ..device.records import Acceptance, Conditions, ProfiledBundle
from ..engine import Engine
from ..errors import ProfileError
from ..providers import Backend
from ..session import Session
from .conditions import memory, watched
from .passes import POSITIONS, ROWS, DrafterTimer, PassTimer, measure_operators, measure_prefill
from .roofline import read_bandwidth, roofline
from .trials import QUICK_THRESHOLDS, THRESHOLDS, Trials, encoded, run_backoff, run_strategies, time_outside
from .widths import FARTHEST, STRETCH, measure_widths

Progress = Callable[[str, float], None]
"""Told the stage at work and how much of the whole is done, in [0, 1]."""

_TRIALS = 0.35  # share of the time in which all strategies decode all prompts


@dataclass(frozen=True)
class Effort:
    """How thorough a run is.

    Attributes:
        seconds: For all of it; more where a single pass takes long, as every stage does the least it must.
        pasts: Positions before the passes that are timed.
        prompts: Tokens of the prompts whose first token is timed.
        skipped: Positions that further heads have to catch up on, inside the base's graph or in their own.
        thresholds: ε_b that `dynamo` is tried with.
        texts: How many of the built-in prompts are decoded; None means all.
        read_bytes: For the bandwidth: more than any cache holds.
        quick: Whether the figures are rough.
    """

    seconds: float = 120.0
    pasts: tuple[int, ...] = (32, 256, 1024, 4096)
    prompts: tuple[int, ...] = (16, 64, 256, 1024)
    skipped: tuple[int, ...] = (8, 32, 128, 512)
    thresholds: tuple[float, ...] = THRESHOLDS
    texts: int | None = None
    read_bytes: int = 128 << 20
    quick: bool = False


FULL = Effort()
QUICK = Effort(20.0, (32, 512), (32, 256), (16, 128), QUICK_THRESHOLDS, texts=3, quick=True)


class Bench:
    """What is measured, and with what.

    Attributes:
        engine: On the bundle.
        timer: Of its session.
        texts: Prompts as tokens.
        effort: How thoroughly.
    """

    def __init__(
        self,
        engine: Engine,
        plain: Bundle | None,
        prompts: Sequence[str | Sequence[int]] | None,
        effort: Effort,
    ):
        """See that there is something to measure.

        Raises:
            ProfileError: There is no room for a measurement, or no prompt.
            PromptError: A prompt is empty, or not text.
        """
        session = engine.session
        if session.max_length < 2 * ROWS[-1] + 2:
            raise ProfileError(
                f"{engine.bundle.folder} has a context of {session.max_length}, too short to be measured"
            )
        self.engine, self.effort, self._plain = engine, effort, plain
        self.timer = PassTimer(session)
        self.texts = encoded(engine, prompts)[: effort.texts if prompts is None else None]

    @cached_property
    def base(self) -> Engine:
        """What speeds are compared with; not loaded before it is asked for, as it takes memory."""
        return self.engine if self._plain is None else Engine(self._plain, self.engine.backend)

    def trials(self, profile: Profile) -> Trials:
        """Return prompts to decode, as long as the time allows by what a pass was found to cost."""
        per_token = next(each.time.p50 for each in profile.passes if each.rows == 1) + 0.2
        milliseconds = _TRIALS * self.effort.seconds * 1e3
        new_tokens = int(np.clip(milliseconds / per_token / (30 * len(self.texts)), 16, 64))
        return Trials(self.engine, self.base, self.texts, min(new_tokens, self.engine.session.max_length // 2))


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        name: As those who wait are told.
        begins: Share of the run that is done by then.
        budget: Share of the time that it may take.
        measure: Returns the profile so far with what it finds in so many seconds.
    """

    name: str
    begins: float
    budget: float
    measure: Callable[[Bench, Profile, float], Profile]


def measure(
    bundle: Bundle,
    backend: Backend | None = None,
    *,
    effort: Effort = FULL,
    prompts: Sequence[str | Sequence[int]] | None = None,
    plain: Bundle | None = None,
    progress: Progress = lambda stage, share: None,
) -> Profile:
    """Measure everything.

    Args:
        bundle: What to run.
        backend: How.
        effort: `FULL` takes about two minutes, `QUICK` about 20 seconds; more where a single pass takes long.
        prompts: To decode with every strategy; None for built-in ones.
        plain: The same model without further heads, to compare strategies with; None for this bundle's passes without
            heads.
        progress: Told how far it is.

    Raises:
        ProfileError: There is no room for a measurement, or no prompt.
        DynamoError: The bundle does not run.
    """
    progress("loading", 0.0)
    with watched() as watch:
        started = time.perf_counter()
        engine = Engine(bundle, backend)
        load_s = time.perf_counter() - started
        bench = Bench(engine, plain, prompts, effort)
        profile = _unmeasured(bench, load_s)
        pulses = []  # one and the same pass, behind every stage
        for stage in STAGES:
            progress(stage.name, stage.begins)
            profile = stage.measure(bench, profile, stage.budget * effort.seconds)
            pulses.append(bench.timer.reference())
    progress("done", 1.0)
    return replace(profile, conditions=watch.conditions(max(pulses) / min(pulses)), peak_bytes=memory("VmHWM"))


def _unmeasured(bench: Bench, load_s: float) -> Profile:
    """Return a profile that says what is measured, and nothing yet of what that costs."""
    bundle = bench.engine.bundle
    return Profile(
        device=inspect_device(bench.engine.session.provider),
        bundle=ProfiledBundle(
            name=bundle.folder.resolve().name,
            graph_sha256=bundle.graph_sha256,
            kind=bundle.topology.kind,
            precision=bundle.precision,
            model_type=bundle.model_type,
            n_tokens=bundle.topology.n_tokens,
            graph_bytes=bundle.graph_bytes,
        ),
        conditions=Conditions(True, None, 1.0),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        threads=bench.engine.backend.threads or 0,
        quick=bench.effort.quick,
        bandwidth=0.0,
        load_s=load_s,
        peak_bytes=0,
        steady_bytes=0,
        drafting=0.0,
        passes=[],
    )


def _bandwidth(bench: Bench, profile: Profile, seconds: float) -> Profile:
    found = read_bandwidth(profile.threads or cores(), seconds, bench.effort.read_bytes)
    return replace(profile, bandwidth=found)


def _passes(bench: Bench, profile: Profile, seconds: float) -> Profile:
    session = bench.engine.session
    passes = bench.timer.passes(_fitting(bench.effort.pasts, session, ROWS[-1]), seconds)
    return replace(profile, passes=passes, roofline=roofline(bench.engine.bundle, session, passes, profile.bandwidth))


def _widths(bench: Bench, profile: Profile, seconds: float) -> Profile:
    session, text = bench.engine.session, [token for each in bench.texts for token in each]
    pasts = [past for past in bench.effort.pasts if past <= FARTHEST]
    found = measure_widths(session, text, _fitting(pasts, session, STRETCH), seconds)
    return replace(profile, widths=found)


def _prefill(bench: Bench, profile: Profile, seconds: float) -> Profile:
    lengths = _fitting(bench.effort.prompts, bench.engine.session, 2)
    prefill = measure_prefill(bench.engine, lengths, seconds)
    return replace(profile, prefill=prefill, steady_bytes=memory("VmRSS"))


def _heads(bench: Bench, profile: Profile, seconds: float) -> Profile:
    """Return what the drafter's graph costs, or heads inside the base's when they come back."""
    session = bench.engine.session
    if session.heads is None:
        return replace(profile, resume=bench.timer.resume(bench.effort.skipped, seconds))
    pasts = _fitting(bench.effort.pasts, session, POSITIONS[-1])
    return replace(profile, drafter=DrafterTimer(bench.timer).runs(pasts, bench.effort.skipped, seconds))


def _operators(bench: Bench, profile: Profile, seconds: float) -> Profile:
    """Return a few passes, however long they take."""
    return replace(profile, operators=measure_operators(bench.engine))


def _strategies(bench: Bench, profile: Profile, seconds: float) -> Profile:
    trials = bench.trials(profile)
    outside = time_outside(trials, profile.drafter)
    found = replace(
        profile,
        drafting=outside.drafting,
        overhead=outside.overhead,
        acceptance=[
            Acceptance(depth, middle_of(index), seen, accepted, greedy)
            for greedy, judged in outside.judged.items()
            for (depth, index), (seen, accepted) in sorted(_binned(judged).items())
        ],
    )
    bench.engine.profile = found  # what "auto" plans with
    return replace(found, strategies=run_strategies(trials, seconds))


def _backoff(bench: Bench, profile: Profile, seconds: float) -> Profile:
    return replace(profile, backoff=run_backoff(bench.trials(profile), seconds, bench.effort.thresholds))


STAGES = (
    Stage("memory bandwidth", 0.03, 0.03, _bandwidth),
    Stage("passes", 0.06, 0.28, _passes),
    Stage("widths", 0.34, 0.02, _widths),
    Stage("prompts", 0.36, 0.1, _prefill),
    Stage("further heads", 0.46, 0.05, _heads),
    Stage("operators", 0.5, 0.0, _operators),
    Stage("strategies", 0.52, _TRIALS, _strategies),
    Stage("back-off thresholds", 0.85, 0.15, _backoff),
)
"""All of them, in their order: the later ones build on what the earlier ones have found."""


def _fitting(lengths: Sequence[int], session: Session, more: int) -> list[int]:
    """Return those lengths that leave room in the context; at least one."""
    longest = session.max_length - more
    return [length for length in lengths if length <= longest] or [longest]


def _binned(judged: Sequence[tuple[int, float, bool]]) -> dict[tuple[int, int], tuple[int, int]]:
    """Return drafts seen and accepted, by their depth and the bin of their confidence."""
    found: dict[tuple[int, int], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for depth, confidence, accepted in judged:
        seen, right = found[depth, bin_of(confidence)]
        found[depth, bin_of(confidence)] = seen + 1, right + accepted
    return found
