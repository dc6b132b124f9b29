"""Changes of the traced graph, each on its own."""

from .add_draft import AddDraft, AddHeadStates
from .add_outputs import AddOutputs
from .clear_metadata import ClearMetadata
from .merge_heads import MergeAttentions, MergeProducts
from .name_by_scope import NameByScope
from .optimize import Optimize
from .pack_qkv import PackQKV
from .shorten_names import ShortenNames
from .simplify_reshapes import SimplifyReshapes
from .transpose_weights import TransposeWeights

__all__ = [
    "AddDraft",
    "AddHeadStates",
    "AddOutputs",
    "ClearMetadata",
    "MergeAttentions",
    "MergeProducts",
    "NameByScope",
    "Optimize",
    "PackQKV",
    "ShortenNames",
    "SimplifyReshapes",
    "TransposeWeights",
]
