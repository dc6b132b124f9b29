"""Prompt sets and prompt files, in the formats that benchmarks publish."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_evaluate.errors import EvaluationError
from dynamo_evaluate.prompts import Prompt, fingerprint, load_prompts
from dynamo_runtime import DynamoError, Engine

VICUNA = {"question_id": 1, "text": "How can I improve my time management skills?", "category": "generic"}
MT_BENCH = {
    "question_id": 81,
    "category": "writing",
    "turns": ["Compose a post.", "Rewrite it."],
    "reference": ["a", "b"],
}
SPEC_BENCH = {"question_id": 160, "category": "translation", "turns": ["Translate German to English: Guten Tag."]}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The bundle that ships, for its tokenizer."""
    from dynamo_runtime.bundle import DEFAULT_BUNDLE

    return Engine(DEFAULT_BUNDLE, provider="cpu", threads=1)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (VICUNA, Prompt("1", (VICUNA["text"],), False, "generic")),
        (MT_BENCH, Prompt("81", ("Compose a post.", "Rewrite it."), False, "writing")),
        (SPEC_BENCH, Prompt("160", ("Translate German to English: Guten Tag.",), False, "translation")),
        (HUMAN_EVAL, Prompt("HumanEval/0", ("def f():\n",), True)),
        ({"prompt": "Once"}, Prompt("1", ("Once",))),
    ],
)
def test_published_formats(tmp_path: Path, engine: Engine, row: dict[str, Any], expected: Prompt) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps(row) + "\n\n")
    assert load_prompts(str(path), engine) == [expected]
    packed = tmp_path / "question.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert load_prompts(str(packed), engine) == [expected]
    assert Prompt.of(json.loads(json.dumps(expected.record))) == expected


def test_lines_of_text(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("One\n\nTwo\n")
    assert load_prompts(str(path), engine, code=True) == [Prompt("1", ("One",), True), Prompt("3", ("Two",), True)]
    assert load_prompts(str(path), engine, limit=1) == [Prompt("1", ("One",))]


def test_other_separators_of_lines_and_a_byte_order_mark(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(("\ufeff" + json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\r\n").encode())
    assert load_prompts(str(path), engine)[0].turns == ("a\u2028b",)


def test_the_papers_ten(engine: Engine) -> None:
    found = load_prompts("paper", engine)
    assert len(found) == 10 and found[0].turns == ("I am a student at the",)
    assert fingerprint(found) != fingerprint(found[:9])


def test_held_out_modules(engine: Engine) -> None:
    found = load_prompts("stdlib", engine, limit=5)
    assert len({prompt.id for prompt in found}) == 5
    for prompt in found:
        assert prompt.code and prompt.turns[0].endswith("\n")
        assert 96 <= len(engine.encode(prompt.turns[0])) <= 192
    assert load_prompts("stdlib", engine, limit=5) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompts"),
        ("no json\n", "line 1 of .* is not a JSON object"),
        ("[" * 100_000, "line 1 of .* is not a JSON object"),
        ('\n{"prompt": "\\ud800"}', "the prompt in line 2 of .* is not valid UTF-8"),
        ('{"prompt": "a"}\n{"question": "b"}\n', "line 2 of .* has no prompt"),
        ('{"turns": []}\n', "has no prompt"),
        ('{"turns": ["a", 3]}\n', "has no prompt"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "two prompts with the same"),
    ],
)
def test_bad_files(tmp_path: Path, engine: Engine, content: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(DynamoError, match=message):
        load_prompts(str(path), engine)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no prompts"),
        (b"no gzip", "cannot read prompts from .*p.jsonl.gz: Not a gzipped file"),
        (
            gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9],
            "cannot read prompts from .*p.jsonl.gz: Compressed file ended",
        ),
        (gzip.compress(b'{"prompt": "a"}\n{"prompt": "\xff"}', mtime=0), "line 2 of .*p.jsonl.gz is not text in UTF-8"),
    ],
)
def test_broken_archives(tmp_path: Path, engine: Engine, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        load_prompts(str(path), engine)


def test_missing_file_and_bad_limit(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(EvaluationError, match="cannot read prompts"):
        load_prompts(str(tmp_path / "none.txt"), engine)
    with pytest.raises(EvaluationError, match="fewer than 1000000"):
        load_prompts("stdlib", engine, limit=1_000_000)
