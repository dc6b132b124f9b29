"""From what is exported to the graphs of the contract: the trace, and the passes over it in order."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dynamo_graph.files import version
from dynamo_graph.passes import run_passes
from dynamo_graph.walk import is_cache

from .drafting import Words
from .graph import InspectedModel, trace
from .passes import (
    AddDraft,
    AddHeadStates,
    AddOutputs,
    ClearMetadata,
    MergeAttentions,
    MergeProducts,
    NameByScope,
    Optimize,
    PackQKV,
    ShortenNames,
    SimplifyReshapes,
    TransposeWeights,
)
from .passes.add_outputs import OUTPUT_EMBEDDING, input_embedding
from .weights import WeightStore


@dataclass(frozen=True)
class Built:
    """The graphs of a bundle.

    Attributes:
        base: The base model's.
        drafter: Of what predicts further tokens; None where that needs no graph.
        weights: Of both, still torch's memory.
    """

    base: ir.Model
    drafter: ir.Model | None
    weights: WeightStore

    @property
    def graphs(self) -> list[ir.Model]:
        """All there are."""
        return [self.base] if self.drafter is None else [self.base, self.drafter]

    @property
    def drafter_caches(self) -> tuple[int, int]:
        """KV caches of the drafter's graph, and the heads in each."""
        inputs = [] if self.drafter is None else [value for value in self.drafter.graph.inputs if is_cache(value)]
        heads = {int(value.shape[1]) for value in inputs if value.shape is not None}  # type: ignore[arg-type]
        return len(inputs) // 2, heads.pop()


def build_graphs(inspected: InspectedModel) -> Built:
    """Return the graphs of the contract."""
    traced = trace(inspected)
    run_passes(traced.base, base_passes(inspected, traced.weights))
    if traced.drafter is not None:
        run_passes(traced.drafter, drafter_passes(inspected, traced.weights, traced.base))
    built = Built(traced.base, traced.drafter, traced.weights)
    for model in built.graphs:
        model.producer_name, model.producer_version = "dynamo-edge", version("dynamo-edge")
    return built


def base_passes(inspected: InspectedModel, weights: WeightStore) -> list[ir.passes.PassBase]:
    """Return what makes the base's graph of the traced one, in order.

    Args:
        inspected: The model to export.
        weights: Those of the traced graph; added to.
    """
    embedding = inspected.base.get_output_embeddings()
    bias = None if embedding.bias is None else embedding.bias.detach().numpy().copy()
    weight = embedding.weight.detach().numpy()
    return [
        *_tidy(),
        AddOutputs(weights, weight, bias, _is_tied(inspected), inspected.output),
        RemoveUnusedNodesPass(),
        ShortenNames(),
        ClearMetadata(),
    ]


def drafter_passes(inspected: InspectedModel, weights: WeightStore, base: ir.Model) -> list[ir.passes.PassBase]:
    """Return what makes the drafter's graph of the layers cut off the traced one, in order.

    Args:
        inspected: The model to export.
        weights: Those of the traced graph; added to.
        base: The base's graph, as it is written.
    """
    exported = inspected.exported
    embedding = inspected.base.get_output_embeddings()
    lookup = input_embedding(base)
    tied = _is_tied(inspected)
    words = Words(
        exported.draft_vocabulary,
        embedding.weight.detach().numpy(),
        None if embedding.bias is None else embedding.bias.detach().numpy().copy(),
        inspected.output,
        lookup if tied else base.graph.initializers[OUTPUT_EMBEDDING],
        tied,
        lookup,
    )
    return [
        *_tidy(),
        MergeAttentions(),
        MergeProducts(),
        RemoveUnusedNodesPass(),
        AddHeadStates(
            weights,
            exported.topology.layers,
            embedding.weight.shape[1],
            None if exported.conditions else exported.ahead,
        ),
        RemoveUnusedNodesPass(),
        ShortenNames(),
        ClearMetadata(),
        AddDraft(weights, words, exported.conditions),
    ]


def _tidy() -> list[ir.passes.PassBase]:
    return [
        TransposeWeights(),
        RemoveUnusedNodesPass(),
        NameByScope(),
        Optimize(),
        SimplifyReshapes(),
        PackQKV(),
        RemoveUnusedNodesPass(),
    ]


def _is_tied(inspected: InspectedModel) -> bool:
    """Tell whether input and output embedding are one."""
    return inspected.base.get_output_embeddings().weight is inspected.base.get_input_embeddings().weight
