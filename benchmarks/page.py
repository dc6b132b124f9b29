"""What pages that scripts write have in common: prose in readable lines, and a check that they are up to date."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from dynamo_runtime.files import write_whole

WIDTH = 120


def wrapped(page: str) -> str:
    """Return a page whose paragraphs stand on one line each, in lines of `WIDTH`; rows and headings stay one."""
    return "".join(f"{_wrapped(line)}\n" for line in page.splitlines())


def put_between(page: str, mark: str, made: str) -> str:
    """Return a page with other lines between `<!-- mark -->` and the next `<!-- end -->`.

    Raises:
        SystemExit: It has no place for them.
    """
    before, begin, rest = page.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    if not begin or not end:
        sys.exit(f"the page has no lines <!-- {mark} --> and <!-- end --> to put the tables between")
    return f"{before}{begin}{made.strip()}\n{end}{after}"


def write_or_check(path: Path, page: str, *, check: bool) -> int:
    """Write a page, or with `check` see that it is what would be written; returns the exit status."""
    if not check:
        write_whole(path, page)
    elif not path.is_file() or path.read_text(encoding="utf-8") != page:
        print(f"{path} is out of date: run python benchmarks/{Path(sys.argv[0]).name}", file=sys.stderr)
        return 1
    return 0


def _wrapped(line: str) -> str:
    if line.startswith(("|", "#")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
