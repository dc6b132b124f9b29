"""Values that nobody expects, and files with some of them in it."""

from __future__ import annotations

import json
from random import Random
from typing import Any

EXTREMES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    10**30,
    0.0,
    1.5,
    -0.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "x" * 10_000,
    "\0",
    "\ud800",
    "a\nb\x1b[31m",
    "../secret.json",
    "/etc/passwd",
    "model.onnx",
    [],
    [0],
    [-1, 10**9],
    ["x"],
    [[[]]],
    {},
    {"x": 1},
    {"kind": "cp"},
)


def damage_json(rng: Random, content: Any) -> tuple[str, str]:
    """A JSON text with one value changed, and what was done."""
    places = list(_places(content))
    if not places:
        return json.dumps(rng.choice(EXTREMES)), "another value"
    # A vocabulary has thousands of places, and little else is interesting.
    shallow = [place for place in places if len(place) <= 3]
    path = rng.choice(shallow if shallow and rng.random() < 0.8 else places)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    old, key = parent[path[-1]], path[-1]
    how = rng.choice(("extreme", "extreme", "extreme", "near", "gone", "more", "nested", "twice"))
    name = "/".join(map(str, path))[:80]
    if how == "near" and isinstance(old, int | float):
        parent[key] = rng.choice((old + 1, old - 1, old * 2, -old, old * 1000, float(old), str(old)))
        return json.dumps(content), f"{name} from {old} to {parent[key]!r}"
    if how == "gone":
        del parent[key]
    elif how == "more" and isinstance(parent, dict):
        parent[rng.choice(("x", "", "__class__", "\ud800"))] = rng.choice(EXTREMES)
    elif how == "nested":
        parent[key] = "\1"
        depth = rng.choice((10, 1000, 100_000))
        return json.dumps(content).replace('"\\u0001"', "[" * depth + "]" * depth), f"{name} nested {depth} deep"
    elif how == "twice" and isinstance(parent, list):
        parent.append(old)
    else:
        parent[key] = rng.choice(EXTREMES)
        return json.dumps(content), f"{name} is {str(parent[key])[:40]!r}"
    return json.dumps(content), f"{name} {how}"


def _places(content: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield (*path, key)
            yield from _places(value, (*path, key))


def damage_bytes(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Bytes cut off, flipped, put in, or all gone, and what was done."""
    how = rng.choice(("cut", "flip", "flip", "zeros", "insert", "append", "empty", "front", "one bit"))
    at = rng.randrange(len(data) + 1)
    changed = bytearray(data)
    if how == "cut":
        return data[:at], f"cut at {at}"
    if how == "empty":
        return b"", "empty"
    if how == "append":
        return data + rng.randbytes(rng.choice((1, 100))), "something appended"
    if how == "front":
        return b"\xef\xbb\xbf" + data, "a byte-order mark in front"
    if how == "insert":
        changed[at:at] = rng.randbytes(rng.choice((1, 16)))
    elif how == "zeros":
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    elif data:
        for _ in range(1 if how == "one bit" else rng.choice((1, 8, 64))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed), f"{how} at {at}"
