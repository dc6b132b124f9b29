"""What a figure of a profile is: a row for a spreadsheet, a cell of a table, and a line beside other profiles'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..device.profile import Profile
from ..tables import MISSING, Table, number, ratio

CsvRow = tuple[str, str, str, str, Any]
"""Section, name, variant, unit and value, for a spreadsheet."""
Line = tuple[Any, str, str, float]
"""What lines are sorted by, heading, label and value, of one profile beside others."""


@dataclass(frozen=True)
class Fact:
    """What a profile has one of.

    Attributes:
        table: Title of the table that it is a line of.
        label: Of that line.
        get: The value of a profile; where there are several, a list, or by their variants. None or "" if not known.
        show: The value as people read it, "" if not known; None for the value itself.
        row: Section, name, variant and unit for a spreadsheet; None for no row.
        measured: Of a figure that machines differ in, which is then compared by its ratio: what to divide the value by
            to have it in the label's unit. Zero was not measured.
        shown: Whether it is a line of the table.
        compared: Whether it is one side by side.
        place: Among the lines of the table, where that is not the order of the list.
    """

    table: str
    label: str
    get: Callable[[Profile], Any]
    show: Callable[[Profile], str] | None = None
    row: tuple[str, str, str, str] | None = None
    measured: float | None = None
    shown: bool = True
    compared: bool = False
    place: int = 0

    def value(self, profile: Profile) -> float | None:
        """Return what was measured, in the label's unit."""
        value = self.get(profile)
        return value / self.measured if value and self.measured else None

    def text(self, profile: Profile) -> str:
        """As people read it."""
        if self.show:
            return self.show(profile)
        if self.measured is None:
            return str(self.get(profile))
        value = self.value(profile)
        return "" if value is None else number(value)

    def rows(self, profile: Profile) -> list[CsvRow]:
        """For a spreadsheet."""
        return [] if self.row is None else _rows(self.row, self.get(profile))


@dataclass(frozen=True)
class Figure:
    """What every item of a series has.

    Attributes:
        get: The value of an item; where there are several, by their variants. None if not known.
        section: For a spreadsheet, or what tells it of an item; "" for no row.
        variant: See there.
        unit: See there.
        table: Title of the listing that it is a column of; "" for none.
        column: Heading of that column.
        show: An item's cell there; None for the value as a number.
        compared: Heading side by side, or what tells it of an item; "" if it is not compared.
    """

    get: Callable[[Any], Any]
    section: str | Callable[[Any], str] = ""
    variant: str = ""
    unit: str = ""
    table: str = ""
    column: str = ""
    show: Callable[[Any], str] | None = None
    compared: str | Callable[[Any], str] = ""

    def text(self, item: Any) -> str:
        """As people read it."""
        return self.show(item) if self.show else number(self.get(item))

    def rows(self, item: Any, name: str) -> list[CsvRow]:
        """For a spreadsheet."""
        section = _of(self.section, item)
        return _rows((section, name, self.variant, self.unit), self.get(item)) if section else []


@dataclass(frozen=True)
class Listing:
    """A table with a row an item.

    Attributes:
        title: Of the table; figures of that table are its columns.
        pick: The items that are shown, in their order.
        cell_width: See `Table`.
    """

    title: str
    pick: Callable[[Sequence[Any]], Sequence[Any]] = list
    cell_width: int = Table.cell_width


@dataclass(frozen=True)
class Grid:
    """A table of one figure by two properties.

    Attributes:
        title: Of the table.
        corner: What its rows are by.
        has: Whether an item is in it.
        at: Row and column of an item.
        show_row: Heading of a row.
        show_column: Heading of a column.
        cell: An item as people read it.
    """

    title: str
    corner: str
    has: Callable[[Any], bool]
    at: Callable[[Any], tuple[Any, Any]]
    show_row: Callable[[Any], str]
    show_column: Callable[[Any], str]
    cell: Callable[[Profile, Any], str]

    def make(self, profile: Profile, items: Sequence[Any]) -> Table:
        """Return the table."""
        cells = {self.at(item): self.cell(profile, item) for item in items if self.has(item)}
        rows, columns = ([*sorted({place[axis] for place in cells})] for axis in (0, 1))
        return Table(
            self.title,
            [self.corner, *map(self.show_column, columns)],
            [[self.show_row(row), *(cells.get((row, column), MISSING) for column in columns)] for row in rows],
        )


@dataclass(frozen=True)
class Series:
    """What a profile has several of.

    Attributes:
        items: Of a profile.
        name: Of an item, for a spreadsheet.
        figures: What every item has.
        grids: Tables of them, which come first.
        listings: Tables of them.
        label: Of an item side by side; None for its name.
        place: What items are sorted by there; those with the same stay in the order they come in.
    """

    items: Callable[[Profile], Sequence[Any]]
    name: Callable[[Any], str]
    figures: Sequence[Figure]
    grids: Sequence[Grid] = ()
    listings: Sequence[Listing] = ()
    label: Callable[[Any], str] | None = None
    place: Callable[[Any], Any] = field(default=lambda item: 0)

    def tables(self, profile: Profile) -> list[Table]:
        """For people."""
        items = self.items(profile)
        return [
            *(grid.make(profile, items) for grid in self.grids),
            *(self._listing(listing, listing.pick(items)) for listing in self.listings),
        ]

    def _listing(self, listing: Listing, items: Sequence[Any]) -> Table:
        figures = [figure for figure in self.figures if figure.table == listing.title]
        rows = [[figure.text(item) for figure in figures] for item in items]
        return Table(listing.title, [figure.column for figure in figures], rows, listing.cell_width)

    def rows(self, profile: Profile) -> list[CsvRow]:
        """For a spreadsheet."""
        return [
            row for item in self.items(profile) for figure in self.figures for row in figure.rows(item, self.name(item))
        ]

    def beside(self, profiles: Sequence[Profile]) -> list[list[str]]:
        """Return lines of profiles side by side, below their headings."""
        figures = [figure for figure in self.figures if figure.compared]
        columns = [[self._lines(figure, profile) for profile in profiles] for figure in figures]
        return [line for of_figure in columns for line in side_by_side(of_figure)]

    def _lines(self, figure: Figure, profile: Profile) -> list[Line]:
        label = self.label or self.name
        return [
            (self.place(item), _of(figure.compared, item), label(item), figure.get(item))
            for item in self.items(profile)
        ]


def side_by_side(columns: Sequence[Sequence[Line]]) -> list[list[str]]:
    """Return lines with every profile's value and its ratio to the first profile's, below their headings.

    Args:
        columns: The lines of every profile.
    """
    found: dict[tuple[Any, str, str], dict[int, float]] = {}
    for i, column in enumerate(columns):
        for place, heading, label, value in column:
            found.setdefault((place, heading, label), {})[i] = value
    lines: list[list[str]] = []
    above = ""
    for (_, heading, label), values in sorted(found.items(), key=lambda each: each[0][0]):
        if heading != above:
            lines.append([heading])
            above = heading
        first, *others = (values.get(i) for i in range(len(columns)))
        lines.append([label, number(first), *(_relative(value, first) for value in others)])
    return lines


def _relative(value: float | None, reference: float | None) -> str:
    return MISSING if value is None else f"{number(value)} ({ratio(value, reference)})"


def _rows(row: tuple[str, str, str, str], value: Any) -> list[CsvRow]:
    """Return a row a value, without what is not known."""
    section, name, variant, unit = row
    if isinstance(value, Mapping):
        found = list(value.items())
    else:
        found = [(variant, each) for each in (value if isinstance(value, list) else [value])]
    return [(section, name, which, unit, each) for which, each in found if each is not None and each != ""]


def _of(given: str | Callable[[Any], str], item: Any) -> str:
    return given if isinstance(given, str) else given(item)
