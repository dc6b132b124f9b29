"""Drafts: guesses at the tokens behind the next one, which the first head verifies in the pass that follows.

A drafter may guess in any way, as long as a `Draft` tells what it was drawn from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import NamedTuple, Protocol

import numpy as np

from .cooccurrence import Cooccurrence
from .errors import ParameterError
from .parameters import SamplingParameters, check_kind, whole
from .sampling import Candidates, Context, draw
from .step import Step
from .verification import Draft

_ROUNDING = 1e-6  # of probabilities that sum to 1

NO_GUESS = Candidates(np.empty(0, np.int64), np.empty(0))
"""No candidates: a drafter has nothing to say of that place."""

Guesses = Callable[[Sequence[int]], Candidates]
"""Distribution of the token behind those chosen so far: the newest final token, and then every draft as it is chosen.

Of so many tokens chosen, the guess is at that depth: 1 right behind the newest final token.
"""


@dataclass(frozen=True)
class Ask:
    """What a pass is to be fed and to compute for a drafter's sake.

    Attributes:
        heads: Whether rows of the further heads are wanted.
        look_ahead: Ids fed behind the text and never kept.
    """

    heads: bool = False
    look_ahead: Sequence[int] = ()

    def __or__(self, other: Ask) -> Ask:
        """Return what serves both."""
        return Ask(self.heads or other.heads, max(self.look_ahead, other.look_ahead, key=len))


NOTHING = Ask()


class Repeat(NamedTuple):
    """A token that may follow as it did before in the text, and how often such tokens are right."""

    token: int
    expected: float


class Passed(NamedTuple):
    """A pass that has been judged, as a drafter sees it.

    Attributes:
        step: What it said: rows of the first head for the last token that was final before, for every draft it was
            fed, and for look-ahead tokens; of further heads the same without the last.
        context: All tokens that were final before the pass.
        final: Tokens that are final now: the drafts that were accepted, and one of the target's own.
        judged: Drafts that the pass was fed.
    """

    step: Step
    context: Context
    final: list[int]
    judged: int

    @property
    def accepted(self) -> int:
        """How many drafts stand; also the number of the row that gave the newest final token."""
        return len(self.final) - 1


class Drafter(Protocol):
    """Where drafts come from.

    Attributes:
        depth: Most drafts a pass.
        ask: What a pass is to be fed and to compute so that the drafter can guess behind it.
    """

    depth: int
    ask: Ask

    def guess(self, passed: Passed) -> Guesses | None:
        """Guess at what follows `passed.final`; None if this pass tells nothing."""


class Checked:
    """A drafter of somebody's own: its guesses have to be distributions over the vocabulary.

    Attributes:
        depth: The drafter's.
        ask: The drafter's.
    """

    def __init__(self, drafter: Drafter, vocab_size: int):
        name = type(drafter).__name__
        if isinstance(drafter, type):
            raise ParameterError(f"a drafter of your own is an object, not the class {drafter.__name__}")
        for needed in ("depth", "ask", "guess"):
            if not hasattr(drafter, needed):
                raise ParameterError(f"a drafter has depth, ask and guess, and {name} has no {needed}")
        check_kind(f"ask of drafter {name}", drafter.ask, Ask, "an Ask")
        self.depth, self.ask = whole(f"depth of drafter {name}", drafter.depth, 0), drafter.ask
        self._drafter, self._vocab_size = drafter, vocab_size

    def guess(self, passed: Passed) -> Guesses | None:
        """See `Drafter`.

        Raises:
            ParameterError: It gives something else, at once or when a guess is made that is no such distribution.
        """
        guesses, name = self._drafter.guess(passed), type(self._drafter).__name__
        check_kind(f"what drafter {name} guesses with", guesses, (Callable, NoneType), "a function")  # type: ignore[arg-type]

        def candidates(chosen: Sequence[int]) -> Candidates:
            assert guesses is not None
            found = guesses(chosen)
            check_kind(f"a guess of drafter {name}", found, Candidates, "Candidates")
            if len(found.ids):
                self._check(found)
            return found

        return None if guesses is None else candidates

    def _check(self, found: Candidates) -> None:
        drafter, size = f"drafter {type(self._drafter).__name__}", self._vocab_size
        if np.min(found.ids) < 0 or np.max(found.ids) >= size:
            raise ParameterError(f"{drafter} guessed a token that is not one of the {size} of the vocabulary")
        whole = len(found.probabilities) == len(found.ids) and np.min(found.probabilities) >= 0
        if not whole or abs(float(np.sum(found.probabilities)) - 1) > _ROUNDING:
            raise ParameterError(f"{drafter} guessed with probabilities that do not sum to 1")


class Combined:
    """Two drafters as one: at every place the first one's guess where it has any, else the second one's.

    Attributes:
        depth: The larger of theirs.
        ask: What serves both.
    """

    def __init__(self, first: Drafter, second: Drafter):
        self.depth = max(first.depth, second.depth)
        self.ask = first.ask | second.ask
        self._drafters = (first, second)

    def guess(self, passed: Passed) -> Guesses | None:
        """See `Drafter`."""
        found = [(each.depth, guesses) for each in self._drafters if (guesses := each.guess(passed)) is not None]

        def candidates(chosen: Sequence[int]) -> Candidates:
            for depth, guesses in found:
                guess = guesses(chosen) if len(chosen) <= depth else NO_GUESS
                if guess:
                    return guess
            return NO_GUESS

        return candidates if found else None


class Repeats(Protocol):
    """What may follow in a text by what followed in it before: see `lookup.Lookup`."""

    name: str
    depth: int

    @property
    def length(self) -> int:
        """Tokens of the longest match."""

    def follow(self, passed: Passed) -> None:
        """Take what has become final."""

    def ahead(self) -> Iterator[Repeat]:
        """Yield what follows the text, one token after the other."""

    def behind(self, chosen: Sequence[int]) -> Repeat | None:
        """Return what follows the text and some drafts."""


class Proposer:
    """Chooses drafts among a drafter's guesses, and what the text repeats.

    With counts, what the drafter says of a token is multiplied by the co-occurrence mask of the pair that it would end
    (DynaMo, Eq. 3 and 6, whose first token is settled here): `f(x_i) · (p̂(x_{i-1}, x_i) / p̂(x_i))^α_c`.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        parameters: SamplingParameters,
        counts: Cooccurrence | None,
        *,
        name: str = "",
        repeats: Repeats | None = None,
    ):
        """Take a drafter, or what repeats, or both: then each draft is of the one that expects more of its guess.

        Args:
            drafter: Whose guesses they are.
            parameters: Those whose names begin with draft_.
            counts: For the mask, or None.
            name: Of the drafter.
            repeats: Of the text.
        """
        most = max(each.depth for each in (drafter, repeats) if each is not None)
        self.depth = min(parameters.draft_tokens or most, most)
        self.guessed = 0 if drafter is None else min(self.depth, drafter.depth)
        self._drafter, self._repeats, self._name = drafter, repeats, name
        self._parameters = parameters
        self._counts = counts
        self._certain = parameters.draft_choice == "argmax"

    def propose(
        self,
        passed: Passed,
        rng: np.random.Generator,
        worth: Callable[[Sequence[float]], bool],
        further: Callable[[Sequence[float]], bool] = lambda confidences: True,
        expected: Callable[[int, float], float] = lambda depth, confidence: confidence,
        *,
        may_repeat: bool = True,
    ) -> list[Draft]:
        """Draft what follows a pass as far as drafts are worth their cost.

        Whether a draft is worth it is decided before it is drawn: once before the drafter is asked about its place, and
        again with what the drafter says of that place. If the decision depended on what was drawn, the drafts that are
        judged would not be distributed as the drafter says, and verification would not be exact. For the same reason
        it is decided beforehand whose draft it is.

        Args:
            passed: The pass, which `repeats` follows already.
            rng: For sampled drafts.
            worth: From the confidences of all drafts up to the next to whether that is to be drawn.
            further: From the confidences of the drafts there are to whether the drafter is to be asked about the next:
                what is told the draft before it has to be run for that.
            expected: From the depth of a draft and the drafter's confidence in it to its expected acceptance.
            may_repeat: Whether drafts may be what the text repeats.
        """
        guesses = None if self._drafter is None else self._drafter.guess(passed)
        drafts: list[Draft] = []
        confidences: list[float] = []
        chosen = [passed.final[-1]]
        repeated = self._repeated(self._repeats if may_repeat else None)
        while len(drafts) < self.depth:
            if len(drafts) >= self.guessed or (guesses is not None and not further(confidences)):
                guesses = None
            found = NO_GUESS if guesses is None else guesses(chosen)
            if guesses is not None and self._counts is not None:
                found = masked(found, chosen[-1], self._counts, self._parameters.draft_cooccurrence_weight)
            token, confidence = self._chosen(found)
            repeat = repeated(chosen)
            is_repeat = repeat is not None and (not found or repeat.expected > expected(len(chosen), confidence))
            if not found and not is_repeat:
                break
            confidences.append(repeat.expected if is_repeat and repeat is not None else confidence)
            if not worth(confidences):
                break
            if is_repeat and repeat is not None:
                assert self._repeats is not None
                drafts.append(Draft(repeat.token, None, repeat.expected, self._repeats.name))
            else:
                drafts.append(self._drawn(found, token, confidence, rng))
            chosen.append(drafts[-1].token)
        return drafts

    def _chosen(self, found: Candidates) -> tuple[int, float]:
        """Return the draft, -1 if it is still to be drawn, and the confidence in it.

        In what is to be drawn that is the probability that two draws are the same.
        """
        if not found:
            return -1, 0.0
        return found.best if self._certain else (-1, float((found.probabilities**2).sum()))

    def _drawn(self, found: Candidates, token: int, confidence: float, rng: np.random.Generator) -> Draft:
        if self._certain:
            return Draft(token, None, confidence, self._name)
        return Draft(int(found.ids[draw(found.probabilities, rng.random())]), found, confidence, self._name)

    def _repeated(self, repeats: Repeats | None) -> Callable[[Sequence[int]], Repeat | None]:
        """Return what the text repeats behind tokens chosen so far, the newest final one first.

        Alone, it is drafted no further than the match behind it is long.
        """
        if repeats is None:
            return lambda chosen: None
        most = self.depth if self._drafter is not None else min(self.depth, repeats.length)
        following = list(itertools.islice(repeats.ahead(), most))
        tokens = [repeat.token for repeat in following]

        def repeated(chosen: Sequence[int]) -> Repeat | None:
            depth = len(chosen) - 1
            if list(chosen[1:]) == tokens[:depth]:
                return following[depth] if depth < len(following) else None
            return repeats.behind(chosen[1:])

        return repeated


def masked(candidates: Candidates, before: int, counts: Cooccurrence, alpha: float) -> Candidates:
    """Return candidates weighted by how much more often than by chance they were counted behind the token `before`.

    If no candidate was ever counted there, all stay as they are.

    Args:
        candidates: f, the distribution that the drafter gives.
        before: x_(i-1).
        counts: n-grams.
        alpha: α_c.
    """
    _, rank, nodes = counts.extend(2, np.array([before]), candidates.ids)
    ids = candidates.ids[rank]
    weights = candidates.probabilities[rank] * counts.mask(2, nodes, counts.unigram[ids], alpha)
    if not weights.any():
        return candidates
    return Candidates(ids, weights / weights.sum())
