"""Graphs walked and edited, on one small enough to see."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dynamo_graph.errors import WriteError
from dynamo_graph.initializers import initializer, is_weight, lazily, option, sizes
from dynamo_graph.nodes import insert_behind, make, redirect, replace_node, stand_in
from dynamo_graph.passes import run_passes
from dynamo_graph.walk import attentions, downstream, has_features, upstream


def value(shape: list[int | str], name: str = "x") -> ir.Value:
    """A float value."""
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def diamond() -> tuple[ir.Model, list[ir.Node]]:
    """A graph x → a, a → b, a → c, b + c → d, which is its output."""
    x = value(["batch", "seq", 4])
    a = make("Neg", [x], "a", ["a"])
    b = make("Exp", [a.outputs[0]], "b", ["b"])
    c = make("Tanh", [a.outputs[0]], "c", ["c"])
    d = make("Add", [b.outputs[0], c.outputs[0]], "d", ["d"])
    graph = ir.Graph([x], [d.outputs[0]], nodes=[a, b, c, d], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10), [a, b, c, d]


def test_what_lies_before_and_behind() -> None:
    model, (a, b, c, d) = diamond()
    assert list(upstream(d.outputs[0])) == [d, b, c, a], "the nearest first"
    assert list(upstream(d.outputs[0], until={b, c})) == [d, b, c]
    assert list(upstream(b.outputs[0], None, c.outputs[0])) == [b, c, a]
    assert not upstream(model.graph.inputs[0])
    assert downstream(a.outputs[0]) == {b, c, d} and downstream(b.outputs[0], None) == {d}
    assert downstream(d.outputs[0]) == set()


@pytest.mark.parametrize(
    ("shape", "features"),
    [
        (["batch", "seq", 4], True),
        (["batch", "seq"], False),
        (["batch", 4, "seq"], False),
        (["batch", "rows", 4], False),
        ([1, 3, 4], False),
        ([], False),
    ],
)
def test_features_of_every_token(shape: list[int | str], features: bool) -> None:
    assert has_features(value(shape)) == features
    assert not has_features(None) and not has_features(ir.Value(name="of no known shape"))


def test_attentions_without_a_cache_are_refused() -> None:
    model, _ = diamond()
    assert attentions(model) == []
    model.graph.append(make("GroupQueryAttention", [model.graph.inputs[0]], "odd", ["y"], domain="com.microsoft"))
    with pytest.raises(WriteError, match=r"odd does not read past_key_values\.N\.key"):
        attentions(model)


def test_initializers_are_made_once() -> None:
    model, _ = diamond()
    one = initializer(model, "one", np.arange(6.0).reshape(2, 3))
    assert initializer(model, "one", np.zeros(1)) is one and is_weight(one) and sizes(one) == (2, 3)
    calls = []

    def turn(array: np.ndarray) -> np.ndarray:
        calls.append(array)
        return array.T

    turned = lazily(model, "turned", [one], turn, (3, 2))
    assert lazily(model, "turned", [one], turn, (3, 2)) is turned and not calls, "not before it is asked for"
    assert turned.const_value is not None and one.const_value is not None
    np.testing.assert_array_equal(turned.const_value.numpy(), one.const_value.numpy().T)
    chosen = option(model, "rows", np.zeros(0, np.int64), ["rows"])
    assert chosen in model.graph.inputs and not is_weight(chosen) and str(chosen.shape) == "[rows]"
    assert set(model.graph.initializers) == {"one", "turned", "rows"}


def test_nodes_take_the_places_of_others() -> None:
    model, (a, b, _, d) = diamond()
    graph = model.graph
    new = make("Sin", [a.outputs[0]], "new")
    replace_node(b, new)
    assert [node.name for node in graph] == ["a", "new", "c", "d"] and d.inputs[0] is new.outputs[0]
    assert new.outputs[0].name == "b"
    cast = make("Cast", [d.outputs[0]], "cast", attributes={"to": 10})
    insert_behind(graph, d.outputs[0], cast)
    stand_in(graph, d.outputs[0], cast.outputs[0], ".full", lambda reader: reader is not cast)
    assert [v.name for v in graph.outputs] == ["d"] and graph.outputs[0] is cast.outputs[0]
    assert d.outputs[0].name == "d.full" and cast.inputs[0] is d.outputs[0]
    first = make("Abs", [graph.inputs[0]], "first", ["first"])
    insert_behind(graph, graph.inputs[0], first)
    redirect(graph.inputs[0], first.outputs[0], lambda reader: reader is a)
    assert graph[0] is first and a.inputs[0] is first.outputs[0] and first.inputs[0] is graph.inputs[0]


class Complaining(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raise WriteError("not this graph")


class Idle(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, False)


def test_passes_are_run_in_order() -> None:
    model, _ = diamond()
    assert not run_passes(model, [Idle()])
    with pytest.raises(WriteError, match=r"^not this graph$") as raised:
        run_passes(model, [Idle(), Complaining()])
    assert not isinstance(raised.value.__cause__, ir.passes.PassError)


def test_unused_weights_go_unread() -> None:
    """onnx-ir's pass, which we rely on: defaults of inputs stay, and nothing is computed to find out."""
    model, (a, *_) = diamond()

    def never() -> ir.Tensor:
        raise AssertionError("read")

    lazy = ir.LazyTensor(never, dtype=ir.DataType.FLOAT, shape=ir.Shape([4]), name="lazy")
    for name in ("unused", "used"):
        model.graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]), const_value=lazy)
        )
    option(model, "rows", np.zeros(0, np.int64), ["rows"])
    model.graph.append(make("Abs", [a.outputs[0]], "idle", ["idle"]))
    total = make("Add", [model.graph.outputs[0], model.graph.initializers["used"]], "total", ["total"])
    model.graph.append(total)
    model.graph.outputs[0] = total.outputs[0]
    assert run_passes(model, [RemoveUnusedNodesPass()])
    assert [node.name for node in model.graph] == ["a", "b", "c", "d", "total"]
    assert set(model.graph.initializers) == {"used", "rows"}
    assert not run_passes(model, [RemoveUnusedNodesPass()])
