"""Every architecture and feature, through the whole pipeline and its gate, and against oracles of our own."""

from __future__ import annotations

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

from dynamo_export import ExportError, cli, export_bundle
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
    graph = onnx.load(folder / "model.onnx").graph
    nodes = [node for node in checkpoints.all_nodes(graph) if node.op_type == "GroupQueryAttention"]
    attention = [attributes(node) for node in nodes]
    assert len(attention) == 1 + checkpoints.heads_of(name)  # two layers of the base, and one a further head
    assert [a.get("local_window_size", -1) for a in attention] == WINDOWS.get(name, [-1] * len(attention))
    outside = 0 if name in ROTARY_OUTSIDE else 1
    assert [a["do_rotary"] for a in attention] == NOT_ROTATED.get(name, [outside] * len(attention))
    assert {a.get("softcap", 0.0) for a in attention} == {3.0 if name == "gemma2" else 0.0}
    assert ("skipped_states" in {value.name for value in graph.input}) == (name not in ROTARY_OUTSIDE)
    packed = [not node.input[1] for node in nodes]
    assert all(packed) if name in PACKED else not any(packed)
    vocabularies = [i.name for i in graph.initializer if sorted(i.dims) == [64, checkpoints.VOCAB]]
    config = checkpoints.CONFIGS[name]
    if config.hidden_size == 64:
        assert len(vocabularies) == (1 if config.tie_word_embeddings else 2)
    products = [n for n in graph.node if {"out_states"} & set(n.input)]
    assert len(products) == 1, "one product with the output embedding for all heads"
    assert _between(graph, products[0]) == BEHIND.get(name, [])


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
        further = [logits[0, -1].numpy() for logits in model(torch.tensor([tokens]))]
    for head, logits in enumerate(further, start=1):
        np.testing.assert_allclose(step.logits(head)[0], logits, atol=3e-5)


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


@pytest.mark.parametrize(("heads", "topology", "layers"), [(0, Plain(), 2), (2, ParallelHeads(2), 3)])
def test_fewer_heads(heads: int, topology: Topology, layers: int, checkpoint: FolderOf, tmp_path: Path) -> None:
    """`--heads 0` is the plain language model, and one head can be left out."""
    graph = export_bundle(tmp_path / "out" / "model.onnx", checkpoint("neox"), heads=heads)
    bundle = load_bundle(graph)
    assert (bundle.topology, bundle.kv_layers) == (topology, layers)
    session = onnxruntime.InferenceSession(graph)
    outputs = {output.name for output in session.get_outputs()}
    assert ("penultimate_states" in outputs) == (heads > 0)
    optional = {value.name for value in session.get_overridable_initializers()}
    assert optional == ({"num_logits_to_keep", *(["head_rows", "skipped_states"] if heads else [])})


def test_plain_export_of_a_plain_base(tmp_path: Path) -> None:
    """`--heads 0` needs no heads in the checkpoint."""
    source = checkpoints.save_plain(tmp_path / "base", checkpoints.CONFIGS["qwen2"])
    graph = export_bundle(tmp_path / "out" / "model.onnx", source, heads=0)
    assert load_bundle(graph).topology == Plain()


def test_optional_inputs_have_defaults(bundle: FolderOf) -> None:
    """A caller that knows nothing of them gets all rows of the first head, and the others are not computed."""
    folder = bundle("llama-grouped")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    ids = np.arange(10, 17)[None]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for layer in range(4):
        for part in ("key", "value"):
            feed[f"past_key_values.{layer}.{part}"] = np.zeros((1, 2, 16, 16), np.float32)
    first, ids = session.run(["logits", "topk_ids"], feed)
    assert first.shape == (1, 7, checkpoints.VOCAB) and ids.shape == (1, 7, 128)
    chosen = {"num_logits_to_keep": np.array(2), "head_rows": np.array([-1, 0])}
    rows = session.run(["logits"], feed | chosen)[0]
    assert rows.shape == (1, 2 + 2 * 2, checkpoints.VOCAB)
    np.testing.assert_allclose(rows[:, :2], first[:, -2:], atol=1e-6)


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
