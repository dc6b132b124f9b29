"""What a model says of the tokens of a text, as numbers; `scoring` runs the passes they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
    def join(scores: Sequence[Scores]) -> Scores:
        """The scores of several texts as one."""
        return Scores(
            np.concatenate([each.nll for each in scores], axis=1),
            np.concatenate([each.joint for each in scores]),
            np.concatenate([each.choices for each in scores], axis=1),
        )


def log_sum(values: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials along the last axis."""
    largest = values.max(-1)
    total: np.ndarray = largest + np.log(np.exp(values - largest[..., None]).sum(-1))
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
