"""From a multi-token checkpoint to a bundle: a traced ONNX graph that provably agrees with the torch model."""

from typing import TYPE_CHECKING, Any

from .errors import ExportError

if TYPE_CHECKING:
    from .export import export_bundle

__all__ = ["ExportError", "export_bundle"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when they are needed: Optimum reads our arguments at every start."""
    if name == "export_bundle":
        from .export import export_bundle

        return export_bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
