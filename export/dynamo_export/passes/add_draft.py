"""The two ends of the drafter's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from ..drafting import DraftEnd, Words
from ..weights import WeightStore

Ahead = Callable[[DraftEnd, list[ir.Value]], tuple[ir.Value, list[tuple[ir.Value, int]]]]
"""Makes of the chosen rows of every state all states that become logits, one after the other; and further outputs."""


class AddHeadStates(ir.passes.InPlacePass):
    """Ends the layers: chosen rows of what they make of the tokens."""

    def __init__(self, store: WeightStore, n_states: int, hidden: int, ahead: Ahead | None) -> None:
        """Take the weights, the number of states among the graph's outputs, their width, and what becomes of them.

        Without the last the states stay.
        """
        super().__init__()
        self.store, self.n_states, self.hidden, self.ahead = store, n_states, hidden, ahead

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put the outputs of the contract in the place of the states."""
        end, graph = DraftEnd(model, self.store), model.graph
        states, presents = graph.outputs[: self.n_states], graph.outputs[self.n_states :]
        graph.outputs.clear()
        chosen = end.chosen_states(states)
        if self.ahead is None:
            graph.outputs.extend(chosen)
        else:
            joined, further = self.ahead(end, chosen)
            end.put_out_states(joined, self.hidden, further)
        graph.outputs.extend(presents)
        graph.sort()
        return ir.passes.PassResult(model, True)


class AddDraft(ir.passes.InPlacePass):
    """Adds what makes drafts of states."""

    def __init__(self, store: WeightStore, words: Words, conditions: Sequence[Any]) -> None:
        """Take the weights and what `DraftEnd.draft` takes."""
        super().__init__()
        self.store, self.words, self.conditions = store, words, conditions

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add it."""
        DraftEnd(model, self.store).draft(self.words, self.conditions)
        return ir.passes.PassResult(model, True)
