"""The KV cache: one buffer per layer that is past and present at once, so that nothing is copied per step."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .errors import PromptError

GROWTH_SLOTS = 256

Allocate = Callable[[tuple[int, ...], np.dtype], Any]
"""Makes a zeroed buffer of a shape and type somewhere; what it returns has a `shape`."""


class KVCache:
    """Keys and values of every layer, and the tokens they stand for.

    The graph writes new keys and values in place, behind the `length` first positions; what lies beyond
    `length` is stale and never read, so that rolling back is setting a length.

    Passes may leave out the further heads. The layers of those then have no keys and values for the pass's
    positions, and the states that they would have been made of are kept until a pass takes them along.

    Attributes:
        buffers: Per layer (keys, values), each of `shape` [1, kv_heads, capacity, head_size] and `dtype`.
        tokens: The tokens whose keys and values are held, in order.
        skipped: States of the last positions, which the further heads have not seen, [positions, hidden] each.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_size: int,
        max_length: int,
        *,
        dtype: np.dtype | type = np.float32,
        growth: int = GROWTH_SLOTS,
        allocate: Allocate = np.zeros,
    ):
        """Allocate the first buffers.

        Args:
            layers: Attention layers.
            kv_heads: Key/value heads of each.
            head_size: Width of one.
            max_length: Most positions it may hold.
            dtype: Of keys and values.
            growth: Positions per growth step.
            allocate: For buffers that are not numpy arrays; those cannot grow, so `growth` must be `max_length`.
        """
        self.shape = (1, kv_heads, 0, head_size)
        self.dtype = np.dtype(dtype)
        self._growth = growth
        self._new = allocate
        self.max_length = max_length
        self.tokens: list[int] = []
        self.skipped: list[np.ndarray] = []
        self.buffers: list[tuple[Any, Any]] = []
        self._layers = layers
        self._allocate(min(growth, max_length))

    @property
    def length(self) -> int:
        """Positions held."""
        return len(self.tokens)

    @property
    def skipped_length(self) -> int:
        """Positions at the end that the further heads have not seen."""
        return sum(len(states) for states in self.skipped)

    @property
    def capacity(self) -> int:
        """Positions there is room for without growing."""
        return self.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return 2 * self._layers * int(np.prod(self.shape)) * self.dtype.itemsize

    def reserve(self, length: int) -> bool:
        """Make room for `length` positions by doubling; returns whether the buffers moved.

        Raises:
            PromptError: More than `max_length` positions, or than there is memory for.
        """
        if length <= self.capacity:
            return False
        if length > self.max_length:
            raise PromptError(f"{length} tokens do not fit into the cache of {self.max_length}")
        steps = -(-max(length, 2 * self.capacity) // self._growth)
        try:
            self._allocate(min(steps * self._growth, self.max_length))
        except MemoryError:
            raise PromptError(f"there is no memory for a cache of {length} tokens") from None
        return True

    def advance(self, tokens: Sequence[int], skipped: np.ndarray | None = None) -> None:
        """Count `tokens`, whose keys and values the graph has just written, as held.

        Args:
            tokens: Of the pass.
            skipped: Their states [tokens, hidden] if the further heads were left out; None if they took part, and with
                them all that had been skipped before.
        """
        self.tokens.extend(tokens)
        if skipped is None:
            self.skipped.clear()
        else:
            self.skipped.append(skipped)

    def rollback(self, length: int) -> None:
        """Forget everything behind the first `length` positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length} of {self.length} positions")
        surplus = self.length - length
        while surplus and self.skipped:
            states = self.skipped.pop()
            if len(states) > surplus:
                self.skipped.append(states[:-surplus])
            surplus = max(surplus - len(states), 0)
        del self.tokens[length:]

    def reset(self) -> None:
        """Forget everything."""
        self.tokens.clear()
        self.skipped.clear()

    def close(self) -> None:
        """Forget everything, and free the memory."""
        self.reset()
        self.shape, self.buffers = (*self.shape[:2], 0, self.shape[3]), []

    def _allocate(self, capacity: int) -> None:
        """Make larger buffers; without memory for all of them, those that are there stay."""
        shape = (*self.shape[:2], capacity, self.shape[3])
        held, made = self.length, list[tuple[Any, Any]]()
        for layer in range(self._layers):
            pair = (self._new(shape, self.dtype), self._new(shape, self.dtype))
            if self.buffers:
                for new, buffer in zip(pair, self.buffers[layer], strict=True):
                    new[:, :, :held] = buffer[:, :, :held]
            made.append(pair)
        self.shape, self.buffers = shape, made
