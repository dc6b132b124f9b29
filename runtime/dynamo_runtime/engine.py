"""A bundle, ready to continue prompts."""

from __future__ import annotations

import contextlib
import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Unpack

import numpy as np

from .bundle import Bundle, load_bundle
from .chat import Message
from .decoding import PREFILL_CHUNK
from .device.costs import Knowledge
from .device.inspection import device_key
from .device.plan import threshold_for
from .device.profile import Profile, cached_path
from .drafting import Drafter
from .earlier import load_earlier
from .errors import ParameterError, ProfileError, PromptError, printable
from .parameters import SamplingOptions, SamplingParameters, check_kind, whole
from .providers import Backend, BackendOptions, log
from .sampling import LogitsProcessor
from .selection import check_own, check_reads, is_lossless, make_strategy, parameters_for
from .session import Session
from .strategies import TARGET_SPEEDUP, Auto, Strategy
from .stream import Generation, Limits, TextStream
from .text import as_text, token_ids
from .turns import Ticket

CHARACTERS_A_TOKEN = 1000
"""More than the longest token of any vocabulary has."""


class StreamOptions(SamplingOptions, total=False):
    """What `Engine.stream` takes as keywords."""

    strategy: str | Strategy
    drafter: str | Drafter | None
    max_new_tokens: int | None
    seed: int | None
    stop: str | Sequence[str]
    logits_processors: Sequence[LogitsProcessor]
    ignore_eos: bool
    log_probabilities: bool
    origins: bool
    show_special: bool
    plain_prompt: bool
    target_speedup: float | None
    wait: bool


class Engine:
    """A bundle, ready to continue prompts. One generation at a time, whichever threads they come from.

    A generation that another thread has begun is waited for; one of the same thread ends when the next begins. As a
    context manager it is closed at the end.

    What the cache holds of one prompt is not computed again for the next: only the tokens behind the common prefix
    are computed. (A pass over fewer rows rounds differently in the last bits; call `reset` where runs must agree bit by
    bit.)

    Attributes:
        bundle: What is running.
        session: Its graph and cache.
        backend: How its graph was asked to run.
        knowledge: What the profile says, ready for planning.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        backend: Backend | None = None,
        *,
        max_length: int | None = None,
        verify: bool = False,
        prefill_chunk: int = PREFILL_CHUNK,
        profile: Profile | None = None,
        draft_corpus: str | Path | None = None,
        **options: Unpack[BackendOptions],
    ):
        """Load a bundle.

        Args:
            bundle: A bundle, its folder, or the ONNX file inside it.
            backend: How its graph is run.
            max_length: Most positions of prompt and continuation; None means the model's context length.
            verify: Compare the files' sha256 when loading from a path.
            prefill_chunk: Most prompt tokens per forward pass: bounds the memory of long prompts.
            profile: What strategy "auto" plans with; None for what `dynamo-profile` has kept of this device and bundle,
                if anything.
            draft_corpus: A file of earlier texts, which the drafter "lookup" searches too: see `load_earlier`.
            **options: Fields of `Backend` (provider, threads, …), in place of those in `backend`.

        Raises:
            DynamoError: See `load_bundle`, `load_earlier` and `Session`.
        """
        self._prefill_chunk = whole("prefill_chunk", prefill_chunk, 1)
        check_kind("bundle", bundle, (Bundle, str, Path), "a bundle or its path")
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle, verify=verify)
        check_kind("draft_corpus", draft_corpus, (str, Path, NoneType), "the path of a file")
        self._corpus = None if draft_corpus is None else load_earlier(draft_corpus, self.bundle)
        self.session = Session(self.bundle, backend, max_length=max_length, **options)
        self.backend = self.session.backend
        self.profile = self._kept_profile() if profile is None else profile

    @property
    def profile(self) -> Profile | None:
        """The profile that strategy "auto" plans with; it may be replaced."""
        return self._profile

    @profile.setter
    def profile(self, profile: Profile | None) -> None:
        check_kind("profile", profile, (Profile, NoneType), "a Profile")
        self._profile = profile
        self.knowledge = Knowledge.of(self.bundle, profile)

    @property
    def lossless(self) -> bool:
        """Whether verified drafts leave the text as plain decoding writes it.

        The bundle says so, and the profile has found nothing else on this device, if it was tested.
        """
        return is_lossless(self.bundle, self.knowledge)

    def _kept_profile(self) -> Profile | None:
        try:
            path = cached_path(device_key(self.session.provider), self.bundle, self.backend.threads)
            return Profile.load(path) if path.is_file() else None
        except ProfileError as error:
            log.warning("%s", error)
        except OSError as error:  # a folder that may not be searched
            log.warning("%s cannot be read: %s", printable(str(path)), error.strerror or error)
        except RuntimeError:  # there is no home folder
            pass
        return None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget the cached prompt; waits for its turn, as `stream` does.

        Raises:
            EngineError: The engine is closed.
        """
        with self._alone():
            self.session.cache.reset()

    def close(self) -> None:
        """Free the graph and its memory; waits for its turn, as `stream` does. Afterwards the engine cannot be used."""
        if not self.session.turns.closed:
            with self._alone():
                self.session.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        turns, ticket = self.session.turns, Ticket()
        turns.begin(ticket)
        try:
            yield
        finally:
            turns.give_up(ticket)
            turns.pause(ticket)

    def encode(self, prompt: str | Sequence[int], *, plain_prompt: bool = False) -> list[int]:
        """Return the prompt's tokens, checked; where there are none, the one that begins a text.

        Args:
            prompt: Text, or token ids.
            plain_prompt: Whether what looks like a control token is text.

        Raises:
            PromptError: It is empty and nothing begins a text, is not encodable, has unknown tokens, is longer than the
                context, or is neither text nor token ids.
            EngineError: The engine is closed.
        """
        bundle = self.bundle
        self.session.turns.check_open()
        if isinstance(prompt, str):
            text = as_text(prompt, "the prompt")
            if len(text) > CHARACTERS_A_TOKEN * self.session.max_length:  # which would take memory to find out
                raise PromptError(
                    f"the prompt has {len(text)} characters, more than any {self.session.max_length} tokens say"
                )
            tokens = bundle.control_tokens.encode_literally(text) if plain_prompt else bundle.tokenizer.encode(text).ids
        elif plain_prompt:
            raise ParameterError("plain_prompt is about text, and this prompt is made of tokens already")
        else:
            tokens = token_ids(prompt)
        if not tokens:
            if bundle.bos_token_id is None:
                raise PromptError("the prompt is empty")
            tokens = [bundle.bos_token_id]
        if min(tokens) < 0 or max(tokens) >= bundle.vocab_size:
            raise PromptError(f"the prompt has token ids outside 0 … {bundle.vocab_size - 1}")
        if len(tokens) > self.session.max_length:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, more than the context of {self.session.max_length}"
            )
        return tokens

    def stream(
        self,
        prompt: str | Sequence[int],
        parameters: SamplingParameters | None = None,
        *,
        strategy: str | Strategy = Auto.name,
        drafter: str | Drafter | None = None,
        max_new_tokens: int | None = 128,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        logits_processors: Sequence[LogitsProcessor] = (),
        ignore_eos: bool = False,
        log_probabilities: bool = False,
        origins: bool = False,
        show_special: bool = False,
        plain_prompt: bool = False,
        target_speedup: float | None = None,
        wait: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> TextStream:
        """Continue a prompt piece by piece.

        A parameter that is named, in one way or the other, has to be one that the strategy reads.

        The generation begins when its first piece is asked for, and then has the engine to itself: it waits until a
        generation of another thread is over, and it ends a generation of the same thread, wherever that was.

        Args:
            prompt: Text, or token ids.
            parameters: In place of the bundle's defaults.
            strategy: "auto", "autoregressive", "dynamo" (whose defaults are the paper's) or "speculative"; or one of
                your own, which then has its own parameters.
            drafter: For "auto" and "speculative": a name in `registry.DRAFTERS`, "both", or one of your own. None for
                the bundle's, with "auto" besides what the text repeats ("both"); "lookup" where the bundle has none.
            max_new_tokens: Exact upper limit; None means until the context is full.
            seed: For reproducible draws; None draws afresh.
            stop: Strings that end the text in front of them; they may have special tokens in them, shown or not.
            logits_processors: Functions (context tokens, logits [V]) -> logits [V], applied to every head.
            ignore_eos: Go on behind end-of-sequence tokens, for measurements of a fixed length.
            log_probabilities: Have what the base model makes of every token: see `Generation`.
            origins: Have where every token comes from, a pass of its own or a draft: see `Generation`.
            show_special: Have special tokens in the text; the one that ends it is left out all the same.
            plain_prompt: What looks like a control token in the prompt is text.
            target_speedup: Times the speed of plain decoding that `dynamo` is to reach: the profile says with which
                back-off threshold.
            wait: Whether to wait for a generation of another thread; else it is an error that there is one.
            **sampling: Fields of `SamplingParameters`; what is None or absent comes from `parameters`, or else from the
                bundle.

        Returns:
            An iterator over pieces of text. All arguments are checked before it returns.

        Raises:
            PromptError: See `encode`.
            ParameterError: A parameter is unknown, out of range, not read by the strategy, or does not fit the bundle.
            EngineError: The engine is closed; or with the first piece, see `TextStream`.
        """
        started = time.perf_counter()
        flags = {"ignore_eos": ignore_eos, "log_probabilities": log_probabilities, "show_special": show_special}
        for name, flag in (flags | {"origins": origins, "plain_prompt": plain_prompt, "wait": wait}).items():
            check_kind(name, flag, (bool, np.bool_), "true or false")
        if max_new_tokens is not None:
            max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
        if seed is not None:
            seed = whole("seed", seed, 0)
        stops = _stop_strings(stop)
        check_kind("logits_processors", logits_processors, Iterable, "a list of functions")
        logits_processors = list(logits_processors)
        for processor in logits_processors:
            check_kind("a logits processor", processor, Callable, "a function")  # type: ignore[arg-type]
        tokens = self.encode(prompt, plain_prompt=plain_prompt)
        check_kind("parameters", parameters, (SamplingParameters, NoneType), "SamplingParameters")
        named = {name: value for name, value in sampling.items() if value is not None}
        if target_speedup is not None:
            check_kind(TARGET_SPEEDUP, target_speedup, numbers.Real, "a number")
            named[TARGET_SPEEDUP] = target_speedup
        if isinstance(strategy, str):
            chosen = self._make_strategy(strategy, parameters, named, logits_processors, drafter)
        elif parameters is not None or named or logits_processors or drafter is not None:
            raise ParameterError("a strategy of your own has parameters, processors and drafter of its own: name none")
        else:
            chosen = check_own(strategy)
        # The last token need not be fed, so it may stand one behind the last position.
        limit, reason = self.session.max_length - len(tokens) + 1, "context"
        if max_new_tokens is not None and max_new_tokens <= limit:
            limit, reason = max_new_tokens, "length"
        return TextStream(
            self.session,
            chosen,
            tokens,
            np.random.default_rng(seed),
            Limits(limit, reason, stops, frozenset(() if ignore_eos else self.bundle.eos_token_ids), show_special),
            scored=log_probabilities,
            traced=origins,
            prefill_chunk=self._prefill_chunk,
            started=started,
            wait=wait,
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        parameters: SamplingParameters | None = None,
        **options: Unpack[StreamOptions],
    ) -> Generation:
        """Continue a prompt to the end; arguments as of `stream`."""
        with self.stream(prompt, parameters, **options) as stream:
            for _ in stream:
                pass
            return stream.result()

    def chat_stream(
        self,
        messages: Sequence[Message],
        parameters: SamplingParameters | None = None,
        *,
        trust_content: bool = False,
        **options: Unpack[StreamOptions],
    ) -> TextStream:
        """Answer messages piece by piece, as the bundle's chat template puts them.

        Args:
            messages: Objects with `role` and `content`, as in OpenAI's protocol.
            parameters: See `stream`.
            trust_content: Whether messages may hold control tokens; else what looks like one is text.
            **options: Of `stream`.

        Raises:
            BundleError: The bundle has no chat template.
            PromptError: They are no messages, or the template does not want them.
            ParameterError: See `stream`.
        """
        check_kind("trust_content", trust_content, (bool, np.bool_), "true or false")
        prompt = self.bundle.chat_template.encode(messages, self.bundle.control_tokens, trust_content=trust_content)
        return self.stream(prompt.encoded.ids, parameters, **options)

    def chat(
        self,
        messages: Sequence[Message],
        parameters: SamplingParameters | None = None,
        *,
        trust_content: bool = False,
        **options: Unpack[StreamOptions],
    ) -> Generation:
        """Answer messages to the end; arguments as of `chat_stream`."""
        with self.chat_stream(messages, parameters, trust_content=trust_content, **options) as stream:
            for _ in stream:
                pass
            return stream.result()

    def _make_strategy(
        self,
        name: str,
        parameters: SamplingParameters | None,
        named: dict[str, Any],
        processors: Sequence[LogitsProcessor],
        drafter: str | Drafter | None,
    ) -> Strategy:
        """Return a strategy by name, with what it reads of the parameters."""
        names = {*named, *(parameters.named if parameters else ())}
        check_reads(name, names, self.bundle, self.knowledge)
        if {TARGET_SPEEDUP, "backoff_threshold"} <= names:
            raise ParameterError("a target speed-up chooses the back-off threshold: give one of them")
        named = dict(named)
        if (target := named.pop(TARGET_SPEEDUP, None)) is not None:
            named["backoff_threshold"] = threshold_for(self.profile, target)
        resolved = parameters_for(name, self.bundle, named, parameters)
        return make_strategy(
            name, self.bundle, resolved, processors, drafter=drafter, knowledge=self.knowledge, corpus=self._corpus
        )


def _stop_strings(stop: str | Sequence[str]) -> list[str]:
    """Stop strings, of which there may be one.

    Raises:
        ParameterError: They are something else, or empty.
    """
    if not isinstance(stop, str) and (isinstance(stop, bytes) or not isinstance(stop, Iterable)):
        raise ParameterError(f"stop must be text or a list of texts, not a {type(stop).__name__}")
    stops = [stop] if isinstance(stop, str) else list(stop)
    for each in stops:
        check_kind("a stop string", each, str, "text")
        if not each:
            raise ParameterError("a stop string must not be empty")
    return stops
