"""Generation after generation in one process: memory must stay where it was."""

from __future__ import annotations

from pathlib import Path
from random import Random

from support import handmade

from dynamo_runtime import Engine

from .workers import Log, Verdict

GROWS = "memory grows"
FORBIDDEN = {GROWS}
CASES = 10**9  # one process for all
WARM_UP, GENERATIONS, MOST = 3, 50, 24 << 20  # cases, of a case, bytes
_bundle: list[Path] = []
_engine: list[Engine] = []
_used: list[int] = []


def prepare(folder: Path) -> None:
    """A bundle with heads."""
    _bundle.append(handmade.write_bundle(folder / "memory", 3))


def case(rng: Random, scratch: Path, log: Log) -> Verdict:
    """Some generations that end, are cancelled or abandoned, and now and then an engine of its own."""
    if not _engine:
        _engine.append(Engine(_bundle[0], provider="cpu", threads=1))
    engine = Engine(_bundle[0], provider="cpu", threads=1) if rng.random() < 0.2 else _engine[0]
    for _ in range(GENERATIONS):
        strategy = rng.choice(("autoregressive", "speculative", "dynamo", "auto"))
        prompt = [rng.randrange(1, 300) for _ in range(rng.choice((1, 20, 200)))]
        stream = engine.stream(prompt, strategy=strategy, max_new_tokens=rng.choice((1, 8, 30)), seed=rng.randrange(99))
        stop = rng.choice((0, 2, 10**6))
        for number, _piece in enumerate(stream):
            if number == stop:
                if rng.random() < 0.5:
                    stream.cancel()
                else:
                    break
    _used.append(_resident())
    if len(_used) > WARM_UP and _used[-1] - _used[WARM_UP - 1] > MOST:
        grown = _used[-1] - _used[WARM_UP - 1]
        return Verdict(GROWS, "", f"{grown >> 20} MiB in {(len(_used) - WARM_UP) * GENERATIONS} generations")
    return Verdict("as before")


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))
