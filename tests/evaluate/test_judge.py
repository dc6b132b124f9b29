"""A language model as judge, behind a server of our own that speaks OpenAI's protocol."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import made_up

from dynamo_evaluate.cli import main
from dynamo_evaluate.errors import EvaluationError
from dynamo_evaluate.judge import Judge, Questions, judge, read_choice, read_grade
from dynamo_evaluate.prompts import Prompt
from dynamo_evaluate.results import Results
from dynamo_evaluate.settings import PLAIN, Setting
from dynamo_evaluate.summary import summarize

KEY = "sk-very-secret"
FAST = "dynamo, ε_b 0.5"


class Server(ThreadingHTTPServer):
    """Grades texts of plain 8 and others 5, and prefers plain's at seed 0, the other at seed 1, neither at seed 2."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.questions: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.fail_after = 10**9
        self.mute = False
        self.page = b""  # put out instead of an answer
        self.content: Any = None  # likewise
        self.patience = threading.Event()
        self.patience.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def answer(self, question: str) -> str:
        if self.mute:
            return "I would rather not say."
        if "### Continuation A" not in question:
            return f"Reasons, not [[11]]. [[{8 if 'plain says' in question else 5}]]"
        a = question.split("### Continuation A")[1].split("### Continuation B")[0]
        seed = int(question.strip()[-1])
        if seed == 2:
            return "Both are fine. [[C]]"
        plain_is_a = "plain says" in a
        return "[[A]]" if plain_is_a == (seed == 0) else "[[B]]"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.add(self.headers["Authorization"])
        question = body["messages"][0]["content"]
        self.server.questions.append(question)
        self.server.requests.append(body)
        if self.path != "/v1/chat/completions" or len(self.server.questions) > self.server.fail_after:
            self.send_response(401)
            self.end_headers()
            return
        self.server.patience.wait(30)
        content = self.server.answer(question) if self.server.content is None else self.server.content
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
        data = self.server.page or json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.server.page else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # whoever asked was interrupted
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return made_up.grid(tmp_path / "r.jsonl", [0.5, 1.0])


def test_scores_and_verdicts(server: Server, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    model = Judge(server.url, "strong", "MY_KEY")
    assert judge(results, model, Questions(["score", "pair"], [FAST]), 4) == 0
    found = summarize(results)
    assert found.outcomes[PLAIN].measures["score"].value == 8
    assert found.outcomes[FAST].measures["score"].value == 5
    assert {name: share.value for name, share in found.outcomes[FAST].verdicts.items()} == pytest.approx(
        {"win": 1 / 3, "tie": 1 / 3, "lose": 1 / 3}
    )
    assert found.outcomes[FAST].measures["win_rate"].value == pytest.approx(1.0)
    assert server.requests[0]["temperature"] == 0 and server.requests[0]["model"] == "strong"
    assert "score" not in found.outcomes["dynamo, ε_b 1"].measures
    assert server.keys == {f"Bearer {KEY}"}
    assert results.path is not None and KEY not in results.path.read_text()


def test_order_is_random_and_noted(server: Server, results: Results) -> None:
    judge(results, Judge(server.url, "strong", "NO_KEY"), Questions(["pair"], [FAST, "dynamo, ε_b 1"]), 2)
    plain_first = ["plain says" in q.split("### Continuation B")[0] for q in server.questions]
    assert 4 <= sum(plain_first) <= 20  # of 24
    for record in results.of("pair"):
        assert record["verdict"] == {0: "lose", 1: "win", 2: "tie"}[record["seed"]]
    assert sum(record["plain_first"] for record in results.of("pair")) == sum(plain_first)


def test_equal_texts_are_a_tie_without_asking(server: Server, results: Results) -> None:
    for record in results.records:
        record["text"] = "the same"
    judge(results, Judge(server.url, "strong", "NO_KEY"), Questions(["pair"], [FAST]), 2)
    assert not server.questions
    assert {record["verdict"] for record in results.of("pair")} == {"tie"}


def test_goes_on_after_the_judge_fell_silent(server: Server, results: Results) -> None:
    server.fail_after = 5
    with pytest.raises(EvaluationError, match=r"the judge at .* does not answer"):
        judge(results, Judge(server.url, "strong", "NO_KEY"), Questions(["score"], [FAST]), 1)
    assert len(list(results.of("score"))) == 5
    server.fail_after, asked = 10**9, len(server.questions)
    assert results.path is not None
    results.close()
    again = Results.load(results.path, to_append=True)
    judge(again, Judge(server.url, "strong", "NO_KEY"), Questions(["score"], [FAST]), 1)
    assert len(list(again.of("score"))) == 24
    assert len(server.questions) - asked == 24 - 5


def test_two_judges_do_not_mix(server: Server, results: Results) -> None:
    judge(results, Judge(server.url, "strong", "NO_KEY"), Questions(["score"], [FAST], 1), 1)
    assert len(server.questions) == 6  # one prompt, two settings, three seeds
    with pytest.raises(EvaluationError, match="was judged by strong"):
        judge(results, Judge(server.url, "stronger", "NO_KEY"), Questions(["score"], [FAST]), 1)


def test_answers_without_a_grade_do_not_count(server: Server, results: Results) -> None:
    server.mute = True
    model = Judge(server.url, "strong", "NO_KEY", {})
    assert judge(results, model, Questions(["score", "pair"], [FAST]), 4) == 36
    assert "temperature" not in server.requests[0]
    assert "score" not in summarize(results).outcomes[FAST].measures
    assert all(record["answer"] == "I would rather not say." for record in results.of("score"))
    server.mute = False
    assert judge(results, model, Questions(["score", "pair"], [FAST]), 4) == 0  # asked again
    assert summarize(results).outcomes[FAST].measures["score"].value == 5


def test_later_turns_are_shown_with_what_was_before(server: Server) -> None:
    """The first turn is the beginning; the answers and turns after it belong to the continuation."""
    settings = [Setting(PLAIN, "autoregressive", plain=True), Setting(FAST, "dynamo")]
    texts = [Prompt("0", ("Compose.", "Rhyme.")).record]
    results = Results.start(None, made_up.header(settings, 1, 2, template="USER: {prompt} ", texts=texts))
    for setting in settings:
        for turn in range(2):
            for seed in range(2):
                text = f"{setting.name} answers {turn}, {seed}"
                results.append(made_up.generation(setting.name, 0, seed, turn=turn, text=text))
    judge(results, Judge(server.url, "strong", "NO_KEY"), Questions(["score"], [FAST]), 1)
    asked = next(q for q in server.questions if f"{FAST} answers 1, 0" in q)
    assert "### Beginning\nUSER: Compose. \n" in asked
    assert f"{FAST} answers 0, 0\n\nUSER: Rhyme. {FAST} answers 1, 0" in asked


def test_answers_in_another_protocol(server: Server) -> None:
    model = Judge(server.url, "strong", "NO_KEY")
    server.page = b"<html>"
    with pytest.raises(EvaluationError, match="not as OpenAI's protocol has it"):
        model.ask("?")


@pytest.mark.parametrize("content", [3, [{"type": "text", "text": "[[5]]"}], {"text": "[[5]]"}, True])
def test_answers_that_are_no_text(server: Server, content: Any) -> None:
    server.content = content
    with pytest.raises(EvaluationError, match="not as OpenAI's protocol has it"):
        Judge(server.url, "strong", "NO_KEY").ask("?")


@pytest.mark.parametrize("page", [b"null", b"[]", b'{"choices": {}}', b'{"choices": [null]}', b'{"choices": null}'])
def test_pages_of_another_shape(server: Server, page: bytes) -> None:
    server.page = page
    with pytest.raises(EvaluationError, match="not as OpenAI's protocol has it"):
        Judge(server.url, "strong", "NO_KEY").ask("?")


def test_a_key_is_in_no_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the client cites."""
    monkeypatch.setenv("MY_KEY", KEY)
    model = Judge("http://me:hidden@there/v1", "strong", "MY_KEY")

    def refuse(**request: Any) -> None:
        raise RuntimeError(f"no such key: {KEY} of me:hidden")

    monkeypatch.setattr(model._client.chat.completions, "create", refuse)
    with pytest.raises(EvaluationError, match="the judge at http://there/v1/ does not answer: no such key: … of me:…"):
        model.ask("?")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_does_not_wait_for_the_judge(server: Server, results: Results) -> None:
    """A question may take minutes."""
    server.patience.clear()
    results.close()
    command = [sys.executable, "-m", "dynamo_evaluate", "judge", str(results.path)]
    command += ["--model", "strong", "--endpoint", server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not server.questions:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=10)
    server.patience.set()
    assert running.returncode == 130
    assert said.splitlines()[-1].startswith("dynamo-eval: interrupted") and "Traceback" not in said


@pytest.mark.parametrize(
    ("answer", "grade"),
    [("fine [[7]]", 7), ("[[3]] no, [[4.5]]", 4.5), ("[[0]]", None), ("[[11]]", None), ("7/10", None), ("", None)],
)
def test_grades(answer: str, grade: float | None) -> None:
    assert read_grade(answer) == grade


def test_choices() -> None:
    assert read_choice("[[A]]", plain_first=True) == "lose" and read_choice("[[A]]", plain_first=False) == "win"
    assert read_choice("[[B]]", plain_first=True) == "win" and read_choice("[[B]]", plain_first=False) == "lose"
    assert read_choice("[[A]], or [[C]]", plain_first=True) == "tie" and read_choice("A", plain_first=True) is None


def test_command(
    server: Server, results: Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    results.close()
    arguments = ["judge", str(results.path), "--model", "strong", "--endpoint", server.url]
    assert main([*arguments, "--ask", "pair", "--settings", FAST]) == 0
    assert "A judge's verdicts against plain" in capsys.readouterr().out
    for wrong, message in (
        (["judge", str(results.path)], "who is to judge?"),
        (["judge", str(results.path), "--model", "strong"], "no key in the environment variable OPENAI_API_KEY"),
        ([*arguments, "--settings", "nobody"], "has no setting 'nobody'"),
        ([*arguments, "--at-once", "0"], "--at-once must be at least 1"),
        ([*arguments, "--limit", "-1"], "--limit must be at least 1"),
        ([*arguments, "--request", "x"], "--request must be a JSON object"),
    ):
        assert main(wrong) == 1
        assert message in capsys.readouterr().err
    dead = ["judge", str(results.path), "--model", "strong", "--endpoint", "http://127.0.0.1:9/v1"]
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    assert main(dead) == 1
    assert "the judge at http://127.0.0.1:9/v1/ does not answer" in capsys.readouterr().err
    dead[-1] = "http://me:hidden@127.0.0.1:9/v1?token=hidden#hidden"
    assert main(dead) == 1
    complaint = capsys.readouterr().err
    assert "the judge at http://127.0.0.1:9/v1/ does not answer" in complaint and "hidden" not in complaint
    for wrong in ("http://me:hid/den@there", "http://me:hidden@there:port"):
        dead[-1] = wrong
        assert main(dead) == 1
        complaint = capsys.readouterr().err
        assert complaint == "dynamo-eval: error: --endpoint is not a URL that can be asked: http://HOST:PORT/v1\n"
