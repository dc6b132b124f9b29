"""Streaming text: whole characters, nothing taken back, stop strings independent of the pieces."""

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import handmade
from tokenizers import Tokenizer, decoders, models

from dynamo_runtime.text import Detokenizer, StopStrings

BYTE_LEVEL = handmade.train_tokenizer()
SPECIAL = [token.content for token in BYTE_LEVEL.get_added_tokens_decoder().values()]  # never shown


def byte_fallback() -> Tokenizer:
    """A sentencepiece-like tokenizer: ▁ for spaces, <0xNN> for what it has no piece for."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁def", "▁return", "▁x", "x", "▁", "é"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


FALLBACK = byte_fallback()


def fallback_encode(text: str) -> list[int]:
    tokens: list[int] = []
    for character in text:
        piece = FALLBACK.token_to_id({" ": "▁"}.get(character, character))
        tokens += [piece] if piece is not None else list(character.encode())
    return tokens


def stream(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30), st.text(max_size=60))
def test_text_streams_back_exactly(prompt: str, text: str) -> None:
    assume(not any(special in prompt + text for special in SPECIAL))
    tokens = BYTE_LEVEL.encode(text).ids
    pieces = stream(BYTE_LEVEL, BYTE_LEVEL.encode(prompt).ids, tokens)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@settings(max_examples=200, deadline=None)
@given(st.text("x é日🎉def", max_size=12), st.text("x é日本🎉 y", max_size=24))
def test_byte_fallback_streams_back_exactly(prompt: str, text: str) -> None:
    """One incomplete byte turns all neighbouring bytes into replacement characters until it is completed."""
    pieces = stream(FALLBACK, fallback_encode("x" + prompt), fallback_encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=60))
def test_arbitrary_tokens_stream_like_decoding_at_once(tokens: list[int]) -> None:
    """Any tokens, whole characters or not."""
    pieces = stream(BYTE_LEVEL, [], tokens)
    whole = BYTE_LEVEL.decode(tokens)
    assume("\ufffd" * 8 not in whole)  # longer runs of broken bytes are given up on, see below
    assert "".join(pieces) == whole


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=30), st.text(min_size=1, max_size=20))
def test_a_broken_prompt_does_not_break_the_text(prompt: list[int], text: str) -> None:
    pieces = stream(BYTE_LEVEL, prompt, BYTE_LEVEL.encode(text).ids)
    assert "".join(pieces).endswith(text)


def test_characters_come_when_they_are_whole() -> None:
    tokens = [BYTE_LEVEL.token_to_id(character) for character in "ðŁİĲ"]  # 🎐 byte by byte
    assert BYTE_LEVEL.decode(tokens) == "🎐"
    assert stream(BYTE_LEVEL, [], tokens) == ["", "", "", "🎐", ""]
    assert stream(BYTE_LEVEL, [], tokens[:2]) == ["", "", "\ufffd"]


def test_leading_space_after_a_prompt_is_kept() -> None:
    space_def = FALLBACK.token_to_id("▁def")
    assert FALLBACK.decode([space_def]) == "def"
    assert "".join(stream(FALLBACK, fallback_encode("x"), [space_def])) == " def"
    assert "".join(stream(FALLBACK, [], [space_def])) == "def"


def test_endless_broken_bytes_are_not_held_for_ever() -> None:
    byte = BYTE_LEVEL.token_to_id("Ī")  # a lone continuation byte
    detokenizer = Detokenizer(BYTE_LEVEL)
    pieces = [detokenizer.push(byte) for _ in range(200)]
    assert sum(map(len, pieces)) > 150
    assert sum(map(len, pieces)) + len(detokenizer.flush()) == 200


def run_stops(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    out = "".join(matcher.push(piece) for piece in pieces)
    return out + matcher.flush(), matcher.stopped


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.text("abc", max_size=25),
    st.lists(st.integers(0, 25), max_size=8),
)
def test_stop_strings_do_not_depend_on_the_pieces(stops: list[str], text: str, cuts: list[int]) -> None:
    expected = text
    for end in range(len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            expected = text[: end - max(map(len, complete))]
            break
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    found, stopped = run_stops(stops, pieces)
    assert found == expected
    assert stopped == any(stop in text for stop in stops)


@pytest.mark.parametrize(
    ("piece", "expected"),
    [("hello", "hello"), ("hello\n", "hello"), ("hello\n\nd", "hello"), ("hello\n\ndx", "hello\n\ndx")],
)
def test_only_a_possible_beginning_is_held_back(piece: str, expected: str) -> None:
    assert StopStrings(["\n\ndef"]).push(piece) == expected
