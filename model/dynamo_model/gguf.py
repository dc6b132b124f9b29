"""GGUF files: what transformers makes of them, and what it leaves out."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from .errors import CheckpointError, first_line

log = logging.getLogger("dynamo_model")

MAGIC = b"GGUF"

# How text was split when a byte-level vocabulary's merges were learned, by the file's `tokenizer.ggml.pre`: for these
# every digit stands apart. transformers does not know of it, so that "\n\n1" became other tokens than in training.
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
GPT2 = {"gpt-2", "phi-2", "olmo", "mpt", "jais", "gpt-neox"}


def check_gguf(path: Path) -> None:
    """Refuse early what is no GGUF file, or cannot be read for want of a package.

    Raises:
        CheckpointError: One of these.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(f"reading {path.name} needs {package}: pip install {package}")


@contextmanager
def bar_on_terminals_alone() -> Iterator[None]:
    """Keep the progress bar of transformers' reader out of logs and pipes."""
    from transformers import modeling_gguf_pytorch_utils as reader

    own = reader.tqdm
    reader.tqdm = partial(own, disable=None)
    try:
        yield
    finally:
        reader.tqdm = own


def restore_splitting(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer made from a GGUF file the splitting of text that the file names.

    Args:
        tokenizer: transformers', changed in place.
        path: Of the file.

    Raises:
        CheckpointError: The file cannot be read.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        metadata, _ = read_gguf_metadata(str(path), ())
    except Exception as error:  # the reader trusts the file
        raise CheckpointError(f"{path} is not a readable GGUF file: {first_line(error)}") from error
    splitting = metadata.get("tokenizer.ggml.pre", "default")
    known = splitting in GGUF_PRE_TOKENIZER_SPLITS or splitting in GPT2
    if metadata.get("tokenizer.ggml.model") != "gpt2" or known:
        return
    if splitting in DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, as_bytes])
        return
    log.warning(
        "%s splits text as %r, which is not known here: as GPT-2 does, then; tokens may differ from the model's own",
        path.name,
        splitting,
    )
