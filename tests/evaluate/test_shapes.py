"""Results files that somebody has edited: the line and the field are named, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import made_up

from dynamo_evaluate.cli import main
from dynamo_evaluate.shapes import fits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made_up.grid(tmp_path / "r.jsonl", [0.5, 1.0], 2, 2).close()
    return tmp_path / "r.jsonl"


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        (1, "bundle", {"name": "x"}),
        (1, "bundle", {**made_up.BUNDLE, "kind": "unknown"}),
        (1, "seeds", True),
        (1, "settings", [{}]),
        (1, "texts", "abc"),
        (1, "sampling", None),
        (3, "tokens", "12"),
        (3, "turn", {}),
        (3, "steps", {"1": "x"}),
        (3, "measures", 3),
        (3, "seconds", None),
        (3, "seconds", float("inf")),
        (3, "passes", 0),
    ],
)
@pytest.mark.parametrize("command", ["report", "compare", "judge"])
def test_a_field_that_is_something_else(
    path: Path, capsys: pytest.CaptureFixture[str], command: str, line: int, field: str, value: Any
) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = json.dumps(json.loads(lines[line - 1]) | {field: value})
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    more = {"compare": [str(path)], "judge": ["--model", "m", "--endpoint", "http://127.0.0.1:9"]}
    assert main([command, str(path), *more.get(command, [])]) == 1
    said = capsys.readouterr().err
    assert f"line {line} of {path} is not as dynamo-eval writes it: see its field '{field}'" in said
    assert said.count("\n") == 1 and path.read_bytes() == before


def test_shapes() -> None:
    assert fits(1, int | float) and not fits(True, int) and not fits("1", int)
    assert fits({"a": 1, "b": 2}, {"a": int}) and not fits({"b": 2}, {"a": int}) and not fits([], {"a": int})
    assert fits([1, 2], [int]) and not fits([1, "2"], [int]) and not fits({}, [int])
    assert fits({"x": 1}, {...: int}) and not fits({"x": None}, {...: int}) and fits(None, int | None)
    assert (
        fits("tie", {"tie", None}) and fits(None, {"tie", None}) and not fits("no", {"tie"}) and not fits([], {"tie"})
    )
