"""How likely a bundle finds a text: perplexities of every token ahead (DynaMo, section "Evaluation").

Serves the gates of `dynamo_quantize` and the measures of `dynamo_evaluate`; decoding does not need it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .session import Session, Step

_BYTES_AT_ONCE = 64 << 20  # logits of one pass
LOOK_AHEAD_STRIDE = 4  # look-ahead tokens are tried behind every so many tokens: each trial is a pass of its own


@dataclass(frozen=True)
class Scores:
    """What a bundle says of the tokens of a text.

    Attributes:
        nll: -log p(x_{t+i} | x_{1:t}) in nats, [n_tokens, positions]; i = 1 is the first head.
        joint: -log p(x_{t+1:t+n} | x_{1:t}), [positions]: the sum of `nll`, or what a joint head says.
        choices: The most likely token i places on, [n_tokens, positions].
    """

    nll: np.ndarray
    joint: np.ndarray
    choices: np.ndarray

    def perplexities(self) -> dict[str, float]:
        """``ppl_i`` = exp of the mean of nll_i, and ``ppl_1:n`` = exp of the mean of joint / n."""
        n = len(self.nll)
        found = {f"ppl_{i}": float(np.exp(nll.mean())) for i, nll in enumerate(self.nll, 1)}
        return found | ({f"ppl_1:{n}": float(np.exp(self.joint.mean() / n))} if n > 1 else {})

    @staticmethod
    def join(scores: Sequence["Scores"]) -> "Scores":
        """The scores of several texts as one."""
        return Scores(
            np.concatenate([each.nll for each in scores], axis=1),
            np.concatenate([each.joint for each in scores]),
            np.concatenate([each.choices for each in scores], axis=1),
        )


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
    session: Session, tokens: Sequence[int], begin: int = 0, first: int = 0, end: int | None = None
) -> Iterator[Stretch]:
    """Score a stretch of a text, given what stands before it in a window.

    Args:
        session: Of the bundle; its cache is emptied and used.
        tokens: The whole text.
        begin: Where the window begins: the model sees nothing before.
        first: First position that is scored.
        end: Behind the last position that is scored, and fed; None means the end of the text. What is predicted may
            lie behind it, but not behind the text.

    Raises:
        DynamoError: The window has tokens outside the vocabulary or too many of them.
        ValueError: The text is too short.
    """
    n = session.bundle.n_tokens
    if len(tokens) <= n:
        raise ValueError(f"a text of {len(tokens)} tokens cannot be scored {n} tokens ahead")
    end = len(tokens) - n if end is None else min(end, len(tokens) - n)
    session.cache.reset()
    if session.bundle.kind == "lookahead":
        yield from _score_look_ahead(session, tokens, begin, first, end)
        return
    parts = session.bundle.n_heads + session.bundle.rank * n
    rows = max(1, _BYTES_AT_ONCE // (4 * session.bundle.vocab_size * parts))
    for at in range(begin, first, rows):
        session.step(tokens[at : min(at + rows, first)], head_rows=())
    for at in range(first, end, rows):
        positions = range(at, min(at + rows, end))
        step = session.step(tokens[at : positions.stop], rows=0, head_rows=range(len(positions)))
        targets = np.array([tokens[at + i : positions.stop + i] for i in range(1, n + 1)])
        score = _score_joint if session.bundle.kind == "cp" else _score_heads
        yield Stretch(positions, score(step, targets), step)


def score_base(session: Session, tokens: Sequence[int], first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Score a text by the first head alone, the base model's; further heads are not computed.

    Args:
        session: Of the bundle; its cache is emptied and used.
        tokens: The text, longer by at most one token than the cache.
        first: First position that is scored.

    Returns:
        -log p(x_{t+1} | x_{1:t}) in nats, and the most likely x_{t+1}, both [positions].

    Raises:
        DynamoError: The text has tokens outside the vocabulary or too many of them.
    """
    rows = max(1, _BYTES_AT_ONCE // (4 * session.bundle.vocab_size))
    session.cache.reset()
    for at in range(0, first, rows):
        session.step(tokens[at : min(at + rows, first)], head_rows=())
    nll, choices = [np.empty(0)], [np.empty(0, np.int64)]
    for at in range(first, len(tokens) - 1, rows):
        end = min(at + rows, len(tokens) - 1)
        logits = session.step(tokens[at:end], rows=0, head_rows=()).logits()
        nll.append(_nll(logits, np.array(tokens[at + 1 : end + 1])))
        choices.append(logits.argmax(-1))
    return np.concatenate(nll), np.concatenate(choices)


def _score_heads(step: Step, targets: np.ndarray) -> Scores:
    """The scores of one pass with parallel heads, or with one head; targets [n_heads, rows]."""
    logits = [step.logits(head) for head in range(1, len(targets) + 1)]
    nll = np.array([_nll(each, row) for each, row in zip(logits, targets, strict=True)])
    return Scores(nll, nll.sum(0), np.array([each.argmax(-1) for each in logits]))


def _score_joint(step: Step, targets: np.ndarray) -> Scores:
    """The scores of one pass with a joint head, whose tokens after the first are told by their marginals."""
    log_w = step.gate().astype(np.float64)  # [rows, rank]
    log_p = np.array([_log_softmax(step.factors()[:, i]) for i in range(len(targets))])  # [n, rows, rank, vocab]
    found = np.take_along_axis(log_p, targets[:, :, None, None], -1)[..., 0]  # [n, rows, rank]
    nll, choices = -_log_sum(log_w + found), (np.exp(log_p) * np.exp(log_w)[:, :, None]).sum(2).argmax(-1)
    nll[0], choices[0] = _nll(step.logits(), targets[0]), step.logits().argmax(-1)
    return Scores(nll, -_log_sum(log_w + found.sum(0)), choices)


def _score_look_ahead(session: Session, tokens: Sequence[int], begin: int, first: int, end: int) -> Iterator[Stretch]:
    """Feeds the text in strides, each with the look-ahead tokens behind it, which are then dropped."""
    n = session.bundle.n_tokens
    for known in range(begin + LOOK_AHEAD_STRIDE, end + 1, LOOK_AHEAD_STRIDE):
        position = known - 1  # its successors are what the pass predicts
        if position < first:
            continue
        fed = [*tokens[begin + session.cache.length : known], *session.bundle.look_ahead]
        step = session.step(fed, rows=n)
        session.cache.rollback(known - begin)
        logits = step.logits()
        nll = _nll(logits, np.array(tokens[known : known + n]))[:, None]
        yield Stretch(range(position, known), Scores(nll, nll.sum(0), logits.argmax(-1)[:, None]), step)


def _log_sum(values: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials along the last axis."""
    largest = values.max(-1)
    total: np.ndarray = largest + np.log(np.exp(values - largest[..., None]).sum(-1))
    return total


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    return exact - _log_sum(exact)[..., None]


def _nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p of one target a row; logits [rows, vocab], targets [rows]."""
    exact = logits.astype(np.float64)
    nll: np.ndarray = _log_sum(exact) - exact[np.arange(len(targets)), targets]
    return nll
