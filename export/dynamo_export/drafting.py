"""The end of the drafter's graph: from what its layers make of final tokens to logits of the draft vocabulary.

Heads that need not know what is drafted in front of them all say so at once, right behind their layers. Where they are
conditioned on it, the graph is two parts that share no node: the *layers* run once a round and put out the states of
all heads, the *draft* runs once a depth, from a state and the token in front of it to logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import option
from dynamo_graph.nodes import make
from dynamo_model.output import Output
from dynamo_runtime.names import (
    DRAFT_PART,
    DRAFT_STATES,
    HEAD_ROWS,
    HEAD_STATES,
    PREVIOUS,
    VOCABULARY,
)

from .rows import select_rows
from .tail import End

TOP_K = 64  # of a draft: the paper draws from 50


@dataclass(frozen=True)
class Words:
    """What drafts are made of.

    Attributes:
        ids: The draft vocabulary, int64 [words]; None for every word there is.
        embedding: The base's output embedding [vocab, hidden].
        bias: Its bias [vocab], or None.
        output: What the base does to its logits behind that.
        whole: The initializer of the output embedding in the base's graph, for drafts of every word.
        tied: Whether that is the input embedding too.
        lookup: The initializer of the input embedding [ids, hidden] in the base's graph.
    """

    ids: np.ndarray | None
    embedding: np.ndarray
    bias: np.ndarray | None
    output: Output
    whole: ir.Value
    tied: bool
    lookup: ir.Value

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.embedding if self.ids is None else self.ids)


class DraftEnd(End):
    """Adds both parts to a graph whose first outputs are the further states, and its last ones caches."""

    def chosen_states(self, states: Sequence[ir.Value]) -> list[ir.Value]:
        """Return the rows of every state that something is wanted of, [batch, head_rows, hidden] each.

        By default that is the last row.
        """
        rows = option(self.model, HEAD_ROWS, np.array([-1], np.int64), [HEAD_ROWS])
        cuts: dict[ir.Value, ir.Value] = {}

        def gathered(value: ir.Value) -> ir.Node:
            return self.make("Gather", [value, rows], [f"{value.name}_head_rows"], axis=1)

        return [select_rows(self.model, state, gathered, cuts, "head_rows") for state in states]

    def joined(self, states: Sequence[ir.Value], hidden: int) -> ir.Value:
        """Return all of a row's states one after the other, [batch, head_rows · states, hidden]."""
        side_by_side = self.add("Concat", list(states), ["out_side_by_side"], axis=-1).outputs[0]
        return self.split_rows(side_by_side, hidden)

    def split_rows(self, values: ir.Value, hidden: int) -> ir.Value:
        """[batch, head_rows, parts · hidden] as [batch, head_rows · parts, hidden]."""
        shape = self.constant("out_part_rows", np.array([0, -1, hidden], np.int64))
        return self.add("Reshape", [values, shape], ["out_parts"]).outputs[0]

    def put_out_states(self, states: ir.Value, hidden: int, others: Sequence[tuple[ir.Value, int]]) -> None:
        """End the layers."""
        states.name = HEAD_STATES
        self.put_out(states, ["batch", "states", hidden])
        for value, width in others:
            self.put_out(value, ["batch", HEAD_ROWS, width])

    def draft(self, words: Words, conditions: Sequence[Any]) -> None:
        """Go on to words: from the states that were put out, or, conditioned, from one that is given.

        Args:
            words: What drafts are made of.
            conditions: Of every head, the torch module of its condition on the token in front; none if there are none.
        """
        hidden = words.embedding.shape[1]
        outputs = list(self.graph.outputs)
        if conditions:
            given = self.input(DRAFT_STATES, ir.DataType.FLOAT, ["batch", "drafts", hidden])
            state = self.conditioned(given, words, conditions)
        else:
            state = next(value for value in outputs if value.name == HEAD_STATES)
            self.graph.outputs.remove(state)
        if words.ids is None:
            embedding, tied, weights = self.shared(words.whole), words.tied, words.bias
        else:
            embedding = self.turned("draft.embedding.weight", words.embedding[words.ids])
            tied, weights = False, None if words.bias is None else words.bias[words.ids]
        bias = None if weights is None else self.constant("draft.embedding.bias", weights)
        logits = self.behind(words.output, self.product(state, embedding, tied, words.count, bias))
        places = self.put_out_logits(logits, words.count, min(TOP_K, words.count))
        if words.ids is not None:
            self.name_words(places, words.ids)

    def name_words(self, places: ir.Value, ids: np.ndarray) -> None:
        """Put out ids of the whole vocabulary in the place of places in the draft vocabulary."""
        table = self.constant(VOCABULARY, ids.astype(np.int64))
        name, places.name = places.name, f"{places.name}.places"
        found = self.add("Gather", [table, places], ["out_ids"], axis=0).outputs[0]
        found.name, found.type, found.shape = name, places.type, places.shape
        self.graph.outputs[self.graph.outputs.index(places)] = found

    def conditioned(self, state: ir.Value, words: Words, conditions: Sequence[Any]) -> ir.Value:
        """`s_i + W2_i silu(W1_i [s_i ; e_u])` (Hydra, Ankner et al. 2024), of the head that the depth says.

        Heads have weights of their own: every one is a branch, which holds them itself, as onnxruntime prepares the
        weights of a product only in the graph that it is in.
        """
        previous = self.input(PREVIOUS, ir.DataType.INT64, ["batch", "drafts"])
        looked_up = self.add("Gather", [self.shared(words.lookup), previous], ["out_previous"], axis=0).outputs[0]
        both = self.add("Concat", [state, looked_up], ["out_both"], axis=-1).outputs[0]
        change = self.chosen_branch([_Condition(f"{i}", both, each) for i, each in enumerate(conditions)])
        return self.add("Add", [state, change], ["out_conditioned"]).outputs[0]

    def chosen_branch(self, branches: Sequence[_Condition]) -> ir.Value:
        """Return what the branch of that number gives."""
        if len(branches) == 1:
            nodes, value = branches[0].nodes(self.graph)
            self.graph.extend(nodes)
            return value
        part = self.input(DRAFT_PART, ir.DataType.INT64, [])
        node = self.branching(part, 0, branches, self.graph)
        return node.outputs[0]

    def branching(self, part: ir.Value, first: int, branches: Sequence[_Condition], graph: ir.Graph) -> ir.Node:
        """Return an `If` that halves the branches until one is left; `first` is the number of the first of them."""
        half = len(branches) // 2
        middle = self.constant(f"draft.part.{first + half}", np.array(first + half, np.int64))
        name = f"/draft/{first}/{first + len(branches)}"
        less = make("Less", [part, middle], f"{name}/less", [f"{name}/is_less"])
        node = ir.Node("", "If", less.outputs, num_outputs=1, name=f"{name}/if")
        node.outputs[0].name = f"{name}/change"
        for key, at, some in (("then_branch", first, branches[:half]), ("else_branch", first + half, branches[half:])):
            node.attributes[key] = ir.AttrGraph(key, self.branch(part, at, some, f"{name}/{key}"))
        graph.extend([less, node])
        return node

    def branch(self, part: ir.Value, first: int, branches: Sequence[_Condition], name: str) -> ir.Graph:
        """Return one side of such an `If`."""
        inner = ir.Graph([], [], nodes=[], name=name)
        if len(branches) == 1:
            nodes, value = branches[0].nodes(inner)
            inner.extend(nodes)
        else:
            value = self.branching(part, first, branches, inner).outputs[0]
        inner.outputs.append(value)
        return inner

    def input(self, name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
        """Return a further input of the graph."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def shared(self, weight: ir.Value) -> ir.Value:
        """Return a weight of the base's graph: of the same name here, it is written once."""
        assert weight.name is not None
        if weight.name not in self.graph.initializers:
            own = ir.Value(name=weight.name, type=weight.type, shape=weight.shape, const_value=weight.const_value)
            self.graph.register_initializer(own)
        return self.graph.initializers[weight.name]


@dataclass(frozen=True)
class _Condition:
    """Of one head: its number, `[s_i ; e_u]`, and the torch module with the linear maps `hidden` and `out`."""

    name: str
    both: ir.Value
    module: Any

    def nodes(self, graph: ir.Graph) -> tuple[list[ir.Node], ir.Value]:
        """Return what works out the change of the state, with its weights in a graph; not yet placed."""
        weights = [
            ir.Value(name=f"condition.{self.name}.{layer}.weight", const_value=ir.Tensor(array))
            for layer in ("hidden", "out")
            for array in [np.ascontiguousarray(getattr(self.module, layer).weight.detach().numpy().T)]
        ]
        for value in weights:
            assert value.const_value is not None
            value.type = ir.TensorType(value.const_value.dtype)
            value.shape = ir.Shape(value.const_value.shape.numpy())
            graph.register_initializer(value)
        where = f"/condition/{self.name}"
        hidden = make("MatMul", [self.both, weights[0]], f"{where}/hidden", [f"{where}/h"])
        gate = make("Sigmoid", hidden.outputs, f"{where}/gate", [f"{where}/g"])
        silu = make("Mul", [hidden.outputs[0], gate.outputs[0]], f"{where}/silu", [f"{where}/s"])
        out = make("MatMul", [silu.outputs[0], weights[1]], f"{where}/out", [f"{where}/change"])
        return [hidden, gate, silu, out], out.outputs[0]
