"""From tokens to streamed text: whole characters only, and nothing behind a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens always decoded along in front of new ones.
_CONTEXT_TOKENS = 8
# A character has at most four bytes: what is not whole after so many tokens is no text.
_MOST_HELD_TOKENS = 16


class Detokenizer:
    """Incremental decoding that never breaks a UTF-8 character.

    A character may be spread over tokens; bytes that do not make one yet are held back. Decoders such as
    sentencepiece's look at the token before (a leading space is dropped at the start of a text), so a few
    earlier tokens, at first the end of the prompt, are always decoded along.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        """Continue the text of `context` (token ids)."""
        self._tokenizer = tokenizer
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
            if self._whole - self._mark >= _CONTEXT_TOKENS:
                self._move_window()
        return new

    def flush(self) -> str:
        """Whatever is held back, incomplete characters as replacement characters."""
        new = self._decode()[self._given :]
        self._given += len(new)
        return new

    def _move_window(self) -> None:
        self._tokens = self._tokens[self._mark :]
        self._mark = self._whole = len(self._tokens)
        self._given = len(self._decode())

    def _whole_end(self, context: Sequence[int]) -> list[int]:
        # A window that began inside a character would decode to something else than the prompt's end.
        for size in range(_CONTEXT_TOKENS, 2 * _CONTEXT_TOKENS):
            end = list(context[-size:])
            if not self._tokenizer.decode(end, skip_special_tokens=True).startswith(REPLACEMENT):
                return end
        return []

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return text


class StopStrings:
    """Holds back what may be the beginning of a stop string, and ends the text in front of one.

    The first stop string to be *completed* counts (the longest, if several are at once), so that the text
    does not depend on the pieces in which it arrives.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Append text; returns what may be given out. After a match `stopped` is set: nothing more comes."""
        if self.stopped:
            return ""
        self._held += text
        matches = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start) for start, stop in matches if start >= 0]
        if ends:
            self.stopped = True
            start = min(ends)[1]  # smallest end, then smallest start
            out, self._held = self._held[:start], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """What is still held back: the text ended without a stop string."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
