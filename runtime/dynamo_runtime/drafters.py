"""Drafters: guesses at the tokens behind the next one, out of the pass that gave the next one.

They may guess in any way, as long as a `Draft` tells what it was drawn from: the first head verifies.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from .bundle import Bundle
from .cooccurrence import Cooccurrence
from .errors import ParameterError
from .parameters import SamplingParameters
from .sampling import Candidates, draw, truncate
from .session import Step
from .verification import Draft


class Drafter(Protocol):
    """Where drafts come from.

    Attributes:
        look_ahead: Ids fed behind every pass's tokens for the drafter's sake; they are no text.
        depth: Most drafts a pass.
    """

    look_ahead: Sequence[int]
    depth: int

    def start(self, step: Step, judged: int, accepted: int) -> bool:
        """Turn to a new pass, `accepted` of whose `judged` drafts stand; False if it holds no guesses."""

    def candidates(self, depth: int, token: int) -> Candidates:
        """Distribution of the token `depth` places behind the next one, given the one chosen before it.

        Called for depth 1, 2, …, with the next token at depth 1 and then every draft as it is chosen.
        """


class ParallelHeads:
    """Head i + 1 of the graph guesses i tokens behind the next one, whatever stands in between (DynaMo)."""

    look_ahead: Sequence[int] = ()

    def __init__(self, bundle: Bundle, parameters: SamplingParameters):
        self.depth = bundle.n_heads - 1
        self._parameters = parameters

    def start(self, step: Step, judged: int, accepted: int) -> bool:
        """The heads' rows are those of the last final token and of every draft fed."""
        self._step, self._row = step, accepted
        return True

    def candidates(self, depth: int, token: int) -> Candidates:
        """f^(depth+1), truncated."""
        logits, ids = self._step.topk(depth + 1)
        return truncate(logits[self._row], ids[self._row], self._parameters)


class JointHead:
    """A mixture of r products of factors (CP decomposition, Basharin et al. 2024), drawn from token by token.

    With every token that is chosen the components are weighed anew by how likely each had made it,
    ``w_α ← w_α p_α^(s)(x_s)``: what comes next depends on what was drafted, and its probability is known. The
    factors are truncated to their most probable tokens, as the heads of the other drafters are.
    """

    look_ahead: Sequence[int] = ()

    def __init__(self, bundle: Bundle, parameters: SamplingParameters):
        self.depth = bundle.n_tokens - 1
        self._parameters = parameters

    def start(self, step: Step, judged: int, accepted: int) -> bool:
        """The joint head's rows are those of the last final token and of every draft fed."""
        logits, ids = step.factor_topk()
        k = self._parameters.top_k or logits.shape[-1]
        self._ids = ids[accepted, :, :, :k]
        scaled = logits[accepted, :, :, :k].astype(np.float64) / (self._parameters.temperature or 1.0)
        likelihood = np.exp(scaled - scaled[:, :, :1])
        self._probabilities = likelihood / likelihood.sum(-1, keepdims=True)
        log_w = step.gate()[accepted].astype(np.float64)
        self._weights = np.exp(log_w - log_w.max())
        return True

    def candidates(self, depth: int, token: int) -> Candidates:
        """Σ_α w_α p_α^(depth+1), after `token` has been accounted for as x_depth."""
        before, factor = depth - 1, depth  # places of x_depth and of x_(depth+1)
        likely = np.where(self._ids[before] == token, self._probabilities[before], 0.0).sum(-1)
        if (self._weights * likely).any():  # else no factor's truncation has it, and it tells nothing
            self._weights = self._weights * likely
        self._weights = self._weights / self._weights.sum()
        ids, place = np.unique(self._ids[factor], return_inverse=True)
        values = self._weights[:, None] * self._probabilities[factor]
        return Candidates(ids, np.bincount(place.ravel(), values.ravel(), len(ids)))


class LookAhead:
    """The base itself guesses at the places of look-ahead tokens behind the text (PaSS, Monea et al. 2023).

    They stand behind the drafts, so if one of those is rejected they have seen a text that does not exist: the pass
    holds no guesses then.
    """

    def __init__(self, bundle: Bundle, parameters: SamplingParameters):
        self.depth = len(bundle.look_ahead)
        if parameters.draft_tokens:
            self.depth = min(self.depth, parameters.draft_tokens)
        self.look_ahead: Sequence[int] = bundle.look_ahead[: self.depth]
        self._parameters = parameters

    def start(self, step: Step, judged: int, accepted: int) -> bool:
        """The look-ahead rows follow those of the last final token and of every draft fed."""
        self._step, self._first = step, judged + 1
        return accepted == judged

    def candidates(self, depth: int, token: int) -> Candidates:
        """The base's own distribution at look-ahead token `depth`."""
        logits, ids = self._step.topk()
        if self._first + depth > len(ids):  # the context ends: not all look-ahead tokens were fed
            return Candidates(np.empty(0, np.int64), np.empty(0))
        row = self._first + depth - 1
        return truncate(logits[row], ids[row], self._parameters)


DRAFTERS: dict[str, type[ParallelHeads] | type[JointHead] | type[LookAhead]] = {
    "parallel": ParallelHeads,
    "cp": JointHead,
    "lookahead": LookAhead,
}


def make_drafter(bundle: Bundle, parameters: SamplingParameters) -> Drafter:
    """The drafter of a bundle.

    Raises:
        ParameterError: It has none, or not as many drafts as are asked for.
    """
    if bundle.kind not in DRAFTERS:
        raise ParameterError("strategy speculative needs a bundle with a drafter, and this is a plain one")
    drafter = DRAFTERS[bundle.kind](bundle, parameters)
    if parameters.draft_tokens >= bundle.n_tokens:
        raise ParameterError(
            f"draft_tokens must be from 1 to {bundle.n_tokens - 1} for this bundle, not {parameters.draft_tokens}"
        )
    return drafter


def propose(
    drafter: Drafter,
    token: int,
    parameters: SamplingParameters,
    counts: Cooccurrence | None,
    rng: np.random.Generator,
    worth: Callable[[Sequence[float]], bool],
) -> list[Draft]:
    """Draft what follows `token`, the newest final one, as far as it is worth while.

    That is settled before a draft is drawn. If it depended on what was drawn, drafts that are judged would not be
    distributed as the drafter says, and verification would not be exact.

    With counts, what the drafter says of a token is multiplied by the co-occurrence mask of the pair that it would end
    (DynaMo, Eq. 3 and 6, whose first token is settled here): ``f(x_i) · (p̂(x_{i-1}, x_i) / p̂(x_i))^α_c``.

    Args:
        drafter: Turned to the pass.
        token: x_1.
        parameters: Those whose names begin with draft_.
        counts: For the mask, or None.
        rng: For sampled drafts.
        worth: From the confidences of all drafts up to the next to whether that is to be drawn.
    """
    drafts: list[Draft] = []
    confidences: list[float] = []
    for depth in range(1, (parameters.draft_tokens or drafter.depth) + 1):
        found = drafter.candidates(depth, token)
        if counts is not None:
            found = masked(found, token, counts, parameters.draft_cooccurrence_weight)
        if len(found.ids) == 0:
            break
        certain = parameters.draft_choice == "argmax"
        best = int(np.argmax(found.probabilities))
        # Of a draft still to be drawn: how likely two draws are the same.
        agreement = found.probabilities[best] if certain else (found.probabilities**2).sum()
        confidences.append(float(agreement))
        if not worth(confidences):
            break
        index = best if certain else draw(found.probabilities, rng.random())
        token = int(found.ids[index])
        drafts.append(Draft(token, None if certain else found, confidences[-1]))
    return drafts


def masked(candidates: Candidates, before: int, counts: Cooccurrence, alpha: float) -> Candidates:
    """Candidates weighed by how much more often than by chance they were counted behind the token `before`.

    If none of them ever was, they stay as they are.

    Args:
        candidates: f.
        before: x_(i-1).
        counts: n-grams.
        alpha: α_c.
    """
    _, rank, nodes = counts.extend(2, np.array([before]), candidates.ids)
    lift = counts.frequency(2, nodes) / counts.unigram[candidates.ids[rank]]
    weights = candidates.probabilities[rank] * lift**alpha
    if not weights.any():
        return candidates
    return Candidates(candidates.ids[rank], weights / weights.sum())
