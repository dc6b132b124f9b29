"""The joint objective of CP heads, against the explicit joint tensor over a tiny vocabulary."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from dynamo_model import CPModel
from dynamo_train import TrainingError, loop
from dynamo_train.joint import JointCLM, load_balance
from dynamo_train.objective import Objective
from dynamo_train.optimizers import make_optimizers
from dynamo_train.recipe import Recipe
from dynamo_train.tokens import CorpusRecord, TokenStreams, validation_batches

VOCAB = 7
WholeAndResumed = Callable[[Callable[[], Objective]], list[dict[str, torch.Tensor]]]


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    return replace(recipe, length=12)


@pytest.fixture
def streams(record: CorpusRecord) -> TokenStreams:
    return TokenStreams(twins(200, 0), twins(60, 1), record)


def make(n_tokens: int = 3, rank: int = 4) -> CPModel:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB
    )
    model = CPModel(AutoModelForCausalLM.from_config(config), n_tokens, rank)
    with torch.no_grad():  # a stem with something to say, and components that differ
        model.multi.decoder.embed_in.weight *= 50
        model.multi.output_embedding.weight *= 20
        model.gate.weight *= 20
        model.factors.weight += 0.2 * torch.randn_like(model.factors.weight)
    return model


def some_tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def twins(n: int, seed: int) -> np.ndarray:
    """0 X X 0 X X …, X = 1 or 2 by a fair coin: the two tokens behind a 0 are uncertain, but always the same."""
    coins = np.random.default_rng(seed).integers(1, 3, n)
    return np.stack([np.zeros(n, int), coins, coins], 1).ravel().astype(np.uint16)


def dense_joint(model: CPModel, tokens: torch.Tensor) -> torch.Tensor:
    """The joint distribution of the next three tokens at every position, [batch, length, V, V, V]."""
    _, log_w, logits = model(tokens[:, :-3])
    first, second, third = logits.softmax(-1).unbind(2)
    return torch.einsum("bta,btax,btay,btaz->btxyz", log_w.exp(), first, second, third)


def naive_losses(model: CPModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The base's, the joint and the load-balancing loss from whole tensors."""
    first, log_w, _ = model(tokens[:, :-3])
    joint = dense_joint(model, tokens)
    nll = [
        -joint[b, t, tokens[b, t + 1], tokens[b, t + 2], tokens[b, t + 3]].log()
        for b in range(joint.shape[0])
        for t in range(joint.shape[1])
    ]
    weights = log_w.exp().flatten(0, 1)
    preferred = weights.argmax(-1).bincount(minlength=model.rank) / len(weights)
    balance = sum(model.rank * preferred[a] * weights[:, a].mean() for a in range(model.rank))
    base = F.cross_entropy(first.flatten(0, 1), tokens[:, 1:-2].flatten())
    return base, torch.stack(nll).mean(), balance


def test_joint_loss_is_that_of_the_explicit_joint_tensor() -> None:
    model, tokens = make(), some_tokens(2, 9)
    totals = dense_joint(model, tokens).sum((2, 3, 4))
    torch.testing.assert_close(totals, torch.ones_like(totals))
    losses = JointCLM(model, balance=0.25)(tokens)
    base, joint, balance = naive_losses(model, tokens)
    torch.testing.assert_close(losses, torch.stack([base, joint, 0.25 * balance]))


def test_gradient_is_that_of_the_explicit_joint_tensor_scaled_into_shared_weights() -> None:
    model, tokens = make(), some_tokens(2, 9)

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}

    ours = gradients(JointCLM(model, balance=0.25, shared_gradient_scale=0.1)(tokens).sum())
    base, joint, balance = naive_losses(model, tokens)
    from_base = gradients(base)
    base, joint, balance = naive_losses(model, tokens)
    from_joint = gradients(joint + 0.25 * balance)
    shared = {f"multi.base.{name}" for name, _ in model.base.named_parameters()}
    for name, gradient in ours.items():
        expected = from_base[name] + (0.1 if name in shared else 1.0) * from_joint[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_rank_1_is_independent_heads() -> None:
    model, tokens = make(rank=1), some_tokens(3, 10)
    _, _, logits = model(tokens[:, :7])
    expected = sum(
        F.cross_entropy(logits[:, :, s, 0].flatten(0, 1), tokens[:, s + 1 : s + 8].flatten()) for s in range(3)
    )
    losses = JointCLM(model, balance=0.5)(tokens)
    torch.testing.assert_close(losses[1], expected)
    assert losses[2].item() == 0.5


def test_figures_are_marginals_of_the_explicit_joint_tensor() -> None:
    model = make().eval()
    batches = [some_tokens(2, 9).numpy(), some_tokens(1, 9).numpy()]
    pair, triple, first, gates = [], [], [], []
    with torch.no_grad():
        for array in batches:
            tokens = torch.from_numpy(array)
            joint = dense_joint(model, tokens)
            base_logits, log_w, _ = model(tokens[:, :-3])
            for b in range(joint.shape[0]):
                for t in range(joint.shape[1]):
                    x1, x2, x3 = tokens[b, t + 1 : t + 4]
                    pair.append(joint[b, t, x1, x2].sum().log())
                    triple.append(joint[b, t, x1, x2, x3].log())
                    first.append(base_logits[b, t].log_softmax(-1)[x1])
                    gates.append(log_w[b, t].exp())
    figures = JointCLM(model, balance=0.0).validate(batches)
    assert list(figures) == ["ppl_1", "gate_min", "ppl_1:2", "ppl_1:3"]
    assert figures["ppl_1"] == pytest.approx(math.exp(-np.mean(first)), rel=1e-5)
    assert figures["ppl_1:2"] == pytest.approx(math.exp(-np.mean(pair) / 2), rel=1e-5)
    assert figures["ppl_1:3"] == pytest.approx(math.exp(-np.mean(triple) / 3), rel=1e-5)
    assert figures["gate_min"] == pytest.approx(torch.stack(gates).mean(0).min().item(), rel=1e-5)


def test_load_balance_by_hand() -> None:
    weights = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]], requires_grad=True)
    loss = load_balance(weights)
    assert loss.item() == pytest.approx(2 * (2 / 3 * 0.7 + 1 / 3 * 0.3))
    loss.backward()
    # Two of three prefer the first component; the preference itself is a constant.
    torch.testing.assert_close(weights.grad, 2 * torch.tensor([[2 / 9, 1 / 9]]).expand(3, -1))
    assert load_balance(torch.eye(4)).item() == pytest.approx(1.0)
    assert load_balance(F.one_hot(torch.zeros(5, dtype=torch.long), 4).float()).item() == pytest.approx(4.0)


def test_balance_brings_a_dead_component_back() -> None:
    """Components that say the same leave the joint loss indifferent to the gate: only balance moves it."""
    tokens = some_tokens(4, 12)

    def smallest_gate(balance: float, steps: int) -> float:
        model = make(n_tokens=2, rank=2)
        with torch.no_grad():
            one = model.factors.weight.view(2, 2, 16, 16)
            one[:, 1] = one[:, 0]
            context = model.states(tokens)[1].flatten(0, 1)
            preference = torch.linalg.pinv(context, rtol=1e-2) @ torch.full((len(context),), 4.0)
            model.gate.weight.copy_(torch.stack([preference / 2, -preference / 2]))  # w = (0.98, 0.02) everywhere
        objective = JointCLM(model, balance, freeze_base=True)
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(objective(tokens).sum(), model.gate.weight)
            with torch.no_grad():
                model.gate.weight -= 0.1 * gradient
        return objective.validate([tokens.numpy()])["gate_min"]

    assert smallest_gate(1.0, steps=0) == pytest.approx(0.018, abs=0.002)
    assert smallest_gate(0.0, steps=100) == pytest.approx(0.018, abs=0.002)
    assert smallest_gate(1.0, steps=100) > 0.3


def test_rank_2_learns_what_independent_heads_cannot(recipe: Recipe, streams: TokenStreams, tmp_path: Path) -> None:
    """Behind a 0, X X has one bit of entropy, two for independent heads; behind the second X, 0 X has one."""
    bound = {1: math.exp(3 * math.log(2) / 6), 2: math.exp(2 * math.log(2) / 6)}  # 1.41 and 1.26 a token
    recipe = replace(recipe, steps=100, heads_lr=1e-2, freeze_base=True)
    found = {}
    for rank in (1, 2):
        objective = JointCLM(make(2, rank), balance=0.01, freeze_base=True)
        before = {name: tensor.clone() for name, tensor in objective.model.base.state_dict().items()}
        start = objective.validate(validation_batches(streams.held_out, sequences=2, length=12, extra=2))
        found[rank] = loop.train(objective, streams, recipe, tmp_path / str(rank)).figures
        assert found[rank]["ppl_1:2"] < start["ppl_1:2"]
        assert found[rank]["ppl_1"] == start["ppl_1"]
        assert all(torch.equal(before[name], p) for name, p in objective.model.base.state_dict().items())
    assert bound[1] < found[1]["ppl_1:2"]
    assert bound[2] < found[2]["ppl_1:2"] < 0.5 * (bound[1] + bound[2])


def test_training_the_base_along_changes_it_and_lowers_all_losses(
    recipe: Recipe, streams: TokenStreams, tmp_path: Path
) -> None:
    model = make(2, 2)
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    recipe = replace(recipe, steps=40, base_lr=5e-3)
    objective = JointCLM(model, 0.01, shared_gradient_scale=0.1)
    start = objective.validate(validation_batches(streams.held_out, sequences=2, length=12, extra=2))
    end = loop.train(objective, streams, recipe, tmp_path).figures
    lines = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1][0] < 0.5 * lines[0][0] and lines[-1][1] < 0.5 * lines[0][1]
    assert end["ppl_1"] < 0.5 * start["ppl_1"] and end["ppl_1:2"] < 0.5 * start["ppl_1:2"]
    assert not any(torch.equal(before[name], p) for name, p in model.base.named_parameters())


def test_an_interrupted_run_ends_bit_equal(whole_and_resumed: WholeAndResumed) -> None:
    whole, resumed = whole_and_resumed(lambda: JointCLM(make(), 0.01, shared_gradient_scale=0.1))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_of_other_settings_is_refused(recipe: Recipe, streams: TokenStreams, tmp_path: Path) -> None:
    recipe = replace(recipe, steps=1)
    loop.train(JointCLM(make(), 0.01), streams, recipe, tmp_path)
    with pytest.raises(TrainingError, match=r"another run: objective\.balance was 0\.01 and is 0\.02"):
        loop.train(JointCLM(make(), 0.02), streams, recipe, tmp_path)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("freeze_base", [True, False])
def test_learning_rates_reach_their_parameters(kind: str, freeze_base: bool) -> None:
    objective = JointCLM(make(), 0.01, freeze_base)
    optimizers = make_optimizers(objective, kind=kind, base_lr=1e-5, heads_lr=1e-3, weight_decay=0.1)
    rate = {id(p): g["lr"] for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
    base = {id(p) for p in objective.model.base.parameters()}
    assert rate.keys() == {id(p) for p in objective.parameters()} - (base if freeze_base else set())
    assert all(lr == (1e-5 if parameter in base else 1e-3) for parameter, lr in rate.items())
    on_muon = {id(p) for group in optimizers[-1].param_groups for p in group["params"]} if kind == "muon" else set()
    matrices = {id(objective.model.gate.weight), id(objective.model.factors.weight)}
    assert matrices <= on_muon if kind == "muon" else not on_muon
