"""Two checkouts of this repository beside each other: is decoding as fast as it was?

    python benchmarks/checkouts.py BEFORE AFTER BUNDLE...

BEFORE and AFTER are roots of checkouts, and BUNDLE a bundle that both can read. Each runs in a process of its own with
the same Python; every prompt is decoded by one and then by the other, in an order that alternates, so that whatever the
machine does meanwhile falls on both. Printed are tokens a second of BEFORE, the ratio AFTER ÷ BEFORE over all prompts
with a bootstrap interval, and whether all texts were the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from ratios import interval, speed_ratio
from tqdm import tqdm

from dynamo_runtime import load_bundle
from dynamo_runtime.cli.arguments import add_chat, put

PROMPTS = (
    "class Stack:\n    def __init__(self):\n",
    "import os\n\ndef walk(path):\n    ",
    "def parse(text):\n    result = []\n    for line in text",
    "for index, value in enumerate(values):\n    if value",
    "def read(path):\n    with open(path) as file:\n",
    "try:\n    import json\nexcept ImportError:\n",
)
STRATEGIES = ("autoregressive", "speculative", "auto", "dynamo")
WORKER = """
import json, sys
from dynamo_runtime import Engine
engine = Engine(sys.argv[1], provider="cpu")
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    engine.reset()
    result = engine.generate(job.pop("prompt"), ignore_eos=True, **job)
    spent = result.statistics.total_s - result.statistics.ttft_s
    print(json.dumps([result.tokens, result.statistics.new_tokens - result.statistics.first_tokens, spent]), flush=True)
"""


class Worker:
    """A checkout's engine in a process of its own."""

    def __init__(self, checkout: Path, bundle: str):
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve() / "runtime")}
        command = [sys.executable, "-c", WORKER, bundle]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._line()

    def decode(self, **job: Any) -> tuple[list[int], int, float]:
        """Tokens, how many the passes after the first gave, and the seconds those took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        tokens, count, seconds = json.loads(self._line())
        return tokens, count, seconds

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline() or sys.exit("a checkout ended early: its complaint is above")


def main() -> None:
    """Print one row a bundle and strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    add_chat(parser)
    arguments = parser.parse_args()
    print("| bundle | strategy | before, tokens/s | after ÷ before | same texts |\n|---|---|---|---|---|")
    for bundle in arguments.bundles:
        prompts = [put(arguments, load_bundle(bundle), prompt) for prompt in PROMPTS]
        workers = [Worker(checkout, bundle) for checkout in (arguments.before, arguments.after)]
        for strategy in STRATEGIES:
            counts, seconds = (np.zeros((2, len(PROMPTS))) for _ in range(2))
            same = True
            for turn in tqdm(range(arguments.rounds + 1), desc=f"{Path(bundle).name}, {strategy}", leave=False):
                for place, prompt in enumerate(prompts):
                    texts: dict[int, list[int]] = {}
                    for side in (0, 1) if (turn + place) % 2 else (1, 0):
                        texts[side], count, spent = workers[side].decode(
                            prompt=prompt, strategy=strategy, seed=turn, max_new_tokens=arguments.new_tokens
                        )
                        if turn:  # the first round warms up
                            counts[side, place] += count
                            seconds[side, place] += spent
                    same = same and texts[0] == texts[1]
            value, low, high = interval(speed_ratio, counts[1], seconds[1], counts[0], seconds[0])
            speed, name = counts[0].sum() / seconds[0].sum(), Path(bundle).name
            shown = f"{value:.2f} [{low:.2f}, {high:.2f}]"
            print(f"| {name} | {strategy} | {speed:.0f} | {shown} | {'yes' if same else 'no'} |", flush=True)
    print(f"\n{len(PROMPTS)} prompts × {arguments.rounds} × {arguments.new_tokens} tokens. {describe_machine()}.")


if __name__ == "__main__":
    main()
