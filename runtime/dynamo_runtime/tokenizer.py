"""A tokenizer that comes from anywhere: what it makes of a text is bounded, and where it panics there is an error."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import BundleError, DynamoError, PromptError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_MOST_FILE_BYTES = 128 << 20  # the largest in use have 35 MB
_MOST_CHARACTERS = 64 << 20  # of a text
# A text may become so long whatever it was, or so many times as long as it was.
_FREE_CHARACTERS, _MOST_TIMES = 4 << 20, 16
_MOST_TIMES_DECODED = 1024
_LONGEST_OF_UNICODE = 64  # bytes that its forms make of a character: 33, and some room


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.

    Raises:
        BundleError: It is absent, unreadable, too large, or multiplies what it decodes.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        raise BundleError(f"{path} is missing: this bundle cannot turn text into tokens")
    if path.stat().st_size > _MOST_FILE_BYTES:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, which no tokenizer has")
    with _errors(BundleError, f"{path} is not a readable tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
        times = _times(_description(tokenizer.decoder))
    if times > _MOST_TIMES_DECODED:
        raise BundleError(f"{path} is not a usable tokenizer: it decodes a character as {times:.3g} others")
    return bounded(tokenizer)


def bounded(tokenizer: Tokenizer) -> Tokenizer:
    """Return the same tokenizer, as `Bounded`, which cannot be a subclass of it."""
    return cast("Tokenizer", Bounded(tokenizer))


class Bounded:
    """A tokenizer with checks around its work; everything else is the tokenizer's own."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._most_times = _times(_description(tokenizer.normalizer))
        self._texts: dict[tuple[int, bool], str] = {}  # of single tokens, which streams ask about again and again

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return bounded, (self._tokenizer,)

    def encode(self, text: str, *args: Any, **options: Any) -> Encoding:
        """Encode a text.

        Raises:
            PromptError: It is too long, becomes too long, or the tokenizer panics.
        """
        if len(text) > _MOST_CHARACTERS:
            raise PromptError(f"a text of {len(text)} characters is too long to be encoded: give it in pieces")
        with _errors(PromptError, "the tokenizer fails on this text"):
            if len(text) * self._most_times > _room(text):
                self._check_growth(text)
            return self._tokenizer.encode(text, *args, **options)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode tokens.

        Raises:
            PromptError: The tokenizer panics.
        """
        if len(ids) != 1:
            return self._decode(ids, skip_special_tokens)
        single = ids[0], skip_special_tokens
        text = self._texts.get(single)
        if text is None:
            text = self._texts[single] = self._decode(ids, skip_special_tokens)
        return text

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        # Once a token: `_errors` itself would take as long as the work.
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        except BaseException:
            with _errors(PromptError, "the tokenizer fails on these tokens"):
                raise

    def _check_growth(self, text: str) -> None:
        """Normalise a text step by step, and look before each how long it may become.

        Raises:
            PromptError: Too long.
        """
        room = _room(text)
        for step in _steps(_description(self._tokenizer.normalizer)):
            if len(text) * _times(step) > room:
                raise PromptError("the bundle's tokenizer multiplies this text: it would become too long")
            text = _normalized(step, text)


def _room(text: str) -> int:
    """Return characters that a text may become."""
    return max(_FREE_CHARACTERS, _MOST_TIMES * len(text))


@contextlib.contextmanager
def _errors(kind: type[DynamoError], what: str) -> Iterator[None]:
    """Yield whatever the library raises is an error of ours; a panic in Rust is not even an `Exception`."""
    try:
        yield
    except DynamoError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {error}") from error


def _description(part: Any) -> Mapping[str, Any]:
    """Return a normalizer or decoder as it stands in the file."""
    return json.loads(part.__getstate__()) if part is not None else {}


def _steps(description: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the normalizers that a normalizer is made of, in order."""
    if (steps := description.get("normalizers")) is None:
        yield description
        return
    for step in steps:
        yield from _steps(step)


def _normalized(description: Mapping[str, Any], text: str) -> str:
    """Return what a normalizer makes of a text."""
    from tokenizers import normalizers

    normalizer: Any = normalizers.NFC()
    normalizer.__setstate__(json.dumps(description).encode())  # which makes it another
    result: str = normalizer.normalize_str(text)
    return result


def _times(part: Mapping[str, Any]) -> float:
    """Return how many characters a normalizer or decoder may make of one, by what its file says.

    Unicode's own forms count as one, though a few characters become up to 18: that is up to the text.
    """
    if steps := part.get("normalizers") or part.get("decoders"):
        return math.prod(map(_times, steps), start=1.0)
    if part.get("type") == "Prepend":
        return 1.0 + len(part["prepend"])
    if part.get("type") == "Replace":
        found = part["pattern"].get("String", "")
        # A regular expression may find nothing before every character.
        return max(1.0, len(part["content"]) / len(found)) if found else 1.0 + len(part["content"])
    if part.get("type") == "Precompiled":
        return _times_precompiled(base64.b64decode(part["precompiled_charsmap"]))
    return 1.0


def _times_precompiled(table: bytes) -> float:
    """Return the same of sentencepiece's table: a trie, whose size comes first, and what its leaves are replaced by."""
    longest = max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")))
    return float(longest) if longest > _LONGEST_OF_UNICODE else 1.0
