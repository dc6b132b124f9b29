"""From a graph to a smaller graph: every weight by the format of its part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

from dynamo_graph.branches import fold_heads
from dynamo_graph.initializers import drop_unused, sizes
from dynamo_graph.read import read_model
from dynamo_graph.write import weight_bytes, write_model
from dynamo_runtime.bundle import Bundle

from .blocks import Blocks, Format, round_to_nearest
from .calibration import cache_ranges, hessians
from .errors import QuantizeError
from .gptq import gptq
from .parts import Product, find_products
from .passes.quantize_cache import quantize_cache
from .passes.store_blocks import CONTRIB, put_blocks
from .passes.store_dynamic import put_dynamic
from .passes.to_half import to_half
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
    model.opset_imports.setdefault(CONTRIB, 1)
    products = find_products(model, bundle.kv_layers)
    formats = _formats(products, scheme)
    jobs = [(product, form) for product, form in zip(products, formats, strict=True) if form is not None]
    blocks = _all_blocks(bundle, model, [job for job in jobs if job[0].is_lookup or not scheme.dynamic], scheme, texts)
    for product, chosen in jobs:
        if (product.name, chosen) in blocks:
            put_blocks(model, product, blocks[product.name, chosen])
        else:
            put_dynamic(model, product)
    drop_unused(model)
    if ranges is not None:
        quantize_cache(model, ranges)
    if scheme.activations == "fp16":
        to_half(model, products)
    fold_heads(model)
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
        inputs, outputs = _matrix_shape(product)
        if outputs < LEAST_OUTPUTS:
            form = None
        elif form is not None and product.transposed:  # the look-up has no room for padding
            fitting = [size for size in _halves(form.block_size) if inputs % size == 0]
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
        for group in _groups(calibrated, weight_bytes(model)):
            sums = hessians(bundle, model, [product for product, _ in group], texts)
            for product, form in group:
                made[product.name, form] = gptq(_matrix(product), sums.of(product), form)
                bar.update()
        for product, form in jobs:  # a tied weight is rounded for its product
            if (product.name, form) not in made:
                made[product.name, form] = round_to_nearest(_matrix(product), form)
                bar.update()
    return made


def _groups(jobs: list[tuple[Product, Format]], weights: int) -> list[list[tuple[Product, Format]]]:
    """Cuts jobs into runs whose Hessians fit into memory together; every run reads the calibration text once."""
    limit = max(HESSIAN_BYTES, int(HESSIAN_SHARE * weights))
    groups: list[list[tuple[Product, Format]]] = []
    held = 0
    for job in jobs:
        inputs = _matrix_shape(job[0])[0]
        held += 4 * inputs**2
        if not groups or held > limit:
            groups.append([])
            held = 4 * inputs**2
        groups[-1].append(job)
    return groups


def _matrix_shape(product: Product) -> tuple[int, int]:
    """Inputs K and outputs N."""
    rows, columns = sizes(product.weight)
    return (columns, rows) if product.transposed else (rows, columns)


def _matrix(product: Product) -> np.ndarray:
    """The weight [K, N]."""
    assert product.weight.const_value is not None
    weight = product.weight.const_value.numpy()
    return weight.T if product.transposed else weight


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
