"""The loop that every strategy runs in: forward passes, and what becomes of the cache between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .errors import ParameterError
from .origins import OWN, Origin
from .sampling import Context
from .scores import negative_log_likelihood
from .session import Session
from .step import NONE, At, Last, Rows, Step
from .strategies import Strategy, Turn

PREFILL_CHUNK = 256


class Round(NamedTuple):
    """What one forward pass gave.

    Attributes:
        tokens: Final tokens: accepted drafts that the pass was fed, the token of its own, and behind that the guesses
            that were let through on the spot (see `Turn.proposed`).
        proposed: Draft tokens that were judged.
        verified: How many of `tokens` are drafts that the pass was fed.
        log_probabilities: Of the final tokens that have none yet, in order, as far as the pass tells; empty unless they
            are wanted.
        sources: Of the drafts that the pass was fed: names of their drafters.
    """

    tokens: list[int]
    proposed: int
    verified: int
    log_probabilities: Sequence[float] = ()
    sources: Sequence[str] = ()

    @property
    def accepted(self) -> int:
        """Draft tokens that are among `tokens`: all but the pass's own."""
        return len(self.tokens) - 1

    def accepted_of(self, taken: int) -> int:
        """Draft tokens among the first `taken` tokens."""
        return taken if taken <= self.verified else taken - 1

    def origin(self, place: int) -> Origin:
        """Return where the token at a place of `tokens` comes from."""
        if place < self.verified:
            return Origin(place + 1, self.sources[place])
        return OWN if place == self.verified else Origin(place)


def reuse_prefix(session: Session, prompt: Sequence[int]) -> int:
    """Roll the cache back to what it has in common with the prompt; returns how many positions that are.

    The last token is always left to be computed, as the first pass must have a row to read.
    """
    common = 0
    for held, wanted in zip(session.cache.tokens, prompt[:-1], strict=False):
        if held != wanted:
            break
        common += 1
    session.cache.rollback(common)
    return common


def prefill(session: Session, prompt: Sequence[int], chunk: int) -> Iterator[None]:
    """Feed the prompt in chunks until at most one chunk is left, which the first decode step feeds.

    Args:
        session: Rolled back to a prefix of the prompt.
        prompt: Its tokens.
        chunk: Most tokens a pass.
    """
    while len(prompt) - session.cache.length > chunk:
        yield
        held = session.cache.length
        session.step(prompt[held : held + chunk], heads=NONE)
    yield


def decode(
    session: Session, strategy: Strategy, context: Context, rng: np.random.Generator, *, scored: bool = False
) -> Iterator[Round]:
    """Yield one round after another, without end.

    Whatever is final but not in the cache is fed, with the strategy's drafts behind it and look-ahead tokens, if it
    asked for any, behind those; the cache then rolls back behind the drafts that were accepted.

    Args:
        session: Holding all of the context but its last tokens.
        strategy: Says what becomes of a pass, and what it wants of the next.
        context: Final tokens; added to.
        rng: For everything that is random.
        scored: Whether log-probabilities of the tokens are wanted.
    """
    turn = Turn([], ask=strategy.ask)
    unscored = 0  # final tokens at the end of the context: the rows in front of them tell their log-probabilities
    while True:
        pending = context.tokens[session.cache.length :]
        room = session.max_length - len(context.tokens)
        drafts = turn.drafts[:room]
        look_ahead = list(turn.ask.look_ahead[: room - len(drafts)])
        fed = pending + [draft.token for draft in drafts] + look_ahead
        judged = 1 + len(drafts)  # rows: the last final token's, and every draft's
        last = len(fed) - len(look_ahead)
        rows = Last(unscored + judged + len(look_ahead))
        if not turn.ask.heads:
            heads: Rows = NONE
        elif last == len(fed) and not unscored:
            heads = rows
        else:
            heads = At(range(last - judged, last))
        step = session.step(fed, rows=rows, heads=heads)
        turn = strategy.advance(step.without(unscored), context, drafts, rng)
        _check(turn, len(drafts), session.bundle.vocab_size, strategy)
        session.cache.rollback(len(context.tokens) + turn.accepted)
        final = [draft.token for draft in drafts[: turn.accepted]] + turn.tokens
        context.extend(final)
        logs: list[float] = []
        if scored:
            told = unscored + turn.accepted + 1  # rows that tell a final token each
            logs = log_probabilities(step, context.tokens[-unscored - len(final) :][:told])
            unscored = len(turn.tokens) - 1
        del step  # what it says is copied for whoever has it when the next pass begins
        sources = [draft.source for draft in drafts]
        yield Round(final, len(drafts) + turn.proposed, turn.accepted, logs, sources)


def _check(turn: Turn, drafts: int, vocab_size: int, strategy: Strategy) -> None:
    """See that a strategy, which may be of somebody's own, goes on by tokens that there are.

    Raises:
        ParameterError: It does not.
    """
    if not isinstance(turn, Turn) or not turn.tokens or not 0 <= turn.accepted <= drafts:
        given = "" if isinstance(turn, Turn) else f", not a {type(turn).__name__}"
        refused = f"must be a Turn of one new token or more, with no more drafts accepted than there were{given}"
    elif min(turn.tokens) < 0 or max(turn.tokens) >= vocab_size:
        refused = f"has token ids outside 0 … {vocab_size - 1}"
    else:
        return
    raise ParameterError(f"what strategy {type(strategy).__name__} makes of a pass {refused}")


def score_rest(session: Session, tokens: Sequence[int], unscored: int) -> list[float]:
    """Log-probabilities of the last `unscored` tokens of a text, which no pass of `decode` told: one pass more."""
    step = session.step(tokens[session.cache.length : -1], rows=Last(unscored), heads=NONE)
    return log_probabilities(step, tokens[-unscored:])


def log_probabilities(step: Step, tokens: Sequence[int]) -> list[float]:
    """Return what the base model makes of tokens, in nats: row i of the first head tells tokens[i]."""
    found: list[float] = (-negative_log_likelihood(step.logits()[: len(tokens)], np.array(tokens))).tolist()
    return found
