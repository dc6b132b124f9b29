"""Tokenizers that come from anywhere: none takes the memory or the process, and usual ones are what they were."""

import base64
import copy
import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from dynamo_runtime import BundleError, Engine, PromptError, load_bundle
from dynamo_runtime.tokenizer import bounded, read_tokenizer

TEXT = "def f(x):\n    return 'ﷺ' + x  # ﬁne\n"
USUAL: dict[str, Any] = {
    "none": None,
    "bert": normalizers.BertNormalizer(),
    "t5": normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), "▁"), normalizers.Strip()]),
    "llama": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "many": normalizers.Sequence([normalizers.NFKD(), *[normalizers.Replace(Regex("\\s"), " ")] * 8]),
}


def changed(copied, **parts: Any) -> Path:
    """The copy's tokenizer with other parts."""
    path = copied.folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(path))
    copied.relist()
    return path


@pytest.mark.parametrize("name", USUAL)
def test_usual_tokenizers_are_untouched(copied, name: str) -> None:
    path = changed(copied, normalizer=USUAL[name])
    mine, theirs = read_tokenizer(path), Tokenizer.from_file(str(path))
    assert mine.encode(TEXT * 1000).ids == theirs.encode(TEXT * 1000).ids
    assert mine.get_vocab() == theirs.get_vocab()
    for _ in range(2):  # single tokens are remembered
        for token in (0, 1, 2, 65, 300):
            assert mine.decode([token]) == theirs.decode([token])
            assert mine.decode([token], skip_special_tokens=False) == theirs.decode([token], skip_special_tokens=False)
    tokens = theirs.encode(TEXT).ids
    assert mine.decode(tokens) == theirs.decode(tokens)


@pytest.mark.parametrize("name", [name for name in USUAL if name != "none"])
def test_long_texts_are_no_bombs(copied, name: str) -> None:
    """Step by step, as is looked at texts of which the file alone might make too much."""
    read_tokenizer(changed(copied, normalizer=USUAL[name]))._check_growth(TEXT * 100_000)  # type: ignore[attr-defined]


def bombs() -> dict[str, Any]:
    return {
        "one for many": normalizers.Replace("x", "y" * (1 << 20)),
        "step by step": normalizers.Sequence([normalizers.Replace("x", "x" * 100)] * 10),
        "before every character": normalizers.Replace(Regex("(?=.)"), "y" * (1 << 20)),
        "of nothing": normalizers.Replace("", "y" * (1 << 20)),
        "in front": normalizers.Prepend("y" * (16 << 20)),
    }


@pytest.mark.parametrize("name", bombs())
def test_a_text_is_not_multiplied(copied, name: str) -> None:
    changed(copied, normalizer=bombs()[name])
    bundle = load_bundle(copied.folder)
    started = time.perf_counter()
    with pytest.raises(PromptError, match="multiplies this text"):
        Engine(bundle, threads=1).generate("x" * 100)
    with pytest.raises(PromptError, match="multiplies this text"):
        bundle.control_tokens.encode_literally("x" * 100)
    assert time.perf_counter() - started < 5


def test_a_table_that_multiplies() -> None:
    def table(replacement: bytes) -> Any:
        found = base64.b64encode((0).to_bytes(4, "little") + replacement + b"\0").decode()
        return {"type": "Precompiled", "precompiled_charsmap": found}

    from dynamo_runtime.tokenizer import _times

    assert _times(table(b"y" * 33)) == 1  # as Unicode does
    assert _times(table(b"y" * 5000)) == 5000


def test_a_decoder_that_multiplies(copied) -> None:
    path = changed(copied, decoder=decoders.Sequence([decoders.Replace("a", "a" * 100)] * 5))
    with pytest.raises(BundleError, match=r"decodes a character as 1e\+10 others"):
        read_tokenizer(path)


def test_a_panic_is_an_error(copied) -> None:
    """A regular expression that gives up has Rust panic, which is no `Exception` in Python."""
    changed(copied, pre_tokenizer=pre_tokenizers.Split(Regex("(a+)+$"), "isolated"))
    bundle = load_bundle(copied.folder)
    for encode in (bundle.tokenizer.encode, bundle.control_tokens.encode, bundle.control_tokens.encode_literally):
        with pytest.raises(PromptError, match="the tokenizer fails on this text"):
            encode("a" * 50 + "!")
    assert bundle.tokenizer.encode("aaa").ids


def test_it_is_copied_like_any(copied) -> None:
    bundle = load_bundle(copied.folder)
    assert pickle.loads(pickle.dumps(bundle.tokenizer)).encode(TEXT).ids == bundle.tokenizer.encode(TEXT).ids
    assert copy.copy(bundle.tokenizer).get_vocab_size() == bundle.tokenizer.get_vocab_size()


def test_what_is_no_panic_goes_on(copied) -> None:
    class Interrupted:
        normalizer = None

        def encode(self, text: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bounded(Interrupted()).encode("x")  # type: ignore[arg-type]


def test_files_that_no_tokenizer_has(copied, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied.folder / "tokenizer.json"
    path.write_text("[" * 100_000)
    with pytest.raises(BundleError, match="is not a readable tokenizer"):
        read_tokenizer(path)
    monkeypatch.setattr("dynamo_runtime.tokenizer._MOST_FILE_BYTES", 99_999)
    with pytest.raises(BundleError, match="has 100000 bytes, which no tokenizer has"):
        read_tokenizer(path)


def test_texts_that_nobody_has(copied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_runtime.tokenizer._MOST_CHARACTERS", 1000)
    with pytest.raises(PromptError, match="a text of 1001 characters is too long"):
        Engine(copied.folder, threads=1).generate("x" * 1001)


def test_padding_of_the_file_is_left_out(copied) -> None:
    path = copied.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["padding"] = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    path.write_text(json.dumps(content))
    copied.relist()
    assert len(load_bundle(copied.folder).tokenizer.encode("x").ids) == 1
