"""Several guesses a position: what the best static tree of drafts would give over the best chain.

    python benchmarks/tree.py [NAME=]BUNDLE… [--rows N] [--prompts N] [--times FILE] [--json FILE]
    python benchmarks/tree_page.py [--results FILE]      # writes docs/trees.md

Bundles have heads with a graph of their own.  Plain decoding answers the prompts of `benchmarks/prompts`, greedily and
at temperature 0.7; each token of an answer is looked up among the heads' choices at its place, as drafting would rank
them, mask included.  That says which tree of at most --rows rows is the best (`sequoia.best_tree`), and how many passes
every tree and every chain would have taken: drafts are the heads' first choices, in a tree their second and third too,
and the text is plain decoding's.  Trees and chains are chosen by every other prompt, and their passes are counted on
the rest.

Times are medians on this machine behind --past positions, whole calls: passes over chains by the bundle's graph, passes
over trees by a copy whose attention is told positions and what rows must not see (scaled so that one row costs the
same, as two loads of one graph differ by some per cent), the drafter's layers by the positions they read, its runs by
the rows they are about, and moving the keys and values of the rows that stand.  A round is the sum of what it is made
of.  Times are measured by themselves with `--times FILE --prompts 0`, for a machine that is idle for a minute only, and
read from FILE where there is one.

A row behind a masked sibling adds up the same numbers in other places, so it may say something else: "flips" runs the
tree, the chain to each of its rows, and passes over one token, and compares the most probable tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from ratios import interval, speed_ratio
from sequoia import Tree, acceptance, asked, best_tree, chain, parents, replay
from tasks import DECODING, TASKS, named, prompts_of
from tqdm import tqdm
from tree_pass import TreePasses, keep_path, write_tree_graph

from dynamo_runtime import ALL, Engine, Last
from dynamo_runtime.drafting import masked
from dynamo_runtime.errors import DynamoError, ParameterError
from dynamo_runtime.files import write_whole
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.profiling.passes import PassTimer, rounds
from dynamo_runtime.providers import import_onnxruntime
from dynamo_runtime.sampling import truncate
from dynamo_runtime.session import Session

CHOICES = 7  # of the drafter's at a place, as many as eight rows can hold
LAYERS = (1, 2, 4, 8)  # positions that the drafter's layers read in a round
LEAST_TOKENS = 8  # of an answer
BLOCK = 4  # runs of a kind in a row, of which the first warms up


@dataclass(frozen=True)
class Answer:
    """What plain decoding wrote.

    Attributes:
        task: Of the prompt.
        prompt: Its tokens.
        tokens: Of the answer.
        ranks: See `sequoia.replay`, [tokens - 1, depths].
    """

    task: str
    prompt: list[int]
    tokens: list[int]
    ranks: np.ndarray


class Choices:
    """What a bundle's heads would draft, in the order in which they would: with the mask, as `Proposer` has it."""

    def __init__(self, engine: Engine, parameters: SamplingParameters):
        weight = parameters.draft_cooccurrence_weight
        self._counts = engine.bundle.cooccurrence if weight > 0 and engine.bundle.has_cooccurrence else None
        self._parameters = parameters

    def __call__(self, logits: np.ndarray, ids: np.ndarray, before: int) -> np.ndarray:
        """Return tokens by falling probability.

        Args:
            logits: Of the top K, [K], descending.
            ids: Theirs.
            before: The token in front of them.
        """
        found = truncate(logits, ids, self._parameters)
        if self._counts is not None:
            found = masked(found, before, self._counts, self._parameters.draft_cooccurrence_weight)
        tokens: np.ndarray = found.ids[np.argsort(-found.probabilities, kind="stable")[:CHOICES]]
        return tokens


def ranks_of(engine: Engine, choices: Choices, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Return which choice of the heads every token of an answer was: see `sequoia.replay`, [tokens - 1, depths]."""
    depths, count = engine.bundle.topology.parts, len(answer) - 1
    engine.reset()
    ahead = engine.session.step([*prompt, *answer[:-1]], heads=Last(count + 1)).ahead()
    ranks = np.full((count, depths), -1)
    for depth in range(1, depths + 1):
        before = [answer[min(place + depth - 1, count)] for place in range(count + 1)]
        logits, ids = ahead.topk(depth - 1, before)
        for place in range(count + 1 - depth):
            found = np.flatnonzero(choices(logits[place], ids[place], before[place]) == answer[place + depth])
            if len(found):
                ranks[place, depth - 1] = found[0]
    return ranks


def answers_of(engine: Engine, decoding: str, tasks: Sequence[str], prompts: int, new_tokens: int) -> list[Answer]:
    """Return what plain decoding writes, and which of it the heads would have guessed."""
    choices, found = Choices(engine, engine.bundle.parameters(DECODING[decoding])), []
    questions = [(task, prompt) for task in tasks for prompt in prompts_of(task, engine, prompts)]
    for seed, (task, prompt) in enumerate(tqdm(questions, desc=decoding, leave=False, disable=None)):
        engine.reset()
        options = DECODING[decoding] | {"strategy": "autoregressive", "max_new_tokens": new_tokens, "seed": seed}
        tokens = engine.generate(prompt, **options).tokens
        if len(tokens) >= LEAST_TOKENS:
            found.append(Answer(task, prompt, tokens, ranks_of(engine, choices, prompt, tokens)))
    return found


@dataclass(frozen=True)
class Times:
    """What a round is made of, in milliseconds.

    Attributes:
        chains: Passes over 1, 2, … rows.
        trees: The same over trees, as if one row of a tree cost what one of a chain does.
        layers: The drafter's layers, by the positions they read: see `LAYERS`.
        drafts: Its runs about 1, 2, … rows; empty where one run of the layers makes all drafts.
        keeping: Moving keys and values of accepted rows.
    """

    chains: list[float]
    trees: list[float]
    layers: list[float]
    drafts: list[float]
    keeping: float

    def drafting(self, tree: Tree, tokens: float) -> float:
        """Return the drafter's share of a round that gives so many tokens."""
        if len(tree) == 1:
            return 0.0
        runs = sum(self.drafts[rows - 1] for rows in asked(tree)) if self.drafts else 0.0
        return float(np.interp(tokens, LAYERS, self.layers)) + runs

    def round(self, tree: Tree, tokens: float) -> float:
        """Return a round that gives so many tokens."""
        if tree == chain(len(tree) - 1):
            return self.chains[len(tree) - 1] + self.drafting(tree, tokens)
        return self.trees[len(tree) - 1] + self.drafting(tree, tokens) + self.keeping

    def of_rows(self, tree: Tree, tokens: float) -> float:
        """Return the same, were a tree's rows and runs as cheap as a chain's, and nothing to be moved.

        That is the least it can be.
        """
        runs = self.drafts[0] * len(asked(tree)) if self.drafts else 0.0
        layers = 0.0 if len(tree) == 1 else float(np.interp(tokens, LAYERS, self.layers))
        return self.chains[len(tree) - 1] + layers + runs


def measure_times(engine: Engine, passes: TreePasses, past: int, rows: int, seconds: float) -> Times:
    """Time everything that a round may be made of, in random order."""
    session, timer = engine.session, PassTimer(engine.session)
    heads, cache = session.heads, session.cache
    assert heads is not None and cache.states is not None
    timer.behind(past)
    heads.ahead([past - 1])
    states = np.random.default_rng(0).normal(size=(rows, heads.given)).astype(cache.states.dtype)

    def layers(count: int) -> object:
        cache.seen = past - count
        return heads.ahead([past - 1])

    def one_chain(count: int) -> object:
        step = session.step([1] * count, rows=ALL, heads=Last(0))
        cache.rollback(past)
        return step.topk()

    runs: dict[str, list[Callable[[], object]]] = {
        "chains": [lambda m=m: one_chain(m) for m in range(1, rows + 1)],  # type: ignore[misc]
        "trees": [lambda m=m: passes.logits([1] * m, [-1] + [0] * (m - 1)) for m in range(1, rows + 1)],  # type: ignore[misc]
        "layers": [lambda k=k: layers(k) for k in LAYERS],  # type: ignore[misc]
        "keeping": [lambda: keep_path(session, [0, 2])],
    }
    if heads.drafter.conditioned:
        runs["drafts"] = [lambda b=b: heads.draft(states[:b], 0, [1] * b) for b in range(1, rows)]  # type: ignore[misc]
    kinds = [(name, place) for name, of_kind in runs.items() for place in range(len(of_kind))]
    spent: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    rng = np.random.default_rng(0)
    for _ in rounds(seconds, 3):
        for number in rng.permutation(len(kinds)):
            name, place = kinds[number]
            block = []
            for _ in range(BLOCK):
                started = time.perf_counter()
                runs[name][place]()
                block.append((time.perf_counter() - started) * 1e3)
            spent[kinds[number]] += block[1:]
    medians = {name: [float(np.median(spent[name, place])) for place in range(len(runs[name]))] for name in runs}
    engine.reset()
    loads = medians["chains"][0] / medians["trees"][0]
    trees = [each * loads for each in medians["trees"]]
    return Times(medians["chains"], trees, medians["layers"], medians.get("drafts", []), medians["keeping"][0])


def candidates(right: np.ndarray, rows: int) -> list[Tree]:
    """Return the chains, and of every number of rows and depth the best tree that is none.

    The smallest tree is among them, whether or not it gives anything.
    """
    chains = [chain(drafts) for drafts in range(min(len(right), rows - 1) + 1)]
    sizes = [(count, depth) for count in range(2, rows + 1) for depth in range(1, len(right) + 1)]
    trees = [[(), (0,), (1,)], *(best_tree(right, count, depth)[1] for count, depth in sizes)]
    found = {tuple(tree): tree for tree in trees if tree not in chains}
    return [*chains, *found.values()]


def per_pass(tree: Tree, answers: Sequence[Answer]) -> float:
    """Return tokens a pass."""
    return sum(len(each.ranks) for each in answers) / sum(replay(tree, each.ranks) for each in answers)


def compare_trees(answers: Sequence[Answer], times: Times, rows: int) -> dict[str, Any]:
    """Chains and trees of one decoding: chosen by every other answer, replayed on the others."""
    known, held = answers[::2], answers[1::2]
    right = acceptance([each.ranks for each in known], CHOICES)
    every = candidates(right, rows)

    def speed(tree: Tree) -> float:
        tokens = per_pass(tree, known)
        return tokens / times.round(tree, tokens)

    def described(tree: Tree) -> dict[str, Any]:
        tokens = per_pass(tree, held)
        cost = {"ms": times.round(tree, tokens), "least_ms": times.of_rows(tree, tokens)}
        return {"tree": [list(ranks) for ranks in tree], "tokens_per_pass": tokens, **cost}

    chains = [tree for tree in every if tree == chain(len(tree) - 1)]
    trees = [tree for tree in every if tree not in chains]
    by_rows = {count: [tree for tree in trees if len(tree) == count] for count in range(2, rows + 1)}
    best_chain, best = max(chains, key=speed), max(trees, key=speed)
    return {
        "right": right.tolist(),
        "chains": [described(tree) for tree in chains],
        "trees": [described(max(some, key=speed)) for some in by_rows.values() if some],
        "best_chain": described(best_chain),
        "best_tree": described(best),
        "gains": {
            task: gain(best, best_chain, held, times, task) for task in ("all", *dict.fromkeys(a.task for a in held))
        },
        "answers": len(held),
        "tokens": sum(len(each.ranks) for each in held),
    }


def gain(tree: Tree, best_chain: Tree, answers: Sequence[Answer], times: Times, task: str) -> dict[str, Any]:
    """Of a tree over a chain on the answers of a task, with intervals over prompts; and of the chain over plain."""
    some = [each for each in answers if task in ("all", each.task)]
    tokens = [float(len(each.ranks)) for each in some]

    def spent(fed: Tree, cost: Callable[[Tree, float], float]) -> list[float]:
        ms = cost(fed, per_pass(fed, some))
        return [replay(fed, each.ranks) * ms for each in some]

    of_chain = spent(best_chain, times.round)
    return {
        "chain": per_pass(best_chain, some),
        "tree": per_pass(tree, some),
        "tree_over_chain": interval(speed_ratio, tokens, spent(tree, times.round), tokens, of_chain),
        "at_least_cost": interval(speed_ratio, tokens, spent(tree, times.of_rows), tokens, of_chain),
        "chain_over_plain": interval(speed_ratio, tokens, of_chain, tokens, spent(chain(0), times.round)),
    }


class Flips:
    """Counts where a row of a tree says something else than a chain to it, and a chain than passes over one token."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[bool, bool, float]]] = {
            "behind a sibling": [],
            "first choices": [],
            "chain": [],
        }

    def add(self, kind: str, ours: np.ndarray, theirs: np.ndarray, right: bool) -> None:
        """Compare two rows of logits, [vocab]; `right` says whether the text goes through this row."""
        other = bool(ours.argmax() != theirs.argmax())
        self._rows[kind].append((right, other, float(np.abs(ours - theirs).max())))

    def summary(self) -> dict[str, dict[str, float]]:
        """Rows, flips among them, the same of rows that the text goes through, and the largest difference."""
        found: dict[str, dict[str, float]] = {}
        for kind, rows in self._rows.items():
            right = [other for is_right, other, _ in rows if is_right]
            largest = max((difference for *_, difference in rows), default=0.0)
            flips = sum(other for _, other, _ in rows)
            found[kind] = {"rows": len(rows), "flips": flips, "right": len(right), "right_flips": sum(right)}
            found[kind]["largest_difference"] = largest
        return found


def grown(engine: Engine, choices: Choices, tree: Tree, root: int) -> list[int]:
    """Return the tokens of a tree behind what the cache holds, whose root is the newest final token."""
    session = engine.session
    assert session.heads is not None
    token: dict[tuple[int, ...], int] = {(): root}
    position = session.cache.length - 1
    for depth in range(len(asked(tree))):
        some = sorted({ranks[:-1] for ranks in tree if len(ranks) == depth + 1})
        before = [token[ranks] for ranks in some]
        logits, ids = session.heads.ahead([position] * len(some)).topk(depth, before)
        for row, ranks in enumerate(some):
            found = choices(logits[row], ids[row], before[row]).tolist()
            token |= {(*ranks, k): choice for k, choice in enumerate([*found, *[root] * (CHOICES - len(found))])}
    return [token[ranks] for ranks in tree]


def count_flips(
    engine: Engine, passes: TreePasses, answers: Sequence[Answer], tree: Tree, count: int
) -> dict[str, dict[str, float]]:
    """Run a tree at some places of the answers, and the chain to each of its rows."""
    session, flips, choices = engine.session, Flips(), Choices(engine, engine.bundle.parameters(DECODING["greedy"]))
    each = -(-count // len(answers))
    with tqdm(total=each * len(answers), desc="flips", leave=False, disable=None) as bar:
        for answer in answers:
            engine.reset()
            text = [*answer.prompt, *answer.tokens]
            last = len(text) - len(tree) - 1
            for place in np.linspace(len(answer.prompt), last, each).round().astype(int).tolist():
                if place > session.cache.length:
                    session.step(text[session.cache.length : place])
                    tokens = grown(engine, choices, tree, text[place])
                    _compare(session, passes.logits(tokens, parents(tree)), tree, tokens, text[place:], flips)
                bar.update()
    return flips.summary()


def _compare(session: Session, found: np.ndarray, tree: Tree, tokens: list[int], text: list[int], flips: Flips) -> None:
    """Hold the rows of a tree against chains, and those against passes over one token."""
    past, row = session.cache.length, {ranks: number for number, ranks in enumerate(tree)}
    done = set[tuple[int, ...]]()
    for leaf in sorted(tree, key=len, reverse=True):
        if leaf in done:
            continue
        path = [leaf[:depth] for depth in range(len(leaf) + 1)]
        fed = [tokens[row[ranks]] for ranks in path]
        chained = session.step(fed, rows=ALL).logits().copy()
        session.cache.rollback(past)
        for depth, ranks in enumerate(path):
            alone = session.step([fed[depth]]).logits()[-1]
            if ranks in done:
                continue
            done.add(ranks)
            right = fed[: depth + 1] == text[: depth + 1]
            kind = "behind a sibling" if any(ranks) else "first choices"
            flips.add(kind, found[row[ranks]], chained[depth], right)
            flips.add("chain", chained[depth], alone, right)
        session.cache.rollback(past)


def study(arguments: argparse.Namespace, name: str, folder: Path, kept: dict[str, Any]) -> dict[str, Any]:
    """Return all of one bundle; `kept` are times by name, added to."""
    with Engine(folder, threads=arguments.threads) as engine, tempfile.TemporaryDirectory() as scratch:
        if engine.session.heads is None:
            raise ParameterError(f"{folder} has no heads with a graph of their own: export a checkpoint with heads")
        copy = Path(scratch) / "tree.onnx"
        write_tree_graph(engine.bundle.graph_path, copy)
        passes = TreePasses(engine.session, copy)
        if name not in kept:
            kept[name] = vars(measure_times(engine, passes, arguments.past, arguments.rows, arguments.seconds))
        times = Times(**kept[name])
        found: dict[str, Any] = {"precision": engine.bundle.precision, "times": kept[name], "decodings": {}}
        if not arguments.prompts:
            return found
        for decoding in DECODING:
            answers = answers_of(engine, decoding, arguments.tasks, arguments.prompts, arguments.new_tokens)
            found["decodings"][decoding] = compare_trees(answers, times, arguments.rows)
            if decoding == "greedy":
                widest = found["decodings"][decoding]["trees"][-1]["tree"]
                tree = [tuple(ranks) for ranks in widest]
                flips = count_flips(engine, passes, answers[1::2], tree, arguments.positions)
                found["flips"] = {"tree": widest, "rows": flips}
        return found


def main(argv: list[str] | None = None) -> int:
    """Run the study, print what it comes to, and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=named, metavar="[NAME=]BUNDLE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help="default: all")
    parser.add_argument("--prompts", type=int, default=10, metavar="N", help="of every task; 0: times alone")
    parser.add_argument("--new-tokens", type=int, default=96, help="most of an answer (default: 96)")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="most of a tree (default: 8)")
    parser.add_argument("--past", type=int, default=256, help="positions that passes are timed behind (default: 256)")
    parser.add_argument("--positions", type=int, default=200, help="places to look for flips at (default: 200)")
    parser.add_argument("--seconds", type=float, default=20, help="to time a bundle for (default: 20)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--times", type=Path, metavar="FILE", help="read from there, or written where it is not yet")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args(argv)
    if arguments.rows < 3 or arguments.rows > CHOICES + 1:
        parser.error(f"--rows must be from 3, the least that make a tree, to {CHOICES + 1}, not {arguments.rows}")
    runtime = f"onnxruntime {import_onnxruntime().__version__}, Python {platform.python_version()}"
    machine = f"{describe_machine()}; {runtime}"
    given = arguments.times is not None and arguments.times.is_file()
    kept: dict[str, Any] = (
        json.loads(arguments.times.read_text(encoding="utf-8")) if given else {"machine": machine, "bundles": {}}
    )
    content = {name: getattr(arguments, name) for name in ("prompts", "new_tokens", "rows", "past", "positions")}
    content |= {"machine": kept["machine"], "bundles": {}}
    try:
        for name, folder in arguments.bundles:
            content["bundles"][name] = found = study(arguments, name, folder, kept["bundles"])
            for decoding, figures in found["decodings"].items():
                value, low, high = figures["gains"]["all"]["tree_over_chain"]
                print(f"{name}, {decoding}: the best tree over the best chain {value:.3f} [{low:.3f}, {high:.3f}]")
    except DynamoError as error:
        print(f"tree: error: {error}", file=sys.stderr)
        return 1
    if arguments.times and not given:
        write_whole(arguments.times, json.dumps(kept, indent=1) + "\n")
    if arguments.json:
        write_whole(arguments.json, json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
