"""Rotary position embedding: read off the model by calling it, and moved into the attention op where that is exact.

Nothing here knows a scaling rule. The model's own rotary module is called once on every position of the context, so
linear, llama3 and yarn scaling, with their attention factors, are simply in the table. A rule that depends on the
length of the prompt (dynamic NTK beyond its context, longrope) has no such table, is noticed because a short call
disagrees with a long one, and is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import ExportError

APPLY = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a model.

    Attributes:
        cos: [context, rotary], as the model's rotary module returns it.
        sin: [context, rotary].
        inside: Whether the op can apply it exactly as the model does.
        interleaved: Whether neighbouring dimensions rotate together (else the two halves).
    """

    cos: Tensor
    sin: Tensor
    inside: bool
    interleaved: bool

    def half(self) -> tuple[Tensor, Tensor]:
        """The tables as the op wants them, [context, rotary / 2] each."""
        pick = slice(0, None, 2) if self.interleaved else slice(0, self.cos.shape[1] // 2)
        return self.cos[:, pick].contiguous(), self.sin[:, pick].contiguous()


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """What the op computes, written out to compare a model's own function with.

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


def _apply_function(model: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    return getattr(sys.modules[type(model).__module__], APPLY, None)


def _layout(model: nn.Module, cos: Tensor, sin: Tensor, head_size: int) -> tuple[bool, bool]:
    """Finds by trial whether the op can rotate as the model does: (it can, interleaved)."""
    apply = _apply_function(model)
    if apply is None or (cos.shape[1] // 2) % 8:  # the op wants half the rotary size to be a multiple of 8
        return False, False
    generator = torch.Generator().manual_seed(0)
    seq = min(5, cos.shape[0])
    x = torch.randn(1, 2, seq, head_size, generator=generator)
    y = torch.randn(1, 2, seq, head_size, generator=generator)
    own_x, own_y = apply(x, y, cos[None, -seq:], sin[None, -seq:])
    for interleaved in (False, True):
        half_cos, half_sin = Rotary(cos[-seq:], sin[-seq:], True, interleaved).half()
        same = [
            torch.allclose(own, rotated(z, half_cos, half_sin, interleaved), atol=1e-6)
            for own, z in ((own_x, x), (own_y, y))
        ]
        if all(same):
            return True, interleaved
    return False, False


def read_rotary(base: nn.Module, decoder: nn.Module, head_size: int, context_length: int) -> Rotary:
    """Reads a model's rotary embedding.

    Args:
        base: The transformers language model (its modeling file holds `apply_rotary_pos_emb`).
        decoder: Its decoder, which holds `rotary_emb`.
        head_size: Size of an attention head.
        context_length: Positions to tabulate.

    Returns:
        Tables and layout.

    Raises:
        ExportError: If there is no rotary module, or its table depends on the length of the prompt.
    """
    module = getattr(decoder, "rotary_emb", None)
    if module is None:
        raise ExportError(f"{type(base).__name__} has no rotary position embedding: not supported")
    x = torch.zeros(1, 1)

    def table(length: int) -> tuple[Tensor, Tensor]:
        cos, sin = module(x, position_ids=torch.arange(length)[None])
        return cos[0].float(), sin[0].float()

    with torch.no_grad():
        cos, sin = table(context_length)
        for length in {1, 2, context_length // 2, context_length - 1} - {0}:
            short_cos, short_sin = table(length)
            if not (torch.equal(cos[:length], short_cos) and torch.equal(sin[:length], short_sin)):
                kind = (getattr(base.config, "rope_parameters", None) or {}).get("rope_type", "unknown")
                raise ExportError(
                    f"rope scaling '{kind}' changes with the length of the prompt within {context_length} tokens: "
                    "it has no fixed table (a smaller --context-length may)"
                )
        inside, interleaved = _layout(base, cos, sin, head_size)
    return Rotary(cos, sin, inside, interleaved)


class TableRotary(nn.Module):
    """Takes the place of a rotary module while tracing: the same numbers, gathered from the table."""

    def __init__(self, rotary: Rotary) -> None:
        """Keeps the tables as buffers, so that they become initializers of the graph."""
        super().__init__()
        self.cos = nn.Buffer(rotary.cos)
        self.sin = nn.Buffer(rotary.sin)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Looks positions int64 [batch, seq] up, giving cos and sin [batch, seq, rotary]."""
        return nn.functional.embedding(position_ids, self.cos), nn.functional.embedding(position_ids, self.sin)


@contextmanager
def rotary_replaced(base: nn.Module, decoder: nn.Module, rotary: Rotary) -> Iterator[None]:
    """For the trace: rotary as the identity where the op applies it, as a table look-up where it does not."""
    modeling = sys.modules[type(base).__module__]
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
