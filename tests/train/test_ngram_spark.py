"""N-gram counts on Spark: shards together give the corpus, and the file is that of the counter in memory."""

import json
import shutil
import socket
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dynamo_runtime.corpus import is_held_out
from dynamo_train import TrainingError
from dynamo_train.cooccurrence import count_ngrams
from dynamo_train.corpus import Shard, read_corpus, read_shard, shards_of
from dynamo_train.counting import Counting, write_counts_of_corpus
from dynamo_train.ngram_spark import NONE, Cluster, Text, count_shards, start
from dynamo_train.tokens import encode

WORDS = ["the", "a", "model", "drafts", "tokens", "and", "verifies", "them"]
END, PERCENT = 0, 20.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parquet files, a .jsonl file in a folder of its own, and text files."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, 40)))

    for i in range(3):
        table = pyarrow.table({"text": [*(text() for _ in range(20)), " "]})
        pyarrow.parquet.write_table(table, folder / f"texts-{i}.parquet")
    (folder / "more").mkdir()
    rows = [json.dumps({"text": text()}) for _ in range(20)]
    (folder / "more" / "rows.jsonl").write_text("\n".join(rows))
    (folder / "more" / "empty.jsonl").write_text("")
    for name in ("x.txt", "y.md", "more/z.txt"):
        (folder / name).write_text(text())
    (folder / "_left-out.jsonl").write_text("no rows")
    return folder


@pytest.fixture(scope="module")
def text() -> Text:
    tokenizer = Tokenizer(models.WordLevel({"[end]": END, **{word: i for i, word in enumerate(WORDS, 1)}}, "[end]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Text(tokenizer.to_str(), len(WORDS) + 1, END, PERCENT)


def tokens_of(source: str, text: Text) -> np.ndarray:
    """The training tokens of a corpus read as one."""
    tokenizer = Tokenizer.from_str(text.tokenizer)
    kept = (document for document in read_corpus(source) if not is_held_out(document, PERCENT))
    return np.concatenate([encode(document, tokenizer, END)[0] for document in kept]).astype(np.uint16)


def test_shards_together_are_the_corpus(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a text")
    source = f"{corpus}+{tmp_path / 'one.txt'}"
    shards = shards_of(source)
    assert len(shards) == 7 and Shard(str(corpus), "more/rows.jsonl") in shards
    found = Counter(document for shard in shards for document in read_shard(shard))
    assert found == Counter(read_corpus(source)) and found.total() == 84


def test_workers_count_what_is_in_a_shard(corpus: Path, text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all blocks and shards sum up to what one stream has, level by level, totals among them."""
    monkeypatch.setattr("dynamo_train.ngram_spark.BLOCK_TOKENS", 100)
    shards = shards_of(str(corpus))
    columns = {"source": [each.source for each in shards], "table": [each.table for each in shards]}
    found: Counter = Counter()
    for batch in count_shards(iter([pyarrow.record_batch(columns)]), text, 3):
        assert batch.schema.names == ["level", "x1", "x2", "x3", "n"]
        for row in batch.to_pylist():
            found[tuple(row.values())[:4]] += row["n"]
    tokens = tokens_of(str(corpus), text).tolist()
    expected: Counter = Counter()
    for level in (1, 2, 3):
        grams = [tuple(tokens[i : i + level]) for i in range(len(tokens) - level + 1)]
        inside = [gram for gram in grams if END not in gram[:-1]]
        behind = (NONE,) * (3 - level)
        expected.update((level, *gram, *behind) for gram in inside)
        expected[(level, NONE, NONE, NONE)] = len(inside)
    assert found == expected


@pytest.fixture
def pyspark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One that need not be installed, and whose sessions do not start."""
    names = ("pyspark", "pyspark.errors", "pyspark.sql", "py4j", "py4j.protocol")
    modules = {name: ModuleType(name) for name in names}

    class PySparkException(Exception):
        pass

    class Py4JError(Exception):
        pass

    class Builder:
        def appName(self, _: str) -> "Builder":
            return self

        master = appName

        def config(self, *_: str) -> "Builder":
            return self

        def getOrCreate(self) -> None:
            raise Py4JError("An error occurred\njava.lang.IllegalStateException: and a hundred lines")

    modules["pyspark.errors"].PySparkException = PySparkException
    modules["pyspark.sql"].SparkSession = type("SparkSession", (), {"builder": Builder()})
    modules["py4j.protocol"].Py4JError = Py4JError
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["pyspark"]


@pytest.fixture
def java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "jdk" / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))


def said_by(master: str) -> str:
    with pytest.raises(TrainingError) as error:
        start(Cluster(master))
    (line,) = str(error.value).splitlines()
    return line


def test_no_pyspark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py4j", None)
    monkeypatch.setitem(sys.modules, "pyspark", None)
    assert "needs pyspark: pip install 'dynamo-edge[cpu,train,spark]'" in said_by("local[1]")


def test_no_java(pyspark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    line = said_by("local[1]")
    assert "needs Java 17 or 21, and there is no `java` on the PATH" in line and "--engine duckdb" in line
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    assert f"JAVA_HOME, '{tmp_path / 'jdk'}', has no bin/java" in said_by("local[1]")


def test_no_master(pyspark: ModuleType, java: None) -> None:
    with socket.socket() as taken:  # a port at which nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"spark://127.0.0.1:{taken.getsockname()[1]}"
        line = said_by(url)
        assert f"no Spark master answers at '{url}'" in line and "start it, or give --master the URL" in line
    assert "no Spark master answers at 'spark://host'" in said_by("spark://host")
    with socket.create_server(("127.0.0.1", 0)) as other:
        line = said_by(f"{url},127.0.0.1:{other.getsockname()[1]}")
    assert "Spark does not start at" in line and "An error occurred" in line, "of two masters one answers"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java")
def test_spark_writes_the_same_bits(corpus: Path, text: Text, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    pytest.importorskip("pyspark")
    min_counts = [1, 2, 3]
    counts = count_ngrams(
        tokens_of(str(corpus), text), 3, vocab_size=text.vocab_size, end_id=END, min_counts=min_counts
    )
    assert 0 < len(counts.keys[1]) < len(WORDS) ** 3
    counts.save(tmp_path / "expected.npz")
    settings = {"spark.sql.shuffle.partitions": "3", "spark.ui.enabled": "false"}
    how = Counting("spark", 4 << 30, "local[2]", settings)
    kept = write_counts_of_corpus(str(corpus), text, tmp_path / "found.npz", how, min_counts, tmp_path / "work")
    assert kept == [len(keys) for keys in counts.keys]
    assert (tmp_path / "found.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()
