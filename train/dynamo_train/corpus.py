"""Where the training text comes from, and which of it is held out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynamo_runtime.corpus import (
    HELD_OUT_PERCENT,
    STANDARD_LIBRARY,
    TEXT_SUFFIXES,
    Document,
    is_held_out,
    json_rows,
    python_modules,
    standard_library,
    text_files,
)

from .errors import TrainingError

GZIP = b"\x1f\x8b"
PACKAGE = "package:"
"""Prefix that names an installed package as a corpus: `package:numpy`."""
TABLES = (".jsonl", ".parquet")
"""Endings of the files in a folder whose rows are texts, beside text files."""


def read_corpus(source: str) -> Iterator[Document]:
    """Read a corpus one document at a time.

    Args:
        source: `stdlib`, `package:NAME` (the Python files of an installed package), a `.jsonl`, `.parquet` or
            `.txt` file, or a folder of such and other text files; rows of the first two have a `text` column and
            those of `.parquet` may have `tokens` besides or instead, a text file is one document.  Several are
            joined by `+`: `stdlib+package:numpy`.

    Raises:
        TrainingError: There is no such thing, or no text in it.
        PromptError: A line of a `.jsonl` file has no text.
    """
    path = Path(source)
    documents: Iterator[Document]
    if len(parts := _parts(source)) > 1:
        documents = (document for part in parts for document in read_corpus(part))
    elif source == STANDARD_LIBRARY:
        documents = standard_library()
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
        if document.tokens or document.text.strip():
            empty = False
            yield document
    if empty:
        raise TrainingError(f"'{source}' holds no text (files ending in {', '.join((*TEXT_SUFFIXES, *TABLES))} count)")


@dataclass(frozen=True)
class Shard:
    """A part of a corpus that a process reads by itself.

    Attributes:
        source: A corpus that is not joined of others, see `read_corpus`.
        table: A file of rows in a folder, by its path in there; empty: all that is in no such file.
    """

    source: str
    table: str = ""


def shards_of(source: str) -> list[Shard]:
    """Cut a corpus into shards: every `.jsonl` and `.parquet` file of a folder is one, and whatever else is named.

    Args:
        source: See `read_corpus`.
    """
    shards = []
    for part in _parts(source):
        shards.append(Shard(part))
        if Path(part).is_dir():
            shards += [Shard(part, path.relative_to(part).as_posix()) for path in tables_of(Path(part))]
    return shards


def read_shard(shard: Shard) -> Iterator[Document]:
    """Read a shard: all shards of a corpus together give the documents of `read_corpus`.

    Raises:
        TrainingError: As `read_corpus`; a folder's shard may hold no text.
        PromptError: A line of a `.jsonl` file has no text.
    """
    root = Path(shard.source)
    if not root.is_dir():
        yield from read_corpus(shard.source)
    else:
        documents = _rows_in(root, root / shard.table) if shard.table else text_files(root)
        yield from (document for document in documents if document.tokens or document.text.strip())


def _parts(source: str) -> list[str]:
    """Return the corpora that a corpus is joined of."""
    return source.split("+") if "+" in source and not Path(source).exists() else [source]


def held_out_documents(source: str = STANDARD_LIBRARY, percent: float = HELD_OUT_PERCENT) -> list[Document]:
    """Return the documents of a corpus that training never sees."""
    return [document for document in read_corpus(source) if is_held_out(document, percent)]


def _package(name: str) -> Iterator[Document]:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise TrainingError(f"there is no installed package '{name}' to train on")
    root = Path(spec.submodule_search_locations[0])
    yield from python_modules(root, root.parent)


def _folder(root: Path) -> Iterator[Document]:
    """Yield text files, then rows of tables; those whose names begin with a dot or an underscore are no texts."""
    yield from text_files(root)
    for path in tables_of(root):
        yield from _rows_in(root, path)


def tables_of(root: Path) -> list[Path]:
    """Return the files below a folder whose rows are texts, in order."""
    files = [path for path in sorted(root.rglob("*")) if path.suffix in TABLES and path.is_file()]
    return [path for path in files if not any(part.startswith((".", "_")) for part in path.relative_to(root).parts)]


def _rows_in(root: Path, path: Path) -> Iterator[Document]:
    """Yield the rows of a table in a folder, named by its place in there."""
    for document in _rows(path):
        name = "/".join((*path.relative_to(root).parts[:-1], document.name))
        yield replace(document, group=name, name=name)


def _rows(path: Path) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        yield from json_rows(path)
    elif path.suffix in (".json", ".parquet") and path.stat().st_size:
        yield from _table(path, path.suffix.removeprefix("."))
    else:
        data = path.read_bytes()
        if b"\0" in data or data.startswith(GZIP):
            raise TrainingError(f"'{path}' is not text: unpack it first, or give one of the kinds that --help lists")
        yield Document(path.name, path.name, data.decode("utf-8", errors="replace"))


def _table(path: Path, kind: str) -> Iterator[Document]:
    import datasets

    i, verbosity = 0, datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said below, once
    try:
        for row in datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True):
            text, tokens = row.get("text"), token_ids(row.get("tokens"))
            if not isinstance(text, str):
                if tokens is None:
                    raise TrainingError(f"row {i} of '{path}' has no text in a column named 'text', and no tokens")
                text = ""
            yield Document(f"{path.name}:{i}", f"{path.name}:{i}", text, tokens)
            i += 1
    except TrainingError:
        raise
    except Exception as error:  # datasets hands on whatever its readers raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"'{path}' cannot be read as {kind}, behind {i} rows: {said}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def token_ids(column: Any) -> tuple[int, ...] | None:
    """Return tokens in a row; None if there are none, or something else is called so."""
    if isinstance(column, list) and column and all(isinstance(each, int) for each in column):
        return tuple(column)
    return None
