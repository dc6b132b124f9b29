"""A bundle's graph with passes over trees of drafts: for a study, as no bundle has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dynamo_graph.read import read_model
from dynamo_graph.walk import attentions
from dynamo_graph.write import write_model
from dynamo_runtime import Session
from dynamo_runtime.binding import Binding
from dynamo_runtime.names import ATTENTION_MASK, INPUT_IDS, KEPT_ROWS, LOGITS, PENULTIMATE

POSITIONS, BIAS = "position_ids", "attention_bias"
_POSITIONS_INPUT, _BIAS_INPUT = 9, 10  # of GroupQueryAttention
_MASKED = -1e9  # its exponential is 0


def write_tree_graph(graph: Path, path: Path) -> None:
    """Write a copy of a graph whose attentions are told every row's position, and what it must not see.

    Args:
        graph: A bundle's.
        path: The copy's, which must not exist.
    """
    model = read_model(graph)
    positions = ir.Value(name=POSITIONS, shape=ir.Shape([1, "seq"]), type=ir.TensorType(ir.DataType.INT64))
    bias = ir.Value(name=BIAS, shape=ir.Shape([1, 1, "seq", "total"]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.extend([positions, bias])
    for _, node in attentions(model):
        if len(node.inputs) <= _BIAS_INPUT:
            node.resize_inputs(_BIAS_INPUT + 1)
        node.replace_input_with(_POSITIONS_INPUT, positions)
        node.replace_input_with(_BIAS_INPUT, bias)
    write_model(model, path)


class TreePasses:
    """Passes over trees behind what the cache of a session holds; they leave it as it is."""

    def __init__(self, session: Session, path: Path):
        """Load the copy of a session's graph.

        Args:
            session: Whose keys and values are read, and written behind.
            path: Of the copy: see `write_tree_graph`.
        """
        self._session = session
        loaded, _ = session.backend.start(path, session.bundle.precision)
        self._bound = Binding(loaded, [LOGITS], "cpu")

    def logits(self, tokens: Sequence[int], parents: Sequence[int]) -> np.ndarray:
        """Run a pass over the rows of a tree.

        Args:
            tokens: Of every row.
            parents: See `sequoia.parents`.

        Returns:
            Logits of every row, [rows, vocab].
        """
        cache, bound, rows = self._session.cache, self._bound, len(tokens)
        past, total = cache.length, cache.length + rows
        cache.reserve(total)
        sees = np.eye(rows, dtype=bool)
        depths = np.zeros(rows, np.int64)
        for row, parent in enumerate(parents):
            if parent >= 0:
                sees[row] |= sees[parent]
                depths[row] = depths[parent] + 1
        bias = np.zeros((1, 1, rows, total), np.float32)
        bias[0, 0, :, past:][~sees] = _MASKED
        given: dict[str, np.ndarray] = {
            INPUT_IDS: np.array([tokens], np.int64),
            ATTENTION_MASK: np.ones((1, total), np.int64),
            KEPT_ROWS: np.array(rows, np.int64),
            POSITIONS: past + depths[None],
            BIAS: bias,
        }
        bound.caches(cache)
        for name, array in given.items():
            bound.input(name, array)
        if cache.states is not None:
            bound.output(PENULTIMATE, cache.states[past:], (1, rows, cache.states.shape[1]))
        bound.run()
        logits: np.ndarray = bound.read()[LOGITS].numpy()[0]
        return logits


def keep_path(session: Session, rows: Sequence[int]) -> None:
    """Move keys, values and states of the accepted rows of a tree to where the text goes on: what a tree costs besides.

    Args:
        session: Whose cache they stand in, behind what it holds.
        rows: Their numbers, ascending.
    """
    cache = session.cache
    past, kept = cache.length, np.array(rows)
    if np.array_equal(kept, np.arange(len(kept))):
        return
    for keys, values in cache.buffers:
        for buffer in (keys, values):
            buffer[:, :, past : past + len(kept)] = buffer[:, :, past + kept]
    if cache.states is not None:
        cache.states[past : past + len(kept)] = cache.states[past + kept]
