"""Are passes of all widths the same on other processors?  The width test under emulators, which need not be fast.

    dynamo-export FOLDER/fp32/model.onnx --heads 0         # the embedded model
    python benchmarks/processors.py make FOLDER            # every scheme of it, and what full precision says
    python benchmarks/processors.py run FOLDER "this machine (AVX-512, VNNI)"
    python benchmarks/processors.py run FOLDER "Haswell (AVX2)" -- qemu-x86_64 -cpu Haswell PYTHON
    python benchmarks/processors.py run FOLDER "Cortex-A76" -- qemu-aarch64 -L ROOT -cpu cortex-a76 ROOT/usr/bin/python3
    python benchmarks/processors.py table                  # writes the tables of docs/exactness.md

The command behind `--` is an emulator with a Python that has numpy and onnxruntime; it is given this file to run.
It takes long: what is found for a scheme is kept at once, and --schemes runs some, beside those that were run before.
Passes over 2 … 8 tokens are compared with passes over one as `dynamo-profile` does it, behind two pasts, at one thread.
As passes may agree and all be wrong, logits of passes over one token and over eight are held against those of the fp32
bundle as this machine computes it: the root of the mean square of what they differ by, over the standard deviation of
a row. Rounding weights has its part in that; what a processor adds is the ratio to the first one of the table.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "runtime"))  # of the Python that an emulator runs, which has nothing installed

RESULTS, PAGE = ROOT / "benchmarks/results/processors.json", ROOT / "docs/exactness.md"
MARK = "tables of benchmarks/processors.py"
PASTS, SCORED, WIDE = (32, 256), 48, 8
ONE, SEVERAL = "error_one", "error_several"
WRONG = 1.5  # times the error of the first processor: beyond what adding in another order makes
FULL = "fp32"
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "int8, blocks of 32": ("int8", {"block_size": 32}),
    "int8, blocks of 128": ("int8", {"block_size": 128}),
    "int8, cache in fp32": ("int8", {"kv_cache": "fp32"}),
    "int4": ("int4", {"algorithm": "rtn"}),
    "int4, blocks of 16": ("int4", {"algorithm": "rtn", "block_size": 16}),
    "int4, blocks of 64": ("int4", {"algorithm": "rtn", "block_size": 64}),
    "int4, zero points": ("int4", {"algorithm": "rtn", "symmetric": False}),
    "int4, output too": ("int4", {"algorithm": "rtn", "parts": {"output": "int4"}}),
    "int8-dynamic": ("int8-dynamic", {}),
}


def folder_of(work: Path, name: str) -> Path:
    """Return where the bundle of a scheme lies."""
    return work / name.replace(", ", "-").replace(" ", "-")


def make(work: Path) -> None:
    """Write bundles without gates, the text, and the logits of the fp32 bundle."""
    from dynamo_quantize.quantize import write_bundle
    from dynamo_quantize.schemes import Options, resolve
    from dynamo_quantize.texts import pieces
    from dynamo_runtime import load_bundle

    full = load_bundle(work / FULL)
    text = pieces(full, None, 1, full.context_length, held_out=True)[0]
    (work / "text.json").write_text(json.dumps(text))
    np.save(work / "reference.npy", logits_of(full, text, 1))
    for name, (scheme, options) in SCHEMES.items():
        folder = folder_of(work, name)
        folder.mkdir()
        print(name, file=sys.stderr)
        write_bundle(full, resolve(scheme, Options(**options)), folder).write_manifest()


def logits_of(bundle: Any, text: list[int], width: int) -> np.ndarray:
    """Return logits [SCORED, V] of a text's beginning from passes over `width` tokens."""
    from dynamo_runtime.session import Session
    from dynamo_runtime.step import ALL, NONE

    session = Session(bundle, provider="cpu", threads=1)
    parts = [text[at : at + width] for at in range(0, SCORED, width)]
    return np.concatenate([session.step(part, rows=ALL, heads=NONE).logits() for part in parts])


def test(work: Path, schemes: list[str]) -> None:
    """Run the width test on bundles and print a line of JSON for each: what an emulator is told to do."""
    from dataclasses import asdict

    from dynamo_runtime.bundle import load_bundle
    from dynamo_runtime.profiling.widths import measure_widths
    from dynamo_runtime.session import Session

    text, reference = json.loads((work / "text.json").read_text()), np.load(work / "reference.npy")
    for name in schemes:
        bundle = load_bundle(folder_of(work, name))
        widths = measure_widths(Session(bundle, provider="cpu", threads=1), text, PASTS, 0.0)
        found: dict[str, Any] = {"scheme": name, **asdict(widths), "exact": widths.exact, "holds": widths.holds}
        for key, width in ((ONE, 1), (SEVERAL, WIDE)):
            found[key] = error(logits_of(bundle, text, width), reference)
        print(json.dumps(found), flush=True)


def error(logits: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square of the difference, over the standard deviation of a row's logits."""
    return float(np.sqrt(((logits - reference) ** 2).mean() / reference.var(axis=-1).mean()))


def run(work: Path, name: str, schemes: list[str], command: list[str]) -> None:
    """Have `test` run by a command, and keep what it finds under a name, beside schemes that were run before."""
    called = [*(command or [sys.executable]), str(Path(__file__).resolve()), "test", str(work.resolve())]
    process = subprocess.Popen([*called, "--schemes", *schemes], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        row = json.loads(line)
        keep(name, command, row.pop("scheme"), row)
    if process.wait():
        sys.exit(f"{' '.join(called)} ends with status {process.returncode}")


def keep(name: str, command: list[str], scheme: str, row: dict[str, Any]) -> None:
    """Write what was found for one scheme into the results."""
    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"processors": {}}
    if not command:
        from machine import describe_machine

        from dynamo_runtime.providers import import_onnxruntime

        record["machine"] = f"{describe_machine()}; onnxruntime {import_onnxruntime().__version__}"
    processor = record["processors"].setdefault(name, {"schemes": {}})
    processor["command"] = without_paths(command)
    processor["schemes"][scheme] = row
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def without_paths(command: list[str]) -> str:
    """Return the emulator and what it is told, without folders of this machine and what is before it (env, nice)."""
    first = next((at for at, each in enumerate(command) if Path(each).name.startswith("qemu-")), 0)
    return re.sub(r"[^ =]*/", "", " ".join(command[first:]))


def verdict(row: dict[str, Any]) -> str:
    """Return a cell of the first table."""
    if row["exact"]:
        return "exact"
    if row["holds"]:
        return f"rounding ({row['difference']:.0e})"
    return f"**no** ({row['difference']:.2g}; {row['changed']} of {row['compared']})"


def errors(row: dict[str, Any], first: dict[str, Any]) -> str:
    """Return a cell of the second table.

    It says what passes over one token and over several are off by, in units of the first's.
    """
    of = first[ONE] or 1.0
    ratios = [row[key] / of for key in (ONE, SEVERAL)]
    if not first[ONE]:  # full precision, which is what all are held against
        return f"{max(row[ONE], row[SEVERAL]):.0e}"
    shown = f"{ratios[0]:.2f}, {ratios[1]:.2f}"
    return f"**{shown}**" if max(ratios) > WRONG else shown


def tables(record: dict[str, Any]) -> str:
    """Both tables, and what they were made with, in Markdown."""
    names = list(record["processors"])
    first = record["processors"][names[0]]["schemes"]
    lines = []
    for title, cell in (
        ("Passes over 2 … 8 tokens against passes over one", lambda s, row: verdict(row)),
        ("Error of passes over 1 and over 8 tokens", lambda s, row: errors(row, first[s])),
    ):
        lines += [f"| {title} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for scheme in first:
            rows = [record["processors"][name]["schemes"].get(scheme) for name in names]
            lines.append(f"| {scheme} | " + " | ".join(cell(scheme, row) if row else "" for row in rows) + " |")
        lines.append("")
    commands = [f"- {name}: `{each['command']}`" for name, each in record["processors"].items() if each["command"]]
    return "\n".join([*lines, f"{names[0]}: {record['machine']}. The others:", "", *commands, ""])


def write_page() -> None:
    """Put the tables into the page, between their marks."""
    from page import put_between, wrapped

    made = wrapped(tables(json.loads(RESULTS.read_text())))
    PAGE.write_text(put_between(PAGE.read_text(encoding="utf-8"), MARK, made), encoding="utf-8")


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["make", "run", "test", "table"])
    parser.add_argument("folder", nargs="?", type=Path, help="of the bundles")
    parser.add_argument("name", nargs="?", help="of the processor")
    parser.add_argument("--schemes", nargs="+", choices=[FULL, *SCHEMES], default=[FULL, *SCHEMES], help="(all)")
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, command = parser.parse_args(sys.argv[1:place]), sys.argv[place + 1 :]
    folder, task = arguments.folder, arguments.task
    if task == "table":
        write_page()
    elif folder is None or (task == "run" and not arguments.name):
        parser.error(f"{task} needs the folder of the bundles{' and a name' * (task == 'run')}")
    elif task == "run":
        run(folder, arguments.name, arguments.schemes, command)
    elif task == "make":
        make(folder)
    else:
        test(folder, arguments.schemes)


if __name__ == "__main__":
    main()
