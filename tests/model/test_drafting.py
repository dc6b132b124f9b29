"""Draft vocabulary and condition of token heads, against their definitions written out, and in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints

from dynamo_model import CheckpointError, MultiTokenModel
from dynamo_model.output import logits_of

NAMES = ["neox", "llama-linear-tied", "granite", "cohere", "gemma2", "phi"]  # the last has a bias, others scale or cap
WORDS = torch.tensor([7, 0, 300, 12, 41])
IDS = torch.randint(0, checkpoints.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def make(name: str = "neox", n_heads: int = 3, **options: Any) -> MultiTokenModel:
    """With conditions that say something."""
    torch.manual_seed(0)
    model = MultiTokenModel(checkpoints.random_base(checkpoints.CONFIGS[name]), n_heads, **options).eval()
    with torch.no_grad():
        for condition in model.conditions:
            condition.out.weight.normal_(std=0.05)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_a_softmax_over_the_words_of_the_draft_vocabulary(name: str) -> None:
    model = make(name, draft_vocabulary=WORDS)
    others = torch.ones(checkpoints.VOCAB, dtype=torch.bool)
    others[WORDS] = False
    with torch.no_grad():
        states, logits = model.states(IDS), model(IDS)
        torch.testing.assert_close(logits[0], model.base(IDS).logits)  # of all words
        for state, ours in zip(states[1:], logits[1:], strict=True):
            dense = logits_of(model.base, state).masked_fill(others, -torch.inf)
            torch.testing.assert_close(ours.softmax(-1), dense.softmax(-1))
            torch.testing.assert_close(model.draft_logits(state), dense[..., WORDS])


@pytest.mark.parametrize("name", NAMES)
def test_a_condition_is_its_formula(name: str) -> None:
    model = make(name, conditioned=True)
    state, previous = model.states(IDS)[2], IDS.flip(1)
    embedded = model.base.get_input_embeddings().weight[previous]
    first, second = (getattr(model.conditions[1], part).weight for part in ("hidden", "out"))
    assert first.shape == (64, 128) and second.shape == (64, 64)  # as wide as the base, which is narrower than 384
    hidden = torch.einsum("wh,bth->btw", first, torch.cat([state, embedded], -1))
    expected = state + torch.einsum("hw,btw->bth", second, hidden * torch.sigmoid(hidden))
    torch.testing.assert_close(model.condition(3, state, previous), expected)


def test_a_new_condition_changes_nothing_and_hears_both_parts() -> None:
    plain = make()
    torch.manual_seed(0)
    base = checkpoints.random_base(checkpoints.CONFIGS["neox"])
    new = MultiTokenModel(base, 3, conditioned=True, condition_width=48).eval()
    assert all(torch.equal(a, b) for a, b in zip(plain(IDS), new(IDS), strict=True))
    state = plain.states(IDS)[1]
    assert not plain.conditioned and not len(plain.conditions) and plain.condition(2, state, IDS) is state
    weight, embedding = new.conditions[0].hidden.weight.detach(), base.get_input_embeddings().weight
    assert new.conditioned and weight.shape == (48, 128)
    shares = [(torch.randn(1000, 64) @ weight[:, :64].T).std(), (embedding @ weight[:, 64:].T).std()]
    assert 0.8 < shares[0] / shares[1] < 1.25


def test_forward_is_told_the_text_and_drafts_on_where_it_ends() -> None:
    model = make(n_heads=4, conditioned=True, draft_vocabulary=WORDS)
    with torch.no_grad():
        logits, states = model(IDS), model.states(IDS)
        for t in range(9):
            text = IDS[:, : t + 1]  # x_{t+1} is the first that a head behind the first may not know
            for head in (2, 3, 4):
                drafted = IDS[:, t + head - 1] if t + head - 1 < 9 else logits[head - 2][:, t].argmax(-1)
                state = model.condition(head, states[head - 1][:, t], drafted)
                torch.testing.assert_close(logits[head - 1][:, t, WORDS], model.draft_logits(state))
            torch.testing.assert_close(model(text)[0][:, -1], logits[0][:, t], rtol=1e-4, atol=1e-5)
        assert model(IDS[:, :1])[3].shape == (2, 1, checkpoints.VOCAB)


def test_gradients_reach_the_condition_and_never_the_input_embedding() -> None:
    torch.manual_seed(0)
    model = MultiTokenModel(checkpoints.random_base(checkpoints.CONFIGS["neox"]), 2, conditioned=True)
    first, second = model.conditions[0].hidden.weight, model.conditions[0].out.weight
    state = torch.randn(2, 9, 64)
    model.condition(2, state, IDS).square().sum().backward()
    assert second.grad.abs().sum() > 0 and not first.grad.any()  # W2 is zero, so that W1 has no say yet
    with torch.no_grad():
        second -= 1e-3 * second.grad
    model.condition(2, state, IDS).square().sum().backward()
    assert (first.grad != 0).all()
    assert model.base.get_input_embeddings().weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{"draft_vocabulary": WORDS}, {"conditioned": True, "condition_width": 24}, {"conditioned": True}, {}],
    ids=["words", "narrow", "wide", "plain"],
)
def test_save_and_load(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = make("phi", **options).to(dtype)
    model.save(tmp_path)
    loaded = MultiTokenModel.load(tmp_path, dtype)
    own, read = model.state_dict(), loaded.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[key], read[key]) for key in own)
    assert loaded.conditioned == ("conditioned" in options)
    if dtype == torch.float32:  # converting a model converts tables of its rotation too, which loading does not
        assert all(torch.equal(a, b) for a, b in zip(loaded(IDS), model(IDS), strict=True))
    added = sum(p.numel() for p in model.parameters()) - model.base.num_parameters()
    assert model.head_parameters() == added
    tensors = load_file(tmp_path / "heads.safetensors")
    extra = {name for name in tensors if "condition" in name or name == "draft_vocabulary"}
    if "draft_vocabulary" in options:
        assert extra == {"draft_vocabulary"} and tensors["draft_vocabulary"].dtype == torch.int64
        assert loaded.draft_vocabulary is not None and torch.equal(loaded.draft_vocabulary, WORDS)
    elif loaded.conditioned:
        assert extra == {f"{i}.condition.{part}.weight" for i in (2, 3) for part in ("hidden", "out")}
        assert tensors["3.condition.hidden.weight"].shape == (options.get("condition_width", 64), 128)
    else:
        assert not extra and loaded.draft_vocabulary is None  # as all checkpoints before there were either


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (WORDS.int(), r"is a list of token ids, int64 \[words\], not int32 \[5\]"),
        (WORDS.float(), r"not float32 \[5\]"),
        (WORDS[None], r"not int64 \[1, 5\]"),
        (WORDS[:0], r"not int64 \[0\]"),
        (torch.tensor(3), r"not int64 \[\]"),
        (torch.tensor([1, 2, 1]), "names a token twice"),
        (torch.tensor([1, 320]), "names token 320: the base has 320"),
        (torch.tensor([-1, 2]), "names token -1"),
    ],
)
def test_a_table_that_is_none_is_refused(words: torch.Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        make(draft_vocabulary=words)
    make(draft_vocabulary=WORDS).save(tmp_path)
    file = tmp_path / "heads.safetensors"
    save_file(load_file(file) | {"draft_vocabulary": words}, file, metadata={"kind": "parallel", "n_heads": "3"})
    with pytest.raises(CheckpointError, match=message):
        MultiTokenModel.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"3.condition.out.weight": None}, "does not fit the base"),
        ({"2.condition.hidden.weight": None}, "does not fit the base"),
        ({"2.condition.hidden.weight": torch.zeros(24, 64)}, "does not fit the base"),
        ({"2.condition.hidden.weight": torch.zeros(65, 128)}, "does not fit the base"),
        ({"2.condition.hidden.weight": torch.zeros(0, 128)}, "one hidden unit or more, not 0"),
        ({"2.condition.hidden.weight": torch.tensor(1.0)}, "one hidden unit or more, not 0"),
        ({"2.condition.bias": torch.zeros(24)}, "does not fit the base"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    make(conditioned=True, condition_width=24).save(tmp_path)
    file = tmp_path / "heads.safetensors"
    tensors = load_file(file) | changes
    left = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(left, file, metadata={"kind": "parallel", "n_heads": "3"})
    with pytest.raises(CheckpointError, match=message):
        MultiTokenModel.load(tmp_path)
