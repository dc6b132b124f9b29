"""Does every drafter write plain decoding's text?  On prompts of ours, in one command for all precisions.

    python benchmarks/proofs.py fp32=BUNDLE int8=BUNDLE int4=BUNDLE [--prompts N] [--new-tokens N] [--json FILE]

On every bundle, drafters that it can have (lookup, its own, both) draft in every pass (`speculative`), and `auto` as it
likes.  Every prompt of `benchmarks/prompts` is a user's turn, answered greedily and at temperature 0.7 with the same
seed; plain decoding is `autoregressive` on the same bundle.  A greedy text that differs is told apart by whether it
parts from plain's at a near tie: where the two largest logits are closer than twice the largest difference that passes
of several tokens make to a logit.  The exit status is 1 if a text differs otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

from machine import describe_machine
from same_text import Said, by_depth, differences, pass_difference
from tasks import DECODING, LEAST_TOKENS, TASKS, TIE_PROMPTS, named, prompts_of
from tqdm import tqdm

from dynamo_runtime import Engine, Lookup
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.files import write_whole
from dynamo_runtime.providers import import_onnxruntime
from dynamo_runtime.registry import BOTH, can_draft
from dynamo_runtime.tables import Table

PASS_WIDTH = 16  # rows: lookup's longest drafts and the token in front of them


def ways(engine: Engine) -> dict[str, dict[str, Any]]:
    """Options of every way to draft on a bundle, by name."""
    kind = engine.bundle.topology.kind
    drafters = [Lookup.name, *((kind, BOTH) if can_draft(engine.bundle) else ())]
    found: dict[str, dict[str, Any]] = {name: {"strategy": "speculative", "drafter": name} for name in drafters}
    return found | {"auto": {"strategy": "auto"}}


def prove(engine: Engine, decoding: str, prompts: list[list[int]], new_tokens: int, tie: float) -> list[dict[str, Any]]:
    """Compare the texts of every way with plain decoding's: a row each."""
    found = ways(engine)
    texts: dict[str, list[list[int]]] = {name: [] for name in found}
    accepted: dict[str, list[list[int]]] = {name: [] for name in found}
    answered, expected = list[Said](), list[list[int]]()
    for seed, prompt in enumerate(tqdm(prompts, desc=decoding, leave=False, disable=None)):
        options = DECODING[decoding] | {"seed": seed}
        engine.reset()
        plain = engine.generate(prompt, strategy="autoregressive", max_new_tokens=new_tokens, **options).tokens
        if len(plain) < LEAST_TOKENS:
            continue
        answered.append(prompt)
        expected.append(plain)
        for name, way in found.items():
            engine.reset()
            written = engine.generate(prompt, max_new_tokens=len(plain), ignore_eos=True, **options, **way)
            texts[name].append(written.tokens)
            accepted[name].append(written.statistics.accepted_at_depth)
    rows = []
    for name in found:
        row = {"drafter": name, "decoding": decoding, "texts": len(answered), "tokens": sum(map(len, expected))}
        row |= {"accepted": int(by_depth(accepted[name]).sum())}
        if decoding == "greedy":
            row["different"], row["near_ties"], row["gaps"] = differences(engine, answered, expected, texts[name], tie)
        else:
            row["different"] = sum(a != b for a, b in zip(expected, texts[name], strict=True))
        rows.append(row)
    return rows


def table(bundles: dict[str, list[dict[str, Any]]]) -> Table:
    """Return a row for every bundle, drafter and decoding."""
    columns = [
        "bundle",
        "drafter",
        "decoding",
        "texts",
        "tokens",
        "drafts accepted",
        "texts not plain's (at near ties)",
    ]
    rows = []
    for bundle, proofs in bundles.items():
        for row in proofs:
            different = str(row["different"]) + (f" ({row['near_ties']})" if row.get("near_ties") else "")
            counts = [f"{row[name]:,}" for name in ("texts", "tokens", "accepted")]
            rows.append([bundle, row["drafter"], row["decoding"], *counts, different])
    return Table("Texts of every drafter against plain decoding's", columns, rows)


def main(argv: list[str] | None = None) -> int:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=named, metavar="[NAME=]BUNDLE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help="default: all")
    parser.add_argument("--prompts", type=int, metavar="N", help="of every task, spread evenly (default: all)")
    parser.add_argument("--new-tokens", type=int, default=96, help="most of an answer (default: 96)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args(argv)
    bundles: dict[str, list[dict[str, Any]]] = {}
    try:
        for name, folder in arguments.bundles:
            with Engine(folder, threads=arguments.threads) as engine:
                tie = 2 * pass_difference(engine, [*prompts_of("chat", engine, TIE_PROMPTS)], PASS_WIDTH)
                prompts = [each for task in arguments.tasks for each in prompts_of(task, engine, arguments.prompts)]
                bundles[name] = [
                    row for decoding in DECODING for row in prove(engine, decoding, prompts, arguments.new_tokens, tie)
                ]
    except DynamoError as error:
        print(f"proofs: error: {error}", file=sys.stderr)
        return 1
    runtime = f"onnxruntime {import_onnxruntime().__version__}, Python {platform.python_version()}"
    machine = f"{describe_machine()}; {runtime}"
    print(f"{table(bundles).markdown()}\n\nUp to {arguments.new_tokens} tokens an answer. {machine}.")
    if arguments.json:
        content = {"machine": machine, "new_tokens": arguments.new_tokens, "bundles": bundles}
        write_whole(arguments.json, json.dumps(content, indent=1) + "\n")
    proofs = [row for of_bundle in bundles.values() for row in of_bundle]
    return int(any(row["different"] > row.get("near_ties", 0) for row in proofs))


if __name__ == "__main__":
    sys.exit(main())
