"""Decoding strategies: what to ask of a forward pass, and which tokens it lets through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .bundle import Bundle
from .drafters import make_drafter, propose
from .dynamo import check_dynamo, sample_ngram
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
        trial = context.fork()

        def target(accepted: int) -> Candidates:
            if accepted:
                trial.extend([drafts[accepted - 1].token])
            return self._target.distribution(step, trial, accepted)

        accepted, token = verify(drafts, target, rng.random)
        following: list[Draft] = []
        if self._drafter.start(step, len(drafts), accepted):
            following = propose(self._drafter, token, self._parameters, self._counts, rng)
        return Turn([token], accepted, following)


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
        heads = [self._candidates(step, head, context) for head in self._heads]
        ngram = sample_ngram(heads, context.seen, rng.random(), self._parameters, self._counts)
        return Turn(ngram.tokens, weighed=len(heads) - 1)

    def _candidates(self, step: Step, head: int, context: Context) -> Candidates:
        if self._full_rows:
            logits = apply_processors(self._processors, context.tokens, step.logits(head)[-1])
            logits, ids = sort_logits(logits, self._parameters.top_k)
        else:
            all_logits, all_ids = step.topk(head)
            logits, ids = all_logits[-1], all_ids[-1]
        return truncate(logits, ids, self._parameters)


STRATEGIES: dict[str, Callable[[Bundle, SamplingParameters, Sequence[LogitsProcessor]], Strategy]] = {
    Autoregressive.name: Autoregressive,
    Dynamo.name: Dynamo,
    Speculative.name: Speculative,
}


def make_strategy(
    name: str, bundle: Bundle, parameters: SamplingParameters, processors: Sequence[LogitsProcessor] = ()
) -> Strategy:
    """A strategy by name.

    Raises:
        ParameterError: There is none of that name, or it does not fit the bundle or the parameters.
    """
    if name not in STRATEGIES:
        raise ParameterError(f"unknown strategy {name!r}: choose {' or '.join(STRATEGIES)}")
    return STRATEGIES[name](bundle, parameters, processors)


def default_strategy(bundle: Bundle) -> str:
    """`dynamo` for parallel heads, `speculative` for other drafters, `autoregressive` for a plain bundle."""
    if bundle.kind == "plain":
        return Autoregressive.name
    return Dynamo.name if bundle.kind == "parallel" else Speculative.name
