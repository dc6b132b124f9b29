"""Where the tokens of a text come from: a pass of the model's own, or a draft that was accepted."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Origin(NamedTuple):
    """How one token came to be.

    Attributes:
        depth: 0 for the token that a forward pass gives of its own; d for an accepted draft, the d-th behind the last
            final token (of `dynamo`: for the token of further head d).
        source: Name of the drafter, as in `Statistics.accepted_by`; empty where it has none.
    """

    depth: int = 0
    source: str = ""


OWN = Origin()
"""Of the token that a pass gives of its own."""


class Span(NamedTuple):
    """A stretch of text that one token gave.

    Attributes:
        text: Not empty. A character that several tokens make is the last one's.
        origin: Of that token.
    """

    text: str
    origin: Origin


class Attribution:
    """Divides a text that is given out piece by piece among the tokens that it is made of.

    Attributes:
        origins: Of every token so far.
        spans: Of the text given out so far.
    """

    def __init__(self) -> None:
        self.origins: list[Origin] = []
        self.spans: list[Span] = []
        self._held: deque[Span] = deque()

    def hold(self, text: str) -> None:
        """Take the text of the newest token; it is given out later, or never, if a stop string ends in it."""
        if text:
            self._held.append(Span(text, self.origins[-1]))

    def give_out(self, length: int) -> None:
        """Have the first `length` characters of what is held be given out."""
        while length > 0:
            text, origin = self._held.popleft()
            self.spans.append(Span(text[:length], origin))
            if len(text) > length:
                self._held.appendleft(Span(text[length:], origin))
            length -= len(text)
