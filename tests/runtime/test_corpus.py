"""Where text comes from: folders, files, rows, and the standard library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from dynamo_runtime.corpus import Document, is_held_out, python_modules, read_documents, standard_library
from dynamo_runtime.errors import PromptError


def test_rows(tmp_path: Path) -> None:
    """Each row's field `text`, as a group of its own."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("größer", " \n", "x\ny")))
    assert list(read_documents(path)) == [
        Document("rows.jsonl:0", "rows.jsonl:0", "größer"),
        Document("rows.jsonl:2", "rows.jsonl:2", "x\ny"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", "is not a JSON object"),
        (b"[]", "is not a JSON object"),
        (b"[" * 100_000, "is not a JSON object"),
        (b'{"content": "x"}', "has no text in a field named 'text'"),
        (b'{"text": 3}', "has no text in a field named 'text'"),
        (b'{"text": "\xff"}', "is not text in UTF-8"),
        (b'{"text": "\\ud800"}', "is not valid UTF-8"),
    ],
)
def test_bad_rows(row: bytes, message: str, tmp_path: Path) -> None:
    """A row without text is named by its line."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + row)
    with pytest.raises(PromptError, match=rf"line 3 of '.*rows\.jsonl' {message}"):
        list(read_documents(path))


def test_rows_end_where_lines_end(tmp_path: Path) -> None:
    """A text may hold other separators of lines, and a file begin with a byte-order mark."""
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n')
    assert [document.text for document in read_documents(tmp_path / "rows.jsonl")] == ["a\u2028b"]


def test_folder(tmp_path: Path) -> None:
    """Text files in order of their paths, grouped by what lies directly in the folder; other files do not count."""
    for name, text in {"b.py": "b = 1", "a/z.md": "zed", "a/deep/y.txt": "why", "c.bin": "no", "empty.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(read_documents(tmp_path)) == [
        Document("a", "a/deep/y.txt", "why"),
        Document("a", "a/z.md", "zed"),
        Document("b", "b.py", "b = 1"),
    ]


def test_file(tmp_path: Path) -> None:
    """One file of whatever suffix is one text, if it is one."""
    (tmp_path / "notes").write_text("naïve", encoding="utf-8")
    assert list(read_documents(tmp_path / "notes")) == [Document("notes", "notes", "naïve")]
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="is not text in UTF-8"):
        list(read_documents(tmp_path / "bytes"))


def test_no_text(tmp_path: Path) -> None:
    """Nothing there, and nothing in it, are errors."""
    with pytest.raises(PromptError, match=r"give a folder, a text file or a \.jsonl file"):
        list(read_documents(tmp_path / "absent"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "none.jsonl").write_text("")
    for name in ("", "blank.txt", "none.jsonl"):
        with pytest.raises(PromptError, match="holds no text"):
            list(read_documents(tmp_path / name))


def test_what_is_held_out() -> None:
    """The share of the hash of the group's name decides."""
    for name in ("ast", "json", "typing", "abc"):
        share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
        for percent in (0.0, 100 * share - 1e-6, 100 * share + 1e-6, 100.0):
            assert is_held_out(Document(name, "x", "y"), percent) == (share < percent / 100)


def test_parts_of_the_standard_library(tmp_path: Path) -> None:
    """Held out or not is all there is, and no top-level module is in both; what does not parse is left out."""
    for i in range(60):
        (tmp_path / f"m{i}").mkdir()
        (tmp_path / f"m{i}" / "__init__.py").write_text(f"x = {i}")
    (tmp_path / "m1" / "old.py").write_text("print 1")
    (tmp_path / "m1" / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'ä'\n".encode("latin-1"))
    (tmp_path / "m1" / "tests").mkdir()
    (tmp_path / "m1" / "tests" / "test_x.py").write_text("x = 1")
    every, held, others = (list(python_modules(tmp_path, held_out=which)) for which in (None, True, False))
    assert {d.name for d in every} == {*(f"m{i}.__init__" for i in range(60)), "m1.latin"}
    assert [d.text for d in every if d.name == "m1.latin"] == ["# -*- coding: latin-1 -*-\nx = 'ä'\n"]
    assert {d.name for d in held} | {d.name for d in others} == {d.name for d in every}
    assert not {d.group for d in held} & {d.group for d in others}
    assert held and all(is_held_out(d) for d in held) and not any(is_held_out(d) for d in others)


def test_the_standard_library_has_both_parts() -> None:
    """The first modules of either part, of the running interpreter."""
    for which in (True, False):
        document = next(standard_library(which))
        assert is_held_out(document) == which and document.text.strip()
