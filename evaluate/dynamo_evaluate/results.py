"""Results on disk: JSON lines that grow as work is done, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import io
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dynamo_runtime.bundle import Bundle
from dynamo_runtime.corpus import json_object
from dynamo_runtime.device.inspection import describe_processor
from dynamo_runtime.providers import import_onnxruntime

from .errors import EvaluationError
from .locking import lock

VERSION = 1
_SHOWN = 60  # characters of a value in a complaint
Record = dict[str, Any]


def describe_bundle(bundle: Bundle) -> Record:
    """Return what tells one bundle from another, wherever it lies."""
    content = {name: record.sha256 for name, record in sorted(bundle.files.items())}
    return {
        "name": bundle.folder.resolve().name,
        "kind": bundle.topology.kind,
        "n_tokens": bundle.topology.n_tokens,
        "precision": bundle.precision,
        "sha256": hashlib.sha256(json.dumps([content, dict(bundle.sampling)]).encode()).hexdigest(),
    }


def describe_machine(provider: str) -> Record:
    """Return what results were run on."""
    return {
        "processor": describe_processor(),
        "provider": provider,
        "onnxruntime": import_onnxruntime().__version__,
        "python": platform.python_version(),
    }


class Results:
    """One results file: a header that says what was run, and a record for every piece of work that is done.

    Whoever adds to a file has it alone until `close`, or until the process ends, however it does; others may read it.

    Attributes:
        path: The file.
        header: Its first line: "command", "machine", and all that the records depend on.
        records: The others, in the order they were finished.
    """

    def __init__(self, path: Path | None, header: Record, records: list[Record], file: io.FileIO | None = None):
        """Use `start` or `load`; without a file nothing is written."""
        self.path, self.header, self.records, self._file = path, header, records, file

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write the file."""
        if self._file is not None:
            self._file.close()

    @classmethod
    def start(cls, path: Path | None, header: Record, *, overwrite: bool = False) -> Results:
        """Begin a file, or go on with one whose header is the same.

        Args:
            path: None keeps the results in memory.
            header: JSON values.
            overwrite: Begin anew whatever is there.

        Raises:
            EvaluationError: The file holds other results, another run writes it, or it cannot be written.
        """
        header = json.loads(json.dumps({"dynamo_eval": VERSION, **header}))
        if path is None:
            return cls(None, header, [])
        file = _open(path)
        try:
            found = cls(path, header, [], file)
            if path.is_file() and not overwrite and not _line(header).startswith(path.read_bytes()):
                found = cls._resume(path, header, file)
            else:  # nothing is there, or a header that was cut off
                if path.is_file():
                    file.truncate(0)
                found._write(header)
        except BaseException as error:
            file.close()
            if isinstance(error, OSError):
                raise EvaluationError(f"cannot write {path}: {error.strerror or error}") from error
            raise
        return found

    @classmethod
    def _resume(cls, path: Path, header: Record, file: io.FileIO) -> Results:
        found = cls._read(path, file)
        ours, theirs = flat(header), flat(found.header)
        for name in sorted(set(ours) | set(theirs)):
            if ours.get(name) != theirs.get(name):
                what = f"{name}: {_short(theirs.get(name))}, now {_short(ours.get(name))}"
                raise EvaluationError(
                    f"{path} holds results of another run ({what}): name another file, or give --overwrite"
                )
        return found

    @classmethod
    def load(cls, path: str | Path, to_append: bool = False) -> Results:
        """Read a file; a last line that was cut off is left out.

        Args:
            path: The file.
            to_append: Cut that line off in the file as well, and have it alone from now on.

        Raises:
            EvaluationError: It is missing, not a results file of this version, or another run writes it.
        """
        path = Path(path)
        if not to_append:
            return cls._read(path, None)
        if not path.is_file():
            raise EvaluationError(f"cannot read {path}: there is no such file")
        file = _open(path)
        try:
            return cls._read(path, file)
        except BaseException:
            file.close()
            raise

    @classmethod
    def _read(cls, path: Path, file: io.FileIO | None) -> Results:
        """Of a file, which is repaired if it is open."""
        try:
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if file is not None and len(whole) < len(data):
                file.truncate(len(whole))
            lines = whole.decode("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        header, *records = [json_object(line) for line in lines[:-1]] or [None]
        if header is None or header.get("dynamo_eval") != VERSION or not isinstance(header.get("command"), str):
            raise EvaluationError(f"{path} is not a results file of dynamo-eval, version {VERSION}")
        for number, record in enumerate(records, 2):
            if record is None or not isinstance(record.get("kind"), str):
                raise EvaluationError(f"line {number} of {path} is not a result of dynamo-eval: take it out")
        return cls(path, header, [record for record in records if record is not None], file)

    def append(self, record: Record) -> None:
        """Add a record; once this returns, an interrupt does not lose it.

        Raises:
            EvaluationError: It cannot be written.
        """
        self.records.append(record)
        if self._file is not None:
            try:
                self._write(record)
            except OSError as error:
                raise EvaluationError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _write(self, record: Record) -> None:
        assert self._file is not None
        rest = _line(record)
        while rest:  # a disk that fills up takes a part
            rest = rest[self._file.write(rest) or 0 :]

    def of(self, kind: str) -> Iterator[Record]:
        """Yield the records of one kind."""
        return (record for record in self.records if record["kind"] == kind)

    def done(self, kind: str, key: Callable[[Record], Any]) -> set[Any]:
        """Return keys of the work of one kind that need not be done again."""
        return {key(record) for record in self.of(kind)}

    def demand(self, command: str) -> None:
        """Check that these are results of one command.

        Raises:
            EvaluationError: They are not.
        """
        if self.header.get("command") != command:
            raise EvaluationError(f"{self.path} holds results of {self.header.get('command')}, not of {command}")


def flat(header: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a header without nesting: names of its fields, one behind the other."""
    found: dict[str, Any] = {}
    for name, value in header.items():
        found |= flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return one line for people."""
    return (
        f"{machine['processor']}; onnxruntime {machine['onnxruntime']} ({machine['provider']}), "
        f"Python {machine['python']}"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _open(path: Path) -> io.FileIO:
    """Return a file to append to, for us alone.

    Raises:
        EvaluationError: Another run has it, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror or error}") from error
    if not lock(file.fileno()):
        file.close()
        raise EvaluationError(f"another run is writing {path}: wait for its end, or name another file")
    return file


def _line(record: Record) -> bytes:
    """As JSON; file names that are no text are in it as escapes."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
