"""The tables of docs/training.md are those that the committed results make."""

from __future__ import annotations

import json
from pathlib import Path

import curve
import training

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines()


def rows_of(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith("|")]


def test_variants_and_curve() -> None:
    variants = json.loads((ROOT / "benchmarks" / "results" / "training_smollm2.json").read_text(encoding="utf-8"))
    found = json.loads(curve.RESULTS.read_text(encoding="utf-8"))
    for table in (training.table(variants["variants"]), curve.table(found["curve"], 32 * 512)):
        rows = rows_of(table)
        first = LINES.index(rows[0])
        assert LINES[first : first + len(rows)] == rows


def test_lines_of_a_run_without_times() -> None:
    """As `dynamo-train heads` writes them: those without a validation are left out."""
    line = {name: 1.5 for name in curve.COLUMNS}
    rows = rows_of(curve.table([{"step": 1, "loss": [1.0]}, {"step": 2} | line], 1_000_000))
    assert rows[0].startswith("| tokens seen | tokens a pass, greedy |") and len(rows) == 3
    assert rows[2] == "| 2.0 M | 1.500 | 1.500 | 1.500 | 1.500 | 1.500 | 1.5 | 1.5 | 1.5 |"
