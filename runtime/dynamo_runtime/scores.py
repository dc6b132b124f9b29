"""What a model says of the tokens of a text, as numbers; `scoring` runs the passes they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """What a bundle says of the tokens of a text.

    Attributes:
        nll: -log p(x_{t+i} | x_{1:t}) in nats, [n_tokens, positions]; i = 1 is the first head. It is inf where x_{t+i}
            is not covered: a further head drafts from a vocabulary that does not have it. Heads that are conditioned on
            the token in front of x_{t+i} were told the text's.
        joint: -log p(x_{t+1:t+n} | x_{1:t}), [positions]: the sum of `nll`, or what a joint head says.
        choices: The most likely token i places on, [n_tokens, positions].
    """

    nll: np.ndarray
    joint: np.ndarray
    choices: np.ndarray

    def perplexities(self) -> dict[str, float]:
        """`ppl_i` = exp of the mean of nll_i, and `ppl_1:n` = exp of the mean of joint / n.

        Means are over the positions whose tokens are covered (see `coverage`); where none is, the figure is left out.
        """
        n = len(self.nll)
        sums = {f"ppl_{i}": nll for i, nll in enumerate(self.nll, 1)}
        sums |= {f"ppl_1:{n}": self.joint / n} if n > 1 else {}
        covered = {name: values[np.isfinite(values)] for name, values in sums.items()}
        return {name: float(np.exp(values.mean())) for name, values in covered.items() if len(values)}

    @property
    def coverage(self) -> list[float]:
        """Of every token ahead, the share of positions where it is among those that its head may say."""
        shares: list[float] = np.isfinite(self.nll).mean(1).tolist()
        return shares

    @staticmethod
    def join(scores: Sequence[Scores]) -> Scores:
        """Return the scores of several texts as one."""
        return Scores(
            np.concatenate([each.nll for each in scores], axis=1),
            np.concatenate([each.joint for each in scores]),
            np.concatenate([each.choices for each in scores], axis=1),
        )


def log_sum(values: np.ndarray) -> np.ndarray:
    """Return the log of the sum of exponentials along the last axis."""
    largest = values.max(-1)
    shift = np.where(np.isneginf(largest), 0.0, largest)  # of nothing but -inf it is that
    with np.errstate(divide="ignore"):
        total: np.ndarray = shift + np.log(np.exp(values - shift[..., None]).sum(-1))
    return total


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis, in float64."""
    exact = logits.astype(np.float64)
    return exact - log_sum(exact)[..., None]


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p of one target a row, in nats, [rows]; logits [rows, vocab], targets [rows]."""
    exact = logits.astype(np.float64)
    nll: np.ndarray = log_sum(exact) - exact[np.arange(len(targets)), targets]
    return nll
