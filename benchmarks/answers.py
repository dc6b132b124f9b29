"""What quantization does to a chat model's own answers: perplexity, and first sentences that change.

    dynamo-export -m smollm2
    python benchmarks/answers.py [--bundle BUNDLE] [--json FILE]

Asks the bundle in full precision the questions of `dynamo_quantize`, quantizes it in every way below, calibrating on
the answers to every other question, and measures each smaller bundle on the answers to the rest: PPL_1 of those
answers, PPL_1 of held-out modules of the standard library, and how many greedy answers begin with another first
sentence, of the held-out questions and of all.  The cost of a pass over one token and over four, behind 64 others, is
taken in one interleaved run of all bundles, in units of fp32's pass over one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from tqdm import tqdm

from dynamo_quantize.blocks import Format
from dynamo_quantize.conversations import GREEDY, SENTENCE_TOKENS, Exchange, conversations, first_sentences
from dynamo_quantize.quantize import write_bundle
from dynamo_quantize.schemes import Options, Part, Scheme, resolve
from dynamo_quantize.texts import pieces
from dynamo_runtime import ALL, Bundle, Engine, load_bundle
from dynamo_runtime.providers import import_onnxruntime
from dynamo_runtime.scoring import score_window

FP32 = "fp32"
PAST = 64
LIBRARY_PIECES, LIBRARY_TOKENS = 12, 384


@dataclass(frozen=True)
class Variant:
    """One row: a scheme, what departs from its defaults, and formats of parts that no option asks for."""

    name: str
    scheme: str
    options: Options = field(default_factory=Options)
    formats: Mapping[Part, Format | None] = field(default_factory=dict)

    @property
    def resolved(self) -> Scheme:
        """With everything that departs from the defaults."""
        scheme = resolve(self.scheme, self.options)
        return replace(scheme, formats={**scheme.formats, **self.formats})


def variants() -> list[Variant]:
    """Return the rows, widest first."""
    eight = [Variant(f"int8, blocks of {size}", "int8", Options(block_size=size)) for size in (32, 64, 128)]
    return [
        *eight,
        Variant("int8, blocks of 32, cache in fp32", "int8", Options(block_size=32, kv_cache="fp32")),
        Variant("int8, blocks of 32, output in fp32", "int8", Options(block_size=32, parts={"output": "fp32"})),
        Variant("int8, blocks of 32, last layer in fp32", "int8", Options(block_size=32, parts={"first_head": "fp32"})),
        Variant("int8, blocks of 32, asymmetric", "int8", formats=dict.fromkeys(Part, Format(8, 32, False))),
        Variant("int4, rounded", "int4", Options(algorithm="rtn")),
        Variant("int4, GPTQ", "int4"),
        Variant("int4, rounded, asymmetric", "int4", Options(algorithm="rtn", symmetric=False)),
        Variant("int4, GPTQ, asymmetric", "int4", Options(symmetric=False)),
        Variant("int4, GPTQ, last layer in int8, blocks of 32", "int4", formats={Part.FIRST_HEAD: Format(8, 32)}),
        Variant("int4, GPTQ, blocks of 16", "int4", Options(block_size=16)),
        Variant("int4, GPTQ, cache in fp32", "int4", Options(kv_cache="fp32")),
    ]


def perplexity(engine: Engine, texts: list[list[int]], starts: list[int]) -> float:
    """PPL_1 of texts, judged from some position of each on."""
    found = [
        score.scores.nll[0]
        for text, start in zip(texts, starts, strict=True)
        for score in score_window(engine.session, text, first=start)
    ]
    return float(np.exp(np.concatenate(found).mean()))


def sentences(engine: Engine, spoken: list[Exchange]) -> list[str]:
    """First sentences of greedy answers."""
    answers = [engine.generate(each.prompt, max_new_tokens=SENTENCE_TOKENS, **GREEDY).tokens for each in spoken]
    return first_sentences(engine.bundle, answers)


def measure(bundle: Bundle, spoken: list[Exchange], library: list[list[int]], theirs: list[str]) -> dict[str, Any]:
    """Return figures of one bundle.

    Args:
        bundle: It.
        spoken: All conversations; every other one, from the second, is held out.
        library: Pieces of the standard library.
        theirs: First sentences in full precision.
    """
    engine = Engine(bundle, provider="cpu")
    judged = [each for each in spoken[1::2] if len(each.answer) > 1]
    own = sentences(engine, spoken)
    changed = [ours != other for ours, other in zip(own, theirs, strict=True)]
    return {
        "bytes": bundle.graph_bytes,
        "ppl_answers": perplexity(engine, [e.tokens for e in judged], [len(e.prompt) - 1 for e in judged]),
        "ppl_library": perplexity(engine, library, [0] * len(library)),
        "changed_held_out": sum(changed[1::2]),
        "changed": sum(changed),
        "examples": [[a, b] for a, b in zip(theirs, own, strict=True) if a != b][:4],
    }


def time_passes(bundles: dict[str, Bundle], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a pass over one token and over four, all bundles in turn."""
    engines = {name: Engine(bundle, provider="cpu") for name, bundle in bundles.items()}
    text = np.random.default_rng(0).integers(1, next(iter(bundles.values())).vocab_size, PAST + 4).tolist()
    taken: dict[str, dict[int, list[float]]] = {name: {1: [], 4: []} for name in engines}
    for engine in engines.values():
        engine.session.step(text[:PAST])
    names = list(engines)
    for turn in tqdm(range(rounds + 2), desc="passes"):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            session = engines[name].session
            for width in (1, 4):
                started = time.perf_counter()
                session.step(text[PAST : PAST + width], rows=ALL)
                if turn > 1:  # the first warm up
                    taken[name][width].append(1000 * (time.perf_counter() - started))
                session.cache.rollback(PAST)
    return {name: {str(w): statistics.median(times) for w, times in by.items()} for name, by in taken.items()}


def table(figures: dict[str, dict[str, Any]], held_out: int, asked: int) -> str:
    """Return the table for docs/quantization.md."""
    full = figures[FP32]
    lines = [
        f"| | MB | PPL_1, own answers | PPL_1, library | changed, of {held_out} held out | changed, of all {asked} "
        "| pass over 1 | over 4 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        ppl = [
            f"{row[key]:.3f}" + ("" if name == FP32 else f" ({row[key] / full[key] - 1:+.2%})")
            for key in ("ppl_answers", "ppl_library")
        ]
        passes = [f"{row['passes'][width] / full['passes']['1']:.2f}" for width in ("1", "4")]
        cells = [name, f"{row['bytes'] / 1e6:.0f}", *ppl, str(row["changed_held_out"]), str(row["changed"]), *passes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=None, help="in fp32, with a chat template (default: smollm2 of the cache)")
    parser.add_argument("--rounds", type=int, default=40, help="of timed passes (default: 40)")
    parser.add_argument("--json", type=Path, help="keep the figures")
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the table of kept figures, and measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.table:
        kept = json.loads(arguments.table.read_text())
        print(table(kept["figures"], kept["held_out"], kept["asked"]) + f"\n\n{kept['machine']}")
        return
    from dynamo_runtime.cache import kept_bundle

    full = load_bundle(arguments.bundle or kept_bundle("smollm2", FP32))
    spoken = conversations(full)
    library = pieces(full, None, LIBRARY_PIECES, LIBRARY_TOKENS, held_out=True)
    theirs = first_sentences(full, [each.answer for each in spoken])
    rows = variants()
    figures = {FP32: measure(full, spoken, library, theirs)}
    with tempfile.TemporaryDirectory() as temporary:
        bundles = {FP32: full}
        for i, row in enumerate(tqdm(rows, desc="quantizing")):
            folder = Path(temporary) / str(i)
            folder.mkdir()
            bundles[row.name] = write_bundle(full, row.resolved, folder, calibration=spoken[::2])
            figures[row.name] = measure(bundles[row.name], spoken, library, theirs)
        for name, passes in time_passes(bundles, arguments.rounds).items():
            figures[name]["passes"] = passes
    machine = f"{describe_machine()}; onnxruntime {import_onnxruntime().__version__}."
    print(table(figures, len(spoken[1::2]), len(spoken)) + f"\n\n{machine}")
    if arguments.json:
        content = {"machine": machine, "bundle": full.source.model, "held_out": len(spoken[1::2]), "asked": len(spoken)}
        arguments.json.write_text(json.dumps(content | {"figures": figures}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
