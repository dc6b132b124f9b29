"""Tiny bundles written by hand with onnx.helper: real graphs that keep the contract, made without torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dynamo_runtime.bundle import Bundle
from dynamo_runtime.files import sha256
from dynamo_runtime.joint import JointHead
from dynamo_runtime.look_ahead import LookAhead
from dynamo_runtime.manifest import FORMAT_VERSION, DrafterGraph
from dynamo_runtime.parallel import ParallelHeads
from dynamo_runtime.topology import Plain, Topology

KV_HEADS, QUERY_HEADS, HEAD_SIZE, HIDDEN = 1, 2, 16, 32
CONTEXT_LENGTH = 640
TOP_K_OUTPUTS, DRAFT_TOP_K_OUTPUTS = 128, 64
GRAPH, DRAFTER = "model.onnx", "drafter.onnx"
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
    """Nodes, inputs, outputs and initializers of one graph under construction."""

    def __init__(self, rng: np.random.Generator):
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.rng = rng

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def numbers(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> str:
        value = self.rng.normal(size=shape) * scale / np.sqrt(shape[0])
        return self.constant(name, value.astype(np.float32))

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))

    def input(self, name: str, shape: Sequence[str | int], kind: int = TensorProto.INT64) -> None:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))

    def output(self, name: str, shape: Sequence[str | int], kind: int = TensorProto.FLOAT) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def model(self, name: str) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def positions(self) -> None:
        """What attention is told of positions, from the mask."""
        angles = np.arange(CONTEXT_LENGTH)[:, None] / 100.0 ** (np.arange(HEAD_SIZE // 2) / (HEAD_SIZE // 2))
        self.constant("cos", np.cos(angles).astype(np.float32))
        self.constant("sin", np.sin(angles).astype(np.float32))
        self.numbers("one", 1)
        self.node("ReduceSum", ["attention_mask", "one"], ["lengths64"], keepdims=0)
        self.node("Sub", ["lengths64", "one"], ["last64"])
        self.node("Cast", ["last64"], ["seqlens_k"], to=TensorProto.INT32)
        self.node("Shape", ["attention_mask"], ["total64"], start=1, end=2)
        self.node("Cast", ["total64"], ["total1"], to=TensorProto.INT32)
        self.node("Squeeze", ["total1"], ["total"])

    def layer(self, index: int, source: str, cache: int | None = None) -> str:
        """One attention layer with rotary positions and a residual; its KV cache has its number, or another."""
        at, cache = f"/layers.{index}", index if cache is None else cache
        for part, width in (("q", QUERY_HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weight = self.weight(f"{at}/{part}.weight", HIDDEN, width * HEAD_SIZE)
            self.node("MatMul", [source, weight], [f"{at}/{part}"])
        past = [f"past_key_values.{cache}.{part}" for part in ("key", "value")]
        present = [f"present.{cache}.{part}" for part in ("key", "value")]
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

    def caches(self, count: int) -> None:
        """Past and present of so many layers."""
        shape = ["batch", KV_HEADS, "capacity", HEAD_SIZE]
        for layer in range(count):
            for part in ("key", "value"):
                self.input(f"past_key_values.{layer}.{part}", shape, TensorProto.FLOAT)
                self.output(f"present.{layer}.{part}", shape)

    def words(
        self, states: str, output: str, sharpness: float, width: int, top_k: int, ids: Sequence[int] = ()
    ) -> None:
        """From states to logits and the largest of them; `ids` name the words where those are not all there are."""
        self.node("LpNormalization", [states], ["unit"], axis=2, p=2)
        self.node("MatMul", ["unit", output], ["unscaled"])
        scale = self.constant("sharpness", np.array(sharpness * np.sqrt(HIDDEN), np.float32))
        self.node("Mul", ["unscaled", scale], ["logits"])
        places = "places" if ids else "topk_ids"
        self.node("TopK", ["logits", self.numbers("K", top_k)], ["topk_logits", places], axis=-1)
        if ids:
            self.node("Gather", [self.numbers("draft_vocabulary", *ids), places], ["topk_ids"], axis=0)
        rows = ["batch", "rows"]
        self.output("logits", [*rows, width])
        self.output("topk_logits", [*rows, top_k])
        self.output("topk_ids", [*rows, top_k], TensorProto.INT64)

    def factors(self, row: str, n_tokens: int, rank: int) -> str:
        """Gate and factors of a joint head."""
        self.node("MatMul", [row, self.weight("gate.weight", HIDDEN, rank)], ["gate_scores"])
        self.node("LogSoftmax", ["gate_scores"], ["gate"], axis=-1)
        self.output("gate", ["batch", "head_rows_count", rank])
        self.node("MatMul", [row, self.weight("factors", HIDDEN, n_tokens * rank * HIDDEN)], ["factor_states"])
        self.node("Reshape", ["factor_states", self.numbers("factor_shape", 0, -1, HIDDEN)], ["factor_rows"])
        return "factor_rows"


def build_graphs(
    vocab: int,
    n_heads: int,
    *,
    seed: int = 0,
    sharpness: float = 3.0,
    top_k: int = TOP_K_OUTPUTS,
    kind: str = "parallel",
    rank: int = 0,
    format_version: int = FORMAT_VERSION,
    skips: bool = True,
    conditioned: bool = False,
    vocabulary: Sequence[int] | None = None,
    draft_top_k: int = DRAFT_TOP_K_OUTPUTS,
) -> dict[str, onnx.ModelProto]:
    """A language model of 1 stem layer, a first head and `n_heads` - 1 further heads of one layer each.

    `sharpness` scales the logits (nats). The further heads' weights come last, so that the first head is the
    same function for every `n_heads`, kind and format, and the further ones for every format. Of kind "cp" it has a
    joint head over `n_heads` tokens instead, of kind "lookahead" as many look-ahead embeddings as it would have further
    heads.

    Args:
        vocab: Tokens.
        n_heads: See above.
        seed: Of the weights.
        sharpness: See above.
        top_k: Of the base's outputs, at most.
        kind: Of the topology; "parallel" with a single head is "plain".
        rank: Of a joint head.
        format_version: Of the bundle: before 4 all is one graph.
        skips: In those, whether a pass can do without further heads and make up for it.
        conditioned: Whether heads are told the token in front of what they predict.
        vocabulary: Ids of the words that drafts are made of; None for all.
        draft_top_k: Of the drafter's outputs, at most.

    Returns:
        The graphs by their files' names.
    """
    further = {"parallel": n_heads - 1, "cp": 1}.get(kind, 0)
    inside = format_version < 4 and further > 0
    base = _Graph(np.random.default_rng(seed))
    base.positions()
    base.input("input_ids", ["batch", "seq"])
    base.input("attention_mask", ["batch", "total"])
    base.input("num_logits_to_keep", [])
    base.constant("num_logits_to_keep", np.array(0, np.int64))
    embedding = base.weight("embedding", vocab, HIDDEN, scale=np.sqrt(vocab))
    output = base.weight("output", HIDDEN, vocab, scale=1.0)
    if kind == "lookahead":
        more = base.constant("look_ahead", np.random.default_rng(seed).normal(size=(n_heads - 1, HIDDEN)).astype("f4"))
        base.node("Concat", [embedding, more], ["extended"], axis=0)
        embedding = "extended"
    base.node("Gather", [embedding, "input_ids"], ["embedded"])
    stem = base.layer(0, "embedded")
    first = base.layer(1, stem)
    base.node("Neg", ["num_logits_to_keep"], ["minus_rows"])
    base.node("Reshape", ["minus_rows", "one"], ["first_row"])
    base.node("Slice", [first, "first_row", base.numbers("end", np.iinfo(np.int64).max), "one"], ["rows_1"])
    states = "rows_1"
    if further and (skips or not inside):
        base.node("Identity", [stem], ["penultimate_states"])
        base.output("penultimate_states", ["batch", "seq", HIDDEN])
    if inside:
        states = _heads_inside(base, stem, n_heads, kind, rank, skips)
    base.words(states, output, sharpness, vocab, min(top_k, vocab))
    base.caches(2 + further if inside else 2)
    graphs = {GRAPH: base}
    if further and not inside:
        graphs[DRAFTER] = drafter = _Graph(base.rng)
        _heads_beside(drafter, n_heads, kind, rank)
        state = "head_states"
        if conditioned:
            drafter.output(state, ["batch", "states", HIDDEN])
            drafter.input("draft_states", ["batch", "drafts", HIDDEN], TensorProto.FLOAT)
            drafter.initializers["embedding"] = base.initializers["embedding"]
            state = _condition(drafter, further, np.random.default_rng(seed + 1000))
        drafter.initializers["output"] = base.initializers["output"]
        words = output
        if vocabulary is not None:
            whole = numpy_helper.to_array(base.initializers["output"])
            words = drafter.constant("draft.output", whole[:, list(vocabulary)])
            del drafter.initializers["output"]
        count = vocab if vocabulary is None else len(vocabulary)
        drafter.words(state, words, sharpness, count, min(draft_top_k, count), vocabulary or ())
    return {name: graph.model(name.split(".")[0]) for name, graph in graphs.items()}


def _heads_inside(g: _Graph, stem: str, n_heads: int, kind: str, rank: int, skips: bool) -> str:
    """Further heads in the base's graph; their rows behind those of the first, which is one of its values."""
    g.input("head_rows", ["head_rows_count"])
    g.constant("head_rows", np.zeros(0, np.int64))
    if skips:
        g.input("skipped_states", ["batch", "skipped", HIDDEN], TensorProto.FLOAT)
        g.constant("skipped_states", np.zeros((1, 0, HIDDEN), np.float32))
        g.node("Concat", ["skipped_states", stem], ["head_inputs"], axis=1)
        stem = "head_inputs"
    states = ["rows_1"]
    for layer in range(2, 3 if kind == "cp" else 1 + n_heads):
        g.node("Gather", [g.layer(layer, stem), "head_rows"], [f"rows_{layer}"], axis=1)
        states.append(f"rows_{layer}")
    if kind == "cp":
        states[1] = g.factors("rows_2", n_heads, rank)
    g.node("Concat", states, ["states"], axis=1)
    return "states"


def _heads_beside(g: _Graph, n_heads: int, kind: str, rank: int) -> None:
    """The layers of the drafter's graph; weights are drawn in the order that they have inside the base's."""
    g.positions()
    g.input("penultimate_states", ["batch", "seq", HIDDEN], TensorProto.FLOAT)
    g.input("attention_mask", ["batch", "total"])
    count = 1 if kind == "cp" else n_heads - 1
    g.caches(count)
    g.input("head_rows", ["head_rows_count"])
    g.numbers("head_rows", -1)
    rows = []
    for layer in range(count):
        g.node("Gather", [g.layer(2 + layer, "penultimate_states", layer), "head_rows"], [f"rows_{layer}"], axis=1)
        rows.append(f"rows_{layer}")
    if kind == "cp":
        g.node("Identity", [g.factors(rows[0], n_heads, rank)], ["head_states"])
    else:
        g.node("Concat", rows, ["side_by_side"], axis=2)
        g.node("Reshape", ["side_by_side", g.numbers("parts_shape", 0, -1, HIDDEN)], ["head_states"])


def _condition(g: _Graph, parts: int, rng: np.random.Generator) -> str:
    """`s + W2 silu(W1 [s ; e])` with weights of every part, the part chosen by nested branches."""
    g.input("previous_tokens", ["batch", "drafts"])
    g.node("Gather", ["embedding", "previous_tokens"], ["previous"])
    g.node("Concat", ["draft_states", "previous"], ["both"], axis=2)

    def branch(part: int) -> onnx.GraphProto:
        """Of one part."""
        inner = _Graph(rng)
        out = f"change_{part}"
        at = f"condition.{part}"
        hidden = inner.weight(f"{at}.hidden.weight", 2 * HIDDEN, HIDDEN)
        inner.node("MatMul", ["both", hidden], [f"{at}.h"])
        inner.node("Sigmoid", [f"{at}.h"], [f"{at}.g"])
        inner.node("Mul", [f"{at}.h", f"{at}.g"], [f"{at}.s"])
        inner.node("MatMul", [f"{at}.s", inner.weight(f"{at}.out.weight", HIDDEN, HIDDEN, scale=4.0)], [out])
        inner.output(out, ["batch", "drafts", HIDDEN])
        weights = list(inner.initializers.values())
        return helper.make_graph(inner.nodes, at, [], inner.outputs, weights)

    if parts == 1:
        only = branch(0)
        g.nodes.extend(only.node)
        g.initializers |= {each.name: each for each in only.initializer}
    else:
        g.input("draft_part", [])
        other = branch(parts - 1)
        for part in reversed(range(parts - 1)):
            limit = g.constant(f"part_{part}", np.array(part + 1, np.int64))
            less = helper.make_node("Less", ["draft_part", limit], [f"is_{part}"])
            outs = [f"chosen_{part}"]
            chosen = helper.make_node("If", [f"is_{part}"], outs, then_branch=branch(part), else_branch=other)
            value = helper.make_tensor_value_info(outs[0], TensorProto.FLOAT, ["batch", "drafts", HIDDEN])
            other = helper.make_graph([less, chosen], f"from_{part}", [], [value])
        g.nodes.extend(other.node)
    g.node("Add", ["draft_states", "change_0" if parts == 1 else "chosen_0"], ["conditioned"])
    return "conditioned"


def build_graph(vocab: int, n_heads: int, **options: Any) -> onnx.ModelProto:
    """The base's graph alone: see `build_graphs`."""
    return build_graphs(vocab, n_heads, **options)[GRAPH]


def save_graphs(folder: Path, vocab: int, n_heads: int, *, shared: bool = False, **options: Any) -> None:
    """Write the graphs of a bundle.

    Args:
        folder: Where to.
        vocab: See `build_graphs`.
        n_heads: See `build_graphs`.
        shared: Whether weights that both graphs have lie in the base's file alone, as export writes them.
        **options: See `build_graphs`.
    """
    graphs = build_graphs(vocab, n_heads, **options)
    for name, model in graphs.items():
        onnx.save(model, str(folder / name))
    if shared:
        refer(folder / DRAFTER, folder / GRAPH)


def refer(drafter: Path, base: Path, location: str | None = None) -> list[str]:
    """Have a graph take the weights that another one has from that one's file, or from one of another name.

    Returns:
        Names of the weights.
    """
    model, content = onnx.load(str(drafter)), base.read_bytes()
    there = {each.name: each.raw_data for each in onnx.load(str(base)).graph.initializer if len(each.raw_data) >= 64}
    found = []
    for weight in model.graph.initializer:
        if there.get(weight.name) == weight.raw_data:
            place = content.index(weight.raw_data)
            entries = {"location": location or base.name, "offset": str(place), "length": str(len(weight.raw_data))}
            weight.ClearField("raw_data")
            weight.data_location = TensorProto.EXTERNAL
            for key, value in entries.items():
                weight.external_data.add(key=key, value=value)
            found.append(weight.name)
    drafter.write_bytes(model.SerializeToString())
    return found


def drafter_of(
    kind: str,
    n_tokens: int,
    vocab: int,
    *,
    format_version: int = FORMAT_VERSION,
    conditioned: bool = False,
    vocabulary: Sequence[int] | None = None,
    draft_top_k: int = DRAFT_TOP_K_OUTPUTS,
) -> DrafterGraph | None:
    """What a manifest says of the drafter's graph that `build_graphs` makes."""
    if format_version < 4 or n_tokens == 1 or kind not in ("parallel", "cp"):
        return None
    words = vocab if vocabulary is None else len(vocabulary)
    ids = None if vocabulary is None else tuple(int(each) for each in vocabulary)
    layers = 1 if kind == "cp" else n_tokens - 1
    return DrafterGraph(DRAFTER, layers, KV_HEADS, min(draft_top_k, words), conditioned, ids)


_OF_DRAFTER = ("format_version", "conditioned", "vocabulary", "draft_top_k")


def small_bundle(folder: Path, kind: str, n_tokens: int, *, vocab: int, rank: int = 0, **graph: Any) -> Bundle:
    """A bundle without tokenizer or manifest, of any kind and vocabulary; further options of `save_graphs`."""
    folder.mkdir(parents=True)
    n_heads = 1 if kind == "plain" else n_tokens
    save_graphs(folder, vocab, n_heads, kind="parallel" if kind == "plain" else kind, rank=rank, **graph)
    if n_tokens > 1:
        random_counts(folder / "cooccurrence.npz", vocab, 3, branching=vocab // 2)
    topology = topology_of(kind, n_tokens, rank)
    drafter = drafter_of(kind, n_tokens, vocab, **{name: graph[name] for name in _OF_DRAFTER if name in graph})
    return Bundle(
        folder=folder,
        topology=topology,
        drafter=drafter,
        vocab_size=vocab,
        context_length=CONTEXT_LENGTH,
        kv_layers=2 + (topology.layers if drafter is None else 0),
        kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        top_k_outputs=min(graph.get("top_k", TOP_K_OUTPUTS), vocab),
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
    n_heads, version = changes.pop("n_heads", 1), changes.get("format_version", FORMAT_VERSION)
    drafter = drafter_of("parallel", n_heads, changes.get("vocab_size", TOP_K_OUTPUTS), format_version=version)
    manifest = {
        "format_version": version,
        "topology": {"kind": "plain"} if n_heads == 1 else {"kind": "parallel", "n_heads": n_heads},
        "drafter": None if drafter is None else asdict(drafter),
        "model_type": "handmade",
        "context_length": CONTEXT_LENGTH,
        "kv_layers": 2 + (n_heads - 1 if version < 4 else 0),
        "kv_heads": KV_HEADS,
        "head_size": HEAD_SIZE,
        "precision": "fp32",
        "bos_token_id": None,
        "eos_token_ids": [0],
        "graph": GRAPH,
        "files": listed(folder),
    }
    (folder / "dynamo_config.json").write_text(json.dumps(manifest | changes))


def write_bundle(
    folder: Path,
    n_heads: int,
    *,
    counts: bool = True,
    tokenizer: Tokenizer | None = None,
    files: Mapping[str, str] | None = None,
    graph: Mapping[str, Any] | None = None,
    sharpness: float = 3.0,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a whole bundle, with further files and other fields of the manifest; returns its ONNX file.

    Args:
        folder: Made for it.
        n_heads: Tokens that it predicts.
        counts: Whether it has n-gram counts.
        tokenizer: Of its own.
        files: Further ones, by name.
        graph: Further options of `save_graphs`, "kind" and "format_version" among them.
        sharpness: Of the graphs.
        seed: Of the graphs.
        **changes: Fields of the manifest.
    """
    folder.mkdir(parents=True)
    options = dict(graph or {})
    kind, rank = options.get("kind", "parallel"), options.get("rank", 0)
    tokenizer = tokenizer or train_tokenizer()
    for name, content in (files or {}).items():
        (folder / name).write_text(content, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    save_graphs(folder, vocab, n_heads, sharpness=sharpness, seed=seed, **options)
    if counts and n_heads > 1:
        random_counts(folder / "cooccurrence.npz", vocab, n_heads)
    fields = {
        "vocab_size": vocab,
        "top_k_outputs": min(options.get("top_k", TOP_K_OUTPUTS), vocab),
        "sampling": {"temperature": 0.7, "top_k": 50, "repetition_penalty": 1.1, "backoff_threshold": 0.5},
    }
    if n_heads > 1:
        topology = topology_of(kind, n_heads, rank)
        drafter = drafter_of(kind, n_heads, vocab, **{name: options[name] for name in _OF_DRAFTER if name in options})
        fields |= {
            "format_version": options.get("format_version", FORMAT_VERSION),
            "topology": {"kind": topology.kind} | asdict(topology),
            "drafter": None if drafter is None else asdict(drafter),
            "kv_layers": 2 + (topology.layers if drafter is None else 0),
        }
    write_manifest(folder, **fields | changes)
    return folder / GRAPH
