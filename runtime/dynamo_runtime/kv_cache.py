"""The KV cache: one buffer per layer that is past and present at once, so that nothing is copied per step."""

from collections.abc import Sequence

import numpy as np

from .errors import PromptError

GROWTH_SLOTS = 256


class KVCache:
    """Keys and values of every layer, and the tokens they stand for.

    The graph writes new keys and values in place, behind the `length` first positions; what lies beyond
    `length` is stale and never read, so that rolling back is setting a length.

    Attributes:
        buffers: Per layer (keys, values), each [1, kv_heads, capacity, head_size].
        tokens: The tokens whose keys and values are held, in order.
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
    ):
        self._shape = (1, kv_heads, 0, head_size)
        self._dtype = np.dtype(dtype)
        self._growth = growth
        self.max_length = max_length
        self.tokens: list[int] = []
        self.buffers: list[tuple[np.ndarray, np.ndarray]] = []
        self._layers = layers
        self._allocate(min(growth, max_length))

    @property
    def length(self) -> int:
        """Positions held."""
        return len(self.tokens)

    @property
    def capacity(self) -> int:
        """Positions there is room for without growing."""
        return int(self.buffers[0][0].shape[2])

    def reserve(self, length: int) -> bool:
        """Make room for `length` positions by doubling; returns whether the buffers moved.

        Raises:
            PromptError: More than `max_length` positions.
        """
        if length <= self.capacity:
            return False
        if length > self.max_length:
            raise PromptError(f"{length} tokens do not fit into the cache of {self.max_length}")
        steps = -(-max(length, 2 * self.capacity) // self._growth)
        self._allocate(min(steps * self._growth, self.max_length))
        return True

    def advance(self, tokens: Sequence[int]) -> None:
        """Count `tokens`, whose keys and values the graph has just written, as held."""
        self.tokens.extend(tokens)

    def rollback(self, length: int) -> None:
        """Forget everything behind the first `length` positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length} of {self.length} positions")
        del self.tokens[length:]

    def reset(self) -> None:
        """Forget everything."""
        self.tokens.clear()

    def _allocate(self, capacity: int) -> None:
        shape = (*self._shape[:2], capacity, self._shape[3])
        held = self.length
        old, self.buffers = self.buffers, []
        for layer in range(self._layers):
            pair = (np.zeros(shape, self._dtype), np.zeros(shape, self._dtype))
            if old:
                for new, buffer in zip(pair, old[layer], strict=True):
                    new[:, :, :held] = buffer[:, :, :held]
            self.buffers.append(pair)
