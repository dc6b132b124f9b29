"""Peak memory of quantizing a bundle, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from support import handmade

VOCAB = 30_000
SCRIPT = """
import json, sys
from dynamo_quantize import blocks, quantize, quantize_bundle
from dynamo_quantize.memory import peak_bytes
from dynamo_runtime.providers import import_onnxruntime
import_onnxruntime()
blocks._nbits()
for name, size in {"CALIBRATION_PIECES": 2, "CALIBRATION_TOKENS": 64, "TEXTS": 1, "TEXT_TOKENS": 32, "WIDTHS": 1,
                   "WIDTH_TOKENS": 8, "PROMPTS": 1, "PROMPT_TOKENS": 8, "NEW_TOKENS": 4}.items():
    setattr(quantize, name, size)
quantize.gates.peak_memory = lambda folder: None
before = peak_bytes()
source, output, text = sys.argv[1:]
quantize_bundle(source, output, "int8", calibration=text, gate_text=text, allow_degraded=True)
print(json.dumps({"before": before, "peak": peak_bytes()}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_peak_memory(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two and a half times the fp32 weights on top of the imported libraries, gates and all."""
    for name, size in {"HIDDEN": 640, "QUERY_HEADS": 40, "KV_HEADS": 40}.items():
        monkeypatch.setattr(handmade, name, size)
    source = tmp_path / "source"
    source.mkdir()
    onnx.save(handmade.build_graph(VOCAB, 1), source / "model.onnx")
    handmade.train_tokenizer().save(str(source / "tokenizer.json"))
    handmade.write_manifest(source, n_heads=1, vocab_size=VOCAB, top_k_outputs=128, sampling={})
    weights = (source / "model.onnx").stat().st_size
    assert weights > 150e6
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "out" / "m.onnx"), str(text)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout.splitlines()[-1])
    used = memory["peak"] - memory["before"]
    assert weights < used, "a session holds all weights, so less than that was not measured"
    assert used <= 2.5 * weights, (memory, weights)
    assert (tmp_path / "out" / "m.onnx").stat().st_size < 0.3 * weights
