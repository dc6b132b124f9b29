"""N-grams counted out of core: sorted tables in a DuckDB database on disk, and the co-occurrence file made of them.

What is kept, and every bit of the file, are those of `dynamo_train.cooccurrence.count_ngrams`; only the memory
is another's: DuckDB's, which has a limit and writes to disk what does not fit.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .cooccurrence import CHUNK, check_min_counts, read_chunks, within_document
from .errors import TrainingError

BATCH = 1 << 18
BLOCK = 16 << 20  # bytes that numpy hands to zlib at once
PER_THREAD = 256 << 20  # DuckDB works with less a thread, but then it writes to disk what need not go there
LEAST_MEMORY = 128 << 20


class NgramTable:
    """The n-grams that are kept, level by level; used with `with`.

    Attributes:
        unigrams: Counts of the single tokens [vocab].
        totals: How many 1-, 2-, … n-grams were counted, those that were dropped included.
        min_counts: The rule, a level: kept if seen at least so often.
    """

    def __init__(self, folder: Path, vocab_size: int, min_counts: Sequence[int], *, memory: int, threads: int) -> None:
        """Make an empty table.

        Args:
            folder: An empty folder with room for what does not fit into memory.
            vocab_size: Number of token ids.
            min_counts: What is kept, for 1-, 2-, … n-grams.
            memory: Bytes that DuckDB may take.
            threads: At most so many.

        Raises:
            TrainingError: DuckDB is not installed, or the rule does not fit.
        """
        check_min_counts(min_counts, len(min_counts))
        self.unigrams = np.zeros(vocab_size, dtype=np.int64)
        self.totals = [0] * len(min_counts)
        self.min_counts = list(min_counts)
        self._database = _duckdb().connect(
            folder / "ngrams.duckdb",
            config={
                "memory_limit": f"{memory}B",
                "threads": max(1, min(threads, memory // PER_THREAD)),
                "temp_directory": str(folder / "spilled"),
            },
        )

    def __enter__(self) -> NgramTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the database; what it says of memory and disk becomes one line."""
        self._database.close()
        if error is not None and isinstance(error, _duckdb().Error):
            raise TrainingError(
                f"DuckDB cannot count these n-grams: {str(error).splitlines()[0]} "
                "(more --memory-limit, or a --work with more room, may help)"
            ) from error

    def count(self, tokens: NDArray[np.unsignedinteger], end_id: int | None, chunk_tokens: int = CHUNK) -> None:
        """Count all n-grams of a stream that lie within one document.

        Args:
            tokens: The training tokens [tokens]; a memory map is read in pieces and never held.
            end_id: The token between documents; it may end an n-gram but nothing follows it.
            chunk_tokens: Positions looked at at once.
        """
        order = len(self.min_counts)
        for chunk in read_chunks(tokens, 1, chunk_tokens):
            self.unigrams += np.bincount(chunk, minlength=len(self.unigrams))
        self.totals[0] = len(tokens)
        for level in range(2, order + 1):
            ends = [] if end_id is None else [f"{column} <> {end_id}" for column in _columns(level - 1)]
            where = f"WHERE {' AND '.join(ends)}" if ends else ""
            self._register("grams", _columns(level), _windows(tokens, level, chunk_tokens))
            self._keep(level, f"SELECT {_list(level)}, count(*) AS n FROM grams {where} GROUP BY ALL")
            self._database.unregister("grams")
            for chunk in read_chunks(tokens, level, chunk_tokens):
                self.totals[level - 1] += int(within_document(chunk, level, end_id).sum())

    def fill(self, batches: Iterable[Any]) -> None:
        """Take n-grams that were counted elsewhere and are to be kept, in any order, each once.

        Args:
            batches: Pyarrow record batches of a column `level`, of `x1` … (those behind the level's are not read)
                and of `n`, the count.
        """
        order = len(self.min_counts)
        self._database.execute(
            f"CREATE TABLE found (level INTEGER, {', '.join(f'{x} INTEGER' for x in _columns(order))}, n BIGINT)"
        )
        for batch in batches:
            self._database.register("batch", _pyarrow().Table.from_batches([batch]))
            self._database.execute(f"INSERT INTO found SELECT level, {_list(order)}, n FROM batch")
            self._database.unregister("batch")
        single = self._database.execute("SELECT x1, n FROM found WHERE level = 1").fetchnumpy()
        self.unigrams[single["x1"]] = single["n"]
        for level in range(2, order + 1):
            self._keep(level, f"SELECT {_list(level)}, n FROM found WHERE level = {level}")

    def nodes(self, level: int) -> int:
        """Return how many n-grams of a level, from 2, are kept."""
        return int(self._database.execute(f"SELECT count(*) FROM level_{level}").fetchall()[0][0])

    def save(self, path: Path) -> None:
        """Write what `dynamo_train.cooccurrence.NgramCounts.save` would write, an array's piece at a time."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in (
                ("totals", np.asarray(self.totals, dtype=np.int64)),
                ("min_count", np.asarray(self.min_counts, dtype=np.int64)),
                ("counts_1", self.unigrams.astype(np.min_scalar_type(int(self.unigrams.max(initial=0))))),
            ):
                _write_array(archive, name, array.dtype, len(array), [array])
            parents = len(self.unigrams)
            for level in range(2, len(self.min_counts) + 1):
                table = f"level_{level}"
                [(size, most_id, most)] = self._database.execute(
                    f"SELECT count(*), coalesce(max(x{level}), 0), coalesce(max(n), 0) FROM {table}"
                ).fetchall()
                _write_array(archive, f"offsets_{level}", np.min_scalar_type(size), parents + 1, self._offsets(level))
                ids, counts = (self._column(f"SELECT {column} FROM {table}") for column in (f"x{level}", "n"))
                _write_array(archive, f"ids_{level}", np.min_scalar_type(most_id), size, ids)
                _write_array(archive, f"counts_{level}", np.min_scalar_type(most), size, counts)
                parents = size

    def _keep(self, level: int, counted: str) -> None:
        """Store what the rule keeps of a level, sorted."""
        self._database.execute(
            f"CREATE TABLE level_{level} AS SELECT * FROM ({counted}) WHERE n >= {self.min_counts[level - 1]} "
            f"ORDER BY {_list(level)}"
        )

    def _offsets(self, level: int) -> Iterator[NDArray[np.int64]]:
        """Yield where the children of each node of the level below begin, and where the last ones end."""
        children = f"SELECT {_list(level - 1)}, count(*) AS children FROM level_{level} GROUP BY ALL"
        parents = f"(SELECT range AS x1 FROM range({len(self.unigrams)}))" if level == 2 else f"level_{level - 1}"
        end = 0
        yield np.zeros(1, np.int64)
        for sizes in self._column(
            f"SELECT coalesce(children, 0) FROM {parents} LEFT JOIN ({children}) USING ({_list(level - 1)}) "
            f"ORDER BY {_list(level - 1)}"
        ):
            ends = end + sizes.cumsum()
            yield ends
            end = int(ends[-1])

    def _column(self, query: str) -> Iterator[NDArray[np.int64]]:
        """Yield the one column of a result, in pieces."""
        for batch in self._database.sql(query).to_arrow_reader(BATCH):
            if batch.num_rows:
                yield batch.column(0).to_numpy(zero_copy_only=False).astype(np.int64)

    def _register(self, name: str, columns: list[str], windows: Iterator[list[NDArray[Any]]]) -> None:
        """Make n-grams [positions] a column, which are made as they are asked for, a table that is read once."""
        arrow = _pyarrow()
        schema = arrow.schema([(column, arrow.int32()) for column in columns])
        batches = (arrow.RecordBatch.from_arrays([arrow.array(x) for x in window], schema=schema) for window in windows)
        self._database.register(name, arrow.RecordBatchReader.from_batches(schema, batches))


def _windows(tokens: NDArray[np.unsignedinteger], level: int, chunk_tokens: int) -> Iterator[list[NDArray[np.int32]]]:
    """Yield all n-grams of a stream, the i-th tokens of many together."""
    for chunk in read_chunks(tokens, level, min(chunk_tokens, BATCH)):
        narrow = chunk.astype(np.int32)
        positions = len(chunk) - level + 1
        yield [narrow[i : i + positions] for i in range(level)]


def _write_array(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], size: int, pieces: Iterable[NDArray[Any]]
) -> None:
    """Add an array [size] that comes in pieces as `numpy.savez_compressed` adds a whole one."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(file, header)
        _write_blocks(file, (piece.astype(dtype).tobytes() for piece in pieces), BLOCK)


def _write_blocks(file: IO[bytes], pieces: Iterable[bytes], block: int) -> None:
    """Write in blocks of numpy's size: what zlib makes of bytes may depend on how many it is given at once."""
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        while len(waiting) >= block:
            file.write(bytes(waiting[:block]))
            del waiting[:block]
    if waiting:
        file.write(bytes(waiting))


def _columns(level: int) -> list[str]:
    return [f"x{i}" for i in range(1, level + 1)]


def _list(level: int) -> str:
    return ", ".join(_columns(level))


def _duckdb() -> Any:
    try:
        import duckdb
    except ModuleNotFoundError:
        raise TrainingError("counting out of core needs duckdb: pip install 'dynamo-edge[cpu,train,scale]'") from None
    return duckdb


def _pyarrow() -> Any:
    import pyarrow

    return pyarrow
