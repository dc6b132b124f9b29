"""What a bundle holds besides its base model: whatever predicts further tokens, and where it stands in the graph.

There is one class for every way of predicting, each in the module of its drafter, and `registry.TOPOLOGIES` has them
all. Whoever needs to know about layers, inputs, outputs or rows asks the topology, and never which one it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from .names import HEAD_ROWS
from .scores import Scores, negative_log_likelihood
from .step import Step


class Holder(Protocol):
    """Whatever holds a topology: a bundle, as those below it see it.

    Attributes:
        topology: What predicts further tokens.
        vocab_size: V.
        look_ahead: Ids of the look-ahead tokens, which follow the vocabulary's; empty where there are none.
    """

    @property
    def topology(self) -> Topology:
        """See above."""

    @property
    def vocab_size(self) -> int:
        """See above."""

    @property
    def look_ahead(self) -> range:
        """See above."""


@dataclass(frozen=True)
class Topology:
    """What a bundle holds besides its base; this class itself says "nothing", and a subclass what it adds.

    Its fields are whole numbers, and stand in the manifest under their names.

    Attributes:
        kind: What manifests, reports and the command line call it.
        least: Smallest value of every field.
        independent: Whether the joint distribution of all tokens is the product of what is said of each.
    """

    kind: ClassVar[str]
    least: ClassVar[Mapping[str, int]] = {}
    independent: ClassVar[bool] = True

    @classmethod
    def sizes_in_version_2(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a bundle whose manifest is of version 2, where they stood among all others."""
        return {name: content.get(name) for name in cls.least}

    @property
    def n_tokens(self) -> int:
        """Tokens that one pass predicts, the base's own among them."""
        return self.n_heads

    @property
    def n_heads(self) -> int:
        """Token heads whose logits are predictions of their own, the base's head among them."""
        return 1

    @property
    def layers(self) -> int:
        """Attention layers that only further tokens need: the last ones of the graph."""
        return 0

    @property
    def weight_layers(self) -> int:
        """About how many layers' weights a pass reads more for further tokens; for rules of thumb."""
        return self.layers

    @property
    def parts(self) -> int:
        """Rows of the logits that the graph puts out for one row of its heads, behind those of the first head."""
        return 0

    @property
    def look_ahead(self) -> int:
        """Ids behind the vocabulary that may be fed though they are no text."""
        return 0

    @property
    def inputs(self) -> list[str]:
        """Further inputs of the graph that a pass may be given."""
        return [HEAD_ROWS] if self.has_head_rows else []

    @property
    def outputs(self) -> dict[str, int]:
        """Further outputs of a pass with heads, by name: width of their last axis."""
        return {}

    @property
    def has_head_rows(self) -> bool:
        """Whether the graph has heads whose rows are chosen apart from the first head's."""
        return self.parts > 0

    def score(self, step: Step, targets: np.ndarray) -> Scores:
        """Return how likely a pass finds what follows.

        Args:
            step: With rows of all heads.
            targets: x_{t+1} … x_{t+n} behind every row t, [n_tokens, rows].
        """
        ahead = step.ahead() if len(targets) > 1 else None
        logits = [step.logits()]
        logits += [ahead.logits(part, before.tolist()) for part, before in enumerate(targets[:-1]) if ahead is not None]
        nll = np.array([negative_log_likelihood(each, row) for each, row in zip(logits, targets, strict=True)])
        return Scores(nll, nll.sum(0), np.array([each.argmax(-1) for each in logits]))


@dataclass(frozen=True)
class Plain(Topology):
    """The base model alone."""

    kind = "plain"
