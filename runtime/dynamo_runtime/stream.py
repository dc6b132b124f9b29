"""A running generation: rounds of tokens in, pieces of text out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .decoding import Round, decode, prefill, reuse_prefix, score_rest
from .errors import EngineError
from .generation_statistics import Statistics
from .origins import Attribution, Origin, Span
from .sampling import Context
from .session import Session
from .strategies import Strategy
from .text import Detokenizer, StopStrings
from .turns import Ticket


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
        text: The continuation, without the token that ended it and stop string.
        tokens: New tokens, a final end-of-sequence token included.
        log_probabilities: Of every token, in nats, by the base model itself: before temperature, penalty, truncation
            and processors. Empty unless they were asked for; of a generation that did not come to its end, perhaps not
            of the last tokens.
        finish_reason: "eos", "stop" (a stop string), "length" (`max_new_tokens`), "context" (the context is
            full) or "cancelled".
        statistics: What it cost.
        origins: Where every token comes from; empty unless that was asked for.
        spans: The text in stretches of one token, each with its origin; empty unless that was asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    statistics: Statistics
    log_probabilities: list[float] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """Where a generation ends.

    Attributes:
        tokens: Most new tokens.
        reason: What ends it there: see `Generation.finish_reason`.
        stops: Strings that end the text in front of them.
        end_tokens: Tokens that end it.
        show_special: Whether the text has special tokens in it.
    """

    tokens: int
    reason: str
    stops: Sequence[str] = ()
    end_tokens: frozenset[int] = frozenset()
    show_special: bool = False


class TextStream(Iterator[str]):
    """Pieces of text of one running generation; never a broken character, never anything taken back.

    It begins with its first piece, and then has the engine to itself until it is over: at its end, when it fails, is
    cancelled, closed or dropped, or when the thread that reads it begins something else on the engine. As a context
    manager it is closed at the end.

    Attributes:
        tokens: New tokens so far.
        log_probabilities: See `Generation`; of several tokens that one pass gave, some may come with the next.
        text: Text given out so far.
        finish_reason: See `Generation`; empty while it runs, and if it was closed before its end.
        statistics: What it has cost so far; time in which the consumer kept it waiting is left out, and so is time
            in which it waited for the engine.
        origins: See `Generation`, so far.
        spans: See `Generation`, of `text`.
    """

    def __init__(
        self,
        session: Session,
        strategy: Strategy,
        prompt: list[int],
        rng: np.random.Generator,
        limits: Limits,
        *,
        scored: bool,
        traced: bool = False,
        prefill_chunk: int,
        started: float,
        wait: bool = True,
    ):
        """Use `Engine.stream`."""
        self._ticket = Ticket()  # first, as whatever was begun is closed
        self._session, self._strategy, self._prompt, self._rng = session, strategy, prompt, rng
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []
        self.text = ""
        self.finish_reason = ""
        self.statistics = Statistics(strategy.name, prompt_tokens=len(prompt))
        self._limits, self._scored, self._wait = limits, scored, wait
        self._attribution = Attribution() if traced else None
        bundle = session.bundle
        self._detokenizer = Detokenizer(bundle.tokenizer, prompt, show_special=limits.show_special)
        self._special = bundle.control_tokens.texts
        self._hidden = {} if limits.show_special else bundle.control_tokens.hidden
        self._stops = StopStrings(limits.stops, self._special.values())
        self._prefill_chunk = prefill_chunk
        self._closed = False
        self._busy_s = time.perf_counter() - started
        # It knows nothing of the stream, which is thus freed as soon as nobody reads it any more.
        self._rounds: Iterator[Round | None] | None = None

    def __next__(self) -> str:
        """Return the next piece of text, not empty.

        Raises:
            EngineError: Another generation has begun on this engine, and the cache is no longer this one's; or it is to
                begin, and the engine is closed, or at work while nobody wants to wait.
            DynamoError: The bundle does not run, or a part of somebody's own says what it must not.
        """
        if self._closed or self.finish_reason:
            raise StopIteration
        turns = self._session.turns
        try:
            if self._ticket.over:
                piece = self._end("cancelled")
            elif self._rounds is not None:
                turns.go_on(self._ticket)
                piece = self._work()
            elif turns.begin(self._ticket, wait=self._wait):
                piece = self._work()
            else:
                piece = self._end("cancelled")
        except EngineError:
            raise  # it is not this one's turn
        except BaseException:  # Ctrl-C may come at any place
            self._closed = self._ticket.over = True
            turns.pause(self._ticket)
            raise
        if not piece:
            raise StopIteration
        self.text += piece
        if self._attribution is not None:
            self._attribution.give_out(len(piece))
        return piece

    @property
    def origins(self) -> Sequence[Origin]:
        """See above."""
        return () if self._attribution is None else self._attribution.origins

    @property
    def spans(self) -> Sequence[Span]:
        """See above."""
        return () if self._attribution is None else self._attribution.spans

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def cancel(self) -> None:
        """End the generation after the forward pass that runs now (callable from another thread)."""
        self._session.turns.give_up(self._ticket)

    def close(self) -> None:
        """Cancel, and give out nothing more, nor what is held back as it may become part of a stop string."""
        self._closed = True
        self.cancel()

    def result(self) -> Generation:
        """Return the generation as it stands."""
        reason = self.finish_reason or "cancelled"
        told = list(self.log_probabilities), list(self.origins), list(self.spans)
        return Generation(self.text, list(self.tokens), reason, self.statistics, *told)

    def _elapsed(self) -> float:
        return self._busy_s + time.perf_counter() - self._resumed

    def _work(self) -> str:
        """Return the next piece, in a turn that has begun; empty if there are no more."""
        self._resumed = time.perf_counter()
        try:
            if self._rounds is None:
                self._rounds = self._begin()
            piece = self._next_piece(self._rounds)
        except BaseException:
            # Perhaps in the middle of something: what the cache holds is not to be relied on.
            self._session.cache.reset()
            self._closed = self._ticket.over = True
            raise
        finally:
            self._busy_s = self.statistics.total_s = self._elapsed()
            self._session.turns.pause(self._ticket)
        return piece

    def _begin(self) -> Iterator[Round | None]:
        session = self._session
        self._ort_before = session.ort_seconds
        context = Context(self._prompt, session.bundle.vocab_size)
        self.statistics.reused_tokens = reuse_prefix(session, self._prompt)
        return itertools.chain(
            prefill(session, self._prompt, self._prefill_chunk),
            decode(session, self._strategy, context, self._rng, scored=self._scored),
        )

    def _next_piece(self, rounds: Iterator[Round | None]) -> str:
        piece = ""
        while not piece and not self.finish_reason:
            given = None if self._ticket.over else next(rounds)
            if given is not None:
                piece = self._accept(given)
            if self.finish_reason and self._scored and not self._ticket.over:
                self._score_to_the_end()
            if self.finish_reason or self._ticket.over:
                piece += self._end(self.finish_reason or "cancelled")
        return piece

    def _end(self, reason: str) -> str:
        """Finish; returns what was held back."""
        self.finish_reason, self._ticket.over = reason, True
        if not self.tokens:  # a character that the prompt has begun is none of ours
            return ""
        return self._show(self._detokenizer.flush()) + self._stops.flush()

    def _show(self, text: str) -> str:
        """Take text of the newest token; returns what can be given out."""
        if self._attribution is not None:
            self._attribution.hold(text)
        return self._stops.push(text)

    def _score_to_the_end(self) -> None:
        """Have as many log-probabilities as tokens; the text may have ended inside the last round."""
        del self.log_probabilities[len(self.tokens) :]
        if unscored := len(self.tokens) - len(self.log_probabilities):
            self.log_probabilities += score_rest(self._session, self._prompt + self.tokens, unscored)
            self.statistics.ort_s = self._session.ort_seconds - self._ort_before

    def _accept(self, given: Round) -> str:
        """Take the tokens of one round up to whatever ends the text; returns what can be given out."""
        piece, taken = "", 0
        self.log_probabilities += given.log_probabilities
        for token in given.tokens:
            if self._attribution is not None:
                self._attribution.origins.append(given.origin(taken))
            taken += 1
            self.tokens.append(token)
            if token in self._limits.end_tokens:
                # A stop string may end with it that begins in the text.
                piece += self._stops.push(self._special.get(token, ""), shown=False)
                self.finish_reason = "eos"
            else:
                piece += self._show(self._detokenizer.push(token))
                if token in self._hidden:
                    piece += self._stops.push(self._hidden[token], shown=False)
                if self._stops.stopped:
                    self.finish_reason = "stop"
                elif len(self.tokens) == self._limits.tokens:
                    self.finish_reason = self._limits.reason
            if self.finish_reason:
                break
        accepted = given.accepted_of(taken)  # the text may end inside an accepted run
        ort_s = self._session.ort_seconds - self._ort_before
        self.statistics.count_round(taken, given.proposed, accepted, self._elapsed(), ort_s, given.sources)
        return piece
