"""What a scheme and its options come to, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_quantize import SCHEMES, Options, QuantizeError
from dynamo_quantize.blocks import Format
from dynamo_quantize.schemes import GateLimits, Part, resolve

LITTLE, MORE = GateLimits(2.0, 4.0), GateLimits(8.0, 8.0)


def test_defaults() -> None:
    """As documented: int8 everywhere; int4 by GPTQ, heads and output in 8 bits; no blocks for the other two."""
    int8, int4, dynamic, half = (resolve(name, Options()) for name in SCHEMES)
    assert [scheme.name for scheme in (int8, int4, dynamic, half)] == ["int8", "int4", "int8-dynamic", "fp16"]
    assert int8.formats == dict.fromkeys(Part, Format(8, 64))
    assert int4.formats == dict.fromkeys(Part, Format(4, 32)) | {Part.HEADS: Format(8, 64), Part.OUTPUT: Format(8, 128)}
    assert int4.algorithm == "gptq"
    assert half.formats == dict.fromkeys(Part) and half.activations == "fp16"
    assert [s.dynamic for s in (int8, int4, dynamic, half)] == [False, False, True, False]
    assert [s.kv_cache for s in (int8, int4, dynamic, half)] == ["int8", "int8", "fp32", "fp32"]
    assert [s.limits for s in (int8, int4, dynamic, half)] == [LITTLE, MORE, LITTLE, LITTLE]
    assert [s.calibrated for s in (int8, int4, dynamic, half)] == [True, True, False, False]
    assert not any(scheme.given for scheme in (int8, int4, dynamic, half))


def test_parts_of_their_own() -> None:
    """A part's precision replaces the scheme's; at 8 bits within int4 the output alone has larger blocks."""
    found = resolve("int4", Options(parts={"stem": "int8", "heads": "fp32", "output": "int4"}))
    assert found.formats == {
        Part.STEM: Format(8, 64),
        Part.FIRST_HEAD: Format(4, 32),
        Part.HEADS: None,
        Part.OUTPUT: Format(4, 32),
        Part.INPUT: Format(4, 32),
    }
    assert found.given == {Part.STEM, Part.HEADS, Part.OUTPUT}
    mixed = resolve("int8", Options(parts={"heads": "int4"}))
    assert mixed.formats == dict.fromkeys(Part, Format(8, 64)) | {Part.HEADS: Format(4, 32)}
    assert mixed.algorithm == "gptq"
    assert resolve("int4", Options(parts={"heads": "int4"})).formats[Part.HEADS] == Format(4, 32)
    assert resolve("int8-dynamic", Options(parts={"output": "fp32"})).formats[Part.OUTPUT] is None


@pytest.mark.parametrize(
    ("name", "options", "lossless"),
    [
        ("int8", {}, True),
        ("int4", {}, True),  # whose output embedding alone has blocks of 128
        ("fp16", {}, True),
        ("int8-dynamic", {}, False),
        ("int8", {"block_size": 32}, True),
        ("int8", {"block_size": 128}, False),
        ("int4", {"block_size": 64}, False),
        ("int4", {"block_size": 64, "parts": dict.fromkeys(("stem", "first_head", "heads"), "int8")}, True),
    ],
)
def test_what_undertakes_to_be_lossless(name: str, options: dict[str, Any], lossless: bool) -> None:
    """Blocks of 64 at 8 bits and of 32 at 4, inside the model; wider ones only where nothing is rounded behind them."""
    assert resolve(name, Options(**options)).lossless == lossless


def test_blocks_and_zero_points() -> None:
    """A block size is everybody's; zero points are the 4-bit parts'."""
    found = resolve("int4", Options(block_size=64, symmetric=False))
    assert found.formats == dict.fromkeys(Part, Format(4, 64, False)) | dict.fromkeys(
        (Part.HEADS, Part.OUTPUT), Format(8, 64)
    )
    assert resolve("int8", Options(block_size=16)).formats == dict.fromkeys(Part, Format(8, 16))
    asymmetric = resolve("int4", Options(symmetric=False))
    assert asymmetric.formats[Part.STEM] == Format(4, 32, False)
    assert asymmetric.formats[Part.HEADS] == Format(8, 64, True)
    assert asymmetric.formats[Part.OUTPUT] == Format(8, 128, True)


@pytest.mark.parametrize(
    ("scheme", "options", "expected"),
    [
        ("int8", {"kv_cache": "fp32"}, False),
        ("int4", {"kv_cache": "fp32"}, True),
        ("int4", {"kv_cache": "fp32", "algorithm": "rtn"}, False),
        ("int4", {"algorithm": "rtn"}, True),
        ("int8-dynamic", {"kv_cache": "int8"}, True),
        ("int4", {"kv_cache": "fp32", "parts": {str(part): "int8" for part in Part}}, False),
    ],
)
def test_what_needs_text(scheme: str, options: dict[str, Any], expected: bool) -> None:
    """GPTQ and an 8-bit cache need it, nothing else."""
    assert resolve(scheme, Options(**options)).calibrated == expected


def test_limits() -> None:
    """Each can be set by itself; 0 is a limit."""
    assert resolve("int8", Options(perplexity_limit=0.0)).limits == GateLimits(0.0, 4.0)
    assert resolve("int4", Options(tokens_per_pass_limit=1.5)).limits == GateLimits(8.0, 1.5)


@pytest.mark.parametrize(
    ("scheme", "options", "complaint"),
    [
        ("int2", {}, "unknown scheme 'int2': choose int8, int4, int8-dynamic, fp16"),
        ("int4", {"algorithm": "awq"}, "unknown algorithm 'awq': choose rtn, gptq"),
        ("int8", {"kv_cache": "int4"}, "unknown KV cache 'int4': choose fp32, int8"),
        ("int8", {"block_size": 48}, "unknown block size '48': choose 16, 32, 64, 128"),
        ("int8", {"block_size": 0}, "unknown block size '0'"),
        ("int8", {"parts": {"tail": "int8"}}, "unknown part 'tail': choose stem, first_head, heads, output, input"),
        ("int8", {"parts": {"stem": "fp16"}}, "unknown precision of stem 'fp16': choose fp32, int8, int4"),
        ("fp16", {"parts": {"stem": "int8"}}, "fp16 has one precision for all parts, and no blocks"),
        ("fp16", {"block_size": 32}, "fp16 has one precision for all parts, and no blocks"),
        ("fp16", {"kv_cache": "int8"}, "fp16 keeps its cache in fp16"),
        ("fp16", {"algorithm": "gptq"}, "fp16 has no 4-bit parts, so an algorithm or zero points"),
        ("int8-dynamic", {"parts": {"stem": "int4"}}, "int8-dynamic has no blocks: its parts are int8 or fp32"),
        ("int8-dynamic", {"block_size": 32}, "int8-dynamic has no blocks: its parts are int8 or fp32"),
        ("int8", {"algorithm": "gptq"}, "int8 has no 4-bit parts, so an algorithm or zero points for them"),
        ("int8", {"symmetric": True}, "int8 has no 4-bit parts, so an algorithm or zero points for them"),
        ("int8", {"perplexity_limit": -1.0}, "the limits of the gates must be at least 0 percent"),
        ("int8", {"tokens_per_pass_limit": float("nan")}, "the limits of the gates must be at least 0 percent"),
    ],
)
def test_refusals(scheme: str, options: dict[str, Any], complaint: str) -> None:
    """What is unknown or does not go together is said in one line."""
    with pytest.raises(QuantizeError) as found:
        resolve(scheme, Options(**options))
    assert str(found.value).startswith(complaint) and "\n" not in str(found.value)
