"""train/corpora/passages.py: prompts about what a model wrote itself."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import handmade

SCRIPT = Path(__file__).parents[2] / "train" / "corpora" / "passages.py"
SPEC = importlib.util.spec_from_file_location("passages", SCRIPT)
assert SPEC is not None and SPEC.loader is not None
passages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(passages)

SENTENCE = "This is one of several sentences that are long enough to be a passage. "
CODE = "```python\n" + "x = 1  # a line of code\n" * 5 + "```"


def test_passages_are_sentences_in_a_row_and_whole_blocks() -> None:
    answer = f"Short. One.\n\n{SENTENCE * 6}\n\n{CODE}\n\n| a table. | of. |\n\n```\nx\n```"
    prose, code = passages.passages_of(answer, random.Random(0))
    assert code == [CODE]
    assert len(prose) == 1 and prose[0] in SENTENCE * 6 and 2 <= prose[0].count("passage.") <= 5


def test_prompts_of_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First answers alone are taken, and every prompt is an instruction of its kind and a passage of theirs."""
    tokenizer = handmade.train_tokenizer()
    said = [(0, "a question "), (1, f"{SENTENCE * 5}\n\n{CODE}"), (0, "another "), (1, "Never this one. " * 20)]
    pieces = [(role, tokenizer.encode(text).ids) for role, text in said]
    row = {"tokens": [t for _, ids in pieces for t in ids], "role": [role for role, ids in pieces for _ in ids]}
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "corpus" / "texts-00000.parquet")
    monkeypatch.setattr(passages, "load_tokenizer", lambda _: tokenizer)
    out = tmp_path / "prompts.jsonl"
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "corpus"), "--out", str(out), "--prompts", "200"])
    passages.main()
    prompts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    instructions = json.loads(passages.INSTRUCTIONS.read_text())
    kinds = {each: kind for kind, several in instructions.items() for each in several}
    assert len(prompts) == 200
    for prompt in prompts:
        instruction, passage = prompt.split("\n\n", 1)
        assert passage == CODE if kinds[instruction] == "on_code" else passage in SENTENCE * 5
    assert {kinds[prompt.split("\n\n", 1)[0]] for prompt in prompts} == set(passages.KINDS)
