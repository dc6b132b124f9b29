"""The numbers that planning was tuned with, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, field


def _row_shares() -> dict[str, float]:
    return {"fp32": 0.14, "fp16": 0.14, "int8": 0.25, "int8-dynamic": 0.25, "int4": 0.35}


@dataclass(frozen=True)
class Tuning:
    """What is decided by a number and not by a measurement of the device at hand.

    Every one was chosen by hand; tests/runtime/test_plan.py holds `auto` with all of them to 97 % of the best fixed
    setting on made-up devices. Where a measurement stands beside a number, it is one to compare it with, not the
    source it was taken from.

    Attributes:
        exploration: Share of the time that may be spent on finding out whether drafting pays again. By hand.
        bins: Bins of a draft's confidence. By hand; profiles are kept with as many, so changing it invalidates them.
        prior_weight: Drafts that must have been judged to count as much as what was known before. By hand.
        fade: What stays of the judged drafts of every kind, each time they fade. By hand.
        fade_every: Rounds with drafts between two fadings. By hand.
        fade_at_probe: What stays of them at a probe after a stretch without drafts. By hand.
        memory: What a judged draft counts for once the next one of its kind is judged. By hand.
        recent: What a pass counts for once the next one is there, in the average of what drafting gains. By hand.
        steady: The same in the rate that every choice is made by. By hand.
        first_passes: What was known before counts as so many passes. By hand.
        longest_wait: Plain tokens before the next probe, unless that costs more than `costliest_probe`. By hand.
        costliest_probe: Share of the time since the last probe that a probe may cost at most. Heads have to catch up on
            all that they have not seen, so a longer wait does not make up for it: there is no probe if it costs more.
            By hand.
        trial: Plain passes' time that drafting may lose before it is given up, where it is not expected to pay. By
            hand.
        doubt: The same where it still is expected to pay. By hand.
        savings: The same, of what it gained before. By hand.
        nearly_greedy: A temperature below which sampling is more like choosing the most probable token. By hand.
        past_step: Positions for which one set of costs serves. By hand.
        bytes_per_ms: Weights that a device nobody has measured reads in a millisecond. By hand (two cores of a server
            read 15 to 39 MB of a graph in a millisecond: benchmarks/results/devices).
        overhead_ms: Python's time for a plain token there. By hand (0.15 ms with the embedded model in int8: ibid.).
        drafting_ms: The same for a draft. By hand (0.12 to 0.16 ms: ibid.).
        run_ms: The same for a run of the drafter's graph. By hand (0.02 to 0.05 ms with the embedded model).
        row_share: What one more row costs there, of a pass over one row, by precision. By hand (int8, the embedded
            model: 0.24 to 0.26; larger ones 0.10 to 0.19, in fp32 0.04 to 0.05: ibid.).
        other_row_share: The same for any other precision. By hand.
        accepted: Share of drafts expected to be right before any was judged. By hand.
        untried: What a kind of drafts never tried is hoped to be, between its own kind of confidence and its depth. By
            hand; without hope it never would be tried.
        probe_weight: Weight of a pass after a stretch without drafts, as the one before may be long ago. By hand.
        repeat_share: What a draft from the text takes of Python's time for a plain token, as it is only judged. By
            hand (0.16 with the embedded model in int8).
        vain: Share of the time that may go into rows of repeated tokens and not be won back. The aim of the plan.
        vain_passes: Plain passes whose time counts as spent when a text begins: what may be tried at once. By hand.
        vain_savings: Plain passes' time that such rows may lose again of what they gained. By hand.
    """

    exploration: float = 0.01
    bins: int = 5
    prior_weight: float = 3.0
    fade: float = 0.9
    fade_every: int = 16
    fade_at_probe: float = 0.9
    memory: float = 0.97
    recent: float = 0.95
    steady: float = 0.99
    first_passes: int = 4
    longest_wait: int = 512
    costliest_probe: float = 0.02
    trial: float = 0.9
    doubt: float = 2.0
    savings: float = 5.0
    nearly_greedy: float = 0.35
    past_step: int = 64
    bytes_per_ms: float = 15e6
    overhead_ms: float = 0.13
    drafting_ms: float = 0.14
    run_ms: float = 0.04
    row_share: Mapping[str, float] = field(default_factory=_row_shares)
    other_row_share: float = 0.25
    accepted: float = 0.5
    untried: float = 0.5
    probe_weight: float = 0.5
    repeat_share: float = 0.2
    vain: float = 0.01
    vain_passes: float = 64.0
    vain_savings: float = 2.0


DEFAULT = Tuning()
