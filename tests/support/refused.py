"""Architectures that are refused before they are trained: a tiny configuration of each, and the reason."""

from __future__ import annotations

from transformers import (
    BambaConfig,
    FalconConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    MixtralConfig,
    Olmo3Config,
    PretrainedConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from .checkpoints import GROUPED, SIZES, VOCAB

_GPT = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96}
_GPT |= {"bos_token_id": 0, "eos_token_id": 0}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_LINEAR = {f"linear_{part}": size for part, size in (("num_key_heads", 2), ("num_value_heads", 2))}
_LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

TABLES = "its layers rotate by different tables, each kind of layer by its own"
ROUTING = "its layers choose by their numbers what to compute, as the routing of tokens to experts does"
INTERFACE = "it does not attend through transformers' attention interface"
HYBRID = "layer 0 of 2 does not attend (a hybrid of attention and recurrent or convolutional layers"

# Configuration, and how the reason begins.
REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "bamba": (BambaConfig(**GROUPED, **_MAMBA, attn_layer_indices=[1]), HYBRID),
    "falcon": (FalconConfig(**SIZES), INTERFACE),
    "falcon-h1": (
        FalconH1Config(**GROUPED, **(_MAMBA | {"mamba_n_heads": 4}), head_dim=16, mamba_d_ssm=64),
        "its layers hand something on from token to token besides attention",
    ),
    "gemma3": (Gemma3TextConfig(**GROUPED, head_dim=16), TABLES),
    "gpt2": (GPT2Config(**_GPT), "does not keep its decoder layers in `layers` before one final norm"),
    "gpt-oss": (
        GptOssConfig(**GROUPED, head_dim=16, num_local_experts=4, sliding_window=20),
        "layer 0 gives its attention `s_aux`, which GroupQueryAttention cannot express here",
    ),
    "gptj": (GPTJConfig(**_GPT, rotary_dim=8), INTERFACE),
    "jamba": (
        JambaConfig(
            **GROUPED,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            mamba_d_state=4,
            mamba_dt_rank=4,
        ),
        HYBRID,
    ),
    "lfm2": (Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_multiple_of=32), HYBRID),
    "mixtral": (MixtralConfig(**GROUPED, num_local_experts=4), ROUTING),
    "olmo3": (Olmo3Config(**GROUPED, sliding_window=20), TABLES),
    "qwen3-moe": (Qwen3MoeConfig(**GROUPED, **_EXPERTS, head_dim=16), ROUTING),
    "qwen3-next": (
        Qwen3NextConfig(
            **GROUPED,
            **_EXPERTS,
            **_LINEAR,
            head_dim=16,
            shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"],
        ),
        HYBRID,
    ),
}
