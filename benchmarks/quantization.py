"""What quantization costs and gains: every scheme, and every part of the model alone, on held-out Python.

    python benchmarks/quantization.py [--model CHECKPOINT] [--json FILE] [--plot FILE]
    python benchmarks/quantization.py --random [--json FILE]

Exports the checkpoint with its parallel heads and plain, quantizes both in every way, and runs all of them in turn, in
an order that rotates, so that a drift of the machine's speed falls on all alike.  With --random the model is one of
Pythia-160M's shape with two further heads and random weights: sizes and times then mean something, texts do not, and
4-bit weights are rounded to nearest.

Columns: graph and weights on disk and weights read a pass, as shares of fp32's; peak memory of load, a prompt of 256
tokens and 32 new ones; milliseconds of the plain bundle's pass over one token behind 512 others, and what a pass over m
tokens takes as a multiple of that, with all heads at all rows (as verification runs); rise of PPL_1 and PPL_1:n over
fp32; fall of the tokens per pass of greedy verified decoding and of DynaMo sampling; tokens/s of plain, verified and
DynaMo decoding over plain fp32's; positions at which passes of 2 … n+1 tokens choose differently from passes over one.
Brackets hold 95 % bootstrap intervals over texts or prompts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from drafters import GREEDY
from machine import describe_machine
from random_model import make_bundle
from ratios import Interval, interval, ratio, speed_ratio
from tqdm import tqdm

from dynamo_evaluate.prompts import held_out_prompts
from dynamo_export import export_bundle
from dynamo_quantize.gates import Samples, measure
from dynamo_quantize.quantize import write_bundle
from dynamo_quantize.schemes import Options, Part, resolve
from dynamo_quantize.texts import OWN, pieces
from dynamo_runtime import ALL, Bundle, Engine, load_bundle
from dynamo_runtime.cli.arguments import add_chat, put
from dynamo_runtime.providers import import_onnxruntime

PAST, WIDEST = 512, 6
FP32 = "fp32"
MODES: dict[str, dict[str, Any]] = {
    "plain": GREEDY | {"strategy": "autoregressive"},
    "speculative": GREEDY | {"strategy": "speculative"},
    "dynamo": {"strategy": "dynamo", "temperature": 0.7, "top_k": 50, "repetition_penalty": 1.0},
}


@dataclass(frozen=True)
class Variant:
    """One row: a scheme and what departs from its defaults."""

    name: str
    scheme: str
    options: Options = field(default_factory=Options)
    timed: bool = True


def schemes() -> list[Variant]:
    """Return the rows that are compared with one another."""
    return [
        Variant("int8", "int8"),
        Variant("int8, blocks of 32", "int8", Options(block_size=32)),
        Variant("int8, blocks of 128", "int8", Options(block_size=128)),
        Variant("int8, cache in fp32", "int8", Options(kv_cache="fp32")),
        Variant("int8-dynamic", "int8-dynamic"),
        Variant("int4", "int4"),
        Variant("int4, asymmetric", "int4", Options(symmetric=False)),
        Variant("int4, blocks of 128", "int4", Options(block_size=128)),
        Variant("int4, output too", "int4", Options(parts={"output": "int4"})),
        Variant("int4, heads in int4", "int4", Options(parts={"heads": "int4"})),
        Variant("int4, rtn", "int4", Options(algorithm="rtn")),
        Variant("int4, cache in fp32", "int4", Options(kv_cache="fp32")),
        Variant("fp16", "fp16"),
    ]


def single_parts() -> list[Variant]:
    """Return one part at a time in 4 bits, the rest in fp32."""
    rows = []
    for part in Part:
        precisions = dict.fromkeys(map(str, Part), "fp32") | {str(part): "int4"}
        rows.append(Variant(f"{part} alone in int4", "int4", Options(parts=precisions, kv_cache="fp32"), False))
    return rows


@dataclass
class Outcome:
    """What one row did: by mode, lists [prompts] of tokens, passes and seconds; by width, lists [rounds] of seconds."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    passes: dict[str, list[int]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    pass_seconds: dict[int, list[float]] = field(default_factory=dict)


def write_all(full: dict[str, Bundle], rows: list[Variant], folder: Path) -> dict[str, dict[str, Bundle]]:
    """Bundles by row and by "multi" or "plain"."""
    bundles = {FP32: full}
    for i, row in enumerate(tqdm(rows, desc="quantizing")):
        made = {}
        for kind, bundle in full.items():
            if kind == "plain" and not row.timed:
                continue
            into = folder / f"{i}-{kind}"
            into.mkdir()
            made[kind] = write_bundle(bundle, resolve(row.scheme, row.options), into)
        bundles[row.name] = made
    return bundles


def time_passes(engines: dict[str, dict[str, Engine]], rounds: int, outcomes: dict[str, Outcome]) -> None:
    """Time passes over 1 … WIDEST tokens (of plain bundles: over 1, as width 0) behind the same text, interleaved."""
    names = list(engines)
    rng = np.random.default_rng(0)
    text = rng.integers(1, engines[FP32]["multi"].bundle.vocab_size, PAST + WIDEST).tolist()
    for name in names:
        outcomes[name].pass_seconds = {m: [] for m in range(WIDEST + 1)}
        for engine in engines[name].values():
            engine.reset()
            engine.session.step(text[:PAST])
    for turn in tqdm(range(rounds + 2), desc="passes"):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for m in range(WIDEST + 1):
                session = engines[name]["multi" if m else "plain"].session
                width = max(m, 1)
                started = time.perf_counter()
                session.step(text[PAST : PAST + width], rows=ALL, heads=ALL)
                if turn > 1:  # the first warm up
                    outcomes[name].pass_seconds[m].append(time.perf_counter() - started)
                session.cache.rollback(PAST)


def generate(
    engines: dict[str, dict[str, Engine]], prompts: list[str | list[int]], new_tokens: int, outcomes: dict[str, Outcome]
) -> None:
    """Run every mode of every row on every prompt, interleaved."""
    jobs = [(name, mode) for name in engines for mode in MODES if mode != "plain" or "plain" in engines[name]]
    for name, mode in jobs:
        for counts in (outcomes[name].tokens, outcomes[name].passes, outcomes[name].seconds):
            counts[mode] = []
    for index, prompt in enumerate(tqdm(prompts, desc="prompts")):
        shift = index % len(jobs)
        for name, mode in jobs[shift:] + jobs[:shift]:
            engine = engines[name]["plain" if mode == "plain" else "multi"]
            engine.reset()
            engine.generate(prompt, max_new_tokens=1, seed=0, **MODES[mode])  # decoding is timed, not prefill
            found = engine.generate(prompt, max_new_tokens=new_tokens, seed=index, ignore_eos=True, **MODES[mode])
            outcomes[name].tokens[mode].append(found.statistics.new_tokens)
            outcomes[name].passes[mode].append(found.statistics.rounds)
            outcomes[name].seconds[mode].append(found.statistics.total_s)


def perplexity_ratio(ours: np.ndarray, theirs: np.ndarray, axis: int) -> np.ndarray:
    """PPL over PPL, from the mean negative log-likelihoods of texts of equal length."""
    change: np.ndarray = np.exp(ours.mean(axis=axis) - theirs.mean(axis=axis))
    return change


def summarize(
    bundles: dict[str, dict[str, Bundle]], outcomes: dict[str, Outcome], samples: Samples, meaningful: bool
) -> dict[str, dict[str, Any]]:
    """Return the tables' figures."""
    reference = measure(bundles[FP32]["multi"], samples)
    length = len(samples.texts[0]) - bundles[FP32]["multi"].topology.n_tokens if meaningful else 0
    summary: dict[str, dict[str, Any]] = {}
    for name, bundle in tqdm(bundles.items(), desc="measuring"):
        found = reference if name == FP32 else measure(bundle["multi"], samples, reference)
        outcome, full = outcomes[name], outcomes[FP32]
        figures: dict[str, Any] = {
            "graph_bytes": found.graph_bytes,
            "graph_share": found.graph_bytes / reference.graph_bytes,
            "pass_bytes": found.pass_bytes,
            "pass_share": found.pass_bytes / reference.pass_bytes,
            "peak_bytes": found.peak_bytes,
            "pass_ms": {m: statistics.median(s) * 1e3 for m, s in outcome.pass_seconds.items()},
            "width_difference": found.difference,
            "width_flips": sum(found.flips.values()),
            "width_positions": found.compared,
        }
        if meaningful:
            by_text = [
                [each.reshape(len(samples.texts), length).mean(1) for each in (scores.nll[0], scores.joint)]
                for scores in (found.scores, reference.scores)
            ]
            n = bundle["multi"].topology.n_tokens
            figures |= {
                "perplexities": found.scores.perplexities(),
                "ppl_1_ratio": interval(perplexity_ratio, by_text[0][0], by_text[1][0]),
                f"ppl_1:{n}_ratio": interval(perplexity_ratio, by_text[0][1] / n, by_text[1][1] / n),
                "same_choice": (found.scores.choices == reference.scores.choices).mean(1).tolist(),
            }
        for mode in outcome.tokens:
            o, f = ((each.tokens[mode], each.passes[mode], each.seconds[mode]) for each in (outcome, full))
            figures[mode] = {
                "tokens_per_pass": interval(ratio, o[0], o[1]),
                "tokens_per_pass_ratio": interval(speed_ratio, o[0], o[1], f[0], f[1]),
                "speed_ratio": interval(speed_ratio, o[0], o[2], full.tokens["plain"], full.seconds["plain"]),
            }
            if "plain" in outcome.tokens:
                own = outcome.tokens["plain"], outcome.seconds["plain"]
                figures[mode]["speed_over_own_plain"] = interval(speed_ratio, o[0], o[2], *own)
        summary[name] = figures
    return summary


def size_table(summary: dict[str, dict[str, Any]], names: list[str]) -> str:
    """Sizes, times of passes and flips as a Markdown table."""
    lines = [
        "| scheme | graph MB (of fp32) | read a pass | peak MB | plain ms | "
        + " | ".join(f"m = {m}" for m in range(1, WIDEST + 1))
        + " | max \\|Δlogit\\| by width | flips |",
        "|---" * (WIDEST + 7) + "|",
    ]
    for name in names:
        f = summary[name]
        first = f["pass_ms"][0]
        peak = f"{f['peak_bytes'] / 1e6:.0f}" if f["peak_bytes"] else "–"
        widths = " | ".join(f"{f['pass_ms'][m] / first:.2f}" for m in range(1, WIDEST + 1))
        lines.append(
            f"| {name} | {f['graph_bytes'] / 1e6:.1f} ({f['graph_share']:.1%}) | {f['pass_share']:.1%} | {peak} "
            f"| {first:.2f} | {widths} | {f['width_difference']:.1e} | {f['width_flips']} of {f['width_positions']:,} |"
        )
    return "\n".join(lines)


def quality_table(summary: dict[str, dict[str, Any]], names: list[str], n: int) -> str:
    """Return losses as a Markdown table."""
    lines = [
        f"| scheme | graph | PPL_1 | PPL_1:{n} | same first choice | tokens/pass, speculative | tokens/pass, dynamo |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        f = summary[name]
        passes = [
            f"{f[mode]['tokens_per_pass'][0]:.2f} {_change(f[mode]['tokens_per_pass_ratio'])}"
            for mode in MODES
            if mode != "plain"
        ]
        lines.append(
            f"| {name} | {f['graph_share']:.1%} | {_change(f['ppl_1_ratio'])} | {_change(f[f'ppl_1:{n}_ratio'])} "
            f"| {f['same_choice'][0]:.1%} | " + " | ".join(passes) + " |"
        )
    return "\n".join(lines)


def speed_table(summary: dict[str, dict[str, Any]], names: list[str]) -> str:
    """Speeds as a Markdown table."""
    lines = [
        "| scheme | plain | speculative | dynamo | speculative ÷ own plain | dynamo ÷ own plain |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        f = summary[name]
        cells = [_ratio(f[mode]["speed_ratio"]) for mode in MODES]
        cells += [_ratio(f[mode]["speed_over_own_plain"]) for mode in ("speculative", "dynamo")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _change(value: Interval) -> str:
    if value[1] == value[2] == 1:
        return ""
    return f"{value[0] - 1:+.2%} [{value[1] - 1:+.2%}, {value[2] - 1:+.2%}]"


def _ratio(value: Interval) -> str:
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def plot(summary: dict[str, dict[str, Any]], names: list[str], path: Path) -> None:
    """Cost of a pass by its tokens, and what is lost for what is saved, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    widths = range(1, WIDEST + 1)
    for name in [name for name in (FP32, "int8", "int4", "int8-dynamic", "fp16") if name in names]:
        times = [summary[name]["pass_ms"][m] for m in widths]
        left.plot(widths, times, marker="o", label=name)
    left.set(xlabel="tokens a pass", ylabel=f"ms behind {PAST} tokens", ylim=(0, None))
    left.legend()
    left.grid(alpha=0.3)
    shown = ("int8", "int8-dynamic", "int4", "int4, rtn", "int4, blocks of 128", "int4, output too", "fp16")
    for name in [name for name in shown if "ppl_1_ratio" in summary.get(name, {})]:
        f = summary[name]
        value, low, high = (100 * (each - 1) for each in f["ppl_1_ratio"])
        right.errorbar(100 * f["graph_share"], value, [[value - low], [high - value]], fmt="o", capsize=3)
        right.annotate(name, (100 * f["graph_share"], value), xytext=(5, 3), textcoords="offset points", fontsize=7)
    right.set(xlabel="graph and weights, % of fp32", ylabel="rise of PPL_1, % (95 % interval)")
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def samples_for(bundle: Bundle, texts: int, meaningful: bool) -> Samples:
    """Held-out text: for the random model only what the widths need."""
    widths = pieces(bundle, None, 24 if meaningful else 4, 64, held_out=True)
    if not meaningful:
        return Samples(OWN, widths[:1], widths, [], 0)
    return Samples(OWN, pieces(bundle, None, texts, 512, held_out=True), widths, [], 0)


def main() -> int:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint (default: the package's)")
    parser.add_argument("--random", action="store_true", help="a random model of Pythia-160M's shape")
    parser.add_argument("--heads", type=int, default=3, help="parallel heads (default: 3)")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--texts", type=int, default=60, help="of 512 tokens, for perplexities (default: 60)")
    parser.add_argument("--rounds", type=int, default=30, help="of timed passes (default: 30)")
    add_chat(parser)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--plot", type=Path, help="draw them there (.svg or .png)")
    arguments = parser.parse_args()
    meaningful = not arguments.random
    compared, parts = schemes(), single_parts() if meaningful else []
    if arguments.random:
        compared = [row for row in compared if row.name in ("int8", "int8-dynamic", "int4, rtn", "fp16")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.random:
            multi = make_bundle(folder / "random")
            checkpoint = folder / "random" / "checkpoint"
            plain = export_bundle(folder / "plain" / "model.onnx", checkpoint, heads=0, parity_length=64)
            full = {"multi": load_bundle(multi), "plain": load_bundle(plain)}
        else:
            full = {
                kind: load_bundle(export_bundle(folder / kind / "model.onnx", arguments.model, heads=heads))
                for kind, heads in (("multi", arguments.heads), ("plain", 0))
            }
        bundles = write_all(full, compared + parts, folder)
        outcomes = {name: Outcome() for name in bundles}
        timed = [FP32, *(row.name for row in compared)]
        engines = {
            name: {kind: Engine(bundle, threads=arguments.threads) for kind, bundle in bundles[name].items()}
            for name in bundles
        }
        time_passes({name: engines[name] for name in timed}, arguments.rounds, outcomes)
        if meaningful:
            texts = held_out_prompts(engines[FP32]["plain"], arguments.prompts)
            prompts = [put(arguments, full["plain"], prompt.turns[0]) for prompt in texts]
            generate(engines, prompts, arguments.new_tokens, outcomes)
        del engines
        samples = samples_for(full["multi"], arguments.texts, meaningful)
        summary = summarize(bundles, outcomes, samples, meaningful)
    machine = (
        f"{describe_machine()}; onnxruntime {import_onnxruntime().__version__}, Python {platform.python_version()}"
    )
    print(size_table(summary, timed))
    if meaningful:
        print("\n" + quality_table(summary, list(summary), full["multi"].topology.n_tokens))
        print("\n" + speed_table(summary, timed))
        print(f"\n{len(samples.texts)} texts × 512 tokens; {len(prompts)} prompts × {arguments.new_tokens} new tokens.")
    print(f"\n{machine}.")
    if arguments.plot:
        plot(summary, timed, arguments.plot)
    if arguments.json:
        record = {"machine": machine, "arguments": sys.argv[1:], "summary": summary}
        arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
