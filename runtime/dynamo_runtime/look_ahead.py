"""Look-ahead embeddings (PaSS, Monea, Joulin, Grave 2023): the base itself predicts further tokens behind the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .drafting import NO_GUESS, Ask, Guesses, Passed
from .parameters import SamplingParameters
from .sampling import Candidates, Truncated
from .scores import Scores, negative_log_likelihood
from .step import Step
from .topology import Holder, Topology


@dataclass(frozen=True)
class LookAhead(Topology):
    """L ids behind the vocabulary; the base's output at the i-th of them is about the token i places after the next.

    Attributes:
        n_look_ahead: L.
    """

    n_look_ahead: int = 1

    kind = "lookahead"
    least: ClassVar[Mapping[str, int]] = {"n_look_ahead": 1}

    @classmethod
    def sizes_in_version_2(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """See `Topology`; there it was one more, the tokens that a pass predicts."""
        tokens = content.get("n_tokens")
        return {"n_look_ahead": tokens - 1 if isinstance(tokens, int) else tokens}

    @property
    def n_tokens(self) -> int:
        """One more than look-ahead tokens."""
        return 1 + self.n_look_ahead

    @property
    def look_ahead(self) -> int:
        """L."""
        return self.n_look_ahead

    def score(self, step: Step, targets: np.ndarray) -> Scores:
        """See `Topology`; of one position, whose look-ahead tokens have rows of their own: targets [n_tokens, 1]."""
        nll = negative_log_likelihood(step.logits(), targets[:, 0])[:, None]
        return Scores(nll, nll.sum(0), step.logits().argmax(-1)[:, None])


class LookAheadDrafter:
    """The base's own distributions at the places of look-ahead tokens.

    They stand behind the drafts, so if one of those is rejected they have seen a text that does not exist: the pass
    holds no guesses then.
    """

    def __init__(self, bundle: Holder, parameters: SamplingParameters):
        ids = bundle.look_ahead[: parameters.draft_tokens or None]
        self.depth = len(ids)
        self.ask = Ask(look_ahead=ids)
        self._parameters = parameters

    def guess(self, passed: Passed) -> Guesses | None:
        """Return the look-ahead rows follow those of the last final token and of every draft fed."""
        if passed.accepted < passed.judged:
            return None
        logits, ids = passed.step.topk()

        def candidates(chosen: Sequence[int]) -> Candidates:
            row = passed.judged + len(chosen)
            if row >= len(ids):  # the context ends: not all look-ahead tokens were fed
                return NO_GUESS
            return Truncated(logits[row].tolist(), ids[row].tolist(), self._parameters)

        return candidates
