"""A text in which every token's colour says how it came: on the terminal, or as a page."""

from __future__ import annotations

import html
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import PromptError
from ..files import check_writable, write_whole
from ..lookup import Lookup
from ..origins import OWN, Origin, Span
from ..stream import TextStream
from .ending import say

PAGE = ".html"
_RESET = "\x1b[0m"
_DEEPEST = 3  # from there on drafts share a colour


@dataclass(frozen=True)
class Kind:
    """Tokens that look the same.

    Attributes:
        label: In the legend.
        mark: Where there are no colours; the depth is put into it.
        ground: Number of the background among a terminal's 256 colours, and as HTML writes it.
    """

    label: str
    mark: str = ""
    ground: tuple[int, str] | None = None


# The deeper a draft, the darker the green.
_OWN = Kind("the pass's own token")
_BY_DEPTH = (
    Kind("draft of depth 1", "1", (194, "#d7f5cf")),
    Kind("of depth 2", "2", (114, "#8fd68a")),
    Kind("of depth 3 and more", "{}", (35, "#45b06a")),
)
_LOOKUP = Kind("draft of lookup", "L{}", (153, "#b3d9ff"))
KINDS = (_OWN, *_BY_DEPTH, _LOOKUP)
"""In the order of the legend."""


def kind_of(origin: Origin) -> Kind:
    """Return how a token is shown."""
    if origin.depth == OWN.depth:
        return _OWN
    return _LOOKUP if origin.source == Lookup.name else _BY_DEPTH[min(origin.depth, _DEEPEST) - 1]


def counts(origins: Sequence[Origin]) -> Counter[Kind]:
    """Return tokens of every kind."""
    return Counter(map(kind_of, origins))


def visible(text: str) -> str:
    """Return a text without anything that moves a cursor or turns a line around: that is shown escaped."""
    return "".join(each if _is_harmless(each) else each.encode("unicode_escape").decode() for each in text)


def _is_harmless(character: str) -> bool:
    return character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs"


def coloured(span: Span) -> str:
    """Return a span in its colour, for terminals.

    It is coloured line by line, as a background would else run to the terminal's edge.
    """
    kind = kind_of(span.origin)
    text = visible(span.text)
    if kind.ground is None:
        return text
    start = f"\x1b[38;5;16;48;5;{kind.ground[0]}m"
    lines = text.replace("\n", "↵\n").split("\n")
    return "\n".join(f"{start}{line}{_RESET}" if line else "" for line in lines)


def bracketed(span: Span) -> str:
    """Return a span where there are no colours: drafts in brackets, with their depth."""
    kind = kind_of(span.origin)
    text = visible(span.text)
    return text if kind.ground is None else f"[{kind.mark.format(span.origin.depth)}|{text}]"


def may_colour(stream: object) -> bool:
    """Tell whether a stream is a terminal whose user wants colours (https://no-color.org)."""
    is_terminal = getattr(stream, "isatty", lambda: False)()
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def legend(origins: Sequence[Origin], *, colours: bool) -> str:
    """Return one line: what every look means, and how many tokens have it."""
    found, parts = counts(origins), []
    for kind, origin in zip(KINDS, (OWN, Origin(1), Origin(2), Origin(3), Origin(1, Lookup.name)), strict=True):
        look = coloured(Span(kind.label, origin)) if colours else kind.label
        if not colours and kind.ground is not None:
            look += f" [{kind.mark.format('N')}|…]"
        parts.append(f"{look} {found[kind]}")
    return "tokens: " + ", ".join(parts)


@dataclass
class View:
    """Where it is shown: on stdout as the text comes, or as a page of all texts there were.

    Attributes:
        page: The file, or None for stdout.
    """

    page: Path | None
    _sections: list[str] = field(default_factory=list)

    def pieces(self, stream: TextStream) -> Iterator[str]:
        """Yield what goes to stdout: beside a page the text as it is."""
        if self.page is not None:
            yield from stream
            return
        look = coloured if may_colour(sys.stdout) else bracketed
        shown = 0
        for _ in stream:
            yield "".join(map(look, stream.spans[shown:]))
            shown = len(stream.spans)

    def finish(self, prompt: str, stream: TextStream) -> None:
        """Say what the colours meant, or write the page.

        Raises:
            OutputError: The page cannot be written.
        """
        if self.page is None:
            colours = may_colour(sys.stdout) and may_colour(sys.stderr)
            say(legend(stream.origins, colours=colours), styled=colours)
            return
        self._sections.append(section(prompt, stream))
        write_whole(self.page, page_of(self._sections))


def view(argument: str | None) -> View | None:
    """Return what `--show-drafts` asks for.

    Raises:
        PromptError: Its value is no name of a page.
        OutputError: No file can be written there.
    """
    if not argument:
        return None if argument is None else View(None)
    if not argument.endswith(PAGE):
        raise PromptError(f"--show-drafts writes a page to a file whose name ends in {PAGE}, not to {argument}")
    check_writable(Path(argument))
    return View(Path(argument))


def given(arguments: Sequence[str]) -> list[str]:
    """Return a command line on which `--show-drafts` is not followed by something else than a page.

    That may be a prompt.
    """
    following = [*arguments, ""][1:]
    return [
        f"{argument}=" if argument == "--show-drafts" and not after.endswith(PAGE) else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


def section(prompt: str, stream: TextStream) -> str:
    """Return a prompt and what was written behind it, as HTML."""
    spans = "".join(map(_element, stream.spans))
    return (
        f'<pre><span class="prompt">{_escaped(prompt)}</span>{spans}</pre>\n'
        f"<p>{_html_legend(stream.origins)}</p>\n<p>{_escaped(stream.statistics.line())}</p>\n"
    )


def page_of(sections: Sequence[str]) -> str:
    """Return a page that needs nothing but itself."""
    colours = "\n".join(
        f".k{number} {{ background: {kind.ground[1]} }}" for number, kind in enumerate(KINDS) if kind.ground
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Where the tokens came from</title>
<style>
body {{ color: #111; background: #fff; font-family: sans-serif; margin: 2em }}
pre {{ font-family: monospace; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere }}
pre span, .legend span {{ border-radius: 3px; padding: 1px 0 }}
.prompt {{ color: #777 }}
{colours}
</style>
{"<hr>".join(sections)}</html>
"""


def _element(span: Span) -> str:
    kind, text = kind_of(span.origin), _escaped(span.text)
    if kind.ground is None:
        return text
    by = f" by {span.origin.source}" if span.origin.source else ""
    title = html.escape(f"draft of depth {span.origin.depth}{by}")
    return f'<span class="k{KINDS.index(kind)}" title="{title}">{text.replace(chr(10), "↵" + chr(10))}</span>'


def _html_legend(origins: Sequence[Origin]) -> str:
    found = counts(origins)
    parts = (f'<span class="k{number}">{kind.label}</span> {found[kind]}' for number, kind in enumerate(KINDS))
    return f'<span class="legend">tokens: {", ".join(parts)}</span>'


def _escaped(text: str) -> str:
    return html.escape(visible(text))
