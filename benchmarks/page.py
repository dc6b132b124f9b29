"""What pages that scripts write have in common: prose in lines that can be read."""

from __future__ import annotations

import textwrap

WIDTH = 120


def wrapped(page: str) -> str:
    """Return a page whose paragraphs stand on one line each, in lines of `WIDTH`; rows and headings stay one."""
    return "".join(f"{_wrapped(line)}\n" for line in page.splitlines())


def _wrapped(line: str) -> str:
    if line.startswith(("|", "#")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
