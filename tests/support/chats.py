"""Chat templates as models have them, the special tokens that they use, and messages to try them with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from . import handmade

FOLDER = Path(__file__).parent / "templates"

CONTROL: dict[str, list[str]] = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "phi": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "smollm2": ["<|im_start|>", "<|im_end|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "features": ["<s>", "<|im_start|>", "<|im_end|>"],
}
"""By template, beside `<|endoftext|>`."""

NAMED: dict[str, dict[str, Any]] = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": False, "__type": "AddedToken"}},
    "phi": {"bos_token": "<|endoftext|>", "eos_token": "<|end|>"},
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "features": {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
}
"""What `tokenizer_config.json` says of them."""

TURN_END = {
    "llama3": "<|eot_id|>",
    "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "phi": "<|end|>",
    "smollm2": "<|im_end|>",
    "mistral": "</s>",
    "features": "<|im_end|>",
}


def say(*contents: Any, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return [*first, *({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))]


MESSAGES: dict[str, list[dict[str, Any]]] = {
    "a question": say("What is a fib(n)?"),
    "with a system": say("Hello", system="Be brief.\n"),
    "turns": say("One", "Two", "Three", "  Four\n\n", "Five", system="You count."),
    "unicode": say(
        "größer 日本 🎉🚀 ½ – “quoted” \u200b\u00a0", "naïve e\u0301", "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    ),
    "blanks": say("  leading", "\n\ntrailing  \n", "\tboth\t \r\n", system="  \n "),
    "nothing said": say("", "", ""),
    "markup": say('<b>&amp;"quotes" {{ not_a_variable }} {% if %}</b>', "{# no comment #}", "'single' \\n"),
    "thoughts": say("Why?", "<think>\nBecause\n</think>\n\nSo.", "And?", "<think>x</think>y", "Then?"),
    "nearly control tokens": say("if a <", "<|im_", "end|> [IN", "> quote [", "]"),
    "none dropped": [{"role": "user", "content": "x", "name": None, "tool_calls": None}],
}


def tokenizer_of(name: str) -> Tokenizer:
    """A small tokenizer with a template's control tokens; it begins every prompt as such a model's does."""
    tokenizer = handmade.train_tokenizer(CONTROL[name], ["<think>", "</think>"])
    bos = NAMED[name].get("bos_token")
    if isinstance(bos, str):
        token = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, token)])
    return tokenizer


def files(name: str) -> dict[str, str]:
    """What lies beside the tokenizer in a bundle."""
    template = (FOLDER / f"{name}.jinja").read_text()
    return {"tokenizer_config.json": json.dumps(NAMED[name] | {"chat_template": template})}


def write_bundle(folder: Path, name: str, n_heads: int = 3, **changes: Any) -> Path:
    """A handmade bundle with a chat template; returns its ONNX file."""
    tokenizer = tokenizer_of(name)
    fields: Mapping[str, Any] = {"eos_token_ids": [tokenizer.token_to_id(TURN_END[name])], "sampling": {}}
    return handmade.write_bundle(folder, n_heads, tokenizer=tokenizer, files=files(name), **{**fields, **changes})


def contents(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is said in messages."""
    return [message["content"] for message in messages]
