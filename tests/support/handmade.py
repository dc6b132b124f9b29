"""Tiny bundles written by hand with onnx.helper: real graphs that keep the contract, made without torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dynamo_runtime.bundle import Bundle, sha256
from dynamo_runtime.joint import JointHead
from dynamo_runtime.look_ahead import LookAhead
from dynamo_runtime.parallel import ParallelHeads
from dynamo_runtime.topology import Plain, Topology

KV_HEADS, QUERY_HEADS, HEAD_SIZE, HIDDEN = 1, 2, 16, 32
CONTEXT_LENGTH = 640
TOP_K_OUTPUTS = 128
CORPUS = [
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n",
    "größer, naïve, 日本語のテキスト, emoji 🎉🚀 und ½ – “quoted”\n",
    "for i in range(10):\n    print(i)\n",
]


CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]


def train_tokenizer(control: Sequence[str] = (), added: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer: special token 0, all 256 bytes, some merges; behind those what else is asked for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens(list(control))
    tokenizer.add_tokens(list(added))
    return tokenizer


class _Graph:
    """Nodes and initializers of one graph under construction."""

    def __init__(self, seed: int):
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(seed)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> str:
        value = self.rng.normal(size=shape) * scale / np.sqrt(shape[0])
        return self.constant(name, value.astype(np.float32))

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))

    def layer(self, index: int, source: str) -> str:
        """One attention layer with rotary positions and a residual, KV cache number `index`."""
        at = f"/layers.{index}"
        for part, width in (("q", QUERY_HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weight = self.weight(f"{at}/{part}.weight", HIDDEN, width * HEAD_SIZE)
            self.node("MatMul", [source, weight], [f"{at}/{part}"])
        past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        present = [f"present.{index}.{part}" for part in ("key", "value")]
        self.node(
            "GroupQueryAttention",
            [f"{at}/q", f"{at}/k", f"{at}/v", *past, "seqlens_k", "total", "cos", "sin"],
            [f"{at}/attention", *present],
            domain="com.microsoft",
            num_heads=QUERY_HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        )
        weight = self.weight(f"{at}/o.weight", QUERY_HEADS * HEAD_SIZE, HIDDEN, scale=2.0)
        self.node("MatMul", [f"{at}/attention", weight], [f"{at}/o"])
        self.node("Add", [source, f"{at}/o"], [f"{at}/out"])
        return f"{at}/out"


def build_graph(
    vocab: int,
    n_heads: int,
    *,
    seed: int = 0,
    sharpness: float = 3.0,
    top_k: int = TOP_K_OUTPUTS,
    kind: str = "parallel",
    rank: int = 0,
) -> onnx.ModelProto:
    """A language model of 1 stem layer, a first head and `n_heads` - 1 further heads of one layer each.

    `sharpness` scales the logits (nats). The further heads' weights come last, so that the first head is the
    same function for every `n_heads` and kind. Of kind "cp" it has a joint head over `n_heads` tokens instead, of kind
    "lookahead" as many look-ahead embeddings as it would have further heads.
    """
    n_tokens, n_heads = n_heads, n_heads if kind == "parallel" else 1
    g = _Graph(seed)
    top_k = min(top_k, vocab)
    int64 = lambda name, *values: g.constant(name, np.array(values, np.int64))  # noqa: E731
    angles = np.arange(CONTEXT_LENGTH)[:, None] / 100.0 ** (np.arange(HEAD_SIZE // 2) / (HEAD_SIZE // 2))
    g.constant("cos", np.cos(angles).astype(np.float32))
    g.constant("sin", np.sin(angles).astype(np.float32))
    one, end = int64("one", 1), int64("end", np.iinfo(np.int64).max)
    g.constant("num_logits_to_keep", np.array(0, np.int64))

    g.node("ReduceSum", ["attention_mask", one], ["lengths64"], keepdims=0)
    g.node("Sub", ["lengths64", one], ["last64"])
    g.node("Cast", ["last64"], ["seqlens_k"], to=TensorProto.INT32)
    g.node("Shape", ["attention_mask"], ["total64"], start=1, end=2)
    g.node("Cast", ["total64"], ["total1"], to=TensorProto.INT32)
    g.node("Squeeze", ["total1"], ["total"])

    embedding = g.weight("embedding", vocab, HIDDEN, scale=np.sqrt(vocab))
    output = g.weight("output", HIDDEN, vocab, scale=1.0)
    if kind == "lookahead":
        further = g.constant("look_ahead", np.random.default_rng(seed).normal(size=(n_tokens - 1, HIDDEN)).astype("f4"))
        g.node("Concat", [embedding, further], ["extended"], axis=0)
        embedding = "extended"
    g.node("Gather", [embedding, "input_ids"], ["embedded"])
    stem = g.layer(0, "embedded")
    first = g.layer(1, stem)
    g.node("Neg", ["num_logits_to_keep"], ["minus_rows"])
    g.node("Reshape", ["minus_rows", one], ["first_row"])
    g.node("Slice", [first, "first_row", end, one], ["rows_1"])
    value = helper.make_tensor_value_info
    outputs = []
    further = {"parallel": n_heads - 1, "cp": 1}.get(kind, 0)
    if further:
        g.constant("head_rows", np.zeros(0, np.int64))
        g.constant("skipped_states", np.zeros((1, 0, HIDDEN), np.float32))
        g.node("Identity", [stem], ["penultimate_states"])
        outputs.append(value("penultimate_states", TensorProto.FLOAT, ["batch", "seq", HIDDEN]))
        g.node("Concat", ["skipped_states", stem], ["head_states"], axis=1)
    states = ["rows_1"]
    for layer in range(2, 2 + further):
        g.node("Gather", [g.layer(layer, "head_states"), "head_rows"], [f"rows_{layer}"], axis=1)
        states.append(f"rows_{layer}")
    if kind == "cp":
        g.node("MatMul", ["rows_2", g.weight("gate.weight", HIDDEN, rank)], ["gate_scores"])
        g.node("LogSoftmax", ["gate_scores"], ["gate"], axis=-1)
        outputs.append(value("gate", TensorProto.FLOAT, ["batch", "head_rows_count", rank]))
        g.node("MatMul", ["rows_2", g.weight("factors", HIDDEN, n_tokens * rank * HIDDEN)], ["factor_states"])
        g.node("Reshape", ["factor_states", int64("factor_shape", 0, -1, HIDDEN)], ["factor_rows"])
        states[1] = "factor_rows"
    g.node("Concat", states, ["states"], axis=1)
    g.node("LpNormalization", ["states"], ["unit"], axis=2, p=2)
    g.node("MatMul", ["unit", output], ["unscaled"])
    scale = g.constant("sharpness", np.array(sharpness * np.sqrt(HIDDEN), np.float32))
    g.node("Mul", ["unscaled", scale], ["logits"])
    g.node("TopK", ["logits", int64("K", top_k)], ["topk_logits", "topk_ids"], axis=-1)
    for name, width in (("logits", vocab), ("topk_logits", top_k), ("topk_ids", top_k)):
        numbers = TensorProto.INT64 if name == "topk_ids" else TensorProto.FLOAT
        outputs.append(value(name, numbers, ["batch", "rows_of_all_heads", width]))
    layers = 2 + further
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch", "seq"]),
        value("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    for layer in range(layers):
        for part in ("key", "value"):
            shape = ["batch", KV_HEADS, "capacity", HEAD_SIZE]
            inputs.append(value(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, shape))
            outputs.append(value(f"present.{layer}.{part}", TensorProto.FLOAT, shape))
    inputs.append(value("num_logits_to_keep", TensorProto.INT64, []))
    if further:
        inputs.append(value("head_rows", TensorProto.INT64, ["head_rows_count"]))
        inputs.append(value("skipped_states", TensorProto.FLOAT, ["batch", "skipped", HIDDEN]))
    graph = helper.make_graph(g.nodes, "handmade", inputs, outputs, initializer=g.initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def small_bundle(folder: Path, kind: str, n_tokens: int, *, vocab: int, rank: int = 0, **graph: Any) -> Bundle:
    """A bundle without tokenizer or manifest, of any kind and vocabulary."""
    folder.mkdir(parents=True)
    n_heads = 1 if kind == "plain" else n_tokens
    model = build_graph(vocab, n_heads, kind="parallel" if kind == "plain" else kind, rank=rank, **graph)
    onnx.save(model, str(folder / "model.onnx"))
    if n_tokens > 1:
        random_counts(folder / "cooccurrence.npz", vocab, 3, branching=vocab // 2)
    topology = topology_of(kind, n_tokens, rank)
    return Bundle(
        folder=folder,
        topology=topology,
        vocab_size=vocab,
        context_length=CONTEXT_LENGTH,
        kv_layers=2 + topology.layers,
        kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        top_k_outputs=min(TOP_K_OUTPUTS, vocab),
    )


def topology_of(kind: str, n_tokens: int, rank: int = 0) -> Topology:
    """What predicts `n_tokens` tokens a pass."""
    made = {
        "plain": lambda: Plain(),
        "parallel": lambda: ParallelHeads(n_tokens),
        "cp": lambda: JointHead(n_tokens, rank),
        "lookahead": lambda: LookAhead(n_tokens - 1),
    }
    return made[kind]()


def random_counts(path: Path, vocab: int, orders: int, *, seed: int = 0, branching: int = 24) -> None:
    """Write a random trie of n-gram counts in the layout of `cooccurrence.npz`."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {"counts_1": rng.integers(5, 500, vocab)}
    nodes = vocab
    for order in range(2, orders + 1):
        sizes = rng.integers(0, branching, nodes)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        ids = np.concatenate([np.sort(rng.choice(vocab, size, replace=False)) for size in sizes])
        arrays |= {
            f"offsets_{order}": offsets,
            f"ids_{order}": ids.astype(np.int32),
            f"counts_{order}": rng.integers(1, 20, len(ids)),
        }
        nodes = len(ids)
        branching = min(branching, 6)
    totals = [int(arrays[f"counts_{order}"].sum()) * 2 for order in range(1, orders + 1)]
    np.savez(path, totals=np.array(totals), min_count=np.ones(orders, np.int64), **arrays)


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """What a manifest says of the files that lie in `folder`."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != "dynamo_config.json"
    }


def add_file(folder: Path, name: str, content: str) -> None:
    """Put a file into a bundle, and into its manifest if it has one."""
    (folder / name).write_text(content, encoding="utf-8")
    path = folder / "dynamo_config.json"
    if path.is_file():
        manifest = json.loads(path.read_text()) | {"files": listed(folder), "sha256": None}
        path.write_text(json.dumps(manifest))


def write_manifest(folder: Path, **changes: Any) -> None:
    """Write `dynamo_config.json` for the files that lie in `folder`."""
    n_heads = changes.pop("n_heads", 1)
    manifest = {
        "format_version": 3,
        "topology": {"kind": "plain"} if n_heads == 1 else {"kind": "parallel", "n_heads": n_heads},
        "model_type": "handmade",
        "context_length": CONTEXT_LENGTH,
        "kv_layers": n_heads + 1,
        "kv_heads": KV_HEADS,
        "head_size": HEAD_SIZE,
        "precision": "fp32",
        "bos_token_id": None,
        "eos_token_ids": [0],
        "graph": "model.onnx",
        "files": listed(folder),
    }
    (folder / "dynamo_config.json").write_text(json.dumps(manifest | changes))


def write_bundle(
    folder: Path,
    n_heads: int,
    *,
    counts: bool = True,
    sharpness: float = 3.0,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    files: Mapping[str, str] | None = None,
    **changes: Any,
) -> Path:
    """Write a whole bundle, with further files and other fields of the manifest; returns its ONNX file."""
    folder.mkdir(parents=True)
    tokenizer = tokenizer or train_tokenizer()
    for name, content in (files or {}).items():
        (folder / name).write_text(content, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    onnx.save(build_graph(vocab, n_heads, sharpness=sharpness, seed=seed), str(folder / "model.onnx"))
    if counts and n_heads > 1:
        random_counts(folder / "cooccurrence.npz", vocab, n_heads)
    fields = {
        "vocab_size": vocab,
        "top_k_outputs": min(TOP_K_OUTPUTS, vocab),
        "sampling": {"temperature": 0.7, "top_k": 50, "repetition_penalty": 1.1, "backoff_threshold": 0.5},
    }
    write_manifest(folder, n_heads=n_heads, **fields | changes)
    return folder / "model.onnx"
