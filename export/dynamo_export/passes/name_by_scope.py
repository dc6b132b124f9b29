"""Nodes named by the module they were traced in."""

from __future__ import annotations

import re

import onnx_ir as ir


class NameByScope(ir.passes.InPlacePass):
    """Puts a node's innermost named module in front of its name: the tracer leaves it in the metadata."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename the nodes whose names do not say it yet."""
        modified = False
        for node in model.graph:
            scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
            where = [scope for scope in scopes[1:-1] if scope]
            prefix = f"/{where[-1].replace('.', '/')}/" if where else ""
            if not (node.name or "").startswith(prefix):
                node.name = f"{prefix}{node.name}"
                modified = True
        return ir.passes.PassResult(model, modified)
