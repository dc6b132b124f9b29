"""What the calibration text tells: ranges of keys and values, and Hessians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.naive import graph_paths

from dynamo_graph.read import read_model
from dynamo_quantize.blocks import Format
from dynamo_quantize.calibration import cache_ranges, hessians
from dynamo_quantize.graph import in_groups
from dynamo_quantize.parts import find_products
from dynamo_quantize.schemes import Part
from dynamo_runtime.session import Session

RNG = np.random.default_rng(3)
TEXT, OTHER = RNG.integers(1, 320, 12).tolist(), RNG.integers(1, 320, 60).tolist()


@pytest.mark.parametrize("name", ["plain", "parallel"])
def test_ranges_hold_at_every_position(name: str, export: Callable[[str], Any]) -> None:
    """Keys of the first layer are tokens, rotated by where they stand: elsewhere they stay within their range."""
    bundle = export(name).bundle
    keys, values = cache_ranges(bundle, read_model(bundle.graph_path), None, [TEXT])[0][0]
    session = Session(bundle, provider="cpu")
    beyond = 0.0
    for before in range(0, 60, 5):
        session.cache.reset()
        session.step([*OTHER[:before], *TEXT])
        here = [np.abs(buffer[0, :, before : before + len(TEXT)]).max(axis=1) for buffer in session.cache.buffers[0]]
        assert (here[0] <= keys * 1.0001).all()
        np.testing.assert_allclose(here[1], values, rtol=1e-4)
        if before == 0:
            first = here[0]
        beyond = max(beyond, float((here[0] / first).max()))
    assert beyond > 1.2, "at other positions some channels reach further than in the text itself"


@pytest.mark.parametrize("name", ["parallel", "conditioned"])
def test_ranges_of_the_heads_caches(name: str, export: Callable[[str], Any]) -> None:
    """Found by running the heads over the same texts; one for each of their caches, with all heads in it."""
    bundle = export(name).bundle
    graphs = [read_model(path) for path in graph_paths(bundle)]
    heads = cache_ranges(bundle, *graphs, [TEXT, OTHER])[1]
    session = Session(bundle, provider="cpu")
    record = bundle.drafter
    assert record is not None and (record.kv_layers, record.kv_heads) == (1, bundle.topology.layers * bundle.kv_heads)
    largest = np.zeros((record.kv_layers, record.kv_heads, bundle.head_size))
    for text in (TEXT, OTHER):
        session.cache.reset()
        session.step(text).ahead()
        assert session.heads is not None
        values = [np.abs(pair[1][0, :, : len(text)]).max(axis=1) for pair in session.heads.kv.buffers]
        largest = np.maximum(largest, values)
    for (keys, values), expected in zip(heads, largest, strict=True):
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        assert (keys > 0).all()


def test_hessians_in_groups(export: Callable[[str], Any]) -> None:
    """Groups hold no more than they may, lose nothing, and give the sums that one run over all gives."""
    bundle = export("parallel").bundle
    model = read_model(bundle.graph_path)
    products = [p for p in find_products(model, bundle.kv_layers) if not p.is_lookup and p.part is not Part.OUTPUT]
    whole = hessians(bundle, model, products, [TEXT, OTHER])
    groups = in_groups([(product, Format(4)) for product in products], 4 * 96**2 + 1)
    assert len(groups) > 2
    assert [product for group in groups for product, _ in group] == products
    for group in groups[:3]:
        found = hessians(bundle, model, [product for product, _ in group], [TEXT, OTHER])
        for product, _ in group:
            np.testing.assert_allclose(found.of(product), whole.of(product), rtol=1e-5, atol=1e-4)
