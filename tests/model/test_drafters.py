"""Joint heads and look-ahead embeddings: what they compute, and their files beside a base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

from dynamo_model import DRAFTERS, CheckpointError, CPModel, LookAheadModel, MultiTokenModel, drafters_of

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
}
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**SIZE),
    "llama-tied": LlamaConfig(**SIZE, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZE, num_key_value_heads=2),
}


def base(name: str, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(1))


def damaged(file: Path, metadata: dict[str, str]) -> None:
    save_file(load_file(file), file, metadata=metadata)


@pytest.mark.parametrize("name", CONFIGS)
def test_joint_head_reads_the_context_embedding(name: str) -> None:
    model = CPModel(base(name), n_tokens=3, rank=2).eval()
    x = ids(2, 7)
    with torch.no_grad():
        first, log_w, logits = model(x)
        assert torch.equal(first, model.base(x).logits)
        assert logits.shape == (2, 7, 3, 2, 61)
        torch.testing.assert_close(log_w.exp().sum(-1), torch.ones(2, 7))
        # Component 1 of the third token, as the paper writes it: its own linear map of e_t, then the embedding.
        _, context = model.states(x)
        own = model.factors.weight[(2 * 2 + 1) * 32 : (2 * 2 + 2) * 32]
        torch.testing.assert_close(logits[:, :, 2, 1], context @ own.T @ model.multi.output_embedding.weight.T)
        torch.testing.assert_close(log_w, (context @ model.gate.weight.T).log_softmax(-1))
    assert model.head_parameters() == sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in model.base.parameters()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_look_ahead_tokens_stand_behind_the_vocabulary(name: str) -> None:
    model = LookAheadModel(base(name), 3).eval()
    x = ids(2, 7)
    with torch.no_grad():
        assert torch.equal(model(x), model.base(x).logits)
        embedded = model.embed(torch.tensor([[5, 61, 63]]))[0]
        assert torch.equal(embedded[0], model.base.get_input_embeddings().weight[5])
        assert torch.equal(embedded[1:], model.embeddings[[0, 2]])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["embeddings"]
    assert model.head_parameters() == 3 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_drafters_lie_beside_one_base(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = base(name, dtype)
    models = [MultiTokenModel(whole, 3), CPModel(whole, 4, 2), LookAheadModel(whole, 5)]
    for i, model in enumerate(models):
        assert drafters_of(tmp_path) == [*DRAFTERS][:i]
        model.save(tmp_path)
    x = ids(1, 6)
    with torch.no_grad():
        for model in models:
            model.eval()
            loaded = type(model).load(tmp_path, dtype=dtype)
            assert not loaded.training
            assert (loaded.shape, loaded.n_tokens) == (model.shape, model.n_tokens)
            assert loaded.head_parameters() == sum(p.numel() for p in model.parameters()) - whole.num_parameters()
            own, read = model.state_dict(), loaded.state_dict()
            assert own.keys() == read.keys() and all(torch.equal(own[key], read[key]) for key in own)
            for a, b in zip(model(x), loaded(x), strict=True):
                assert torch.equal(a, b)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(reloaded(x).logits, whole(x).logits)


@pytest.mark.parametrize(
    ("n_tokens", "rank", "message"),
    [(1, 2, "2 to 8 tokens, not 1"), (9, 2, "2 to 8 tokens, not 9"), (3, 0, "1 to 32, not 0"), (3, 33, "not 33")],
)
def test_size_of_a_joint_head_is_limited(n_tokens: int, rank: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CPModel(base("gpt_neox"), n_tokens, rank)


@pytest.mark.parametrize("n_look_ahead", [0, 17])
def test_number_of_look_ahead_tokens_is_limited(n_look_ahead: int) -> None:
    with pytest.raises(CheckpointError, match=f"1 to 16 look-ahead embeddings, not {n_look_ahead}"):
        LookAheadModel(base("gpt_neox"), n_look_ahead)


@pytest.mark.parametrize(
    ("kind", "make", "fitting", "wrong_sizes", "misfits"),
    [
        (
            "cp",
            lambda: CPModel(base("gpt_neox"), 3, 2),
            {"n_tokens": "3", "rank": "2"},
            [{}, {"n_tokens": "3"}, {"n_tokens": "9", "rank": "2"}, {"n_tokens": "3", "rank": "-2"}],
            [{"n_tokens": "2", "rank": "2"}, {"n_tokens": "3", "rank": "4"}],
        ),
        (
            "lookahead",
            lambda: LookAheadModel(base("gpt_neox"), 3),
            {"n_look_ahead": "3"},
            [{}, {"n_look_ahead": "0"}, {"n_look_ahead": "17"}, {"n_look_ahead": "x"}],
            [{"n_look_ahead": "2"}],
        ),
    ],
)
def test_missing_and_broken_drafters_are_refused(kind, make, fitting, wrong_sizes, misfits, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = make()
    load, file = type(model).load, tmp_path / f"{kind}.safetensors"
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")
    model.base.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"has no {kind}\.safetensors: .*`dynamo-train {kind} "):
        load(tmp_path)
    model.save(tmp_path)
    damaged(file, {"kind": kind} | fitting)
    load(tmp_path)
    for shape in wrong_sizes:
        damaged(file, {"kind": kind} | shape)
        with pytest.raises(CheckpointError, match=r"2 to 8 tokens, not|rank of a joint head|1 to 16 look-ahead"):
            load(tmp_path)
    for shape in misfits:
        damaged(file, {"kind": kind} | shape)
        with pytest.raises(CheckpointError, match="does not fit the base"):
            load(tmp_path)
    damaged(file, {"kind": "parallel"} | fitting)
    with pytest.raises(CheckpointError, match=f"drafter of kind {kind}"):
        load(tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(tmp_path)
