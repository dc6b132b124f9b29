"""The best static tree of drafts: Sequoia's dynamic program (Chen et al. 2024, arXiv 2402.12374).

A tree is a set of paths of ranks: `()` is the row of the newest final token, `(0,)` the drafter's first choice behind
it, `(0, 2)` its third choice behind that. A chain is the tree of nothing but first choices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

import numpy as np

Ranks = tuple[int, ...]
Tree = list[Ranks]
"""Its rows in the order in which a pass is fed them: every parent before its children, first choices first."""


def chain(drafts: int) -> Tree:
    """So many first choices behind each other."""
    return [(0,) * depth for depth in range(drafts + 1)]


def best_tree(right: np.ndarray, rows: int, depth: int) -> tuple[float, Tree]:
    """Return the tree that is expected to give the most tokens a pass.

    With p_dk how likely the k-th choice at depth d is right where those before it are, a tree gives `Σ Π p` over the
    paths to its rows. So the best one of m rows is made of the best ones behind each child of the root, whose rows add
    up to m - 1 (Sequoia, Prop. 3.4 and its dynamic program; here p may differ from depth to depth).

    Args:
        right: p, [depths, ranks].
        rows: Most rows, the root's among them.
        depth: Most drafts behind each other.

    Returns:
        Tokens a pass, the one that the pass itself adds among them; and the tree.
    """
    ranks, most = right.shape[1], min(depth, len(right))

    @cache
    def behind(count: int, at: int) -> tuple[float, Tree]:
        """Return the best `count` rows whose root stands at a depth, where that is right."""
        value, children = among(count - 1, at, 0)
        return 1.0 + value, [(), *children]

    @cache
    def among(count: int, at: int, rank: int) -> tuple[float, Tree]:
        """Return the best `count` rows in children from this rank on of a row at a depth."""
        if not count or at == most or rank == ranks:
            return 0.0, []
        found = among(count, at, rank + 1)
        for own in range(1, count + 1):
            value, tree = behind(own, at + 1)
            others, further = among(count - own, at, rank + 1)
            whole = float(right[at, rank]) * value + others
            if whole > found[0]:
                found = whole, [*((rank, *path) for path in tree), *further]
        return found

    value, tree = behind(rows, 0)
    return value, sorted(tree)


def expected(tree: Collection[Ranks], right: np.ndarray) -> float:
    """Return tokens a pass of a tree: `Σ Π p` over the paths to its rows."""
    return float(sum(np.prod([right[depth, rank] for depth, rank in enumerate(path)]) for path in tree))


def replay(tree: Collection[Ranks], ranks: np.ndarray) -> int:
    """Pass that writing a text takes with such a tree behind every pass.

    Args:
        tree: What is fed.
        ranks: Which choice of the drafter each token was that became text, [tokens, depths]: behind the token in the
            row, at every depth; negative where it was none of them.
    """
    paths, passes, at = set(tree), 0, 0
    while at < len(ranks):
        passes += 1
        accepted = 0
        while accepted < ranks.shape[1] and tuple(ranks[at, : accepted + 1].tolist()) in paths:
            accepted += 1
        at += accepted + 1
    return passes


def acceptance(ranks: Sequence[np.ndarray], choices: int) -> np.ndarray:
    """Return how likely each choice of the drafter is right at each depth, where all before it were among its choices.

    Args:
        ranks: Of some texts: see `replay`.
        choices: How many of them count.

    Returns:
        p, [depths, choices].
    """
    every = np.concatenate(ranks)
    known = np.ones(len(every), bool)
    right = np.zeros((every.shape[1], choices))
    for depth, column in enumerate(every.T):
        column = column[known]
        right[depth] = [(column == rank).mean() if len(column) else 0.0 for rank in range(choices)]
        known &= (every[:, depth] >= 0) & (every[:, depth] < choices)
    return right


def parents(tree: Tree) -> list[int]:
    """Return the row in front of each row, by its number; -1 for the root."""
    row = {path: number for number, path in enumerate(tree)}
    return [row[path[:-1]] if path else -1 for path in tree]


def asked(tree: Collection[Ranks]) -> list[int]:
    """Of how many rows at depth 0, 1, … a drafter has to say what follows."""
    found = {path[:-1] for path in tree if path}
    return [sum(len(path) == depth for path in found) for depth in range(max(map(len, found), default=-1) + 1)]
