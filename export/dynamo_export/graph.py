"""From a torch model to the traced graph: input ids to the heads' normed states, with shared KV buffers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamo_model import CheckpointError
from dynamo_model.attention import LayerAttention
from dynamo_model.output import Output
from dynamo_model.preflight import preflight
from dynamo_model.rotary import Rotary, rotary_replaced
from dynamo_runtime.names import ATTENTION_MASK, INPUT_IDS, PAST, PRESENT, caches

from .attention import Emitter, PassThroughCache, emitting
from .errors import ExportError
from .exported import Exported
from .norm import rms_norms_fused
from .weights import WeightStore

OPSET = 20


@dataclass
class Subject:
    """What is exported, and how it is expressed.

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


def inspect(exported: Exported, context_length: int) -> Subject:
    """Finds out whether and how the model can be expressed.

    Raises:
        ExportError: If something in it cannot be expressed exactly.
    """
    try:
        found = preflight(exported.base, context_length, exported.topology.layers)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    return Subject(exported, context_length, found.attention, found.rotary, found.output)


class Traced(nn.Module):
    """The module that is traced: graph inputs in, states of all heads and present caches out."""

    def __init__(self, subject: Subject, emitter: Emitter) -> None:
        super().__init__()
        self.model = subject.exported.layered
        self.subject = subject
        self.emitter = emitter
        if subject.rotary.inside:
            cos, sin = subject.rotary.half()
            self.cos_cache, self.sin_cache = nn.Buffer(cos), nn.Buffer(sin)
            emitter.interleaved = subject.rotary.interleaved

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        """Runs one pass.

        Args:
            input_ids: int64 [batch, seq].
            attention_mask: int64 [batch, total].
            past: Key and value per layer, [batch, kv_heads, capacity, head_size].
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
        if self.subject.rotary.inside:
            emitter.cos, emitter.sin = self.cos_cache, self.sin_cache
        else:  # the rows are the last positions that the mask covers
            seq = input_ids.shape[1]
            inputs["position_ids"] = (lengths - seq)[:, None] + torch.arange(seq)
        all_states = self.subject.exported.states(input_ids, **inputs)
        return (*all_states, *(x for layer in sorted(emitter.present) for x in emitter.present[layer]))


@contextmanager
def output_embedding_aside(base: PreTrainedModel) -> Iterator[None]:
    """Takes the output embedding out of the model, whose trace ends at the states.

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
    """Keeps what the exporter has to say about itself off the user's terminal."""
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


def trace(subject: Subject) -> tuple[ir.Model, WeightStore]:
    """Traces the model with `torch.onnx.export`.

    Raises:
        ExportError: It cannot be traced.

    Returns:
        A graph whose outputs are `states_1` … `states_n` and `present.N.key|value`, and its weights, which are still
        torch's own memory: nothing is copied, but for an input embedding that look-ahead embeddings extend.
    """
    layers = subject.attention
    emitter = Emitter(layers)
    first = layers[0]
    module = Traced(subject, emitter).eval()
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
        stack.enter_context(output_embedding_aside(subject.base))
        stack.enter_context(subject.exported.tracing())
        stack.enter_context(rms_norms_fused(subject.exported.layered))
        stack.enter_context(rotary_replaced(subject.base, subject.rotary))
        stack.enter_context(emitting(subject.exported.layered, emitter))
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
            raise ExportError(f"{type(subject.base).__name__} cannot be traced: {reason}") from error
    assert program is not None
    model = program.model
    _name_ends(model, subject.exported.n_states)
    store = WeightStore()
    for value in model.graph.initializers.values():
        store.adopt(value)
    return model, store


def _name_ends(model: ir.Model, n_states: int) -> None:
    """Gives inputs and outputs the names of the contract."""
    graph = model.graph
    for value, name in zip(graph.inputs[:2], (INPUT_IDS, ATTENTION_MASK), strict=True):
        value.name = name
    layers = range(len(graph.inputs[2:]) // 2)
    for value, name in zip(graph.inputs[2:], caches(PAST, layers), strict=True):
        value.name = name
    states = [f"states_{i + 1}" for i in range(n_states)]
    for value, name in zip(graph.outputs, [*states, *caches(PRESENT, layers)], strict=True):
        value.name = name
