"""What a profile says, as text, Markdown and rows for a spreadsheet, and several profiles side by side."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence

from ..device.profile import Profile
from ..device.records import Conditions, StrategyRun
from ..errors import printable
from ..tables import MISSING, NAME_WIDTH, WIDTH, Table, in_spreadsheet, percent
from .facts import BUNDLE, CONDITIONS, CONSTANTS, DEVICE, FACTS
from .figures import CsvRow, Fact, Line, side_by_side
from .series import SERIES

HEADER = ("section", "name", "variant", "unit", "value")


def summary(profile: Profile) -> str:
    """Return a profile as tables for a terminal; warnings come first, what was not measured is left out."""
    wrapped = [textwrap.fill(text, WIDTH) for text in caveats(profile)]
    return "\n\n".join([*wrapped, *(table.text() for table in tables(profile))])


def markdown(profile: Profile) -> str:
    """Return the tables of `summary` as Markdown, without headings, so that they fit below any."""
    return "\n\n".join([*(f"**{text}**" for text in caveats(profile)), *(t.markdown() for t in tables(profile))])


def caveats(profile: Profile) -> list[str]:
    """Say why the figures may not be what the device can do; empty if nothing is wrong."""
    found = []
    if not profile.conditions.idle:
        found.append(f"NOT IDLE: do not rely on these figures. {_disturbance(profile.conditions)}")
    if profile.quick:
        found.append("QUICK RUN: fewer repetitions, so the figures are rough.")
    if profile.widths is not None and not profile.widths.holds:
        found.append(
            "PASSES DEPEND ON THEIR WIDTH: over several tokens this device computes other logits than over one, so "
            "auto drafts nothing, and speculative does not write plain decoding's text."
        )
    return found


def _disturbance(conditions: Conditions) -> str:
    busy = "It is not known what other processes used (the extra [profile] tells)"
    if conditions.busy is not None:
        busy = f"Other processes used {percent(conditions.busy)} of the CPU"
    return f"{busy}; between stages of the run one and the same pass cost up to {conditions.drift:.2f} times its least."


def is_plain(run: StrategyRun) -> bool:
    """Tell whether this is plain decoding, which the others are held against."""
    return run.name == "plain"


def tables(profile: Profile) -> list[Table]:
    """Return every table that has something in it."""
    made = [_facts(title, profile) for title in (DEVICE, CONDITIONS, BUNDLE, CONSTANTS)]
    made += [table for series in SERIES for table in series.tables(profile)]
    return [table for table in made if table.rows]


def _of_table(title: str) -> list[Fact]:
    """Return its lines, in their order."""
    return sorted((fact for fact in FACTS if fact.table == title), key=lambda fact: fact.place)


def _facts(title: str, profile: Profile) -> Table:
    """Return names and values, without what is not known."""
    lines = [[fact.label, fact.text(profile)] for fact in _of_table(title) if fact.shown]
    return Table(title, [], [line for line in lines if line[1]])


def to_csv(profile: Profile) -> str:
    """`csv_rows` below `HEADER`, as the content of a file; in front of what looks like a formula is an apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows([in_spreadsheet(cell) for cell in row] for row in csv_rows(profile))
    return buffer.getvalue()


def csv_rows(profile: Profile) -> list[CsvRow]:
    """Return every figure that was measured, in full precision, on a row of its own: see `HEADER`."""
    return [row for each in (*FACTS, *SERIES) for row in each.rows(profile)]


def compare_profiles(profiles: Sequence[Profile], names: Sequence[str]) -> str:
    """Profiles side by side in one table for a terminal, with ratios to the first; warnings come first.

    Args:
        profiles: One or more.
        names: Of the profiles, for the columns' heads.
    """
    found = [
        f"{printable(name)}: {text}" for profile, name in zip(profiles, names, strict=True) for text in caveats(profile)
    ]
    return "\n\n".join([*(textwrap.fill(text, WIDTH) for text in found), comparison(profiles, names).text()])


def comparison(profiles: Sequence[Profile], names: Sequence[str]) -> Table:
    """Return the table of `compare_profiles`."""
    rows = [
        [fact.label, *(fact.text(profile) or MISSING for profile in profiles)]
        for title in (DEVICE, BUNDLE, CONDITIONS)
        for fact in _of_table(title)
        if fact.compared
    ]
    rows += side_by_side([_constants(profile) for profile in profiles])
    rows += [line for series in SERIES for line in series.beside(profiles)]
    cell_width = min(24, max(14, (WIDTH - NAME_WIDTH) // len(names) - 2))
    return Table(f"Side by side (in parentheses ÷ {names[0]})", ["", *names], rows, cell_width)


def _constants(profile: Profile) -> list[Line]:
    """Return what was measured once, as lines beside other profiles', in the order of the table."""
    lines = [(fact.label, fact.value(profile)) for fact in _of_table(CONSTANTS)]
    return [(0, CONSTANTS, label, value) for label, value in lines if value is not None]
