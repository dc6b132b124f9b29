"""What a decode step costs outside onnxruntime, on a random T3 model of Pythia-160M's shape at fp32.

    python benchmarks/step_overhead.py [--work FOLDER]

Exports the model (once, into FOLDER) and runs every strategy on it in interleaved rounds.  Random weights say nothing
sensible, so `dynamo` runs at ε_b = 0: every step forms, masks, thresholds and samples the whole joint.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from dynamo_export.export import export_bundle
from dynamo_model import DEFAULT_CHECKPOINT, MultiTokenModel
from dynamo_runtime import Engine
from dynamo_train.cooccurrence import FILE, count_ngrams

VOCAB = 50304
STRATEGIES: dict[str, dict[str, Any]] = {
    "autoregressive": {"strategy": "autoregressive"},
    "dynamo, ε_b 0.5": {"strategy": "dynamo", "backoff_threshold": 0.5},
    "dynamo, ε_b 0": {"strategy": "dynamo", "backoff_threshold": 0.0},
    "speculative, greedy": {"strategy": "speculative", "temperature": 0.0},
}


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


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keeps the bundle (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        engine = Engine(make_bundle(arguments.work or Path(temporary)), threads=arguments.threads)
        prompt = np.random.default_rng(1).integers(1, VOCAB, 64).tolist()
        shares: dict[str, list[float]] = {name: [] for name in STRATEGIES}
        steps: dict[str, list[float]] = {name: [] for name in STRATEGIES}
        for turn in range(arguments.rounds + 1):
            for name, options in STRATEGIES.items():
                engine.reset()
                result = engine.generate(
                    prompt, max_new_tokens=arguments.new_tokens, seed=turn, ignore_eos=True, **options
                ).statistics
                if turn:  # the first round warms up
                    shares[name].append(result.outside_share)
                    steps[name].append((result.total_s - result.ttft_s) / (result.rounds - 1) * 1e3)
    print("| strategy | ms a step | outside onnxruntime |\n|---|---|---|")
    for name in STRATEGIES:
        print(f"| {name} | {statistics.median(steps[name]):.1f} | {statistics.median(shares[name]):.1%} |")
    print(f"\nMedians of {arguments.rounds} interleaved runs of {arguments.new_tokens} tokens. {describe_machine()}.")


if __name__ == "__main__":
    main()
