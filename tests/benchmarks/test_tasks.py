"""`benchmarks/tasks.py` on small bundles: its figures against the engine's own, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tasks
from support import chats, profiles

from dynamo_runtime import Engine

COMMON = ["--tasks", "chat", "json", "--prompts", "3", "--new-tokens", "12", "--threads", "1"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One with three heads, and one that is plain."""
    folder = tmp_path_factory.mktemp("bundles")
    long = {"context_length": 1024}
    return (
        chats.write_bundle(folder / "multi", "smollm2", 3, **long).parent,
        chats.write_bundle(folder / "plain", "smollm2", 1, **long).parent,
    )


@pytest.fixture
def rows(bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Of a run with everything, on a device that is not measured."""
    monkeypatch.setattr(tasks, "measure", lambda *given, **options: profiles.full())
    out = tmp_path / "figures.json"
    assert tasks.main([f"tiny={bundles[0]}", "--dynamo", *COMMON, "--json", str(out)]) == 0
    found: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return found


def test_every_way_of_every_task(rows: list[dict[str, Any]]) -> None:
    """Greedily plain and what drafts, sampled `dynamo` besides; a line each in the table."""
    ways = [tasks.PLAIN, "speculative", "auto", "auto, heads alone", "auto, lookup alone"]
    dynamo = [f"dynamo, first token {rule}" for rule in ("joint", "base")]
    expected = [
        (task, decoding, way)
        for task in ("chat", "json")
        for decoding, of_it in (("greedy", ways), ("T 0.7", ways + dynamo))
        for way in of_it
    ]
    assert [(row["task"], row["decoding"], row["way"]) for row in rows] == expected
    assert tasks.table(rows).count("\n| tiny | ") == len(expected)


def test_figures(rows: list[dict[str, Any]], bundles: tuple[Path, Path]) -> None:
    """Texts are plain's; tokens a pass and acceptance are those of the same generations, run here one by one."""
    found = {(row["task"], row["decoding"], row["way"]): row for row in rows}
    assert {row["different_texts"] for row in rows if not row["way"].startswith("dynamo")} == {0}
    assert all("different_texts" not in row for row in rows if row["way"].startswith("dynamo"))
    engine = Engine(bundles[0], threads=1)
    prompts = [json.loads(line)["prompt"] for line in (tasks.PROMPTS / "json.jsonl").read_text().splitlines()]
    for decoding, sampling in tasks.DECODING.items():
        tokens = passes = measured = 0
        accepted = [0, 0]
        for seed, prompt in enumerate([prompts[0], prompts[14], prompts[29]]):
            plain = engine.chat(
                chats.say(prompt), strategy="autoregressive", max_new_tokens=12, seed=seed, **sampling
            ).tokens
            if len(plain) < tasks.LEAST_TOKENS:
                continue
            options = {"strategy": "speculative", "max_new_tokens": len(plain), "ignore_eos": True, "seed": seed}
            spoken = engine.chat(chats.say(prompt), **options, **sampling)
            assert spoken.tokens == plain
            measured += 1
            tokens += len(plain)
            passes += spoken.statistics.rounds
            for depth, count in enumerate(spoken.statistics.accepted_at_depth):
                accepted[depth] += count
        row = found["json", decoding, "speculative"]
        assert (row["prompts"], row["tokens"]) == (measured, tokens) and measured
        assert row["accepted_at_depth"] == accepted
        assert row["tokens_per_pass"][0] == pytest.approx((tokens - measured) / (passes - measured))
        assert found["json", decoding, tasks.PLAIN]["speed_ratio"] == [1.0, 1.0, 1.0]


def test_a_plain_bundle_of_another_precision(
    bundles: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is no measure of anything: one line."""
    half = chats.write_bundle(tmp_path / "half", "smollm2", 1, context_length=1024, precision="fp16").parent
    assert tasks.main([f"tiny={bundles[0]}", "--plain", f"tiny={half}", *COMMON]) == 1
    errors = capsys.readouterr().err
    assert errors == "tasks: error: tiny and its plain bundle differ in precision: fp32 against fp16\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a=x", "--plain", "b=y"], "--plain b goes with no bundle"),
        (["a=x", "a=y"], "two bundles have the same name"),
        (["a=x", "--tasks", "poems"], "invalid choice: 'poems'"),
    ],
)
def test_names(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """That fit nothing."""
    with pytest.raises(SystemExit) as ended:
        tasks.main(arguments)
    assert ended.value.code == 2 and says in capsys.readouterr().err
