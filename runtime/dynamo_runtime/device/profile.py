"""The profile of one bundle on one device: what is kept, as JSON, and where."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..cache import cache_folder
from ..errors import ProfileError, shown
from ..files import file_name, read_object, write_whole
from .records import (
    Acceptance,
    Backoff,
    Conditions,
    Device,
    DrafterRuns,
    Floor,
    Operator,
    Pass,
    Prefill,
    ProfiledBundle,
    Resume,
    StrategyRun,
    Widths,
)

SCHEMA_VERSION = 3
# Those of the first know heads only as a part of the base's graph, and none before the third has tested widths.
_READ_VERSIONS = (1, 2, 3)
PROFILES = "DYNAMO_PROFILES"  # environment variable: the folder that profiles are kept in
_MOST_BYTES = 16 << 20  # of a profile
_MOST_NUMBER = 1e18  # in it, where bytes are counted


@dataclass(frozen=True)
class Profile:
    """All that was measured; times are in milliseconds unless their names say otherwise.

    Attributes:
        created: Date and time, UTC, ISO 8601.
        threads: Threads within an operator; 0 is onnxruntime's choice.
        quick: Whether it was a quick run, of fewer repetitions.
        bandwidth: Bytes a second that this many threads read from memory.
        load_s: Seconds to load the bundle.
        peak_bytes: Largest memory of the process.
        steady_bytes: Its memory while decoding.
        drafting: Spent in Python for every draft proposed and judged: outside the pass and the runs of the drafter's
            graph.
        overhead: Spent outside a pass for every token of plain decoding: sampling it, turning it into text.
        drafter: Costs of the drafter's graph; None where there is none.
        widths: Whether passes over several tokens say what passes over one say; None if that was not tested.
    """

    device: Device
    bundle: ProfiledBundle
    conditions: Conditions
    created: str
    threads: int
    quick: bool
    bandwidth: float
    load_s: float
    peak_bytes: int
    steady_bytes: int
    drafting: float
    passes: list[Pass]
    prefill: list[Prefill] = field(default_factory=list)
    resume: list[Resume] = field(default_factory=list)
    roofline: list[Floor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    strategies: list[StrategyRun] = field(default_factory=list)
    acceptance: list[Acceptance] = field(default_factory=list)
    backoff: list[Backoff] = field(default_factory=list)
    overhead: float = 0.0
    drafter: DrafterRuns | None = None
    widths: Widths | None = None
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Return the profile as it is written."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def load(path: Path) -> Profile:
        """Read a profile, of this schema version or an older one.

        Raises:
            ProfileError: There is none, or it is damaged or of another schema version.
        """
        try:
            content = read_object(path, _MOST_BYTES)
        except OSError as error:
            raise ProfileError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise ProfileError(f"{path} is not a profile: {error}") from error
        version = content.get("schema_version")
        if version not in _READ_VERSIONS or isinstance(version, bool):
            raise ProfileError(
                f"{path} has schema version {shown(version)}, this program reads "
                f"{_READ_VERSIONS[0]} to {_READ_VERSIONS[-1]}: run dynamo-profile again"
            )
        try:
            profile: Profile = _read(Profile, content | {"schema_version": SCHEMA_VERSION})
        except (TypeError, ValueError) as error:
            raise ProfileError(f"{path} is not a whole profile: {error}") from error
        if wrong := profile._wrong():
            raise ProfileError(f"{path} is not a whole profile: {wrong}")
        return profile

    def _wrong(self) -> str:
        """Return what is wrong with the figures that planning uses; empty if nothing is."""
        if not any(not each.heads for each in self.passes) or min(each.time.p50 for each in self.passes) <= 0:
            return "it does not say what passes cost"
        if min(min(each.rows - 1, each.past) for each in self.passes) < 0:
            return "passes: rows or past is too small"
        for each in self.acceptance:
            if each.depth < 1 or not 0 <= each.confidence <= 1 or not 0 <= each.accepted <= each.seen:
                return "acceptance: depth, confidence, seen or accepted is out of range"
        for counts in (counts for run in self.strategies for counts in run.drafters.values()):
            if len(counts) != 2 or not 0 <= counts[1] <= counts[0] or not counts[0]:
                return "strategies: drafts accepted are more than there were"
        wrong = "" if self.drafter is None else _wrong_runs(self.drafter)
        return wrong or ("" if self.widths is None else _wrong_widths(self.widths))

    def save(self, path: Path) -> None:
        """Write the profile, or nothing.

        Raises:
            OutputError: It cannot be written there.
        """
        write_whole(path, self.to_json())


def _wrong_runs(drafter: DrafterRuns) -> str:
    """Return what is wrong with the costs of a drafter's graph; empty if nothing is."""
    if not drafter.layers or not drafter.drafts:
        return "drafter: it does not say what layers and drafts cost"
    times = [*(run.time for run in drafter.layers), *(run.time for run in drafter.drafts)]
    if min(time.p50 for time in times) <= 0:
        return "drafter: a time is not more than 0"
    if min(min(run.positions - 1, run.past) for run in drafter.layers) < 0:
        return "drafter: positions or past is too small"
    if min(run.depth for run in drafter.drafts) < 0:
        return "drafter: depth is too small"
    return ""


def _wrong_widths(widths: Widths) -> str:
    """Return what is wrong with the figures of the width test; empty if nothing is."""
    if widths.rows < 2 or not 0 <= widths.changed <= widths.compared or not widths.compared:
        return "widths: rows, compared or changed is out of range"
    if min(widths.difference, widths.largest) < 0:
        return "widths: a logit is less than 0"
    return ""


def _read(kind: Any, value: Any, where: str = "it") -> Any:
    """Return a value of JSON as the type that a dataclass wants.

    Args:
        kind: The type.
        value: Whatever stands there.
        where: The field, for errors.

    Raises:
        TypeError: It is not of that type.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise TypeError(f"{where} is not an object")
        hints = typing.get_type_hints(kind)
        return kind(**{name: _read(hints.get(name), content, shown(name)) for name, content in value.items()})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        if not isinstance(value, list):
            raise TypeError(f"{where} is not a list")
        return [_read(arguments[0], item, where) for item in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"{where} is not an object")
        return {name: _read(arguments[1], item, where) for name, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _read(arguments[0], value, where)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (int, float) and is_number and not abs(value) <= _MOST_NUMBER:
        raise TypeError(f"{where} is {shown(value)}, which is not a number to go by")
    if kind is float and is_number:
        return float(value)
    if kind is None or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{where} is {shown(value)}, which is not what is expected there")
    return value


def profiles_folder() -> Path:
    """Return where profiles are kept: `DYNAMO_PROFILES`, or a folder of the cache."""
    given = os.environ.get(PROFILES)
    return Path(given) if given else cache_folder() / "profiles"


def cached_path(device_key: str, bundle: Bundle, threads: int | None) -> Path:
    """Return the file of a bundle's profile on a device, with so many threads.

    Args:
        device_key: From `device.device_key`.
        bundle: It is told from others by the checksum of its graph.
        threads: Within an operator; None is onnxruntime's choice.
    """
    graph = file_name(bundle.graph_sha256[:16] or bundle.folder.name)
    return profiles_folder() / f"{device_key}-{threads or 0}-{graph}.json"
