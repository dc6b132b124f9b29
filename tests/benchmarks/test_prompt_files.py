"""The prompts in `benchmarks/prompts`: how many, well-formed, none like another or one of the calibration."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from dynamo_evaluate.prompts import load_prompts
from dynamo_quantize.conversations import QUESTIONS
from dynamo_runtime.bundle import DEFAULT_BUNDLE
from dynamo_runtime.corpus import json_rows
from dynamo_runtime.engine import Engine

FOLDER = Path(__file__).parents[2] / "benchmarks" / "prompts"
COUNTS = {"chat": 80, "code": 40, "prose": 40, "edit": 40, "json": 30}
RUN = 5  # words in a row
SHARED = 0.25  # of the runs of the shorter of two prompts


def rows(task: str) -> list[dict[str, str]]:
    """The rows of a file."""
    return [json.loads(line) for line in (FOLDER / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of words in a text, or the text itself if it is short."""
    words = tuple(text.lower().split())
    return {words[i : i + RUN] for i in range(max(len(words) - RUN + 1, 1))}


def test_the_files_are_those_of_the_tasks() -> None:
    """No more and no less."""
    assert sorted(path.stem for path in FOLDER.glob("*.jsonl")) == sorted(COUNTS)


@pytest.mark.parametrize("task", COUNTS)
def test_rows(task: str) -> None:
    """Three fields, ids that count up, clean text; both readers find the same prompts."""
    found = rows(task)
    assert len(found) == COUNTS[task]
    assert all(list(row) == ["id", "task", "prompt"] and row["task"] == task for row in found)
    assert [row["id"] for row in found] == [f"{task}-{number:02}" for number in range(1, COUNTS[task] + 1)]
    prompts = [row["prompt"] for row in found]
    for prompt in prompts:
        assert prompt == prompt.strip() and "  \n" not in prompt and "<|" not in prompt and "\r" not in prompt
        assert prompt.count("```") % 2 == 0
    path = FOLDER / f"{task}.jsonl"
    assert [document.text for document in json_rows(path, "prompt")] == prompts
    read = load_prompts(str(path), Engine(DEFAULT_BUNDLE, provider="cpu", threads=1))
    assert [(prompt.id, prompt.turns) for prompt in read] == [(row["id"], (row["prompt"],)) for row in found]


def test_no_prompt_is_like_another() -> None:
    """No two are alike by more than a quarter of their runs of five words, nor like a question of the calibration."""
    texts = [row["prompt"] for task in COUNTS for row in rows(task)]
    texts += QUESTIONS.read_text(encoding="utf-8").splitlines()
    for (one, its), (other, others) in itertools.combinations([(text, runs(text)) for text in texts], 2):
        assert len(its & others) <= SHARED * min(len(its), len(others)), f"{one!r} is like {other!r}"


def test_given_texts_have_the_length_of_a_page() -> None:
    """What is to be edited has 80 to 200 words, what fields are taken from 15 to 80; openings are 2 to 4 sentences."""
    for task, least, most in (("edit", 80, 200), ("json", 15, 80), ("prose", 25, 80)):
        for row in rows(task):
            instruction, given = row["prompt"].split("\n\n", 1)
            assert instruction and least <= len(given.split()) <= most, row["id"]
