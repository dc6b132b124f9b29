"""What `benchmarks/rows.py` measures is what it says, on shapes that take no time."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import rows
from onnx import numpy_helper
from rows_kernels import ATTENTIONS, PRODUCTS, Attention, Attentions, Product, Products, Shapes
from rows_operators import operators

from dynamo_quantize.blocks import Format
from dynamo_runtime import DEFAULT_BUNDLE, load_bundle

SHAPES = Shapes(2, 4, 2, 16, (("a", 64, 128), ("b", 64, 64), ("b", 64, 64), ("c", 64, 320)))
PAST = 40


def attend(way: Attention, bits: bool) -> np.ndarray:
    """Results of the second of eight rows, from a cache of the same numbers."""
    graph = Attentions(SHAPES, way, 1, 64, threads=1)
    for index, (name, array) in enumerate(graph.buffers.items()):
        whole = np.random.default_rng(index).integers(-100, 100, array.shape)
        graph.buffers[name] = whole.astype(np.int8) if bits else (whole * 4 / 127).astype(np.float32)
    binding = graph.bind(PAST, 1, 1)
    graph.kernels.session.run_with_iobinding(binding)
    return np.stack([each for each in binding.copy_outputs_to_cpu() if each.ndim == 3])


@pytest.mark.parametrize("way", [way for way in ATTENTIONS if not way.grouping], ids=lambda way: way.name)
def test_every_attention_runs(way: Attention) -> None:
    """And all rows of an int8 cache are alike."""
    difference = Attentions(SHAPES, way, 1, 64, threads=1).difference(PAST)
    assert difference == 0 if way.bits else difference is None or difference < 1e-2


def test_an_int8_cache_says_what_an_fp32_one_says() -> None:
    """Tiled and not; but for the new row's own key and value, which are rounded."""
    by_name = {way.name: way for way in ATTENTIONS}
    whole = attend(by_name["fp32 cache"], False)
    for name in ("int8 cache", "int8 cache, tiled", "int8 cache, one scale"):
        np.testing.assert_allclose(attend(by_name[name], True), whole, atol=2e-2)


@pytest.mark.parametrize("way", PRODUCTS, ids=lambda way: way.name)
def test_every_product_runs(way: Product) -> None:
    """Products of whole numbers, and of narrow blocks, do not depend on how many rows there are."""
    difference = Products(SHAPES, way, 1).difference()
    narrow = way.form in (Format(8, 32), Format(8, 64), Format(4, 32))
    assert difference == 0 if narrow or way.static else difference < 0.1


def test_operators_of_a_pass_are_those_of_its_graph() -> None:
    """Every attention and product once, and as many bytes as the products' weights and scales take in the file."""
    bundle = load_bundle(DEFAULT_BUNDLE)
    found = {row["way"]: row for row in operators(bundle, 1, (1, 2), 2)}
    assert found["GroupQueryAttention"]["count"] == bundle.kv_layers
    graph = onnx.load(str(bundle.graph_path)).graph
    sizes = {each.name: len(numpy_helper.to_array(each).tobytes()) for each in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert sum(row["bytes"] for row in found.values()) == sum(sizes.get(name, 0) for n in nodes for name in n.input)
    assert all(row["ms"]["1"] > 0 and row["ms"]["2"] > 0 for row in found.values() if row["bytes"])


def test_tables_go_between_their_marks() -> None:
    """What stood there goes, what stands around stays, and a section without figures is left alone."""
    found = [{"way": "a", "threads": 1, "past": 64, "ratio": {str(m): 1.5 for m in rows.WIDTHS}}]
    record = {"options": found, "options_rounds": 3, "bundle": "b", "machine": "c"}
    page = "<!-- conditions -->\n<!-- end -->\none\n<!-- options -->\nold\n<!-- end -->\n"
    page += "two\n<!-- passes -->\nkept\n<!-- end -->\n"
    filled = rows.fill(page, record)
    assert "-->\none\n<!-- options -->\n| session's options" in filled and "old" not in filled
    assert "| a | 1.50 |" in filled and "two\n<!-- passes -->\nkept\n<!-- end -->\n" in filled
    assert rows.fill(filled, record) == filled
