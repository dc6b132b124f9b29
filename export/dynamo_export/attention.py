"""What a model's attention is, and how it is written as ``com.microsoft::GroupQueryAttention``.

Two attention functions are registered with transformers. ``dynamo_probe`` runs once, eagerly, and writes down what
every layer asks of its attention: head counts, scale, soft cap and, by *evaluating the mask rule* that transformers
built for it, the sliding window. What the op cannot express ends here, in one line. ``dynamo_gqa`` is the function
that the trace goes through: it emits the op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .errors import ExportError

PROBE = "dynamo_probe"
EMIT = "dynamo_gqa"

# Keyword arguments that decoders hand down to their attention and that change nothing in a cached, causal, inference
# pass. Any other argument that is not None or False might, and is refused.
HARMLESS = {
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "dropout",
    "is_causal",
}


@dataclass(frozen=True)
class LayerAttention:
    """What one decoder layer asks of its attention.

    Attributes:
        layer: Index of the layer, and of its KV cache.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_size: Size of one head, the same for queries, keys and values.
        scale: Factor on query · key.
        window: Keys that a query sees, itself included; None for all.
        softcap: Soft cap on the scores; 0 for none.
    """

    layer: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int | None
    softcap: float


@dataclass
class MaskRule:
    """Stands where a decoder layer expects its mask, and remembers the rule the mask would be filled by."""

    rule: Callable[..., Tensor]


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Switches every attention of a transformers model to the registered function `name`, and back."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def window_of(rule: Callable[..., Tensor], context_length: int, layer: int) -> int | None:
    """Reads the sliding window off a mask rule by evaluating it.

    Args:
        rule: transformers' mask function: (batch, head, query position, key position) → may attend.
        context_length: Positions that the bundle will cover.
        layer: For the error message.

    Returns:
        Keys that a query sees, itself included, or None where every query sees all before it.

    Raises:
        ExportError: If the rule is not causal attention with at most a sliding window.
    """
    zero = torch.tensor(0)
    keys = torch.arange(context_length)

    def seen(query: int) -> Tensor:
        return rule(zero, zero, torch.tensor(query), keys).expand(context_length)

    last = seen(context_length - 1)
    window = int(last.sum())
    # A handful of rows, those on either side of the window among them, decide whether that is the whole rule.
    rows = {0, 1, context_length // 2, context_length - 2, context_length - 1, window - 1, window, window + 1}
    for query in sorted(row for row in rows if 0 <= row < context_length):
        expected = (keys <= query) & (keys > query - window)
        if not torch.equal(seen(query), expected):
            raise ExportError(
                f"layer {layer} has an attention mask that is neither causal nor a sliding window: "
                "GroupQueryAttention cannot express it"
            )
    return window if window < context_length else None


class _Probe:
    """The registered probe: collects one `LayerAttention` per layer."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerAttention] = {}
        self.context_length = 0

    def mask(self, *args: Any, mask_function: Callable[..., Tensor], **kwargs: Any) -> MaskRule:
        return MaskRule(mask_function)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: MaskRule | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        heads, head_size = query.shape[1], query.shape[3]
        kv_heads = key.shape[1]
        if value.shape[3] != head_size or key.shape[3] != head_size:
            raise ExportError(f"layer {layer} has values of another size than its keys: not supported")
        if heads % kv_heads:
            raise ExportError(f"layer {layer}: {heads} query heads are no multiple of {kv_heads} key heads")
        if not getattr(module, "is_causal", True) or not kwargs.get("is_causal", True):
            raise ExportError(f"layer {layer} has bidirectional attention: not supported")
        if attention_mask is None:
            raise ExportError(f"layer {layer} builds its attention mask in a way that cannot be read: not supported")
        softcap = float(kwargs.pop("softcap", None) or 0.0)
        declared = kwargs.pop("sliding_window", None)
        window = window_of(attention_mask.rule, self.context_length, layer)
        if declared is not None and declared < self.context_length and declared != window:
            raise ExportError(f"layer {layer} declares a window of {declared} but masks {window}: not supported")
        for name, argument in kwargs.items():
            if name not in HARMLESS and argument is not None and argument is not False:
                raise ExportError(
                    f"layer {layer} gives its attention `{name}`, which GroupQueryAttention cannot express here"
                )
        scale = head_size**-0.5 if scaling is None else float(scaling)
        self.layers[layer] = LayerAttention(layer, heads, kv_heads, head_size, scale, window, softcap)
        batch, _, seq, _ = query.shape
        return query.new_zeros(batch, seq, heads, head_size), None


@dataclass
class Emitter:
    """The registered emitter: turns every attention of a traced model into one GroupQueryAttention node.

    Attributes:
        layers: What each layer asks for.
        past: Past key and value per layer, [batch, kv_heads, capacity, head_size].
        present: The op's present key and value per layer, filled during the pass.
        seqlens: int32 [batch], tokens in the cache after the pass, minus one.
        total: int32 scalar, length of the attention mask.
        cos: Rotary table [context, rotary / 2], or None where rotary is applied outside the op.
        sin: Like `cos`.
        interleaved: Whether pairs of neighbouring dimensions rotate together.
    """

    layers: dict[int, LayerAttention]
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seqlens: Tensor | None = None
    total: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Emits the op for one layer.

        Args:
            module: The attention module; its `layer_idx` selects the cache.
            query: [batch, heads, seq, head_size].
            key: [batch, kv_heads, seq, head_size].
            value: [batch, kv_heads, seq, head_size].
            attention_mask: Ignored: the op masks by `seqlens`.
            **kwargs: Read by the probe already.

        Returns:
            The attended values [batch, seq, heads · head_size], and None for the weights.
        """
        spec = self.layers[int(module.layer_idx)]  # type: ignore[arg-type]
        batch, _, seq, _ = query.shape
        flat = [x.transpose(1, 2).reshape(batch, seq, -1) for x in (query, key, value)]
        past_key, past_value = self.past[spec.layer]
        attributes: dict[str, Any] = {
            "num_heads": spec.heads,
            "kv_num_heads": spec.kv_heads,
            "scale": spec.scale,
            "do_rotary": int(self.cos is not None),
            "rotary_interleaved": int(self.interleaved),
        }
        if spec.window is not None:
            attributes["local_window_size"] = spec.window
        if spec.softcap:
            attributes["softcap"] = spec.softcap
        inputs: list[Tensor | None] = [*flat, past_key, past_value, self.seqlens, self.total]
        if self.cos is not None:
            inputs += [self.cos, self.sin]
        attended, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=(query.dtype, key.dtype, value.dtype),
            shapes=(flat[0].shape, past_key.shape, past_value.shape),
            version=1,
        )
        self.present[spec.layer] = (present_key, present_value)
        return attended, None


class PassThroughCache:
    """Passed as `past_key_values` while tracing: the op keeps the cache, so `update` hands back what is new."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values unchanged."""
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: positions come from the attention mask."""
        return 0


def probe_attention(model: nn.Module, run: Callable[[Tensor], Any], context_length: int) -> dict[int, LayerAttention]:
    """Finds what every layer of a model asks of its attention.

    Args:
        model: The model, whose attention implementation is switched for the moment.
        run: Runs every layer on token ids int64 [1, seq].
        context_length: Positions that the bundle will cover.

    Returns:
        One description per layer index.

    Raises:
        ExportError: If GroupQueryAttention cannot express one of them.
    """
    probe = _Probe()
    probe.context_length = context_length
    AttentionInterface.register(PROBE, probe.attend)
    AttentionMaskInterface.register(PROBE, probe.mask)
    with attention_implementation(model, PROBE), torch.no_grad():
        run(torch.zeros(1, 2, dtype=torch.long))
    if not probe.layers:
        raise ExportError("this model does not attend through transformers' attention interface: not supported")
    return probe.layers


@contextmanager
def emitting(model: nn.Module, emitter: Emitter) -> Iterator[None]:
    """Sends every attention of the model through `emitter`; masks are not built at all."""
    AttentionInterface.register(EMIT, emitter.attend)
    with attention_implementation(model, EMIT):
        yield
