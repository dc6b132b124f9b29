"""First light: plain decoding, the multi-head graph and DynaMo sampling on held-out Python, side by side.

    python benchmarks/first_light.py MULTI/model.onnx PLAIN/model.onnx [--json FILE]

PLAIN is the `--heads 0` export of the same checkpoint.  All settings run on every prompt in turn, in an order that
rotates from prompt to prompt, so that a drift of the machine's speed falls on all alike.  Prompts are cut from
the modules of the running interpreter's standard library that training holds out.

Columns: tokens per pass; tokens/s over plain's; share of an output's lines in its longest prefix that parses
(together with its prompt, outputs cut at their last complete line); distinct-3, the share of an output's
trigrams that are different; the negative log-likelihood a token that the base model itself gives the output.
Brackets hold 95 % bootstrap intervals over the prompts.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from machine import describe_machine
from numpy.typing import NDArray
from scipy.stats import bootstrap
from tqdm import tqdm

from dynamo_runtime import Engine
from dynamo_train.corpus import held_out_documents

PLAIN = "plain"
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Setting:
    """One row of the table: a name, whether the plain bundle runs it, and the options of `Engine.generate`."""

    name: str
    plain_bundle: bool
    options: dict[str, Any]


@dataclass
class Outcome:
    """What one setting did on every prompt: arrays [prompts]."""

    new_tokens: list[int]
    passes: list[int]
    seconds: list[float]
    parsing: list[float]
    distinct_3: list[float]
    nll: list[float]


def settings(thresholds: Sequence[float], repetition_penalty: float) -> list[Setting]:
    """The rows: plain, autoregressive on the multi-head graph, dynamo at every threshold, and without mask."""
    shared = {"temperature": 0.7, "top_k": 50, "repetition_penalty": repetition_penalty}
    rows = [
        Setting(PLAIN, True, shared | {"strategy": "autoregressive"}),
        Setting("autoregressive, multi-head graph", False, shared | {"strategy": "autoregressive"}),
    ]
    for threshold in thresholds:
        options = shared | {"strategy": "dynamo", "backoff_threshold": threshold}
        rows.append(Setting(f"dynamo ε_b {threshold:g}", False, options))
    return rows


# The paper leaves these open; each row departs from the default in one of them.
READINGS: dict[str, dict[str, Any]] = {
    "as released": {},
    "no mask (α_c 0)": {"cooccurrence_weight": 0.0},
    "quarter mask (α_c 0.25)": {"cooccurrence_weight": 0.25},
    "half mask (α_c 0.5)": {"cooccurrence_weight": 0.5},
    "three-quarter mask (α_c 0.75)": {"cooccurrence_weight": 0.75},
    "full mask (α_c 1)": {"cooccurrence_weight": 1.0},
    "no adaptive threshold": {"adaptive_threshold": "none"},
    "Otsu without blur": {"adaptive_threshold": "otsu"},
    "Otsu and blur": {"adaptive_threshold": "blur"},
    "Otsu over non-zero entries": {"adaptive_threshold": "blur", "otsu_zeros": False},
    "joint not normalised": {"normalize_joint": False},
    "pre-mask test: none": {"premask_test": "none"},
    "pre-mask test: sole survivor": {"premask_test": "sole"},
    "pre-mask test: all": {"premask_test": "all"},
}


def reading_rows(threshold: float, shared: dict[str, Any]) -> list[Setting]:
    """One row for every reading of the paper, all at one back-off threshold."""
    options = shared | {"strategy": "dynamo", "backoff_threshold": threshold}
    return [Setting(f"ε_b {threshold:g}, {name}", False, options | reading) for name, reading in READINGS.items()]


def held_out_prompts(engine: Engine, count: int, tokens: int) -> list[str]:
    """Cut prompts from held-out modules: from the start of a top-level statement to the end of a line.

    Args:
        engine: for its tokenizer.
        count: how many, spread evenly over all places that qualify.
        tokens: least length of a prompt.
    """
    prompts = []
    for document in held_out_documents():
        lines = document.text.splitlines(keepends=True)
        for node in ast.parse(document.text).body:
            text, length = "", 0
            for line in lines[node.lineno - 1 :]:
                text += line
                length = len(engine.encode(text)) if len(text) > 2 * tokens else 0
                if length >= tokens:
                    break
            if tokens <= length <= 2 * tokens:
                prompts.append(text)
    if len(prompts) < count:
        raise SystemExit(f"only {len(prompts)} prompts in the held-out modules, {count} wanted")
    return [prompts[i] for i in np.linspace(0, len(prompts) - 1, count).round().astype(int)]


def parsing_share(prompt: str, output: str) -> float:
    """Share of the output's complete lines that lie in the longest prefix of prompt + output that parses."""
    head = prompt.count("\n")
    lines = (prompt + output).split("\n")[:-1]  # what follows the last line break is no complete line
    if len(lines) == head:
        return float("nan")
    for end in range(len(lines), head, -1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse("\n".join(lines[:end]) + "\n")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return (end - head) / (len(lines) - head)
    return 0.0


def distinct_share(tokens: Sequence[int], n: int = 3) -> float:
    """Share of different n-grams among an output's n-grams."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams)


def base_nll(plain: Engine, prompt: Sequence[int], output: Sequence[int]) -> float:
    """Mean negative log-likelihood of an output's tokens under the base model."""
    plain.reset()
    logits = plain.session.step([*prompt, *output[:-1]], rows=len(output)).logits(1).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-log_p[np.arange(len(output)), list(output)].mean())


def run(engines: dict[bool, Engine], rows: list[Setting], prompts: list[str], new_tokens: int) -> dict[str, Outcome]:
    """Run every setting on every prompt, interleaved."""
    outcomes = {row.name: Outcome([], [], [], [], [], []) for row in rows}
    for row in rows:  # warm-up, not counted
        engines[row.plain_bundle].generate(prompts[0], max_new_tokens=16, seed=0, **row.options)
    for index, prompt in enumerate(tqdm(prompts, desc="prompts")):
        shift = index % len(rows)
        for row in rows[shift:] + rows[:shift]:
            engine = engines[row.plain_bundle]
            engine.reset()
            engine.generate(prompt, max_new_tokens=1, seed=0, **row.options)  # decoding is timed, not prefill
            generation = engine.generate(prompt, max_new_tokens=new_tokens, seed=index, ignore_eos=True, **row.options)
            statistics, outcome = generation.statistics, outcomes[row.name]
            outcome.new_tokens.append(statistics.new_tokens)
            outcome.passes.append(statistics.rounds)
            outcome.seconds.append(statistics.total_s)
            outcome.parsing.append(parsing_share(prompt, generation.text))
            outcome.distinct_3.append(distinct_share(generation.tokens))
            outcome.nll.append(base_nll(engines[True], engine.encode(prompt), generation.tokens))
    return outcomes


def interval(statistic: Callable[..., NDArray[np.float64]], *samples: Sequence[float]) -> Interval:
    """A statistic of paired samples [prompts] with its 95 % percentile-bootstrap interval."""
    data = tuple(np.asarray(sample, dtype=np.float64) for sample in samples)
    if all(np.ptp(sample) == 0 for sample in data):
        value = float(statistic(*data, axis=-1))
        return value, value, value
    result = bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
        n_resamples=2000,
    )
    low, high = result.confidence_interval
    return float(statistic(*data, axis=-1)), float(low), float(high)


def ratio(top: NDArray[np.float64], bottom: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Sum over sum."""
    return top.sum(axis=axis) / bottom.sum(axis=axis)


def speed_ratio(
    tokens: NDArray[np.float64],
    seconds: NDArray[np.float64],
    plain_tokens: NDArray[np.float64],
    plain_seconds: NDArray[np.float64],
    axis: int,
) -> NDArray[np.float64]:
    """Tokens a second over plain's."""
    return ratio(tokens, seconds, axis) / ratio(plain_tokens, plain_seconds, axis)


def summarize(outcomes: dict[str, Outcome]) -> dict[str, dict[str, Interval]]:
    """The table's figures, each with its interval."""

    def mean(sample: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.nanmean(sample, axis=axis)

    plain = outcomes[PLAIN]
    return {
        name: {
            "tokens_per_pass": interval(ratio, o.new_tokens, o.passes),
            "tokens_per_s": interval(ratio, o.new_tokens, o.seconds),
            "speed_ratio": interval(speed_ratio, o.new_tokens, o.seconds, plain.new_tokens, plain.seconds),
            "parsing": interval(mean, o.parsing),
            "distinct_3": interval(mean, o.distinct_3),
            "nll": interval(mean, o.nll),
        }
        for name, o in outcomes.items()
    }


def table(summary: dict[str, dict[str, Interval]]) -> str:
    """The summary as a Markdown table; ✓ marks a quality whose interval overlaps plain's."""
    lines = [
        "| setting | tokens/pass | tokens/s ÷ plain | parsing lines | distinct-3 | base NLL |",
        "|---|---|---|---|---|---|",
    ]
    plain = summary[PLAIN]
    for name, figures in summary.items():
        cells = [name, f"{figures['tokens_per_pass'][0]:.2f}", _cell(figures["speed_ratio"], 2)]
        for quality in ("parsing", "distinct_3", "nll"):
            overlaps = figures[quality][1] <= plain[quality][2] and plain[quality][1] <= figures[quality][2]
            mark = " ✓" if overlaps and name != PLAIN else ""
            cells.append(_cell(figures[quality], 3 if quality != "nll" else 2) + mark)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Interval, digits: int) -> str:
    return f"{value[0]:.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("multi", type=Path, help="multi-head bundle")
    parser.add_argument("plain", type=Path, help="`--heads 0` export of the same checkpoint")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7])
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="on both sides (default: 1)")
    parser.add_argument(
        "--dynamo",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="one more row: options of Engine.generate on top of the shared ones",
    )
    parser.add_argument(
        "--readings",
        type=float,
        nargs="+",
        default=[],
        metavar="E",
        help="add rows for all readings of the paper's open points at these thresholds",
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()

    engines = {False: Engine(arguments.multi, threads=arguments.threads)}
    engines[True] = Engine(arguments.plain, threads=arguments.threads)
    rows = settings(arguments.thresholds, arguments.repetition_penalty)
    for threshold in arguments.readings:
        rows += reading_rows(threshold, rows[1].options)
    for text in arguments.dynamo:
        name, _, options = text.partition("=")
        rows.append(Setting(name, False, rows[1].options | {"strategy": "dynamo"} | json.loads(options)))
    prompts = held_out_prompts(engines[True], arguments.prompts, arguments.prompt_tokens)
    outcomes = run(engines, rows, prompts, arguments.new_tokens)
    summary = summarize(outcomes)
    machine = f"{describe_machine()}; onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}"
    print(table(summary))
    print(f"\n{len(prompts)} prompts × {arguments.new_tokens} new tokens a setting. {machine}.")
    if arguments.json:
        record = {
            "machine": machine,
            "arguments": sys.argv[1:],
            "settings": [asdict(row) for row in rows],
            "summary": summary,
        }
        arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
