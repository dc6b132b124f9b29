"""A tiny random Llama as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import LlamaConfig

from support import checkpoints

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def as_llama_cpp_stores(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order that GGUF files of Llama have."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, splitting: str = "gpt-2") -> Any:
    """A tiny random Llama as a GGUF file in full precision; returns the model."""
    base = checkpoints.random_base(checkpoints.CONFIGS["llama-grouped"])
    config: LlamaConfig = base.config
    tokenizer = checkpoints.train_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [word for word, _ in vocabulary] + [f"<fill {i}>" for i in range(checkpoints.VOCAB - len(vocabulary))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(checkpoints.VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * (len(words) - 1)])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    state = {name: tensor.detach().numpy() for name, tensor in base.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        of, block = f"model.layers.{layer}", f"blk.{layer}"
        query = as_llama_cpp_stores(state[f"{of}.self_attn.q_proj.weight"], config.num_attention_heads)
        key = as_llama_cpp_stores(state[f"{of}.self_attn.k_proj.weight"], config.num_key_value_heads)
        writer.add_tensor(f"{block}.attn_q.weight", query)
        writer.add_tensor(f"{block}.attn_k.weight", key)
        for theirs, ours in (
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            writer.add_tensor(f"{block}.{theirs}.weight", state[f"{of}.{ours}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return base
