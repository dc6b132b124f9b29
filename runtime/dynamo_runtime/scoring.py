"""How likely a bundle finds a text: perplexities of every token ahead (DynaMo, section "Evaluation").

Serves the gates of `dynamo_quantize` and the measures of `dynamo_evaluate`; decoding does not need it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .scores import Scores, negative_log_likelihood
from .session import Session
from .step import ALL, NONE, Last, Step

BYTES_AT_ONCE = 64 << 20  # logits of one pass
LOOK_AHEAD_STRIDE = 4  # look-ahead tokens are tried behind every so many tokens: each trial is a pass of its own


@dataclass(frozen=True)
class Stretch:
    """Successive positions that one pass scored.

    Attributes:
        positions: Places t of the last known token, counted from 0.
        scores: Of the tokens behind each of them.
        step: The pass; its last rows are those of `positions`.
    """

    positions: range
    scores: Scores
    step: Step


def score_texts(session: Session, texts: Iterable[Sequence[int]]) -> Scores:
    """Score texts one after the other, each from an empty cache.

    Args:
        session: Of the bundle; its cache is used.
        texts: Token ids, each longer than `n_tokens` and no longer than the cache; predictions that reach beyond the
            end of a text are left out.

    Raises:
        DynamoError: A text has tokens outside the vocabulary or too many of them.
        ValueError: A text is too short.
    """
    return Scores.join([each.scores for text in texts for each in score_window(session, list(text))])


def score_window(
    session: Session,
    tokens: Sequence[int],
    begin: int = 0,
    first: int = 0,
    end: int | None = None,
    *,
    at_once: int = BYTES_AT_ONCE,
) -> Iterator[Stretch]:
    """Score a stretch of a text, given what stands before it in a window.

    Args:
        session: Of the bundle; its cache is emptied and used.
        tokens: The whole text.
        begin: Where the window begins: the model sees nothing before.
        first: First position that is scored.
        end: Behind the last position that is scored, and fed; None means the end of the text. What is predicted may
            lie behind it, but not behind the text.
        at_once: Bytes of logits that one pass may put out.

    Raises:
        DynamoError: The window has tokens outside the vocabulary or too many of them.
        ValueError: The text is too short.
    """
    topology = session.bundle.topology
    n = topology.n_tokens
    if len(tokens) <= n:
        raise ValueError(f"a text of {len(tokens)} tokens cannot be scored {n} tokens ahead")
    end = len(tokens) - n if end is None else min(end, len(tokens) - n)
    session.cache.reset()
    if topology.look_ahead:
        yield from _score_look_ahead(session, tokens, begin, first, end)
        return
    rows = max(1, at_once // (4 * session.bundle.vocab_size * (1 + topology.parts)))
    for at in range(begin, first, rows):
        session.step(tokens[at : min(at + rows, first)], heads=NONE)
    for at in range(first, end, rows):
        positions = range(at, min(at + rows, end))
        step = session.step(tokens[at : positions.stop], rows=ALL, heads=ALL)
        targets = np.array([tokens[at + i : positions.stop + i] for i in range(1, n + 1)])
        yield Stretch(positions, topology.score(step, targets), step)


def score_base(
    session: Session, tokens: Sequence[int], first: int = 0, *, at_once: int = BYTES_AT_ONCE
) -> tuple[np.ndarray, np.ndarray]:
    """Score a text by the first head alone, the base model's; further heads are not computed.

    Args:
        session: Of the bundle; its cache is emptied and used.
        tokens: The text, longer by at most one token than the cache.
        first: First position that is scored.
        at_once: Bytes of logits that one pass may put out.

    Returns:
        -log p(x_{t+1} | x_{1:t}) in nats, and the most likely x_{t+1}, both [positions].

    Raises:
        DynamoError: The text has tokens outside the vocabulary or too many of them.
    """
    rows = max(1, at_once // (4 * session.bundle.vocab_size))
    session.cache.reset()
    for at in range(0, first, rows):
        session.step(tokens[at : min(at + rows, first)], heads=NONE)
    nll, choices = [np.empty(0)], [np.empty(0, np.int64)]
    for at in range(first, len(tokens) - 1, rows):
        end = min(at + rows, len(tokens) - 1)
        logits = session.step(tokens[at:end], rows=ALL, heads=NONE).logits()
        nll.append(negative_log_likelihood(logits, np.array(tokens[at + 1 : end + 1])))
        choices.append(logits.argmax(-1))
    return np.concatenate(nll), np.concatenate(choices)


def _score_look_ahead(session: Session, tokens: Sequence[int], begin: int, first: int, end: int) -> Iterator[Stretch]:
    """Feed the text in strides, each with the look-ahead tokens behind it, which are then dropped."""
    topology = session.bundle.topology
    n = topology.n_tokens
    for known in range(begin + LOOK_AHEAD_STRIDE, end + 1, LOOK_AHEAD_STRIDE):
        position = known - 1  # its successors are what the pass predicts
        if position < first:
            continue
        fed = [*tokens[begin + session.cache.length : known], *session.bundle.look_ahead]
        step = session.step(fed, rows=Last(n))
        session.cache.rollback(known - begin)
        targets = np.array(tokens[known : known + n])[:, None]
        yield Stretch(range(position, known), topology.score(step, targets), step)
