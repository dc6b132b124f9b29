"""The schemes: what every part of a model is stored as, and how its numbers are found.

Which part gets which precision by default was measured on the embedded default: docs/quantization.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from .blocks import Format
from .errors import QuantizeError

PRECISIONS = ("fp32", "int8", "int4")  # of a part
ALGORITHMS = ("rtn", "gptq")  # of 4-bit parts; 8-bit parts are always rounded to nearest
KV_CACHES = ("fp32", "int8")
BLOCK_SIZES = (16, 32, 64, 128)
_WIDEST_ALIKE = {8: 64, 4: 32}  # blocks, by bits, whose products come out alike in passes of every width


class Part(StrEnum):
    """What can be quantized in a way of its own."""

    STEM = "stem"  # every layer but the last of the base
    FIRST_HEAD = "first_head"  # the last layer of the base
    HEADS = "heads"  # whatever predicts further tokens
    OUTPUT = "output"  # the output embedding, shared by all heads
    INPUT = "input"  # the input embedding


@dataclass(frozen=True)
class GateLimits:
    """What a bundle may lose and still pass its gates, in percent of what the bundle in full precision does.

    Attributes:
        perplexity: Rise of PPL_1 … PPL_n and PPL_1:n.
        tokens_per_pass: Fall of the tokens a pass gives; it has to be certain (95 %) to count.
    """

    perplexity: float
    tokens_per_pass: float


@dataclass(frozen=True)
class Scheme:
    """A way of making a bundle smaller.

    Attributes:
        name: What `--quantize` calls it.
        formats: Of every part in blocks; None leaves a part in fp32.
        algorithm: Of the 4-bit parts.
        activations: "fp32", or "fp16" for everything up to the output embedding.
        dynamic: Whether activations are quantized at run time, a tensor at a time.
        kv_cache: "fp32" (that is, as the activations) or "int8". With int8 the attention computes every row alike,
            however many rows a pass has. With fp32 it does not, by a last bit, which rounding the activations to int8
            makes large: passes over one token and over several then choose differently now and then.
        limits: Of the gates.
        given: Parts whose precision was asked for.
    """

    name: str
    formats: Mapping[Part, Format | None]
    limits: GateLimits
    algorithm: str = "rtn"
    activations: str = "fp32"
    dynamic: bool = False
    kv_cache: str = "fp32"
    given: frozenset[Part] = frozenset()

    @property
    def calibrated(self) -> bool:
        """Whether text is needed to find the numbers."""
        gptq = self.algorithm == "gptq" and any(form and form.bits == 4 for form in self.formats.values())
        return gptq or self.kv_cache == "int8"

    @property
    def lossless(self) -> bool:
        """Whether the scheme undertakes that passes of every width say the same; if not, changes are counted only.

        Behind the output embedding nothing is rounded any more, and the input embedding is looked up.
        """
        inside = (form for part, form in self.formats.items() if part not in (Part.OUTPUT, Part.INPUT))
        return not self.dynamic and all(form is None or form.block_size <= _WIDEST_ALIKE[form.bits] for form in inside)


_NOTHING: dict[Part, Format | None] = dict.fromkeys(Part)
_LITTLE = GateLimits(perplexity=2.0, tokens_per_pass=4.0)
_MORE = GateLimits(perplexity=8.0, tokens_per_pass=8.0)
# The widest blocks that are computed alike in passes of different width; they are faster than blocks of 32.
_INT8 = Format(8, _WIDEST_ALIKE[8])
# Within int4, where every bit counts. Blocks of 128 are not computed alike in passes of different width, by a last bit;
# behind the output embedding, and only there, nothing is rounded any more that this could change.
_INT8_SMALL = Format(8, 128)

SCHEMES: dict[str, Scheme] = {
    "int8": Scheme("int8", dict.fromkeys(Part, _INT8), _LITTLE, kv_cache="int8"),
    "int4": Scheme(
        "int4",
        dict.fromkeys(Part, Format(4, 32)) | {Part.HEADS: _INT8, Part.OUTPUT: _INT8_SMALL},
        _MORE,
        "gptq",
        kv_cache="int8",
    ),
    "int8-dynamic": Scheme("int8-dynamic", dict.fromkeys(Part, _INT8), _LITTLE, dynamic=True),
    "fp16": Scheme("fp16", _NOTHING, _LITTLE, activations="fp16"),
}


@dataclass(frozen=True)
class Options:
    """What departs from a scheme's defaults; None leaves them.

    Attributes:
        parts: Precision of single parts, from `PRECISIONS`.
        block_size: Of all parts in blocks.
        symmetric: Whether 4-bit blocks have no zero points.
        algorithm: From `ALGORITHMS`.
        kv_cache: From `KV_CACHES`.
        perplexity_limit: See `GateLimits`, percent.
        tokens_per_pass_limit: See `GateLimits`, percent.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    block_size: int | None = None
    symmetric: bool | None = None
    algorithm: str | None = None
    kv_cache: str | None = None
    perplexity_limit: float | None = None
    tokens_per_pass_limit: float | None = None


def resolve(name: str, options: Options) -> Scheme:
    """Return a scheme with everything that was asked for.

    Raises:
        QuantizeError: Something is unknown, or does not go together.
    """
    if name not in SCHEMES:
        raise QuantizeError(f"unknown scheme {name!r}: choose {', '.join(SCHEMES)}")
    scheme = SCHEMES[name]
    _check("algorithm", options.algorithm, ALGORITHMS)
    _check("KV cache", options.kv_cache, KV_CACHES)
    _check("block size", options.block_size, BLOCK_SIZES)
    for part, precision in options.parts.items():
        _check("part", part, tuple(Part))
        _check(f"precision of {part}", precision, PRECISIONS)
    if scheme.activations != "fp32" and (options.parts or options.block_size):
        raise QuantizeError(f"{name} has one precision for all parts, and no blocks")
    if scheme.activations != "fp32" and options.kv_cache == "int8":
        raise QuantizeError(f"{name} keeps its cache in {name}")
    if scheme.dynamic and ("int4" in options.parts.values() or options.block_size):
        raise QuantizeError(f"{name} has no blocks: its parts are int8 or fp32")
    formats = dict(scheme.formats)
    for part, precision in options.parts.items():
        usual = scheme.formats[Part(part)]
        own = usual if usual is not None and usual.bits == 8 else _INT8
        formats[Part(part)] = {"fp32": None, "int8": own, "int4": Format(4, 32)}[precision]
    has_4_bits = any(form is not None and form.bits == 4 for form in formats.values())
    algorithm = options.algorithm or ("gptq" if has_4_bits else "rtn")
    if not has_4_bits and (options.algorithm or options.symmetric is not None):
        raise QuantizeError(f"{name} has no 4-bit parts, so an algorithm or zero points for them mean nothing")
    symmetric = options.symmetric is not False
    for part, form in formats.items():
        if form is not None:
            form = Format(form.bits, options.block_size or form.block_size, symmetric or form.bits == 8)
            formats[part] = form
    limits = GateLimits(
        scheme.limits.perplexity if options.perplexity_limit is None else options.perplexity_limit,
        scheme.limits.tokens_per_pass if options.tokens_per_pass_limit is None else options.tokens_per_pass_limit,
    )
    if not (limits.perplexity >= 0 and limits.tokens_per_pass >= 0):
        raise QuantizeError("the limits of the gates must be at least 0 percent")
    return replace(
        scheme,
        formats=formats,
        limits=limits,
        algorithm=algorithm,
        kv_cache=options.kv_cache or scheme.kv_cache,
        given=frozenset(map(Part, options.parts)),
    )


def _check(what: str, given: object, known: tuple[object, ...]) -> None:
    if given is not None and given not in known:
        raise QuantizeError(f"unknown {what} {str(given)!r}: choose {', '.join(map(str, known))}")
