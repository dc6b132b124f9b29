"""What the export asks of a model, whatever predicts its further tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamo_model.output import logits_of
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.session import Session
from dynamo_runtime.step import Step
from dynamo_runtime.topology import Plain, Topology

from .deviation import Case, PassOutputs, Values
from .drafting import DraftEnd
from .errors import ExportError


class Exported:
    """A base, and what was put on it; this class itself is the plain export, and a subclass says what it adds.

    The two static methods are about a bundle, which is compared when the model is no longer in memory.

    Attributes:
        kind: What manifests and the command line call it.
        base: The transformers language model.
        drafter: The model around it that predicts further tokens, or None.
    """

    kind: ClassVar[str] = Plain.kind
    drafter: Any

    def __init__(self, base: PreTrainedModel, drafter: Any) -> None:
        self.base = base
        self.drafter = drafter

    @property
    def topology(self) -> Topology:
        """What the bundle's manifest will say of it."""
        return Plain()

    @property
    def layered(self) -> nn.Module:
        """The module that is traced, which holds every decoder layer: the base, or it with layers of a drafter."""
        return self.base

    @property
    def n_states(self) -> int:
        """States that one pass ends with: the base's, and one of every layer for further tokens."""
        return 1 + self.topology.layers

    @property
    def least_context(self) -> int:
        """Fewest positions of a bundle: the gate has to see every look-ahead token behind a token."""
        return 2 + self.topology.look_ahead

    @property
    def draft_vocabulary(self) -> np.ndarray | None:
        """Ids of the tokens that drafts are made of, int64 [words]; None for all there are."""
        return None

    @property
    def conditions(self) -> Sequence[nn.Module]:
        """Of every further head, the maps `hidden` and `out` of its condition on the token in front; none without."""
        return ()

    def ahead(self, end: DraftEnd, chosen: list[ir.Value]) -> tuple[ir.Value, list[tuple[ir.Value, int]]]:
        """Make of the chosen states those that become logits; every state is a token head's here, and so stays.

        Args:
            end: The end of the drafter's graph, added to.
            chosen: The rows of every further state [batch, head_rows, hidden].

        Returns:
            All states of a row one after the other [batch, head_rows · parts, hidden]; further outputs
            [batch, head_rows, width] with their widths.
        """
        hidden = self.base.get_output_embeddings().weight.shape[1]
        return end.joined(chosen, hidden), []

    def keep_heads(self, heads: int) -> None:
        """Drop all token heads but the first ones.

        Args:
            heads: How many to keep, the base's own among them.

        Raises:
            ExportError: There are no such heads, or not so many, or only the base's would be left.
        """
        raise ExportError(f"--heads {heads} means parallel heads: leave it out with --drafter {self.kind}")

    def tracing(self) -> AbstractContextManager[None]:
        """Return what the model needs for the duration of the trace."""
        return nullcontext()

    def states(self, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        """Return normed hidden states [batch, seq, hidden], `n_states` of them.

        Args:
            input_ids: int64 [batch, seq].
            inputs: What the base's decoder takes besides.
        """
        inputs.setdefault("use_cache", inputs.get("past_key_values") is not None)
        return (self.base.base_model(input_ids=input_ids, **inputs).last_hidden_state,)

    def values(self, input_ids: Tensor, start: int) -> Values:
        """Return every output that is compared, from one pass without a cache.

        The output embedding runs on the rows that are wanted alone.

        Args:
            input_ids: int64 [1, seq].
            start: First row wanted.
        """
        return self.head_values(self.states(input_ids, use_cache=False)[0], start)

    def head_values(self, state: Tensor, start: int) -> Values:
        """Return logits of the first head, of its states [1, seq, hidden]."""
        return {"logits": logits_of(self.base, state[0, start:])[:, None].numpy()}

    def prepare(self, tokens: np.ndarray, other: np.ndarray, fork: int) -> None:
        """Write into two random sequences what they must have for everything to be compared.

        Args:
            tokens: int64 [length].
            other: As `tokens` up to `fork`, other tokens from there on.
            fork: First position in which they differ.
        """

    @staticmethod
    def put_out(bundle: Bundle, step: Step, name: str, theirs: Values) -> tuple[np.ndarray, ...]:
        """Return one output of a pass, and its top-K logits and ids if it has any, as [rows, parts, width] each.

        Args:
            bundle: The bundle.
            step: The pass.
            name: As `values` calls it.
            theirs: What torch says of the same positions.
        """
        return tuple(array[:, None] for array in (step.logits(), *step.topk()))

    @staticmethod
    def runs(session: Session, case: Case) -> Iterator[tuple[str, Iterable[PassOutputs]]]:
        """Yield ways of running a case that only such a bundle has, by name."""
        return iter(())
