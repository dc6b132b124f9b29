"""Verification: further heads at all rows of one graph, or a second small graph at the accepted row?

    python benchmarks/head_rows.py [MULTI/model.onnx PLAIN/model.onnx]

Which row of a verified pass counts is known only after its first head has been read.  Either the further heads are
computed at all rows of the same graph ("one graph"), or the pass stops at the first head and the stem's output, and a
second graph runs the further heads over the accepted rows ("two graphs", cut out of the same export; it reads the
output embedding a second time).  "Known row" is the unreachable best: one graph, further heads at the right row only.
"One graph ÷ plain token" is how many tokens a pass must give to break even with plain decoding, apart from what Python
adds.  PLAIN is the `--heads 0` export of MULTI's checkpoint.  Without arguments, random weights of Pythia-160M's shape.

Medians of interleaved rounds, milliseconds inside onnxruntime for a pass over m tokens behind 256 others.  For
two graphs 1 … m rows are accepted in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from machine import describe_machine
from onnx import helper
from random_model import make_bundle

from dynamo_export import export_bundle
from dynamo_graph.read import read_model
from dynamo_runtime.bundle import Bundle, load_bundle
from dynamo_runtime.names import PENULTIMATE
from dynamo_runtime.providers import import_onnxruntime
from dynamo_runtime.session import Session
from dynamo_runtime.step import ALL, LAST, Last

PAST, MOST = 256, 5
_NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")


def norm_readers(graph: onnx.GraphProto) -> dict[str, int]:
    """For every value that norms read, how many do; in the order of the graph."""
    readers: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in _NORMS:
            readers[node.input[0]] = readers.get(node.input[0], 0) + 1
    return readers


def first_graph(plain: Path) -> tuple[onnx.ModelProto, str]:
    """The plain graph with the stem's output (what its last layer reads) as one more output."""
    model = onnx.load(plain)
    readers = norm_readers(model.graph)
    per_layer = max(readers.values())
    stem = [value for value, count in readers.items() if count == per_layer][-1 if per_layer > 1 else -3]
    model.graph.output.append(helper.make_tensor_value_info(stem, onnx.TensorProto.FLOAT, None))
    return model, stem


def second_graph(multi: Path, bundle: Bundle) -> tuple[onnx.ModelProto, str]:
    """The further heads of a multi-head graph, from the stem's output on."""
    model = ir.to_proto(read_model(multi))  # which puts the heads into the graph itself
    graph = model.graph
    stem = PENULTIMATE
    states = next(node for node in graph.node if "out_states" in node.output)
    del states.input[0]  # the first head's rows
    further = range(bundle.kv_layers - bundle.topology.n_heads + 1, bundle.kv_layers)
    presents = [f"present.{layer}.{part}" for layer in further for part in ("key", "value")]
    wanted = ["logits", "topk_logits", "topk_ids", *presents]
    maker = {output: node for node in graph.node for output in node.output}
    kept: list[onnx.NodeProto] = []
    todo, seen = list(wanted), {stem}
    while todo:
        value = todo.pop()
        if value in seen or value not in maker:
            continue
        seen.update(maker[value].output)
        kept.append(maker[value])
        todo += maker[value].input
    read = {name for node in kept for name in node.input}
    nodes = [node for node in graph.node if any(node is other for other in kept)]
    inputs = [value for value in graph.input if value.name in read]
    inputs.append(helper.make_tensor_value_info(stem, onnx.TensorProto.FLOAT, ["batch", "seq", None]))
    outputs = [value for value in graph.output if value.name in presents]
    outputs += [
        helper.make_tensor_value_info(name, kind, None) for name, kind in zip(wanted[:3], (1, 1, 7), strict=True)
    ]
    weights = [weight for weight in graph.initializer if weight.name in read]
    cut = helper.make_graph(nodes, "heads", inputs, outputs, weights)
    return helper.make_model(cut, opset_imports=model.opset_import, ir_version=model.ir_version), stem


class Bound:
    """A graph with its cache bound in place, as the runtime binds it."""

    def __init__(self, model: onnx.ModelProto, folder: Path, bundle: Bundle, threads: int | None) -> None:
        folder.mkdir()
        onnx.save(model, folder / "model.onnx")
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads:
            options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        shape = (1, bundle.kv_heads, 2 * PAST, bundle.head_size)
        caches = [i.name for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self.caches = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32) for name in caches}
        for name, cache in self.caches.items():
            self._input(name, cache)
            present = name.replace("past_key_values", "present")
            self.binding.bind_output(present, "cpu", 0, np.float32, shape, cache.ctypes.data)
        self.free = [o.name for o in self.session.get_outputs() if not o.name.startswith("present.")]

    def _input(self, name: str, array: np.ndarray) -> None:
        self.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self, inputs: dict[str, np.ndarray]) -> tuple[float, dict[str, Any]]:
        """Run once; returns seconds and outputs."""
        for name, array in inputs.items():
            self._input(name, array)
        for name in self.free:
            self.binding.bind_output(name)
        started = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        seconds = time.perf_counter() - started
        names = [output.name for output in self.session.get_outputs()]
        values = dict(zip(self.binding_names(names), self.binding.get_outputs(), strict=True))
        return seconds, values

    def binding_names(self, names: list[str]) -> list[str]:
        """Outputs in the order in which they were first bound: caches, then the rest."""
        return [name for name in names if name.startswith("present.")] + self.free


def measure(
    multi: Path, plain: Path, rounds: int, threads: int | None
) -> tuple[float, list[tuple[int, float, float, float]]]:
    """Milliseconds of a plain token, and rows of the table: m, then those of known row, one graph and two graphs."""
    bundle = load_bundle(multi)
    whole = Session(bundle, provider="cpu", threads=threads)
    alone = Session(load_bundle(plain), provider="cpu", threads=threads)
    rng = np.random.default_rng(0)
    for session in (whole, alone):
        session.step(rng.integers(0, bundle.vocab_size, PAST).tolist())
    with tempfile.TemporaryDirectory() as folder:
        proto, stem = first_graph(plain)
        first = Bound(proto, Path(folder) / "first", load_bundle(plain), threads)
        proto, entry = second_graph(multi, bundle)
        second = Bound(proto, Path(folder) / "second", bundle, threads)
        del proto
        times: dict[tuple[int, str], list[float]] = {}
        for turn in range(rounds + 2):
            alone.cache.rollback(PAST)
            before = alone.ort_seconds
            alone.step([1])
            if turn >= 2:
                times.setdefault((0, "plain"), []).append((alone.ort_seconds - before) * 1e3)
            for m in range(1, MOST + 1):
                tokens = rng.integers(0, bundle.vocab_size, m)
                found: dict[str, float] = {}
                for name, head_rows in (("known", LAST), ("one", ALL)):
                    whole.cache.rollback(PAST)
                    before = whole.ort_seconds
                    whole.step(tokens.tolist(), rows=Last(m), heads=head_rows)
                    found[name] = whole.ort_seconds - before
                mask = np.ones((1, PAST + m), np.int64)
                keep = np.array(m, np.int64)
                ids = tokens[None].astype(np.int64)
                found["two"], values = first.run({"input_ids": ids, "attention_mask": mask, "num_logits_to_keep": keep})
                state = values[stem].numpy()
                accepted = 1 + turn % m
                part = np.ascontiguousarray(state[:, :accepted])
                row = np.array([accepted - 1], np.int64)
                mask = np.ones((1, PAST + accepted), np.int64)
                seconds, _ = second.run({entry: part, "attention_mask": mask, "head_rows": row})
                found["two"] += seconds
                if turn >= 2:  # the first ones warm up
                    for name, value in found.items():
                        times.setdefault((m, name), []).append(value * 1e3)
    medians = {key: statistics.median(values) for key, values in times.items()}
    rows = [(m, medians[m, "known"], medians[m, "one"], medians[m, "two"]) for m in range(1, MOST + 1)]
    return medians[0, "plain"], rows


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("multi", type=Path, nargs="?", help="multi-head bundle of a GPT-NeoX")
    parser.add_argument("plain", type=Path, nargs="?", help="`--heads 0` export of the same checkpoint")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        multi, plain = arguments.multi, arguments.plain
        if multi is None:
            multi = make_bundle(Path(temporary))
            plain = export_bundle(
                Path(temporary) / "plain/model.onnx", Path(temporary) / "checkpoint", heads=0, parity_length=64
            )
        elif plain is None:
            parser.error("name the plain bundle too")
        token, rows = measure(multi, plain, arguments.rounds, arguments.threads)
        heads = load_bundle(multi).topology.n_heads
    print("| m | known row, ms | one graph ÷ known | two graphs ÷ known | one graph ÷ plain token |")
    print("|---|---|---|---|---|")
    for m, known, one, two in rows:
        print(f"| {m} | {known:.2f} | {one / known:.2f} | {two / known:.2f} | {one / token:.2f} |")
    print(f"\nA plain token: {token:.2f} ms. {heads} heads; medians of {arguments.rounds} interleaved rounds.")
    print(f"{describe_machine()}.")


if __name__ == "__main__":
    main()
