"""The list of all that a profile has several of, from which tables, spreadsheets and comparisons are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..device.profile import Profile
from ..device.records import Acceptance, DraftRun, Floor, LayersRun, Pass, StrategyRun
from ..tables import MISSING, interval, number, percent, ratio
from .figures import Figure, Grid, Listing, Series

OPERATORS = 10  # the slowest ones are shown

_FIRST_TOKEN = "First token, ms"
_ONE_ROW = "A pass over one row, ms"
_RESUME = "Resuming: what a pass with heads costs more behind positions that had none"
_LAYERS = "The drafter's layers, by the positions they read, ms"
_DRAFTS = "The drafter's drafts, ms"
_ROOFLINE = "Roofline: a pass over one row without heads, and the time to read its bytes"
_OPERATORS = "Slowest operators of a pass over one row"
_STRATEGIES = "Strategies"
_BETWEEN = "Time between tokens, ms"
_BACKOFF = "Back-off threshold of dynamo"


def _heading(table: str, column: str, show: Callable[[Any], str]) -> Figure:
    """Return what names the items of a table."""
    return Figure(show, table=table, column=column, show=show)


def _part(figure: Figure, name: str) -> Callable[[Any], float]:
    """Return one attribute of what a figure gets."""
    return lambda item: getattr(figure.get(item), name)


def _quantiles(figure: Figure) -> list[Figure]:
    """Return a figure that is `Quantiles` as a figure a level; the median is what is compared."""
    levels = [
        replace(
            figure,
            get=_part(figure, level),
            variant=level,
            unit="ms",
            column=level,
            compared=figure.compared if level == "p50" else "",
        )
        for level in ("p50", "p90", "p99")
    ]
    return [*levels, Figure(_part(figure, "count"), figure.section, "count")]


def _interval(figure: Figure) -> list[Figure]:
    """Return a figure that is an `Interval` as the estimate, which is shown and compared, and its ends."""
    value, low, high = (replace(figure, get=_part(figure, part), variant=part) for part in ("value", "low", "high"))
    return [value, *(replace(end, table="", compared="") for end in (low, high))]


def grid(profile: Profile) -> dict[tuple[bool, int, int], Pass]:
    """Return the passes by heads, past and rows."""
    return {(p.heads, p.past, p.rows): p for p in profile.passes}


def _with_heads(each: Pass) -> str:
    return "with" if each.heads else "without"


def _over_single(profile: Profile, each: Pass) -> str:
    single = grid(profile).get((False, each.past, 1))
    return f"{number(each.time.p50)} ({ratio(each.time.p50, single.time.p50 if single else None)})"


def _passes(heads: bool) -> Grid:
    return Grid(
        f"A pass {'with' if heads else 'without'} further heads, p50 in ms (÷ one row without heads)",
        "rows m",
        has=lambda p: p.heads == heads,
        at=lambda p: (p.rows, p.past),
        show_row=str,
        show_column="past {:,}".format,
        cell=_over_single,
    )


def _right(profile: Profile, each: Acceptance) -> str:
    return f"{each.accepted / each.seen:.2f} ({each.seen:,})" if each.seen else MISSING


def _sampling(each: Acceptance) -> str:
    return "greedy" if each.greedy else "sampled"


def _acceptance(greedy: bool) -> Grid:
    return Grid(
        f"Drafts that were right (of so many), by the drafter's confidence, {'greedy' if greedy else 'sampled'}",
        "confidence",
        has=lambda a: a.greedy == greedy,
        at=lambda a: (a.confidence, a.depth),
        show_row="{:.2f}".format,
        show_column="depth {}".format,
        cell=_right,
    )


def _share(floor: Floor) -> str:
    return percent(floor.floor / floor.measured) if floor.measured else MISSING


def _layers(profile: Profile) -> Sequence[LayersRun]:
    return profile.drafter.layers if profile.drafter else []


def _drafts(profile: Profile) -> Sequence[DraftRun]:
    return profile.drafter.drafts if profile.drafter else []


def _which(run: DraftRun) -> str:
    return f"depth {run.depth}" if run.depth else "all"


def _by_drafter(run: StrategyRun) -> str:
    return ", ".join(f"{name} {counts[1]} of {counts[0]}" for name, counts in run.drafters.items()) or MISSING


def _accepted(run: StrategyRun) -> str:
    return " ".join(f"{share:.2f}" for share in run.acceptance) or MISSING


# In the order of tables and spreadsheets.
SERIES = (
    Series(
        lambda p: p.prefill,
        lambda prompt: f"prompt {prompt.tokens}",
        [
            _heading(_FIRST_TOKEN, "prompt tokens", lambda prompt: f"{prompt.tokens:,}"),
            *_quantiles(
                Figure(
                    lambda prompt: prompt.first_token,
                    "first token",
                    table=_FIRST_TOKEN,
                    compared="First token, p50 in ms",
                )
            ),
            Figure(lambda prompt: prompt.tokens_per_s, "first token", "speed", "tokens/s", _FIRST_TOKEN, "tokens/s"),
        ],
        listings=[Listing(_FIRST_TOKEN)],
        label=lambda prompt: f"{prompt.tokens:,} prompt tokens",
        place=lambda prompt: prompt.tokens,
    ),
    Series(
        lambda p: p.passes,
        lambda each: f"past {each.past}, m {each.rows}",
        [
            _heading(_ONE_ROW, "further heads", _with_heads),
            _heading(_ONE_ROW, "past", lambda each: f"{each.past:,}"),
            *_quantiles(
                Figure(
                    lambda each: each.time,
                    lambda each: f"pass {_with_heads(each)} heads",
                    table=_ONE_ROW,
                    compared=lambda each: f"A pass {_with_heads(each)} further heads, p50 in ms",
                )
            ),
            Figure(
                lambda each: each.inside,
                lambda each: f"pass {_with_heads(each)} heads",
                "inside p50",
                "ms",
                _ONE_ROW,
                "in onnxruntime, p50",
            ),
        ],
        grids=[_passes(heads=False), _passes(heads=True)],
        listings=[
            Listing(
                _ONE_ROW,
                lambda passes: sorted((p for p in passes if p.rows == 1), key=lambda p: (p.heads, p.past)),
            )
        ],
        label=lambda each: f"past {each.past:,}, m {each.rows}",
        place=lambda each: (each.heads, each.past, each.rows),
    ),
    Series(
        lambda p: p.resume,
        lambda each: f"skipped {each.skipped}",
        [
            _heading(_RESUME, "positions", lambda each: f"{each.skipped:,}"),
            Figure(lambda each: each.extra, "resume", "", "ms", _RESUME, "ms more"),
        ],
        listings=[Listing(_RESUME)],
    ),
    Series(
        _layers,
        lambda run: f"past {run.past}, positions {run.positions}",
        [
            _heading(_LAYERS, "positions", lambda run: f"{run.positions:,}"),
            _heading(_LAYERS, "past", lambda run: f"{run.past:,}"),
            *_quantiles(
                Figure(
                    lambda run: run.time,
                    "drafter's layers",
                    table=_LAYERS,
                    compared="The drafter's layers, p50 in ms",
                )
            ),
            Figure(lambda run: run.inside, "drafter's layers", "inside p50", "ms", _LAYERS, "in onnxruntime, p50"),
        ],
        listings=[Listing(_LAYERS, lambda runs: sorted(runs, key=lambda run: (run.past, run.positions)))],
        label=lambda run: f"past {run.past:,}, positions {run.positions:,}",
        place=lambda run: (run.past, run.positions),
    ),
    Series(
        _drafts,
        _which,
        [
            _heading(_DRAFTS, "drafts", _which),
            *_quantiles(
                Figure(
                    lambda run: run.time,
                    "drafter's drafts",
                    table=_DRAFTS,
                    compared="The drafter's drafts, p50 in ms",
                )
            ),
            Figure(lambda run: run.inside, "drafter's drafts", "inside p50", "ms", _DRAFTS, "in onnxruntime, p50"),
        ],
        listings=[Listing(_DRAFTS)],
        place=lambda run: run.depth,
    ),
    Series(
        lambda p: p.roofline,
        lambda floor: f"past {floor.past}",
        [
            _heading(_ROOFLINE, "past", lambda floor: f"{floor.past:,}"),
            Figure(
                lambda floor: floor.bytes,
                "roofline",
                "read",
                "bytes",
                _ROOFLINE,
                "MB read",
                lambda floor: number(floor.bytes / 1e6),
            ),
            Figure(lambda floor: floor.floor, "roofline", "floor", "ms", _ROOFLINE, "floor, ms"),
            Figure(lambda floor: floor.measured, "roofline", "measured", "ms", _ROOFLINE, "measured, ms"),
            _heading(_ROOFLINE, "floor ÷ measured", _share),
        ],
        listings=[Listing(_ROOFLINE)],
    ),
    Series(
        lambda p: p.operators,
        lambda operator: operator.name,
        [
            _heading(_OPERATORS, "operator", lambda operator: operator.name),
            Figure(lambda operator: operator.time, "operator", "time", "ms", _OPERATORS, "ms"),
            Figure(
                lambda operator: operator.nodes,
                "operator",
                "nodes",
                "",
                _OPERATORS,
                "nodes",
                lambda operator: f"{operator.nodes:,}",
            ),
        ],
        listings=[Listing(_OPERATORS, lambda operators: sorted(operators, key=lambda o: -o.time)[:OPERATORS])],
    ),
    Series(
        lambda p: p.strategies,
        lambda run: run.name,
        [
            _heading(_STRATEGIES, "strategy", lambda run: run.name),
            *_interval(
                Figure(
                    lambda run: run.tokens_per_pass,
                    "tokens a pass",
                    unit="tokens",
                    table=_STRATEGIES,
                    column="tokens/pass",
                    show=lambda run: f"{run.tokens_per_pass.value:.2f}",
                    compared="Strategies, tokens/pass",
                )
            ),
            *_interval(
                Figure(
                    lambda run: run.tokens_per_s,
                    "speed",
                    unit="tokens/s",
                    table=_STRATEGIES,
                    column="tokens/s",
                    compared="Strategies, tokens/s",
                )
            ),
            *_interval(
                Figure(
                    lambda run: run.ratio,
                    "speed over plain",
                    unit="ratio",
                    table=_STRATEGIES,
                    column="tokens/s ÷ plain",
                    show=lambda run: interval(run.ratio),
                    compared="Strategies, tokens/s ÷ plain",
                )
            ),
            Figure(
                lambda run: {f"depth {depth}": share for depth, share in enumerate(run.acceptance, 1)},
                "accepted",
                unit="share",
                table=_STRATEGIES,
                column="accepted, by depth",
                show=_accepted,
            ),
            Figure(
                lambda run: {name: counts[1] / counts[0] for name, counts in run.drafters.items()},
                "accepted, by drafter",
                unit="share",
                table=_STRATEGIES,
                column="accepted, by drafter",
                show=_by_drafter,
            ),
            _heading(_BETWEEN, "strategy", lambda run: run.name),
            *_quantiles(Figure(lambda run: run.between_tokens, "between tokens", table=_BETWEEN)),
        ],
        listings=[Listing(_STRATEGIES, cell_width=20), Listing(_BETWEEN)],
    ),
    Series(
        lambda p: p.acceptance,
        lambda each: f"{_sampling(each)}, depth {each.depth}, confidence {each.confidence:g}",
        [
            Figure(lambda each: each.seen, "acceptance", "seen", "drafts"),
            Figure(lambda each: each.accepted, "acceptance", "accepted", "drafts"),
        ],
        grids=[_acceptance(greedy=False), _acceptance(greedy=True)],
    ),
    Series(
        lambda p: p.backoff,
        lambda each: f"ε_b {each.threshold:g}",
        [
            _heading(_BACKOFF, "ε_b", lambda each: f"{each.threshold:g}"),
            Figure(
                lambda each: each.tokens_per_pass,
                "back-off",
                "tokens a pass",
                "tokens",
                _BACKOFF,
                "tokens/pass",
                lambda each: f"{each.tokens_per_pass:.2f}",
            ),
            *_interval(
                Figure(
                    lambda each: each.speedup,
                    "back-off",
                    unit="ratio",
                    table=_BACKOFF,
                    column="tokens/s ÷ plain",
                    show=lambda each: interval(each.speedup),
                )
            ),
        ],
        listings=[Listing(_BACKOFF)],
    ),
)
