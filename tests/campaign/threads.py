"""Eight threads on one engine: every text is the one that it would have been alone, or there is a clear refusal."""

from __future__ import annotations

import threading
from pathlib import Path
from random import Random
from typing import Any

from support import handmade

from dynamo_runtime import DynamoError, Engine

from .workers import Log, Verdict, place

WRONG, RAISED = "wrong text beside other threads", "traceback in a thread"
FORBIDDEN = {WRONG, RAISED}
THREADS, TURNS = 8, 6
STRATEGIES = ("autoregressive", "speculative", "dynamo", "auto")
_bundle: list[Path] = []


def prepare(folder: Path) -> None:
    """A bundle with heads."""
    _bundle.append(handmade.write_bundle(folder / "threads", 3))


def case(rng: Random, scratch: Path, log: Log) -> Verdict:
    """A few turns of every thread."""
    engine = Engine(_bundle[0], provider="cpu", threads=1)
    plans = [[_plan(rng) for _ in range(TURNS)] for _ in range(THREADS)]
    alone = {str(plan): _alone(engine, plan) for plans_of_one in plans for plan in plans_of_one}
    seen: list[Verdict] = []
    refused: list[str] = []

    def work(mine: list[dict[str, Any]]) -> None:
        for plan in mine:
            try:
                _turn(engine, plan, alone[str(plan)], seen)
            except DynamoError as error:
                refused.append(str(error))
            except RuntimeError as error:
                if "another generation has begun on this engine" in str(error):
                    refused.append(str(error))
                else:
                    seen.append(Verdict(RAISED, f"RuntimeError at {place()}", str(error)[:200]))
            except Exception as error:
                seen.append(Verdict(RAISED, f"{type(error).__name__} at {place()}", str(error)[:200]))

    running = [threading.Thread(target=work, args=(mine,), daemon=True) for mine in plans]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if seen:
        return seen[0]
    return Verdict("refused to some, right for others" if refused else "right text in all")


def _plan(rng: Random) -> dict[str, Any]:
    return {
        "prompt": rng.choice(("def fib(n):", "class Point:", "for i in range(10):\n    print")),
        "strategy": rng.choice(STRATEGIES),
        "seed": rng.randrange(5),
        "end": rng.choice(("", "", "", "cancelled", "abandoned")),
    }


def _options(plan: dict[str, Any]) -> dict[str, Any]:
    return {"strategy": plan["strategy"], "seed": plan["seed"], "max_new_tokens": 12}


def _alone(engine: Engine, plan: dict[str, Any]) -> str:
    return engine.generate(plan["prompt"], **_options(plan)).text


def _turn(engine: Engine, plan: dict[str, Any], text: str, seen: list[Verdict]) -> None:
    stream = engine.stream(plan["prompt"], **_options(plan))
    found = ""
    for number, piece in enumerate(stream):
        found += piece
        if number == 2 and plan["end"]:
            if plan["end"] == "abandoned":
                break
            stream.cancel()
    if found != text and not (plan["end"] and text.startswith(found)):
        seen.append(Verdict(WRONG, plan["strategy"], f"{plan}: {found!r}, alone {text!r}"))
