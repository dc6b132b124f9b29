"""A strong language model as judge, behind any endpoint of OpenAI's protocol (DynaMo, section "Evaluation")."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from tqdm import tqdm

from .cells import PAIR, SCORE
from .errors import EvaluationError
from .generate import GENERATION, Conversations
from .results import Record, Results
from .settings import PLAIN

GREEDY: Mapping[str, Any] = {"temperature": 0}
_NO_KEY = "none"  # servers on one's own machine ask for none, the client for something
_KEPT = 500  # characters of an answer that cannot be read

_SINGLE = """Below are the beginning of a text and a continuation that a language model wrote for it.
Grade the continuation. Consider whether it fits the beginning, makes sense, is correct where that can be told, and neither repeats itself nor \
breaks off its thought before its end (being cut off at the very end does not matter).
Give one sentence of reasons, and then a grade from 1 (useless) to 10 (excellent) in the form [[grade]], like [[5]].

### Beginning
{prompt}

### Continuation
{answer}
"""  # noqa: E501
_PAIR = """Below are the beginning of a text and two continuations, A and B, that language models wrote for it.
Say which is better. Consider whether they fit the beginning, make sense, are correct where that can be told, and neither repeat themselves \
nor break off a thought before their end (being cut off at the very end does not matter). Do not let their order or \
their length sway you.
Give one sentence of reasons, and then [[A]] if A is better, [[B]] if B is better, or [[C]] if neither is.

### Beginning
{prompt}

### Continuation A
{a}

### Continuation B
{b}
"""  # noqa: E501
_GRADE = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_CHOICE = re.compile(r"\[\[\s*([ABC])\s*\]\]")


@dataclass(frozen=True)
class Task:
    """One question to the judge.

    Attributes:
        kind: "score" or "pair".
        place: Setting, prompt, turn and seed.
        question: What it is asked.
        plain_first: Whether plain's text is A.
    """

    kind: str
    place: Mapping[str, Any]
    question: str
    plain_first: bool = False


class Judge:
    """A model behind an endpoint."""

    def __init__(self, endpoint: str | None, model: str, key_variable: str, request: Mapping[str, Any] = GREEDY):
        """Connect to nothing yet.

        Args:
            endpoint: Base URL, usually ending in /v1; None means OpenAI's own.
            model: Its name there.
            key_variable: Environment variable that holds the key.
            request: What is asked for beside model and messages.

        Raises:
            EvaluationError: The client library is not there, or there is no key for OpenAI's own endpoint.
        """
        try:
            import openai
        except ImportError:
            raise EvaluationError("a judge needs the client library: pip install 'dynamo-edge[eval]'") from None
        key = os.environ.get(key_variable)
        if endpoint is None and not key:
            raise EvaluationError(f"there is no key in the environment variable {key_variable}")
        self.model, self._request = model, dict(request)
        try:
            self._client = openai.OpenAI(base_url=endpoint, api_key=key or _NO_KEY, max_retries=4)
            url = self._client.base_url
            self._where = str(url.copy_with(userinfo=b"", query=None, fragment=None))
        except Exception:  # of the client's own library; it may cite a password, as it does not know where that ends
            raise EvaluationError("--endpoint is not a URL that can be asked: http://HOST:PORT/v1") from None
        self._secrets = [secret for secret in (key, url.password, url.query.decode()) if secret]

    def ask(self, question: str) -> str:
        """Return its answer.

        Raises:
            EvaluationError: It gave none.
        """
        messages: Any = [{"role": "user", "content": question}]
        try:
            found = self._client.chat.completions.create(model=self.model, messages=messages, **self._request)
        except Exception as error:  # of the client, of what it stands on, or of how it reads JSON
            raise EvaluationError(f"the judge at {self._where} does not answer: {self._redacted(error)}") from None
        try:
            answer = found.choices[0].message.content
            if not isinstance(answer, str | None):
                raise TypeError
        except (AttributeError, LookupError, TypeError):
            raise EvaluationError(f"{self._where} answers, but not as OpenAI's protocol has it") from None
        return answer or ""

    def _redacted(self, error: Exception) -> str:
        """Return what an error says, without what nobody but the judge is to know."""
        said = str(error)
        for secret in self._secrets:
            said = said.replace(secret, "…")
        return said


@dataclass(frozen=True)
class Questions:
    """What is asked about.

    Attributes:
        kinds: "score": every text of the settings and of plain is graded from 1 to 10. "pair": every text is put beside
            plain's at the same seed, in random order; equal texts are a tie without asking.
        settings: Names of those that are judged.
        limit: Of the prompts the first so many; None means all.
    """

    kinds: Collection[str]
    settings: Collection[str]
    limit: int | None = None


def judge(results: Results, model: Judge, questions: Questions, at_once: int) -> int:
    """Ask about everything that was not asked yet.

    Args:
        results: Of generations; they grow by an answer a question.
        model: Whom to ask.
        questions: What about.
        at_once: Questions under way at the same time.

    Returns:
        How many answers could not be read.

    Raises:
        EvaluationError: The judge does not answer, or another one has judged these results.
    """
    judges = {record["judge"] for kind in (SCORE, PAIR) for record in results.of(kind)} - {model.model}
    if judges:
        raise EvaluationError(f"{results.path} was judged by {judges.pop()}: judge a copy of it, two do not mix")
    tasks = []
    for task in _tasks(results, questions):
        if task.question:
            tasks.append(task)
        else:
            results.append({"kind": PAIR, **task.place, "verdict": "tie", "plain_first": False, "judge": model.model})
    for task, answer in tqdm(_ask(model, tasks, at_once), total=len(tasks), desc="questions", disable=None):
        results.append(_record(task, answer) | {"judge": model.model})
    return len(list(_tasks(results, questions)))


def _ask(model: Judge, tasks: Sequence[Task], at_once: int) -> Iterator[tuple[Task, str]]:
    """Yield answers as they come.

    The threads are daemons: an interrupt does not wait for answers that are under way, which may take minutes.
    """
    waiting: SimpleQueue[Task] = SimpleQueue()
    found: SimpleQueue[tuple[Task, str | Exception]] = SimpleQueue()

    def work() -> None:
        with contextlib.suppress(Empty):
            while True:
                task = waiting.get_nowait()
                try:
                    found.put((task, model.ask(task.question)))
                except Exception as error:
                    found.put((task, error))
                    return

    for task in tasks:
        waiting.put(task)
    for _ in range(min(at_once, len(tasks))):
        Thread(target=work, daemon=True).start()
    try:
        for _ in tasks:
            task, answer = found.get()
            if isinstance(answer, Exception):
                raise answer
            yield task, answer
    finally:  # nothing new is asked
        with contextlib.suppress(Empty):
            while True:
                waiting.get_nowait()


def read_grade(answer: str) -> float | None:
    """Return the last grade in an answer, if there is one from 1 to 10."""
    found = _GRADE.findall(answer)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


def read_choice(answer: str, plain_first: bool) -> str | None:
    """Return the last choice in an answer, as what it says of the setting: "win", "tie" or "lose"."""
    found = _CHOICE.findall(answer)
    if not found:
        return None
    if found[-1] == "C":
        return "tie"
    return "win" if (found[-1] == "B") == plain_first else "lose"


def _tasks(results: Results, questions: Questions) -> Iterable[Task]:
    """Yield questions that have no answer yet; one without a text is a tie.

    A later turn of a conversation is put as a continuation of the first, with the answers in between.
    """
    done = {
        (kind, *_place(record).values())
        for kind, answer in ((SCORE, "score"), (PAIR, "verdict"))
        for record in results.of(kind)
        if record[answer] is not None
    }
    conversations = Conversations(results)
    prompts = {text["id"] for text in results.header["texts"][: questions.limit]}
    for record in results.of(GENERATION):
        place, name = _place(record), record["setting"]
        if record["prompt"] not in prompts or name not in {PLAIN, *questions.settings}:
            continue
        where = record["prompt"], record["seed"], record["turn"]
        prompt, answer = conversations.beginning(record["prompt"]), conversations.continuation(name, *where)
        against = conversations.continuation(PLAIN, *where)
        if answer is None:
            continue
        if SCORE in questions.kinds and (SCORE, *place.values()) not in done:
            yield Task(SCORE, place, _SINGLE.format(prompt=prompt, answer=answer))
        if PAIR in questions.kinds and name != PLAIN and against is not None and (PAIR, *place.values()) not in done:
            plain_first = random.Random(repr(place)).random() < 0.5
            a, b = (against, answer) if plain_first else (answer, against)
            question = "" if a == b else _PAIR.format(prompt=prompt, a=a, b=b)
            yield Task(PAIR, place, question, plain_first)


def _place(record: Record) -> dict[str, Any]:
    return {name: record[name] for name in ("setting", "prompt", "turn", "seed")}


def _record(task: Task, answer: str) -> Record:
    """Return an answer as a record; one that cannot be read is kept, and asked for again the next time."""
    record: Record = {"kind": task.kind, **task.place}
    if task.kind == SCORE:
        record |= {"score": read_grade(answer)}
    else:
        record |= {"verdict": read_choice(answer, task.plain_first), "plain_first": task.plain_first}
    return record if None not in record.values() else record | {"answer": answer[:_KEPT]}
