"""A conversation with a bundle: what was said stays in the cache, and is not read again."""

from __future__ import annotations

from typing import Any, Unpack

from .chat import ChatPrompt, Message, asked
from .engine import Engine, StreamOptions
from .parameters import SamplingParameters
from .stream import TextStream

_WHOLE = ("eos", "length", "context", "cancelled")  # ends of a text that has every token's text in it


class Conversation:
    """Questions and answers in turn.

    An answer goes into the next prompt by its own tokens, wherever the template writes it as the model did: so a
    turn costs the question alone, whatever an encoding of the answer's text would have been cut into. It is
    for one thread; others may use the engine meanwhile.
    """

    def __init__(self, engine: Engine, system: str | None = None, *, trust_content: bool = False):
        """Begin.

        Args:
            engine: Answers.
            system: What stands in front of all questions.
            trust_content: Whether questions may hold control tokens.
        """
        self._engine, self._trust = engine, trust_content
        self._system = system
        self._answer: TextStream | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but for the system's message; the answer that was running is over."""
        self._end_answer()
        self._said: list[Message] = []
        self._prompt: ChatPrompt | None = None
        self._tokens: list[int] = []
        self._answer = None

    @property
    def messages(self) -> list[Message]:
        """All that was said, the answer as far as it has come."""
        return self._with(None if self._answer is None else self._answer.text)

    def say(
        self, question: str, parameters: SamplingParameters | None = None, **options: Unpack[StreamOptions]
    ) -> TextStream:
        """Ask; the answer that was running is over, and what of it came out is what was said.

        Args:
            question: The user's message.
            parameters: See `Engine.stream`.
            **options: Of `Engine.stream`.

        Raises:
            DynamoError: See `Engine.chat`; the conversation is then as it was.
        """
        said, prompt, tokens = self._following(question)
        stream = self._engine.stream(tokens, parameters, **options)
        self._end_answer()
        self._said, self._prompt, self._tokens, self._answer = said, prompt, tokens, stream
        return stream

    def _end_answer(self) -> None:
        if self._answer is not None:
            self._answer.close()

    def _following(self, question: str) -> tuple[list[Message], ChatPrompt, list[int]]:
        """Return all that is said then, and how it is read."""
        found = []
        bundle, answer = self._engine.bundle, self._answer
        # Some templates put blanks around answers that the model itself began or ended with.
        for text in [None] if answer is None else dict.fromkeys((answer.text, answer.text.strip())):
            said = [*self._with(text)[len(self._first) :], *asked(question)]
            prompt = bundle.chat_template.encode(
                [*self._first, *said], bundle.control_tokens, trust_content=self._trust
            )
            tokens = self._continued(prompt)
            if tokens is not None:
                return said, prompt, tokens
            found.append((said, prompt, prompt.encoded.ids))
        return found[0]

    @property
    def _first(self) -> list[Message]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]

    def _with(self, answer: str | None) -> list[Message]:
        last: list[dict[str, Any]] = [] if answer is None else [{"role": "assistant", "content": answer}]
        return [*self._first, *self._said, *last]

    def _continued(self, prompt: ChatPrompt) -> list[int] | None:
        """Return the tokens read and written so far, and those of what is new.

        It is None if the prompt does not go on from them.
        """
        answer = self._answer
        if answer is None or self._prompt is None or answer.finish_reason not in _WHOLE:
            return None
        own = answer.tokens[:-1] if answer.finish_reason == "eos" else answer.tokens
        so_far = self._prompt.text + answer.text
        if not prompt.text.startswith(so_far) or not self._engine.bundle.control_tokens.texts.keys().isdisjoint(own):
            return None
        rest = prompt.encoded.behind(len(so_far))
        return None if rest is None else [*self._tokens, *own, *rest]
