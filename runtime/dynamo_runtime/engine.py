"""Prompt in, text out: one loop over forward passes for every decoding strategy."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import Bundle, load_bundle
from .device.inspection import device_key
from .device.plan import Knowledge, threshold_for
from .device.profile import Profile, cached_path
from .errors import ParameterError, ProfileError, PromptError
from .parameters import resolve_parameters
from .providers import log
from .sampling import Context, LogitsProcessor
from .session import Session
from .statistics import Statistics
from .strategies import Auto, Strategy, make_strategy
from .text import Detokenizer, StopStrings
from .verification import Draft

PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
        text: The continuation, without end-of-sequence token and stop string.
        tokens: New tokens, a final end-of-sequence token included.
        finish_reason: "eos", "stop" (a stop string), "length" (`max_new_tokens`), "context" (the context is
            full) or "cancelled".
        statistics: What it cost.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    statistics: Statistics


class Engine:
    """A bundle, ready to continue prompts. One generation at a time.

    What the cache holds of one prompt is not computed again for the next: only what follows the common prefix
    is. (A pass over fewer rows rounds differently in the last bits; call `reset` where runs must agree bit by
    bit.)

    Attributes:
        bundle: What is running.
        session: Its graph and cache.
        threads: Threads within an operator, if they were given.
        knowledge: What the profile says, ready for planning.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        max_length: int | None = None,
        verify: bool = False,
        prefill_chunk: int = PREFILL_CHUNK,
        profile: Profile | None = None,
        **backend: Any,
    ):
        """Load a bundle.

        Args:
            bundle: A bundle, its folder, or the ONNX file inside it.
            max_length: Most positions of prompt and continuation; None means the model's context length.
            verify: Compare the files' sha256 when loading from a path.
            prefill_chunk: Most prompt tokens per forward pass: bounds the memory of long prompts.
            profile: What strategy "auto" plans with; None for what `dynamo-profile` has kept of this device and bundle,
                if anything.
            **backend: Fields of `Backend`: provider, threads, ….

        Raises:
            DynamoError: See `load_bundle` and `Session`.
        """
        if prefill_chunk < 1:
            raise ParameterError(f"prefill_chunk must be at least 1, not {prefill_chunk}")
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle, verify=verify)
        self.session = Session(self.bundle, max_length=max_length, **backend)
        self._prefill_chunk = prefill_chunk
        self.threads: int | None = backend.get("threads")
        self.profile = profile or self._kept_profile(self.threads)

    @property
    def profile(self) -> Profile | None:
        """What strategy "auto" plans with; may be replaced."""
        return self._profile

    @profile.setter
    def profile(self, profile: Profile | None) -> None:
        self._profile = profile
        self.knowledge = Knowledge.of(self.bundle, profile)

    def _kept_profile(self, threads: int | None) -> Profile | None:
        path = cached_path(device_key(self.session.provider), self.bundle, threads)
        if not path.is_file():
            return None
        try:
            return Profile.load(path)
        except ProfileError as error:
            log.warning("%s", error)
            return None

    def reset(self) -> None:
        """Forget the cached prompt."""
        self.session.cache.reset()

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The prompt's tokens, checked.

        Raises:
            PromptError: It is empty, not encodable, has unknown tokens, or is longer than the context.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("the prompt is empty")
            try:
                prompt.encode("utf-8")
            except UnicodeEncodeError:
                raise PromptError("the prompt is not valid UTF-8") from None
            tokens = self.bundle.tokenizer.encode(prompt).ids
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            raise PromptError("the prompt is empty")
        if min(tokens) < 0 or max(tokens) >= self.bundle.vocab_size:
            raise PromptError(f"the prompt has token ids outside 0 … {self.bundle.vocab_size - 1}")
        if len(tokens) > self.session.max_length:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, more than the context of {self.session.max_length}"
            )
        return tokens

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        strategy: str | Strategy = Auto.name,
        max_new_tokens: int | None = 128,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        logits_processors: Sequence[LogitsProcessor] = (),
        ignore_eos: bool = False,
        target_speedup: float | None = None,
        **sampling: Any,
    ) -> "TextStream":
        """Continue a prompt piece by piece.

        Args:
            prompt: Text, or token ids.
            strategy: "auto", "autoregressive", "dynamo" or "speculative"; or one of your own, which then has its own
                parameters.
            max_new_tokens: Exact upper limit; None means until the context is full.
            seed: For reproducible draws; None draws afresh.
            stop: Strings that end the text in front of them.
            logits_processors: Functions (context tokens, logits [V]) -> logits [V], applied to every head.
            ignore_eos: Go on behind end-of-sequence tokens, for measurements of a fixed length.
            target_speedup: Times the speed of plain decoding that `dynamo` is to reach: the profile says with which
                back-off threshold.
            **sampling: Fields of `SamplingParameters`; what is None or absent comes from the bundle.

        Returns:
            An iterator over pieces of text. All arguments are checked before it returns.

        Raises:
            PromptError: See `encode`.
            ParameterError: A parameter is unknown, out of range, or does not fit the bundle.
        """
        started = time.perf_counter()
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ParameterError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if seed is not None and seed < 0:
            raise ParameterError(f"seed must be at least 0, not {seed}")
        stops = [stop] if isinstance(stop, str) else list(stop)
        if "" in stops:
            raise ParameterError("a stop string must not be empty")
        tokens = self.encode(prompt)
        if target_speedup is not None:
            sampling["backoff_threshold"] = threshold_for(self.profile, target_speedup)
        parameters = resolve_parameters(self.bundle.sampling, sampling, has_counts=self.bundle.has_cooccurrence)
        chosen = strategy
        if isinstance(chosen, str):
            chosen = make_strategy(chosen, self.bundle, parameters, logits_processors, self.knowledge)
        # The last token need not be fed, so it may stand one behind the last position.
        room = self.session.max_length - len(tokens) + 1
        limit, reason = room, "context"
        if max_new_tokens is not None and max_new_tokens <= room:
            limit, reason = max_new_tokens, "length"
        return TextStream(
            self.session,
            chosen,
            tokens,
            np.random.default_rng(seed),
            limit=limit,
            limit_reason=reason,
            stops=stops,
            end_tokens=frozenset() if ignore_eos else frozenset(self.bundle.eos_token_ids),
            prefill_chunk=self._prefill_chunk,
            started=started,
        )

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue a prompt to the end; arguments as of `stream`."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result()


@dataclass(frozen=True)
class Round:
    """What one forward pass gave: final `tokens`, the first `accepted` of `proposed` draft tokens among them."""

    tokens: list[int]
    proposed: int
    accepted: int


class TextStream(Iterator[str]):
    """Pieces of text of one running generation; never a broken character, never anything taken back.

    Attributes:
        tokens: New tokens so far.
        text: Text given out so far.
        finish_reason: See `Generation`; empty while it runs.
        statistics: What it has cost so far; time in which the consumer kept it waiting is left out.
    """

    def __init__(
        self,
        session: Session,
        strategy: Strategy,
        prompt: list[int],
        rng: np.random.Generator,
        *,
        limit: int,
        limit_reason: str,
        stops: Sequence[str],
        end_tokens: frozenset[int],
        prefill_chunk: int,
        started: float,
    ):
        """Use `Engine.stream`."""
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason = ""
        self.statistics = Statistics(strategy.name, prompt_tokens=len(prompt))
        self._session, self._strategy, self._prompt, self._rng = session, strategy, prompt, rng
        self._limit, self._limit_reason = limit, limit_reason
        self._detokenizer = Detokenizer(session.bundle.tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._end_tokens = end_tokens
        self._prefill_chunk = prefill_chunk
        self._cancelled = self._started = False
        self._busy_s = time.perf_counter() - started
        self._pieces = self._run()

    def __next__(self) -> str:
        """The next piece of text, not empty.

        Raises:
            RuntimeError: Another generation has begun on this engine, and the cache is no longer this one's.
        """
        if self._started and not self.finish_reason and self._session.user is not self:
            raise RuntimeError("another generation has begun on this engine: this one cannot go on")
        self._resumed = time.perf_counter()
        try:
            piece = next(self._pieces)
        finally:
            self.statistics.total_s = self._elapsed()
            self._busy_s = self.statistics.total_s
        self.text += piece
        return piece

    def cancel(self) -> None:
        """End the generation after the forward pass that runs now (callable from another thread)."""
        self._cancelled = True

    def result(self) -> Generation:
        """The generation as it stands."""
        return Generation(self.text, list(self.tokens), self.finish_reason or "cancelled", self.statistics)

    def _elapsed(self) -> float:
        return self._busy_s + time.perf_counter() - self._resumed

    def _run(self) -> Iterator[str]:
        self._started, self._session.user = True, self
        self._ort_before = self._session.ort_seconds
        context = Context(self._prompt, self._session.bundle.vocab_size)
        drafts = self._strategy.reads_heads
        self.statistics.reused_tokens = reuse_prefix(self._session, self._prompt, drafts)
        for _ in prefill(self._session, self._prompt, self._prefill_chunk, drafts):
            if self._cancelled:
                self.finish_reason = "cancelled"
                return
        for turn in decode(self._session, self._strategy, context, self._rng):
            piece = self._accept(turn)
            if self._cancelled and not self.finish_reason:
                self.finish_reason = "cancelled"
            if self.finish_reason:
                piece += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
            if piece:
                yield piece
            if self.finish_reason:
                return

    def _accept(self, turn: Round) -> str:
        """Take the tokens of one round up to whatever ends the text; returns what can be given out."""
        piece, taken = "", 0
        for token in turn.tokens:
            taken += 1
            self.tokens.append(token)
            if token in self._end_tokens:
                self.finish_reason = "eos"
            else:
                piece += self._stops.push(self._detokenizer.push(token))
                if self._stops.stopped:
                    self.finish_reason = "stop"
                elif len(self.tokens) == self._limit:
                    self.finish_reason = self._limit_reason
            if self.finish_reason:
                break
        accepted = min(turn.accepted, taken)  # the text may end inside an accepted run
        ort_s = self._session.ort_seconds - self._ort_before
        self.statistics.count_round(taken, turn.proposed, accepted, self._elapsed(), ort_s)
        return piece


def reuse_prefix(session: Session, prompt: Sequence[int], heads: bool) -> int:
    """Roll the cache back to what it has in common with the prompt; returns how many positions that are.

    The last token is always left to be computed, as the first pass must have a row to read. What the further heads
    have not seen is of no use where they are to be `heads` and it is more than they should see in one pass.
    """
    common = 0
    for held, wanted in zip(session.cache.tokens, prompt[:-1], strict=False):
        if held != wanted:
            break
        common += 1
    session.cache.rollback(common)
    if heads and session.cache.skipped_length > PREFILL_CHUNK:
        common -= session.cache.skipped_length
        session.cache.rollback(common)
    return common


def prefill(session: Session, prompt: Sequence[int], chunk: int, heads: bool) -> Iterator[None]:
    """Feed the prompt in chunks until at most one chunk is left, which the first decode step feeds.

    Args:
        session: Rolled back to a prefix of the prompt.
        prompt: Its tokens.
        chunk: Most tokens a pass.
        heads: Whether the further heads will be read later.
    """
    while len(prompt) - session.cache.length > chunk:
        yield
        held = session.cache.length
        session.step(prompt[held : held + chunk], head_rows=None if heads else ())
    yield


def decode(session: Session, strategy: Strategy, context: Context, rng: np.random.Generator) -> Iterator[Round]:
    """One round after another, without end.

    Whatever is final but not in the cache is fed, with the strategy's drafts behind it and the look-ahead tokens
    behind those; the cache then rolls back behind the drafts that were accepted.
    """
    drafts: list[Draft] = []
    while True:
        pending = context.tokens[session.cache.length :]
        room = session.max_length - len(context.tokens)
        drafts = drafts[:room]
        look_ahead = list(strategy.look_ahead[: room - len(drafts)])
        fed = pending + [draft.token for draft in drafts] + look_ahead
        judged = 1 + len(drafts)  # rows: the last final token's, and every draft's
        last = len(fed) - len(look_ahead)
        head_rows = range(last - judged, last) if strategy.reads_heads else ()
        step = session.step(fed, rows=judged + len(look_ahead), head_rows=head_rows)
        turn = strategy.advance(step, context, drafts, rng)
        session.cache.rollback(len(context.tokens) + turn.accepted)
        final = [draft.token for draft in drafts[: turn.accepted]] + turn.tokens
        context.extend(final)
        yield Round(final, len(drafts) + turn.weighed, turn.accepted + len(turn.tokens) - 1)
        drafts = turn.drafts
