r"""What more training buys: how far heads foresee, against the tokens that they were trained on.

    python benchmarks/curve.py [METRICS.jsonl]

METRICS is the `metrics.jsonl` of a run of `dynamo-train heads … --cache` (in WORK/run), of which lines with a
validation are shown; without it those of SmolLM2's heads, as `dynamo-train default smollm2 --data
train/corpora/smollm2` made them with steps of 8 x 512 tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dynamo_runtime.tables import Table

RESULTS = Path(__file__).parent / "results" / "heads_smollm2.jsonl"
COLUMNS = ("greedy_tokens_a_pass", "tokens_a_pass", "greedy_1", "greedy_2", "greedy_3", "ppl_2", "ppl_3", "ppl_4")


def table(lines: list[dict[str, Any]], tokens: int) -> str:
    """Return a row for every validation.

    Args:
        lines: Of the metrics.
        tokens: Of a step.
    """
    rows = []
    for line in lines:
        if COLUMNS[0] in line:
            figures = (f"{line[name]:.1f}" if name.startswith("ppl") else f"{line[name]:.3f}" for name in COLUMNS)
            rows.append([f"{line['step'] * tokens / 1e6:.2f} M", *figures])
    names = ["tokens a pass, greedy", "… of the text", *(f"greedy at depth {i}" for i in (1, 2, 3))]
    return Table("Held-out text", ["tokens seen", *names, "PPL_2", "PPL_3", "PPL_4"], rows).markdown()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--tokens", type=int, default=8 * 512, help="of a step (default: %(default)s)")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.metrics.read_text(encoding="utf-8").splitlines()]
    print(table(lines, arguments.tokens))


if __name__ == "__main__":
    main()
