"""Look-ahead embeddings (PaSS): rows behind the vocabulary in the input embedding, and nothing else in the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor, nn

from dynamo_model import LookAheadModel
from dynamo_runtime.look_ahead import LookAhead
from dynamo_runtime.session import Session
from dynamo_runtime.step import Last

from .deviation import Case, PassOutputs, Values, between
from .exported import Exported


class ExportedLookAhead(Exported):
    """A base and look-ahead embeddings."""

    kind = LookAhead.kind
    drafter: LookAheadModel

    @property
    def topology(self) -> LookAhead:
        """See `Exported`."""
        return LookAhead(self.drafter.n_look_ahead)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Put the look-ahead embeddings behind the vocabulary's for the duration: one table, one look-up."""
        own = self.base.get_input_embeddings()
        table = self.drafter.table().detach()
        try:
            self.base.set_input_embeddings(nn.Embedding.from_pretrained(table))
            yield
        finally:
            self.base.set_input_embeddings(own)

    def values(self, input_ids: Tensor, start: int) -> Values:
        """See `Exported`; with the model's own look-up of look-ahead tokens, not the traced one."""
        decoder = self.base.base_model
        embedded = self.drafter.embed(input_ids)
        state = decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return self.head_values(state, start)

    def prepare(self, tokens: np.ndarray, other: np.ndarray, fork: int) -> None:
        """Write all look-ahead ids into `tokens` from `fork` on, and at the end of `other`.

        So rolling back to `fork` is what the runtime does: drop look-ahead tokens, go on with tokens, look ahead again.
        """
        count = self.drafter.n_look_ahead
        ids = len(self.drafter.vocabulary()) + np.arange(count)
        tokens[fork : fork + count] = ids[: len(tokens) - fork]
        other[-count:] = ids

    @staticmethod
    def runs(session: Session, case: Case) -> Iterator[tuple[str, Iterable[PassOutputs]]]:
        """As the runtime does: look ahead behind a text, drop that, look ahead behind more text, and so on."""
        upto = min(case.fork + len(session.bundle.look_ahead), len(case.tokens))
        yield "look-ahead", _look_ahead(session, case, upto)


def _look_ahead(session: Session, case: Case, upto: int) -> Iterator[PassOutputs]:
    fork, start = case.fork, case.start
    session.cache.reset()
    for tokens, expected, at, end in (
        (case.tokens, case.expected, 0, upto),
        (case.other, case.expected_other, fork, len(case.other)),
        (case.tokens, case.expected, fork, upto),
        (case.other, case.expected_other, fork, len(case.other)),
    ):
        session.cache.rollback(at)
        first = max(at, start)
        step = session.step(tokens[at:end].tolist(), rows=Last(end - first))
        yield step, between(expected, first - start, end - start)
