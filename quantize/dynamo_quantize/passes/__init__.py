"""Changes that make a graph smaller, each on its own."""

from .quantize_cache import QuantizeCache
from .store_blocks import StoreBlocks
from .store_dynamic import StoreDynamic
from .to_half import ToHalf

__all__ = ["QuantizeCache", "StoreBlocks", "StoreDynamic", "ToHalf"]
