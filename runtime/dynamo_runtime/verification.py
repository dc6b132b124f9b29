"""Speculative verification (Leviathan et al. 2023, Chen et al. 2023): drafts are let through by the target alone."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .sampling import Candidates, draw


class Draft(NamedTuple):
    """A guess at one token.

    Attributes:
        token: The guess.
        drawn_from: q, the distribution it was really drawn from; None if it was certain, i.e. q(token) = 1.
        confidence: What its drafter expected of it before it was drawn, in [0, 1].
        source: Name of its drafter.
    """

    token: int
    drawn_from: Candidates | None = None
    confidence: float = 0.0
    source: str = ""


def verify(
    drafts: Sequence[Draft], target: Callable[[int], Candidates], uniform: Callable[[], float]
) -> tuple[int, int]:
    """Return how many drafts stand, and the token that follows them.

    The tokens that stand and the one that follows are together distributed as the target says.

    A draft d is accepted with min(1, p(d) / q(d)); the first rejected one is replaced by a draw from
    norm(max(0, p - q)), and if all stand one more token is drawn from p. A certain draft (q(d) = 1) stands with
    probability p(d); if it does not, the token is drawn from p without d. Both come to one plain draw from p: the
    draft stands if it is the token that was drawn. So certain drafts take one uniform number a token, just as plain
    decoding does, and give the same text from the same seed.

    Args:
        drafts: In order.
        target: Function of i that returns p of the token behind the first i drafts.
        uniform: Function that draws a number from [0, 1).

    Returns:
        Number of drafts accepted, and the next token.
    """
    for i, draft in enumerate(drafts):
        p = target(i)
        if draft.drawn_from is None:
            token = p.draw(uniform())
            if token != draft.token:
                return i, token
            continue
        q = draft.drawn_from
        if uniform() * probability(q, draft.token) >= probability(p, draft.token):
            return i, int(p.ids[draw(residual(p, q), uniform())])
    p = target(len(drafts))
    return len(drafts), p.draw(uniform())


def agreement(drafts: Sequence[Draft], tokens: Sequence[int]) -> tuple[int, int]:
    """Return what `verify` does where p is on one token whatever stands before it, as in plain greedy decoding.

    Args:
        drafts: In order.
        tokens: That of every row: behind no draft, behind the first, and so on.
    """
    accepted = 0
    for draft, token in zip(drafts, tokens, strict=False):
        if draft.token != token:
            break
        accepted += 1
    return accepted, tokens[accepted]


def probability(candidates: Candidates, token: int) -> float:
    """Return the probability of a token, 0 outside the candidates."""
    return float(candidates.probabilities[candidates.ids == token].sum())


def residual(p: Candidates, q: Candidates) -> np.ndarray:
    """Return max(0, p - q) over the candidates of p [k], not normalised; p itself where rounding leaves nothing."""
    order = np.argsort(q.ids)
    place = np.minimum(np.searchsorted(q.ids, p.ids, sorter=order), len(order) - 1)
    found = order[place]
    rest = np.maximum(p.probabilities - np.where(q.ids[found] == p.ids, q.probabilities[found], 0.0), 0.0)
    return rest if rest.sum() > 0 else p.probabilities
