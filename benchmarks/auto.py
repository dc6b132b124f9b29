"""Strategy `auto` against plain decoding and every fixed number of drafts, where drafting pays and where it does not.

    python benchmarks/auto.py MULTI/model.onnx [PLAIN/model.onnx] [--profile FILE] [--json FILE]
    python benchmarks/auto.py --summary FILE.json…       # one line a text and file, as in docs/profiling.md

PLAIN is the `--heads 0` export of the same checkpoint in the same precision; without it "plain" is `autoregressive` on
MULTI, which is as good where further heads have a graph of their own: the base's is then the same.  The device is
profiled first, unless a profile is given.  Texts: "sampled" and "greedy" continue prompts from modules of the standard
library that training holds out; "shuffled" has every strategy write a text whose tokens are in random order, so that no
drafter can know what comes next.  All settings run on every prompt in turn, in an order drawn anew each time.  Brackets
hold 95 % bootstrap intervals over the prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from ratios import Interval, interval, ratio, speed_ratio
from tqdm import tqdm

from dynamo_quantize.texts import pieces
from dynamo_runtime import Backend, Engine, Step, load_bundle
from dynamo_runtime.device.profile import Profile
from dynamo_runtime.generation_statistics import Statistics
from dynamo_runtime.profiling.measure import FULL, QUICK, measure
from dynamo_runtime.sampling import Candidates, Context, Target
from dynamo_runtime.selection import make_strategy
from dynamo_runtime.strategies import Autoregressive, Speculative

PROMPT_TOKENS = 64
TEXTS: dict[str, dict[str, Any]] = {
    "sampled": {},
    "greedy": {"temperature": 0.0},
    "shuffled": {},
}


class Forced(Target):
    """A target that does all that sampling does, and then chooses the token of a given text."""

    text: Sequence[int]
    reads_context = True

    def certain(self, step: Step) -> None:
        """Say nothing: the text decides."""

    def distribution(self, step: Step, context: Context, row: int = -1) -> Candidates:
        """Return all of it on the next token of the text."""
        super().distribution(step, context, row)
        return Candidates(np.array([self.text[len(context.tokens)]]), np.ones(1))

    def sample(self, step: Step, context: Context, uniform: float, row: int = -1) -> int:
        """Return the next token of the text."""
        return int(self.distribution(step, context, row).ids[0])


def settings(multi: Engine, plain: Engine) -> dict[str, tuple[Engine, str, dict[str, Any]]]:
    """Ways to decode: an engine, a strategy and its options; `plain` may be `multi` itself."""
    fixed = {
        f"speculative, {d} draft{'s' * (d > 1)}": (multi, "speculative", {"draft_tokens": d})
        for d in range(1, multi.bundle.topology.n_tokens)
    }
    ways: dict[str, tuple[Engine, str, dict[str, Any]]] = {"plain": (plain, "autoregressive", {})}
    if plain is not multi:
        ways["autoregressive, this graph"] = (multi, "autoregressive", {})
    return ways | fixed | {"auto": (multi, "auto", {})}


def decode(
    engine: Engine, name: str, options: dict[str, Any], prompt: list[int], forced: list[int] | None, new_tokens: int
) -> Statistics:
    """Decode one prompt."""
    engine.reset()
    parameters = engine.bundle.parameters(options)
    strategy = make_strategy(name, engine.bundle, parameters, knowledge=engine.knowledge)
    if forced is not None:
        assert isinstance(strategy, Autoregressive | Speculative)
        strategy._target = Forced(parameters)
        strategy._target.text = prompt + forced
    return engine.generate(prompt, strategy=strategy, max_new_tokens=new_tokens, seed=1, ignore_eos=True).statistics


def run(multi: Engine, plain: Engine, count: int, new_tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return all texts and settings; returns rows by text and setting."""
    rng = np.random.default_rng(0)
    texts = pieces(multi.bundle, None, count, PROMPT_TOKENS + new_tokens + 8, held_out=True)
    ways = settings(multi, plain)
    rows: dict[str, dict[str, Any]] = {}
    for kind, sampling in TEXTS.items():
        found: dict[str, list[list[Statistics]]] = {name: [[] for _ in texts] for name in ways}
        for _ in tqdm(range(rounds), desc=kind, unit="round"):
            for place, text in enumerate(texts):
                shuffled = rng.permutation(text).tolist() if kind == "shuffled" else None
                prompt = (shuffled or text)[:PROMPT_TOKENS]
                forced = None if shuffled is None else shuffled[PROMPT_TOKENS:]
                for name in rng.permutation(list(ways)):
                    engine, strategy, options = ways[name]
                    statistics = decode(engine, strategy, options | sampling, prompt, forced, new_tokens)
                    found[name][place].append(statistics)
        rows[kind] = summarize(found)
    return rows


def summarize(found: dict[str, list[list[Statistics]]]) -> dict[str, Any]:
    """Return figures of one text by setting; speeds of all rounds of a prompt together."""

    def sums(name: str) -> tuple[list[float], list[float], list[float]]:
        tokens = [sum(float(s.new_tokens - s.first_tokens) for s in of_prompt) for of_prompt in found[name]]
        seconds = [sum(s.total_s - s.ttft_s for s in of_prompt) for of_prompt in found[name]]
        passes = [sum(float(s.rounds - 1) for s in of_prompt) for of_prompt in found[name]]
        return tokens, seconds, passes

    plain_tokens, plain_seconds, _ = sums("plain")
    rows: dict[str, Any] = {}
    for name in found:
        tokens, seconds, passes = sums(name)
        rows[name] = {
            "tokens_per_pass": interval(ratio, tokens, passes),
            "tokens_per_s": sum(tokens) / sum(seconds),
            "ratio": interval(speed_ratio, tokens, seconds, plain_tokens, plain_seconds),
        }
    fixed = [name for name in found if name.startswith("speculative")]
    best = max(["plain", *fixed], key=lambda name: rows[name]["ratio"][0])
    ours, theirs = sums("auto"), sums(best)
    rows["auto"]["best"] = best
    rows["auto"]["over_best"] = interval(speed_ratio, ours[0], ours[1], theirs[0], theirs[1])
    return rows


def cell(value: Interval) -> str:
    """Return an estimate with its interval."""
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| text | setting | tokens/pass | tokens/s | ÷ plain | ÷ best fixed |", "|---|---|---|---|---|---|"]
    for kind, settings in rows.items():
        for name, row in settings.items():
            best = f"{cell(row['over_best'])} ({row['best']})" if "best" in row else ""
            cells = [
                kind,
                name,
                f"{row['tokens_per_pass'][0]:.2f}",
                f"{row['tokens_per_s']:.0f}",
                cell(row["ratio"]),
                best,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(files: Sequence[Path]) -> str:
    """Markdown of several results: what `auto` gains, and what the best fixed setting does."""
    lines = [
        "| model | text | tokens/pass | `auto` ÷ plain | best fixed ÷ plain | `auto` ÷ best fixed |",
        "|---|---|---|---|---|---|",
    ]
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        for kind, settings in content["rows"].items():
            auto = settings["auto"]
            best = settings[auto["best"]]
            cells = [
                file.stem.removeprefix("auto_").replace("_", ", "),
                kind,
                f"{auto['tokens_per_pass'][0]:.2f}",
                cell(auto["ratio"]),
                f"{best['ratio'][0]:.2f} ({auto['best']})",
                cell(auto["over_best"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("multi", type=Path, nargs="?")
    parser.add_argument("plain", type=Path, nargs="?")
    parser.add_argument(
        "--summary", type=Path, nargs="+", metavar="JSON", help="run nothing: show results side by side"
    )
    parser.add_argument("--profile", type=Path, help="of MULTI on this machine; written if it is not there yet")
    parser.add_argument("--quick", action="store_true", help="a quick profile")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(arguments.summary))
        return
    if arguments.multi is None:
        parser.error("name a multi-token bundle")
    bundle = load_bundle(arguments.multi)
    if arguments.profile and arguments.profile.is_file():
        profile = Profile.load(arguments.profile)
    else:
        profile = measure(bundle, Backend(threads=arguments.threads), effort=QUICK if arguments.quick else FULL)
        if arguments.profile:
            profile.save(arguments.profile)
    multi = Engine(bundle, threads=arguments.threads, profile=profile)
    plain = Engine(arguments.plain, threads=arguments.threads) if arguments.plain else multi
    rows = run(multi, plain, arguments.prompts, arguments.new_tokens, arguments.rounds)
    print(table(rows))
    conditions = (
        f"{arguments.prompts} prompts × {arguments.new_tokens} tokens × {arguments.rounds} rounds; "
        f"{bundle.precision}, {bundle.topology.n_tokens} tokens a pass; {describe_machine()}"
    )
    print(f"\n{conditions}.")
    if arguments.json:
        content = {"conditions": conditions, "idle": profile.conditions.idle, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
