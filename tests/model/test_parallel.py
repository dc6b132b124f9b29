"""The multi-token model: topology, sizes, gradients, checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dynamo_model import CheckpointError, MultiTokenModel, has_drafter
from dynamo_model.parallel import scale_gradient

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
}
GROUPED = SIZE | {"num_key_value_heads": 2}
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**SIZE),
    "llama-tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "mistral-window": MistralConfig(**GROUPED, sliding_window=4),
}

# Hidden size, layers, attention heads, intermediate size, vocabulary; and the overhead of T3 in the paper, %.
PYTHIA = {
    "70m": (512, 6, 8, 2048, 50304, 8.95),
    "160m": (768, 12, 12, 3072, 50304, 8.73),
    "410m": (1024, 24, 16, 4096, 50304, 6.22),
    "1b": (2048, 16, 8, 8192, 50304, 9.95),
    "1.4b": (2048, 24, 16, 8192, 50304, 7.12),
    "2.8b": (2560, 32, 32, 10240, 50304, 5.67),
    "6.9b": (4096, 32, 32, 16384, 50432, 5.87),
}


def make(config: PreTrainedConfig, n_heads: int = 3, dtype: torch.dtype = torch.float32) -> MultiTokenModel:
    torch.manual_seed(0)
    return MultiTokenModel(AutoModelForCausalLM.from_config(config, dtype=dtype), n_heads).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", PYTHIA)
def test_overhead_of_t3_is_the_papers(size: str) -> None:
    hidden, layers, attention_heads, intermediate, vocab, percent = PYTHIA[size]
    config = GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=attention_heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
    )
    with torch.device("meta"):
        model = make(config)
    base = sum(p.numel() for p in model.base.parameters())
    assert round(100 * model.head_parameters() / base, 2) == percent


@pytest.mark.parametrize("name", CONFIGS)
def test_first_head_is_the_base_and_further_heads_read_the_stem(name: str) -> None:
    model = make(CONFIGS[name])
    x = ids(2, 9)
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(logits[0], model.base(x).logits)
        # A further head that holds the last layer's own weights must say what the base says.
        model.heads[1].load_state_dict(model.decoder.layers[-1].state_dict())
        torch.testing.assert_close(model(x)[2], logits[0])
        # One with all-zero output is the stem itself, through the final norm.
        hidden = model.base(x, output_hidden_states=True).hidden_states
        for p in model.heads[0].parameters():
            p.zero_()
        stem = hidden[-2]
        torch.testing.assert_close(model.states(x)[1], model.final_norm(stem))


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_passes_equal_one_pass(name: str) -> None:
    model = make(CONFIGS[name])
    x = ids(2, 9)
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(x)
        model(x[:, :5], past_key_values=cache)
        rest = model(x[:, 5:], past_key_values=cache)
    assert len(cache.layers) == 4
    for a, b in zip(whole, rest, strict=True):
        torch.testing.assert_close(a[:, 5:], b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(CONFIGS[name], dtype=dtype)
    model.save(tmp_path)
    assert has_drafter(tmp_path, "parallel")
    base, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = MultiTokenModel.load(tmp_path, dtype=dtype)
    x = ids(1, 7)
    with torch.no_grad():
        assert torch.equal(base(x).logits, model.base(x).logits)
        assert all(torch.equal(a, b) for a, b in zip(loaded(x), model(x), strict=True))


def test_gradient_from_further_heads_into_shared_weights_is_scaled() -> None:
    model = make(CONFIGS["gpt_neox"])
    x = ids(1, 6)

    def gradients(scale: float) -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(s.pow(2).sum() for s in model.states(x, shared_gradient_scale=scale)[1:]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    full, tenth = gradients(1.0), gradients(0.1)
    assert full.keys() == tenth.keys() and any("final_layer_norm" in name for name in full)
    for name, gradient in full.items():
        own = name.startswith("heads.")
        torch.testing.assert_close(tenth[name], gradient * (1.0 if own else 0.1), rtol=1e-4, atol=1e-6)


def test_scale_gradient_leaves_the_value() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    y.backward()
    assert torch.equal(y, x) and x.grad.item() == 0.25


@pytest.mark.parametrize("n_heads", [1, 9])
def test_number_of_heads_is_limited(n_heads: int) -> None:
    with pytest.raises(CheckpointError, match="2 to 8"):
        make(CONFIGS["gpt_neox"], n_heads)


def test_plain_base_is_refused_with_the_way_out(tmp_path: Path) -> None:
    make(CONFIGS["gpt_neox"]).base.save_pretrained(tmp_path)
    assert not has_drafter(tmp_path, "parallel")
    with pytest.raises(CheckpointError, match=r"has no heads\.safetensors: train it first with `dynamo-train heads"):
        MultiTokenModel.load(tmp_path)


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        MultiTokenModel.load(tmp_path / "nowhere")
    model = make(CONFIGS["gpt_neox"])
    model.save(tmp_path)
    heads = tmp_path / "heads.safetensors"
    whole = heads.read_bytes()
    heads.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="safetensors"):
        MultiTokenModel.load(tmp_path)
    tensors = {name: t[:1].contiguous() for name, t in model.drafter_state_dict().items()}
    save_file(tensors, heads, metadata={"kind": "parallel", "n_heads": "3"})
    with pytest.raises(CheckpointError, match="does not fit"):
        MultiTokenModel.load(tmp_path)
    save_file(tensors, heads)
    with pytest.raises(CheckpointError, match="does not say that it holds a drafter of kind parallel"):
        MultiTokenModel.load(tmp_path)
    for shape in ({}, {"n_heads": "1"}, {"n_heads": "9"}, {"n_heads": "-3"}, {"n_heads": "three"}):
        save_file(model.drafter_state_dict(), heads, metadata={"kind": "parallel"} | shape)
        with pytest.raises(CheckpointError, match="2 to 8 heads"):
            MultiTokenModel.load(tmp_path)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    model = make(CONFIGS["gpt_neox"])
    model.save(tmp_path)
    torch.save(model.base.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        MultiTokenModel.load(tmp_path)
