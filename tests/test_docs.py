"""Links of the pages lead somewhere, the index has every page, lines are short, and what is said is so."""

from __future__ import annotations

import re
from pathlib import Path

import picture
import pytest
import readme

from dynamo_evaluate import results
from dynamo_runtime import manifest
from dynamo_runtime.device import profile

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:benchmarks|docs|evaluate|examples|export|graph|model|quantize|runtime|tests|train)/[\w/.]*)`")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
WIDTH = 120


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("http:", "https:")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_that_are_named_exist(page: Path) -> None:
    for path in PATH.findall(prose(page)):
        assert (ROOT / path).exists(), path


def test_index_has_every_page() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(prose(DOCS / "README.md"))}
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_lines_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    tables = () if page == ROOT / "README.md" else ("|",)  # a row of a table is one line
    assert not [line for line in lines if len(line) > WIDTH and not line.startswith(tables)]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_readme_shows_what_was_measured() -> None:
    assert readme.main(["--check"]) == 0


def test_the_picture_shows_what_was_decoded() -> None:
    assert picture.drawn(picture.load_results()) == picture.PICTURE.read_text(encoding="utf-8")


def test_the_changelog_knows_what_is_written() -> None:
    rows = [line.split("|") for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()]
    written = [int(row[2]) for row in rows if len(row) == 6 and row[2].strip().isdigit()]
    assert written == [manifest.FORMAT_VERSION, profile.SCHEMA_VERSION, results.VERSION]
