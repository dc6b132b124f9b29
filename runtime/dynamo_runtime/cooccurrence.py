"""The co-occurrence mask of DynaMo (Eq. 3, 6): n-gram counts in a trie, and the ratio computed from them."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import BundleError

# Looking a candidate up by binary search costs about as much as passing over this many children.
CHILDREN_PER_SEARCH = 16
_MOST_ORDERS = 16
# Memory of the arrays over the size of the file: counts that training writes take up to 8 times as much.
_MOST_RATIO, _FREE_BYTES = 32, 64 << 20


@dataclass
class _Level:
    """Nodes of one order >= 2, grouped by parent, ascending by token within a parent."""

    offsets: np.ndarray  # [nodes of the order below + 1]
    ids: np.ndarray  # [nodes], last token of the n-gram
    counts: np.ndarray  # [nodes]
    keys: np.ndarray | None = None  # [nodes] parent * V + token, ascending; built on first use


class Cooccurrence:
    """Counts of 1-, 2-, … n-grams of the training text, as a trie.

    A node is an index into its order's arrays; at order 1 it is the token itself.

    Attributes:
        orders: The longest n-gram counted.
        vocab_size: V.
        unigram: p̂(x) of every token, [V].
    """

    def __init__(self, totals: np.ndarray, counts_1: np.ndarray, levels: list[_Level]):
        self.orders = 1 + len(levels)
        self.vocab_size = len(counts_1)
        self.unigram = counts_1 / max(int(totals[0]), 1)
        self._totals = totals
        self._levels = levels

    def extend(
        self, order: int, nodes: np.ndarray, tokens: np.ndarray, *, children_per_search: int = CHILDREN_PER_SEARCH
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return all counted n-grams of `order` that continue one of `nodes` by one of `tokens`.

        Args:
            order: Length of the n-grams looked for, from 2.
            nodes: Nodes of order - 1, [S].
            tokens: Distinct candidate tokens, [k].
            children_per_search: Children of a node that are passed over in the time of one binary search.

        Returns:
            Three arrays [S']: place of the prefix in `nodes`, place of the last token in `tokens`, node of
            the n-gram.
        """
        level = self._levels[order - 2]
        if len(nodes) == 1:
            return _children(level, int(nodes[0]), tokens)
        starts = level.offsets[nodes]
        sizes = level.offsets[nodes + 1] - starts
        ends = sizes.cumsum()
        total = int(ends[-1]) if len(ends) else 0
        if total > children_per_search * len(nodes) * len(tokens):
            return self._search(level, nodes, tokens)
        # Children of all nodes, end to end.
        child = np.repeat(starts - ends + sizes, sizes)
        child += np.arange(total)
        ids = level.ids.take(child)
        wanted = np.zeros(self.vocab_size, bool)
        wanted[tokens] = True
        kept = np.flatnonzero(wanted.take(ids))
        ranks = np.empty(self.vocab_size, np.intp)  # among the candidates; of other tokens it is not read
        ranks[tokens] = np.arange(len(tokens))
        return ends.searchsorted(kept, side="right"), ranks[ids[kept]], child[kept]

    def _search(
        self, level: _Level, nodes: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if level.keys is None:
            parents = np.repeat(np.arange(len(level.offsets) - 1), np.diff(level.offsets))
            level.keys = parents * self.vocab_size + level.ids
        order = np.argsort(tokens)  # ascending queries walk the keys in one direction, which is kinder to the caches
        wanted = (nodes[:, None] * self.vocab_size + tokens[order]).ravel()
        found = np.searchsorted(level.keys, wanted)
        found[found == len(level.keys)] = 0
        kept = np.flatnonzero(level.keys[found] == wanted)
        parent, rank = np.divmod(kept, len(tokens))
        return parent, order[rank], found[kept]

    def mask(self, order: int, nodes: np.ndarray, chance: np.ndarray, alpha: float) -> np.ndarray:
        """m^α_c of counted n-grams, [S]: `(p̂(x_1..x_n) / Π p̂(x_i))^α_c` (DynaMo, Eq. 3 and 6).

        Args:
            order: n, from 2.
            nodes: The n-grams, [S].
            chance: Π p̂(x_i), how often they would be there by chance, [S]. A factor that all of them share may be left
                out, if what the mask is put on is normalised afterwards.
            alpha: α_c.
        """
        frequency = self._levels[order - 2].counts[nodes] / self._totals[order - 1]
        ratio = np.divide(frequency, chance, out=np.zeros(len(nodes)), where=chance > 0)
        return ratio if alpha == 1 else ratio**alpha


def _children(level: _Level, node: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what `Cooccurrence.extend` gives for a single node.

    Its children lie side by side, and are searched there.
    """
    begin, end = level.offsets.item(node), level.offsets.item(node + 1)
    ids = level.ids[begin:end]
    if begin == end:
        tokens = tokens[:0]
    order = tokens.argsort()
    wanted = tokens[order].astype(ids.dtype)
    found = ids.searchsorted(wanted)
    (kept,) = (ids.take(found, mode="clip") == wanted).nonzero()  # of what is above all of them the last one is none
    return np.zeros(len(kept), np.intp), order[kept], begin + found[kept]


def load_cooccurrence(path: Path, vocab_size: int | None = None) -> Cooccurrence:
    """Read the counts that `dynamo-train` writes.

    Args:
        path: `cooccurrence.npz`.
        vocab_size: The graph's V, to check that the counts are of the same vocabulary.

    Raises:
        BundleError: The file is missing, unreadable, inconsistent, or of another vocabulary.
    """
    if not path.is_file():
        raise BundleError(f"{path} is missing: there are no n-gram counts for the co-occurrence mask")
    try:
        _check_headers(path)
        with np.load(path, allow_pickle=False) as file:
            totals = np.asarray(file["totals.npy"], np.int64)
            counts_1 = np.asarray(file["counts_1.npy"], np.int64)
            levels = [
                _Level(
                    np.asarray(file[f"offsets_{order}.npy"], np.int64),
                    np.asarray(file[f"ids_{order}.npy"], np.int32),
                    np.asarray(file[f"counts_{order}.npy"], np.float64),
                )
                for order in range(2, len(totals) + 1)
            ]
    except Exception as error:  # a damaged archive raises from zipfile, zlib, struct, numpy, …
        raise BundleError(f"{path} is not a readable table of n-gram counts: {error}") from error
    if totals.ndim != 1 or len(totals) < 2 or counts_1.ndim != 1 or totals.min() < 0:
        raise BundleError(f"{path} does not hold counts of single tokens and at least pairs")
    if vocab_size is not None and len(counts_1) != vocab_size:
        raise BundleError(
            f"{path} counts a vocabulary of {len(counts_1)} tokens where the graph has {vocab_size}: "
            "it belongs to another tokenizer"
        )
    if counts_1.min(initial=0) < 0 or any(level.counts.min(initial=0) < 0 for level in levels):
        raise BundleError(f"{path} is inconsistent: it has counts below 0")
    below = len(counts_1)
    for order, level in enumerate(levels, 2):
        size = len(level.ids)
        whole = level.offsets.shape == (below + 1,) and level.counts.shape == (size,) and level.offsets[0] == 0
        if not whole or level.offsets[-1] != size or np.any(np.diff(level.offsets) < 0):
            raise BundleError(f"{path} is inconsistent: the counts of order {order} do not fit together")
        if size and (level.ids.min() < 0 or level.ids.max() >= len(counts_1)):
            raise BundleError(f"{path} is inconsistent: order {order} counts tokens outside the vocabulary")
        below = size
    return Cooccurrence(totals, counts_1, levels)


def _check_headers(path: Path) -> None:
    """Judge what is said of the arrays before any is read: a small archive may unpack to more than there is memory.

    Raises:
        ValueError: They are not what counts are made of; or whatever a damaged archive raises.
    """
    with zipfile.ZipFile(path) as archive:
        orders, elements = _length(archive, "totals"), _length(archive, "counts_1")
        if orders > _MOST_ORDERS:
            raise ValueError(f"it is of order {orders}, and {_MOST_ORDERS} is the most")
        for order in range(2, orders + 1):
            elements += sum(_length(archive, f"{name}_{order}") for name in ("offsets", "ids", "counts"))
    if 8 * elements > _MOST_RATIO * path.stat().st_size + _FREE_BYTES:
        raise ValueError(f"it would take {8 * elements >> 20} MiB of memory, far more than its size accounts for")


def _length(archive: zipfile.ZipFile, name: str) -> int:
    """Elements of an array of whole numbers, by its header and by the archive alike."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        begin = file.tell()
    length: int = shape[0] if len(shape) == 1 else -1
    if length < 0 or (length and dtype.kind not in "iu") or dtype.hasobject:
        raise ValueError(f"{name} is not a row of whole numbers")
    if begin + length * dtype.itemsize != member.file_size:
        raise ValueError(f"{name} has {member.file_size - begin} bytes where its header says {length * dtype.itemsize}")
    return length
