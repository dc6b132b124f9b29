"""From one head's logits to one token: processors, truncation, and the draw."""

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import ParameterError
from .parameters import SamplingParameters
from .step import Step

LogitsProcessor = Callable[[Sequence[int], np.ndarray], np.ndarray]
"""Maps (context tokens, logits [V]) to new logits [V]; -inf forbids a token."""

_CERTAIN = np.ones(1)
_CERTAIN.flags.writeable = False  # many share it
_FEW = 128  # numbers that plain Python is quicker with than numpy
_FAR = 800.0  # in a float64 exp(-800) is 0
_TINY = 1e-100  # temperatures at which a logit may become too large for a float64
_BITS_OF_ONE = int(np.float64(1).view(np.int64))
_FINE_BITS = 44  # of a float64's 52 of mantissa: what is left of them tells 256 weights apart within a factor of two


class Context:
    """The tokens so far, prompt included, and which of the vocabulary stand among them.

    Attributes:
        tokens: In order.
    """

    def __init__(self, tokens: Sequence[int], vocab_size: int):
        self.tokens = list(tokens)
        self._seen = np.zeros(vocab_size, bool)
        self._marked = 0  # tokens that `_seen` knows of: most texts never ask
        self._shared = False  # whether another context has the same `_seen`

    @property
    def seen(self) -> np.ndarray:
        """Whether each token of the vocabulary occurs in the text so far, [V]."""
        if self._marked < len(self.tokens):
            if self._shared:
                self._seen, self._shared = self._seen.copy(), False
            self._seen[self.tokens[self._marked :]] = True
            self._marked = len(self.tokens)
        return self._seen

    def extend(self, tokens: Sequence[int]) -> None:
        """Append accepted tokens."""
        self.tokens.extend(tokens)

    def fork(self) -> "Context":
        """Return a copy, to be extended by tokens that may not stay."""
        self._shared = True
        other = Context.__new__(Context)
        other.tokens = self.tokens.copy()
        other._seen, other._marked, other._shared = self._seen, self._marked, True
        return other


@dataclass(frozen=True)
class Candidates:
    """A truncated distribution: `probabilities` [k] of distinct `ids` [k], summing to 1; descending from `truncate`."""

    ids: np.ndarray
    probabilities: np.ndarray

    def __bool__(self) -> bool:
        return len(self.ids) > 0

    @property
    def best(self) -> tuple[int, float]:
        """The most probable token, and its probability."""
        place = int(self.probabilities.argmax())
        return int(self.ids[place]), float(self.probabilities[place])

    def draw(self, uniform: float) -> int:
        """Return the token that a uniform number in [0, 1) draws."""
        return int(self.ids[draw(self.probabilities, uniform)])


def draw(weights: np.ndarray, uniform: float) -> int:
    """Return the index drawn in proportion to non-negative `weights` [k] by inverting their distribution function.

    Args:
        weights: Not all zero; they need not sum to 1.
        uniform: In [0, 1).
    """
    if len(weights) == 1:
        return 0
    cumulative = weights.cumsum()
    index = int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))
    if index == len(weights) or weights[index] == 0:  # uniform * total was rounded up to the total
        index = int(np.flatnonzero(weights)[-1])
    return index


def penalize_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Return the repetition penalty in logit space (CTRL, Keskar et al. 2019): l/θ if l > 0, else l·θ.

    Args:
        logits: [k].
        seen: Which of them belong to tokens in the context, [k].
        penalty: θ.
    """
    penalized = logits.copy()
    (places,) = seen.nonzero()  # few of many
    found = logits[places]
    penalized[places] = np.where(found > 0, found / penalty, found * penalty)
    return penalized


def truncate(logits: np.ndarray, ids: np.ndarray, parameters: SamplingParameters) -> Candidates:
    """Apply softmax at temperature T to the top-k logits, cut the result to top-p and min-p, and renormalise it.

    Args:
        logits: [K], descending.
        ids: Their tokens, [K].
        parameters: Temperature (0 counts as 1 here: a greedy caller takes the largest), top_k, top_p, min_p.

    Raises:
        ParameterError: No logit is finite (processors forbade every token, or the graph overflowed).
    """
    if parameters.top_k:
        logits, ids = logits[: parameters.top_k], ids[: parameters.top_k]
    _check_finite(logits[0])
    size = len(ids)
    if size == 1:
        return Candidates(ids, _CERTAIN)
    weights = _weights(logits, logits[0], parameters)
    cumulative = weights.cumsum()
    if parameters.top_p < 1:
        # A token belongs to the nucleus while those before it have not reached top_p: so at least one does.
        size = min(size, 1 + int(cumulative.searchsorted(parameters.top_p * cumulative[-1])))
    if parameters.min_p > 0:
        size = min(size, int(np.count_nonzero(weights >= parameters.min_p)))
    if weights[size - 1] == 0:  # processors may have left fewer than k
        size = int(np.count_nonzero(weights))
    return Candidates(ids[:size], weights[:size] / cumulative[size - 1])


class Truncated(Candidates):
    """What `truncate` makes of a few logits, when it is asked for.

    Mostly nothing is wanted but one draw, or the most probable token. Those are found in plain Python: behind a pass
    numpy is in no cache of the processor, and what it does with fifty numbers takes longer than to add them up.
    """

    _logits: list[float]
    _ids: list[int]
    _parameters: SamplingParameters
    _weighed: list[float] | None

    def __init__(self, logits: list[float], ids: list[int], parameters: SamplingParameters):
        """Take what `truncate` takes, as lists."""
        # Set so as a frozen class is slow to set its attributes, and `cached_property` takes a lock.
        vars(self).update(_logits=logits, _ids=ids, _parameters=parameters, _weighed=None)

    def __bool__(self) -> bool:
        return True

    @property
    def best(self) -> tuple[int, float]:
        """See `Candidates`."""
        return self._ids[0], 1.0 / self._cumulative()[-1]

    def draw(self, uniform: float) -> int:
        """See `Candidates`."""
        cumulative = self._cumulative()
        place = bisect_right(cumulative, uniform * cumulative[-1])
        return self._ids[min(place, len(cumulative) - 1)]

    def _cumulative(self) -> list[float]:
        """Weights of the candidates, each with all before it; the first weighs 1."""
        if self._weighed is None:
            vars(self)["_weighed"] = found = _weigh(self._logits, self._parameters)
            return found
        return self._weighed

    @cached_property
    def ids(self) -> np.ndarray:
        """See `Candidates`."""
        return self._all.ids

    @cached_property
    def probabilities(self) -> np.ndarray:
        """See `Candidates`."""
        return self._all.probabilities

    @cached_property
    def _all(self) -> Candidates:
        return truncate(np.array(self._logits), np.array(self._ids), self._parameters)


def _weigh(logits: Sequence[float], parameters: SamplingParameters) -> list[float]:
    """Return weights of the candidates that `truncate` leaves, each with all before it; the first weighs 1.

    Raises:
        ParameterError: See `truncate`.
    """
    logits, exp = logits[: parameters.top_k or None], math.exp
    _check_finite(logits[0])
    largest, temperature = logits[0], parameters.temperature or 1.0
    weights = [exp((logit - largest) / temperature) for logit in logits]
    cumulative = list(itertools.accumulate(weights))
    size = len(weights)
    if parameters.top_p < 1:
        size = min(size, 1 + bisect_left(cumulative, parameters.top_p * cumulative[-1]))
    if parameters.min_p > 0:
        size = min(size, sum(weight >= parameters.min_p for weight in weights))
    while weights[size - 1] == 0:  # processors may have left fewer than k
        size -= 1
    return cumulative[:size]


def truncate_row(logits: np.ndarray, parameters: SamplingParameters) -> Candidates:
    """Truncate a full row of logits [V] as `truncate` does, but without top_k.

    The row is not sorted: the candidates come in the order of their ids.

    Raises:
        ParameterError: See `truncate`.
    """
    largest = logits.max()
    _check_finite(largest)
    weights = _weights(logits, largest, parameters)
    total = weights.sum()
    # The nucleus holds no token so light that all such tokens together would not make up what it may leave out.
    least = max(parameters.min_p, (1 - parameters.top_p) * total / len(weights))
    ids = np.flatnonzero(weights >= least if least else weights > 0)
    if len(ids) < len(weights):
        weights = weights[ids]
    if parameters.top_p < 1:
        kept = _nucleus(weights, logits[ids], parameters.top_p * total)
        ids, weights = ids[kept], weights[kept]
    weights /= weights.sum()
    return Candidates(ids, weights)


def _check_finite(largest: np.floating | float) -> None:
    """Check that there is a token to choose.

    Raises:
        ParameterError: The largest logit is not finite.
    """
    if not math.isfinite(largest):
        raise ParameterError("no token can be chosen: the largest logit is not finite")


def _weights(logits: np.ndarray, largest: np.floating, parameters: SamplingParameters) -> np.ndarray:
    """Apply softmax at temperature T before it is normalised: 1 for the largest logit, in float64, [k]."""
    temperature = parameters.temperature or 1.0
    weights = np.subtract(logits, largest, dtype=np.float64)
    if temperature < _TINY:
        np.maximum(weights, -_FAR * temperature, out=weights)  # they would overflow
    if temperature != 1:
        weights /= temperature
    return np.exp(weights, out=weights)


def _nucleus(weights: np.ndarray, logits: np.ndarray, mass: float) -> np.ndarray:
    """Return the places, ascending, of the largest weights until their sum reaches `mass`; of equal logits the first.

    Weights are put into narrow bins, by the upper bits of their float64, and only the bin in which the mass is reached
    is sorted.

    Args:
        weights: In (0, 1], [k].
        logits: What they were made of, [k].
        mass: Of the weights' sum.
    """
    bins = (_BITS_OF_ONE - weights.view(np.int64)) >> _FINE_BITS  # 0 holds the largest
    masses = np.bincount(bins, weights)
    reached = masses.cumsum()
    edge = int(reached.searchsorted(mass))
    if edge == len(masses):
        return np.arange(len(weights))
    kept = bins < edge
    (places,) = (bins == edge).nonzero()
    places = places[np.argsort(-logits[places], kind="stable")]
    inside = weights[places].cumsum()
    kept[places[: 1 + int(inside.searchsorted(mass - (reached[edge] - masses[edge])))]] = True
    return np.flatnonzero(kept)


def sort_logits(logits: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `top_k` largest logits (0: all) and their ids, descending; of equal ones the smaller id first."""
    if top_k == 1:
        ids = np.array([logits.argmax()])
    elif 0 < top_k < len(logits):
        smallest = np.partition(logits, len(logits) - top_k)[len(logits) - top_k]
        ids = np.flatnonzero(logits >= smallest)
    else:
        ids = np.arange(len(logits))
    order = ids[np.argsort(-logits[ids], kind="stable")]
    if top_k:
        order = order[:top_k]
    return logits[order], order


def apply_processors(processors: Sequence[LogitsProcessor], context: Sequence[int], logits: np.ndarray) -> np.ndarray:
    """Run the logits processors in turn over one full row [V].

    Raises:
        ParameterError: One of them does not return such a row.
    """
    logits = np.array(logits)  # theirs to change
    for processor in processors:
        size, logits = len(logits), np.asarray(processor(context, logits))
        if logits.shape != (size,) or not np.issubdtype(logits.dtype, np.number) or np.isnan(logits).any():
            raise ParameterError(
                f"a logits processor has to return {size} numbers, as many as it is given, none of them nan"
            )
    return logits


class Target:
    """Plain decoding's choice of one token: repetition penalty, processors, temperature, truncation, draw.

    It reads the graph's top-K outputs where they certainly hold the whole truncated set, else the full row.
    """

    def __init__(self, parameters: SamplingParameters, processors: Sequence[LogitsProcessor] = ()):
        self._parameters = parameters
        self._processors = processors
        self._as_it_is = not processors and parameters.repetition_penalty == 1
        # Greedily the largest logit is the only candidate, and neither T nor top-p matters.
        self._top_k = 1 if parameters.greedy else parameters.top_k

    @property
    def reads_context(self) -> bool:
        """Whether the text so far decides beside the pass."""
        return not self._as_it_is

    def distribution(self, step: Step, context: Context, row: int = -1) -> Candidates:
        """Return the distribution of the token behind `context`; of greedy decoding, all of it is on one token.

        Args:
            step: The pass.
            context: All tokens before it, those drafted in between included: they count as repetitions.
            row: The row of the first head that `context` ends with.
        """
        penalty = self._parameters.repetition_penalty
        if self._as_it_is and 0 < self._top_k <= _FEW:
            top = step.largest(row, self._top_k)
            if len(top[1]) == self._top_k:
                return Truncated(*top, self._parameters)
        found = None if self._processors else _certified_topk(step, context, penalty, self._top_k, row)
        if found is None:
            logits = step.logits()[row]
            if penalty != 1:
                logits = penalize_repetition(logits, context.seen, penalty)
            if self._processors:
                logits = apply_processors(self._processors, context.tokens, logits)
            if self._top_k == 0:
                return truncate_row(logits, self._parameters)
            found = sort_logits(logits, self._top_k)
        logits, ids = found
        if len(ids) > _FEW:
            return truncate(logits, ids, self._parameters)
        return Truncated(logits.tolist(), ids.tolist(), self._parameters)

    def certain(self, step: Step) -> list[int] | None:
        """Return the token behind every row where neither chance nor the text before it decides; None elsewhere."""
        return step.best() if self._top_k == 1 and self._as_it_is else None

    def sample(self, step: Step, context: Context, uniform: float, row: int = -1) -> int:
        """Draw the token; arguments as of `distribution`, and the uniform number in [0, 1) that decides the draw."""
        if (certain := self.certain(step)) is not None:
            return certain[row]
        return self.distribution(step, context, row).draw(uniform)


def _certified_topk(
    step: Step, context: Context, penalty: float, top_k: int, row: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the penalised top-k from the graph's top-K outputs, or None if a token outside them might belong to it.

    A penalty of at least 1 only lowers logits, so no token outside the top-K can exceed the smallest of them:
    the set is complete if its k-th penalised logit is larger than that.
    """
    all_logits, all_ids = step.topk()
    logits, ids = all_logits[row], all_ids[row]
    if not 0 < top_k <= len(ids) or penalty < 1:
        return None
    if penalty == 1:
        return logits[:top_k], ids[:top_k]
    bound = logits[-1]
    logits = penalize_repetition(logits, context.seen[ids], penalty)
    order = np.lexsort((ids, -logits))[:top_k]
    if len(ids) < len(context.seen) and not logits[order[-1]] > bound:
        return None
    return logits[order], ids[order]
