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
from .errors import BundleError
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

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
CATCH_UP_CHUNK = 512
"""Most positions that the layers read at once: bounds the memory of their attention."""


class Heads:
    """The drafter's graph of one bundle, with the keys and values of its layers.

    Attributes:
        kv: These keys and values; as many positions are held as `KVCache.seen` says.
        seconds: Time spent inside onnxruntime so far.
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
        self._cache, self._width = cache, cache.states.shape[1]
        self._path = bundle.folder / self.drafter.graph
        topology = bundle.topology
        conditioned = [PREVIOUS, DRAFT_PART] if self.drafter.conditioned else []
        layers = range(self.drafter.kv_layers)
        ends = [PENULTIMATE, ATTENTION_MASK, HEAD_ROWS, *caches(PAST, layers), HEAD_STATES, *topology.outputs]
        session, _ = backend.start(self._path, bundle.precision, without=[DRAFT_STATES, *conditioned, *OUTPUTS])
        self._check(session, _layer_sizes(bundle, cache.states.shape[1]))
        kinds = {each.name: each.type for each in session.get_inputs()}
        self.kv = KVBuffers(
            self.drafter.kv_layers,
            self.drafter.kv_heads,
            bundle.head_size,
            cache.max_length,
            dtype=_TYPES[kinds[caches(PAST, [0])[0]]],
            **room,
        )
        self._layers = Binding(session, [], "cpu")
        self._states_type = _TYPES[{each.name: each.type for each in session.get_outputs()}[HEAD_STATES]]
        session, _ = backend.start(self._path, bundle.precision, without=[*ends, *caches(PRESENT, layers)])
        self._check(session, _draft_sizes(bundle, cache.states.shape[1]))
        self._draft = Binding(session, [], "cpu")
        self._ones = np.empty(0, np.int64)
        # What a run reads and writes stays bound as long as runs are about as many rows, which they nearly always are.
        self._wanted, self._put_out = np.empty(0, np.int64), dict[str, np.ndarray]()
        self._drafted: dict[str, np.ndarray] = {}

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
        parts, states = self.bundle.topology.parts, values.pop(HEAD_STATES)[0]
        return HeadsAhead(self, states.reshape(len(positions), parts, -1), values)

    def draft(self, states: np.ndarray, part: int = 0, before: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Go from states to words.

        Args:
            states: [drafts, width].
            part: Whose states they are, where heads are conditioned.
            before: The token in front of each draft, where heads are conditioned.

        Returns:
            Top-K by name, and "logits", which the next draft writes over; [drafts, …].

        Raises:
            BundleError: The graph does not run, or what it puts out are no numbers.
            ValueError: Heads are conditioned, and the tokens in front are not named.
        """
        count = len(states)
        held = self._drafted
        if not held or len(held[DRAFT_STATES][0]) != count:
            held = self._hold_drafts(count)
        held[DRAFT_STATES][0] = states
        if self.drafter.conditioned:
            if before is None:
                raise ValueError("these heads are conditioned on the token in front of what they predict: name it")
            held[PREVIOUS][0] = before
            held[DRAFT_PART][()] = part
        self._run(self._draft, "a draft")
        largest = held[TOPK_LOGITS][0]
        if not np.isfinite(largest[:, 0]).all():  # the largest is nan if any is: onnxruntime's top-k puts those first
            raise BundleError(
                f"{self._path} gave logits that are not finite numbers: its weights are damaged, or what it computes "
                "does not fit into its precision"
            )
        return {TOPK_LOGITS: largest.copy(), TOPK_IDS: held[TOPK_IDS][0].copy(), LOGITS: held[LOGITS][0]}

    def close(self) -> None:
        """Free graph and memory."""
        self.kv.free()
        del self._layers, self._draft

    def _run_layers(self, begin: int, end: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Have the layers read the states of some positions; returns what they put out of rows counted from the end."""
        states, bound = self._cache.states, self._layers
        assert states is not None
        self.kv.make_room(end, begin)
        if len(self._ones) < end:
            self._ones = np.ones(self.kv.capacity, np.int64)
        bound.caches(self.kv)
        bound.input(PENULTIMATE, states[begin:], (1, end - begin, states.shape[1]))
        bound.input(ATTENTION_MASK, self._ones, (1, end))
        if len(self._wanted) != len(rows):
            self._hold_states(len(rows))
        self._wanted[:] = rows
        self._run(bound, f"positions {begin} to {end}")
        return {name: array.copy() for name, array in self._put_out.items()}

    def _hold_states(self, rows: int) -> None:
        """Have the layers put out so many rows into memory that stays the same from run to run."""
        topology, width = self.bundle.topology, self._width
        self._wanted = np.empty(rows, np.int64)
        self._layers.input(HEAD_ROWS, self._wanted)
        shapes = {HEAD_STATES: (1, rows * topology.parts, width)}
        shapes |= {name: (1, rows, size) for name, size in topology.outputs.items()}
        kinds = {HEAD_STATES: self._states_type}
        self._put_out = {name: np.empty(shape, kinds.get(name, np.float32)) for name, shape in shapes.items()}
        for name, array in self._put_out.items():
            self._layers.output(name, array)

    def _hold_drafts(self, count: int) -> dict[str, np.ndarray]:
        """Have the draft read and write so many rows in memory that stays the same from run to run."""
        drafter, bound = self.drafter, self._draft
        words = self.bundle.vocab_size if drafter.vocabulary is None else len(drafter.vocabulary)
        held = {DRAFT_STATES: np.empty((1, count, self._width), self._states_type)}
        if drafter.conditioned:
            held |= {PREVIOUS: np.empty((1, count), np.int64), DRAFT_PART: np.zeros((), np.int64)}
        for name, array in held.items():
            if name != DRAFT_PART or self.bundle.topology.parts > 1:
                bound.input(name, array)
        for name, size, kind in (
            (LOGITS, words, np.float32),
            (TOPK_LOGITS, drafter.top_k_outputs, np.float32),
            (TOPK_IDS, drafter.top_k_outputs, np.int64),
        ):
            held[name] = np.empty((1, count, size), kind)
            bound.output(name, held[name])
        self._drafted = held
        return held

    def _run(self, bound: Binding, what: str) -> None:
        started = time.perf_counter()
        try:
            bound.run()
        except Exception as error:  # onnxruntime raises many classes that share no base
            raise BundleError(f"{self._path} fails at {what}: {error}") from error
        self.seconds += time.perf_counter() - started

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


def _layer_sizes(bundle: Bundle, width: int) -> dict[str, list[int | None]]:
    topology, drafter = bundle.topology, bundle.drafter
    assert drafter is not None
    layers = range(drafter.kv_layers)
    wanted: dict[str, list[int | None]] = {PENULTIMATE: [None, None, width], ATTENTION_MASK: [None, None]}
    wanted |= {HEAD_ROWS: [None], HEAD_STATES: [None, None, width]}
    wanted |= {name: [None, None, size] for name, size in topology.outputs.items()}
    cache = [None, drafter.kv_heads, None, bundle.head_size]
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
    """What the heads say behind some positions: see `step.Ahead`. Words are worked out when they are asked for."""

    def __init__(self, heads: Heads, states: np.ndarray, outputs: dict[str, np.ndarray]):
        """Take what the layers put out: states [rows, parts, width], and what else by name."""
        self._heads, self._states, self._outputs = heads, states, outputs
        self._top: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    @property
    def rows(self) -> int:
        """See `Ahead`."""
        return len(self._states)

    def logits(self, part: int, before: Sequence[int] | None = None) -> np.ndarray:
        """See `Ahead`; of a word outside the draft vocabulary it is -inf."""
        heads = self._heads
        rows = heads.draft(self._states[:, part], part, before)[LOGITS]
        words = heads.drafter.vocabulary
        if words is None:
            return rows.copy()
        whole = np.full((len(rows), heads.bundle.vocab_size), -np.inf, rows.dtype)
        whole[:, words] = rows
        return whole

    def topk(self, part: int, before: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `Ahead`; heads that are not conditioned are all asked at once."""
        rows, parts, width = self._states.shape
        if self._heads.drafter.conditioned:
            key = (part, *(before or ()))
            if key not in self._top:
                found = self._heads.draft(self._states[:, part], part, before)
                self._top[key] = found[TOPK_LOGITS], found[TOPK_IDS]
            return self._top[key]
        if () not in self._top:
            found = self._heads.draft(self._states.reshape(rows * parts, width))
            self._top[()] = found[TOPK_LOGITS], found[TOPK_IDS]
        values, ids = (each.reshape(rows, parts, -1)[:, part] for each in self._top[()])
        return values, ids

    def output(self, name: str) -> np.ndarray:
        """See `Ahead`."""
        return self._outputs[name][0]
