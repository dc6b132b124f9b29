"""Decoding strategies: what to ask of a forward pass, and which tokens it lets through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .bundle import Bundle
from .dynamo import check_dynamo, sample_ngram
from .errors import ParameterError
from .parameters import SamplingParameters
from .sampling import (
    Candidates,
    Context,
    LogitsProcessor,
    apply_processors,
    make_sampler,
    sort_logits,
    truncate,
)
from .session import Step


@dataclass(frozen=True)
class Turn:
    """What a strategy makes of one pass.

    Attributes:
        tokens: New tokens, final. Their keys and values are not in the cache yet: the next pass feeds them.
        accepted: How many of the drafts that the pass was fed are final as well; the cache rolls back behind
            them.
        drafts: Guesses for the tokens after `tokens`, to be fed with them and judged by the next turn.
    """

    tokens: list[int]
    accepted: int = 0
    drafts: list[int] = field(default_factory=list)


class Strategy(Protocol):
    """A drafter and an acceptance rule on the step that all strategies share.

    Every pass is fed the final tokens that the cache does not hold yet, then the drafts; `rows` and
    `head_rows` say which of its rows the strategy reads, `advance` judges the drafts and adds tokens and
    further drafts.
    """

    name: str

    def rows(self, drafted: int) -> int:
        """How many last rows of the first head to compute, given the number of drafts fed; >= 1."""

    def head_rows(self, fed: int, drafted: int) -> Sequence[int] | None:
        """Which of the `fed` rows of the further heads to compute; None means the last."""

    def advance(self, step: Step, context: Context, drafts: Sequence[int], rng: np.random.Generator) -> Turn:
        """Judge the drafts by this pass and go on from the last accepted one.

        `context` holds final tokens only.
        """


class Autoregressive:
    """One token a pass, from the first head."""

    name = "autoregressive"

    def __init__(self, bundle: Bundle, parameters: SamplingParameters, processors: Sequence[LogitsProcessor] = ()):
        self._sample = make_sampler(parameters, processors)

    def rows(self, drafted: int) -> int:
        """The last row."""
        return 1

    def head_rows(self, fed: int, drafted: int) -> Sequence[int] | None:
        """The last row."""
        return None

    def advance(self, step: Step, context: Context, drafts: Sequence[int], rng: np.random.Generator) -> Turn:
        """Sample the next token."""
        return Turn([self._sample(step, context, rng.random())])


class Dynamo:
    """Dynamic multi-token sampling (DynaMo, Alg. 1): 1 to n tokens a pass, emitted without verification."""

    name = "dynamo"

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

    def rows(self, drafted: int) -> int:
        """The last row."""
        return 1

    def head_rows(self, fed: int, drafted: int) -> Sequence[int] | None:
        """The last row."""
        return None

    def advance(self, step: Step, context: Context, drafts: Sequence[int], rng: np.random.Generator) -> Turn:
        """Run Alg. 1 on the last row of every head."""
        heads = [self._candidates(step, head, context) for head in self._heads]
        ngram = sample_ngram(heads, context.seen, rng.random(), self._parameters, self._counts)
        return Turn(ngram.tokens)

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
    """`dynamo` for a bundle with several heads, else `autoregressive`."""
    return Dynamo.name if bundle.n_heads > 1 else Autoregressive.name
