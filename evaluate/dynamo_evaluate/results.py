"""Results on disk: JSON lines that grow as work is done, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dynamo_runtime.bundle import Bundle
from dynamo_runtime.device.inspection import describe_processor
from dynamo_runtime.providers import import_onnxruntime

from .errors import EvaluationError

VERSION = 1
_SHOWN = 60  # characters of a value in a complaint
Record = dict[str, Any]


def describe_bundle(bundle: Bundle) -> Record:
    """What tells one bundle from another, wherever it lies."""
    content = {name: record.sha256 for name, record in sorted(bundle.files.items())}
    return {
        "name": bundle.folder.resolve().name,
        "kind": bundle.topology.kind,
        "n_tokens": bundle.topology.n_tokens,
        "precision": bundle.precision,
        "sha256": hashlib.sha256(json.dumps([content, dict(bundle.sampling)]).encode()).hexdigest(),
    }


def describe_machine(provider: str) -> Record:
    """What results were run on."""
    return {
        "processor": describe_processor(),
        "provider": provider,
        "onnxruntime": import_onnxruntime().__version__,
        "python": platform.python_version(),
    }


class Results:
    """One results file: a header that says what was run, and a record for every piece of work that is done.

    Attributes:
        path: The file.
        header: Its first line: "command", "machine", and all that the records depend on.
        records: The others, in the order they were finished.
    """

    def __init__(self, path: Path | None, header: Record, records: list[Record]):
        """Use `start` or `load`; without a path nothing is written."""
        self.path, self.header, self.records = path, header, records

    @classmethod
    def start(cls, path: Path | None, header: Record, *, overwrite: bool = False) -> Results:
        """Begin a file, or go on with one whose header is the same.

        Args:
            path: None keeps the results in memory.
            header: JSON values.
            overwrite: Begin anew whatever is there.

        Raises:
            EvaluationError: The file holds other results, or cannot be written.
        """
        header = json.loads(json.dumps({"dynamo_eval": VERSION, **header}))
        if path is None:
            return cls(None, header, [])
        try:
            if path.is_file() and path.stat().st_size and not overwrite:
                return cls._resume(path, header)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_line(header), encoding="utf-8")
        except OSError as error:
            raise EvaluationError(f"cannot write {path}: {error.strerror or error}") from error
        return cls(path, header, [])

    @classmethod
    def _resume(cls, path: Path, header: Record) -> Results:
        found = cls.load(path, repair=True)
        ours, theirs = flat(header), flat(found.header)
        for name in sorted(set(ours) | set(theirs)):
            if ours.get(name) != theirs.get(name):
                what = f"{name}: {_short(theirs.get(name))}, now {_short(ours.get(name))}"
                raise EvaluationError(
                    f"{path} holds results of another run ({what}): name another file, or give --overwrite"
                )
        return found

    @classmethod
    def load(cls, path: str | Path, repair: bool = False) -> Results:
        """Read a file; a last line that was cut off is left out.

        Args:
            path: The file.
            repair: Cut that line off in the file as well, so that records can be appended.

        Raises:
            EvaluationError: It is missing or not a results file of this version.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if repair and len(whole) < len(data):
                os.truncate(path, len(whole))
            lines = whole.decode("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        try:
            header, *records = [json.loads(line) for line in lines[:-1]]
        except ValueError:
            raise EvaluationError(f"{path} is not a results file of dynamo-eval") from None
        if not isinstance(header, dict) or header.get("dynamo_eval") != VERSION:
            raise EvaluationError(f"{path} is not a results file of dynamo-eval, version {VERSION}")
        return cls(path, header, records)

    def append(self, record: Record) -> None:
        """Add a record; once this returns, an interrupt does not lose it."""
        self.records.append(record)
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(_line(record))
            except OSError as error:
                raise EvaluationError(f"cannot write {self.path}: {error.strerror or error}") from error

    def of(self, kind: str) -> Iterator[Record]:
        """The records of one kind."""
        return (record for record in self.records if record["kind"] == kind)

    def done(self, kind: str, key: Callable[[Record], Any]) -> set[Any]:
        """Keys of the work of one kind that need not be done again."""
        return {key(record) for record in self.of(kind)}

    def demand(self, command: str) -> None:
        """Check that these are results of one command.

        Raises:
            EvaluationError: They are not.
        """
        if self.header.get("command") != command:
            raise EvaluationError(f"{self.path} holds results of {self.header.get('command')}, not of {command}")


def flat(header: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A header without nesting: names of its fields, one behind the other."""
    found: dict[str, Any] = {}
    for name, value in header.items():
        found |= flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def machine_line(machine: Mapping[str, Any]) -> str:
    """One line for people."""
    return (
        f"{machine['processor']}; onnxruntime {machine['onnxruntime']} ({machine['provider']}), "
        f"Python {machine['python']}"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
