"""Counts of the n-grams of the training tokens, from which the runtime makes the co-occurrence mask.

DynaMo, Eq. 3 and 6: `m(x1..xn) = p̂(x1..xn) / Π_i p̂(x_i)`.  What is stored are the counts, as a trie: level 1
is the vocabulary, the children of a node are the tokens that were seen to follow it.  What is kept: an n-gram
that was counted at least `min_count` times; all others get m = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import TrainingError

FILE = "cooccurrence.npz"
CHUNK = 1 << 23


@dataclass(frozen=True)
class NgramCounts:
    """A trie of n-gram counts.

    Attributes:
        unigrams: Counts of the single tokens [vocab]; index = token id = node number on level 1.
        keys: For levels 2 … n, `parent node * vocab + token id`, ascending [nodes].
        counts: For levels 2 … n, the count of each node [nodes].
        totals: How many 1-, 2-, … n-grams were counted, those that were dropped included.
        min_counts: The rule, a level: kept if seen at least so often.
    """

    unigrams: NDArray[np.int64]
    keys: list[NDArray[np.int64]]
    counts: list[NDArray[np.int64]]
    totals: list[int]
    min_counts: list[int]

    def save(self, path: Path) -> None:
        """Write the trie in CSR form: `offsets_k`, `ids_k`, `counts_k` a level."""
        vocab = len(self.unigrams)
        arrays = {
            "totals": np.asarray(self.totals, dtype=np.int64),
            "min_count": np.asarray(self.min_counts, dtype=np.int64),
            "counts_1": _narrow(self.unigrams),
        }
        parents = vocab
        for level, (keys, counts) in enumerate(zip(self.keys, self.counts, strict=True), start=2):
            arrays[f"offsets_{level}"] = _narrow(np.searchsorted(keys, np.arange(parents + 1) * vocab))
            arrays[f"ids_{level}"] = _narrow(keys % vocab)
            arrays[f"counts_{level}"] = _narrow(counts)
            parents = len(keys)
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def count_ngrams(
    tokens: NDArray[np.unsignedinteger],
    order: int,
    *,
    vocab_size: int,
    end_id: int | None,
    min_counts: Sequence[int],
    chunk_tokens: int = CHUNK,
) -> NgramCounts:
    """Count all n-grams up to `order` that lie within one document.

    Args:
        tokens: The training tokens [tokens].
        order: The longest n-gram, the number of heads.
        vocab_size: Number of token ids.
        end_id: The token between documents; it may end an n-gram but nothing follows it.
        min_counts: What is kept, for 1-, 2-, … n-grams; must not fall, since an n-gram needs its prefix.
        chunk_tokens: Positions counted at once, which bounds the memory on a long stream.

    Raises:
        TrainingError: `min_counts` has another length than `order` or falls.
    """
    check_min_counts(min_counts, order)
    unigrams = np.zeros(vocab_size, dtype=np.int64)
    for chunk in read_chunks(tokens, 1, chunk_tokens):
        unigrams += np.bincount(chunk, minlength=vocab_size)
    result = NgramCounts(unigrams, [], [], [len(tokens)], list(min_counts))
    for level in range(2, order + 1):
        keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        total = 0
        for chunk in read_chunks(tokens, level, chunk_tokens):
            node, inside = _walk(chunk, result.keys, level, vocab_size, end_id)
            total += int(inside.sum())
            kept = node >= 0
            new, new_counts = np.unique(node[kept] * vocab_size + chunk[level - 1 :][kept], return_counts=True)
            keys, counts = _add(keys, counts, new, new_counts)
        enough = counts >= min_counts[level - 1]
        result.keys.append(keys[enough])
        result.counts.append(counts[enough])
        result.totals.append(total)
    return result


def check_min_counts(min_counts: Sequence[int], order: int) -> None:
    """Refuse what is no rule of what is kept.

    Raises:
        TrainingError: `min_counts` has another length than `order` or falls.
    """
    if len(min_counts) != order or list(min_counts) != sorted(min_counts):
        raise TrainingError(f"{order} minimal counts that do not fall are needed, not {list(min_counts)}")


def within_document(chunk: NDArray[np.int64], level: int, end_id: int | None) -> NDArray[np.bool_]:
    """Return which n-grams of `level` in `chunk` lie within one document: only their last token may end it."""
    positions = len(chunk) - level + 1
    inside = np.ones(positions, dtype=bool)
    if end_id is not None:
        for i in range(level - 1):
            inside &= chunk[i : i + positions] != end_id
    return inside


def _walk(
    chunk: NDArray[np.int64],
    keys: list[NDArray[np.int64]],
    level: int,
    vocab: int,
    end_id: int | None,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For every n-gram of `level` in `chunk`: the node of its prefix (-1: dropped), and if it counts."""
    inside = within_document(chunk, level, end_id)
    positions = len(inside)
    node = np.where(inside, chunk[:positions], -1)
    for i, level_keys in enumerate(keys, start=1):
        wanted = node * vocab + chunk[i : i + positions]
        index = np.minimum(np.searchsorted(level_keys, wanted), len(level_keys) - 1)
        node = np.where((node >= 0) & (level_keys[index] == wanted), index, -1) if len(level_keys) else node * 0 - 1
    return node, inside


def read_chunks(tokens: NDArray[np.unsignedinteger], order: int, size: int) -> Iterator[NDArray[np.int64]]:
    """Cut a stream so that every n-gram of `order` lies in exactly one chunk; of a file only these are in memory."""
    for start in range(0, max(0, len(tokens) - order + 1), size):
        stop = min(start + size + order - 1, len(tokens))
        yield _read(tokens, start, stop).astype(np.int64)


def _read(tokens: NDArray[np.unsignedinteger], start: int, stop: int) -> NDArray[np.unsignedinteger]:
    """Return a piece of a stream; that of a mapped file is read, since pages of a map would stay with the process."""
    if not (isinstance(tokens, np.memmap) and isinstance(tokens.base, mmap)):  # slices of maps have another base
        return tokens[start:stop]
    offset = tokens.offset + start * tokens.itemsize
    return np.fromfile(tokens.filename, tokens.dtype, stop - start, offset=offset)


def _add(
    keys: NDArray[np.int64], counts: NDArray[np.int64], new: NDArray[np.int64], new_counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    merged, inverse = np.unique(np.concatenate([keys, new]), return_inverse=True)
    return merged, np.bincount(inverse, np.concatenate([counts, new_counts]), len(merged)).astype(np.int64)


def _narrow(array: NDArray[np.int64]) -> NDArray[np.integer]:
    """Return the same values in the smallest unsigned type that holds them."""
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))
