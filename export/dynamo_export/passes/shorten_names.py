"""Names as the checkpoint has them."""

from __future__ import annotations

import onnx_ir as ir


class ShortenNames(ir.passes.InPlacePass):
    """Names weights and nodes as the checkpoint does, without the wrappers of the trace around them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename them; where both layouts of a weight are in use, they differ in name."""
        modified = False
        for value in list(model.graph.initializers.values()):
            assert value.name is not None
            short = "+".join(map(_short, value.name.split("+")))
            if short not in model.graph.initializers:
                value.name, modified = short, True
        for node in model.graph:
            short = (node.name or "").replace("/model/base/", "/", 1)
            if short != node.name:
                node.name, modified = short, True
        return ir.passes.PassResult(model, modified)


def _short(name: str) -> str:
    """Of a weight, or of one of several that were joined."""
    return name.removeprefix("model.").removeprefix("base.").removesuffix(".qkv").removesuffix(".transposed")
