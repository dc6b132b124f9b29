"""Thousands of damaged bundles, wrong calls, threads and interrupted writers: does anything forbidden come of them?

python tests/campaign/run.py --minutes 2 --seed 1 --json campaign.json
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DYNAMO_PROFILES"] = tempfile.mkdtemp(prefix="campaign-profiles-")  # no profile of this machine plays a part
sys.path[:0] = [str(Path(__file__).parents[1])]

from campaign import bundles, calls, memory, replacing, threads  # noqa: E402
from campaign.workers import FORBIDDEN, Verdict, run_case, run_cases  # noqa: E402

SHARES: dict[ModuleType, float] = {bundles: 0.5, calls: 0.25, replacing: 0.15, threads: 0.05, memory: 0.05}
EXAMPLES = 3  # numbers of cases that are kept of a fault


def main() -> int:
    """Run; returns 1 if anything forbidden was seen."""
    names = {kind.__name__.rpartition(".")[2]: kind for kind in SHARES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--cases", type=int, help="in all, of every kind; those of earlier runs count")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="counts and faults; with the same seed a run goes on in it")
    parser.add_argument("--case", metavar="KIND:NUMBER", help="run one case here, and show what became of it")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(names):
        parser.error(f"there is no kind {unknown.pop()}")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="campaign-") as sound:
        tempfile.tempdir = sound  # of workers that die, too
        for kind in SHARES:
            if hasattr(kind, "prepare"):
                kind.prepare(Path(sound))
        if args.case:
            name, _, number = args.case.partition(":")
            with tempfile.TemporaryDirectory() as scratch:
                print(run_case(names[name], args.seed, int(number), Path(scratch), show=True))
            return 0
        state = _state(args.json, args.seed)
        chosen = [names[name] for name in args.kinds] or list(SHARES)
        whole = sum(SHARES[kind] for kind in chosen)
        try:
            for kind in chosen:
                _run(kind, args, 60 * args.minutes * SHARES[kind] / whole, state)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
    _show(state)
    return int(any(outcome in _forbidden() for each in state["kinds"].values() for outcome in each["counts"]))


def _forbidden() -> set[str]:
    return FORBIDDEN.union(*(kind.FORBIDDEN for kind in SHARES))


def _state(path: Path | None, seed: int) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {"seed": seed, "kinds": {}}
    state: dict[str, Any] = json.loads(path.read_text())
    if state["seed"] != seed:
        raise SystemExit(f"{path} is of seed {state['seed']}: name another file")
    return state


def _run(kind: ModuleType, args: argparse.Namespace, seconds: float, state: dict[str, Any]) -> None:
    """Go on with one kind."""
    name = kind.__name__.rpartition(".")[2]
    mine = state["kinds"].setdefault(name, {"next": 0, "seconds": 0.0, "counts": {}, "faults": {}})
    before, began, saved = mine["seconds"], time.monotonic(), time.monotonic()

    def until(number: int) -> bool:
        return time.monotonic() - began > seconds or (args.cases is not None and number >= args.cases)

    try:
        for number, verdict in run_cases(kind, args.seed, mine["next"], until, args.workers):
            _count(mine, number, verdict)
            mine["seconds"] = round(before + time.monotonic() - began, 1)
            if time.monotonic() - saved > 5:
                _save(args.json, state)
                saved = time.monotonic()
    finally:
        _save(args.json, state)


def _count(mine: dict[str, Any], number: int, verdict: Verdict) -> None:
    mine["next"] = number + 1
    mine["counts"] = dict(Counter(mine["counts"]) + Counter([verdict.outcome]))
    if verdict.outcome in _forbidden():
        what = f"{verdict.outcome}: {verdict.detail}"
        fault = mine["faults"].setdefault(what, {"count": 0, "cases": [], "example": verdict.what})
        fault["count"] += 1
        fault["cases"] = [*fault["cases"], number][:EXAMPLES]


def _save(path: Path | None, state: dict[str, Any]) -> None:
    if path is not None:
        new = path.with_name(f".{path.name}.new")
        new.write_text(json.dumps(state, indent=1) + "\n")
        new.replace(path)


def _show(state: dict[str, Any]) -> None:
    forbidden = _forbidden()
    for name, mine in state["kinds"].items():
        print(f"{name}: {mine['next']} cases in {mine['seconds']:.0f} s")
        for outcome, count in sorted(mine["counts"].items(), key=lambda each: -each[1]):
            print(f"  {'!' if outcome in forbidden else ' '} {count:7}  {outcome}")
        for what, fault in sorted(mine["faults"].items(), key=lambda each: -each[1]["count"]):
            print(f"      {fault['count']:5}  {what}   (case {name}:{fault['cases'][0]}: {fault['example'][:160]!r})")


if __name__ == "__main__":
    sys.exit(main())
