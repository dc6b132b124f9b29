"""Earlier texts on the disk for the drafter `lookup`: cut into tokens and indexed once, and mapped into memory."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from pathlib import Path

import numpy as np

from .bundle import TOKENIZER, Bundle
from .cache import cache_folder
from .corpus import read_documents
from .errors import OutputError, PromptError
from .files import write_whole
from .providers import log
from .repeats import Occurrences

_FORMAT = 1
_BETWEEN = -1  # stands behind every text, and is no token
_MOST_TOKENS = 1 << 30


def load_earlier(path: str | Path, bundle: Bundle) -> Occurrences:
    """Return the texts of a file as a bundle's tokens, and where every pair and every four of them stands.

    That is kept in the cache folder, and made anew when the file or the bundle's tokenizer has changed. Where it cannot
    be kept it is made every time.

    Args:
        path: A text file, or one of JSON lines with a field "text".
        bundle: Whose tokens they are to be.

    Raises:
        PromptError: There is no such file, no text in it, or too much.
    """
    path = Path(path)
    if not path.is_file():
        raise PromptError(f"the draft corpus {path} is no file: a text file or a .jsonl file is wanted")
    digest = _digest(path, bundle)
    try:
        kept = cache_folder() / "earlier" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.npy"
        return _mapped(kept, digest, bundle.vocab_size)
    except (OSError, ValueError, EOFError):  # there is none, it is another one's, or it is damaged
        pass
    except RuntimeError:  # there is no home folder
        return _made(path, bundle)
    made = _made(path, bundle)
    columns = list(made.arrays())
    sizes = np.array([len(columns[0]), len(columns[1])], np.int32)
    content = io.BytesIO()
    np.save(content, np.concatenate([digest, sizes, *columns]))
    try:
        write_whole(kept, content.getvalue())
    except OutputError as error:
        log.warning("the index of %s cannot be kept: %s", path, error)
    return made


def _made(path: Path, bundle: Bundle) -> Occurrences:
    """Cut the texts into tokens, and find where each stands."""
    tokens: list[int] = []
    for document in read_documents(path):
        tokens += bundle.tokenizer.encode(document.text, add_special_tokens=False).ids
        tokens.append(_BETWEEN)
        if len(tokens) > _MOST_TOKENS:
            raise PromptError(f"the draft corpus {path} has more than {_MOST_TOKENS} tokens")
    return Occurrences(tokens)


def _digest(path: Path, bundle: Bundle) -> np.ndarray:
    """Of all that an index depends on, int32 [8]."""
    status, tokenizer = path.stat(), bundle.files.get(TOKENIZER)
    of_tokenizer = (
        tokenizer.sha256 if tokenizer else hashlib.sha256((bundle.folder / TOKENIZER).read_bytes()).hexdigest()
    )
    what = f"{_FORMAT} {status.st_size} {status.st_mtime_ns} {of_tokenizer}"
    return np.frombuffer(hashlib.sha256(what.encode()).digest(), np.int32)


def _mapped(kept: Path, digest: np.ndarray, vocab_size: int) -> Occurrences:
    """Return an index as it was kept.

    Raises:
        OSError: It cannot be read.
        ValueError: It is of something else, or not whole.
    """
    whole = np.load(kept, mmap_mode="r")
    if whole.dtype != np.int32 or whole.ndim != 1 or len(whole) < 10 or not np.array_equal(whole[:8], digest):
        raise ValueError("it is of something else")
    count, slots = (int(size) for size in whole[8:10])
    ends = np.cumsum([10, count, slots, count, slots, count])
    if min(count, slots) < 1 or slots & (slots - 1) or len(whole) != ends[-1]:
        raise ValueError("it is not whole")
    arrays = [whole[begin:end] for begin, end in itertools.pairwise(ends)]
    for each, least, end in zip(arrays, [_BETWEEN] * 5, [vocab_size, *[count] * 4], strict=True):
        if each.min() < least or each.max() >= end:
            raise ValueError("it is not whole")
    return Occurrences.of(arrays)
