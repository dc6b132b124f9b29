"""N-gram counts out of core: the file is that of the counter in memory, bit for bit."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from dynamo_train import TrainingError, counting
from dynamo_train.arguments import setting, size
from dynamo_train.cooccurrence import count_ngrams
from dynamo_train.counting import Counting, engine_for, write_counts
from dynamo_train.tokens import CorpusRecord, TokenStreams

VOCAB, END = 300, 0
LIMIT = 4 << 30


def zipf(tokens: int, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    ranks = np.random.default_rng(seed).zipf(1.2, tokens)
    return ((ranks - 1) % vocab).astype(np.uint16)


def streams_of(tokens: np.ndarray) -> TokenStreams:
    record = CorpusRecord("made up", 1, 0, 0, len(tokens), 0, 0.0, "")
    return TokenStreams(tokens, tokens[:0], record)


def written(tokens: np.ndarray, folder: Path, engine: str, min_counts: list[int], vocab: int = VOCAB) -> bytes:
    path = folder / f"{engine}.npz"
    how = Counting(engine, LIMIT)
    write_counts(
        streams_of(tokens), path, how, vocab_size=vocab, end_id=END, min_counts=min_counts, work=folder / "work"
    )
    return path.read_bytes()


@pytest.mark.parametrize("min_counts", [[1, 1], [1, 1, 2], [1, 2, 2, 3], [1, 99999, 99999]])
def test_the_same_bits(min_counts: list[int], tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    tokens = zipf(20_000)
    assert written(tokens, tmp_path, "duckdb", min_counts) == written(tokens, tmp_path, "memory", min_counts)
    assert list((tmp_path / "work").iterdir()) == []  # nothing stays of what went to disk


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_streams_shorter_than_an_ngram(tokens: int, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    few = np.full(tokens, 5, np.uint16)
    assert written(few, tmp_path, "duckdb", [1, 1, 1]) == written(few, tmp_path, "memory", [1, 1, 1])


def test_a_mapped_file_and_pieces_of_it(tmp_path: Path) -> None:
    """Of a map the file is read: the whole one from where it begins, and a slice's own tokens."""
    path = tmp_path / "tokens.bin"
    tokens = zipf(5000)
    np.concatenate([np.full(8, 7, np.uint16), tokens]).tofile(path)
    mapped = np.memmap(path, np.uint16, "r", offset=16)
    for given, same in ((mapped, tokens), (mapped[1000:3000], tokens[1000:3000])):
        found, expected = (
            count_ngrams(each, 2, vocab_size=VOCAB, end_id=END, min_counts=[1, 1], chunk_tokens=700)
            for each in (given, same)
        )
        assert np.array_equal(found.unigrams, expected.unigrams) and found.totals == expected.totals
        assert np.array_equal(found.keys[0], expected.keys[0]) and np.array_equal(found.counts[0], expected.counts[0])


@pytest.mark.slow
def test_arrays_of_many_blocks_are_written_as_numpy_does(tmp_path: Path) -> None:
    """Arrays longer than what numpy hands to zlib at once, and pieces that end anywhere."""
    pytest.importorskip("duckdb")
    from dynamo_train.ngram_table import BLOCK, _write_array

    array = np.random.default_rng(3).integers(0, 9, BLOCK + 999_999).astype(np.uint8)
    np.savez_compressed(tmp_path / "expected.npz", array=array)
    with zipfile.ZipFile(tmp_path / "found.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        _write_array(archive, "array", array.dtype, len(array), np.array_split(array, 37))
    assert (tmp_path / "found.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()


@pytest.mark.slow
def test_the_same_bits_with_little_memory(tmp_path: Path) -> None:
    """More n-grams than DuckDB may hold: some go to disk on the way."""
    pytest.importorskip("duckdb")
    from dynamo_train.ngram_table import NgramTable

    vocab = 50_000
    tokens = np.random.default_rng(3).integers(0, vocab, 1_500_000).astype(np.uint16)
    count_ngrams(tokens, 2, vocab_size=vocab, end_id=END, min_counts=[1, 1]).save(tmp_path / "expected.npz")
    (tmp_path / "work").mkdir()
    with NgramTable(tmp_path / "work", vocab, [1, 1], memory=100 << 20, threads=2) as table:
        table.count(tokens, END)
        table.save(tmp_path / "found.npz")
    assert (tmp_path / "found.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()


def test_memory_where_it_fits_and_duckdb_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting.importlib.util, "find_spec", lambda name: object())
    assert engine_for(Counting(memory_limit=2 << 30), 10**6) == "memory"
    assert engine_for(Counting(memory_limit=2 << 30), 10**9) == "duckdb"
    assert engine_for(Counting("memory", memory_limit=2 << 30), 10**9) == "memory"
    monkeypatch.setattr(counting.importlib.util, "find_spec", lambda name: None)
    assert engine_for(Counting(memory_limit=2 << 30), 10**9) == "memory"


def test_what_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    small = Counting("duckdb", 50 << 20)
    arguments = {"vocab_size": VOCAB, "end_id": END, "work": tmp_path}
    with pytest.raises(TrainingError, match="is too little"):
        write_counts(streams_of(zipf(99)), tmp_path / "x", small, min_counts=[1, 1], **arguments)
    with pytest.raises(TrainingError, match="minimal counts"):
        write_counts(streams_of(zipf(99)), tmp_path / "x", Counting("duckdb", LIMIT), min_counts=[2, 1], **arguments)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("text", "expected"), [("8GB", 8 * 10**9), ("1.5 g", 1_500_000_000), ("700", 700)])
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


def test_bad_sizes_and_settings() -> None:
    for text in ("", "GB", "-1GB", "0", "8 apples"):
        with pytest.raises(Exception, match="no size"):
            size(text)
    assert setting("spark.x=a=b") == ("spark.x", "a=b")
    with pytest.raises(Exception, match="NAME=VALUE"):
        setting("spark.x")
