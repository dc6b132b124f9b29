"""A loaded graph with the memory that it reads and writes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .kv_cache import KVBuffers
from .names import LOGITS, PAST, PRESENT, caches

_ONNX_TYPES = {np.dtype(np.float32): 1, np.dtype(np.int8): 3, np.dtype(np.int64): 7, np.dtype(np.float16): 10}
"""onnxruntime takes these numbers sooner than numpy's types."""


class Calls(NamedTuple):
    """What onnxruntime is called by.

    Attributes:
        bind_input: Takes name, place, type, shape and address.
        bind_output: Takes the same.
        place: The processor's memory, which may be several arguments.
        run: Takes nothing.
    """

    bind_input: Callable[..., None]
    bind_output: Callable[..., None]
    place: tuple[Any, ...]
    run: Callable[[], None]


def documented_calls(session: Any, binding: Any) -> Calls:
    """Return those that onnxruntime documents."""
    return Calls(binding.bind_input, binding.bind_output, ("cpu", 0), partial(session.run_with_iobinding, binding))


def inner_calls(session: Any, binding: Any) -> Calls:
    """Return what the documented ones call in their turn.

    Behind a pass all of Python is cold, and in there a device's name is looked up, and what only GPUs have is seen to,
    every time: as long as the binding itself takes. An onnxruntime that is made otherwise has the documented ones.
    """
    try:
        from onnxruntime import OrtDevice  # loaded by now: a session is of it

        inner, place = binding._iobinding, OrtDevice.make("cpu", 0)._get_c_device()
        run = partial(session._sess.run_with_iobinding, inner, None)
        return Calls(inner.bind_input, inner.bind_output, (place,), run)
    except (AttributeError, ImportError, TypeError):
        return documented_calls(session, binding)


class Binding:
    """A loaded graph, its inputs, and the outputs that are fetched together; inputs that have not moved stay bound."""

    def __init__(self, session: Any, names: Sequence[str], device: str):
        """Take an `InferenceSession`, the outputs wanted, and where full rows of logits stay until they are read."""
        self.session = session
        self.outputs = {output.name for output in session.get_outputs()}
        self.binding = session.io_binding()
        self._calls = inner_calls(session, self.binding)
        self._device = device
        self._places = [(name, device if name == LOGITS else "cpu") for name in names]
        self._inputs: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._memory: dict[str, tuple[np.ndarray, int, int]] = {}  # the array that was bound last: its type and address
        self._caches: object = None  # whose buffers are bound
        self.renew()  # first, so that their places in the output vector are those in `names`

    def input(self, name: str, array: np.ndarray, shape: tuple[int, ...] | None = None, *, begin: int = 0) -> None:
        """Bind the memory of an array, from the row `begin` on; contents are read when the graph runs."""
        shape = array.shape if shape is None else shape
        kind, address = self._memory_of(name, array, begin)
        if self._inputs.get(name) != (address, shape):
            self._calls.bind_input(name, *self._calls.place, kind, shape, address)
            self._inputs[name] = address, shape

    def output(self, name: str, array: np.ndarray, shape: tuple[int, ...] | None = None, *, begin: int = 0) -> None:
        """Have the graph write an output into the memory of an array, from the row `begin` on."""
        shape = array.shape if shape is None else shape
        kind, address = self._memory_of(name, array, begin)
        self._calls.bind_output(name, *self._calls.place, kind, shape, address)

    def _memory_of(self, name: str, array: np.ndarray, begin: int) -> tuple[int, int]:
        """Return the type of an array, as ONNX numbers it, and where a row of it lies.

        Behind a pass the processor's caches are cold, and asking numpy is slow: it is asked once for every array.
        """
        known = self._memory.get(name)
        if known is None or known[0] is not array:
            known = self._memory[name] = (array, _ONNX_TYPES[array.dtype], array.ctypes.data)
        return known[1], known[2] + (begin * array.strides[0] if begin else 0)

    def caches(self, held: KVBuffers) -> None:
        """Bind keys and values, as past and as present, unless they are."""
        if self._caches is held.buffers:
            return
        kind = _ONNX_TYPES[np.dtype(held.dtype)]
        buffers = [buffer for pair in held.buffers for buffer in pair]
        layers = range(len(held.buffers))
        for past, present, buffer in zip(caches(PAST, layers), caches(PRESENT, layers), buffers, strict=True):
            address = buffer.ctypes.data if self._device == "cpu" else buffer.data_ptr()
            place = (self._device, 0, kind, held.shape, address)
            self.binding.bind_input(past, *place)
            self.binding.bind_output(present, *place)
        self._caches = held.buffers

    def run(self) -> None:
        """Run the graph; what was read of an earlier run stays what it is."""
        if self._taken:
            self.renew()
        self._calls.run()

    def read(self) -> dict[str, Any]:
        """Return the outputs of the newest run by name, as onnxruntime holds them."""
        self._taken = True
        vector = self.binding.get_outputs_as_ortvaluevector()
        return {name: vector[i] for i, (name, _) in enumerate(self._places)}

    def renew(self) -> None:
        """Have onnxruntime allocate anew: outputs become of another size, or somebody holds those of an earlier run."""
        self._taken = False
        for name, device in self._places:
            self.binding.bind_output(name, device)
