"""Text that every user has, or gives.

Serves `dynamo_train` (to train on), `dynamo_quantize` (to calibrate with, and its gates) and `dynamo_evaluate` (to
measure on); decoding needs it where there is to be a draft corpus.
"""

import ast
import hashlib
import json
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PromptError
from .text import as_text

STANDARD_LIBRARY = "stdlib"
"""Name of the corpus every user has: the Python standard library of the running interpreter."""

HELD_OUT_PERCENT = 6.0
TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst", ".c", ".h", ".cpp", ".js", ".ts", ".rs", ".go", ".java")
# Tests repeat the modules they test; encodings and pydoc_data are generated tables, not programs.
_NOT_PROGRAMS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    Attributes:
        group: What is held out as one: the top-level package or module, folder or row the text belongs to.
        name: The text's own name, unique in the corpus.
        text: Its content; empty where there are tokens alone.
        tokens: What it was written in, where a model wrote it; only a tokenizer that decodes them to the text, if there
            is one, may take them.
    """

    group: str
    name: str
    text: str
    tokens: tuple[int, ...] | None = None


def is_held_out(document: Document, percent: float = HELD_OUT_PERCENT) -> bool:
    """Tell whether a document belongs to validation: the SHA-256 of its group's name decides, nothing else."""
    digest = hashlib.sha256(document.group.encode()).digest()
    return int.from_bytes(digest[:4], "big") < percent / 100 * 2**32


def standard_library(held_out: bool | None = None) -> Iterator[Document]:
    """Yield the modules of the running interpreter's standard library: those held out, those not, or (None) all."""
    return python_modules(Path(sysconfig.get_paths()["stdlib"]), held_out=held_out)


def python_modules(folder: Path, root: Path | None = None, held_out: bool | None = None) -> Iterator[Document]:
    """Yield the Python modules below `folder`, named and grouped by their path from `root`."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(root or folder).with_suffix("").parts
        if _NOT_PROGRAMS & set(parts[:-1]):
            continue
        if held_out not in (None, is_held_out(Document(parts[0], "", ""))):
            continue
        try:
            with tokenize.open(path) as file:  # honours the coding cookie
                text = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a library's doubtful escapes are not ours to report
                ast.parse(text)
        except (SyntaxError, ValueError, OSError):
            continue  # Python 2 samples of lib2to3 and the like
        yield Document(parts[0], ".".join(parts), text)


def text_files(root: Path) -> Iterator[Document]:
    """Yield the text files below a folder."""
    for path in sorted(root.rglob("*")):
        if path.suffix in TEXT_SUFFIXES and path.is_file():
            parts = path.relative_to(root).with_suffix("").parts
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise PromptError(f"cannot read {path}: {error.strerror or error}") from error
            yield Document(parts[0], path.relative_to(root).as_posix(), text)


def read_documents(source: str | Path) -> Iterator[Document]:
    """Yield texts from a folder of text files, a text file, or a `.jsonl` file whose rows have a field `text`.

    Raises:
        PromptError: There is no such thing, or no text in it.
    """
    path = Path(source)
    if path.is_dir():
        documents = text_files(path)
    elif path.suffix == ".jsonl" and path.is_file():
        documents = json_rows(path)
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise PromptError(f"{path} is not text in UTF-8") from None
        except OSError as error:
            raise PromptError(f"cannot read {path}: {error.strerror or error}") from error
        documents = iter([Document(path.name, path.name, text)])
    else:
        raise PromptError(f"no text at '{source}': give a folder, a text file or a .jsonl file")
    empty = True
    for document in documents:
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise PromptError(f"'{source}' holds no text (files ending in {', '.join(TEXT_SUFFIXES)} count)")


def json_rows(path: Path, field: str = "text") -> Iterator[Document]:
    """Yield the rows of a `.jsonl` file, each a text of its own; empty lines do not count.

    Args:
        path: The file.
        field: Of a row that holds its text.

    Raises:
        PromptError: A line is no row with a text; the message names it.
    """
    row = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Document(f"{path.name}:{row}", f"{path.name}:{row}", _text_of(path, number, line, field))
                    row += 1
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror or error}") from error


def _text_of(path: Path, number: int, line: bytes, field: str) -> str:
    try:
        values = json_object(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        raise PromptError(f"line {number} of '{path}' is not text in UTF-8") from None
    if values is None:
        raise PromptError(f"line {number} of '{path}' is not a JSON object: one a line is wanted")
    text = values.get(field)
    if not isinstance(text, str):
        raise PromptError(f"line {number} of '{path}' has no text in a field named '{field}'")
    return as_text(text, f"the text in line {number} of '{path}'")


def json_object(line: str) -> dict[str, Any] | None:
    """Return what a line of JSON holds; None if that is no object."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or nested without end
        return None
    return values if isinstance(values, dict) else None
