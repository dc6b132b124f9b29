"""From a graph to a smaller graph: every weight by the format of its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from tqdm import tqdm

from dynamo_graph.passes import FoldHeads, run_passes
from dynamo_graph.read import read_model
from dynamo_graph.write import weight_bytes, write_model
from dynamo_runtime.bundle import Bundle

from .blocks import Blocks, Format, round_to_nearest
from .calibration import cache_ranges, hessians
from .errors import QuantizeError
from .gptq import gptq
from .parts import Product, find_products
from .passes import QuantizeCache, StoreBlocks, StoreDynamic, ToHalf
from .schemes import Part, Scheme

HESSIAN_SHARE, HESSIAN_BYTES = 0.4, 256 << 20  # held at once: of the weights' bytes, but at least so many
LEAST_OUTPUTS = 64  # a narrower product, as the gate of a joint head, is not worth its error
LEAST_BLOCK = 16


def write_graph(
    bundle: Bundle, scheme: Scheme, path: Path, texts: list[list[int]], external: bool
) -> dict[Part, list[str]]:
    """Writes the smaller graph.

    Args:
        bundle: The bundle in full precision.
        scheme: From `resolve`.
        path: The `.onnx` file to write.
        texts: Calibration text as tokens, where the scheme needs it.
        external: Whether the weights go into a file of their own even if they would fit.

    Returns:
        What the weights of every part are stored as.
    """
    model = read_model(bundle.graph_path)
    ranges = cache_ranges(bundle, model, texts) if scheme.kv_cache == "int8" else None
    products = find_products(model, bundle.kv_layers)
    formats = _formats(products, scheme)
    jobs = [(product, form) for product, form in zip(products, formats, strict=True) if form is not None]
    made = _all_blocks(bundle, model, [job for job in jobs if job[0].is_lookup or not scheme.dynamic], scheme, texts)
    passes: list[ir.passes.PassBase] = [
        StoreBlocks(product, made[product.name, form]) if (product.name, form) in made else StoreDynamic(product)
        for product, form in jobs
    ]
    passes.append(RemoveUnusedNodesPass())
    if ranges is not None:
        passes.append(QuantizeCache(ranges))
    if scheme.activations == "fp16":
        passes.append(ToHalf(next(product for product in products if product.part is Part.OUTPUT)))
    passes.append(FoldHeads())
    run_passes(model, passes)
    write_model(model, path, external)
    stored: dict[Part, set[str]] = {product.part: set() for product in products}
    for product, form in zip(products, formats, strict=True):
        stored[product.part].add(_described(form, scheme, product))
    return {part: sorted(names) for part, names in stored.items()}


def _formats(products: list[Product], scheme: Scheme) -> list[Format | None]:
    """The format of every product.

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
    bundle: Bundle, model: ir.Model, jobs: list[tuple[Product, Format]], scheme: Scheme, texts: list[list[int]]
) -> dict[tuple[str, Format], Blocks]:
    """The blocks of every weight in every format that it is wanted in."""
    made: dict[tuple[str, Format], Blocks] = {}
    calibrated = [job for job in jobs if scheme.algorithm == "gptq" and job[1].bits == 4 and not job[0].is_lookup]
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
    """Cuts jobs into runs whose Hessians fit into memory together; every run reads the calibration text once.

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
    """A product's format in words."""
    if form is None:
        return scheme.activations
    if scheme.dynamic and not product.is_lookup:
        return "int8, by output"
    if form.bits == 8:
        return f"int8, blocks of {form.block_size}"
    algorithm = "rtn" if product.is_lookup else scheme.algorithm
    zero_points = "symmetric" if form.symmetric else "asymmetric"
    return f"int4, blocks of {form.block_size}, {zero_points}, {algorithm}"
