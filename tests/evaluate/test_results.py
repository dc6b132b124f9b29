"""Results files: they grow, survive an interrupt, and refuse another run's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynamo_evaluate.cli import main
from dynamo_evaluate.errors import EvaluationError
from dynamo_evaluate.results import Results, describe_bundle
from dynamo_runtime.bundle import MANIFEST, load_bundle

HEADER = {"command": "generate", "seeds": 3}


def test_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    first = Results.start(path, HEADER)
    first.append({"kind": "generation", "text": "größer"})
    first.append({"kind": "other", "value": 1})
    with path.open("a") as file:
        file.write('{"kind": "generation", "te')  # power fails
    first.close()
    again = Results.start(path, HEADER)
    assert again.records == first.records
    again.append({"kind": "other", "value": 2})
    assert Results.load(path).records == [*first.records, {"kind": "other", "value": 2}]
    assert again.done("other", lambda record: record["value"]) == {1, 2}


def test_repairs_before_appending(tmp_path: Path) -> None:
    """Whoever loads a file to add to it does not write behind half a line."""
    path = tmp_path / "r.jsonl"
    Results.start(path, HEADER).append({"kind": "x", "value": 1})
    path.write_bytes(path.read_bytes() + '{"kind": "ü'.encode()[:-1])  # inside a character
    assert len(Results.load(path).records) == 1
    Results.load(path, to_append=True).append({"kind": "x", "value": 2})
    assert [record["value"] for record in Results.load(path).records] == [1, 2]


def test_what_a_bundle_is_known_by(pair: Any, tmp_path: Path) -> None:
    """Anything that changes what it writes: weights, counts, tokenizer, sampling defaults; not where it lies."""
    copy = tmp_path / "multi"
    shutil.copytree(pair.multi, copy)
    before = describe_bundle(load_bundle(pair.multi))
    assert describe_bundle(load_bundle(copy)) == before
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["sampling"]["cooccurrence_weight"] = 0.25
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert describe_bundle(load_bundle(copy))["sha256"] != before["sha256"]


def test_other_runs_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Results.start(path, HEADER).append({"kind": "x"})
    before = path.read_bytes()
    with pytest.raises(EvaluationError, match=r"another run \(seeds: 3, now 4\).*--overwrite"):
        Results.start(path, HEADER | {"seeds": 4})
    assert path.read_bytes() == before
    assert Results.start(path, HEADER | {"seeds": 4}, overwrite=True).records == []
    assert Results.load(path).header["seeds"] == 4


@pytest.mark.parametrize("content", ["", "text\n", "[1]\n", '{"dynamo_eval": 99}\n', '{"dynamo_eval": 1}\n'])
def test_what_is_not_a_results_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(EvaluationError, match="is not a results file"):
        Results.load(path)


@pytest.mark.parametrize("line", ["[1]", "{}", '{"kind": 3}', "[" * 100_000, '{"kind": "x"'])
def test_a_line_that_is_no_result_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{"dynamo_eval": 1, "command": "generate"}}\n{{"kind": "x"}}\n{line}\n')
    with pytest.raises(EvaluationError, match=r"line 3 of .*r\.jsonl is not a result"):
        Results.load(path)


def test_begins_again_after_half_a_header(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Results.start(path, HEADER).close()
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        Results.start(path, HEADER).close()
        assert path.read_bytes() == whole


WRITER = """
import sys, time
from dynamo_evaluate.results import Results
results = Results.start(__import__("pathlib").Path(sys.argv[1]), {"command": "generate", "seeds": 3})
print("mine", flush=True)
time.sleep(60)
"""


def test_two_runs_do_not_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second says so in one line; a run that is killed leaves nothing behind that is in the way."""
    path = tmp_path / "r.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "mine\n"
        before = path.read_bytes()
        for again in (lambda: Results.start(path, HEADER), lambda: Results.start(path, HEADER, overwrite=True)):
            with pytest.raises(EvaluationError, match=r"another run is writing .*r\.jsonl"):
                again()
        assert main(["judge", str(path), "--model", "strong"]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert path.read_bytes() == before
        assert Results.load(path).records == []  # reading is for everybody
        other.kill()
    Results.start(path, HEADER).append({"kind": "x"})


def test_a_name_that_is_no_text_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    header = HEADER | {"texts": ["\udcff.txt"]}
    Results.start(path, header).close()
    assert Results.start(path, header).header["texts"] == ["\udcff.txt"]


def test_missing_or_unwritable(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot read"):
        Results.load(tmp_path / "none.jsonl")
    with pytest.raises(EvaluationError, match="cannot write"):
        Results.start(tmp_path, HEADER)


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    results = Results.start(None, HEADER)
    results.append({"kind": "x"})
    assert len(results.records) == 1 and not list(tmp_path.iterdir())


def test_one_record_a_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    results = Results.start(path, HEADER)
    results.append({"kind": "x", "text": "a\nb\u2028c"})
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 3 and json.loads(lines[1])["text"] == "a\nb\u2028c"
    assert Results.load(path).records == results.records
