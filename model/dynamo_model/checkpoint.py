"""Loading a base model, so that nothing of it is silently missing, wrong or left out."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from .errors import CheckpointError, first_line
from .gguf import bar_on_terminals_alone, check_gguf, restore_splitting
from .sources import ADAPTER, Checkpoint, check_base, find_checkpoint

log = logging.getLogger("dynamo_model")

HARMLESS = (r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)attn(ention)?\.(masked_)?bias$", r"(^|\.)position_ids$")
"""Tensors that older checkpoints hold and no model reads: tables that are computed, masks that are built."""

WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.")
"""What torch.compile, DataParallel, peft and FSDP put before the names of a model they wrap."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files, one of which every tokenizer has."""

DEQUANTIZED: dict[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Quantized formats that transformers turns back into plain weights without a further package."""


def load_base(name: str | Path | Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a base causal LM, every parameter from the checkpoint and nothing of the checkpoint unused.

    Weights come from safetensors or GGUF alone, quantized ones are dequantized, and an adapter is merged.

    Args:
        name: Folder, GGUF file, name of a known model, or Hub id; or what `find_checkpoint` returned.
        dtype: The parameters' type after loading, whatever they are stored as.

    Raises:
        CheckpointError: No such model, no weights that are safe to read, weights that do not fit the configuration, or
            a kind that cannot be taken: one line that says what to do.
    """
    checkpoint = find_checkpoint(name)
    check_base(checkpoint)
    where = f"cannot load a base model from '{checkpoint.name}'"
    options: dict[str, Any] = {"gguf_file": checkpoint.gguf} if checkpoint.gguf else {"use_safetensors": True}
    if checkpoint.gguf:
        check_gguf(checkpoint.folder / checkpoint.gguf)
    else:
        options |= _dequantizing(checkpoint)
    with _without_adapter(checkpoint) as folder, _quiet(), bar_on_terminals_alone():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported with all else that does not fit
                **options,
            )
        except Exception as error:  # whatever transformers and the libraries under it raise on a broken checkpoint
            raise CheckpointError(f"{where}: {first_line(error)}") from error
    base, info = loaded
    _check_complete(checkpoint, info)
    if hasattr(base, "hf_quantizer"):
        _forget_quantization(base, dtype)
    if checkpoint.adapter is not None:
        base = _merged(base, checkpoint.adapter)
        log.info("merged the adapter in %s into the base in %s", checkpoint.adapter, checkpoint.folder)
    if odd := [key for key, parameter in base.named_parameters() if not parameter.isfinite().all()]:
        raise CheckpointError(f"'{checkpoint.name}' has values that are not finite numbers in {_some(odd)}")
    return base


def load_tokenizer(name: str | Path | Checkpoint) -> Any:
    """Load the tokenizer of a checkpoint, an adapter's own before its base's.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    checkpoint = find_checkpoint(name)
    own = checkpoint.adapter is not None and (checkpoint.adapter / "tokenizer_config.json").is_file()
    folder = checkpoint.adapter if own and checkpoint.adapter else checkpoint.folder
    options = {"gguf_file": checkpoint.gguf} if checkpoint.gguf else {}
    if not checkpoint.gguf and not any((folder / file).is_file() for file in TOKENIZERS):
        raise CheckpointError(f"no tokenizer in '{checkpoint.name}'")  # transformers would make an empty one
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
    except Exception as error:  # transformers raises whatever its many tokenizers do
        raise CheckpointError(f"no tokenizer in '{checkpoint.name}': {first_line(error)}") from error
    if checkpoint.gguf:
        restore_splitting(tokenizer, checkpoint.folder / checkpoint.gguf)
    return tokenizer


def count_parameters(name: str | Path | Checkpoint) -> int:
    """Return the number of a base's parameters, by its configuration alone: no weights are read.

    Raises:
        CheckpointError: The configuration is missing, or of a kind that cannot be taken.
    """
    checkpoint = find_checkpoint(name)
    check_base(checkpoint)
    config = _config(checkpoint)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
    except Exception as error:  # whatever transformers raises on a configuration that makes no sense
        raise CheckpointError(f"cannot load a base model from '{checkpoint.name}': {first_line(error)}") from error


def stored_dtype(name: str | Path | Checkpoint) -> torch.dtype:
    """Return the type that a checkpoint's weights are stored as.

    It is the only one there is, or fp32 where there are several.
    """
    checkpoint = find_checkpoint(name)
    if checkpoint.gguf or checkpoint.adapter is not None or _quantization(checkpoint):
        return torch.float32
    types = set()
    for path in checkpoint.folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            types |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    known = {"BF16": torch.bfloat16, "F16": torch.float16}
    return known.get(next(iter(types)), torch.float32) if len(types) == 1 else torch.float32


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: It is none, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {first_line(error)}") from error


def _check_complete(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Refuse a model with a parameter that did not come from the checkpoint, or a checkpoint with more in it.

    Raises:
        CheckpointError: What is missing, extra, of another shape, or called by another name.
    """
    name = checkpoint.name
    missing, extra = set(info["missing_keys"]), set(info["unexpected_keys"])
    extra = {key for key in extra if not any(re.search(pattern, key) for pattern in HARMLESS)}
    for prefix in WRAPPERS:
        if extra and all(key.startswith(prefix) for key in extra):
            raise CheckpointError(
                f"the tensors of '{name}' are called '{prefix}…', as they are when a wrapper is saved in place of the "
                f"model in it: save that, or strip '{prefix}' from their names"
            )
    if missing and extra:
        raise CheckpointError(
            f"'{name}' does not fit its config.json: {_some(missing)} missing, and there is {_some(extra)}, which the "
            "model does not have"
        )
    if missing:
        raise CheckpointError(f"'{name}' is incomplete: {_some(missing)} missing from its weights")
    if extra:
        raise CheckpointError(
            f"'{name}' holds {_some(extra)}, which its config.json has no place for: they would be left out"
        )
    if info["mismatched_keys"]:
        key, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(
            f"'{name}' does not fit its config.json: {key} is {list(stored)} where {list(wanted)} is expected"
        )
    if info["error_msgs"]:
        raise CheckpointError(f"cannot load a base model from '{name}': {info['error_msgs'][0]}")


def _some(keys: Collection[str]) -> str:
    first = sorted(keys)[0]
    return first if len(keys) == 1 else f"{first} and {len(keys) - 1} more"


def _config(checkpoint: Checkpoint) -> Any:
    """Return the configuration of a base.

    Raises:
        CheckpointError: It cannot be read.
    """
    options = {"gguf_file": checkpoint.gguf} if checkpoint.gguf else {}
    try:
        with _quiet():
            return AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=False, **options)
    except Exception as error:  # whatever transformers raises on a broken file
        raise CheckpointError(f"cannot load a base model from '{checkpoint.name}': {first_line(error)}") from error


def _quantization(checkpoint: Checkpoint) -> str:
    """Return how the weights of a folder are quantized, by its configuration; empty where they are not.

    Raises:
        CheckpointError: The configuration cannot be read.
    """
    settings = getattr(_config(checkpoint), "quantization_config", None)
    if settings is None:
        return ""
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))


def _dequantizing(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what makes transformers dequantize the weights, if they are quantized.

    Raises:
        CheckpointError: It cannot, not without further packages.
    """
    method = _quantization(checkpoint)
    if not method:
        return {}
    if method not in DEQUANTIZED:
        raise CheckpointError(
            f"'{checkpoint.name}' is quantized by {method}, which transformers does not undo without further packages: "
            "take the model in full precision that it was made from, and quantize the bundle"
        )
    return {"quantization_config": DEQUANTIZED[method](dequantize=True)}


def _forget_quantization(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a dequantized model what it is now: plain weights of one type, saved and described as such."""
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method", "quantization_config"):
        for owner in (base, base.config):
            if attribute in vars(owner):
                delattr(owner, attribute)


@contextmanager
def _without_adapter(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield the base's folder without an adapter in it.

    An adapter sends transformers to the base that the adapter names.
    """
    if not (checkpoint.folder / ADAPTER).is_file():
        yield checkpoint.folder
        return
    with tempfile.TemporaryDirectory(prefix="dynamo-base-") as temporary:
        for path in checkpoint.folder.iterdir():
            if not path.name.startswith("adapter_"):
                os.symlink(path.resolve(), Path(temporary) / path.name)
        yield Path(temporary)


def _merged(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Return the base with a LoRA adapter merged into its weights.

    Raises:
        CheckpointError: Peft is not installed, or the adapter does not fit.
    """
    try:
        from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise CheckpointError(
            f"{adapter} holds a LoRA adapter, and merging it needs peft: pip install peft, or merge it elsewhere with "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)"
        ) from error
    if not (adapter / "adapter_model.safetensors").is_file():
        raise CheckpointError(f"{adapter} has no adapter_model.safetensors: its adapter cannot be merged")
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            model = get_peft_model(base, PeftConfig.from_pretrained(str(adapter)))
            result: Any = set_peft_model_state_dict(model, load_peft_weights(str(adapter), device="cpu"))
            lost = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
            if lost or result.unexpected_keys:
                odd = _some([*lost, *result.unexpected_keys])
                raise CheckpointError(f"the adapter in {adapter} does not fit its base: {odd}")
            merged = model.merge_and_unload()
    except CheckpointError:
        raise
    except Exception as error:  # peft raises whatever torch does
        raise CheckpointError(f"the adapter in {adapter} cannot be merged: {first_line(error)}") from error
    if not isinstance(merged, PreTrainedModel):
        raise CheckpointError(f"{adapter} holds an adapter that cannot be merged into the weights")
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting what is reported here, and from drawing its own progress bars."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
