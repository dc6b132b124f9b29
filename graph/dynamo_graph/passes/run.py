"""Passes run one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def run_passes(model: ir.Model, passes: Sequence[ir.passes.PassBase]) -> bool:
    """Run passes on a graph, in order.

    Returns:
        Whether one of them changed something.

    Raises:
        WriteError: What a pass raises, as it is: onnx-ir would wrap it.
    """
    try:
        return ir.passes.Sequential(*passes)(model).modified
    except ir.passes.PassError as error:
        cause = error.__cause__
        if cause is None:
            raise
    raise cause
