"""A model's attention, written as `com.microsoft::GroupQueryAttention`.

`dynamo_gqa` is an attention function registered with transformers, which the trace goes through: it emits the op, as
`dynamo_model.attention` has read off the model what every layer asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dynamo_model.attention import LayerAttention, attention_implementation

EMIT = "dynamo_gqa"


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
        """Emit the op for one layer.

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
        rotates = self.cos is not None and spec.rotates
        attributes: dict[str, Any] = {
            "num_heads": spec.heads,
            "kv_num_heads": spec.kv_heads,
            "scale": spec.scale,
            "do_rotary": int(rotates),
            "rotary_interleaved": int(self.interleaved),
        }
        if spec.window is not None:
            attributes["local_window_size"] = spec.window
        if spec.softcap:
            attributes["softcap"] = spec.softcap
        inputs: list[Tensor | None] = [*flat, past_key, past_value, self.seqlens, self.total]
        if rotates:
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
        """Return the new keys and values unchanged."""
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions come from the attention mask."""
        return 0


@contextmanager
def emitting(model: nn.Module, emitter: Emitter) -> Iterator[None]:
    """Send every attention of the model through `emitter`; masks are not built at all."""
    AttentionInterface.register(EMIT, emitter.attend)
    with attention_implementation(model, EMIT):
        yield
