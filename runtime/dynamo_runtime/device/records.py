"""What a profile is made of: the device, the bundle, and all that was measured of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..interval import Interval

ROUNDING = 2.0**-10
"""Of the largest logit: a difference that adding in another order makes, in half precision at most. Where a last bit
decides how activations are rounded to 8 bits, and that decides about more of them, logits differ by ten times as much
and more."""


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
class ProfiledBundle:
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
class Widths:
    """What passes over several tokens say, against passes over one: see `profiling.widths`.

    Attributes:
        rows: Most tokens of a pass that was compared.
        pasts: Positions in the cache before the first of them.
        compared: Rows of logits that were compared, over all pasts and numbers of tokens.
        changed: Those of them whose first choice is another, or that are no numbers.
        difference: Largest |Δlogit|.
        largest: Largest |logit|.
    """

    rows: int
    pasts: list[int]
    compared: int
    changed: int
    difference: float
    largest: float

    @property
    def exact(self) -> bool:
        """Whether they say the same to the last bit."""
        return not self.changed and self.difference == 0

    @property
    def holds(self) -> bool:
        """Whether verified text is that of plain decoding: no choice changes, and what differs is rounding."""
        return not self.changed and self.difference <= ROUNDING * self.largest


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
