"""The drafter's graph: what predicts further tokens, beside the base's graph and run apart from it.

Its *layers* read the states of tokens that are final, once a round and with keys and values of their own, so that
nothing is spent on drafts that fall. Its *draft* goes from what they put out to words, at once for all heads, or one
head after the other where each is to know the token drafted in front of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .binding import Binding
from .bundle import Bundle
from .errors import BundleError, EngineError
from .kv_cache import KVBuffers, KVCache
from .names import (
    ATTENTION_MASK,
    DRAFT_PART,
    DRAFT_STATES,
    HEAD_ROWS,
    HEAD_STATES,
    LOGITS,
    OUTPUTS,
    PAST,
    PENULTIMATE,
    PRESENT,
    PREVIOUS,
    TOPK_IDS,
    TOPK_LOGITS,
    caches,
)
from .providers import Backend
from .step import as_array

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
"""Of keys, values and states, as onnxruntime calls them."""
CATCH_UP_CHUNK = 512
"""Most positions that the layers read at once: bounds the memory of their attention."""


class Heads:
    """The drafter's graph of one bundle, with the keys and values of its layers.

    Attributes:
        kv: These keys and values; as many positions are held as `KVCache.seen` says.
        seconds: Time spent inside onnxruntime so far.
    """

    def __init__(self, bundle: Bundle, backend: Backend, cache: KVCache, device: str, **room: Any):
        """Load the graph and check that it keeps the contract of the manifest.

        Args:
            bundle: One with a drafter's graph.
            backend: How it is run.
            cache: The base's, with the states that the layers read.
            device: Where full rows of logits stay until they are read: "cpu" or "cuda".
            **room: `growth` and `allocate` of `KVBuffers`.

        Raises:
            ProviderError: No usable onnxruntime or execution provider.
            BundleError: The graph does not load or is not what the manifest says.
        """
        assert bundle.drafter is not None and cache.states is not None
        self.bundle, self.drafter = bundle, bundle.drafter
        self.seconds = 0.0
        self._cache = cache
        self._path = bundle.folder / self.drafter.graph
        topology = bundle.topology
        conditioned = [PREVIOUS, DRAFT_PART] if self.drafter.conditioned else []
        layers = range(topology.layers)
        ends = [PENULTIMATE, ATTENTION_MASK, HEAD_ROWS, *caches(PAST, layers), HEAD_STATES, *topology.outputs]
        session, _ = backend.start(self._path, bundle.precision, without=[DRAFT_STATES, *conditioned, *OUTPUTS])
        self._check(session, _layer_sizes(bundle, cache.states.shape[1]))
        kinds = {each.name: each.type for each in session.get_inputs()}
        kind = kinds[caches(PAST, [0])[0]]
        if kind not in TYPES:
            raise BundleError(f"{self._path} keeps its cache as {kind}, which is not supported")
        self.kv = KVBuffers(
            topology.layers,
            bundle.kv_heads,
            bundle.head_size,
            cache.max_length,
            dtype=TYPES[kind],
            **room,
        )
        self._layers: Binding | None = Binding(session, [HEAD_STATES, *topology.outputs], "cpu")
        session, _ = backend.start(self._path, bundle.precision, without=[*ends, *caches(PRESENT, layers)])
        self._check(session, _draft_sizes(bundle, cache.states.shape[1]))
        self._draft: Binding | None = Binding(session, list(OUTPUTS), device)
        self._ones = np.empty(0, np.int64)
        self._part = np.zeros((), np.int64)

    def ahead(self, positions: Sequence[int]) -> HeadsAhead:
        """What the heads say behind some positions that the cache holds.

        Args:
            positions: Any, one of them perhaps twice.
        """
        cache, first = self._cache, min(positions)
        begin, end = min(cache.seen, first), max(positions) + 1
        while first - begin > CATCH_UP_CHUNK:
            self._run_layers(begin, begin + CATCH_UP_CHUNK, [-1])
            begin += CATCH_UP_CHUNK
        values = self._run_layers(begin, end, [position - end for position in positions])
        cache.seen = max(cache.seen, end)
        what = f"{self._path}, behind {end} tokens,"
        states = as_array(values, HEAD_STATES, what)
        parts = self.bundle.topology.parts
        if len(states) != len(positions) * parts:
            raise BundleError(
                f"{self._path} puts out {len(states)} states for {len(positions)} rows: it is not the graph its "
                "manifest describes"
            )
        return HeadsAhead(self, states.reshape(len(positions), parts, -1), values, what)

    def draft(self, states: np.ndarray, part: int = 0, before: Sequence[int] | None = None) -> dict[str, Any]:
        """Go from states to words.

        Args:
            states: [drafts, width].
            part: Whose states they are, where heads are conditioned.
            before: The token in front of each draft, where heads are conditioned.

        Returns:
            Logits and top-K by name, as onnxruntime holds them.

        Raises:
            ValueError: The heads are conditioned, and there is not a token for every draft.
            BundleError: The graph does not run.
            EngineError: The session is closed.
        """
        bound = _open(self._draft)
        states = np.ascontiguousarray(states)
        bound.input(DRAFT_STATES, states, (1, *states.shape))
        if self.drafter.conditioned:
            if before is None or len(before) != len(states):
                raise ValueError("these heads are conditioned on the token in front of what they predict: name it")
            previous = np.array(before, np.int64)
            self._part[()] = part
            bound.input(PREVIOUS, previous, (1, len(previous)))
            if self.bundle.topology.parts > 1:
                bound.input(DRAFT_PART, self._part)
        return self._run(bound, f"a draft of {len(states)} rows")

    def check(self) -> None:
        """Find out about the cache's first position what no shape tells: how many states there are, and of what words.

        Raises:
            BundleError: It is not what the manifest says, or the graph does not run.
        """
        states, parts = self.ahead([0]).states[0], self.bundle.topology.parts
        for part in {0, parts - 1}:
            values = {name: value.numpy()[0] for name, value in self.draft(states[part : part + 1], part, [0]).items()}
            logits, top, ids = (values[name] for name in (LOGITS, TOPK_LOGITS, TOPK_IDS))
            known = ids.min() >= 0 and ids.max() < self.bundle.vocab_size and len(logits) == len(ids) == len(top) == 1
            if not known or not np.allclose(self.whole_rows(logits)[0][ids[0]], top[0], 1e-2, 1e-2, equal_nan=True):
                raise BundleError(f"{self._path} makes drafts of other words than its manifest says")

    def whole_rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows over the draft vocabulary as rows over all words, -inf where there is none."""
        words = self.drafter.vocabulary
        if words is None:
            return rows
        whole = np.full((len(rows), self.bundle.vocab_size), -np.inf, rows.dtype)
        whole[:, np.array(words)] = rows
        return whole

    def close(self) -> None:
        """Free graph and memory."""
        self.kv.free()
        self._layers = self._draft = None

    def _run_layers(self, begin: int, end: int, rows: Sequence[int]) -> dict[str, Any]:
        """Have the layers read the states of some positions, and put out rows counted from their end."""
        states, bound = self._cache.states, _open(self._layers)
        assert states is not None
        self.kv.make_room(end, begin)
        if len(self._ones) < end:
            self._ones = np.ones(self.kv.capacity, np.int64)
        bound.caches(self.kv)
        bound.input(PENULTIMATE, states[begin:], (1, end - begin, states.shape[1]))
        bound.input(ATTENTION_MASK, self._ones, (1, end))
        wanted = np.array(rows, np.int64)
        bound.input(HEAD_ROWS, wanted)
        return self._run(bound, f"behind {begin} tokens over {end - begin}")

    def _run(self, bound: Binding, what: str) -> dict[str, Any]:
        bound.renew()
        started = time.perf_counter()
        try:
            values = bound.run()
        except Exception as error:  # onnxruntime raises many classes that share no base
            raise BundleError(f"{self._path} fails at {what}: {error}") from error
        self.seconds += time.perf_counter() - started
        return values

    def _check(self, session: Any, wanted: dict[str, list[int | None]]) -> None:
        """Compare inputs and outputs with what the manifest says.

        Args:
            session: Of one part of the graph.
            wanted: Names with their shapes; None for an axis of any size.

        Raises:
            BundleError: One is missing, not accounted for, or of another size.
        """
        there = [*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs()]
        found = {each.name: each.shape for each in there}
        for name, sizes in wanted.items():
            if name not in found:
                raise BundleError(f"{self._path} has no {name}: it is not the graph its manifest describes")
            shape = found[name]
            if len(shape) != len(sizes) or any(
                size is not None and size != axis for size, axis in zip(sizes, shape, strict=True)
            ):
                raise BundleError(
                    f"{self._path}: {name} has the shape {shape}, which is not what the manifest describes"
                )
        if unknown := [name for name in found if name not in wanted]:
            raise BundleError(f"{self._path} has {unknown[0]}, which its manifest does not account for")


def _open(bound: Binding | None) -> Binding:
    """A part of the graph, unless the session has been closed."""
    if bound is None:
        raise EngineError("the engine is closed: make a new one")
    return bound


def _layer_sizes(bundle: Bundle, width: int) -> dict[str, list[int | None]]:
    topology = bundle.topology
    layers = range(topology.layers)
    wanted: dict[str, list[int | None]] = {PENULTIMATE: [None, None, width], ATTENTION_MASK: [None, None]}
    wanted |= {HEAD_ROWS: [None], HEAD_STATES: [None, None, width]}
    wanted |= {name: [None, None, size] for name, size in topology.outputs.items()}
    cache = [None, bundle.kv_heads, None, bundle.head_size]
    return wanted | dict.fromkeys([*caches(PAST, layers), *caches(PRESENT, layers)], cache)


def _draft_sizes(bundle: Bundle, width: int) -> dict[str, list[int | None]]:
    drafter = bundle.drafter
    assert drafter is not None
    words = bundle.vocab_size if drafter.vocabulary is None else len(drafter.vocabulary)
    top = [None, None, drafter.top_k_outputs]
    wanted = {DRAFT_STATES: [None, None, width], LOGITS: [None, None, words], TOPK_LOGITS: top, TOPK_IDS: top}
    if drafter.conditioned:
        wanted[PREVIOUS] = [None, None]
        if bundle.topology.parts > 1:
            wanted[DRAFT_PART] = []
    return wanted


class HeadsAhead:
    """What the heads say behind some positions: see `step.Ahead`. Words are worked out when they are asked for.

    Attributes:
        states: What the layers made of them, [rows, parts, width].
    """

    def __init__(self, heads: Heads, states: np.ndarray, values: dict[str, Any], what: str):
        """Take what the layers put out; states [rows, parts, width]."""
        self._heads, self.states, self._values, self._what = heads, states, values, what
        self._drafts: dict[tuple[int, ...], dict[str, Any]] = {}

    @property
    def rows(self) -> int:
        """See `Ahead`."""
        return len(self.states)

    def logits(self, part: int, before: Sequence[int] | None = None) -> np.ndarray:
        """See `Ahead`; of a word outside the draft vocabulary it is -inf."""
        return self._heads.whole_rows(self._read(LOGITS, part, before))

    def topk(self, part: int, before: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `Ahead`."""
        return self._read(TOPK_LOGITS, part, before), self._read(TOPK_IDS, part, before)

    def output(self, name: str) -> np.ndarray:
        """See `Ahead`."""
        return as_array(self._values, name, self._what)

    def _read(self, name: str, part: int, before: Sequence[int] | None) -> np.ndarray:
        """One output of the draft, [rows, …]."""
        if self._heads.drafter.conditioned:
            key = (part, *(before or ()))
            if key not in self._drafts:
                self._drafts[key] = self._heads.draft(self.states[:, part], part, before)
            return as_array(self._drafts[key], name, self._what)
        rows, parts, width = self.states.shape
        if not self._drafts:
            self._drafts[()] = self._heads.draft(self.states.reshape(rows * parts, width))
        every = as_array(self._drafts[()], name, self._what)
        return every.reshape(rows, parts, -1)[:, part]
