"""Results of generations that nobody generated, with figures that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamo_evaluate.prompts import Prompt
from dynamo_evaluate.results import Results
from dynamo_evaluate.settings import PLAIN, Setting

MACHINE = {"processor": "a machine", "provider": "cpu", "onnxruntime": "1.0", "python": "3"}
BUNDLE = {"name": "made-up", "kind": "parallel", "n_tokens": 3, "precision": "fp32", "sha256": "00"}
SAMPLING = {"temperature": 0.7, "top_k": 50, "repetition_penalty": 1.0}


def header(settings: list[Setting], prompts: int, seeds: int, **changes: Any) -> dict[str, Any]:
    """A header as `dynamo-eval generate` writes it."""
    return {
        "command": "generate",
        "bundle": BUNDLE,
        "plain": BUNDLE | {"kind": "plain"},
        "machine": MACHINE,
        "prompts": {"source": "made up", "sha256": "11"},
        "texts": [Prompt(str(i), (f"prompt {i}",)).record for i in range(prompts)],
        "seeds": seeds,
        "max_new_tokens": 12,
        "ignore_eos": True,
        "template": "{prompt}",
        "sampling": SAMPLING,
        "settings": [setting.record for setting in settings],
    } | changes


def generation(setting: str, prompt: int, seed: int, **figures: Any) -> dict[str, Any]:
    """A record: 12 tokens in as many passes and 12 seconds, unless said otherwise."""
    record = {
        "kind": "generation",
        "setting": setting,
        "prompt": str(prompt),
        "turn": 0,
        "seed": seed,
        "text": f"{setting} says {prompt} at {seed}",
        "finish": "length",
        "tokens": 12,
        "passes": 12,
        "seconds": 12.0,
        "steps": {"1": 12},
        "measures": {"nll": 1.0},
    }
    return record | figures


def grid(path: Path | None, thresholds: list[float], prompts: int = 4, seeds: int = 3, **changes: Any) -> Results:
    """Plain, and dynamo at some ε_b: the lower, the faster, and the further its likelihood is from plain's.

    Plain's likelihood is 1 plus 0.1, 0 or -0.1 by seed; dynamo's is 2 (1 - ε_b) below, at 3 - 2 ε_b times the speed.
    """
    settings = [Setting(PLAIN, "autoregressive", plain=True)]
    settings += [Setting(f"dynamo, ε_b {e:g}", "dynamo", False, "dynamo", e) for e in thresholds]
    results = Results.start(path, header(settings, prompts, seeds, **changes))
    for prompt in range(prompts):
        for seed in range(seeds):
            noise = 0.1 * (1 - seed)
            results.append(generation(PLAIN, prompt, seed, measures={"nll": 1 + noise}))
            for e in thresholds:
                speed = 3 - 2 * e
                figures = {"seconds": 12 / speed, "passes": 4, "steps": {"3": 4}}
                figures |= {"measures": {"nll": 1 + noise - 2 * (1 - e)}}
                results.append(generation(f"dynamo, ε_b {e:g}", prompt, seed, **figures))
    return results
