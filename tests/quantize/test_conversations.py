"""What a chat model itself writes, as text for calibration and gates."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import handmade

from dynamo_graph.files import read_report
from dynamo_quantize import conversations, quantize_bundle
from dynamo_quantize.conversations import QUESTIONS, first_sentences, own_words
from dynamo_runtime import Engine
from dynamo_runtime.bundle import Bundle, load_bundle

from .conftest import Exported

FEW = 6
TEMPLATE = "{% for m in messages %}Q: {{ m['content'][:20] }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"


@pytest.fixture
def talking(export: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A plain bundle with a chat template, few questions, and an empty cache."""
    folder = tmp_path / "bundle"
    shutil.copytree(export("plain").folder, folder)
    handmade.add_file(folder, "chat_template.jinja", TEMPLATE)
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(QUESTIONS.read_text().splitlines()[:FEW]))
    monkeypatch.setattr(conversations, "QUESTIONS", questions)
    monkeypatch.setattr(conversations, "NEW_TOKENS", 12)
    monkeypatch.setenv("DYNAMO_CACHE", str(tmp_path / "cache"))
    return load_bundle(folder)


def test_questions_are_all_different() -> None:
    """And enough of them."""
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()
    assert len(questions) == len(set(questions)) == 48 and all(question.strip() for question in questions)


def test_asked_once(talking: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are what greedy decoding of the question gives, and are kept by graph and question."""
    spoken = own_words(talking)
    assert len(spoken) == FEW
    engine = Engine(talking)
    for conversation, question in zip(spoken, conversations.QUESTIONS.read_text().splitlines(), strict=True):
        assert engine.bundle.tokenizer.decode(conversation.prompt) == f"Q: {question[:20]}A:"
        expected = engine.generate(conversation.prompt, max_new_tokens=12, strategy="autoregressive", temperature=0.0)
        assert conversation.answer == expected.tokens
    kept = list((tmp_path / "cache" / "answers").iterdir())
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr(conversations, "Engine", None)
        assert own_words(talking) == spoken
    for damage in ("[[1, 2", "[]", json.dumps([[10**6]] * FEW), json.dumps([["a"]] * FEW)):
        kept[0].write_text(damage)
        assert own_words(talking) == spoken


def test_a_cache_that_cannot_be_written(talking: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs time, and nothing else."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNAMO_CACHE", str(tmp_path / "file"))
    assert len(own_words(talking)) == FEW


@pytest.mark.parametrize("why", ["no template", "no jinja2", "a template that refuses"])
def test_who_cannot_be_talked_to(
    why: str, talking: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Is measured on other text, and that is said."""
    if why == "no template":
        (talking.folder / "chat_template.jinja").unlink()
    elif why == "no jinja2":
        monkeypatch.setitem(sys.modules, "jinja2", None)
        monkeypatch.delitem(sys.modules, "dynamo_runtime.templates", raising=False)
    else:
        (talking.folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with caplog.at_level(logging.INFO, "dynamo_quantize"):
        assert own_words(talking) == []
    assert "not measured on its own answers: " in caplog.text


def test_gates_run_on_the_answers(
    talking: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Half of them calibrate, the other half are judged, and the last line counts changed first sentences."""
    with caplog.at_level(logging.INFO, "dynamo_quantize"):
        graph = quantize_bundle(talking.folder, tmp_path / "out/model.onnx", "int8", allow_degraded=True)
    made = load_bundle(graph)
    assert made.quantization is not None and made.quantization.calibration is not None
    spoken = own_words(talking)
    assert made.quantization.calibration == {
        "text": f"its own answers to {FEW // 2} questions",
        "tokens": sum(len(each.tokens) for each in spoken[::2]),
    }
    gates = read_report(made.folder)["gates"]
    assert gates["text"] == f"its own answers to {FEW // 2} questions"
    assert gates["scored_tokens"] == sum(len(each.answer) + 1 for each in spoken[1::2])
    row = next(row for row in gates["rows"] if row["gate"] == "answers")
    assert row["figure"] == f"first sentences changed, of {FEW // 2}" and row["limit"] is None
    engine = Engine(made)
    own = first_sentences(made, [engine.generate(e.prompt, **conversations.GREEDY).tokens for e in spoken[1::2]])
    theirs = first_sentences(made, [each.answer for each in spoken[1::2]])
    assert row["value"] == sum(a != b for a, b in zip(own, theirs, strict=True))
    assert f"{row['value']} of {FEW // 2} first sentences changed" in caplog.messages[-1]
    assert capsys.readouterr().out.startswith(f"measured on its own answers to {FEW // 2} questions\n")


def test_a_text_that_is_named_comes_first(talking: Bundle, tmp_path: Path, text: Path) -> None:
    """For gates and calibration, each on its own."""
    graph = quantize_bundle(
        talking.folder, tmp_path / "out/model.onnx", "int8", gate_text=text, calibration=text, allow_degraded=True
    )
    made = load_bundle(graph)
    assert made.quantization is not None and made.quantization.calibration is not None
    assert made.quantization.calibration["text"] == read_report(made.folder)["gates"]["text"] == "code.py"
    assert not (tmp_path / "cache" / "answers").exists()


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Paris is it. It is large.", "Paris is it."),
        (" Yes! No", "Yes!"),
        ("3.5 miles", "3.5 miles"),
        ("one\ntwo", "one"),
        ("Sure, here you go: 1. a", "Sure, here you go:"),
        ("", ""),
    ],
)
def test_first_sentence(text: str, first: str) -> None:
    """Ends at a mark that a blank follows, or at the end of the line."""
    assert conversations._first_sentence(text) == first
