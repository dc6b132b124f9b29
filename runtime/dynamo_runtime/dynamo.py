"""Dynamic multi-token sampling (DynaMo, Alg. 1): the joint of all heads, masked, thresholded, with back-off.

Everything is exact but sparse: with the mask only n-grams that were counted survive, so the trie of counts is
walked within the top-k sets; without it, entries below the static threshold are never formed, because a
product of probabilities is at most any of its prefixes. `tests/runtime/dense_dynamo.py` is the same algorithm
on full arrays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .cooccurrence import Cooccurrence
from .errors import ParameterError
from .parameters import SamplingParameters
from .sampling import Candidates, draw
from .thresholds import TOLERANCE, blurred_values, otsu_threshold

# Largest joint formed without the mask: 50^3 fits amply, 50^4 at ε_b = 0 does not.
MAX_ENTRIES = 1 << 20
_BELOW_ONE = math.nextafter(1.0, 0.0)
# Cells of the top-k grid are numbered in 64 bits.
MAX_CELLS = 1 << 63


@dataclass(frozen=True)
class Joint:
    """Entries of J that are not zero, in the row-major order of the top-k grid.

    Attributes:
        ranks: Place of each token in its head's top-k, [S, n].
        tokens: The n-grams, [S, n].
        values: J, [S].
    """

    ranks: np.ndarray
    tokens: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class NGram:
    """What one pass emits: `tokens`, and the probability with which they were drawn once n was settled."""

    tokens: list[int]
    probability: float


@dataclass(frozen=True)
class CountedGrams:
    """Counted n-grams within the top-k sets, unordered, on the way to a masked joint.

    Attributes:
        cells: Their cells in the top-k grid, numbered in row-major order, [S].
        product: Π f^i(x_i), [S].
        chance: Π p̂(x_i), [S].
        nodes: Where they are in the trie of counts, [S].
    """

    cells: np.ndarray
    product: np.ndarray
    chance: np.ndarray
    nodes: np.ndarray


def check_dynamo(parameters: SamplingParameters, n_heads: int, counts: Cooccurrence | None) -> None:
    """Refuse parameters with which Alg. 1 cannot run on this bundle.

    Raises:
        ParameterError: No truncation, a mask without counts, or too large a joint without a mask.
    """
    if parameters.top_k == 0:
        raise ParameterError("strategy dynamo needs a top_k of at least 1")
    if parameters.top_k**n_heads >= MAX_CELLS:
        raise ParameterError(f"top_k {parameters.top_k} is too large for {n_heads} heads")
    if parameters.cooccurrence_weight > 0:
        if counts is None:
            raise ParameterError("this bundle has no n-gram counts (cooccurrence.npz): cooccurrence_weight must be 0")
        return
    # At most 1/ε entries of a distribution reach ε, and each is extended by k tokens before it is tested.
    threshold = parameters.backoff_threshold ** (n_heads - 1)
    grid = float(parameters.top_k) ** n_heads
    if n_heads > 1 and min(grid, parameters.top_k / max(threshold, 1e-300)) > MAX_ENTRIES:
        raise ParameterError(
            f"without the co-occurrence mask, {n_heads} heads with top_k {parameters.top_k} and "
            f"backoff_threshold {parameters.backoff_threshold} may leave too many n-grams: "
            "raise the threshold or lower top_k"
        )


def sample_ngram(
    heads: Sequence[Candidates],
    seen: np.ndarray,
    uniform: float,
    parameters: SamplingParameters,
    counts: Cooccurrence | None,
) -> NGram:
    """Algorithm 1: as many tokens as the heads are confident of, at least one.

    With the mask, n starts at the longest n-gram counted if that is shorter than the number of heads: of
    longer ones no mask is known.

    Args:
        heads: f^1 … f^n, each truncated to its top-k.
        seen: Which tokens stand in the context, [V].
        uniform: In [0, 1); the only randomness.
        parameters: The paper's, and the choices where it is open.
        counts: For the mask; may be None if cooccurrence_weight is 0.
    """
    if parameters.first_token == "base":
        token, uniform = choose_first(heads[0], seen, uniform, parameters)
        heads = [certain(token), *heads[1:]]
    joint = back_off(heads, seen, parameters, counts)
    if joint is not None:
        return _choose(joint.tokens, joint.values, uniform, parameters.greedy)
    first = heads[0]
    values = first.probabilities / parameters.repetition_penalty ** seen[first.ids]
    return _choose(first.ids[:, None], values, uniform, parameters.greedy)


def emitted_length(
    heads: Sequence[Candidates],
    seen: np.ndarray,
    following: int,
    parameters: SamplingParameters,
    counts: Cooccurrence | None,
) -> int:
    """Return how many tokens Alg. 1 emits in front of a text that is already there.

    Arguments as of `sample_ngram`, and `following`, the next token of that text: with first_token "base" the number
    depends on it, else on nothing random.
    """
    if parameters.first_token == "base":
        heads = [certain(following), *heads[1:]]
    joint = back_off(heads, seen, parameters, counts)
    return 1 if joint is None else joint.tokens.shape[1]


def certain(token: int) -> Candidates:
    """Return all of the distribution on one token."""
    return Candidates(np.array([token]), np.ones(1))


def choose_first(
    first: Candidates, seen: np.ndarray, uniform: float, parameters: SamplingParameters
) -> tuple[int, float]:
    """Return a token of f^1, and what is left of the randomness.

    Inside the token's share of [0, 1) it is uniform again.
    """
    values = first.probabilities / parameters.repetition_penalty ** seen[first.ids]
    index = int(np.argmax(values)) if parameters.greedy else draw(values, uniform)
    total = values.sum()
    rest = (uniform - values[:index].sum() / total) * total / values[index]
    return int(first.ids[index]), min(max(float(rest), 0.0), _BELOW_ONE)


def back_off(
    heads: Sequence[Candidates], seen: np.ndarray, parameters: SamplingParameters, counts: Cooccurrence | None
) -> Joint | None:
    """Return the joint of the largest n in which an n-gram survives, or None where that is a single token.

    Arguments as of `sample_ngram`; nothing here is random.
    """
    longest = len(heads)
    if parameters.backoff_threshold >= 1:
        longest = 1  # by definition: J = 1 can be reached by a sole survivor
    if parameters.cooccurrence_weight > 0 and counts is not None:
        longest = min(longest, counts.orders)
        walk = walk_counts(heads[:longest], counts)
    else:
        walk = []
    for n in range(longest, 1, -1):
        joint = surviving_joint(heads[:n], seen, parameters, counts, walk[n - 1] if walk else None)
        if joint is not None:
            return joint
    return None


def surviving_joint(
    heads: Sequence[Candidates],
    seen: np.ndarray,
    parameters: SamplingParameters,
    counts: Cooccurrence | None = None,
    counted: CountedGrams | None = None,
) -> Joint | None:
    """Take steps 1 to 6 of Alg. 1 at one n: J after mask, thresholds and penalty, or None to back off.

    Args:
        heads: f^1 … f^n.
        seen: Which tokens stand in the context, [V].
        parameters: See `SamplingParameters`.
        counts: For the mask.
        counted: The n-grams that survive the mask, from `walk_counts`; None means no mask.
    """
    n = len(heads)
    shape = tuple(len(head.ids) for head in heads)
    threshold = parameters.backoff_threshold ** (n - 1)  # ε_b^(n-1), for zeroing and for the emission test
    # 1, 2: the joint, with its mask
    if counted is None or counts is None:
        cells, values = _product_above(heads, threshold)
    else:
        mask = counts.mask(n, counted.nodes, counted.chance, parameters.cooccurrence_weight)
        cells, values = counted.cells, counted.product * mask
        total = values.sum()
        if not total > 0:
            return None  # no n-gram was ever seen
        if parameters.normalize_joint:
            values = values / total
    # 3: static threshold
    (kept,) = np.nonzero((values > 0) & (values >= threshold))
    must_pass_before_mask = counted is not None and (
        parameters.premask_test == "all" or (parameters.premask_test == "sole" and int(np.count_nonzero(values)) == 1)
    )
    cells, values = cells[kept], values[kept]
    if must_pass_before_mask:
        likely = _premask(heads, cells, shape) >= threshold
        cells, values = cells[likely], values[likely]
    if len(values) == 0:
        return None
    # 4: adaptive threshold; a single entry is never below it
    if parameters.adaptive_threshold != "none" and len(values) > 1 and not _clear_of_blur(values, shape, parameters):
        strong = values >= (1 - TOLERANCE) * _adaptive_threshold(cells, values, shape, parameters)
        cells, values = cells[strong], values[strong]
    order = np.argsort(cells)
    cells, values = cells[order], values[order]
    ranks = np.stack(np.unravel_index(cells, shape), axis=1)
    tokens = np.stack([head.ids[ranks[:, i]] for i, head in enumerate(heads)], axis=1)
    # 5: repetition penalty
    values = values / parameters.repetition_penalty ** count_repeats(tokens, seen)
    # 6: emission test
    if values.max() < threshold:
        return None
    return Joint(ranks, tokens, values)


def walk_counts(heads: Sequence[Candidates], counts: Cooccurrence) -> list[CountedGrams]:
    """Return counted n-grams made of the heads' top-k tokens, for n = 1 … len(heads): back-off finds them ready.

    Args:
        heads: f^1 … f^n.
        counts: The trie to walk.
    """
    first = heads[0]
    grams = CountedGrams(np.arange(len(first.ids)), first.probabilities, counts.unigram[first.ids], first.ids)
    walk = [grams]
    for n, head in enumerate(heads[1:], 2):
        parent, rank, nodes = counts.extend(n, grams.nodes, head.ids)
        grams = CountedGrams(
            cells=grams.cells[parent] * len(head.ids) + rank,
            product=grams.product[parent] * head.probabilities[rank],
            chance=grams.chance[parent] * counts.unigram[head.ids[rank]],
            nodes=nodes,
        )
        walk.append(grams)
    return walk


def count_repeats(tokens: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Per n-gram, how many of its tokens stand in the context or earlier in the n-gram itself, [S].

    Args:
        tokens: [S, n].
        seen: Which tokens stand in the context, [V].
    """
    repeated = seen[tokens]
    for i in range(1, tokens.shape[1]):
        repeated[:, i] |= (tokens[:, :i] == tokens[:, i : i + 1]).any(axis=1)
    count: np.ndarray = repeated.sum(axis=1)
    return count


def _product_above(heads: Sequence[Candidates], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Cells and values of Π f^i wherever it reaches the threshold, pruned head by head."""
    values = heads[0].probabilities
    cells = np.arange(len(values))
    for head in heads[1:]:
        alive = values >= threshold
        longer = values[alive, None] * head.probabilities
        parent, rank = np.nonzero(longer >= threshold)
        cells, values = cells[alive][parent] * len(head.ids) + rank, longer[parent, rank]
    return cells, values


def _premask(heads: Sequence[Candidates], cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Π f^i of some cells."""
    product = np.ones(len(cells))
    for head, rank in zip(heads, np.unravel_index(cells, shape), strict=True):
        product = product * head.probabilities[rank]
    return product


def _clear_of_blur(values: np.ndarray, shape: tuple[int, ...], parameters: SamplingParameters) -> bool:
    """Tell whether Otsu's threshold of the blurred joint is certainly below every entry, and need not be worked out.

    It is one of the blurred values, and along every axis the kernel gives a cell at most half of what another holds
    (behind a border twice a quarter), so none exceeds sum(J) / 2^n.
    """
    axes = sum(size > 1 for size in shape)
    return parameters.adaptive_threshold == "blur" and bool(values.min() >= values.sum() / 2**axes)


def _adaptive_threshold(
    cells: np.ndarray, values: np.ndarray, shape: tuple[int, ...], parameters: SamplingParameters
) -> float:
    """ε_AT: Otsu's threshold of J, or of J blurred over the grid of descending probabilities."""
    blur = parameters.adaptive_threshold == "blur"
    population = blurred_values(cells, values, shape) if blur else values
    zeros = math.prod(shape) - len(population) if parameters.otsu_zeros else 0
    return otsu_threshold(population, zeros)


def _choose(tokens: np.ndarray, values: np.ndarray, uniform: float, greedy: bool) -> NGram:
    index = int(np.argmax(values)) if greedy else draw(values, uniform)
    return NGram([int(token) for token in tokens[index]], float(values[index] / values.sum()))
