"""What the model's activations look like on real text: Hessians for GPTQ, ranges of keys and values for the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

from dynamo_graph.initializers import sizes
from dynamo_graph.walk import attentions
from dynamo_graph.write import write_model
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.names import ATTENTION_MASK, INPUT_IDS, PAST, caches
from dynamo_runtime.providers import import_onnxruntime
from dynamo_runtime.session import Session

from .parts import Product

CHUNK_TOKENS = 256  # a pass: bounds the memory for activations


def hessians(bundle: Bundle, model: ir.Model, products: Sequence[Product], texts: Sequence[Sequence[int]]) -> Hessians:
    """Run the texts through the graph and sum what every product's inputs look like.

    Args:
        bundle: The bundle in full precision.
        model: Its graph; it has other outputs while this runs.
        products: Those wanted.
        texts: Token ids; each is cut to the bundle's context.
    """
    found = Hessians()
    inputs = {_input_name(product): product.node.inputs[0] for product in products}
    if not inputs:
        return found
    outputs = list(model.graph.outputs)
    with tempfile.TemporaryDirectory(prefix="dynamo-quantize-") as folder:
        try:  # onnxruntime computes whatever leads to an output
            model.graph.outputs[:] = [value for value in inputs.values() if value is not None]
            write_model(model, Path(folder) / bundle.graph)
        finally:
            model.graph.outputs[:] = outputs
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(Path(folder) / bundle.graph), options, providers=["CPUExecutionProvider"])
        chunk = min(CHUNK_TOKENS, bundle.context_length)
        pieces = [list(text[at : at + chunk]) for text in texts for at in range(0, len(text), chunk)]
        for piece in tqdm(pieces, desc="calibration", unit="pass", leave=False, disable=None):
            for name, activations in zip(inputs, session.run(list(inputs), _feed(bundle, piece)), strict=True):
                found.add(name, activations.reshape(-1, activations.shape[-1]))
    return found


class Hessians:
    """Σ x xᵀ over the inputs x of every product, by name of the activation that it reads."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, name: str, activations: np.ndarray) -> None:
        """Add activations [rows, K]."""
        product = activations.T @ activations
        self._sums[name] = product if name not in self._sums else self._sums[name] + product

    def of(self, product: Product) -> np.ndarray:
        """Return the sum for one product, [K, K]."""
        return self._sums[_input_name(product)]


def _input_name(product: Product) -> str:
    value = product.node.inputs[0]
    assert value is not None and value.name is not None
    return value.name


def _feed(bundle: Bundle, tokens: Sequence[int]) -> dict[str, np.ndarray]:
    """Return inputs for a pass of the base from an empty cache, with all rows."""
    length = len(tokens)
    cache = np.zeros((1, bundle.kv_heads, length, bundle.head_size), np.float32)
    feed: dict[str, np.ndarray] = {
        INPUT_IDS: np.array([tokens], np.int64),
        ATTENTION_MASK: np.ones((1, length), np.int64),
    }
    return feed | dict.fromkeys(caches(PAST, range(bundle.kv_layers)), cache)


Ranges = list[tuple[np.ndarray, np.ndarray]]
"""Largest magnitude of every channel of keys and of values, [kv_heads, head_size] each, by layer."""


def cache_ranges(
    bundle: Bundle, model: ir.Model, drafter: ir.Model | None, texts: Sequence[Sequence[int]]
) -> tuple[Ranges, Ranges]:
    """Return what keys and values look like in the base's layers, and in those of further heads.

    Two channels of a key that are rotated into each other both get the largest length of the pair: what the same key
    would reach at any position, those behind the end of the texts among them.

    Args:
        bundle: The bundle in full precision.
        model: Its graph.
        drafter: That of further heads.
        texts: Token ids; each is cut to the bundle's context.
    """
    session = Session(bundle, provider="cpu")

    def nothing(layers: int, kv_heads: int) -> Ranges:
        shape = kv_heads, bundle.head_size
        return [(np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in range(layers)]

    base, record = nothing(bundle.kv_layers, bundle.kv_heads), bundle.drafter
    heads = [] if record is None else nothing(record.kv_layers, record.kv_heads)
    for text in tqdm(texts, desc="cache ranges", unit="text", leave=False, disable=None):
        session.cache.reset()
        tokens = list(text[: session.max_length])
        for at in range(0, len(tokens), CHUNK_TOKENS):
            step = session.step(tokens[at : at + CHUNK_TOKENS])
        _widen(base, session.cache.buffers, len(tokens), _rotated(model))
        if drafter is not None and session.heads is not None:
            step.ahead()
            _widen(heads, session.heads.kv.buffers, len(tokens), _rotated(drafter))
    return base, heads


def _widen(ranges: Ranges, buffers: Sequence[tuple[np.ndarray, np.ndarray]], length: int, pairs: Pairs) -> None:
    """Have ranges cover what some caches hold at their first `length` positions."""
    for layer, (of_keys, of_values) in enumerate(ranges):
        keys, values = (np.abs(buffer[0, :, :length]) for buffer in buffers[layer])
        for one, other in pairs.get(layer, ()):
            keys[..., one] = keys[..., other] = np.hypot(keys[..., one], keys[..., other])
        np.maximum(of_keys, keys.max(axis=1), out=of_keys)
        np.maximum(of_values, values.max(axis=1), out=of_values)


Pairs = dict[int, list[tuple[int, int]]]
"""Pairs of channels that attention rotates into each other, by layer."""


def _rotated(model: ir.Model) -> Pairs:
    """Return pairs of channels that attention rotates into each other, by layer; none where it does not rotate."""
    found = {}
    for layer, node in attentions(model):
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        if not given.get("do_rotary"):
            continue
        cosines = node.inputs[7]
        assert cosines is not None
        half, interleaved = sizes(cosines)[1], given.get("rotary_interleaved")
        found[layer] = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    return found
