"""Opens plain bundles in Optimum and compares the tokens it writes with the runtime's, greedily.

    python -m venv optimum && optimum/bin/pip install 'dynamo-edge[cpu]' 'optimum-onnx==0.1.*' 'transformers<4.58'
    optimum/bin/python benchmarks/optimum_opens.py BUNDLE …

An environment of its own, since optimum-onnx 0.1 needs an older transformers than the export.  A bundle counts as
opened if all tokens agree, with the cache as Optimum keeps it; the status is 1 if one does not.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dynamo_runtime import Engine, SamplingParameters

PROMPTS = ("The capital of France is", "def read(path):\n", "Once upon a time")


def written_by_optimum(bundle: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Return new tokens of each prompt, by `ORTModelForCausalLM` and transformers' own greedy search."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model: Any = ORTModelForCausalLM.from_pretrained(bundle)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found


def check(bundle: Path, tokens: int) -> bool:
    """Compare, and print a line."""
    engine = Engine(bundle)
    greedy = SamplingParameters(temperature=0.0, repetition_penalty=1.0)
    prompts = [engine.encode(prompt) for prompt in PROMPTS]
    ours = [
        list(engine.generate(prompt, greedy, strategy="autoregressive", max_new_tokens=tokens).tokens)
        for prompt in prompts
    ]
    try:
        theirs = written_by_optimum(bundle, prompts, tokens)
    except Exception as error:
        print(f"{bundle}: not opened: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
        return False
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(f"{bundle}: {same} of {len(PROMPTS)} texts the same, {sum(map(len, ours))} tokens")
    return same == len(PROMPTS)


def main() -> int:
    """Check every bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=24, help="new ones, a text (default: %(default)s)")
    arguments = parser.parse_args()
    print(", ".join(f"{name} {version(name)}" for name in ("optimum-onnx", "transformers", "onnxruntime")))
    return 0 if all([check(bundle, arguments.tokens) for bundle in arguments.bundles]) else 1


if __name__ == "__main__":
    sys.exit(main())
