"""Further heads folded into a branch of the graph, and unfolded again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.naive import all_nodes, outputs

from dynamo_graph.passes import FoldHeads, TakeSkippedStates, UnfoldHeads
from dynamo_graph.read import read_model
from dynamo_graph.write import write_model
from dynamo_runtime import NONE, Session
from dynamo_runtime.names import SKIPPED

TOKENS = [5, 250, 3, 91, 18, 7, 7, 30, 111, 62]


@pytest.mark.parametrize("name", ["parallel", "cp"])
def test_fold_and_unfold_are_inverse(name: str, export: Callable[[str], Any], tmp_path: Path) -> None:
    """As exported the heads are in the branch; unfolded, and folded again, the graph says the same."""
    bundle = export(name).bundle
    folded = onnx.load(bundle.graph_path).graph
    (branch,) = (node for node in folded.node if node.op_type == "If")
    inside = {node.name for node in all_nodes(folded)} - {node.name for node in folded.node}
    heads = [w.name for w in folded.initializer if "heads" in w.name and len(w.dims) == 2]
    read = {name for node in folded.node for name in node.input}
    assert heads and not read & set(heads), "what belongs to heads is read inside the branch alone"
    expected = outputs(bundle, TOKENS)
    model = read_model(bundle.graph_path)
    assert not any(node.op_type == "If" for node in model.graph)
    assert inside <= {node.name for node in model.graph}
    for turn, change in enumerate((UnfoldHeads(), FoldHeads(), UnfoldHeads())):
        folder = tmp_path / str(turn)
        folder.mkdir()
        assert change(model).modified == (turn > 0), "read_model unfolds"
        assert not change(model).modified, "a second time there is nothing to do"
        write_model(model, folder / "model.onnx")
        if name == "cp":  # the checker does not know onnxruntime's RMS norm
            onnx.checker.check_model(str(folder / "model.onnx"))
        again = replace(bundle, folder=folder)
        for output, values in outputs(again, TOKENS).items():
            np.testing.assert_array_equal(values, expected[output])
    assert branch.output


def test_a_graph_that_takes_no_skipped_states_stays(export: Callable[[str], Any]) -> None:
    """Kinds without further heads have nothing to fold."""
    for name in ("plain", "lookahead"):
        model = read_model(export(name).bundle.graph_path)
        assert SKIPPED not in {value.name for value in model.graph.inputs}
        before = len(model.graph)
        for change in (TakeSkippedStates(), FoldHeads(), UnfoldHeads()):
            assert not change(model).modified
        assert len(model.graph) == before


@pytest.mark.parametrize("name", ["parallel", "cp"])
def test_skipped_states_are_taken_once(name: str, export: Callable[[str], Any]) -> None:
    """An exported graph takes them already."""
    model = read_model(export(name).bundle.graph_path)
    before = [node.name for node in model.graph]
    assert not TakeSkippedStates()(model).modified
    assert [node.name for node in model.graph] == before


def test_a_pass_without_heads_costs_no_heads(export: Callable[[str], Any]) -> None:
    """The heads' caches are not even written."""
    session = Session(export("parallel").bundle, provider="cpu", threads=1)
    before = session.cache.buffers[-1][0].copy()
    session.step(TOKENS, heads=NONE)
    assert np.array_equal(session.cache.buffers[-1][0], before)
    session.step([4])
    assert np.any(session.cache.buffers[-1][0][:, :, : len(TOKENS) + 1], axis=(1, 3)).all()
