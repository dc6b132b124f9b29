"""Text that is tokenized and packed while it is trained on, for corpora that no disk holds.

Every process reads documents of its own: whole shards if their number divides by that of the processes, else every n-th
document.  Shards come in a random order, another one in every epoch, and documents are shuffled within blocks of as
many as memory may hold.  They are put end to end, each with the token that ends a text, and cut into sequences.

A block is a function of where it begins, and so a run goes on exactly where it was, at the price of reading a block
once more.  The shuffle buffer of `datasets` mixes farther, but its state leaves out what is in the buffer: a run that
goes on from it sees other documents.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
class Order:
    """In which order documents come.

    Attributes:
        block: Documents that are shuffled among themselves, and are in memory together; 1 leaves all as it is stored.
        seed: Of the orders of shards and documents.
    """

    block: int = 1
    seed: int = 0


STORED = Order()
"""As it is stored, in every epoch."""


class HeldOut(NamedTuple):
    """What is never trained on.

    Attributes:
        percent: Share of the documents, by the hash of their text.
        tokens: At most so many of them are read; 0 for all.
    """

    percent: float
    tokens: int = 0


class Share(NamedTuple):
    """Which part of a text is one process' own: its number, and how many processes there are."""

    process: int
    processes: int


@dataclass(frozen=True)
class StreamRecord:
    """What is known of a text that nobody has read to its end.

    Attributes:
        source: Folder, file or Hub id.
        shards: How many files there are.
        processes: Among which they are divided; as many have to go on with a run.
        held_out_tokens: That were read for validations.
        held_out_percent: Share of the documents that are never trained on, by the hash of their text.
        sha256: Of the names and sizes of the files, or of the dataset's own fingerprint.
        block: Documents that are shuffled among themselves.
    """

    source: str
    shards: int
    processes: int
    held_out_tokens: int
    held_out_percent: float
    sha256: str
    block: int


class TextStream:
    """The part of a text that one process trains on, without end: behind its last document the first one follows.

    Args:
        dataset: With a column `text`; the process' own part.
        encode: Token ids of a document, with the token that ends it.
        percent: Share of the documents that is left out, see `StreamRecord`.
        order: In which they come.
    """

    def __init__(
        self, dataset: IterableDataset, encode: Callable[[Document], Ids], percent: float, order: Order = STORED
    ) -> None:
        self._unread, self._encode, self._percent, self._order = dataset, encode, percent, order
        self._pieces: deque[tuple[dict[str, Any], Ids]] = deque()  # documents, each with where it stands
        self._used = 0  # tokens of the first of them that are behind
        self._begin(0)

    def take(self, rows: int, length: int, extra: int) -> NDArray[np.int64]:
        """Return the next sequences.

        Args:
            rows: How many.
            length: Positions of each.
            extra: Tokens behind the last position, which the next sequence begins with.

        Returns:
            Token ids [rows, length + extra].

        Raises:
            TrainingError: There is no text to train on.
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
        """Return where `take` goes on, as JSON."""
        return json.dumps({"place": self._pieces[0][0] if self._pieces else self._place(), "used": self._used})

    def go_on(self, position: str) -> None:
        """Go on at a `position` of the same text.

        Raises:
            TrainingError: It is none.
        """
        try:
            found = json.loads(position)
            place = found["place"]
            self._begin(place["epoch"], place["block"], place["rows"])
            self._pieces.clear()
            self._given, self._used = place["given"], found["used"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(
                "the checkpoint does not say where its text goes on: remove it to start over"
            ) from error

    def _begin(self, epoch: int, block: int = 0, rows: dict[str, Any] | None = None) -> None:
        """Stand before a block that begins at some rows, None being the first of an epoch."""
        self._epoch, self._block, self._start, self._empty = epoch, block, rows, rows is None
        self._documents: deque[Document] = deque()  # of the block before, what is left
        self._given = 0  # documents of the block that are behind
        self._dataset = copy.deepcopy(self._unread)  # one that went on somewhere does so in every epoch
        self._dataset.set_epoch(self._order_of_shards(epoch))
        if rows is not None:
            self._dataset.load_state_dict(rows)
        self._rows = iter(self._dataset)

    def _order_of_shards(self, epoch: int) -> int:
        """Return a number by which `datasets` orders shards, the same for all processes.

        0 leaves them as they are.
        """
        if self._order.block == 1:
            return 0
        return int(np.random.default_rng([self._order.seed, epoch]).integers(1, 1 << 31))

    def _place(self) -> dict[str, Any]:
        """Of the next document."""
        return {"epoch": self._epoch, "block": self._block, "rows": self._start, "given": self._given}

    def _next(self) -> tuple[dict[str, Any], Ids]:
        while not self._documents:
            if not self._read_block():
                if self._empty:
                    raise TrainingError("there is no text to train on: more documents, or fewer processes, are needed")
                self._begin(self._epoch + 1)
        place = self._place()
        document = self._documents.popleft()
        self._given += 1
        if not self._documents:
            self._block, self._given, self._start = self._block + 1, 0, self._dataset.state_dict()
        return place, self._encode(document)

    def _read_block(self) -> bool:
        """Put the block that comes next in order, without those of its documents that are behind; False at the end."""
        kept = (each for each in map(document_of, self._rows) if _is_trained_on(each, self._percent))
        block = list(islice(kept, self._order.block))
        if block and self._order.block > 1:
            numbers = np.random.default_rng([self._order.seed, self._epoch, self._block]).permutation(len(block))
            block = [block[number] for number in numbers]
        self._documents.extend(block[self._given :])
        self._empty = self._empty and not block
        return bool(block)


def _is_trained_on(document: Document, percent: float) -> bool:
    return bool(document.tokens or document.text.strip()) and not is_held_out(document, percent)


def document_of(row: dict[str, Any]) -> Document:
    """Return a row of a dataset; its text is its group as well, so that the same text is held out wherever it stands.

    Raises:
        TrainingError: It has no text.
    """
    text = row.get("text")
    if not isinstance(text, str):
        raise TrainingError("a row of the text has no string in a column named 'text'")
    return Document(text, "", text, token_ids(row.get("tokens")))


def open_shards(source: str) -> tuple[IterableDataset, str]:
    """Return the rows of a folder of `.parquet` or `.jsonl` files, of one such file, or of a dataset on the Hub.

    Returns:
        The rows, none of them read, and a SHA-256 that tells them from others.

    Raises:
        TrainingError: There are none.
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
    source: str,
    tokenizer: Tokenizer,
    end_id: int,
    held_out: HeldOut,
    share: Share,
    order: Order = STORED,
) -> TokenStreams:
    """Return what a process trains on, and the first held-out tokens, which are the same for all.

    Args:
        source: See `open_shards`.
        tokenizer: The model's.
        end_id: Id put behind every document.
        held_out: What is held out of it.
        share: Which part is this process' own.
        order: In which documents are trained on.

    Raises:
        TrainingError: There is no such text, or nothing of it is held out.
    """
    from datasets.distributed import split_dataset_by_node

    def encode_one(document: Document) -> Ids:
        return encode(document, tokenizer, end_id)[0]

    rows, sha256 = open_shards(source)
    found: Ids = []
    for ids in _held_out(rows, encode_one, held_out.percent):
        found += ids
        if len(found) >= held_out.tokens > 0:
            break
    if not found:
        raise TrainingError(f"nothing of '{source}' is held out: it needs more text, or another --held-out-percent")
    tokens = np.array(found[: held_out.tokens or None], dtype=np.uint32)
    record = StreamRecord(source, rows.num_shards, share.processes, len(tokens), held_out.percent, sha256, order.block)
    mine = split_dataset_by_node(open_shards(source)[0], share.process, share.processes)
    how = sha256_of_tokenizer(tokenizer, end_id)
    return TokenStreams(tokens[:0], tokens, record, how, TextStream(mine, encode_one, held_out.percent, order))


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
