r"""The tables of speed and quality in docs, from reports of `dynamo-eval`.

    python benchmarks/quality.py            # what every back-off threshold does to quality, and to speed on every model
    python benchmarks/quality.py --ablation # the paper's ablation and the other readings
    python benchmarks/quality.py --smollm2  # the first table, of SmolLM2

Reads `benchmarks/results/quality/*.json`, each the report.json of

    dynamo-eval generate BUNDLE --plain PLAIN --prompts stdlib --limit 40 --seeds 8 --thresholds 0:1:0.1 \
        --repetition-penalty 1 --max-new-tokens 96 --first-token joint --out run.jsonl        (and with base)
    dynamo-eval judge run.jsonl --mauve BUNDLE
    dynamo-eval report run.jsonl --out FOLDER

on the embedded model in int8, once again with 16 seeds, of shorter runs in fp32 and on the widened model
(benchmarks/widen.py), and of `dynamo-eval ablation`; every file says how it was run.  SmolLM2's are of

    dynamo-eval generate BUNDLE --plain PLAIN --prompts benchmarks/prompts/chat.jsonl --chat --limit 10 --seeds 5 \
        --thresholds 0.1 0.3 0.5 0.7 0.9 --repetition-penalty 1 --max-new-tokens 96 --first-token joint --out run.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamo_evaluate.cells import AXES, MEASURES, SPEED, TOKENS_PER_PASS
from dynamo_evaluate.report import INSIDE
from dynamo_evaluate.results import machine_line
from dynamo_evaluate.settings import ABLATION, PLAIN, READINGS
from dynamo_evaluate.summary import ALL

RESULTS = Path(__file__).parent / "results" / "quality"
SAME_QUALITY = (
    "embedded-int8-joint",
    "embedded-fp32-joint",
    "embedded-int8-base",
    "embedded-int8-base-again",
    "embedded-fp32-base",
)
# Quality is that of the first, the longest run; the other models write the same texts, rounding aside.
MODELS = ("embedded-int8", "embedded-fp32", "widened-int8", "widened-fp32")
REAL = ("smollm2-int8",)
FIRST_TOKENS = {"joint": "drawn with the others, as in the paper", "base": "drawn as plain does (`--first-token base`)"}
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
SHOWN = ("nll", "distinct_3", "repetition", "parsing", "mauve")


def load(name: str) -> dict[str, Any]:
    """Return one report."""
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return report


def quality_cells(report: dict[str, Any], setting: str) -> list[str]:
    """Return every measure of one setting, of plain with its spread."""
    cells = []
    for name in SHOWN:
        found = report["outcomes"][setting]["measures"].get(name)
        if found is None:
            cells.append("–")
        elif setting == PLAIN:
            low, high = report["plain_spread"][name]
            cells.append(f"{found['value']:.2f} [{low:.2f}, {high:.2f}]")
        else:
            cells.append(f"{found['value']:.2f}" + (f" {INSIDE}" if found["inside"] else ""))
    return cells


def speed_cell(report: dict[str, Any], setting: str) -> str:
    """Speed over plain's with its interval."""
    speed = report["outcomes"][setting][SPEED]
    return f"{speed['value']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]"


def settings_table(thresholds: Sequence[float], models: Sequence[str]) -> list[str]:
    """Quality of the first model at some thresholds, and speed on every model."""
    columns = ["setting", "tokens/pass", *(MEASURES[name] for name in SHOWN), *(f"speed ÷ plain, {m}" for m in models)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for number, (first_token, meaning) in enumerate(FIRST_TOKENS.items()):
        reports = {model: load(f"{model}-{first_token}") for model in models}
        quality = reports[models[0]]
        if number == 0:
            cells = ["plain", "1.00", *quality_cells(quality, PLAIN), *["1"] * len(models)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append(f"| **first token {meaning}** |" + " |" * (len(columns) - 1))
        for threshold in thresholds:
            name = f"dynamo, ε_b {threshold:g}"
            tokens = quality["outcomes"][name][TOKENS_PER_PASS]["value"]
            cells = [f"ε_b {threshold:g}", f"{tokens:.2f}", *quality_cells(quality, name)]
            cells += [speed_cell(report, name) for report in reports.values()]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def same_quality_table(runs: Sequence[str]) -> list[str]:
    """Same-quality speed-ups by measure, of runs with seeds enough for a spread of plain."""
    lines = ["| run | axis | " + " | ".join([*(MEASURES[name] for name in SHOWN), "all of these"]) + " |"]
    lines.append("|---" * (len(SHOWN) + 3) + "|")
    for run in runs:
        report = load(run)
        for axis, label in AXES.items():
            found = {each["measure"]: each for each in report["same_quality"] if each["axis"] == axis}
            cells = [same_cell(found.get(name)) for name in (*SHOWN, ALL)]
            lines.append(f"| {run}, {report['seeds']} seeds | {label} | " + " | ".join(cells) + " |")
    return lines


def same_cell(found: dict[str, Any] | None) -> str:
    """Return a same-quality speed-up with its interval."""
    if found is None:
        return "–"
    if found["value"] is None:
        return "none"
    partly = "" if found["share_of_resamples"] >= 0.995 else f" ({found['share_of_resamples']:.0%} of resamples)"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]{partly}"


def ablation_table(threshold: float) -> list[str]:
    """Return every variant at one threshold, and up to how many tokens per pass its quality is plain's."""
    report = load("ablation")
    columns = ["variant", "tokens/pass", "speed ÷ plain", *(MEASURES[name] for name in SHOWN if name != "mauve")]
    columns.append("same quality up to, tokens/pass")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    plain = quality_cells(report, PLAIN)[: len(columns) - 4]
    lines.append("| " + " | ".join(["plain", "1.00", "1", *plain, ""]) + " |")
    same = {
        each["variant"]: each
        for each in report["same_quality"]
        if (each["axis"], each["measure"]) == (TOKENS_PER_PASS, ALL)
    }
    for variant in ABLATION | READINGS:
        name = f"{variant}, ε_b {threshold:g}"
        tokens = report["outcomes"][name][TOKENS_PER_PASS]["value"]
        cells = [variant, f"{tokens:.2f}", speed_cell(report, name), *quality_cells(report, name)[: len(columns) - 4]]
        lines.append("| " + " | ".join([*cells, same_cell(same.get(variant))]) + " |")
    return lines


def conditions(*names: str) -> str:
    """Return what some reports were run on."""
    sizes, machines = [], []
    for name in names:
        report = load(name)
        sizes.append(f"{name} {report['finished']['prompts']} × {report['seeds']} × {report['max_new_tokens']}")
        machines.append(machine_line(report["machine"]))
    return f"Prompts × seeds × tokens: {', '.join(sizes)}. {'; '.join(dict.fromkeys(machines))}."


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ablation", action="store_true")
    what.add_argument("--smollm2", action="store_true")
    parser.add_argument("--thresholds", type=float, nargs="+", help=f"ε_b (default: {THRESHOLDS}, of the ablation 0.5)")
    arguments = parser.parse_args()
    if arguments.ablation:
        for threshold in arguments.thresholds or [0.5]:
            print("\n".join([*ablation_table(threshold), ""]))
        print(conditions("ablation"))
        return
    models = REAL if arguments.smollm2 else MODELS
    runs = [f"{model}-{first}" for model in REAL for first in FIRST_TOKENS] if arguments.smollm2 else SAME_QUALITY
    print("\n".join([*settings_table(arguments.thresholds or THRESHOLDS, models), "", *same_quality_table(runs), ""]))
    print(conditions(*(f"{model}-base" for model in models)))


if __name__ == "__main__":
    main()
