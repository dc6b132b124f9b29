"""A random T3 model of Pythia-160M's shape at fp32: it costs what such models cost, and says nothing sensible.

python benchmarks/random_model.py FOLDER      # prints where its bundle lies
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from dynamo_export.export import export_bundle
from dynamo_model import DEFAULT_CHECKPOINT, MultiTokenModel
from dynamo_train.cooccurrence import FILE, count_ngrams

VOCAB = 50304


def make_bundle(work: Path) -> Path:
    """Export the random model, with counts of random text that its heads' top-k meet often."""
    graph = work / "bundle" / "model.onnx"
    if graph.is_file():
        return graph
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
    )
    checkpoint = work / "checkpoint"
    model = MultiTokenModel(AutoModelForCausalLM.from_config(config), 3)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms of equal weights would be merged
            parameter.data += 0.02 * torch.randn(parameter.shape)
    model.save(checkpoint)
    AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT).save_pretrained(checkpoint)
    tokens = np.random.default_rng(0).zipf(1.2, 3_000_000) % VOCAB
    counts = count_ngrams(tokens.astype(np.uint16), 3, vocab_size=VOCAB, end_id=None, min_counts=[1, 1, 1])
    counts.save(checkpoint / FILE)
    return export_bundle(graph, checkpoint, parity_length=64)


if __name__ == "__main__":
    print(make_bundle(Path(sys.argv[1])))
