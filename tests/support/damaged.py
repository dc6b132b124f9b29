"""Checkpoints with one planted fault each: what becomes of them is a right bundle, or one line.

python tests/support/damaged.py FOLDER  # writes them all, to look at
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor

from support import checkpoints

WEIGHTS = "model.safetensors"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Fault:
    """One way of being damaged.

    Attributes:
        plant: Does it to a whole checkpoint (Llama, two layers, untied).
        says: What the one line says, as a pattern; None if the checkpoint is taken all the same.
        weights: Of a checkpoint that is taken: what the tensors must be, of the sound one's.
    """

    plant: Callable[[Path], None]
    says: str | None = None
    weights: Callable[[Tensors], Tensors] = lambda sound: sound


def change(folder: Path, edit: Callable[[Tensors], Tensors | None]) -> None:
    """Edits the tensors of a checkpoint."""
    tensors = load_file(folder / WEIGHTS)
    edited = edit(tensors)
    save_file(tensors if edited is None else edited, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, file: str = "config.json", **settings: Any) -> None:
    """Changes settings in a JSON file."""
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | settings))


def _prefixed(prefix: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: {prefix + key: value for key, value in tensors.items()})


def _without(part: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: {k: v for k, v in tensors.items() if part not in k})


def _quantized_by(method: str, **settings: Any) -> Callable[[Path], None]:
    return lambda folder: configure(folder, quantization_config={"quant_method": method, **settings})


def _transposed(folder: Path) -> None:
    change(folder, lambda tensors: tensors | {(k := "model.layers.1.mlp.up_proj.weight"): tensors[k].T.contiguous()})


def _truncated(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def _missing_shard(folder: Path) -> None:
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    half = len(names) // 2
    files = {name: f"model-0000{1 if i < half else 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _not_a_number(folder: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = math.nan

    change(folder, edit)


def _remote_code(folder: Path) -> None:
    configure(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


def _foreign_tokenizer(folder: Path) -> None:
    words = {f"w{i}": i for i in range(checkpoints.VOCAB + 1)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def _more_added_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fill = checkpoints.VOCAB - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<more {i}>") for i in range(fill + 2)])
    tokenizer.save(str(folder / "tokenizer.json"))


def _leftovers(folder: Path) -> None:
    table = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    change(folder, lambda tensors: tensors | table)


def _tied_by_name(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)


def fp8(tensors: Tensors, block: int = 32) -> tuple[Tensors, Tensors]:
    """Projections in fp8 with a scale per block, as they are stored; and what they are worth."""
    stored, worth = dict(tensors), dict(tensors)
    for name in [name for name in tensors if "proj" in name]:
        weight = tensors[name]
        rows, columns = (math.ceil(size / block) for size in weight.shape)
        scale = torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                part = weight[i * block : (i + 1) * block, j * block : (j + 1) * block]
                scale[i, j] = part.abs().max() / 448
        whole = scale.repeat_interleave(block, 0)[: len(weight)].repeat_interleave(block, 1)[:, : weight.shape[1]]
        stored[name] = (weight / whole).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        worth[name] = stored[name].float() * whole
    return stored, worth


def _in_fp8(folder: Path) -> None:
    change(folder, lambda tensors: fp8(tensors)[0])
    _quantized_by("fp8", activation_scheme="dynamic", weight_block_size=[32, 32])(folder)


RANK, ALPHA = 4, 8.0
TARGET = "self_attn.q_proj"


def lora(seed: int = 3) -> Tensors:
    """A LoRA adapter of the query projections, as peft stores it."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.{TARGET}"
        found[f"{name}.lora_A.weight"] = torch.randn(RANK, 64, generator=generator)
        found[f"{name}.lora_B.weight"] = 0.1 * torch.randn(64, RANK, generator=generator)
    return found


def merged(sound: Tensors) -> Tensors:
    """The weights with that adapter: W + α / r · B A."""
    adapter, result = lora(), dict(sound)
    for layer in range(2):
        name = f"model.layers.{layer}.{TARGET}"
        a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        result[f"{name}.weight"] = sound[f"{name}.weight"] + ALPHA / RANK * b @ a
    return result


def add_adapter(folder: Path, base: str, tensors: Tensors | None = None) -> None:
    """Puts the adapter into a folder, naming a base."""
    folder.mkdir(exist_ok=True)
    save_file(lora() if tensors is None else tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    settings |= {"target_modules": ["q_proj"], "bias": "none", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _adapter_beside(folder: Path) -> None:
    add_adapter(folder, "somebody/another-base")  # never fetched: the base that it lies beside counts


def _misfit_adapter(folder: Path) -> None:
    moved = {key.replace("layers.1", "layers.7"): value for key, value in lora().items()}
    add_adapter(folder, "somebody/another-base", moved)


def _half_an_adapter(folder: Path) -> None:
    add_adapter(folder, "somebody/another-base", {k: v for k, v in lora().items() if "layers.1" not in k})


FAULTS: dict[str, Fault] = {
    "saved compiled": Fault(_prefixed("_orig_mod."), r"called '_orig_mod\.…'.*strip"),
    "saved parallel": Fault(_prefixed("module."), r"called 'module\.…'"),
    "saved inside peft": Fault(_prefixed("base_model.model."), r"called 'base_model\.model\.…'"),
    "no output embedding": Fault(_without("lm_head"), r"is incomplete: lm_head\.weight missing"),
    "a layer short": Fault(_without("layers.1."), r"is incomplete: model\.layers\.1\..* and 8 more missing"),
    "a norm short": Fault(_without("model.norm"), r"is incomplete: model\.norm\.weight missing"),
    "a layer too many": Fault(
        lambda folder: configure(folder, num_hidden_layers=1, layer_types=None), r"holds model\.layers\.1\..*no place"
    ),
    "misnamed": Fault(
        lambda folder: change(folder, lambda t: {k.replace("up_proj", "up"): v for k, v in t.items()}),
        r"does not fit its config\.json: model\.layers\.0\.mlp\.up_proj\.weight and 1 more missing, and there is",
    ),
    "a transposed weight": Fault(_transposed, r"up_proj\.weight is \[64, 96\] where \[96, 64\] is expected"),
    "another vocabulary": Fault(lambda folder: configure(folder, vocab_size=400), r"is \[320, 64\] where \[400, 64\]"),
    "truncated": Fault(_truncated, r"cannot load a base model"),
    "a shard short": Fault(_missing_shard, r"cannot load a base model.*model-00002-of-00002"),
    "only a pickle": Fault(_pickled, r"cannot load a base model"),
    "not a number": Fault(_not_a_number, r"not finite numbers in model\.layers\.0\.mlp\.down_proj\.weight"),
    "config not JSON": Fault(lambda f: (f / "config.json").write_text("{") and None, r"cannot load a base model"),
    "unknown architecture": Fault(lambda f: configure(f, model_type="nobody"), r"cannot load a base model"),
    "remote code": Fault(_remote_code, r"cannot load a base model"),
    "gptq": Fault(_quantized_by("gptq", bits=4, group_size=128), r"quantized by gptq.*take the model in full"),
    "awq": Fault(_quantized_by("awq", bits=4, group_size=128), r"quantized by awq"),
    "bitsandbytes": Fault(_quantized_by("bitsandbytes", load_in_4bit=True), r"quantized by bitsandbytes"),
    "compressed-tensors": Fault(_quantized_by("compressed-tensors"), r"quantized by compressed-tensors"),
    "no tokenizer": Fault(_no_tokenizer, r"has no tokenizer\.json"),
    "another tokenizer": Fault(_foreign_tokenizer, r"does not match the model: it has token 320"),
    "a misfit adapter": Fault(_misfit_adapter, r"the adapter in .* does not fit its base"),
    "half an adapter": Fault(_half_an_adapter, r"the adapter in .* does not fit its base"),
    "an adapter beside its base": Fault(_adapter_beside, weights=merged),
    "fp8": Fault(_in_fp8, weights=lambda sound: fp8(sound)[1]),
    "more added tokens": Fault(_more_added_tokens),
    "harmless leftovers": Fault(_leftovers),
    "tied by its config alone": Fault(_tied_by_name),
}


def write(folder: Path, fault: str) -> Path:
    """A checkpoint with one of `FAULTS`."""
    made = checkpoints.save_plain(folder, checkpoints.CONFIGS["llama-grouped"])
    FAULTS[fault].plant(made)
    return made


if __name__ == "__main__":
    for number, name in enumerate(FAULTS):
        write(Path(sys.argv[1]) / f"{number:02}-{name.replace(' ', '-')}", name)
