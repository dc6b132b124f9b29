"""Quantized graphs against torch models that have the dequantized weights, and what holds bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.naive import (
    all_graphs,
    all_nodes,
    attributes,
    graph_paths,
    in_passes,
    initializers,
    outputs,
    relative,
    stored_weights,
    torch_outputs,
    with_weights,
)

from dynamo_quantize import Options, QuantizeError, quantize
from dynamo_quantize.schemes import resolve
from dynamo_runtime import Engine
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.session import Session
from dynamo_runtime.step import ALL

ExportOf = Callable[[str], Any]
SmallerOf = Callable[..., Bundle]
NAMES = ["plain", "parallel", "conditioned", "words", "cp", "lookahead"]
TOKENS = np.random.default_rng(0).integers(1, 320, 40).tolist()
FP32_CACHE = {"kv_cache": "fp32"}
WEIGHT_ONLY: list[tuple[str, dict[str, Any]]] = [
    ("int8", FP32_CACHE),
    ("int4", FP32_CACHE),
    ("int4", FP32_CACHE | {"algorithm": "rtn", "symmetric": False, "block_size": 16, "parts": {"heads": "fp32"}}),
]


def exact(bundle: Bundle, folder: Path) -> Path:
    """A copy of the graphs whose products keep their activations in fp32."""
    folder.mkdir()
    for path in graph_paths(bundle):
        model = onnx.load(path)
        for node in all_nodes(model.graph):
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1
        onnx.save(model, folder / path.name)
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("scheme", "options"), WEIGHT_ONLY, ids=["int8", "gptq", "rtn"])
def test_weights_of_torch(
    scheme: str, options: dict[str, Any], name: str, export: ExportOf, smaller: SmallerOf, tmp_path: Path
) -> None:
    """The graph is the torch model with the stored weights; with activations in int8 it is so within a few percent."""
    exported, bundle = export(name), smaller(name, scheme, **options)
    model = exported.model()
    full = torch_outputs(model, TOKENS)
    small = stored_weights(*graph_paths(bundle))
    assert with_weights(model, initializers(*graph_paths(exported.bundle)), small) > 60_000
    expected = torch_outputs(model, TOKENS)
    as_fp32 = replace(bundle, folder=exact(bundle, tmp_path / "exact"))
    for output, theirs in outputs(as_fp32, TOKENS).items():
        np.testing.assert_allclose(theirs, expected[output], atol=2e-4)
        # The weights' own error is what the comparison above must not be blind to.
        assert relative(full[output], expected[output]) > 1e-3
    for output, ours in outputs(bundle, TOKENS).items():
        assert relative(ours, expected[output]) < 0.04


@pytest.mark.parametrize("name", ["capped", "scaled"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp16"])
def test_what_lies_behind_the_output_embedding(name: str, scheme: str, export: ExportOf, smaller: SmallerOf) -> None:
    """The product is found through what the base does to its logits, which stays in 32 bits; top-K are of the result.

    Against torch with the stored weights, or in fp16 with its own.
    """
    exported, bundle = export(name), smaller(name, scheme, **({} if scheme == "fp16" else FP32_CACHE))
    model = exported.model()
    small = stored_weights(*graph_paths(bundle))
    weight = "model.embed_tokens.weight" if name == "capped" else "lm_head.weight"
    if scheme != "fp16":
        assert any(key.startswith(weight) for key in small), "the output embedding is quantized"
        with_weights(model, initializers(*graph_paths(exported.bundle)), small)
    expected = torch_outputs(model, TOKENS)
    for output, ours in outputs(bundle, TOKENS).items():
        assert ours.dtype == np.float32
        assert relative(ours, expected[output]) < 0.04
        if name == "capped":
            assert 0.3 < np.abs(ours).max() <= 0.5
    step = Session(bundle, provider="cpu", threads=1).step(TOKENS, rows=ALL, heads=ALL)
    values, ids = step.topk(1)
    np.testing.assert_array_equal(values, -np.sort(-step.logits(1), axis=1)[:, : values.shape[1]])
    np.testing.assert_array_equal(values, np.take_along_axis(step.logits(1), ids, 1))
    for path in graph_paths(bundle):
        kinds = {node.op_type for node in onnx.load(path).graph.node if "/out/out_" in node.name}
        assert {"Tanh", "Div", "Mul"} <= kinds if name == "capped" else "Mul" in kinds


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_cache_in_int8(name: str, scheme: str, export: ExportOf, smaller: SmallerOf, text: Path) -> None:
    """Keys and values in int8 change the logits by a few percent; all caches have that type, and scales by channel."""
    bundle, exported = smaller(name, scheme), export(name)
    tokens = bundle.tokenizer.encode(text.read_text()[3000:]).ids[:40]  # like the calibration text
    model = exported.model()
    with_weights(model, initializers(*graph_paths(exported.bundle)), stored_weights(*graph_paths(bundle)))
    expected = torch_outputs(model, tokens)
    session = Session(bundle, provider="cpu", threads=1)
    for output, ours in in_passes(session, tokens).items():
        assert relative(ours, expected[output]) < 0.05
    pairs = every_buffer(session)
    base, record = [bundle.kv_heads] * bundle.kv_layers, bundle.drafter
    heads = base if record is None else base + [record.kv_heads] * record.kv_layers
    assert len(pairs) == len(heads)
    assert {buffer.dtype for pair in pairs for buffer in pair} == {np.dtype(np.int8)}
    for pair, count in zip(pairs, heads, strict=True):
        for buffer in pair:
            largest = np.abs(buffer[0, :, : len(tokens)].astype(int)).max((1,))
            assert largest.shape == (count, bundle.head_size)
            assert (largest > 30).all(), "every channel uses the range"
    nodes = [node for path in graph_paths(bundle) for node in onnx.load(path).graph.node]
    caches = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    assert [attributes(node)["k_quant_type"] for node in caches] == [b"PER_CHANNEL"] * len(pairs)


def every_buffer(session: Session) -> list[Any]:
    """Keys and values of all layers, those of further heads among them."""
    return [*session.cache.buffers, *([] if session.heads is None else session.heads.kv.buffers)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("scheme", "size"), [("int8", None), ("int8", 32), ("int4", 32)], ids=["64", "32", "int4"])
def test_passes_of_every_width_agree_bit_by_bit(
    scheme: str, size: int | None, threads: int, name: str, smaller: SmallerOf
) -> None:
    """With the cache in int8, by default and in blocks of 32: one token at a time, several, or all.

    And behind rolled-back ones.
    """
    bundle = smaller(name, scheme, block_size=size)
    session = Session(bundle, provider="cpu", threads=threads)
    narrow = in_passes(session, TOKENS, 1)
    for width in (2, 3, 4, 5, 6, 7, 8, 16, None):
        session.cache.reset()
        for output, wide in in_passes(session, TOKENS, width).items():
            np.testing.assert_array_equal(wide, narrow[output])
    session.cache.reset()
    session.step(TOKENS[:11])
    session.step([5, 6, 7, 8, 9])
    session.cache.rollback(11)
    for output, again in in_passes(session, TOKENS[11:], 4).items():
        np.testing.assert_array_equal(again, narrow[output][11:])


@pytest.mark.parametrize("name", NAMES)
def test_passes_of_int4_differ_by_the_last_bit(name: str, smaller: SmallerOf) -> None:
    """The output embedding's blocks of 128 add up in another order, which nothing behind them makes larger."""
    narrow = outputs(smaller(name, "int4"), TOKENS, 1)
    for width in (2, 3, 5):
        for output, wide in outputs(smaller(name, "int4"), TOKENS, width).items():
            np.testing.assert_allclose(wide, narrow[output], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_verified_text_is_the_text(name: str, scheme: str, smaller: SmallerOf) -> None:
    """Greedy speculative decoding writes what autoregressive decoding writes, token by token."""
    engine = Engine(smaller(name, scheme), provider="cpu", threads=1)
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": 24, "ignore_eos": True}
    drafted = 0
    for prompt in ([3], TOKENS[:7], TOKENS[7:31]):
        texts = []
        for strategy in ("autoregressive", "speculative"):
            engine.reset()
            found = engine.generate(prompt, strategy=strategy, **greedy)
            texts.append(found.tokens)
        drafted += sum(found.statistics.proposed_at_depth)
        assert texts[0] == texts[1] and len(texts[0]) == 24
    assert drafted > 0


@pytest.mark.parametrize("name", NAMES)
def test_half(name: str, export: ExportOf, smaller: SmallerOf) -> None:
    """Weights, activations and cache in 16 bits give torch's logits within their precision, in 32 bits."""
    exported, bundle = export(name), smaller(name, "fp16")
    expected = torch_outputs(exported.model(), TOKENS)
    session = Session(bundle, provider="cpu", threads=1)
    for output, ours in in_passes(session, TOKENS, 8).items():
        assert ours.dtype == np.float32
        assert relative(ours, expected[output]) < 4e-3
    assert {buffer.dtype for pair in every_buffer(session) for buffer in pair} == {np.dtype(np.float16)}
    full, half = (initializers(*graph_paths(each)) for each in (exported.bundle, bundle))
    matrices = {n for n, array in full.items() if array.ndim == 2 and n != "cp.gate.weight" and "cache" not in n}
    for matrix in matrices:
        np.testing.assert_array_equal(half[matrix], full[matrix].astype(np.float16))


def test_too_large_for_half(export: ExportOf, tmp_path: Path) -> None:
    """A weight beyond the range of 16 bits is named, not turned into infinity."""
    source = export("plain").bundle
    model = onnx.load(source.graph_path)
    tensor = next(i for i in model.graph.initializer if i.name == "gpt_neox.layers.1.mlp.dense_4h_to_h.weight")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[3, 3] = -7e4
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    (tmp_path / "source").mkdir()
    onnx.save(model, tmp_path / "source" / source.graph)
    bundle = replace(source, folder=tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(QuantizeError, match=r"dense_4h_to_h\.weight holds 7e\+04, which is too large for fp16"):
        quantize.write_bundle(bundle, resolve("fp16", Options()), tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
def test_dynamic(name: str, export: ExportOf, smaller: SmallerOf) -> None:
    """Weights of torch in int8 by output, products in integers, logits within what rounding activations costs."""
    exported, bundle = export(name), smaller(name, "int8-dynamic")
    assert not bundle.lossless and bundle.precision == "int8-dynamic"
    small = stored_weights(*graph_paths(bundle))
    model = exported.model()
    full = initializers(*graph_paths(exported.bundle))
    turned = {weight.removesuffix(".transposed"): array for weight, array in small.items()}
    lookups = {weight: array for weight, array in small.items() if weight in turned and "embed" in weight}
    for weight, array in (turned | lookups).items():
        theirs = full[weight] if full[weight].shape == array.shape and "embed" in weight else full[weight].T
        assert relative(array, theirs) < 0.02
    with_weights(model, full, turned)
    expected = torch_outputs(model, TOKENS)
    for output, ours in outputs(bundle, TOKENS).items():
        assert relative(ours, expected[output]) < 0.05
    types = [node.op_type for path in graph_paths(bundle) for node in all_nodes(onnx.load(path).graph)]
    assert not {"MatMul", "FusedMatMul"} & set(types) - ({"MatMul"} if name == "cp" else set())


@pytest.mark.parametrize("name", ["parallel", "lookahead"])
def test_tied_embeddings_are_stored_once(name: str, export: ExportOf, smaller: SmallerOf) -> None:
    """Look-up and product share one weight of 8 bits, so that all weights take little more than a byte a number.

    In blocks that need no padding here.
    """
    full, small = (initializers(b.graph_path) for b in (export(name).bundle, smaller(name, "int8", block_size=32)))
    matrices = {n: array for n, array in full.items() if array.ndim == 2 and "cache" not in n}
    stored = {n: array for n, array in small.items() if array.dtype == np.uint8}
    assert sum(array.nbytes for array in stored.values()) == sum(array.size for array in matrices.values())
    assert [n.rsplit(".q", 1)[0] for n in stored if "embed" in n] == ["model.embed_tokens.weight"]
    assert {n for n, array in small.items() if array.dtype == np.float32 and array.ndim == 2} <= {
        *(f"{n}.scales" for n in stored),
        *("cos_cache", "sin_cache"),
    }


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic", "fp16"])
def test_the_gate_of_a_joint_head_stays(scheme: str, export: ExportOf, smaller: SmallerOf) -> None:
    """Too narrow to be worth it: its weight and its product are what they were (fp16: its weight in 16 bits)."""
    full, small = (initializers(*graph_paths(b)) for b in (export("cp").bundle, smaller("cp", scheme)))
    expected = full["cp.gate.weight"].astype(np.float16 if scheme == "fp16" else np.float32)
    np.testing.assert_array_equal(small["cp.gate.weight"], expected)
    assert small["cp.gate.weight"].dtype == expected.dtype


def formats(bundle: Bundle) -> dict[str, str]:
    """What every quantized weight is stored as, from its name."""
    names = [name for name, array in initializers(*graph_paths(bundle)).items() if array.dtype == np.uint8]
    return {name.rsplit(".", 1)[0]: name.rsplit(".", 1)[1] for name in names if not name.endswith(".zero_points")}


def test_formats_of_the_parts(smaller: SmallerOf) -> None:
    """Heads and output embedding of int4 have 8 bits, every other weight 4; single parts can be given a precision."""
    assert set(formats(smaller("cp", "int8")).values()) == {"q8b64"}
    default = formats(smaller("cp", "int4"))
    assert default.pop("lm_head.weight") == "q8b128"
    heads = {name: default.pop(name) for name in list(default) if name.startswith(("heads.", "cp."))}
    assert set(heads.values()) == {"q8b64"}
    assert set(default.values()) == {"q4b32"} and len(default) + len(heads) == 14
    parts = {"stem": "int8", "heads": "fp32", "output": "int4"}
    changed = smaller("cp", "int4", parts=parts, algorithm="rtn")
    found = formats(changed)
    assert not [name for name in found if name.startswith(("heads.", "cp."))]
    assert {found[name] for name in found if ".layers.0." in name} == {"q8b64"}
    assert {found[name] for name in found if ".layers.1." in name} == {"q4b32"} == {found["lm_head.weight"]}
    assert changed.quantization.parts == {
        "stem": ["int8, blocks of 64"],
        "first_head": ["int4, blocks of 32, symmetric, rtn"],
        "heads": ["fp32"],
        "output": ["int4, blocks of 32, symmetric, rtn"],
        "input": ["int4, blocks of 32, symmetric, rtn"],
    }


PARTS: list[tuple[str, str, dict[str, str], list[str]]] = [
    ("conditioned", "int8", {"heads": "q8b64", "embedding": "q8b64"}, ["int8, blocks of 64"]),
    ("conditioned", "int4", {"heads": "q8b64", "embedding": "q8b64"}, ["int8, blocks of 64"]),
    ("words", "int4", {"heads": "q8b64", "embedding": "q4b32"}, ["int8, blocks of 64"]),
]


@pytest.mark.parametrize(("name", "scheme", "wanted", "said"), PARTS)
def test_what_further_heads_are_stored_as(
    name: str, scheme: str, wanted: dict[str, str], said: list[str], smaller: SmallerOf
) -> None:
    """Layers, conditions and the draft vocabulary's embedding in the heads' format; what is the base's stays so."""
    bundle = smaller(name, scheme)
    assert bundle.quantization is not None and bundle.quantization.parts["heads"] == said
    found = formats(bundle)
    own = {key: form for key, form in found.items() if key.startswith(("heads.", "condition.", "draft."))}
    assert set(own.values()) == {wanted["heads"]}
    heads = 2 if name == "conditioned" else 1
    conditions = {f"condition.{head}.{layer}.weight" for head in range(heads) for layer in ("hidden", "out")}
    assert conditions | ({"draft.embedding.weight"} if name == "words" else set()) <= own.keys()
    lookup = "model.embed_tokens.weight" if name == "conditioned" else "gpt_neox.embed_in.weight"
    assert formats(bundle)[lookup] == wanted["embedding"]


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic", "fp16"])
@pytest.mark.parametrize("name", ["conditioned", "words"])
def test_what_the_base_has_is_not_written_twice(name: str, scheme: str, smaller: SmallerOf) -> None:
    """The drafter's file refers to the base's embeddings, and has no full weight left that nobody reads."""
    bundle = smaller(name, scheme)
    model = onnx.load(bundle.folder / "drafter.onnx", load_external_data=False)
    referred = {i.name for i in model.graph.initializer if i.external_data}
    places = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
    assert places == {bundle.graph}
    lookup = "model.embed_tokens.weight" if name == "conditioned" else "gpt_neox.embed_in.weight"
    assert {each.split(".q")[0] for each in referred} >= {lookup}
    embeddings = [i for i in model.graph.initializer if {*i.dims} & {320} and len(i.dims) > 1]
    assert all(i.external_data for i in embeddings if np.prod(i.dims) > 8192)
    for graph in all_graphs(model.graph):
        used = {each for inner in all_graphs(graph) for node in inner.node for each in node.input}
        own = {i.name for i in graph.initializer} - {value.name for value in graph.input}
        assert own <= used


def test_a_shared_embedding_is_what_it_is_in_the_base(smaller: SmallerOf) -> None:
    """Fitted to the base's states, numbers and scales alike."""
    parts = dict.fromkeys(("stem", "first_head", "heads"), "fp32") | {"output": "int4", "input": "int4"}
    bundle = smaller("conditioned", "int4", parts=parts, algorithm="gptq", **FP32_CACHE)
    base, drafter = (initializers(path) for path in graph_paths(bundle))
    shared = {name for name in base.keys() & drafter.keys() if "embed" in name}
    assert len(shared) >= 2
    for name in shared:
        np.testing.assert_array_equal(base[name], drafter[name])


def test_look_up_without_padding(smaller: SmallerOf) -> None:
    """A look-up has no room for padding, so its blocks are halved until they fit: 128 does not divide 64."""
    found = formats(smaller("cp", "int8", block_size=128))
    assert found.pop("gpt_neox.embed_in.weight") == "q8b64"
    assert set(found.values()) == {"q8b128"}
    assert formats(smaller("parallel", "int4"))["model.embed_tokens.weight"] == "q8b64"


def test_tied_embeddings_have_one_precision(export: ExportOf, tmp_path: Path) -> None:
    """Another precision asked for the input embedding alone cannot be had."""
    wanted = resolve("int8", Options(parts={"input": "fp32"}, kv_cache="fp32"))
    with pytest.raises(QuantizeError, match="input and output embedding are one weight here"):
        quantize.write_bundle(export("parallel").bundle, wanted, tmp_path)
    same = resolve("int8", Options(parts={"input": "int8"}, kv_cache="fp32"))
    quantize.write_bundle(export("parallel").bundle, same, tmp_path)


def test_hessians_are_those_of_the_inputs(export: ExportOf, smaller: SmallerOf, text: Path) -> None:
    """On the calibration text the outputs of gptq are closer to fp32 than those of rounding to nearest."""
    exported = export("cp")
    tokens = exported.bundle.tokenizer.encode(text.read_text()).ids[:96]
    full = outputs(exported.bundle, tokens)
    found = {}
    for algorithm in ("gptq", "rtn"):
        small = smaller("cp", "int4", algorithm=algorithm, **FP32_CACHE)
        found[algorithm] = {name: relative(x, full[name]) for name, x in outputs(small, tokens).items()}
    assert set(found["gptq"]) == {"logits", "gate", "factor_logits"}
    for name, error in found["gptq"].items():  # further heads are rounded, and read better states
        assert error < (0.8 if name == "logits" else 1.0) * found["rtn"][name]


def test_a_tied_weight_is_rounded_for_its_product(export: ExportOf, smaller: SmallerOf) -> None:
    """With GPTQ the shared embedding is rounded for the states it meets, at the cost of its own numbers' error."""
    parts = dict.fromkeys(("stem", "first_head", "heads"), "fp32") | {"output": "int4", "input": "int4"}
    full = initializers(export("parallel").bundle.graph_path)["model.embed_tokens.weight"]
    error = {}
    for algorithm in ("gptq", "rtn"):
        bundle = smaller("parallel", "int4", parts=parts, algorithm=algorithm, **FP32_CACHE)
        weights = stored_weights(bundle.graph_path)
        assert set(weights) == {"model.embed_tokens.weight"}
        error[algorithm] = relative(weights["model.embed_tokens.weight"], full)
    # Rounded for look-ups alone, every number by itself, its error would be the smaller one.
    assert error["rtn"] * 1.05 < error["gptq"] < 3 * error["rtn"]
