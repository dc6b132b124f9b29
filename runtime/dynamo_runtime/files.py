"""Files of results, which are written whole or not at all, and small files of JSON, which may come from anywhere."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from .errors import OutputError

# What a bundle knows of text besides its tokenizer, as Hugging Face names it.
TEMPLATE, CONFIG, SPECIAL_TOKENS = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"


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


def read_small(path: Path, most_bytes: int) -> str:
    """The text of a file that has no reason to be big.

    Raises:
        OSError: It cannot be read.
        ValueError: It is bigger, or not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes, which such a file never has")
    return content.decode("utf-8")


def read_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds none.
    """
    try:
        content = json.loads(read_small(path, most_bytes))
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def file_name(text: str) -> str:
    """A text as part of a file's name, wherever it comes from: it names no other folder."""
    return re.sub(r"[^A-Za-z0-9._-]|^\.", "_", text)[:100]


def lies_in(folder: Path, name: str) -> bool:
    """Whether a name, wherever it comes from, is that of a file in a folder itself, and of no link out of it."""
    path = folder / name
    return Path(name).name == name and os.path.isfile(path) and path.resolve().parent == folder.resolve()
