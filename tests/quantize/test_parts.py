"""The part of every weight, told by the graph alone, is the one that its name says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
from support.naive import graph_paths, initializers

from dynamo_graph.read import read_model
from dynamo_quantize import QuantizeError
from dynamo_quantize.parts import Product, find_drafter_products, find_products
from dynamo_quantize.schemes import Part


def by_name(product: Product) -> Part:
    """The part that the weight's name says, in a model of two layers."""
    name = product.name
    if "embed" in name:
        return Part.INPUT if product.is_lookup else Part.OUTPUT
    if "lm_head" in name:
        return Part.OUTPUT
    layer = re.search(r"layers[./](\d+)", name)
    assert layer, name
    return [Part.STEM, Part.FIRST_HEAD][int(layer[1])]


# Parts and how many weights they have: attention and feed-forward are 2 + 2 products with NeoX, 2 + 3 with the others.
EXPECTED = {
    "plain": {Part.STEM: 4, Part.FIRST_HEAD: 4, Part.OUTPUT: 1, Part.INPUT: 1},
    "parallel": {Part.STEM: 5, Part.FIRST_HEAD: 5, Part.OUTPUT: 1, Part.INPUT: 1},
    "cp": {Part.STEM: 4, Part.FIRST_HEAD: 4, Part.OUTPUT: 1, Part.INPUT: 1},
    "lookahead": {Part.STEM: 5, Part.FIRST_HEAD: 5, Part.OUTPUT: 1, Part.INPUT: 1},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_parts_of_every_kind(name: str, export: Callable[[str], Any]) -> None:
    """No weight is missed or taken for another part's, with serial and parallel residuals and of every kind."""
    bundle = export(name).bundle
    model = read_model(bundle.graph_path)
    products = find_products(model, bundle.kv_layers)
    assert {product.name: product.part for product in products} == {p.name: by_name(p) for p in products}
    assert [product.part for product in products] == [by_name(product) for product in products]
    assert Counter(product.part for product in products) == EXPECTED[name]
    matrices = {name for name, array in initializers(bundle.graph_path).items() if array.ndim == 2}
    assert {product.name for product in products} == matrices - {"cos_cache", "sin_cache"}
    for product in products:
        assert product.transposed == ("embed" in product.name)


# Products of the drafter's graph: its layers, the joint head's maps, conditions with their look-up, and the embedding.
# Gate and up are one, and of two layers the projections to queries, keys and values.
DRAFTERS = {"parallel": 4 + 1, "cp": 4 + 2 + 1, "conditioned": 1 + 2 * 3 + 2 * 2 + 1 + 1, "words": 4 + 2 + 1 + 1}


@pytest.mark.parametrize("name", DRAFTERS)
def test_everything_in_the_drafter_is_of_its_heads(name: str, export: Callable[[str], Any]) -> None:
    """No weight is missed, those inside branches included."""
    bundle = export(name).bundle
    products = find_drafter_products(read_model(graph_paths(bundle)[1]))
    assert {product.part for product in products} == {Part.HEADS} and len(products) == DRAFTERS[name]
    matrices = {name for name, array in initializers(graph_paths(bundle)[1]).items() if array.ndim == 2}
    assert {product.name for product in products} == matrices - {"cos_cache", "sin_cache"}
    assert [product.is_lookup for product in products].count(True) == (name in ("conditioned", "words"))


def test_other_attentions_than_expected(export: Callable[[str], Any]) -> None:
    """A graph with another number of attention layers than the manifest says is refused."""
    bundle = export("parallel").bundle
    with pytest.raises(QuantizeError, match=r"has attention layers \[0, 1\] where 4 are expected"):
        find_products(read_model(bundle.graph_path), 4)


def test_no_product_before_the_logits(export: Callable[[str], Any]) -> None:
    """Without an output embedding there is nothing to tell the parts from."""
    bundle = export("parallel").bundle
    model = read_model(bundle.graph_path)
    for value in model.graph.initializers.values():
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    with pytest.raises(QuantizeError, match="no product with an output embedding before the graph's logits"):
        find_products(model, bundle.kv_layers)
