"""From a graph to a smaller graph: every weight by the format of its part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from tqdm import tqdm

from dynamo_graph.passes import run_passes
from dynamo_graph.read import places, read_model
from dynamo_graph.write import Place, weight_bytes, write_model
from dynamo_runtime.bundle import Bundle

from .blocks import Blocks, Format, round_to_nearest
from .calibration import cache_ranges, hessians
from .errors import QuantizeError
from .gptq import gptq
from .parts import Product, find_drafter_products, find_products, output_product
from .passes import QuantizeCache, StoreBlocks, StoreDynamic, ToHalf
from .schemes import Part, Scheme

HESSIAN_SHARE, HESSIAN_BYTES = 0.4, 256 << 20  # held at once: of the weights' bytes, but at least so many
LEAST_OUTPUTS = 64  # a narrower product, as the gate of a joint head, is not worth its error
LEAST_BLOCK = 16


Stored = dict[Part, list[str]]
"""What the weights of every part are stored as."""


@dataclass(frozen=True)
class _Graph:
    """One graph, and what becomes of it.

    Attributes:
        model: The graph in full precision; changed when it is written.
        products: Its weights, and what they are to be stored as.
        ranges: Of its caches; empty where they stay as they are.
        path: The `.onnx` file to write.
    """

    model: ir.Model
    products: Sequence[tuple[Product, Format | None]]
    ranges: Sequence[tuple[np.ndarray, np.ndarray]]
    path: Path

    @property
    def jobs(self) -> list[tuple[Product, Format]]:
        """The weights that are stored smaller."""
        return [(product, form) for product, form in self.products if form is not None]

    def in_blocks(self, scheme: Scheme) -> list[tuple[Product, Format]]:
        """Return those of them that are stored in blocks."""
        return [job for job in self.jobs if job[0].is_lookup or not scheme.dynamic]


def write_graphs(
    bundle: Bundle, scheme: Scheme, folder: Path, graph: str, texts: list[list[int]], external: bool
) -> Stored:
    """Write the smaller graphs.

    Args:
        bundle: The bundle in full precision.
        scheme: From `resolve`.
        folder: Where to write them.
        graph: File name of the base's; that of the drafter stays.
        texts: Calibration text as tokens, where the scheme needs it.
        external: Whether the weights go into files of their own even if they would fit.
    """
    drafter = None if bundle.drafter is None else read_model(bundle.folder / bundle.drafter.graph)
    model = read_model(bundle.graph_path)
    ranges = cache_ranges(bundle, model, drafter, texts) if scheme.kv_cache == "int8" else ([], [])
    found = find_products(model, bundle.kv_layers)
    products = list(zip(found, _formats(found, scheme), strict=True))
    base = _Graph(model, products, ranges[0], folder / graph)
    blocks = _all_blocks(bundle, model, base.in_blocks(scheme), scheme, texts, {})
    _write(base, blocks, scheme, external)
    if drafter is not None and bundle.drafter is not None:
        of_base = {product.name: form for product, form in products if product.part in (Part.OUTPUT, Part.INPUT)}
        of_heads = _drafter_formats(find_drafter_products(drafter), scheme, of_base)
        heads = _Graph(drafter, of_heads, ranges[1], folder / bundle.drafter.graph)
        # Those of the base stay what they were fitted to there; the others are rounded to nearest.
        blocks = {key: those for key, those in blocks.items() if key[0] in of_base}
        blocks = _all_blocks(bundle, drafter, heads.in_blocks(scheme), scheme, (), blocks)
        _write(heads, blocks, scheme, external, places(folder / graph))
        products += [(product, form) for product, form in of_heads if product.name not in of_base]
    stored: dict[Part, set[str]] = {product.part: set() for product, _ in products}
    for product, form in products:
        stored[product.part].add(_described(form, scheme, product))
    return {part: sorted(names) for part, names in stored.items()}


def _write(
    graph: _Graph,
    blocks: Mapping[tuple[str, Format], Blocks],
    scheme: Scheme,
    external: bool,
    elsewhere: Mapping[str, Place] | None = None,
) -> None:
    """Write one smaller graph.

    Args:
        graph: What is written.
        blocks: Of every weight that is stored in such, by name and format.
        scheme: From `resolve`.
        external: See `write_graphs`.
        elsewhere: Where weights of the base's graph stand.
    """
    passes: list[ir.passes.PassBase] = [
        StoreBlocks(product, blocks[product.name, form]) if (product.name, form) in blocks else StoreDynamic(product)
        for product, form in graph.jobs
    ]
    passes.append(RemoveUnusedNodesPass())
    if graph.ranges:
        passes.append(QuantizeCache(graph.ranges))
    if scheme.activations == "fp16":
        passes.append(ToHalf(output_product(graph.model, [product for product, _ in graph.products])))
    run_passes(graph.model, passes)
    for part in graph.model.graphs():  # the weights that were replaced inside branches
        for name, value in list(part.initializers.items()):
            if not value.uses() and not value.is_graph_input():
                del part.initializers[name]
    write_model(graph.model, graph.path, external, elsewhere)


def _drafter_formats(
    products: Sequence[Product], scheme: Scheme, of_base: Mapping[str, Format | None]
) -> list[tuple[Product, Format | None]]:
    """Return what the weights of further heads are stored as; those of the base as they are there."""
    found = []
    for product in products:
        form = of_base.get(product.name, scheme.formats[Part.HEADS])
        found.append((product, None if product.outputs < LEAST_OUTPUTS else form))
    return found


def _formats(products: list[Product], scheme: Scheme) -> list[Format | None]:
    """Return the format of every product.

    A weight that is looked up and multiplied with is stored once, so the input embedding then follows the output's.
    """
    output = next(product for product in products if product.part is Part.OUTPUT)
    found = []
    for product in products:
        form = scheme.formats[product.part]
        tied = product.weight is output.weight
        if tied and product is not output:
            if product.part in scheme.given and form != scheme.formats[Part.OUTPUT]:
                raise QuantizeError("input and output embedding are one weight here and have the output's precision")
            form = scheme.formats[Part.OUTPUT]
        if product.outputs < LEAST_OUTPUTS:
            form = None
        elif form is not None and product.transposed:  # the look-up has no room for padding
            fitting = [size for size in _halves(form.block_size) if product.inputs % size == 0]
            form = replace(form, block_size=fitting[0]) if fitting else None
        found.append(form)
    return found


def _halves(block_size: int) -> list[int]:
    return [block_size >> i for i in range(block_size.bit_length()) if block_size >> i >= LEAST_BLOCK]


def _all_blocks(
    bundle: Bundle,
    model: ir.Model,
    jobs: list[tuple[Product, Format]],
    scheme: Scheme,
    texts: Sequence[list[int]],
    known: Mapping[tuple[str, Format], Blocks],
) -> dict[tuple[str, Format], Blocks]:
    """Return the blocks of every weight in every format that it is wanted in; some may be known."""
    made = dict(known)
    fits = scheme.algorithm == "gptq" and bool(texts)
    calibrated = [job for job in jobs if fits and job[1].bits == 4 and not job[0].is_lookup]
    with tqdm(total=len(jobs), desc="quantizing", unit="weight", leave=False, disable=None) as bar:
        for group in in_groups(calibrated, max(HESSIAN_BYTES, int(HESSIAN_SHARE * weight_bytes(model)))):
            sums = hessians(bundle, model, [product for product, _ in group], texts)
            for product, form in group:
                made[product.name, form] = gptq(product.matrix(), sums.of(product), form)
                bar.update()
        for product, form in jobs:  # a tied weight is rounded for its product
            if (product.name, form) not in made:
                made[product.name, form] = round_to_nearest(product.matrix(), form)
                bar.update()
    return made


def in_groups(jobs: Sequence[tuple[Product, Format]], limit: int) -> list[list[tuple[Product, Format]]]:
    """Cut jobs into runs whose Hessians fit into memory together; every run reads the calibration text once.

    Args:
        jobs: Products and their formats.
        limit: Most bytes of Hessians, which one alone may exceed.
    """
    groups: list[list[tuple[Product, Format]]] = []
    held = 0
    for product, form in jobs:
        needed = 4 * product.inputs**2
        held += needed
        if not groups or held > limit:
            groups.append([])
            held = needed
        groups[-1].append((product, form))
    return groups


def _described(form: Format | None, scheme: Scheme, product: Product) -> str:
    """Return a product's format in words."""
    if form is None:
        return scheme.activations
    if scheme.dynamic and not product.is_lookup:
        return "int8, by output"
    if form.bits == 8:
        return f"int8, blocks of {form.block_size}"
    algorithm = "rtn" if product.is_lookup or product.part is Part.HEADS else scheme.algorithm
    zero_points = "symmetric" if form.symmetric else "asymmetric"
    return f"int4, blocks of {form.block_size}, {zero_points}, {algorithm}"
