"""From a bundle to a smaller bundle, and what that costs. Needs no torch."""

from typing import TYPE_CHECKING, Any

from dynamo_graph.errors import WriteError

from .errors import QuantizeError
from .schemes import SCHEMES, Options

if TYPE_CHECKING:
    from .quantize import check_request, quantize_bundle, quantize_into

__all__ = ["SCHEMES", "Options", "QuantizeError", "WriteError", "check_request", "quantize_bundle", "quantize_into"]


def __getattr__(name: str) -> Any:
    """Import onnx only when it is needed: Optimum reads the arguments of dynamo-export at every start."""
    if name in ("check_request", "quantize_bundle", "quantize_into"):
        from . import quantize

        return getattr(quantize, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
