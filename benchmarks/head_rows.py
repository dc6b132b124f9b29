"""Where further heads are best computed: what a verified round costs with them inside the pass, and beside it.

    python benchmarks/head_rows.py BUNDLE… [--past N] [--json FILE]
    python benchmarks/head_rows.py --table JSON

BUNDLE is one with parallel heads.  Which row of a pass drafts begin at is known only once its first head has been
judged.  Its two graphs are put together in the ways that there are:

- *inside*: heads at all rows of the pass, whose words come from one product with the first head's (format 3);
- *a*: the heads' layers at all rows of the pass, and the words of the accepted row from a graph of their own;
- *b*: the pass is the plain one; layers and words of accepted rows in a graph of their own (what bundles hold);
- *c*: one graph that finds the accepted row itself, by comparing its own greedy choices with the drafts it was fed.

Heads that are told the token in front are worked out draft by draft, and only b can do that. Their drafts are also made
one and two a round, which is shown in a table of its own.

All ways run in turn, behind so many positions, in passes over m tokens of which 1 … m are accepted in turn, and make
all the drafts there are.  Times are whole calls as Python sees them, medians, in units of the pass over one token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from machine import describe_machine
from onnx import TensorProto, helper, numpy_helper

from dynamo_runtime.bundle import Bundle, load_bundle
from dynamo_runtime.names import (
    HEAD_ROWS,
    HEAD_STATES,
    OUTPUTS,
    PAST,
    PENULTIMATE,
    PRESENT,
    TOPK_IDS,
    caches,
)
from dynamo_runtime.providers import Backend
from dynamo_runtime.session import Session
from dynamo_runtime.step import ALL, Last

MOST, CAPACITY = 5, 512
WAYS = ("plain", "inside", "a", "b", "c")


def joined(bundle: Bundle, *, draft: bool) -> onnx.ModelProto:
    """Return the base's graph and the heads' layers as one, and if wanted the words behind them.

    The layers' caches follow those of the base; the heads' words are `ahead_logits` and so on.
    """
    assert bundle.drafter is not None
    base = onnx.load(bundle.graph_path)
    further = onnx.load(bundle.folder / bundle.drafter.graph)
    graph, ahead = base.graph, further.graph
    renamed = {PENULTIMATE: PENULTIMATE, "attention_mask": "attention_mask"}
    layers = range(bundle.drafter.kv_layers)
    for prefix in (PAST, PRESENT):
        renamed |= dict(zip(caches(prefix, layers), caches(prefix, _behind(bundle)), strict=True))
    renamed |= {HEAD_ROWS: HEAD_ROWS, HEAD_STATES: HEAD_STATES, "": ""}

    def name(value: str) -> str:
        return renamed.get(value, f"ahead_{value}")

    words = [] if draft else behind(ahead, {HEAD_STATES})
    for node in ahead.node:
        if node in words:
            continue
        node.input[:] = [name(value) for value in node.input]
        node.output[:] = [name(value) for value in node.output]
        node.name = f"/ahead{node.name}"
        graph.node.append(node)
    for weight in ahead.initializer:
        weight.name = name(weight.name)
        graph.initializer.append(weight)
    there = {value.name for value in (*graph.input, *graph.output)}
    made = {value for node in graph.node for value in node.output}
    read = {value for node in graph.node for value in node.input}
    for source, target, kept in ((ahead.input, graph.input, read), (ahead.output, graph.output, made)):
        for value in source:
            value.name = name(value.name)
            if value.name not in there and value.name in kept and value.name != HEAD_STATES:
                target.append(value)
    return base


def behind(graph: onnx.GraphProto, values: set[str]) -> list[onnx.NodeProto]:
    """Return the nodes that depend on one of some values; they stand in the order in which they are run."""
    reached, found = set(values), []
    for node in graph.node:
        if reached & set(node.input):
            reached |= set(node.output)
            found.append(node)
    return found


def words_alone(bundle: Bundle) -> onnx.ModelProto:
    """From states of heads that are not conditioned to their words."""
    assert bundle.drafter is not None
    model = onnx.load(bundle.folder / bundle.drafter.graph)
    graph = model.graph
    nodes = behind(graph, {HEAD_STATES})
    shapes = [node for node in graph.node if node.op_type == "Reshape" and "blocks" in node.name]
    kept = [node for node in graph.node if node in nodes or node in shapes]
    del graph.node[:], graph.input[:]
    graph.node.extend(kept)
    graph.input.append(helper.make_tensor_value_info(HEAD_STATES, TensorProto.FLOAT, [1, "rows", None]))
    outputs = [value for value in graph.output if value.name in OUTPUTS]
    del graph.output[:]
    graph.output.extend(outputs)
    return model


def _behind(bundle: Bundle) -> range:
    """Numbers of the layers' caches behind the base's."""
    assert bundle.drafter is not None
    return range(bundle.kv_layers, bundle.kv_layers + bundle.drafter.kv_layers)


def inside(bundle: Bundle) -> onnx.ModelProto:
    """Heads at all rows, of all words, in one product with the first head's."""
    model = joined(bundle, draft=False)
    graph = model.graph
    product = next(node for node in graph.node if node.name == "/out/out_product")
    graph.node.insert(
        list(graph.node).index(product),
        helper.make_node("Concat", [product.input[0], HEAD_STATES], ["all_states"], axis=1),
    )
    product.input[0] = "all_states"
    graph.output.append(helper.make_tensor_value_info(HEAD_STATES, TensorProto.FLOAT, None))
    return _ordered(model)


def layers_inside(bundle: Bundle) -> onnx.ModelProto:
    """Return the layers at all rows; their states are put out."""
    model = joined(bundle, draft=False)
    model.graph.output.append(helper.make_tensor_value_info(HEAD_STATES, TensorProto.FLOAT, None))
    return _ordered(model)


def finding_the_row(bundle: Bundle) -> onnx.ModelProto:
    """Everything in one graph, heads at the row behind the last draft that the greedy choices agree with."""
    model = joined(bundle, draft=True)
    graph = model.graph
    graph.input.remove(next(value for value in graph.input if value.name == HEAD_ROWS))
    graph.initializer.remove(next(value for value in graph.initializer if value.name == HEAD_ROWS))
    constants = {"c_first": [0], "c_second": [1], "c_end": [2**62], "c_axis": [1], "c_last": [-1], "c_none": [0]}
    for name, numbers in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
    graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "c_along"))
    nodes = [
        helper.make_node("Slice", [TOPK_IDS, "c_first", "c_second", "c_last"], ["c_best"]),
        helper.make_node("Squeeze", ["c_best", "c_last"], ["c_choices"]),
        helper.make_node("Slice", ["c_choices", "c_first", "c_last", "c_axis"], ["c_judging"]),
        helper.make_node("Slice", ["input_ids", "c_second", "c_end", "c_axis"], ["c_drafts"]),
        helper.make_node("Equal", ["c_judging", "c_drafts"], ["c_right"]),
        helper.make_node("Not", ["c_right"], ["c_wrong"]),
        helper.make_node("Cast", ["c_wrong"], ["c_misses"], to=TensorProto.INT64),
        helper.make_node("CumSum", ["c_misses", "c_along"], ["c_missed"]),
        helper.make_node("Equal", ["c_missed", "c_none"], ["c_stands"]),
        helper.make_node("Cast", ["c_stands"], ["c_standing"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["c_standing"], ["c_accepted"], keepdims=0),
        helper.make_node("Reshape", ["c_accepted", "c_axis"], [HEAD_ROWS]),
    ]
    graph.node.extend(nodes)
    return _ordered(model)


def _ordered(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the nodes in an order in which they can be run."""
    graph = model.graph
    known = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    todo = list(graph.node)
    del graph.node[:]
    while todo:
        ready = [node for node in todo if known.issuperset(node.input)]
        if not ready:
            raise ValueError(f"nothing makes what {todo[0].name} reads")
        graph.node.extend(ready)
        known |= {value for node in ready for value in node.output}
        todo = [node for node in todo if node not in ready]
    return model


WHOLE = {"inside": inside, "a": layers_inside, "c": finding_the_row, "words": words_alone}
"""What graphs of other ways are made by; told heads can be put into none of them."""


class Whole:
    """A graph of ours with its caches bound in place, as the runtime binds them."""

    def __init__(self, model: onnx.ModelProto, folder: Path, bundle: Bundle, backend: Backend) -> None:
        folder.mkdir()
        onnx.save(model, folder / "model.onnx")
        self.session, _ = backend.start(folder / "model.onnx", bundle.precision)
        self.binding = self.session.io_binding()
        kinds = [each.type for each in self.session.get_inputs() if each.name.startswith(PAST)]
        layers, kind = range(len(kinds) // 2), np.int8 if "tensor(int8)" in kinds else np.float32
        shapes = {each.name: each.shape for each in self.session.get_inputs()}
        self.kept: list[np.ndarray] = []
        for past, present in zip(caches(PAST, layers), caches(PRESENT, layers), strict=True):
            shape = (1, shapes[past][1], CAPACITY, bundle.head_size)
            buffer = np.ones(shape, kind)
            self.kept.append(buffer)
            self.binding.bind_input(past, "cpu", 0, kind, shape, buffer.ctypes.data)
            self.binding.bind_output(present, "cpu", 0, kind, shape, buffer.ctypes.data)
        self.free = [o.name for o in self.session.get_outputs() if not o.name.startswith(f"{PRESENT}.")]
        self.first = len(self.kept)

    def run(self, **inputs: np.ndarray) -> dict[str, Any]:
        """Run once, and read what it puts out."""
        for name, array in inputs.items():
            self.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name in self.free:
            self.binding.bind_output(name)
        self.session.run_with_iobinding(self.binding)
        vector = self.binding.get_outputs_as_ortvaluevector()
        return {name: vector[self.first + i] for i, name in enumerate(self.free)}


def measure(bundle: Bundle, rounds: int, threads: int | None, before: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by way and m, and under "token" that of a pass of the base over one token."""
    backend = Backend("cpu", threads=threads)
    session = Session(bundle, backend)
    rng = np.random.default_rng(0)
    session.step(rng.integers(0, bundle.vocab_size, before).tolist()).ahead().topk(0, [0])
    parts = range(bundle.topology.parts)
    assert session.heads is not None
    heads = session.heads
    with tempfile.TemporaryDirectory() as folder:
        made = {} if heads.drafter.conditioned else WHOLE
        whole = {way: Whole(make(bundle), Path(folder) / way, bundle, backend) for way, make in made.items()}
        ways: dict[str, Callable[[list[int], int], object]] = {}

        def plain(tokens: list[int], accepted: int) -> None:
            session.cache.rollback(before)
            session.step(tokens, rows=Last(len(tokens)), heads=ALL).topk()

        def beside(tokens: list[int], accepted: int, drafts: int = len(parts)) -> None:
            session.cache.rollback(before)
            step = session.step(tokens, rows=Last(len(tokens)), heads=ALL)
            step.topk()
            ahead = step.ahead(accepted - 1)
            told = 1
            for part in range(drafts):
                told = ahead.largest(part, [told])[1][0]

        def fed(tokens: list[int]) -> dict[str, np.ndarray]:
            return {
                "input_ids": np.array([tokens], np.int64),
                "attention_mask": np.ones((1, before + len(tokens)), np.int64),
                "num_logits_to_keep": np.array(len(tokens), np.int64),
            }

        def in_pass(tokens: list[int], accepted: int) -> None:
            values = whole["inside"].run(**fed(tokens), head_rows=np.arange(len(tokens)))
            values[TOPK_IDS].numpy()

        def layers_in_pass(tokens: list[int], accepted: int) -> None:
            values = whole["a"].run(**fed(tokens), head_rows=np.arange(len(tokens)))
            values[TOPK_IDS].numpy()
            states = values[HEAD_STATES].numpy().reshape(len(tokens), len(parts), -1)[accepted - 1]
            whole["words"].run(head_states=states[None])[TOPK_IDS].numpy()

        def one_graph(tokens: list[int], accepted: int) -> None:
            values = whole["c"].run(**fed(tokens))
            values[TOPK_IDS].numpy()
            values[f"ahead_{TOPK_IDS}"].numpy()

        ways |= {"plain": plain, "b": beside}
        if heads.drafter.conditioned:
            ways |= {f"{n}": partial(beside, drafts=n) for n in parts if n}
        else:
            ways |= {"inside": in_pass, "a": layers_in_pass, "c": one_graph}
        times: dict[tuple[str, int], list[float]] = {(way, m): [] for way in ways for m in range(1, MOST + 1)}
        for turn in range(rounds + 2):
            for m in range(1, MOST + 1):
                tokens = rng.integers(0, bundle.vocab_size, m).tolist()
                for way in rng.permutation(list(ways)):
                    started = time.perf_counter()
                    ways[way](tokens, 1 + turn % m)
                    if turn >= 2:  # the first ones warm up
                        times[way, m].append((time.perf_counter() - started) * 1e3)
    found = {way: {str(m): statistics.median(times[way, m]) for m in range(1, MOST + 1)} for way in ways}
    return found | {"token": {"1": found["plain"]["1"]}}


def table(content: dict[str, Any]) -> str:
    """Markdown, in units of a pass of the base over one token."""
    lines = [
        "| bundle | m | plain | inside − plain | a − plain | b − plain | c − plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in content["bundles"].items():
        found, token = entry["ms"], entry["ms"]["token"]["1"]
        for m in map(str, (1, 2, 4)):
            plain = found["plain"][m]
            extra = [f"{(found[way][m] - plain) / token:.2f}" if way in found else "–" for way in WAYS[1:]]
            lines.append(f"| {' | '.join([name, m, f'{plain / token:.2f}', *extra])} |")
    told = [(name, entry["ms"]) for name, entry in content["bundles"].items() if "2" in entry["ms"]]
    if told:
        lines += ["", "| bundle | m | one draft | two | all |", "|---|---|---|---|---|"]
    for name, found in told:
        for m in map(str, (1, 2, 4)):
            extra = [f"{(found[way][m] - found['plain'][m]) / found['token']['1']:.2f}" for way in ("1", "2", "b")]
            lines.append(f"| {' | '.join([name, m, *extra])} |")
    return "\n".join([*lines, "", content["conditions"]])


def describe(bundle: Bundle) -> str:
    """Return what a row of the table is about."""
    assert bundle.drafter is not None
    words = "all words" if bundle.drafter.vocabulary is None else f"{len(bundle.drafter.vocabulary):,} words"
    told = ", conditioned" if bundle.drafter.conditioned else ""
    return f"{bundle.model_type}, {bundle.precision}, {bundle.topology.parts} heads of {words}{told}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, metavar="JSON", help="run nothing: show results")
    given = parser.parse_args(arguments)
    if given.table:
        print(table(json.loads(given.table.read_text(encoding="utf-8"))))
        return
    found = {}
    for path in given.bundles:
        bundle = load_bundle(path)
        if bundle.drafter is None or bundle.topology.n_heads < 2:
            parser.error(f"{path} has no parallel heads in a graph of their own")
        found[describe(bundle)] = {"ms": measure(bundle, given.rounds, given.threads, given.past)}
    rounds = f"Medians of {given.rounds} interleaved rounds behind {given.past} positions."
    content = {
        "conditions": f"{rounds} {describe_machine()}.",
        "bundles": found,
    }
    print(table(content))
    if given.json:
        given.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
