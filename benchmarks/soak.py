"""Does memory stay where it is while one engine writes text after text with the drafter `lookup`?

    python benchmarks/soak.py [BUNDLE] [--tokens N] [--json FILE]

One engine writes texts that fill its context, one behind the other, as a service does: each with an index of its own,
which is to be gone with the text.  Prompts are tokens drawn anew, every second text begins like the one before it (so
that its cache is rolled back and not emptied), and every third is left in the middle.  The resident memory is read
behind every text; from a tenth of the tokens on, by when caches and allocators are as large as they get, it must not
grow by more than --most MiB.  The exit status is 1 if it does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from tqdm import tqdm

from dynamo_runtime import DEFAULT_BUNDLE, Engine
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.files import write_whole

MIB = 1 << 20
PROMPT = 64  # tokens


def resident() -> int:
    """Return bytes of this process that are in memory (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def soak(engine: Engine, tokens: int, options: dict[str, Any]) -> list[tuple[int, int]]:
    """Write so many tokens; returns (tokens written, bytes resident) behind every text."""
    rng, room = np.random.default_rng(0), engine.session.max_length - PROMPT
    written, number, found = 0, 0, list[tuple[int, int]]()
    prompt: list[int] = []
    with tqdm(total=tokens, unit="token", disable=None, leave=False) as bar:
        while written < tokens:
            if number % 2 == 0:
                prompt = rng.integers(1, engine.bundle.vocab_size, PROMPT).tolist()
            stream = engine.stream(prompt, max_new_tokens=room, seed=number, ignore_eos=True, **options)
            for _ in stream:
                if number % 3 == 2 and len(stream.tokens) > room // 2:
                    stream.cancel()
            bar.update(len(stream.tokens))
            written, number = written + len(stream.tokens), number + 1
            found.append((written, resident()))
    return found


def grown(found: list[tuple[int, int]]) -> int:
    """Return bytes by which memory was larger at its largest than when a tenth of the tokens had been written."""
    settled = [held for written, held in found if 10 * written >= found[-1][0]]
    return max(settled) - settled[0]


def main(argv: list[str] | None = None) -> int:
    """Write, and say what memory did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, default=DEFAULT_BUNDLE, help="default: the embedded model")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--strategy", choices=("auto", "speculative"), default="speculative")
    parser.add_argument("--drafter", default="lookup")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--most", type=float, default=8.0, metavar="MIB", help="that it may grow by (default: 8)")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and text (default: the context)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    options = {name: getattr(arguments, name) for name in ("strategy", "drafter", "temperature")}
    started = time.perf_counter()
    try:
        with Engine(arguments.bundle, threads=arguments.threads, max_length=arguments.max_length) as engine:
            found = soak(engine, arguments.tokens, options)
    except DynamoError as error:
        print(f"soak: error: {error}", file=sys.stderr)
        return 1
    growth, seconds = grown(found) / MIB, time.perf_counter() - started
    print(
        f"{found[-1][0]:,} tokens in {len(found)} texts, {seconds:.0f} s: {found[-1][1] / MIB:.1f} MiB at the end, "
        f"{growth:.1f} more at most than behind a tenth of them. {describe_machine()}."
    )
    if arguments.json:
        content = {"machine": describe_machine(), **options, "grown_mib": growth, "resident": found}
        write_whole(arguments.json, json.dumps(content) + "\n")
    return int(growth > arguments.most)


if __name__ == "__main__":
    sys.exit(main())
