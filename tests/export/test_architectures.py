"""Every architecture and feature, through the whole pipeline and its gate, and against oracles of our own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support import checkpoints
from support.refused import REFUSED
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from dynamo_export import ExportError, cli, export_bundle, head_ends, parity
from dynamo_model import MultiTokenModel
from dynamo_runtime import Engine
from dynamo_runtime.bundle import load_bundle
from dynamo_runtime.parallel import ParallelHeads
from dynamo_runtime.session import Session
from dynamo_runtime.topology import Plain, Topology

FolderOf = Callable[[str], Path]

# What must be found in the graph, so that a feature is not lost from it unnoticed: node attributes, in order of layers.
WINDOWS = {
    "qwen2-mixed-window": [-1, 17, 17, 17],
    "mistral-window": [20] * 4,
    "cohere2": [-1, 18, 18, 18],
    "gemma2": [19, -1, -1, -1],
    "starcoder2": [21] * 4,
    "ministral": [23] * 4,
    "exaone4": [22, -1, -1, -1],
}
ROTARY_OUTSIDE = {"neox-rotary-20", "mistral-rotary-12"}
NOT_ROTATED = {"cohere2": [0, 1, 1, 1], "exaone4": [1, 0, 0, 0], "smollm3": [1, 0, 0, 0]}
NORMED = {"qwen3-wide-heads", "qwen3-bias", "cohere", "olmo2", "exaone4"}  # queries and keys, before the attention
CUT = {"phi", "phi3", "stablelm"}  # projections are taken apart, and not put together as they were
SHARED_NORM = {"cohere", "cohere2", "phi"}  # the feed-forward reads it as well
SHIFTED_NORM = {"gemma", "gemma2"}  # by 1, which the graph adds
APART = NORMED | CUT | ROTARY_OUTSIDE | SHARED_NORM | SHIFTED_NORM  # whose further heads keep an attention each
PACKED = checkpoints.CONFIGS.keys() - NORMED - CUT - ROTARY_OUTSIDE
BOUNDARIES = {
    "llama-bias-llama3": "rope llama3 32",
    "qwen2-yarn": "rope yarn 32",
    "qwen2-mixed-window": "window 17",
    "mistral-window": "window 20",
    "cohere2": "window 18",
    "gemma2": "window 19",
    "starcoder2": "window 21",
    "exaone4": "window 22",
    "ministral": "window 23",
}
# What lies between the product with the output embedding and the logits.
BEHIND = {
    "granite": ["Mul"],
    "cohere": ["Mul"],
    "cohere2": ["Mul"],
    "gemma2": ["Div", "Tanh", "Mul"],
    "phi": ["Add"],
}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes of a node as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


@pytest.mark.parametrize("name", checkpoints.CONFIGS)
def test_architecture(name: str, bundle: FolderOf, checkpoint: FolderOf) -> None:
    """Passes the gate, has the features in the graph, and decodes greedily as transformers does."""
    folder = bundle(name)
    parity = checkpoints.read_report(folder)["parity"]
    assert parity["passed"] and parity["reference"] == ["eager"]
    cases = {row["case"] for row in parity["rows"]}
    assert cases == {"short", "context 96", *([BOUNDARIES[name]] if name in BOUNDARIES else [])}
    _check_graph(name, folder)
    _check_greedy(folder, checkpoint(name))
    if name in checkpoints.THREE_HEADS:
        _check_verified(folder)


def _check_graph(name: str, folder: Path) -> None:
    heads = checkpoints.heads_of(name) - 1
    kept, together = (heads, 1) if name in APART else (1, heads)
    graphs = [onnx.load(folder / file).graph for file in ("model.onnx", "drafter.onnx")]
    nodes = [[node for node in graph.node if node.op_type == "GroupQueryAttention"] for graph in graphs]
    assert [len(found) for found in nodes] == [2, kept]
    attention = [attributes(node) for found in nodes for node in found]
    assert [a.get("local_window_size", -1) for a in attention] == WINDOWS.get(name, [-1] * 4)[: len(attention)]
    outside = 0 if name in ROTARY_OUTSIDE else 1
    assert [a["do_rotary"] for a in attention] == NOT_ROTATED.get(name, [outside] * 4)[: len(attention)]
    assert {a.get("softcap", 0.0) for a in attention} == {3.0 if name == "gemma2" else 0.0}
    packed = [not node.input[1] for found in nodes for node in found]
    assert all(packed) if name in PACKED else not any(packed)
    config, drafting = checkpoints.CONFIGS[name], checkpoints.DRAFTING.get(name, {})
    record, kv_heads = load_bundle(folder).drafter, getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert record is not None and (record.kv_layers, record.kv_heads) == (kept, together * kv_heads)
    sizes = [(a["num_heads"], a["kv_num_heads"]) for a in attention]
    alone = config.num_attention_heads, kv_heads
    assert sizes == [alone] * 2 + [(together * alone[0], together * alone[1])] * kept
    tied, words = config.tie_word_embeddings, "draft_vocabulary" in drafting
    _check_words(graphs, config.hidden_size, tied, words, drafting.get("conditioned", False))
    caches = [f"past_key_values.{layer}.{part}" for layer in range(kept) for part in ("key", "value")]
    parts = ["draft_part"] if heads > 1 else []
    told = ["draft_states", "previous_tokens", *parts] if drafting.get("conditioned") else []
    inputs = ["penultimate_states", "attention_mask", *caches, "head_rows", *told]
    assert [value.name for value in graphs[1].input] == inputs
    presents = [cache.replace("past_key_values", "present") for cache in caches]
    outputs = [*(["head_states"] if told else []), *presents, "logits", "topk_logits", "topk_ids"]
    assert [value.name for value in graphs[1].output] == outputs
    for graph in graphs:
        product = next(node for node in graph.node if node.name == "/out/out_product")
        assert _between(graph, product) == BEHIND.get(name, [])


def _check_words(graphs: list[onnx.GraphProto], hidden: int, tied: bool, words: bool, conditioned: bool) -> None:
    """Embeddings are written once: the drafter's file refers to those of the base, and has a smaller one of its own."""
    small = len(checkpoints.WORDS)
    other = re.compile(r"condition|\+")  # no embeddings, but some are as wide by chance
    matrices = [[i for i in graph.initializer if len(i.dims) == 2 and not other.search(i.name)] for graph in graphs]
    sizes = [sorted(list(i.dims) for i in found) for found in matrices]
    base, drafter = ([size for size in found if {*size} & {checkpoints.VOCAB, small}] for found in sizes)
    table, turned = [checkpoints.VOCAB, hidden], [hidden, checkpoints.VOCAB]
    assert base == ([table] if tied else [turned, table])
    own = [[hidden, small]] if words else [table] if tied else [turned]
    assert drafter == (own if table in own or not conditioned else [*own, table])


def _between(graph: onnx.GraphProto, product: onnx.NodeProto) -> list[str]:
    """Operations from a product to `logits`."""
    found, value = [], product.output[0]
    while value != "logits":
        (node,) = (n for n in graph.node if value in n.input)
        found.append(node.op_type)
        value = node.output[0]
    return found


def _check_greedy(folder: Path, source: Path) -> None:
    """Not by the gate's means: transformers' own `generate` on the base, and further heads on plain torch forwards."""
    prompt, new = [7, 250, 3, 91, 18], 60
    base = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    expected = base.generate(
        torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0].tolist()
    session = Session(load_bundle(folder, verify=True))
    step = session.step(prompt)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new:
        tokens.append(int(step.logits().argmax()))
        step = session.step(tokens[-1:])
    assert tokens == expected
    model = MultiTokenModel.load(source)
    with torch.no_grad():
        first, *further = [logits[0, -1].numpy() for logits in model(torch.tensor([tokens]))]
    for part, logits in enumerate(further):  # told the first choice of the head before it
        ours = step.ahead().logits(part, [int((first if part == 0 else further[part - 1]).argmax())])
        np.testing.assert_allclose(ours[0], logits, atol=3e-5)


def _check_verified(folder: Path) -> None:
    """Verified decoding gives the very tokens of plain decoding."""
    engine = Engine(folder)
    plain, verified = (
        engine.generate("def fib(n):", strategy=strategy, temperature=0, max_new_tokens=32, ignore_eos=True).tokens
        for strategy in ("autoregressive", "speculative")
    )
    assert len(plain) == 32 and verified == plain


def test_bf16_checkpoint_is_exported_in_fp32(tmp_path: Path) -> None:
    """Weights stored as bf16 come out as the same numbers in fp32."""
    source = checkpoints.save_multi(tmp_path / "checkpoint", checkpoints.CONFIGS["llama-grouped"], dtype=torch.bfloat16)
    graph = export_bundle(tmp_path / "out" / "model.onnx", source)
    model = onnx.load(graph)
    assert {i.data_type for i in model.graph.initializer} == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    embedding = next(i for i in model.graph.initializer if i.name == "model.embed_tokens.weight")
    stored = MultiTokenModel.load(source, torch.bfloat16).base.get_input_embeddings().weight
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(embedding), stored.detach().float().numpy())


@pytest.mark.parametrize(("heads", "topology"), [(0, Plain()), (2, ParallelHeads(2))])
def test_fewer_heads(heads: int, topology: Topology, checkpoint: FolderOf, tmp_path: Path) -> None:
    """`--heads 0` is the plain language model, and one head can be left out, its condition with it."""
    graph = export_bundle(tmp_path / "out" / "model.onnx", checkpoint("phi"), heads=heads)
    bundle = load_bundle(graph)
    assert (bundle.topology, bundle.kv_layers) == (topology, 2)
    assert (bundle.drafter is not None) == (graph.parent / "drafter.onnx").exists() == (heads > 0)
    session = onnxruntime.InferenceSession(graph)
    outputs = {output.name for output in session.get_outputs()}
    assert ("penultimate_states" in outputs) == (heads > 0)
    assert [value.name for value in session.get_overridable_initializers()] == ["num_logits_to_keep"]


@pytest.mark.parametrize("name", ["neox", "cp-llama-tied"])
def test_the_base_of_heads_is_the_plain_export(
    name: str, bundle: FolderOf, checkpoint: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node by node and weight by weight, but that it puts out the states that its last layer reads."""
    base = onnx.load(bundle(name) / "model.onnx").graph  # which others use as well, and so has to pass the gate
    monkeypatch.setattr(parity, "reference", lambda inspected, length: ([], []))
    plain = onnx.load(export_bundle(tmp_path / "out" / "model.onnx", checkpoint(name), heads=0)).graph
    (states,) = [value for value in base.output if value.name == "penultimate_states"]
    base.output.remove(states)
    for field in ("input", "output", "initializer"):
        ours, theirs = ({short(each.name): each for each in getattr(graph, field)} for graph in (base, plain))
        assert ours.keys() == theirs.keys(), field
        for name, each in ours.items():
            each.name = theirs[name].name
            assert each == theirs[name], name
    assert nodes_of(base) == nodes_of(plain)


def short(name: str) -> str:
    """A name without the modules around the base, which those of packed weights begin with."""
    return name.removeprefix("/model/base" if name.startswith("/model/base/") else "/model")


def nodes_of(graph: onnx.GraphProto) -> list[tuple[Any, ...]]:
    """What every node does, and what it does it to: the names of values in between say nothing."""
    ends = {value.name for value in graph.output}
    called: dict[str, str] = {}
    found = []
    for number, node in enumerate(graph.node):
        inputs = [called.get(name, short(name)) for name in node.input]
        called |= {name: f"{number}.{i}" for i, name in enumerate(node.output) if name not in ends}
        found.append((node.op_type, node.domain, inputs, [called.get(n, n) for n in node.output], attributes(node)))
    return found


def test_plain_export_of_a_plain_base(tmp_path: Path) -> None:
    """`--heads 0` needs no heads in the checkpoint."""
    source = checkpoints.save_plain(tmp_path / "base", checkpoints.CONFIGS["qwen2"])
    graph = export_bundle(tmp_path / "out" / "model.onnx", source, heads=0)
    assert load_bundle(graph).topology == Plain()


def run_graph(path: Path, outputs: list[str], **feed: np.ndarray) -> list[np.ndarray]:
    """One run of a graph with empty caches."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    cache = {
        value.name: np.zeros((1, value.shape[1], 16, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    return session.run(outputs, cache | feed)


def test_optional_inputs_have_defaults(bundle: FolderOf) -> None:
    """A caller gets all rows of the base, and what the heads say behind the last."""
    folder = bundle("llama-grouped")
    ids = np.arange(10, 17)[None]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    first, top, states = run_graph(folder / "model.onnx", ["logits", "topk_ids", "penultimate_states"], **feed)
    assert first.shape == (1, 7, checkpoints.VOCAB) and top.shape == (1, 7, 128) and states.shape == (1, 7, 64)
    (rows,) = run_graph(folder / "model.onnx", ["logits"], **feed, num_logits_to_keep=np.array(2))
    np.testing.assert_allclose(rows, first[:, -2:], atol=1e-6)
    feed = {"penultimate_states": states, "attention_mask": np.ones_like(ids)}
    last, values, top = run_graph(folder / "drafter.onnx", ["logits", "topk_logits", "topk_ids"], **feed)
    assert last.shape == (1, 2, checkpoints.VOCAB) and top.shape == (1, 2, 64)
    np.testing.assert_array_equal(values, np.take_along_axis(last, top, -1))
    (chosen,) = run_graph(folder / "drafter.onnx", ["logits"], **feed, head_rows=np.array([0, -1]))
    assert chosen.shape == (1, 4, checkpoints.VOCAB)
    np.testing.assert_allclose(chosen[:, 2:], last, atol=1e-6)


def test_both_parts_of_conditioned_heads_at_once(bundle: FolderOf) -> None:
    """They share no node, so whoever feeds both gets both: what the draft of the last row reads, and other words."""
    folder = bundle("phi")
    ids = np.arange(10, 17)[None]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (states,) = run_graph(folder / "model.onnx", ["penultimate_states"], **feed)
    feed = {"penultimate_states": states, "attention_mask": np.ones_like(ids)}
    others = np.random.default_rng(0).normal(size=(1, 5, 3 * 64)).astype(np.float32)
    feed |= {"draft_states": others, "previous_tokens": ids[:, :5], "draft_part": np.array(1)}
    wanted = ["head_states", "logits", "topk_logits", "topk_ids"]
    last, logits, values, top = run_graph(folder / "drafter.onnx", wanted, **feed)
    words = checkpoints.WORDS.numpy()
    assert last.shape == (1, 2, 3 * 64) and logits.shape == (1, 5, len(words)) and top.shape == (1, 5, 64)
    places = np.full(checkpoints.VOCAB, -1)
    places[words] = np.arange(len(words))
    np.testing.assert_array_equal(values, np.take_along_axis(logits, places[top], -1))
    (chosen,) = run_graph(folder / "drafter.onnx", ["head_states"], **feed, head_rows=np.array([0, -1]))
    assert chosen.shape == (1, 4, 3 * 64)
    np.testing.assert_allclose(chosen[:, 2:], last, atol=1e-6)


def test_what_only_one_head_reads_stands_in_its_branch(
    bundle: FolderOf, checkpoint: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or with the layers, if that is too much for a branch, or a norm is not cut by rows; parity is proved of all."""
    bundles = [(bundle("phi"), False, 3 * 64), (bundle("cohere"), True, 64 + 1), (tmp_path / "whole", True, 64)]
    monkeypatch.setattr(head_ends, "BRANCH_BYTES", 0)
    export_bundle(tmp_path / "whole" / "model.onnx", checkpoint("phi"))
    for folder, inside, width in bundles:
        graph = onnx.load(folder / "drafter.onnx").graph
        outer, *branches = checkpoints.all_graphs(graph)
        assert any(weight.name.startswith("heads.1.mlp.") for weight in outer.initializer) == inside
        assert any(weight.name.startswith("heads.1.mlp.") for each in branches for weight in each.initializer) != inside
        (states,) = (value for value in graph.output if value.name == "head_states")
        assert states.type.tensor_type.shape.dim[-1].dim_value == width


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            LlamaConfig(
                **checkpoints.SIZES,
                rope_parameters=checkpoints.rope(
                    "longrope",
                    factor=3.0,
                    short_factor=[1.0] * 8,
                    long_factor=[2.0] * 8,
                    original_max_position_embeddings=32,
                ),
            ),
            "rope scaling 'longrope' changes with the length of the prompt",
        ),
    ],
)
def test_refusals(config: PretrainedConfig, complaint: str, tmp_path: Path) -> None:
    """What cannot be exact is refused, and leaves nothing behind."""
    source = checkpoints.save_multi(tmp_path / "checkpoint", config)
    with pytest.raises(ExportError, match=complaint):
        export_bundle(tmp_path / "out" / "model.onnx", source)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(("name", "heads"), [("gemma3", []), ("falcon-h1", ["--heads", "0"])])
def test_the_command_refuses(name: str, heads: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An architecture that cannot be expressed is one line and no file, with heads or without."""
    config, reason = REFUSED[name]
    source = (checkpoints.save_plain if heads else checkpoints.save_multi)(tmp_path / "checkpoint", config)
    capsys.readouterr()
    assert cli.main(["-o", str(tmp_path / "out"), "-m", str(source), *heads]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dynamo-export")]
    assert " is not supported: " in line and reason in line
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_longrope_within_its_short_context(tmp_path: Path) -> None:
    """Shortened to where only one table applies, the same model is exact."""
    rope = checkpoints.rope(
        "longrope", factor=3.0, short_factor=[1.5] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=32
    )
    source = checkpoints.save_multi(tmp_path / "checkpoint", LlamaConfig(**checkpoints.SIZES, rope_parameters=rope))
    graph = export_bundle(tmp_path / "out" / "model.onnx", source, context_length=32)
    assert load_bundle(graph).context_length == 32


@pytest.mark.parametrize("name", ["neox", "llama-grouped"])
def test_layers_with_equal_weights(name: str, checkpoint: FolderOf, tmp_path: Path) -> None:
    """A head that is a copy of the last layer: equal weights are merged in the graph, and it still agrees."""
    model = MultiTokenModel.load(checkpoint(name))
    model.heads[0].load_state_dict(model.decoder.layers[-1].state_dict())
    model.save(tmp_path / "copied")
    shutil.copyfile(checkpoint(name) / "tokenizer.json", tmp_path / "copied" / "tokenizer.json")
    export_bundle(tmp_path / "bundle" / "model.onnx", tmp_path / "copied")
