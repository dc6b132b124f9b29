"""What a chat model itself writes: questions of ours, answered greedily by the bundle in full precision.

Rounding weights changes such text first: where two words are nearly as likely, the other one is chosen, and the answer
goes another way. Perplexity on somebody else's text does not show that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynamo_runtime import Engine
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.cache import cache_folder
from dynamo_runtime.errors import DynamoError, OutputError
from dynamo_runtime.files import file_name, read_small, write_whole

QUESTIONS = Path(__file__).with_name("questions.txt")
NEW_TOKENS = 72  # of an answer
MOST_BYTES = 16 << 20  # of answers that are kept
SENTENCE_TOKENS = 48  # of an answer, for its first sentence
GREEDY: dict[str, Any] = {"strategy": "autoregressive", "temperature": 0.0, "repetition_penalty": 1.0}
log = logging.getLogger("dynamo_quantize")


@dataclass(frozen=True)
class Exchange:
    """A question as the chat template puts it, and its answer, as tokens."""

    prompt: list[int]
    answer: list[int]

    @property
    def tokens(self) -> list[int]:
        """All of it."""
        return self.prompt + self.answer


def conversations(bundle: Bundle) -> list[Exchange]:
    """Ask a bundle our questions, or look up what it answered before.

    Args:
        bundle: In full precision, with a chat template.

    Raises:
        DynamoError: It has none, or the template does not take a question.
    """
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()
    template, control = bundle.chat_template, bundle.control_tokens
    prompts = [template.encode([{"role": "user", "content": each}], control).encoded.ids for each in questions]
    prompts = [prompt for prompt in prompts if len(prompt) + NEW_TOKENS <= bundle.context_length]
    asked = hashlib.sha256(json.dumps([prompts, NEW_TOKENS]).encode()).hexdigest()
    path = cache_folder() / "answers" / f"{file_name(bundle.graph_sha256[:16])}-{asked[:16]}.json"
    answers = _kept(path, len(prompts), bundle.vocab_size)
    if answers is None:
        log.info("asking the bundle %d questions, once: its answers are what the gates run on", len(prompts))
        engine = Engine(bundle, provider="cpu")
        answers = [
            engine.generate(prompt, max_new_tokens=NEW_TOKENS, **GREEDY).tokens
            for prompt in tqdm(prompts, desc="answers", leave=False, disable=None)
        ]
        with contextlib.suppress(OutputError):  # a cache that cannot be written costs time, nothing else
            write_whole(path, json.dumps(answers))
    return [Exchange(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def own_words(bundle: Bundle) -> list[Exchange]:
    """Return the conversations of a bundle that can be talked to; none of one that cannot."""
    try:
        return conversations(bundle)
    except DynamoError as error:
        log.info("not measured on its own answers: %s", error)
        return []


def first_sentences(bundle: Bundle, answers: Sequence[Sequence[int]]) -> list[str]:
    """Return the first sentence of every answer, given as tokens."""
    return [_first_sentence(bundle.tokenizer.decode(list(answer[:SENTENCE_TOKENS]))) for answer in answers]


def _first_sentence(text: str) -> str:
    """Up to the first mark that ends one, or line; all of a text that has none."""
    return re.split(r"(?<=[.!?:])\s|\n", text.strip(), maxsplit=1)[0]


def _kept(path: Path, count: int, vocab_size: int) -> list[list[int]] | None:
    try:
        answers = json.loads(read_small(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(answers, list) and len(answers) == count and all(isinstance(each, list) for each in answers)
    known = whole and all(isinstance(i, int) and 0 <= i < vocab_size for each in answers for i in each)
    return answers if known else None
