"""Rotary position embedding: read off the model by calling it.

Nothing here knows a scaling rule.  The model's own rotary module is called once on every position of the context, so
linear, llama3 and yarn scaling, with their attention factors, are simply in the table.  A rule that depends on the
length of the prompt (dynamic NTK beyond its context, longrope) has no such table, is noticed because a short call
disagrees with a long one, and is refused.

Where a graph's attention may rotate in the model's place is found out likewise: queries and keys of every layer are
taken as the model rotates them, and once more with its rotation switched off and rotated here.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import Probe
from .errors import CheckpointError

APPLY = "apply_rotary_pos_emb"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a model.

    Attributes:
        cos: [context, rotary], as the model's rotary module returns it.
        sin: [context, rotary].
        inside: Whether the attention op can apply it exactly as the model does.
        interleaved: Whether neighbouring dimensions rotate together (else the two halves).
        twice: Whether the table holds every angle twice in a row (else all of them, and then all again).
    """

    cos: Tensor
    sin: Tensor
    inside: bool
    interleaved: bool = False
    twice: bool = False

    def half(self) -> tuple[Tensor, Tensor]:
        """Return the tables as the op wants them, [context, rotary / 2] each."""
        pick = slice(0, None, 2) if self.twice else slice(0, self.cos.shape[1] // 2)
        return self.cos[:, pick].contiguous(), self.sin[:, pick].contiguous()


class TableRotary(nn.Module):
    """Takes the place of a rotary module: the same numbers, gathered from the table.

    Args:
        rotary: Whose tables become buffers, and so initializers of a traced graph.
    """

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.cos = nn.Buffer(rotary.cos)
        self.sin = nn.Buffer(rotary.sin)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Look positions int64 [batch, seq] up, giving cos and sin [batch, seq, rotary]."""
        return nn.functional.embedding(position_ids, self.cos), nn.functional.embedding(position_ids, self.sin)


@contextmanager
def rotary_replaced(base: PreTrainedModel, rotary: Rotary) -> Iterator[None]:
    """For the moment, rotary as the identity where the op applies it, as a table look-up where it does not."""
    decoder, modeling = base.base_model, sys.modules[type(base).__module__]
    own_module, own_apply = decoder.rotary_emb, getattr(modeling, APPLY, None)
    try:
        decoder.rotary_emb = TableRotary(rotary)
        if rotary.inside:
            setattr(modeling, APPLY, lambda query, key, *args, **kwargs: (query, key))
        yield
    finally:
        decoder.rotary_emb = own_module
        if rotary.inside:
            setattr(modeling, APPLY, own_apply)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return what the op computes, written out to compare a model's own rotation with.

    Args:
        x: Queries or keys [batch, heads, seq, head_size].
        cos: [seq, rotary / 2].
        sin: [seq, rotary / 2].
        interleaved: Whether neighbouring dimensions form a pair.

    Returns:
        `x` with its first `rotary` dimensions rotated.
    """
    width = 2 * cos.shape[-1]
    turning, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turning.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Tell whether two results are the same but for the order in which numbers were added up."""
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= TOLERANCE * ours.abs().max())


def read_rotary(
    base: PreTrainedModel, probe: Callable[..., Probe], context_length: int
) -> tuple[Rotary, dict[int, bool]]:
    """Read a model's rotary embedding.

    Args:
        base: The transformers language model.
        probe: Runs base and further layers on a few token ids and probes their attention; takes `position_ids` or
            nothing.
        context_length: Positions to tabulate.

    Returns:
        Tables and layout, and for every layer whether it rotates at all.

    Raises:
        CheckpointError: There is no rotary module, its table depends on the length of the prompt, or a layer does
            something else with it.
    """
    calls: list[tuple[int, set[str]]] = []
    module = getattr(base.base_model, "rotary_emb", None)
    if not isinstance(module, nn.Module):
        raise CheckpointError("it has no rotary position embedding")

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((len(args), set(kwargs) - {"x", "position_ids"}))

    handle = module.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        seq = probe().queries[0].shape[2]
    finally:
        handle.remove()
    if any(more or n_args > 2 for n_args, more in calls):
        raise CheckpointError("its layers rotate by different tables, each kind of layer by its own")
    cos, sin = _tables(base, module, context_length)

    # At the far end of the context: nothing that depends on positions in another way goes unnoticed.
    far = torch.arange(context_length - seq, context_length, device=base.device)[None]
    own = probe(position_ids=far)
    if hasattr(sys.modules[type(base).__module__], APPLY) and not (cos.shape[1] // 2) % 8:
        # The op wants half the rotary size to be a multiple of 8.
        with rotary_replaced(base, Rotary(cos, sin, True)):
            bare = probe()
        for interleaved, twice in ((False, False), (True, True), (True, False)):
            rotary = Rotary(cos, sin, True, interleaved, twice)
            rotates = _rotates(own, bare, rotary, far[0])
            if rotates is not None:
                return rotary, rotates
    rotary = Rotary(cos, sin, False)
    with rotary_replaced(base, rotary):
        looked_up = probe(position_ids=far)
    for layer in own.queries:
        if not (close(own.queries[layer], looked_up.queries[layer]) and close(own.keys[layer], looked_up.keys[layer])):
            raise CheckpointError(f"layer {layer} rotates by another table than the model's one rotary embedding has")
    return rotary, dict.fromkeys(own.queries, True)


def _tables(base: PreTrainedModel, module: nn.Module, context_length: int) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine [context, rotary] of every position, in float32."""
    module = copy.deepcopy(module)  # a scaling rule that depends on the length leaves its traces in the module
    x = torch.zeros(1, 1, device=base.device)

    def table(length: int) -> tuple[Tensor, Tensor]:
        cos, sin = module(x, position_ids=torch.arange(length, device=base.device)[None])
        return cos[0].float(), sin[0].float()

    cos, sin = table(context_length)
    for length in {1, 2, context_length // 2, context_length - 1} - {0}:
        short_cos, short_sin = table(length)
        if not (torch.equal(cos[:length], short_cos) and torch.equal(sin[:length], short_sin)):
            kind = (getattr(base.config, "rope_parameters", None) or {}).get("rope_type", "unknown")
            raise CheckpointError(
                f"rope scaling '{kind}' changes with the length of the prompt within {context_length} tokens: "
                "it has no fixed table (a smaller --context-length may)"
            )
    return cos, sin


def _rotates(own: Probe, bare: Probe, rotary: Rotary, positions: Tensor) -> dict[int, bool] | None:
    """Tell whether the op does to a layer's bare queries and keys what the model does, or leaves them alone as it does.

    None if there is a layer for which neither holds.
    """
    cos, sin = (table[positions] for table in rotary.half())
    found = {}
    for layer in own.queries:
        pairs = [(side[layer], other[layer]) for side, other in ((own.queries, bare.queries), (own.keys, bare.keys))]
        if all(close(theirs, x) for theirs, x in pairs):
            found[layer] = False
        elif all(close(theirs, rotated(x, cos, sin, rotary.interleaved)) for theirs, x in pairs):
            found[layer] = True
        else:
            return None
    return found
