"""Prompts: the paper's ten, held-out Python of this machine, and files in the formats that benchmarks use."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_runtime import Engine
from dynamo_runtime.corpus import STANDARD_LIBRARY, json_object, standard_library
from dynamo_runtime.text import as_text

from .errors import EvaluationError

PAPER = "paper"
PAPER_PROMPTS = (
    "I am a student at the",
    "This is going to be a very",
    "He wanted to play, but",
    "How can we",
    "What will",
    "Will you",
    "Please explain",
    "Do not",
    "Wow! I can't believe that",
    "This is amazing! We",
)
"""The sentence-completion benchmark of DynaMo, section "Evaluation"."""

STDLIB_TOKENS = 96  # least length of a prompt cut from a module
STDLIB_PROMPTS = 60


@dataclass(frozen=True)
class Prompt:
    """One prompt, or a conversation.

    Attributes:
        id: Unique among the prompts.
        turns: What is said in turn; every one but the first follows an answer.
        code: Whether prompt and answer are Python.
        category: As the benchmark sorts it, or "".
    """

    id: str
    turns: tuple[str, ...]
    code: bool = False
    category: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """For a results file."""
        return asdict(self) | {"turns": list(self.turns)}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Prompt:
        """From a results file."""
        return cls(**(record | {"turns": tuple(record["turns"])}))


def load_prompts(source: str, engine: Engine, limit: int | None = None, code: bool = False) -> list[Prompt]:
    """Return prompts by the name of a set, or from a file.

    Args:
        source: "paper", "stdlib", or a file: one prompt a line, or JSON lines as of Vicuna (`text`), MT-Bench and
            Spec-Bench (`turns`), HumanEval (`prompt`), or any with a field `prompt` or `text`; may end in .gz.
        engine: Its tokenizer says how long prompts are that are cut from modules.
        limit: At most so many: from modules evenly spread, from a file the first.
        code: Whether a file's prompts are Python; those of HumanEval and "stdlib" are known to be.

    Raises:
        DynamoError: There is no such file, no prompt in it, or a line is none.
    """
    if source == PAPER:
        return [Prompt(str(i), (text,)) for i, text in enumerate(PAPER_PROMPTS, 1)][:limit]
    if source == STANDARD_LIBRARY:
        return held_out_prompts(engine, limit or STDLIB_PROMPTS)
    return _read(Path(source), code)[:limit]


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of all prompts."""
    text = json.dumps([prompt.record for prompt in prompts], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def held_out_prompts(engine: Engine, count: int, tokens: int = STDLIB_TOKENS) -> list[Prompt]:
    """Return prompts from held-out modules, from the start of a top-level statement to the end of a line.

    Args:
        engine: For its tokenizer.
        count: How many, spread evenly over all places that qualify.
        tokens: Least length of a prompt.

    Raises:
        EvaluationError: The running interpreter's library does not have so many.
    """
    found = []
    for document in standard_library(held_out=True):
        lines = document.text.splitlines(keepends=True)
        for node in ast.parse(document.text).body:
            text, length = "", 0
            for line in lines[node.lineno - 1 :]:
                text += line
                length = len(engine.encode(text)) if len(text) > 2 * tokens else 0
                if length >= tokens:
                    break
            if tokens <= length <= 2 * tokens:
                found.append(Prompt(f"{document.name}:{node.lineno}", (text,), code=True))
    if len(found) < count:
        raise EvaluationError(f"the held-out modules give {len(found)} prompts, fewer than {count}")
    return [found[i] for i in np.linspace(0, len(found) - 1, count).round().astype(int)]


def _read(path: Path, code: bool) -> list[Prompt]:
    name = path.name.removesuffix(".gz")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise EvaluationError(
            f"cannot read prompts from {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise EvaluationError(f"line {line} of {path} is not text in UTF-8") from None
    lines = text.replace("\r\n", "\n").split("\n")  # a JSON line may hold other separators of lines
    if name.endswith((".jsonl", ".json")):
        prompts = [_row(path, i, line, code) for i, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [Prompt(str(i), (line,), code) for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise EvaluationError(f"{path} has no prompts")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise EvaluationError(f"{path} has two prompts with the same question_id, task_id or id")
    return prompts


def _row(path: Path, number: int, line: str, code: bool) -> Prompt:
    row = json_object(line)
    if row is None:
        raise EvaluationError(f"line {number} of {path} is not a JSON object: one a line is wanted")
    turns = row.get("turns") or [row.get("prompt") or row.get("text")]
    if not isinstance(turns, list) or not all(isinstance(turn, str) and turn for turn in turns):
        raise EvaluationError(f"line {number} of {path} has no prompt in a field prompt, text or turns")
    for turn in turns:
        as_text(turn, f"the prompt in line {number} of {path}")
    identity = next((row[name] for name in ("question_id", "task_id", "id") if name in row), number)
    is_code = code or {"task_id", "prompt", "entry_point"} <= row.keys()  # HumanEval's
    return Prompt(str(identity), tuple(turns), is_code, str(row.get("category", "")))
