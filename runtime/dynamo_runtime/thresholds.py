"""The adaptive threshold of Alg. 1: Otsu's method on the joint, or on a blurred copy of it.

Both work on the few entries that are not zero and count the zeros, and give what the full grid would give.
"""

import math

import numpy as np

# Sums in different orders differ in the last bits; entries or splits that differ by less count as equal.
TOLERANCE = 1e-12
# Kernel of size 3: the binomial one, to which OpenCV rounds its Gaussian of that size.
KERNEL = (0.25, 0.5, 0.25)
# Blurring a cell of a small full grid is that much cheaper than sorting a cell of a sparse one.
DENSE_PER_SPARSE = 16


def otsu_threshold(values: np.ndarray, zeros: int = 0) -> float:
    """Otsu's threshold: the split of the population with the largest variance between its two classes.

    Exact, i.e. every split between distinct values is tried, not the borders of a histogram. Of equally good
    splits the lowest is taken.

    Args:
        values: Positive values, [S >= 1], in any order.
        zeros: Further members of the population that are 0.

    Returns:
        The smallest value of the upper class. If there is nothing to split, the smallest value.
    """
    values = np.sort(values)
    count = zeros + len(values)
    lower = zeros + np.arange(len(values))  # size of the lower class when the upper one begins at this value
    distinct = np.empty(len(values), bool)
    distinct[0] = zeros > 0
    np.greater(values[1:], values[:-1], out=distinct[1:])
    (splits,) = np.nonzero(distinct)
    if len(splits) == 0:
        return float(values[0])
    sums = np.cumsum(values)
    below = np.concatenate(([0.0], sums[:-1]))[splits]
    w0 = lower[splits].astype(np.float64)
    w1 = count - w0
    mean_gap = (sums[-1] - below) / w1 - below / w0
    between = w0 * w1 * mean_gap**2
    best = splits[np.argmax(between >= between.max() * (1 - TOLERANCE))]
    return float(values[best])


def blurred_values(
    cells: np.ndarray, values: np.ndarray, shape: tuple[int, ...], *, dense_per_sparse: float = DENSE_PER_SPARSE
) -> np.ndarray:
    """Return positive cells of a sparse grid after a Gaussian blur of kernel size 3 along every axis.

    At the borders the grid is mirrored without repeating the border cell (what OpenCV and torchvision do).

    Args:
        cells: Cells that are not zero, distinct, numbered in row-major order, [S].
        values: Their values, [S].
        shape: Size of the grid, n axes.
        dense_per_sparse: Cells of a dense grid that are blurred in the time of one spread sparsely.

    Returns:
        The blurred values of all cells within reach, in no particular order.
    """
    ranks = np.unravel_index(cells, shape)
    box = tuple(min(int(rank.max()) + 2, size) for rank, size in zip(ranks, shape, strict=True))
    if math.prod(box) <= dense_per_sparse * len(cells) * 3 ** len(shape):
        return _blur_dense(ranks, values, box, shape)
    return _blur_sparse(cells, values, shape)


def _blur_dense(
    ranks: tuple[np.ndarray, ...], values: np.ndarray, box: tuple[int, ...], shape: tuple[int, ...]
) -> np.ndarray:
    grid = np.zeros(box)  # cells outside `box` are out of the kernel's reach
    grid[ranks] = values
    side, middle, _ = KERNEL
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        source = np.moveaxis(grid, axis, 0)
        blurred = middle * source
        blurred[1:] += side * source[:-1]
        blurred[:-1] += side * source[1:]
        blurred[0] += side * source[1]
        if len(source) == size:
            blurred[-1] += side * source[-2]
        grid = np.moveaxis(blurred, 0, axis)
    return grid[grid > 0]


def _blur_sparse(cells: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    side, middle, _ = KERNEL
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        stride = math.prod(shape[axis + 1 :])
        rank = cells // stride % size
        # A cell gives to its neighbours; the second from a border stands mirrored behind the border as well.
        down, up = rank > 0, rank < size - 1
        to_down = np.where(rank == 1, 2 * side, side) * values
        to_up = np.where(rank == size - 2, 2 * side, side) * values
        spread = np.concatenate([cells, cells[down] - stride, cells[up] + stride])
        given = np.concatenate([middle * values, to_down[down], to_up[up]])
        order = np.argsort(spread)
        spread, given = spread[order], given[order]
        first = np.flatnonzero(np.concatenate(([True], spread[1:] != spread[:-1])))
        cells, values = spread[first], np.add.reduceat(given, first)
    return values
