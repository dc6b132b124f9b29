"""Weights in blocks: what is stored, and that onnxruntime's kernels read it as we do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass
from support.naive import dequantize, relative, unpack

from dynamo_quantize.blocks import Blocks, Format, round_to_nearest
from dynamo_quantize.gptq import gptq
from dynamo_quantize.parts import Product
from dynamo_quantize.passes import StoreBlocks, StoreDynamic
from dynamo_quantize.schemes import Part

Quantizer = Callable[[np.ndarray, Format], Blocks]
OUTPUTS = 24
FORMATS = [
    Format(bits, size, symmetric) for bits in (8, 4) for size in (16, 32, 64, 128) for symmetric in (True, False)
]


def _gptq(weight: np.ndarray, form: Format) -> Blocks:
    x = np.random.default_rng(1).normal(size=(300, len(weight))).astype(np.float32)
    return gptq(weight, x.T @ x, form)


QUANTIZERS: dict[str, Quantizer] = {"rtn": round_to_nearest, "gptq": _gptq}
CASES = [
    pytest.param(name, form, k, id=f"{name}-{form.bits}x{form.block_size}{'s' if form.symmetric else 'a'}-{k}")
    for form in FORMATS
    for name in QUANTIZERS
    for k in (128, 160, 72)  # of every block a multiple; of some; of none
]


def random_weight(k: int, n: int = OUTPUTS, seed: int = 0) -> np.ndarray:
    """A weight [K, N] with an outlier in some places, a constant block, and means away from 0."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(k, n)) + rng.normal(size=n) * 0.5
    weight[5, 3] = -9.0
    weight[7, 4] = 7.0
    weight[:16, 6] = 0.0
    return weight.astype(np.float32)


def meant(blocks: Blocks, k: int) -> np.ndarray:
    """The weight [K, N] that blocks stand for."""
    form = blocks.format
    return dequantize(blocks.packed, blocks.scales, blocks.zero_points, form.bits, form.block_size, k).T


def product(blocks: Blocks, x: np.ndarray, n: int, level: int) -> np.ndarray:
    """X · W by a graph of one MatMulNBits."""
    arrays = {"packed": blocks.packed, "scales": blocks.scales}
    if blocks.zero_points is not None:
        arrays["zero_points"] = blocks.zero_points
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        K=x.shape[1],
        N=n,
        bits=blocks.format.bits,
        block_size=blocks.format.block_size,
        accuracy_level=level,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", x.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", n])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return run(helper.make_model(graph, opset_imports=opsets, ir_version=10), {"x": x})[0]


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of a model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


@pytest.mark.parametrize(("name", "form", "k"), CASES)
def test_the_kernel_multiplies_with_what_is_meant(name: str, form: Format, k: int) -> None:
    """Products with the stored weight are those with (q - zero point) · scale; the weight is close to the full one."""
    weight = random_weight(k)
    blocks = QUANTIZERS[name](weight, form)
    k_blocks = -(-k // form.block_size)
    assert blocks.packed.dtype == np.uint8 and blocks.scales.dtype == np.float32
    assert blocks.packed.shape == (OUTPUTS, k_blocks, form.block_size * form.bits // 8)
    assert blocks.scales.size == OUTPUTS * k_blocks
    assert (blocks.zero_points is None) == form.symmetric
    dense = meant(blocks, k)
    # One output against another would be wrong by more than 100 %.
    assert relative(dense, weight) < (0.02 if form.bits == 8 else 0.25)
    np.testing.assert_allclose(dense[:16, 6], 0, atol=1e-6 if form.block_size == 16 else 0.3)
    x = np.random.default_rng(2).normal(size=(5, k)).astype(np.float32)
    exact = x @ dense
    assert relative(product(blocks, x, OUTPUTS, 1), exact) < 1e-5
    assert relative(product(blocks, x, OUTPUTS, 4), exact) < 1.5e-2


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_rounded_to_the_nearest(form: Format) -> None:
    """Every weight has the number that is nearest to it, within half a scale unless it lies beyond the range."""
    weight = random_weight(160)
    blocks = round_to_nearest(weight, form)
    size, largest = form.block_size, 2**form.bits - 1
    k_blocks = blocks.scales.size // OUTPUTS
    scales = blocks.scales.reshape(OUTPUTS, k_blocks)
    zeros = np.full((OUTPUTS, k_blocks), 2 ** (form.bits - 1))
    if blocks.zero_points is not None:
        zeros = unpack(blocks.zero_points.reshape(OUTPUTS, -1), form.bits, k_blocks)
    q = unpack(blocks.packed, form.bits, size).reshape(OUTPUTS, -1)[:, :160]
    scale, zero = (np.repeat(a, size, axis=1)[:, :160] for a in (scales, zeros))
    error = np.abs((q - zero) * scale - weight.T)
    room = 1e-5 * np.abs(scale) + 1e-6
    for other in range(largest + 1):
        assert (error <= np.abs((other - zero) * scale - weight.T) + room).all()
    inside = (q > 0) & (q < largest)
    assert (error[inside] <= (np.abs(scale) / 2 + room)[inside]).all()
    assert (error <= np.abs(scale) + room).all()
    for n in range(OUTPUTS):
        for block in range(k_blocks):
            values = weight[block * size : (block + 1) * size, n]
            if form.symmetric:
                expected = np.abs(values).max() / 2 ** (form.bits - 1)
            else:
                expected = (max(values.max(), 0) - min(values.min(), 0)) / largest
            assert abs(scales[n, block]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize("form", [Format(8, 32), Format(4, 32), Format(4, 32, False)], ids=str)
def test_blocks_of_one_sign(name: str, form: Format) -> None:
    """Blocks whose range does not hold a zero have one all the same, and stay as close as others."""
    weight = np.random.default_rng(0).uniform(2, 3, (64, 8)).astype(np.float32)
    weight[:, 4:] *= -1
    assert relative(meant(QUANTIZERS[name](weight, form), 64), weight) < 0.1


@pytest.mark.parametrize("form", [Format(8, 32), Format(4, 32), Format(8, 64)], ids=str)
def test_rows_do_not_depend_on_each_other(form: Format) -> None:
    """A row's product is the same bit by bit, however many rows are multiplied at once."""
    for k, n in ((64, 320), (160, 96)):
        blocks = round_to_nearest(random_weight(k, n), form)
        x = np.random.default_rng(2).normal(size=(12, k)).astype(np.float32)
        single = np.concatenate([product(blocks, x[i : i + 1], n, 4) for i in range(12)])
        for rows in (2, 3, 5, 12):
            several = np.concatenate([product(blocks, x[i : i + rows], n, 4) for i in range(0, 12, rows)])
            np.testing.assert_array_equal(several, single)


@pytest.mark.parametrize("form", [Format(4, 32), Format(4, 32, False), Format(8, 64)], ids=str)
def test_slices_are_put_together(form: Format) -> None:
    """Quantizing some outputs at a time is quantizing them all at once."""
    weight = random_weight(96, 50)
    expected = round_to_nearest(weight, form)
    found = round_to_nearest(weight, form, at_once=96 * 7)
    np.testing.assert_array_equal(found.packed, expected.packed)
    np.testing.assert_array_equal(found.scales, expected.scales)
    assert (found.zero_points is None) == (expected.zero_points is None)
    if found.zero_points is not None and expected.zero_points is not None:
        np.testing.assert_array_equal(found.zero_points, expected.zero_points)


def _tied_model(weight: np.ndarray) -> tuple[ir.Model, list[Product]]:
    """A look-up and a product with one weight [80 ids, 64], and a product with a weight of its own [64, 80]."""
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["rows"], name="look-up"),
        helper.make_node("FusedMatMul", ["x", "embedding"], ["y"], "tied", domain="com.microsoft", transB=1),
        helper.make_node("MatMul", ["x", "own"], ["z"], name="own"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tied",
        [value("input_ids", TensorProto.INT64, ["rows"]), value("x", TensorProto.FLOAT, ["rows", 64])],
        [
            value("rows", TensorProto.FLOAT, ["rows", 64]),
            value("y", TensorProto.FLOAT, ["rows", 80]),
            value("z", TensorProto.FLOAT, ["rows", 80]),
        ],
        [numpy_helper.from_array(weight, "embedding"), numpy_helper.from_array(2 * weight.T.copy(), "own")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    lookup, tied, own = model.graph
    embedding, other = model.graph.initializers["embedding"], model.graph.initializers["own"]
    products = [
        Product(lookup, embedding, Part.INPUT, True),
        Product(tied, embedding, Part.OUTPUT, True),
        Product(own, other, Part.STEM, False),
    ]
    return model, products


@pytest.mark.parametrize(
    "form", [Format(8, 32), Format(8, 64), Format(4, 32), Format(4, 16, False), Format(4, 64, False)], ids=str
)
def test_one_stored_weight_for_look_up_and_product(form: Format) -> None:
    """Both read the same bytes; rows are exactly the dequantized ones; inputs and outputs keep their names."""
    weight = random_weight(80, 64)
    model, products = _tied_model(weight)
    stored = round_to_nearest(weight.T.copy(), form)
    other = round_to_nearest(2 * weight.T.copy(), form)
    changes = [StoreBlocks(each, stored if each.transposed else other) for each in products]
    assert all(change(model).modified for change in changes)
    assert not any(change(model).modified for change in changes), "a second time there is nothing to do"
    assert RemoveUnusedNodesPass()(model).modified, "the full weights"
    arrays = [tensor.const_value.numpy() for tensor in model.graph.initializers.values() if tensor.const_value]
    assert sum(array.nbytes for array in arrays if array.size == stored.packed.size) == 2 * stored.packed.nbytes
    assert [node.op_type for node in model.graph] == ["GatherBlockQuantized", "Reshape", "MatMulNBits", "MatMulNBits"]
    ids = np.array([0, 79, 5, 5], np.int64)
    x = np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32)
    rows, y, z = run(ir.to_proto(model), {"input_ids": ids, "x": x})
    dense = meant(stored, 64).T
    np.testing.assert_allclose(rows, dense[ids], atol=1e-6)
    assert relative(y, x @ dense.T) < 1.5e-2
    assert relative(z, 2 * x @ dense.T) < 1.5e-2


def test_products_of_integers() -> None:
    """Products of one input share its rounding; the outputs are those of the rounded weight, within the input's."""
    weight = random_weight(80, 64)
    model, products = _tied_model(weight)
    changes = [StoreDynamic(each) for each in products if not each.is_lookup]
    assert all(change(model).modified for change in changes)
    assert not any(change(model).modified for change in changes), "a second time there is nothing to do"
    ops = [node.op_type for node in model.graph]
    assert ops.count("DynamicQuantizeLinear") == 1 and ops.count("MatMulInteger") == 2
    x = np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32)
    rows, y, z = run(ir.to_proto(model), {"input_ids": np.array([3]), "x": x})
    np.testing.assert_array_equal(rows, weight[[3]])
    scales = np.abs(weight).max(axis=1, keepdims=True) / 127
    rounded = np.round(weight / np.where(scales == 0, 1, scales)) * scales
    assert relative(y, x @ rounded.T) < 1.5e-2 and relative(z, 2 * x @ rounded.T) < 1.5e-2
