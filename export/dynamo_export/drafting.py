"""The end of the drafter's graph: from what its layers make of final tokens to logits of the draft vocabulary.

Heads that need not know what is drafted in front of them all say so at once, right behind their layers. Where they are
conditioned on it, the graph is two parts that share no node: the *layers* run once a round and put out what further
nodes of every head read, the *draft* runs once a depth, from that and the token in front of the draft to logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import initializer, option
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

from .head_ends import HeadEnd, head_ends, width_of
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
        """Go on to words: from the states that were put out, or, of a conditioned head, from what its draft reads.

        Args:
            words: What drafts are made of.
            conditions: Of every head, the torch module of its condition on the token in front; none if there are none.
        """
        if conditions:
            state = self.told(words, conditions)
        else:
            state = next(value for value in self.graph.outputs if value.name == HEAD_STATES)
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

    def told(self, words: Words, conditions: Sequence[Any]) -> ir.Value:
        """Return the state of the head that the depth says, told the token in front.

        The graph's first outputs are the states of all heads. What only one of them reads is left to its draft: a chain
        of drafts that ends early has not paid for the heads behind its end. What those nodes read is put out in the
        states' place.
        """
        states, others = self.graph.outputs[: len(conditions)], self.graph.outputs[len(conditions) :]
        self.graph.outputs.clear()
        ends = head_ends(self.graph, states)
        widths = [width_of(value) for value in ends[0].given]
        self.put_out_states(self.joined([value for end in ends for value in end.given], sum(widths)), sum(widths), [])
        self.graph.outputs.extend(others)
        given = self.cut(self.input(DRAFT_STATES, ir.DataType.FLOAT, ["batch", "drafts", sum(widths)]), widths)
        previous = self.input(PREVIOUS, ir.DataType.INT64, ["batch", "drafts"])
        looked_up = self.add("Gather", [self.shared(words.lookup), previous], ["out_previous"], axis=0).outputs[0]
        for end in ends:
            self.graph.remove(end.nodes)
        both = zip(ends, conditions, strict=True)
        return self.chosen_branch([_Told(f"{i}", end, given, looked_up, each) for i, (end, each) in enumerate(both)])

    def cut(self, value: ir.Value, widths: Sequence[int]) -> list[ir.Value]:
        """Return the parts of a value [batch, drafts, …], side by side, of some widths."""
        if len(widths) == 1:
            return [value]
        lengths = self.constant("out_given_widths", np.array(widths, np.int64))
        node = self.make("Split", [value, lengths], [f"out_given_{i}" for i in range(len(widths))], axis=-1)
        self.graph.append(node)
        for part, width in zip(node.outputs, widths, strict=True):
            part.type, part.shape = value.type, ir.Shape(["batch", "drafts", width])
        return list(node.outputs)

    def chosen_branch(self, branches: Sequence[_Told]) -> ir.Value:
        """Return what the branch of that number gives."""
        if len(branches) == 1:
            return branches[0].place(self.graph)
        part = self.input(DRAFT_PART, ir.DataType.INT64, [])
        return self.branching(part, 0, branches, self.graph)

    def branching(self, part: ir.Value, first: int, branches: Sequence[_Told], graph: ir.Graph) -> ir.Value:
        """Return what an `If` gives that halves the branches until one is left; `first` is the number of the first."""
        half = len(branches) // 2
        middle = self.constant(f"draft.part.{first + half}", np.array(first + half, np.int64))
        name = f"/draft/{first}/{first + len(branches)}"
        less = make("Less", [part, middle], f"{name}/less", [f"{name}/is_less"])
        node = ir.Node("", "If", less.outputs, num_outputs=1, name=f"{name}/if")
        node.outputs[0].name = f"{name}/state"
        for key, at, some in (("then_branch", first, branches[:half]), ("else_branch", first + half, branches[half:])):
            inner = ir.Graph([], [], nodes=[], name=f"{name}/{key}")
            inner.outputs.append(some[0].place(inner) if len(some) == 1 else self.branching(part, at, some, inner))
            node.attributes[key] = ir.AttrGraph(key, inner)
        graph.extend([less, node])
        return node.outputs[0]

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
class _Told:
    """A conditioned head.

    Attributes:
        name: Its number.
        end: What it makes by itself.
        given: What that reads, of the drafts that are made [batch, drafts, width].
        previous: Row of the input embedding of the token in front.
        module: The torch module of its condition, with the linear maps `hidden` and `out`.
    """

    name: str
    end: HeadEnd
    given: list[ir.Value]
    previous: ir.Value
    module: Any

    def place(self, graph: ir.Graph) -> ir.Value:
        """Return `s_i + W2_i silu(W1_i [s_i ; e_u])` (Hydra, Ankner et al. 2024), worked out in a graph.

        The graph holds the weights that nothing else reads, as onnxruntime prepares those of a product only in the
        graph that it is in.
        """
        state = self._state(graph)
        where = f"/condition/{self.name}"
        hidden_weight, out_weight = (self._weight(graph, layer) for layer in ("hidden", "out"))
        both = make("Concat", [state, self.previous], f"{where}/both", [f"{where}/b"], {"axis": -1})
        hidden = make("MatMul", [both.outputs[0], hidden_weight], f"{where}/hidden", [f"{where}/h"])
        gate = make("Sigmoid", hidden.outputs, f"{where}/gate", [f"{where}/g"])
        silu = make("Mul", [hidden.outputs[0], gate.outputs[0]], f"{where}/silu", [f"{where}/s"])
        out = make("MatMul", [silu.outputs[0], out_weight], f"{where}/out", [f"{where}/change"])
        told = make("Add", [state, out.outputs[0]], f"{where}/told", [f"{where}/state"])
        graph.extend([both, hidden, gate, silu, out, told])
        return told.outputs[0]

    def _state(self, graph: ir.Graph) -> ir.Value:
        """Work out the head's state of what its end reads."""
        end, given = self.end, dict(zip(self.end.given, self.given, strict=True))
        for node in end.nodes:
            for place, value in enumerate(node.inputs):
                if value in given:
                    node.replace_input_with(place, given[value])
            for value in node.outputs:
                if value.shape is not None and len(value.shape) == 3:
                    value.shape = ir.Shape([value.shape[0], "drafts", value.shape[2]])
        for weight in end.weights:
            if all(use.node in end.nodes for use in weight.uses()):
                _move(weight, graph)
        graph.extend(end.nodes)
        return given.get(end.state, end.state)

    def _weight(self, graph: ir.Graph, layer: str) -> ir.Value:
        array = np.ascontiguousarray(getattr(self.module, layer).weight.detach().numpy().T)
        return initializer(graph, f"condition.{self.name}.{layer}.weight", array)


def _move(weight: ir.Value, graph: ir.Graph) -> None:
    """Have another graph hold a weight."""
    owner = weight.graph
    assert owner is not None and weight.name is not None
    if owner is not graph:
        graph.register_initializer(owner.initializers.pop(weight.name))
