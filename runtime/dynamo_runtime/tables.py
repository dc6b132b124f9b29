"""Tables as text and Markdown, and numbers as people read them."""

from __future__ import annotations

import itertools
import math
import textwrap
from dataclasses import dataclass
from typing import Any

from .errors import printable
from .interval import Interval

MISSING = "–"
WIDTH = 100  # characters of a terminal
NAME_WIDTH = 36  # longer names of rows are broken into lines


@dataclass(frozen=True)
class Table:
    """Rows of text under a title.

    Attributes:
        title: What it shows, and in what units.
        columns: Heads of the columns; empty where rows are names and their values.
        rows: Cells, the first of which names the row. A row of one cell is a heading for those below it.
        cell_width: Characters of the widest cell in a terminal; longer ones are broken into lines.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    cell_width: int = 24

    def text(self) -> str:
        """Return aligned columns; those that do not fit beside the others follow below, with the rows' names again."""
        rows = [self.columns, *self.rows] if self.columns else self.rows
        limit = self.cell_width if self.columns else WIDTH - NAME_WIDTH
        grid = [[_wrap(cell, limit if column else NAME_WIDTH) for column, cell in enumerate(row)] for row in rows]
        columns = zip(*(row for row in grid if len(row) > 1), strict=True)
        widths = [max(len(line) for cell in column for line in cell) for column in columns]
        lines = [printable(self.title)]
        for number, block in enumerate(_blocks(widths)):
            lines += [""] * bool(number)
            for row in grid:
                if len(row) == 1:
                    lines += ["", "  " + " ".join(row[0])]
                else:
                    cells = [(row[column], widths[column]) for column in block]
                    lines += _aligned(cells, right=bool(self.columns))
        return "\n".join(lines)

    def markdown(self) -> str:
        """Return the same as Markdown, with a bold title; names and values become one line."""
        title = f"**{in_markdown(self.title)}**"
        if not self.columns:
            return f"{title}: " + "; ".join(in_markdown(": ".join(row)) for row in self.rows)
        count = len(self.columns)
        rows = [row if len(row) > 1 else [f"**{row[0]}**", *[""] * (count - 1)] for row in self.rows]
        lines = ["| " + " | ".join(map(in_markdown, row)) + " |" for row in [self.columns, *rows]]
        return "\n".join([title, "", lines[0], "|---" * count + "|", *lines[1:]])


def _aligned(cells: list[tuple[list[str], int]], right: bool) -> list[str]:
    """Return the lines of one row from every cell's lines and width, all cells but the first to the right."""
    columns, widths = zip(*cells, strict=True)
    lines = []
    for first, *others in itertools.zip_longest(*columns, fillvalue=""):
        padded = [cell.rjust(width) if right else cell for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  " + "  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return lines


def _blocks(widths: list[int]) -> list[list[int]]:
    """Return columns that fit beside each other, each time behind the first."""
    blocks, free = [[0]], WIDTH - 2 - widths[0]
    for column, width in enumerate(widths[1:], start=1):
        if width + 2 > free and len(blocks[-1]) > 1:
            blocks.append([0])
            free = WIDTH - 2 - widths[0]
        blocks[-1].append(column)
        free -= width + 2
    return blocks


def _wrap(cell: str, width: int) -> list[str]:
    return textwrap.wrap(printable(cell), width) or [""]


def in_markdown(cell: str) -> str:
    """Return text that Markdown takes for nothing else: no tags, no links, no cells of a table."""
    cell = printable(cell).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return cell.replace("|", "\\|").replace("`", "\\`").replace("](", "]\\(")


def in_spreadsheet(cell: Any) -> Any:
    """Return a cell of a CSV file that no spreadsheet takes for a formula; numbers stay numbers."""
    if not isinstance(cell, str):
        return cell
    cell = printable(cell)
    return f"'{cell}" if cell.lstrip().startswith(("=", "+", "-", "@")) else cell


def number(value: float | None) -> str:
    """Show about three figures, never an exponent; `MISSING` for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    digits = 0 if value == 0 else 3 if abs(value) < 0.1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}"


def ratio(value: float | None, reference: float | None) -> str:
    """Return the quotient with two decimals, or `MISSING` where there is none."""
    return f"{value / reference:.2f}" if value is not None and reference else MISSING


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{share * 100:.1f} %" if share < 0.1 else f"{share * 100:.0f} %"


def interval(estimate: Interval) -> str:
    """Return an estimate and its interval, with two decimals."""
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def binary_size(count: int) -> str:
    """Return bytes of hardware, in units of two; nothing for none."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):,.4g} {unit}"
    return f"{count / 1024:,.4g} KiB" if count else ""
