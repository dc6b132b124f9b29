"""Where a pass of a bundle spends its time: its operators' own times, as onnxruntime's profile has them.

Used by rows.py.  Noting times slows small operators down, so the times are shares of a pass and not a pass.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from dynamo_runtime import ALL, NONE, Bundle, Engine
from dynamo_runtime.profiling.roofline import read_bandwidth

PAST, WARM = 64, 3
READ_SECONDS, READ_BYTES = 1.0, 1 << 28
SUFFIX = "_kernel_time"


def operators(bundle: Bundle, threads: int, widths: Iterable[int], rounds: int) -> list[dict[str, Any]]:
    """Return the times of a pass by kind of operator, products by their shape, the most expensive first.

    Returns:
        Of every kind: name, how many of them, bytes of weights they read, milliseconds of a pass by width
        (medians), and, for all of them, bytes a second that these threads can read from memory.
    """
    weights = weight_bytes(str(bundle.graph_path))
    bandwidth = read_bandwidth(threads, READ_SECONDS, READ_BYTES)
    times: dict[str, dict[str, float]] = defaultdict(dict)
    count: Counter[str] = Counter()
    read: Counter[str] = Counter()
    for m in widths:
        passes = profile(bundle, threads, m, rounds)
        kinds = {event["name"]: kind(event) for event in passes[0]}
        count, read = Counter(kinds.values()), Counter()
        for name, each in kinds.items():
            read[each] += weights.get(name.removesuffix(SUFFIX), 0)
        for each in count:
            spent = [sum(event["dur"] for event in one if kinds[event["name"]] == each) for one in passes]
            times[each][str(m)] = float(np.median(spent)) / 1e3
    first = next(iter(times.values()))
    order = sorted(times, key=lambda name: -times[name][next(iter(first))])
    return [
        {"way": name, "count": count[name], "bytes": read[name], "ms": times[name], "bandwidth": bandwidth}
        for name in order
    ]


def profile(bundle: Bundle, threads: int, m: int, rounds: int) -> list[list[dict[str, Any]]]:
    """Return the kernels' events of every pass over m rows, behind `PAST` positions."""
    text = np.random.default_rng(0).integers(1, bundle.vocab_size, PAST + m).tolist()
    with tempfile.TemporaryDirectory() as folder:
        session = Engine(bundle, provider="cpu", threads=threads, profile_prefix=str(Path(folder) / "ort")).session
        session.step(text[:PAST], heads=NONE)
        for _ in range(WARM + rounds):
            session.step(text[PAST:], rows=ALL, heads=NONE)
            session.cache.rollback(PAST)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(SUFFIX)]
    of_node: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in sorted(kernels, key=lambda event: event["ts"]):
        of_node[event["name"]].append(event)
    first = 1 + WARM  # behind the prompt's pass, and those that warm up
    return [[runs[first + turn] for runs in of_node.values() if len(runs) > first + turn] for turn in range(rounds)]


def kind(event: dict[str, Any]) -> str:
    """Return what an operator is called in the table: a product by its inputs and outputs."""
    name: str = event["args"]["op_name"]
    if name != "MatMulNBits":
        return name
    inputs, outputs = (next(iter(event["args"][f"{way}_type_shape"][0].values()))[-1] for way in ("input", "output"))
    return f"product, {inputs:,} → {outputs:,}"


def weight_bytes(path: str) -> dict[str, int]:
    """Return the bytes of weights and scales that every product of a graph reads, by the node's name."""
    found = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            numbers = given["K"] * given["N"]
            found[node.name] = numbers * given["bits"] // 8 + 4 * numbers // given["block_size"]
    return found
