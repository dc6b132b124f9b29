"""The look-ahead objective, whose one batched pass must equal the base run on `x_1 … x_t [LA]_1 … [LA]_L`."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from dynamo_model import LookAheadModel
from dynamo_train import TrainingError, loop
from dynamo_train.look_ahead import LookAheadCLM
from dynamo_train.objective import NextTokenCLM, Objective
from dynamo_train.optimizers import make_optimizers
from dynamo_train.recipe import Recipe
from dynamo_train.tokens import CorpusRecord, TokenStreams, validation_batches

VOCAB = 13
WholeAndResumed = Callable[[Callable[[], Objective]], list[dict[str, torch.Tensor]]]
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**SIZE, vocab_size=VOCAB, attention_dropout=0.5, hidden_dropout=0.5),
    "llama": LlamaConfig(**SIZE, vocab_size=VOCAB, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZE, vocab_size=VOCAB, num_key_value_heads=2),
}


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    return replace(recipe, length=14, base_lr=0.0, shared_gradient_scale=1.0, freeze_base=True)


@pytest.fixture
def streams(record: CorpusRecord) -> TokenStreams:
    """A text of period 5, as far as the position in the period can be known: every token is in it once."""
    train, held_out = (np.resize([3, 1, 4, 7, 5], n).astype(np.uint16) for n in (400, 100))
    return TokenStreams(train, held_out, record)


def make(config: PreTrainedConfig, n_look_ahead: int = 3, attention: str = "sdpa") -> LookAheadModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # a base with something to say about its input
        base.get_input_embeddings().weight *= 20
        for name, parameter in base.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter *= 5
    return LookAheadModel(base, n_look_ahead)


def some_tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def naive_nll(model: LookAheadModel, tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Every anchor on its own: the base on the text up to it and the look-ahead tokens, no cache, no mask."""
    look_ahead = VOCAB + torch.arange(model.n_look_ahead)
    result = torch.empty(*anchors.shape, model.n_look_ahead)
    for b, row in enumerate(anchors.tolist()):
        for a, t in enumerate(row):
            log_p = model(torch.cat([tokens[b, : t + 1], look_ahead])[None]).log_softmax(-1)[0]
            for i in range(1, model.n_look_ahead + 1):
                result[b, a, i - 1] = -log_p[t + i, tokens[b, t + 1 + i]]
    return result


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_pass_over_all_blocks_equals_a_pass_for_each(name: str, attention: str) -> None:
    model, tokens = make(CONFIGS[name], attention=attention), some_tokens(2, 13)
    objective = LookAheadCLM(model, anchors=4).train()
    anchors = torch.stack([torch.arange(9), torch.tensor([8, 0, 3, 3, 1, 7, 2, 6, 5])])  # first and last t among them
    naive = naive_nll(model, tokens, anchors)
    assert naive.std() > 0.1
    torch.testing.assert_close(objective.nll(tokens, anchors), naive, rtol=1e-4, atol=1e-5)

    naive_losses = naive_nll(model, tokens, objective.choose_anchors(tokens)).mean((0, 1))
    losses = objective(tokens)
    torch.testing.assert_close(losses, naive_losses, rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad(naive_losses.sum(), model.embeddings)
    (gradient,) = torch.autograd.grad(losses.sum(), model.embeddings)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_figures_are_perplexities_by_depth_at_the_same_anchors_every_time(streams: TokenStreams) -> None:
    model = make(CONFIGS["llama"])
    objective = LookAheadCLM(model, anchors=5)
    batches = validation_batches(streams.held_out, sequences=3, length=14, extra=1)
    with torch.no_grad():
        nll = torch.cat([naive_nll(model, t, objective.choose_anchors(t)) for t in map(torch.from_numpy, batches)])
    mean = nll.double().mean((0, 1))
    figures = objective.validate(batches)
    assert list(figures) == ["ppl_2", "ppl_3", "ppl_4", "ppl_2:4"]
    assert [figures[f"ppl_{i}"] for i in (2, 3, 4)] == pytest.approx(mean.exp().tolist(), rel=1e-4)
    assert figures["ppl_2:4"] == pytest.approx(math.exp(mean.mean()), rel=1e-4)
    torch.manual_seed(99)
    assert objective.validate(batches) == figures
    assert list(LookAheadCLM(make(CONFIGS["llama"], 1), anchors=5).validate(batches)) == ["ppl_2"]


def test_anchors_depend_on_seed_and_sequence_alone() -> None:
    model, tokens = make(CONFIGS["llama"]), some_tokens(3, 101)
    choice = LookAheadCLM(model, anchors=20, seed=1).choose_anchors(tokens)
    assert choice.shape == (3, 20)
    assert (choice.diff(dim=1) > 0).all() and choice.min() >= 0 and choice.max() <= 96  # t + 1 + 3 is the last label
    torch.manual_seed(99)
    again = LookAheadCLM(model, anchors=20, seed=1).choose_anchors(tokens[1:2])
    assert torch.equal(again[0], choice[1])
    assert not torch.equal(choice[0], choice[1])
    assert not torch.equal(LookAheadCLM(model, anchors=20, seed=2).choose_anchors(tokens), choice)
    everything = LookAheadCLM(model, anchors=200).choose_anchors(tokens)
    assert torch.equal(everything, torch.arange(97).expand(3, -1))
    with pytest.raises(TrainingError, match="too short"):
        LookAheadCLM(model, anchors=1).choose_anchors(tokens[:, :4])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_embeddings_learn_and_the_base_stays_bit_identical(
    optimizer: str, recipe: Recipe, streams: TokenStreams, tmp_path: Path
) -> None:
    """A base that knows a periodic text is made to say more of it at once."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, vocab_size=VOCAB))
    base_recipe = replace(recipe, steps=60, base_lr=1e-2, freeze_base=False)
    assert loop.train(NextTokenCLM(base), streams, base_recipe, tmp_path / "base").figures["ppl_1"] < 2

    objective = LookAheadCLM(LookAheadModel(base, 2), anchors=6)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    start = objective.validate(validation_batches(streams.held_out, sequences=2, length=14, extra=1))
    recipe = replace(recipe, steps=80, heads_lr=2e-2, optimizer=optimizer)
    end = loop.train(objective, streams, recipe, tmp_path / "run").figures
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert end["ppl_2"] < 0.7 * start["ppl_2"] and end["ppl_3"] < 0.7 * start["ppl_3"]


def test_only_the_embeddings_are_optimised_and_never_decay() -> None:
    objective = LookAheadCLM(make(CONFIGS["qwen2"]), anchors=4)
    for kind in ("adamw", "muon"):
        (optimizer,) = make_optimizers(objective, kind=kind, base_lr=0.0, heads_lr=1e-2, weight_decay=0.1)
        (group,) = optimizer.param_groups
        assert [id(p) for p in group["params"]] == [id(objective.model.embeddings)]
        assert (group["lr"], group["weight_decay"]) == (1e-2, 0.0)
    objective.model.base.requires_grad_(True)
    with pytest.raises(AssertionError):
        LookAheadCLM(objective.model, anchors=4)


def test_accumulated_micro_batches_equal_one_batch(recipe: Recipe, streams: TokenStreams, tmp_path: Path) -> None:
    results = []
    for micro_batch in (1, 4):
        model = make(CONFIGS["gpt_neox"])
        recipe = replace(recipe, micro_batch=micro_batch, steps=2)
        loop.train(LookAheadCLM(model, anchors=4), streams, recipe, tmp_path / str(micro_batch))
        results.append(model.embeddings)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_an_interrupted_run_ends_bit_equal(whole_and_resumed: WholeAndResumed) -> None:
    whole, resumed = whole_and_resumed(lambda: LookAheadCLM(make(CONFIGS["gpt_neox"]), anchors=4))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole["embeddings"], make(CONFIGS["gpt_neox"]).embeddings)


def test_a_checkpoint_of_other_settings_is_refused(recipe: Recipe, streams: TokenStreams, tmp_path: Path) -> None:
    recipe = replace(recipe, steps=1)
    loop.train(LookAheadCLM(make(CONFIGS["llama"]), anchors=4), streams, recipe, tmp_path)
    progress = json.loads((tmp_path / "checkpoint" / "progress.json").read_text())
    assert progress["fingerprint"]["objective"] == {"kind": "LookAheadCLM", "n_look_ahead": 3, "anchors": 4}
    with pytest.raises(TrainingError, match=r"another run: objective\.anchors was 4"):
        loop.train(LookAheadCLM(make(CONFIGS["llama"]), anchors=5), streams, recipe, tmp_path)
