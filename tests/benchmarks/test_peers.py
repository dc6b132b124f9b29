"""`benchmarks/peers.py`: what workers are asked and say, how texts are compared, and the page made of the figures."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import peer_models
import peer_worker
import peers
import peers_page
import pytest
from peers import PeerError
from support import chats, handmade

from dynamo_export.genai import genai_config
from dynamo_runtime import Engine, load_bundle

PROMPT = [5, 17, 40, 4, 30, 17, 40]

# Answers like llama-server: with the prompt backwards, and with times that say what it was asked.
SERVER = """#!{python}
import http.server, json, sys
if "--version" in sys.argv:
    sys.exit(print("version: 7 (abc)"))
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())
    def do_GET(self):
        self.reply({{"status": "ok"}})
    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        timings = {{"prompt_ms": 5.0, "predicted_ms": 1000.0 * job["ignore_eos"] + job["n_predict"], "draft_n": 3}}
        if not job["cache_prompt"] and job["return_tokens"] and job["temperature"] == 0:
            self.reply({{"tokens": job["prompt"][::-1], "timings": timings}})
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats.write_bundle(tmp_path_factory.mktemp("bundle") / "plain", "smollm2", 1, context_length=256).parent


def peer(kind: str, model: Path, **options: Any) -> peers.Peer:
    return peers.Peer("int8", kind, kind, model, sys.executable, options, {"plain": {}}, "")


def test_our_worker(bundle: Path) -> None:
    """Writes what the engine writes, goes on for as long as it is asked to, and ends with its input."""
    way = {"strategy": "autoregressive", "temperature": 0.0, "repetition_penalty": 1.0}
    worker = peers.Worker(peer("dynamo", bundle), 1)
    found = worker.ask(PROMPT, 12, way)
    with Engine(bundle, threads=1) as engine:
        assert found["tokens"] == engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True, **way).tokens
    assert found["first"] == 1 and found["first_s"] > 0 and found["decode_s"] > 0
    assert worker.peak_bytes == found["peak_bytes"] > 1 << 20
    worker.close()
    assert worker._process.returncode == 0


def test_genai_worker(bundle: Path) -> None:
    """Writes our tokens, n-grams drafted or not."""
    pytest.importorskip("onnxruntime_genai")
    described = genai_config(load_bundle(bundle), handmade.HIDDEN, handmade.QUERY_HEADS, pad=None)
    (bundle / "genai_config.json").write_text(json.dumps(described))
    genai = peer_worker.Genai(str(bundle), 1, {})
    with Engine(bundle, threads=1) as engine:
        way = {"strategy": "autoregressive", "temperature": 0.0, "repetition_penalty": 1.0}
        expected = engine.generate(PROMPT, max_new_tokens=24, ignore_eos=False, **way).tokens
    for way in ({}, {"ngram_size": 2, "max_draft_tokens": 4}):
        found = genai.run(PROMPT, 24, way, to_the_end=True)
        assert found["tokens"] == expected
        assert found["accepted"] <= found["drafted"] and (found["drafted"] > 0) == bool(way)
    assert len(genai.run(PROMPT, 24, {}, to_the_end=False)["tokens"]) == 24


def test_llama_cpp_worker(tmp_path: Path) -> None:
    """Is asked over HTTP, timed by the server, and ended with its worker."""
    server = tmp_path / "llama-server"
    server.write_text(SERVER.format(python=sys.executable))
    server.chmod(server.stat().st_mode | stat.S_IXUSR)
    worker = peers.Worker(peer("llama.cpp", tmp_path / "x.gguf", server=str(server), flags=["--spec-default"]), 1)
    assert worker.version == "7 (abc)"
    found = worker.ask([1, 2, 3], 8, {})
    assert (found["tokens"], found["first_s"], found["decode_s"]) == ([3, 2, 1], 0.005, 1.008)
    assert worker.ask([1, 2, 3], 8, {}, to_the_end=True)["decode_s"] == 0.008
    assert (found["drafted"], found["accepted"]) == (3, 0)
    worker.close()


def test_a_worker_that_ends_early(tmp_path: Path) -> None:
    """Is one line that says how to see why."""
    with pytest.raises(PeerError, match=r"genai: its process ended early: run .*peer_worker.py genai") as error:
        peers.Worker(peer("genai", tmp_path / "nothing"), 1)
    assert "\n" not in str(error.value)


def test_models_are_whole_or_not_there(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_text("half")
        raise PeerError("no")

    with pytest.raises(PeerError):
        peer_models.kept(tmp_path / "work" / "x", half)
    assert not list((tmp_path / "work").iterdir())
    assert peer_models.kept(tmp_path / "work" / "x", lambda path: path.mkdir()).is_dir()
    assert peer_models.kept(tmp_path / "work" / "x", half).is_dir()  # not made again
    with pytest.raises(PeerError, match=r"there is no llama-server in .*: python benchmarks/build_llama_cpp\.py"):
        peer_models.program(tmp_path, "llama-server")
    with pytest.raises(PeerError, match=r"ended with 3: why$"):
        peer_models.run([sys.executable, "-c", "print('first\\nwhy'); raise SystemExit(3)"])


def test_texts_beside_each_other() -> None:
    """Tokens in common before the texts part; `dynamo` is no plain text and not compared."""
    assert [peers.common(a, b) for a, b in (([1, 2], [1, 2]), ([1, 2], [1, 3, 4]), ([1], [1, 2]), ([2], [1]))] == [
        2,
        1,
        1,
        0,
    ]
    plain, drafted = {("chat", 0): [1, 2, 3, 4], ("edit", 0): [5, 6]}, {("chat", 0): [1, 2, 9, 4], ("edit", 0): [5, 6]}
    texts = {"int8/ours/plain": plain, "int8/x/plain": drafted, "int8/x/n-gram": plain, "int4/x/plain": plain}
    rows = {
        (row["precision"], row["peer"], row["way"]): row
        for row in peers.agreement({**texts, f"int8/ours/{peers.NOT_LOSSLESS[0]}": drafted})
    }
    assert len(rows) == len(texts)
    assert rows["int8", "x", "n-gram"]["same_as_plain"] == 1 and rows["int8", "x", "n-gram"]["same_as_ours"] == 2
    assert rows["int8", "x", "n-gram"]["in_common_with_plain"] == pytest.approx(4 / 6)
    assert "same_as_plain" not in rows["int8", "x", "plain"] and rows["int8", "x", "plain"]["same_as_ours"] == 1
    assert "same_as_ours" not in rows["int4", "x", "plain"]


def test_turns_rotate() -> None:
    assert [peers.in_turn([1, 2, 3], turn) for turn in (0, 1, 5)] == [[1, 2, 3], [2, 3, 1], [3, 1, 2]]


# --- the page ---------------------------------------------------------------------------------------------------------


def content() -> dict[str, Any]:
    """Figures of ours at 10 ms a token, of onnxruntime-genai on our bundle at 20, and of llama.cpp at 5."""
    found: dict[str, Any] = {"machine": "M", "taken": "busy", "model": "smollm2", "threads": 2, "peers": []}
    found |= {"conditions": {"rounds": 2, "prompts": 2, "new_tokens": 9}, "lengths": [], "answers": [], "agreement": []}
    for name, cost in (("ours", 0.01), ("genai, our bundle", 0.02), ("llama.cpp Q8_0", 0.005)):
        of_it = {"precision": "int8", "peer": name}
        described = {"ways": ["plain"], "version": "1", "flags": "-c", "bytes": 2e6, "load_s": 0.5, "peak_bytes": 0}
        found["peers"].append(of_it | described)
        for measure in ("prefill", "short", "long"):
            row = {"measure": measure, "tokens": [10, 30], "seconds": [10 * cost, 30 * cost]}
            found["lengths"].append(of_it | row)
        ways = ("plain", "auto", *peers.NOT_LOSSLESS) if name == "ours" else ("plain",)
        for way in ways:
            speed = {"plain": 1, "auto": 3}.get(way, 100)
            row = {"way": way, "task": "chat", "tokens": [10, 30], "first_s": [0.1, 0.3], "drafted": 4, "accepted": 1}
            found["answers"].append(of_it | row | {"seconds": [10 * cost / speed, 30 * cost / speed]})
    return found


def test_figures_of_the_page() -> None:
    """Ratios are those of the sums; what missed its aim is said so; a lossy way is nobody's best."""
    text = peers_page.document(content())
    assert "| int8 | plain time a token behind 64 ÷ genai, our bundle | ≤ 0.78 | 0.50 [0.50, 0.50] | met |" in text
    assert "| int8 | plain time a token behind 64 ÷ llama.cpp Q8_0 | ≤ 1.00 | 2.00 [2.00, 2.00] | missed |" in text
    assert "| int8 | genai, our bundle | 50.0 | 20.0 | 0.50 [0.50, 0.50] | 20.0 | 0.50 [0.50, 0.50] |" in text
    best = "| int8 | chat | ours, auto | llama.cpp Q8_0, plain | 1.50 [1.50, 1.50] | 1.50 [1.50, 1.50] |"
    assert best in text and "| ≥ 1.30 | 1.50 [1.50, 1.50] | met |" in text
    assert "Slower than llama.cpp Q8_0 behind 64 tokens (2.00)" in text and "**busy.**" in text
    assert "| int8 | ours | auto | 300 | 1 of 4 | 200 |" in text


def test_the_page_is_written_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, page = tmp_path / "figures.json", tmp_path / "peers.md"
    given = ["--results", str(results), "--output", str(page)]
    assert peers_page.main(given) == 1 and "is no file of benchmarks/peers.py" in capsys.readouterr().err
    results.write_text(json.dumps(content()))
    assert peers_page.main([*given, "--check"]) == 1 and not page.exists()
    assert peers_page.main(given) == 0 and (tmp_path / peers_page.PICTURE).is_file()
    assert peers_page.main([*given, "--check"]) == 0
    page.write_text(page.read_text().replace("missed", "met"))
    assert peers_page.main([*given, "--check"]) == 1 and "is out of date" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ours", "fp64=x"], "a bundle is int8 or int4, as in int8=FOLDER, not fp64"),
        (["--ours", "int8=x", "--peer-python", "ollama=y"], "--peer-python is for genai and transformers, not ollama"),
    ],
)
def test_names(arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That fit nothing."""
    with pytest.raises(SystemExit) as ended:
        peers.main([*arguments, "--json", str(tmp_path / "out.json")])
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_a_bundle_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and nothing written."""
    out = tmp_path / "out.json"
    assert peers.main(["--ours", f"int8={tmp_path / 'none'}", "--json", str(out)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("peers: error: ") and errors.count("\n") == 1 and not out.exists()
