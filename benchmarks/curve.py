r"""What more training buys: how far heads foresee, against the tokens that they were trained on.

    python benchmarks/curve.py [METRICS.jsonl]

METRICS is the `metrics.jsonl` of a run of `dynamo-train heads … --cache` (in WORK/run), of which lines with a
validation are shown.  Without it the curve is that of the heads that ship for SmolLM2, `results/curve_smollm2.json`:
trained on one NVIDIA H200 by a driver that kept the states in its memory, with this package's objective, optimizer,
schedule and order of windows, and validated behind a half, a quarter, … of its steps; with what the heads then drafted
in answers to the prompts of `benchmarks/prompts/`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dynamo_runtime.tables import Table

RESULTS = Path(__file__).parent / "results" / "curve_smollm2.json"
COLUMNS = ("greedy_tokens_a_pass", "tokens_a_pass", "greedy_1", "greedy_2", "greedy_3", "ppl_2", "ppl_3", "ppl_4")


def table(lines: list[dict[str, Any]], tokens: int) -> str:
    """Return a row for every validation, with the seconds so far where they were noted.

    Args:
        lines: Of the metrics.
        tokens: Of a step.
    """
    lines = [line for line in lines if COLUMNS[0] in line]
    timed = "seconds" in lines[0]
    rows = []
    for line in lines:
        figures = (f"{line[name]:.1f}" if name.startswith("ppl") else f"{line[name]:.3f}" for name in COLUMNS)
        seconds = [f"{line['seconds']:.0f}"] if timed else []
        rows.append([f"{line['step'] * tokens / 1e6:.1f} M", *seconds, *figures])
    names = ["tokens a pass, greedy", "… of the text", *(f"greedy at depth {i}" for i in (1, 2, 3))]
    header = ["tokens seen", *(["seconds"] if timed else []), *names, "PPL_2", "PPL_3", "PPL_4"]
    return Table("Held-out text", header, rows).markdown()


def task_table(tasks: dict[str, dict[str, Any]]) -> str:
    """Return tokens a pass and, by depth, how often drafts are right where those before were; by task and decoding."""
    rows = [
        [task, decoding, f"{found['tokens_a_pass']:.2f}", " ".join(f"{share:.2f}" for share in found["by_depth"])]
        for task in next(iter(tasks.values()))
        for decoding, found in ((decoding, tasks[decoding][task]) for decoding in tasks)
    ]
    return Table("Fresh prompts", ["task", "decoding", "tokens a pass", "right at depth 1, 2, 3"], rows).markdown()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--tokens", type=int, default=32 * 512, help="of a step (default: %(default)s)")
    arguments = parser.parse_args()
    text = arguments.metrics.read_text(encoding="utf-8")
    if arguments.metrics.suffix == ".json":
        found = json.loads(text)
        print(table(found["curve"], found["sequences"] * found["length"]), task_table(found["tasks"]), sep="\n\n")
    else:
        print(table([json.loads(line) for line in text.splitlines()], arguments.tokens))


if __name__ == "__main__":
    main()
