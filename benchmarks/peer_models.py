"""The same weights in every peer's own form, made once and kept: what `benchmarks/peers.py` runs its peers on."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from dynamo_model.sources import find_checkpoint
from dynamo_runtime.errors import DynamoError

CHECKPOINT = "checkpoint"
BUILDER = "onnxruntime_genai.models.builder"


class PeerError(DynamoError):
    """A peer, or its model, cannot be had; the message says what to do."""


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """Return a file or folder that is made once, and is there only when it is whole.

    Args:
        path: Where it is to lie.
        make: Writes it to the path it is given, in a folder that exists.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            make(temporary / path.name)
            os.replace(temporary / path.name, path)
        finally:
            shutil.rmtree(temporary)
    return path


def run(command: list[str]) -> None:
    """Run a program that says nothing unless it fails.

    Raises:
        PeerError: It did, with its last line.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:] or ["it said nothing"]
        raise PeerError(f"{' '.join(command)} ended with {done.returncode}: {last[0]}")


def checkpoint(name: str, work: Path) -> Path:
    """Return a model's weights and tokenizer as a folder of transformers, in fp32.

    Args:
        name: As `dynamo-export -m` takes it.
        work: Folder of all that is kept.
    """

    def make(folder: Path) -> None:
        from dynamo_model.checkpoint import load_base, load_tokenizer

        load_base(name).save_pretrained(folder)
        load_tokenizer(name).save_pretrained(folder)

    return kept(work / CHECKPOINT, make)


def genai_model(python: str, name: str, work: Path, bits: int, block: int) -> Path:
    """Return what onnxruntime-genai's own builder makes of the checkpoint, with activations in int8 as ours.

    Args:
        python: The interpreter that has onnxruntime-genai.
        name: As `dynamo-export -m` takes it.
        work: Folder of all that is kept.
        bits: Of a weight.
        block: Weights that share a scale.
    """

    def make(folder: Path) -> None:
        source = str(checkpoint(name, work))
        with tempfile.TemporaryDirectory() as cache:
            command = [python, "-m", BUILDER, "-i", source, "-o", str(folder), "-c", cache, "-e", "cpu"]
            run([*command, "-p", f"int{bits}", "--extra_options", f"block_size={block}", "accuracy_level=4"])

    return kept(work / f"genai-int{bits}-block{block}", make)


def gguf_model(name: str, work: Path, form: str, llama_cpp: Path) -> Path:
    """Return the checkpoint's GGUF file in another precision, or itself where it is in that.

    Args:
        name: As `dynamo-export -m` takes it; its checkpoint has to be a GGUF file.
        work: Folder of all that is kept.
        form: `Q8_0`, `Q4_0`, … as llama-quantize names them.
        llama_cpp: A build of llama.cpp.

    Raises:
        PeerError: It is no GGUF file, or llama-quantize fails.
    """
    found = find_checkpoint(name)
    if found.gguf is None:
        raise PeerError(f"llama.cpp needs a GGUF file: {name} is none")
    source = found.folder / found.gguf
    if source.stem.upper().endswith(form):
        return source
    quantize = str(program(llama_cpp, "llama-quantize"))
    command = [quantize, "--allow-requantize", str(source)]
    return kept(work / f"{form}.gguf", lambda path: run([*command, str(path), form]))


def program(llama_cpp: Path, name: str) -> Path:
    """Return a program of a build of llama.cpp.

    Raises:
        PeerError: It is not there.
    """
    for path in (llama_cpp / "bin" / name, llama_cpp / name):
        if path.is_file():
            return path
    raise PeerError(f"there is no {name} in {llama_cpp}: python benchmarks/build_llama_cpp.py {llama_cpp}")


def stored_bytes(model: Path) -> int:
    """Size of the graph and its weights: of a GGUF file, or of what a folder holds as `.onnx`, `.data`, weights."""
    if model.is_file():
        return model.stat().st_size
    suffixes = {".onnx", ".data", ".safetensors"}
    return sum(file.stat().st_size for file in model.iterdir() if file.suffix in suffixes)
