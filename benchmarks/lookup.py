"""What the drafter `lookup` costs a step and a token, and what it gives where texts repeat themselves, or do not.

    python benchmarks/lookup.py [--bundle PATH [--chat]] [--json FILE]

The first table follows texts behind 8,192 tokens of context, a token at a time, without any model: modules of the
standard library as tokens of the bundle, and made-up texts that are hard on hash chains.  The second decodes prompts
with every way to draft in turn; "rows won" is what rows of repeated tokens gave beyond their costs, as a share of the
time, both by the curve that `auto` plans with.  The third says how often repeated tokens were right, by
the length of the match: what the usual rates in `dynamo_runtime.repeat_rates` are to be compared with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine

from dynamo_runtime import DEFAULT_BUNDLE, Auto, Context, Engine, ParameterError, Passed
from dynamo_runtime.corpus import standard_library
from dynamo_runtime.lookup import Lookup
from dynamo_runtime.repeats import Occurrences
from dynamo_runtime.selection import make_strategy

CONTEXT, STEPS = 8192, 4096
_LETTER = (
    "Dear Ms. Harlow, thank you for your letter of the third of May. We are sorry to hear that the second crate "
    "arrived damaged, and that four of the twelve lamps could not be used. A new crate will leave our warehouse in "
    "Dover on Monday and should reach you by Thursday. Please keep the damaged lamps until our driver has seen them. "
    "With kind regards, Thomas Reed, Reed and Sons."
)
_MODULE = (
    "class Account:\n    def __init__(self, owner, balance=0):\n        self.owner = owner\n        self.balance = "
    "balance\n\n    def deposit(self, amount):\n        if amount <= 0:\n            raise ValueError('amount must be "
    "positive')\n        self.balance += amount\n        return self.balance\n"
)
ANSWERED = {
    "editing": (
        f"Replace Dover by Calais in this letter and write all of it:\n\n{_LETTER}",
        f"Add a method withdraw to this class and write all of it:\n\n{_MODULE}",
    ),
    "from scratch": (
        "Write a short story about a lighthouse keeper who finds a map.",
        "Why do leaves change their colour in autumn?",
    ),
}
SAMPLED = "from scratch, T 1"
CONTINUED = {
    "editing": (f"# The class:\n{_MODULE}\n# The same class with a method withdraw:\n",),
    "from scratch": ("import os\n\ndef walk(path):\n    ", "class Stack:\n    def __init__(self):\n"),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"strategy": "autoregressive"},
    "lookup, as far as the match": {"strategy": "speculative", "drafter": "lookup"},
    "auto, lookup": {"strategy": "auto", "drafter": "lookup"},
    "auto": {"strategy": "auto"},
}


def texts_to_follow(engine: Engine) -> dict[str, list[int]]:
    """Return texts of `CONTEXT` and `STEPS` tokens by name."""
    rng, length = np.random.default_rng(0), CONTEXT + STEPS
    code: list[int] = []
    for document in standard_library():
        code += engine.bundle.tokenizer.encode(document.text).ids
        if len(code) >= length:
            break
    return {
        "standard library": code[:length],
        "random, all tokens": rng.integers(engine.bundle.vocab_size, size=length).tolist(),
        "random, four tokens": rng.integers(4, size=length).tolist(),
        "one token": [5] * length,
    }


def follow(text: Sequence[int]) -> dict[str, float]:
    """Costs of following a text: milliseconds to begin, microseconds a step, and bytes a token."""
    begun = []
    for _ in range(9):
        lookup, started = Lookup(), time.perf_counter()
        lookup.follow(Passed(None, Context(text[: CONTEXT - 1], 1), [text[CONTEXT - 1]], 0))  # type: ignore[arg-type]
        begun.append(time.perf_counter() - started)
    context = Context(text[: CONTEXT - 1], 1)
    lookup = Lookup()
    lookup.follow(Passed(None, context, [text[CONTEXT - 1]], 0))  # type: ignore[arg-type]
    context.extend([text[CONTEXT - 1]])
    steps = []
    for token in text[CONTEXT:]:
        started = time.perf_counter()
        lookup.follow(Passed(None, context, [token], 0))  # type: ignore[arg-type]
        for _ in zip(range(4), lookup.ahead(), strict=False):
            pass
        steps.append(time.perf_counter() - started)
        context.extend([token])
    sizes = [_bytes_a_token(text[:count]) for count in (CONTEXT, CONTEXT + STEPS)]
    p50, p99 = np.percentile(steps, [50, 99]) * 1e6
    return {
        "begin_ms": float(np.median(begun)) * 1e3,
        "step_us": float(p50),
        "step_mean_us": float(np.mean(steps)) * 1e6,
        "step_p99_us": float(p99),
        "bytes": max(sizes),
    }


def _bytes_a_token(text: Sequence[int]) -> float:
    """Of all arrays, as they are behind a text that was followed from its beginning."""
    found = Occurrences()
    for token in text:
        found.append(token)
    arrays: Iterator[Any] = (array("i", each) for each in found.arrays())
    return sum(sys.getsizeof(each) for each in arrays) / len(text)


def decode(
    engine: Engine, prompts: Mapping[str, Sequence[str]], chat: bool, rounds: int, new_tokens: int
) -> list[dict]:
    """Return every way on every prompt in turn; a row for every kind of prompts and way."""
    rows = {(kind, way): Counter[str]() for kind in prompts for way in WAYS}
    for turn in range(rounds + 1):  # the first round warms up
        for kind, questions in prompts.items():
            for question in questions:
                prompt: str | list[int] = question
                if chat:
                    said, control = [{"role": "user", "content": question}], engine.bundle.control_tokens
                    prompt = engine.bundle.chat_template.encode(said, control).encoded.ids
                texts = set()
                for way in list(WAYS) if turn % 2 else reversed(list(WAYS)):
                    text, cost = _decode_once(engine, prompt, way, new_tokens, 1.0 if kind == SAMPLED else 0.0)
                    texts.add(text)
                    if turn:
                        rows[kind, way].update(cost)
                if len(texts) > 1:
                    raise SystemExit(f"the texts behind {question!r} differ")
    found = []
    for (kind, way), sums in rows.items():
        plain = rows[kind, "plain"]
        found.append(
            {
                "kind": kind,
                "way": way,
                "tokens_per_pass": sums["tokens"] / sums["passes"],
                "ratio": sums["tokens"] / sums["seconds"] / (plain["tokens"] / plain["seconds"]),
                "won": sums["gained"] / sums["time"] if sums["time"] else 0.0,
                "drafters": {
                    name[9:]: (sums[f"accepted {name[9:]}"], sums[name])
                    for name in sums
                    if name.startswith("proposed ")
                },
            }
        )
    return found


def _decode_once(
    engine: Engine, prompt: str | list[int], way: str, new_tokens: int, temperature: float
) -> tuple[tuple[int, ...], Counter[str]]:
    """Return one text, and what it cost."""
    engine.reset()
    parameters = engine.bundle.parameters({"temperature": temperature})
    options = WAYS[way]
    strategy = make_strategy(
        options["strategy"], engine.bundle, parameters, drafter=options.get("drafter"), knowledge=engine.knowledge
    )
    written = engine.generate(prompt, strategy=strategy, max_new_tokens=new_tokens, seed=0, ignore_eos=True)
    cost, found = written.statistics, Counter[str]()
    found["tokens"] = cost.new_tokens - cost.first_tokens
    found["passes"] = cost.rounds - 1
    found["seconds"] = cost.total_s - cost.ttft_s  # type: ignore[assignment]
    if isinstance(strategy, Auto) and strategy.copying is not None:
        found["time"] = strategy.copying.time  # type: ignore[assignment]
        found["gained"] = strategy.copying.gained  # type: ignore[assignment]
    found.update({f"proposed {name}": count for name, count in cost.proposed_by.items()})
    found.update({f"accepted {name}": count for name, count in cost.accepted_by.items()})
    return tuple(written.tokens), found


def rates(
    engine: Engine, prompts: Mapping[str, Sequence[str]], chat: bool, new_tokens: int
) -> dict[str, tuple[int, int]]:
    """Return how often what follows a match was right in answers.

    Counts are (right, seen) by the length of the match and agreement.
    """
    found: dict[str, tuple[int, int]] = {}
    for question in [each for questions in prompts.values() for each in questions]:
        tokens = engine.encode(question)
        if chat:
            said, control = [{"role": "user", "content": question}], engine.bundle.control_tokens
            tokens = engine.bundle.chat_template.encode(said, control).encoded.ids
        engine.reset()
        answer = engine.generate(tokens, strategy="autoregressive", temperature=0.0, max_new_tokens=new_tokens).tokens
        lookup, context = Lookup(), Context(tokens, engine.bundle.vocab_size)
        for token, following in itertools.pairwise(answer):
            lookup.follow(Passed(None, context, [token], 0))  # type: ignore[arg-type]
            context.extend([token])
            trail = lookup.trail
            if trail.length:
                group = next(name for least, name in _GROUPS if trail.length >= least)
                name = f"{group}, {('one place', 'two that agree', 'two that differ')[trail.agreement]}"
                right, seen = found.get(name, (0, 0))
                found[name] = right + (trail.following == following), seen + 1
    return dict(sorted(found.items()))


_GROUPS = ((32, "32 or more"), (16, "16 to 31"), (8, "8 to 15"), (5, "5 to 7"), (4, "4"), (3, "3"), (2, "2"))


def show(costs: Mapping[str, Mapping[str, float]], rows: Sequence[Mapping[str, Any]], right: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = [
        f"| text | ms to begin with {CONTEXT:,} tokens | µs a step, median | mean | 99 % | bytes a token |",
        "|---|---|---|---|---|---|",
    ]
    for name, cost in costs.items():
        figures = [cost["begin_ms"], cost["step_us"], cost["step_mean_us"], cost["step_p99_us"], cost["bytes"]]
        lines.append(f"| {name} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
    lines += [
        "",
        "| prompts | way | tokens/pass | tokens/s ÷ plain | rows won | accepted |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        by = ", ".join(f"{name} {accepted} of {count}" for name, (accepted, count) in row["drafters"].items())
        won = f"{row['won']:+.1%}" if row["way"].startswith("auto") else "–"
        shown = f"{row['tokens_per_pass']:.2f} | {row['ratio']:.2f} | {won} | {by or '–'}"
        lines.append(f"| {row['kind']} | {row['way']} | {shown} |")
    lines += ["", "| match of | right |", "|---|---|"]
    lines += [f"| {name} | {ours / seen:.2f} ({seen}) |" for name, (ours, seen) in right.items()]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="default: the embedded model")
    parser.add_argument("--chat", action="store_true", help="put prompts to a chat model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prompts = dict(ANSWERED if arguments.chat else CONTINUED)
    prompts[SAMPLED] = prompts["from scratch"]
    with Engine(arguments.bundle, threads=arguments.threads) as engine:
        costs = {name: follow(text) for name, text in texts_to_follow(engine).items()}
        rows = decode(engine, prompts, arguments.chat, arguments.rounds, arguments.new_tokens)
        right = rates(engine, prompts, arguments.chat, arguments.new_tokens)
        planned = "its profile" if engine.profile else "rules of thumb, as it has not been profiled"
        name = f"{arguments.bundle.absolute().name}, {engine.bundle.precision}"
    conditions = f"{name}; planned by {planned}. {describe_machine()}."
    print(f"{show(costs, rows, right)}\n\n{conditions}")
    if arguments.json:
        content = {"conditions": conditions, "steps": costs, "texts": rows, "right": right}
        arguments.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ParameterError as error:
        sys.exit(str(error))
