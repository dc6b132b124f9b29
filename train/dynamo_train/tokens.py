"""From documents to one long stream of token ids on disk, and from there to training batches."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dynamo_runtime.corpus import Document, is_held_out
from dynamo_runtime.files import WholeFolder
from dynamo_runtime.version import __version__

from .corpus import read_corpus
from .errors import TrainingError

if TYPE_CHECKING:
    from .stream import StreamRecord, TextStream

END_OF_TEXT = "<|endoftext|>"
RECORD = "tokens.json"
logger = logging.getLogger(__name__)


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer (as GPT-NeoX's) whose token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


@dataclass(frozen=True)
class CorpusRecord:
    """What a token stream was made from; stands in model cards and guards a resumed run."""

    source: str
    documents: int
    held_out_documents: int
    characters: int
    train_tokens: int
    held_out_tokens: int
    held_out_percent: float
    sha256: str


@dataclass(frozen=True)
class TokenStreams:
    """Training and held-out tokens of a corpus, memory-mapped; documents end with the end-of-text token.

    Attributes:
        train: Token ids [tokens]; none of a text that is streamed.
        held_out: Token ids [tokens].
        record: What they were made from.
        tokenizer: sha256 of what made them.
        text: What is trained on instead, if it is streamed.
    """

    train: NDArray[np.unsignedinteger]
    held_out: NDArray[np.unsignedinteger]
    record: CorpusRecord | StreamRecord
    tokenizer: str = ""
    text: TextStream | None = None


def sha256_of(source: str) -> str:
    """Of a corpus' content, wherever it lies."""
    digest = hashlib.sha256()
    for document in read_corpus(source):
        digest.update(_bytes(document))
    return digest.hexdigest()


def sha256_of_tokenizer(tokenizer: Tokenizer, end_id: int) -> str:
    """Of all that decides how a text is tokenized."""
    return hashlib.sha256(f"{end_id} {tokenizer.to_str()}".encode()).hexdigest()


def tokenize_corpus(source: str, tokenizer: Tokenizer, end_id: int, percent: float, folder: Path) -> TokenStreams:
    """Tokenise a corpus into `folder`, or map what an earlier run made there of the same text in the same way.

    Documents that have tokens of this tokenizer keep them: what a model wrote is not always cut as its text would be.

    Args:
        source: See `dynamo_train.corpus.read_corpus`.
        tokenizer: The model's tokenizer; special tokens that it would add are left out.
        end_id: Id put behind every document.
        percent: Share of the groups that is held out.
        folder: Where the two token files and their record lie; it is replaced as a whole.

    Raises:
        TrainingError: There is no such text or too little of it, or it changed while it was read.
        OutputError: The folder cannot be written, or another process writes it.
    """
    content = sha256_of(source)
    how = sha256_of_tokenizer(tokenizer, end_id)
    stamp = hashlib.sha256(f"{content} {how} {percent} {__version__}".encode()).hexdigest()
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)
    if _record(folder, stamp, dtype) is None:
        with WholeFolder(folder) as place:
            new = place.new()
            made = _tokenize(source, tokenizer, end_id, percent, dtype, new)
            if made.sha256 != content:
                raise TrainingError(f"'{source}' changed while it was read: start again")
            (new / RECORD).write_text(json.dumps({"stamp": stamp, "record": asdict(made)}, indent=1))
            place.put(new)
    record = _record(folder, stamp, dtype)
    if record is None:
        raise TrainingError(f"{folder} does not hold what was just written there: is another process at work in it?")
    if not record.train_tokens or not record.held_out_tokens:
        raise TrainingError(
            f"'{source}' leaves {record.train_tokens} training and {record.held_out_tokens} held-out tokens: "
            "more files, or another --held-out-percent, are needed"
        )
    train, held_out = (np.memmap(path, dtype=dtype, mode="r") for path in _paths(folder).values())
    return TokenStreams(train, held_out, replace(record, source=source), how)


def _paths(folder: Path) -> dict[bool, Path]:
    return {held: folder / f"tokens-{'held-out' if held else 'train'}.bin" for held in (False, True)}


def _record(folder: Path, stamp: str, dtype: np.dtype) -> CorpusRecord | None:
    """Of the tokens in a folder; None if they are others, or not whole."""
    try:
        found = json.loads((folder / RECORD).read_text())
        record = CorpusRecord(**found["record"])
        sizes = [path.stat().st_size // dtype.itemsize for path in _paths(folder).values()]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if found["stamp"] == stamp and sizes == [record.train_tokens, record.held_out_tokens] else None


def _bytes(document: Document) -> bytes:
    tokens = b"" if document.tokens is None else np.array(document.tokens, np.int64).tobytes()
    return f"{document.name}\0{document.text}\0".encode() + tokens


def own_tokens(document: Document, tokenizer: Tokenizer) -> list[int] | None:
    """Return the tokens that a document came with, if they are a tokenizer's: it decodes them to the document's text.

    Of a document that is tokens alone nothing else can be known than that the tokenizer has such tokens.

    Raises:
        TrainingError: It has not, and there is no text to encode instead.
    """
    tokens = document.tokens
    known = tokens is not None and min(tokens) >= 0 and max(tokens) < tokenizer.get_vocab_size()
    if tokens and not document.text and not known:
        raise TrainingError(f"'{document.name}' is tokens of another tokenizer, and has no text to encode instead")
    if tokens is None or not known:
        return None
    found = list(tokens)
    same = not document.text or tokenizer.decode(found, skip_special_tokens=False) == document.text
    return found if same else None


def encode(document: Document, tokenizer: Tokenizer, end_id: int) -> tuple[list[int], bool]:
    """Return the tokens of a document with the one that ends it, and whether they are those that it came with."""
    own = own_tokens(document, tokenizer)
    ids = own if own is not None else tokenizer.encode(document.text, add_special_tokens=False).ids
    if document.tokens is None or ids[-1:] != [end_id]:  # a model may have ended its text itself
        ids = [*ids, end_id]
    return ids, own is not None


def _tokenize(
    source: str, tokenizer: Tokenizer, end_id: int, percent: float, dtype: np.dtype, folder: Path
) -> CorpusRecord:
    digest = hashlib.sha256()
    documents, tokens, characters, foreign = {False: 0, True: 0}, {False: 0, True: 0}, 0, 0
    files = {held: path.open("wb") for held, path in _paths(folder).items()}
    try:
        for document in read_corpus(source):
            held = is_held_out(document, percent)
            ids, own = encode(document, tokenizer, end_id)
            foreign += document.tokens is not None and not own
            np.asarray(ids, dtype=dtype).tofile(files[held])
            documents[held] += 1
            tokens[held] += len(ids)
            characters += len(document.text)
            digest.update(_bytes(document))
    finally:
        for file in files.values():
            file.close()
    if foreign:
        logger.warning("'%s': %d texts came with tokens of another tokenizer, and were encoded anew", source, foreign)
    return CorpusRecord(
        source=source,
        documents=documents[False] + documents[True],
        held_out_documents=documents[True],
        characters=characters,
        train_tokens=tokens[False],
        held_out_tokens=tokens[True],
        held_out_percent=percent,
        sha256=digest.hexdigest(),
    )


def batch(
    stream: NDArray[np.unsignedinteger], step: int, *, sequences: int, length: int, extra: int, seed: int
) -> NDArray[np.int64]:
    """Return the batch of one training step: a function of the step alone, so that a resumed run sees the same.

    Every epoch cuts the stream at another random offset and shuffles the blocks.

    Args:
        stream: Token ids [tokens].
        step: Number of the step, from 0.
        sequences: Sequences in a batch.
        length: Positions in a sequence.
        extra: Tokens behind the last position, so that every head has a label everywhere.
        seed: Of the offsets and orders.

    Returns:
        Token ids [sequences, length + extra].

    Raises:
        TrainingError: The stream is shorter than one block.
    """
    # The random cut may cost up to one block, so that every epoch has the same number of them.
    blocks = (len(stream) - extra) // length - 1
    if blocks < 1:
        raise TrainingError(f"{len(stream)} training tokens are too few for sequences of {length}")
    starts = _starts(blocks, step, sequences, length, seed)
    return np.stack([stream[start : start + length + extra] for start in starts]).astype(np.int64)


def window_numbers(windows: int, step: int, sequences: int, seed: int) -> NDArray[np.int64]:
    """Return the windows of one training step [sequences], where a text is cut into the same ones in every epoch."""
    return np.array(_starts(windows, step, sequences, 1, seed), dtype=np.int64)


def validation_batches(
    stream: NDArray[np.unsignedinteger], *, sequences: int, length: int, extra: int
) -> list[NDArray[np.int64]]:
    """Cut a stream into batches [<= sequences, length + extra], once through, in order."""
    length = min(length, len(stream) - extra)
    if length < 1:
        raise TrainingError("too few held-out tokens to validate on")
    starts = range(0, len(stream) - length - extra + 1, length)
    blocks = np.stack([stream[s : s + length + extra] for s in starts]).astype(np.int64)
    return [blocks[i : i + sequences] for i in range(0, len(blocks), sequences)]


def _starts(blocks: int, step: int, sequences: int, length: int, seed: int) -> list[int]:
    """Return where the blocks of one training step start."""
    starts = []
    for i in range(step * sequences, (step + 1) * sequences):
        epoch, index = divmod(i, blocks)
        offset, order = _epoch(epoch, blocks, length, seed)
        starts.append(offset + int(order[index]) * length)
    return starts


@lru_cache(maxsize=2)
def _epoch(epoch: int, blocks: int, length: int, seed: int) -> tuple[int, NDArray[np.int64]]:
    rng = np.random.default_rng([seed, epoch])
    return int(rng.integers(length)), rng.permutation(blocks)
