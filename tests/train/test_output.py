"""Losses on bases that change their logits behind the output embedding, against whole logits and naive autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import checkpoints
from torch.utils._python_dispatch import TorchDispatchMode

from dynamo_model import CPModel, LookAheadModel, MultiTokenModel
from dynamo_train import objective
from dynamo_train.joint import JointCLM
from dynamo_train.look_ahead import LookAheadCLM
from dynamo_train.objective import Objective
from dynamo_train.parallel import ModifiedCLM

NAMES = ["granite", "cohere", "gemma2", "phi"]
TOKENS = torch.randint(0, checkpoints.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "CAPPED_LOGITS", 5 * checkpoints.VOCAB)


def base_of(name: str) -> Any:
    return checkpoints.random_base(checkpoints.CONFIGS[name])


def logits_of(name: str, model: Any, state: torch.Tensor) -> torch.Tensor:
    """As the architectures' papers and code have it."""
    embedding = model.get_output_embeddings()
    logits = state @ embedding.weight.T
    if name == "phi":
        return logits + embedding.bias
    return {"granite": logits / 3.0, "cohere": 0.25 * logits, "gemma2": 0.5 * torch.tanh(logits / 0.5)}[name]


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_one_step_of_token_heads(name: str) -> None:
    weights = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = MultiTokenModel(base_of(name), 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        states = model.states(TOKENS[:, :9])
        naive = torch.stack(
            [
                F.cross_entropy(logits_of(name, model.base, state).flatten(0, 1), TOKENS[:, k : k + 9].flatten())
                for k, state in enumerate(states, start=1)
            ]
        )
        losses = ModifiedCLM(model)(TOKENS)
        torch.testing.assert_close(losses, naive)
        likelihoods = ModifiedCLM(model).token_log_likelihoods(TOKENS)
        torch.testing.assert_close(-likelihoods.mean((1, 2)), naive.detach())
        (losses if ours else naive).sum().backward()
        optimizer.step()
        weights.append(model.state_dict())
    start = MultiTokenModel(base_of(name), 3).state_dict()
    assert not torch.equal(weights[0]["base.model.embed_tokens.weight"], start["base.model.embed_tokens.weight"])
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_loss_of_a_joint_head(name: str) -> None:
    model = CPModel(base_of(name), 2, 3)
    first, context = model.states(TOKENS[:, :10])
    log_w, factors = model.mixture(context)
    log_p = logits_of(name, model.base, factors).log_softmax(-1)  # [batch, length, n, rank, vocab]
    labels = torch.stack([TOKENS[:, 1:11], TOKENS[:, 2:12]], -1)[..., None, None].expand(-1, -1, -1, 3, 1)
    joint = -(log_w + log_p.gather(-1, labels)[..., 0].sum(-2)).logsumexp(-1).mean()
    base = F.cross_entropy(logits_of(name, model.base, first).flatten(0, 1), TOKENS[:, 1:11].flatten())
    losses = JointCLM(model, balance=0.0)(TOKENS)
    torch.testing.assert_close(losses[:2], torch.stack([base, joint]))
    ours = torch.autograd.grad(losses.sum(), model.factors.weight, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(joint, model.factors.weight), rtol=1e-4, atol=1e-6)


def test_loss_of_look_ahead_embeddings() -> None:
    """Against the base's own forward, with the look-ahead tokens behind every prefix of the text."""
    base = base_of("granite")
    model = LookAheadModel(base, 2)
    anchors = torch.arange(9).expand(2, -1)
    nll = LookAheadCLM(model, anchors=9).nll(TOKENS, anchors)
    ids = torch.tensor([checkpoints.VOCAB, checkpoints.VOCAB + 1]).expand(2, -1)
    for t in range(9):
        logits = model(torch.cat([TOKENS[:, : t + 1], ids], 1))[:, -2:]
        expected = F.cross_entropy(logits.flatten(0, 1), TOKENS[:, t + 2 : t + 4].flatten(), reduction="none")
        torch.testing.assert_close(nll[:, t].flatten(), expected, rtol=1e-4, atol=1e-5)


class _Largest(TorchDispatchMode):
    """The most numbers that any result over the vocabulary had, the turned embedding aside."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == checkpoints.VOCAB and len(out) != 64:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_capped_logits_of_all_positions_never_exist_at_once() -> None:
    model = MultiTokenModel(base_of("gemma2"), 2)
    whole: Objective = ModifiedCLM(model)
    with _Largest() as seen:
        whole(TOKENS).sum().backward()
    assert 0 < seen.numbers <= 5 * checkpoints.VOCAB
