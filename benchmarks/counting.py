"""How long counting n-grams takes, how much memory and disk, by engine and number of tokens.

    python benchmarks/counting.py --tokens 1000000 10000000 --engines memory duckdb spark cluster
    python benchmarks/counting.py --table

Text is drawn from Zipf's law, a token at a time, which is the hardest case: hardly an n-gram comes twice.  Every
engine counts in a process of its own, and files are compared bit by bit.  `memory` and `duckdb` count a file of
tokens; `spark` reads and tokenises shards of text in one process of two threads, `cluster` on a standalone master
and worker that are started on loopback.  With --merge, runs go into what --out has already.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from machine import describe_machine

from dynamo_train.arguments import size

VOCAB, END, DOCUMENT = 49_152, 0, 500
SHARD_TOKENS = 1_000_000
ENGINES = ("memory", "duckdb", "spark", "cluster")
RESULTS = Path(__file__).parent / "results" / "counting.json"


def zipf_tokens(tokens: int, path: Path) -> None:
    """Write a stream of documents of 500 tokens; every block is drawn with a seed of its own."""
    bounds = np.cumsum(1 / np.arange(1, VOCAB))
    with path.open("wb") as file:
        for block, start in enumerate(range(0, tokens, SHARD_TOKENS)):
            length = min(SHARD_TOKENS, tokens - start)
            drawn = 1 + np.searchsorted(bounds, np.random.default_rng([0, block]).random(length) * bounds[-1])
            drawn[DOCUMENT - 1 :: DOCUMENT] = END
            drawn[-1] = END
            drawn.astype(np.uint16).tofile(file)


def write_shards(stream: Path, folder: Path) -> None:
    """Write the same documents as text, a word a token, in parquet files."""
    import pyarrow
    import pyarrow.parquet

    tokens = np.memmap(stream, np.uint16, "r")
    for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
        documents = np.split(block := tokens[start : start + SHARD_TOKENS], np.flatnonzero(block == END) + 1)
        texts = [" ".join(map(str, document[:-1].tolist())) for document in documents if len(document)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"texts-{number:05}.parquet")


def count(engine: str, folder: Path, limit: int, min_counts: list[int], master: str) -> None:
    """Count the text in a folder, in a process that is measured, and say its own peak of memory."""
    from dynamo_train.counting import Counting, write_counts, write_counts_of_corpus

    out, work = folder / "counts.npz", folder / "work"
    began = time.perf_counter()
    if engine in ("spark", "cluster"):
        from dynamo_train.ngram_spark import Text

        settings = {"spark.ui.enabled": "false", "spark.driver.host": "127.0.0.1", "spark.sql.shuffle.partitions": "16"}
        settings["spark.executorEnv.PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        how = Counting("spark", limit, master, settings)
        text = Text(_tokenizer(), VOCAB, END, 1e-9)
        kept = write_counts_of_corpus(str(folder / "shards"), text, out, how, min_counts, work)
    else:
        from dynamo_train.tokens import CorpusRecord, TokenStreams

        tokens = np.memmap(folder / "tokens.bin", np.uint16, "r")
        streams = TokenStreams(tokens, tokens[:0], CorpusRecord("Zipf", 1, 0, 0, len(tokens), 0, 0.0, ""))
        how = Counting(engine, limit)
        kept = write_counts(streams, out, how, vocab_size=VOCAB, end_id=END, min_counts=min_counts, work=work)
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": 1024 * int(peak), "kept": kept}))


def _tokenizer() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(VOCAB)}, unk_token=str(END)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer.to_str()


def measured(engine: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """Run `count` in a process, and watch memory of all it starts, and the disk it takes."""
    out = folder / "counts.npz"
    command = [sys.executable, __file__, "--count", engine, str(folder), *options]
    most, disk = 0, 0
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            most = max(most, sum(_held(each) for each in [process, *_children(process)]))
            disk = max(disk, _disk(folder / "work"))
            time.sleep(0.1)
        said.seek(0)
        lines = said.read().decode().splitlines()
    if child.returncode:
        sys.exit(f"{engine}: the process ended with status {child.returncode}")
    found: dict[str, Any] = json.loads(lines[-1])
    content = out.read_bytes()
    out.unlink()
    return found | {
        "peak_bytes_of_all": most,
        "disk_bytes": disk,
        "file_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _held(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _disk(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """Yield a standalone master and one worker of two cores on loopback; gives the master's URL."""
    import pyspark

    home = Path(pyspark.__file__).parent
    host, port = "127.0.0.1", _free_port()
    environment = os.environ | {"SPARK_HOME": str(home), "SPARK_LOCAL_IP": host, "PYSPARK_PYTHON": sys.executable}
    url = f"spark://{host}:{port}"
    here = ["--host", host, "--webui-port", "0"]
    room = ["--cores", "2", "--memory", "2G", "--work-dir", str(folder / "worker")]
    commands = (
        ["org.apache.spark.deploy.master.Master", *here, "--port", str(port)],
        ["org.apache.spark.deploy.worker.Worker", *here, *room, url],
    )
    started: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "cluster.log").open("wb") as log:
            for command in commands:
                started.append(
                    subprocess.Popen(
                        [home / "bin" / "spark-class", *command],
                        env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    )
                )  # fmt: skip
                if len(started) == 1:
                    _wait_for(host, port)
        yield url
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _wait_for(host: str, port: int, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), 1).close()
            return
        except OSError:
            if time.monotonic() > until:
                sys.exit(f"Spark's master does not listen on port {port}")
            time.sleep(0.2)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return all runs that are asked for."""
    runs = []
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory(dir=arguments.work) as name:
            folder = Path(name)
            zipf_tokens(tokens, folder / "tokens.bin")
            (folder / "shards").mkdir()
            if {"spark", "cluster"} & set(arguments.engines):
                write_shards(folder / "tokens.bin", folder / "shards")
            for engine in arguments.engines:
                options = ["--memory-limit", str(arguments.memory_limit), "--min-counts", arguments.min_counts]
                with cluster(folder) if engine == "cluster" else nullcontext("local[2]") as master:
                    found = measured(engine, folder, [*options, "--master", master])
                about = {"engine": engine, "tokens": tokens, "memory_limit": arguments.memory_limit}
                runs.append(about | {"min_counts": arguments.min_counts} | found)
                print(json.dumps(runs[-1]), flush=True)
                shutil.rmtree(folder / "work", ignore_errors=True)
    return runs


def table(results: dict[str, Any]) -> str:
    """Return the runs as a table, and whether all engines wrote the same."""
    lines = [
        f"Zipf text of {VOCAB} tokens, {results['machine']}:",
        "",
        "| tokens | kept from | engine | limit | time | peak, process | peak, all | on disk | pairs | triples | file |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    same: dict[tuple[int, str], set[str]] = {}
    for each in results["runs"]:
        same.setdefault((each["tokens"], each["min_counts"]), set()).add(each["sha256"])
        limit = f"{each['memory_limit'] / 1e6:.0f} MB" if each["engine"] == "duckdb" else ""
        sizes = [each[name] / 1e6 for name in ("peak_bytes", "peak_bytes_of_all", "disk_bytes")]
        cells = [f"{each['tokens'] / 1e6:g} M", each["min_counts"], each["engine"], limit, f"{each['seconds']:.1f} s"]
        cells += [f"{value:,.0f} MB" for value in sizes]
        cells += [f"{number / 1e6:.2f} M" for number in each["kept"]] + [f"{each['file_bytes'] / 1e6:.1f} MB"]
        lines.append("| " + " | ".join(cells) + " |")
    differ = [key for key, found in same.items() if len(found) > 1]
    lines += ["", f"Engines differ at {differ}." if differ else "All engines wrote the same bits."]
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=["memory", "duckdb"])
    parser.add_argument("--memory-limit", type=size, default=10**9)
    parser.add_argument("--min-counts", default="1,1,2")
    parser.add_argument("--work", type=Path, help="folder with room for tokens and what does not fit into memory")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--merge", action="store_true", help="add to the results there, in place of those alike")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the table of --out")
    parser.add_argument("--master", help=argparse.SUPPRESS)
    parser.add_argument("--count", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count:
        engine, folder = arguments.count[0], Path(arguments.count[1])
        least = [int(part) for part in arguments.min_counts.split(",")]
        count(engine, folder, arguments.memory_limit, least, arguments.master)
        return
    if not arguments.table:
        results: dict[str, Any] = {"machine": describe_machine(), "runs": run(arguments)}
        if arguments.merge and arguments.out.is_file():
            key = ("engine", "tokens", "memory_limit", "min_counts")
            new = {tuple(each[name] for name in key) for each in results["runs"]}
            old = json.loads(arguments.out.read_text())["runs"]
            results["runs"] += [each for each in old if tuple(each[name] for name in key) not in new]
        results["runs"].sort(key=lambda each: (each["tokens"], each["min_counts"], ENGINES.index(each["engine"])))
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(json.loads(arguments.out.read_text())))


if __name__ == "__main__":
    main()
