"""Tiny random checkpoints of every architecture, as folders that `dynamo-export` takes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Exaone4Config,
    Gemma2Config,
    GemmaConfig,
    Glm4Config,
    GPTNeoXConfig,
    GraniteConfig,
    HeliumConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from dynamo_model import CPModel, LookAheadModel, MultiTokenModel

VOCAB = 320
CORPUS = [
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n",
    "for i in range(10):\n    print(i)\n",
]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}
WIDE = {"num_attention_heads": 2}  # heads of 32: half of one is enough for rotation inside the attention


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """Rope parameters of one scaling rule."""
    return {"rope_type": kind, "rope_theta": 10_000.0, **more}


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)

# One configuration per architecture and feature.
CONFIGS: dict[str, PretrainedConfig] = {
    "neox": GPTNeoXConfig(**SIZES, rope_parameters=rope("default", partial_rotary_factor=1.0)),
    "neox-partial-serial": GPTNeoXConfig(
        **(SIZES | {"hidden_size": 128}),
        use_parallel_residual=False,
        rope_parameters=rope("default", partial_rotary_factor=0.5),
    ),
    "neox-rotary-20": GPTNeoXConfig(
        **(SIZES | {"hidden_size": 160}), rope_parameters=rope("default", partial_rotary_factor=0.5)
    ),
    "neox-tied-nobias": GPTNeoXConfig(
        **SIZES,
        tie_word_embeddings=True,
        attention_bias=False,
        rope_parameters=rope("default", partial_rotary_factor=1.0),
    ),
    "llama-grouped": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama-bias-llama3": LlamaConfig(
        **SIZES, num_key_value_heads=1, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3
    ),
    "llama-linear-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=rope("linear", factor=3.0)),
    "llama-dynamic-within": LlamaConfig(**SIZES, rope_parameters=rope("dynamic", factor=2.0)),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2-yarn": Qwen2Config(
        **SIZES,
        num_key_value_heads=2,
        rope_parameters=rope("yarn", factor=3.0, original_max_position_embeddings=32),
    ),
    "qwen2-mixed-window": Qwen2Config(
        **SIZES,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=17,
        max_window_layers=1,
    ),
    "qwen3-wide-heads": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
    "qwen3-bias": Qwen3Config(**SIZES, num_key_value_heads=4, head_dim=16, attention_bias=True),
    "mistral-window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=20),
    "mistral-rotary-12": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None, head_dim=24),
    # Scales and caps that matter at the size of these models' logits.
    "granite": GraniteConfig(
        **GROUPED,
        logits_scaling=3.0,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        tie_word_embeddings=True,
    ),
    "cohere": CohereConfig(**GROUPED, logit_scale=0.25, use_qk_norm=True, tie_word_embeddings=False),
    "cohere2": Cohere2Config(
        **GROUPED, logit_scale=2.5, sliding_window=18, layer_types=["full_attention", "sliding_attention"]
    ),
    "gemma": GemmaConfig(**GROUPED, head_dim=32),
    "gemma2": Gemma2Config(
        **GROUPED,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=19,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=0.5,
    ),
    "phi": PhiConfig(**(GROUPED | WIDE), partial_rotary_factor=0.5),
    "phi3": Phi3Config(**GROUPED),
    "olmo2": Olmo2Config(**GROUPED),
    "starcoder2": Starcoder2Config(**GROUPED, sliding_window=21),
    "stablelm": StableLmConfig(**(GROUPED | WIDE), partial_rotary_factor=0.5, use_qkv_bias=True),
    "glm4": Glm4Config(**GROUPED, head_dim=32, attention_bias=True),
    "ministral": MinistralConfig(**GROUPED, head_dim=16, sliding_window=23),
    "exaone4": Exaone4Config(**GROUPED, sliding_window=22, layer_types=["sliding_attention", "full_attention"]),
    "helium": HeliumConfig(**GROUPED, head_dim=16),
    "smollm3": SmolLM3Config(**GROUPED, no_rope_layers=[1, 0], tie_word_embeddings=True),
}

# Two heads are quicker to export where an architecture has several configurations.
THREE_HEADS = {"neox", "llama-grouped", "qwen2-mixed-window", "mistral-window"}
THREE_HEADS |= {"granite", "cohere", "cohere2", "gemma", "gemma2", "phi", "phi3", "olmo2", "starcoder2", "stablelm"}
THREE_HEADS |= {"glm4", "ministral", "exaone4", "helium", "smollm3"}

# How their further heads draft: over which words, and whether they are conditioned on the token in front. Every way is
# here with tied and untied embeddings, with two heads and with three, and with rotation outside the attention.
WORDS = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))[:100]
OVER_WORDS = {"neox-tied-nobias", "llama-bias-llama3", "cohere2", "gemma2"}
CONDITIONED = {"qwen3-bias", "mistral-rotary-12", "gemma", "granite", "starcoder2"}
BOTH = {"neox-rotary-20", "llama-linear-tied", "smollm3", "cohere", "phi", "stablelm"}
DRAFTING: dict[str, dict[str, Any]] = {
    **{name: {"draft_vocabulary": WORDS} for name in OVER_WORDS},
    **{name: {"conditioned": True} for name in CONDITIONED},
    **{name: {"draft_vocabulary": WORDS, "conditioned": True} for name in BOTH},
}

# Checkpoints with another drafter: configuration, and n_tokens and rank of a joint head or the look-ahead embeddings.
JOINT = {
    "cp-neox": ("neox", 3, 3),
    "cp-llama": ("llama-grouped", 2, 1),
    "cp-llama-tied": ("llama-linear-tied", 2, 3),
    "cp-qwen2": ("qwen2", 3, 1),
    "cp-granite": ("granite", 2, 2),
    "cp-cohere": ("cohere", 2, 2),
    "cp-gemma2": ("gemma2", 2, 2),
}
LOOK_AHEAD = {
    "lookahead-neox": ("neox", 1),
    "lookahead-llama": ("llama-grouped", 3),
    "lookahead-llama-tied": ("llama-linear-tied", 2),
    "lookahead-qwen2": ("qwen2", 4),
    "lookahead-granite": ("granite", 2),
}


def heads_of(name: str) -> int:
    """Token heads of the checkpoint with one of `CONFIGS`."""
    return 3 if name in THREE_HEADS else 2


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with at most `VOCAB` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def random_base(config: PretrainedConfig, seed: int = 0) -> Any:
    """A base model whose every parameter is random: norms and biases too, which start at ones and zeros."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # as saving a model changes its own
    _shake(base)
    return base.eval()


def _shake(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))


def save_plain(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
    """A plain base model with its tokenizer."""
    random_base(config).to(dtype).save_pretrained(folder)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def save_multi(
    folder: Path, config: PretrainedConfig, n_heads: int = 3, dtype: torch.dtype = torch.float32, **drafting: Any
) -> Path:
    """A multi-token checkpoint with its tokenizer; `drafting` as in `DRAFTING`."""
    torch.manual_seed(1)
    model = MultiTokenModel(random_base(config), n_heads, **drafting)
    _shake(model.heads)
    _shake(model.conditions)
    model.to(dtype).save(folder)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def save_drafter(folder: Path, name: str) -> Path:
    """One of `JOINT` or `LOOK_AHEAD` with its tokenizer and n-gram counts."""
    torch.manual_seed(2)
    config, *shape = (JOINT | LOOK_AHEAD)[name]
    base = random_base(CONFIGS[config])
    if name in JOINT:
        model = CPModel(base, *shape)
        for module in (model.multi.heads, model.gate, model.factors):
            _shake(module)
        model.save(folder)
    else:
        LookAheadModel(base, *shape).save(folder)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    save_counts(folder)
    return folder


def save_counts(folder: Path) -> None:
    """A valid, tiny n-gram count file."""
    np.savez(
        folder / "cooccurrence.npz",
        totals=np.array([4, 3, 2]),
        min_count=np.array([1, 1, 1]),
        counts_1=np.bincount([1, 2, 3, 4], minlength=VOCAB),
        offsets_2=np.cumsum([0, 0, 1, 1, 1] + [0] * (VOCAB - 4)),
        ids_2=np.array([2, 3, 4]),
        counts_2=np.array([1, 1, 1]),
        offsets_3=np.array([0, 1, 2, 2]),
        ids_3=np.array([3, 4]),
        counts_3=np.array([1, 1]),
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle."""
    return json.loads((folder / "dynamo_config.json").read_text())


def read_report(folder: Path) -> dict[str, Any]:
    """What proves a bundle."""
    return json.loads((folder / "report.json").read_text())


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Every node of a graph, those of its branches included."""
    return [node for each in all_graphs(graph) for node in each.node]


def all_graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """A graph and all branches in it."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [graph, *(each for branch in inner for each in all_graphs(branch))]
