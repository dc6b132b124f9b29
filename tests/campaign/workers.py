"""Cases in worker processes that may hang, die or want too much memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from types import ModuleType

from dynamo_runtime.errors import DynamoError

SECONDS = 20.0  # a case may take
MEMORY = 2 << 30  # bytes a case may want besides what the worker has
CASES = 250  # of one worker: whatever it leaks goes with it
HANG, CRASH, TRACEBACK, TOO_MUCH = "hang", "crash of the process", "traceback", "above 2 GB"
FORBIDDEN = {HANG, CRASH, TRACEBACK, TOO_MUCH}
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        outcome: Its kind, which is counted.
        detail: What tells faults of one kind apart, as the place of a traceback.
        what: What was done, for people.
    """

    outcome: str
    detail: str = ""
    what: str = ""


@dataclass
class Log:
    """What a case was made of, known even if it ends in an exception."""

    steps: list[str] = field(default_factory=list)
    show: bool = False  # at once, as the process may die

    def __call__(self, step: str) -> None:
        self.steps.append(step[:200])
        if self.show:
            print(self.steps[-1], flush=True)

    def __str__(self) -> str:
        return "; ".join(self.steps)[:600]


def run_case(kind: ModuleType, seed: int, number: int, scratch: Path, show: bool = False) -> Verdict:
    """One case of a kind, which is a module with `case`; what escapes it is a verdict too."""
    log = Log(show=show)
    try:
        verdict: Verdict = kind.case(Random(f"{seed} {kind.__name__} {number}"), scratch, log)
    except DynamoError as error:
        return one_line(error, log)
    except MemoryError:
        return Verdict(TOO_MUCH, place(), str(log))
    except Exception as error:
        return Verdict(TRACEBACK, f"{type(error).__name__} at {place()}", f"{log}: {str(error)[:200]}")
    return Verdict(verdict.outcome, verdict.detail, verdict.what or str(log))


def one_line(error: DynamoError, log: Log) -> Verdict:
    """An error of our own, which is what bad input deserves, if it is one line and not endless."""
    said = str(error)
    if "\n" in said or len(said) > 20_000 or not said:
        return Verdict("an error that is not one line", type(error).__name__, f"{log}: {said[:200]!r}")
    return Verdict("one line", "", str(log))


def place() -> str:
    """Where the exception that is being handled left our code."""
    frames = [f for f in traceback.extract_tb(sys.exc_info()[2]) if Path(f.filename).is_relative_to(_ROOT)]
    ours = [frame for frame in frames if "campaign" not in frame.filename] or frames
    return f"{Path(ours[-1].filename).relative_to(_ROOT)}:{ours[-1].lineno}" if ours else "?"


def _work(kind: ModuleType, seed: int, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="campaign-", ignore_cleanup_errors=True) as scratch:
        while (number := pipe.recv()) is not None:
            pipe.send(run_case(kind, seed, number, Path(scratch)))


class Worker:
    """One process, and the case that it works on."""

    def __init__(self, kind: ModuleType, seed: int):
        """Fork it: what is imported already is there at once."""
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(kind, seed, theirs), daemon=False)
        self.process.start()
        theirs.close()
        self.number, self.began, self.cases = -1, 0.0, 0

    def begin(self, number: int) -> None:
        """Give it a case."""
        self.number, self.began = number, time.monotonic()
        self.cases += 1
        self.pipe.send(number)

    def take(self) -> Verdict | None:
        """The verdict; None while there is none."""
        if self.pipe.poll():
            try:
                return self.pipe.recv()
            except (EOFError, OSError):
                self.process.join()
                return Verdict(CRASH, f"exit code {self.process.exitcode}")
        return Verdict(HANG) if time.monotonic() - self.began > SECONDS else None

    def end(self) -> None:
        """Whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_cases(
    kind: ModuleType, seed: int, first: int, until: Callable[[int], bool], count: int
) -> Iterator[tuple[int, Verdict]]:
    """Verdicts of the cases from `first` on, in order, until there are enough.

    Args:
        kind: See `run_case`.
        seed: Of all cases.
        first: Number of the first.
        until: Whether no more are to begin behind so many.
        count: Of workers.
    """
    workers: list[Worker] = []
    begun = given = first
    finished: dict[int, Verdict] = {}
    try:
        while True:
            while len(workers) < count and not until(begun):
                workers.append(Worker(kind, seed))
                workers[-1].begin(begun)
                begun += 1
            if not workers:
                return
            wait([worker.pipe for worker in workers], timeout=1.0)
            for worker in list(workers):
                verdict = worker.take()
                if verdict is None:
                    continue
                finished[worker.number] = verdict
                dead = verdict.outcome in (HANG, CRASH)
                if dead or until(begun) or worker.cases >= getattr(kind, "CASES", CASES):
                    worker.end()
                    workers.remove(worker)
                else:
                    worker.begin(begun)
                    begun += 1
            while given in finished:
                yield given, finished.pop(given)
                given += 1
    finally:
        for worker in workers:
            worker.end()
