"""Sequoia's dynamic program against all trees there are, and replayed texts against following them by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sequoia import Ranks, acceptance, asked, best_tree, chain, expected, parents, replay


def all_trees(rows: int, depths: int, ranks: int) -> list[list[Ranks]]:
    """Every set of rows with the root in it in which no row is without its parent."""
    nodes = [path for depth in range(1, depths + 1) for path in itertools.product(range(ranks), repeat=depth)]
    found = []
    for count in range(rows):
        for some in itertools.combinations(nodes, count):
            if all(len(path) == 1 or path[:-1] in some for path in some):
                found.append([(), *some])
    return found


@pytest.mark.parametrize(("rows", "depths", "ranks"), [(1, 3, 2), (4, 3, 2), (5, 2, 3), (6, 3, 2)])
def test_no_tree_is_better(rows: int, depths: int, ranks: int) -> None:
    for seed in range(4):
        right = np.random.default_rng(seed).dirichlet(np.ones(ranks + 1), depths)[:, :ranks]
        value, tree = best_tree(right, rows, depths)
        assert value == pytest.approx(expected(tree, right))
        assert len(tree) <= rows and tree == sorted(tree)
        assert value == pytest.approx(max(expected(each, right) for each in all_trees(rows, depths, ranks)))


def test_it_is_no_deeper_than_it_may_be() -> None:
    right = np.array([[0.9, 0.05], [0.9, 0.05], [0.9, 0.05]])
    assert best_tree(right, 4, 3)[1] == chain(3)
    value, tree = best_tree(right, 4, 1)
    assert tree == [(), (0,), (1,)] and value == pytest.approx(1.95)


def test_a_replay_takes_as_many_passes_as_following_the_text() -> None:
    ranks = np.array([[0, 1, 0], [1, 0, 0], [2, 0, 0], [0, 0, 0], [1, 1, -1], [-1, -1, -1]])
    assert replay(chain(0), ranks) == 6
    assert replay(chain(3), ranks) == 3  # one draft stands, then none, then three
    assert replay([(), (0,), (0, 1), (0, 1, 0)], ranks) == 3
    assert replay([(), (1,)], ranks) == 4


def test_acceptance_is_counted_where_the_drafts_before_were_among_the_choices() -> None:
    ranks = [np.array([[0, 0], [0, 1]]), np.array([[1, 1], [-1, 0]])]
    assert acceptance(ranks, 2) == pytest.approx(np.array([[2 / 4, 1 / 4], [1 / 3, 2 / 3]]))
    assert acceptance(ranks, 1) == pytest.approx(np.array([[2 / 4], [1 / 2]]))


def test_rows_know_their_parents_and_the_drafter_what_it_is_asked() -> None:
    tree = [(), (0,), (0, 0), (0, 2), (1,), (1, 0)]
    assert parents(tree) == [-1, 0, 1, 1, 0, 4]
    assert asked(tree) == [1, 2] and asked(chain(3)) == [1, 1, 1] and asked([()]) == []
