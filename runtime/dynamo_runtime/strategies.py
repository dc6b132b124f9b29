"""Decoding strategies: what to ask of a forward pass, and which tokens it lets through."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from .bundle import Bundle
from .device.copying import NO_CHAIN, Chain, Copying
from .device.costs import Knowledge
from .device.plan import Planner
from .drafting import NOTHING, Ask, Drafter, Passed, Proposer
from .dynamo import check_dynamo, choose_first, emitted_length, sample_ngram
from .errors import ParameterError
from .parameters import DRAFTS_ONLY, DYNAMO_ONLY, TARGET, SamplingParameters
from .registry import make_sources
from .repeats import Occurrences
from .sampling import (
    Candidates,
    Context,
    LogitsProcessor,
    Target,
    apply_processors,
    sort_logits,
    truncate,
)
from .step import Step
from .verification import Draft, agreement, verify

TARGET_SPEEDUP = "target_speedup"
"""Name of the option that may be given in place of a back-off threshold: see `Engine.stream`."""


class Turn(NamedTuple):
    """What a strategy makes of one pass, and what it wants of the next.

    Attributes:
        tokens: New tokens, final. Their keys and values are not in the cache yet: the next pass feeds them.
        accepted: How many of the drafts that the pass was fed are final as well; the cache rolls back behind
            them.
        drafts: Guesses for the tokens after `tokens`, to be fed with them and judged by the next turn.
        ask: What the next pass is to be fed and to compute besides.
        proposed: Further tokens that were guessed and judged on the spot, without being fed; those let through
            are in `tokens`, behind the first.
    """

    tokens: list[int]
    accepted: int = 0
    drafts: Sequence[Draft] = ()
    ask: Ask = NOTHING
    proposed: int = 0


class Strategy(Protocol):
    """A drafter and an acceptance rule on the step that all strategies share.

    Every pass is fed the final tokens that the cache does not hold yet, then the drafts, then look-ahead ids if they
    were asked for. The step has one row of the first head for the last final token, one for every draft and one for
    every look-ahead id; of further heads, if asked for, those that stand before the look-ahead ids.

    Attributes:
        name: What the user calls it.
        ask: What the first pass is to be fed and to compute besides.
    """

    name: str

    @property
    def ask(self) -> Ask:
        """What the first pass is to be fed and to compute besides."""

    def advance(self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator) -> Turn:
        """Judge the drafts by this pass and go on from the last accepted one.

        `context` holds final tokens only.
        """


class Autoregressive:
    """One token a pass, from the first head."""

    name = "autoregressive"
    reads: ClassVar[Collection[str]] = TARGET
    ask = NOTHING

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
    reads: ClassVar[Collection[str]] = TARGET | DRAFTS_ONLY
    all_drafters: ClassVar[bool] = False
    """Whether it drafts from both the text and the bundle's own drafter where no drafter is named."""

    def __init__(
        self,
        bundle: Bundle,
        parameters: SamplingParameters,
        processors: Sequence[LogitsProcessor] = (),
        drafter: str | Drafter | None = None,
        corpus: Occurrences | None = None,
    ):
        """Take a drafter.

        Args:
            bundle: What runs.
            parameters: Those whose names begin with draft_, and the target's.
            processors: Of the target's logits.
            drafter: One of `registry.DRAFTERS` by name, "both", or one of your own; None is the bundle's, or the text
                where it has none.
            corpus: Earlier texts for the drafter "lookup".
        """
        self._target = Target(parameters, processors)
        self._sources = make_sources(bundle, parameters, drafter, all_there_are=self.all_drafters, corpus=corpus)
        own, name, self._lookup = self._sources
        masked = parameters.draft_cooccurrence_weight > 0 and bundle.has_cooccurrence
        counts = bundle.cooccurrence if masked and own is not None else None
        self._proposer = Proposer(own, parameters, counts, name=name, repeats=self._lookup)
        self._parameters = parameters

    @property
    def ask(self) -> Ask:
        """What the drafter wants of the next pass."""
        return NOTHING if self._sources.drafter is None else self._sources.drafter.ask

    def advance(self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator) -> Turn:
        """Verify the drafts, add the token that follows them, and draft on from there."""
        passed = self._judge(step, context, drafts, rng)
        if self._lookup is not None:
            self._lookup.follow(passed)
        following = self._proposer.propose(passed, rng, self._worth)
        return Turn(passed.final[-1:], passed.accepted, following, self.ask)

    def _judge(self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator) -> Passed:
        """Return the pass with what it makes final: the drafts that stand, and the target's token behind them."""
        if not drafts:
            return Passed(step, context, [self._target.sample(step, context, rng.random(), 0)], 0)
        accepted, token = self._verify(step, context, drafts, rng)
        return Passed(step, context, [*(draft.token for draft in drafts[:accepted]), token], len(drafts))

    def _verify(
        self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator
    ) -> tuple[int, int]:
        """Return how many drafts stand, and the token behind them."""
        if (certain := self._target.certain(step)) is not None:
            return agreement(drafts, certain)
        reads = self._target.reads_context
        trial = context.fork() if reads else context

        def target(accepted: int) -> Candidates:
            if reads and accepted:
                trial.extend([drafts[accepted - 1].token])
            return self._target.distribution(step, trial, accepted)

        return verify(drafts, target, rng.random)

    def _worth(self, confidences: Sequence[float]) -> bool:
        return math.prod(confidences) >= self._parameters.draft_confidence


class Auto(Speculative):
    """`speculative` with as many drafts as are expected to pay on this device and in this text.

    Where no draft is expected to pay, it drafts nothing.
    """

    name = "auto"
    all_drafters = True

    def __init__(
        self,
        bundle: Bundle,
        parameters: SamplingParameters,
        processors: Sequence[LogitsProcessor] = (),
        drafter: str | Drafter | None = None,
        knowledge: Knowledge | None = None,
        corpus: Occurrences | None = None,
    ):
        """Plan with what the device has been measured to cost, or else with what such devices usually do.

        Args:
            bundle: What runs.
            parameters: Those whose names begin with draft_, and the target's.
            processors: Of the target's logits.
            drafter: See `Speculative`; None is the text and the bundle's own drafter, where it has one.
            knowledge: Of the device and the drafter.
            corpus: See `Speculative`.
        """
        super().__init__(bundle, parameters, processors, drafter, corpus)
        knowledge = knowledge or Knowledge.of(bundle, None)
        own, name, lookup = self._sources
        if name != bundle.topology.kind:  # what was counted of drafts is of the bundle's own
            knowledge = Knowledge(knowledge.costs, {})
        self._planner: Planner | None = None
        self.copying: Copying | None = None
        if own is not None:
            acceptances = knowledge.acceptances(self._proposer.guessed, parameters.temperature)
            self._planner = Planner(knowledge.costs, acceptances, own.ask, most=self._proposer.depth)
        if lookup is not None:
            self.copying = Copying(knowledge.costs, min(self._proposer.depth, lookup.depth), lookup.name)

    @property
    def ask(self) -> Ask:
        """What the drafter wants of the next pass if that pass is to yield drafts; else nothing."""
        return super().ask if self._planner is not None and self._planner.drafting else NOTHING

    def advance(self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator) -> Turn:
        """Verify the drafts there are, draft on if this pass is to yield drafts, and plan the next pass.

        If the drafter has a graph of its own, that graph is run here and nowhere else; so it is run only if the plan
        wants drafts.
        """
        planner = self._planner
        passed = self._judge(step, context, drafts, rng)
        token, accepted, past = passed.final[-1:], passed.accepted, len(context.tokens)
        if planner is not None:
            planner.judged([draft.confidence for draft in drafts], accepted)
        chain = self._repeated(passed, drafts)
        if planner is None:
            return Turn(token, accepted, chain.drafts)
        if not planner.drafting:
            planner.wait(past)
            return Turn(token, accepted, chain.drafts, self.ask)
        if chain.drafts and planner.runs and chain.rate > planner.rate:
            return Turn(token, accepted, chain.drafts, self.ask)
        may_repeat = self.copying is not None and self.copying.may_try
        following = self._proposer.propose(
            passed, rng, self._worth, planner.further, planner.acceptances.of, may_repeat=may_repeat
        )
        confidences = [draft.confidence for draft in following]
        planner.plan(confidences, past + len(drafts), instead=chain.gain)
        return Turn(token, accepted, following, self.ask)

    def _repeated(self, passed: Passed, drafts: Sequence[Draft]) -> Chain:
        """Return the drafts to feed if the next pass is fed nothing but what the text repeats."""
        lookup, copying = self._lookup, self.copying
        if lookup is None or copying is None:
            return NO_CHAIN
        copying.judged(drafts, passed.final)
        lookup.follow(passed)
        return copying.chain(lookup.ahead(), len(passed.context.tokens), self._parameters.draft_confidence)

    def _worth(self, confidences: Sequence[float]) -> bool:
        assert self._planner is not None  # else nothing is proposed
        return self._planner.worth(confidences) and super()._worth(confidences)  # the plan counts drafts made


class Dynamo:
    """Dynamic multi-token sampling (DynaMo, Alg. 1): 1 to n tokens a pass, emitted without verification."""

    name = "dynamo"
    reads: ClassVar[Collection[str]] = TARGET | DYNAMO_ONLY | {TARGET_SPEEDUP}
    ask = Ask(heads=True)

    def __init__(self, bundle: Bundle, parameters: SamplingParameters, processors: Sequence[LogitsProcessor] = ()):
        n_heads = bundle.topology.n_heads
        if not self.fits(bundle):
            raise ParameterError(
                "strategy dynamo needs a graph with several heads (parallel ones), and this one has only the first"
            )
        counted = parameters.cooccurrence_weight > 0 and bundle.has_cooccurrence
        self._counts = bundle.cooccurrence if counted else None
        check_dynamo(parameters, n_heads, self._counts)
        self._n_heads = n_heads
        self._parameters = parameters
        self._processors = processors
        # Without processors the truncated set is exactly the first k of the graph's top-K outputs.
        most = min(bundle.top_k_outputs, bundle.drafter.top_k_outputs if bundle.drafter else bundle.top_k_outputs)
        self._full_rows = bool(processors) or parameters.top_k > most

    @staticmethod
    def fits(bundle: Bundle) -> bool:
        """Tell whether a bundle has several heads, whose joint distribution Alg. 1 samples from."""
        return bundle.topology.n_heads > 1

    def advance(self, step: Step, context: Context, drafts: Sequence[Draft], rng: np.random.Generator) -> Turn:
        """Run Alg. 1 on the last row of every head."""
        uniform = rng.random()
        first = self._first(step, context, -1)
        token = int(first.ids[0])
        if self._parameters.first_token == "base":
            token, _ = choose_first(first, context.seen, uniform, self._parameters)
        heads = [first, *self._further(step, context, -1, token)]
        ngram = sample_ngram(heads, context.seen, uniform, self._parameters, self._counts)
        return Turn(ngram.tokens, ask=self.ask, proposed=len(heads) - 1)

    def length(self, step: Step, context: Context, row: int, following: int) -> int:
        """Return how many tokens Alg. 1 emits behind `context` where the text goes on with the token `following`.

        `row` is the row of the pass that the context ends with.
        """
        first = self._first(step, context, row)
        token = following if self._parameters.first_token == "base" else int(first.ids[0])
        heads = [first, *self._further(step, context, row, token)]
        return emitted_length(heads, context.seen, following, self._parameters, self._counts)

    def _first(self, step: Step, context: Context, row: int) -> Candidates:
        """f^1 of one row, truncated."""
        if self._full_rows:
            return self._truncated(context, step.logits()[row])
        logits, ids = step.topk()
        return truncate(logits[row], ids[row], self._parameters)

    def _further(self, step: Step, context: Context, row: int, token: int) -> Iterator[Candidates]:
        """f^2 … f^n of one row, truncated.

        Heads that are conditioned on the token in front of what they predict are told `token`, which the first head
        gives, and then the most probable one of every head.
        """
        ahead = step.ahead(row)
        for part in range(self._n_heads - 1):
            if self._full_rows:
                found = self._truncated(context, ahead.logits(part, [token])[0])
            else:
                logits, ids = ahead.topk(part, [token])
                found = truncate(logits[0], ids[0], self._parameters)
            yield found
            token = int(found.ids[0])

    def _truncated(self, context: Context, logits: np.ndarray) -> Candidates:
        """Process, sort and truncate a full row of logits [V]."""
        processed = apply_processors(self._processors, context.tokens, logits)
        return truncate(*sort_logits(processed, self._parameters.top_k), self._parameters)
