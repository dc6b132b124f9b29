"""From a torch model to the traced graph: input ids to the heads' normed states, with shared KV buffers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamo_model import CheckpointError
from dynamo_model.attention import LayerAttention
from dynamo_model.output import Output
from dynamo_model.preflight import preflight
from dynamo_model.rotary import Rotary, rotary_replaced
from dynamo_runtime.names import ATTENTION_MASK, INPUT_IDS, PAST, PENULTIMATE, PRESENT, caches

from .attention import Emitter, PassThroughCache, emitting
from .errors import ExportError
from .exported import Exported
from .norm import rms_norms_fused
from .weights import WeightStore

OPSET = 20


@dataclass
class InspectedModel:
    """A model whose every part can be expressed as a graph, and how: what `inspect` found.

    Attributes:
        exported: The model.
        context_length: Positions the bundle covers.
        attention: What every layer asks of its attention, in the order of the KV caches.
        rotary: The rotary embedding.
        output: What the base does to its logits behind the output embedding.
    """

    exported: Exported
    context_length: int
    attention: dict[int, LayerAttention]
    rotary: Rotary
    output: Output

    @property
    def base(self) -> PreTrainedModel:
        """The transformers language model."""
        return self.exported.base


def inspect(exported: Exported, context_length: int) -> InspectedModel:
    """Find out whether and how the model can be expressed.

    Raises:
        ExportError: If something in it cannot be expressed exactly.
    """
    try:
        found = preflight(exported.base, context_length, exported.topology.layers)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    return InspectedModel(exported, context_length, found.attention, found.rotary, found.output)


class Traced(nn.Module):
    """The module that is traced: graph inputs in, states and present caches out."""

    def __init__(self, inspected: InspectedModel, emitter: Emitter) -> None:
        super().__init__()
        self.model = inspected.exported.layered
        self.inspected = inspected
        self.emitter = emitter
        if inspected.rotary.inside:
            cos, sin = inspected.rotary.half()
            self.cos_cache, self.sin_cache = nn.Buffer(cos), nn.Buffer(sin)
            emitter.interleaved = inspected.rotary.interleaved

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        """Run one pass.

        Args:
            input_ids: int64 [batch, seq].
            attention_mask: int64 [batch, total].
            past: Key and value per layer, [batch, kv_heads, capacity, head_size].

        Returns:
            States of all heads [batch, seq, hidden]; where there are further layers, the state that they and the base's
            last layer read; present keys and values.
        """
        emitter = self.emitter
        lengths = attention_mask.sum(1)
        emitter.past, emitter.present = past, {}
        emitter.seqlens = (lengths - 1).to(torch.int32)
        total = torch.onnx.ops.symbolic(
            "Shape", (attention_mask,), {"start": 1, "end": 2}, dtype=torch.int64, shape=(1,)
        )
        emitter.total = total.to(torch.int32).reshape(())
        inputs: dict[str, Any] = {"past_key_values": PassThroughCache()}
        if self.inspected.rotary.inside:
            emitter.cos, emitter.sin = self.cos_cache, self.sin_cache
        else:  # the rows are the last positions that the mask covers
            seq = input_ids.shape[1]
            inputs["position_ids"] = (lengths - seq)[:, None] + torch.arange(seq)
        stem: list[Tensor] = []
        decoder: Any = self.inspected.base.base_model
        handle = decoder.layers[-1].register_forward_pre_hook(lambda _, args: stem.append(args[0]))
        try:
            all_states = self.inspected.exported.states(input_ids, **inputs)
        finally:
            handle.remove()
        presents = [x for layer in sorted(emitter.present) for x in emitter.present[layer]]
        return (*all_states, *(stem if self.inspected.exported.topology.layers else []), *presents)


@contextmanager
def output_embedding_aside(base: PreTrainedModel) -> Iterator[None]:
    """Take the output embedding out of the model, whose trace ends at the states.

    As an unused weight it would stay referenced by the exporter for good, and with it the mapped checkpoint.
    """
    own = base.get_output_embeddings()
    try:
        base.set_output_embeddings(nn.Identity())
        yield
    finally:
        base.set_output_embeddings(own)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the exporter has to say about itself off the user's terminal."""
    names = ["torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir"]
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@dataclass
class Graphs:
    """What a model is traced to.

    Attributes:
        base: From ids to `states_1`, `penultimate_states` and caches: the base model alone.
        drafter: From `penultimate_states` to `states_2` … `states_n` and caches; None where nothing reads them.
        weights: Of both, still torch's own memory: nothing is copied, but for an input embedding that look-ahead
            embeddings extend.
    """

    base: ir.Model
    drafter: ir.Model | None
    weights: WeightStore


def trace(inspected: InspectedModel) -> Graphs:
    """Trace the model with `torch.onnx.export`, and cut the layers of further heads off it.

    Raises:
        ExportError: It cannot be traced.
    """
    layers = inspected.attention
    emitter = Emitter(layers)
    first = layers[0]
    module = Traced(inspected, emitter).eval()
    empty = torch.zeros(2, first.kv_heads, 8, first.head_size)
    past = [(empty.clone(), empty.clone()) for _ in layers]
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    batch = torch.export.Dim("batch")
    cache = {0: batch, 2: torch.export.Dim("capacity")}
    shapes = (
        {0: batch, 1: torch.export.Dim("seq")},
        {0: batch, 1: torch.export.Dim("total")},
        [(cache, cache) for _ in layers],
    )
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(torch.no_grad())
        stack.enter_context(output_embedding_aside(inspected.base))
        stack.enter_context(inspected.exported.tracing())
        stack.enter_context(rms_norms_fused(inspected.exported.layered))
        stack.enter_context(rotary_replaced(inspected.base, inspected.rotary))
        stack.enter_context(emitting(inspected.exported.layered, emitter))
        try:
            program = torch.onnx.export(
                module,
                (ids, mask, past),
                dynamic_shapes=shapes,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
            )
        except Exception as error:  # the exporter's own, or whatever the model's code raises while it is traced
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ExportError(f"{type(inspected.base).__name__} cannot be traced: {reason}") from error
    assert program is not None
    model = program.model
    exported = inspected.exported
    further = exported.topology.layers
    _name_ends(model, exported.n_states, bool(further))
    store = WeightStore()
    for value in model.graph.initializers.values():
        store.adopt(value)
    if not further:
        return Graphs(model, None, store)
    drafter, own = model.clone(), len(layers) - further
    _keep_heads(drafter, own, [state_name(i) for i in range(2, exported.n_states + 1)])
    _keep_base(model, own)
    return Graphs(model, drafter, store)


def _keep_base(model: ir.Model, layers: int) -> None:
    """Drop the further heads."""
    graph = model.graph
    graph.inputs[:] = _named(graph.inputs, [INPUT_IDS, ATTENTION_MASK, *caches(PAST, range(layers))])
    graph.outputs[:] = _named(graph.outputs, ["states_1", PENULTIMATE, *caches(PRESENT, range(layers))])
    RemoveUnusedNodesPass()(model)


def _keep_heads(model: ir.Model, first: int, states: list[str]) -> None:
    """Drop the base's own layers: what is left begins with the state that its last layer reads.

    Args:
        model: All that was traced.
        first: Number of the first further layer; its cache becomes number 0.
        states: Names of the further states.

    Raises:
        ExportError: The heads read something else of the tokens.
    """
    graph = model.graph
    layers = range(first, len(graph.inputs[2:]) // 2)
    (stem,) = _named(graph.outputs, [PENULTIMATE])
    entry = ir.Value(name=PENULTIMATE, type=stem.type, shape=stem.shape)
    stem.name = f"{PENULTIMATE}.traced"
    pasts = _named(graph.inputs, caches(PAST, layers))
    presents = _named(graph.outputs, caches(PRESENT, layers))
    further = _named(graph.outputs, states)
    ids, mask = graph.inputs[:2]
    graph.outputs[:] = [*further, *presents]
    for value in (stem, ids):  # of the ids they may still ask how many there are
        value.replace_all_uses_with(entry)
    graph.inputs[:] = [entry, mask, *pasts]
    for prefix, values in ((PAST, pasts), (PRESENT, presents)):
        for value, name in zip(values, caches(prefix, range(len(layers))), strict=True):
            value.name = name
    RemoveUnusedNodesPass()(model)
    if any(use.node.op_type == "Gather" for use in entry.uses()):
        raise ExportError("the further heads read the tokens themselves: not supported")


def _named(values: Sequence[ir.Value], names: Sequence[str]) -> list[ir.Value]:
    """Return those of some values that have these names, in their order."""
    found = {value.name: value for value in values}
    return [found[name] for name in names]


def _name_ends(model: ir.Model, n_states: int, has_heads: bool) -> None:
    """Give inputs and outputs the names of the contract."""
    graph = model.graph
    for value, name in zip(graph.inputs[:2], (INPUT_IDS, ATTENTION_MASK), strict=True):
        value.name = name
    layers = range(len(graph.inputs[2:]) // 2)
    for value, name in zip(graph.inputs[2:], caches(PAST, layers), strict=True):
        value.name = name
    states = [state_name(i) for i in range(1, n_states + 1)] + [PENULTIMATE] * has_heads
    for value, name in zip(graph.outputs, [*states, *caches(PRESENT, layers)], strict=True):
        value.name = name


def state_name(head: int) -> str:
    """Return what a traced graph calls the state of a head, counted from 1."""
    return f"states_{head}"
