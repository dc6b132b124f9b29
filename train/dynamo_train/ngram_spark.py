"""N-grams counted on many machines by Apache Spark: workers read shards, tokenise, and count by shuffle.

A shard is tokenised on one worker, where n-grams are counted block by block (`count_shards`); sums over blocks
and shards are made by a shuffle on the n-gram, and what the rule keeps goes to the driver.  Rows are whole numbers
and their sums exact, so that neither the number of workers nor a task that is run again changes a bit.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dynamo_runtime.corpus import is_held_out

from .cooccurrence import NgramCounts, count_ngrams
from .corpus import Shard, read_shard, shards_of
from .errors import TrainingError
from .tokens import encode

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

BLOCK_TOKENS = 1 << 19
NONE = -1
"""Token of a row's columns behind its level's, and of all columns in the row that has a level's total."""


@dataclass(frozen=True)
class Text:
    """What workers need to make training tokens of shards.

    Attributes:
        tokenizer: The model's, as JSON.
        vocab_size: Number of token ids.
        end_id: Id put behind every document.
        held_out_percent: Share of the groups that is left out.
    """

    tokenizer: str
    vocab_size: int
    end_id: int
    held_out_percent: float


@dataclass(frozen=True)
class Cluster:
    """Where Spark runs.

    Attributes:
        master: Its URL: `local[2]`, `spark://host:7077`, `yarn`, `k8s://…`.
        settings: Spark's own, by name.
    """

    master: str = "local[*]"
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CountedNgrams:
    """What Spark found.

    Attributes:
        totals: How many 1-, 2-, … n-grams were counted, those that were dropped included.
        batches: Of the n-grams that are kept, see `dynamo_train.ngram_table.NgramTable.fill`.
    """

    totals: list[int]
    batches: Iterator[pyarrow.RecordBatch]


def start(cluster: Cluster) -> SparkSession:
    """Start Spark, or join it.

    Raises:
        TrainingError: It is not installed, there is no Java, or the master does not answer.
    """
    try:
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ModuleNotFoundError:
        raise TrainingError("counting on Spark needs pyspark: pip install 'dynamo-edge[cpu,train,spark]'") from None
    _check_java()
    _check_master(cluster.master)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName("dynamo-train counts").master(cluster.master)
    for name, value in ({"spark.ui.showConsoleProgress": "false"} | cluster.settings).items():
        builder = builder.config(name, value)
    try:
        return builder.getOrCreate()
    except (PySparkException, Py4JError, RuntimeError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"Spark does not start at '{cluster.master}': {said} (it needs Java 17 or 21; what Java said is above)"
        ) from error


def _check_java() -> None:
    """Find Java where Spark looks for it, which else fails without saying what it misses."""
    home = os.environ.get("JAVA_HOME")
    if shutil.which("java", path=str(Path(home, "bin")) if home else None) is None:
        where = f"JAVA_HOME, '{home}', has no bin/java" if home else "there is no `java` on the PATH and no JAVA_HOME"
        raise TrainingError(
            f"Spark needs Java 17 or 21, and {where}: install one (apt install openjdk-17-jre-headless), or count "
            "without Spark (--engine duckdb)"
        )


def _check_master(master: str, seconds: float = 5) -> None:
    """Knock at a standalone master, or several of which one answers; Spark would try for a minute, and say much."""
    if not master.startswith("spark://"):
        return
    said = ""
    for address in master.removeprefix("spark://").split(","):
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), seconds).close()
            return
        except (OSError, ValueError, OverflowError) as error:
            said = str(error)
    raise TrainingError(
        f"no Spark master answers at '{master}' ({said}): start it, or give --master the URL that its log and page name"
    )


def count_on_spark(spark: SparkSession, source: str, text: Text, min_counts: Sequence[int]) -> CountedNgrams:
    """Count all n-grams of a corpus that lie within one document.

    Args:
        spark: The session, see `start`.
        source: See `dynamo_train.corpus.read_corpus`; workers must find it under the same name.
        text: How it becomes tokens.
        min_counts: What is kept, for 1-, 2-, … n-grams.

    Raises:
        TrainingError: A worker could not read its shard, or Spark gave the job up.
    """
    with _one_line():
        kept = _counted(spark, source, text, min_counts).persist()
        totals: dict[int, int] = dict(kept.where(f"x1 = {NONE}").select("level", "n").toLocalIterator())
    return CountedNgrams([totals.get(level, 0) for level in range(1, len(min_counts) + 1)], _batches(kept))


def _counted(spark: SparkSession, source: str, text: Text, min_counts: Sequence[int]) -> DataFrame:
    """Return rows of n-grams that are kept, of all single tokens, and of totals."""
    from pyspark.sql import functions

    order = len(min_counts)
    shards = [(each.source, each.table) for each in shards_of(source)]
    rows = spark.createDataFrame(spark.sparkContext.parallelize(shards, len(shards)), "source string, table string")
    gram = ["level", *(f"x{i}" for i in range(1, order + 1))]
    schema = ", ".join(f"{name} int" for name in gram) + ", n bigint"
    least = " ".join(f"WHEN {level} THEN {count}" for level, count in enumerate(min_counts, 1) if level > 1)
    return (
        rows.mapInArrow(partial(count_shards, text=text, order=order), schema)
        .groupBy(*gram)
        .agg(functions.sum("n").alias("n"))
        .where(f"x1 = {NONE} OR n >= CASE level {least} ELSE 1 END")
    )


def _batches(kept: DataFrame) -> Iterator[pyarrow.RecordBatch]:
    """Yield the n-grams of a frame, a partition at a time, and many in a row, since Python is slow at taking rows."""
    with _one_line():
        for row in kept.where(f"x1 <> {NONE}").mapInArrow(_pack, "batch binary").toLocalIterator():
            with pyarrow.ipc.open_stream(row.batch) as stream:
                yield from stream


def _pack(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    for batch in batches:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        yield pyarrow.record_batch({"batch": pyarrow.array([sink.getvalue().to_pybytes()], pyarrow.binary())})


def count_shards(batches: Iterator[pyarrow.RecordBatch], text: Text, order: int) -> Iterator[pyarrow.RecordBatch]:
    """Yield the worker's part: the n-grams of shards, counted block by block.

    Args:
        batches: Of the columns of `dynamo_train.corpus.Shard`.
        text: How shards become tokens.
        order: The longest n-gram.

    Yields:
        Rows of `level`, `x1` … and `n`; those of different blocks may be of the same n-gram.
    """
    tokenizer = Tokenizer.from_str(text.tokenizer)
    for batch in batches:
        for row in batch.to_pylist():
            for block in _blocks(Shard(**row), tokenizer, text):
                counts = count_ngrams(
                    block, order, vocab_size=text.vocab_size, end_id=text.end_id, min_counts=[1] * order
                )
                yield from _rows(counts)


def _blocks(shard: Shard, tokenizer: Tokenizer, text: Text) -> Iterator[NDArray[np.uint32]]:
    """Yield the training tokens of a shard; documents stay whole."""
    block: list[int] = []
    for document in read_shard(shard):
        if not is_held_out(document, text.held_out_percent):
            block += encode(document, tokenizer, text.end_id)[0]
        if len(block) >= BLOCK_TOKENS:
            yield np.array(block, np.uint32)
            block = []
    if block:
        yield np.array(block, np.uint32)


def _rows(counts: NgramCounts) -> Iterator[pyarrow.RecordBatch]:
    """Yield a trie as rows, level by level."""
    order = len(counts.totals)
    vocab = len(counts.unigrams)
    grams = [np.arange(vocab)]  # of a level: the i-th tokens of all its nodes
    for level in range(1, order + 1):
        if level > 1:
            parents, last = np.divmod(counts.keys[level - 2], vocab)
            grams = [*(x[parents] for x in grams), last]
        number = counts.unigrams if level == 1 else counts.counts[level - 2]
        seen = np.flatnonzero(number)
        columns = {f"x{i + 1}": grams[i][seen] if i < level else np.full(len(seen), NONE) for i in range(order)}
        total = {name: [NONE] for name in columns}
        for x, n in ((columns, number[seen]), (total, [counts.totals[level - 1]])):
            arrays = {"level": np.full(len(n), level), **x}
            fields = {name: pyarrow.array(values, pyarrow.int32()) for name, values in arrays.items()}
            yield pyarrow.record_batch({**fields, "n": pyarrow.array(n, pyarrow.int64())})


@contextmanager
def _one_line() -> Iterator[None]:
    """Yield what a worker said at last, out of the many lines in which Spark tells it."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        said = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
        raise TrainingError(f"Spark gave the job up: {(said or lines)[-1 if said else 0][:300]}") from error
