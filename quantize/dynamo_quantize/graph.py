"""From a graph to a smaller graph: every weight by the format of its part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

from dynamo_runtime.bundle import Bundle

from .blocks import Blocks, Format, k_quant, round_to_nearest
from .calibration import Hessians, cache_ranges, hessians
from .dynamic import quantize_dynamically, untie
from .errors import QuantizeError
from .gptq import gptq
from .half import to_half
from .kv_cache import quantize_cache
from .nbits import CONTRIB, put_blocks
from .parts import Product, find_products
from .schemes import Part, Scheme
from .weights import drop_unused, sizes
from .write import EMBED_LIMIT_BYTES, weight_bytes, write_model

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
    model = ir.load(bundle.graph_path)
    model.opset_imports.setdefault(CONTRIB, 1)
    products = find_products(model, bundle.kv_layers)
    formats = _formats(products, scheme)
    ranges = cache_ranges(bundle, texts) if scheme.kv_cache == "int8" else None
    sums = None
    if scheme.algorithm == "gptq":
        four = [p for p, form in zip(products, formats, strict=True) if form and form.bits == 4 and not p.is_lookup]
        sums = hessians(bundle, model, four, texts)
    if scheme.dynamic:
        products = untie(model, products)
    _put_weights(model, products, formats, scheme, sums)
    drop_unused(model)
    if ranges is not None:
        quantize_cache(model, ranges)
    if scheme.activations == "fp16":
        to_half(model, products)
    if scheme.dynamic:
        chosen = [p.node for p, form in zip(products, formats, strict=True) if form and not p.is_lookup]
        _write_dynamic(model, path, [node.name for node in chosen if node.name], external)
    else:
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
        rows, columns = sizes(product.weight)
        if (rows if product.transposed else columns) < LEAST_OUTPUTS:
            form = None
        elif form is not None and product.transposed:  # the look-up has no room for padding
            form = next(
                (Format(form.bits, size, form.symmetric) for size in _halves(form.block_size) if columns % size == 0),
                None,
            )
        found.append(form)
    return found


def _halves(block_size: int) -> list[int]:
    return [block_size >> i for i in range(block_size.bit_length()) if block_size >> i >= LEAST_BLOCK]


def _put_weights(
    model: ir.Model, products: list[Product], formats: list[Format | None], scheme: Scheme, sums: Hessians | None
) -> None:
    """Replaces every product that has a format, but those which onnxruntime's dynamic quantizer will replace."""
    jobs = [
        (p, form) for p, form in zip(products, formats, strict=True) if form and (p.is_lookup or not scheme.dynamic)
    ]
    jobs.sort(key=lambda job: job[0].is_lookup)  # a tied weight is rounded for its product
    done: dict[tuple[str, Format], Blocks] = {}
    for product, form in tqdm(jobs, desc="quantizing", unit="weight", leave=False, disable=None):
        key = product.name, form
        if key not in done:
            assert product.weight.const_value is not None
            weight = product.weight.const_value.numpy()
            done[key] = _quantizer(product, form, scheme, sums)(weight.T if product.transposed else weight, form=form)
        put_blocks(model, product, done[key])


def _quantizer(product: Product, form: Format, scheme: Scheme, sums: Hessians | None) -> Callable[..., Blocks]:
    """What finds the numbers of one weight."""
    if form.bits == 8 or scheme.algorithm == "rtn":
        return round_to_nearest
    if scheme.algorithm == "k-quant":
        return k_quant
    if sums is None or product.is_lookup:  # every input of a look-up counts alike
        return partial(gptq, hessian=np.eye(sizes(product.weight)[1]))
    return partial(gptq, hessian=sums.of(product))


def _write_dynamic(model: ir.Model, path: Path, names: list[str], external: bool) -> None:
    """Writes a graph of which some products are quantized dynamically."""
    full = path.with_name("fp32.onnx")
    external = external or weight_bytes(model) / 4 > EMBED_LIMIT_BYTES
    files = write_model(model, full, external)
    quantize_dynamically(full, path, names, external)
    for file in files:
        file.unlink()


def _described(form: Format | None, scheme: Scheme, product: Product) -> str:
    """A product's format in words."""
    if form is None:
        return scheme.activations
    if scheme.dynamic and not product.is_lookup:
        return "int8, by output"
    if form.bits == 8:
        return f"int8, blocks of {form.block_size}"
    return f"int4, blocks of {form.block_size}, {'symmetric' if form.symmetric else 'asymmetric'}, {scheme.algorithm}"
