"""What drafting gives by task: tokens a pass and wall clock over plain decoding, on prompts of ours.

    python benchmarks/tasks.py [NAME=]BUNDLE… [--plain [NAME=]BUNDLE…] [--dynamo] [--prompts N] [--json FILE]

For example, `int8=multi-int8 int4=multi-int4 --plain int8=plain-int8`.  Of every task in `benchmarks/prompts`, every
prompt is a user's turn, answered greedily and at temperature 0.7.  Plain decoding says first, off the clock, how long
the answer is (up to its end, or --new-tokens); then plain and all strategies write that many tokens, in an order that
rotates from prompt to prompt, so that a drift of the machine's speed falls on all alike.  "Plain" is the bundle of the
same name under --plain, the same model exported with `--heads 0`, or else `autoregressive` on the bundle itself, which
is as good where further heads have a graph of their own.  `auto` plans by the profile that `dynamo-profile` has kept of
the bundle, or by one that is measured first; on a bundle with heads it is also run with one of its two drafters alone.
`dynamo` (--dynamo) verifies nothing, writes other texts, and is run at temperature 0.7 alone: greedily its heads are
certain, and nothing is backed off from.

Columns: tokens a pass; share of the drafts at depth 1, 2, … that became text (one behind a rejected one did not);
tokens/s behind the first pass over that of plain decoding; texts that are not plain's, and how many of them part from
it at a near tie: where the two largest logits are closer than twice the largest difference that passes of several
tokens make to a logit.  Brackets hold 95 % bootstrap intervals over the prompts.

A pass over one row waits for memory, one over several for arithmetic, and on a machine that is shared the two slow down
apart from each other, for seconds or hours.  So what a pass over four rows costs in units of one over one is measured
whenever prompts of a task begin, and stands in the results.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from ratios import interval, ratio, speed_ratio
from same_text import Said, by_depth, differences, pass_difference
from tqdm import tqdm

from dynamo_evaluate.prompts import load_prompts
from dynamo_runtime import Backend, Bundle, Engine, Generation, load_bundle
from dynamo_runtime.chat import asked
from dynamo_runtime.errors import DynamoError, ParameterError
from dynamo_runtime.files import write_whole
from dynamo_runtime.parameters import FIRST_TOKENS
from dynamo_runtime.profiling.measure import FULL, QUICK, measure
from dynamo_runtime.profiling.passes import PassTimer
from dynamo_runtime.providers import import_onnxruntime
from dynamo_runtime.selection import refusal

PROMPTS = Path(__file__).parent / "prompts"
TASKS = ("chat", "code", "prose", "edit", "json")
PLAIN = "plain"
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.0},
    "T 0.7": {"temperature": 0.7, "top_k": 50, "repetition_penalty": 1.0},
}
LEAST_TOKENS = 8  # of an answer: shorter ones are over before decoding has begun
TIE_PROMPTS = 20
SEVERAL, PAST, PASSES = 4, 64, 20  # rows of the pass whose cost is noted, positions in front of it, and how often


@dataclass(frozen=True)
class Way:
    """A way to decode: a strategy with its options, on the plain engine or on that of the bundle."""

    name: str
    options: dict[str, Any]

    @property
    def lossless(self) -> bool:
        """Whether it writes plain decoding's text, rounding aside."""
        return self.options["strategy"] != "dynamo"


@dataclass
class Outcome:
    """What one way did on every prompt: lists [prompts]."""

    tokens: list[list[int]] = field(default_factory=list)
    decoded: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    proposed: list[list[int]] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)

    def add(self, generation: Generation) -> None:
        """One prompt: what came behind the first pass, which is the prompt's."""
        statistics = generation.statistics
        self.tokens.append(generation.tokens)
        self.decoded.append(statistics.new_tokens - statistics.first_tokens)
        self.passes.append(statistics.rounds - 1)
        self.seconds.append(statistics.total_s - statistics.ttft_s)
        self.proposed.append(statistics.proposed_at_depth)
        self.accepted.append(statistics.accepted_at_depth)


def ways(engine: Engine, decoding: str, dynamo: bool, threshold: float) -> list[Way]:
    """Plain decoding and all that is compared with it; what cannot run on the bundle is left out."""
    sampling = DECODING[decoding]
    found = [Way(PLAIN, sampling | {"strategy": "autoregressive"})]
    found += [Way(name, sampling | {"strategy": name}) for name in ("speculative", "auto")]
    if engine.bundle.topology.parts:  # who of the two drafters `auto` has it from
        alone = {"heads": engine.bundle.topology.kind, "lookup": "lookup"}
        found += [Way(f"auto, {name} alone", found[-1].options | {"drafter": each}) for name, each in alone.items()]
    if dynamo and decoding != "greedy":
        mask = {} if engine.bundle.has_cooccurrence else {"cooccurrence_weight": 0.0}
        options = sampling | mask | {"strategy": "dynamo", "backoff_threshold": threshold}
        found += [Way(f"dynamo, first token {each}", options | {"first_token": each}) for each in FIRST_TOKENS]
    possible = []
    for way in found:
        given = {name: value for name, value in way.options.items() if name not in ("strategy", "drafter")}
        if reason := refusal(way.options["strategy"], engine.bundle, given, way.options.get("drafter")):
            print(f"tasks: note: left out, {way.name}: {reason}", file=sys.stderr)
        else:
            possible.append(way)
    return possible


def question(engine: Engine, prompt: str) -> list[int]:
    """Return the tokens of a user's turn."""
    return engine.bundle.chat_template.encode(asked(prompt, None), engine.bundle.control_tokens).encoded.ids


def prompts_of(task: str, engine: Engine, count: int | None) -> list[list[int]]:
    """Return the tokens of a task's prompts: all, or so many that are spread evenly over the file."""
    every = load_prompts(str(PROMPTS / f"{task}.jsonl"), engine)
    count = min(count or len(every), len(every))
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, count).round().astype(int)]
    return [question(engine, prompt.turns[0]) for prompt in chosen]


def run(
    multi: Engine, plain: Engine, found: list[Way], prompts: list[list[int]], new_tokens: int, label: str
) -> tuple[list[Said], dict[str, Outcome]]:
    """Run every way on every prompt, interleaved.

    Returns the prompts with answers to measure, and outcomes by way.
    """

    def generate(way: Way, prompt: list[int], seed: int, tokens: int, to_the_end: bool) -> Generation:
        engine = plain if way.name == PLAIN else multi
        engine.reset()
        return engine.generate(prompt, max_new_tokens=tokens, seed=seed, ignore_eos=not to_the_end, **way.options)

    outcomes = {way.name: Outcome() for way in found}
    answered: list[Said] = []
    for way in found:  # warm-up, not counted
        generate(way, prompts[0], 0, LEAST_TOKENS, to_the_end=False)
    for seed, prompt in enumerate(tqdm(prompts, desc=label, leave=False, disable=None)):
        length = len(generate(found[0], prompt, seed, new_tokens, to_the_end=True).tokens)
        if length < LEAST_TOKENS:
            continue
        answered.append(prompt)
        shift = seed % len(found)
        for way in found[shift:] + found[:shift]:
            outcomes[way.name].add(generate(way, prompt, seed, length, to_the_end=False))
    return answered, outcomes


def cost_of_rows(engine: Engine) -> float:
    """Return what a pass over several rows costs at this moment, in units of one over one row."""
    timer = PassTimer(engine.session)
    timer.behind(PAST)
    taken = [[timer.step(rows, heads=False)[0] for rows in (SEVERAL, 1)] for _ in range(PASSES)]
    several, one = np.median(taken, axis=0)
    return float(several / one)


def summarize(
    found: list[Way], outcomes: dict[str, Outcome], plain: Engine, prompts: list[Said], decoding: str, tie: float
) -> list[dict[str, Any]]:
    """Return the figures of one task and one decoding, a row a way."""
    base = outcomes[PLAIN]
    rows = []
    for way in found:
        outcome = outcomes[way.name]
        proposed, accepted = by_depth(outcome.proposed), by_depth(outcome.accepted)
        row: dict[str, Any] = {
            "way": way.name,
            "tokens_per_pass": interval(ratio, outcome.decoded, outcome.passes),
            "tokens_per_s": sum(outcome.decoded) / sum(outcome.seconds),
            "speed_ratio": interval(speed_ratio, outcome.decoded, outcome.seconds, base.decoded, base.seconds),
            "proposed_at_depth": proposed.tolist(),
            "accepted_at_depth": accepted.tolist(),
        }
        if way.lossless and decoding == "greedy":
            texts, ties, gaps = differences(plain, prompts, base.tokens, outcome.tokens, tie)
            row |= {"different_texts": texts, "near_ties": ties, "near_tie_below": tie, "gaps": gaps}
        elif way.lossless:
            row["different_texts"] = sum(a != b for a, b in zip(outcome.tokens, base.tokens, strict=True))
        rows.append(row)
    return rows


def check_alike(name: str, multi: Bundle, plain: Bundle) -> None:
    """See that two bundles have the same base at the same precision, so that both write the same texts.

    Raises:
        ParameterError: They have not.
    """

    def base(bundle: Bundle) -> dict[str, str]:
        stored = bundle.quantization
        if stored is None:
            return {"precision": bundle.precision}
        parts = {f"weights of {part}": ", ".join(forms) for part, forms in stored.parts.items() if part != "heads"}
        return {"precision": bundle.precision, "KV cache": stored.kv_cache, **parts}

    ours, theirs = base(multi), base(plain)
    for what, form in ours.items():
        if form != theirs.get(what):
            raise ParameterError(f"{name} and its plain bundle differ in {what}: {form} against {theirs.get(what)}")


def measured(arguments: argparse.Namespace, name: str, folder: Path, plain_folder: Path | None) -> Iterator[Any]:
    """Yield the rows of one bundle, task by task."""
    bundle = load_bundle(folder)
    if plain_folder:
        check_alike(name, bundle, load_bundle(plain_folder))
    with Engine(bundle, threads=arguments.threads) as multi:
        if multi.profile is None:
            effort = QUICK if arguments.quick else FULL
            multi.profile = measure(bundle, Backend(threads=arguments.threads), effort=effort)
        plain = Engine(plain_folder, threads=arguments.threads) if plain_folder else multi
        ties: list[Said] = [*prompts_of("chat", plain, TIE_PROMPTS)]
        width = bundle.topology.n_tokens
        tie = 2 * max(pass_difference(engine, ties, width) for engine in {multi, plain})
        for task in arguments.tasks:
            prompts = prompts_of(task, plain, arguments.prompts)
            for decoding in DECODING:
                found = ways(multi, decoding, arguments.dynamo, arguments.threshold)
                label = f"{name}, {task}, {decoding}"
                four_rows = cost_of_rows(plain)
                answered, outcomes = run(multi, plain, found, prompts, arguments.new_tokens, label)
                if not answered:
                    print(f"tasks: note: {label}: no answer has {LEAST_TOKENS} tokens", file=sys.stderr)
                    continue
                of_all = {"bundle": name, "precision": bundle.precision, "task": task, "decoding": decoding}
                of_all |= {"prompts": len(answered), "tokens": sum(map(len, outcomes[PLAIN].tokens))}
                of_all["four_rows"] = four_rows
                for row in summarize(found, outcomes, plain, answered, decoding, tie):
                    yield of_all | row
        if plain is not multi:
            plain.close()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| bundle | task | decoding | strategy | tokens/pass | accepted at depth 1, 2, … | ÷ plain "
        "| texts not plain's (at near ties) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rates = [f"{a / p:.2f}" for a, p in zip(row["accepted_at_depth"], row["proposed_at_depth"], strict=True) if p]
        texts = f"{row['different_texts']} of {row['prompts']}" if "different_texts" in row else "others"
        texts += f" ({row['near_ties']})" if row.get("near_ties") else ""
        value, low, high = row["speed_ratio"]
        cells = [row["bundle"], row["task"], row["decoding"], row["way"], f"{row['tokens_per_pass'][0]:.2f}"]
        cells += [" ".join(rates) or "–", f"{value:.2f} [{low:.2f}, {high:.2f}]", texts]
        if row["way"] == PLAIN:
            cells[-2:] = [f"1 ({row['tokens_per_s']:.0f} tokens/s)", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def named(text: str) -> tuple[str, Path]:
    """`NAME=FOLDER`, or a folder that has its own name."""
    name, equals, folder = text.partition("=")
    return (name, Path(folder)) if equals else (Path(text).name, Path(text))


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=named, metavar="[NAME=]BUNDLE")
    parser.add_argument("--plain", nargs="+", type=named, default=[], metavar="[NAME=]BUNDLE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help="default: all")
    parser.add_argument("--prompts", type=int, metavar="N", help="of every task, spread evenly (default: all)")
    parser.add_argument("--new-tokens", type=int, default=128, help="most of an answer (default: 128)")
    parser.add_argument("--dynamo", action="store_true", help="strategy dynamo besides, with both first-token rules")
    parser.add_argument("--threshold", type=float, default=0.5, help="dynamo's ε_b (default: 0.5)")
    parser.add_argument("--quick", action="store_true", help="a quick profile, where none is kept")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write all figures there, after every task anew")
    arguments = parser.parse_args(argv)
    plain = dict(arguments.plain)
    if unknown := sorted(plain.keys() - dict(arguments.bundles).keys()):
        parser.error(f"--plain {unknown[0]} goes with no bundle: give both the same name")
    if len(dict(arguments.bundles)) < len(arguments.bundles):
        parser.error("two bundles have the same name: write NAME=BUNDLE")
    machine = (
        f"{describe_machine()}; onnxruntime {import_onnxruntime().__version__}, Python {platform.python_version()}"
    )
    rows: list[dict[str, Any]] = []
    for name, folder in arguments.bundles:
        try:
            for row in measured(arguments, name, folder, plain.get(name)):
                rows.append(row)
                if arguments.json:
                    content = {"machine": machine, "new_tokens": arguments.new_tokens, "threads": arguments.threads}
                    content |= {"profile": "quick" if arguments.quick else "full or kept", "rows": rows}
                    write_whole(arguments.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        except DynamoError as error:
            print(f"tasks: error: {error}", file=sys.stderr)
            return 1
    print(table(rows))
    print(f"\nUp to {arguments.new_tokens} tokens an answer. {machine}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
