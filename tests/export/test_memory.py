"""Peak memory of an export, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import checkpoints
from transformers import GPTNeoXConfig

# Large enough for the weights (190 MB) to stand out from the libraries; a short context keeps the gate quick.
CONFIG = GPTNeoXConfig(
    vocab_size=24_000,
    hidden_size=640,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=10,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
    rope_parameters=checkpoints.rope("default", partial_rotary_factor=0.25),
)
SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from dynamo_export.export import export_bundle
from dynamo_quantize.memory import peak_bytes
before = peak_bytes()
graph = export_bundle(sys.argv[1], sys.argv[2])
print(json.dumps({"before": before, "peak": peak_bytes()}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
@pytest.mark.slow
def test_peak_memory(tmp_path: Path) -> None:
    """At most three times the fp32 weights on top of the imported libraries, from loading to the gate."""
    source = checkpoints.save_multi(tmp_path / "checkpoint", CONFIG)
    weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "out" / "model.onnx"), str(source)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    memory = json.loads(done.stdout.splitlines()[-1])
    assert memory["peak"] - memory["before"] <= 3 * weights, (memory, weights)
