"""A bundle's graph in onnxruntime: bound buffers, and one forward pass at a time."""

import time
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np

from .bundle import Bundle
from .errors import BundleError, ParameterError, PromptError
from .kv_cache import GROWTH_SLOTS, KVCache
from .names import (
    ATTENTION_MASK,
    HEAD_ROWS,
    INPUT_IDS,
    KEPT_ROWS,
    LOGITS,
    OUTPUTS,
    PAST,
    PENULTIMATE,
    PRESENT,
    SKIPPED,
    TOPK_IDS,
    caches,
)
from .parameters import whole
from .providers import Backend, BackendOptions, backend_of, import_onnxruntime
from .step import LAST, All, Last, Rows, Step
from .turns import Turns

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
TWIN_BYTES = 64 << 20
_FIRST_CACHE = caches(PAST, [0])[0]
_MOVABLE = "cuda"  # the provider whose memory is bound; any other reads and writes the computer's own


class _Binding:
    """A loaded graph, its inputs, and the outputs that are fetched together; inputs that have not moved stay bound."""

    def __init__(self, session: Any, names: list[str], device: str):
        self.session = session
        self.outputs = {output.name for output in session.get_outputs()}
        self.binding = session.io_binding()
        # Full rows stay where they were computed until somebody reads them.
        self._places = [(name, device if name == LOGITS else "cpu") for name in names]
        self._inputs: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.buffers: object = None  # of the cache, which are bound
        self.renew()  # first, so that their places in the output vector are those in `names`

    def input(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
        """Bind the memory of an array, which the caller keeps alive; contents are read when the graph runs."""
        place = array.ctypes.data, shape
        if self._inputs.get(name) != place:
            self.binding.bind_input(name, "cpu", 0, array.dtype.type, shape, place[0])
            self._inputs[name] = place

    def renew(self) -> None:
        """Have onnxruntime allocate anew, so that an earlier `Step` keeps what it has."""
        for name, device in self._places:
            self.binding.bind_output(name, device)

    def read(self) -> dict[str, Any]:
        """What a pass has put out, by name, as onnxruntime holds it."""
        vector = self.binding.get_outputs_as_ortvaluevector()
        return {name: vector[i] for i, (name, _) in enumerate(self._places)}


class Session:
    """The graph of one bundle with its KV cache.

    Attributes:
        bundle: What is running.
        backend: How it was asked to run.
        provider: Short name of the execution provider that runs it.
        cache: The KV cache; `cache.rollback(length)` before a step drops positions.
        skips_heads: Whether a pass that wants no rows of further heads does not compute them.
        step_seconds: Time spent in steps so far.
        ort_seconds: The part of it inside onnxruntime.
        passes: Forward passes so far.
        turns: Whose turn it is to use it. Steps do not ask: whoever takes them directly is alone with the session.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend | None = None,
        *,
        max_length: int | None = None,
        growth: int = GROWTH_SLOTS,
        twin_bytes: int = TWIN_BYTES,
        **options: Unpack[BackendOptions],
    ):
        """Load the graph and check that it keeps the contract of the manifest.

        Args:
            bundle: From `load_bundle`, or built in memory.
            backend: How the graph is run.
            max_length: Largest number of positions the cache may hold; None means the bundle's context
                length.
            growth: Cache slots per growth step, where the cache is in the computer's memory.
            twin_bytes: A graph up to this size is loaded a second time for passes without heads.
            **options: Fields of `Backend`, in place of those in `backend`.

        Raises:
            ProviderError: No usable onnxruntime or execution provider.
            ParameterError: `max_length` or a field of `Backend` is out of range.
            BundleError: The graph does not load or is not what the manifest says.
        """
        length = bundle.context_length if max_length is None else whole("max_length", max_length, 1)
        if not 1 <= length <= bundle.context_length:
            raise ParameterError(
                f"max_length must be from 1 to the context length {bundle.context_length}, not {length}"
            )
        self.bundle = bundle
        self.step_seconds = self.ort_seconds = 0.0
        self.passes = 0
        self._ids_end, self._parts = bundle.look_ahead.stop, bundle.topology.parts
        self.turns = Turns()
        self.backend = backend_of(backend, options)
        self._twin_bytes = twin_bytes
        self._session, self.provider = self.backend.start(bundle.graph_path, bundle.precision)
        self._device = "cuda" if self.provider == _MOVABLE else "cpu"
        inputs = self._check_contract()
        self.skips_heads = SKIPPED in inputs
        self.cache = KVCache(
            bundle.kv_layers,
            bundle.kv_heads,
            bundle.head_size,
            length,
            dtype=_TYPES[inputs[_FIRST_CACHE].type],
            growth=growth if self._device == "cpu" else length,
            allocate=np.zeros if self._device == "cpu" else self._allocate,
        )
        self._rows = np.zeros((), np.int64)
        self._head_rows: np.ndarray
        self._make_room()
        self._with_heads = _Binding(self._session, [*OUTPUTS, *bundle.topology.outputs], self._device)
        self._without_heads: _Binding | None = None
        if self.skips_heads:
            states = inputs[SKIPPED]
            self._none_skipped = np.empty((1, 0, states.shape[-1]), _TYPES[states.type])
        if self._parts:
            self._check_heads()

    @property
    def max_length(self) -> int:
        """Largest number of positions the cache may hold."""
        return self.cache.max_length

    def step(self, tokens: Sequence[int], *, rows: Last | All = LAST, heads: Rows = LAST) -> Step:
        """Run the graph over `tokens`, appended to what the cache holds, and advance the cache by them.

        Args:
            tokens: m >= 1 ids of tokens, or of look-ahead tokens.
            rows: Rows of the first head to return.
            heads: Rows of every further head to return. If there are none, the heads are left out where the graph can
                do without them (`skips_heads`); the next pass that wants rows of them makes up for it.

        Raises:
            PromptError: No tokens, a token outside the vocabulary, or more than the cache or the memory holds.
            BundleError: The graph does not run.
            EngineError: The session is closed.
            ValueError: `rows` or `heads` are not among the m rows.
        """
        entered = time.perf_counter()
        self.turns.check_open()
        m = len(tokens)
        if m == 0:
            raise PromptError("there are no tokens to process")
        if min(tokens) < 0 or max(tokens) >= self._ids_end:
            raise PromptError(f"token ids must be from 0 to {self._ids_end - 1}")
        kept, head_rows = rows.of(m), heads.of(m)
        if not kept:
            raise ValueError("a pass returns rows of the first head, at least one")
        total = self.cache.length + m
        self.cache.reserve(total)
        if len(self._ones) < total:
            self._make_room()
        skipping = self.skips_heads and not head_rows
        if skipping and self._without_heads is None:
            self._without_heads = self._bind_without_heads()
        bound = self._without_heads if skipping and self._without_heads is not None else self._with_heads
        if bound.buffers is not self.cache.buffers:
            self._bind_cache(bound)
        self._rows[()] = len(kept)
        self._ids[:m] = tokens
        bound.input(INPUT_IDS, self._ids, (1, m))
        bound.input(ATTENTION_MASK, self._ones, (1, total))
        wanted = 0
        if self._parts and not skipping:
            # Counted from the end, where the heads see states of earlier passes in front.
            wanted = len(head_rows)
            if wanted > len(self._head_rows):  # a row may be wanted twice
                self._head_rows = np.empty(wanted, np.int64)
            self._head_rows[:wanted] = head_rows
            bound.input(HEAD_ROWS, self._head_rows, (wanted,))
            if self.skips_heads:
                skipped = self.cache.skipped
                owed = np.concatenate(skipped)[None] if skipped else self._none_skipped
                bound.input(SKIPPED, owed, owed.shape)
        bound.renew()
        started = time.perf_counter()
        try:
            bound.session.run_with_iobinding(bound.binding)
        except Exception as error:  # onnxruntime raises many classes that share no base
            raise BundleError(f"{self.bundle.graph_path} fails at a pass over {m} tokens: {error}") from error
        self.ort_seconds += time.perf_counter() - started
        self.passes += 1
        values = bound.read()
        found, asked = values[LOGITS].shape()[1], len(kept) + self._parts * wanted
        if found != asked:
            raise BundleError(
                f"{self.bundle.graph_path} puts out {found} rows of logits where {asked} were asked for: it is not the "
                "graph its manifest describes"
            )
        self.cache.advance(tokens, values.pop(PENULTIMATE).numpy()[0] if skipping else None)
        self.step_seconds += time.perf_counter() - entered
        what = f"{self.bundle.graph_path}, in a pass over {m} tokens behind {total - m},"
        return Step(values, head_rows=wanted, parts=self._parts, what=what)

    def close(self) -> None:
        """Free graph and cache; passes that were taken keep what they say."""
        if self.turns.closed:
            return
        self.turns.close()
        self.cache.close()
        self._without_heads = None
        del self._session, self._with_heads

    def end_profiling(self) -> str:
        """End onnxruntime's own profile, which `Backend.profile_prefix` began; returns the name of its file."""
        name: str = self._session.end_profiling()
        return name

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A buffer in the provider's memory; stale contents are never read, so it is not cleared."""
        return import_onnxruntime().OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, self._device, 0)

    def _make_room(self) -> None:
        """What a pass is given, for as many positions as the cache: a context may be long, and most texts are short."""
        self._ones = np.ones(self.cache.capacity, np.int64)
        self._ids = np.empty(self.cache.capacity, np.int64)
        self._head_rows = np.empty(self.cache.capacity, np.int64)

    def _bind_without_heads(self) -> _Binding:
        """A binding for passes that leave the further heads out.

        A small model's pass is so short that choosing a branch of the graph takes a few per cent of it, so a small
        graph is loaded a second time, with the heads cut off for good.
        """
        session, names = self._session, [*OUTPUTS, PENULTIMATE]
        path = self.bundle.graph_path
        files = [path, path.with_name(f"{path.name}.data")]
        if sum(file.stat().st_size for file in files if file.is_file()) <= self._twin_bytes:
            unwanted = (HEAD_ROWS, SKIPPED, *caches(PRESENT, self.bundle.head_layers))
            session, _ = self.backend.start(path, self.bundle.precision, without=unwanted)
            bound = _Binding(session, names, self._device)
        else:
            bound = _Binding(session, names, self._device)
            bound.input(HEAD_ROWS, self._rows, (0,))
        return bound

    def _bind_cache(self, bound: _Binding) -> None:
        """Bind what does not change from pass to pass."""
        bound.input(KEPT_ROWS, self._rows, ())
        dtype = self.cache.dtype.type
        buffers = [buffer for pair in self.cache.buffers for buffer in pair]
        layers = range(self.bundle.kv_layers)
        for past, present, buffer in zip(caches(PAST, layers), caches(PRESENT, layers), buffers, strict=True):
            address = buffer.ctypes.data if self._device == "cpu" else buffer.data_ptr()
            place = (self._device, 0, dtype, self.cache.shape, address)
            bound.binding.bind_input(past, *place)
            if present in bound.outputs:
                bound.binding.bind_output(present, *place)
        bound.buffers = self.cache.buffers

    def _check_contract(self) -> dict[str, Any]:
        """Compare names, types and sizes with the manifest; returns the graph's inputs by name."""
        bundle, topology, path = self.bundle, self.bundle.topology, self.bundle.graph_path
        arguments = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        inputs = {argument.name: argument for argument in arguments}
        outputs = {argument.name: argument for argument in self._session.get_outputs()}
        layers = range(bundle.kv_layers)
        presents = caches(PRESENT, layers)
        needed_inputs = [INPUT_IDS, ATTENTION_MASK, KEPT_ROWS, *caches(PAST, layers), *topology.inputs]
        needed_outputs = [*OUTPUTS, *presents, *topology.outputs]
        needed_outputs += [PENULTIMATE] if SKIPPED in inputs else []
        for kind, needed, there in (("input", needed_inputs, inputs), ("output", needed_outputs, outputs)):
            for name in needed:
                if name not in there:
                    raise BundleError(f"{path} has no {kind} {name}: it is not the graph its manifest describes")
        unknown = [i.name for i in self._session.get_inputs() if i.name not in needed_inputs]
        if unknown:
            raise BundleError(f"{path} has an input {unknown[0]} that its manifest does not account for")
        if inputs[_FIRST_CACHE].type not in _TYPES:
            raise BundleError(f"{path} keeps its cache as {inputs[_FIRST_CACHE].type}, which is not supported")
        sizes = [(LOGITS, -1, bundle.vocab_size, "vocabulary"), (TOPK_IDS, -1, bundle.top_k_outputs, "top_k_outputs")]
        sizes += [(name, -1, width, f"width of {name}") for name, width in topology.outputs.items()]
        sizes += [(name, 1, bundle.kv_heads, "kv_heads") for name in presents]
        sizes += [(name, 3, bundle.head_size, "head_size") for name in presents]
        sizes += [(name, 1, bundle.kv_heads, "kv_heads") for name in caches(PAST, layers)]
        sizes += [(name, 3, bundle.head_size, "head_size") for name in caches(PAST, layers)]
        for name, axis, size, what in sizes:
            kind, shape = ("output", outputs[name].shape) if name in outputs else ("input", inputs[name].shape)
            found = shape[axis] if len(shape) > max(axis, 0) else None
            if not isinstance(found, int):  # an axis that is only named says nothing
                raise BundleError(f"{path}: {kind} {name} has no {what} of a fixed size")
            if found != size:
                raise BundleError(f"{path}: {kind} {name} has a {what} of {found} where the manifest says {size}")
        if SKIPPED in inputs:
            states = inputs[SKIPPED]
            if states.type not in _TYPES or len(states.shape) != 3 or not isinstance(states.shape[-1], int):
                raise BundleError(f"{path}: input {SKIPPED} is not of a supported type and shape")
        return inputs

    def _check_heads(self) -> None:
        """Run one pass: how many heads there are is in no shape of the graph, and with others its text would be wrong.

        Raises:
            BundleError: They are not as many as the manifest says, or the graph does not run.
        """
        self.step([0])
        self.cache.reset()
        self.step_seconds, self.ort_seconds, self.passes = 0.0, 0.0, 0
