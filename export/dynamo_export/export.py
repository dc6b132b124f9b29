"""From a checkpoint to a bundle: the stages in order."""

from __future__ import annotations

import gc
import logging
import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dynamo_graph.branches import pass_bytes
from dynamo_graph.files import read_json, version, write_json, write_report
from dynamo_graph.read import read_model
from dynamo_graph.staging import Target, discard
from dynamo_graph.write import write_model
from dynamo_quantize import check_request, quantize_bundle
from dynamo_runtime.bundle import Bundle, list_files, load_bundle
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.manifest import Source
from dynamo_runtime.parameters import SamplingParameters

from . import parity
from .build import build_graph
from .compare import Row, table
from .errors import ExportError
from .genai import genai_config
from .graph import Subject, inspect
from .registry import exported
from .source import find_checkpoint, load_model
from .tail import TOP_K

OLDER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")  # transformers can convert these
log = logging.getLogger("dynamo_export")


def export_bundle(
    output: str | Path,
    model: str | Path | None = None,
    *,
    heads: int | None = None,
    drafter: str | None = None,
    overwrite: bool = False,
    external_data: bool = False,
    context_length: int | None = None,
    parity_length: int = parity.DEFAULT_LENGTH,
    quantize: str | None = None,
    **quantization: Any,
) -> Path:
    """Exports a checkpoint as a bundle, which exists only once it agrees with the torch model.

    Args:
        output: The `.onnx` file; its folder becomes the bundle.
        model: Checkpoint folder or Hub id; None for the default that ships with the package.
        heads: Parallel token heads; 0 for the plain language model, None for all there are.
        drafter: Kind of what predicts further tokens (`dynamo_runtime.registry.TOPOLOGIES`); None for the parallel
            heads, or else the only drafter the checkpoint has.
        overwrite: Replace an earlier export of the same name.
        external_data: Weights in a file of their own even where one file would do.
        context_length: Positions to cover; None for all the model was built for.
        parity_length: Longest sequence the parity gate runs.
        quantize: A scheme of `dynamo_quantize`: the bundle, once it agrees, is made smaller and has to pass those gates
            too.
        **quantization: What else `dynamo_quantize.quantize_bundle` takes.

    Returns:
        The `.onnx` file in its place.

    Raises:
        WriteError: The checkpoint, the arguments or the target do not allow it, or the graph fails a gate; nothing is
            left behind.
    """
    target = Target(Path(output), overwrite)
    if quantize is not None:
        check_request(quantize, **quantization)
    folder = find_checkpoint(model)
    clock = _Clock()
    subject = _load(folder, heads, drafter, context_length)
    topology = subject.exported.topology
    clock.lap(
        f"loaded {folder.name}: {type(subject.base).__name__}, {topology.kind}, {topology.n_tokens} token(s) a pass"
    )
    staged = target.stage()
    try:
        bundle = write_rest(folder, staged, target.graph, subject)
        cases, left_out = parity.reference(subject, parity_length)
        clock.lap("ran the torch model")
        graph, weights = build_graph(subject)
        clock.lap(f"traced {len(graph.graph)} nodes")
        files = write_model(graph, staged / target.graph, external_data)
        clock.lap(f"wrote {sum(f.stat().st_size for f in files) / 1e6:.1f} MB of graph and weights")
        weights.clear()
        del graph, subject  # the session's weights come instead of torch's
        gc.collect()
        read = pass_bytes(read_model(staged / target.graph))
        bundle = replace(bundle, pass_bytes=read, files=list_files(staged))
        bundle.write_manifest()
        rows = _gate(staged, cases, left_out)
        clock.lap("passed the parity gate")
        write_report(staged, parity=parity.as_json(rows, cases, left_out))
        replace(bundle, files=list_files(staged)).write_manifest()
        if quantize is not None:
            return quantize_bundle(
                staged, output, quantize, overwrite=overwrite, external_data=external_data, **quantization
            )
        target.move_in(staged)
    except OSError as error:
        raise ExportError(f"cannot write the bundle: {error.strerror or error}") from error
    finally:
        discard(staged)
    clock.lap(f"the bundle is in {target.folder}")
    return target.folder / target.graph


class _Clock:
    """Logs how long each stage took."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self, what: str) -> None:
        now = time.perf_counter()
        log.info("%s (%.1f s)", what, now - self.last)
        self.last = now


def _load(folder: Path, heads: int | None, kind: str | None, context_length: int | None) -> Subject:
    base, drafter = load_model(folder, heads, kind)
    longest = getattr(base.config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 2:
        raise ExportError(f"{folder / 'config.json'} does not say how long the model's context is")
    model = exported(base, drafter)
    context = longest if context_length is None else context_length
    if not model.least_context <= context <= longest:
        raise ExportError(f"--context-length must be {model.least_context} to {longest}, not {context}")
    return inspect(model, context)


def _gate(staged: Path, cases: list[parity.Case], left_out: list[str]) -> list[Row]:
    try:
        bundle = load_bundle(staged)
    except DynamoError as error:
        raise ExportError(f"the exported bundle does not load: {error}") from error
    rows = parity.gate(bundle, cases)
    print(table(rows, left_out))
    failed = [row for row in rows if not row.passed]
    if failed:
        worst = max(failed, key=lambda row: row.difference / row.limit)
        raise ExportError(
            f"the graph does not agree with the torch model in {len(failed)} of {len(rows)} comparisons (worst: "
            f"{worst.case}, {worst.run}, {worst.output}, |Δlogit| {worst.difference:.1e} over {worst.limit:.1e}): "
            "nothing was written"
        )
    return rows


def write_rest(folder: Path, staged: Path, graph: str, subject: Subject) -> Bundle:
    """Writes everything beside the graph.

    Returns:
        What the manifest will say, but for the files.

    Raises:
        ExportError: The checkpoint's tokenizer or configuration does not fit its weights.
    """
    shutil.copyfile(folder / "config.json", staged / "config.json")
    if (folder / "generation_config.json").is_file():
        shutil.copyfile(folder / "generation_config.json", staged / "generation_config.json")
    elif subject.base.generation_config is not None:
        subject.base.generation_config.save_pretrained(staged)
    vocab_size = int(subject.base.get_output_embeddings().weight.shape[0])
    tokenizer_size = write_tokenizer(folder, staged, vocab_size)
    if (folder / "cooccurrence.npz").is_file() and subject.exported.topology.n_tokens > 1:
        shutil.copyfile(folder / "cooccurrence.npz", staged / "cooccurrence.npz")
    config = subject.base.config
    generation = read_json(staged / "generation_config.json")
    first = subject.attention[0]
    bundle = Bundle(
        folder=staged,
        graph=graph,
        topology=subject.exported.topology,
        model_type=config.model_type,
        vocab_size=vocab_size,
        tokenizer_size=tokenizer_size,
        context_length=subject.context_length,
        kv_layers=len(subject.attention),
        kv_heads=first.kv_heads,
        head_size=first.head_size,
        top_k_outputs=min(TOP_K, vocab_size),
        bos_token_id=_first(_special(generation, config, "bos_token_id", vocab_size)),
        eos_token_ids=tuple(_special(generation, config, "eos_token_id", vocab_size)),
        sampling=_sampling(generation),
        source=Source(
            model=folder.name,
            architecture=type(subject.base).__name__,
            rotary="inside" if subject.rotary.inside else "outside",
            versions={name: version(name) for name in ("dynamo-edge", "torch", "transformers", "onnx", "onnxruntime")},
        ),
    )
    pad = _first(_special(generation, config, "pad_token_id", vocab_size))
    write_json(staged / "genai_config.json", genai_config(bundle, int(config.hidden_size), first.heads, pad))
    return bundle


def write_tokenizer(folder: Path, staged: Path, vocab_size: int) -> int:
    """Copies the checkpoint's tokenizer, or has transformers convert an older one.

    Returns:
        Number of tokens it knows.

    Raises:
        ExportError: There is none, or it knows tokens that the model has no embedding for.
    """
    if (folder / "tokenizer.json").is_file():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staged / name)
    elif not any((folder / name).is_file() for name in OLDER_TOKENIZERS):
        raise ExportError(f"{folder} has no tokenizer.json")
    else:
        try:
            AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(staged)
        except Exception as error:  # transformers raises whatever its many tokenizers do
            raise ExportError(f"{folder} has no tokenizer.json, and none could be made from what is there") from error
    try:
        tokenizer = Tokenizer.from_file(str(staged / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ExportError(f"{folder / 'tokenizer.json'} is not a readable tokenizer: {error}") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ExportError(
            f"the tokenizer in {folder} does not match the model: it has token {largest}, the vocabulary ends at "
            f"{vocab_size - 1}"
        )
    if not (staged / "tokenizer_config.json").is_file():
        write_json(staged / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return tokenizer.get_vocab_size()


def _sampling(generation: dict[str, Any]) -> dict[str, Any]:
    """Sampling defaults: what generation_config.json says, and the runtime's (the paper's) for the rest."""
    own = {field.name: generation[field.name] for field in fields(SamplingParameters) if generation.get(field.name)}
    try:
        return asdict(SamplingParameters(**own))
    except DynamoError as error:
        raise ExportError(f"generation_config.json: {error}") from error


def _special(generation: dict[str, Any], config: Any, name: str, vocab_size: int) -> list[int]:
    """Ids of a special token, from generation_config.json or else the model's configuration."""
    found = generation.get(name)
    if found is None:
        found = getattr(config, name, None)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return [int(i) for i in ids if isinstance(i, int) and 0 <= i < vocab_size]


def _first(ids: list[int]) -> int | None:
    return ids[0] if ids else None
