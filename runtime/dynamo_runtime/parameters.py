"""Sampling parameters: the paper's names, their defaults, and their ranges."""

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypedDict

from .errors import ParameterError, shown

ADAPTIVE = ("blur", "otsu", "none")
PREMASK_TESTS = ("sole", "all", "none")
FIRST_TOKENS = ("joint", "base")
DRAFT_CHOICES = ("argmax", "sample")
_MOST = (1 << 31) - 1  # of whole numbers: all of any vocabulary

TARGET = frozenset({"temperature", "top_k", "top_p", "min_p", "repetition_penalty"})
"""Parameters of plain decoding's choice of a token."""

READINGS_OF_THE_PAPER = frozenset({"adaptive_threshold", "otsu_zeros", "normalize_joint", "premask_test"})
"""Parameters that choose between readings of Algorithm 1 where the paper is silent.

No command has a flag for them, as none helps to decode: `dynamo-eval ablation` compares them (docs/sampling.md).
"""

DYNAMO_ONLY = READINGS_OF_THE_PAPER | {"backoff_threshold", "cooccurrence_weight", "first_token"}
"""Parameters of the paper's Algorithm 1."""

DRAFTS_ONLY = frozenset({"draft_tokens", "draft_choice", "draft_cooccurrence_weight", "draft_confidence"})
"""Parameters of drafts that the target verifies."""

PAPER: Mapping[str, Any] = {"temperature": 0.7, "top_k": 50, "repetition_penalty": 1.1}
"""What the paper decodes with, where `SamplingParameters` or a bundle say otherwise."""

_OF_COUNTS = frozenset({"cooccurrence_weight", "draft_cooccurrence_weight"})


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return a whole number of any kind that a caller gives.

    Raises:
        ParameterError: It is none, too small, or too large.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least or (most is not None and number > most):
        bound = f" and at most {most}" if most is not None and number is not None and number > most else ""
        raise ParameterError(f"{name} must be a whole number of at least {least}{bound}, not {shown(value)}")
    return number


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """See that a caller gives something of a kind.

    Args:
        name: Of the argument.
        value: What was given.
        kind: What it must be.
        what: That is called in a sentence.

    Raises:
        ParameterError: It is something else.
    """
    if not isinstance(value, kind):
        raise ParameterError(f"{name} must be {what}, not a {type(value).__name__}")


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """How tokens are chosen.

    The defaults are DynaMo's (paper, Alg. 1 and its experiments), but for the repetition penalty, which is none: the
    paper's is strategy `dynamo`'s own (see `PAPER`).

    Attributes:
        temperature: T; 0 is greedy.
        top_k: k most probable tokens of a head that take part; 0 means all (not with `dynamo`).
        top_p: Smallest set of those that reaches this probability; 1 means all.
        min_p: Smallest probability of a token among those, relative to the largest; 0 means any.
        repetition_penalty: `autoregressive` and `speculative` divide positive and multiply negative logits of
            tokens in the context by it; `dynamo` divides an entry of the joint once per token that stands in
            the context or earlier in the same n-gram.
        backoff_threshold: ε_b in [0, 1]. An n-gram must reach ε_b^(n-1), else n - 1 is tried. 1 always gives
            one token, 0 gives n wherever a counted n-gram exists.
        cooccurrence_weight: α_c in [0, 1], exponent of the mask: 1 all of it, 0 none, with n-grams never seen
            allowed.
        first_token: "joint" as in the paper, where an n-gram is drawn as a whole, or "base": the first token is drawn
            from f^1 alone, as plain decoding does, and the joint is of the n-grams that begin with it.
        adaptive_threshold: A reading of the paper, as are the next three: "blur" (Otsu's threshold of the blurred
            joint), "otsu" (of the joint itself) or "none".
        otsu_zeros: Whether the zeros of the joint belong to Otsu's population, as the dark pixels of an image
            do.
        normalize_joint: Whether the joint is normalised over the top-k grid after the mask.
        premask_test: When the probability of an n-gram *before* the mask must reach the threshold too: "sole"
            (when one n-gram alone survives the mask and so has J = 1 however unlikely it was), "all", or
            "none".
        draft_tokens: Most drafts a pass of `speculative`; 0 means as many as the bundle predicts.
        draft_choice: How `speculative` picks a draft: "argmax" of what the drafter thinks likely, which gives the
            very text of `autoregressive` under the same seed, or a "sample" of it.
        draft_cooccurrence_weight: α_c of the mask on the drafts of `speculative`, where there are counts; 0, unless
            given, for heads that are told the token in front of what they predict.
        draft_confidence: In [0, 1]. Drafting stops where the drafter's own probability that all drafts so far and the
            next are right falls below it; 0 never stops.
    """

    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    backoff_threshold: float = 0.5
    cooccurrence_weight: float = 1.0
    first_token: str = "joint"
    adaptive_threshold: str = "blur"
    otsu_zeros: bool = True
    normalize_joint: bool = True
    premask_test: str = "sole"
    draft_tokens: int = 0
    draft_choice: str = "argmax"
    draft_cooccurrence_weight: float = 0.5
    draft_confidence: float = 0.0

    def __new__(cls, **named: Any) -> Self:
        """Note what the caller names."""
        made = super().__new__(cls)
        object.__setattr__(made, "_named", frozenset(named))
        return made

    @property
    def named(self) -> frozenset[str]:
        """Fields that the caller named, whatever their values.

        Where all were given, as `dataclasses.replace` does, those that are not the defaults.
        """
        named: frozenset[str] = self._named  # type: ignore[attr-defined]
        fields = dataclasses.fields(self)
        if len(named) < len(fields):
            return named
        return frozenset(field.name for field in fields if getattr(self, field.name) != field.default)

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            ParameterError: A value is not finite, out of range, or of the wrong type.
        """
        self._number("temperature", 0, math.inf)
        self._number("top_p", 0, 1, open_below=True)
        self._number("min_p", 0, 1)
        self._number("draft_cooccurrence_weight", 0, 1)
        self._number("draft_confidence", 0, 1)
        self._number("repetition_penalty", 0.01, 100)
        self._number("backoff_threshold", 0, 1)
        self._number("cooccurrence_weight", 0, 1)
        for name in ("top_k", "draft_tokens"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 0, _MOST))
        choices_of = {
            "adaptive_threshold": ADAPTIVE,
            "premask_test": PREMASK_TESTS,
            "first_token": FIRST_TOKENS,
            "draft_choice": DRAFT_CHOICES,
        }
        for name, choices in choices_of.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ParameterError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")
        for name in ("otsu_zeros", "normalize_joint"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(f"{name} must be true or false, not {shown(getattr(self, name))}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable choice is taken instead of a draw."""
        return self.temperature == 0

    def _number(self, name: str, low: float, high: float, open_below: bool = False) -> None:
        value = getattr(self, name)
        try:
            number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not low <= number <= high or (open_below and number == low):
            least = f"greater than {low}" if open_below else f"at least {low}"
            most = "" if high == math.inf else f" and at most {high}"
            raise ParameterError(f"{name} must be a finite number, {least}{most}, not {shown(value)}")
        if not isinstance(value, int | float):
            object.__setattr__(self, name, number)


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParameters` as keywords; None is as good as absent."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    backoff_threshold: float | None
    cooccurrence_weight: float | None
    first_token: str | None
    adaptive_threshold: str | None
    otsu_zeros: bool | None
    normalize_joint: bool | None
    premask_test: str | None
    draft_tokens: int | None
    draft_choice: str | None
    draft_cooccurrence_weight: float | None
    draft_confidence: float | None


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Check the sampling defaults of a bundle; fields that are not ours are left alone.

    Raises:
        ParameterError: A value is out of range or of the wrong type.
    """
    names = {field.name for field in dataclasses.fields(SamplingParameters)}
    SamplingParameters(**{name: value for name, value in defaults.items() if name in names})


def resolve_parameters(
    defaults: Mapping[str, Any] | SamplingParameters,
    given: Mapping[str, Any],
    *,
    has_counts: bool,
    conditioned: bool = False,
) -> SamplingParameters:
    """Return the parameters of one generation: given ones, else the defaults, else those of `SamplingParameters`.

    Without counts there is no mask to weigh, so its exponents are then 0 unless they are given.  Nor are drafts masked
    unasked if the heads are told the token in front: they know what the counts of pairs say.

    Args:
        defaults: The manifest's "sampling", whose fields beyond ours belong to other programs and are left alone; or
            the caller's own, or a strategy's, in place of those.
        given: What the caller named; None means not given.
        has_counts: Whether the bundle has n-gram counts.
        conditioned: Whether its heads are told the token in front of what they predict.

    Raises:
        ParameterError: An unknown name among `given`, a value out of range, or a mask without counts.
    """
    names = {field.name for field in dataclasses.fields(SamplingParameters)}
    if unknown := sorted(set(given) - names):
        raise ParameterError(f"unknown parameter {unknown[0]}; there are {', '.join(sorted(names))}")
    values = {name: value for name, value in given.items() if value is not None}
    named = frozenset(values)
    if isinstance(defaults, SamplingParameters):
        named |= defaults.named
        defaults = dataclasses.asdict(defaults)
    needless = {"draft_cooccurrence_weight"} if has_counts and conditioned else set() if has_counts else _OF_COUNTS
    unnamed = needless - named
    values = {name: value for name, value in defaults.items() if name in names} | dict.fromkeys(unnamed, 0.0) | values
    resolved = SamplingParameters(**values)
    object.__setattr__(resolved, "_named", named)  # not all that it was made of
    for name in () if has_counts else _OF_COUNTS:
        if getattr(resolved, name) > 0:
            raise ParameterError(f"this bundle has no n-gram counts (cooccurrence.npz): {name} must be 0")
    return resolved
