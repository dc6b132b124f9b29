r"""What pays in training heads on a frozen base: every variant on the same states for the same steps, in one table.

    python benchmarks/training.py smollm2 --data train/corpora/smollm2 --work FOLDER --steps 400 --json results.json
    python benchmarks/training.py --render benchmarks/results/training_smollm2.json

CORPUS is text of the model's own (`dynamo-train texts`).  A run that was interrupted goes on; variants that are done
are not run again.  `--only REGEX` takes some.  Figures are of held-out text (docs/training.md says what each means).

The second line prints the table of docs/training.md.  Those results are of a driver of their own, which kept the states
in the memory of one NVIDIA H200, and went by this package's objective, optimizers, schedule and order of windows; the
last variants of it are of code that did not pay and is not in the package.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from dynamo_model.checkpoint import load_base, load_tokenizer
from dynamo_model.sources import find_checkpoint
from dynamo_runtime.files import write_whole
from dynamo_runtime.tables import Table
from dynamo_train.drafter import Start
from dynamo_train.known import KNOWN_DRAFTERS
from dynamo_train.loop import train
from dynamo_train.parallel import TokenHeads
from dynamo_train.precision import fastest_precision
from dynamo_train.recipe import Recipe
from dynamo_train.tokens import tokenize_corpus

SMOLLM2 = KNOWN_DRAFTERS["smollm2"]
STANDARD = SMOLLM2.heads
RATE = 1e-3
"""Of all variants that name none."""
VARIANTS: dict[str, tuple[TokenHeads, dict[str, Any]]] = {
    "KL, copied layers, told": (STANDARD, {}),
    "… rate 2e-3": (STANDARD, {"heads_lr": 2e-3}),
    "… rate 4e-3": (STANDARD, {"heads_lr": 4e-3}),
    "… Muon 3e-3": (STANDARD, {"optimizer": "muon", "heads_lr": 3e-3}),
    "… cross-entropy": (replace(STANDARD, loss="ce"), {}),
    "… random layers": (replace(STANDARD, init="random"), {}),
    "… not told": (replace(STANDARD, condition=False), {}),
    "… all words": (replace(STANDARD, draft_vocab=None), {}),
}


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="smollm2")
    parser.add_argument("--data")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sequences", type=int, default=SMOLLM2.recipe.sequences)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", default="", help="regular expression for names of variants")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--render", type=Path, metavar="JSON", help="print the table of such results, and run nothing")
    arguments = parser.parse_args()
    if arguments.render:
        print(table(json.loads(arguments.render.read_text(encoding="utf-8"))["variants"]))
        return
    if arguments.data is None or arguments.work is None:
        parser.error("give --data and --work, or --render")
    recipe = replace(
        SMOLLM2.recipe,
        steps=arguments.steps,
        sequences=arguments.sequences,
        micro_batch=arguments.sequences,
        length=arguments.length,
        heads_lr=RATE,
        precision=fastest_precision(),
        validate_every=0,
    )
    rows = {}
    for name, (heads, changes) in VARIANTS.items():
        if re.search(arguments.only, name):
            rows[name] = _figures(name, heads, replace(recipe, **changes), arguments)
    result = {
        "machine": describe_machine(),
        "versions": {"torch": torch.__version__},
        "steps": arguments.steps,
        "sequences": arguments.sequences,
        "length": arguments.length,
        "tokens_seen": arguments.steps * arguments.sequences * arguments.length,
        "precision": recipe.precision,
        "variants": rows,
    }
    if arguments.json:
        write_whole(arguments.json, json.dumps(result, indent=1) + "\n")
    print(table(rows))


def _figures(name: str, heads: TokenHeads, recipe: Recipe, arguments: argparse.Namespace) -> dict[str, float]:
    """Of one variant, trained if it is not yet; its name and settings name its folder."""
    folder = arguments.work / "runs" / re.sub(r"\W+", "-", f"{name} {recipe.steps}").strip("-")
    done = folder / "figures.json"
    if not done.is_file():
        checkpoint = find_checkpoint(arguments.base)
        tokenizer = load_tokenizer(checkpoint)
        streams = tokenize_corpus(
            arguments.data, tokenizer.backend_tokenizer, tokenizer.eos_token_id, 6.0, arguments.work / "tokens"
        )
        torch.manual_seed(recipe.seed)
        objective = heads.objective(Start(checkpoint, load_base(checkpoint), lambda: streams, arguments.work), recipe)
        start = time.process_time()
        outcome = train(objective, streams, recipe, folder)
        found = outcome.figures | {"processor_seconds": time.process_time() - start}
        write_whole(done, json.dumps(found, indent=1) + "\n")
    figures: dict[str, float] = json.loads(done.read_text())
    return figures


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return greedy tokens a pass, by the text and at each depth; where they were judged, on answers to new prompts."""
    first = next(iter(rows.values()))
    heads = sorted(int(key.removeprefix("greedy_")) for key in first if re.match(r"greedy_\d", key))
    tasks = list(first.get("tasks", {}))
    header = ["heads", "tokens a pass, greedy", "… of the text", *(f"greedy at depth {i}" for i in heads), *tasks]
    lines = []
    for name, figures in rows.items():
        cells = [f"{figures['greedy_tokens_a_pass']:.3f}", f"{figures['tokens_a_pass']:.3f}"]
        cells += [f"{figures[f'greedy_{i}']:.3f}" for i in heads]
        lines.append([name, *cells, *(f"{figures['tasks'][task]:.2f}" for task in tasks)])
    return Table("Held-out text", header, lines).markdown()


if __name__ == "__main__":
    main()
