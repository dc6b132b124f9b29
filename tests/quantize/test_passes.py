"""Passes that make a graph smaller, on graphs as they are exported; what they compute is the matter of test_graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from dynamo_graph.initializers import is_weight, sizes
from dynamo_graph.passes import run_passes
from dynamo_graph.read import read_model
from dynamo_graph.walk import attentions, is_cache
from dynamo_quantize import QuantizeError
from dynamo_quantize.parts import Product, find_drafter_products, find_products, output_product
from dynamo_quantize.passes import QuantizeCache, ToHalf
from dynamo_quantize.schemes import Part

ExportOf = Callable[[str], Any]


def output_of(model: ir.Model, kv_layers: int) -> Product:
    """The product with the output embedding."""
    return next(product for product in find_products(model, kv_layers) if product.part is Part.OUTPUT)


@pytest.mark.parametrize("name", ["plain", "parallel"])
def test_a_cache_in_int8_once(name: str, export: ExportOf) -> None:
    """Every attention gets the scales of its layer, and all caches their type; a second time nothing happens."""
    bundle = export(name).bundle
    model = read_model(bundle.graph_path)
    shape = (bundle.kv_heads, bundle.head_size)
    ranges = [(np.full(shape, 127.0 * (1 + i)), np.zeros(shape)) for i in range(bundle.kv_layers)]
    assert QuantizeCache(ranges)(model).modified
    for layer, node in attentions(model):
        scales = [value.const_value.numpy() for value in node.inputs[12:14] if value and value.const_value]
        np.testing.assert_allclose(scales[0], 1.0 + layer)
        np.testing.assert_allclose(scales[1], 1 / 127)  # what is always 0 needs some scale
    caches = [value for value in [*model.graph.inputs, *model.graph.outputs] if is_cache(value)]
    assert len(caches) == 4 * bundle.kv_layers and {value.dtype for value in caches} == {ir.DataType.INT8}
    assert not QuantizeCache(ranges)(model).modified


@pytest.mark.parametrize("name", ["parallel", "conditioned"])
def test_half_of_a_drafter(name: str, export: ExportOf) -> None:
    """Its states are half as well, wherever there are any, the weights in branches too, and logits are not."""
    model = read_model(export(name).folder / "drafter.onnx")
    output = output_product(model, find_drafter_products(model))
    assert ToHalf(output)(model).modified
    weights = [value for graph in model.graphs() for value in graph.initializers.values() if is_weight(value)]
    assert {value.dtype for value in weights if len(sizes(value)) == 2} == {ir.DataType.FLOAT16}
    types = {value.name: value.dtype for value in [*model.graph.inputs, *model.graph.outputs]}
    states = {each: kind for each, kind in types.items() if each and each.endswith("_states")}
    told = {"head_states", "draft_states"} if name == "conditioned" else set()
    assert states == dict.fromkeys({"penultimate_states"} | told, ir.DataType.FLOAT16)
    assert types["logits"] == types["topk_logits"] == ir.DataType.FLOAT
    assert not ToHalf(output)(model).modified


@pytest.mark.parametrize("name", ["parallel", "cp"])
def test_half_once(name: str, export: ExportOf) -> None:
    """Matrices are half afterwards and logits are not; a second time nothing happens."""
    bundle = export(name).bundle
    model = read_model(bundle.graph_path)
    output = output_of(model, bundle.kv_layers)
    assert ToHalf(output)(model).modified
    weights = [value for value in model.graph.initializers.values() if is_weight(value)]
    assert {value.dtype for value in weights if len(sizes(value)) == 2} == {ir.DataType.FLOAT16}
    types = {value.name: value.dtype for value in model.graph.outputs}
    assert types["logits"] == types["topk_logits"] == ir.DataType.FLOAT
    assert not ToHalf(output)(model).modified


def test_what_a_pass_complains_of_arrives(export: ExportOf) -> None:
    """A pass within a sequence fails with its own error, not with onnx-ir's."""
    bundle = export("plain").bundle
    model = read_model(bundle.graph_path)
    output = output_of(model, bundle.kv_layers)
    assert output.weight.const_value is not None
    output.weight.const_value = ir.Tensor(output.weight.const_value.numpy() * 0 + 1e6)
    with pytest.raises(QuantizeError, match=r"holds 1e\+06, which is too large for fp16"):
        run_passes(model, [ToHalf(output)])
