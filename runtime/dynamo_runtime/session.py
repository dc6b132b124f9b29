"""A bundle's graph in onnxruntime: bound buffers, and one forward pass at a time."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .bundle import Bundle
from .errors import BundleError, ParameterError, PromptError
from .kv_cache import GROWTH_SLOTS, KVCache
from .names import OUTPUTS, PENULTIMATE, SKIPPED
from .providers import Backend, import_onnxruntime

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
TWIN_BYTES = 64 << 20  # a graph up to this size is loaded a second time for passes without heads
_MOVABLE = "cuda"  # the provider whose memory is bound; any other reads and writes the computer's own


class Step:
    """What one forward pass says: logits of the rows that were asked for, of every head.

    The arrays stay what they are whatever is run later. They become arrays when they are read: full rows stay in
    onnxruntime's own memory, so that a sampler which is content with the top-k outputs does not pay for a vocabulary.
    """

    def __init__(self, values: dict[str, Any], bundle: Bundle, head_rows: int):
        """Take a pass's outputs.

        Args:
            values: Arrays, or what onnxruntime holds, by name and with the batch axis: "logits", "topk_logits" and
                "topk_ids" [1, rows of all heads, …], the first head's first; of a joint head "gate" too.
            bundle: Whose they are.
            head_rows: Rows of every further head.
        """
        self._values = values
        self._bundle = bundle
        self._head_rows = head_rows
        factors = bundle.n_tokens * bundle.rank if bundle.kind == "cp" else 0
        self._further = head_rows * (factors or bundle.n_heads - 1)

    def logits(self, head: int = 1) -> np.ndarray:
        """The full rows of one head, [rows, vocab]."""
        return self._of_head("logits", head)

    def topk(self, head: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The largest logits of one head and their token ids, both [rows, K], in descending order."""
        return self._of_head("topk_logits", head), self._of_head("topk_ids", head)

    def gate(self) -> np.ndarray:
        """Of a joint head: log w_α of its components, [rows, rank]."""
        return self._read("gate")

    def factors(self) -> np.ndarray:
        """Of a joint head: logits of every factor p_α^(s), [rows, n_tokens, rank, vocab]."""
        return self._of_factors("logits")

    def factor_topk(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a joint head: every factor's largest logits and their ids, both [rows, n_tokens, rank, K], descending."""
        return self._of_factors("topk_logits"), self._of_factors("topk_ids")

    def _of_head(self, name: str, head: int) -> np.ndarray:
        rows = self._read(name)
        first = len(rows) - self._further
        if head == 1:
            return rows[:first]
        begin = first + (head - 2) * self._head_rows
        return rows[begin : begin + self._head_rows]

    def _of_factors(self, name: str) -> np.ndarray:
        rows = self._read(name)
        shape = (self._head_rows, self._bundle.n_tokens, self._bundle.rank, rows.shape[1])
        return rows[len(rows) - self._further :].reshape(shape)

    def _read(self, name: str) -> np.ndarray:
        value = self._values[name]
        if not isinstance(value, np.ndarray):
            value = self._values[name] = value.numpy()  # over the same memory, unless that is a device's
        array: np.ndarray = value[0]
        return array


class _Binding:
    """A loaded graph, its inputs, and the outputs that are fetched together; inputs that have not moved stay bound."""

    def __init__(self, session: Any, names: list[str], device: str):
        self.session = session
        self.outputs = {output.name for output in session.get_outputs()}
        self.binding = session.io_binding()
        # Full rows stay where they were computed until somebody reads them.
        self._places = [(name, device if name == "logits" else "cpu") for name in names]
        self._inputs: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.renew()  # first, so that their places in the output vector are those in `names`

    def input(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
        """Bind the memory of an array, which the caller keeps alive; contents are read when the graph runs."""
        place = array.ctypes.data, shape
        if self._inputs.get(name) != place:
            self._inputs[name] = place
            self.binding.bind_input(name, "cpu", 0, array.dtype.type, shape, place[0])

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
        provider: Short name of the execution provider that runs it.
        cache: The KV cache; `cache.rollback(length)` before a step drops positions.
        skips_heads: Whether a pass that wants no rows of further heads does not compute them.
        step_seconds: Time spent in steps so far.
        ort_seconds: The part of it inside onnxruntime.
        passes: Forward passes so far.
        user: Whoever relies on what the cache holds.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_length: int | None = None,
        growth: int = GROWTH_SLOTS,
        **backend: Any,
    ):
        """Load the graph and check that it keeps the contract of the manifest.

        Args:
            bundle: From `load_bundle`, or built in memory.
            max_length: Largest number of positions the cache may hold; None means the bundle's context
                length.
            growth: Cache slots per growth step, where the cache is in the computer's memory.
            **backend: Fields of `Backend`: provider, threads, ….

        Raises:
            ProviderError: No usable onnxruntime or execution provider.
            ParameterError: `max_length` or a field of `Backend` is out of range.
            BundleError: The graph does not load or is not what the manifest says.
        """
        length = bundle.context_length if max_length is None else max_length
        if not 1 <= length <= bundle.context_length:
            raise ParameterError(
                f"max_length must be from 1 to the context length {bundle.context_length}, not {length}"
            )
        self.bundle = bundle
        self.step_seconds = self.ort_seconds = 0.0
        self.passes = 0
        self.user: object = None
        self._backend = Backend(**backend)
        self._session, self.provider = self._backend.start(bundle.graph_path, bundle.precision)
        self._device = "cuda" if self.provider == _MOVABLE else "cpu"
        inputs = self._check_contract()
        self.skips_heads = SKIPPED in inputs
        self.cache = KVCache(
            bundle.kv_layers,
            bundle.kv_heads,
            bundle.head_size,
            length,
            dtype=_TYPES[inputs["past_key_values.0.key"].type],
            growth=growth if self._device == "cpu" else length,
            allocate=np.zeros if self._device == "cpu" else self._allocate,
        )
        self._ones = np.ones(length, np.int64)
        self._rows = np.zeros((), np.int64)
        self._ids = np.empty(length, np.int64)
        self._head_rows = np.empty(length, np.int64)
        with_heads = [*OUTPUTS, "gate"] if bundle.kind == "cp" else [*OUTPUTS]
        self._with_heads = _Binding(self._session, with_heads, self._device)
        self._without_heads: _Binding | None = None
        if self.skips_heads:
            states = inputs[SKIPPED]
            self._none_skipped = np.empty((1, 0, states.shape[-1]), _TYPES[states.type])
        self._bind_cache(self._with_heads)

    @property
    def max_length(self) -> int:
        """Largest number of positions the cache may hold."""
        return self.cache.max_length

    def step(self, tokens: Sequence[int], *, rows: int = 1, head_rows: Sequence[int] | None = None) -> Step:
        """Run the graph over `tokens`, appended to what the cache holds, and advance the cache by them.

        Args:
            tokens: m >= 1 ids of tokens, or of look-ahead tokens.
            rows: Last rows of the first head to return; 0 means all m.
            head_rows: Rows of this pass (0 … m-1, or negative from the end) to return of every further head;
                None means the last. If there are none, the heads are left out where the graph can do without
                them (`skips_heads`); the next pass that wants rows of them makes up for it.

        Raises:
            PromptError: No tokens, a token outside the vocabulary, or more than the cache may hold.
            BundleError: The graph does not run.
            ValueError: `rows` or `head_rows` are not among the m rows.
        """
        entered = time.perf_counter()
        m = len(tokens)
        if m == 0:
            raise PromptError("there are no tokens to process")
        if min(tokens) < 0 or max(tokens) >= self.bundle.look_ahead.stop:
            raise PromptError(f"token ids must be from 0 to {self.bundle.look_ahead.stop - 1}")
        if not 0 <= rows <= m:
            raise ValueError(f"rows {rows} of a pass over {m} tokens")
        if head_rows is not None and not all(-m <= row < m for row in head_rows):
            raise ValueError(f"head_rows {list(head_rows)} of a pass over {m} tokens")
        total = self.cache.length + m
        if self.cache.reserve(total):
            self._bind_cache(self._with_heads)
            if self._without_heads is not None:
                self._bind_cache(self._without_heads)
        skipping = self.skips_heads and head_rows is not None and len(head_rows) == 0
        if skipping and self._without_heads is None:
            self._without_heads = self._bind_without_heads()
        bound = self._without_heads if skipping and self._without_heads is not None else self._with_heads
        self._rows[()] = rows
        self._ids[:m] = tokens
        bound.input("input_ids", self._ids, (1, m))
        bound.input("attention_mask", self._ones, (1, total))
        wanted = 0
        if self.bundle.has_head_rows and not skipping:
            # From the end, where the heads see states of earlier passes in front.
            further = [-1] if head_rows is None else [row if row < 0 else row - m for row in head_rows]
            wanted = len(further)
            self._head_rows[:wanted] = further
            bound.input("head_rows", self._head_rows, (wanted,))
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
        self.cache.advance(tokens, values.pop(PENULTIMATE).numpy()[0] if skipping else None)
        self.step_seconds += time.perf_counter() - entered
        return Step(values, self.bundle, wanted)

    def end_profiling(self) -> str:
        """End onnxruntime's own profile, which `Backend.profile_prefix` began; returns the name of its file."""
        name: str = self._session.end_profiling()
        return name

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A buffer in the provider's memory; stale contents are never read, so it is not cleared."""
        return import_onnxruntime().OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, self._device, 0)

    def _bind_without_heads(self) -> _Binding:
        """A binding for passes that leave the further heads out.

        A small model's pass is so short that choosing a branch of the graph takes a few per cent of it, so a small
        graph is loaded a second time, with the heads cut off for good.
        """
        session, names = self._session, [*OUTPUTS, PENULTIMATE]
        path = self.bundle.graph_path
        files = [path, path.with_name(f"{path.name}.data")]
        if sum(file.stat().st_size for file in files if file.is_file()) <= TWIN_BYTES:
            presents = [f"present.{layer}.{part}" for layer in self.bundle.head_layers for part in ("key", "value")]
            unwanted = ("head_rows", SKIPPED, *presents)
            session, _ = self._backend.start(path, self.bundle.precision, without=unwanted)
            bound = _Binding(session, names, self._device)
        else:
            bound = _Binding(session, names, self._device)
            bound.input("head_rows", self._head_rows, (0,))
        self._bind_cache(bound)
        return bound

    def _bind_cache(self, bound: _Binding) -> None:
        """Bind what does not change from pass to pass."""
        bound.input("num_logits_to_keep", self._rows, ())
        dtype = self.cache.dtype.type
        for layer, pair in enumerate(self.cache.buffers):
            for part, buffer in zip(("key", "value"), pair, strict=True):
                address = buffer.ctypes.data if self._device == "cpu" else buffer.data_ptr()
                place = (self._device, 0, dtype, self.cache.shape, address)
                bound.binding.bind_input(f"past_key_values.{layer}.{part}", *place)
                if f"present.{layer}.{part}" in bound.outputs:
                    bound.binding.bind_output(f"present.{layer}.{part}", *place)

    def _check_contract(self) -> dict[str, Any]:
        """Compare names, types and sizes with the manifest; returns the graph's inputs by name."""
        bundle, path = self.bundle, self.bundle.graph_path
        arguments = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        inputs = {argument.name: argument for argument in arguments}
        outputs = {argument.name: argument for argument in self._session.get_outputs()}
        cache = [f"{layer}.{part}" for layer in range(bundle.kv_layers) for part in ("key", "value")]
        needed_inputs = [
            "input_ids",
            "attention_mask",
            "num_logits_to_keep",
            *(f"past_key_values.{name}" for name in cache),
        ]
        if bundle.has_head_rows:
            needed_inputs.append("head_rows")
        needed_outputs = [*OUTPUTS, *(f"present.{name}" for name in cache)]
        if bundle.kind == "cp":
            needed_outputs.append("gate")
        if SKIPPED in inputs:
            needed_outputs.append(PENULTIMATE)
        for kind, needed, present in (("input", needed_inputs, inputs), ("output", needed_outputs, outputs)):
            for name in needed:
                if name not in present:
                    raise BundleError(f"{path} has no {kind} {name}: it is not the graph its manifest describes")
        unknown = [i.name for i in self._session.get_inputs() if i.name not in needed_inputs]
        if unknown:
            raise BundleError(f"{path} has an input {unknown[0]} that its manifest does not account for")
        if inputs["past_key_values.0.key"].type not in _TYPES:
            raise BundleError(
                f"{path} keeps its cache as {inputs['past_key_values.0.key'].type}, which is not supported"
            )
        sizes = [
            ("logits", -1, bundle.vocab_size, "vocabulary"),
            ("topk_ids", -1, bundle.top_k_outputs, "top_k_outputs"),
        ]
        if bundle.kind == "cp":
            sizes.append(("gate", -1, bundle.rank, "rank"))
        sizes += [(f"present.{name}", 1, bundle.kv_heads, "kv_heads") for name in cache]
        sizes += [(f"present.{name}", 3, bundle.head_size, "head_size") for name in cache]
        for name, axis, size, what in sizes:
            shape = outputs[name].shape
            found = shape[axis] if shape else None
            if isinstance(found, int) and found != size:  # a named axis says nothing
                raise BundleError(f"{path}: output {name} has a {what} of {found} where the manifest says {size}")
        return inputs
