"""A bundle's graphs in onnxruntime: bound buffers, and one forward pass at a time."""

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import numpy as np

from .binding import Binding
from .bundle import Bundle
from .errors import BundleError, ParameterError, PromptError
from .heads import TYPES, Heads
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
    TOPK_LOGITS,
    caches,
)
from .outputs import Outputs, RunOutputs, TopK, gone
from .parameters import whole
from .providers import Backend, BackendOptions, backend_of, import_onnxruntime
from .step import LAST, Ahead, All, InsideAhead, Last, Rows, Step
from .topology import Plain
from .turns import Turns

_FIRST_CACHE = caches(PAST, [0])[0]
_MOVABLE = "cuda"  # the provider whose memory is bound; any other reads and writes the computer's own


class _Pass(NamedTuple):
    """What a pass is called where it is complained of: put into words only there."""

    bundle: Bundle
    tokens: int
    before: int

    def __str__(self) -> str:
        return f"{self.bundle.graph_path}, in a pass over {self.tokens} tokens behind {self.before},"


class Session:
    """The graphs of one bundle with their KV caches.

    Attributes:
        bundle: What is running.
        backend: How it was asked to run.
        provider: Short name of the execution provider that runs it.
        cache: The KV cache; `cache.rollback(length)` before a step drops positions.
        heads: What predicts further tokens in a graph of its own; None where there is none.
        step_seconds: Time spent in steps so far.
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
        **options: Unpack[BackendOptions],
    ):
        """Load the graphs and check that they keep the contract of the manifest.

        Args:
            bundle: From `load_bundle`, or built in memory.
            backend: How the graphs are run.
            max_length: Largest number of positions the cache may hold; None means the bundle's context
                length.
            growth: Cache slots per growth step, where the cache is in the computer's memory.
            **options: Fields of `Backend`, in place of those in `backend`.

        Raises:
            ProviderError: No usable onnxruntime or execution provider.
            ParameterError: `max_length` or a field of `Backend` is out of range.
            BundleError: A graph does not load or is not what the manifest says.
        """
        length = bundle.context_length if max_length is None else whole("max_length", max_length, 1)
        if not 1 <= length <= bundle.context_length:
            raise ParameterError(
                f"max_length must be from 1 to the context length {bundle.context_length}, not {length}"
            )
        self.bundle = bundle
        self.step_seconds = self._seconds = 0.0
        self.passes = 0
        self._ids_end = bundle.look_ahead.stop
        self.turns = Turns()
        self.backend = backend_of(backend, options)
        self._session, self.provider = self.backend.start(bundle.graph_path, bundle.precision)
        self._device = "cuda" if self.provider == _MOVABLE else "cpu"
        inputs, outputs = self._check_contract()
        # Formats 2 and 3: further heads are inside the base's graph, which may be able to do without them.
        self._inside = bundle.topology.parts if bundle.drafter is None else 0
        self._skips = SKIPPED in inputs
        states = outputs.get(PENULTIMATE)
        room: dict[str, Any] = {
            "growth": growth if self._device == "cpu" else length,
            "allocate": np.zeros if self._device == "cpu" else self._allocate,
        }
        self.cache = KVCache(
            bundle.kv_layers,
            bundle.kv_heads,
            bundle.head_size,
            length,
            dtype=TYPES[inputs[_FIRST_CACHE].type],
            width=0 if states is None else states.shape[-1],
            states_dtype=np.float32 if states is None else TYPES[states.type],
            **room,
        )
        self._rows = np.zeros((), np.int64)
        self._make_room()
        names = [LOGITS, *(bundle.topology.outputs if self._inside else {})]
        self._bound = Binding(self._session, names, self._device)
        self._asked: tuple[int, int] | None = None  # rows of the first head, and of every one inside, with room bound
        self._outputs: Callable[[], RunOutputs | None] = gone  # of the newest pass, as long as somebody has them
        self._bound.input(KEPT_ROWS, self._rows)
        self.heads: Heads | None = None
        if bundle.drafter is not None:
            self.heads = Heads(bundle, self.backend, self.cache, **room)
        if bundle.topology.parts:
            self._check_heads()

    @property
    def max_length(self) -> int:
        """Largest number of positions the cache may hold."""
        return self.cache.max_length

    @property
    def skips_heads(self) -> bool:
        """Whether a pass that wants no rows of further heads does not compute them."""
        return self._skips or self.heads is not None

    @property
    def ort_seconds(self) -> float:
        """Time spent inside onnxruntime so far."""
        return self._seconds + (0.0 if self.heads is None else self.heads.seconds)

    def step(self, tokens: Sequence[int], *, rows: Last | All = LAST, heads: Rows = LAST) -> Step:
        """Run the base's graph over `tokens`, appended to what the cache holds, and advance the cache by them.

        Args:
            tokens: m >= 1 ids of tokens, or of look-ahead tokens.
            rows: Rows of the first head to return.
            heads: Rows that further heads may be asked about. If there are none, heads inside the base's graph are
                left out where it can do without them (`skips_heads`); the next pass that wants rows of them makes up
                for it. Heads with a graph of their own are run when the step is asked for them.

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
        before, bound, cache = self.cache.length, self._bound, self.cache
        total = before + m
        cache.reserve(total)
        if len(self._ones) < total:
            self._make_room()
        bound.caches(cache)
        self._rows[()] = len(kept)
        for place, token in enumerate(tokens):  # few of them: numpy takes longer to see what a list holds
            self._ids[place] = token
        bound.input(INPUT_IDS, self._ids, (1, m))
        bound.input(ATTENTION_MASK, self._ones, (1, total))
        if cache.states is not None:
            bound.output(PENULTIMATE, cache.states, (1, m, cache.states.shape[1]), begin=before)
        inside = self._inside and (bool(head_rows) or not self._skips)
        if self._inside:
            self._want(head_rows if inside else [], before if inside else cache.seen)
        self._hand_over()
        self._ask_rows(len(kept), len(head_rows) if inside else 0)
        started = time.perf_counter()
        try:
            bound.run()
        except Exception as error:  # onnxruntime raises many classes that share no base
            raise BundleError(f"{self.bundle.graph_path} fails at a pass over {m} tokens: {error}") from error
        self._seconds += time.perf_counter() - started
        self.passes += 1
        cache.advance(tokens, seen=bool(inside))
        outputs = RunOutputs(bound, self._top, _Pass(self.bundle, m, before))
        self._outputs = weakref.ref(outputs)
        step = self._step(outputs, [total + row for row in head_rows])
        self.step_seconds += time.perf_counter() - entered
        return step

    def _hand_over(self) -> None:
        """Leave what the newest pass has put out, and its memory, to whoever still has it."""
        outputs = self._outputs()
        if outputs is not None:
            outputs.keep()
            self._asked = None

    def _ask_rows(self, rows: int, head_rows: int) -> None:
        """Have the pass put out so many rows of the first head, and of every one inside the base's graph."""
        if self._asked == (rows, head_rows):
            return
        self._asked = rows, head_rows
        top = self._top = TopK(rows + self._inside * head_rows, self.bundle.top_k_outputs)
        self._bound.renew()
        self._bound.output(TOPK_LOGITS, top.logits)
        self._bound.output(TOPK_IDS, top.ids)

    def _step(self, values: Outputs, positions: Sequence[int]) -> Step:
        """Return what a pass said, with a way to ask the heads about some of its positions."""
        count, own, taken = len(positions), self.heads, self.cache.passes
        if own is not None:

            def ask(rows: Sequence[int]) -> Ahead:
                return own.ahead([positions[row] for row in rows], taken)

            return Step(values, ask, head_rows=count)
        if not self._inside or not count:
            return Step(values)
        further, independent = self._inside * count, self.bundle.topology.independent

        def look(rows: Sequence[int]) -> Ahead:
            return InsideAhead(values, count, self._inside, independent, rows)

        return Step(values, look, head_rows=count, behind=further)

    def _want(self, head_rows: Sequence[int], seen_from: int) -> None:
        """Bind the inputs of heads that are inside the base's graph.

        Args:
            head_rows: Rows of them, counted from the end, where they see states of earlier passes in front.
            seen_from: Where the states of earlier passes end that the heads are given as well; those begin with the
                first one that the heads have not seen.
        """
        wanted = np.array(head_rows, np.int64)
        self._bound.input(HEAD_ROWS, wanted, (len(wanted),))
        self._head_rows = wanted  # kept alive
        states, seen = self.cache.states, self.cache.seen
        if self._skips and states is not None:
            owed = states[seen:seen_from]
            self._bound.input(SKIPPED, owed, (1, *owed.shape))

    def bind(self, names: Sequence[str]) -> Binding:
        """Return a second binding of the base's graph, whose buffers the caller binds.

        Args:
            names: Of the outputs that are fetched.
        """
        return Binding(self._session, names, self._device)

    def close(self) -> None:
        """Free graph and cache; the steps that were returned keep their values."""
        if self.turns.closed:
            return
        self.turns.close()
        self._hand_over()
        self.cache.close()
        if self.heads is not None:
            self.heads.close()
        del self._session, self._bound

    def end_profiling(self) -> str:
        """End onnxruntime's own profile, which `Backend.profile_prefix` began; returns the name of its file."""
        name: str = self._session.end_profiling()
        return name

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """Return a buffer in the provider's memory; stale contents are never read, so it is not cleared."""
        return import_onnxruntime().OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, self._device, 0)

    def _make_room(self) -> None:
        """Make the inputs of a pass as long as the cache is now.

        They grow with it, as a context may be long while most texts are short.
        """
        self._ones = np.ones(self.cache.capacity, np.int64)
        self._ids = np.empty(self.cache.capacity, np.int64)

    def _check_contract(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compare names, types and sizes with the manifest; returns the graph's inputs and outputs by name."""
        bundle, path = self.bundle, self.bundle.graph_path
        topology = bundle.topology if bundle.drafter is None else Plain()
        arguments = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        inputs = {argument.name: argument for argument in arguments}
        outputs = {argument.name: argument for argument in self._session.get_outputs()}
        layers = range(bundle.kv_layers)
        presents = caches(PRESENT, layers)
        needed_inputs = [INPUT_IDS, ATTENTION_MASK, KEPT_ROWS, *caches(PAST, layers), *topology.inputs]
        needed_outputs = [*OUTPUTS, *presents, *topology.outputs]
        needed_outputs += [PENULTIMATE] if SKIPPED in inputs or bundle.drafter is not None else []
        for kind, needed, there in (("input", needed_inputs, inputs), ("output", needed_outputs, outputs)):
            for name in needed:
                if name not in there:
                    raise BundleError(f"{path} has no {kind} {name}: it is not the graph its manifest describes")
        unknown = [i.name for i in self._session.get_inputs() if i.name not in needed_inputs]
        if unknown:
            raise BundleError(f"{path} has an input {unknown[0]} that its manifest does not account for")
        if inputs[_FIRST_CACHE].type not in TYPES:
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
        for states in filter(None, (inputs.get(SKIPPED), outputs.get(PENULTIMATE))):
            if states.type not in TYPES or len(states.shape) != 3 or not isinstance(states.shape[-1], int):
                raise BundleError(f"{path}: {states.name} is not of a supported type and shape")
        return inputs, outputs

    def _check_heads(self) -> None:
        """Run one pass to count the heads, as no shape of the graph says how many there are.

        Raises:
            BundleError: They are not as many as the manifest says, or the graph does not run.
        """
        try:
            self.step([0])
        except BundleError as error:
            raise BundleError(f"{error}; or it is not the graph its manifest describes") from error
        if self.heads is not None:
            self.heads.check()
            self.heads.seconds = 0.0
        self.cache.reset()
        self.step_seconds, self._seconds, self.passes = 0.0, 0.0, 0
