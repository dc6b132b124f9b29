"""Joint heads by CP tensor decomposition (Basharin, Chertkov, Oseledets 2024): a mixture of r products of factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .drafting import Ask, Guesses, Passed
from .names import GATE
from .parameters import SamplingParameters
from .sampling import Candidates
from .scores import Scores, log_softmax, log_sum, negative_log_likelihood
from .step import Ahead, Step
from .topology import Holder, Topology


@dataclass(frozen=True)
class JointHead(Topology):
    """One layer, a gate and n · r factors over it: `Σ_α w_α Π_s p_α^(s)(x_{t+s})`, whose first token is the base's.

    Attributes:
        rank: Components r.
    """

    n_tokens: int = 2
    rank: int = 1

    kind = "cp"
    independent = False
    least: ClassVar[Mapping[str, int]] = {"n_tokens": 2, "rank": 1}

    @property
    def layers(self) -> int:
        """The one whose state the mixture is made of."""
        return 1

    @property
    def weight_layers(self) -> int:
        """The layer, and as much again for the factors."""
        return 2

    @property
    def parts(self) -> int:
        """A row of every factor."""
        return self.n_tokens * self.rank

    @property
    def outputs(self) -> dict[str, int]:
        """The gate."""
        return {GATE: self.rank}

    def gate(self, ahead: Ahead) -> np.ndarray:
        """Return the log w_α of the components, [rows, rank]."""
        return ahead.output(GATE)

    def factors(self, ahead: Ahead) -> np.ndarray:
        """Return logits of every factor p_α^(s), [rows, n_tokens, rank, vocab]."""
        return self._by_factor([ahead.logits(part) for part in range(self.parts)])

    def factor_topk(self, ahead: Ahead) -> tuple[np.ndarray, np.ndarray]:
        """Return every factor's largest logits and their ids, both [rows, n_tokens, rank, K], descending."""
        values, ids = zip(*(ahead.topk(part) for part in range(self.parts)), strict=True)
        return self._by_factor(values), self._by_factor(ids)

    def score(self, step: Step, targets: np.ndarray) -> Scores:
        """See `Topology`; tokens after the first are told by their marginals."""
        ahead = step.ahead()
        log_w = self.gate(ahead).astype(np.float64)  # [rows, rank]
        factors = self.factors(ahead)
        log_p = np.array([log_softmax(factors[:, i]) for i in range(len(targets))])  # [n, rows, rank, vocab]
        found = np.take_along_axis(log_p, targets[:, :, None, None], -1)[..., 0]  # [n, rows, rank]
        nll, choices = -log_sum(log_w + found), (np.exp(log_p) * np.exp(log_w)[:, :, None]).sum(2).argmax(-1)
        nll[0], choices[0] = negative_log_likelihood(step.logits(), targets[0]), step.logits().argmax(-1)
        return Scores(nll, -log_sum(log_w + found.sum(0)), choices)

    def _by_factor(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Parts [rows, width] as [rows, n_tokens, rank, width]."""
        rows = np.stack(parts, axis=1)
        return rows.reshape(len(rows), self.n_tokens, self.rank, rows.shape[-1])


class JointDrafter:
    """Draws from the mixture token by token.

    With every token that is chosen the components are weighted anew by how likely each had made it,
    `w_α ← w_α p_α^(s)(x_s)`: what comes next depends on what was drafted, and its probability is known. The
    factors are truncated to their most probable tokens, as the heads of the other drafters are.
    """

    ask = Ask(heads=True)

    def __init__(self, bundle: Holder, parameters: SamplingParameters):
        assert isinstance(bundle.topology, JointHead)  # the registry's
        self._joint = bundle.topology
        self.depth = self._joint.n_tokens - 1
        self._parameters = parameters

    def guess(self, passed: Passed) -> Guesses:
        """Σ_α w_α p_α^(s) of the row that the text goes on from, given the tokens chosen before x_s."""
        ahead = passed.step.ahead(passed.accepted)
        logits, ids = (each[0] for each in self._joint.factor_topk(ahead))  # [n_tokens, rank, K]
        k = self._parameters.top_k or logits.shape[-1]
        ids = ids[:, :, :k]
        scaled = logits[:, :, :k].astype(np.float64) / (self._parameters.temperature or 1.0)
        likelihood = np.exp(scaled - scaled[:, :, :1])
        probabilities = likelihood / likelihood.sum(-1, keepdims=True)
        log_w = self._joint.gate(ahead)[0].astype(np.float64)
        prior = np.exp(log_w - log_w.max())

        def candidates(chosen: Sequence[int]) -> Candidates:
            weights = prior
            for place, token in enumerate(chosen):
                likely = np.where(ids[place] == token, probabilities[place], 0.0).sum(-1)
                if (weights * likely).any():  # else no factor's truncation has it, and it tells nothing
                    weights = weights * likely
                weights = weights / weights.sum()
            factor = len(chosen)
            tokens, place_of = np.unique(ids[factor], return_inverse=True)
            values = weights[:, None] * probabilities[factor]
            return Candidates(tokens, np.bincount(place_of.ravel(), values.ravel(), len(tokens)))

        return candidates
