"""Writes docs/trees.md from what `benchmarks/tree.py` measured.

    python benchmarks/tree_page.py [--results FILE] [--output FILE] [--check]

With --check nothing is written, and the exit status is 1 if the file is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from page import wrapped, write_or_check

from dynamo_runtime.tables import Table

ROOT = Path(__file__).resolve().parent.parent
WORTH = 1.05  # of a chain's speed: what a tree has to give to be built
INTRO = """# Trees of drafts: a study

A chain feeds one guess a position. A tree feeds several, and a mask has each see only what stands in front of it
([SpecInfer](https://arxiv.org/abs/2305.09781), [Medusa](https://arxiv.org/abs/2401.10774)); the best static tree of so
many rows follows from how often each choice at each depth is right, by the dynamic program of
[Sequoia](https://arxiv.org/abs/2402.12374) (`benchmarks/sequoia.py`, tested against all trees there are). The runtime
feeds chains. This page says what trees would give; nothing of them is in the runtime.
"""
BUILD = """
**What building it takes**: inputs `attention_bias` and `position_ids` in exported graphs (a new format of bundles, and
slower attention on providers whose kernel has no bias); drafters that give several choices a position, told heads in
one run for all rows of a depth; verification that follows a path; a cache that moves accepted rows together; and a plan
that weighs trees. Same seed, same text holds only as far as rows behind a sibling do not flip.
"""


def interval(values: list[float]) -> str:
    """Return a ratio with its interval."""
    value, low, high = values
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def shape(tree: list[list[int]]) -> str:
    """Return a tree's rows at each depth."""
    depths = [len(ranks) for ranks in tree]
    return " + ".join(str(depths.count(depth)) for depth in range(max(depths) + 1))


def gains(content: dict[str, Any]) -> Table:
    """Return the best tree over the best chain, by bundle, decoding and task."""
    columns = ["bundle", "decoding", "task", "best chain, tokens a pass", "÷ plain", "best tree, tokens a pass"]
    columns += ["tree ÷ chain", "were a tree's rows a chain's"]
    rows = []
    for bundle, study in content["bundles"].items():
        for decoding, found in study["decodings"].items():
            for task, gain in found["gains"].items():
                ratios = [interval(gain[name]) for name in ("tree_over_chain", "at_least_cost")]
                chain = [f"{gain['chain']:.2f}", interval(gain["chain_over_plain"])]
                rows.append([bundle, decoding, task, *chain, f"{gain['tree']:.2f}", *ratios])
    return Table("Wall clock by the curve, on prompts that no tree was chosen by", columns, rows)


def sizes(content: dict[str, Any]) -> Table:
    """Chains and trees of every number of rows, greedily."""
    columns = ["bundle", "rows", "chain, tokens a pass", "its round, plain passes", "÷ plain"]
    columns += ["tree, rows by depth", "tokens a pass", "its round, plain passes", "÷ plain"]
    rows = []
    for bundle, study in content["bundles"].items():
        found, plain = study["decodings"]["greedy"], study["times"]["chains"][0]
        for count in range(1, content["rows"] + 1):
            cells = [bundle, str(count)]
            for kind in ("chains", "trees"):
                each = next((each for each in found[kind] if len(each["tree"]) == count), None)
                cells += [shape(each["tree"]) if each else "–"] if kind == "trees" else []
                if each is None:
                    cells += ["–"] * 3
                    continue
                cost = each["ms"] / plain
                cells += [f"{each['tokens_per_pass']:.2f}", f"{cost:.2f}", f"{each['tokens_per_pass'] / cost:.2f}"]
            rows.append(cells)
    return Table("By rows, greedily, all tasks", columns, rows)


def passes(content: dict[str, Any]) -> Table:
    """Return what a pass costs, as a chain and as a tree."""
    columns = ["bundle", "pass over", *map(str, range(1, content["rows"] + 1))]
    rows = []
    for bundle, study in content["bundles"].items():
        for kind in ("chains", "trees"):
            rows.append([bundle, f"a {kind[:-1]}", *(f"{ms:.1f}" for ms in study["times"][kind])])
    return Table("Milliseconds of a pass over so many rows", columns, rows)


def flips(content: dict[str, Any]) -> Table:
    """Return how often a row says something else than the same row in another pass."""
    columns = ["bundle", "row", "against", "rows", "another token", "rows of the text", "another token there"]
    columns += ["largest difference of a logit"]
    said = {
        "behind a sibling": ("of a tree, behind a masked sibling", "the chain to it"),
        "first choices": ("of a tree, first choices in front", "the chain to it"),
        "chain": ("of a chain", "a pass over one token"),
    }
    rows = []
    for bundle, study in content["bundles"].items():
        for kind, found in study["flips"]["rows"].items():
            counts = [str(found[name]) for name in ("rows", "flips", "right", "right_flips")]
            rows.append([bundle, *said[kind], *counts, f"{found['largest_difference']:.2g}"])
    return Table("Flips, greedily", columns, rows)


def verdict(content: dict[str, Any]) -> str:
    """Return what it comes to, bundle by bundle, and what building it takes where it is worth it."""
    lines, worth = [], False
    for bundle, study in content["bundles"].items():
        found = {decoding: figures["gains"]["all"] for decoding, figures in study["decodings"].items()}
        best = max(found, key=lambda decoding: found[decoding]["tree_over_chain"][0])
        value = found[best]["tree_over_chain"][0]
        worth = worth or value >= WORTH
        chain = "plain decoding" if found[best]["chain"] == 1 else "the best chain"
        lines.append(
            f"- **{bundle}**: the best tree runs at {interval(found[best]['tree_over_chain'])} "
            f"of {chain} ({best}, all tasks), with {found[best]['tree']:.2f} tokens a pass against "
            f"{found[best]['chain']:.2f}. {_why(study, found[best], value)}"
        )
    head = "**Worth building**" if worth else "**Not worth building on these figures**"
    rule = f"{head} (the aim is {WORTH:.2f} of the best chain, plain decoding being the shortest):"
    return "\n".join([rule, "", *lines]) + ("\n" + BUILD if worth else "\n")


def _why(study: dict[str, Any], gain: dict[str, Any], value: float) -> str:
    """Return which of the costs is in the way."""
    flipped = study["flips"]["rows"]["behind a sibling"]
    exact = (
        f"Of {flipped['rows']} rows behind a sibling {flipped['flips']} said another token "
        f"({flipped['right_flips']} of {flipped['right']} where the text went on)."
    )
    if value >= WORTH:
        return exact
    cheap = gain["at_least_cost"][0]
    if cheap >= WORTH:
        return (
            f"Were its rows and drafts as cheap as a chain's it would be {cheap:.2f}: the mask costs too much. {exact}"
        )
    return f"Even with rows and drafts as cheap as a chain's it would be {cheap:.2f}: rows cost too much. {exact}"


def document(content: dict[str, Any]) -> str:
    """Return the whole page."""
    tables = [f"{each(content).markdown()}\n" for each in (gains, sizes, passes, flips)]
    texts = [figures["answers"] for study in content["bundles"].values() for figures in study["decodings"].values()]
    conditions = (
        f"{max(texts)} answers of at most {content['new_tokens']} tokens, with a chat template; as many others chose "
        f"trees and chains. Passes behind {content['past']} positions. {content['machine']}."
    )
    how = (
        "Tokens a pass are counted by going through plain decoding's answers with the heads' choices at every place. A "
        "round's time is that of its pass, the drafter's layers and runs, and for a tree moving the rows that stand; "
        "Python's time for a draft is left out, which favours trees, as they have more of them. `python "
        "benchmarks/tree.py NAME=BUNDLE… --json benchmarks/results/tree_smollm2.json` measures, `python "
        "benchmarks/tree_page.py` writes this page."
    )
    note = f"> {content['note']}\n" if "note" in content else ""
    return wrapped("\n".join([INTRO, *([note] if note else []), verdict(content), *tables, conditions, "", how]))


def main(argv: list[str] | None = None) -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/tree_smollm2.json", metavar="FILE")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/trees.md", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is out of date")
    arguments = parser.parse_args(argv)
    page = document(json.loads(arguments.results.read_text(encoding="utf-8")))
    return write_or_check(arguments.output, page, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
