"""Control tokens: what they are called, and how text that only looks like one is encoded."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from .errors import BundleError, PromptError
from .tokenizer import bounded

_MOST_OF_FORMS = 1 << 26  # characters of all that control tokens begin and end with; thousands of them have a million


@dataclass(frozen=True)
class Encoded:
    """A text's tokens, and where in it each begins and ends."""

    ids: list[int]
    spans: list[tuple[int, int]]

    def behind(self, place: int) -> list[int] | None:
        """Return the tokens of all that follows a place in the text; None if a token lies across it."""
        for index, (start, _) in enumerate(self.spans):
            if start >= place:
                return self.ids[index:] if all(end <= place for _, end in self.spans[:index]) else None
        return [] if all(end <= place for _, end in self.spans) else None


@dataclass(frozen=True)
class _Literal:
    """A tokenizer that knows no control token by its text, but by a stand-in for it that nobody can guess.

    Attributes:
        tokenizer: It.
        stand_ins: By control token.
        ids: From its numbers of added tokens to the usual ones.
    """

    tokenizer: Tokenizer
    stand_ins: dict[int, str]
    ids: dict[int, int]


class ControlTokens:
    """The tokens that steer a model: the tokenizer's special ones, and those that end a text.

    Attributes:
        hidden: Texts of special tokens, by token: what a decoded text leaves out.
        texts: Of all control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, end_tokens: Iterable[int] = ()):
        known = tokenizer.get_added_tokens_decoder()
        added = {token: each.content for token, each in known.items()}
        self._tokenizer, self._added = tokenizer, added
        self.hidden = {token: text for token, text in added.items() if known[token].special}
        self.texts = self.hidden | {token: added[token] for token in end_tokens if token in added}
        if sum(len(text) ** 2 for text in self.texts.values()) > _MOST_OF_FORMS:
            raise BundleError("the bundle's tokenizer has special tokens of a length that no tokenizer's have")

    def mark(self, text: str, marker: str) -> str:
        """Put a marker inside whatever is a control token's text, or may become one by what is beside it."""
        pattern, beginnings, endings = self._forms
        text = pattern.sub(lambda found: found[0][0] + marker + found[0][1:], text)
        # Blanks stay outermost, as templates strip them.
        bare = text.rstrip()
        if any(bare[-length:] in beginnings for length in range(1, min(len(bare), self._longest) + 1)):
            text = bare + marker + text[len(bare) :]
        bare = text.lstrip()
        if any(bare[:length] in endings for length in range(1, min(len(bare), self._longest) + 1)):
            text = text[: len(text) - len(bare)] + marker + bare
        return text

    def encode(self, text: str, breaks: Collection[int] = ()) -> Encoded:
        """Encode a text with its control tokens, without adding any.

        Args:
            text: Any.
            breaks: Places in it across which no control token lies: what looks like one there is text.

        Raises:
            PromptError: See `encode_literally`.
        """
        found = self._tokenizer.encode(text, add_special_tokens=False)
        genuine, forged = [], False
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if token in self.texts and any(start < place < end for place in breaks):
                forged = True
            elif token in self.texts:
                genuine.append((token, start, end))
        if not forged:
            return Encoded(found.ids, found.offsets)
        # One pass over all of it, so that what lies between control tokens is cut as it always is.
        given, origin, done = "", list[int](), 0
        for token, start, end in genuine:
            at = text.find(self.texts[token], start, end)  # blanks around it may belong to the token
            start, end = (start, end) if at < 0 else (at, at + len(self.texts[token]))
            stand_in = self._literal.stand_ins[token]
            given += text[done:start] + stand_in
            origin += [*range(done, start), *[start] * len(stand_in)]
            done = end
        given += text[done:]
        origin += range(done, len(text) + 1)
        encoded = self._encode(given, add_special_tokens=False)
        return Encoded(encoded.ids, [(origin[start], origin[end]) for start, end in encoded.spans])

    def encode_literally(self, text: str) -> list[int]:
        """Encode a text in which nothing is a control token; what the tokenizer puts around every text stays.

        Raises:
            PromptError: The tokenizer cannot write a control token's text in any other way.
        """
        return self._encode(text, add_special_tokens=True).ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> Encoded:
        literal = self._literal
        found = literal.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        for token, added in zip(found.ids, found.special_tokens_mask, strict=True):
            if token in self._reachable and not added:
                raise PromptError(f"this tokenizer cannot write {self.texts[token]} as text")
        return Encoded([literal.ids.get(token, token) for token in found.ids], found.offsets)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.texts.values()), default=0)

    @cached_property
    def _forms(self) -> tuple[re.Pattern[str], set[str], set[str]]:
        """What finds control tokens in a text, the longest first; and what they begin and end with."""
        known = sorted((text for text in self.texts.values() if len(text) > 1), key=len, reverse=True)
        beginnings = {text[:end] for text in known for end in range(1, len(text))}
        endings = {text[start:] for text in known for start in range(1, len(text))}
        return re.compile("|".join(map(re.escape, known)) or "(?!)"), beginnings, endings

    @cached_property
    def _reachable(self) -> frozenset[int]:
        """Control tokens that stand in the vocabulary proper, so that text might be cut into them."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        return frozenset(token for token, text in self.texts.items() if vocabulary.get(text) == token)

    @cached_property
    def _literal(self) -> _Literal:
        content = json.loads(self._tokenizer.to_str())
        nonce = secrets.token_hex(8)
        stand_ins = {token: f"\ue000{nonce}-{token}\ue001" for token in self.texts}
        for entry in content["added_tokens"]:
            entry["content"] = stand_ins.get(entry["id"], entry["content"])
        try:
            tokenizer = Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # tokenizers raises plain Exception, of what it has written itself
            raise PromptError(f"the bundle's tokenizer cannot take control tokens as text: {error}") from error
        # Added tokens outside the vocabulary are numbered anew.
        names = self._added | stand_ins
        numbered = tokenizer.get_added_tokens_decoder()
        tokens = {name: token for token, name in names.items()}
        ids = {number: tokens[known.content] for number, known in numbered.items()}
        return _Literal(bounded(tokenizer), stand_ins, ids)
