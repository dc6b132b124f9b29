"""Text to calibrate with and text to measure on, as tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dynamo_runtime.bundle import Bundle
from dynamo_runtime.corpus import read_documents, standard_library

from .errors import QuantizeError

OWN = "the standard library of Python"
ENOUGH = 8  # times the pieces wanted: more text is not looked at


def pieces(bundle: Bundle, source: str | Path | None, count: int, length: int, held_out: bool) -> list[list[int]]:
    """Cut a corpus into pieces and take some, spread evenly.

    Args:
        bundle: For its tokenizer.
        source: A folder of text files, a text file or a .jsonl file; None for Python's standard library.
        count: Most pieces.
        length: Tokens a piece has.
        held_out: Of the standard library, whether to take the modules that training holds out or the others.

    Raises:
        QuantizeError: There is not a single piece of that length.
        DynamoError: The text cannot be read, or the bundle has no tokenizer.
    """
    documents = standard_library(held_out) if source is None else read_documents(source)
    found: list[list[int]] = []
    for document in documents:
        if len(found) >= ENOUGH * count:
            break
        tokens = bundle.tokenizer.encode(document.text).ids
        found += [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
    if not found:
        raise QuantizeError(f"{source or OWN} has no text of {length} tokens")
    chosen = np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))
    return [found[i] for i in chosen]
