"""Many texts at once: every pass of the base's graph reads one token of each, so that its weights are read once.

For writing text in bulk (`dynamo-train texts`); an `Engine` is for one text, as soon as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Protocol, TypeVar, Unpack

import numpy as np

from .bundle import Bundle
from .errors import BundleError, ParameterError
from .kv_cache import KVBuffers
from .names import ATTENTION_MASK, INPUT_IDS, KEPT_ROWS, TOPK_IDS, TOPK_LOGITS
from .parameters import whole
from .providers import Backend, BackendOptions
from .session import Session


class Growing(Protocol):
    """A text that is being written.

    Attributes:
        tokens: All of it so far, at least one; they may end with several that no pass has read yet.
    """

    tokens: list[int]

    def go_on(self, logits: np.ndarray, ids: np.ndarray) -> bool:
        """Append one token or more; returns whether the text goes on, and then behind all of them.

        Args:
            logits: The largest behind the text's last token, [K], in descending order.
            ids: Their tokens, [K].
        """


Text = TypeVar("Text", bound=Growing)


class Batch:
    """A bundle that writes many texts at once, on the CPU.

    Every row of a pass has a length of its own. The row of a text that has ended goes to the next one; where there is
    none any more, the batch becomes smaller. What a row says does not depend on the others, but for the last bits where
    passes of different widths round differently (`Bundle.lossless`).

    Attributes:
        bundle: What is running.
        rows: Most texts at once.
        length: Most tokens of a text.
    """

    def __init__(self, bundle: Bundle, rows: int, length: int, **options: Unpack[BackendOptions]):
        """Load the base's graph, and make room for keys and values of all rows.

        Args:
            bundle: From `load_bundle`.
            rows: Most texts at once.
            length: Most tokens of a text; the last of them is not read by a pass.
            **options: Fields of `Backend`; the provider is cpu.

        Raises:
            DynamoError: See `Session`.
            ParameterError: `rows` or `length` is out of range, or there is no memory for them.
            BundleError: Its further heads are inside the base's graph.
        """
        self.rows, self.length = whole("rows", rows, 1), whole("length", length, 2, bundle.context_length)
        if bundle.drafter is None and bundle.topology.parts:
            raise BundleError(f"{bundle.folder} has its heads in the base's graph, one text a pass: export it again")
        self.bundle = bundle
        session = Session(bundle, Backend(provider="cpu"), max_length=1, **options)
        try:
            self._caches = KVBuffers(
                bundle.kv_layers,
                bundle.kv_heads,
                bundle.head_size,
                length,
                dtype=session.cache.dtype,
                growth=length,
                batch=rows,
            )
        except MemoryError:
            raise ParameterError(f"there is no memory for {rows} rows of {length} tokens: name fewer") from None
        self._buffers, self._shape = self._caches.buffers, self._caches.shape
        self._bound = session.bind([TOPK_LOGITS, TOPK_IDS])
        self._kept = np.ones((), np.int64)
        self._bound.input(KEPT_ROWS, self._kept)
        self.passes = 0

    def write(self, texts: Iterable[Text], after_pass: Callable[[int], None] | None = None) -> Iterator[Text]:
        """Write texts to their ends, as many at once as there are rows.

        Args:
            texts: Taken as rows become free.
            after_pass: Told of every pass how many rows it had.

        Yields:
            Each when it has ended; the one that ends first comes first.

        Raises:
            BundleError: The graph does not run.
        """
        waiting = iter(texts)
        rows = list(islice(waiting, self.rows))
        lengths = np.zeros(len(rows), np.int64)  # tokens of each that a pass has read
        self._narrow(len(rows))
        while rows:
            fed = [text.tokens[length] for text, length in zip(rows, lengths, strict=True)]
            logits, ids = self._pass(np.array(fed, np.int64)[:, None], lengths)
            lengths += 1
            if after_pass is not None:
                after_pass(len(rows))
            for row in reversed(range(len(rows))):
                text = rows[row]
                if lengths[row] < len(text.tokens) or text.go_on(logits[row], ids[row]):
                    continue
                yield text
                following = next(waiting, None)
                if following is not None:
                    rows[row], lengths[row] = following, 0
                    continue
                last = len(rows) - 1
                self._move(last, row, lengths[last])
                rows[row], lengths[row] = rows[last], lengths[last]
                rows.pop()
                lengths = lengths[:last]
            if len(rows) < self._caches.shape[0]:
                self._narrow(len(rows))

    def _pass(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return one token of every row.

        Args:
            tokens: [rows, 1].
            lengths: Tokens of every row that were read before, [rows].

        Returns:
            The largest logits of every row and their tokens, both [rows, K].
        """
        # Row by row, the mask's sum is what attention and positions go by.
        mask = (np.arange(lengths.max() + 1) <= lengths[:, None]).astype(np.int64)
        bound = self._bound
        bound.caches(self._caches)
        bound.input(INPUT_IDS, tokens)
        bound.input(ATTENTION_MASK, mask)
        try:
            bound.run()
            values = bound.read()
            logits, ids = (values[name].numpy()[:, -1] for name in (TOPK_LOGITS, TOPK_IDS))
        except Exception as error:  # onnxruntime raises many classes that share no base
            raise BundleError(f"{self.bundle.graph_path} fails at a pass over {len(tokens)} rows: {error}") from error
        self.passes += 1
        return logits, ids

    def _narrow(self, rows: int) -> None:
        """Have the graph see the first rows of the buffers alone."""
        self._caches.shape = (rows, *self._shape[1:])
        self._caches.buffers = [(keys[:rows], values[:rows]) for keys, values in self._buffers]

    def _move(self, source: int, target: int, length: int) -> None:
        """Copy keys and values of one row into another."""
        if source != target:
            for pair in self._buffers:
                for buffer in pair:
                    buffer[target, :, :length] = buffer[source, :, :length]
