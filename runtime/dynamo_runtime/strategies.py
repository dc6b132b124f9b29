"""Decoding strategies: what to ask of a forward pass, and which tokens it lets through."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .bundle import Bundle
from .device.plan import Acceptances, Knowledge, Planner
from .drafters import make_drafter, propose
from .dynamo import check_dynamo, emitted_length, sample_ngram
from .errors import ParameterError
from .parameters import SamplingParameters
from .sampling import (
    Candidates,
    Context,
    LogitsProcessor,
    Target,
    apply_processors,
    sort_logits,
    truncate,
)
from .session import Step
from .verification import Draft, verify


@dataclass(frozen=True)
class Turn:
    """What a strategy makes of one pass.

    Attributes:
        tokens: New tokens, final. Their keys and values are not in the cache yet: the next pass feeds them.
        accepted: How many of the drafts that the pass was fed are final as well; the cache rolls back behind
            them.
        drafts: Guesses for the tokens after `tokens`, to be fed with them and judged by the next turn.
        weighed: Further tokens that were guessed and judged on the spot, without being fed; those let through
            are in `tokens`, behind the first.
    """

    tokens: list[int]
    accepted: int = 0
    drafts: list[Draft] = field(default_factory=list)
    weighed: int = 0


class Strategy(Protocol):
    """A drafter and an acceptance rule on the step that all strategies share.

    Every pass is fed the final tokens that the cache does not hold yet, then the drafts, then `look_ahead`. The step
    has one row of the first head for the last final token, one for every draft and one for every id of `look_ahead`;
    of the further heads it has those of them that stand before `look_ahead`.

    Attributes:
        name: What the user calls it.
        look_ahead: Ids fed behind the text for the drafter's sake, and never kept.
        reads_heads: Whether the next step is read for more than the first head; else further heads are left out of it.
    """

    name: str
    look_ahead: Sequence[int]
    reads_heads: bool

    def advance(self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator) -> Turn:
        """Judge the drafts by this pass and go on from the last accepted one.

        `context` holds final tokens only.
        """


class Autoregressive:
    """One token a pass, from the first head."""

    name = "autoregressive"
    look_ahead: Sequence[int] = ()
    reads_heads = False

    def __init__(self, bundle: Bundle, parameters: SamplingParameters, processors: Sequence[LogitsProcessor] = ()):
        self._target = Target(parameters, processors)

    def advance(self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator) -> Turn:
        """Sample the next token."""
        return Turn([self._target.sample(step, context, rng.random())])


class Speculative:
    """The text of `autoregressive`, sooner: drafts that the first head verifies in the pass that follows.

    The cache has to read the new tokens anyway, so reading the drafts behind them costs next to nothing.
    """

    name = "speculative"

    def __init__(self, bundle: Bundle, parameters: SamplingParameters, processors: Sequence[LogitsProcessor] = ()):
        self._target = Target(parameters, processors)
        self._drafter = make_drafter(bundle, parameters)
        self.look_ahead = self._drafter.look_ahead
        self.reads_heads = bundle.has_head_rows
        masked = parameters.draft_cooccurrence_weight > 0 and bundle.has_cooccurrence
        self._counts = bundle.cooccurrence if masked else None
        self._parameters = parameters

    def advance(self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator) -> Turn:
        """Verify the drafts, add the token that follows them, and draft on from there."""
        accepted, token = self._verify(step, context, drafts, rng)
        return Turn([token], accepted, self._propose(step, len(drafts), accepted, token, rng))

    def _verify(
        self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator
    ) -> tuple[int, int]:
        if not drafts:
            return 0, self._target.sample(step, context, rng.random(), 0)
        trial = context.fork()

        def target(accepted: int) -> Candidates:
            if accepted:
                trial.extend([drafts[accepted - 1].token])
            return self._target.distribution(step, trial, accepted)

        return verify(drafts, target, rng.random)

    def _propose(self, step: Step, judged: int, accepted: int, token: int, rng: np.random.Generator) -> list[Draft]:
        if not self._drafter.start(step, judged, accepted):
            return []
        return propose(self._drafter, token, self._parameters, self._counts, rng, self._worth)

    def _worth(self, confidences: Sequence[float]) -> bool:
        return math.prod(confidences) >= self._parameters.draft_confidence


class Auto(Speculative):
    """`speculative` with as many drafts as are expected to pay on this device and in this text, none if none does."""

    name = "auto"

    def __init__(
        self,
        bundle: Bundle,
        parameters: SamplingParameters,
        processors: Sequence[LogitsProcessor] = (),
        knowledge: Knowledge | None = None,
    ):
        """Plan with what the device has been measured to cost, or else with what such devices usually do.

        Args:
            bundle: With a drafter.
            parameters: Those whose names begin with draft_, and the target's.
            processors: Of the target's logits.
            knowledge: Of the device and the drafter.
        """
        super().__init__(bundle, parameters, processors)
        depth = min(parameters.draft_tokens or self._drafter.depth, self._drafter.depth)
        self._ahead = self.look_ahead
        knowledge = knowledge or Knowledge.of(bundle, None)
        acceptances = Acceptances(depth, knowledge.drafts_at(parameters.temperature))
        self._planner = Planner(knowledge.costs, acceptances, len(self._ahead))
        self._has_heads = bundle.has_head_rows
        self._follow()

    def advance(self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator) -> Turn:
        """Verify what drafts there are, draft on if the pass was asked for drafts, and plan the next."""
        planner = self._planner
        accepted, token = self._verify(step, context, drafts, rng)
        if drafts:
            planner.acceptances.add([draft.confidence for draft in drafts], accepted)
        if not planner.drafting:
            if planner.wait():
                self._follow()
            return Turn([token], accepted)
        following = self._propose(step, len(drafts), accepted, token, rng)
        planner.plan([draft.confidence for draft in following], len(context.tokens) + len(drafts))
        self._follow()
        return Turn([token], accepted, following)

    def _worth(self, confidences: Sequence[float]) -> bool:
        return super()._worth(confidences) and self._planner.worth(confidences)

    def _follow(self) -> None:
        """Have the next pass computed as planned."""
        drafting = self._planner.drafting
        self.reads_heads = drafting and self._has_heads
        self.look_ahead = self._ahead if drafting else ()


class Dynamo:
    """Dynamic multi-token sampling (DynaMo, Alg. 1): 1 to n tokens a pass, emitted without verification."""

    name = "dynamo"
    look_ahead: Sequence[int] = ()
    reads_heads = True

    def __init__(self, bundle: Bundle, parameters: SamplingParameters, processors: Sequence[LogitsProcessor] = ()):
        if bundle.n_heads < 2:
            raise ParameterError("strategy dynamo needs a graph with several heads, and this one has only the first")
        counted = parameters.cooccurrence_weight > 0 and bundle.has_cooccurrence
        self._counts = bundle.cooccurrence if counted else None
        check_dynamo(parameters, bundle.n_heads, self._counts)
        self._heads = range(1, bundle.n_heads + 1)
        self._parameters = parameters
        self._processors = processors
        # Without processors the truncated set is exactly the first k of the graph's top-K outputs.
        self._full_rows = bool(processors) or parameters.top_k > bundle.top_k_outputs

    def advance(self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator) -> Turn:
        """Run Alg. 1 on the last row of every head."""
        heads = self._candidates(step, context, -1)
        ngram = sample_ngram(heads, context.seen, rng.random(), self._parameters, self._counts)
        return Turn(ngram.tokens, weighed=len(heads) - 1)

    def length(self, step: Step, context: Context, row: int, following: int) -> int:
        """How many tokens Alg. 1 emits between `context`, which ends with one row of a pass, and a `following` text."""
        heads = self._candidates(step, context, row)
        return emitted_length(heads, context.seen, following, self._parameters, self._counts)

    def _candidates(self, step: Step, context: Context, row: int) -> list[Candidates]:
        """f^1 … f^n of one row, truncated."""
        return [truncate(*self._largest(step, head, context, row), self._parameters) for head in self._heads]

    def _largest(self, step: Step, head: int, context: Context, row: int) -> tuple[np.ndarray, np.ndarray]:
        if self._full_rows:
            logits = apply_processors(self._processors, context.tokens, step.logits(head)[row])
            return sort_logits(logits, self._parameters.top_k)
        logits, ids = step.topk(head)
        return logits[row], ids[row]


STRATEGIES: dict[str, type[Autoregressive] | type[Dynamo] | type[Speculative]] = {
    strategy.name: strategy for strategy in (Auto, Autoregressive, Dynamo, Speculative)
}


def make_strategy(
    name: str,
    bundle: Bundle,
    parameters: SamplingParameters,
    processors: Sequence[LogitsProcessor] = (),
    knowledge: Knowledge | None = None,
) -> Strategy:
    """A strategy by name.

    Args:
        name: One of `STRATEGIES`. "auto" is "autoregressive" where nothing can be drafted, or not without changing the
            text.
        bundle: What it runs on.
        parameters: Of all strategies.
        processors: Of the logits.
        knowledge: Of the device, for "auto".

    Raises:
        ParameterError: There is none of that name, or it does not fit the bundle or the parameters.
    """
    if name not in STRATEGIES:
        raise ParameterError(f"unknown strategy {name!r}: choose {' or '.join(STRATEGIES)}")
    if name == Auto.name:
        if bundle.kind == "plain" or not bundle.lossless:
            return Autoregressive(bundle, parameters, processors)
        return Auto(bundle, parameters, processors, knowledge)
    return STRATEGIES[name](bundle, parameters, processors)
