r"""Prompts about passages: of a corpus' own answers, what a user might ask to be edited, taken apart or gone on with.

    dynamo-train texts smollm2 --device cuda --batch 4096 --beginnings train/corpora/beginnings.txt --out FIRST …
    python train/corpora/passages.py FIRST --model smollm2 --out prompts.jsonl
    dynamo-train texts smollm2 --device cuda --batch 4096 --prompts prompts.jsonl --out SECOND …

No passage comes from anywhere but the model. Of every answer's paragraphs of prose 2 to 5 sentences in a row may be
taken, and every block of code.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pyarrow.parquet as pq

from dynamo_model.checkpoint import load_tokenizer
from dynamo_train.corpus import tables_of

INSTRUCTIONS = Path(__file__).with_name("instructions.json")
PROSE, CODE = (120, 800), (80, 700)  # characters
KINDS = {"edit": 16, "data": 10, "go_on": 12, "on_code": 6}
"""How many of 44 prompts are of a kind."""


def answers_of(corpus: Path, model: str) -> Iterator[str]:
    """Yield the answers in a corpus as text, in order; the first of every row alone, as later ones drift."""
    tokenizer = load_tokenizer(model)
    for path in tables_of(corpus):
        for row in pq.read_table(path, columns=["tokens", "role"]).to_pylist():
            spans = groupby(zip(row["tokens"], row["role"], strict=True), key=lambda pair: pair[1])
            first = next(([token for token, _ in span] for role, span in spans if role), [])
            yield tokenizer.decode(first, skip_special_tokens=True)


def passages_of(answer: str, rng: random.Random) -> tuple[list[str], list[str]]:
    """Return some of an answer's prose, and its code."""
    code = [block for block in re.findall(r"```\w*\n.*?```", answer, re.DOTALL) if CODE[0] < len(block) < CODE[1]]
    prose = []
    for paragraph in map(str.strip, answer.split("\n\n")):
        sentences = re.split(r"(?<=[.!?])\s+", paragraph)
        if len(sentences) > 1 and "|" not in paragraph and not paragraph.startswith("```"):
            begin = rng.randrange(max(1, len(sentences) - 2))
            passage = " ".join(sentences[begin : begin + rng.randint(2, 5)])
            prose += [passage] if PROSE[0] < len(passage) < PROSE[1] else []
    return prose, code


def main() -> None:
    """Write as many prompts as are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--model", default="smollm2", help="whose tokens they are (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--prompts", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    instructions = json.loads(INSTRUCTIONS.read_text(encoding="utf-8"))
    prose, code = [], []
    for answer in answers_of(arguments.corpus, arguments.model):
        found = passages_of(answer, rng)
        prose += found[0]
        code += found[1]
    if not prose or not code:
        parser.error(f"{arguments.corpus} has {len(prose)} passages of prose and {len(code)} of code: give more text")
    with arguments.out.open("w", encoding="utf-8") as file:
        for kind in rng.choices(list(KINDS), list(KINDS.values()), k=arguments.prompts):
            passage = rng.choice(code if kind == "on_code" else prose)
            file.write(json.dumps({"text": f"{rng.choice(instructions[kind])}\n\n{passage}"}) + "\n")


if __name__ == "__main__":
    main()
