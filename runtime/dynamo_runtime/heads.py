"""The drafter's graph: what predicts further tokens, beside the base's graph and run apart from it.

Its *layers* read the states of tokens that are final, once a round and with keys and values of their own, so that
nothing is spent on drafts that fall. Its *draft* goes from what they put out to words, at once for all heads, or one
head after the other where each is to know the token drafted in front of it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .ahead import AllAhead, HeadsAhead, ToldAhead
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
    PAST,
    PENULTIMATE,
    PRESENT,
    PREVIOUS,
    TOPK_IDS,
    TOPK_LOGITS,
    caches,
)
from .outputs import TopK, gone, not_finite
from .providers import Backend

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
"""Of keys, values and states, as onnxruntime calls them."""
CATCH_UP_CHUNK = 512
"""Most positions that the layers read at once: bounds the memory of their attention."""


class Heads:
    """The drafter's graph of one bundle, with the keys and values of its layers.

    Attributes:
        kv: These keys and values; as many positions are held as `KVCache.seen` says.
        seconds: Time spent inside onnxruntime so far.
        runs: Of the layers so far.
        words: Ids of the draft vocabulary; None for all words.
        given: Width of what the draft of a conditioned head reads; 0 if none is.
    """

    def __init__(self, bundle: Bundle, backend: Backend, cache: KVCache, **room: Any):
        """Load the graph and check that it keeps the contract of the manifest.

        Args:
            bundle: One with a drafter's graph.
            backend: How it is run.
            cache: The base's, with the states that the layers read.
            **room: `growth` and `allocate` of `KVBuffers`.

        Raises:
            ProviderError: No usable onnxruntime or execution provider.
            BundleError: The graph does not load or is not what the manifest says.
        """
        assert bundle.drafter is not None and cache.states is not None
        self.bundle, self.drafter = bundle, bundle.drafter
        self.seconds = 0.0
        vocabulary = self.drafter.vocabulary
        self.words = None if vocabulary is None else np.array(vocabulary)
        self._cache, self._width = cache, cache.states.shape[1]
        self._path = bundle.folder / self.drafter.graph
        told, self.given = self.drafter.conditioned, 0
        layers, drafts = _layer_sizes(bundle, self._width), _draft_sizes(bundle)
        session = self._start(backend, layers if told else layers | drafts, drafts if told else {})
        kinds = {each.name: each.type for each in (*session.get_inputs(), *session.get_outputs())}
        kind = kinds[caches(PAST, [0])[0]]
        if kind not in TYPES:
            raise BundleError(f"{self._path} keeps its cache as {kind}, which is not supported")
        self.kv = KVBuffers(
            self.drafter.kv_layers,
            self.drafter.kv_heads,
            bundle.head_size,
            cache.max_length,
            dtype=TYPES[kind],
            **room,
        )
        self._states_type = cache.states.dtype
        self._layers: Binding | None = Binding(session, [], "cpu")
        self._draft: Binding | None = None
        if told:
            self.given = self._given_width(session)
            drafts[DRAFT_STATES] = [None, None, self.given]
            self._draft = Binding(self._start(backend, drafts, layers), [], "cpu")
        self._ones = np.empty(0, np.int64)
        # What a run reads and writes stays bound as long as runs are about as many rows, which they nearly always are.
        self._held: dict[str, np.ndarray] = {}
        self._drafted: dict[str, np.ndarray] = {}
        self._states = np.empty(0, self._states_type)
        self._newest: Callable[[], AllAhead | ToldAhead | None] = gone  # as long as somebody has it
        self._top = TopK(0, self.drafter.top_k_outputs)  # of whichever part makes words
        self.runs = 0

    def ahead(self, positions: Sequence[int], taken: int | None = None) -> AllAhead | ToldAhead:
        """Return what the heads say behind some positions of a pass.

        Args:
            positions: Any, one of them perhaps twice.
            taken: `KVCache.passes` when the pass had been taken; None for whatever is held now.

        Raises:
            BundleError: The graph does not run, or what it puts out are no numbers.
            EngineError: The session is closed.
            ValueError: The cache does not hold the positions any more.
        """
        self._read_states(positions, taken)
        outputs = {name: self._held[name][0].copy() for name in self.bundle.topology.outputs}
        ahead: AllAhead | ToldAhead
        if self.drafter.conditioned:
            ahead = ToldAhead(self, positions, taken, outputs, self._states)
        else:
            self._check_numbers()
            ahead = AllAhead(self, positions, taken, outputs, self._top)
        self._newest = weakref.ref(ahead)
        return ahead

    def check(self) -> None:
        """Find out about the cache's first position what no shape tells: how many states there are, and of what words.

        Raises:
            BundleError: It is not what the manifest says, or the graph does not run.
        """
        try:
            ahead = self.ahead([0])
        except BundleError as error:
            raise BundleError(f"{error}; or it is not the graph its manifest describes") from error
        for part in {0, self.bundle.topology.parts - 1}:
            (values, ids), logits = ahead.topk(part, [0]), ahead.logits(part, [0])
            known = ids.min() >= 0 and ids.max() < self.bundle.vocab_size
            if not known or not np.allclose(logits[0][ids[0]], values[0], 1e-2, 1e-2, equal_nan=True):
                raise BundleError(f"{self._path} makes drafts of other words than its manifest says")

    def again(self, ahead: HeadsAhead) -> np.ndarray:
        """Full rows of all heads that are not conditioned, [rows, parts, words]; they stay until the next run.

        Args:
            ahead: What was asked before.

        Raises:
            BundleError: The graph does not run.
            EngineError: The session is closed.
            ValueError: They have to be worked out again, and the cache does not hold the positions any more.
        """
        if ahead.run != self.runs:
            self._read_states(ahead.positions, ahead.taken)
            ahead.run = self.runs
        return self._held[LOGITS].reshape(ahead.rows, self.bundle.topology.parts, -1)

    @property
    def drafted(self) -> np.ndarray:
        """Full rows of the newest draft [drafts, words], which stay until the next."""
        return self._drafted[LOGITS][0]

    def draft(self, states: np.ndarray, part: int, before: Sequence[int] | None) -> TopK:
        """Go on to words of one conditioned head.

        Args:
            states: What the layers put out of it, [drafts, width].
            part: Whose they are.
            before: The token in front of each draft.

        Returns:
            The largest logits of every draft, which stay until the next.

        Raises:
            BundleError: The graph does not run, or what it puts out are no numbers.
            EngineError: The session is closed.
            ValueError: There is not a token in front for every draft.
        """
        if before is None or len(before) != len(states):
            raise ValueError("these heads are conditioned on the token in front of what they predict: name it")
        bound = _open(self._draft)
        if self._top.rows != len(before):
            self._drafted = self._hold_drafts(len(before))
        held = self._drafted
        held[DRAFT_STATES][0], held[DRAFT_PART][()] = states, part
        for place, token in enumerate(before):  # few of them: numpy takes longer to see what a list holds
            held[PREVIOUS][0, place] = token
        self._run(bound, "a draft")
        self._check_numbers()
        return self._top

    def close(self) -> None:
        """Free graph and memory."""
        self.kv.free()
        self._layers = self._draft = None

    def _start(self, backend: Backend, wanted: Sizes, other: Sizes) -> Any:
        """Load a part of the graph, without the other one."""
        session, _ = backend.start(self._path, self.bundle.precision, without=list(other))
        self._check(session, wanted)
        return session

    def _given_width(self, session: Any) -> int:
        """Return how wide that is which the layers put out for the draft of one head.

        Raises:
            BundleError: It may be of any width.
        """
        width = next(each.shape[-1] for each in session.get_outputs() if each.name == HEAD_STATES)
        if not isinstance(width, int):
            raise BundleError(f"{self._path}: {HEAD_STATES} has no width of a fixed size")
        return width

    def _read_states(self, positions: Sequence[int], taken: int | None) -> None:
        """Have the layers read all states up to the last of some positions, and put out what they make of these."""
        cache, first = self._cache, min(positions)
        _open(self._layers)
        if taken is not None and not cache.has(positions, taken):
            raise ValueError("further heads are asked of a row that the cache does not hold any more")
        begin, end = min(cache.seen, first), max(positions) + 1
        while first - begin > CATCH_UP_CHUNK:
            self._run_layers(begin, begin + CATCH_UP_CHUNK, [-1])
            begin += CATCH_UP_CHUNK
        self._run_layers(begin, end, [position - end for position in positions])
        cache.seen = max(cache.seen, end)

    def _run_layers(self, begin: int, end: int, rows: Sequence[int]) -> None:
        """Have the layers read the states of some positions, and put out rows that are counted from the end."""
        states, bound, newest = self._cache.states, _open(self._layers), self._newest()
        assert states is not None
        if newest is not None:
            newest.keep()
            self._newest = gone
        self.kv.make_room(end, begin)
        if len(self._ones) < end:
            self._ones = np.ones(self.kv.capacity, np.int64)
        bound.caches(self.kv)
        bound.input(PENULTIMATE, states, (1, end - begin, self._width), begin=begin)
        bound.input(ATTENTION_MASK, self._ones, (1, end))
        if not self._held or len(self._held[HEAD_ROWS]) != len(rows):
            self._held = self._hold_rows(len(rows))
        for place, row in enumerate(rows):
            self._held[HEAD_ROWS][place] = row
        self.runs += 1  # whatever comes of it
        self._run(bound, f"positions {begin} to {end}")

    def _hold_rows(self, rows: int) -> dict[str, np.ndarray]:
        """Have the layers be asked about so many rows, in memory that stays the same from run to run."""
        topology, bound = self.bundle.topology, _open(self._layers)
        held = {HEAD_ROWS: np.empty(rows, np.int64)}
        bound.input(HEAD_ROWS, held[HEAD_ROWS])
        put_out = {name: np.empty((1, rows, size), np.float32) for name, size in topology.outputs.items()}
        if self.drafter.conditioned:
            self._states = np.empty((rows, topology.parts, self.given), self._states_type)
            put_out[HEAD_STATES] = self._states.reshape(1, -1, self.given)
        else:
            put_out |= self._room_for_words(rows * topology.parts)
        for name, array in put_out.items():
            bound.output(name, array)
        return held | put_out

    def _hold_drafts(self, count: int) -> dict[str, np.ndarray]:
        """Have the draft be about so many states, in memory that stays the same from run to run."""
        held = {
            DRAFT_STATES: np.empty((1, count, self.given), self._states_type),
            PREVIOUS: np.empty((1, count), np.int64),
            DRAFT_PART: np.zeros((), np.int64),
        }
        for name, array in held.items():
            if name != DRAFT_PART or self.bundle.topology.parts > 1:
                _open(self._draft).input(name, array)
        put_out = self._room_for_words(count)
        for name, array in put_out.items():
            _open(self._draft).output(name, array)
        return held | put_out

    def _room_for_words(self, rows: int) -> dict[str, np.ndarray]:
        top = self._top = TopK(rows, self.drafter.top_k_outputs)
        full = np.empty((1, rows, _words(self.bundle)), np.float32)
        return {LOGITS: full, TOPK_LOGITS: top.logits, TOPK_IDS: top.ids}

    def _check_numbers(self) -> None:
        """See that what was run gave some.

        Raises:
            BundleError: It gave something else.
        """
        if not self._top.is_finite():
            raise not_finite(self._path, LOGITS)

    def _run(self, bound: Binding, what: str) -> None:
        started = time.perf_counter()
        try:
            bound.run()
        except Exception as error:  # onnxruntime raises many classes that share no base
            raise BundleError(f"{self._path} fails at {what}: {error}") from error
        self.seconds += time.perf_counter() - started

    def _check(self, session: Any, wanted: Sizes) -> None:
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
    """Return a part of the graph, unless the session has been closed."""
    if bound is None:
        raise EngineError("the engine is closed: make a new one")
    return bound


Sizes = dict[str, list[int | None]]
"""Names of inputs and outputs with their shapes; None for an axis of any size."""


def _words(bundle: Bundle) -> int:
    """Return how many words drafts are made of."""
    assert bundle.drafter is not None
    return bundle.vocab_size if bundle.drafter.vocabulary is None else len(bundle.drafter.vocabulary)


def _layer_sizes(bundle: Bundle, width: int) -> Sizes:
    topology, drafter = bundle.topology, bundle.drafter
    assert drafter is not None
    layers = range(drafter.kv_layers)
    wanted: Sizes = {PENULTIMATE: [None, None, width], ATTENTION_MASK: [None, None], HEAD_ROWS: [None]}
    if drafter.conditioned:
        wanted[HEAD_STATES] = [None, None, None]
    wanted |= {name: [None, None, size] for name, size in topology.outputs.items()}
    cache = [None, drafter.kv_heads, None, bundle.head_size]
    return wanted | dict.fromkeys([*caches(PAST, layers), *caches(PRESENT, layers)], cache)


def _draft_sizes(bundle: Bundle) -> Sizes:
    drafter = bundle.drafter
    assert drafter is not None
    top: list[int | None] = [None, None, drafter.top_k_outputs]
    wanted: Sizes = {LOGITS: [None, None, _words(bundle)], TOPK_LOGITS: top, TOPK_IDS: top}
    if drafter.conditioned:
        wanted |= {DRAFT_STATES: [None, None, None], PREVIOUS: [None, None]}
        if bundle.topology.parts > 1:
            wanted[DRAFT_PART] = []
    return wanted
