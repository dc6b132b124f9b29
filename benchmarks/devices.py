"""Writes docs/devices.md from the profiles of all machines that were measured.

    python benchmarks/devices.py [--profiles FOLDER] [--output FILE] [--check]

The profiles are the JSON files that dynamo-profile writes.  With --check nothing is written, and the exit status is 1
if the file is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from page import wrapped, write_or_check

from dynamo_runtime.device.costs import MeasuredDrafterCosts
from dynamo_runtime.device.profile import Profile
from dynamo_runtime.errors import ProfileError
from dynamo_runtime.profiling import report
from dynamo_runtime.profiling.series import grid
from dynamo_runtime.tables import MISSING, Table, interval, number, ratio

ROOT = Path(__file__).resolve().parent.parent
ROWS = 4  # of the pass whose cost the overview shows
INTRO = f"""# What devices make of it

Bundles measured with `dynamo-profile` on the machines below, each by itself. Times are medians unless they say
otherwise, brackets are 95 % intervals. A pass over m rows feeds m tokens at once: what it costs over a pass of one row
without further heads decides what drafting can gain. The overview shows that for m = {ROWS} behind the shortest text
measured, and the strategy with the most tokens a second, plain decoding included.

This page is written by `python benchmarks/devices.py` from `benchmarks/results/devices/`.
"""


def load(folder: Path) -> list[Profile]:
    """Return the profiles of a folder, by the names of their files.

    Raises:
        ProfileError: There is none, or one of them cannot be read.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ProfileError(f"there are no profiles (*.json) in {folder}")
    return [Profile.load(path) for path in paths]


def document(profiles: list[Profile]) -> str:
    """Return the whole page."""
    sections = [f"## {_machine(p)}: {p.bundle.name}, {p.bundle.precision}\n\n{report.markdown(p)}\n" for p in profiles]
    page = "\n".join([INTRO, overview(profiles).markdown() + "\n", *sections])
    return wrapped(page)


def overview(profiles: list[Profile]) -> Table:
    """Return one row a profile."""
    columns = ["device", "provider", "bundle", "precision", "plain, tokens/s", f"pass of {ROWS} rows ÷ 1"]
    columns += ["with further heads", "best strategy", "tokens/s ÷ plain"]
    return Table("Overview", columns, [_row(profile) for profile in profiles])


def _row(profile: Profile) -> list[str]:
    passes = grid(profile)
    past = min((p.past for p in profile.passes), default=0)
    times = {key: passes[key].time.p50 for key in passes}
    without = times.get((False, past, ROWS))
    given = times.get((True, past, ROWS)) if profile.drafter is None else _with_drafts(profile, without, past)
    costs = [ratio(time, times.get((False, past, 1))) for time in (without, given)]
    plain = next((run.tokens_per_s.value for run in profile.strategies if report.is_plain(run)), None)
    best = max(profile.strategies, key=lambda run: run.ratio.value, default=None)
    doubts = ", ".join(text.partition(":")[0].lower() for text in report.caveats(profile))
    return [
        _machine(profile) + (f" ({doubts})" if doubts else ""),
        profile.device.provider,
        profile.bundle.name,
        profile.bundle.precision,
        number(plain),
        *costs,
        best.name if best else MISSING,
        interval(best.ratio) if best else MISSING,
    ]


def _with_drafts(profile: Profile, without: float | None, past: int) -> float | None:
    """Return a pass and, from the drafter's graph, as many drafts as it has rows but one."""
    if without is None or profile.drafter is None:
        return None
    making = MeasuredDrafterCosts.of(profile.drafter)
    return without + making.begin(1, past) + making.further * (ROWS - 1)


def _machine(profile: Profile) -> str:
    device = profile.device
    return device.gpu or f"{device.cores} cores of {device.processor}"


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=Path, default=ROOT / "benchmarks/results/devices", metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/devices.md", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is out of date")
    arguments = parser.parse_args()
    try:
        content = document(load(arguments.profiles))
    except ProfileError as error:
        sys.exit(str(error))
    return write_or_check(arguments.output, content, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
