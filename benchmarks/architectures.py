"""Writes docs/architectures.md from the tables that the tests run: what is supported, and what is refused and why.

    python benchmarks/architectures.py [--output FILE] [--check]

What is said of an architecture is what `dynamo_model.preflight` finds when it runs a tiny model of it with random
weights.  With --check nothing is written, and the exit status is 1 if the file is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from page import write_or_check

from dynamo_model import CheckpointError, LookAheadModel
from dynamo_model.preflight import Supported, preflight
from dynamo_runtime.tables import MISSING, Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from support.checkpoints import CONFIGS, random_base  # type: ignore[import-not-found]  # noqa: E402
from support.refused import REFUSED  # type: ignore[import-not-found]  # noqa: E402

INTRO = """# Architectures

Nothing in this repository knows an architecture by its name. Before anything is trained, and before anything is
exported, `dynamo_model.preflight.preflight` runs the base on six random tokens and judges what it does: every layer's
attention, its rotation, what lies behind the output embedding, whether anything but attention hands something on from
token to token, and whether a further head that holds the last layer's own weights says what the base says. What
cannot be exported exactly is refused there, in one sentence. An architecture that is in neither table is judged
likewise.
"""
SUPPORTED = """## Supported

A tiny model of each, with random weights, goes through heads, export, the parity gate and greedy decoding in the
tests: the text is transformers' own, and verified decoding writes the very tokens of plain decoding. A cell names
everything that its tested configurations have. "In the op" means that onnxruntime's attention rotates queries and
keys itself; where it cannot, the rotation is traced.
"""
REFUSALS = """## Refused

By `dynamo-train` before any work, and by `dynamo-export`, with this sentence:
"""
OUTRO = """
Of every architecture, rope scaling that changes with the length of the prompt (longrope, dynamic NTK) is refused for
contexts in which it does: `--context-length` makes them shorter. Joint heads need what token heads need; look-ahead
embeddings need no further layer, but an input embedding that only looks its rows up.

This page is written by `python benchmarks/architectures.py` from the tables in `tests/support/`.
"""


def document() -> str:
    """Return the whole page."""
    return "\n".join([INTRO, SUPPORTED, supported().markdown(), "", REFUSALS, refused().markdown(), OUTRO])


def supported() -> Table:
    """Return one row an architecture, from all its configurations in the tests."""
    columns = ["architecture", "attention", "rotation", "behind the output embedding", "look-ahead embeddings"]
    cells: dict[str, list[tuple[list[str], ...]]] = {}
    for config in CONFIGS.values():
        base = random_base(config)
        cells.setdefault(type(base).__name__, []).append(_cells(base, preflight(base)))
    rows = [[name, *map(_union, zip(*found, strict=True))] for name, found in sorted(cells.items())]
    return Table("What a tested model has", columns, rows)


def refused() -> Table:
    """Return one row an architecture."""
    rows = []
    for config, _ in REFUSED.values():
        base = random_base(config)
        name = type(base).__name__
        try:
            preflight(base)
        except CheckpointError as error:
            rows.append([name, str(error).removeprefix(f"{name} is not supported: ")])
        else:
            sys.exit(f"{name} is supported, but listed as refused")
    return Table("What is refused", ["architecture", "why"], sorted(rows))


def _cells(base: Any, found: Supported) -> tuple[list[str], ...]:
    layers = list(found.attention.values())
    windows = {spec.window for spec in layers}
    attention = ["window" if None not in windows else "windows in some layers"] if windows != {None} else []
    attention += ["soft cap"] if any(spec.softcap for spec in layers) else []
    attention += ["scale of its own"] if any(spec.scale != spec.head_size**-0.5 for spec in layers) else []
    rotation = ["in the op" if found.rotary.inside else "traced"]
    rotation += ["neighbours"] if found.rotary.interleaved else []
    rotation += ["part of a head"] if found.rotary.cos.shape[1] < layers[0].head_size else []
    rotation += ["some layers not at all"] if not all(spec.rotates for spec in layers) else []
    output = ["bias"] if base.get_output_embeddings().bias is not None else []
    output += ["scale"] if found.output.scale != 1 else []
    output += ["soft cap"] if found.output.softcap else []
    try:
        LookAheadModel(base, 1)
        look_ahead = ["yes"]
    except CheckpointError:
        look_ahead = ["no: scales its input embedding"]
    return attention, rotation, output, look_ahead


def _union(cells: Iterable[list[str]]) -> str:
    """Everything that some configuration has, once."""
    return ", ".join(dict.fromkeys(part for cell in cells for part in cell)) or MISSING


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/architectures.md", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is out of date")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    return write_or_check(arguments.output, document(), check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
