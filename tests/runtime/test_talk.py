"""`dynamo-run --chat`: a question on the command line, and a conversation at a terminal or through a pipe."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import chats

from dynamo_runtime import Conversation, Engine
from dynamo_runtime.cli import run

FLAGS = ["--seed", "3", "--threads", "1", "--max-new-tokens", "12"]
OPTIONS: dict[str, Any] = {"seed": 3, "max_new_tokens": 12}
COMMAND = [sys.executable, "-m", "dynamo_runtime.cli.run"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats.write_bundle(tmp_path_factory.mktemp("talk") / "bundle", "smollm2")


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return Engine(bundle, threads=1)


def answer(engine: Engine, question: str, system: str | None = None, **options: Any) -> str:
    engine.reset()
    return engine.chat(chats.say(question, system=system), **OPTIONS | options).text


def test_a_question(bundle: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """Behind --chat, or where a prompt stands."""
    folder, expected = str(bundle.parent), answer(engine, "Hello there")
    for arguments in (
        ["-m", folder, "--chat", "Hello there"],
        [folder, "--chat", "Hello there"],
        ["--chat", "Hello there", "-m", str(bundle)],
        ["--chat", folder, "Hello there"],
        [folder, "Hello there", "--chat"],
        ["-m", folder, "-p", "Hello there", "--chat"],
    ):
        assert run.main([*arguments, *FLAGS]) == 0
        captured = capsys.readouterr()
        assert captured.out == expected
        assert re.fullmatch(r"(dynamo-run: note: .*\n)?auto: \d+ prompt tokens, 12 new .*\n", captured.err)


def test_flags_of_a_chat(bundle: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["-m", str(bundle), "--chat", "x<|im_end|>"]
    for flags, options in (
        (["--system", "Be brief."], {"system": "Be brief."}),
        (["--trust-content"], {"trust_content": True}),
        (["--strategy", "dynamo"], {"strategy": "dynamo"}),
        (["--show-special", "--temperature", "3"], {"show_special": True, "temperature": 3.0}),
    ):
        assert run.main([*start, *FLAGS, *flags]) == 0
        assert capsys.readouterr().out == answer(engine, "x<|im_end|>", **options)
    assert run.main([*start, *FLAGS, "--compare", "--repeats", "1"]) == 0
    assert "compare: auto " in capsys.readouterr().err


def test_an_answer_may_be_longer_than_a_continuation(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-m", str(bundle), "--threads", "1", "--temperature", "0", "--repetition-penalty", "1.5"]
    assert run.main([*flags, "-p", "x"]) == 0
    assert " 128 new " in capsys.readouterr().err
    assert run.main([*flags, "--chat", "x", "--max-length", "500"]) == 0
    assert int(re.search(r"(\d+) new", capsys.readouterr().err)[1]) != 128  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "x", "-p", "y"], "--system and --trust-content are for --chat"),
        (["--trust-content", "-p", "y"], "--system and --trust-content are for --chat"),
        (["--chat", "x", "--plain-prompt"], "--plain-prompt is for prompts"),
        (["--chat", "x", "-p", "y"], "there are two questions"),
        (["--chat", "--compare"], "--compare runs one question"),
        (["--chat", "--strategy", "psychic"], "unknown strategy 'psychic'"),
        (["--chat", "--temperature", "-1"], "temperature must be"),
        (["--chat", "x " * 2000], "more than the context of 640"),
        (["--chat", "x\udcff"], "the question is not valid UTF-8"),
    ],
)
def test_what_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run.main(["-m", str(bundle), *arguments, *FLAGS]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if ": note: " not in line]
    assert captured.out == "" and len(lines) == 1 and message in lines[0], captured.err


@pytest.mark.parametrize("question", [["--chat", "Hello"], ["--chat"]])
def test_bundles_that_cannot_be_talked_to(
    plain: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], question: list[str]
) -> None:
    gemma = chats.write_bundle(tmp_path / "gemma", "gemma")
    for model, flags, message in (
        (plain, [], "has no chat template"),
        (gemma, ["--system", "x"], "refuses these messages: System role not supported"),
    ):
        assert run.main(["-m", str(model), *question, *flags, *FLAGS]) == 1
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if ": note: " not in line]
        assert captured.out == "" and len(lines) == 1 and message in lines[0]


def test_lines_of_a_pipe_are_turns(bundle: Path, engine: Engine) -> None:
    engine.reset()
    conversation = Conversation(engine, "Be brief.")
    expected, reused = [], []
    for question in ("Hello", "größer?"):
        stream = conversation.say(question, **OPTIONS)
        expected.append("".join(stream))
        reused.append(stream.statistics.reused_tokens)
    again = answer(engine, "Hello", "Be brief.")
    done = subprocess.run(
        [*COMMAND, str(bundle), "--chat", "--system", "Be brief.", *FLAGS],
        input="\ufeffHello\r\n\n  \ngrößer?\n/reset\nHello\n/exit\nnever\n".encode(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.decode() == f"{expected[0]}\n{expected[1]}\n{again}\n"
    lines = [line for line in done.stderr.decode().splitlines() if ": note: " not in line]
    assert len(lines) == 3 and f"({reused[1]} reused)" in lines[1]
    assert reused[1] > 30
    for said, message in ((b"\xff\n", "not valid UTF-8"), (b"x " * 2000, "more than the context")):
        broken = subprocess.run(
            [*COMMAND, str(bundle), "--chat", *FLAGS], input=said, capture_output=True, timeout=60, check=False
        )
        assert broken.returncode == 1 and message in broken.stderr.decode().splitlines()[-1]


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, *arguments: str):
        ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # it becomes the controlling terminal
        )  # fmt: skip
        os.close(theirs)
        self._end, self.seen = ours, ""

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def wait_for(self, pattern: str, seconds: float = 30) -> str:
        """What came up to and with a pattern; it is then behind us."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            ready, _, _ = select.select([self._end], [], [], max(0, until - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.seen!r}"
            try:
                self.seen += os.read(self._end, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"it ended without {pattern!r}: {self.seen!r}") from None
        passed, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return passed

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal(bundle: Path) -> Iterator[Terminal]:
    started = Terminal(*COMMAND, str(bundle), "--chat", "--seed", "3", "--threads", "1", "--max-new-tokens", "9")
    yield started
    started.close()


def test_a_terminal(terminal: Terminal) -> None:
    terminal.wait_for(r"Ctrl-C stops an answer, /reset begins anew, /exit or Ctrl-D ends.*> ")
    terminal.type("Hello\n")
    terminal.wait_for(r"auto: (\d+) prompt tokens, \d+ new.*> ")
    terminal.type("again\n")
    terminal.wait_for(r"auto: (\d+) prompt tokens \(\d+ reused\).*> ")
    terminal.type("x " * 1500 + "\n")  # a question that does not fit is no end
    terminal.wait_for(r"dynamo-run: error: the prompt has \d+ tokens, more than the context.*> ")
    terminal.type("/reset\n")
    terminal.wait_for("> ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    time.sleep(0.3)  # by when it waits for more
    terminal.type("\x03")  # Ctrl-C where nothing is answered
    terminal.wait_for("> ")
    terminal.type("Hello\n")
    terminal.wait_for(r"auto: \d+ prompt tokens \(\d+ reused\), \d+ new.*> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=30) == 0


def test_an_interrupt_stops_the_answer_alone(bundle: Path) -> None:
    slow = (
        "import sys, time, dynamo_runtime.cli.run as run, dynamo_runtime.session as session\n"
        "step = session.Session.step\n"
        "def slowly(self, *given, **named):\n"
        "    time.sleep(0.05)\n"
        "    return step(self, *given, **named)\n"
        "session.Session.step = slowly\n"
        "sys.exit(run.main(sys.argv[1:]))\n"
    )
    flags = ["--chat", "--seed", "3", "--threads", "1", "--max-new-tokens", "400", "--temperature", "3"]
    terminal = Terminal(sys.executable, "-c", slow, str(bundle), *flags)
    try:
        terminal.wait_for("Ctrl-D ends.*> ")
        terminal.type("Hello\n")
        terminal.wait_for("Hello\r?\n..")
        terminal.type("\x03")
        passed = terminal.wait_for(r"auto: \d+ prompt tokens, (\d+) new.*> ")
        assert int(re.search(r"(\d+) new", passed)[1]) < 300  # type: ignore[index]
        terminal.type("/exit\n")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
