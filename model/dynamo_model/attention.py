"""What a model's attention is: read off the model by running it.

An attention function is registered with transformers under the name `dynamo_probe`.  It attends to nothing, and
writes down what every layer asks of its attention: head counts, scale, soft cap and, by *evaluating the mask rule* that
transformers built for it, the sliding window.  What a graph's attention (onnxruntime's GroupQueryAttention) cannot
express ends here, in one sentence.
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

from .errors import CheckpointError

PROBE = "dynamo_probe"

# Keyword arguments that decoders hand down to their attention and that change nothing in a cached, causal, inference
# pass.  Any other argument that is not None or False might, and is refused.
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
        rotates: Whether queries and keys are rotated by their positions.
    """

    layer: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int | None
    softcap: float
    rotates: bool = True


@dataclass
class MaskRule:
    """Stands where a decoder layer expects its mask, and remembers the rule the mask would be filled by."""

    rule: Callable[..., Tensor]


@dataclass
class Probe:
    """What one run with attention to nothing has seen.

    Attributes:
        context_length: Positions of which the mask rules are evaluated.
        layers: What every layer asks for.
        queries: Of every layer [batch, heads, seq, head_size], as its attention gets them.
        keys: Likewise, [batch, kv_heads, seq, head_size].
    """

    context_length: int
    layers: dict[int, LayerAttention] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, *args: Any, mask_function: Callable[..., Tensor], **kwargs: Any) -> MaskRule:
        """Return the registered mask function."""
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
        """Return the registered attention function.

        Raises:
            CheckpointError: GroupQueryAttention cannot express what is asked for.
        """
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        heads, head_size = query.shape[1], query.shape[3]
        kv_heads = key.shape[1]
        if value.shape[3] != head_size or key.shape[3] != head_size:
            raise CheckpointError(f"layer {layer} has values of another size than its keys")
        if heads % kv_heads:
            raise CheckpointError(f"layer {layer} has {heads} query heads, no multiple of its {kv_heads} key heads")
        if not getattr(module, "is_causal", True) or not kwargs.get("is_causal", True):
            raise CheckpointError(f"layer {layer} has bidirectional attention")
        if not isinstance(attention_mask, MaskRule):
            raise CheckpointError(f"layer {layer} builds its attention mask in a way that cannot be read")
        softcap = float(kwargs.pop("softcap", None) or 0.0)
        declared = kwargs.pop("sliding_window", None)
        window = window_of(attention_mask.rule, self.context_length, layer, query.device)
        if declared is not None and declared < self.context_length and declared != window:
            raise CheckpointError(f"layer {layer} declares an attention window of {declared} but masks {window}")
        for name, argument in kwargs.items():
            if name not in HARMLESS and argument is not None and argument is not False:
                raise CheckpointError(
                    f"layer {layer} gives its attention `{name}`, which GroupQueryAttention cannot express here"
                )
        scale = head_size**-0.5 if scaling is None else float(scaling)
        self.layers[layer] = LayerAttention(layer, heads, kv_heads, head_size, scale, window, softcap)
        self.queries[layer], self.keys[layer] = query, key
        batch, _, seq, _ = query.shape
        return query.new_zeros(batch, seq, heads, head_size), None


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Switch every attention of a transformers model to the registered function `name`, and back."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def probe_attention(model: nn.Module, run: Callable[[], Any], context_length: int) -> Probe:
    """Find what every layer of a model asks of its attention.

    Args:
        model: The model, whose attention implementation is switched for the moment.
        run: Runs every layer on some token ids, without a cache.
        context_length: Positions of which the mask rules are evaluated.

    Raises:
        CheckpointError: GroupQueryAttention cannot express what one of them asks for.
    """
    probe = Probe(context_length)
    AttentionInterface.register(PROBE, probe.attend)
    AttentionMaskInterface.register(PROBE, probe.mask)
    try:
        with attention_implementation(model, PROBE), torch.no_grad():
            run()
    except CheckpointError:
        raise
    except Exception as error:  # a model that reads its mask itself has no use for a rule
        if MaskRule.__name__ not in str(error):
            raise
        raise CheckpointError("it does not attend through transformers' attention interface") from error
    return probe


def window_of(
    rule: Callable[..., Tensor], context_length: int, layer: int, device: torch.device | None = None
) -> int | None:
    """Read the sliding window off a mask rule by evaluating it.

    Args:
        rule: transformers' mask function: (batch, head, query position, key position) → may attend.
        context_length: Positions of which it is evaluated.
        layer: For the error message.
        device: On which it is evaluated; that of the model, whose tensors it may hold.

    Returns:
        Keys that a query sees, itself included, or None where every query sees all before it.

    Raises:
        CheckpointError: The rule is not causal attention with at most a sliding window.
    """
    zero = torch.tensor(0, device=device)
    keys = torch.arange(context_length, device=device)

    def seen(query: int) -> Tensor:
        return rule(zero, zero, torch.tensor(query, device=device), keys).expand(context_length)

    last = seen(context_length - 1)
    window = int(last.sum())
    # A handful of rows, those on either side of the window among them, decide whether that is the whole rule.
    rows = {0, 1, context_length // 2, context_length - 2, context_length - 1, window - 1, window, window + 1}
    for query in sorted(row for row in rows if 0 <= row < context_length):
        expected = (keys <= query) & (keys > query - window)
        if not torch.equal(seen(query), expected):
            raise CheckpointError(
                f"layer {layer} has an attention mask that is neither causal nor a sliding window: "
                "GroupQueryAttention cannot express it"
            )
    return window if window < context_length else None
