"""The ways of decoding that are compared: plain, thresholds of `dynamo`, the paper's ablation, and other readings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dynamo_runtime.bundle import Bundle
from dynamo_runtime.selection import refusal

from .errors import EvaluationError

PLAIN = "plain"
DYNAMO = "dynamo"
MOST_THRESHOLDS = 1001

# Paper, table of the ablation at 7.3B: what is left of mask, Otsu's threshold and blur.
ABLATION: dict[str, dict[str, Any]] = {
    "mask, Otsu, blur": {"cooccurrence_weight": 1.0, "adaptive_threshold": "blur"},
    "mask, Otsu": {"cooccurrence_weight": 1.0, "adaptive_threshold": "otsu"},
    "mask": {"cooccurrence_weight": 1.0, "adaptive_threshold": "none"},
    "half mask, Otsu, blur": {"cooccurrence_weight": 0.5, "adaptive_threshold": "blur"},
    "Otsu, blur": {"cooccurrence_weight": 0.0, "adaptive_threshold": "blur"},
}

# Where the paper leaves the algorithm open, each departs from our choice in one point (docs/sampling.md).
READINGS: dict[str, dict[str, Any]] = {
    "Otsu over survivors": {"otsu_zeros": False},
    "joint not normalised": {"normalize_joint": False},
    "no pre-mask test": {"premask_test": "none"},
    "pre-mask test of all": {"premask_test": "all"},
    "first token as plain draws it": {"first_token": "base"},
}


@dataclass(frozen=True)
class Setting:
    """One way of decoding.

    Attributes:
        name: Unique among the settings.
        strategy: Of `Engine.generate`.
        plain: Whether the plain bundle runs it.
        variant: Settings of one variant lie on one curve; "" if it is on none.
        threshold: ε_b, of a curve's settings.
        sampling: Sampling parameters on top of those that all settings share.
        drafter: Of a strategy that drafts; None for what it takes by itself.
    """

    name: str
    strategy: str
    plain: bool = False
    variant: str = ""
    threshold: float | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    drafter: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        """For a results file; without a drafter that was not named, so that a file from before goes on."""
        return {name: value for name, value in asdict(self).items() if name != "drafter" or value is not None}


def parse_thresholds(texts: Sequence[str]) -> list[float]:
    """Return back-off thresholds from numbers and ranges BEGIN:END:STEP, END included; ascending, each once.

    Raises:
        EvaluationError: One is neither, or outside [0, 1].
    """
    values: set[float] = set()
    for text in texts:
        try:
            parts = [float(part) for part in text.split(":")]
        except ValueError:
            parts = []
        if len(parts) == 3 and parts[2] > 0 and (parts[1] - parts[0]) / parts[2] < MOST_THRESHOLDS:
            steps = math.floor((parts[1] - parts[0]) / parts[2] + 1e-9)
            parts = [round(parts[0] + i * parts[2], 9) for i in range(steps + 1)]
        elif len(parts) != 1:
            parts = []
        if not parts or not all(0 <= part <= 1 for part in parts):
            raise EvaluationError(f"{text!r} is no back-off threshold in [0, 1], nor a range BEGIN:END:STEP of them")
        values.update(parts)
    return sorted(values)


def curve(thresholds: Iterable[float], variants: Mapping[str, Mapping[str, Any]] | None = None) -> list[Setting]:
    """`dynamo` at every threshold, of one variant or of several by name."""
    found = []
    for variant, changes in (variants or {DYNAMO: {}}).items():
        for threshold in thresholds:
            name = f"{variant}, ε_b {threshold:g}"
            found.append(Setting(name, DYNAMO, False, variant, threshold, {**changes, "backoff_threshold": threshold}))
    return found


def possible(settings: Sequence[Setting], bundle: Bundle, shared: Mapping[str, Any]) -> tuple[list[Setting], list[str]]:
    """Return the settings that this bundle can run, and what is in the way of the others.

    Args:
        settings: Of the multi-token bundle.
        bundle: It.
        shared: Sampling parameters of all settings.

    Raises:
        EvaluationError: It can run none of them.
    """
    found, refused = [], []
    for setting in settings:
        if why := refusal(setting.strategy, bundle, {**shared, **setting.sampling}, setting.drafter):
            refused.append(f"{setting.name}: {why}")
        else:
            found.append(setting)
    if not found:
        raise EvaluationError(f"{bundle.folder} can run none of the settings ({refused[0]})")
    return found, refused
