"""Graphs of nothing but a bundle's attentions, or nothing but its products: what rows cost in kernels alone.

Used by rows.py.  Every layer has caches and weights of its own, of random numbers, so that they come from memory as
they do in a pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from dynamo_quantize.blocks import Format
from dynamo_runtime.loading import huge_pages, untiled_attention
from dynamo_runtime.providers import import_onnxruntime

FLOAT, HALF, INT8, UINT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8
NUMPY: dict[int, Any] = {FLOAT: np.float32, HALF: np.float16, INT8: np.int8, UINT8: np.uint8}
EXACT_ROWS = 8
DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Shapes:
    """What a bundle's base graph consists of.

    Attributes:
        layers: Attentions.
        heads: Of queries.
        kv_heads: Of keys and values.
        head_size: Channels of a head.
        products: Of every product with weights in blocks (input, K inputs, N outputs); the output embedding last.
    """

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    products: tuple[tuple[str, int, int], ...]

    @classmethod
    def read(cls, path: str) -> Shapes:
        """Return the shapes of a graph whose products are in blocks."""
        nodes = onnx.load(path, load_external_data=False).graph.node
        attributes = {
            kind: [
                {each.name: helper.get_attribute_value(each) for each in node.attribute} | {"input": node.input[0]}
                for node in nodes
                if node.op_type == kind
            ]
            for kind in ("GroupQueryAttention", "MatMulNBits")
        }
        attentions, products = attributes.values()
        first, packed = attentions[0], products[0]
        heads, kv_heads = first["num_heads"], first["kv_num_heads"]
        return cls(
            len(attentions),
            heads,
            kv_heads,
            packed["N"] // (heads + 2 * kv_heads),
            tuple((each["input"], each["K"], each["N"]) for each in products),
        )


class Kernels:
    """A session of some nodes, and buffers that its passes read and write."""

    def __init__(
        self,
        nodes: Iterable[NodeProto],
        weights: dict[str, np.ndarray],
        inputs: list[ValueInfoProto],
        outputs: dict[str, int],
        *,
        threads: int,
        tiled: bool = False,
    ):
        """Load it, with huge pages as far as there are any."""
        graph = helper.make_graph(
            list(nodes),
            "kernels",
            inputs,
            [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with nullcontext() if tiled else untiled_attention(), huge_pages():
            self.session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        self.outputs = list(outputs)

    def bind(self, feeds: dict[str, np.ndarray], caches: dict[str, tuple[str, np.ndarray]] | None = None) -> Any:
        """Return a binding; `caches` are written where they are read, by input: the output's name and the buffer."""
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        caches = caches or {}
        for name, (present, buffer) in caches.items():
            place = "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data
            binding.bind_input(name, *place)
            binding.bind_output(present, *place)
        written = {present for present, _ in caches.values()}
        for name in self.outputs:
            if name not in written:
                binding.bind_output(name)
        binding.kept = feeds  # onnxruntime reads them where they are
        return binding


@dataclass(frozen=True)
class Attention:
    """A way to attend.

    Attributes:
        name: In the table.
        cache: Type of keys and values.
        activations: Type of queries and results.
        channels: Whether the cache's scales are those of channels, rather than one.
        bits: Of the cache's numbers, if they have scales.
        tiled: Whether onnxruntime may use tiles.
        op: "GroupQueryAttention", or ONNX's own "Attention".
        grouping: "": as a pass has it.  "rows as heads": one row of m times as many heads, "heads as rows": the heads
            of a group as further rows of one.  What these would cost at least; masks, rotations, and how keys are
            written, are left out.
    """

    name: str
    cache: int = FLOAT
    activations: int = FLOAT
    channels: bool = True
    bits: int = 0
    tiled: bool = False
    op: str = "GroupQueryAttention"
    grouping: str = ""


ATTENTIONS = (
    Attention("int8 cache, tiled", INT8, bits=8, tiled=True),
    Attention("int8 cache", INT8, bits=8),
    Attention("int8 cache, one scale", INT8, channels=False, bits=8),
    Attention("int8 cache, rows as heads", INT8, bits=8, grouping="rows as heads"),
    Attention("int4 cache", UINT8, bits=4),
    Attention("fp32 cache, tiled", tiled=True),
    Attention("fp32 cache"),
    Attention("fp32 cache, heads as rows", grouping="heads as rows"),
    Attention("fp16 cache, fp32 activations", HALF),
    Attention("all in fp16", HALF, HALF),
    Attention("ONNX Attention, fp32", op="Attention"),
)


class Attentions:
    """All attentions of a model in one graph."""

    def __init__(self, shapes: Shapes, way: Attention, rows: int, capacity: int, threads: int):
        """For passes over `rows` rows (and, unless the way groups them, any other number)."""
        self.shapes, self.way, self.capacity = shapes, way, capacity
        self.heads, self.rows = shapes.heads, rows
        if way.grouping == "rows as heads":
            self.heads, self.rows = rows * shapes.heads, 1
        elif way.grouping == "heads as rows":
            self.heads, self.rows = shapes.kv_heads, rows * shapes.heads // shapes.kv_heads
        self.width = (self.heads + 2 * shapes.kv_heads) * shapes.head_size
        rng = np.random.default_rng(0)
        kind = NUMPY[way.activations]
        self.x = rng.normal(size=(1, max(self.rows, EXACT_ROWS), self.width)).astype(kind)
        size = shapes.head_size // 2 if way.bits == 4 else shapes.head_size
        self.held = (1, shapes.kv_heads, capacity, size)
        build = self._onnx if way.op == "Attention" else self._grouped
        nodes, weights, inputs, outputs = build()
        self.kernels = Kernels(nodes, weights, inputs, outputs, threads=threads, tiled=way.tiled)
        self.buffers = {
            f"{each}{layer}": rng.integers(-100, 100, self.held).astype(np.int8).view(NUMPY[way.cache])
            if way.bits
            else rng.normal(size=self.held).astype(NUMPY[way.cache])
            for layer in range(shapes.layers)
            for each in ("key", "value")
        }

    def _made(self, layer: int) -> dict[str, int]:
        """Return outputs of a node, with their types."""
        held = {f"present.{each}{layer}": self.way.cache for each in ("key", "value")}
        return {f"y{layer}": self.way.activations} | held

    def _grouped(self) -> tuple[list[NodeProto], dict[str, np.ndarray], list[ValueInfoProto], dict[str, int]]:
        way, shapes, value = self.way, self.shapes, helper.make_tensor_value_info
        attributes: dict[str, Any] = {"num_heads": self.heads, "kv_num_heads": shapes.kv_heads, "do_rotary": 1}
        pairs = shapes.head_size // 2
        angles = np.arange(self.capacity)[:, None] * 10000.0 ** (-np.arange(pairs) / pairs)
        weights = {"cos": np.cos(angles), "sin": np.sin(angles)}
        weights = {name: array.astype(NUMPY[way.activations]) for name, array in weights.items()}
        scales = []
        if way.bits:
            kind = "PER_CHANNEL" if way.channels else "PER_TENSOR"
            attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": way.bits}
            shape = (1, shapes.kv_heads, 1, shapes.head_size) if way.channels else (1,)
            weights |= dict.fromkeys(("k_scale", "v_scale"), np.full(shape, 4 / 127, np.float32))
            scales = ["", "", "", "k_scale", "v_scale"]
        inputs = [value("qkv", way.activations, [1, "rows", self.width])]
        inputs += [value("length", TensorProto.INT32, [1]), value("total", TensorProto.INT32, [])]
        nodes: list[NodeProto] = []
        outputs: dict[str, int] = {}
        for layer in range(shapes.layers):
            given = ["qkv", "", "", f"key{layer}", f"value{layer}", "length", "total", "cos", "sin", *scales]
            made = self._made(layer)
            nodes.append(helper.make_node("GroupQueryAttention", given, list(made), domain=DOMAIN, **attributes))
            inputs += [value(f"{each}{layer}", way.cache, self.held) for each in ("key", "value")]
            outputs |= made
        return nodes, weights, inputs, outputs

    def _onnx(self) -> tuple[list[NodeProto], dict[str, np.ndarray], list[ValueInfoProto], dict[str, int]]:
        """Causal, by the operator of opset 23, whose cache is as long as the past and is copied by every pass."""
        way, shapes, value = self.way, self.shapes, helper.make_tensor_value_info
        sizes = [self.heads * shapes.head_size, *[shapes.kv_heads * shapes.head_size] * 2]
        weights = {"sizes": np.array(sizes, np.int64)}
        inputs = [value("qkv", way.activations, [1, "rows", self.width])]
        nodes = [helper.make_node("Split", ["qkv", "sizes"], ["q", "k", "v"], axis=2)]
        outputs: dict[str, int] = {}
        for layer in range(shapes.layers):
            made = self._made(layer)
            given = ["q", "k", "v", "", f"key{layer}", f"value{layer}"]
            attributes: dict[str, Any] = {"q_num_heads": self.heads, "kv_num_heads": shapes.kv_heads, "is_causal": 1}
            nodes.append(helper.make_node("Attention", given, list(made), **attributes))
            held: list[int | str | None] = [1, shapes.kv_heads, "past", shapes.head_size]
            inputs += [value(f"{each}{layer}", way.cache, held) for each in ("key", "value")]
            outputs |= made
        return nodes, weights, inputs, outputs

    def bind(self, past: int, first: int, rows: int) -> Any:
        """Return a pass over some of the rows of `x` behind `past` positions."""
        feeds = {"qkv": np.ascontiguousarray(self.x[:, first : first + rows])}
        if self.way.op == "Attention":
            return self.kernels.bind(feeds | {name: array[:, :, :past].copy() for name, array in self.buffers.items()})
        feeds |= {"length": np.array([past + rows - 1], np.int32), "total": np.array(past + rows, np.int32)}
        return self.kernels.bind(feeds, {name: (f"present.{name}", array) for name, array in self.buffers.items()})

    def difference(self, past: int) -> float | None:
        """Largest difference between passes over several rows and passes over one; None if rows are grouped."""
        if self.way.grouping or self.way.op == "Attention":  # the latter's caches are new with every pass
            return None

        def run(width: int) -> np.ndarray:
            parts = []
            for at in range(0, EXACT_ROWS, width):
                binding = self.bind(past + at, at, min(width, EXACT_ROWS - at))
                self.kernels.session.run_with_iobinding(binding)
                parts.append(np.stack([each for each in binding.copy_outputs_to_cpu() if each.ndim == 3]))
            return np.concatenate(parts, axis=2).astype(np.float32)

        single = run(1)
        return max(float(np.abs(run(width) - single).max()) for width in range(2, EXACT_ROWS + 1))


@dataclass(frozen=True)
class Product:
    """A way to store the weights of products.

    Attributes:
        name: In the table.
        form: Blocks, or None.
        static: Types of activations and weights where activations have a fixed scale and every output has one.
        dynamic: Whether a tensor's activations share a scale that is found at run time.
        merged: Whether products of one input are one.
    """

    name: str
    form: Format | None = None
    static: tuple[int, int] | None = None
    dynamic: bool = False
    merged: bool = False


PRODUCTS = (
    Product("int8, blocks of 64", Format(8, 64)),
    Product("int8, blocks of 32", Format(8, 32)),
    Product("int8, blocks of 128", Format(8, 128)),
    Product("int8, blocks of 64, one product an input", Format(8, 64), merged=True),
    Product("int8, fixed scales, u8 · s8", static=(UINT8, INT8)),
    Product("int8, fixed scales, u8 · u8", static=(UINT8, UINT8)),
    Product("int8, fixed scales, s8 · s8", static=(INT8, INT8)),
    Product("int8-dynamic", dynamic=True),
    Product("int4, blocks of 16", Format(4, 16)),
    Product("int4, blocks of 32", Format(4, 32)),
    Product("int4, blocks of 64", Format(4, 64)),
    Product("int4, blocks of 128", Format(4, 128)),
    Product("int4, blocks of 32, asymmetric", Format(4, 32, symmetric=False)),
    Product("int4, blocks of 64, asymmetric", Format(4, 64, symmetric=False)),
)


class Products:
    """All products of a model in one graph, none waiting for another."""

    def __init__(self, shapes: Shapes, way: Product, threads: int):
        """Weights are random; where others have 4 bits the output embedding has 8, in blocks of 64."""
        self.rng = np.random.default_rng(0)
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        products: list[tuple[str, int, int]] = []
        for source, k, n in shapes.products:
            if way.merged and products and products[-1][0] == source:
                products[-1] = (source, k, products[-1][2] + n)
            else:
                products.append((source, k, n))
        quantized: dict[str, str] = {}
        for number, (source, k, n) in enumerate(products):
            name, given = f"y{number}", f"x{k}"
            if way.form is not None:
                last = number == len(products) - 1 and way.form.bits == 4
                self._blocks(name, given, k, n, Format(8, 64) if last else way.form)
            elif way.dynamic:
                self.weights |= {f"{name}.w": self._integers(INT8, (k, n)), f"{name}.s": self._scales((n,))}
                self._node("DynamicQuantizeMatMul", [given, f"{name}.w", f"{name}.s"], name)
            else:
                assert way.static is not None
                self._static(name, given, source, (k, n), way.static, quantized)
        inputs = [
            helper.make_tensor_value_info(f"x{k}", FLOAT, [1, "rows", k]) for k in sorted({k for _, k, _ in products})
        ]
        outputs: dict[str, int] = {f"y{number}": FLOAT for number in range(len(products))}
        self.x = {each.name: self.rng.normal(size=(1, EXACT_ROWS, int(each.name[1:]))) for each in inputs}
        self.kernels = Kernels(self.nodes, self.weights, inputs, outputs, threads=threads)
        self.weights.clear()

    def _integers(self, dtype: int, shape: tuple[int, ...]) -> np.ndarray:
        """Of 8 bits, around zero or, if they have no sign, around 128."""
        low = self.rng.integers(-127, 128, shape, dtype=np.int8)
        return low if dtype == INT8 else (low.view(np.uint8) ^ 128)

    def _scales(self, shape: tuple[int, ...]) -> np.ndarray:
        return ((self.rng.random(shape, np.float32) + 0.5) / 100).astype(np.float32)

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        domain = "" if kind == "QuantizeLinear" else DOMAIN
        self.nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))

    def _blocks(self, name: str, given: str, k: int, n: int, form: Format) -> None:
        blocks = -(-k // form.block_size)
        made = {"q": self.rng.integers(0, 256, (n, blocks, form.block_size * form.bits // 8), np.uint8)}
        made["s"] = self._scales((n, blocks))
        if not form.symmetric:
            made["z"] = self.rng.integers(0, 256, (n, -(-blocks * form.bits // 8)), np.uint8)
        self.weights |= {f"{name}.{key}": array for key, array in made.items()}
        attributes = {"K": k, "N": n, "bits": form.bits, "block_size": form.block_size, "accuracy_level": 4}
        self._node("MatMulNBits", [given, *(f"{name}.{key}" for key in made)], name, **attributes)

    def _static(
        self,
        name: str,
        given: str,
        source: str,
        shape: tuple[int, int],
        types: tuple[int, int],
        quantized: dict[str, str],
    ) -> None:
        zeros = {kind: np.array(0 if kind == INT8 else 128, NUMPY[kind]) for kind in types}
        self.weights |= {"scale": np.array(0.03, np.float32), "zero": zeros[types[0]], "zero.w": zeros[types[1]]}
        if source not in quantized:  # once, for all products of the same input
            quantized[source] = f"{name}.x"
            self._node("QuantizeLinear", [given, "scale", "zero"], quantized[source])
        self.weights |= {f"{name}.w": self._integers(types[1], shape), f"{name}.s": self._scales((shape[1],))}
        inputs = [quantized[source], f"{name}.w", "scale", f"{name}.s", "zero"]
        self._node("MatMulIntegerToFloat", [*inputs, *(["zero.w"] if types[1] == UINT8 else [])], name)

    def bind(self, first: int, rows: int) -> Any:
        """Return a pass over some of the rows of `x`."""
        return self.kernels.bind(
            {name: np.ascontiguousarray(x[:, first : first + rows], np.float32) for name, x in self.x.items()}
        )

    def difference(self) -> float:
        """Largest difference between passes over several rows and over one, relative to a product's largest result."""

        def run(width: int) -> list[np.ndarray]:
            parts = []
            for at in range(0, EXACT_ROWS, width):
                binding = self.bind(at, min(width, EXACT_ROWS - at))
                self.kernels.session.run_with_iobinding(binding)
                parts.append(binding.copy_outputs_to_cpu())
            return [np.concatenate(each, axis=1) for each in zip(*parts, strict=True)]

        single = run(1)
        return max(
            float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            for width in range(2, EXACT_ROWS + 1)
            for ours, theirs in zip(run(width), single, strict=True)
        )
