"""A bundle that is replaced while the disk fails, the process dies or somebody else does the same.

Whatever happens, what lies there afterwards is the old bundle or the new one, or none where there was none before;
nothing is loaded that is half of each; and doing it again succeeds.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from support import handmade

from dynamo_graph.errors import WriteError
from dynamo_graph.staging import Destination
from dynamo_runtime import DynamoError, load_bundle

from .workers import Log, Verdict, place

HALF, LEFT, STUCK, WRITER = (
    "half bundle loaded",
    "staging folder left over",
    "cannot be done again",
    "traceback of a writer",
)
UNTOLD, LOST = "said to be done, and is not", "old bundle lost"
FORBIDDEN = {HALF, LEFT, STUCK, WRITER, UNTOLD, LOST}
NONE = "no bundle"
NAMES = ("model.onnx", "model.onnx.data", "tokenizer.json", "cooccurrence.npz")
EVENTS = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "open",
    "shutil.rmtree",
}
OURS = (DynamoError, WriteError)


def case(rng: Random, scratch: Path, log: Log) -> Verdict:
    """One replacement that something happens to."""
    shutil.rmtree(scratch / "here", ignore_errors=True)
    folder = scratch / "here" / "bundle"
    folder.parent.mkdir()
    old = rng.random() < 0.8
    if old:
        _fill(folder, "old", rng)
    log("over an old bundle" if old else "where nothing is")
    verdict = rng.choice((_killed, _failed, _two))(rng, folder, log)
    return Verdict(LOST, str(log)) if old and verdict.outcome == NONE else verdict


def _fill(folder: Path, what: str, rng: Random) -> None:
    """A bundle whose files all say what it is; all such have the same sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES if what == "old" else rng.sample(NAMES, len(NAMES)):
        text = f" {what} {name}".encode() * 5
        # The graph is one of which nothing but its producer's name is said.
        (folder / name).write_bytes(b"\x12" + bytes([len(text)]) + text if name == NAMES[0] else text)
    handmade.write_manifest(folder, vocab_size=300, top_k_outputs=8)


def _replace(folder: Path, what: str, rng: Random) -> None:
    """As a user's program does it."""
    with Destination(folder / "model.onnx", overwrite=True) as target:
        staged = target.stage()
        _fill(staged, what, rng)
        target.move_in(staged)


def _child(act: Callable[[], None], folder: Path, watch: Callable[[int], None]) -> tuple[int, str, str]:
    """Do it in a process of its own, asking `watch` before every change of the file system.

    Returns:
        How the process ended; "done", "one line" or "traceback"; and where.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        said = ("done", "")
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in EVENTS and str(folder.parent) in str(arguments[:2]):
                count += 1
                watch(count)

        sys.addaudithook(hook)
        try:
            act()
        except OURS:
            said = ("one line", "")
        except BaseException as error:
            said = ("traceback", f"{type(error).__name__} at {place()}")
        os.write(theirs, pickle.dumps(said))
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    return (status, *(pickle.loads(data) if data else ("killed", "")))


def _found(folder: Path) -> str:
    """What lies there: "old", "new" or another name, "none", or "half"."""
    try:
        load_bundle(folder)
    except OURS:
        return "none"
    kinds = {(folder / name).read_bytes().split()[-2].decode() for name in NAMES}
    if len(kinds) > 1:
        return "half"
    try:
        load_bundle(folder, verify=True)
    except OURS:
        return "half"
    return kinds.pop()


def _judge(folder: Path, done: str, where: str, rng: Random, log: Log, *, killed: bool = False) -> Verdict:
    if done == "traceback":
        return Verdict(WRITER, where)
    found = _found(folder)
    log(f"found: {found}, said: {done}")
    if found == "half":
        return Verdict(HALF)
    if done == "done" and found != "new":
        return Verdict(UNTOLD, found)
    left = [path.name for path in folder.parent.iterdir() if path != folder and not path.name.endswith(".lock")]
    if left and not killed:
        return Verdict(LEFT, "", f"{log}: {left}")
    try:
        _replace(folder, "again", rng)
    except OURS as error:
        return Verdict(STUCK, "one line", f"{log}: {error}")
    except Exception as error:
        return Verdict(STUCK, f"{type(error).__name__} at {place()}", str(log))
    if _found(folder) != "again":
        return Verdict(STUCK, "done again, and is not", str(log))
    return Verdict(NONE if found == "none" else f"{found} bundle")


def _killed(rng: Random, folder: Path, log: Log) -> Verdict:
    """The process dies at some change of the file system."""
    at = rng.randrange(1, 40)
    log(f"killed at change {at}")

    def watch(count: int) -> None:
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    _, done, where = _child(lambda: _replace(folder, "new", rng), folder, watch)
    return _judge(folder, done, where, rng, log, killed=done == "killed")


def _failed(rng: Random, folder: Path, log: Log) -> Verdict:
    """One change, or every one from then on for a while, is refused by the system; or it is Ctrl-C."""
    at, span = rng.randrange(1, 40), rng.choice((1, 1, 2, 5))
    number = rng.choice((errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS, errno.EXDEV))
    log(f"{errno.errorcode[number]} at change {at}, {span} times")
    inside = [False]

    def watch(count: int) -> None:
        if inside[0] and at <= count < at + span:
            raise OSError(number, os.strerror(number))

    def act() -> None:
        with Destination(folder / "model.onnx", overwrite=True) as target:
            staged = target.stage()
            _fill(staged, "new", rng)
            inside[0] = True  # what fails before is the caller's
            try:
                target.move_in(staged)
            finally:
                inside[0] = False

    _, done, where = _child(act, folder, watch)
    return _judge(folder, done, where, rng, log)


def _two(rng: Random, folder: Path, log: Log) -> Verdict:
    """Two at once, with pauses in either."""
    log("two writers")
    pauses = [[rng.random() < 0.3 for _ in range(80)] for _ in range(2)]
    ends: list[int] = []
    for mine, name in zip(pauses, ("new", "other"), strict=True):
        pid = os.fork()
        if pid == 0:

            def watch(count: int, mine: list[bool] = mine) -> None:
                if mine[count % len(mine)]:
                    time.sleep(0.0005)

            act = lambda name=name: _replace(folder, name, Random(name))  # noqa: E731
            _, done, _ = _child(act, folder, watch)
            os._exit({"done": 0, "one line": 1}.get(done, 2))
        ends.append(pid)
    codes = []
    while ends:
        _, status = os.waitpid(ends.pop(), 0)
        codes.append(os.waitstatus_to_exitcode(status))
    found = _found(folder)
    if 2 in codes:
        return Verdict(WRITER, "two writers")
    if found == "half":
        return Verdict(HALF, "two writers")
    if found not in ("new", "other") and 0 not in codes:
        return Verdict(NONE if found == "none" else "neither of two writers, as both said")
    if found not in ("new", "other"):
        return Verdict(UNTOLD, f"two writers, {found}")
    try:
        _replace(folder, "again", rng)
    except OURS as error:
        return Verdict(STUCK, "two writers", f"{log}: {error}")
    return Verdict("a bundle of one of two writers")
