"""What a row costs, and what might make it cheaper: attention, products, pages of memory and options of a session.

    dynamo-export -m smollm2 --quantize int8
    python benchmarks/rows.py [SECTION …] [--bundle BUNDLE] [--json FILE]
    python benchmarks/rows.py --tables JSON [--page docs/rows.md]

Sections, all of them by default; figures of others that are in the JSON file are kept:

attention  all attentions of the model and nothing else, with caches of their own, behind pasts of several lengths:
           types of cache, with and without tiles, ways to have rows share work, ONNX's own operator.
products   all products of the model and nothing else, with random weights: blocks, fixed scales, 4 bits.
passes     the bundle itself with attention tiled and not, and on small and huge pages; whether widths agree.
operators  where a pass of the bundle spends its time, by onnxruntime's own profile.
options    the bundle itself with options of a session that onnxruntime offers.

Everything in a table is measured in turns that rotate; ratios are medians over rounds of the ratio within a round.
A "row" is a token of a pass: m rows at once are what verification of m - 1 drafts needs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
from blocks import exactness
from machine import describe_machine
from page import put_between, wrapped
from rows_kernels import ATTENTIONS, PRODUCTS, Attentions, Products, Shapes
from rows_operators import operators
from tqdm import tqdm

from dynamo_quantize.texts import pieces
from dynamo_runtime import ALL, NONE, Bundle, Engine, load_bundle
from dynamo_runtime.loading import huge_pages, untiled_attention
from dynamo_runtime.providers import import_onnxruntime

WIDTHS, PASTS, THREADS = (1, 2, 3, 4, 6, 8), (64, 256, 1024, 4096), (1, 2)
PASS_PASTS = (64, 1024)
OPERATOR_WIDTHS = (1, 2, 4, 8)
LEAST_SHARE = 0.003  # of a pass: operators below it are in the sum alone
TEXTS, TEXT_TOKENS = 4, 96
MARGIN = 64  # slots of a cache behind the past

OPTIONS: dict[str, dict[str, str]] = {
    "as the runtime loads it": {},
    "spinning on after a pass": {"session.force_spinning_stop": "0"},
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "threads bound to cores": {"session.intra_op_thread_affinities": "2"},
    "blocks of work that shrink": {"session.dynamic_block_base": "4"},
    "weights by the device's allocator": {"session.use_device_allocator_for_initializers": "1"},
    "no denormals": {"session.set_denormal_as_zero": "1"},
    "no arena": {"enable_cpu_mem_arena": "False"},
    "no memory pattern": {"enable_mem_pattern": "False"},
    "as the runtime loads it, once more": {},
}

Key = tuple[Any, ...]


def take_turns(
    actions: Mapping[Key, Callable[[], object]], rounds: int, what: str, clock: Callable[[], float] = perf_counter
) -> dict[Key, list[float]]:
    """Return milliseconds [rounds] of every action.

    Each round begins with another one, and the first two do not count.
    """
    keys = list(actions)
    taken: dict[Key, list[float]] = {key: [] for key in keys}
    for turn in tqdm(range(rounds + 2), desc=what, leave=False):
        shift = turn * 5 % len(keys)
        for key in keys[shift:] + keys[:shift]:
            started = clock()
            actions[key]()
            if turn > 1:
                taken[key].append(1e3 * (clock() - started))
    return taken


def attention(shapes: Shapes, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return milliseconds of all attentions by way, past and width."""
    found: list[dict[str, Any]] = []
    for past in PASTS:
        actions: dict[Key, Callable[[], object]] = {}
        made: dict[str, Attentions] = {}
        for way in tqdm(ATTENTIONS, desc=f"attention, past {past}", leave=False):
            for m in WIDTHS:
                if m == WIDTHS[0] or way.grouping:
                    graph = Attentions(shapes, way, m, past + MARGIN, threads)
                    made.setdefault(way.name, graph)
                binding = graph.bind(past, 0, graph.rows if way.grouping else m)
                actions[way.name, m] = partial(_run, graph, binding)
        taken = take_turns(actions, rounds, f"attention, past {past}")
        for way in ATTENTIONS:
            found.append(
                {
                    "way": way.name,
                    "past": past,
                    "ms": {str(m): float(np.median(taken[way.name, m])) for m in WIDTHS},
                    "difference": made[way.name].difference(past),
                    "cache_bytes": sum(array.nbytes for array in made[way.name].buffers.values()) // (past + MARGIN),
                }
            )
    return found


def _run(graph: Any, binding: Any) -> None:
    graph.kernels.session.run_with_iobinding(binding)


def products(shapes: Shapes, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return milliseconds of all products by way and width."""
    made = {way.name: Products(shapes, way, threads) for way in tqdm(PRODUCTS, desc="products", leave=False)}
    actions = {(name, m): partial(_run, graph, graph.bind(0, m)) for name, graph in made.items() for m in WIDTHS}
    taken = take_turns(actions, rounds, f"products, {threads} threads")
    return [
        {"way": name, "threads": threads, "difference": graph.difference()} | _summary(taken, name, PRODUCTS[0].name)
        for name, graph in made.items()
    ]


def _summary(taken: dict[Key, list[float]], name: str, base: str) -> dict[str, Any]:
    """Medians by width, and of the ratio to another's."""
    return {
        "ms": {str(m): float(np.median(taken[name, m])) for m in WIDTHS},
        "ratio": {str(m): float(np.median(np.divide(taken[name, m], taken[base, m]))) for m in WIDTHS},
    }


@contextmanager
def loading(*ways: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Sessions made inside are loaded in these ways instead of the runtime's own."""

    @contextmanager
    def chosen() -> Iterator[None]:
        with ExitStack() as stack:
            for way in ways:
                stack.enter_context(way())
            yield

    with patch("dynamo_runtime.providers.fast_loading", chosen):
        yield


LOADING: dict[str, tuple[Callable[[], AbstractContextManager[None]], ...]] = {
    "tiled, small pages": (),
    "tiled, huge pages": (huge_pages,),
    "untiled, small pages": (untiled_attention,),
    "untiled, huge pages": (untiled_attention, huge_pages),
}


def passes(bundle: Bundle, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return milliseconds inside onnxruntime of whole passes by way of loading, past and width."""
    engines, exact = {}, {}
    texts = pieces(bundle, None, TEXTS, TEXT_TOKENS, held_out=True)
    for name, ways in LOADING.items():
        with loading(*ways):
            engines[name] = Engine(bundle, provider="cpu", threads=threads)
            exact[name] = exactness(bundle, texts, threads)
    return [
        {"way": name, "threads": threads, "past": past} | row | exact[name]
        for past in PASS_PASTS
        for name, row in _passes(bundle, engines, past, rounds, f"passes, {threads} threads, past {past}").items()
    ]


def options(bundle: Bundle, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return the same by options of a session."""
    onnxruntime = import_onnxruntime()
    engines = {}
    for name, entries in OPTIONS.items():

        class Chosen(onnxruntime.SessionOptions):  # type: ignore[name-defined]
            def add_session_config_entry(self, key: str, value: str, given: dict[str, str] = entries) -> None:
                super().add_session_config_entry(key, given.get(key, value))

        def chosen(kind: Any = Chosen, given: dict[str, str] = entries) -> Any:
            made = kind()
            for key, value in given.items():
                if hasattr(made, key):
                    setattr(made, key, value == "True")
                else:
                    made.add_session_config_entry(key, value)
            return made

        with patch.object(onnxruntime, "SessionOptions", chosen):
            engines[name] = Engine(bundle, provider="cpu", threads=threads)
    past = PASS_PASTS[0]
    found = _passes(bundle, engines, past, rounds, f"options, {threads} threads")
    return [{"way": name, "threads": threads, "past": past} | row for name, row in found.items()]


def _passes(
    bundle: Bundle, engines: Mapping[str, Engine], past: int, rounds: int, what: str
) -> dict[str, dict[str, Any]]:
    """By engine: medians by width, and ratios to the first engine's."""
    text = np.random.default_rng(0).integers(1, bundle.vocab_size, past + WIDTHS[-1]).tolist()
    sessions = {name: engine.session for name, engine in engines.items()}
    for session in sessions.values():
        session.cache.reset()
        session.step(text[:past], heads=NONE)

    def run(name: str, m: int) -> None:
        sessions[name].step(text[past : past + m], rows=ALL, heads=NONE)
        sessions[name].cache.rollback(past)

    def clock() -> float:
        return sum(session.ort_seconds for session in sessions.values())

    actions = {(name, m): partial(run, name, m) for name in sessions for m in WIDTHS}
    taken = take_turns(actions, rounds, what, clock)
    return {name: _summary(taken, name, next(iter(sessions))) for name in sessions}


def tables(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the tables of docs/rows.md by section, as far as there are figures, and then how they were taken."""
    widths = [f"m = {m}" for m in WIDTHS]
    for row_of, section in ((_attention_row, "attention"), (_product_row, "products"), (_pass_row, "passes")):
        if section in record:
            titles, rows = row_of(record[section])
            yield section, _table([*titles[:-1], *widths, titles[-1]], rows)
    if "operators" in record:
        yield "operators", _operators_table(record["operators"])
    if "options" in record:
        rows = [[row["way"], *_cells(row["ratio"])] for row in record["options"]]
        yield "options", _table(["session's options, ÷ as the runtime loads it", *widths], rows)
    rounds = ", ".join(f"{section} {record[f'{section}_rounds']}" for section in SECTIONS if section in record)
    yield "conditions", wrapped(f"{record['bundle']}. Rounds: {rounds}. {record['machine']}.").rstrip()


def fill(page: str, record: dict[str, Any]) -> str:
    """Return a page with its tables between their marks, `<!-- section -->` and `<!-- end -->`."""
    for section, table in tables(record):
        page = put_between(page, section, table)
    return page


def _cells(by_width: Mapping[str, float]) -> list[str]:
    return [f"{by_width[str(m)]:.2f}" for m in WIDTHS]


def _difference(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def _attention_row(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    titles = ["attention alone, ms", "past", "MB of cache, 1,024 tokens", "difference by width"]
    return titles, [
        [
            row["way"],
            f"{row['past']:,}",
            f"{row['cache_bytes'] * 1024 / 1e6:.1f}",
            *_cells(row["ms"]),
            _difference(row["difference"]),
        ]
        for row in sorted(rows, key=lambda row: row["past"])
    ]


def _product_row(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    titles = [f"products alone, ÷ {PRODUCTS[0].name}", "threads", "ms, m = 1", "difference by width"]
    return titles, [
        [
            row["way"],
            str(row["threads"]),
            f"{row['ms']['1']:.2f}",
            *_cells(row["ratio"]),
            _difference(row["difference"]),
        ]
        for row in rows
    ]


def _pass_row(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    titles = ["whole passes, ms", "threads", "past", "max \\|Δlogit\\| by width"]
    return titles, [
        [row["way"], str(row["threads"]), f"{row['past']:,}", *_cells(row["ms"]), _difference(row["difference"])]
        for row in rows
    ]


def _operators_table(rows: Sequence[dict[str, Any]]) -> str:
    totals = {str(m): sum(row["ms"][str(m)] for row in rows) for m in OPERATOR_WIDTHS}
    titles = [f"ms, m = {m}" for m in OPERATOR_WIDTHS]
    shown = [row for row in rows if row["ms"]["1"] >= LEAST_SHARE * totals["1"]]
    read = rows[0]["bandwidth"] / 1e9
    lines = [
        [
            row["way"],
            str(row["count"]),
            *(f"{row['ms'][str(m)]:.2f}" for m in OPERATOR_WIDTHS),
            f"{row['ms']['1'] / totals['1']:.0%}",
            *(
                [f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / row['ms']['1'] / 1e6:.0f}"]
                if row["bytes"]
                else ["", ""]
            ),
        ]
        for row in shown
    ]
    weights = sum(row["bytes"] for row in rows)
    sums = [f"{totals[str(m)]:.2f}" for m in OPERATOR_WIDTHS]
    lines.append(["all", str(sum(row["count"] for row in rows)), *sums, "100%", f"{weights / 1e6:.1f}", ""])
    columns = ["operator", "how many", *titles, "share, m = 1", "MB read", f"GB/s, m = 1 (of {read:.0f})"]
    return _table(columns, lines)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| ---", "|---").replace("--- |", "---|")


SECTIONS = ("attention", "products", "passes", "operators", "options")


def measure(section: str, bundle: Bundle, threads: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Return one section's rows; attention, operators and options with the most threads alone."""
    if section in ("attention", "products"):
        shapes = Shapes.read(str(bundle.graph_path))
        if section == "attention":
            return attention(shapes, threads[-1], rounds)
        return [row for count in threads for row in products(shapes, count, rounds)]
    if section == "passes":
        return [row for count in threads for row in passes(bundle, count, rounds)]
    if section == "operators":
        return operators(bundle, threads[-1], OPERATOR_WIDTHS, rounds)
    return options(bundle, threads[-1], rounds)


def main() -> None:
    """Measure what is asked for, and print all tables there are figures for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--bundle", help="with weights in blocks (default: smollm2 in int8, of the cache)")
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS), help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=20, help="default: 20")
    parser.add_argument("--json", type=Path, help="keep the figures")
    parser.add_argument("--tables", type=Path, metavar="JSON", help="print the tables of kept figures only")
    parser.add_argument("--page", type=Path, help="put the tables into this page, between its marks")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"unknown section {min(unknown)!r}: choose {', '.join(SECTIONS)}")
    kept = arguments.tables or arguments.json
    record = json.loads(kept.read_text()) if kept and kept.is_file() else {}
    if not arguments.tables:
        from dynamo_runtime.cache import kept_bundle

        bundle = load_bundle(arguments.bundle or kept_bundle("smollm2", "int8"))
        record["machine"] = f"{describe_machine()}; onnxruntime {import_onnxruntime().__version__}"
        record["bundle"] = f"{bundle.source.model}, {bundle.precision}"
        for section in arguments.sections or SECTIONS:
            record[section] = measure(section, bundle, arguments.threads, arguments.rounds)
            record[f"{section}_rounds"] = arguments.rounds
            if arguments.json:
                arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print("\n\n".join(table for _, table in tables(record)))
    if arguments.page:
        arguments.page.write_text(fill(arguments.page.read_text(), record))


if __name__ == "__main__":
    main()
