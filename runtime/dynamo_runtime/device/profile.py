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
from ..interval import Interval

SCHEMA_VERSION = 2
_READ_VERSIONS = (1, 2)  # those of the first know heads only as a part of the base's graph
PROFILES = "DYNAMO_PROFILES"  # environment variable: the folder that profiles are kept in
_MOST_BYTES = 16 << 20  # of a profile
_MOST_NUMBER = 1e18  # in it, where bytes are counted


@dataclass(frozen=True)
class Quantiles:
    """Times of one thing measured `count` times, in milliseconds."""

    p50: float
    p90: float
    p99: float
    count: int


@dataclass(frozen=True)
class Device:
    """What the graph runs on.

    Attributes:
        processor: Name of the CPU.
        cores: Logical cores that this process may use.
        instruction_sets: Those of interest to kernels, e.g. "AVX-512", "VNNI".
        caches: Bytes by level: "L1d", "L2", "L3".
        memory_bytes: Of the computer.
        gpu: Name of the GPU that was used, or "".
        gpu_memory_bytes: Its memory.
        gpu_driver: Version of its driver.
        system: Operating system and release.
        python: Version.
        onnxruntime: Version.
        provider: Execution provider that ran the graph, by its short name.
        providers: Those that the installed onnxruntime has.
    """

    processor: str
    cores: int
    provider: str
    onnxruntime: str
    instruction_sets: list[str] = field(default_factory=list)
    caches: dict[str, int] = field(default_factory=dict)
    memory_bytes: int = 0
    gpu: str = ""
    gpu_memory_bytes: int = 0
    gpu_driver: str = ""
    system: str = ""
    python: str = ""
    providers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """The bundle that was measured.

    Attributes:
        name: Its folder's name.
        graph_sha256: Of its graph.
        kind: "plain", "parallel", "cp" or "lookahead".
        precision: Its scheme.
        model_type: The base's architecture.
        n_tokens: Tokens a pass predicts.
        graph_bytes: Graph and weights on disk.
    """

    name: str
    graph_sha256: str
    kind: str
    precision: str
    model_type: str
    n_tokens: int
    graph_bytes: int


@dataclass(frozen=True)
class Conditions:
    """How quiet it was.

    Attributes:
        idle: Whether the figures are worth keeping: little else ran, and nothing drifted.
        busy: Share of all cores' time that other processes used meanwhile; None if it cannot be told here.
        drift: Largest over smallest cost of the same pass, measured between the stages of the run.
        frequency_mhz: Lowest and highest clock seen, empty if it cannot be told here.
        temperature_c: Highest seen, or None.
    """

    idle: bool
    busy: float | None
    drift: float
    frequency_mhz: list[float] = field(default_factory=list)
    temperature_c: float | None = None


@dataclass(frozen=True)
class Prefill:
    """A prompt of `tokens`, from an empty cache to its first new token."""

    tokens: int
    first_token: Quantiles
    tokens_per_s: float


@dataclass(frozen=True)
class Pass:
    """A forward pass over `rows` tokens behind `past` others.

    Attributes:
        heads: Whether further heads were computed, at all rows. False for bundles that have none in the base's graph.
        rows: Tokens fed, m.
        past: Positions in the cache before.
        time: The whole step in Python.
        inside: Median of the part inside onnxruntime, in milliseconds.
    """

    heads: bool
    rows: int
    past: int
    time: Quantiles
    inside: float


@dataclass(frozen=True)
class LayersRun:
    """The layers of the drafter's graph over the states of `positions` tokens behind `past` others.

    Attributes:
        positions: Read at once: those that became final since the layers ran last.
        past: Positions that they have read before.
        time: The whole of it in Python.
        inside: Median of the part inside onnxruntime, in milliseconds.
    """

    positions: int
    past: int
    time: Quantiles
    inside: float


@dataclass(frozen=True)
class DraftRun:
    """What goes from the states of the layers to words.

    Attributes:
        depth: Of the draft that it is for, from 1, where every draft takes a run; 0 where one is for all of them.
        time: The whole of it in Python.
        inside: Median of the part inside onnxruntime, in milliseconds.
    """

    depth: int
    time: Quantiles
    inside: float


@dataclass(frozen=True)
class DrafterRuns:
    """What the drafter's graph costs beside the passes: its layers once a round, and then its drafts."""

    layers: list[LayersRun]
    drafts: list[DraftRun]


@dataclass(frozen=True)
class Resume:
    """What a pass with heads costs more, in milliseconds, because `skipped` positions before it were without."""

    skipped: int
    extra: float


@dataclass(frozen=True)
class Floor:
    """The roofline of a pass over one token without heads.

    Attributes:
        past: Positions in the cache before.
        bytes: What the pass has to read: weights and cache.
        floor: That over the bandwidth, in milliseconds.
        measured: Median of the pass inside onnxruntime, in milliseconds.
    """

    past: int
    bytes: int
    floor: float
    measured: float


@dataclass(frozen=True)
class Operator:
    """One kind of operator in onnxruntime's own profile of a pass over one token: milliseconds a pass, and nodes."""

    name: str
    time: float
    nodes: int


@dataclass(frozen=True)
class StrategyRun:
    """One strategy on all prompts, interleaved with the others.

    Attributes:
        name: Of the strategy, with its settings.
        tokens_per_pass: Mean over the prompts.
        tokens_per_s: The same.
        ratio: Tokens/s over those of plain decoding.
        acceptance: Share of drafts accepted, by depth.
        between_tokens: Inter-token latency: time between one token and the next as they are given out.
        drafters: Drafts proposed, and those of them accepted, by the name of their drafter.
    """

    name: str
    tokens_per_pass: Interval
    tokens_per_s: Interval
    ratio: Interval
    acceptance: list[float]
    between_tokens: Quantiles
    drafters: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Acceptance:
    """How often a draft of some confidence was right, given that those before it were.

    Attributes:
        depth: Place of the draft, from 1.
        confidence: The drafter's own probability, at the middle of its bin.
        seen: Drafts judged.
        accepted: Those that were right.
        greedy: Whether the most probable token was right, or else a sampled one, with the bundle's own sampling.
    """

    depth: int
    confidence: float
    seen: int
    accepted: int
    greedy: bool = False


@dataclass(frozen=True)
class Backoff:
    """What `dynamo` sampling gains at a back-off threshold ε_b."""

    threshold: float
    tokens_per_pass: float
    speedup: Interval


@dataclass(frozen=True)
class Profile:
    """All of it; times in milliseconds unless their names say otherwise.

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
    """

    device: Device
    bundle: Subject
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
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The profile as it is written."""
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
                f"{' and '.join(map(str, _READ_VERSIONS))}: run dynamo-profile again"
            )
        try:
            profile: Profile = _read(Profile, content | {"schema_version": SCHEMA_VERSION})
        except (TypeError, ValueError) as error:
            raise ProfileError(f"{path} is not a whole profile: {error}") from error
        if wrong := profile._wrong():
            raise ProfileError(f"{path} is not a whole profile: {wrong}")
        return profile

    def _wrong(self) -> str:
        """What planning cannot go by; empty if nothing is wrong."""
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
        return "" if self.drafter is None else _wrong_runs(self.drafter)

    def save(self, path: Path) -> None:
        """Write the profile, or nothing.

        Raises:
            OutputError: It cannot be written there.
        """
        write_whole(path, self.to_json())


def _wrong_runs(drafter: DrafterRuns) -> str:
    """What planning cannot go by in the costs of a drafter's graph; empty if nothing is wrong."""
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


def _read(kind: Any, value: Any, where: str = "it") -> Any:
    """A value of JSON as the type that a dataclass wants.

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
    """Where profiles are kept: `DYNAMO_PROFILES`, or a folder of the cache."""
    given = os.environ.get(PROFILES)
    return Path(given) if given else cache_folder() / "profiles"


def cached_path(device_key: str, bundle: Bundle, threads: int | None) -> Path:
    """The file of a bundle's profile on a device, with so many threads.

    Args:
        device_key: From `device.device_key`.
        bundle: Told from others by its graph.
        threads: Within an operator; None is onnxruntime's choice.
    """
    graph = file_name(bundle.graph_sha256[:16] or bundle.folder.name)
    return profiles_folder() / f"{device_key}-{threads or 0}-{graph}.json"
