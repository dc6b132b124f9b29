"""The KV cache: one buffer per layer that is past and present at once, so that nothing is copied per step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .errors import PromptError

GROWTH_SLOTS = 256

Allocate = Callable[[tuple[int, ...], np.dtype], Any]
"""Makes a zeroed buffer of a shape and type somewhere; what it returns has a `shape`."""


class KVBuffers:
    """Keys and values of some layers, with room for so many positions.

    The graph writes new keys and values in place, behind those that it is told are held; what lies beyond is stale
    and never read.

    Attributes:
        buffers: Per layer (keys, values), each of `shape` [batch, kv_heads, capacity, head_size] and `dtype`.
        max_length: Most positions there may be.
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
        batch: int = 1,
    ):
        """Allocate the first buffers.

        Args:
            layers: Attention layers.
            kv_heads: Key/value heads of each.
            head_size: Width of one.
            max_length: Most positions they may hold.
            dtype: Of keys and values.
            growth: Positions per growth step.
            allocate: For buffers that are not numpy arrays; those cannot grow, so `growth` must be `max_length`.
            batch: Texts they are of.
        """
        self.shape = (batch, kv_heads, 0, head_size)
        self.dtype = np.dtype(dtype)
        self._growth = growth
        self._new = allocate
        self.max_length = max_length
        self.buffers: list[tuple[Any, Any]] = []
        self._layers = layers
        self._allocate(min(growth, max_length), 0)

    @property
    def capacity(self) -> int:
        """Positions there is room for without growing."""
        return self.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return 2 * self._layers * int(np.prod(self.shape)) * self.dtype.itemsize

    def make_room(self, length: int, held: int) -> bool:
        """Make room for `length` positions by doubling, keeping the first `held`; returns whether the buffers moved.

        Raises:
            PromptError: More than `max_length` positions, or than there is memory for.
        """
        if length <= self.capacity:
            return False
        if length > self.max_length:
            raise PromptError(f"{length} tokens do not fit into the cache of {self.max_length}")
        steps = -(-max(length, 2 * self.capacity) // self._growth)
        try:
            self._allocate(min(steps * self._growth, self.max_length), held)
        except MemoryError:
            raise PromptError(f"there is no memory for a cache of {length} tokens") from None
        return True

    def free(self) -> None:
        """Let go of the memory."""
        self.shape, self.buffers = (*self.shape[:2], 0, self.shape[3]), []

    def _allocate(self, capacity: int, held: int) -> None:
        """Make larger buffers; without memory for all of them, those that are there stay."""
        shape = (*self.shape[:2], capacity, self.shape[3])
        made = list[tuple[Any, Any]]()
        for layer in range(self._layers):
            pair = (self._new(shape, self.dtype), self._new(shape, self.dtype))
            if self.buffers:
                for new, buffer in zip(pair, self.buffers[layer], strict=True):
                    new[:, :, :held] = buffer[:, :, :held]
            made.append(pair)
        self.shape, self.buffers = shape, made


class KVCache(KVBuffers):
    """Keys and values of every layer of the base, and the tokens they stand for.

    Rolling back is setting a length. Further heads may have seen less than the base: the states that they read are
    kept, so that they can catch up whenever they are wanted.

    Attributes:
        tokens: The tokens whose keys and values are held, in order.
        states: What further heads read of every position, [capacity, width]; None where there are none.
        seen: Positions, from the first, that the further heads have seen.
        passes: Passes that it was advanced by.
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
        width: int = 0,
        states_dtype: np.dtype | type = np.float32,
    ):
        """Allocate the first buffers.

        Args:
            layers: Attention layers.
            kv_heads: Key/value heads of each.
            head_size: Width of one.
            max_length: Most positions it may hold.
            dtype: Of keys and values.
            growth: See `KVBuffers`.
            allocate: See `KVBuffers`.
            width: Of the states that further heads read; 0 where there are none.
            states_dtype: Their type.
        """
        self.tokens: list[int] = []
        self.seen = self.passes = 0
        self.states = np.empty((0, width), states_dtype) if width else None
        self._written_by: list[int] = []  # which pass wrote a position's states
        super().__init__(layers, kv_heads, head_size, max_length, dtype=dtype, growth=growth, allocate=allocate)

    @property
    def length(self) -> int:
        """Positions held."""
        return len(self.tokens)

    def reserve(self, length: int) -> bool:
        """Make room for `length` positions by doubling; returns whether the buffers moved.

        Raises:
            PromptError: More than `max_length` positions, or than there is memory for.
        """
        return self.make_room(length, self.length)

    def advance(self, tokens: Sequence[int], *, seen: bool = False) -> None:
        """Count `tokens`, whose keys and values the graph has just written, as held.

        Args:
            tokens: Of the pass.
            seen: Whether the further heads took part, and with them all that they had not seen before.
        """
        self.passes += 1
        if self.states is not None:
            self._written_by[self.length :] = [self.passes] * len(tokens)
        self.tokens.extend(tokens)
        if seen:
            self.seen = self.length

    def has(self, positions: Iterable[int], by: int) -> bool:
        """Tell whether the states of some positions are still held as a pass wrote them.

        Args:
            positions: Any.
            by: Number of the pass: `passes` when it had been taken.
        """
        return all(position < self.length and self._written_by[position] == by for position in positions)

    def rollback(self, length: int) -> None:
        """Forget everything behind the first `length` positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length} of {self.length} positions")
        del self.tokens[length:]
        self.seen = min(self.seen, length)

    def reset(self) -> None:
        """Forget everything."""
        self.rollback(0)

    def close(self) -> None:
        """Forget everything, and free the memory."""
        self.reset()
        self.free()
        if self.states is not None:
            self.states = self.states[:0].copy()

    def _allocate(self, capacity: int, held: int) -> None:
        states = self.states
        if states is not None:
            states = np.empty((capacity, states.shape[1]), states.dtype)
            states[:held] = self.states[:held]  # type: ignore[index]
        super()._allocate(capacity, held)
        self.states = states
