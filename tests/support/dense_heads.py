"""What hand-made bundles say, worked out in numpy with nothing cached: every row from the whole text in front of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from dynamo_runtime.bundle import Bundle

from . import handmade


class DenseHeads:
    """The weights of a hand-made bundle of format 4 in float64, and what its formulas make of them."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self._weights: dict[str, np.ndarray] = {}
        for name in bundle.graphs:
            for graph in _graphs(onnx.load(str(bundle.folder / name)).graph):
                self._weights |= {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self._weights = {
            name: value.astype(np.float64) if value.dtype == np.float32 else value
            for name, value in self._weights.items()
        }

    def first(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits of the base's own head, [positions, vocab]."""
        return self._words(self._layer(1, self._stem(tokens)), "output")

    def states(self, tokens: Sequence[int]) -> np.ndarray:
        """Of every further head or factor, [positions, parts, hidden]."""
        stem, topology = self._stem(tokens), self.bundle.topology
        if topology.kind == "cp":
            return (self._layer(2, stem) @ self._weights["factors"]).reshape(len(tokens), topology.parts, -1)
        return np.stack([self._layer(2 + part, stem) for part in range(topology.parts)], 1)

    def gate(self, tokens: Sequence[int]) -> np.ndarray:
        """Log of the weights of a joint head's components, [positions, rank]."""
        scores = self._layer(2, self._stem(tokens)) @ self._weights["gate.weight"]
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    def head(self, states: np.ndarray, part: int, before: Sequence[int] | None = None) -> np.ndarray:
        """Logits of one part behind some states [rows, hidden], told the token in front: -inf outside the table."""
        drafter = self.bundle.drafter
        assert drafter is not None
        if drafter.conditioned:
            assert before is not None
            both = np.concatenate([states, self._weights["embedding"][list(before)]], -1)
            hidden = both @ self._weights[f"condition.{part}.hidden.weight"]
            states = states + (hidden / (1 + np.exp(-hidden))) @ self._weights[f"condition.{part}.out.weight"]
        whole = self._words(states, "output")
        if drafter.vocabulary is not None:
            outside = np.setdiff1d(np.arange(self.bundle.vocab_size), drafter.vocabulary)
            whole[:, outside] = -np.inf
        return whole

    def _stem(self, tokens: Sequence[int]) -> np.ndarray:
        return self._layer(0, self._weights["embedding"][list(tokens)])

    def _words(self, states: np.ndarray, name: str) -> np.ndarray:
        unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
        logits: np.ndarray = unit @ self._weights[name] * self._weights["sharpness"]
        return logits

    def _layer(self, index: int, x: np.ndarray) -> np.ndarray:
        at, size = f"/layers.{index}", handmade.HEAD_SIZE
        q, k, v = (x @ self._weights[f"{at}/{part}.weight"] for part in "qkv")
        k = self._turned(k)
        heads = []
        for head in range(handmade.QUERY_HEADS):
            scores = self._turned(q[:, head * size : (head + 1) * size]) @ k.T / np.sqrt(size)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            powers = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(powers / powers.sum(-1, keepdims=True) @ v)
        found: np.ndarray = x + np.concatenate(heads, -1) @ self._weights[f"{at}/o.weight"]
        return found

    def _turned(self, x: np.ndarray) -> np.ndarray:
        """With rotary positions."""
        cos, sin = (self._weights[name][: len(x)] for name in ("cos", "sin"))
        one, two = np.split(x, 2, axis=-1)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and its branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
