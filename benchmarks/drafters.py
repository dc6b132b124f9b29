"""Drafters: what verified decoding gains with every drafter of a checkpoint, on held-out Python.

    python benchmarks/drafters.py [--model CHECKPOINT] [--also "CP, rank 1=CHECKPOINT"] [--json FILE]

Exports the checkpoint's plain model and all its drafters (those of --also as joint heads), then runs every setting on
every prompt in turn, in an order that rotates from prompt to prompt, so that a drift of the machine's speed falls on
all alike.  Prompts are cut from the modules of the standard library that training holds out.

Columns: tokens per pass; acceptance by depth (a draft behind a rejected one counts as rejected); tokens/s over that of
plain decoding with the same sampling; parameters and bytes that the bundle has beyond the plain one; texts that are
not plain decoding's, and how many of them part from it at a near tie: where the two largest logits are closer than
twice the largest difference that passes of several tokens make to a logit.  Brackets hold 95 % bootstrap intervals
over the prompts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import platform
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from ratios import interval, ratio, speed_ratio
from same_text import Said, by_depth, differences, pass_difference
from tqdm import tqdm

from dynamo_evaluate.prompts import held_out_prompts
from dynamo_export import export_bundle
from dynamo_model import DEFAULT_CHECKPOINT, CPModel, LookAheadModel, MultiTokenModel, has_drafter
from dynamo_runtime import Engine
from dynamo_runtime.bundle import load_bundle
from dynamo_runtime.cli.arguments import add_chat, put
from dynamo_runtime.providers import import_onnxruntime

PLAIN = "plain"
GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}
SAMPLED: dict[str, Any] = {"temperature": 0.7, "top_k": 50, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Decoding:
    """One row of the table: the bundle that runs it, the plain row it is compared with, and its options."""

    name: str
    bundle: str
    reference: str
    options: dict[str, Any]


@dataclass
class Outcome:
    """What one setting did on every prompt: lists [prompts]."""

    tokens: list[list[int]] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    proposed: list[list[int]] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Exported:
    """A bundle, and the parameters its drafter adds to the base."""

    folder: Path
    extra_parameters: int


def export_all(model: Path, also: dict[str, Path], folder: Path) -> dict[str, Exported]:
    """Export the plain model and every drafter; parallel heads at every number there is."""
    plan: list[tuple[str, Path, dict[str, Any], int]] = [(PLAIN, model, {"heads": 0}, 0)]
    if has_drafter(model, "parallel"):
        heads = MultiTokenModel.load(model)
        each = heads.head_parameters() // (heads.n_heads - 1)
        for n in range(2, heads.n_heads + 1):
            plan.append((f"T{n} heads", model, {"heads": n, "drafter": "parallel"}, each * (n - 1)))
    for name, source in {"": model, **also}.items():
        if has_drafter(source, "cp"):
            cp = CPModel.load(source)
            plan.append((name or f"CP, rank {cp.rank}", source, {"drafter": "cp"}, cp.head_parameters()))
    if has_drafter(model, "lookahead"):
        ahead = LookAheadModel.load(model)
        plan.append((f"PaSS, L {ahead.n_look_ahead}", model, {"drafter": "lookahead"}, ahead.head_parameters()))
    bundles = {}
    logging.getLogger("dynamo_export").setLevel(logging.WARNING)
    for i, (name, source, options, extra) in enumerate(tqdm(plan, desc="exporting")):
        with contextlib.redirect_stdout(io.StringIO()):  # the gates' tables
            export_bundle(folder / str(i) / "model.onnx", source, **options)
        bundles[name] = Exported(folder / str(i), extra)
    return bundles


def decodings(bundles: dict[str, Exported], confidence: float) -> list[Decoding]:
    """Return the rows: plain and every drafter, greedily and sampled, with the mask on drafts and without."""
    rows = []
    drafters = [name for name in bundles if name != PLAIN]
    longest = max((name for name in drafters if name.startswith("T")), default=None)

    def add(name: str, bundle: str, reference: str, options: dict[str, Any], strategy: str = "speculative") -> None:
        rows.append(Decoding(name, bundle, reference, options | {"strategy": strategy}))

    add(PLAIN, PLAIN, PLAIN, GREEDY, "autoregressive")
    if longest:
        add(f"{longest}, autoregressive", longest, PLAIN, GREEDY, "autoregressive")
    for name in drafters:
        has_counts = load_bundle(bundles[name].folder).has_cooccurrence
        if has_counts:
            add(f"{name}, mask", name, PLAIN, GREEDY)
        if not has_counts or name == longest or not name.startswith("T"):
            add(name, name, PLAIN, GREEDY | {"draft_cooccurrence_weight": 0.0})
        if has_counts and name == longest:
            add(f"{name}, full mask", name, PLAIN, GREEDY | {"draft_cooccurrence_weight": 1.0})
            add(f"{name}, mask, cut-off {confidence:g}", name, PLAIN, GREEDY | {"draft_confidence": confidence})
    sampled = f"{PLAIN}, T 0.7"
    add(sampled, PLAIN, sampled, SAMPLED, "autoregressive")
    for name in [n for n in drafters if n == longest or not n.startswith("T")]:
        add(f"{name}, T 0.7, mask", name, sampled, SAMPLED)
        add(f"{name}, T 0.7, mask, sampled drafts", name, sampled, SAMPLED | {"draft_choice": "sample"})
    return rows


def run(engines: dict[str, Engine], rows: list[Decoding], prompts: list[Said], new_tokens: int) -> dict[str, Outcome]:
    """Run every setting on every prompt, interleaved."""
    outcomes = {row.name: Outcome() for row in rows}
    for row in rows:  # warm-up, not counted
        engines[row.bundle].generate(prompts[0], max_new_tokens=16, seed=0, **row.options)
    for index, prompt in enumerate(tqdm(prompts, desc="prompts")):
        shift = index % len(rows)
        for row in rows[shift:] + rows[:shift]:
            engine = engines[row.bundle]
            engine.reset()
            engine.generate(prompt, max_new_tokens=1, seed=0, **row.options)  # decoding is timed, not prefill
            result = engine.generate(prompt, max_new_tokens=new_tokens, seed=index, ignore_eos=True, **row.options)
            outcome, statistics = outcomes[row.name], result.statistics
            outcome.tokens.append(result.tokens)
            outcome.rounds.append(statistics.rounds)
            outcome.seconds.append(statistics.total_s)
            outcome.proposed.append(statistics.proposed_at_depth)
            outcome.accepted.append(statistics.accepted_at_depth)
    return outcomes


def summarize(
    rows: list[Decoding],
    outcomes: dict[str, Outcome],
    engines: dict[str, Engine],
    bundles: dict[str, Exported],
    prompts: list[Said],
) -> dict[str, dict[str, Any]]:
    """Return the table's figures."""

    def size(name: str) -> int:
        return sum(file.bytes for file in engines[name].bundle.files.values())

    noise = {name: pass_difference(engine, prompts[:20], 6) for name, engine in engines.items()}
    summary = {}
    for row in rows:
        o, plain = outcomes[row.name], outcomes[row.reference]
        counts, plain_counts = [[len(tokens) for tokens in outcome.tokens] for outcome in (o, plain)]
        proposed, accepted = by_depth(o.proposed), by_depth(o.accepted)
        tie = 2 * max(noise[row.bundle], noise[PLAIN])
        figures: dict[str, Any] = {
            "tokens_per_pass": interval(ratio, counts, o.rounds),
            "speed_ratio": interval(speed_ratio, counts, o.seconds, plain_counts, plain.seconds),
            "draft_tokens_proposed": int(proposed.sum()),
            "draft_tokens_accepted": int(accepted.sum()),
            "acceptance_rate_at_depth": (accepted / np.maximum(proposed, 1)).tolist(),
            "extra_parameters": bundles[row.bundle].extra_parameters,
            "extra_bytes": size(row.bundle) - size(PLAIN),
        }
        if row.options["temperature"] == 0:
            texts, ties, gaps = differences(engines[PLAIN], prompts, plain.tokens, o.tokens, tie)
            figures |= {"different_texts": texts, "near_ties": ties, "near_tie_below": tie, "gaps": gaps}
        elif row.options.get("draft_choice", "argmax") == "argmax":  # the same draws, so the same text
            figures["different_texts"] = sum(a != b for a, b in zip(o.tokens, plain.tokens, strict=True))
        summary[row.name] = figures
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Return the summary as a Markdown table."""
    lines = [
        "| drafter | tokens/pass | accepted at depth 1, 2, … | tokens/s ÷ plain | extra parameters | extra MB "
        "| texts not plain's (at near ties) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, f in summary.items():
        rates = " ".join(f"{rate:.2f}" for rate in f["acceptance_rate_at_depth"]) or "–"
        value, low, high = f["speed_ratio"]
        texts = str(f["different_texts"]) if "different_texts" in f else "another draw"
        texts += f" ({f['near_ties']})" if f.get("different_texts") and "near_ties" in f else ""
        lines.append(
            f"| {name} | {f['tokens_per_pass'][0]:.2f} | {rates} | {value:.2f} [{low:.2f}, {high:.2f}] "
            f"| {f['extra_parameters']:,} | {f['extra_bytes'] / 1e6:.1f} | {texts} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_CHECKPOINT, help="checkpoint (default: the package's)")
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=CHECKPOINT", help="one more joint head on the same base"
    )
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--confidence", type=float, default=0.3, help="of the rows with a cut-off (default: 0.3)")
    parser.add_argument("--rows", default="", metavar="REGEX", help="run the plain rows and those that match alone")
    add_chat(parser)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    also = {name: Path(path) for name, _, path in (text.partition("=") for text in arguments.also)}
    with tempfile.TemporaryDirectory() as folder:
        bundles = export_all(arguments.model, also, Path(folder))
        engines = {name: Engine(bundle.folder, threads=arguments.threads) for name, bundle in bundles.items()}
        wanted = re.compile(arguments.rows)
        rows = [
            row for row in decodings(bundles, arguments.confidence) if row.bundle == PLAIN or wanted.search(row.name)
        ]
        found = held_out_prompts(engines[PLAIN], arguments.prompts, arguments.prompt_tokens)
        prompts = [put(arguments, engines[PLAIN].bundle, prompt.turns[0]) for prompt in found]
        outcomes = run(engines, rows, prompts, arguments.new_tokens)
        summary = summarize(rows, outcomes, engines, bundles, prompts)
    machine = (
        f"{describe_machine()}; onnxruntime {import_onnxruntime().__version__}, Python {platform.python_version()}"
    )
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
