"""Changes of a graph that export and quantization share, and how one or many of them are run."""

from .fold_heads import FoldHeads
from .run import run_passes
from .take_skipped_states import TakeSkippedStates
from .unfold_heads import UnfoldHeads

__all__ = ["FoldHeads", "TakeSkippedStates", "UnfoldHeads", "run_passes"]
