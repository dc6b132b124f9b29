"""What a profile says, as text, Markdown and rows for a spreadsheet, and several profiles side by side."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from ..device.profile import Conditions, Pass, Profile, Quantiles, StrategyRun
from ..interval import Interval
from ..tables import MISSING, NAME_WIDTH, WIDTH, Table, binary_size, interval, number, percent, printable, ratio

Row = tuple[str, str, str, str, Any]
HEADER = ("section", "name", "variant", "unit", "value")
OPERATORS = 10  # the slowest ones are shown
_CONSTANTS = "Load, memory, bandwidth, and what Python adds"


def summary(profile: Profile) -> str:
    """A profile as tables for a terminal; warnings come first, what was not measured is left out."""
    wrapped = [textwrap.fill(text, WIDTH) for text in caveats(profile)]
    return "\n\n".join([*wrapped, *(table.text() for table in tables(profile))])


def markdown(profile: Profile) -> str:
    """The tables of `summary` as Markdown, without headings, so that they fit below any."""
    return "\n\n".join([*(f"**{text}**" for text in caveats(profile)), *(t.markdown() for t in tables(profile))])


def caveats(profile: Profile) -> list[str]:
    """Why the figures may not be what the device can do; empty if nothing is wrong."""
    found = []
    if not profile.conditions.idle:
        found.append(f"NOT IDLE: do not rely on these figures. {_disturbance(profile.conditions)}")
    if profile.quick:
        found.append("QUICK RUN: fewer repetitions, so the figures are rough.")
    return found


def _disturbance(conditions: Conditions) -> str:
    busy = "It is not known what other processes used (the extra [profile] tells)"
    if conditions.busy is not None:
        busy = f"Other processes used {percent(conditions.busy)} of the CPU"
    return f"{busy}; between stages of the run one and the same pass cost up to {conditions.drift:.2f} times its least."


def tables(profile: Profile) -> list[Table]:
    """Every table that has something in it."""
    made = [
        _facts("Device", _device(profile)),
        _facts("Conditions", _conditions(profile)),
        _facts("Bundle", _bundle(profile)),
        _facts(_CONSTANTS, {name: number(value) for name, value in _constants(profile).items()}),
        Table(
            "First token, ms",
            ["prompt tokens", "p50", "p90", "p99", "tokens/s"],
            [[f"{p.tokens:,}", *_times(p.first_token), number(p.tokens_per_s)] for p in profile.prefill],
        ),
        _passes(profile, heads=False),
        _passes(profile, heads=True),
        Table(
            "A pass over one row, ms",
            ["further heads", "past", "p50", "p90", "p99", "in onnxruntime, p50"],
            [
                ["with" if p.heads else "without", f"{p.past:,}", *_times(p.time), number(p.inside)]
                for p in sorted(profile.passes, key=lambda p: (p.heads, p.past))
                if p.rows == 1
            ],
        ),
        Table(
            "Resuming: what a pass with heads costs more behind positions that had none",
            ["positions", "ms more"],
            [[f"{r.skipped:,}", number(r.extra)] for r in profile.resume],
        ),
        Table(
            "Roofline: a pass over one row without heads, and the time to read its bytes",
            ["past", "MB read", "floor, ms", "measured, ms", "floor ÷ measured"],
            [
                [f"{f.past:,}", number(f.bytes / 1e6), number(f.floor), number(f.measured), _share(f.floor, f.measured)]
                for f in profile.roofline
            ],
        ),
        Table(
            "Slowest operators of a pass over one row",
            ["operator", "ms", "nodes"],
            [
                [o.name, number(o.time), f"{o.nodes:,}"]
                for o in sorted(profile.operators, key=lambda o: -o.time)[:OPERATORS]
            ],
        ),
        Table(
            "Strategies",
            ["strategy", "tokens/pass", "tokens/s", "tokens/s ÷ plain", "accepted, by depth"],
            [
                [
                    s.name,
                    f"{s.tokens_per_pass.value:.2f}",
                    number(s.tokens_per_s.value),
                    interval(s.ratio),
                    " ".join(f"{share:.2f}" for share in s.acceptance) or MISSING,
                ]
                for s in profile.strategies
            ],
            cell_width=20,
        ),
        Table(
            "Time between tokens, ms",
            ["strategy", "p50", "p90", "p99"],
            [[s.name, *_times(s.between_tokens)] for s in profile.strategies],
        ),
        _acceptance(profile, greedy=False),
        _acceptance(profile, greedy=True),
        Table(
            "Back-off threshold of dynamo",
            ["ε_b", "tokens/pass", "tokens/s ÷ plain"],
            [[f"{b.threshold:g}", f"{b.tokens_per_pass:.2f}", interval(b.speedup)] for b in profile.backoff],
        ),
    ]
    return [table for table in made if table.rows]


def _times(quantiles: Quantiles) -> list[str]:
    return [number(quantiles.p50), number(quantiles.p90), number(quantiles.p99)]


def _share(part: float, whole: float) -> str:
    return percent(part / whole) if whole else MISSING


def _facts(title: str, values: dict[str, str]) -> Table:
    """Names and values, without what is not known."""
    return Table(title, [], [[name, value] for name, value in values.items() if value])


def _device(profile: Profile) -> dict[str, str]:
    device = profile.device
    gpu = [device.gpu, binary_size(device.gpu_memory_bytes), device.gpu_driver and f"driver {device.gpu_driver}"]
    return {
        "CPU": device.processor,
        "cores": str(device.cores),
        "threads": _threads(profile),
        "instruction sets": ", ".join(device.instruction_sets),
        "caches": ", ".join(f"{level} {binary_size(size)}" for level, size in device.caches.items()),
        "memory": binary_size(device.memory_bytes),
        "GPU": ", ".join(filter(None, gpu)),
        "provider": device.provider,
        "onnxruntime": device.onnxruntime,
        "its providers": ", ".join(device.providers),
        "Python": device.python,
        "system": device.system,
    }


def _threads(profile: Profile) -> str:
    return str(profile.threads) if profile.threads else "onnxruntime's choice"


def _conditions(profile: Profile) -> dict[str, str]:
    conditions = profile.conditions
    clock = " to ".join(number(value / 1e3) for value in dict.fromkeys(conditions.frequency_mhz))
    return {
        "measured, UTC": profile.created[:16].replace("T", " "),
        "repetitions": "few (quick run)" if profile.quick else "all",
        "idle": "yes" if conditions.idle else "NO",
        "CPU used by others": "not known" if conditions.busy is None else percent(conditions.busy),
        "drift, dearest ÷ cheapest": f"{conditions.drift:.2f}",
        "clock": f"{clock} GHz" if clock else "",
        "hottest": "" if conditions.temperature_c is None else f"{conditions.temperature_c:.0f} °C",
    }


def _bundle(profile: Profile) -> dict[str, str]:
    bundle = profile.bundle
    return {
        "name": bundle.name,
        "architecture": bundle.model_type,
        "kind": bundle.kind,
        "tokens a pass predicts": str(bundle.n_tokens),
        "precision": bundle.precision,
        "SHA-256 of the graph": bundle.graph_sha256[:16],
    }


def _constants(profile: Profile) -> dict[str, float]:
    """Figures that a profile has one of; what is zero was not measured."""
    found = {
        "load, s": profile.load_s,
        "graph and weights, MB": profile.bundle.graph_bytes / 1e6,
        "peak memory, MB": profile.peak_bytes / 1e6,
        "memory while decoding, MB": profile.steady_bytes / 1e6,
        "bandwidth, GB/s": profile.bandwidth / 1e9,
        "outside the pass, ms a plain token": profile.overhead,
        "outside the pass, ms a draft": profile.drafting,
    }
    return {name: value for name, value in found.items() if value}


def grid(profile: Profile) -> dict[tuple[bool, int, int], Pass]:
    """The passes by heads, past and rows."""
    return {(p.heads, p.past, p.rows): p for p in profile.passes}


def is_plain(run: StrategyRun) -> bool:
    """Whether this is plain decoding, which the others are held against."""
    return run.name == "plain"


def _passes(profile: Profile, heads: bool) -> Table:
    passes = grid(profile)
    pasts = sorted({p.past for p in profile.passes if p.heads == heads})

    def cell(rows: int, past: int) -> str:
        if not (found := passes.get((heads, past, rows))):
            return MISSING
        single = passes.get((False, past, 1))
        return f"{number(found.time.p50)} ({ratio(found.time.p50, single.time.p50 if single else None)})"

    return Table(
        f"A pass {'with' if heads else 'without'} further heads, p50 in ms (÷ one row without heads)",
        ["rows m", *(f"past {past:,}" for past in pasts)],
        [
            [str(rows), *(cell(rows, past) for past in pasts)]
            for rows in sorted({p.rows for p in profile.passes if p.heads == heads})
        ],
    )


def _acceptance(profile: Profile, greedy: bool) -> Table:
    bins = {(a.confidence, a.depth): a for a in profile.acceptance if a.greedy == greedy}
    depths = sorted({depth for _, depth in bins})

    def cell(confidence: float, depth: int) -> str:
        found = bins.get((confidence, depth))
        return f"{found.accepted / found.seen:.2f} ({found.seen:,})" if found and found.seen else MISSING

    return Table(
        f"Drafts that were right (of so many), by the drafter's confidence, {'greedy' if greedy else 'sampled'}",
        ["confidence", *(f"depth {depth}" for depth in depths)],
        [
            [f"{confidence:.2f}", *(cell(confidence, depth) for depth in depths)]
            for confidence in sorted({confidence for confidence, _ in bins})
        ],
    )


def to_csv(profile: Profile) -> str:
    """`csv_rows` below `HEADER`, as the content of a file."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(csv_rows(profile))
    return buffer.getvalue()


def csv_rows(profile: Profile) -> list[Row]:
    """Every figure that was measured, in full precision, on a row of its own: see `HEADER`."""
    device, conditions, bundle = profile.device, profile.conditions, profile.bundle
    rows: list[Row] = [
        ("device", "processor", "", "", device.processor),
        ("device", "cores", "", "", device.cores),
        ("device", "threads", "", "", profile.threads),
        *(("device", "instruction set", "", "", name) for name in device.instruction_sets),
        *(("device", "cache", level, "bytes", size) for level, size in device.caches.items()),
        ("device", "memory", "", "bytes", device.memory_bytes or None),
        ("device", "gpu", "", "", device.gpu),
        ("device", "gpu memory", "", "bytes", device.gpu_memory_bytes or None),
        ("device", "gpu driver", "", "", device.gpu_driver),
        ("device", "provider", "", "", device.provider),
        ("device", "onnxruntime", "", "", device.onnxruntime),
        ("device", "python", "", "", device.python),
        ("device", "system", "", "", device.system),
        ("device", "bandwidth", "", "bytes/s", profile.bandwidth or None),
        ("conditions", "created", "", "", profile.created),
        ("conditions", "quick", "", "", int(profile.quick)),
        ("conditions", "idle", "", "", int(conditions.idle)),
        ("conditions", "CPU used by others", "", "share", conditions.busy),
        ("conditions", "drift", "", "ratio", conditions.drift),
        *(
            ("conditions", "clock", variant, "MHz", value)
            for variant, value in zip(("lowest", "highest"), conditions.frequency_mhz, strict=False)
        ),
        ("conditions", "temperature", "highest", "°C", conditions.temperature_c),
        ("bundle", "name", "", "", bundle.name),
        ("bundle", "graph", "", "SHA-256", bundle.graph_sha256),
        ("bundle", "kind", "", "", bundle.kind),
        ("bundle", "precision", "", "", bundle.precision),
        ("bundle", "model type", "", "", bundle.model_type),
        ("bundle", "tokens a pass", "", "", bundle.n_tokens),
        ("bundle", "graph and weights", "", "bytes", bundle.graph_bytes),
        ("load", "load", "", "s", profile.load_s),
        ("load", "memory", "peak", "bytes", profile.peak_bytes or None),
        ("load", "memory", "decoding", "bytes", profile.steady_bytes or None),
        ("load", "outside the pass", "plain token", "ms", profile.overhead or None),
        ("load", "outside the pass", "draft", "ms", profile.drafting or None),
    ]
    for prompt in profile.prefill:
        rows += _quantiles("first token", f"prompt {prompt.tokens}", prompt.first_token)
        rows.append(("first token", f"prompt {prompt.tokens}", "speed", "tokens/s", prompt.tokens_per_s))
    for p in profile.passes:
        section, name = f"pass {'with' if p.heads else 'without'} heads", f"past {p.past}, m {p.rows}"
        rows += _quantiles(section, name, p.time)
        rows.append((section, name, "inside p50", "ms", p.inside))
    rows += [("resume", f"skipped {r.skipped}", "", "ms", r.extra) for r in profile.resume]
    for floor in profile.roofline:
        name = f"past {floor.past}"
        rows.append(("roofline", name, "read", "bytes", floor.bytes))
        rows.append(("roofline", name, "floor", "ms", floor.floor))
        rows.append(("roofline", name, "measured", "ms", floor.measured))
    for operator in profile.operators:
        rows.append(("operator", operator.name, "time", "ms", operator.time))
        rows.append(("operator", operator.name, "nodes", "", operator.nodes))
    for run in profile.strategies:
        rows += _interval("tokens a pass", run.name, "tokens", run.tokens_per_pass)
        rows += _interval("speed", run.name, "tokens/s", run.tokens_per_s)
        rows += _interval("speed over plain", run.name, "ratio", run.ratio)
        rows += [("accepted", run.name, f"depth {d}", "share", share) for d, share in enumerate(run.acceptance, 1)]
        rows += _quantiles("between tokens", run.name, run.between_tokens)
    for seen in profile.acceptance:
        name = f"{'greedy' if seen.greedy else 'sampled'}, depth {seen.depth}, confidence {seen.confidence:g}"
        rows.append(("acceptance", name, "seen", "drafts", seen.seen))
        rows.append(("acceptance", name, "accepted", "drafts", seen.accepted))
    for backoff in profile.backoff:
        name = f"ε_b {backoff.threshold:g}"
        rows.append(("back-off", name, "tokens a pass", "tokens", backoff.tokens_per_pass))
        rows += _interval("back-off", name, "ratio", backoff.speedup)
    return [row for row in rows if row[-1] is not None and row[-1] != ""]


def _quantiles(section: str, name: str, times: Quantiles) -> list[Row]:
    rows: list[Row] = [(section, name, level, "ms", getattr(times, level)) for level in ("p50", "p90", "p99")]
    return [*rows, (section, name, "count", "", times.count)]


def _interval(section: str, name: str, unit: str, estimate: Interval) -> list[Row]:
    return [(section, name, part, unit, getattr(estimate, part)) for part in ("value", "low", "high")]


def compare(profiles: Sequence[Profile], names: Sequence[str]) -> str:
    """Profiles side by side in one table for a terminal, with ratios to the first; warnings come first.

    Args:
        profiles: One or more.
        names: Of the profiles, for the columns' heads.
    """
    found = [
        f"{printable(name)}: {text}" for profile, name in zip(profiles, names, strict=True) for text in caveats(profile)
    ]
    return "\n\n".join([*(textwrap.fill(text, WIDTH) for text in found), comparison(profiles, names).text()])


def comparison(profiles: Sequence[Profile], names: Sequence[str]) -> Table:
    """The table of `compare`."""
    rows = [[name, *(fact(profile) or MISSING for profile in profiles)] for name, fact in _FACTS.items()]
    for title, figures, label in _FIGURES:
        columns = [figures(profile) for profile in profiles]
        keys = list(dict.fromkeys(key for column in columns for key in column))
        rows += [[title]] * bool(keys)
        for key in keys if all(isinstance(key, str) for key in keys) else sorted(keys):
            first, *others = (column.get(key) for column in columns)
            rows.append([label(key), number(first), *(_relative(value, first) for value in others)])
    cell_width = min(24, max(14, (WIDTH - NAME_WIDTH) // len(names) - 2))
    return Table(f"Side by side (in parentheses ÷ {names[0]})", ["", *names], rows, cell_width)


def _relative(value: float | None, reference: float | None) -> str:
    return MISSING if value is None else f"{number(value)} ({ratio(value, reference)})"


def _times_of_passes(profile: Profile, heads: bool) -> dict[Any, float]:
    return {(p.past, p.rows): p.time.p50 for p in profile.passes if p.heads == heads}


_FACTS: dict[str, Callable[[Profile], str]] = {
    "CPU": lambda p: p.device.processor,
    "cores": lambda p: str(p.device.cores),
    "threads": _threads,
    "GPU": lambda p: p.device.gpu,
    "provider": lambda p: p.device.provider,
    "onnxruntime": lambda p: p.device.onnxruntime,
    "Python": lambda p: p.device.python,
    "system": lambda p: p.device.system,
    "bundle": lambda p: p.bundle.name,
    "kind": lambda p: p.bundle.kind,
    "tokens a pass predicts": lambda p: str(p.bundle.n_tokens),
    "precision": lambda p: p.bundle.precision,
    "measured, UTC": lambda p: p.created[:16].replace("T", " "),
    "idle": lambda p: "yes" if p.conditions.idle else "NO",
    "quick run": lambda p: "yes" if p.quick else "no",
}
_PASS = "past {0[0]:,}, m {0[1]}".format
_FIGURES: list[tuple[str, Callable[[Profile], dict[Any, float]], Callable[[Any], str]]] = [
    (_CONSTANTS, _constants, str),
    (
        "First token, p50 in ms",
        lambda p: {prompt.tokens: prompt.first_token.p50 for prompt in p.prefill},
        "{:,} prompt tokens".format,
    ),
    ("A pass without further heads, p50 in ms", lambda p: _times_of_passes(p, False), _PASS),
    ("A pass with further heads, p50 in ms", lambda p: _times_of_passes(p, True), _PASS),
    ("Strategies, tokens/pass", lambda p: {run.name: run.tokens_per_pass.value for run in p.strategies}, str),
    ("Strategies, tokens/s", lambda p: {run.name: run.tokens_per_s.value for run in p.strategies}, str),
    ("Strategies, tokens/s ÷ plain", lambda p: {run.name: run.ratio.value for run in p.strategies}, str),
]
