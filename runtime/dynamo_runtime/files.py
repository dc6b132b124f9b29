"""Results that are written whole or not at all."""

import os
import tempfile
from pathlib import Path

from .errors import OutputError


def write_whole(path: Path, content: str) -> None:
    """Write a file that is there only once it is whole.

    Raises:
        OutputError: It cannot be written there.
    """
    check_writable(path)
    try:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Find out before the work begins whether a file can be written.

    Raises:
        OutputError: It cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
