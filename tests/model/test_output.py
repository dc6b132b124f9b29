"""From states to logits, against the formulas written out, for bases that change their logits behind the embedding."""

from __future__ import annotations

import pytest
import torch
from support import checkpoints
from torch import Tensor

from dynamo_model import CPModel, MultiTokenModel
from dynamo_model.output import Output, logits_of

FORMULAS = {
    "granite": lambda logits: logits / 3.0,
    "cohere": lambda logits: logits * 0.25,
    "cohere2": lambda logits: logits * 2.5,
    "gemma2": lambda logits: 0.5 * torch.tanh(logits / 0.5),
    "phi": lambda logits: logits,  # its output embedding has a bias
}
IDS = torch.tensor([[7, 250, 3, 91, 18, 300, 42]])


@pytest.mark.parametrize("name", FORMULAS)
def test_every_head_goes_the_bases_way(name: str) -> None:
    base = checkpoints.random_base(checkpoints.CONFIGS[name])
    embedding = base.get_output_embeddings()
    assert (embedding.bias is not None) == (name == "phi")

    def naive(state: Tensor) -> Tensor:
        product = state @ embedding.weight.T
        return FORMULAS[name](product if embedding.bias is None else product + embedding.bias)

    with torch.no_grad():
        own = base(IDS).logits
        multi = MultiTokenModel(base, 3)
        multi.heads[1].load_state_dict(multi.decoder.layers[-1].state_dict())
        first, second, copied = multi(IDS)
        state = multi.states(IDS)[1]
        torch.testing.assert_close(first, own)
        torch.testing.assert_close(copied, own)
        torch.testing.assert_close(second, naive(state))
        torch.testing.assert_close(logits_of(base, state), naive(state))
        if name != "phi":  # what is behind the embedding matters at the size of these logits
            assert (second - state @ embedding.weight.T).abs().max() > 0.05 * second.abs().max()

        joint = CPModel(base, 2, 3)
        logits, _, factors = joint(IDS)
        torch.testing.assert_close(logits, own)
        torch.testing.assert_close(factors, naive(joint.mixture(joint.states(IDS)[1])[1]))


def test_scale_and_cap_by_hand() -> None:
    logits = torch.tensor([-4.0, 0.0, 1.0])
    assert Output().behind(logits) is logits
    torch.testing.assert_close(Output(2.0, 3.0).behind(logits), 3 * torch.tanh(logits * 2 / 3))
