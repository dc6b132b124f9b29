"""A loaded graph with the memory that it reads and writes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .kv_cache import KVBuffers
from .names import LOGITS, PAST, PRESENT, caches


class Binding:
    """A loaded graph, its inputs, and the outputs that are fetched together; inputs that have not moved stay bound."""

    def __init__(self, session: Any, names: Sequence[str], device: str):
        """Take an `InferenceSession`, the outputs wanted, and where full rows of logits stay until they are read."""
        self.session = session
        self.outputs = {output.name for output in session.get_outputs()}
        self.binding = session.io_binding()
        self._device = device
        self._places = [(name, device if name == LOGITS else "cpu") for name in names]
        self._inputs: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._memory: dict[str, tuple[np.ndarray, int]] = {}  # the array that was bound last, and its address
        self._caches: object = None  # whose buffers are bound
        self.renew()  # first, so that their places in the output vector are those in `names`

    def input(self, name: str, array: np.ndarray, shape: tuple[int, ...] | None = None, *, begin: int = 0) -> None:
        """Bind the memory of an array, from the row `begin` on; contents are read when the graph runs."""
        shape = array.shape if shape is None else shape
        place = self._address(name, array, begin), shape
        if self._inputs.get(name) != place:
            self.binding.bind_input(name, "cpu", 0, array.dtype.type, shape, place[0])
            self._inputs[name] = place

    def output(self, name: str, array: np.ndarray, shape: tuple[int, ...] | None = None, *, begin: int = 0) -> None:
        """Have the graph write an output into the memory of an array, from the row `begin` on."""
        shape = array.shape if shape is None else shape
        self.binding.bind_output(name, "cpu", 0, array.dtype.type, shape, self._address(name, array, begin))

    def _address(self, name: str, array: np.ndarray, begin: int) -> int:
        """Return where a row of an array lies.

        Behind a pass the processor's caches are cold, and asking numpy is slow: it is asked once for every array.
        """
        known = self._memory.get(name)
        if known is None or known[0] is not array:
            known = self._memory[name] = (array, array.ctypes.data)
        return known[1] + (begin * array.strides[0] if begin else 0)

    def caches(self, held: KVBuffers) -> None:
        """Bind keys and values, as past and as present, unless they are."""
        if self._caches is held.buffers:
            return
        dtype = held.dtype.type
        buffers = [buffer for pair in held.buffers for buffer in pair]
        layers = range(len(held.buffers))
        for past, present, buffer in zip(caches(PAST, layers), caches(PRESENT, layers), buffers, strict=True):
            address = buffer.ctypes.data if self._device == "cpu" else buffer.data_ptr()
            place = (self._device, 0, dtype, held.shape, address)
            self.binding.bind_input(past, *place)
            self.binding.bind_output(present, *place)
        self._caches = held.buffers

    def renew(self) -> None:
        """Have onnxruntime allocate anew, so that whoever holds what an earlier run gave keeps it."""
        for name, device in self._places:
            self.binding.bind_output(name, device)

    def run(self) -> None:
        """Run the graph."""
        self.session.run_with_iobinding(self.binding)

    def read(self) -> dict[str, Any]:
        """Return the outputs of a run by name, as onnxruntime holds them."""
        vector = self.binding.get_outputs_as_ortvaluevector()
        return {name: vector[i] for i, (name, _) in enumerate(self._places)}
