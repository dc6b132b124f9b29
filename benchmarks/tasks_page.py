"""The tables of docs/speculative.md that say what drafting gives by task, from what `benchmarks/tasks.py` measured.

    python benchmarks/tasks_page.py [--check]

They are put between the comments `<!-- begin: … -->` and `<!-- end -->`.  With --check nothing is written, and the exit
status is 1 if the page is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from page import put_between, wrapped, write_or_check

from dynamo_runtime.tables import Table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/speculative.md"
RESULTS = ("tasks_smollm2", "tasks_smollm2_others")
MARK = "begin: python benchmarks/tasks_page.py"
WAYS = {
    "auto, lookup alone": "lookup alone",
    "auto, heads alone": "heads alone",
    "auto": "auto: both",
    "speculative": "three drafts of heads in every pass",
}
PLAIN, DYNAMO = "plain", "dynamo, first token base"


def figures(row: dict[str, Any]) -> str:
    """Speed over plain decoding with its interval, and tokens a pass."""
    value, low, high = row["speed_ratio"]
    return f"{value:.2f} [{low:.2f}, {high:.2f}] {row['tokens_per_pass'][0]:.2f}"


def cost_of_rows(content: dict[str, Any]) -> str:
    """Say what a pass over four rows cost while the figures were taken; nothing where that was not noted."""
    costs: dict[str, list[float]] = {}
    for row in content["rows"]:
        if "four_rows" in row:
            costs.setdefault(row["bundle"], []).append(row["four_rows"])
    if not costs:
        return ""
    ranges = [f"{min(found):.2f} to {max(found):.2f} in {name}" for name, found in costs.items()]
    return f" Meanwhile a pass over four rows cost {', '.join(ranges)} of one over one row."


def table(content: dict[str, Any]) -> str:
    """Return a row for every bundle, task and decoding."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in content["rows"]:
        found.setdefault((row["bundle"], row["task"], row["decoding"]), {})[row["way"]] = row
    dynamo = any(DYNAMO in ways for ways in found.values())
    rows = []
    for names, ways in found.items():
        cells = [figures(ways[way]) for way in WAYS]
        cells += [figures(ways[DYNAMO]) if DYNAMO in ways else "–"] if dynamo else []
        lossless = [row for way, row in ways.items() if way != PLAIN and "different_texts" in row]
        different, texts = (sum(row[name] for row in lossless) for name in ("different_texts", "prompts"))
        rows.append([*names, *cells, f"{different} of {texts}"])
    header = ["weights", "task", "decoding", *WAYS.values(), *(["dynamo"] if dynamo else []), "texts not plain's"]
    prompts = max(row["prompts"] for row in content["rows"])
    asked = f"{prompts} prompts a task × at most {content['new_tokens']} tokens."
    conditions = f"{asked} {content['machine']}.{cost_of_rows(content)}"
    title = "Speed over plain decoding with its interval, then tokens a pass"
    return f"{Table(title, header, rows).markdown()}\n\n{wrapped(conditions)}"


def main(argv: list[str] | None = None) -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    arguments = parser.parse_args(argv)
    results = [json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8")) for name in RESULTS]
    made = put_between(PAGE.read_text(encoding="utf-8"), MARK, "\n".join(map(table, results)))
    return write_or_check(PAGE, made, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
