"""From what is exported to the graph of the contract: the trace, and the passes over it in order."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dynamo_graph.files import version
from dynamo_graph.passes import FoldHeads, TakeSkippedStates, run_passes

from .graph import Subject, trace
from .passes import (
    AddOutputs,
    ClearMetadata,
    NameByScope,
    Optimize,
    PackQKV,
    ShortenNames,
    SimplifyReshapes,
    TransposeWeights,
)
from .weights import WeightStore


def build_graph(subject: Subject) -> tuple[ir.Model, WeightStore]:
    """The graph of the contract, and its weights, which are still torch's memory."""
    model, weights = trace(subject)
    run_passes(model, passes_of(subject, weights))
    model.producer_name, model.producer_version = "dynamo-edge", version("dynamo-edge")
    return model, weights


def passes_of(subject: Subject, weights: WeightStore) -> list[ir.passes.PassBase]:
    """What makes the graph of the contract of the traced one, in order.

    Args:
        subject: What is exported.
        weights: Those of the traced graph; added to.
    """
    return [
        TransposeWeights(),
        RemoveUnusedNodesPass(),
        NameByScope(),
        Optimize(),
        SimplifyReshapes(),
        PackQKV(),
        RemoveUnusedNodesPass(),
        _outputs(subject, weights),
        RemoveUnusedNodesPass(),
        ShortenNames(),
        ClearMetadata(),
        TakeSkippedStates(),
        FoldHeads(),
    ]


def _outputs(subject: Subject, weights: WeightStore) -> AddOutputs:
    embedding = subject.base.get_output_embeddings()
    bias = getattr(embedding, "bias", None)
    return AddOutputs(
        weights,
        subject.exported.n_states,
        embedding.weight.detach().numpy(),
        None if bias is None else bias.detach().numpy().copy(),
        embedding.weight is subject.base.get_input_embeddings().weight,
        subject.output,
        subject.exported.ahead,
    )
