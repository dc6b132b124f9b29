"""Where the training text comes from, and which of it is held out."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import TrainingError

STANDARD_LIBRARY = "stdlib"
"""Name of the corpus every user has: the Python standard library of the running interpreter."""

PACKAGE = "package:"
"""Prefix that names an installed package as a corpus: ``package:numpy``."""

HELD_OUT_PERCENT = 6.0
TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst", ".c", ".h", ".cpp", ".js", ".ts", ".rs", ".go", ".java")
# Tests repeat the modules they test; encodings and pydoc_data are generated tables, not programs.
_NOT_PROGRAMS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    Attributes:
        group: what is held out as one: the top-level package or module, folder or row the text belongs to.
        name: the text's own name, unique in the corpus.
        text: its content.
    """

    group: str
    name: str
    text: str


def read_corpus(source: str) -> Iterator[Document]:
    """Read a corpus one document at a time.

    Args:
        source: ``stdlib``, ``package:NAME`` (the Python files of an installed package), a folder of text files,
            or a ``.jsonl``, ``.parquet`` or ``.txt`` file; rows of the first two have a ``text`` column, a text
            file is one document.  Several are joined by ``+``: ``stdlib+package:numpy``.

    Raises:
        TrainingError: there is no such thing, or no text in it.
    """
    path = Path(source)
    documents: Iterator[Document]
    if "+" in source and not path.exists():
        documents = (document for part in source.split("+") for document in read_corpus(part))
    elif source == STANDARD_LIBRARY:
        documents = _modules(Path(sysconfig.get_paths()["stdlib"]))
    elif source.startswith(PACKAGE):
        documents = _package(source.removeprefix(PACKAGE))
    elif path.is_dir():
        documents = _folder(path)
    elif path.is_file():
        documents = _rows(path)
    else:
        raise TrainingError(
            f"no corpus at '{source}': give a folder, a file, '{STANDARD_LIBRARY}' or '{PACKAGE}NAME' of an "
            "installed package"
        )
    empty = True
    for document in documents:
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise TrainingError(f"'{source}' holds no text (files ending in {', '.join(TEXT_SUFFIXES)} count)")


def is_held_out(document: Document, percent: float = HELD_OUT_PERCENT) -> bool:
    """Whether a document belongs to validation: the SHA-256 of its group's name decides, nothing else."""
    digest = hashlib.sha256(document.group.encode()).digest()
    return int.from_bytes(digest[:4], "big") < percent / 100 * 2**32


def held_out_documents(source: str = STANDARD_LIBRARY, percent: float = HELD_OUT_PERCENT) -> list[Document]:
    """The documents of a corpus that training never sees."""
    return [document for document in read_corpus(source) if is_held_out(document, percent)]


def _package(name: str) -> Iterator[Document]:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise TrainingError(f"there is no installed package '{name}' to train on")
    root = Path(spec.submodule_search_locations[0])
    yield from _modules(root, root.parent)


def _modules(folder: Path, root: Path | None = None) -> Iterator[Document]:
    """The Python modules below ``folder``, named and grouped by their path from ``root``."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(root or folder).with_suffix("").parts
        if _NOT_PROGRAMS & set(parts[:-1]):
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


def _folder(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        if path.suffix in TEXT_SUFFIXES and path.is_file():
            parts = path.relative_to(root).with_suffix("").parts
            text = path.read_text(encoding="utf-8", errors="replace")
            yield Document(parts[0], path.relative_to(root).as_posix(), text)


def _rows(path: Path) -> Iterator[Document]:
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        yield Document(path.name, path.name, path.read_text(encoding="utf-8", errors="replace"))
        return
    import datasets

    kind = "parquet" if path.suffix == ".parquet" else "json"
    rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    for i, row in enumerate(rows):
        if not isinstance(row.get("text"), str):
            raise TrainingError(f"row {i} of '{path}' has no text in a column named 'text'")
        yield Document(f"{path.name}:{i}", f"{path.name}:{i}", row["text"])
