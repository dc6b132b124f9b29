"""Graphs that come from anywhere: weights are read from files beside them, and from no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dynamo_graph.errors import WriteError
from dynamo_graph.read import read_model
from dynamo_runtime.wire import external_files

WEIGHT = np.arange(4, dtype=np.float32)


def external(location: str, **place: int) -> TensorProto:
    """The weight in another file."""
    tensor = numpy_helper.from_array(WEIGHT, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": 16, **place}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph(weights: TensorProto, *, where: str = "initializer") -> bytes:
    """A model x + w, in which w stands in one of the places that tensors may stand in."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    constant = helper.make_node("Constant", [], ["w"])
    constant.attribute.append(helper.make_attribute("value", weights))
    add = helper.make_node("Add", ["x", "w"], ["y"])
    nodes = [add] if where == "initializer" else [constant, add]
    body = helper.make_graph(nodes, "g", [x], [y], [weights] if where == "initializer" else [])
    if where == "branch":
        branch = helper.make_graph(
            [constant, helper.make_node("Add", ["x", "w"], ["z"])],
            "b",
            [],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])],
        )
        on = helper.make_tensor("on", TensorProto.BOOL, [], [True])
        node = helper.make_node("If", ["on"], ["y"], then_branch=branch, else_branch=branch)
        body = helper.make_graph([node], "g", [x], [y], [on])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Where the graph is to lie, with its weights beside it and a file outside."""
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "weights").write_bytes(WEIGHT.tobytes())
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").mkdir()
    return folder / "model.onnx"


def test_weights_beside_the_graph(model: Path) -> None:
    model.write_bytes(graph(external("weights")))
    value = read_model(model).graph.initializers["w"].const_value
    assert value is not None and np.array_equal(value.numpy(), WEIGHT)


@pytest.mark.parametrize("where", ["initializer", "constant", "branch"])
@pytest.mark.parametrize(
    "location", ["../secret", "{outside}", "link", "folder", "nowhere", "..", "", "m" * 300, "a\0b"]
)
def test_weights_elsewhere(model: Path, location: str, where: str) -> None:
    """Wherever in the graph: nothing is opened."""
    location = location.format(outside=model.parent.parent / "secret")
    model.write_bytes(graph(external(location), where=where))
    assert external_files(model.read_bytes()) == {location}
    with pytest.raises(WriteError, match="which is no file in the folder of the graph"):
        read_model(model)


@pytest.mark.parametrize("place", [{"offset": 8}, {"offset": -4}, {"offset": 1 << 60}])
def test_weights_beyond_their_file(model: Path, place: dict[str, int]) -> None:
    model.write_bytes(graph(external("weights", **place)))
    with pytest.raises(WriteError, match=r"ends before the weight|is not a readable ONNX file"):
        read_model(model)


@pytest.mark.parametrize(
    "content", [b"\x80" * 50, b"\x3a\x05abc", b"\x3b", onnx.ModelProto().SerializeToString() + b"x"]
)
def test_no_graph(model: Path, content: bytes) -> None:
    model.write_bytes(content)
    with pytest.raises(WriteError, match="is not a readable ONNX file"):
        read_model(model)
