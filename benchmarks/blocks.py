"""What the size of int8's blocks decides: the cost of a pass over several rows, and whether its results are exact.

    dynamo-export -m smollm2
    python benchmarks/blocks.py [--bundle BUNDLE] [--json FILE]

Quantizes a bundle in fp32 to int8 in blocks of 32, 64 and 128, without gates.  T(m) is what a pass over m tokens takes
with the first head at all rows, as verification runs it, behind a past of some length; all sizes in turn, and all
widths of each, in orders that rotate.  T(m) ÷ T(1), and T(1) ÷ T(1) in blocks of 32, are medians over rounds of the
ratio within a round, with 95 % bootstrap intervals in the JSON file.  Exactness: text of the bundle's own, or of the
standard library, in passes over 2 … 8 rows against passes over one, caches and all: the largest difference of a logit,
and first choices that change, of all heads.  Blocks of 128 stand there for comparison: their products are not computed
row by row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from ratios import Interval, interval
from tqdm import tqdm

from dynamo_quantize.conversations import own_words
from dynamo_quantize.quantize import write_bundle
from dynamo_quantize.schemes import Options, resolve
from dynamo_quantize.texts import pieces
from dynamo_runtime import ALL, NONE, Bundle, Engine, load_bundle
from dynamo_runtime.providers import import_onnxruntime
from dynamo_runtime.session import Session

SIZES, THREADS = (32, 64, 128), (1, 2)
WIDTHS, PASTS = (1, 2, 4, 8), (64, 1024)
EXACT_WIDTHS = range(2, 9)
TEXTS, TEXT_TOKENS = 6, 96
NEVER = -1e30  # for -inf, which cannot be subtracted


def texts_of(full: Bundle) -> tuple[list[list[int]], str]:
    """Text to compare passes on, as tokens, and what it is."""
    if spoken := own_words(full)[1::2]:
        return [each.tokens[:TEXT_TOKENS] for each in spoken[:TEXTS]], "its own answers"
    return pieces(full, None, TEXTS, TEXT_TOKENS, held_out=True), "modules of the standard library"


def in_passes(session: Session, text: list[int], width: int) -> np.ndarray:
    """Return logits [positions, heads, vocab] from passes over `width` tokens.

    A head that is told the token in front is told that of the text; of words that it does not have it says very little.
    """
    session.cache.reset()
    found, parts = [], session.bundle.topology.parts
    told = [*text[1:], *[0] * parts]
    for at in range(0, len(text), width):
        step = session.step(text[at : at + width], rows=ALL, heads=ALL)
        logits = [step.logits()]
        if parts:
            ahead, rows = step.ahead(), len(logits[0])
            logits += [ahead.logits(part, told[at + part : at + part + rows]) for part in range(parts)]
        found.append(np.nan_to_num(np.stack(logits, axis=1), neginf=NEVER))
    return np.concatenate(found)


def exactness(bundle: Bundle, texts: list[list[int]], threads: int) -> dict[str, Any]:
    """Pass over several rows against passes over one."""
    session = Engine(bundle, provider="cpu", threads=threads).session
    difference, changed, compared = 0.0, 0, 0
    for text in texts:
        narrow = in_passes(session, text, 1)
        for width in EXACT_WIDTHS:
            wide = in_passes(session, text, width)
            difference = max(difference, float(np.abs(wide - narrow).max()))
            changed += int((wide.argmax(-1) != narrow.argmax(-1)).sum())
            compared += narrow.shape[0] * narrow.shape[1]
    return {"difference": difference, "changed": changed, "compared": compared}


def time_passes(bundles: dict[int, Bundle], threads: int, past: int, rounds: int) -> dict[int, dict[int, list[float]]]:
    """Return seconds [rounds] of passes behind the same text, by block size and width."""
    text = np.random.default_rng(0).integers(1, next(iter(bundles.values())).vocab_size, past + WIDTHS[-1]).tolist()
    sessions = {size: Engine(bundle, provider="cpu", threads=threads).session for size, bundle in bundles.items()}
    for session in sessions.values():
        session.step(text[:past])
    seconds: dict[int, dict[int, list[float]]] = {size: {m: [] for m in WIDTHS} for size in bundles}
    sizes = list(bundles)
    for turn in tqdm(range(rounds + 2), desc=f"passes, {threads} threads, past {past}"):
        for size in sizes[turn % len(sizes) :] + sizes[: turn % len(sizes)]:
            session = sessions[size]
            shift = turn % len(WIDTHS)
            for i, m in enumerate([1, *WIDTHS[shift:], *WIDTHS[:shift]]):
                started = time.perf_counter()
                session.step(text[past : past + m], rows=ALL, heads=NONE)
                if turn > 1 and i:  # the first rounds warm up, and a round's first pass, behind another bundle's
                    seconds[size][m].append(time.perf_counter() - started)
                session.cache.rollback(past)
    return seconds


def median_ratio(top: list[float], bottom: list[float]) -> Interval:
    """Median over rounds of the ratio within a round."""
    return interval(np.median, np.divide(top, bottom).tolist())


def measure(bundles: dict[int, Bundle], texts: list[list[int]], rounds: int) -> list[dict[str, Any]]:
    """Return a row for every number of threads and block size."""
    rows = []
    for threads in THREADS:
        taken = {past: time_passes(bundles, threads, past, rounds) for past in PASTS}
        for size, bundle in bundles.items():
            row: dict[str, Any] = {"threads": threads, "block_size": size, "bytes": bundle.graph_bytes, "passes": {}}
            for past, seconds in taken.items():
                own, theirs = seconds[size][1], seconds[SIZES[0]][1]
                row["passes"][str(past)] = {
                    "plain": median_ratio(own, theirs),
                    **{str(m): median_ratio(seconds[size][m], own) for m in WIDTHS[1:]},
                }
            rows.append(row | exactness(bundle, texts, threads))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table for docs/quantization.md."""
    multiples = [f"T({m}) ÷ T(1)" for m in WIDTHS[1:]]
    heads = [f"{name}, past {past:,}" for past in PASTS for name in (f"T(1) ÷ {SIZES[0]}'s", *multiples)]
    titles = ["threads", "blocks of", "MB", *heads, "max \\|Δlogit\\| by width", "choices changed"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        ratios = [f"{value[0]:.2f}" for past in PASTS for value in row["passes"][str(past)].values()]
        cells = [str(row["threads"]), str(row["block_size"]), f"{row['bytes'] / 1e6:.0f}", *ratios]
        cells += [f"{row['difference']:.1e}" if row["difference"] else "0", f"{row['changed']} of {row['compared']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="in fp32 (default: smollm2 of the cache)")
    parser.add_argument("--rounds", type=int, default=60, help="of timed passes (default: 60)")
    parser.add_argument("--json", type=Path, help="keep the figures")
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the table of kept figures, and measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.table:
        record = json.loads(arguments.table.read_text())
    else:
        from dynamo_runtime.cache import kept_bundle

        full = load_bundle(arguments.bundle or kept_bundle("smollm2", "fp32"))
        texts, name = texts_of(full)
        with tempfile.TemporaryDirectory() as temporary:
            bundles = {}
            for size in tqdm(SIZES, desc="quantizing"):
                folder = Path(temporary) / str(size)
                folder.mkdir()
                scheme = resolve("int8", Options(block_size=size))
                bundles[size] = write_bundle(full, scheme, folder, calibration=own_words(full)[::2])
            rows = measure(bundles, texts, arguments.rounds)
        record = {
            "machine": f"{describe_machine()}; onnxruntime {import_onnxruntime().__version__}.",
            "bundle": full.source.model,
            "text": f"{sum(map(len, texts))} tokens of {name}",
            "rounds": arguments.rounds,
            "rows": rows,
        }
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"{table(record['rows'])}\n\n{record['rounds']} rounds; {record['text']}. {record['machine']}")


if __name__ == "__main__":
    main()
