"""Do onnxruntime's kernels treat every row alike?  Results of passes over several rows against passes over one.

    python benchmarks/kernels.py

For products with weights in blocks (MatMulNBits) by bits, block size and accuracy level, and for attention
(GroupQueryAttention) by type of cache: the largest difference between passes over 2, 3, 4 and 6 rows and passes over
one, relative to the largest result, and microseconds of a pass over one row (of attention, behind 512 others), medians.
A type that the CPU provider has no kernel for says so.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import numpy as np
import onnx
from machine import describe_machine
from onnx import TensorProto, helper, numpy_helper

from dynamo_quantize.blocks import Format, round_to_nearest
from dynamo_runtime.providers import import_onnxruntime

ROWS, WIDTHS, PAST, REPEATS = 24, (2, 3, 4, 6), 512, 200
HEADS, HEAD_SIZE = 12, 64
NUMPY: dict[int, Any] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.INT8: np.int8}


def make_session(
    node: onnx.NodeProto, inputs: list[Any], outputs: dict[str, int], weights: dict[str, np.ndarray]
) -> Any:
    """Return a session of one node."""
    graph = helper.make_graph(
        [node],
        "kernel",
        inputs,
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def product(form: Format, accuracy_level: int, k: int = 768, n: int = 2304) -> tuple[float, float]:
    """Difference and microseconds of a product with a weight in blocks."""
    rng = np.random.default_rng(0)
    blocks = round_to_nearest(rng.normal(size=(k, n)).astype(np.float32), form)
    weights = {"q": blocks.packed, "scales": blocks.scales}
    attributes: dict[str, Any] = {
        "K": k,
        "N": n,
        "bits": form.bits,
        "block_size": form.block_size,
        "accuracy_level": accuracy_level,
    }
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", **attributes)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", k])]
    session = make_session(node, inputs, {"y": TensorProto.FLOAT}, weights)
    x = rng.normal(size=(1, ROWS, k)).astype(np.float32)

    def run(width: int) -> np.ndarray:
        parts = [session.run(None, {"x": x[:, at : at + width]})[0] for at in range(0, ROWS, width)]
        return np.concatenate(parts, axis=1)

    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        session.run(None, {"x": x[:, :1]})
        times.append(time.perf_counter() - started)
    return difference(run), statistics.median(times) * 1e6


def attention(cache: int, activations: int) -> tuple[float, float]:
    """Difference and microseconds of attention with some type of cache."""
    rng = np.random.default_rng(0)
    value = helper.make_tensor_value_info
    caches = [value(name, cache, [1, HEADS, 1024, HEAD_SIZE]) for name in ("past_key", "past_value")]
    inputs = [value("qkv", activations, [1, "rows", 3 * HEADS * HEAD_SIZE]), *caches]
    inputs += [value("length", TensorProto.INT32, [1]), value("total", TensorProto.INT32, [])]
    names, weights = ["qkv", "", "", "past_key", "past_value", "length", "total"], {}
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": HEADS}
    if cache == TensorProto.INT8:
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        weights = dict.fromkeys(("k_scale", "v_scale"), np.full((1, HEADS, 1, HEAD_SIZE), 4 / 127, np.float32))
        names += ["", "", "", "", "", *weights]
    node = helper.make_node("GroupQueryAttention", names, ["y", "key", "value"], domain="com.microsoft", **attributes)
    session = make_session(node, inputs, {"y": activations, "key": cache, "value": cache}, weights)
    kind, held = NUMPY[activations], NUMPY[cache]
    x = rng.normal(size=(1, PAST + ROWS, 3 * HEADS * HEAD_SIZE)).astype(kind)

    def run(width: int, times: list[float] | None = None) -> np.ndarray:
        buffers = [np.zeros((1, HEADS, 1024, HEAD_SIZE), held) for _ in range(2)]
        parts, at = [], 0
        for rows in [PAST, *[width] * (ROWS // width)]:
            binding = session.io_binding()
            feed = np.ascontiguousarray(x[:, at : at + rows])
            at += rows
            binding.bind_cpu_input("qkv", feed)
            binding.bind_cpu_input("length", np.array([at - 1], np.int32))
            binding.bind_cpu_input("total", np.array(at, np.int32))
            for past, present, buffer in zip(("past_key", "past_value"), ("key", "value"), buffers, strict=True):
                binding.bind_input(past, "cpu", 0, held, buffer.shape, buffer.ctypes.data)
                binding.bind_output(present, "cpu", 0, held, buffer.shape, buffer.ctypes.data)
            binding.bind_output("y")
            started = time.perf_counter()
            session.run_with_iobinding(binding)
            if times is not None and rows == 1:
                times.append(time.perf_counter() - started)
            parts.append(next(out for out in binding.copy_outputs_to_cpu() if out.ndim == 3))
        return np.concatenate(parts[1:], axis=1).astype(np.float32)

    times: list[float] = []
    for _ in range(REPEATS // ROWS + 1):
        run(1, times)
    return difference(run), statistics.median(times) * 1e6


def difference(run: Any) -> float:
    """Largest difference between passes over several rows and passes over one, relative to the largest result."""
    single = run(1)
    return max(float(np.abs(run(width) - single).max()) for width in WIDTHS) / float(np.abs(single).max())


def main() -> None:
    """Run the benchmark and print its tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| product of 768 × 2304 | accuracy level | difference | µs, 1 row |\n|---|---|---|---|")
    for bits in (8, 4):
        for level, sizes in ((4, (16, 32, 64, 128)), (1, (32,))):
            for size in sizes:
                found, micros = product(Format(bits, size), level)
                print(f"| {bits} bits, blocks of {size} | {level} | {found:.1e} | {micros:.0f} |")
    print("\n| attention, 12 heads of 64 | difference | µs, 1 row |\n|---|---|---|")
    for name, cache, activations in (
        ("fp32", TensorProto.FLOAT, TensorProto.FLOAT),
        ("int8 cache by channel, fp32 activations", TensorProto.INT8, TensorProto.FLOAT),
        ("fp16 cache, fp32 activations", TensorProto.FLOAT16, TensorProto.FLOAT),
        ("fp16", TensorProto.FLOAT16, TensorProto.FLOAT16),
        ("bf16", TensorProto.BFLOAT16, TensorProto.BFLOAT16),
    ):
        try:
            found, micros = attention(cache, activations)
            print(f"| {name} | {found:.1e} | {micros:.0f} |")
        except Exception as error:  # onnxruntime raises many classes that share no base
            if "Could not find an implementation" not in str(error):
                raise
            print(f"| {name} | no kernel | |")
    machine = (
        f"{describe_machine()}; onnxruntime {import_onnxruntime().__version__}, Python {platform.python_version()}"
    )
    print(f"\n{machine}.")


if __name__ == "__main__":
    main()
