r"""Tokens a second and memory of training heads, by part, against the arithmetic of docs/scale.md.

    python benchmarks/scale.py --only 'bf16$' --merge
    python benchmarks/scale.py --table --docs

A small GPT-NeoX base with random weights and two further heads is trained for some steps: all of it, with a frozen base
and on cached states, in float32 and under autocast to bfloat16, as it is and with its decoder layers compiled
(`torch.compile`).  Every variant has a process of its own.  The table holds the measured rate of operations against
that of bare matrix products, and what the rates make of the hours that docs/scale.md counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import describe_machine
from page import put_between, wrapped
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from dynamo_model import MultiTokenModel
from dynamo_runtime.files import write_whole
from dynamo_train.cached import CachedHeads
from dynamo_train.objective import Objective
from dynamo_train.optimizers import make_optimizers
from dynamo_train.parallel import ModifiedCLM
from dynamo_train.recipe import Recipe
from dynamo_train.spread import compile_layers
from dynamo_train.states import cache_states
from dynamo_train.tokens import CorpusRecord, TokenStreams

RESULTS = Path(__file__).parent / "results" / "scale.json"
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
MARK = "benchmarks/scale.py --table --docs"
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
HEADS = 3
PAPER_RATE, PAPER_TOKENS = 9.93e9 / (896 * 3600), 9.93e9
"""Tokens a second and GPU at which the paper trained all of a 7.3B, and how many (docs/scale.md)."""
H100 = 989e12
"""Operations a second in dense bfloat16, NVIDIA's data sheet (SXM)."""
TRAINED, FROZEN, READ, CACHED, FEW = "all is trained", "frozen base", "cache is made", "on the cache", "… few words"


@dataclass(frozen=True)
class Shape:
    """Of a GPT-NeoX base.

    Attributes:
        hidden: H; a layer's matrices have 12 h² numbers.
        layers: L, of the base.
        words: V.
        few: Words of the draft vocabulary.
    """

    hidden: int
    layers: int
    words: int
    few: int = 8192

    def operations(self, mode: str) -> float:
        """Of a token, by docs/scale.md: 2 for every number forward, 2 for what goes in, 2 for the number itself."""
        layer, further = 12 * self.hidden**2, HEADS - 1
        heads, base = 6 * layer * further, layer * self.layers
        return {
            TRAINED: 6 * (base + layer * further + HEADS * self.words * self.hidden),
            FROZEN: 2 * base + heads + 4 * self.words * self.hidden * further,
            READ: 2 * (base + self.words * self.hidden),
            CACHED: heads + 4 * self.words * self.hidden * further,
            FEW: heads + 4 * self.few * self.hidden * further,
        }[mode]


SMALL = Shape(512, 4, 8192, 1024)
LARGE = {"1B": Shape(2048, 16, 50_304), "7B": Shape(4096, 32, 50_432)}
SEQUENCES, LENGTH = 4, 240
MODES = (TRAINED, FROZEN, READ, CACHED, FEW)


def variants() -> list[str]:
    """Mode, whether layers are compiled, precision."""
    return [
        f"{mode}{how}, {precision}"
        for mode in MODES
        for how in (("", ", compiled") if mode != READ else ("",))
        for precision in PRECISIONS
    ]


def recipe_of(precision: str) -> Recipe:
    """Of a batch that goes through the model at once."""
    rates: dict[str, Any] = {"base_lr": 1e-4, "heads_lr": 1e-4, "shared_gradient_scale": 1.0, "freeze_base": False}
    return Recipe(
        steps=1, sequences=SEQUENCES, length=LENGTH, micro_batch=SEQUENCES, optimizer="adamw", weight_decay=0.1,
        warmup=0.01, clip=1.0, precision=PRECISIONS[precision], seed=0, **rates,
    )  # fmt: skip


def measure(variant: str, steps: int, folder: Path) -> dict[str, Any]:
    """Of one variant, in a process of its own: seconds and bytes by part."""
    torch.manual_seed(0)
    mode, *compiled, precision = variant.split(", ")
    recipe = recipe_of(precision)
    config = GPTNeoXConfig(
        hidden_size=SMALL.hidden, num_hidden_layers=SMALL.layers, num_attention_heads=8, vocab_size=SMALL.words,
        intermediate_size=4 * SMALL.hidden, max_position_embeddings=LENGTH + HEADS,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    drawn = np.random.default_rng(0).integers(0, SMALL.words, (steps + 1) * SEQUENCES * LENGTH + 1).astype(np.uint16)
    held_out = drawn[: LENGTH + 1]
    streams = TokenStreams(drawn, held_out, CorpusRecord("random", 1, 0, 0, len(drawn), len(held_out), 0.0, ""))
    if mode in (READ, CACHED, FEW):
        start = time.perf_counter()
        states = cache_states(base, streams, recipe, folder)
        seconds = time.perf_counter() - start
        if mode == READ:
            tokens = sum(each.windows * each.length for each in states)
            return {"seconds_a_token": seconds / tokens, "bytes_a_token": sum(each.nbytes for each in states) / tokens}
    words = torch.arange(SMALL.few) if mode == FEW else None
    model = MultiTokenModel(base, HEADS, draft_vocabulary=words)
    if mode in (CACHED, FEW):
        objective: Objective = CachedHeads(model, *states, "kl")
    else:
        objective = ModifiedCLM(model, freeze_base=mode == FROZEN)
    if compiled:
        compile_layers(objective)
    return _trained(objective.train(), streams, recipe, steps)


def _trained(objective: Objective, streams: TokenStreams, recipe: Recipe, steps: int) -> dict[str, Any]:
    optimizers = make_optimizers(objective, kind="adamw", base_lr=1e-4, heads_lr=1e-4, weight_decay=0.1)
    times, saved = [], 0
    for step in range(steps + 1):
        batch = torch.from_numpy(objective.batch(streams, step, recipe))
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            if step == 0:
                saved, losses = _saved(objective, batch)
            else:
                losses = objective(batch)
        losses.sum().backward()
        if step == 0:
            gradients = _bytes([each.grad for each in objective.parameters() if each.grad is not None])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    moments = [value for each in optimizers for state in each.state.values() for value in state.values()]
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    tokens = recipe.sequences * recipe.length
    return {
        "seconds_a_token": statistics.median(times[1:]) / tokens,
        "first_step_seconds": times[0],
        "weights_bytes": _bytes(list(objective.parameters())),
        "gradients_bytes": gradients,
        "moments_bytes": _bytes([each for each in moments if each.ndim]),
        "activations_bytes_a_token": saved / tokens,
        "peak_bytes": 1024 * int(peak),
    }


def _bytes(tensors: list[Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def _saved(objective: nn.Module, batch: Tensor) -> tuple[int, Tensor]:
    """Return bytes that the way forward keeps of its tokens for the way back, every storage once; no weights."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim and tensor.shape[0] in (SEQUENCES, SEQUENCES * LENGTH):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = objective(batch)
    return sum(kept.values()), losses


def product_rate(precision: str) -> float:
    """Operations a second of bare matrix products of a layer's size."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows, weight = torch.ones(SEQUENCES * LENGTH, SMALL.hidden), torch.ones(4 * SMALL.hidden, SMALL.hidden)
    rows, weight, best = rows.to(dtype), weight.to(dtype), float("inf")
    for _ in range(20):
        start = time.perf_counter()
        F.linear(rows, weight)
        best = min(best, time.perf_counter() - start)
    return 2 * rows.shape[0] * weight.numel() / best


def table(results: dict[str, Any]) -> str:
    """Return what was measured, and the hours that come of it."""
    rows, products = results["variants"], results["products"]
    lines = [
        f"h {SMALL.hidden}, L {SMALL.layers}, V {SMALL.words}, {SEQUENCES} sequences of {LENGTH}, T{HEADS}, "
        f"{results['machine']}; bare products: "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in products.items())
        + ".",
        "",
        "| | tokens/s | GFLOP/s, of bare products | compiled: tokens/s | first step |",
        "|---|---|---|---|---|",
    ]
    for mode in MODES:
        for precision in PRECISIONS:
            found, compiled = (rows.get(f"{mode}{how}, {precision}") for how in ("", ", compiled"))
            if found is None:
                continue
            rate = SMALL.operations(mode) / found["seconds_a_token"]
            cells = [f"{mode}, {precision}", f"{1 / found['seconds_a_token']:,.0f}"]
            cells.append(f"{rate / 1e9:.0f}, {rate / products[precision]:.0%}")
            if compiled is None:
                cells += ["", ""]
            else:
                gain = found["seconds_a_token"] / compiled["seconds_a_token"]
                cells += [f"{1 / compiled['seconds_a_token']:,.0f} ({gain:.2f} ×)"]
                cells += [f"{compiled['first_step_seconds']:.0f} s"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_memory(rows), "", *_hours(rows)])


def _memory(rows: dict[str, Any]) -> list[str]:
    """Return bytes by part, counted and measured."""
    h, layer = SMALL.hidden, 12 * SMALL.hidden**2
    lines = ["| MB | weights | gradients | moments | activations: bytes / h a layer and token | peak, process |"]
    lines.append("|---|---|---|---|---|---|")
    for mode in (TRAINED, FROZEN, CACHED, FEW):
        for precision in PRECISIONS:
            found = rows.get(f"{mode}, {precision}")
            if found is None:
                continue
            new = 2 * layer + (layer * SMALL.layers + 2 * SMALL.words * h if mode == TRAINED else 0)
            layers = HEADS - 1 + (SMALL.layers if mode == TRAINED else 0)
            counted = 4 * (layer * (SMALL.layers + 2) + 2 * SMALL.words * h), 4 * new, 8 * new
            parts = (found[f"{name}_bytes"] for name in ("weights", "gradients", "moments"))
            cells = [f"{mode}, {precision}"]
            cells += [f"{part / 1e6:.0f} ({a / 1e6:.0f} by count)" for part, a in zip(parts, counted, strict=True)]
            cells += [f"{found['activations_bytes_a_token'] / (h * layers):.0f}", f"{found['peak_bytes'] / 1e6:,.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _hours(rows: dict[str, Any]) -> list[str]:
    """Hours for the paper's tokens, from its own rate and from rates of modes against each other as measured."""
    lines = ["| 9.93 G tokens | rate of operations against all trained | tokens/s a GPU | hours on one | on eight |"]
    lines.append("|---|---|---|---|---|")
    slow = PAPER_RATE * LARGE["7B"].operations(TRAINED)
    whole = SMALL.operations(TRAINED) / rows[f"{TRAINED}, bf16"]["seconds_a_token"]
    for size, shape in LARGE.items():
        for mode in MODES:
            share = SMALL.operations(mode) / rows[f"{mode}, bf16"]["seconds_a_token"] / whole
            rates = [share * rate / shape.operations(mode) for rate in (slow, 0.4 * H100)]
            hours = [PAPER_TOKENS / rate / 3600 for rate in rates]
            cells = [f"{size}, {mode}", f"{share:.2f}", " – ".join(f"{rate:,.0f}" for rate in rates)]
            cells += [" – ".join(f"{each / n:.3g}" for each in hours) for n in (1, 8)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="variants to measure")
    parser.add_argument("--steps", type=int, default=5, help="timed, behind one that is not (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--merge", action="store_true", help="add to the results there, in place of those alike")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the tables of --json")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/scale.md as well")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if arguments.variant:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.variant, arguments.steps, Path(folder))))
        return
    if not arguments.table:
        old = json.loads(arguments.json.read_text()) if arguments.merge and arguments.json.is_file() else {}
        results = {"machine": describe_machine(), "products": {}, "variants": old.get("variants", {})}
        results["products"] = {precision: product_rate(precision) for precision in PRECISIONS}
        for name in variants():
            if re.search(arguments.only, name):
                command = [sys.executable, __file__, "--variant", name, "--steps", str(arguments.steps)]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                results["variants"][name] = json.loads(said.splitlines()[-1])
                print(name, json.dumps(results["variants"][name]), flush=True)
                write_whole(arguments.json, json.dumps(results, indent=1) + "\n")
    found = table(json.loads(arguments.json.read_text()))
    print(found)
    if arguments.docs:
        write_whole(PAGE, put_between(PAGE.read_text(), MARK, wrapped(found)))


if __name__ == "__main__":
    main()
