"""DynaMo's Algorithm 1, literally: full arrays over the top-k grid, one step of the paper after the other.

Slow and plain on purpose; the runtime's own version must agree with it. Shares no code with it.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Options:
    """Parameters of the paper and the choices where it is open, as in `SamplingParameters`."""

    k: int = 50
    temperature: float = 0.7
    top_p: float = 1.0
    penalty: float = 1.1
    epsilon_b: float = 0.5
    alpha_c: float = 1.0
    adaptive: str = "blur"
    otsu_zeros: bool = True
    normalize: bool = True
    premask_test: str = "sole"
    first_token: str = "joint"


class Counts:
    """N-gram counts as dictionaries: counts[n][(x1, …, xn)]."""

    def __init__(self, counts: dict[int, dict[tuple[int, ...], int]], totals: list[int]):
        self.counts, self.totals = counts, totals

    @classmethod
    def from_npz(cls, path) -> "Counts":
        """Unfold the trie of `cooccurrence.npz`."""
        file = np.load(path)
        totals = [int(total) for total in file["totals"]]
        grams = [(x,) for x in range(len(file["counts_1"]))]
        counts = {1: dict(zip(grams, map(int, file["counts_1"]), strict=True))}
        for n in range(2, len(totals) + 1):
            offsets, ids = file[f"offsets_{n}"], file[f"ids_{n}"]
            longer = [
                (*gram, int(x)) for node, gram in enumerate(grams) for x in ids[offsets[node] : offsets[node + 1]]
            ]
            counts[n] = dict(zip(longer, map(int, file[f"counts_{n}"]), strict=True))
            grams = longer
        return cls(counts, totals)

    def mask(self, gram: tuple[int, ...]) -> float:
        """M of Eq. 6; 0 if the n-gram was never seen."""
        count = self.counts[len(gram)].get(gram, 0)
        if count == 0:
            return 0.0
        joint = count / self.totals[len(gram) - 1]
        return joint / math.prod(self.counts[1][(x,)] / self.totals[0] for x in gram)


def head_distribution(logits: np.ndarray, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Ids and probabilities of one head's top-k at temperature T, descending, renormalised; then top-p."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: options.k]
    scaled = logits[order].astype(float) / (options.temperature or 1.0)
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if options.top_p < 1:
        size, reached = 0, 0.0
        while size == 0 or (size < len(order) and reached < options.top_p):
            reached += probabilities[size]
            size += 1
        probabilities = probabilities[:size] / probabilities[:size].sum()
        order = order[:size]
    return np.array(order), probabilities


def otsu(population: np.ndarray) -> float:
    """Otsu's threshold by trying every distinct value as the smallest of the upper class."""
    best, threshold = -1.0, float(population.min())
    for value in np.unique(population)[1:]:
        upper, lower = population[population >= value], population[population < value]
        w1, w0 = len(upper) / len(population), len(lower) / len(population)
        between = w0 * w1 * (upper.mean() - lower.mean()) ** 2
        if between > best * (1 + 1e-12):
            best, threshold = between, float(value)
    return threshold


def gaussian_blur(grid: np.ndarray) -> np.ndarray:
    """Kernel (1, 2, 1)/4 along every axis, borders mirrored without repeating the border."""
    for axis in range(grid.ndim):
        if grid.shape[axis] == 1:
            continue
        padding = [(1, 1) if a == axis else (0, 0) for a in range(grid.ndim)]
        padded = np.moveaxis(np.pad(grid, padding, mode="reflect"), axis, 0)
        grid = np.moveaxis((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4, 0, axis)
    return grid


def joint(heads, context: set[int], options: Options, counts: Counts | None):
    """J after steps 1 to 5, [k]*n, or None where no entry reaches ε_b^(n-1)."""
    n = len(heads)
    epsilon = options.epsilon_b ** (n - 1)
    shape = tuple(len(ids) for ids, _ in heads)
    product = np.ones(shape)
    for axis, (_, probabilities) in enumerate(heads):
        product = product * probabilities.reshape([-1 if a == axis else 1 for a in range(n)])
    J = product.copy()
    if options.alpha_c > 0:
        assert counts is not None
        for index in itertools.product(*map(range, shape)):
            m = counts.mask(tuple(int(ids[i]) for (ids, _), i in zip(heads, index, strict=True)))
            J[index] *= m**options.alpha_c if m > 0 else 0.0
        if J.sum() == 0:
            return None
        if options.normalize:
            J = J / J.sum()
        sole = np.count_nonzero(J) == 1
        if options.premask_test == "all" or (options.premask_test == "sole" and sole):
            J[product < epsilon] = 0
    J[epsilon > J] = 0
    if options.adaptive != "none" and J.any():
        population = (gaussian_blur(J) if options.adaptive == "blur" else J).ravel()
        if not options.otsu_zeros:
            population = population[population > 0]
        J[otsu(population) * (1 - 1e-12) > J] = 0
    for index in zip(*np.nonzero(J), strict=True):
        gram = [int(ids[i]) for (ids, _), i in zip(heads, index, strict=True)]
        for i, x in enumerate(gram):
            if x in context or x in gram[:i]:
                J[index] /= options.penalty
    if not J.any() or J.max() < epsilon:
        return None
    return J


def generate(logits, context: set[int], uniform: float, options: Options, counts: Counts | None):
    """Algorithm 1: (tokens, the final J or f^1 it was drawn from)."""
    heads = [head_distribution(row, options) for row in logits]
    longest = len(heads)
    if options.alpha_c > 0:
        longest = min(longest, len(counts.totals))
    if options.epsilon_b == 1:
        longest = 1
    if options.first_token == "base":
        ids, probabilities = heads[0]
        f = np.array([p / options.penalty if int(x) in context else p for x, p in zip(ids, probabilities, strict=True)])
        f /= f.sum()
        below = np.concatenate(([0.0], np.cumsum(f)))
        i = int(np.argmax(f)) if options.temperature == 0 else int(np.sum(below[1:] <= uniform))
        i = min(i, len(f) - 1)
        uniform = min(max((uniform - below[i]) / f[i], 0.0), 1 - 2**-53)
        heads[0] = ids[i : i + 1], np.ones(1)
    for n in range(longest, 1, -1):
        J = joint(heads[:n], context, options, counts)
        if J is not None:
            break
    else:
        n = 1
        ids, probabilities = heads[0]
        J = np.array([p / options.penalty if int(x) in context else p for x, p in zip(ids, probabilities, strict=True)])
    if options.temperature == 0:
        flat = int(np.argmax(J))
    else:
        cumulative = np.cumsum(J.ravel())
        flat = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    index = np.unravel_index(flat, J.shape)
    return [int(ids[i]) for (ids, _), i in zip(heads, index, strict=False)][:n], J
