"""A prompt as it is given, and from tokens to streamed text: whole characters, and nothing behind a stop string."""

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from .errors import PromptError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_ORDER_MARK = "\ufeff"
# Tokens decoded along in front of new ones, where what a token says depends on those before it.
_CONTEXT_TOKENS = 4
# A character has at most four bytes: what is not whole after so many tokens is no text.
_MOST_HELD_TOKENS = 16


def as_text(given: str, what: str) -> str:
    """Return a text that can be encoded, without the byte-order mark that files of some programs begin with.

    Args:
        given: The text.
        what: It is called where it is refused.

    Raises:
        PromptError: It is not text.
    """
    if not isinstance(given, str):
        raise PromptError(f"{what} must be text, not a {type(given).__name__}")
    try:
        given.encode("utf-8")
    except UnicodeEncodeError:
        raise PromptError(f"{what} is not valid UTF-8") from None
    return given.removeprefix(_BYTE_ORDER_MARK)


def token_ids(prompt: Sequence[int]) -> list[int]:
    """Return tokens given as whole numbers of any kind.

    Raises:
        PromptError: They are something else.
    """
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise PromptError(f"a prompt is text or token ids, not a {type(prompt).__name__}")
    tokens = []
    for token in prompt:
        if isinstance(token, str):
            raise PromptError("a prompt is one text, not a list of them: give one after the other")
        if isinstance(token, Mapping):
            raise PromptError("a prompt is text or token ids: messages are for Engine.chat")
        try:
            tokens.append(operator.index(token))
        except TypeError:
            raise PromptError(f"token ids are whole numbers, not {token!r}") from None
        if isinstance(token, bool | np.bool_):
            raise PromptError(f"token ids are whole numbers, not {token!r}")
    return tokens


class Detokenizer:
    """Incremental decoding that never breaks a UTF-8 character.

    A character may be spread over tokens; bytes that do not make one yet are held back. Decoders such as
    sentencepiece's look at the token before (a leading space is dropped at the start of a text), so a few
    earlier tokens, at first the end of the prompt, are decoded along. A byte-level decoder joins the bytes of single
    tokens, and needs none of them but those that an unfinished character has begun in.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), *, show_special: bool = False):
        """Continue the text of `context` (token ids), with or without the texts of special tokens."""
        self._tokenizer, self._skip = tokenizer, not show_special
        self._context = 0 if isinstance(tokenizer.decoder, ByteLevel) else _CONTEXT_TOKENS
        self._tokens = self._whole_end(context)
        self._mark = len(self._tokens)  # a place in the window where the text was whole
        self._whole = len(self._tokens)  # the last such place
        self._given = len(self._decode().rstrip(REPLACEMENT))  # characters of the window given out

    def push(self, token: int) -> str:
        """Append one token; returns the characters that are certain now."""
        self._tokens.append(token)
        text = self._decode()
        certain = text.rstrip(REPLACEMENT)
        if len(self._tokens) - self._whole > _MOST_HELD_TOKENS:
            certain = text
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        if len(certain) == len(text):
            self._whole = len(self._tokens)
            if self._whole - self._mark >= self._context:
                self._move_window()
        return new

    def flush(self) -> str:
        """Return whatever is held back, incomplete characters as replacement characters."""
        new = self._decode()[self._given :]
        self._given += len(new)
        return new

    def _move_window(self) -> None:
        self._tokens = self._tokens[self._mark if self._context else self._whole :]
        self._mark = self._whole = len(self._tokens)
        self._given = len(self._decode()) if self._tokens else 0

    def _whole_end(self, context: Sequence[int]) -> list[int]:
        # A window that began inside a character would decode to something else than the prompt's end.
        for size in range(_CONTEXT_TOKENS, 2 * _CONTEXT_TOKENS):
            end = list(context[-size:])
            if not self._tokenizer.decode(end, skip_special_tokens=self._skip).startswith(REPLACEMENT):
                return end
        return []

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=self._skip)
        return text


class StopStrings:
    """Holds back what may be the beginning of a stop string, and ends the text in front of one.

    The first stop string to be *completed* counts (the longest, if several are at once), so that the text
    does not depend on the pieces in which it arrives.

    Parts of a text may not be shown: special tokens. A stop string with one in it is looked for in all of the text, any
    other in what is shown.
    """

    def __init__(self, stops: Sequence[str], special: Collection[str] = ()):
        """Look for some strings; `special` are the texts of the tokens that may not be shown."""
        stops = [stop for stop in stops if stop]
        self._of_all = [stop for stop in stops if any(text in stop for text in special)]
        self._of_shown = [stop for stop in stops if stop not in self._of_all]
        self._held = ""
        self._shown: list[int] = []  # places in it of what is shown
        self.stopped = False

    def push(self, text: str, *, shown: bool = True) -> str:
        """Append text; returns what may be given out. After a match `stopped` is set: nothing more comes."""
        if self.stopped:
            return ""
        if not self._of_all and not self._of_shown:
            return text if shown else ""
        if shown:
            self._shown += range(len(self._held), len(self._held) + len(text))
        self._held += text
        ends, cut = [], len(self._held)
        for text, places, stop in self._searches():
            start = text.find(stop)
            if start >= 0:
                ends.append((places[start + len(stop) - 1] + 1, places[start]))
            elif overlap := _overlap(text, stop):
                cut = min(cut, places[-overlap])
        if ends:
            self.stopped = True
            return self._release(min(ends)[1])  # smallest end, then smallest start
        return self._release(cut)

    def flush(self) -> str:
        """Return what is still held back: the text ended without a stop string."""
        return "" if self.stopped else self._release(len(self._held))

    def _searches(self) -> Iterator[tuple[str, Sequence[int], str]]:
        """Yield every stop string with the text in which it is looked for, and the places of that in what is held."""
        everything = range(len(self._held))
        for stop in self._of_all:
            yield self._held, everything, stop
        shown = "".join(self._held[place] for place in self._shown) if self._of_shown else ""
        for stop in self._of_shown:
            yield shown, self._shown, stop

    def _release(self, cut: int) -> str:
        """Return what is shown in front of a place; the rest is held on."""
        out = "".join(self._held[place] for place in self._shown if place < cut)
        self._held, self._shown = self._held[cut:], [place - cut for place in self._shown if place >= cut]
        return out


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
