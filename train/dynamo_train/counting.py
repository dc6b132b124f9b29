"""By which engine the n-grams of a corpus are counted, and within how much memory; the file is the same bit for bit."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from .arguments import LOCAL
from .cooccurrence import count_ngrams
from .errors import TrainingError
from .ngram_table import LEAST_MEMORY, NgramTable
from .tokens import TokenStreams

if TYPE_CHECKING:
    from .ngram_spark import Text

logger = logging.getLogger(__name__)

_BYTES_PER_TOKEN = 60  # of numpy's counter at its peak, where most n-grams are new: docs/counting.md
_BYTES_AT_LEAST = 600 << 20


@dataclass(frozen=True)
class Counting:
    """How to count.

    Attributes:
        engine: `memory` (numpy), `duckdb` (out of core) or `spark` (many machines); None: the first where the
            n-grams fit into memory, else the second.
        memory_limit: Bytes that this process may take; None: half of the machine's.
        master: URL of Spark's master.
        settings: Spark's own, by name.
    """

    engine: str | None = None
    memory_limit: int | None = None
    master: str = LOCAL
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def memory(self) -> int:
        """Bytes that this process may take."""
        return self.memory_limit or psutil.virtual_memory().total // 2


def write_counts(
    streams: TokenStreams, path: Path, how: Counting, *, vocab_size: int, end_id: int, min_counts: list[int], work: Path
) -> list[int]:
    """Count the n-grams of training tokens and write the co-occurrence file.

    Args:
        streams: The tokens.
        path: The file.
        how: By which engine.
        vocab_size: Number of token ids.
        end_id: The token between documents.
        min_counts: What is kept, for 1-, 2-, … n-grams, see `dynamo_train.cooccurrence.count_ngrams`.
        work: Folder for what does not fit into memory.

    Returns:
        How many n-grams of each level from 2 on are kept.

    Raises:
        TrainingError: The rule does not fit, there is too little memory, or DuckDB is not installed.
    """
    if engine_for(how, len(streams.train)) == "memory":
        counts = count_ngrams(
            streams.train, len(min_counts), vocab_size=vocab_size, end_id=end_id, min_counts=min_counts
        )
        counts.save(path)
        return [len(keys) for keys in counts.keys]
    with _table(work, how, vocab_size, min_counts) as table:
        table.count(streams.train, end_id)
        return _written(table, path)


def write_counts_of_corpus(
    source: str, text: Text, path: Path, how: Counting, min_counts: list[int], work: Path
) -> list[int]:
    """As `write_counts`, of a corpus that Spark's workers read and tokenise.

    Raises:
        TrainingError: As there, and whatever Spark has to say.
    """
    from .ngram_spark import Cluster, count_on_spark, start

    with _table(work, how, text.vocab_size, min_counts) as table:
        spark = start(Cluster(how.master, how.settings))
        try:
            found = count_on_spark(spark, source, text, min_counts)
            if not found.totals[0]:
                raise TrainingError(f"'{source}' leaves 0 training tokens: more files are needed")
            table.totals = found.totals
            table.fill(found.batches)
        finally:
            spark.stop()
        return _written(table, path)


def engine_for(how: Counting, tokens: int) -> str:
    """Return the engine that was asked for, or that suits a number of tokens."""
    if how.engine is not None:
        return how.engine
    need = _BYTES_AT_LEAST + _BYTES_PER_TOKEN * tokens
    if need <= how.memory:
        return "memory"
    if importlib.util.find_spec("duckdb") is None:
        logger.warning(
            "counting may take %.1f GB of memory; out of core it takes what --memory-limit says: "
            "pip install 'dynamo-edge[cpu,train,scale]'",
            need / 1e9,
        )
        return "memory"
    logger.info("counting out of core, by DuckDB")
    return "duckdb"


@contextmanager
def _table(work: Path, how: Counting, vocab_size: int, min_counts: list[int]) -> Iterator[NgramTable]:
    """Yield a table within what the limit leaves to DuckDB; what it writes to disk goes with it."""
    held = psutil.Process().memory_info().rss
    memory = how.memory - held
    if memory < LEAST_MEMORY:
        raise TrainingError(
            f"a memory limit of {how.memory / 1e6:.0f} MB is too little: Python and its libraries take "
            f"{held / 1e6:.0f} MB, and counting needs {LEAST_MEMORY / 1e6:.0f} MB more"
        )
    work.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="ngrams-", dir=work) as folder,
        NgramTable(Path(folder), vocab_size, min_counts, memory=memory, threads=os.cpu_count() or 1) as table,
    ):
        yield table


def _written(table: NgramTable, path: Path) -> list[int]:
    table.save(path)
    return [table.nodes(level) for level in range(2, len(table.min_counts) + 1)]
