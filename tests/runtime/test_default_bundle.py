"""`dynamo-run` without a bundle or a prompt, and its notes on what a bundle is."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import dynamo_runtime
from dynamo_runtime import Engine
from dynamo_runtime.cli import run

FLAGS = ["--seed", "3", "--max-new-tokens", "12", "--threads", "1"]


@pytest.fixture
def default(multi: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle in place of the one that ships with the package."""
    monkeypatch.setattr(run, "DEFAULT_BUNDLE", multi.parent)
    return multi.parent


def text_of(bundle: Path, prompt: str, **options: Any) -> str:
    """What the engine writes behind a prompt."""
    return Engine(bundle, threads=1).generate(prompt, seed=3, max_new_tokens=12, **options).text


def test_neither(default: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our bundle continues our prompt, which is shown because the user did not write it."""
    assert run.main(FLAGS) == 0
    assert capsys.readouterr().out == run.SAMPLE_PROMPT + text_of(default, run.SAMPLE_PROMPT)


def test_prompt_alone(default: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A single argument that is no bundle is the prompt; only its continuation is shown."""
    assert run.main(["def fib(n):", *FLAGS]) == 0
    assert capsys.readouterr().out == text_of(default, "def fib(n):")


def test_bundle_alone(default: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A single argument that is a bundle lacks a prompt, whether a folder or a graph, there or not."""
    for bundle in (str(plain), str(plain.parent)):
        assert run.main([bundle, *FLAGS]) == 1
        captured = capsys.readouterr()
        assert captured.err == f"dynamo-run: error: there is no prompt behind the bundle {bundle}\n"
        assert captured.out == ""


LONE = {
    "a folder that is no bundle": ("{folder}", "exists and is no bundle: a prompt of that name is given with -p"),
    "a file that is no bundle": ("{folder}/some text", "exists and is no bundle"),
    "a path to nothing": ("{folder}/absent", "does not exist: a prompt that looks like a path is given with -p"),
    "a graph that is not there": ("absent.onnx", "does not exist"),
}


@pytest.mark.parametrize("case", LONE)
def test_a_lone_path_is_refused(default: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    argument, message = (text.format(folder=tmp_path) for text in LONE[case])
    (tmp_path / "some text").touch()
    assert run.main([argument, *FLAGS]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("dynamo-run: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    "prompt",
    ["import os.path\n\ndef join(a/b):", "x" * 300, "a long one " * 30, "one/two three", "ends in a.onnx file", "def"],
)
def test_a_lone_prompt_is_continued(default: Path, capsys: pytest.CaptureFixture[str], prompt: str) -> None:
    """Of any length, with separators among its words."""
    assert run.main([prompt, *FLAGS]) == 0
    assert capsys.readouterr().out == text_of(default, prompt)


def test_by_flags(default: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """-m and -p in place of one argument or the other, or of both."""
    expected = text_of(plain, "def fib(n):")
    for arguments in (
        ["-m", str(plain), "-p", "def fib(n):"],
        ["-m", str(plain), "def fib(n):"],
        [str(plain), "-p", "def fib(n):"],
        ["--model", str(plain.parent), "--prompt", "def fib(n):"],
    ):
        assert run.main([*arguments, *FLAGS]) == 0
        assert capsys.readouterr().out == expected
    assert run.main(["-p", "some/path.onnx", *FLAGS]) == 0
    assert capsys.readouterr().out == text_of(default, "some/path.onnx")
    for arguments, message in (
        (["-m", str(plain)], f"there is no prompt behind the bundle {plain}"),
        (["-m", str(plain), "-p", "x", "y"], "given twice"),
        (["-m", str(plain), str(plain), "x"], "given twice"),
        (["-p", "x", str(plain), "y"], "given twice"),
    ):
        assert run.main([*arguments, *FLAGS]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dynamo-run {dynamo_runtime.__version__}\n"
    assert dynamo_runtime.__version__ == importlib.metadata.version("dynamo-edge")


def test_both(default: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundle given continues the prompt given."""
    assert run.main([str(plain), "def fib(n):", *FLAGS]) == 0
    written = capsys.readouterr().out
    assert written == text_of(plain, "def fib(n):") != text_of(default, "def fib(n):", strategy="dynamo")
    assert run.main([str(plain), "", *FLAGS]) == 1
    assert capsys.readouterr().err == "dynamo-run: error: the prompt is empty\n"


@pytest.mark.parametrize(
    ("quantization", "strategy", "notes"),
    [
        ({"lossless": False}, "speculative", ["not exactly the text of autoregressive"]),
        ({"lossless": False}, "dynamo", []),
        ({"lossless": False}, "autoregressive", []),
        ({"lossless": True}, "speculative", []),
        (None, "speculative", []),
        ({"degraded": True}, "autoregressive", ["failed its quality gates"]),
        ({"degraded": True, "lossless": False}, "speculative", ["failed its quality gates", "not exactly the text"]),
    ],
)
def test_notes(
    quantization: dict[str, bool] | None,
    strategy: str,
    notes: list[str],
    multi: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the user would not expect is said on stderr, one line each, and nothing else is."""
    folder = tmp_path / "copy"
    shutil.copytree(multi.parent, folder)
    manifest = json.loads((folder / "dynamo_config.json").read_text())
    if quantization is not None:
        manifest |= {"quantization": {"scheme": "int8-dynamic"} | quantization, "precision": "int8-dynamic"}
    (folder / "dynamo_config.json").write_text(json.dumps(manifest))
    assert run.main([str(folder), "x", "--strategy", strategy, *FLAGS]) == 0
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dynamo-run: note: ")]
    assert len(found) == len(notes)
    assert all(note in line for note, line in zip(notes, found, strict=True))
