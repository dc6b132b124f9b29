"""Everything that can be exported, by kind: the one place that knows it all."""

from __future__ import annotations

from transformers import PreTrainedModel

from dynamo_model import DrafterModel

from .exported import Exported
from .joint import ExportedJoint
from .look_ahead import ExportedLookAhead
from .parallel import ExportedParallel

EXPORTS: dict[str, type[Exported]] = {
    each.kind: each for each in (Exported, ExportedParallel, ExportedJoint, ExportedLookAhead)
}
"""By the kind of the drafter; a base without one is plain."""

PREFERRED = ExportedParallel.kind
"""What is exported of a checkpoint that has several drafters, and what `--heads` counts."""


def exported(base: PreTrainedModel, drafter: DrafterModel | None) -> Exported:
    """Return a loaded model as the export sees it.

    Args:
        base: The transformers language model.
        drafter: The model around it that predicts further tokens, or None for the plain export.
    """
    kind = Exported.kind if drafter is None else drafter.kind
    return EXPORTS[kind](base, drafter)
