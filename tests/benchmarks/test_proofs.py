"""`benchmarks/proofs.py` and `benchmarks/soak.py`: what they count, and that they can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import proofs
import pytest
import soak
from support import chats, handmade

from dynamo_runtime import Engine, Speculative


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts to learn rounding from."""
    monkeypatch.setattr(proofs, "TIE_PROMPTS", 1)


FEW = ["--tasks", "chat", "json", "--prompts", "1", "--new-tokens", "12", "--threads", "1"]


def test_every_drafter_is_held_against_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    multi = chats.write_bundle(tmp_path / "multi", "smollm2", 3, context_length=1024).parent
    plain = chats.write_bundle(tmp_path / "plain", "smollm2", 1, context_length=1024).parent
    out = tmp_path / "proofs.json"
    assert proofs.main([f"fp32={multi}", f"int8={plain}", *FEW, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["bundles"]
    greedy = {name: [row["drafter"] for row in rows if row["decoding"] == "greedy"] for name, rows in found.items()}
    assert greedy == {"fp32": ["lookup", "parallel", "both", "auto"], "int8": ["lookup", "auto"]}
    assert all(row["different"] == 0 and row["texts"] == 2 for rows in found.values() for row in rows)
    assert "| fp32 | both | greedy | 2 |" in capsys.readouterr().out


def test_a_rule_that_takes_every_draft_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multi = chats.write_bundle(tmp_path / "multi", "smollm2", 3, context_length=1024).parent

    def all_stand(self: Speculative, step: Any, context: Any, drafts: Any, rng: Any) -> tuple[int, int]:
        return len(drafts), self._target.sample(step, context, rng.random(), len(drafts))

    monkeypatch.setattr(Speculative, "_verify", all_stand)
    assert proofs.main([str(multi), *FEW]) == 1


@pytest.mark.slow
def test_memory_stays_where_it_is(tmp_path: Path) -> None:
    bundle = handmade.write_bundle(tmp_path / "bundle", 3)
    assert soak.main([str(bundle), "--tokens", "6000", "--threads", "1"]) == 0


def test_growth_is_what_comes_behind_a_tenth_of_the_tokens() -> None:
    assert soak.grown([(5, 100), (10, 300), (50, 320), (100, 310)]) == 20


def test_every_text_is_written(tmp_path: Path) -> None:
    with Engine(handmade.write_bundle(tmp_path / "bundle", 3), provider="cpu", threads=1, max_length=80) as engine:
        found = soak.soak(engine, 60, {"strategy": "speculative", "drafter": "lookup"})
        assert [written for written, _ in found[:2]] == [16, 32] and found[-1][0] >= 60
        assert all(held > 0 for _, held in found)
