"""What a decode step costs outside onnxruntime, by strategy and sampling; and a draw from a whole large vocabulary.

    python benchmarks/step_overhead.py [--bundle PATH]... [--json FILE]

Every setting that a bundle can run writes texts in interleaved rounds; what is outside onnxruntime are drafts,
verification, sampling, text and statistics.  The second table draws a token with top-k 0 from rows of 262,144 logits:
by sorting all of them, and as `Target` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine

from dynamo_runtime import DEFAULT_BUNDLE, Engine, SamplingParameters
from dynamo_runtime.sampling import Candidates, draw, sort_logits, truncate, truncate_row
from dynamo_runtime.selection import refusal

PROMPT = "def fib(n):\n"
SAMPLED = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
WHOLE = {"temperature": 0.7, "top_k": 0, "top_p": 0.9}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain, greedy": ("autoregressive", {"temperature": 0.0}),
    "plain, top-k 50, top-p 0.9": ("autoregressive", SAMPLED),
    "plain, top-k 0, top-p 0.9": ("autoregressive", WHOLE),
    "speculative, greedy": ("speculative", {"temperature": 0.0}),
    "speculative, top-k 50, top-p 0.9": ("speculative", SAMPLED),
    "speculative, top-k 0, top-p 0.9": ("speculative", WHOLE),
    "dynamo, ε_b 0.5": ("dynamo", {"backoff_threshold": 0.5}),
    "dynamo, ε_b 0": ("dynamo", {"backoff_threshold": 0.0}),
}
LARGE_VOCAB = 262_144
DRAWS = 15


def measure(engine: Engine, rounds: int, new_tokens: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by setting: milliseconds a step, those outside onnxruntime, and tokens a pass."""
    able = {name: each for name, each in SETTINGS.items() if refusal(each[0], engine.bundle, each[1]) is None}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in able}
    for turn in range(rounds + 1):
        for name, (strategy, options) in able.items():
            engine.reset()
            limits: dict[str, Any] = {"max_new_tokens": new_tokens, "ignore_eos": True}
            cost = engine.generate(PROMPT, strategy=strategy, seed=turn, **limits, **options).statistics
            if turn:  # the first round warms up
                step_ms = (cost.total_s - cost.ttft_s) / (cost.rounds - 1) * 1e3
                found[name].append((step_ms, cost.outside_share * step_ms, cost.tokens_per_pass))
    rows = {}
    for name, taken in found.items():
        step_ms, outside_ms, tokens = (statistics.median(column) for column in zip(*taken, strict=True))
        rows[name] = {"step_ms": step_ms, "outside_ms": outside_ms, "tokens_per_pass": tokens}
    return rows


def measure_draws(vocab_size: int = LARGE_VOCAB) -> dict[str, dict[str, float]]:
    """Return milliseconds of a draw with top-k 0, by row and top-p: with a full sort, and as it is done."""
    rng = np.random.default_rng(0)
    kinds = {
        "like text": -1.5 * np.log(1 + rng.permutation(vocab_size)),  # Zipf's law, a little steeper
        "normal, σ = 1": rng.normal(size=vocab_size),
    }
    rows = {}
    for kind, logits in kinds.items():
        row = logits.astype(np.float32)
        for top_p in (0.9, 1.0):
            parameters = SamplingParameters(temperature=1.0, top_k=0, top_p=top_p)

            def by_sorting(row: np.ndarray = row, parameters: SamplingParameters = parameters) -> Candidates:
                return truncate(*sort_logits(row, 0), parameters)

            def as_it_is(row: np.ndarray = row, parameters: SamplingParameters = parameters) -> Candidates:
                return truncate_row(row, parameters)

            taken = interleaved([by_sorting, as_it_is])
            kept = len(as_it_is().ids)
            rows[f"{kind}, top-p {top_p}"] = {"kept": kept, "sorted_ms": taken[0], "draw_ms": taken[1]}
    return rows


def interleaved(ways: Sequence[Callable[[], Candidates]]) -> list[float]:
    """Median milliseconds of a draw from what every one of some functions gives."""
    taken: list[list[float]] = [[] for _ in ways]
    for turn in range(DRAWS + 1):
        for way, times in zip(ways, taken, strict=True):
            started = time.perf_counter()
            draw(way().probabilities, turn / (DRAWS + 1))
            times.append((time.perf_counter() - started) * 1e3)
    return [statistics.median(times[1:]) for times in taken]


def table(bundles: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown of what steps cost."""
    lines = ["| bundle | strategy | tokens a pass | ms a step | ms outside | outside |", "|---|---|---|---|---|---|"]
    for bundle, rows in bundles.items():
        for name, row in rows.items():
            share = row["outside_ms"] / row["step_ms"]
            cells = [
                f"{row['tokens_per_pass']:.2f}",
                f"{row['step_ms']:.3f}",
                f"{row['outside_ms']:.3f}",
                f"{share:.1%}",
            ]
            lines.append(f"| {' | '.join([bundle, name, *cells])} |")
    return "\n".join(lines)


def draws_table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown of what draws from a whole row cost."""
    lines = [
        f"| top-k 0 of {LARGE_VOCAB} | tokens kept | ms, all sorted | ms | sorted ÷ this |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [f"{row['kept']:.0f}", f"{row['sorted_ms']:.2f}", f"{row['draw_ms']:.2f}"]
        lines.append(f"| {' | '.join([name, *cells, format(row['sorted_ms'] / row['draw_ms'], '.1f')])} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, action="append", help="may be repeated (default: the embedded model)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundles = {}
    for path in arguments.bundle or [DEFAULT_BUNDLE]:
        with Engine(path, threads=arguments.threads) as engine:
            name = f"{path.resolve().name}, {engine.bundle.precision}, V = {engine.bundle.vocab_size}"
            bundles[name] = measure(engine, arguments.rounds, arguments.new_tokens)
    draws = measure_draws()
    conditions = (
        f"Medians of {arguments.rounds} interleaved runs of {arguments.new_tokens} tokens, and of {DRAWS} draws. "
        f"{describe_machine()}"
    )
    print(f"{table(bundles)}\n\n{draws_table(draws)}\n\n{conditions}.")
    if arguments.json:
        content = {"conditions": conditions, "steps": bundles, "draws": draws}
        arguments.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
