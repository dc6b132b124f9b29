"""Made-up profiles: one with everything in it, one of a drafter with a graph of its own, one with little."""

from dataclasses import replace
from typing import Any

from dynamo_runtime.device.profile import Profile
from dynamo_runtime.device.records import (
    Acceptance,
    Backoff,
    Conditions,
    Device,
    DrafterRuns,
    DraftRun,
    Floor,
    LayersRun,
    Operator,
    Pass,
    Prefill,
    ProfiledBundle,
    Quantiles,
    Resume,
    StrategyRun,
    Widths,
)
from dynamo_runtime.interval import Interval

ROWS, PASTS = range(1, 9), (64, 512, 1984)
POSITIONS, CATCH_UP = (1, 2, 4, 8), (32, 128)
STRATEGIES = {
    "plain": (1.0, 1.0, []),
    "speculative, 2 drafts": (1.94, 1.31, [0.621, 0.358]),
    "speculative, 4 drafts, confidence 0.3": (1.68, 1.22, [0.75, 0.67, 0.59, 0.63]),
    "dynamo, ε_b 0.5": (2.73, 1.58, [0.81, 0.72]),
}


def quantiles(p50: float, count: int = 50) -> Quantiles:
    """Times whose tail is that of a quiet machine."""
    return Quantiles(p50, p50 * 1.07, p50 * 1.31, count)


def interval(value: float, spread: float = 0.03) -> Interval:
    return Interval(value, value * (1 - spread), value * (1 + spread))


def cost(rows: int, past: int, heads: bool) -> float:
    """Milliseconds of a pass on the made-up machine."""
    return (0.9 + 0.11 * (rows - 1) + past * 2e-4) * (1.27 if heads else 1.0)


def layers(positions: int, past: int) -> float:
    """Milliseconds of the made-up drafter's layers."""
    return 0.3 + 0.04 * (positions - 1) + past * 1e-4


def runs(conditioned: bool = True, depth: int = 4) -> DrafterRuns:
    """Costs of a made-up drafter's graph."""
    read = [(positions, past) for past in PASTS for positions in POSITIONS]
    read += [(positions, PASTS[0]) for positions in CATCH_UP]
    depths = range(1, depth + 1) if conditioned else [0]
    return DrafterRuns(
        [LayersRun(*each, quantiles(layers(*each)), layers(*each) * 0.9) for each in read],
        [DraftRun(each, quantiles(0.07), 0.05) for each in depths],
    )


def apart(**changes: Any) -> Profile:
    """The profile of a bundle whose drafter has a graph of its own: no pass has heads."""
    made = full()
    made = replace(made, passes=[each for each in made.passes if not each.heads], resume=[], drafter=runs())
    return replace(made, **changes)


def full(scale: float = 1.0, **changes: Any) -> Profile:
    """A profile with all sections but the drafter's graph's, of a bundle whose heads are inside the base's.

    Args:
        scale: How much slower the machine is.
        changes: Fields to set.
    """
    made = Profile(
        device=Device(
            processor="AMD EPYC 9B14",
            cores=2,
            provider="cpu",
            onnxruntime="1.32.0",
            instruction_sets=["AVX2", "AVX-512", "VNNI"],
            caches={"L1d": 32 << 10, "L2": 1 << 20, "L3": 32 << 20},
            memory_bytes=8 << 30,
            system="Linux 6.1",
            python="3.11.7",
            providers=["cpu"],
        ),
        bundle=ProfiledBundle("python-t3-int8", "3f" * 32, "parallel", "int8", "gpt_neox", 3, 9_700_000),
        conditions=Conditions(idle=True, busy=0.012, drift=1.004, frequency_mhz=[2450.0, 3100.0], temperature_c=61.0),
        created="2026-01-30T12:34:56+00:00",
        threads=2,
        quick=False,
        bandwidth=18.25e9,
        load_s=0.417 * scale,
        peak_bytes=62_500_000,
        steady_bytes=48_250_000,
        drafting=0.0331,
        overhead=0.0724,
        passes=[
            Pass(heads, rows, past, quantiles(cost(rows, past, heads) * scale), cost(rows, past, heads) * 0.94 * scale)
            for heads in (False, True)
            for past in PASTS
            for rows in ROWS
        ],
        prefill=[
            Prefill(tokens, quantiles((0.5 + tokens * 0.021) * scale, 12), tokens / (0.5 + tokens * 0.021) * 1e3)
            for tokens in (16, 64, 256, 1024)
        ],
        resume=[Resume(1, 0.021), Resume(8, 0.104), Resume(64, 0.733)],
        roofline=[
            Floor(past, 9_600_000 + past * 1536, (9_600_000 + past * 1536) / 18.25e6, cost(1, past, False) * 0.94)
            for past in PASTS
        ],
        operators=[
            Operator("MatMulNBits", 0.612, 31),
            Operator("GroupQueryAttention", 0.118, 7),
            *(Operator(f"Operator{i}", 0.03 - i * 1e-3, i + 1) for i in range(10)),
        ],
        strategies=[
            StrategyRun(
                name,
                tokens_per_pass=interval(tokens),
                tokens_per_s=interval(760 * ratio / scale),
                ratio=interval(ratio, 0.02 * (name != "plain")),
                acceptance=acceptance,
                between_tokens=quantiles(1.3 / ratio, 6400),
            )
            for name, (tokens, ratio, acceptance) in STRATEGIES.items()
        ],
        acceptance=[
            Acceptance(depth, confidence, 400 // depth, round(400 // depth * confidence * 0.97))
            for depth in (1, 2)
            for confidence in (0.05, 0.35, 0.65, 0.95)
        ],
        backoff=[
            Backoff(threshold, 3 - 2 * threshold, interval(1.7 - 0.75 * threshold**2, 0.025))
            for threshold in (0.1, 0.3, 0.5, 0.7, 0.9)
        ],
        widths=Widths(8, [64, 512], 224, 0, 0.0, 31.5),
    )
    return replace(made, **changes)


def sparse(**changes: Any) -> Profile:
    """A profile of a plain bundle on another machine, with nothing measured but a few passes."""
    made = Profile(
        device=Device("Cortex-A76", 4, "cpu", "1.31.0"),
        bundle=ProfiledBundle("tiny", "", "plain", "fp32", "llama", 1, 33_800_000),
        conditions=Conditions(idle=False, busy=None, drift=1.124),
        created="2026-01-31T00:00:00+00:00",
        threads=0,
        quick=True,
        bandwidth=7.5e9,
        load_s=1.2,
        peak_bytes=120_000_000,
        steady_bytes=90_000_000,
        drafting=0.0,
        passes=[Pass(False, rows, 64, quantiles(4.0 + rows), 3.9 + rows) for rows in (1, 2, 4)],
    )
    return replace(made, **changes)
