"""The table of README that says when drafting pays, from the results files.

    python benchmarks/readme.py [--check]

It is put between the comments `<!-- begin: … -->` and `<!-- end -->`.  With --check nothing is written, and the exit
status is 1 if README is not what would be written.  A new line of the table is a line in `lines`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from page import put_between, wrapped, write_or_check
from peers_page import OURS, of, time_ratio

from dynamo_evaluate.cells import SPEED, TOKENS_PER_PASS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
README = ROOT / "README.md"
MARK = "begin: python benchmarks/readme.py"
HEADER = ("model", "text", "greedy", "÷ plain", "T 0.7", "÷ plain", "same text")
SMOLLM2, EMBEDDED, WIDENED = "SmolLM2-135M, int8", "embedded, 7 M, int8", "widened, 160M's layers, "
TASKS = {"chat": "chat", "code": "code", "prose": "a story", "edit": "editing", "json": "JSON from a text"}
PEERS = {"llama.cpp Q8_0": "llama.cpp's time (Q8_0)", "genai, our bundle": "onnxruntime-genai's on the same bundle"}
THRESHOLD = "dynamo, ε_b 0.5"
NONE = "–"


def load(name: str) -> dict[str, Any]:
    """Return a results file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def cells(tokens_per_pass: float, speed: Sequence[float]) -> list[str]:
    """Return tokens a pass, and speed over plain with its interval."""
    value, low, high = speed
    return [f"{tokens_per_pass:.2f}", f"{value:.2f} [{low:.2f}, {high:.2f}]"]


def of_tasks(model: str, results: str, way: str = "auto") -> list[list[str]]:
    """Return a line a task, of results of `benchmarks/tasks.py`."""
    found = {(r["task"], r["decoding"]): r for r in load(results)["rows"] if r["way"] == way}
    lines = []
    for task, name in TASKS.items():
        rows = [found[task, decoding] for decoding in ("greedy", "T 0.7")]
        figures = [cell for row in rows for cell in cells(row["tokens_per_pass"][0], row["speed_ratio"])]
        same = sum(row["prompts"] - row["different_texts"] for row in rows)
        lines.append([model, name, *figures, f"{same} of {sum(row['prompts'] for row in rows)}"])
    return lines


def of_auto(model: str, results: str) -> list[str]:
    """Strategy `auto` on Python, of results of `benchmarks/auto.py`; it verifies all that it drafts."""
    rows = [load(results)["rows"][text]["auto"] for text in ("greedy", "sampled")]
    figures = [cell for row in rows for cell in cells(row["tokens_per_pass"][0], row["ratio"])]
    return [model, "Python", *figures, "yes"]


def of_dynamo(model: str, results: str) -> list[str]:
    """Strategy `dynamo` with `--first-token base`, of a report of `dynamo-eval`."""
    outcome = load(f"quality/{results}-base")["outcomes"][THRESHOLD]
    speed = outcome[SPEED]
    figures = cells(outcome[TOKENS_PER_PASS]["value"], [speed[each] for each in ("value", "low", "high")])
    return [model, "Python, `dynamo`", NONE, NONE, *figures, "no"]


def lines() -> list[list[str]]:
    """Return the table's, without its header."""
    return [
        *of_tasks(SMOLLM2, "tasks_smollm2"),
        of_auto(EMBEDDED, "auto_embedded_int8"),
        *(of_dynamo(WIDENED + precision, f"widened-{precision}") for precision in ("int8", "fp32")),
    ]


def beside_peers() -> str:
    """Return a sentence about plain decoding beside that of others, of results of `benchmarks/peers.py`."""
    rows = of(load("peers_smollm2")["lengths"], precision="int8")
    found = []
    for peer, name in PEERS.items():
        behind = [
            time_ratio(*(of(rows, peer=each, measure=length)[0] for each in (OURS, peer)))[0]
            for length in ("short", "long")
        ]
        found.append(f"{behind[0]:.2f} and {behind[1]:.2f} of {name}")
    what = "A token of plain int8 decoding takes, behind 64 and behind 1,024 tokens,"
    return f"{what} {'; '.join(found)} ([peers](docs/peers.md))."


def table() -> str:
    """Markdown, with what it was measured on."""
    rows = [HEADER, ["---"] * len(HEADER), *lines()]
    tasks = load("tasks_smollm2")
    prompts = max(row["prompts"] for row in tasks["rows"])
    size = f"Of SmolLM2 {prompts} prompts a task × at most {tasks['new_tokens']} tokens."
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{text}\n\n" + wrapped(f"{beside_peers()} {size} {tasks['machine']}.")


def main(argv: list[str] | None = None) -> int:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README is out of date")
    arguments = parser.parse_args(argv)
    page = put_between(README.read_text(encoding="utf-8"), MARK, table())
    return write_or_check(README, page, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
