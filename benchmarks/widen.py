"""Makes the embedded model larger without changing what it computes (Net2Net, Chen et al. 2016).

    python benchmarks/widen.py OUT [--times 3] [--layers 12]

The embedded model lives in the processor's cache, so its passes say little of models that do not.  This one costs what
a larger model costs, with the drafts and the text of a trained one: every hidden channel, attention head and
feed-forward neuron is repeated, with weights that read repeated channels divided by as many, and layers are added whose
outputs are zero.  At 3 times and 12 layers its layers are those of Pythia-160M (85 M weights, and 7 M a head).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from dynamo_model import DEFAULT_CHECKPOINT, MultiTokenModel


def widen(times: int, layers: int) -> MultiTokenModel:
    """Return the embedded model with `times` its width, and `layers` layers.

    Args:
        times: Repetitions of every channel.
        layers: At least as many as there are; the new ones come first.
    """
    small = MultiTokenModel.load(DEFAULT_CHECKPOINT)
    config = small.base.config
    old_layers = config.num_hidden_layers
    wide = GPTNeoXConfig(
        **config.to_dict()
        | {
            "hidden_size": config.hidden_size * times,
            "intermediate_size": config.intermediate_size * times,
            "num_attention_heads": config.num_attention_heads * times,
            "num_hidden_layers": layers,
        }
    )
    large = MultiTokenModel(GPTNeoXForCausalLM(wide), small.n_heads)
    source = small.state_dict()
    shift = layers - old_layers
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            number = next((part for part in name.partition(".layers.")[2].split(".")[:1]), "")
            if "gpt_neox.layers." in name and int(number) < shift:
                ends = ("attention.dense.weight", "attention.dense.bias", "dense_4h_to_h.weight", "dense_4h_to_h.bias")
                if name.endswith(ends):
                    parameter.zero_()
                continue
            old = name.replace(f".layers.{number}.", f".layers.{int(number) - shift}.") if number else name
            parameter.copy_(_repeated(old, source[old], times))
    return large


def _repeated(name: str, weight: Tensor, times: int) -> Tensor:
    if weight.dim() == 1:
        return weight.repeat(times)
    if "embed_in" in name:
        return weight.repeat(1, times)
    if "lm_head" in name:
        return weight.repeat(1, times) / times
    return weight.repeat(times, times) / times  # heads follow each other, so repeating all their channels repeats them


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    large = widen(arguments.times, arguments.layers)
    ids = torch.randint(0, large.base.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        small = MultiTokenModel.load(DEFAULT_CHECKPOINT)(ids)
        difference = max(float((a - b).abs().max()) for a, b in zip(small, large(ids), strict=True))
    if difference > 1e-2:
        raise SystemExit(f"the larger model computes something else: logits differ by {difference:.3g}")
    large.save(arguments.out)
    AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT).save_pretrained(arguments.out)
    counts = DEFAULT_CHECKPOINT / "cooccurrence.npz"
    (arguments.out / counts.name).write_bytes(counts.read_bytes())
    print(f"{arguments.out}: logits differ from the embedded model's by at most {difference:.1e}")


if __name__ == "__main__":
    main()
