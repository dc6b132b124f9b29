"""`genai_config.json`: the same graph decoded as a plain language model by onnxruntime-genai."""

from __future__ import annotations

from typing import Any

from dynamo_runtime.bundle import Bundle


def genai_config(bundle: Bundle, hidden_size: int, attention_heads: int, pad: int | None) -> dict[str, Any]:
    """Describe a bundle to onnxruntime-genai.

    Its model type `decoder` feeds ids, mask and caches of the base's graph and reads `logits`; it knows nothing of the
    drafter's.

    Args:
        bundle: What its manifest says.
        hidden_size: Width of the model.
        attention_heads: Query heads.
        pad: Padding token, or None.
    """
    eos = list(bundle.eos_token_ids)
    model: dict[str, Any] = {
        "type": "decoder",
        "context_length": bundle.context_length,
        "vocab_size": bundle.vocab_size,
        "decoder": {
            # 3: onnxruntime would warn at every load that the optional inputs have defaults
            "session_options": {"log_id": "dynamo-edge", "log_severity_level": 3, "provider_options": []},
            "filename": bundle.graph,
            "head_size": bundle.head_size,
            "hidden_size": hidden_size,
            "num_attention_heads": attention_heads,
            "num_hidden_layers": bundle.kv_layers,
            "num_key_value_heads": bundle.kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    if eos:
        model["eos_token_id"] = eos if len(eos) > 1 else eos[0]
    if bundle.bos_token_id is not None:
        model["bos_token_id"] = bundle.bos_token_id
    fill = pad if pad is not None else (eos[0] if eos else 0)
    model["pad_token_id"] = fill
    return {
        "model": model,
        "search": {
            "do_sample": False,
            "max_length": bundle.context_length,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }
