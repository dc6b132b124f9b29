"""Everything of a bundle beside the graph: configuration, tokenizer and chat template, and what the manifest says."""

from __future__ import annotations

import logging
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dynamo_graph.files import read_json, version, write_json
from dynamo_model import DRAFTERS, CheckpointError
from dynamo_model.checkpoint import load_tokenizer
from dynamo_model.sources import Checkpoint
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.files import sha256
from dynamo_runtime.manifest import DrafterGraph, Source
from dynamo_runtime.parameters import SamplingParameters

from .drafting import TOP_K as DRAFT_TOP_K
from .errors import ExportError
from .genai import genai_config
from .graph import InspectedModel
from .tail import TOP_K

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
COUNTS, DRAFTER = "cooccurrence.npz", "drafter.onnx"
log = logging.getLogger("dynamo_export")


def write_rest(checkpoint: Checkpoint, staged: Path, graph: str, inspected: InspectedModel) -> Bundle:
    """Write everything beside the graph.

    Returns:
        What the manifest will say, but for the files.

    Raises:
        ExportError: The checkpoint's tokenizer or configuration does not fit its weights.
    """
    base = inspected.base
    config = checkpoint.file("config.json")
    if config is not None and "quantization_config" not in read_json(config):
        shutil.copyfile(config, staged / "config.json")
    else:  # of the model as it is now, dequantized
        base.config.to_json_file(staged / "config.json")
    if own := checkpoint.file("generation_config.json"):
        shutil.copyfile(own, staged / "generation_config.json")
    elif base.generation_config is not None:
        base.generation_config.save_pretrained(staged)
    vocab_size = int(base.get_output_embeddings().weight.shape[0])
    tokenizer = write_tokenizer(checkpoint, staged, vocab_size)
    counts = checkpoint.file(COUNTS)
    if counts is not None and inspected.exported.topology.n_tokens > 1:
        shutil.copyfile(counts, staged / COUNTS)
    generation = read_json(staged / "generation_config.json")
    first = inspected.attention[0]
    ends = end_tokens(generation, base.config, staged, tokenizer, vocab_size)
    if not ends:
        log.warning("%s names no token that ends a text: texts go on until their limit", checkpoint.name)
    bundle = Bundle(
        folder=staged,
        graph=graph,
        topology=inspected.exported.topology,
        drafter=_drafter_graph(inspected, vocab_size),
        model_type=base.config.model_type,
        vocab_size=vocab_size,
        tokenizer_size=tokenizer.get_vocab_size(),
        context_length=inspected.context_length,
        kv_layers=len(inspected.attention) - inspected.exported.topology.layers,
        kv_heads=first.kv_heads,
        head_size=first.head_size,
        top_k_outputs=min(TOP_K, vocab_size),
        bos_token_id=_first(_special(generation, base.config, "bos_token_id", vocab_size)),
        eos_token_ids=tuple(ends),
        sampling=sampling_of(generation),
        source=Source(
            model=checkpoint.label,
            architecture=type(base).__name__,
            rotary="inside" if inspected.rotary.inside else "outside",
            versions={name: version(name) for name in ("dynamo-edge", "torch", "transformers", "onnx", "onnxruntime")},
            drafters={each.file: sha256(path) for each in DRAFTERS.values() if (path := checkpoint.file(each.file))},
        ),
    )
    pad = _first(_special(generation, base.config, "pad_token_id", vocab_size))
    write_json(staged / "genai_config.json", genai_config(bundle, int(base.config.hidden_size), first.heads, pad))
    return bundle


def _drafter_graph(inspected: InspectedModel, vocab_size: int) -> DrafterGraph | None:
    """Return what the manifest says of the graph of further heads."""
    exported = inspected.exported
    if not exported.topology.layers:
        return None
    words = exported.draft_vocabulary
    return DrafterGraph(
        DRAFTER,
        exported.topology.layers,
        inspected.attention[0].kv_heads,
        min(DRAFT_TOP_K, vocab_size if words is None else len(words)),
        bool(exported.conditions),
        None if words is None else tuple(words.tolist()),
    )


def write_tokenizer(checkpoint: Checkpoint, staged: Path, vocab_size: int) -> Tokenizer:
    """Copy the checkpoint's tokenizer with its chat template, or have transformers convert one of another form.

    Returns:
        The tokenizer.

    Raises:
        ExportError: There is none, or it is another model's: it knows words that the model has no embedding for.
    """
    if checkpoint.file("tokenizer.json") is not None:
        for name in TOKENIZER_FILES:
            if path := checkpoint.file(name):
                shutil.copyfile(path, staged / name)
    else:
        try:
            load_tokenizer(checkpoint).save_pretrained(staged)
        except (CheckpointError, OSError, ValueError, AttributeError) as error:
            raise ExportError(f"{checkpoint.name} has no tokenizer.json, and none can be made: {error}") from error
    try:
        tokenizer = Tokenizer.from_file(str(staged / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ExportError(f"the tokenizer.json of {checkpoint.name} is not readable: {error}") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    if largest >= vocab_size:
        raise ExportError(
            f"the tokenizer of {checkpoint.name} does not match the model: it has token {largest}, the vocabulary ends "
            f"at {vocab_size - 1}"
        )
    added = sum(token >= vocab_size for token in tokenizer.get_vocab(with_added_tokens=True).values())
    if added:
        log.warning("%d added tokens of the tokenizer have no embedding: prompts with them will be refused", added)
    if not (staged / "tokenizer_config.json").is_file():
        write_json(staged / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return tokenizer


def sampling_of(generation: dict[str, Any]) -> dict[str, Any]:
    """Return what a generation_config.json says of sampling, in our terms; the runtime has defaults for the rest.

    Raises:
        ExportError: A value is out of range.
    """
    known = {field.name for field in fields(SamplingParameters)}
    own = {name: value for name, value in generation.items() if name in known and value is not None}
    if generation.get("do_sample") is False:
        own["temperature"] = 0.0
    if own.get("top_k") == -1:
        own["top_k"] = 0
    try:
        SamplingParameters(**own)
    except DynamoError as error:
        raise ExportError(f"generation_config.json: {error}") from error
    return own


def end_tokens(
    generation: dict[str, Any], config: Any, staged: Path, tokenizer: Tokenizer, vocab_size: int
) -> list[int]:
    """Return tokens that end a text: all that generation_config.json, config.json and the tokenizer name.

    A chat model often stops with a token that only one of the three knows.
    """
    ids = _ids(generation.get("eos_token_id"), vocab_size) + _ids(getattr(config, "eos_token_id", None), vocab_size)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_json(staged / name).get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            ids += _ids(tokenizer.token_to_id(text), vocab_size)
    return list(dict.fromkeys(ids))


def _special(generation: dict[str, Any], config: Any, name: str, vocab_size: int) -> list[int]:
    """Return ids of a special token, from generation_config.json or else the model's configuration."""
    found = generation.get(name)
    return _ids(getattr(config, name, None) if found is None else found, vocab_size)


def _ids(found: Any, vocab_size: int) -> list[int]:
    ids = found if isinstance(found, list) else [found]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size]


def _first(ids: list[int]) -> int | None:
    return ids[0] if ids else None
