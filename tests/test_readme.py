"""What README and docs show is run: Python as it stands there, command lines by the parsers of the commands."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_runtime import DEFAULT_BUNDLE

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RUN = (README, ROOT / "docs/using.md", ROOT / "docs/one-pass.md")  # what needs no other bundle than ours
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
PASSED_ON = ["dynamo-eval", "harness"]  # whose flags are those of lm-evaluation-harness
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Parsed(BaseException):
    """A command line that its parser takes; no `except Exception` of a command catches it."""


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page in one language; "" is a terminal."""
    return [code for found, code in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page: Path) -> Iterator[list[str]]:
    """The command lines of a page, in words."""
    for code in blocks(page, ""):
        for line in code.replace("\\\n", " ").splitlines():
            if line.removeprefix("$ ").startswith(("dynamo-", "python3 dev.py")):
                yield shlex.split(line.removeprefix("$ "), comments=True)


def page_name(page: Path) -> str:
    return page.stem


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Has a command parse its words, and do nothing more."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any) -> None:
        original(self, *given)
        raise Parsed

    def run(words: list[str]) -> None:
        name = "dev:main" if words[0] == "python3" else SCRIPTS[words[0]]
        module, _, function = name.partition(":")
        monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "python3" else words)
        with pytest.raises(Parsed):
            getattr(importlib.import_module(module), function)()

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.syspath_prepend(str(ROOT))
    return run


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_parse(page: Path, parse: Any) -> None:
    for words in commands(page):
        if words[:2] != PASSED_ON:
            parse(words)


def test_commands_are_found(parse: Any) -> None:
    assert {words[0] for words in commands(README)} >= {"python3", "dynamo-run", "dynamo-export", "dynamo-train"}
    with pytest.raises(SystemExit):
        parse(["dynamo-run", "--no-such-flag"])


@pytest.mark.parametrize("page", RUN, ids=page_name)
def test_python_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(page, "python")
    assert found
    for code in found:
        exec(compile(code.replace('"BUNDLE"', repr(str(DEFAULT_BUNDLE))), str(page), "exec"), {})
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_is_python(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
