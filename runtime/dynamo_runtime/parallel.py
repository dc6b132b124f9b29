"""Parallel token heads (DynaMo, Tuli et al. 2024): one decoder layer each on the state before the base's last layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .drafting import Ask, Guesses, Passed
from .parameters import SamplingParameters
from .sampling import Candidates, Truncated
from .topology import Holder, Topology


@dataclass(frozen=True)
class ParallelHeads(Topology):
    """Token heads that predict the tokens ahead one by one, whatever stands in between; the base's is the first."""

    n_heads: int = 2

    kind = "parallel"
    least: ClassVar[Mapping[str, int]] = {"n_heads": 2}

    @property
    def layers(self) -> int:
        """One for every further head."""
        return self.n_heads - 1

    @property
    def parts(self) -> int:
        """A row of every further head."""
        return self.n_heads - 1


class ParallelDrafter:
    """Head i + 1 of the graph guesses i tokens behind the next one."""

    ask = Ask(heads=True)

    def __init__(self, bundle: Holder, parameters: SamplingParameters):
        self.depth = bundle.topology.n_heads - 1
        self._parameters = parameters

    def guess(self, passed: Passed) -> Guesses:
        """f^2, f^3, … of the row that the text goes on from, truncated."""
        ahead = passed.step.ahead(passed.accepted)

        def candidates(chosen: Sequence[int]) -> Candidates:
            return Truncated(*ahead.largest(len(chosen) - 1, chosen[-1:]), self._parameters)

        return candidates
