"""Text that is tokenized and packed while it is trained on, for corpora that no disk holds.

Documents are read in the order of their shards, which had better be a random one.  Every process reads its own: whole
shards if their number divides by that of the processes, else every n-th document.  They are put end to end, each with
the token that ends a text, and cut into sequences.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dynamo_runtime.corpus import Document, is_held_out

from .corpus import TABLES, tables_of, token_ids
from .errors import TrainingError
from .tokens import TokenStreams, encode, sha256_of_tokenizer

if TYPE_CHECKING:
    from datasets import IterableDataset

Ids = list[int]


@dataclass(frozen=True)
class StreamRecord:
    """What is known of a text that nobody has read to its end.

    Attributes:
        source: folder, file or Hub id.
        shards: how many files there are.
        processes: among which they are divided; as many have to go on with a run.
        held_out_tokens: that were read for validations.
        held_out_percent: share of the documents that are never trained on, by the hash of their text.
        sha256: of the names and sizes of the files, or of the dataset's own fingerprint.
    """

    source: str
    shards: int
    processes: int
    held_out_tokens: int
    held_out_percent: float
    sha256: str


class TextStream:
    """The part of a text that one process trains on, without end: behind its last document the first one follows.

    Args:
        dataset: with a column ``text``; the process' own part.
        encode: token ids of a document, with the token that ends it.
        percent: share of the documents that is left out, see :class:`StreamRecord`.
    """

    def __init__(self, dataset: IterableDataset, encode: Callable[[Document], Ids], percent: float) -> None:
        self._dataset, self._encode, self._percent = dataset, encode, percent
        self._pieces: deque[tuple[dict[str, Any], Ids]] = deque()  # documents, each with where it stands
        self._used = 0  # tokens of the first of them that are behind
        self._begin(0)

    def take(self, rows: int, length: int, extra: int) -> NDArray[np.int64]:
        """The next sequences.

        Args:
            rows: how many.
            length: positions of each.
            extra: tokens behind the last position, which the next sequence begins with.

        Returns:
            Token ids [rows, length + extra].

        Raises:
            TrainingError: there is no text to train on.
        """
        needed = self._used + rows * length + extra
        there = sum(len(ids) for _, ids in self._pieces)
        while there < needed:
            self._pieces.append(self._next())
            there += len(self._pieces[-1][1])
        tokens = np.concatenate([ids for _, ids in self._pieces])[self._used :].astype(np.int64)
        self._used += rows * length
        while self._used >= len(self._pieces[0][1]):
            self._used -= len(self._pieces.popleft()[1])
        return np.stack([tokens[start : start + length + extra] for start in range(0, rows * length, length)])

    def position(self) -> str:
        """Where :meth:`take` goes on, as JSON."""
        place = self._pieces[0][0] if self._pieces else self._place()
        return json.dumps({"place": place, "used": self._used})

    def go_on(self, position: str) -> None:
        """Go on at a :meth:`position` of the same text.

        Raises:
            TrainingError: it is none.
        """
        try:
            found = json.loads(position)
            self._begin(found["place"]["epoch"], found["place"])
            self._pieces.clear()
            self._used = found["used"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(
                "the checkpoint does not say where its text goes on: remove it to start over"
            ) from error

    def _begin(self, epoch: int, place: dict[str, Any] | None = None) -> None:
        self._epoch, self._empty = epoch, place is None
        self._dataset.set_epoch(epoch)
        if place is not None:
            self._dataset.load_state_dict(place)
        self._rows = iter(self._dataset)

    def _place(self) -> dict[str, Any]:
        """Of the next document; a copy, as the dataset changes its own."""
        return json.loads(json.dumps(self._dataset.state_dict()))

    def _next(self) -> tuple[dict[str, Any], Ids]:
        while True:
            place = self._place()
            row = next(self._rows, None)
            if row is None:
                if self._empty:
                    raise TrainingError("there is no text to train on: more documents, or fewer processes, are needed")
                self._begin(self._epoch + 1)
                continue
            document = document_of(row)
            if (document.tokens or document.text.strip()) and not is_held_out(document, self._percent):
                self._empty = False
                return place, self._encode(document)


def document_of(row: dict[str, Any]) -> Document:
    """A row of a dataset; its text is its group as well, so that the same text is held out wherever it stands.

    Raises:
        TrainingError: it has no text.
    """
    text = row.get("text")
    if not isinstance(text, str):
        raise TrainingError("a row of the text has no string in a column named 'text'")
    return Document(text, "", text, token_ids(row.get("tokens")))


def open_shards(source: str) -> tuple[IterableDataset, str]:
    """The rows of a folder of ``.parquet`` or ``.jsonl`` files, of one such file, or of a dataset on the Hub.

    Returns:
        The rows, none of them read, and a SHA-256 that tells them from others.

    Raises:
        TrainingError: there are none.
    """
    import datasets

    path = Path(source)
    if not path.exists():
        if source.count("/") != 1 or source.startswith((".", "/")):
            raise TrainingError(f"no text at '{source}': --stream reads a folder, a file, or OWNER/NAME on the Hub")
        rows = _load(source, split="train", streaming=True)
        return rows, hashlib.sha256(source.encode()).hexdigest()
    files = [path] if path.is_file() else tables_of(path)
    kinds = {file.suffix for file in files}
    if len(kinds) != 1:
        raise TrainingError(
            f"'{source}' holds {len(kinds)} kinds of shards: --stream reads {' or '.join(TABLES)} files"
        )
    kind = "json" if kinds == {".jsonl"} else "parquet"
    names = "".join(f"{os.path.relpath(file, path)} {file.stat().st_size}\n" for file in files)
    rows = _load(kind, data_files=[str(file) for file in files], split="train", streaming=True)
    assert isinstance(rows, datasets.IterableDataset)
    return rows, hashlib.sha256(names.encode()).hexdigest()


def stream_text(
    source: str, tokenizer: Tokenizer, end_id: int, percent: float, held_out_tokens: int, process: int, processes: int
) -> TokenStreams:
    """What a process trains on, and the first held-out tokens, which are the same for all.

    Args:
        source: see :func:`open_shards`.
        tokenizer: the model's.
        end_id: id put behind every document.
        percent: share of the documents that is held out.
        held_out_tokens: at most so many are read; 0 for all.
        process: this one's number.
        processes: how many there are.

    Raises:
        TrainingError: there is no such text, or nothing of it is held out.
    """
    from datasets.distributed import split_dataset_by_node

    def encode_one(document: Document) -> Ids:
        return encode(document, tokenizer, end_id)[0]

    rows, sha256 = open_shards(source)
    found: Ids = []
    for ids in _held_out(rows, encode_one, percent):
        found += ids
        if len(found) >= held_out_tokens > 0:
            break
    if not found:
        raise TrainingError(f"nothing of '{source}' is held out: it needs more text, or another --held-out-percent")
    held_out = np.array(found[: held_out_tokens or None], dtype=np.uint32)
    record = StreamRecord(source, rows.num_shards, processes, len(held_out), percent, sha256)
    mine = split_dataset_by_node(open_shards(source)[0], process, processes)
    how = sha256_of_tokenizer(tokenizer, end_id)
    return TokenStreams(held_out[:0], held_out, record, how, TextStream(mine, encode_one, percent))


def _held_out(rows: IterableDataset, encode: Callable[[Document], Ids], percent: float) -> Iterator[Ids]:
    for document in map(document_of, rows):
        if (document.tokens or document.text.strip()) and is_held_out(document, percent):
            yield encode(document)


def _load(*what: str, **how: Any) -> IterableDataset:
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said below, once
    try:
        return datasets.load_dataset(*what, **how)
    except Exception as error:  # datasets hands on whatever its readers raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"'{how.get('data_files', what)[0]}' cannot be read: {said}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
